"""ACK and NACK: what each outcome does, to whom it is told, and that a late one does nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

import pytest

from ...broker import Broker
from ...driver import Settlement
from ...errors import AlreadySettled, BrokerUnavailable, Closed, DeliveryLost
from ...events import Lost
from ...message import Message
from ...policy import RetryPolicy
from ._harness import Harness, Kind
from ._raw import raw, raw_address
from ._runner import Suite, needs


class Acknowledging(Suite):
    async def test_an_acknowledged_message_never_comes_again(self, system: Harness, kind: Kind) -> None:
        """A1: not to this consumer, not to another of the group, not after leaving."""
        address = system.address(kind)
        async with system.connect() as one, system.connect() as two:
            await system.publish(one, address, ["a", "b", "c"])
            async with system.subscribe(one, address) as messages, system.subscribe(two, address) as others:
                taken = [*await system.drain(messages), *await system.drain(others)]
                assert sorted(m.value for m in taken) == ["a", "b", "c"]
                await system.nothing(messages)
                await system.nothing(others, quiet=system.gone(kind))
            async with system.subscribe(two, address) as messages:
                await system.nothing(messages)

    async def test_a_confirmed_acknowledgement_outlives_the_process(self, system: Harness, kind: Kind) -> None:
        """A1, A7: when ack(confirm=True) has returned it is stored, whatever happens the moment after."""
        address = system.address(kind)
        doomed = system.connect()
        async with doomed:
            await system.publish(doomed, address, ["a", "b", "c"])
            async with system.subscribe(doomed, address) as messages:
                taken = await system.take(messages, 3)
                for message in taken[:2]:
                    await message.ack(confirm=True)
                await system.crash(doomed)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            again = await system.drain(messages, quiet=system.gone(kind))
        assert [m.id for m in again] == [taken[2].id]

    async def test_a_plain_acknowledgement_is_stored_within_a_second(self, system: Harness, kind: Kind) -> None:
        """A1: a process that dies later than that repeats nothing."""
        address = system.address(kind)
        doomed = system.connect()
        async with doomed:
            await system.publish(doomed, address, ["a", "b", "c"])
            async with system.subscribe(doomed, address) as messages:
                for message in await system.take(messages, 3):
                    await message.ack()
                await asyncio.sleep(1.1)
                await system.crash(doomed)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await system.nothing(messages, quiet=system.gone(kind))

    async def test_the_first_outcome_counts(self, system: Harness, kind: Kind) -> None:
        """A2: the same again is no error, another one is AlreadySettled and changes nothing."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await system.publish(broker, address, ["acked"])
            (message,) = await system.take(messages, 1)
            await message.ack()
            await message.ack()
            await message.ack(confirm=True)
            for other in (message.nack(), message.reject("no")):
                with pytest.raises(AlreadySettled):
                    await other
            await system.nothing(messages)
            await system.publish(broker, address, ["nacked"])
            (message,) = await system.take(messages, 1)
            await message.nack()
            for other in (message.ack(), message.ack(confirm=True), message.reject("no")):
                with pytest.raises(AlreadySettled):
                    await other
            (message,) = await system.take(messages, 1)
            assert (message.value, message.attempt) == ("nacked", 2)
            await message.ack(confirm=True)
            await system.nothing(messages)
            assert await system.browse(broker, system.letters(address)) == []

    async def test_a_nacked_message_comes_again_as_the_next_attempt(self, system: Harness, kind: Kind) -> None:
        """A3: the same id and value, attempt + 1."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await broker.publish(address, "value", id="id", headers={"name": "text"})
            for attempt in (1, 2, 3, 4):
                (message,) = await system.take(messages, 1)
                assert (message.id, message.value, message.attempt) == ("id", "value", attempt)
                assert message.headers == {"name": "text"}
                await (message.nack() if attempt < 4 else message.ack())
            await system.nothing(messages)

    async def test_acknowledging_out_of_order_commits_nothing_early(self, system: Harness, kind: Kind) -> None:
        """A4: after a crash exactly the unsettled messages come again, whatever was acknowledged behind them."""
        address = system.topic(partitions=1) if kind == "topic" else system.queue()
        doomed = system.connect()
        async with doomed:
            await system.publish(doomed, address, [f"v{n}" for n in range(40)])
            async with system.subscribe(doomed, address) as messages:
                taken = {m.value: m for m in await system.take(messages, 40)}
                for number in [*range(39, 20, -1), *range(4, 20, 2), 0]:
                    await taken[f"v{number}"].ack(confirm=True)
                await system.crash(doomed)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            again = await system.drain(messages, quiet=system.gone(kind))
        assert sorted(m.value for m in again) == sorted(f"v{n}" for n in [1, 2, 3, 20, *range(5, 20, 2)])

    async def test_a_stale_acknowledgement_has_no_effect(self, system: Harness, kind: Kind) -> None:
        """A5, L6: after a stop longer than the lease it is DeliveryLost, and the new owner's message stays its own."""
        address = system.address(kind)
        async with system.connect() as sleeper, system.connect() as broker:
            async with system.subscribe(sleeper, address) as held:
                await system.publish(sleeper, address, ["a"])
                (stale,) = await system.take(held, 1)
                await system.freeze(sleeper)
                successor = system.connect()
                async with successor, system.subscribe(successor, address) as messages:
                    (message,) = await system.take(messages, 1)
                    assert message.id == stale.id
                    await system.thaw(sleeper)
                    with pytest.raises(DeliveryLost):
                        await stale.ack(confirm=True)
                    await system.crash(successor)
            async with system.subscribe(broker, address) as messages:
                again = await system.drain(messages, quiet=system.gone(kind))
            assert [m.id for m in again] == [stale.id], "the stale acknowledgement has settled somebody else's message"

    async def test_a_late_acknowledgement_counts_or_says_so(self, system: Harness, kind: Kind) -> None:
        """A6: the lease is over, but nobody took the message: either the ack is stored, or it is DeliveryLost."""
        address = system.address(kind)
        async with system.connect() as sleeper:
            await system.publish(sleeper, address, ["a"])
            async with system.subscribe(sleeper, address, prefetch=1) as messages:
                (message,) = await system.take(messages, 1)
                await system.freeze(sleeper)
                await asyncio.sleep(system.gone(kind))
                await system.thaw(sleeper)
                try:
                    await message.ack(confirm=True)
                    accepted = True
                except DeliveryLost as error:
                    accepted = False
                    assert not error.published
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            again = await system.drain(messages, quiet=system.gone(kind))
        assert [m.value for m in again] == ([] if accepted else ["a"])

    async def test_a_confirmed_acknowledgement_is_not_promised_without_a_connection(
        self, system: Harness, kind: Kind
    ) -> None:
        """A7: it waits, or raises; a message whose ack was confirmed later never comes again, else it does."""
        address = system.address(kind)
        async with system.connect() as broker:
            await system.publish(broker, address, ["a"])
            async with system.subscribe(broker, address) as messages:
                (message,) = await system.take(messages, 1)
                await system.disconnect(broker)
                task = asyncio.ensure_future(message.ack(confirm=True))
                await asyncio.wait([task], timeout=system.quiet)
                assert not task.done() or isinstance(task.exception(), (BrokerUnavailable, DeliveryLost))
                await system.reconnect(broker)
                try:
                    await task
                    accepted = True
                except (BrokerUnavailable, DeliveryLost):
                    accepted = False
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            again = await system.drain(messages, quiet=system.gone(kind))
        assert [m.value for m in again] == ([] if accepted else ["a"])

    async def test_a_handler_that_returns_acknowledges(self, system: Harness, kind: Kind) -> None:
        """A9: once for each message, and nothing comes again."""
        address = system.address(kind)
        runs: Counter[str] = Counter()

        async def handle(message: Message[str]) -> None:
            runs[message.value] += 1

        async with system.connect() as broker:
            async with system.serve(broker, address, handle):
                await system.publish(broker, address, [f"v{n}" for n in range(10)])
                await system.eventually(lambda: len(runs) == 10)
            async with system.subscribe(broker, address) as messages:
                await system.nothing(messages)
        assert set(runs.values()) == {1}

    async def test_a_handler_that_raises_gets_the_message_again(self, system: Harness, kind: Kind) -> None:
        """A9: an exception counts as a failed attempt."""
        address = system.address(kind)
        attempts: list[int] = []

        async def handle(message: Message[str]) -> None:
            attempts.append(message.attempt)
            if message.attempt < 3:
                raise RuntimeError("not yet")

        async with (
            system.connect() as broker,
            system.serve(broker, address, handle, retry=RetryPolicy(wait_initial=system.quiet / 10)),
        ):
            await system.publish(broker, address, ["a"])
            await system.eventually(lambda: len(attempts) == 3)
            await system.settle_down()
        assert attempts == [1, 2, 3]

    async def test_a_cancelled_handler_hands_its_message_back_uncounted(self, system: Harness, kind: Kind) -> None:
        """A9: stopping is nobody's failure: attempt and deliveries are what they were."""
        address = system.address(kind)
        started = asyncio.Event()

        async def hang(message: Message[str]) -> None:
            started.set()
            await asyncio.Event().wait()

        async with system.connect() as broker:
            await system.publish(broker, address, ["a"])
            async with system.serve(broker, address, hang, drain=0):
                await started.wait()
            async with system.subscribe(broker, address) as messages:
                (message,) = await system.take(messages, 1, within=system.quiet)
                assert (message.attempt, message.deliveries) == (1, 1)

    async def test_process_settles_by_how_its_block_ends(self, system: Harness, kind: Kind) -> None:
        """A9: by hand it is the same: an exception retries, its end acknowledges."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await system.publish(broker, address, ["a"])
            for attempt in (1, 2):
                (message,) = await system.take(messages, 1)
                async with message.process(RetryPolicy(wait_initial=0)):
                    assert message.attempt == attempt
                    if attempt == 1:
                        raise RuntimeError("once")
            await system.nothing(messages)

    async def test_a_service_goes_on_after_an_outcome_that_had_no_effect(self, system: Harness, kind: Kind) -> None:
        """A10: a lost message is told by an event; the next ones are handled, and nothing spins."""
        address = system.address(kind)
        started, go = asyncio.Event(), asyncio.Event()
        seen: list[str] = []

        async def handle(message: Message[str]) -> None:
            if message.value == "slow":
                started.set()
                await go.wait()
            seen.append(message.value)

        async with (
            system.connect() as sleeper,
            system.connect() as broker,
            system.serve(sleeper, address, handle),
        ):
            await system.publish(broker, address, ["slow"])
            await started.wait()
            await system.freeze(sleeper)
            async with system.subscribe(broker, address) as messages:
                (message,) = await system.take(messages, 1)
                await message.ack(confirm=True)
            await system.thaw(sleeper)
            go.set()
            await system.eventually(lambda: system.seen(Lost), "the service is told that its message is lost")
            await system.publish(broker, address, ["next"])
            await system.eventually(lambda: "next" in seen)
        assert [event.id for event in system.seen(Lost)] == ["slow"]
        assert seen == ["slow", "next"]

    async def test_settling_after_leaving_is_refused(self, system: Harness, kind: Kind) -> None:
        """A11: Closed, without an effect: what was unsettled on leaving comes again."""
        address = system.address(kind)
        async with system.connect() as broker:
            await system.publish(broker, address, ["a"])
            async with system.subscribe(broker, address) as messages:
                (message,) = await system.take(messages, 1)
            with pytest.raises(Closed):
                await message.ack()
            async with system.subscribe(broker, address) as messages:
                assert [m.value for m in await system.take(messages, 1)] == ["a"]
        with pytest.raises(Closed):
            await message.ack(confirm=True)

    async def test_a_message_that_is_released_comes_again_as_if_for_the_first_time(
        self, system: Harness, kind: Kind
    ) -> None:
        """A2: to whoever is there; neither an attempt nor a delivery is counted, and it is settled then as any other."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await system.publish(broker, address, ["a", "b"])
            for _ in range(12):  # more often than a message may be delivered without an outcome
                for message in await system.take(messages, 2):
                    assert (message.attempt, message.deliveries) == (1, 1)
                    await message.release()
                    with pytest.raises(AlreadySettled):
                        await message.ack()
            for message in await system.take(messages, 2):
                await message.ack(confirm=True)
            await system.nothing(messages)


