"""What is left to store when a subscription or a service ends, while the system refuses for a moment."""

from __future__ import annotations

import asyncio

from brokerkit import BrokerUnavailable, Message, Queue, Reject, Service, connect
from brokerkit.testing import dead_letters, faults, run

QUEUE = Queue("emails", str)


def test_leaving_a_subscription_waits_until_its_acknowledgements_are_stored() -> None:
    async def main() -> None:
        async with connect("memory://") as broker:
            async with broker.subscribe(QUEUE) as messages:
                for number in range(5):
                    await broker.publish(QUEUE, f"v{number}")
                taken = await messages.receive(limit=5, timeout=1)
                faults(broker).fail_settles(BrokerUnavailable("not now"), 12)
                for message in taken:
                    await message.ack()
            async with broker.subscribe(QUEUE) as messages:
                assert await messages.receive(timeout=60) == []

    for seed in range(5):
        run(main, seed=seed)


def test_a_drain_waits_until_outcomes_are_stored() -> None:
    """An acknowledgement, a staged message and a dead letter: each is stored once."""
    out = Queue("out", str)
    service = Service("mailer")
    handled = asyncio.Event()

    @service.subscribe(QUEUE, concurrency=3)
    async def handler(message: Message[str]) -> None:
        handled.set()
        await asyncio.sleep(1)
        if message.value == "bad":
            raise Reject("no")
        await message.publish(out, f"out {message.value}")

    async def main() -> None:
        async with connect("memory://") as broker:
            await broker.publish_many(QUEUE, ["good", "bad"])
            handled.clear()
            async with service.running(broker):
                async with asyncio.timeout(60):
                    await handled.wait()
                faults(broker).fail_settles(BrokerUnavailable("not now"), 4)
            assert [letter.value for letter in await dead_letters(broker, QUEUE)] == ["bad"]
            backlog = await broker.backlog(QUEUE)
            assert (backlog.waiting, backlog.in_flight) == (0, 0)
            assert (await broker.backlog(out)).waiting == 1

    for seed in range(5):
        run(main, seed=seed)
