"""Consumers of a share group at a real broker: what comes out of them, restarted and killed, and what is stored of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from brokerkit.address import AnyQueue
from brokerkit.driver import Delivery, Settlement
from brokerkit.drivers.kafka._share_consumer import ShareConsumer
from brokerkit.errors import DeliveryLost, NotFound, TooLarge
from tests.servers.kafka import Network, shared_kafka

from .consuming import SOON, Process, eventually, ids, names, process
from .share_consuming import QUIET, configure, consuming, copied, done, drain, lease_of, named, take

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def url() -> str:
    return shared_kafka().url()


# ---------------------------------------------------------------------- nothing is lost


async def test_ten_warm_restarts_count_nothing(url: str) -> None:
    queue = named()
    async with process(url, queue) as p:  # type: ignore[arg-type]
        await p.put(queue, names(100))
        for _ in range(10):
            async with consuming(p, queue) as consumer:
                taken = await take(consumer, 100)
                assert sorted(ids(taken)) == names(100)
                assert {delivery.deliveries for delivery in taken} == {1}
        async with consuming(p, queue) as consumer:
            taken = await drain(consumer)
        assert sorted(ids(taken)) == names(100)
        assert {(delivery.deliveries, delivery.record.attempts) for delivery in taken} == {(1, 0)}


async def test_ten_kills_lose_nothing(url: str) -> None:
    queue = named()
    async with process(url, queue) as p:  # type: ignore[arg-type]
        await p.put(queue, names(30))
        seen: Counter[str] = Counter()
        for round in range(10):
            async with process(url) as dying, consuming(dying, queue) as consumer:
                taken = await take(consumer, 30 if round < 2 else 1)
                for delivery in taken:
                    seen[delivery.record.id] += 1
                    # What the process held counts one; what has come alone since the third time counts for itself only.
                    assert delivery.deliveries == seen[delivery.record.id]
                assert round < 2 or taken[0].deliveries >= 3
                await dying.die()
        async with consuming(p, queue) as consumer:
            left: list[Delivery] = []
            while got := await consumer.receive(100, 2 * QUIET):
                assert len(got) == 1
                left += got
                await done(consumer, got)
        assert sorted(ids(left)) == names(30)
        assert {delivery.record.id: delivery.deliveries for delivery in left} == {id: seen[id] + 1 for id in names(30)}


async def test_a_rescue_is_tried_until_it_works(url: str) -> None:
    queue = named()
    kafka = shared_kafka()
    async with process(url, queue) as p:  # type: ignore[arg-type]
        await p.put(queue, names(3))
        for _ in range(2):
            async with process(url) as dying, consuming(dying, queue) as consumer:
                await take(consumer, 3)
                await dying.die()
        configure(kafka, queue.name, "max.message.bytes", "10")
        async with process(url) as dying, consuming(dying, queue) as consumer:
            assert not await consumer.receive(100, 1.0)
            assert isinstance(consumer.problem, TooLarge)
            assert not (await dying.driver.health()).ok
            await dying.die()  # in the middle of it
        async with consuming(p, queue) as consumer:
            assert not await consumer.receive(100, 1.0)
            configure(kafka, queue.name, "max.message.bytes", "100000")
            seen = [delivery for _ in range(3) for delivery in await one(consumer)]
            # The process that died in the middle held it, and never handed it out.
            assert {delivery.deliveries for delivery in seen} == {4}
            assert consumer.problem is None
            assert not await consumer.receive(100, QUIET)
        assert sorted(ids(seen)) == names(3)


async def one(consumer: ShareConsumer) -> list[Delivery]:
    taken = await take(consumer, 1)
    await done(consumer, taken, confirm=True)
    return taken


async def test_what_runs_while_connections_break_is_settled_all_the_same(url: str) -> None:
    queue = named()
    async with Network(shared_kafka()) as network, process(url, queue) as p:  # type: ignore[arg-type]
        await p.put(queue, names(5))
        async with process(network.url()) as broken, consuming(broken, queue) as consumer:
            taken = await take(consumer, 5)
            for count in (2, 3):
                network.reset()
                await eventually(lambda: {lease_of(delivery).lock.count for delivery in taken} == {count})  # noqa: B023
                assert consumer.owned_until > asyncio.get_running_loop().time()
            assert not broken.revoked
            await done(consumer, taken, confirm=True)
        async with consuming(p, queue) as consumer:
            assert not await drain(consumer)


# ---------------------------------------------------------------------- sharing


async def test_twelve_consumers_share_two_partitions_evenly() -> None:
    url = shared_kafka().url(query="queue_partitions=2")
    queue = named()
    counts: Counter[int] = Counter()
    async with process(url, queue) as p:  # type: ignore[arg-type]

        async def work(number: int, entered: asyncio.Barrier) -> None:
            async with consuming(p, queue, prefetch=1) as consumer:
                await entered.wait()
                while got := await consumer.receive(1, 2.0):
                    await asyncio.sleep(0.02)
                    await done(consumer, got)
                    counts[number] += 1

        barrier = asyncio.Barrier(13)
        async with asyncio.TaskGroup() as group:
            for number in range(12):
                group.create_task(work(number, barrier))
            await barrier.wait()
            await p.put(queue, names(600))
    assert sum(counts.values()) == 600
    assert len(counts) == 12
    assert max(counts.values()) <= 2 * min(counts.values()), counts


async def test_a_late_acknowledgement_is_refused(url: str) -> None:
    queue, out = named(lease=1.0), named()
    async with Network(shared_kafka()) as network, process(url, queue, out) as p:  # type: ignore[arg-type]
        async with process(network.url()) as frozen, consuming(frozen, queue) as old, consuming(p, queue) as new:
            await p.put(queue, ["m"])
            receiving = [asyncio.ensure_future(consumer.receive(1, 2.0)) for consumer in (old, new)]
            taken = [list(await each) for each in receiving]
            if not taken[0]:  # the other one has it
                await new.release(taken[1])
                taken[0] = await take(old, 1)
            network.freeze()
            (fresh,) = await take(new, 1)
            assert fresh.deliveries == taken[0][0].deliveries + 1
            network.thaw()
            (stale,) = taken[0]
            items = [Settlement(stale, (copied(stale.record, address=out),))]
            (result,) = await old.settle(items, confirm=True)
            assert isinstance(result, DeliveryLost)
            assert not result.published
            await eventually(lambda: frozen.revoked == ["m"], "revoked told")
            await done(new, [fresh], confirm=True)
        async with consuming(p, queue) as consumer, consuming(p, out) as other:
            assert not await drain(consumer)
            assert not await drain(other)


# ---------------------------------------------------------------------- waiting


async def test_ten_failing_messages_never_stop_a_queue_of_prefetch_ten(url: str) -> None:
    queue = named()
    loop = asyncio.get_running_loop()
    async with process(url, queue) as p:  # type: ignore[arg-type]
        await p.put(queue, names(10, "bad"))
        async with consuming(p, queue, prefetch=10) as consumer:
            good, again, began = 0, 0, loop.time()
            longest, last = 0.0, began
            await p.put(queue, names(1, f"good{good}-"))
            while loop.time() - began < 3.0:
                got = await consumer.receive(10, SOON)
                items: list[Settlement] = []
                for delivery in got:
                    if delivery.record.id.startswith("bad"):
                        again += 1
                        items.append(Settlement(delivery, (copied(delivery.record, delay=0.5, attempts=again),)))
                    else:
                        good, longest, last = good + 1, max(longest, loop.time() - last), loop.time()
                        items.append(Settlement(delivery))
                        await p.put(queue, names(1, f"good{good}-"))
                assert set(await consumer.settle(items)) == {None}
            assert longest < 0.4, "a queue stood still"
            assert good > 20
            assert 30 <= again <= 80


async def test_a_short_delay_is_never_early_and_survives_its_holder(url: str) -> None:
    queue = named()
    loop = asyncio.get_running_loop()
    async with process(url, queue) as p:  # type: ignore[arg-type]
        async with process(url) as dying, consuming(dying, queue) as consumer:
            await p.put(queue, ["m"], delay=0.9)
            stored = loop.time()
            receiving = asyncio.ensure_future(consumer.receive(1, SOON))
            await eventually(lambda: any(later for *_, later in consumer.holding()), "held")
            receiving.cancel()
            await dying.die()
        async with consuming(p, queue) as consumer:
            (delivery,) = await take(consumer, 1)
            assert loop.time() - stored >= 0.85
            assert delivery.deliveries == 2  # a process has died that held it
            await done(consumer, [delivery])


async def test_leaving_keeps_the_rest_of_a_delay(url: str) -> None:
    queue = named()
    loop = asyncio.get_running_loop()
    async with process(url, queue) as p:  # type: ignore[arg-type]
        async with consuming(p, queue) as consumer:
            await p.put(queue, ["m"], delay=0.9)
            stored = loop.time()
            receiving = asyncio.ensure_future(consumer.receive(1, SOON))
            await eventually(lambda: any(later for *_, later in consumer.holding()), "held")
            receiving.cancel()
        async with consuming(p, queue) as consumer:
            (delivery,) = await take(consumer, 1)
            assert 0.85 <= loop.time() - stored < 2.5
            assert delivery.deliveries == 1
            await done(consumer, [delivery])


# ---------------------------------------------------------------------- taking part


async def test_a_queue_that_is_not_there_is_not_found(url: str) -> None:
    async with process(url) as p:
        with pytest.raises(NotFound, match="declare it"):
            async with consuming(p, named()):
                pass


async def test_members_that_leave_are_missed_at_once(url: str) -> None:
    queue = named()
    async with process(url, queue) as p:  # type: ignore[arg-type]
        async with consuming(p, queue) as one_, consuming(p, queue) as other:
            assert one_.member != other.member
            assert len(await members(p, queue)) == 2
        assert await members(p, queue) == []


async def members(p: Process, queue: AnyQueue) -> list[str]:
    from kio.schema.share_group_describe.v1.request import ShareGroupDescribeRequest

    from brokerkit.drivers.kafka._coordinator import ask

    wanted: Any = ShareGroupDescribeRequest
    request = wanted(group_ids=(queue.name,), include_authorized_operations=False)
    answer = await ask(p.context.cluster, queue.name, request, timeout=SOON, line="describe")
    (group,) = answer.groups
    return [member.member_id for member in group.members]