class Zombies(Suite):
    """A process that was believed dead settles what has long been somebody else's."""

    async def test_an_acknowledgement_after_release_has_no_effect(self, system: Harness, kind: Kind) -> None:
        """A5: what was handed back belongs to whoever takes it next."""
        address = raw_address(system, kind)
        async with raw(system, address) as opened:
            await opened.put(address, ["a"])
            async with opened.consume(address) as consumer:
                (stale,) = await opened.take(consumer, 1)
                await consumer.release([stale])
                (fresh,) = await opened.take(consumer, 1)
                assert (stale.record.id, fresh.record.id, fresh.deliveries) == ("a", "a", 1)
                (result,) = await consumer.settle([Settlement(stale)], confirm=True)
                assert isinstance(result, DeliveryLost)
                await consumer.release([stale])
                await opened.nothing(consumer)
                await opened.done(consumer, fresh, confirm=True)

    @needs("queue")
    async def test_an_acknowledgement_after_a_retry_has_no_effect(self, system: Harness) -> None:
        """A5: the retry is a copy with the same id; it is not the zombie's."""
        await self.after(system, retry=True)

    @needs("queue")
    async def test_an_acknowledgement_after_a_redrive_has_no_effect(self, system: Harness) -> None:
        """A5: a redriven message has the same id; it is not the zombie's."""
        await self.after(system, retry=False)

    async def after(self, system: Harness, *, retry: bool) -> None:
        queue = system.queue()
        attempt = 2 if retry else 1
        async with system.connect() as sleeper, system.connect() as broker, AsyncExitStack() as asleep:
            await system.publish(broker, queue, ["a"])
            held = await asleep.enter_async_context(system.subscribe(sleeper, queue))
            (stale,) = await system.take(held, 1)
            await system.freeze(sleeper)
            async with system.subscribe(broker, queue) as messages:
                (taken,) = await system.take(messages, 1)
                if retry:
                    await taken.nack()
                else:
                    await taken.reject("to be redriven")
                    await system.eventually(lambda: self.redriven(system, broker))
                (copy,) = await system.take(messages, 1)
                assert (copy.id, copy.attempt, copy.deliveries) == ("a", attempt, 1)
                await system.thaw(sleeper)
                for settle in (stale.ack(confirm=True), stale.ack(confirm=True)):
                    with pytest.raises(DeliveryLost):
                        await settle
                await asleep.aclose()
                await system.nothing(messages)
            async with system.subscribe(broker, queue) as messages:
                (again,) = await system.take(messages, 1)
                assert (again.id, again.attempt, again.deliveries) == ("a", attempt, 1)
                await again.ack(confirm=True)
                await system.nothing(messages)

    async def redriven(self, system: Harness, broker: Broker) -> bool:
        report = await broker.redrive(system.queue().dead_letters)
        return bool(report.moved)

    async def test_a_stale_retry_or_dead_letter_is_not_stored(self, system: Harness, kind: Kind) -> None:
        """A5: a zombie's outcome publishes nothing, so that no second copy appears."""
        address = system.address(kind)
        async with system.connect() as sleeper, system.connect() as broker:
            await system.publish(broker, address, ["a", "b"])
            async with system.subscribe(sleeper, address) as held:
                stale = await system.take(held, 2)
                await system.freeze(sleeper)
                async with system.subscribe(broker, address) as messages:
                    for message in await system.take(messages, 2):
                        await message.ack(confirm=True)
                    await system.thaw(sleeper)
                    await stale[0].nack()
                    await stale[1].reject("too late")
                    await system.eventually(lambda: len(system.seen(Lost)) >= 2)
                    await system.nothing(messages)
            assert await system.browse(broker, system.letters(address)) == []


