"""TTL: what has expired is dropped with an event; it is neither delivered nor a dead letter."""

from __future__ import annotations

import asyncio

from ...errors import Reject
from ...events import DeadLettered, Expired
from ...message import Message
from ...policy import RetryPolicy
from ._harness import Harness
from ._runner import Suite, needs


class Expiring(Suite):
    @needs("queue.ttl")
    async def test_an_expired_message_is_never_delivered(self, system: Harness) -> None:
        """X1: neither when nobody was there in time nor to whoever waits already; the others are."""
        queue = system.queue()
        async with system.connect() as broker:
            await broker.publish(queue, "short", ttl=system.quiet)
            await broker.publish(queue, "long", ttl=100 * system.quiet)
            await broker.publish(queue, "forever")
            await asyncio.sleep(2 * system.quiet)
            async with broker.subscribe(queue) as messages:
                assert sorted(m.value for m in await system.drain(messages)) == ["forever", "long"]

    @needs("queue.ttl")
    async def test_a_message_is_delivered_within_its_time_to_live(self, system: Harness) -> None:
        """X1: nothing is dropped early."""
        queue = system.queue()
        async with system.connect() as broker, broker.subscribe(queue) as messages:
            for number in range(10):
                await broker.publish(queue, f"v{number}", ttl=2 * system.quiet)
            assert len(await system.take(messages, 10, within=system.quiet)) == 10

    @needs("queue.ttl")
    async def test_what_is_in_hand_when_it_expires_may_be_finished(self, system: Harness) -> None:
        """X2: the owner keeps it, and its acknowledgement counts."""
        queue = system.queue()
        async with system.connect() as broker, broker.subscribe(queue) as messages:
            await broker.publish(queue, "v", ttl=system.quiet)
            (message,) = await system.take(messages, 1)
            await asyncio.sleep(2 * system.quiet)
            await message.ack(confirm=True)
            await system.nothing(messages)

    @needs("queue.ttl")
    async def test_what_is_handed_back_after_it_has_expired_does_not_come_again(self, system: Harness) -> None:
        """X1: released on leaving, or by the end of a lease: it has expired all the same."""
        queue = system.queue()
        dying = system.connect()
        async with system.connect() as broker:
            await broker.publish(queue, "left", ttl=2 * system.quiet)
            async with broker.subscribe(queue) as messages:
                await system.take(messages, 1)
                await asyncio.sleep(3 * system.quiet)
            async with dying, dying.subscribe(queue) as held:
                await broker.publish(queue, "killed", ttl=2 * system.quiet)
                (message,) = await system.take(held, 1)
                assert message.value == "killed"
                await asyncio.sleep(3 * system.quiet)
                await system.crash(dying)
            async with broker.subscribe(queue) as messages:
                await system.nothing(messages, quiet=system.gone("queue") + system.quiet)

    @needs("queue.ttl")
    async def test_a_retry_keeps_the_expiry(self, system: Harness) -> None:
        """X3: a message whose next attempt would come too late is dropped, and not dead-lettered."""
        queue = system.queue()
        attempts: list[int] = []

        async def handler(message: Message[str]) -> None:
            attempts.append(message.attempt)
            raise LookupError

        policy = RetryPolicy(attempts=100, wait_initial=system.quiet, wait_max=system.quiet, wait_jitter=0)
        async with system.connect() as broker, system.serve(broker, queue, handler, retry=policy):
            await broker.publish(queue, "v", ttl=3.5 * system.quiet)
            await asyncio.sleep(10 * system.quiet)
            assert 1 < len(attempts) <= 4, "the fourth is only a little before the end"
            assert attempts == sorted({*attempts})
            assert not system.seen(DeadLettered)
            assert await system.browse(broker, queue.dead_letters) == []

    @needs("queue.ttl")
    async def test_dead_letters_and_what_is_redriven_never_expire(self, system: Harness) -> None:
        """X3: a message that died in time stays to be looked at, and comes back without a time to live."""
        queue = system.queue()
        seen: list[str] = []

        async def handler(message: Message[str]) -> None:
            seen.append(message.value)
            if len(seen) == 1:
                raise Reject("no")

        async with system.connect() as broker, system.serve(broker, queue, handler):
            await broker.publish(queue, "v", ttl=system.quiet)
            await asyncio.sleep(3 * system.quiet)
            (letter,) = await system.browse(broker, queue.dead_letters)
            assert letter.dead.reason == "no"
            await broker.redrive(queue.dead_letters)
            await system.eventually(lambda: len(seen) == 2)

    @needs("queue.ttl")
    async def test_expired_messages_are_counted_by_events(self, system: Harness) -> None:
        """X4: dropped with an event, and nothing is left waiting."""
        queue = system.queue()
        async with system.connect() as broker:
            for number in range(7):
                await broker.publish(queue, f"v{number}", ttl=system.quiet)
            await broker.publish(queue, "stays")
            await asyncio.sleep(2 * system.quiet)
            async with broker.subscribe(queue) as messages:
                assert [m.value for m in await system.drain(messages)] == ["stays"]
                await system.eventually(lambda: sum(event.count for event in system.seen(Expired)) == 7)
            assert {event.address for event in system.seen(Expired)} == {system.prefix + queue.name}
            backlog = await broker.backlog(queue)
            assert backlog.waiting in {None, 0}
            assert backlog.dead in {None, 0}

    @needs("queue.ttl", "queue.delay")
    async def test_the_time_to_live_runs_while_a_message_is_delayed(self, system: Harness) -> None:
        """X1: it counts from acceptance: what expires before it is due never comes."""
        queue = system.queue()
        async with system.connect() as broker, broker.subscribe(queue) as messages:
            await broker.publish(queue, "expires", delay=2 * system.quiet, ttl=system.quiet)
            await broker.publish(queue, "comes", delay=system.quiet, ttl=4 * system.quiet)
            (message,) = await system.take(messages, 1)
            assert message.value == "comes"
            await message.ack()
            await system.nothing(messages, quiet=4 * system.quiet)
