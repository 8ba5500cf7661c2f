"""What sessions, workers and publishers do when the system or a handler fails at the wrong moment; in virtual time."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from brokerkit import (
    EVERY_REPLICA,
    AuthorizationError,
    Batch,
    BrokerUnavailable,
    Closed,
    DecodeError,
    Message,
    Nack,
    Queue,
    Receipt,
    Reject,
    RetryPolicy,
    Service,
    Topic,
    connect,
)
from brokerkit.events import DeadLettered, Event, Handled
from brokerkit.testing import faults, idle, run

EVENTS = Topic("events", int, partitions=1)
JOBS = Queue("jobs", int)
OUT = Queue("out", int)


def test_a_refused_publication_lets_its_key_go_on_once() -> None:
    async def main() -> None:
        running = most = 0
        service = Service("s")
        async with connect("memory://") as broker:

            @service.subscribe(EVENTS, concurrency=4)
            async def handler(message: Message[int]) -> None:
                nonlocal running, most
                running += 1
                most = max(most, running)
                if message.value == 0:
                    await message.publish(OUT, 1)
                    await broker.delete(OUT)
                await asyncio.sleep(5)
                running -= 1

            async with service.running(broker):
                for number in range(5):
                    await broker.publish(EVENTS, number, key="k")
                await asyncio.sleep(60)
            assert most == 1

    run(main)


def test_a_confirmed_acknowledgement_that_fails_in_a_handler_is_a_failed_attempt() -> None:
    async def main() -> None:
        attempts: list[int] = []
        service = Service("s")
        async with connect("memory://") as broker:

            @service.subscribe(JOBS)
            async def handler(message: Message[int]) -> None:
                attempts.append(message.attempt)
                if message.attempt == 1:
                    faults(broker).fail_settles(BrokerUnavailable("not now"), 1)
                await message.ack(confirm=True)

            async with service.running(broker):
                await broker.publish(JOBS, 1)
                await asyncio.sleep(60)
                backlog = await broker.backlog(JOBS)
            assert attempts == [1, 2]
            assert (backlog.waiting, backlog.in_flight, backlog.delayed) == (0, 0, 0)

    run(main)


def test_a_confirmed_acknowledgement_that_fails_may_be_made_again() -> None:
    async def main() -> None:
        async with connect("memory://") as broker, broker.subscribe(JOBS) as messages:
            await broker.publish(JOBS, 1)
            (message,) = await messages.receive()
            faults(broker).fail_settles(BrokerUnavailable("not now"), 1)
            with pytest.raises(BrokerUnavailable):
                await message.ack(confirm=True)
            assert message.outcome is None
            await message.ack(confirm=True)
            assert (await broker.backlog(JOBS)).in_flight == 0

    run(main)


@pytest.mark.parametrize("turns", range(1, 6))
def test_cancelling_a_confirmed_acknowledgement_does_not_take_it_back(turns: int) -> None:
    """Wherever it is: on its way, just refused, or stored.  What the caller has heard of, it makes again."""

    async def main() -> None:
        async with connect("memory://") as broker, broker.subscribe(JOBS) as messages:
            await broker.publish(JOBS, 1)
            (message,) = await messages.receive()
            faults(broker).fail_settles(BrokerUnavailable("not now"), 1)
            task = asyncio.create_task(message.ack(confirm=True))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                assert isinstance(task.exception(), BrokerUnavailable)
                await message.ack()
            await asyncio.sleep(30)
            assert (await broker.backlog(JOBS)).in_flight == 0

    run(main)


def test_what_a_lost_connection_left_behind_is_not_tried_again() -> None:
    """The message comes again on the next connection; retries of its first run beside it would run it twice at once."""

    async def main() -> None:
        runs: list[tuple[int, int]] = []
        service = Service("s")

        @service.subscribe(EVENTS, concurrency=2, retry=RetryPolicy(attempts=5))
        async def handler(message: Message[int]) -> None:
            runs.append((message.value, message.attempt))
            await asyncio.sleep(3)
            if message.value == 0 and message.attempt < 3:
                raise LookupError

        async with connect("memory://") as broker, service.running(broker):
            await broker.publish(EVENTS, 0, key="k")
            await broker.publish(EVENTS, 1, key="k")
            await asyncio.sleep(1)
            faults(broker).disconnect()
            await asyncio.sleep(0.1)
            faults(broker).reconnect()
            await asyncio.sleep(200)
        # One run on the connection that was lost, then the message from its first attempt on.
        assert runs == [(0, 1), (0, 1), (0, 2), (0, 3), (1, 1)]

    run(main)


def test_a_batch_that_fails_after_a_reconnect_leaves_its_service_alive() -> None:
    async def main() -> None:
        batches: list[list[int]] = []
        service = Service("s")

        @service.subscribe(EVENTS, batch=Batch(3, wait=0.1))
        async def handler(messages: Sequence[Message[int]]) -> None:
            batches.append([message.value for message in messages])
            if len(batches) == 1:
                await asyncio.sleep(30)
                raise LookupError

        async with connect("memory://") as broker, service.running(broker):
            for number in range(3):
                await broker.publish(EVENTS, number, key="k")
            await asyncio.sleep(1)
            faults(broker).disconnect()
            await asyncio.sleep(1)
            faults(broker).reconnect()
            await asyncio.sleep(100)
        assert batches == [[0, 1, 2], [0, 1, 2]]

    run(main)


def test_a_replica_keeps_the_order_of_a_key_over_a_reconnect() -> None:
    async def main() -> None:
        runs: list[int] = []
        service = Service("s")

        @service.subscribe(EVENTS, group=EVERY_REPLICA, concurrency=4)
        async def handler(message: Message[int]) -> None:
            runs.append(message.value)
            if message.value == 0:
                await asyncio.sleep(20)

        async with connect("memory://") as broker, service.running(broker):
            for number in range(3):
                await broker.publish(EVENTS, number, key="k")
            await asyncio.sleep(1)
            faults(broker).disconnect()
            await asyncio.sleep(1)
            faults(broker).reconnect()
            await asyncio.sleep(12)
            for number in range(3, 6):
                await broker.publish(EVENTS, number, key="k")
            await asyncio.sleep(60)
        assert runs == [0, 1, 2, 3, 4, 5]

    run(main)


def test_a_handler_that_swallows_its_timeout_leaves_its_worker_as_it_was() -> None:
    async def main() -> None:
        runs: list[int] = []
        service = Service("s")

        @service.subscribe(JOBS, timeout=5, retry=RetryPolicy(attempts=1))
        async def handler(message: Message[int]) -> None:
            runs.append(message.value)
            if message.value == 1:
                await message.ack()
                try:
                    await asyncio.sleep(50)
                except asyncio.CancelledError:
                    return
            elif message.value == 2:
                raise asyncio.CancelledError

        async with connect("memory://") as broker, service.running(broker):
            for number in (1, 2, 3):
                await broker.publish(JOBS, number)
            await asyncio.sleep(60)
        assert runs == [1, 2, 3]

    run(main)


def test_timeouts_hold_while_a_service_drains() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        service = Service("s")

        @service.subscribe(JOBS, timeout=5, concurrency=2)
        async def handler(_: Message[int]) -> None:
            await asyncio.sleep(500)

        async with connect("memory://") as broker:
            async with service.running(broker, drain=300):
                await broker.publish(JOBS, 1)
                await asyncio.sleep(1)
                began = loop.time()
            assert loop.time() - began == pytest.approx(4, abs=0.1)

    run(main)


def test_a_worker_woken_for_a_message_that_it_does_not_take_wakes_the_next() -> None:
    async def main() -> None:
        batches: list[list[int]] = []
        service = Service("s")

        @service.subscribe(JOBS, batch=Batch(2, wait=3000), concurrency=2, prefetch=50, timeout=None)
        async def handler(messages: Sequence[Message[int]]) -> None:
            batches.append([message.value for message in messages])
            await asyncio.sleep(1 if 0 in batches[-1] else 2000)

        async with connect("memory://") as broker, service.running(broker, drain=0):
            await broker.publish_many(JOBS, [0, 1])
            await asyncio.sleep(0.5)
            await broker.publish(JOBS, 2)  # the other worker begins to gather, the first one waits behind it afterwards
            await asyncio.sleep(2)
            await broker.publish_many(JOBS, [3, 4, 5])
            await asyncio.sleep(10)
            assert sorted(value for batch in batches for value in batch) == [0, 1, 2, 3, 4, 5]

    run(main)


def test_a_message_that_cannot_be_read_does_not_keep_other_readers_waiting() -> None:
    async def main() -> None:
        seen: list[object] = []
        as_bytes, as_int = Topic("raw", bytes, partitions=1), Topic("raw", int, partitions=1)
        async with connect("memory://raw") as writer, connect("memory://raw") as reader:
            async with reader.subscribe(as_int) as messages:

                async def read() -> None:
                    try:
                        seen.append(await messages.receive())
                    except DecodeError as error:
                        seen.append(error)

                async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                    group.create_task(read())
                    group.create_task(read())
                    await asyncio.sleep(1)
                    await writer.publish_many(as_bytes, [b"x", b"y"])
        assert [type(item) for item in seen] == [DecodeError, DecodeError]

    run(main)


def test_a_first_publish_in_an_outage_waits_for_the_system_as_later_ones_do() -> None:
    async def main() -> None:
        quotes = Queue("quotes", int, reply=int)
        async with connect("memory://") as broker:
            faults(broker).disconnect()
            asyncio.get_running_loop().call_later(1, faults(broker).reconnect)
            assert isinstance(await broker.publish(JOBS, 1, timeout=5), Receipt)
            assert isinstance((await broker.publish_many(OUT, [1], timeout=5))[0], Receipt)
            faults(broker).disconnect()
            began = asyncio.get_running_loop().time()
            with pytest.raises(BrokerUnavailable):
                await broker.publish(EVENTS, 1, timeout=5)
            with pytest.raises(BrokerUnavailable):
                await broker.publish_many(Queue("other", int), [1], timeout=5)
            with pytest.raises(BrokerUnavailable):
                await broker.request(quotes, 1, timeout=5)
            assert asyncio.get_running_loop().time() - began == pytest.approx(15, abs=0.1)
            faults(broker).reconnect()

    run(main)


def test_a_run_of_a_service_is_entered_once() -> None:
    async def main() -> None:
        service = Service("s")

        @service.subscribe(JOBS)
        async def handler(_: Message[int]) -> None: ...

        async with connect("memory://") as broker:
            running = service.running(broker)
            async with running:
                pass
            with pytest.raises(Closed, match="again"):
                await running.__aenter__()
            async with service.running(broker):
                pass

    run(main)


def test_an_included_service_stops_the_run_that_it_is_part_of() -> None:
    async def main() -> None:
        inner, outer = Service("inner"), Service("outer")
        outer.include(inner)

        @inner.subscribe(JOBS)
        async def handler(_: Message[int]) -> None:
            inner.stop()

        async with connect("memory://") as broker, outer.running(broker):
            await broker.publish(JOBS, 1)
            await asyncio.sleep(1)
            await broker.publish(JOBS, 2)
            await asyncio.sleep(10)
            assert (await broker.backlog(JOBS)).waiting == 1

    run(main)


def test_only_an_acknowledged_message_counts_as_handled() -> None:
    async def main() -> None:
        seen: list[Event] = []
        service = Service("s")

        @service.subscribe(JOBS)
        async def handler(message: Message[int]) -> None:
            if message.value == 1:
                await message.reject("no")
            elif message.value == 2 and message.attempt == 1:
                await message.nack()

        async with connect("memory://", on_event=seen.append) as broker, service.running(broker):
            for number in (1, 2, 3):
                await broker.publish(JOBS, number, id=f"id-{number}")
            await asyncio.sleep(10)
        handled = [(event.id, event.attempt) for event in seen if isinstance(event, Handled)]
        assert sorted(handled) == [("id-2", 2), ("id-3", 1)]

    run(main)


def test_a_nack_that_makes_no_sense_is_refused_where_it_is_made() -> None:
    """The error is that of the attempt, so the log and the letter say what is wrong."""
    for delay in (-1, float("nan"), float("inf"), True, "x"):
        with pytest.raises(ValueError, match="Nack\\(delay="):
            Nack(delay=delay)  # type: ignore[arg-type]


def test_what_was_redriven_to_a_group_is_told_of_as_the_groups() -> None:
    """Metrics by address and group see every message of the group, through whichever queue it comes."""
    orders: Topic[str] = Topic("orders", str)
    told: list[Event] = []

    async def main() -> None:
        service = Service("billing")

        @service.subscribe(orders)
        async def bill(message: Message[str]) -> None:
            raise Reject("no")

        async with connect("memory://", on_event=told.append) as broker, service.running(broker):
            await broker.publish(orders, "o1")
            await idle(broker)
            await broker.redrive(orders.dead_letters("billing"))
            await idle(broker)

    run(main)
    assert {(event.address, event.group) for event in told if isinstance(event, DeadLettered)} == {
        ("orders", "billing")
    }
    assert sum(isinstance(event, DeadLettered) for event in told) == 2


def test_two_handlers_that_share_one_groups_messages_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """A newcomer expects both to see everything; the log says what to do."""
    service = Service("billing")

    @service.subscribe(EVENTS)
    async def first(message: Message[int]) -> None: ...

    @service.subscribe(EVENTS)
    async def second(message: Message[int]) -> None: ...

    @service.subscribe(EVENTS, group="audit")
    async def third(message: Message[int]) -> None: ...

    async def main() -> None:
        async with connect("memory://") as broker, service.running(broker):
            pass

    run(main)
    (warning,) = [record.getMessage() for record in caplog.records if "share the messages" in record.getMessage()]
    assert "first" in warning
    assert "second" in warning
    assert "third" not in warning


FORKING = """
import asyncio, os
from brokerkit import ConfigError, Queue, connect

