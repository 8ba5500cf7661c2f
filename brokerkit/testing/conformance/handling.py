"""Handlers: what they are called with, what their ends mean, and what is told about them."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from ..._plan import Plan
from ...address import Queue
from ...errors import ConfigError, Nack, Reject
from ...events import DeadLettered, Drained, Event, Handled, NothingSettled, Overrun, Retried, Subscribed, Unsubscribed
from ...message import Message
from ...policy import Batch, RetryPolicy
from ...service import Service
from ._harness import Harness, Kind
from ._runner import Suite


@contextmanager
def logged() -> Iterator[list[logging.LogRecord]]:
    """Collect what brokerkit logs, from INFO on."""
    records: list[logging.LogRecord] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    logger, collect = logging.getLogger("brokerkit"), Collect()
    level = logger.level
    logger.addHandler(collect)
    logger.setLevel(logging.INFO)
    try:
        yield records
    finally:
        logger.removeHandler(collect)
        logger.setLevel(level)


def _longer(things: list[Any], than: int) -> bool:
    return len(things) > than


class Handling(Suite):
    async def test_middleware_goes_around_the_handler_the_first_one_outermost(
        self, system: Harness, kind: Kind
    ) -> None:
        """Each sees the message, and the end of what it is around."""
        address = system.address(kind)
        steps: list[str] = []

        def named(name: str) -> Any:
            async def middleware(message: Message[str], call_next: Callable[[Any], Awaitable[object]]) -> object:
                steps.append(f"{name} before {message.value}")
                try:
                    return await call_next(message)
                finally:
                    steps.append(f"{name} after")

            return middleware

        async def handler(message: Message[str]) -> None:
            steps.append("handler")

        middleware = (named("outer"), named("inner"))
        async with system.connect(middleware=middleware) as broker, system.serve(broker, address, handler):
            await system.publish(broker, address, ["v"])
            await system.eventually(lambda: len(steps) == 5)
        assert steps == ["outer before v", "inner before v", "handler", "inner after", "outer after"]

    async def test_what_a_middleware_raises_counts_as_raised_by_the_handler(self, system: Harness, kind: Kind) -> None:
        """It fails the attempt, or rejects; what it swallows is acknowledged."""
        address = system.address(kind)

        async def middleware(message: Message[str], call_next: Callable[[Any], Awaitable[object]]) -> object:
            if message.value == "refused":
                raise Reject("by middleware")
            try:
                return await call_next(message)
            except LookupError:
                return None

        async def handler(message: Message[str]) -> None:
            handled.append(message.value)
            if message.value == "swallowed":
                raise LookupError

        handled: list[str] = []
        async with system.connect(middleware=[middleware]) as broker:
            async with system.serve(broker, address, handler):
                await system.publish(broker, address, ["refused", "swallowed", "good"])
                await system.eventually(lambda: len(handled) == 2 and system.seen(DeadLettered))
                await system.settle_down()
            assert sorted(handled) == ["good", "swallowed"]
            (letter,) = await system.browse(broker, system.letters(address))
            assert (letter.value, letter.dead.reason) == ("refused", "by middleware")

    async def test_events_tell_what_happens(self, system: Harness, kind: Kind) -> None:
        """Subscribed, Handled, Retried, DeadLettered, Unsubscribed, Drained, with address, group, id and attempt."""
        address = system.address(kind)

        async def handler(message: Message[str]) -> None:
            if message.value == "bad" or (message.value == "late" and message.attempt == 1):
                raise LookupError("no such thing")

        options: dict[str, Any] = {"retry": RetryPolicy(attempts=2, wait_initial=0.01), "name": "billing"}
        async with system.connect() as broker, system.serve(broker, address, handler, **options):
            assert {event.address for event in system.seen(Subscribed)} >= {system.prefix + address.name}
            await system.publish(broker, address, ["good", "late", "bad"])
            await system.eventually(lambda: len(system.seen(Handled)) == 2 and system.seen(DeadLettered))
        assert sorted((event.id, event.attempt) for event in system.seen(Handled)) == [("good", 1), ("late", 2)]
        assert all(event.took >= 0 for event in system.seen(Handled))
        assert sorted((event.id, event.attempt, event.error) for event in system.seen(Retried)) == [
            ("bad", 1, "LookupError"),
            ("late", 1, "LookupError"),
        ]
        (dead,) = system.seen(DeadLettered)
        assert (dead.id, dead.attempt, dead.error) == ("bad", 2, "LookupError")
        group = system.prefix + "billing" if kind == "topic" else None
        events: list[Event] = [*system.seen(Handled), *system.seen(Retried), dead]
        assert {(event.address, event.group) for event in events} == {(system.prefix + address.name, group)}
        assert {event.address for event in system.seen(Unsubscribed)} >= {system.prefix + address.name}
        assert len(system.seen(Drained)) == 1

    async def test_a_listener_that_raises_disturbs_nothing(self, system: Harness, kind: Kind) -> None:
        """What it raises is logged and dropped."""
        address = system.address(kind)
        handled: list[str] = []

        def listener(event: Event) -> None:
            raise LookupError("a bug in the listener")

        async def handler(message: Message[str]) -> None:
            handled.append(message.value)

        async with system.connect(on_event=listener) as broker, system.serve(broker, address, handler):
            await system.publish(broker, address, ["a", "b"])
            await system.eventually(lambda: len(handled) == 2)

    async def test_a_handler_over_its_timeout_is_cancelled_and_has_failed(self, system: Harness, kind: Kind) -> None:
        """It runs again as the next attempt, and the others are handled meanwhile."""
        address = system.address(kind)
        attempts: list[int] = []
        cancelled: list[int] = []
        handled: list[str] = []

        async def handler(message: Message[str]) -> None:
            if message.value != "slow":
                handled.append(message.value)
                return
            attempts.append(message.attempt)
            try:
                if message.attempt < 3:
                    await asyncio.sleep(system.deadline)
            except asyncio.CancelledError:
                cancelled.append(message.attempt)
                raise

        options: dict[str, Any] = {"timeout": system.quiet, "retry": RetryPolicy(attempts=3, wait_initial=0.01)}
        async with system.connect() as broker, system.serve(broker, address, handler, concurrency=2, **options):
            await system.publish(broker, address, ["slow"])
            await system.publish(broker, address, ["quick"])
            await system.eventually(lambda: attempts == [1, 2, 3] and handled)
            await system.settle_down()
        assert cancelled == [1, 2]
        assert [event.error for event in system.seen(Retried)] == ["TimeoutError", "TimeoutError"]
        assert not system.seen(DeadLettered)

    async def test_a_plain_function_runs_in_a_thread(self, system: Harness, kind: Kind) -> None:
        """The loop goes on beside it, and its return and its exceptions count as of any handler."""
        address = system.address(kind)
        threads: set[int] = set()
        runs: list[tuple[str, int]] = []

        def handler(message: Message[str]) -> None:
            threads.add(threading.get_ident())
            runs.append((message.value, message.attempt))
            if message.value == "bad":
                raise Reject("no good")
            if message.attempt == 1:
                raise Nack

        async with system.connect() as broker, system.serve(broker, address, handler):
            await system.publish(broker, address, ["good", "bad"])
            await system.eventually(lambda: len(runs) == 3)
            await system.settle_down()
            assert [letter.value for letter in await system.browse(broker, system.letters(address))] == ["bad"]
        assert sorted(runs) == [("bad", 1), ("good", 1), ("good", 2)]
        assert threading.get_ident() not in threads

    async def test_a_plain_function_that_raises_stop_iteration_has_failed(self, system: Harness, kind: Kind) -> None:
        """``next()`` of what is empty: no future can hold that exception, and the message must not stay for ever."""
        address = system.address(kind)

        def handler(message: Message[str]) -> None:
            next(iter(()))

        retry = RetryPolicy(attempts=1)
        async with system.connect() as broker, system.serve(broker, address, handler, retry=retry):
            await system.publish(broker, address, ["value"])
            await system.eventually(lambda: bool(system.seen(DeadLettered)))
        assert [event.error for event in system.seen(DeadLettered)] == ["RuntimeError"]

    async def test_a_plain_function_sees_the_context_of_its_message(self, system: Harness, kind: Kind) -> None:
        """What a middleware puts into a context variable is there in the thread: traces stay together."""
        address = system.address(kind)
        current: contextvars.ContextVar[str] = contextvars.ContextVar("current", default="nothing")
        seen: dict[str, str] = {}

        async def middleware(message: Message[str], call_next: Callable[[Any], Awaitable[object]]) -> object:
            current.set(f"trace of {message.value}")
            return await call_next(message)

        def handler(message: Message[str]) -> None:
            seen[message.value] = current.get()

        async with (
            system.connect(middleware=[middleware]) as broker,
            system.serve(broker, address, handler, concurrency=3),
        ):
            await system.publish(broker, address, ["a", "b", "c"])
            await system.eventually(lambda: len(seen) == 3)
        assert seen == {value: f"trace of {value}" for value in "abc"}

    async def test_what_a_plain_function_returns_is_awaited_if_it_can_be(self, system: Harness, kind: Kind) -> None:
        """A partial, a decorated handler: their coroutine runs on the loop, and its failure is the attempt's."""
        address = system.address(kind)
        handled: list[tuple[str, int]] = []
        loop = asyncio.get_running_loop()

        async def inner(message: Message[str], where: str) -> None:
            assert asyncio.get_running_loop() is loop
            if message.attempt == 1:
                raise LookupError
            handled.append((where, message.attempt))

        def wrapped(message: Message[str]) -> Any:
            return inner(message, "wrapped")

        handlers: list[Callable[[Any], Any]] = [wrapped, functools.partial(inner, where="partial")]
        for number, handler in enumerate(handlers):
            other = system.address(kind, f"{address.name}{number}")
            policy = RetryPolicy(attempts=2, wait_initial=0.01)
            async with system.connect() as broker, system.serve(broker, other, handler, retry=policy):
                await system.publish(broker, other, ["v"])
                await system.eventually(functools.partial(_longer, handled, number))
        assert handled == [("wrapped", 2), ("partial", 2)]

    async def test_a_thread_over_its_timeout_keeps_its_message_and_has_failed_when_it_returns(
        self, system: Harness, kind: Kind
    ) -> None:
        """An event names the handler; the message is not handed to anybody else meanwhile."""
        address = system.address(kind)
        runs: list[int] = []
        release = threading.Event()

        def handler(message: Message[str]) -> None:
            runs.append(message.attempt)
            if message.attempt == 1:
                release.wait(10)

        options: dict[str, Any] = {"timeout": 0.1, "retry": RetryPolicy(attempts=2, wait_initial=0.01)}
        async with system.connect() as broker, system.serve(broker, address, handler, **options):
            await system.publish(broker, address, ["v"])
            await system.eventually(lambda: system.seen(Overrun))
            (event,) = system.seen(Overrun)
            assert (event.id, event.timeout) == ("v", 0.1)
            assert "handler" in event.handler
            assert runs == [1]
            assert not system.seen(Retried)
            release.set()
            await system.eventually(lambda: runs == [1, 2])
        assert [event.error for event in system.seen(Retried)] == ["TimeoutError"]
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await system.nothing(messages)

    async def test_a_drain_reports_threads_that_it_left_running(self, system: Harness, kind: Kind) -> None:
        """They cannot be cancelled; their messages come again."""
        address = system.address(kind)
        started, release = threading.Event(), threading.Event()
        threads: list[threading.Thread] = []

        def handler(message: Message[str]) -> None:
            threads.append(threading.current_thread())
            started.set()
            release.wait(10)

        async with system.connect() as broker:
            await system.publish(broker, address, ["v"])
            async with system.serve(broker, address, handler, drain=0.1):
                await system.eventually(started.is_set)
            (report,) = system.seen(Drained)
            assert (report.threads, report.finished) == (1, 0)
            async with system.subscribe(broker, address) as messages:
                (message,) = await system.take(messages, 1)
                assert message.attempt == 1
                await message.ack()
            release.set()
            for thread in threads:
                thread.join(10)

    async def test_a_handler_may_settle_its_message_itself(self, system: Harness, kind: Kind) -> None:
        """Its outcome stands, whatever the handler returns or raises afterwards."""
        address = system.address(kind)
        runs: list[tuple[str, int]] = []

        async def handler(message: Message[str]) -> None:
            runs.append((message.value, message.attempt))
            if message.value == "acked":
                await message.ack()
                raise LookupError("too late")
            if message.value == "rejected":
                await message.reject("by hand")
            elif message.attempt == 1:
                await message.nack()

        async with system.connect() as broker, system.serve(broker, address, handler):
            await system.publish(broker, address, ["acked", "rejected", "nacked"])
            await system.eventually(lambda: ("nacked", 2) in runs)
            await system.settle_down()
            (letter,) = await system.browse(broker, system.letters(address))
            assert (letter.value, letter.dead.reason) == ("rejected", "by hand")
        assert sorted(runs) == [("acked", 1), ("nacked", 1), ("nacked", 2), ("rejected", 1)]

    async def test_a_message_in_hand_for_a_lease_without_a_settlement_is_warned_of(
        self, system: Harness, kind: Kind
    ) -> None:
        """did you forget ack()? When the prefetch is full; once something is settled it is quiet again."""
        address = system.address(kind)
        # A topic has no lease: a minute stands for it, for which only virtual time can wait.
        plan = Plan if system.virtual else functools.partial(Plan, lease=system.lease)
        async with system.connect() as broker:
            await system.publish(broker, address, ["a", "b", "c"])
            with logged() as records, mock.patch("brokerkit._plans.Plan", plan):
                async with system.subscribe(broker, address, prefetch=2) as messages:
                    held = await system.take(messages, 2)
                    await system.eventually(lambda: system.seen(NothingSettled), within=10 * system.lease + 120)
                    for message in held:
                        await message.ack()
            assert {event.in_flight for event in system.seen(NothingSettled)} == {2}
            assert any("did you forget ack()" in record.getMessage() for record in records)
            assert {record.levelname for record in records if "forget" in record.getMessage()} == {"WARNING"}

    async def test_a_dead_letter_is_logged_as_an_error_with_its_traceback(self, system: Harness, kind: Kind) -> None:
        """With address, id and attempt; a retry as a warning; never with the value."""
        address = system.address(kind)

        async def handler(message: Message[str]) -> None:
            raise LookupError("no such customer")

        policy = RetryPolicy(attempts=2, wait_initial=0.01)
        with logged() as records:
            async with system.connect() as broker, system.serve(broker, address, handler, retry=policy):
                publish: Any = broker.publish
                await publish(address, "canary-value", id="m1")
                await system.eventually(lambda: system.seen(DeadLettered))
        (error,) = [record for record in records if record.levelno == logging.ERROR]
        assert all(part in error.getMessage() for part in (address.name, "m1", "2"))
        assert error.exc_info
        assert isinstance(error.exc_info[1], LookupError)
        warnings = [record.getMessage() for record in records if record.levelno == logging.WARNING]
        assert any("m1" in line and address.name in line for line in warnings)
        assert not any("canary-value" in record.getMessage() for record in records)

    async def test_a_handler_that_raises_outside_of_exception_hands_its_message_back(
        self, system: Harness, kind: Kind
    ) -> None:
        """KeyboardInterrupt, SystemExit and GeneratorExit are no verdict on the message: it comes again, as new."""
        address = system.address(kind)
        runs: list[tuple[int, int]] = []

        class Stop(BaseException):
            pass

        async def handler(message: Message[str]) -> None:
            runs.append((message.attempt, message.deliveries))
            if len(runs) == 1:
                raise Stop

        async with system.connect() as broker:
            try:
                async with system.serve(broker, address, handler):
                    await system.publish(broker, address, ["v"])
                    await system.eventually(lambda: len(runs) >= 2 or not broker._intakes)
            except Stop:
                pass
            if len(runs) == 1:
                async with system.serve(broker, address, handler):
                    await system.eventually(lambda: len(runs) == 2)
            async with system.subscribe(broker, address) as messages:
                await system.nothing(messages)
            assert await system.browse(broker, system.letters(address)) == []

    async def test_a_handler_that_never_settles_is_acknowledged_by_its_return(
        self, system: Harness, kind: Kind
    ) -> None:
        """A service settles what its handler leaves unsettled, in the order of their returns."""
        address = system.address(kind)
        handled: list[str] = []

        async def handler(message: Message[str]) -> int:
            handled.append(message.value)
            return 5

        async with system.connect() as broker:
            async with system.serve(broker, address, handler):
                await system.publish(broker, address, [f"v{n}" for n in range(20)])
                await system.eventually(lambda: len(handled) == 20)
            async with system.subscribe(broker, address) as messages:
                await system.nothing(messages)

    async def test_handlers_that_cannot_be_called_are_refused_at_registration(
        self, system: Harness, kind: Kind
    ) -> None:
        """Before anything runs: too many parameters, a keyword, a generator, resources without a lifespan."""
        service: Any = Service("workers")

        async def three(message: Any, resources: Any, more: Any) -> None: ...
        async def keyword(message: Any, *, needed: Any) -> None: ...
        async def resources(message: Any, database: Any) -> None: ...
        async def nothing() -> None: ...
        async def generator(message: Any) -> Any:
            yield message

        for handler in (three, keyword, resources, nothing, generator, "handler", None):
            with pytest.raises(ConfigError):
                service.subscribe(system.address(kind))(handler)
        assert not service.registrations

    async def test_the_decorator_gives_the_handler_back(self, system: Harness, kind: Kind) -> None:
        """So that it can be called directly, and registered twice."""
        service: Any = Service("workers")

        async def handler(message: Message[str]) -> None: ...

        assert service.subscribe(system.address(kind))(handler) is handler
        assert service.subscribe(system.address(kind, "other"))(handler) is handler

    async def test_a_service_without_handlers_does_not_run(self, system: Harness) -> None:
        """It would do nothing, silently."""
        service: Service[None] = Service("workers")
        async with system.connect() as broker:
            with pytest.raises(ConfigError, match="no handlers"):
                async with service.running(broker):
                    pass

    async def test_settings_that_make_no_sense_are_refused_at_registration(self, system: Harness, kind: Kind) -> None:
        """Each names the option and what it may be."""
        service: Any = Service("workers")
        wrong: list[dict[str, Any]] = [
            {"concurrency": 0},
            {"concurrency": 1.5},
            {"concurrency": True},
            {"prefetch": 0},
            {"prefetch": 1_000_000},
            {"timeout": 0},
            {"timeout": -1},
            {"timeout": float("nan")},
            {"max_deliveries": 0},
            {"retry": 5},
            {"batch": 10},
        ]
        wrong += [{"group": "a/b"}, {"group": 5}, {"start": "earliest"}] if kind == "topic" else [{"group": "g"}]
        for options in wrong:
            with pytest.raises(ConfigError, match=next(iter(options))):
                service.subscribe(system.address(kind), **options)
        replies: Queue[Any, Any] = Queue("quotes", str, reply=str)
        with pytest.raises(ConfigError, match="batch"):
            service.subscribe(replies, batch=Batch(5))
