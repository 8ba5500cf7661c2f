"""Messages as Kafka records: what is written, what is read of what anybody may write, and where keys go."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import confluent_kafka
import pytest

from brokerkit.address import Address, redrive_queue
from brokerkit.driver import Record
from brokerkit.drivers.kafka._records import (
    due,
    hash_of,
    headers_of,
    milliseconds,
    parse_position,
    position,
    record_of,
)
from tests.servers.kafka import shared_kafka

from .publishing import driver, kinds, record, topic

ORDERS = topic("orders")
LETTERS = ORDERS.dead_letters("g")
AGAIN = redrive_queue(ORDERS, "g")


@dataclass
class Foreign:
    """A record that somebody has written."""

    headers: Sequence[tuple[str, bytes | None]] = ()
    offset: int = 7
    timestamp: int = 1_700_000_000_123
    key: bytes | None = b"key"
    value: bytes | None = b"value"


def back(made: Record, *, timed: bool = False, address: Address = ORDERS) -> Record:
    headers = headers_of(made, timed=timed)
    return record_of(
        address, 3, Foreign(headers, timestamp=milliseconds(made.timestamp), key=made.key, value=made.body)
    )


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"key": b""},
        {"key": b"\x00\xff", "attempts": 3, "deliveries": 1_000},
        {"headers": (("a", b"1"), ("a", b""), ("bk-other", b"\xff"), ("ü", b"2"))},
        {"id": "ü/\\ 'x'", "headers": (("bk-idea", b"mine"),)},
        {"id": "i" * 200},
    ],
)
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("body", [b"", b"body", None])
def test_a_record_is_read_as_it_was_written(body: bytes | None, timed: bool, more: dict[str, Any]) -> None:
    made = record(ORDERS, body, timestamp=1_700_000_000.5, **more)
    assert back(made, timed=timed) == made


def test_a_plain_record_has_one_header_of_ours() -> None:
    assert headers_of(record(ORDERS, b"x", id="one"), timed=False) == [("bk-id", b"one")]


@pytest.mark.parametrize(
    ("at", "ms"), [(0.0, 0), (1.0004, 1000), (1.0005, 1001), (1_700_000_000.123, 1_700_000_000_123)]
)
def test_times_are_milliseconds(at: float, ms: int) -> None:
    assert milliseconds(at) == ms


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("other", b"1")],
        [("other", b"1"), ("other", None)],
        [("bk-id", None)],
        [("bk-id", b"")],
        [("bk-id", b"\xff\xfe"), ("a", b"b")],
        [("bk-id", b"x" * 201)],
        [("bk-id", b"x" * 2000)],
        [("bk-attempts", b"1")],
    ],
)
def test_a_record_without_an_id_is_called_by_its_position(headers: list[tuple[str, bytes | None]]) -> None:
    assert record_of(ORDERS, 3, Foreign(headers)).id == "orders[3]@1700000000123-7"


def test_headers_of_others_are_kept_as_they_are() -> None:
    """In order, twice, binary; a null is empty, as there is nothing else to say it with."""
    headers = [("a", b"\xff"), ("", b"2"), ("a", None), ("bk-x", b"3")]
    assert record_of(ORDERS, 0, Foreign(headers)).headers == (("a", b"\xff"), ("", b"2"), ("a", b""), ("bk-x", b"3"))
    assert record_of(ORDERS, 0, Foreign(headers[:1])).headers == (("a", b"\xff"),)
    assert record_of(ORDERS, 0, Foreign([("a", None)])).headers == (("a", b""),)


def test_of_a_header_of_ours_that_is_there_twice_the_first_counts() -> None:
    headers = [("bk-id", b"one"), ("bk-id", b"two"), ("bk-attempts", b"1"), ("bk-attempts", b"2")]
    read = record_of(ORDERS, 0, Foreign(headers))
    assert (read.id, read.attempts, read.headers) == ("one", 1, ())


@pytest.mark.parametrize(
    ("said", "believed"),
    [
        (b"3", 3), (b"1000000", 1_000_000), (b"1000001", 1_000_000), (b"9" * 15, 1_000_000), (b"9" * 16, 0),
        (b"9" * 5000, 0), (b"-1", 0), (b"", 0), (None, 0), (b"1.5", 0), (b"\xff", 0), ("²".encode(), 0), (b" 1", 0),
    ],
)  # fmt: skip
def test_counts_of_others_are_believed_within_reason(said: bytes | None, believed: int) -> None:
    read = record_of(ORDERS, 0, Foreign([("bk-attempts", said), ("bk-deliveries", said)]))
    assert (read.attempts, read.deliveries) == (believed, believed)


@pytest.mark.parametrize(
    ("ms", "seconds"), [(-1, 0.0), (0, 0.0), (-(1 << 63), 0.0), ((1 << 63) - 1, 253_402_300_799.0), (1500, 1.5)]
)
def test_times_of_others_are_times_that_python_has(ms: int, seconds: float) -> None:
    for headers in ([], [("bk-id", b"one")], [("bk-id", b"one"), ("a", b"b")]):
        assert record_of(ORDERS, 0, Foreign(headers, timestamp=ms)).timestamp == seconds
    time.gmtime(seconds)
    assert record_of(ORDERS, 0, Foreign([("bk-time", b"9" * 15), ("a", b"b")])).timestamp <= 253_402_300_799.0


def test_positions_are_read_as_they_were_written() -> None:
    assert parse_position(position("orders", 3, 17, 4), "orders") == (3, 17, 4)
    assert parse_position(position("orders", 3, -1, 4), "orders") == (3, 0, 4)
    assert parse_position(position("or[1]@2-3", 3, 17, 4), "or[1]@2-3") == (3, 17, 4)
    largest = (1 << 63) - 1
    assert parse_position(position("orders", 0, largest, largest), "orders") == (0, largest, largest)


@pytest.mark.parametrize(
    "text",
    ["", "orders", "orders[3]@17", "orders[3]@17-", "orders[x]@17-4", "other[3]@17-4", "orders[3]@17-4 ", "orders[3]@17--4",
     "orders[*]@17-4", "orders[٣]@17-4", "orders[3]@17-" + "9" * 20, "orders[" + "9" * 5000 + "]@1-1", "orders[3]@17-4\n"],
)  # fmt: skip
def test_other_texts_are_no_positions(text: str) -> None:
    assert parse_position(text, "orders") is None


def test_records_of_a_private_queue_tell_when_they_are_due() -> None:
    made = record(AGAIN, b"x", delay=1.5, timestamp=1000.0)
    headers = headers_of(made, timed=True)
    stored = Foreign(headers, timestamp=2_000_000)  # the broker's
    assert due(stored) == 2001.5
    assert record_of(AGAIN, 0, stored).timestamp == 1000.0
    assert due(Foreign(headers_of(record(AGAIN, b"x"), timed=True))) is None


@pytest.mark.parametrize("said", [None, b"", b"x", b"nan", b"inf", b"-1", b"0", b"\xff"])
def test_a_delay_that_makes_no_sense_is_none(said: bytes | None) -> None:
    assert due(Foreign([("bk-delay", said)])) is None


def test_a_delay_of_others_ends_some_day() -> None:
    assert due(Foreign([("bk-delay", b"1e300")], timestamp=0)) == 366 * 86400.0


@pytest.mark.parametrize(
    ("key", "number"),
    [(b"21", -973932308), (b"foobar", -790332482), (b"a-little-bit-long-string", -985981536),
     (b"a-little-bit-longer-string", -1486304829), (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
     (b"abc", 479470107)],
)  # fmt: skip
def test_the_hash_of_a_key_is_that_of_kafkas_own_client(key: bytes, number: int) -> None:
    """Examples of Kafka's own tests."""
    assert hash_of(key) == number & 0x7FFFFFFF


@pytest.mark.asyncio
async def test_keys_go_where_other_clients_put_them() -> None:
    """librdkafka with the partitioner that Java's client has."""
    endpoints = shared_kafka()
    to = topic(partitions=7)
    with endpoints.wire() as admin:
        admin.create(to.name, 7)
        keys = [b"", b"a", *(os.urandom(size) for size in range(1, 40))]
        theirs: dict[bytes, int] = {}

        def delivered(error: object, message: Any) -> None:
            assert error is None
            theirs[message.key() or b""] = message.partition()

        # Its murmur2_random and consistent_random take an empty key for none.
        producer = confluent_kafka.Producer({"bootstrap.servers": endpoints.bootstrap(), "partitioner": "murmur2"})
        for key in keys:
            producer.produce(to.name, b"x", key, on_delivery=delivered)
        assert producer.flush(20) == 0
        async with driver(endpoints.url()) as made:
            results: Sequence[Any] = await made.publish([record(to, b"x", key) for key in keys], timeout=10)
        assert len(set(kinds(results))) == 1
        ours = {
            key: int(result.position.partition("[")[2].partition("]")[0])
            for key, result in zip(keys, results, strict=True)
        }
        assert ours == theirs
        admin.delete([to.name])