JOBS = Queue("jobs", int)

async def main():
    async with connect("memory://") as broker:
        await broker.publish(JOBS, 1)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                await broker.publish(JOBS, 2)
            except ConfigError as error:
                code = 0 if "fork" in str(error) else 2
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        raise SystemExit(os.waitstatus_to_exitcode(status))

asyncio.run(main())
"""


def test_publishing_in_a_forked_child_says_that_it_must_connect_for_itself() -> None:
    """Also in the coroutine that the child has inherited, where asyncio knows no running loop."""
    done = subprocess.run([sys.executable, "-c", FORKING], timeout=30, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("declare", ["auto", "check"])
def test_settings_that_may_not_be_read_are_warned_of_or_refused(
    declare: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with connect("memory://shop") as first:
            await first.declare(EVENTS)
            async with connect("memory://shop", declare=declare) as broker:

                async def refuse(*_: object) -> None:
                    raise AuthorizationError("DESCRIBE_CONFIGS on topic events is not allowed")

                monkeypatch.setattr(broker._driver, "describe", refuse)
                if declare == "check":
                    with pytest.raises(AuthorizationError, match="DESCRIBE_CONFIGS"):
                        await broker.publish(EVENTS, 1)
                else:
                    await broker.publish(EVENTS, 1)
                    assert "DESCRIBE_CONFIGS" in caplog.text

    run(main)


def test_a_broker_is_made_without_a_running_loop() -> None:
    assert repr(connect("memory://")) == "<Broker memory:// new>"
