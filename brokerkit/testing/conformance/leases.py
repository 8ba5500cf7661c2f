"""LEASES and REDELIVERY: who owns a message, for how long, and who gets it when the owner is gone."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import pytest

from ...address import AnyQueue, AnyTopic
from ...broker import Broker
from ...driver import Settlement
from ...errors import DeliveryLost
from ...message import Message
from ...policy import Batch, RetryPolicy
from ._harness import Harness, Kind
from ._raw import raw, raw_queue
from ._runner import Suite, needs, restarts


class Leases(Suite):
    @needs("queue")
    async def test_a_dead_owners_message_does_not_come_before_its_lease_ends(self, system: Harness) -> None:
        """L1: ownership runs its full time from the delivery on, then it ends."""
        queue = system.queue()
        doomed = system.connect()
        async with system.connect() as broker:
            async with doomed, system.subscribe(doomed, queue) as held:
                began = system.now()  # the lease begins on the server, before its owner knows
                await system.publish(broker, queue, ["a"])
                await system.take(held, 1)
                await system.crash(doomed)
            async with system.subscribe(broker, queue) as messages:
                (again,) = await system.take(messages, 1, within=system.gone("queue"))
            assert again.value == "a"
            assert system.prompt or system.now() - began >= system.lease * 0.99
            assert (again.attempt, again.deliveries) == (1, 2)

    async def test_what_a_killed_consumer_held_comes_to_another(self, system: Harness, kind: Kind) -> None:
        """L5: all of it, within the lease, on an idle address too; what was done does not come."""
        address = system.address(kind)
        doomed = system.connect()
        async with system.connect() as broker:
            async with doomed, system.subscribe(doomed, address) as held:
                await system.publish(broker, address, [f"v{n}" for n in range(20)])
                taken = await system.take(held, 20)
                for message in taken[:5]:
                    await message.ack(confirm=True)
                await system.crash(doomed)
            async with system.subscribe(broker, address) as messages:
                again = await system.take(messages, 15, within=system.gone(kind))
                assert sorted(m.id for m in again) == sorted(m.id for m in taken[5:])
                assert {m.attempt for m in again} == {1}, "a crash is no failed attempt"
                assert {m.deliveries for m in again} == {2}
                for message in again:
                    await message.ack()
                await system.nothing(messages)

    async def test_a_lease_is_renewed_while_its_owner_lives(self, system: Harness, kind: Kind) -> None:
        """L2: a message in hand for many leases stays in that hand, and its acknowledgement counts."""
        address = system.address(kind)
        async with system.connect() as one, system.connect() as two:
            await system.publish(one, address, ["a"])
            async with system.subscribe(one, address) as held:
                (message,) = await system.take(held, 1)
                async with system.subscribe(two, address) as messages:
                    await system.nothing(messages, quiet=5 * system.gone(kind))
                    await message.ack(confirm=True)
                    await system.nothing(messages, quiet=system.gone(kind))

    async def test_a_lost_lease_is_not_renewed_back(self, system: Harness, kind: Kind) -> None:
        """L2, L4: one that comes back from a stop does not take the message from its new owner."""
        address = system.address(kind)
        async with system.connect() as sleeper, system.connect() as broker:
            await system.publish(broker, address, ["a"])
            async with system.subscribe(sleeper, address) as held:
                (stale,) = await system.take(held, 1)
                await system.freeze(sleeper)
                async with system.subscribe(broker, address) as messages:
                    (message,) = await system.take(messages, 1)
                    assert message.deliveries == 2
                    await system.thaw(sleeper)
                    for _ in range(3):
                        await system.nothing(held, quiet=system.gone(kind))
                    with pytest.raises(DeliveryLost):
                        await stale.ack(confirm=True)
                    await message.ack(confirm=True)
                await system.nothing(held, quiet=system.gone(kind))

    async def test_what_was_received_and_is_lost_is_not_begun(self, system: Harness, kind: Kind) -> None:
        """L2, L4: one that was stopped with messages that nobody had in hand begins none that others have by now."""
        address = system.address(kind)
        async with (
            system.connect() as sleeper,
            system.connect() as broker,
            system.subscribe(sleeper, address) as held,
        ):
            await system.publish(broker, address, ["a", "b", "c"])
            await system.eventually(lambda: len(held.intake.ready) == 3)
            await system.freeze(sleeper)
            async with system.subscribe(broker, address) as messages:
                taken = await system.take(messages, 3)
                await system.thaw(sleeper)
                await system.nothing(held, quiet=2 * system.gone(kind))
                for message in taken:
                    await message.ack(confirm=True)
            await system.nothing(held, quiet=system.gone(kind))

    async def test_a_batch_that_is_lost_while_it_waits_for_more_is_not_begun(self, system: Harness, kind: Kind) -> None:
        """L2, L4: neither while its owner cannot know what has become of it, nor when it knows."""
        address = system.address(kind)
        ran: list[str] = []

        async def handler(messages: Sequence[Message[str]]) -> None:
            ran.extend(message.value for message in messages)

        wait = 2 * system.gone(kind) + system.quiet
        async with system.connect() as sleeper, system.connect() as broker:
            async with system.serve(sleeper, address, handler, batch=Batch(10, wait=wait)):
                began = system.now()
                await system.publish(broker, address, ["a", "b", "c"])
                await system.settle_down()
                await system.freeze(sleeper)
                async with system.subscribe(broker, address) as messages:
                    taken = await system.take(messages, 3)
                    assert {message.deliveries for message in taken} == {2}
                    await system.thaw(sleeper)
                    await system.nothing(messages, quiet=max(0.0, began + wait - system.now()) + system.gone(kind))
                    assert ran == []
                    for message in taken:
                        await message.ack(confirm=True)
            assert ran == []

    async def test_a_pause_shorter_than_the_lease_costs_nothing(self, system: Harness, kind: Kind) -> None:
        """L2: who was stopped for a while and lives again goes on renewing, and its acknowledgement counts."""
        address = system.address(kind)
        pause = (system.session if kind == "topic" else system.lease) / 2
        async with system.connect() as sleeper, system.connect() as broker:
            await system.publish(broker, address, ["a"])
            async with system.subscribe(sleeper, address) as held, system.subscribe(broker, address) as messages:
                mine = await held.receive(timeout=system.quiet)
                theirs = await messages.receive(timeout=system.quiet) if not mine else ()
                (message,) = (*mine, *theirs)
                owner, waiting = (sleeper, messages) if mine else (broker, held)
                await system.freeze(owner)
                await asyncio.sleep(pause)
                await system.thaw(owner)
                await system.nothing(waiting, quiet=2 * system.gone(kind))
                await message.ack(confirm=True)
                await system.nothing(waiting, quiet=system.gone(kind))

    async def test_a_handler_that_hangs_is_ended_by_its_timeout(self, system: Harness, kind: Kind) -> None:
        """L3: the lease is not renewed for ever: the run is cancelled and counts as a failed attempt."""
        address = system.address(kind)
        runs: list[tuple[int, float]] = []
        cancelled: list[str] = []
        timeout = 2 * system.gone(kind)

        async def handle(message: Message[str]) -> None:
            runs.append((message.attempt, system.now()))
            if message.attempt == 1:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    cancelled.append(message.id)
                    raise

        async with system.connect() as broker:
            await system.publish(broker, address, ["a"])
            retry = RetryPolicy(wait_initial=0)
            async with system.serve(broker, address, handle, timeout=timeout, retry=retry):
                await system.eventually(lambda: len(runs) == 2)
        assert [attempt for attempt, _ in runs] == [1, 2]
        assert cancelled == ["a"]
        assert timeout * 0.99 <= runs[1][1] - runs[0][1] <= timeout + system.quiet

    async def test_a_message_has_one_owner_at_a_time(self, system: Harness, kind: Kind) -> None:
        """L4: while many consumers take, nack and ack, no two of them hold the same message."""
        address = system.address(kind)
        owners: Counter[str] = Counter()
        done: Counter[str] = Counter()
        doubly: list[str] = []
        total = 60
        async with system.connect() as broker, asyncio.TaskGroup() as tasks:

            async def consume(number: int) -> None:
                async with system.connect() as own, system.subscribe(own, address, prefetch=5) as messages:
                    while len(done) < total:
                        for message in await messages.receive(limit=5, timeout=system.quiet / 10):
                            owners[message.id] += 1
                            if owners[message.id] > 1:
                                doubly.append(message.id)
                            await asyncio.sleep(0.001 * number)
                            owners[message.id] -= 1
                            if message.attempt < 3:
                                await message.nack()
                            else:
                                await message.ack()
                                done[message.id] += 1

            for number in range(4):
                tasks.create_task(consume(number))
            await system.publish(broker, address, [f"v{n}" for n in range(total)])
        assert doubly == []
        assert done == Counter(f"v{n}" for n in range(total))

    async def test_messages_that_wait_for_a_handler_keep_their_lease(self, system: Harness, kind: Kind) -> None:
        """L7: prefetched and not started for many leases, each is handled once, by its owner."""
        address = system.address(kind)
        runs: Counter[str] = Counter()
        deliveries: set[int] = set()
        async with system.connect() as one, system.connect() as two:
            await system.publish(one, address, [f"v{n}" for n in range(10)])

            async def handle(message: Message[str]) -> None:
                runs[message.id] += 1
                deliveries.add(message.deliveries)
                await asyncio.sleep(system.lease / 2)

            async with system.serve(one, address, handle, concurrency=1, prefetch=10):
                await system.eventually(lambda: runs)
                async with system.serve(two, address, handle, concurrency=1, prefetch=10):
                    await system.eventually(lambda: len(runs) == 10, within=20 * system.lease + system.deadline)
                    await asyncio.sleep(system.gone(kind))
        assert runs == Counter(f"v{n}" for n in range(10))
        assert deliveries == {1}

    @restarts
    async def test_the_number_of_attempts_survives_every_owner(self, system: Harness, kind: Kind) -> None:
        """L8: it grows by one with each failure, whether the process restarts, leaves or stays."""
        address = system.address(kind)
        attempts: list[int] = []
        async with system.connect() as broker:
            await system.publish(broker, address, ["a"])
        for step in range(3):
            async with system.connect() as broker, system.subscribe(broker, address) as messages:
                (message,) = await system.take(messages, 1)
                attempts.append(message.attempt)
                await message.nack()
                if step % 2:
                    (message,) = await system.take(messages, 1)
                    attempts.append(message.attempt)
                    await message.nack()
            await system.restart()
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            (message,) = await system.take(messages, 1)
            attempts.append(message.attempt)
        assert attempts == [1, 2, 3, 4, 5]

    async def test_the_number_of_deliveries_counts_crashes(self, system: Harness, kind: Kind) -> None:
        """L8: each process that dies with the message adds one; one that hands it back adds none."""
        address = system.address(kind)
        numbers: list[tuple[int, int]] = []
        async with system.connect() as broker:
            await system.publish(broker, address, ["a"])
        for crashes in (True, False, True, False, True):
            broker = system.connect()
            async with broker, system.subscribe(broker, address) as messages:
                (message,) = await system.take(messages, 1, within=system.gone(kind))
                numbers.append((message.attempt, message.deliveries))
                if crashes:
                    await system.crash(broker)
        assert numbers == [(1, 1), (1, 2), (1, 2), (1, 3), (1, 3)]

    async def test_of_many_that_want_a_dead_owners_messages_each_goes_to_one(self, system: Harness, kind: Kind) -> None:
        """L9: three consumers wait for the same twenty messages."""
        address = system.address(kind)
        seen: Counter[str] = Counter()
        doomed = system.connect()
        async with doomed, system.subscribe(doomed, address) as held:
            await system.publish(doomed, address, [f"v{n}" for n in range(20)])
            await system.take(held, 20)
            await system.crash(doomed)

        async def consume() -> None:
            async with system.connect() as broker, system.subscribe(broker, address) as messages:
                seen.update(m.id for m in await system.drain(messages, quiet=2 * system.gone(kind)))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(consume())
        assert seen == Counter(f"v{n}" for n in range(20))

    @needs("queue")
    async def test_a_queue_deleted_under_its_consumer_wedges_nothing(self, system: Harness) -> None:
        """L10: what is in hand can be settled or is lost, and the queue can be made anew."""
        queue = raw_queue(system)
        async with raw(system, queue) as opened, raw(system) as other:
            await opened.put(queue, ["a", "b"])
            async with opened.consume(queue) as consumer:
                taken = await opened.take(consumer, 2)
                await other.driver.delete(queue)
                results = await consumer.settle([Settlement(delivery) for delivery in taken], confirm=True)
                assert all(result is None or isinstance(result, DeliveryLost) for result in results), results
            await other.driver.declare(queue)
            await other.put(queue, ["c"])
            assert [d.record.id for d in await opened.left(queue)] == ["c"]

    @needs("topic")
    async def test_a_message_that_outlives_the_retention_in_hand_wedges_nothing(self, system: Harness) -> None:
        """L10: it can be settled or is lost; the ones behind it come."""
        topic = system.topic(partitions=1, retention=max(1.0, system.lease))
        async with system.connect() as broker, system.subscribe(broker, topic) as messages:
            await system.publish(broker, topic, ["old"])
            (old,) = await system.take(messages, 1)
            await asyncio.sleep(3 * system.lease)
            await system.publish(broker, topic, ["new"])
            (new,) = await system.take(messages, 1)
            assert new.value == "new"
            await new.ack(confirm=True)
            with suppress(DeliveryLost):
                await old.ack(confirm=True)
            await system.publish(broker, topic, ["newer"])
            assert [m.value for m in await system.drain(messages)] == ["newer"]


class Poison(Suite):
    """A message that kills whoever handles it must cost only itself."""

    async def test_a_poison_message_is_dead_lettered_and_the_others_are_handled(
        self, system: Harness, kind: Kind
    ) -> None:
        """L8: it kills its process ten times with a hundred prefetched: one dead letter, 99 handled."""
        address = system.topic(partitions=1) if kind == "topic" else system.queue()
        handled: Counter[str] = Counter()
        deaths = 0
        async with system.connect() as broker:
            await system.publish(broker, address, [f"v{n}" for n in range(100)])
            for _ in range(20):
                process = system.connect()
                died = asyncio.Event()

                async def handle(message: Message[str], died: asyncio.Event = died) -> None:
                    if died.is_set():  # this process is dead
                        await asyncio.Event().wait()
                    if message.value == "v42":
                        died.set()
                        await asyncio.Event().wait()
                    handled[message.value] += 1

                async with process, system.serve(process, address, handle, prefetch=100, max_deliveries=10, drain=0):
                    await system.eventually(partial(self.over, died, system, broker, address))
                    if died.is_set():
                        deaths += 1
                        await system.crash(process)
                if await self.done(system, broker, address):
                    break
            letters = await system.browse(broker, system.letters(address))
        assert [letter.value for letter in letters] == ["v42"]
        assert letters[0].dead.attempts == 0, "no run of it has ever failed: it never came to an end"
        assert deaths == 10
        assert sorted(handled) == sorted(f"v{n}" for n in range(100) if n != 42)

    async def over(self, died: asyncio.Event, system: Harness, broker: Broker, address: AnyTopic | AnyQueue) -> bool:
        return died.is_set() or await self.done(system, broker, address)

    async def done(self, system: Harness, broker: Broker, address: AnyTopic | AnyQueue) -> bool:
        backlog = await system.backlog(broker, address)
        return backlog.waiting in (0, None) and backlog.in_flight in (0, None) and bool(backlog.dead)

    async def test_warm_restarts_never_dead_letter_what_has_not_run(self, system: Harness, kind: Kind) -> None:
        """L8: with attempts=1 and ten restarts in between, every message runs, once."""
        address = system.address(kind)
        ran: Counter[str] = Counter()
        async with system.connect() as broker:
            await system.publish(broker, address, [f"v{n}" for n in range(50)])
            for restart in range(11):
                run = asyncio.Event()

                async def handle(message: Message[str], run: asyncio.Event = run, restart: int = restart) -> None:
                    if restart < 10:
                        run.set()
                        await asyncio.Event().wait()  # cancelled by the stop: handed back
                    ran[message.value] += 1

                retry = RetryPolicy(attempts=1)
                async with system.serve(
                    broker, address, handle, retry=retry, prefetch=50, drain=0 if restart < 10 else 25
                ):
                    await (run.wait() if restart < 10 else system.eventually(lambda: len(ran) == 50))
            assert await system.browse(broker, system.letters(address)) == []
        assert ran == Counter(f"v{n}" for n in range(50))
