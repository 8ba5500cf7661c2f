"""The topic half of the demo: a shop's orders are billed and packed by two groups, in order per customer.

    orders (topic) ─┬─ group "billing" ──→ invoices (topic), stored with the acknowledgement
                    └─ group "warehouse"

`python examples/orders_topics.py [URL]` runs this half alone; `orders.py` adds queues and a request with a reply.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path

from orders_ledger import Ledger, Station
from orders_stage import Demo, Run, perform

from brokerkit import Broker, BrokerError, Message, Reject, RetryPolicy, Service, Topic

FILE = Path(__file__).parent / "data" / "orders.jsonl"


@dataclass
class Item:
    sku: str
    quantity: int
    price: Decimal


@dataclass
class Order:
    id: str
    customer: str
    name: str
    email: str
    country: str
    items: list[Item]
    payment: str
    express: bool
    reminder: bool
    placed: datetime

    @property
    def total(self) -> Decimal:
        return sum((item.price * item.quantity for item in self.items), Decimal(0))


@dataclass
class Invoice:
    order: str
    customer: str
    name: str
    email: str
    total: Decimal
    reminder: bool


ORDERS = Topic("orders", Order)
INVOICES = Topic("invoices", Invoice)


class JsonLine:
    """Sends lines that are JSON already, or claim to be, as they are."""

    content_type = "application/json"

    def encode(self, value: bytes, /) -> bytes:
        return value

    def decode(self, body: bytes, headers: Mapping[str, str], /) -> bytes:
        return body


LINES = Topic("orders", bytes, codec=JsonLine())  # the same topic as the shop's export sees it: it checks nothing


class PaymentBusy(Exception):
    """The payment provider has no time for us now."""


class Payments:
    """Stands in for a payment provider: how a payment goes is part of the order, as with a provider's test cards."""

    async def charge(self, order: Order, attempt: int) -> None:
        await asyncio.sleep(0.005)  # the network
        if order.payment == "bank-offline":
            raise TimeoutError("the bank did not answer")
        if attempt <= {"card-busy-once": 1, "card-busy-twice": 2}.get(order.payment, 0):
            raise PaymentBusy("the payment provider is busy")
        if order.payment == "card-expired":
            raise Reject("the card has expired")


@asynccontextmanager
async def payments() -> AsyncIterator[Payments]:
    yield Payments()  # a real one would connect here and disconnect behind the yield


billing = Service("billing", lifespan=payments)
warehouse = Service("warehouse")


@billing.subscribe(ORDERS, concurrency=8, retry=RetryPolicy(attempts=3, wait_initial=0.1))
async def bill(message: Message[Order], provider: Payments) -> None:
    """Charge the customer; the invoice is stored before this message is acknowledged, and has the same id each time."""
    order = message.value
    if order.total <= 0:
        raise Reject(f"nothing to pay: the total is {order.total}")
    await provider.charge(order, message.attempt)
    invoice = Invoice(order.id, order.customer, order.name, order.email, order.total, order.reminder)
    await message.publish(INVOICES, invoice, key=order.customer, id=f"invoice-{order.id}")


@warehouse.subscribe(ORDERS, concurrency=4)
async def pack(message: Message[Order]) -> None:
    """Take the goods from the shelf."""
    for item in message.value.items:
        if item.sku == "KETTLE-05":
            raise Reject(f"{item.sku} is discontinued")
        if item.quantity < 1:
            raise Reject(f"cannot pack {item.quantity} pieces")
    await asyncio.sleep(0.001)  # the walk


def lines() -> dict[str, bytes]:
    """Return the lines of the shop's export by message id."""
    return {f"line-{number:03}": line for number, line in enumerate(FILE.read_bytes().splitlines(), 1)}


def customer(line: bytes) -> str | None:
    """Return the key of a line: what can be told without reading it."""
    found = re.search(rb'"customer": "([\w-]+)"', line)
    return found[1].decode() if found else None


async def feed(broker: Broker) -> None:
    """Publish all lines as they are, some at a time, in order."""
    items = [LINES.outgoing(line, id=id, key=customer(line)) for id, line in lines().items()]
    for start in range(0, len(items), 20):
        for receipt in await broker.publish_many(LINES, items[start : start + 20]):
            if isinstance(receipt, BrokerError):
                raise receipt


def keys(ledger: Ledger) -> dict[str, str]:
    """Return the customer of each line, to check the order by."""
    return {id: key for id, line in lines().items() if (key := customer(line))}


def all_lines(ledger: Ledger) -> set[str]:
    return set(lines())


async def shop(run: Run) -> None:
    """Play the shop: publish, and know nothing of who reads."""
    async with run.connect() as broker:
        await feed(broker)


service = Service("orders")
service.include(billing)
service.include(warehouse)

STATIONS = [
    Station("billing", ORDERS, "billing", expected=all_lines, keys=keys),
    Station("warehouse", ORDERS, "warehouse", expected=all_lines, keys=keys),
]

if __name__ == "__main__":
    title = f"{len(lines())} lines of {FILE.name} are published to the topic {ORDERS.name!r}, which two groups read."
    sys.exit(perform(Demo(title, service, shop, STATIONS, lines(), also=[INVOICES])))
