"""Delays on a real broker: never early by its clock, once each, and none in the way of another."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio

from brokerkit.address import AnyQueue, Queue
from brokerkit.driver import Receipt, Record
from brokerkit.drivers.kafka._create import create
from brokerkit.drivers.kafka._cut import ALL, cut
from brokerkit.drivers.kafka._look import Look, bounds
from brokerkit.drivers.kafka._records import Native, is_tick
from brokerkit.drivers.kafka._tiers import TIERS, waiting_for
from brokerkit.errors import AuthorizationError, BrokerError, BrokerUnavailable
from brokerkit.events import Expired, PartitionPaused, UpkeepFailed
from brokerkit.policy import MAX_DELAY
from tests.servers.kafka import rights, shared_kafka

from .consuming import SOON, eventually, names
from .delaying import LATE, Seen, Worker, be_wrong, drain, finished, queue, quiet, worker

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def url() -> str:
    return shared_kafka().url()


@pytest_asyncio.fixture
async def mails(url: str) -> AsyncIterator[AnyQueue]:
    made = queue()
    yield made
    await finished(url, made)


async def waiting(p: Worker) -> dict[int, list[Native]]:
    """Return what is in the topic of those that wait, partition by partition."""
    cluster = p.context.cluster
    info = await cluster.topic(waiting_for(p.queue).name, timeout=SOON, fresh=True)
    found: dict[int, list[Native]] = {}
    for number, (start, end) in (await bounds(cluster, info, timeout=SOON)).items():
        look = Look(cluster, info, asyncio.get_running_loop().time() + SOON, records=100)
        look.begin(number, start, end)
        while (native := await look.first(number)) is not None:
            found.setdefault(number, []).append(native)
            look.pop(number)
    return found


@pytest.mark.parametrize("off", [60.0, -60.0, 0.0])
async def test_nothing_is_early_nor_late_whatever_our_clock_shows(url: str, mails: AnyQueue, off: float) -> None:
    be_wrong(off)
    delays = (0.0, 0.2, 0.9, 1.0, 1.05, 1.5, 2.0, 3.3, 11.2)
    async with worker(url, mails) as p:
        await p.make()
        async with p.consuming() as consumer:
            for delay in delays:
                await p.publish([f"m{delay}"], delay=delay)
            seen = Seen()
            await drain(consumer, seen, len(delays))
            await quiet(consumer, seen, 0.5)
            assert not p.events
            assert not p.upkeep.problems
    for delay in delays:
        (at,) = seen.at[f"m{delay}"]
        before, after = p.published[f"m{delay}"]
        assert before + delay <= at < after + delay + LATE, (delay, at - before)
        record = seen.records[f"m{delay}"]
        assert (record.body, record.headers, record.attempts, record.deliveries) == (b"body", (), 0, 0)
        assert record.timestamp == pytest.approx(before + off, abs=2), "when it was published, by the publisher's clock"


async def test_a_message_keeps_all_that_it_has(url: str, mails: AnyQueue) -> None:
    async with worker(url, mails) as p:
        await p.make()
        headers = (("bk-content-type", b"text"), ("x", b"1"), ("x", b"2"))
        record = Record(
            mails, "m", b"body", b"key", headers, 1234.5, delay=2.2, ttl=60.0, attempts=3, deliveries=7
        )  # more deliveries than a message may have that comes beside others
        (receipt,) = await p.driver.publish([record], timeout=SOON)
        assert isinstance(receipt, Receipt)
        stored = time.time()
        async with p.consuming() as consumer:
            seen = Seen()
            await drain(consumer, seen, 1)
        (found,) = seen.records.values()
        assert (found.id, found.body, found.key, found.headers) == ("m", b"body", b"key", headers)
        assert (found.timestamp, found.attempts, found.deliveries) == (1234.5, 3, 7)
        assert found.expires == pytest.approx(stored + 60, abs=1.5)
        assert found.address.name == mails.name


async def test_ten_thousand_are_due_at_once(url: str, mails: AnyQueue) -> None:
    async with worker(url, mails) as p:
        await p.make()
        async with p.consuming(10_000) as consumer:
            ids = names(10_000)
            for start in range(0, len(ids), 1000):
                await p.publish(ids[start : start + 1000], delay=2.0)
            seen = Seen()
            await drain(consumer, seen, len(ids), limit=60)
            await quiet(consumer, seen, 0.5)
            assert not [event for event in p.events if isinstance(event, (PartitionPaused, UpkeepFailed))]
    assert seen.count == len(ids), "each once"
    for id, (at, *_) in seen.at.items():
        assert at >= p.published[id][0] + 2.0


async def test_short_delays_are_not_behind_long_ones(url: str, mails: AnyQueue) -> None:
    async with worker(url, mails) as p:
        await p.make()
        await p.publish(names(6000, "day"), delay=86400.0)
        await p.publish(names(6000, "minute"), delay=100.0)
        await p.publish(names(6000, "long"), delay=10.5)
        async with p.consuming() as consumer:
            seen = Seen()
            await p.publish(["short"], delay=1.0)
            await drain(consumer, seen, 1)
            assert list(seen.at) == ["short"]
            assert seen.at["short"][0] < p.published["short"][1] + 1.0 + LATE
            assert not p.events, "what waits is no partition that stands"


async def test_delays_outlive_all_processes(url: str, mails: AnyQueue) -> None:
    async with worker(url, mails) as p:
        await p.make()
        await p.publish(names(50, "a"), delay=1.1)
        await p.publish(names(50, "b"), delay=2.4)
        await p.publish(["later"], delay=30.0)
    published = p.published
    await asyncio.sleep(3.0 - (time.time() - published["b00000"][0]))  # the time that is to pass
    be_wrong(-60.0)
    async with worker(url, mails) as p:
        begun = time.time()
        async with p.consuming() as consumer:
            seen = Seen()
            await drain(consumer, seen, 100)
            assert time.time() < begun + 5 + LATE, "what is overdue comes at once, but for a hop"
            await quiet(consumer, seen, 0.5)
    assert seen.count == 100
    assert "later" not in seen.at


async def test_a_crash_between_forward_and_commit_brings_it_twice(
    url: str, mails: AnyQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker(url, mails, session=1.0) as p:
        await p.make()
        stored = asyncio.Event()
        copy = p.context.outboxes.copy

        async def and_hang(records: Sequence[Record], timeout: float) -> Any:
            results = await copy(records, timeout)
            if any(record.address.name == mails.name for record in records):
                stored.set()
                await asyncio.get_running_loop().create_future()
            return results

        monkeypatch.setattr(p.context.outboxes, "copy", and_hang)
        await p.publish(["m"], delay=1.0)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(p.upkeep.of(mails))
            async with asyncio.timeout(SOON):
                await stored.wait()
            await p.die()
    async with worker(url, mails) as heir, heir.consuming() as consumer:
        seen = Seen()
        async with asyncio.timeout(SOON):
            while seen.count < 2:
                seen.take(await consumer.receive(10, 1.0))
    assert list(seen.at) == ["m"]


@pytest.mark.parametrize("takes", [0.3, 2.8])
async def test_what_is_being_moved_when_the_last_consumer_leaves_comes_once(
    url: str, mails: AnyQueue, monkeypatch: pytest.MonkeyPatch, takes: float
) -> None:
    """A cluster that takes its time is no fault."""
    async with worker(url, mails) as p:
        await p.make()
        begun = asyncio.Event()
        copy = p.context.outboxes.copy

        async def slow(records: Sequence[Record], timeout: float) -> Any:
            results = await copy(records, timeout)
            if any(record.address.name == mails.name for record in records):
                begun.set()
                await asyncio.sleep(takes)
            return results

        monkeypatch.setattr(p.context.outboxes, "copy", slow)
        await p.publish(names(20), delay=1.0)
        async with p.upkeep.of(mails), asyncio.timeout(SOON):
            await begun.wait()
    async with worker(url, mails) as heir, heir.consuming() as consumer:
        seen = Seen()
        await drain(consumer, seen, 20)
        await quiet(consumer, seen, 2.5)
    assert seen.count == 20


async def test_processes_come_and_go_and_each_message_comes_once(url: str, mails: AnyQueue) -> None:
    ids = names(3000)
    seen = Seen()
    async with worker(url, mails) as first:
        await first.make()
        stop = asyncio.Event()

        async def publish() -> None:
            for start in range(0, len(ids), 100):
                await first.publish(ids[start : start + 100], delay=1.0 + (start % 700) / 500)
                await asyncio.sleep(0.1)

        async def come_and_go() -> None:
            while not stop.is_set():
                async with worker(url, mails) as other, other.upkeep.of(mails):
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(stop.wait(), 0.8)
                    assert not other.upkeep.problems

        async with first.consuming(5000) as consumer, asyncio.TaskGroup() as tasks:
            tasks.create_task(publish())
            tasks.create_task(come_and_go())
            await drain(consumer, seen, len(ids), limit=60)
            stop.set()
            await quiet(consumer, seen, 1.0)
    assert seen.count == len(ids), [id for id, at in seen.at.items() if len(at) > 1][:5]
    for id, (at,) in seen.at.items():
        assert at >= first.published[id][0] + 1.0


@pytest.mark.parametrize("off", [60.0, -60.0])
async def test_a_time_to_live_counts_from_the_first_acceptance(url: str, mails: AnyQueue, off: float) -> None:
    be_wrong(off)
    async with worker(url, mails) as p:
        await p.make()
        await p.publish(["dies"], delay=2.2, ttl=1.5)
        await p.publish(["lives"], delay=2.2, ttl=20.0)
        await p.publish(["at once"], ttl=20.0)
        await p.publish(["over"], ttl=0.001)
        await asyncio.sleep(0.01)
        async with p.consuming() as consumer:
            seen = Seen()
            await drain(consumer, seen, 2)
            await eventually(lambda: sum(e.count for e in p.events if isinstance(e, Expired)) == 2)
            await quiet(consumer, seen, 0.5)
            assert set(seen.at) == {"lives", "at once"}
            for id in seen.at:
                expires = seen.records[id].expires
                assert expires is not None
                before, after = p.published[id]
                assert before + 20 - 0.002 <= expires <= after + 20.002, "by the broker's clock"


async def test_the_longest_delay(url: str, mails: AnyQueue) -> None:
    async with worker(url, mails) as p:
        await p.make()
        await p.publish(["year"], delay=MAX_DELAY)
        await p.publish(["month"], delay=30 * 86400.0)
        async with p.consuming() as consumer:
            assert await consumer.receive(10, 1.5) == []
            assert not p.events
        found = await waiting(p)
    assert all(map(is_tick, found.pop(0, []))), "what time it is was asked"
    assert list(found) == [len(TIERS) - 1], "nothing was moved"
    assert len(found[len(TIERS) - 1]) == 2


async def test_nobody_writes_ticks_where_nothing_waits(url: str, mails: AnyQueue) -> None:
    async with worker(url, mails) as p:
        await p.make()
        async with p.consuming() as consumer:
            await p.publish(["m"])
            seen = Seen()
            await drain(consumer, seen, 1)
            assert await consumer.receive(10, 1.5) == []
        assert await waiting(p) == {}


async def test_what_waits_is_created_with_the_first_delay(url: str, mails: AnyQueue) -> None:
    async with worker(url, mails) as p:
        await create(p.context.cluster, mails, timeout=SOON)
        async with p.consuming() as consumer:
            await p.publish(["m"], delay=1.0)
            seen = Seen()
            await drain(consumer, seen, 1)


async def test_what_was_purged_is_not_moved_on(url: str, mails: AnyQueue) -> None:
    async with worker(url, mails) as p:
        _, info = await p.make()
        async with p.consuming() as consumer:
            await p.publish(names(10, "gone"), delay=2.0)
            await p.publish(names(10, "soon"), delay=0.0)
            seen = Seen()
            await drain(consumer, seen, 10)  # by now what waits was read
            await cut(p.context.cluster, info, dict.fromkeys(range(len(TIERS)), ALL), timeout=SOON)
            await p.publish(["new"], delay=1.0)
            await drain(consumer, seen, 11)
            await quiet(consumer, seen, 1.5)
            assert not p.upkeep.problems
            assert not p.events
    assert not [id for id in seen.at if id.startswith("gone")]


async def test_what_was_purged_before_anybody_read_it_is_no_loss(url: str, mails: AnyQueue) -> None:
    async with worker(url, mails) as p:
        _, info = await p.make()
        await p.publish(names(10, "gone"), delay=1.0)
        await cut(p.context.cluster, info, dict.fromkeys(range(len(TIERS)), ALL), timeout=SOON)
        await p.publish(["new"], delay=1.0)
        async with p.consuming() as consumer:
            seen = Seen()
            await drain(consumer, seen, 1)
            await quiet(consumer, seen, 0.5)
            assert not p.events
            assert not p.upkeep.problems
    assert list(seen.at) == ["new"]


@pytest.mark.parametrize("error", [AuthorizationError("WRITE on topic x was refused"), BrokerUnavailable("no leader")])
async def test_what_cannot_be_moved_is_told_once_and_tried_again(
    url: str, mails: AnyQueue, monkeypatch: pytest.MonkeyPatch, error: BrokerError
) -> None:
    async with worker(url, mails) as p:
        await p.make()
        copy, tries, broken = p.context.outboxes.copy, list[int](), True

        async def maybe(records: Sequence[Record], timeout: float) -> Any:
            results = list(await copy([r for r in records if not (broken and r.id.startswith("bad"))], timeout))
            bad = sum(broken and record.id.startswith("bad") for record in records)
            tries.extend([bad] * bool(bad))
            return [error if broken and record.id.startswith("bad") else results.pop(0) for record in records]

        monkeypatch.setattr(p.context.outboxes, "copy", maybe)
        async with p.consuming() as consumer:
            await p.publish(names(5, "bad"), delay=1.0)
            await p.publish(names(5, "good"), delay=1.5)
            seen = Seen()
            await drain(consumer, seen, 5)
            assert all(id.startswith("good") for id in seen.at), "others go on"
            await eventually(lambda: len(tries) >= 3)
            (event,) = p.events
            assert isinstance(event, UpkeepFailed)
            assert (event.address, event.task) == (mails.name, "delay")
            assert str(error) in event.error
            (problem,) = p.upkeep.problems
            assert str(error) in problem
            assert len(tries) < 10, "no hot loop"
            broken = False
            await drain(consumer, seen, 10)
            await eventually(lambda: not p.upkeep.problems)
            await quiet(consumer, seen, 0.5)
    assert seen.count == 10


@pytest.mark.parametrize("off", [60.0, -60.0])
async def test_a_topic_of_others_that_bears_what_writers_say_makes_nothing_early(
    url: str, mails: AnyQueue, off: float
) -> None:
    be_wrong(off)
    with shared_kafka().wire() as admin:
        admin.create(waiting_for(mails).name, len(TIERS), {"message.timestamp.type": "CreateTime"})
    async with worker(url, mails) as p:
        await p.make()
        async with p.consuming() as consumer:
            await p.publish(names(20, "one"), delay=1.0)
            await p.publish(names(20, "more"), delay=2.5)
            seen = Seen()
            await drain(consumer, seen, 40)
            await quiet(consumer, seen, 0.5)
    assert seen.count == 40
    for id, (at,) in seen.at.items():
        delay = 1.0 if id.startswith("one") else 2.5
        before, after = p.published[id]
        assert before + delay <= at < after + delay + 3 + LATE


async def test_too_few_partitions_make_nothing_early(url: str, mails: AnyQueue) -> None:
    with shared_kafka().wire() as admin:
        admin.create(waiting_for(mails).name, 1, {"message.timestamp.type": "LogAppendTime"})
    async with worker(url, mails) as p:
        await p.make()
        async with p.consuming() as consumer:
            await p.publish(["m"], delay=12.0)
            seen = Seen()
            await drain(consumer, seen, 1)
    (at,) = seen.at["m"]
    assert p.published["m"][0] + 12.0 <= at < p.published["m"][1] + 12.0 + LATE


async def test_without_rights_where_they_wait_it_is_told_once_and_goes_on_later() -> None:
    endpoints = shared_kafka(rights=True)
    prefix = f"d.{uuid.uuid4().hex[:12]}."
    mails: AnyQueue = Queue(f"{prefix}mails", bytes)
    whole = rights(prefix)
    # The queue alone: where its messages wait is another topic, read by another group.
    alone = [dataclasses.replace(right, name=mails.name, prefixed=False) for right in whole]
    with endpoints.wire() as admin:
        admin.allow(whole)
        try:
            async with worker(endpoints.url("SASL"), mails) as p:
                await p.make()
                await p.publish(names(10), delay=1.0)
            admin.allow(alone)
            admin.forbid(whole)
            async with worker(endpoints.url("SASL"), mails) as p:
                async with p.consuming() as consumer:
                    await eventually(lambda: len(p.events) == 2)
                    for event in p.events:
                        assert isinstance(event, UpkeepFailed)
                        assert event.address == mails.name
                        assert waiting_for(mails).name in event.error
                    assert {event.task for event in p.events if isinstance(event, UpkeepFailed)} == {"delay", "keeping"}
                    await p.publish(["plain"])
                    seen = Seen()
                    await drain(consumer, seen, 1)
                    tries = p.count_calls()
                    assert await consumer.receive(10, 2.0) == []
                    assert p.count_calls() - tries < 40, "no hot loop"
                    assert len(p.events) == 2
                    assert any("Forwarder" in problem for problem in p.upkeep.problems)
                    admin.allow(whole)
                    await drain(consumer, seen, 11, limit=60)
                    await eventually(lambda: not [line for line in p.upkeep.problems if "Forwarder" in line])
        finally:
            admin.forbid(whole + alone)
            admin.delete([name for name in admin.cluster(None).topics if name.startswith(prefix)])