class Copies(Suite):
    """An id identifies a message; several messages may have the same."""

    @needs("queue.delay")
    async def test_one_id_three_times_is_three_messages(self, system: Harness) -> None:
        """A2: ready, delayed and in flight at the same time, each settled alone."""
        queue = system.queue()
        async with system.connect() as broker, system.subscribe(broker, queue, prefetch=1) as messages:
            await broker.publish(queue, "in flight", id="same")
            (in_flight,) = await system.take(messages, 1)
            await broker.publish(queue, "ready", id="same")
            await broker.publish(queue, "delayed", id="same", delay=system.lease)
            backlog = await broker.backlog(queue)
            assert (backlog.in_flight, backlog.waiting, backlog.delayed) in {(1, 1, 1), (None, None, None)}
            await in_flight.ack(confirm=True)
            (ready,) = await system.take(messages, 1)
            assert (ready.id, ready.value, ready.attempt) == ("same", "ready", 1)
            await ready.nack()
            (retried,) = await system.take(messages, 1)
            assert (retried.value, retried.attempt) == ("ready", 2)
            await retried.reject("no")
            (delayed,) = await system.take(messages, 1)
            assert (delayed.value, delayed.attempt, delayed.deliveries) == ("delayed", 1, 1)
            await delayed.ack(confirm=True)
            await system.nothing(messages)
            assert [letter.value for letter in await system.browse(broker, queue.dead_letters)] == ["ready"]

    async def test_messages_of_one_id_are_settled_one_by_one(self, system: Harness, kind: Kind) -> None:
        """A2: acknowledging one of them leaves the others where they are."""
        address = system.address(kind)
        async with system.connect() as broker:
            for value in ("one", "two", "three"):
                await broker.publish(address, value, id="same")
            async with system.subscribe(broker, address) as messages:
                taken = {m.value: m for m in await system.take(messages, 3)}
                assert {m.id for m in taken.values()} == {"same"}
                await taken["two"].ack(confirm=True)
            async with system.subscribe(broker, address) as messages:
                assert sorted(m.value for m in await system.drain(messages)) == ["one", "three"]

    @needs("topic")
    async def test_acknowledging_twice_lets_the_next_of_the_key_out_once(self, system: Harness) -> None:
        """ack() and then ack(confirm=True): the one behind the next still waits for it."""
        topic = system.topic()
        async with system.connect() as broker:
            await broker.publish_many(topic, [topic.outgoing(f"v{n}", key="k") for n in range(4)])
            async with broker.subscribe(topic, group="workers") as messages:
                (first,) = await system.take(messages, 1)
                await first.ack()
                (second,) = await system.take(messages, 1)
                await first.ack(confirm=True)
                await system.nothing(messages)
                await second.ack()
                (third,) = await system.take(messages, 1)
                assert (first.value, second.value, third.value) == ("v0", "v1", "v2")
