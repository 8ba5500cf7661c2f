"""Pieces of logs as brokers send them, made by hand."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from aiokafka.record.default_records import DefaultRecordBatchBuilder  # pyright: ignore[reportMissingTypeStubs]
from aiokafka.record.legacy_records import LegacyRecordBatchBuilder  # pyright: ignore[reportMissingTypeStubs]
from aiokafka.record.util import calc_crc32c  # pyright: ignore[reportMissingTypeStubs]

_current: Any = DefaultRecordBatchBuilder
_old: Any = LegacyRecordBatchBuilder
_crc32c: Any = calc_crc32c

TIME: Final = 1_700_000_000_000
LENGTH, EPOCH, CHECKSUM, ATTRIBUTES, LAST, COUNT = 8, 12, 17, 21, 23, 57
"""Where these are in a batch."""
CONTROL: Final = 0x20


def value(offset: int) -> bytes:
    """Return what the record at *offset* says."""
    return b"v%d" % offset


def batch(
    *offsets: int,
    epoch: int = 0,
    producer: int = -1,
    last: int | None = None,
    codec: int = 0,
    control: bool = False,
    count: int | None = None,
) -> bytes:
    """Return a batch with records at *offsets*; *last* is one that was compacted away, a *producer* makes it transactional."""
    base = offsets[0]
    builder = _current(2, codec, int(producer >= 0), producer, 0 if producer >= 0 else -1, -1, 1 << 24)
    for offset in offsets:
        assert builder.append(offset - base, TIME + offset, b"k", value(offset), [("h", b"1")]) is not None
    data = bytearray(builder.build())
    struct.pack_into(">q", data, 0, base)
    struct.pack_into(">i", data, EPOCH, epoch)
    if last is not None:
        struct.pack_into(">i", data, LAST, last - base)
    if control:
        data[ATTRIBUTES + 1] |= CONTROL
    if count is not None:
        struct.pack_into(">i", data, COUNT, count)
    return sealed(data)


def empty(base: int, last: int, *, epoch: int = 0) -> bytes:
    """Return a batch of which compaction has left the head."""
    data = bytearray(batch(base, epoch=epoch, last=last, count=0)[: COUNT + 4])
    struct.pack_into(">i", data, LENGTH, len(data) - 12)
    return sealed(data)


def sealed(data: bytearray) -> bytes:
    """Return *data* with the right checksum."""
    struct.pack_into(">I", data, CHECKSUM, _crc32c(bytes(data[ATTRIBUTES:])))
    return bytes(data)


def old(*offsets: int, form: int = 1, codec: int = 0) -> bytes:
    """Return records in a format of before Kafka 0.11; with a *codec*, one record with all of them in it."""
    builder = _old(form, codec, 1 << 20)
    for offset in offsets:
        inner = offset if form == 0 or not codec else offset - offsets[0]
        assert builder.append(inner, TIME + offset, b"k", value(offset)) is not None
    data = bytearray(builder.build())
    if codec:
        struct.pack_into(">q", data, 0, offsets[-1])
    return bytes(data)


def spoilt(data: bytes, at: int = -1) -> bytes:
    """Return *data* with one byte changed."""
    changed = bytearray(data)
    changed[at] ^= 0x40
    return bytes(changed)


@dataclass(frozen=True)
class Abort:
    """A transaction that was aborted."""

    producer_id: int
    first_offset: int


def offsets_of(records: Sequence[Any]) -> list[int]:
    """Return where *records* are, having looked at what they say."""
    for record in records:
        assert record.value == value(record.offset)
        assert record.key == b"k"
    return [record.offset for record in records]
