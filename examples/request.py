"""A request and its reply, both typed; a failure of the replier comes back as an error.

Prints:

    o1 costs 12.00
    o2: Queue('quotes') failed: Reject: we sell nothing for nothing
"""

import asyncio
import logging
from dataclasses import dataclass

from brokerkit import Message, Queue, Reject, RemoteError, Service, connect

logging.getLogger("brokerkit").setLevel(logging.CRITICAL)  # brokerkit logs final failures; here we print them


@dataclass
class Order:
    id: str
    net: float


QUOTES = Queue("quotes", Order, reply=float)
service = Service("prices")


@service.subscribe(QUOTES)
async def quote(message: Message[Order]) -> float:
    if message.value.net <= 0:
        raise Reject("we sell nothing for nothing")
    return message.value.net * 1.2


async def main() -> None:
    async with connect("memory://") as broker, service.running(broker):
        for order in (Order("o1", 10.0), Order("o2", 0.0)):
            try:
                price = await broker.request(QUOTES, order, timeout=5)
            except RemoteError as error:
                print(f"{order.id}: {error}")
            else:
                print(f"{order.id} costs {price:.2f}")


asyncio.run(main())
