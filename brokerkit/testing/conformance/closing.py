"""CLOSE and DRAIN: what is begun is finished, what is not is handed back, and everything ends in time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest

from ...errors import BrokerError, Closed
from ...events import Drained, Unsubscribed
from ...message import Message
from ...service import Service
from ._harness import Harness, Kind
from ._runner import Suite, needs


class Closing(Suite):
    async def test_a_drain_finishes_what_runs_and_hands_back_the_rest(self, system: Harness, kind: Kind) -> None:
        """Z1: running handlers end and are acknowledged; what had not started comes again, as new."""
        address = system.address(kind)
        started: list[str] = []
        finished: list[str] = []

        async def handler(message: Message[str]) -> None:
            started.append(message.value)
            await asyncio.sleep(system.quiet)
            finished.append(message.value)

        async with system.connect() as broker:
            await system.publish(broker, address, [f"v{n}" for n in range(20)])
            async with system.serve(broker, address, handler, concurrency=3, drain=10 * system.quiet):
                await system.eventually(lambda: len(started) == 3)
            assert sorted(finished) == sorted(started)
            assert len(started) == 3
            began = system.now()
            async with system.subscribe(broker, address) as messages:
                rest = await system.take(messages, 17)
                assert system.now() - began <= system.quiet, "handed back only when its lease or session ended"
                assert {m.value for m in rest} == {f"v{n}" for n in range(20)} - set(finished)
                assert {(m.attempt, m.deliveries) for m in rest} == {(1, 1)}
                for message in rest:
                    await message.ack()
                await system.nothing(messages)

    async def test_a_drain_reports_what_it_did(self, system: Harness, kind: Kind) -> None:
        """Z1: handled, cancelled, handed back."""
        address = system.address(kind)
        started: list[str] = []

        async def handler(message: Message[str]) -> None:
            started.append(message.value)
            if len(started) > 2:
                await asyncio.sleep(system.deadline)

        async with system.connect() as broker:
            await system.publish(broker, address, [f"v{n}" for n in range(6)])
            async with system.serve(broker, address, handler, name="billing", drain=system.quiet):
                await system.eventually(lambda: len(started) == 3)
                await system.settle_down()
        (report,) = system.seen(Drained)
        assert (report.address, report.finished, report.cancelled, report.threads) == ("billing", 2, 1, 0)
        assert report.released == 3
        assert system.seen(Unsubscribed)

    async def test_a_drain_that_takes_too_long_cancels_and_hands_back(self, system: Harness, kind: Kind) -> None:
        """Z2: at its deadline, without burning an attempt."""
        address = system.address(kind)
        started = asyncio.Event()

        async def handler(message: Message[str]) -> None:
            started.set()
            await asyncio.sleep(system.deadline)

        async with system.connect() as broker:
            await system.publish(broker, address, ["v"])
            async with system.serve(broker, address, handler, drain=2 * system.quiet):
                await started.wait()
                began = system.now()
            assert 2 * system.quiet <= system.now() - began < 3 * system.quiet + 5
            async with system.subscribe(broker, address) as messages:
                (message,) = await system.take(messages, 1)
                assert (message.attempt, message.deliveries) == (1, 1)

    async def test_a_handler_that_ignores_its_cancellation_does_not_hold_the_drain(
        self, system: Harness, kind: Kind
    ) -> None:
        """Z2: what it does after its time is over is its own affair; its message comes again or is done."""
        address = system.address(kind)
        started = asyncio.Event()

        async def handler(message: Message[str]) -> None:
            started.set()
            try:
                await asyncio.sleep(system.deadline)
            except asyncio.CancelledError:
                await asyncio.sleep(system.quiet / 4)

        async with system.connect() as broker:
            await system.publish(broker, address, ["v"])
            async with system.serve(broker, address, handler, drain=0):
                await started.wait()
                began = system.now()
            assert system.now() - began < system.deadline / 2

    async def test_nothing_starts_once_a_drain_has_begun(self, system: Harness, kind: Kind) -> None:
        """Z1: what is published meanwhile waits for the next one."""
        address = system.address(kind)
        started: list[str] = []
        service: Service[None] = Service("workers")

        async def handler(message: Message[str]) -> None:
            started.append(message.value)
            if message.value == "first":
                service.stop()
                await system.settle_down()
                await system.publish(publisher, address, ["later"])
                await system.settle_down()

        service.subscribe(address)(handler)
        async with system.connect() as broker, system.connect() as publisher:
            async with service.running(broker):
                await system.publish(publisher, address, ["first"])
                await system.eventually(lambda: started)
                await asyncio.sleep(4 * system.quiet)
            assert started == ["first"]
            async with system.subscribe(broker, address) as messages:
                assert [m.value for m in await system.drain(messages)] == ["later"]

    async def test_a_stopped_service_may_run_again(self, system: Harness, kind: Kind) -> None:
        """Z1: a service is a plain value; it goes on where it stopped."""
        address = system.address(kind)
        handled: list[str] = []
        service: Service[None] = Service("workers")

        async def handler(message: Message[str]) -> None:
            handled.append(message.value)

        service.subscribe(address)(handler)
        async with system.connect() as broker:
            for value in ("a", "b", "c"):
                async with service.running(broker):
                    await system.publish(broker, address, [value])
                    await system.eventually(partial(handled.count, value))
        assert handled == ["a", "b", "c"]

    async def test_closing_a_broker_twice_is_closing_it_once(self, system: Harness, kind: Kind) -> None:
        """Z3: also at the same time, and after a failure."""
        broker = system.connect()
        await broker.__aenter__()
        await asyncio.gather(broker.__aexit__(None, None, None), broker.__aexit__(None, None, None))
        await broker.__aexit__(None, None, None)
        with pytest.raises(Closed):
            await broker.publish(system.address(kind), "v")

    async def test_a_broker_is_entered_once(self, system: Harness) -> None:
        """Z3: neither twice nor again."""
        broker = system.connect()
        async with broker:
            with pytest.raises(BrokerError):
                await broker.__aenter__()
        with pytest.raises(Closed):
            await broker.__aenter__()

    async def test_closing_a_broker_ends_its_subscriptions(self, system: Harness, kind: Kind) -> None:
        """Z3: in whatever order they are left; what they held comes again."""
        address = system.address(kind)
        broker = system.connect()
        async with system.connect() as steady:
            await system.publish(steady, address, ["a", "b"])
            await broker.__aenter__()
            subscription = system.subscribe(broker, address)
            messages = await subscription.__aenter__()
            await system.take(messages, 2)
            await broker.__aexit__(None, None, None)
            with pytest.raises(Closed):
                await messages.receive(timeout=system.quiet)
            await subscription.__aexit__(None, None, None)
            async with system.subscribe(steady, address) as others:
                again = await system.take(others, 2, within=system.quiet)
                assert {m.deliveries for m in again} == {1}

    async def test_closing_a_broker_drains_its_services(self, system: Harness, kind: Kind) -> None:
        """Z3: a running handler ends and its message is acknowledged; leaving the service afterwards does nothing."""
        address = system.address(kind)
        broker = system.connect()
        started = asyncio.Event()
        finished: list[str] = []

        async def handler(message: Message[str]) -> None:
            started.set()
            await asyncio.sleep(system.quiet / 2)
            finished.append(message.value)

        async with system.connect() as steady:
            await system.publish(steady, address, ["a"])
            await broker.__aenter__()
            serving = system.serve(broker, address, handler, drain=2 * system.quiet)
            await serving.__aenter__()
            await started.wait()
            await broker.__aexit__(None, None, None)
            assert finished == ["a"]
            await serving.__aexit__(None, None, None)
            assert len(system.seen(Drained)) == 1
            async with system.subscribe(steady, address) as messages:
                await system.nothing(messages)

    async def test_closing_while_disconnected_ends_in_time(self, system: Harness, kind: Kind) -> None:
        """Z3: in the middle of reconnecting, with messages in hand and handlers running."""
        address = system.address(kind)

        async def handler(message: Message[str]) -> None:
            await asyncio.sleep(0.01)

        async with system.connect() as steady:
            await system.publish(steady, address, [f"v{n}" for n in range(5)])
            async with system.connect() as broker:
                async with system.serve(broker, address, handler, drain=system.quiet):
                    await system.settle_down()
                    await system.disconnect(broker)
                    await system.publish(steady, address, ["later"])
                    await system.settle_down()
                    began = system.now()
                assert system.now() - began < 30
                await system.reconnect(broker)
            assert system.now() - began < 60

    async def test_closing_a_subscription_while_disconnected_ends_in_time(self, system: Harness, kind: Kind) -> None:
        """Z3: its outcomes cannot be stored; it does not wait for them for ever."""
        address = system.address(kind)
        async with system.connect() as broker:
            await system.publish(broker, address, ["v"])
            async with system.subscribe(broker, address) as messages:
                (message,) = await system.take(messages, 1)
                await system.disconnect(broker)
                await message.ack()
                began = system.now()
            assert system.now() - began < 30
            await system.reconnect(broker)

    async def test_everything_that_was_published_is_there_after_closing(self, system: Harness, kind: Kind) -> None:
        """Z4: closing flushes; it is read after the publisher is closed."""
        address = system.address(kind)
        async with system.connect() as publisher:
            await publisher.declare(address)
            tasks = [asyncio.ensure_future(publisher.publish(address, f"v{n}")) for n in range(200)]
            await asyncio.sleep(0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        stored = {r.id for r in results if not isinstance(r, BaseException)}
        assert all(isinstance(r, BrokerError) for r in results if isinstance(r, BaseException)), results
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            found = [m.id for m in await system.drain(messages)]
        assert len(found) == len(set(found))
        assert stored <= set(found)

    async def test_acknowledgements_are_stored_on_leaving(self, system: Harness, kind: Kind) -> None:
        """Z4: plain ack() is flushed when the subscription is left: nothing comes again."""
        address = system.address(kind)
        async with system.connect() as broker:
            await system.publish(broker, address, [f"v{n}" for n in range(30)])
            async with system.subscribe(broker, address) as messages:
                for message in await system.take(messages, 30):
                    await message.ack()
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await system.nothing(messages)

    async def test_an_error_in_the_body_comes_out_as_it_is(self, system: Harness, kind: Kind) -> None:
        """Z5: not in a group of ours, and everything is closed all the same."""
        address = system.address(kind)

        async def handler(message: Message[str]) -> None:
            pass

        with pytest.raises(LookupError) as caught:
            async with (
                system.connect() as broker,
                system.serve(broker, address, handler),
                system.subscribe(broker, address, group="others"),
            ):
                raise LookupError("mine")
        assert str(caught.value) == "mine"
        assert caught.value.__cause__ is None
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await system.publish(broker, address, ["v"])
            assert len(await system.take(messages, 1)) == 1

    async def test_a_lifespan_that_fails_ends_the_start(self, system: Harness, kind: Kind) -> None:
        """Z5: its error comes out of running(); resources opened before are closed, nothing subscribes."""
        address = system.address(kind)
        closed: list[str] = []

        @asynccontextmanager
        async def good() -> AsyncIterator[None]:
            try:
                yield
            finally:
                closed.append("good")

        @asynccontextmanager
        async def bad() -> AsyncIterator[None]:
            raise LookupError("no database")
            yield

        async def handler(message: Message[str]) -> None:
            handled.append(message.value)

        handled: list[str] = []
        service: Service[None] = Service("workers", lifespan=good)
        other: Service[None] = Service("others", lifespan=bad)
        service.subscribe(address)(handler)
        other.subscribe(address)(handler)
        service.include(other)
        async with system.connect() as broker:
            with pytest.raises(LookupError, match="no database"):
                async with service.running(broker):
                    raise AssertionError("it runs")
            assert closed == ["good"]
            await system.publish(broker, address, ["v"])
            await system.settle_down()
            assert not handled

    async def test_start_and_stop_are_logged(self, system: Harness, kind: Kind) -> None:
        """Z1: at INFO, with what the drain did; never a value."""
        address = system.address(kind)
        lines: list[str] = []

        class Lines(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                lines.append(f"{record.levelname} {record.getMessage()}")

        handled: list[str] = []

        async def handler(message: Message[str]) -> None:
            handled.append(message.value)

        logger, watch = logging.getLogger("brokerkit"), Lines()
        level = logger.level
        logger.addHandler(watch)
        logger.setLevel(logging.INFO)
        try:
            async with system.connect() as broker, system.serve(broker, address, handler, name="billing"):
                await system.publish(broker, address, ["canary-value"])
                await system.eventually(lambda: handled)
        finally:
            logger.removeHandler(watch)
            logger.setLevel(level)
        assert any("INFO" in line and "billing" in line and "start" in line for line in lines), lines
        assert any("INFO" in line and "billing" in line and "stopped" in line and "1 " in line for line in lines), lines
        assert not any("canary-value" in line for line in lines)

    @needs("topic")
    async def test_a_member_that_leaves_hands_over_at_once(self, system: Harness) -> None:
        """Z1: leaving the group is not waiting for its session to end."""
        topic = system.topic()
        async with (
            system.connect() as one,
            system.connect() as two,
            two.subscribe(topic, group="workers") as staying,
        ):
            async with one.subscribe(topic, group="workers") as leaving:
                await system.settle_down()
                await system.publish(two, topic, [f"v{n}" for n in range(20)])
                mine = await leaving.receive(limit=100, timeout=system.quiet)
                theirs = await system.drain(staying)
                assert mine
                assert theirs
            began = system.now()
            again = await system.take(staying, 20 - len(theirs))
            assert system.now() - began < system.session
            assert {m.deliveries for m in again} == {1}
