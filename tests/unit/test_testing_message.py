"""`testing.message`: a handler is called by hand, and the message tells what it did."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from brokerkit import (
    AlreadySettled,
    Batch,
    ConfigError,
    DecodeError,
    EncodeError,
    Message,
    Outcome,
    Queue,
    Reject,
    RetryPolicy,
    Service,
    TooLarge,
    Topic,
)
from brokerkit.testing import message, run


@dataclass
class Order:
    id: str
    total: float


ORDERS = Topic("orders", Order)
EMAILS = Queue("emails", str)
QUOTES = Queue("quotes", Order, reply=float)


def test_the_handler_sees_what_a_consumer_would() -> None:
    order = Order("o1", 10.0)
    made = message(ORDERS, order, key="ann", id="m1", headers={"shop": "7"}, attempt=3)
    assert made.value == order
    assert made.value is not order, "it has been through its codec"
    assert (made.key, made.id, made.headers, made.attempt, made.deliveries) == ("ann", "m1", {"shop": "7"}, 3, 1)
    assert made.body == b'{"id":"o1","total":10.0}'
    assert abs(made.timestamp - datetime.now(UTC)) < timedelta(minutes=1)
    assert made.position
    assert made.native is None
    assert made.outcome is None
    assert made.published == ()


def test_every_message_has_an_id_of_its_own() -> None:
    assert len({message(EMAILS, "hi").id for _ in range(100)}) == 100


def test_in_virtual_time_the_timestamp_is_virtual() -> None:
    async def main() -> datetime:
        await asyncio.sleep(60)
        return message(EMAILS, "hi").timestamp

    assert run(main) == datetime(2030, 1, 1, 0, 1, tzinfo=UTC)


def test_a_handler_of_a_service_is_called_as_the_function_it_is() -> None:
    service = Service("billing")

    @service.subscribe(ORDERS)
    async def bill(message: Message[Order]) -> None:
        if message.value.total <= 0:
            raise Reject("nothing to pay")
        await message.publish(EMAILS, f"{message.value.id}: {message.value.total:.2f}", delay=60, id="r1")

    @service.subscribe(QUOTES)
    async def quote(message: Message[Order]) -> float:
        return message.value.total * 2

    @service.subscribe(EMAILS, batch=Batch(10))
    async def send(messages: Sequence[Message[str]]) -> None:
        await messages[1].reject("not an address")

    async def main() -> None:
        order = message(ORDERS, Order("o1", 10.0))
        await bill(order)
        assert order.outcome is None, "the service acknowledges"
        [item] = order.published
        assert (item.address, item.value, item.delay, item.id) == (EMAILS, "o1: 10.00", 60, "r1")
        with pytest.raises(Reject, match="nothing to pay"):
            await bill(message(ORDERS, Order("o2", 0.0)))
        assert await quote(message(QUOTES, Order("o3", 3.0))) == 6.0
        several = [message(EMAILS, "a@x.org"), message(EMAILS, "b")]
        await send(several)
        assert [one.outcome for one in several] == [None, Outcome("reject", reason="not an address")]

    run(main)


@pytest.mark.parametrize(
    "settle, outcome",
    [
        (lambda m: m.ack(), Outcome("ack")),
        (lambda m: m.ack(confirm=True), Outcome("ack")),
        (lambda m: m.nack(), Outcome("nack")),
        (lambda m: m.nack(delay=30), Outcome("nack", delay=30)),
        (lambda m: m.reject("why"), Outcome("reject", reason="why")),
    ],
)
def test_settling_by_hand_is_kept_and_holds(settle: Any, outcome: Outcome) -> None:
    async def main() -> None:
        order = message(ORDERS, Order("o1", 1.0))
        await settle(order)
        assert order.outcome == outcome
        await settle(order)
        with pytest.raises(AlreadySettled):
            await (order.ack() if outcome.kind != "ack" else order.nack())
        with pytest.raises(AlreadySettled):
            await order.publish(EMAILS, "late")
        assert order.outcome == outcome

    run(main)


def test_process_settles_as_a_subscription_would() -> None:
    policy = RetryPolicy(attempts=3, wait_initial=4, wait_jitter=0, on=(ValueError, KeyError))

    async def outcome(made: Message[Any], error: Exception | None) -> Outcome | None:
        async with made.process(policy):
            if error is not None:
                raise error
        return made.outcome

    async def main() -> None:
        assert await outcome(message(EMAILS, "a"), None) == Outcome("ack")
        assert await outcome(message(EMAILS, "a"), ValueError("no")) == Outcome("nack", delay=4)
        assert await outcome(message(EMAILS, "a", attempt=2), ValueError("no")) == Outcome("nack", delay=8)
        dead = await outcome(message(EMAILS, "a", attempt=3), ValueError("no"))
        assert dead == Outcome("reject", reason="failed after 3 attempts: no")
        assert await outcome(message(EMAILS, "a"), TypeError()) == Outcome("reject", reason="TypeError is not retried")
        assert await outcome(message(EMAILS, "a"), Reject("bad")) == Outcome("reject", reason="bad")

    run(main)


def test_a_topics_message_waits_a_minute_at_most() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="holds its key"):
            await message(ORDERS, Order("o1", 1.0)).nack(delay=61)
        email = message(EMAILS, "a")
        await email.nack(delay=61)
        assert email.outcome == Outcome("nack", delay=61)
        with pytest.raises(ConfigError):
            await message(EMAILS, "a").nack(delay=-1)

    run(main)


def test_what_it_publishes_is_checked_as_a_broker_checks_it() -> None:
    async def main() -> None:
        order = message(ORDERS, Order("o1", 1.0))
        with pytest.raises(EncodeError):
            await order.publish(EMAILS, 5)  # type: ignore[misc]
        with pytest.raises(ConfigError):
            await order.publish(ORDERS, Order("o2", 1.0), delay=5)  # type: ignore[call-overload]
        with pytest.raises(TooLarge):
            await order.publish(EMAILS, "x" * 2_000_000)
        with pytest.raises(ConfigError):
            await order.publish(EMAILS.dead_letters, "x")  # type: ignore[call-overload]
        assert order.published == ()

    run(main)


def test_a_message_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(EncodeError):
        message(ORDERS, "no order")  # type: ignore[misc]
    with pytest.raises(ConfigError, match="queue"):
        message(EMAILS, "a", key="k")  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="bk-"):
        message(EMAILS, "a", headers={"bk-inbox": "x"})
    with pytest.raises(ConfigError, match="attempt"):
        message(EMAILS, "a", attempt=0)
    with pytest.raises(ConfigError, match="Topic or a Queue"):
        message(EMAILS.dead_letters, "a")  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="Topic or a Queue"):
        message("emails", "a")  # type: ignore[call-overload]


def test_a_value_that_its_codec_cannot_read_back_shows_when_it_is_read() -> None:
    class Broken:
        content_type = "x/broken"

        def encode(self, value: str) -> bytes:
            return b"?"

        def decode(self, body: bytes, headers: object) -> str:
            raise ValueError("unreadable")

    made = message(Queue("broken", str, codec=Broken()), "a")
    with pytest.raises(DecodeError, match="unreadable"):
        made.value  # noqa: B018
