"""Bad values, options and handlers: an error of our own that says what to do, and nothing is lost."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import multiprocessing
import os
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest

import brokerkit
from brokerkit import (
    BrokerError,
    Closed,
    ConfigError,
    EncodeError,
    Message,
    Nack,
    Queue,
    Reject,
    RetryPolicy,
    Service,
    TooLarge,
    Topic,
    connect,
)
from brokerkit.events import Drained, LoopBlocked
from brokerkit.policy import MAX_BODY
from brokerkit.testing import idle, message, now, run, running


@dataclass
class Order:
    id: str
    total: float = 0.0


class TestPublishing:
    """Everything that can be wrong with one message, found before anything is sent."""

    QUEUE = Queue("emails", str)
    ORDERS = Topic("orders", Order)

    @pytest.mark.parametrize(
        "options",
        [
            {"delay": -1},
            {"delay": math.nan},
            {"delay": math.inf},
            {"delay": 400 * 86400},
            {"delay": "5"},
            {"delay": True},
            {"delay": datetime(2030, 1, 1)},
            {"ttl": 0},
            {"ttl": -1},
            {"ttl": math.nan},
            {"ttl": "5"},
            {"priority": 1},
            {"priority": -1},
            {"priority": 0.5},
            {"priority": True},
            {"headers": {"bk-x": "v"}},
            {"headers": {"a": 5}},
            {"headers": "a=b"},
            {"id": ""},
            {"id": 5},
            {"key": "k"},
            {"timeout": 0},
            {"timeout": -1},
            {"timeout": math.nan},
            {"timeout": "5"},
        ],
    )
    def test_a_bad_option_is_refused_and_nothing_is_stored(self, options: dict[str, Any]) -> None:
        async def main() -> None:
            async with connect("memory://") as broker:
                await broker.declare(self.QUEUE)
                with pytest.raises(ConfigError):
                    await broker.publish(self.QUEUE, "v", **options)
                assert (await broker.backlog(self.QUEUE)).waiting == 0

        run(main)

    def test_nan_and_infinity_are_refused_by_the_publisher(self) -> None:
        async def main() -> None:
            async with connect("memory://") as broker:
                for total in (math.nan, math.inf, -math.inf):
                    with pytest.raises(EncodeError):
                        await broker.publish(self.ORDERS, Order("o", total))

        run(main)

    def test_a_value_too_deep_to_be_read_again_is_refused_by_the_publisher(self) -> None:
        async def main() -> None:
            deep: Any = []
            for _ in range(100_000):  # more than any Python reads
                deep = [deep]
            async with connect("memory://") as broker:
                with pytest.raises(EncodeError):
                    await broker.publish(Topic("json", list[Any]), deep)

        run(main)

    @pytest.mark.parametrize("size", [MAX_BODY - 1, MAX_BODY])
    def test_a_body_within_the_limit_is_sent(self, size: int) -> None:
        async def main() -> None:
            queue = Queue("blobs", bytes)
            async with connect("memory://") as broker:
                await broker.publish(queue, b"x" * size)
                assert (await broker.backlog(queue)).waiting == 1

        run(main)

    def test_a_body_over_the_limit_is_not_sent(self) -> None:
        async def main() -> None:
            queue = Queue("blobs", bytes)
            async with connect("memory://") as broker:
                with pytest.raises(TooLarge, match=str(MAX_BODY)):
                    await broker.publish(queue, b"x" * (MAX_BODY + 1))
                assert (await broker.backlog(queue)).waiting == 0

        run(main)

    def test_what_is_no_address_is_refused(self) -> None:
        async def main() -> None:
            async with connect("memory://") as broker:
                for address in ("emails", None, Queue, 5):
                    with pytest.raises(ConfigError, match="address"):
                        await broker.publish(address, "v")  # type: ignore[call-overload]

        run(main)

    def test_a_datetime_that_is_over_means_now(self) -> None:
        async def main() -> None:
            async with connect("memory://") as broker, broker.subscribe(self.QUEUE) as messages:
                await broker.publish(self.QUEUE, "v", delay=datetime(2000, 1, 1, tzinfo=UTC))
                assert now() > datetime(2000, 1, 1, tzinfo=UTC)
                assert len(await messages.receive(timeout=1)) == 1

        run(main)


class TestLoopsAndProcesses:
    def test_a_broker_of_another_event_loop_is_refused(self) -> None:
        """W4: in another loop of another thread; the broker goes on working in its own."""
        queue = Queue("emails", str)
        found: list[BaseException] = []

        async def main() -> None:
            async with connect("memory://") as broker:
                await broker.publish(queue, "v")

                def elsewhere() -> None:
                    try:
                        asyncio.run(broker.publish(queue, "v"))
                    except BaseException as error:
                        found.append(error)

                thread = threading.Thread(target=elsewhere)
                thread.start()
                await asyncio.to_thread(thread.join)
                await broker.publish(queue, "v")
                assert (await broker.backlog(queue)).waiting == 2

        asyncio.run(main())
        (error,) = found
        assert isinstance(error, ConfigError)
        assert "event loop" in str(error)

    def test_a_broker_of_a_finished_loop_is_refused(self) -> None:
        """W4: one loop after the other."""
        broker = connect("memory://")

        async def first() -> None:
            await broker.__aenter__()

        async def second() -> None:
            await broker.publish(Queue("emails", str), "v")

        asyncio.run(first())
        with pytest.raises(ConfigError, match="event loop"):
            asyncio.run(second())

    def test_a_broker_is_not_closed_by_another_event_loop(self) -> None:
        """W4: its own goes on."""
        queue = Queue("emails", str)

        async def main() -> None:
            async with connect("memory://") as broker:

                async def close() -> None:
                    await broker.__aexit__()

                with pytest.raises(ConfigError, match="event loop"):
                    await asyncio.to_thread(lambda: asyncio.run(close()))
                await broker.publish(queue, "v")

        asyncio.run(main())

    def test_a_broker_of_before_a_fork_is_refused_in_the_child(self) -> None:
        """W5: the parent goes on working."""
        queue = Queue("emails", str)

        async def main() -> bytes:
            async with connect("memory://") as broker:
                await broker.publish(queue, "v")
                read, write = os.pipe()
                child = os.fork()
                if child == 0:
                    text = b"published"
                    try:
                        asyncio.run(broker.publish(queue, "v"))
                    except BaseException as error:
                        text = f"{type(error).__name__}: {error}".encode()
                    os.write(write, text)
                    os._exit(0)
                os.waitpid(child, 0)
                await broker.publish(queue, "v")
                return os.read(read, 1000)

        assert b"fork" in asyncio.run(main())

    def test_a_forked_child_may_connect_for_itself(self) -> None:
        """W5: only what is shared is refused."""
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        child = context.Process(target=_publish_in_child, args=(results,))
        child.start()
        child.join(20)
        assert results.get() == 1


def _publish_in_child(results: Any) -> None:
    async def main() -> int:
        queue = Queue("emails", str)
        async with connect("memory://") as broker:
            await broker.publish(queue, "v")
            return (await broker.backlog(queue)).waiting or 0

    results.put(asyncio.run(main()))


class TestHandlers:
    def test_a_handler_that_blocks_the_loop_is_named(self, caplog: pytest.LogCaptureFixture) -> None:
        """A warning and an event, with its name and how long."""
        queue = Queue("emails", str)
        service = Service("mailer")
        events: list[Any] = []
        done = asyncio.Event()

        @service.subscribe(queue)
        async def greedy(message: Message[str]) -> None:
            time.sleep(1.2)
            done.set()

        async def main() -> None:
            async with connect("memory://", on_event=events.append) as broker, service.running(broker):
                await broker.publish(queue, "v")
                await done.wait()
                async with asyncio.timeout(5):
                    while not any(isinstance(event, LoopBlocked) for event in events):
                        await asyncio.sleep(0.05)

        with caplog.at_level(logging.WARNING, "brokerkit"):
            asyncio.run(main())
        (event,) = [event for event in events if isinstance(event, LoopBlocked)]
        assert "greedy" in event.handler
        assert event.seconds >= 1
        assert any("greedy" in record.getMessage() for record in caplog.records)

    def test_a_handler_that_waits_is_not_said_to_block(self) -> None:
        queue = Queue("emails", str)
        service = Service("mailer")
        events: list[Any] = []
        done = asyncio.Event()

        @service.subscribe(queue)
        async def patient(message: Message[str]) -> None:
            await asyncio.sleep(1.3)
            done.set()

        async def main() -> None:
            async with connect("memory://", on_event=events.append) as broker, service.running(broker):
                await broker.publish(queue, "v")
                await done.wait()
                await asyncio.sleep(0.5)

        asyncio.run(main())
        assert not [event for event in events if isinstance(event, LoopBlocked)]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_what_ends_the_program_ends_it_and_the_message_comes_again(self, error: type[BaseException]) -> None:
        """It is no verdict on the message: nothing is lost, no attempt is burnt."""
        queue = Queue("emails", str)
        service = Service("mailer")
        name = f"memory://ends-{error.__name__}"
        attempts: list[int] = []

        @service.subscribe(queue)
        async def fatal(message: Message[str]) -> None:
            attempts.append(message.attempt)
            raise error

        async def main() -> None:
            async with connect(name) as broker, service.running(broker):
                await broker.publish(queue, "v")
                await asyncio.sleep(5)

        async def after() -> None:
            async with connect(name) as broker, broker.subscribe(queue) as messages:
                (again,) = await messages.receive(timeout=5)
                assert again.attempt == 1
                assert [letter async for letter in broker.browse(queue.dead_letters)] == []

        with pytest.raises(error):
            asyncio.run(main())
        asyncio.run(after())
        gc.collect()
        assert attempts == [1]

    def test_a_handler_that_settles_twice_is_told(self) -> None:
        """AlreadySettled in the handler; the first outcome stands."""
        queue = Queue("emails", str)
        service = Service("mailer")
        raised: list[BrokerError] = []

        @service.subscribe(queue)
        async def twice(message: Message[str]) -> None:
            await message.ack()
            try:
                await message.reject("changed my mind")
            except BrokerError as error:
                raised.append(error)

        async def main() -> None:
            async with running(service) as broker:
                await broker.publish(queue, "v")
                await idle(broker)
                assert (await broker.backlog(queue)).waiting == 0
                assert [letter async for letter in broker.browse(queue.dead_letters)] == []

        run(main)
        assert [type(error).__name__ for error in raised] == ["AlreadySettled"]

    def test_control_exceptions_are_checked(self) -> None:
        assert Reject("why").reason == "why"
        assert Nack(delay=5).delay == 5
        assert not issubclass(Reject, BrokerError)
        assert not issubclass(Nack, BrokerError)

    def test_a_bad_delay_of_nack_is_an_error_of_the_handler(self) -> None:
        """By hand it is refused and the message is still to be settled; raised, it is a failed attempt."""

        async def main() -> None:
            queue = Queue("emails", str)
            async with connect("memory://") as broker, broker.subscribe(queue) as messages:
                await broker.publish(queue, "v")
                (item,) = await messages.receive(timeout=1)
                for delay in (-1, math.nan, math.inf, "5"):
                    with pytest.raises((ConfigError, ValueError)):
                        await item.nack(delay)  # type: ignore[arg-type]
                assert item.outcome is None
                await item.ack()

        run(main)

    def test_a_raised_nack_with_a_bad_delay_does_not_stop_the_service(self) -> None:
        queue = Queue("emails", str)
        for delay in (-1.0, math.nan, math.inf):
            service = Service("mailer")
            handled: list[str] = []

            @service.subscribe(queue, retry=RetryPolicy(attempts=2, wait_initial=0.01))
            async def bad(message: Message[str], handled: list[str] = handled, delay: float = delay) -> None:
                handled.append(message.value)
                if message.value == "bad":
                    raise Nack(delay=delay)

            async def main(service: Service[None] = service, handled: list[str] = handled) -> None:
                async with running(service) as broker:
                    await broker.publish(queue, "bad")
                    await broker.publish(queue, "good")
                    await idle(broker)
                    assert "good" in handled
                    backlog = await broker.backlog(queue)
                    assert (backlog.waiting, backlog.delayed) == (0, 0)

            run(main)

    def test_a_service_without_url_does_not_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("BROKERKIT_URL", raising=False)
        service = Service("mailer")
        with pytest.raises(ConfigError, match="BROKERKIT_URL"):
            brokerkit.run(service)

    def test_a_service_takes_no_handlers_while_it_runs(self) -> None:
        """They would not be called before it runs again, without a word."""
        service = Service("mailer")

        @service.subscribe(Queue("emails", str))
        async def handler(message: Message[str]) -> None: ...

        async def main() -> None:
            async with running(service):
                with pytest.raises(ConfigError, match="running"):
                    service.subscribe(Queue("letters", str))(handler)
                with pytest.raises(ConfigError, match="running"):
                    service.include(Service("other"))
            service.subscribe(Queue("letters", str))(handler)

        run(main)

    def test_a_group_does_not_skip_what_it_cannot_read(self) -> None:
        async def main() -> None:
            async with connect("memory://") as broker:
                with pytest.raises(ConfigError, match="dead-lettered"):
                    broker.subscribe(Topic("orders", str), group="billing", on_invalid="skip")

        run(main)

    def test_a_message_of_a_test_needs_a_value_of_its_type(self) -> None:
        orders: Topic[Any] = Topic("orders", Order)
        with pytest.raises(BrokerError):
            message(orders, "no order")


class TestClosed:
    def test_a_broker_is_used_inside_of_its_async_with(self) -> None:
        async def main() -> None:
            broker = connect("memory://")
            with pytest.raises(Closed, match="async with"):
                await broker.publish(Queue("emails", str), "v")

        run(main)

    def test_a_drained_service_says_so(self) -> None:
        events: list[Any] = []
        service = Service("mailer")

        @service.subscribe(Queue("emails", str))
        async def handler(message: Message[str]) -> None: ...

        async def main() -> None:
            async with connect("memory://", on_event=events.append) as broker, service.running(broker):
                service.stop()
                service.stop()

        run(main)
        assert len([event for event in events if isinstance(event, Drained)]) == 1
