"""What a session does with messages that it may not own any more, or that have crashed too often; in virtual time."""

from __future__ import annotations

import asyncio
import math

import pytest

from brokerkit import Message, Queue, Service, Topic, connect
from brokerkit.testing import faults, idle, run

EVENTS = Topic("events", int, partitions=1)
JOBS = Queue("jobs", int)


@pytest.mark.parametrize("address", [EVENTS, JOBS], ids=["topic", "queue"])
def test_what_a_frozen_process_may_have_lost_is_not_started(address: Topic[int] | Queue[int]) -> None:
    async def main() -> None:
        ran: list[int] = []
        service = Service("s")
        inside, go = asyncio.Event(), asyncio.Event()

        @service.subscribe(address)
        async def handler(message: Message[int]) -> None:
            ran.append(message.value)
            inside.set()
            await go.wait()

        async with connect("memory://") as broker, service.running(broker):
            for number in range(3):
                if isinstance(address, Topic):
                    await broker.publish(address, number, key="k")
                else:
                    await broker.publish(address, number)
            await inside.wait()
            (consumer,) = (c for c in broker._driver.consumers if c._held)  # type: ignore[attr-defined]
            consumer.owned_until = 0.0  # as of a process that runs on after a long stop
            go.set()
            await asyncio.sleep(5)
            assert ran == [0]
            if isinstance(address, Topic):
                await broker.publish(address, 3, key="k")
            consumer.owned_until = math.inf  # the server says that all is still its own
            await idle(broker)
            assert ran == ([0, 1, 2, 3] if isinstance(address, Topic) else [0, 1, 2])

    run(main())


def test_a_reader_can_tell_whether_it_still_owns_what_it_has_in_hand() -> None:
    async def main() -> None:
        async with connect("memory://owned") as broker:
            await broker.publish(JOBS, 1)
            async with broker.subscribe(JOBS, prefetch=1) as messages:
                server = faults(broker)
                for away, back in ((server.freeze, server.thaw), (server.disconnect, server.reconnect)):
                    [message] = await messages.receive(timeout=60)
                    assert messages.owns(message)
                    away()
                    await asyncio.sleep(2 * JOBS.lease)
                    back()
                    await asyncio.sleep(JOBS.lease)
                    assert not messages.owns(message)
                    await message.release()

    run(main())


def test_what_waits_behind_a_message_that_is_dead_lettered_for_its_deliveries_is_judged_like_it() -> None:
    async def main() -> None:
        ran: list[int] = []
        service = Service("s")

        @service.subscribe(EVENTS, max_deliveries=1, concurrency=4)
        async def handler(message: Message[int]) -> None:
            ran.append(message.value)

        async with connect("memory://crashes") as broker:
            async with connect("memory://crashes") as other, other.subscribe(EVENTS, group="s") as messages:
                for number in range(3):
                    await broker.publish(EVENTS, number, key="k")
                await messages.receive(timeout=10)
                faults(other).cut()
            await asyncio.sleep(20)
            await broker.publish(EVENTS, 3, key="k")
            async with service.running(broker):
                await idle(broker)
            assert ran == [3]
            assert [letter.value async for letter in broker.browse(EVENTS.dead_letters("s"))] == [0, 1, 2]

    run(main())
