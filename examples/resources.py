"""A service with resources: opened when it starts, handed to its handlers, closed when it stops.

Prints:

    database open
    ann owes 10.00
    ann owes 13.50
    database closed
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from brokerkit import Message, Service, Topic, connect


@dataclass
class Order:
    customer: str
    total: float


class Database:
    def __init__(self) -> None:
        self.debts: dict[str, float] = {}


@asynccontextmanager
async def database() -> AsyncIterator[Database]:
    print("database open")
    yield Database()
    print("database closed")


ORDERS = Topic("orders", Order)
service = Service("billing", lifespan=database)
done = asyncio.Event()


@service.subscribe(ORDERS)
async def bill(message: Message[Order], db: Database) -> None:
    order = message.value
    db.debts[order.customer] = db.debts.get(order.customer, 0) + order.total
    print(f"{order.customer} owes {db.debts[order.customer]:.2f}")
    if order.total == 3.5:
        done.set()


async def main() -> None:
    async with connect("memory://") as broker, service.running(broker):
        await broker.publish(ORDERS, Order("ann", 10.0), key="ann")
        await broker.publish(ORDERS, Order("ann", 3.5), key="ann")
        await done.wait()


asyncio.run(main())
