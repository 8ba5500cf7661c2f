"""What is done is removed from the disk, and nothing else."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
import pytest_asyncio

from brokerkit.address import AnyQueue, Queue, redrive_queue
from brokerkit.driver import Consumer, Delivery, Settlement, Source
from brokerkit.drivers.kafka import _janitor, _upkeep
from brokerkit.drivers.kafka._consumer import TopicConsumer
from brokerkit.drivers.kafka._coordinator import committed
from brokerkit.drivers.kafka._create import create
from brokerkit.drivers.kafka._cut import cut
from brokerkit.drivers.kafka._janitor import Janitor
from brokerkit.drivers.kafka._look import bounds
from brokerkit.drivers.kafka._records import parse_position
from brokerkit.drivers.kafka._share_group import places
from brokerkit.drivers.kafka._tiers import waiting_for
from brokerkit.errors import AuthorizationError
from brokerkit.events import UpkeepFailed
from tests.servers.kafka import rights, shared_kafka

from .consuming import SOON, Process, done, eventually, named, names, process, take
from .delaying import Seen, drain, finished, queue, worker

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def url() -> str:
    return shared_kafka().url()


@pytest_asyncio.fixture
async def mails(url: str) -> AsyncIterator[AnyQueue]:
    made = queue()
    yield made
    await finished(url, made)


async def limits(p: Process, address: AnyQueue) -> Mapping[int, tuple[int, int]]:
    """Return where the logs of *address* begin and end."""
    cluster = p.context.cluster
    info = await cluster.topic(address.name, timeout=SOON, fresh=True)
    return await bounds(cluster, info, timeout=SOON)


async def starts(p: Process, address: AnyQueue) -> dict[int, int]:
    return {number: start for number, (start, _) in (await limits(p, address)).items()}


def at(delivery: Delivery) -> tuple[int, int]:
    """Return partition and offset."""
    found = parse_position(delivery.position, delivery.record.address.name)
    assert found is not None
    return found[0], found[2]


# ---------------------------------------------------------------------- classic groups


async def test_what_a_classic_group_has_done_is_removed(url: str, mails: AnyQueue) -> None:
    async with worker(url, mails) as p:
        await p.make()
        async with p.consuming() as consumer:
            await p.publish(names(400))
            got = await take(consumer, 400)
            kept = {number: max(o for n, o in map(at, got) if n == number) // 2 for number in {at(d)[0] for d in got}}
            await done(consumer, [d for d in got if at(d)[1] != kept[at(d)[0]]], confirm=True)
            janitor = Janitor(p.context, mails)
            await janitor.look()
            found = await starts(p, mails)
            assert {number: found[number] for number in kept} == kept, "up to the first that is not done"
            await done(consumer, [d for d in got if at(d)[1] == kept[at(d)[0]]], confirm=True)
            await janitor.look()
            assert all(start == end for start, end in (await limits(p, mails)).values())
            assert janitor.problem is None
            await p.publish(names(50, "later"))
            assert len(await take(consumer, 50)) == 50


async def test_what_has_gone_on_is_removed_from_where_it_waited(url: str, mails: AnyQueue) -> None:
    async with worker(url, mails) as p:
        await p.make()
        waiting = waiting_for(mails)
        async with p.consuming() as consumer:
            await p.publish(names(20, "minute"), delay=60.0)
            await p.publish(names(20, "second"), delay=1.0)
            seen = Seen()
            await drain(consumer, seen, 20)
            while True:
                place = (await committed(p.context.cluster, waiting.name, waiting.name, [0], SOON))[0]
                end = (await limits(p, waiting))[0][1]
                if place is not None and place[0] == end:
                    break
                await asyncio.sleep(0.05)
            await Janitor(p.context, mails).look()
            found = await limits(p, waiting)
            assert found[0] == (end, end), "with the ticks"
            assert found[2] == (0, 20), "what waits stays"


async def test_a_private_queue_is_kept_small_too(url: str) -> None:
    topic = named(partitions=1)
    again = redrive_queue(topic, "billing")
    async with process(url, topic) as p:
        await create(p.context.cluster, again, timeout=SOON)
        await p.put(again, names(100))
        async with TopicConsumer(p.context, again, Source(again), 100, p.told) as consumer:
            got = await take(consumer, 100)
            await done(consumer, got, confirm=True)
            janitor = Janitor(p.context, again)
            await janitor.look()
            assert all(start == end for start, end in (await limits(p, again)).values())
            assert janitor.problem is None
        await p.driver.delete(topic)


async def test_what_nobody_has_read_stays(url: str, mails: AnyQueue) -> None:
    async with worker(url, mails) as p:
        janitor = Janitor(p.context, mails)
        await janitor.look()
        assert janitor.problem is None, "there is no topic yet"
        await p.make()
        await p.publish(names(10))
        await janitor.look()
        assert set((await starts(p, mails)).values()) == {0}
        assert janitor.problem is None


async def test_a_topic_that_was_made_again_loses_nothing(
    url: str, mails: AnyQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored of the group is about a log that is no more."""

    async def of_another(*_: object) -> dict[int, tuple[int, str]]:
        return {0: (1000, ""), 1: (1000, ""), 2: (1000, ""), 3: (1000, "")}

    async def classic(*_: object, timeout: float) -> str:
        return "classic"

    async with worker(url, mails) as p:
        await p.make()
        await p.publish(names(40))
        monkeypatch.setattr(_janitor, "committed", of_another)
        monkeypatch.setattr(_janitor, "engine_of", classic)
        asked: list[Mapping[int, int]] = []

        async def spied(cluster: Any, info: Any, below: Mapping[int, int], *, timeout: float) -> dict[int, int]:
            asked.append(below)
            return {}

        monkeypatch.setattr(_janitor, "cut", spied)
        await Janitor(p.context, mails).look()
        assert not asked, "not even asked for: the log may be as long by the time that it is cut"
        assert set((await starts(p, mails)).values()) == {0}


