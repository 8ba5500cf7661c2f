"""`testing.running`, `handled`, `dead_letters` and `faults`: a service is run and looked at."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from brokerkit import (
    EVERY_REPLICA,
    Batch,
    Broker,
    BrokerUnavailable,
    BufferFull,
    CapabilityError,
    Closed,
    ConfigError,
    Message,
    PublishUnknown,
    Queue,
    Reject,
    RetryPolicy,
    Service,
    Topic,
    connect,
)
from brokerkit.middleware import CallNext
from brokerkit.testing import dead_letters, faults, handled, idle, run, running

ORDERS = Topic("orders", str)
EMAILS = Queue("emails", str)
ONCE = RetryPolicy(attempts=1)


async def accept(message: Message[str]) -> None:
    if message.value == "bad":
        raise Reject("bad")


def billing(**options: Any) -> Service:
    service = Service("billing")
    service.subscribe(ORDERS, **options)(accept)
    return service


def values(messages: Sequence[Message[str]]) -> list[str]:
    return [message.value for message in messages]


# --- running ---------------------------------------------------------------------------------------------------------


def test_running_makes_a_broker_and_closes_it() -> None:
    async def main() -> None:
        async with running(billing()) as broker:
            await broker.publish(ORDERS, "a")
            await idle(broker)
            assert values(handled(broker, ORDERS)) == ["a"]
        assert values(handled(broker, ORDERS)) == ["a"]
        with pytest.raises(Closed):
            await broker.publish(ORDERS, "b")

    run(main)


def test_running_opens_a_broker_that_is_not_open_and_closes_that_one_too() -> None:
    async def main() -> None:
        broker = connect("memory://")
        async with running(billing(), broker) as same:
            assert same is broker
            await broker.publish(ORDERS, "a")
        with pytest.raises(Closed):
            await broker.health()

    run(main)


def test_running_leaves_a_broker_open_that_was_open() -> None:
    async def main() -> None:
        async with connect("memory://") as broker:
            async with running(billing(), broker):
                await broker.publish(ORDERS, "a")
                await idle(broker)
            await broker.publish(ORDERS, "b")
            async with running(billing(), broker):
                await idle(broker)
            assert values(handled(broker, ORDERS)) == ["a", "b"]

    run(main)


def test_several_services_run_on_one_broker() -> None:
    async def main() -> None:
        sending = Service("sending")
        sending.subscribe(EMAILS)(accept)
        async with running(billing()) as broker, running(sending, broker):
            await broker.publish(ORDERS, "a")
            await broker.publish(EMAILS, "b")
            await idle(broker)
            assert values(handled(broker, ORDERS)) == ["a"]
            assert values(handled(broker, EMAILS)) == ["b"]

    run(main)


def test_running_takes_a_url() -> None:
    async def main() -> None:
        async with running(billing(), url="memory://?prefix=t.") as broker:
            assert broker.prefix == "t."
        with pytest.raises(ConfigError):
            async with running(billing(), url="nothing://"):
                pass

    run(main)


def test_an_error_of_the_body_comes_out_as_it_is() -> None:
    async def main() -> None:
        with pytest.raises(AssertionError, match="mine"):
            async with running(billing()) as broker:
                await broker.publish(ORDERS, "a")
                raise AssertionError("mine")

    run(main)


def test_leaving_drains() -> None:
    done: list[str] = []

    async def slow(message: Message[str]) -> None:
        await asyncio.sleep(20)
        done.append(message.value)

    async def main(drain: float) -> None:
        service = Service("slow")
        service.subscribe(EMAILS)(slow)
        async with running(service, drain=drain) as broker:
            await broker.publish(EMAILS, f"{drain:g}")
            await asyncio.sleep(1)

    run(lambda: main(25))
    run(lambda: main(5))
    assert done == ["25"]


def test_an_async_fixture_may_enter_in_one_task_and_leave_in_another() -> None:
    @asynccontextmanager
    async def fixture() -> AsyncGenerator[Broker]:
        async with running(billing()) as broker:
            yield broker

    async def main() -> None:
        entered = fixture()
        broker = await asyncio.create_task(entered.__aenter__())
        await broker.publish(ORDERS, "a")
        await idle(broker)
        assert values(handled(broker, ORDERS)) == ["a"]
        await asyncio.create_task(entered.__aexit__(None, None, None))

    run(main)


# --- handled ---------------------------------------------------------------------------------------------------------


def test_handled_has_what_finished_well_in_that_order() -> None:
    async def work(message: Message[str]) -> None:
        match message.value:
            case "slow":
                await asyncio.sleep(10)
            case "again" if message.attempt == 1:
                raise ValueError("once")
            case "bad":
                raise Reject("bad")
            case "nacked" if message.attempt < 3:
                await message.nack()
            case "rejected":
                await message.reject("by hand")
            case "acked":
                await message.ack()
            case "acked and raised":
                await message.ack()
                raise ValueError("too late")

    async def main() -> None:
        service = Service("work")
        service.subscribe(EMAILS, concurrency=20, retry=RetryPolicy(wait_initial=1, wait_jitter=0))(work)
        async with running(service) as broker:
            for value in ("slow", "again", "bad", "nacked", "rejected", "acked", "acked and raised", "plain"):
                await broker.publish(EMAILS, value)
            await idle(broker)
            found = handled(broker, EMAILS)
            assert values(found) == ["acked", "plain", "nacked", "again", "slow"]
            assert [message.attempt for message in found] == [1, 1, 3, 2, 1]
            assert sorted(letter.value for letter in await dead_letters(broker, EMAILS)) == ["bad", "rejected"]

    run(main)


def test_handled_tells_the_groups_of_a_topic_apart() -> None:
    async def main() -> None:
        service = billing()
        service.subscribe(ORDERS, group="audit")(accept)
        service.subscribe(ORDERS, group=EVERY_REPLICA)(accept)
        async with running(service, url="memory://?prefix=t.") as broker:
            await broker.publish(ORDERS, "a")
            await idle(broker)
            assert values(handled(broker, ORDERS)) == ["a", "a", "a"]
            assert values(handled(broker, ORDERS, "billing")) == ["a"]
            assert values(handled(broker, ORDERS, "audit")) == ["a"]
            assert handled(broker, ORDERS, "other") == []
            assert handled(broker, EMAILS) == []

    run(main)


def test_handled_has_what_was_redriven() -> None:
    calls: list[str] = []

    async def twice(message: Message[str]) -> None:
        calls.append(message.value)
        if len(calls) == 1:
            raise Reject("not yet")

    async def main() -> None:
        service = Service("billing")
        service.subscribe(ORDERS)(twice)
        async with running(service, url="memory://?prefix=t.") as broker:
            await broker.publish(ORDERS, "a")
            await idle(broker)
            assert handled(broker, ORDERS) == []
            await broker.redrive(ORDERS.dead_letters("billing"))
            await idle(broker)
            assert values(handled(broker, ORDERS)) == ["a"]
            assert values(handled(broker, ORDERS, "billing")) == ["a"]
            assert await dead_letters(broker, ORDERS, "billing") == []

    run(main)


def test_handled_has_each_message_of_a_batch() -> None:
    async def several(messages: Sequence[Message[str]]) -> None:
        if len(messages) > 1 and any(message.value == "bad" for message in messages):
            raise ValueError("one of them")
        for message in messages:
            await accept(message)

    async def main() -> None:
        service = Service("several")
        service.subscribe(EMAILS, batch=Batch(10, wait=1), retry=ONCE)(several)
        async with running(service) as broker:
            await broker.publish_many(EMAILS, ["a", "bad", "b"])
            await idle(broker)
            assert sorted(values(handled(broker, EMAILS))) == ["a", "b"]
            await broker.publish_many(EMAILS, ["c", "d"])
            await idle(broker)
            assert sorted(values(handled(broker, EMAILS))) == ["a", "b", "c", "d"]

    run(main)


def test_what_a_middleware_keeps_from_the_handler_or_lets_fail_was_not_handled() -> None:
    async def picky(message: Message[Any], call_next: CallNext) -> object:
        if message.value == "kept":
            return None
        result = await call_next(message)
        if message.value == "picked":
            raise Reject("not this one")
        return result

    async def main() -> None:
        async with running(billing(), connect("memory://", middleware=[picky])) as broker:
            for value in ("kept", "picked", "b"):
                await broker.publish(ORDERS, value)
            await idle(broker)
            assert values(handled(broker, ORDERS)) == ["b"]
            assert (await broker.backlog(ORDERS, "billing")).dead == 1

    run(main)


def test_an_attempt_over_its_timeout_was_not_handled() -> None:
    async def stubborn(message: Message[str]) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(100)

    async def main() -> None:
        service = Service("stubborn")
        service.subscribe(EMAILS, timeout=5, retry=ONCE)(stubborn)
        async with running(service) as broker:
            await broker.publish(EMAILS, "a")
            await idle(broker)
            assert handled(broker, EMAILS) == []
            [letter] = await dead_letters(broker, EMAILS)
            assert letter.dead.error == "TimeoutError"

    run(main)


def test_handled_without_running_says_what_to_do() -> None:
    async def main() -> None:
        async with connect("memory://") as broker, billing().running(broker):
            with pytest.raises(ConfigError, match="running"):
                handled(broker, ORDERS)

    run(main)


# --- dead letters, faults --------------------------------------------------------------------------------------------


def test_dead_letters_are_those_of_a_queue_or_of_a_group() -> None:
    async def main() -> None:
        service = billing()
        service.subscribe(ORDERS, group="audit")(accept)
        service.subscribe(EMAILS)(accept)
        async with running(service) as broker:
            assert await dead_letters(broker, EMAILS) == []
            assert await dead_letters(broker, ORDERS, "audit") == []
            await broker.publish(ORDERS, "bad")
            await broker.publish(EMAILS, "bad")
            await broker.publish(EMAILS, "good")
            await idle(broker)
            [one], [two], [three] = (
                await dead_letters(broker, EMAILS),
                await dead_letters(broker, ORDERS, "audit"),
                await dead_letters(broker, ORDERS, "billing"),
            )
            assert [one.dead.group, two.dead.group, three.dead.group] == [None, "audit", "billing"]
            assert {one.dead.reason, two.dead.reason, three.dead.reason} == {"bad"}
            with pytest.raises(ConfigError, match="name it"):
                await dead_letters(broker, ORDERS)  # type: ignore[call-overload]
            with pytest.raises(ConfigError, match="no groups"):
                await dead_letters(broker, EMAILS, "audit")  # type: ignore[call-overload]

    run(main)


def test_faults_break_the_connection_of_one_broker() -> None:
    async def main() -> None:
        async with running(billing()) as broker:
            faults(broker).fail_publishes(BufferFull("no room"), 2)
            await broker.publish(ORDERS, "a")
            faults(broker).lose_replies()
            with pytest.raises(PublishUnknown):
                await broker.publish(ORDERS, "b")
            faults(broker).fail_settles(BrokerUnavailable("gone"), 3)
            await idle(broker)
            assert values(handled(broker, ORDERS)) == ["a", "b"]
            faults(broker).disconnect()
            with pytest.raises(BrokerUnavailable):
                await broker.publish(ORDERS, "c", timeout=5)
            faults(broker).reconnect()
            await broker.publish(ORDERS, "d")
            await idle(broker)
            assert values(handled(broker, ORDERS)) == ["a", "b", "d"]

    run(main)


def test_faults_of_another_driver_are_refused() -> None:
    broker = connect("memory://")
    assert not faults(broker).dead, "it can be had before the broker is open"
    broker._driver = object()  # type: ignore[assignment]
    with pytest.raises(CapabilityError, match="memory://"):
        faults(broker)
