"""Tests of a service: handlers called by hand, and the whole service on memory://, without a server and without sleeps.

Run with `pytest examples/test_billing.py`.
"""

import asyncio
from dataclasses import dataclass

import pytest

from brokerkit import Message, Queue, Reject, RetryPolicy, Service, Topic
from brokerkit.testing import dead_letters, handled, idle, message, running


@dataclass
class Order:
    id: str
    total: float


ORDERS = Topic("orders", Order)
RECEIPTS = Queue("receipts", str)
service = Service("billing")


@service.subscribe(ORDERS, retry=RetryPolicy(attempts=2, wait_initial=0))
async def bill(message: Message[Order]) -> None:
    if message.value.total <= 0:
        raise Reject("nothing to pay")
    await message.publish(RECEIPTS, f"{message.value.id}: {message.value.total:.2f}")


def test_bill_sends_a_receipt() -> None:
    """A handler is a function: call it with a message, look at what it has staged."""
    order = message(ORDERS, Order("o1", 10.0))
    asyncio.run(bill(order))
    assert [item.value for item in order.published] == ["o1: 10.00"]


def test_bill_rejects_an_order_of_nothing() -> None:
    """What a handler raises is for the test to see."""
    with pytest.raises(Reject, match="nothing to pay"):
        asyncio.run(bill(message(ORDERS, Order("o2", 0.0))))


def test_the_service_dead_letters_what_it_rejects() -> None:
    """The whole service runs on memory:// with its real semantics."""

    async def main() -> None:
        async with running(service) as broker:
            await broker.publish(ORDERS, Order("o1", 10.0), key="ann")
            await broker.publish(ORDERS, Order("o2", 0.0), key="ann")
            await idle(broker)
            assert [message.value.id for message in handled(broker, ORDERS)] == ["o1"]
            [letter] = await dead_letters(broker, ORDERS, "billing")
            assert letter.dead.reason == "nothing to pay"

    asyncio.run(main())