async def test_upkeep_looks_soon(url: str, mails: AnyQueue) -> None:
    async with worker(url, mails) as p:
        await p.make()
        async with p.consuming() as consumer:
            await p.publish(names(40))
            await done(consumer, await take(consumer, 40), confirm=True)
        async with p.upkeep.of(mails), asyncio.timeout(SOON):
            while any(start < end for start, end in (await limits(p, mails)).values()):
                await asyncio.sleep(0.05)


async def test_upkeep_looks_once_more_when_the_last_consumer_leaves(
    url: str, mails: AnyQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_upkeep, "WORTH", 0.0)
    monkeypatch.setattr(_janitor, "FIRST", 1e6)
    async with worker(url, mails) as p:
        await p.make()
        async with p.consuming() as one:
            async with p.upkeep.of(mails):
                await p.publish(names(40))
                await done(one, await take(one, 40), confirm=True)
            assert sum((await starts(p, mails)).values()) == 0, "one is there still"
        assert all(start == end for start, end in (await limits(p, mails)).values())


# ---------------------------------------------------------------------- share groups


class Watched:
    """What the janitor removes, and how far the group was by what the cluster keeps just before."""

    def __init__(self, p: Process, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuts: list[tuple[dict[int, int], dict[int, int]]] = []

        async def spied(cluster: Any, info: Any, below: Mapping[int, int], *, timeout: float) -> dict[int, int]:
            found = await places(cluster, info.name, info.name, range(len(info.partitions)), timeout=timeout)
            self.cuts.append((dict(below), {number: place.start for number, place in found.items()}))
            return await cut(cluster, info, below, timeout=timeout)

        monkeypatch.setattr(_janitor, "cut", spied)


async def settled(consumer: Consumer, deliveries: list[Delivery]) -> None:
    results = await consumer.settle([Settlement(delivery) for delivery in deliveries], confirm=True)
    assert list(results) == [None] * len(deliveries)


async def receive(consumer: Consumer, count: int) -> list[Delivery]:
    found: list[Delivery] = []
    async with asyncio.timeout(SOON):
        while len(found) < count:
            found += await consumer.receive(count - len(found), SOON)
    return found


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_above_the_position_of_a_share_group_is_removed(
    url: str, mails: AnyQueue, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Large producer batches, acknowledged here and there: a log that began behind the position would stand for ever."""
    chance = random.Random(seed)
    async with process(url) as p:
        watched = Watched(p, monkeypatch)
        await p.driver.declare(mails)
        async with p.driver.consume(Source(mails), prefetch=1000, revoked=p.told) as consumer:
            janitor = Janitor(p.context, mails)
            await p.put(mails, names(400))
            held = await receive(consumer, 400)
            expected = 400
            for round in range(4):
                chance.shuffle(held)
                some = chance.randrange(len(held) // 2, len(held))
                await settled(consumer, held[:some])
                held = held[some:]
                await janitor.look()
                found = await starts(p, mails)
                for number, offset in map(at, held):
                    assert found[number] <= offset, "what is in hand is there still"
                await p.put(mails, names(100, f"r{round}"))
                held += await receive(consumer, 100)
                expected += 100
            await settled(consumer, held)
            await janitor.look()
            await p.put(mails, names(100, "last"))
            await settled(consumer, await receive(consumer, 100))
            assert janitor.problem is None
            assert not p.events
        assert watched.cuts, "something was removed"
        for below, kept in watched.cuts:
            for number, offset in below.items():
                assert offset <= kept[number], "the group's own position is the limit"


async def test_who_reads_goes_on_after_a_log_was_cut_inside_a_batch(url: str, mails: AnyQueue) -> None:
    async with process(url) as p:
        await p.driver.declare(mails)
        await p.put(mails, names(300), key=b"one partition")
        async with p.driver.consume(Source(mails), prefetch=120, revoked=p.told) as consumer:
            first = await receive(consumer, 120)
            await settled(consumer, first[:75])
            await Janitor(p.context, mails).look()
            await consumer.release(first[75:])
            rest = await receive(consumer, 120)
            seen = {delivery.record.id for delivery in first[:75]}
            while rest:
                seen |= {delivery.record.id for delivery in rest}
                await settled(consumer, rest)
                rest = list(await consumer.receive(120, 1.0))
            assert seen == set(names(300))
            await Janitor(p.context, mails).look()
            assert sum(end - start for start, end in (await limits(p, mails)).values()) <= 300 - 75


# ---------------------------------------------------------------------- rights


async def test_without_the_right_it_is_told_once_and_health_shows_the_growth() -> None:
    endpoints = shared_kafka(rights=True)
    prefix = f"j.{uuid.uuid4().hex[:12]}."
    mails: AnyQueue = Queue(f"{prefix}mails", bytes)
    every = rights(prefix)
    given = [right for right in every if (right.resource, right.operation) != ("topic", "delete")]
    delete = [right for right in every if right not in given]
    with endpoints.wire() as admin:
        admin.allow(given)
        try:
            async with worker(endpoints.url("SASL"), mails) as p:
                await p.make()
                async with p.consuming() as consumer:
                    await p.publish(names(40))
                    await done(consumer, await take(consumer, 40), confirm=True)
                    janitor = Janitor(p.context, mails)
                    await janitor.look()
                    assert isinstance(janitor.problem, AuthorizationError)
                    assert "40 records" in str(janitor.problem)
                    assert f"DELETE on topic {mails.name}" in str(janitor.problem)
                    (event,) = p.events
                    assert isinstance(event, UpkeepFailed)
                    assert (event.address, event.task) == (mails.name, "keeping")
                    await p.publish(names(10, "more"))
                    await done(consumer, await take(consumer, 10), confirm=True)
                    await janitor.look()
                    assert "50 records" in str(janitor.problem)
                    assert len(p.events) == 1
                    admin.allow(delete)
                    async with asyncio.timeout(SOON):
                        while janitor.problem is not None:
                            await janitor.look()
                    assert all(start == end for start, end in (await limits(p, mails)).values())
                    await eventually(lambda: not p.upkeep.problems)
        finally:
            admin.forbid(every)
            admin.delete([name for name in admin.cluster(None).topics if name.startswith(prefix)])
