"""Batches that are compressed, as clients write them and as nobody should."""

from __future__ import annotations

import struct
import sys
import tracemalloc
import zlib
from typing import Any, cast

import cramjam
import pytest
from aiokafka.record.default_records import (  # pyright: ignore[reportMissingTypeStubs]
    DefaultRecordBatch,
    DefaultRecordBatchBuilder,
)

from brokerkit.drivers.kafka._inflate import inflated
from brokerkit.errors import BrokerError, ConfigError, TooLarge

CODECS = {"gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
HEAD = 61


def batch(codec: int, *values: bytes) -> bytes:
    """Return a batch, compressed as aiokafka does it."""
    kind: Any = DefaultRecordBatchBuilder
    builder = kind(
        magic=2, compression_type=codec, is_transactional=0, producer_id=-1, producer_epoch=-1, base_sequence=-1,
        batch_size=1 << 30,
    )  # fmt: skip
    for offset, value in enumerate(values):
        builder.append(offset, 1000 + offset, b"key", value, [("name", b"header")])
    return bytes(builder.build())


def packed(codec: int, records: bytes) -> memoryview:
    """Return a batch with these bytes as its compressed records."""
    made = bytearray(batch(0, b"value")[:HEAD] + records)
    struct.pack_into(">h", made, 21, codec)
    return memoryview(made)


def values(data: memoryview) -> list[bytes]:
    """Return what aiokafka reads."""
    kind: Any = DefaultRecordBatch
    return [record.value for record in kind(data)]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [b"", b"x" * 10, b"0123456789" * 50_000, bytes(3_000_000)])
def test_what_comes_out_is_what_went_in(name: str, value: bytes) -> None:
    data = memoryview(batch(CODECS[name], value, b"second"))
    out = inflated(data, "orders[0]")
    assert values(out) == [value, b"second"]
    assert len(out) == len(inflated(out, "orders[0]"))
    (length,) = struct.unpack_from(">i", out, 8)
    assert length == len(out) - 12


def test_what_is_not_compressed_stays_as_it_is() -> None:
    data = memoryview(batch(0, b"value"))
    assert inflated(data, "orders[0]") is data


def test_java_writes_snappy_in_one_block_or_many() -> None:
    records = batch(0, b"x" * 100_000)[HEAD:]
    blocks = [bytes(cramjam.snappy.compress_raw(records[at : at + 32768])) for at in range(0, len(records), 32768)]
    stream = b"\x82SNAPPY\0" + struct.pack(">ii", 1, 1) + b"".join(struct.pack(">i", len(b)) + b for b in blocks)
    for form in (bytes(cramjam.snappy.compress_raw(records)), stream):
        assert bytes(inflated(packed(2, form), "orders[0]")[HEAD:]) == records


def test_gzip_may_have_several_members() -> None:
    def member(data: bytes) -> bytes:
        stream = zlib.compressobj(wbits=31)
        return stream.compress(data) + stream.flush()

    assert bytes(inflated(packed(1, member(b"one") + member(b"two")), "orders[0]")[HEAD:]) == b"onetwo"


@pytest.mark.parametrize("name", CODECS)
def test_there_is_a_limit(name: str) -> None:
    data = memoryview(batch(CODECS[name], bytes(30_000_000)))
    assert len(data) < 3_000_000
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match=rf"^orders\[0\] inflates to more than 1000000 bytes by {name}$"):
            inflated(data, "orders[0]", most=1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
    finally:
        tracemalloc.stop()
    size = len(inflated(data, "orders[0]"))
    assert len(inflated(data, "orders[0]", most=size)) == size
    with pytest.raises(TooLarge):
        inflated(data, "orders[0]", most=size - 1)


@pytest.mark.parametrize("name", CODECS)
def test_what_is_damaged_is_said(name: str) -> None:
    whole = batch(CODECS[name], b"0123456789" * 1000)
    for data in (whole[:HEAD] + b"\1\2\3\4" * 10, whole[:-5], whole[:HEAD] + b"\xff" * 30):
        with pytest.raises(BrokerError, match=rf"^orders\[0\] (cannot be inflated|inflates to more) .*{name}"):
            inflated(memoryview(data), "orders[0]")
    with pytest.raises(BrokerError, match=r"nobody knows \(5\)"):
        inflated(packed(5, b"data"), "orders[0]")


@pytest.mark.parametrize("size", [0, -1, -(2**31), 100, 2**31 - 1])
def test_blocks_of_snappy_that_make_no_sense(size: int) -> None:
    stream = b"\x82SNAPPY\0" + struct.pack(">iii", 1, 1, size) + b"data"
    with pytest.raises(BrokerError, match="makes no sense"):
        inflated(packed(2, stream), "orders[0]")


@pytest.mark.parametrize("name", ["snappy", "lz4", "zstd"])
def test_without_cramjam_it_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = memoryview(batch(CODECS[name], b"value"))
    monkeypatch.setitem(sys.modules, "cramjam", cast("Any", None))
    with pytest.raises(ConfigError, match=rf"orders\[0\] is compressed by {name}: pip install 'brokerkit\[kafka\]'"):
        inflated(data, "orders[0]")
