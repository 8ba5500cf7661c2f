"""The first program: a typed topic, a service that reads it, and a message.

Prints:

    o1: 10.00
"""

import asyncio
from dataclasses import dataclass

from brokerkit import Message, Service, Topic, connect


@dataclass
class Order:
    id: str
    total: float


ORDERS = Topic("orders", Order)
service, done = Service("billing"), asyncio.Event()


@service.subscribe(ORDERS)
async def bill(message: Message[Order]) -> None:
    print(f"{message.value.id}: {message.value.total:.2f}")
    done.set()


async def main() -> None:
    async with connect("memory://") as broker, service.running(broker):
        await broker.publish(ORDERS, Order("o1", 10.0), key="ann")
        await done.wait()


asyncio.run(main())
