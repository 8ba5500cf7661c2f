"""CAPABILITIES: what a driver claims is what it does; what it does not claim is refused, by name and in time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from ...address import Address
from ...broker import Broker
from ...driver import Capabilities as Claims
from ...errors import CapabilityError
from ...message import Message
from ...policy import Start
from ._harness import Harness, Kind
from ._raw import names, raw, raw_address
from ._runner import Suite, needs, seeds


async def nothing(message: Message[str]) -> None:
    return None


@asynccontextmanager
async def without(system: Harness, *names: str) -> AsyncIterator[Broker]:
    """Connect to a system that claims less than this one."""
    async with system.connect() as broker:
        driver = system.driver(broker)
        true = driver.capabilities

        async def fewer(address: Address) -> Claims:
            return msgspec.structs.replace(await true(address), **dict.fromkeys(names, False))

        driver.capabilities = fewer  # type: ignore[method-assign]
        yield broker


def refused(system: Harness, option: str, address: Any) -> Any:
    """Expect a `CapabilityError` that names option, address and backend."""
    claim = system.topics if address.kind == "topic" else system.queues
    assert claim is not None
    return pytest.raises(CapabilityError, match=rf"(?s)(?=.*{option})(?=.*{address.name})(?=.*{claim.backend})")


class Capabilities(Suite):
    @seeds(1)
    async def test_the_driver_claims_what_its_harness_says(self, system: Harness, kind: Kind) -> None:
        """Neither more nor less, and always the same."""
        address = raw_address(system, kind)
        async with raw(system, address) as opened:
            expected = system.topics if kind == "topic" else system.queues
            assert await opened.driver.capabilities(address) == expected
            assert await opened.driver.capabilities(address) == expected

    @seeds(1)
    async def test_the_driver_can_tell_before_the_address_exists(self, system: Harness, kind: Kind) -> None:
        """It is asked before the first use, to refuse in time."""
        async with raw(system) as opened:
            expected = system.topics if kind == "topic" else system.queues
            assert await opened.driver.capabilities(raw_address(system, kind)) == expected

    @needs("queue")
    async def test_delay_is_refused_where_it_is_not_claimed(self, system: Harness) -> None:
        """At the call; what is not delayed goes through."""
        queue = system.queue()
        async with without(system, "delay") as broker:
            with refused(system, "delay", queue):
                await broker.publish(queue, "late", delay=1)
            await broker.publish(queue, "now")
            async with broker.subscribe(queue) as messages:
                assert [m.value for m in await system.drain(messages)] == ["now"]

    @needs("queue")
    async def test_ttl_is_refused_where_it_is_not_claimed(self, system: Harness) -> None:
        """At the call."""
        queue = system.queue()
        async with without(system, "ttl") as broker:
            with refused(system, "ttl", queue):
                await broker.publish(queue, "value", ttl=1)
            async with broker.subscribe(queue) as messages:
                await system.nothing(messages)

    @needs("queue")
    async def test_priorities_are_refused_where_they_are_not_claimed(self, system: Harness) -> None:
        """At the first use of the queue, whatever that is."""
        queue = system.queue(priorities=2)
        await self.every_use(system, "priorit", queue, "priority")

    @needs("queue")
    async def test_dedup_is_refused_where_it_is_not_claimed(self, system: Harness) -> None:
        """At the first use of the queue, whatever that is."""
        queue = system.queue(dedup=60)
        await self.every_use(system, "dedup", queue, "dedup")

    async def every_use(self, system: Harness, option: str, queue: Any, capability: str) -> None:
        async with without(system, capability) as broker:
            with refused(system, option, queue):
                await broker.publish(queue, "value")
            with refused(system, option, queue):
                await broker.declare(queue)
            with refused(system, option, queue):
                async with broker.subscribe(queue):
                    pass
            with refused(system, option, queue):
                async with system.serve(broker, queue, nothing):
                    pass
            assert await system.driver(broker).describe(raw_address(system, "queue")) is None

    @needs("topic")
    async def test_replay_is_refused_where_it_is_not_claimed(self, system: Harness) -> None:
        """From a time and from a position: at service start, on subscribing and on browsing."""
        topic = system.topic()
        async with without(system, "replay") as broker:
            await broker.publish(topic, "value")
            for start in (Start.at(datetime(2030, 1, 1, tzinfo=UTC)), Start.position("0-0")):
                with refused(system, "start", topic):
                    async with broker.subscribe(topic, start=start):
                        pass
                with refused(system, "start", topic):
                    async with broker.subscribe(topic, group="g", start=start):
                        pass
                with refused(system, "start", topic):
                    async with system.serve(broker, topic, nothing, start=start):
                        pass
                with refused(system, "seek", topic):
                    await broker.seek(topic, "g", start)
                with refused(system, "start", topic):
                    async for _ in broker.browse(topic, start=start):
                        pass

    @needs("queue")
    async def test_migration_is_refused_where_it_is_not_claimed(self, system: Harness) -> None:
        """At the call."""
        queue = system.queue()
        async with without(system, "migrate") as broker:
            await broker.declare(queue)
            with refused(system, "migrat", queue):
                await broker.migrate(queue)

    @needs("queue", "not queue.shared")
    async def test_more_consumers_than_can_take_part_are_refused(self, system: Harness) -> None:
        """On subscribing and at service start; the others go on, and one takes the place of another that has left."""
        queue = system.queue()
        async with system.connect() as broker, contextlib.AsyncExitStack() as stack:
            taking = [await stack.enter_async_context(broker.subscribe(queue)) for _ in range(system.consumers - 1)]
            async with broker.subscribe(queue) as last:

                async def no_more() -> bool:
                    # One of the others may just have been out for a moment, where much else goes on.
                    try:
                        with refused(system, "consumers", queue):
                            async with broker.subscribe(queue):
                                pass
                        with refused(system, "consumers", queue):
                            async with system.serve(broker, queue, nothing):
                                pass
                    except pytest.fail.Exception:
                        return False
                    return True

                await system.eventually(no_more, "more consumers than can take part are let in")
                await system.publish(broker, queue, names(10 * system.consumers))
                parts = await asyncio.gather(*(system.drain(messages) for messages in (*taking, last)))
                assert sorted(m.id for part in parts for m in part) == names(10 * system.consumers)
            async with broker.subscribe(queue) as heir:
                await system.publish(broker, queue, names(10 * system.consumers, "later"))
                parts = await asyncio.gather(*(system.drain(messages) for messages in (*taking, heir)))
                assert sorted(m.id for part in parts for m in part) == names(10 * system.consumers, "later")
                assert parts[-1], "who came last takes no part"
