"""BACK-PRESSURE: bounded everywhere, and nobody starves."""

from __future__ import annotations

import asyncio
import gc
from functools import partial
from typing import Any

import pytest

from ...errors import BufferFull
from ...events import PartitionPaused, PartitionResumed
from ...message import Message
from ...policy import LOG_AHEAD, RetryPolicy
from ...service import Service
from ._harness import Harness, Kind
from ._runner import Suite, needs, seeds


class Backpressure(Suite):
    async def test_no_more_messages_are_in_hand_than_prefetch_says(self, system: Harness, kind: Kind) -> None:
        """K1: settling one lets one in."""
        address = system.address(kind)
        async with system.connect() as broker:
            await system.publish(broker, address, [f"v{n}" for n in range(20)])
            async with system.subscribe(broker, address, prefetch=4) as messages:
                held = await system.take(messages, 4)
                await system.nothing(messages)
                await held[0].ack()
                await system.take(messages, 1)
                await system.nothing(messages)

    async def test_no_more_handlers_run_at_once_than_concurrency_says(self, system: Harness, kind: Kind) -> None:
        """K1: and as many do, where there is enough to do."""
        address = system.address(kind)
        running = most = done = 0

        async def handler(message: Message[str]) -> None:
            nonlocal running, most, done
            running += 1
            most = max(most, running)
            await asyncio.sleep(system.quiet / 50)
            running -= 1
            done += 1

        async with system.connect() as broker:
            await system.publish(broker, address, [f"v{n}" for n in range(60)])
            async with system.serve(broker, address, handler, concurrency=7):
                await system.eventually(lambda: done == 60)
        assert most == 7

    async def test_a_service_owns_no_more_than_its_prefetch(self, system: Harness, kind: Kind) -> None:
        """K1: the system says how many are in flight, whatever the backlog is."""
        address = system.address(kind)
        most: list[int] = []
        done = 0

        async with system.connect() as broker:

            async def handler(message: Message[str]) -> None:
                nonlocal done
                backlog = await system.backlog(broker, address)
                most.append(backlog.in_flight or 0)
                done += 1

            await broker.publish_many(address, [f"v{n}" for n in range(80)])
            async with system.serve(broker, address, handler, concurrency=2, prefetch=6):
                await system.eventually(lambda: done == 80)
        assert max(most) <= 6

    @seeds(1)
    async def test_memory_is_bounded_by_prefetch_and_not_by_the_backlog(self, system: Harness, kind: Kind) -> None:
        """K2: of five thousand messages that wait a process holds its prefetch."""
        address = system.address(kind)
        most = done = 0

        async def handler(message: Message[str]) -> None:
            nonlocal most, done
            done += 1
            if done % 500 == 0:
                most = max(most, sum(type(thing) is Message for thing in gc.get_objects()))
            if done % 100 == 0:
                await asyncio.sleep(0.001)

        async with system.connect() as broker:
            for _ in range(5):
                await broker.publish_many(address, ["v"] * 1000)
            async with system.serve(broker, address, handler, concurrency=4, prefetch=50):
                await system.eventually(lambda: done == 5000)
        assert 0 < most <= 200

    @seeds(1)
    @needs("queue")
    async def test_what_is_behind_a_message_that_is_held_goes_on(self, system: Harness) -> None:
        """K4: one handler sits on a message, thousands behind it are handled; what has to wait for it comes when it is done."""
        queue = system.queue()
        held, go = asyncio.Event(), asyncio.Event()
        handled: set[str] = set()

        async def handler(message: Message[str]) -> None:
            if message.value == "held":
                held.set()
                await go.wait()
            handled.add(message.value)

        async with system.connect() as broker, system.serve(broker, queue, handler, concurrency=4, prefetch=100):
            await broker.publish(queue, "held")
            await held.wait()
            for part in range(8):
                await broker.publish_many(queue, [f"v{part}-{n}" for n in range(500)])
            await system.eventually(lambda: len(handled) >= 1000)
            await asyncio.sleep(2 * system.lease)
            assert "held" not in handled
            go.set()
            await system.eventually(lambda: len(handled) == 4001)

    @needs("bounded")
    async def test_publishing_to_a_full_address_waits_for_room(self, system: Harness, kind: Kind) -> None:
        """K3: a publish is stored as soon as a consumer has made room."""
        address = system.address(kind)
        async with system.connect(options=system.bounded) as broker:
            await broker.declare(address)
            await system.fill(broker, system.native(broker, address))
            publishing = asyncio.ensure_future(broker.publish(address, "more", id="more", timeout=system.deadline))
            await system.settle_down()
            assert not publishing.done()
            async with system.subscribe(broker, address) as messages:
                ids = [m.id for m in await system.drain(messages)]
                assert (await publishing).id == "more"
                ids += [m.id for m in await system.drain(messages, quiet=2 * system.quiet)]
            assert ids.count("more") == 1

    @needs("bounded")
    async def test_publishing_to_a_full_address_gives_up_at_its_timeout(self, system: Harness, kind: Kind) -> None:
        """K3: BufferFull, retryable, and nothing of it is stored."""
        address = system.address(kind)
        async with system.connect(options=system.bounded) as broker:
            await broker.declare(address)
            await system.fill(broker, system.native(broker, address))
            began = system.now()
            with pytest.raises(BufferFull) as caught:
                await broker.publish(address, "more", id="more", timeout=system.quiet)
            assert caught.value.retryable
            assert system.quiet * 0.5 <= system.now() - began <= system.quiet + 1
            async with system.subscribe(broker, address) as messages:
                assert "more" not in [m.id for m in await system.drain(messages)]

    async def test_a_handler_slower_than_every_timeout_of_the_system_runs_once(
        self, system: Harness, kind: Kind
    ) -> None:
        """K4: sessions and leases are kept alive beside it, nothing is dropped and nothing comes twice."""
        address = system.address(kind)
        runs: list[tuple[str, int]] = []

        async def handler(message: Message[str]) -> None:
            runs.append((message.value, message.deliveries))
            await asyncio.sleep(4 * system.gone(kind))

        async with system.connect() as broker, system.connect() as other:
            await system.publish(broker, address, ["a", "b", "c"])
            options: dict[str, Any] = {"timeout": None, "prefetch": 1}
            async with (
                system.serve(broker, address, handler, **options),
                system.serve(other, address, handler, **options),
            ):
                await system.eventually(lambda: len(runs) == 3, within=20 * system.gone(kind))
                await asyncio.sleep(5 * system.gone(kind))
        assert sorted(runs) == [("a", 1), ("b", 1), ("c", 1)]

    async def test_changing_prefetch_while_messages_flow_loses_nothing(self, system: Harness, kind: Kind) -> None:
        """K5: down to one and up again, over and over."""
        address = system.address(kind)
        async with system.connect() as broker:
            await broker.publish_many(address, [f"v{n}" for n in range(120)])
            seen: list[str] = []
            async with system.subscribe(broker, address, prefetch=30) as messages:
                for prefetch in [1, 25, 3, 50, 2] * 4:
                    messages.prefetch = prefetch
                    for message in await messages.receive(limit=7, timeout=system.quiet):
                        seen.append(message.value)
                        await message.ack()
                seen += [m.value for m in await system.drain(messages)]
            assert sorted(seen) == sorted(f"v{n}" for n in range(120))

    @needs("topic", "queue")
    async def test_a_flood_on_one_address_does_not_delay_another(self, system: Harness) -> None:
        """K6: subscriptions of a service do not take each other's turns."""
        service: Service[None] = Service("workers")
        flooded, calm = system.queue("flooded"), system.topic("calm")
        latest: dict[str, float] = {}
        slow = 0

        @service.subscribe(flooded)
        async def busy(message: Message[str]) -> None:
            nonlocal slow
            slow += 1
            await asyncio.sleep(system.quiet / 10)

        @service.subscribe(calm)
        async def quick(message: Message[str]) -> None:
            latest[message.value] = system.now()

        async with system.connect() as broker:
            await broker.publish_many(flooded, ["v"] * 200)
            async with service.running(broker):
                await system.eventually(lambda: slow > 2)
                for number in range(5):
                    began = system.now()
                    await broker.publish(calm, f"v{number}")
                    await system.eventually(partial(latest.get, f"v{number}"))
                    assert latest[f"v{number}"] - began < system.quiet * 2
                assert slow < 200

    @needs("topic")
    async def test_a_hot_key_does_not_delay_the_others(self, system: Harness) -> None:
        """K6: it has one handler at a time; the other slots work for the other keys."""
        topic = system.topic(partitions=1)
        done: list[str] = []

        async def handler(message: Message[str]) -> None:
            await asyncio.sleep(system.quiet / 20)
            done.append(message.key or "")

        async with system.connect() as broker:
            items = [topic.outgoing("v", key="hot") for _ in range(200)]
            await broker.publish_many(topic, items)
            await broker.publish_many(topic, [topic.outgoing("v", key=f"cold{n}") for n in range(20)])
            async with system.serve(broker, topic, handler, concurrency=4):
                await system.eventually(lambda: len([key for key in done if key != "hot"]) == 20)
                assert done.count("hot") < 100
                await system.eventually(lambda: len(done) == 220)

    @seeds(1)
    @needs("topic")
    async def test_a_blocked_key_pauses_its_partition_and_nothing_is_lost(self, system: Harness) -> None:
        """K6: it holds at most a quarter of the window; beyond it the partition stands, with an event."""
        topic = system.topic(partitions=1)
        blocked = asyncio.Event()
        done: set[str] = set()

        async def handler(message: Message[str]) -> None:
            if message.key == "stuck":
                await blocked.wait()
            done.add(message.value)

        count = LOG_AHEAD + 500
        async with system.connect() as broker:
            await broker.publish(topic, "stuck", key="stuck")
            for first in range(0, count, 500):
                items = [topic.outgoing(f"v{n}", key=f"k{n % 50}") for n in range(first, min(first + 500, count))]
                await broker.publish_many(topic, items)
            async with system.serve(broker, topic, handler, concurrency=4, prefetch=200, retry=RetryPolicy(attempts=1)):
                await system.eventually(lambda: system.seen(PartitionPaused), "the partition pauses")
                await system.settle_down()
                assert LOG_AHEAD - 300 <= len(done) <= LOG_AHEAD
                assert "stuck" not in done
                blocked.set()
                await system.eventually(lambda: len(done) == count + 1)
                assert system.seen(PartitionResumed)
