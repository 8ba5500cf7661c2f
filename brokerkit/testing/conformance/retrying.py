"""RETRY: how often, after which wait, and what does not count as a failure."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from functools import partial

import pytest

from ...broker import Broker
from ...errors import ConfigError, Nack, Reject
from ...events import DeadLettered, Retried
from ...message import Message
from ...policy import QUEUE_WAIT, TOPIC_WAIT, RetryPolicy
from ._harness import Harness, Kind
from ._runner import Suite, needs, restarts, seeds


class Retrying(Suite):
    async def test_the_number_of_attempts_counts_the_first(self, system: Harness, kind: Kind) -> None:
        """T1: attempts=3 is three runs, attempts=1 is one; then the dead letter."""
        address = system.address(kind)
        for attempts in (1, 2, 3):
            runs: list[int] = []

            async def handle(message: Message[str], runs: list[int] = runs) -> None:
                runs.append(message.attempt)
                raise RuntimeError("always")

            async with system.connect() as broker:
                letters = system.letters(address)
                retry = RetryPolicy(attempts=attempts, wait_initial=system.quiet / 20)
                async with system.serve(broker, address, handle, retry=retry):
                    await system.publish(broker, address, [f"m{attempts}"])
                    await system.eventually(partial(system.browse, broker, letters))
                    await system.settle_down()
                assert runs == list(range(1, attempts + 1))
                (letter,) = await system.browse(broker, letters)
                assert (letter.id, letter.dead.attempts) == (f"m{attempts}", attempts)
                await broker.purge(letters)

    @seeds(1)
    async def test_the_wait_is_full_jitter_under_a_doubling_limit(self, system: Harness) -> None:
        """T2: anything from nothing to min(wait_max, wait_initial * 2 ** (n - 1)), evenly."""
        draw = random.Random(1)
        for failures, limit in ((1, 2.0), (2, 4.0), (3, 8.0), (4, 10.0), (5, 10.0), (1000, 10.0)):
            policy = RetryPolicy(wait_initial=2.0, wait_max=10.0)
            waits = [policy.wait(failures, longest=TOPIC_WAIT, random_=draw) for _ in range(2000)]
            assert 0 <= min(waits) < 0.05 * limit
            assert 0.95 * limit < max(waits) <= limit
            assert 0.45 * limit < sum(waits) / 2000 < 0.55 * limit
        even = RetryPolicy(wait_initial=2.0, wait_jitter=0)
        assert [even.wait(n, longest=QUEUE_WAIT) for n in (1, 2, 3, 9)] == [2, 4, 8, 300]
        assert even.wait(9, longest=TOPIC_WAIT) == 60
        half = RetryPolicy(wait_initial=2.0, wait_jitter=0.5)
        assert all(1 <= half.wait(1, longest=TOPIC_WAIT, random_=draw) <= 2 for _ in range(500))

    async def test_the_waits_of_a_service_are_its_policys(self, system: Harness, kind: Kind) -> None:
        """T2: each is drawn anew, none is shortened, and the limit doubles."""
        address = system.address(kind)
        unit = system.quiet / 5
        runs: dict[str, list[float]] = defaultdict(list)

        async def handle(message: Message[str]) -> None:
            runs[message.id].append(system.now())
            if message.attempt < 4:
                raise RuntimeError("not yet")

        async with system.connect() as broker:
            retry = RetryPolicy(attempts=4, wait_initial=unit)
            async with system.serve(broker, address, handle, retry=retry, concurrency=30):
                await system.publish(broker, address, [f"v{n}" for n in range(30)])
                await system.eventually(lambda: len(runs) == 30 and all(len(times) == 4 for times in runs.values()))
        retried = system.seen(Retried)
        assert len(retried) == 90
        for event in retried:
            assert 0 <= event.wait <= unit * 2 ** (event.attempt - 1)
            times = runs[event.id]
            assert times[event.attempt] - times[event.attempt - 1] >= event.wait * 0.999, "it ran again too early"
        for attempt in (1, 2, 3):
            waits = [event.wait for event in retried if event.attempt == attempt]
            assert len(set(waits)) == 30, "the waits are not drawn one by one"
            assert max(waits) - min(waits) > 0.5 * unit * 2 ** (attempt - 1)

    @needs("topic", "queue")
    async def test_a_policy_that_waits_too_long_for_a_topic_is_refused(self, system: Harness) -> None:
        """T2: a topic's message holds its key meanwhile, so more than 60 s is ConfigError."""
        handler = _nothing
        async with system.connect() as broker:
            for retry in (RetryPolicy(wait_max=61), RetryPolicy(wait_initial=61, wait_max=300)):
                with pytest.raises(ConfigError):
                    async with system.serve(broker, system.topic(), handler, retry=retry):
                        pass
                async with system.serve(broker, system.queue(), handler, retry=retry):
                    pass

    async def test_what_is_not_worth_a_retry_is_dead_lettered_at_once(self, system: Harness, kind: Kind) -> None:
        """T4: Reject, and any exception outside of `on`."""
        address = system.address(kind)
        runs: Counter[str] = Counter()
        errors = {"reject": Reject("it is wrong"), "key": KeyError("other"), "value": ValueError("bad")}

        async def handle(message: Message[str]) -> None:
            runs[message.value] += 1
            raise errors[message.value]

        async with system.connect() as broker:
            retry = RetryPolicy(attempts=3, wait_initial=system.quiet / 50, on=(ValueError, OSError))
            async with system.serve(broker, address, handle, retry=retry):
                await system.publish(broker, address, list(errors))
                await system.eventually(lambda: self.dead(system, broker, kind, 3))
                await system.settle_down()
            letters = {letter.value: letter.dead for letter in await system.browse(broker, system.letters(address))}
        assert runs == {"reject": 1, "key": 1, "value": 3}
        assert (letters["reject"].reason, letters["reject"].error) == ("it is wrong", "Reject")
        assert (letters["key"].error, letters["key"].attempts) == ("KeyError", 1)
        assert (letters["value"].error, letters["value"].attempts) == ("ValueError", 3)

    async def dead(self, system: Harness, broker: Broker, kind: Kind, count: int) -> bool:
        return len(await system.browse(broker, system.letters(system.address(kind)))) == count

    async def test_nack_with_a_delay_runs_again_no_earlier(self, system: Harness, kind: Kind) -> None:
        """T5: the handler's own wait is kept instead of the policy's, and it counts as a failed attempt."""
        address = system.address(kind)
        wait = min(1.5 * system.lease, 50.0)
        runs: list[tuple[int, float]] = []

        async def handle(message: Message[str]) -> None:
            runs.append((message.attempt, system.now()))
            if message.attempt == 1:
                raise Nack(delay=wait)

        async with system.connect() as broker:
            await system.publish(broker, address, ["a"])
            async with system.serve(broker, address, handle, retry=RetryPolicy(wait_initial=0)):
                await system.eventually(lambda: len(runs) == 2)
        assert [attempt for attempt, _ in runs] == [1, 2]
        assert wait <= runs[1][1] - runs[0][1] <= wait + system.quiet

    async def test_nack_counts_towards_the_last_attempt(self, system: Harness, kind: Kind) -> None:
        """T5: a handler that always asks for another run gets as many as its policy allows."""
        address = system.address(kind)
        runs: list[int] = []

        async def handle(message: Message[str]) -> None:
            runs.append(message.attempt)
            raise Nack

        async with system.connect() as broker:
            await system.publish(broker, address, ["a"])
            async with system.serve(broker, address, handle, retry=RetryPolicy(attempts=4)):
                await system.eventually(lambda: self.dead(system, broker, kind, 1))
        assert runs == [1, 2, 3, 4]

    @restarts
    async def test_failed_attempts_survive_restarts_and_crashes(self, system: Harness, kind: Kind) -> None:
        """T6: a message gets its number of runs, no matter in how many processes."""
        address = system.address(kind)
        runs: list[int] = []
        async with system.connect() as broker:
            await system.publish(broker, address, ["a"])
        retry = RetryPolicy(attempts=6, wait_initial=system.quiet, wait_jitter=0, wait_max=system.quiet)
        for step in range(3):
            process = system.connect()
            before = len(runs)

            async def handle(message: Message[str]) -> None:
                runs.append(message.attempt)
                raise RuntimeError("always")

            async with process, system.serve(process, address, handle, retry=retry, drain=0):
                await system.reach(lambda: len(runs), before + 2)
                await asyncio.sleep(system.quiet / 2)  # the outcome is stored, the next run has not begun
                if step < 2:
                    await system.crash(process)
                else:
                    await system.eventually(partial(self.dead, system, process, kind, 1))
            await system.restart()
        assert runs == [1, 2, 3, 4, 5, 6]

    @seeds(2)
    async def test_a_crash_during_a_retry_loses_nothing(self, system: Harness, kind: Kind) -> None:
        """T7: at whatever moment, the message comes again; twice only where settling is not atomic."""
        claim = system.topics if kind == "topic" else system.queues
        addresses = [system.address(kind, f"{kind}{steps}") for steps in range(12)]
        async with system.connect() as broker:
            for steps, address in enumerate(addresses):
                doomed = system.connect()
                async with doomed:
                    await broker.publish(address, "value", id=f"v{steps}")
                    async with system.subscribe(doomed, address) as held:
                        (message,) = await system.take(held, 1)
                        task = asyncio.ensure_future(message.nack())
                        await system.moments(steps)
                        await system.crash(doomed)
                        await task
            await asyncio.sleep(system.gone(kind))
            again = [message for address in addresses for message in await system.rest(broker, address)]
        assert {m.id for m in again} == {f"v{steps}" for steps in range(12)}
        assert {m.attempt for m in again} == ({1, 2} if system.virtual else {m.attempt for m in again} & {1, 2})
        if claim is not None and claim.atomic:
            assert len(again) == 12

    async def test_each_of_many_retries_keeps_its_own_time(self, system: Harness, kind: Kind) -> None:
        """T8: two hundred messages wait at once, none comes early, none waits for another."""
        address = system.address(kind)
        unit = system.quiet / 20
        due: dict[str, float] = {}
        late: list[tuple[str, float]] = []
        done: set[str] = set()

        async def handle(message: Message[str]) -> None:
            if message.attempt == 1:
                wait = unit * (1 + int(message.value) * 7 % 20)
                due[message.id] = system.now() + wait
                raise Nack(delay=wait)
            late.append((message.id, system.now() - due[message.id]))
            done.add(message.id)

        async with (
            system.connect() as broker,
            system.serve(broker, address, handle, concurrency=8, prefetch=200),
        ):
            await system.publish(broker, address, [str(n) for n in range(200)])
            await system.eventually(lambda: len(done) == 200)
            await system.settle_down()
        assert len(late) == 200
        assert min(lateness for _, lateness in late) >= 0
        assert max(lateness for _, lateness in late) <= system.quiet

    async def test_a_waiting_retry_holds_no_slot(self, system: Harness, kind: Kind) -> None:
        """T8: with concurrency=1 the other messages run while one waits."""
        address = system.address(kind)
        order: list[str] = []

        async def handle(message: Message[str]) -> None:
            order.append(message.value)
            if message.value == "a" and message.attempt == 1:
                raise Nack(delay=system.quiet)

        async with system.connect() as broker, system.serve(broker, address, handle, concurrency=1):
            for value in ("a", "b", "c", "d"):
                await system.publish(broker, address, [value], key=value)
                await system.eventually(partial(order.count, value))
            await system.eventually(lambda: len(order) == 5)
        assert order == ["a", "b", "c", "d", "a"]

    @needs("queue")
    async def test_as_many_retries_as_prefetch_do_not_stop_a_queue(self, system: Harness) -> None:
        """T8: ten messages that fail wait again and again; those behind them are handled as if they were not there."""
        queue = system.queue()
        failed: Counter[str] = Counter()
        handled: list[str] = []

        async def handler(message: Message[str]) -> None:
            if message.value.startswith("bad"):
                failed[message.value] += 1
                raise LookupError
            handled.append(message.value)

        policy = RetryPolicy(attempts=1000, wait_initial=system.quiet, wait_max=system.quiet, wait_jitter=0)
        async with system.connect() as broker:
            await broker.declare(queue)
            async with system.serve(broker, queue, handler, concurrency=10, prefetch=10, retry=policy):
                await broker.publish_many(queue, [f"bad{n}" for n in range(10)])
                await system.eventually(lambda: len(failed) == 10)
                for part in range(5):
                    began, count = system.now(), len(handled)
                    await broker.publish_many(queue, [f"v{part}-{n}" for n in range(20)])
                    await system.eventually(lambda count=count: len(handled) == count + 20)  # type: ignore[misc]
                    assert system.now() - began <= 2 * system.quiet
                    await asyncio.sleep(system.quiet / 2)
        assert len(failed) == 10
        assert min(failed.values()) >= 2, "they are tried meanwhile"

    @needs("queue.priority")
    async def test_a_retry_keeps_its_priority(self, system: Harness) -> None:
        """T8: what is urgent goes before the others at its next attempt too."""
        queue = system.queue(priorities=2)
        async with system.connect() as broker, system.subscribe(broker, queue, prefetch=1) as messages:
            await broker.publish(queue, "urgent", priority=1)
            (message,) = await system.take(messages, 1)
            await broker.publish(queue, "plain")
            await message.nack()
            for value in ("urgent", "plain"):
                (message,) = await system.take(messages, 1)
                assert message.value == value
                await message.ack()

    async def test_a_stop_is_no_failed_attempt(self, system: Harness, kind: Kind) -> None:
        """T9: ten processes start the message and are stopped; it is still at its first attempt."""
        address = system.address(kind)
        seen: list[tuple[int, int]] = []
        async with system.connect() as broker:
            await system.publish(broker, address, ["a", "b", "c"])
        for _ in range(10):
            started = asyncio.Event()

            async def hang(message: Message[str], started: asyncio.Event = started) -> None:
                seen.append((message.attempt, message.deliveries))
                started.set()
                await asyncio.Event().wait()

            async with system.connect() as broker, system.serve(broker, address, hang, drain=0):
                await started.wait()
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            last = await system.take(messages, 3)
        assert {*seen, *((m.attempt, m.deliveries) for m in last)} == {(1, 1)}

    @needs("topic")
    async def test_a_topics_message_may_wait_a_minute_at_most(self, system: Harness) -> None:
        """T5: above that nack is a ValueError, and the message is still to be settled."""
        topic = system.topic()
        async with system.connect() as broker, broker.subscribe(topic, group="g") as messages:
            await system.publish(broker, topic, ["a"])
            (message,) = await system.take(messages, 1)
            with pytest.raises(ValueError, match="60"):
                await message.nack(delay=60.5)
            await message.ack(confirm=True)

    async def test_a_cancellation_of_the_handlers_own_making_is_a_failed_attempt(
        self, system: Harness, kind: Kind
    ) -> None:
        """What it awaited was cancelled, or it cancelled its own task: both count, and the worker lives on."""
        address = system.address(kind)
        attempts: dict[str, list[int]] = {"raises": [], "cancels": [], "fine": []}

        async def handler(message: Message[str]) -> None:
            attempts[message.value].append(message.attempt)
            if message.value == "raises" and message.attempt < 10:
                raise asyncio.CancelledError
            if message.value == "cancels":
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.sleep(system.deadline)

        policy = RetryPolicy(attempts=2, wait_initial=0.01)
        async with system.connect() as broker:
            await system.publish(broker, address, ["raises", "cancels", "fine"])
            async with system.serve(broker, address, handler, retry=policy, concurrency=1):
                await system.eventually(lambda: len(system.seen(DeadLettered)) == 2 and attempts["fine"])
            assert attempts == {"raises": [1, 2], "cancels": [1, 2], "fine": [1]}


async def _nothing(message: Message[str]) -> None:
    return None
