"""Queues of the memory driver: what the conformance suite cannot see from outside, and its own limits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from brokerkit import clock
from brokerkit.address import AnyQueue, Queue, internal
from brokerkit.driver import Backlog, Delivery, Record, Settlement, Source, StoredRecord
from brokerkit.errors import BufferFull, DeliveryLost, NotFound, TooLarge
from brokerkit.events import Event, Expired
from brokerkit.policy import MAX_BODY, MAX_DELAY

from .memory_driver import consuming, done, ids, names, opened, put, rest, results, run, settled, take, turns

LEASE = 30.0
JOBS: AnyQueue = Queue("jobs", bytes, lease=LEASE)


# ---------------------------------------------------------------------- priority, delay, ttl, dedup


def test_higher_priorities_come_first_and_others_are_the_nearest_level() -> None:
    queue: AnyQueue = Queue("ranked", bytes, priorities=3)

    async def main() -> None:
        async with opened(queue) as made, consuming(made, queue) as consumer:
            for number, priority in enumerate((0, 2, 1, 9, -5, 2)):
                await put(made, queue, [f"{priority}/{number}"], priority=priority)
            got = await take(consumer, 6)
            assert ids(got) == ["2/1", "9/3", "2/5", "1/2", "0/0", "-5/4"]
            await consumer.release(got)
            assert ids(await take(consumer, 6)) == ids(got), "released ones keep their places"

    run(main)


def test_ten_thousand_of_the_same_time_come_at_that_time_in_their_order() -> None:
    async def main() -> None:
        async with opened(JOBS) as made, consuming(made, JOBS, prefetch=20_000) as consumer:
            loop = asyncio.get_running_loop()
            await put(made, JOBS, names(10_000), delay=7.5)
            await put(made, JOBS, ["long"], delay=MAX_DELAY)
            await put(made, JOBS, ["short"], delay=0.25)
            began = loop.time()
            assert ids(await consumer.receive(10, 10)) == ["short"]
            assert loop.time() == pytest.approx(began + 0.25)
            assert ids(await take(consumer, 10_000, within=10)) == names(10_000)
            assert loop.time() == pytest.approx(began + 7.5)
            assert await made.purge(JOBS) == 1

    run(main)


def test_the_wall_clock_moves_neither_delays_nor_leases_nor_expiries(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened(JOBS, url="memory://wall") as made, consuming(made, JOBS) as consumer:
            loop, here = asyncio.get_running_loop(), clock.current()
            began = loop.time()
            await put(made, JOBS, ["late"], delay=10)
            await put(made, JOBS, ["short"], ttl=20)
            real = here.time
            monkeypatch.setattr(here, "time", lambda: real() + 3600)
            assert ids(await take(consumer, 1)) == ["short"]
            monkeypatch.setattr(here, "time", lambda: real() - 3600)
            assert ids(await take(consumer, 1, within=20)) == ["late"]
            assert loop.time() == pytest.approx(began + 10)

    run(main)


def test_what_expires_is_dropped_told_and_not_counted() -> None:
    told: list[Event] = []

    async def main() -> None:
        async with opened(JOBS, emit=told.append, max_messages=4) as made, consuming(made, JOBS) as consumer:
            await put(made, JOBS, ["a", "b"], ttl=5)
            await put(made, JOBS, ["c"], ttl=5, delay=2)
            (accepted,) = await made.browse(JOBS, limit=1)
            assert accepted.record.expires == pytest.approx(clock.current().time() + 5)
            (a,) = await consumer.receive(1, 1)
            assert a.record.expires == accepted.record.expires
            await put(made, JOBS, ["d"])
            assert await results(made, JOBS, ["e"]) == [BufferFull]
            await asyncio.sleep(5)
            assert ids(await made.browse(JOBS, limit=10)) == ["a", "d"], "in flight it may finish"
            assert await results(made, JOBS, ["e", "f"]) == [None, None], "the expired made room"
            assert told == []
            await consumer.release([a])
            assert ids(await consumer.receive(10, 1)) == ["d", "e", "f"]
            assert sum(event.count for event in told if isinstance(event, Expired)) == 3
            assert (await made.backlog(Source(JOBS))).in_flight == 3

    run(main)


def test_a_copy_keeps_the_expiry_and_a_backlog_tells_of_the_expired() -> None:
    told: list[Event] = []

    async def main() -> None:
        async with opened(JOBS, emit=told.append) as made, consuming(made, JOBS) as consumer:
            await put(made, JOBS, ["a"], ttl=5)
            (a,) = await take(consumer, 1)
            record = a.record
            copy = Record(JOBS, "a", record.body, ttl=record.ttl, expires=record.expires, delay=3)
            assert await consumer.settle([Settlement(a, (copy,))]) == [None]
            await asyncio.sleep(4)
            (again,) = await take(consumer, 1)
            assert again.record.expires == record.expires
            await consumer.release([again])
            await asyncio.sleep(1)
            backlog = await made.backlog(Source(JOBS))
            assert backlog == Backlog(waiting=0, in_flight=0, delayed=0, dead=0, oldest_age=None)
            assert told == [Expired(address="jobs", count=1)]

    run(main)


def test_what_expired_behind_others_leaves_its_room() -> None:
    told: list[Event] = []

    async def main() -> None:
        async with opened(JOBS, emit=told.append, max_messages=3) as made, consuming(made, JOBS) as consumer:
            await put(made, JOBS, ["a"])
            await put(made, JOBS, ["b"], ttl=5)
            await put(made, JOBS, ["c"])
            await asyncio.sleep(5)
            assert ids(await consumer.receive(10, 1)) == ["a", "c"]
            assert told == [Expired(address="jobs", count=1)]
            assert await results(made, JOBS, ["d", "e"]) == [None, BufferFull]

    run(main)


def test_an_expired_suspect_keeps_nobody_waiting() -> None:
    async def main() -> None:
        async with opened(JOBS) as made, consuming(made, JOBS) as consumer:
            await put(made, JOBS, ["bad"], deliveries=5, ttl=5)
            await put(made, JOBS, ["good"])
            await asyncio.sleep(5)
            assert ids(await consumer.receive(10, 1)) == ["good"]

    run(main)


def test_dedup_is_a_window_from_the_first_copy_that_was_stored() -> None:
    queue: AnyQueue = Queue("once", bytes, dedup=10)

    async def main() -> None:
        async with opened(queue, max_messages=2) as made, consuming(made, queue) as consumer:
            (first,) = await put(made, queue, ["a"])
            assert not first.duplicate
            await asyncio.sleep(9)
            assert [receipt.duplicate for receipt in await put(made, queue, ["a", "b"])] == [True, False]
            assert await results(made, queue, ["c"]) == [BufferFull]
            assert [receipt.duplicate for receipt in await put(made, queue, ["b"])] == [True], "also while it is full"
            got = await take(consumer, 2)
            await done(consumer, got[1])
            assert [receipt.duplicate for receipt in await put(made, queue, ["c"])] == [False], "c was never stored"
            assert await consumer.settle([Settlement(got[0], (Record(queue, "a", b"again"),))]) == [None]
            await asyncio.sleep(1)
            assert ids(await rest(consumer)) == ["c", "a"]
            assert [receipt.duplicate for receipt in await put(made, queue, ["a"])] == [False]
            assert [receipt.duplicate for receipt in await put(made, queue, ["b"])] == [True]

    run(main)


def test_a_dedup_window_is_bounded() -> None:
    queue: AnyQueue = Queue("once", bytes, dedup=10)

    async def main() -> None:
        async with opened(queue, max_messages=2) as made, consuming(made, queue) as consumer:
            for number in range(20):
                await put(made, queue, [f"m{number}"])
                await rest(consumer)
            assert await results(made, queue, ["m20"]) == [BufferFull]
            await asyncio.sleep(10)
            await put(made, queue, ["m20"])

    run(main)


# ---------------------------------------------------------------------- limits and looking


def test_a_full_queue_refuses_publishes_and_never_copies() -> None:
    async def main() -> None:
        async with opened(JOBS, max_messages=3) as made, consuming(made, JOBS) as consumer:
            assert await results(made, JOBS, names(4)) == [None, None, None, BufferFull]
            (one,) = await consumer.receive(1, 1)
            assert await results(made, JOBS, ["x"]) == [BufferFull], "what is in flight is still there"
            copies = (
                Record(JOBS, "copy", b""),
                Record(JOBS.dead_letters, "m0", b""),
                Record(JOBS, "late", b"", delay=9),
            )
            assert await consumer.settle([Settlement(one, copies)]) == [None]
            backlog = await made.backlog(Source(JOBS))
            assert (backlog.waiting, backlog.in_flight, backlog.delayed, backlog.dead) == (3, 0, 1, 1)
            await rest(consumer)
            assert await results(made, JOBS, names(3)) == [None, None, BufferFull]

    run(main)


def test_a_body_over_the_limit_is_refused_and_one_at_the_limit_is_not() -> None:
    async def main() -> None:
        async with opened(JOBS) as made, consuming(made, JOBS) as consumer:
            sizes = (MAX_BODY - 1, MAX_BODY, MAX_BODY + 1)
            found = await made.publish([Record(JOBS, str(size), bytes(size)) for size in sizes], timeout=1)
            assert [isinstance(result, TooLarge) for result in found] == [False, False, True]
            (one, _) = await take(consumer, 2)
            for address in (JOBS, JOBS.dead_letters):
                copies = (Record(JOBS, "fine", b""), Record(address, "huge", bytes(MAX_BODY + 1)))
                (result,) = await consumer.settle([Settlement(one, copies)])
                assert isinstance(result, TooLarge)
                (letter,) = await made.publish([Record(JOBS.dead_letters, "huge", bytes(MAX_BODY + 1))], timeout=1)
                assert isinstance(letter, TooLarge)
            assert not await consumer.receive(10, 1), "nothing of it was stored"
            await done(consumer, one)

    run(main)


def test_positions_tell_the_queue_and_are_never_used_again() -> None:
    async def main() -> None:
        async with opened(JOBS) as made, consuming(made, JOBS) as consumer:
            assert [receipt.position for receipt in await put(made, JOBS, names(2))] == ["jobs@1", "jobs@2"]
            got = await take(consumer, 2)
            await consumer.release(got)
            assert [d.position for d in await rest(consumer)] == ["jobs@1", "jobs@2"]
            await put(made, JOBS, ["x"], delay=5)
            await made.purge(JOBS)
            assert [receipt.position for receipt in await put(made, JOBS, ["a"])] == ["jobs@4"]

    run(main)


def test_browsing_shows_all_that_is_stored_in_pages() -> None:
    async def main() -> None:
        async with opened(JOBS) as made, consuming(made, JOBS) as consumer:
            await put(made, JOBS, names(4))
            await put(made, JOBS, ["late"], delay=9)
            await put(made, JOBS, ["bad"], deliveries=4)
            held = await consumer.receive(1, 0)
            assert ids(held) == ["bad"]
            pages: list[StoredRecord] = []
            while page := await made.browse(JOBS, limit=2, after=pages[-1].position if pages else None):
                assert len(page) == 2
                pages += page
            assert ids(pages) == ["m0", "m1", "m2", "m3", "late", "bad"]
            assert [stored.deliveries for stored in pages] == [0, 0, 0, 0, 0, 5]

    run(main)


def test_the_oldest_age_is_that_of_the_oldest_wherever_it_is() -> None:
    async def main() -> None:
        async with opened(JOBS) as made, consuming(made, JOBS) as consumer:
            now = clock.current().time()
            await put(made, JOBS, ["new"], timestamp=now - 1)
            await put(made, JOBS, ["old"], timestamp=now - 50, delay=10)
            assert (await made.backlog(Source(JOBS))).oldest_age == pytest.approx(50)
            await put(made, JOBS, ["oldest"], timestamp=now - 90)
            await rest(consumer)
            assert (await made.backlog(Source(JOBS))).oldest_age == pytest.approx(50)
            await put(made, JOBS, ["ahead"], timestamp=now + 90)
            await made.purge(JOBS)
            assert (await made.backlog(Source(JOBS))).oldest_age is None

    run(main)


# ---------------------------------------------------------------------- ownership


def test_leaving_puts_everything_back_in_its_place() -> None:
    async def main() -> None:
        async with opened(JOBS) as made:
            await put(made, JOBS, names(6))
            async with consuming(made, JOBS) as one:
                got = await take(one, 4)
                await done(one, got[1])
            async with consuming(made, JOBS) as two:
                again = await take(two, 5)
                assert [(d.record.id, d.deliveries) for d in again] == [(f"m{n}", 1) for n in (0, 2, 3, 4, 5)]
                assert await settled(one, got[0], got[1]) == [DeliveryLost, None]
                assert await settled(two, got[0]) == [DeliveryLost]
                await two.release(got)
                assert await settled(two, *again) == [None] * 5

    run(main)


def test_a_token_of_something_else_is_no_delivery() -> None:
    async def main() -> None:
        async with opened(JOBS) as made, consuming(made, JOBS) as consumer:
            await put(made, JOBS, ["a"])
            (a,) = await take(consumer, 1)
            for token in (None, 1, "jobs@1"):
                alien = Delivery(a.record, token, a.position, 1)
                assert await settled(consumer, alien) == [DeliveryLost]
                await consumer.release([alien])
            assert await settled(consumer, a) == [None]

    run(main)


def test_a_consumer_of_a_deleted_queue_is_told() -> None:
    async def main() -> None:
        async with opened(JOBS) as made, consuming(made, JOBS) as consumer, consuming(made, JOBS) as idle:
            await put(made, JOBS, ["a", "b"])
            got = await take(consumer, 2)
            waiting = asyncio.ensure_future(idle.receive(1, 50))
            await turns()
            await made.delete(JOBS)
            with pytest.raises(NotFound, match="jobs was deleted"):
                await waiting
            with pytest.raises(NotFound):
                await consumer.receive(1, 0)
            assert await settled(consumer, *got) == [DeliveryLost] * 2
            assert not (await made.health()).ok
            await made.declare(JOBS)
            await put(made, JOBS, ["c"])
            with pytest.raises(NotFound):
                await consumer.receive(1, 0)
            async with consuming(made, JOBS) as fresh:
                assert ids(await rest(fresh)) == ["c"]

    run(main)


def test_a_frozen_consumer_of_a_deleted_queue_is_told_when_it_thaws() -> None:
    async def main() -> None:
        async with opened(JOBS, url="memory://gone") as made, opened(url="memory://gone") as other:
            await put(made, JOBS, ["a"])
            async with consuming(other, JOBS) as consumer:
                await take(consumer, 1)
                other.faults.freeze()
                await asyncio.sleep(LEASE)
                await made.delete(JOBS)
                other.faults.thaw()
                with pytest.raises(NotFound):
                    await consumer.receive(1, 1)

    run(main)


def test_a_derived_queue_needs_no_declaration_for_copies_and_readers() -> None:
    again: Any = JOBS._named(internal("orders", "billing", "again"))
    again2: Any = JOBS._named(internal("orders", "audit", "again"))

    async def main() -> None:
        async with opened(JOBS) as made, consuming(made, JOBS) as consumer:
            assert await results(made, again, ["x"]) == [NotFound]
            await put(made, JOBS, ["a"])
            (a,) = await take(consumer, 1)
            assert await consumer.settle([Settlement(a, (Record(again, "a", b""),))]) == [None]
            async with consuming(made, again) as reader:
                assert ids(await rest(reader)) == ["a"]
            async with consuming(made, again2) as reader:
                assert not await reader.receive(1, 0)
            missing: Any = Queue("missing", bytes)
            await put(made, JOBS, ["b"])
            (b,) = await take(consumer, 1)
            (result,) = await consumer.settle([Settlement(b, (Record(again, "no", b""), Record(missing, "no", b"")))])
            assert isinstance(result, NotFound)
            assert await made.browse(again, limit=10) == []
            with pytest.raises(NotFound):
                async with consuming(made, missing):
                    raise AssertionError("it was never declared")

    run(main)
