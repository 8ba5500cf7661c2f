"""Batches of one partition: how they are cut, and what is sent again."""

from __future__ import annotations

import asyncio

import pytest

from brokerkit.drivers.kafka._batch import BATCH, BATCH_BYTES, LAST_MOMENT, Alone, AnyEntry, Call, Lane, Producer
from brokerkit.drivers.kafka._calls import Calls

from .publishing import record, topic

pytestmark = pytest.mark.asyncio

ORDERS = topic("orders")
ME = Producer(1, 0)


def call(*bodies: bytes, deadline: float = 100.0) -> Call:
    return Call([record(ORDERS, body) for body in bodies], 0, deadline, asyncio.get_running_loop().create_future())


def lane(*calls: Call) -> Lane:
    made = Lane("orders", 0, "topic", None)
    made.producer = ME
    for each in calls:
        made.pending.extend(each.entries)
    return made


def bodies(made: Lane, now: float = 0.0) -> list[bytes | None]:
    """Return what is sent next."""
    batch = made.first(now, drop)
    return [] if batch is None else [entry.record.body for entry in batch.entries]


def drop(entry: AnyEntry) -> None:
    assert not entry.open


async def test_a_batch_is_full_at_a_number_of_records_and_of_bytes() -> None:
    many = lane(call(*[b""] * (2 * BATCH + 1)))
    for count in (BATCH, BATCH, 1):
        assert len(bodies(many)) == count
        many.stored()
    assert bodies(many) == []
    large = lane(call(b"1" * 1000, b"2" * BATCH_BYTES * 2, b"3" * 1000, b"4" * 1000))
    sizes: list[list[int]] = []
    while sent := bodies(large):
        sizes.append([len(body or b"") for body in sent])
        large.stored()
    assert sizes == [[1000], [BATCH_BYTES * 2], [1000, 1000]]


async def test_entries_that_nobody_waits_for_are_not_sent() -> None:
    one, two, three = call(b"a", b"b"), call(b"c"), call(b"d")
    two.future.cancel()
    made = lane(one, two, three)
    assert bodies(made) == [b"a", b"b", b"d"]
    three.future.cancel()
    assert bodies(made) == [b"a", b"b"]


async def test_what_is_in_doubt_is_sent_as_it_was_or_given_up() -> None:
    one, two = call(b"a"), call(b"b")
    made = lane(one, two)
    batch = made.first(0.0, drop)
    assert batch is not None
    batch.number(ME, 5, 0, "topic")
    before = batch.data
    batch.doubtful = True
    one.future.cancel()
    assert bodies(made) == [b"a", b"b"]
    batch.number(ME, 6, 0, "topic")
    assert (batch.data, batch.sequence) == (before, 5)
    two.future.cancel()
    assert bodies(made) == []
    assert (made.producer, made.lost) == (None, ME)
    assert not made.takes(ME)
    assert made.takes(Producer(2, 0))


async def test_what_was_refused_is_not_sent_again_in_its_last_moment() -> None:
    """It waits for its deadline elsewhere, and is certainly not stored."""
    short, long = call(b"a", deadline=10.0), call(b"b", deadline=20.0)
    made = lane(short, long)
    batch = made.first(9.99, drop)
    assert batch is not None
    assert len(batch.entries) == 2, "the first time it is worth a try"
    batch.number(ME, 0, 0, "topic")
    assert bodies(made, 9.9) == [b"a", b"b"]
    assert bodies(made, 10.0 - LAST_MOMENT / 2) == [b"b"]
    (entry,) = short.entries
    assert entry.open
    assert not entry.doubtful


async def test_a_batch_that_is_split_is_sent_in_order() -> None:
    made = lane(call(b"a", b"b", b"c"), call(b"d"))
    sent: list[bytes | None] = []
    while now := bodies(made):
        if len(now) > 1:
            made.split()
        else:
            sent += now
            made.stored()
    assert sent == [b"a", b"b", b"c", b"d"]
    assert made.sequence == 4


async def test_what_is_swept_is_what_nobody_waits_for() -> None:
    dropped: list[AnyEntry] = []
    calls = [call(b"%d" % number) for number in range(3000)]
    made = lane(*calls)
    for each in calls[:10] + calls[1000:]:
        each.future.cancel()
    made.sweep(dropped.append)
    assert [entry.record.body for entry in made.pending] == [b"%d" % number for number in range(10, 1000)]
    assert len(dropped) == 2010
    calls[500].future.cancel()
    made.sweep(dropped.append)
    assert len(made.pending) == 990, "all of it is looked at only when it has doubled"
    calls[10].future.cancel()
    made.sweep(dropped.append)
    assert len(made.pending) == 989
    for each in calls[10:1000]:
        each.future.cancel()
    made.sweep(dropped.append)
    assert not made.pending


async def test_calls_fail_at_their_deadlines_and_not_all_in_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an outage there may be hundreds of thousands."""
    monkeypatch.setattr("brokerkit.drivers.kafka._calls._MOST", 10)
    turns: list[int] = []
    loop = asyncio.get_running_loop()
    made: list[Alone] = []
    calls = Calls("kafka://nowhere", lambda: turns.append(sum(each.future.done() for each in made)))
    began = loop.time()
    for number in range(50):
        one = calls.add_one(record(ORDERS, b"x"), began + (0.1 if number % 2 else 1.0))
        assert one is not None
        made.append(one)
    short, long = made[1::2], made[::2]
    await asyncio.gather(*(each.future for each in short))
    assert 0.1 <= loop.time() - began < 1.0
    assert turns == [10, 20, 25]
    assert not any(each.future.done() for each in long)
    await asyncio.gather(*(each.future for each in long))
    assert loop.time() - began >= 1.0
    assert turns == [10, 20, 25, 35, 45, 50]
    assert not calls.waiting
    calls.close()
