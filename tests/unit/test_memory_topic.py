"""Topics of the memory driver: suspects, the window, retention and capacity."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from brokerkit import clock
from brokerkit.address import AnyTopic, Topic, reply_topic
from brokerkit.driver import Backlog, Consumer, Delivery, Record, Settlement, Source
from brokerkit.drivers.memory import MemoryDriver
from brokerkit.drivers.memory._readers import TopicConsumer
from brokerkit.errors import BufferFull, DeliveryLost, PositionLost
from brokerkit.events import Event, PartitionPaused, PartitionResumed
from brokerkit.policy import LOG_AHEAD, LOG_WINDOW, Start

from .memory_driver import consuming, done, ids, names, opened, put, rest, results, run, settled, take, turns

SESSION = 10.0
ORDERS: AnyTopic = Topic("orders", bytes, partitions=4)
LINE: AnyTopic = Topic("line", bytes, partitions=1)


def owned(consumer: Consumer) -> set[int]:
    assert isinstance(consumer, TopicConsumer)
    return set(consumer._member.claims)


async def one_each(made: MemoryDriver, topic: AnyTopic = ORDERS) -> None:
    """Publish one record to each partition."""
    receipts = await put(made, topic, names(topic.partitions))
    assert len({receipt.position for receipt in receipts}) == topic.partitions


# ---------------------------------------------------------------------- alone, held, the window


def test_a_suspect_of_one_partition_waits_for_an_empty_hand_though_others_have_plenty() -> None:
    async def main() -> None:
        async with opened(ORDERS, url="memory://plenty", session=1) as made:
            await one_each(made)
            for _ in range(2):
                async with opened(url="memory://plenty", session=1) as doomed, consuming(doomed, ORDERS) as dying:
                    await take(dying, 4)
                    doomed.faults.cut()
                    await asyncio.sleep(1)
            await put(made, ORDERS, names(40, "new"))
            async with consuming(made, ORDERS) as consumer:
                seen: list[str] = []
                alone = 0
                while len(seen) < 44:
                    got = await consumer.receive(5, 1)
                    assert got
                    if any(d.deliveries >= 3 for d in got):
                        alone += 1
                        assert len(got) == 1
                        assert not await consumer.receive(5, 0), "nothing beside a suspect"
                    else:
                        more = await consumer.receive(1, 0)
                        assert all(d.deliveries < 3 for d in more), "no suspect beside others"
                        got = [*got, *more]
                    seen += ids(got)
                    await done(consumer, *got)
                assert alone == 4
                assert sorted(seen) == sorted([*names(4), *names(40, "new")])

    run(main)


def test_a_suspect_comes_as_soon_as_the_hand_is_empty_whatever_happened_meanwhile() -> None:
    async def main() -> None:
        async with opened(ORDERS) as made, consuming(made, ORDERS) as consumer:
            await put(made, ORDERS, ["a"], key=b"key0")
            await put(made, ORDERS, ["bad"], key=b"key0", deliveries=2)
            held = await take(consumer, 1)
            waiting = asyncio.ensure_future(consumer.receive(9, 50))
            for other in (b"key1", b"key4", b"key5"):
                await turns()
                await put(made, ORDERS, ["other"], key=other)
            await turns()
            assert not waiting.done()
            await done(consumer, *held)
            assert ids(await asyncio.wait_for(waiting, 1)) == ["bad"]

    run(main)


def test_a_suspect_that_moves_away_holds_nobody_up() -> None:
    async def main() -> None:
        async with opened(ORDERS) as made, consuming(made, ORDERS, prefetch=2) as first:
            await put(made, ORDERS, names(4), deliveries=2)
            (suspect,) = await first.receive(10, 1)
            waiting = asyncio.ensure_future(first.receive(10, 5))
            await turns()
            assert not waiting.done()
            async with consuming(made, ORDERS) as second:
                await turns()
                both = [owned(first), owned(second)]
                assert sorted(map(len, both)) == [2, 2]
                if int(suspect.position[7]) not in owned(first):
                    assert len(await waiting) == 1
                else:
                    await done(first, suspect)
                    assert len(await waiting) == 1
                assert len(await second.receive(10, 1)) == 1

    run(main)


def test_a_record_that_came_with_deliveries_comes_alone() -> None:
    async def main() -> None:
        async with opened(LINE) as made, consuming(made, LINE) as consumer:
            await put(made, LINE, ["a"])
            await put(made, LINE, ["bad"], deliveries=2)
            await put(made, LINE, ["b"])
            for expected in (["a"], ["bad"], ["b"]):
                got = await consumer.receive(10, 1)
                assert ids(got) == expected
                assert not await consumer.receive(10, 0) or expected == ["b"]
                await done(consumer, *got)

    run(main)


def test_what_waits_again_comes_in_pieces_as_it_is_asked_for() -> None:
    async def main() -> None:
        async with opened(LINE) as made, consuming(made, LINE) as consumer:
            await put(made, LINE, names(10))
            await consumer.release(await take(consumer, 10))
            pieces = [ids(await consumer.receive(3, 0)) for _ in range(5)]
            assert pieces == [["m0", "m1", "m2"], ["m3", "m4", "m5"], ["m6", "m7", "m8"], ["m9"], []]

    run(main)


def test_a_reader_without_credit_goes_on_when_something_is_settled() -> None:
    async def main() -> None:
        async with opened(LINE) as made, consuming(made, LINE, prefetch=2) as consumer:
            await put(made, LINE, names(4))
            for how in ("settle", "release", "prefetch"):
                held = await take(consumer, 2)
                waiting = asyncio.ensure_future(consumer.receive(1, 50))
                await turns()
                assert not waiting.done()
                if how == "settle":
                    await done(consumer, held[0])
                elif how == "release":
                    await consumer.release(held[:1])
                else:
                    consumer.prefetch = 3
                (got,) = await asyncio.wait_for(waiting, 1)
                await consumer.release([*held, got])

    run(main)


def test_attempts_are_kept_for_whoever_is_next_and_lost_ones_are_not_held() -> None:
    async def main() -> None:
        async with opened(LINE, url="memory://hold") as made, opened(url="memory://hold") as doomed:
            await put(made, LINE, ["a", "b", "c"])
            async with consuming(doomed, LINE) as dying:
                a, b, c = await take(dying, 3)
                await dying.hold(a, 2)
                await dying.hold(a, 3)
                await dying.hold(c, 1)
                await done(dying, b)
                await dying.hold(b, 7)  # settled: nothing to keep, and no error
                await dying.release([c])
                with pytest.raises(DeliveryLost):
                    await dying.hold(c, 5)
                doomed.faults.cut()
            await asyncio.sleep(SESSION)
            async with consuming(made, LINE) as consumer:
                got = await take(consumer, 2)
                assert [(d.record.id, d.record.attempts, d.deliveries) for d in got] == [("a", 3, 2), ("c", 1, 1)]
                assert (await made.browse(LINE, limit=1))[0].record.attempts == 0

    run(main)


def test_a_partition_stands_when_its_oldest_is_too_far_behind() -> None:
    told: list[Event] = []

    async def main() -> None:
        async with opened(ORDERS, emit=told.append) as made, consuming(made, ORDERS, prefetch=10_000) as consumer:
            await put(made, ORDERS, names(LOG_AHEAD + 5), key=b"key0")
            await put(made, ORDERS, ["other"], key=b"key1")
            got = await take(consumer, LOG_AHEAD + 1)
            oldest, *others = [d for d in got if d.record.id != "other"]
            assert not await consumer.receive(10, 1)
            paused = PartitionPaused(address="orders", group="workers", partition=2)
            assert told == [paused]
            await done(consumer, *others)
            assert not await consumer.receive(10, 1)
            await put(made, ORDERS, ["more"], key=b"key1")
            assert ids(await consumer.receive(10, 1)) == ["more"], "the other partitions go on"
            assert told == [paused]
            waiting = asyncio.ensure_future(consumer.receive(10, 5))
            await turns()
            await done(consumer, oldest)
            assert ids(await waiting) == [f"m{LOG_AHEAD + n}" for n in range(5)]
            assert told == [paused, PartitionResumed(address="orders", group="workers", partition=2)]

    run(main)


# ---------------------------------------------------------------------- retention


def test_what_is_too_old_is_removed_and_reported_once() -> None:
    topic: AnyTopic = Topic("brief", bytes, partitions=2, retention=100)

    async def main() -> None:
        async with opened(topic) as made, consuming(made, topic) as consumer:
            await put(made, topic, names(4, "old"))
            (held,) = await consumer.receive(1, 1)
            await asyncio.sleep(99)
            assert len(await made.browse(topic, limit=10)) == 4
            await asyncio.sleep(1)
            assert await made.browse(topic, limit=10) == []
            await put(made, topic, names(4, "new"))
            lost = 0
            got: list[Delivery] = []
            for _ in range(4):
                try:
                    got += await consumer.receive(10, 0)
                except PositionLost as error:
                    lost += error.lost or 0
            assert (lost, sorted(ids(got))) == (3, names(4, "new"))
            await done(consumer, held, *got)
            async with consuming(made, topic, "late") as late:
                assert sorted(ids(await rest(late))) == names(4, "new"), "a new group has lost nothing"

    run(main)


def test_records_are_removed_though_nobody_publishes_or_reads() -> None:
    topic: AnyTopic = Topic("brief", bytes, partitions=1, retention=100)

    async def main() -> None:
        async with opened(topic) as made:
            (first, *_) = await put(made, topic, names(4))
            assert first.position == "brief[0]@0"
            async with consuming(made, topic):
                pass
            await asyncio.sleep(100)
            backlog = await made.backlog(Source(topic, "workers"))
            assert backlog == Backlog(waiting=0, in_flight=0, delayed=0, dead=0, oldest_age=None)
            with pytest.raises(PositionLost) as caught:
                await made.seek(Source(topic, "workers", Start.position("brief[0]@1")))
            assert caught.value.lost == 3
            async with consuming(made, topic) as consumer:
                with pytest.raises(PositionLost):
                    await consumer.receive(1, 1)
                waiting = asyncio.ensure_future(consumer.receive(1, 5))
                await turns()
                await put(made, topic, ["new"])
                assert ids(await waiting) == ["new"]

    run(main)


def test_publishing_alone_removes_what_is_too_old() -> None:
    topic: AnyTopic = Topic("brief", bytes, partitions=2, retention=100)

    async def main() -> None:
        async with opened(topic, max_messages=8) as made:
            store = made.server.topic(topic)
            for _ in range(5):
                await put(made, topic, names(4))
                await asyncio.sleep(60)
                assert sum(len(partition.entries) for partition in store.partitions) <= 8

    run(main)


def test_released_records_that_retention_removed_are_reported_too() -> None:
    topic: AnyTopic = Topic("brief", bytes, partitions=1, retention=100)

    async def main() -> None:
        async with opened(topic) as made, consuming(made, topic) as consumer:
            await put(made, topic, names(4))
            got = await take(consumer, 4)
            await consumer.release(got[2:])
            await asyncio.sleep(100)
            with pytest.raises(PositionLost) as caught:
                await consumer.receive(1, 1)
            assert caught.value.lost == 2
            await done(consumer, *got[:2])
            assert await settled(consumer, got[2]) == [DeliveryLost]

    run(main)


def test_a_gap_wider_than_the_window_is_reported_piece_by_piece() -> None:
    topic: AnyTopic = Topic("brief", bytes, partitions=1, retention=100)
    count = LOG_WINDOW + 1000

    async def main() -> None:
        async with opened(topic) as made, consuming(made, topic, prefetch=10) as consumer:
            await put(made, topic, names(count))
            (held,) = await consumer.receive(1, 1)
            await asyncio.sleep(100)
            with pytest.raises(PositionLost) as first:
                await consumer.receive(1, 1)
            assert first.value.lost == LOG_WINDOW - 1
            waiting = asyncio.ensure_future(consumer.receive(1, 50))
            await turns()
            assert not waiting.done(), "the rest cannot be noted before the oldest is settled"
            await done(consumer, held)
            with pytest.raises(PositionLost) as rest_:
                await waiting
            assert 1 + LOG_WINDOW - 1 + (rest_.value.lost or 0) == count
            await put(made, topic, ["new"])
            assert ids(await consumer.receive(9, 1)) == ["new"]

    run(main)


def test_without_a_retention_nothing_is_ever_too_old() -> None:
    topic: AnyTopic = Topic("eternal", bytes, partitions=2, retention=None)

    async def main() -> None:
        async with opened(topic) as made:
            await put(made, topic, names(4))
            await asyncio.sleep(300 * 86400)
            async with consuming(made, topic) as consumer:
                assert len(await rest(consumer)) == 4

    run(main)


def test_the_time_of_a_log_does_not_go_back_with_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened(ORDERS) as made:
            here = clock.current()
            await put(made, ORDERS, names(8, "before"))
            real = here.time
            monkeypatch.setattr(here, "time", lambda: real() - 3600)
            await put(made, ORDERS, names(8, "after"))
            start = Start.at(datetime.fromtimestamp(real(), UTC))
            async with consuming(made, ORDERS, None, start=start) as reader:
                assert len(await rest(reader)) == 16
            assert ids(await made.browse(ORDERS, limit=99)) == [*names(8, "before"), *names(8, "after")]

    run(main)


# ---------------------------------------------------------------------- capacity


def test_a_full_topic_first_drops_what_every_group_has_settled() -> None:
    async def main() -> None:
        async with (
            opened(ORDERS, max_messages=100) as made,
            consuming(made, ORDERS, "quick") as quick,
            consuming(made, ORDERS, "slow") as slow,
            consuming(made, ORDERS, None),
        ):
            await put(made, ORDERS, names(100))
            assert await results(made, ORDERS, ["x"]) == [BufferFull]
            await rest(quick)
            assert await results(made, ORDERS, ["x"]) == [BufferFull], "slow has not settled anything"
            held = await take(slow, 100)
            await done(slow, *held[1:])
            assert await results(made, ORDERS, names(20, "x")) == [None] * 20
            stored = await made.browse(ORDERS, limit=1000)
            assert held[0].position in [s.position for s in stored]
            assert 90 <= len(stored) <= 100
            await rest(quick)
            await rest(slow)
            await done(slow, held[0])
            for number in range(2000):
                await put(made, ORDERS, [f"y{number}"])
                if number % 10 == 9:
                    assert len(await rest(quick)) == len(await rest(slow)) == 10
            assert len(await made.browse(ORDERS, limit=1000)) <= 100
            backlog = await made.backlog(Source(ORDERS, "slow"))
            assert (backlog.waiting, backlog.in_flight) == (0, 0)

    run(main)


def test_a_full_topic_that_no_group_reads_keeps_what_nobody_has_seen() -> None:
    async def main() -> None:
        async with opened(ORDERS, max_messages=10) as made:
            await put(made, ORDERS, names(10))
            assert await results(made, ORDERS, ["x"]) == [BufferFull]
            async with consuming(made, ORDERS, None) as reader:
                assert await results(made, ORDERS, ["x"]) == [BufferFull]
                assert len(await rest(reader)) == 10
                assert await results(made, ORDERS, ["x"]) == [None]
            while await results(made, ORDERS, ["y"]) == [None]:  # what was dropped has left some room
                pass
            assert "x" in ids(await made.browse(ORDERS, limit=99)), "the reader is gone, and x was not seen"
            async with consuming(made, ORDERS) as consumer:
                assert "x" in ids(await rest(consumer))

    run(main)


def test_copies_never_meet_a_full_topic() -> None:
    async def main() -> None:
        async with opened(ORDERS, LINE, max_messages=5) as made, consuming(made, LINE) as consumer:
            await put(made, ORDERS, names(5))
            await put(made, LINE, ["a"])
            (a,) = await take(consumer, 1)
            copies = tuple(Record(ORDERS, f"copy{n}", b"") for n in range(20))
            assert await consumer.settle([Settlement(a, copies)]) == [None]
            assert len(await made.browse(ORDERS, limit=99)) == 25

    run(main)


def test_replies_push_out_the_oldest_replies() -> None:
    replies = reply_topic()

    async def main() -> None:
        async with opened(LINE, max_messages=50) as made, consuming(made, LINE) as consumer:
            for number in range(200):
                await put(made, LINE, ["q"])
                (question,) = await take(consumer, 1)
                copies = (Record(replies, f"r{number}", b""),)
                assert await consumer.settle([Settlement(question, copies)]) == [None]
            stored = ids(await made.browse(replies, limit=999))
            assert len(stored) <= 50
            assert stored[-1] == "r199"
            assert await results(made, replies, names(60)) == [None] * 60

    run(main)
