"""Replay from a point in time: a service did something wrong since noon; it is mended, and does all that came since then again.

    python examples/replay_since.py [URL]

Prints:

    booked: 12.00
    since noon came: 3 coffee, 1 tea
    booked again: 27.00
"""

import asyncio
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime

from brokerkit import Message, Service, Start, Topic, connect


@dataclass
class Sale:
    id: str
    item: str
    pieces: int


SALES = Topic("example-sales", Sale)
service = Service("booking")
prices = {"tea": 4.0}
booked: dict[str, float] = {}  # by the id of the sale: what is done twice counts once
handled = asyncio.Semaphore(0)


@service.subscribe(SALES)
async def book(message: Message[Sale]) -> None:
    sale = message.value
    booked[sale.id] = sale.pieces * prices.get(sale.item, 0.0)  # the mistake: coffee costs nothing
    handled.release()


async def main(url: str) -> None:
    async with connect(url) as broker:
        async with service.running(broker):
            await broker.publish_many(SALES, [Sale("s1", "tea", 1), Sale("s2", "tea", 1)])
            await asyncio.sleep(0.1)
            noon = datetime.now(UTC)
            await broker.publish_many(SALES, [Sale("s3", "coffee", 3), Sale("s4", "tea", 1)])
            for _ in range(4):
                await handled.acquire()
        print(f"booked: {sum(booked.values()):.2f}")

        prices["coffee"] = 5.0
        # A reader without a group looks, and changes nothing.
        async with broker.subscribe(SALES, start=Start.at(noon), until_end=True) as messages:
            sales = sorted([f"{message.value.pieces} {message.value.item}" async for message in messages], reverse=True)
        print("since noon came:", ", ".join(sales))

        await broker.seek(SALES, "booking", Start.at(noon))  # refused while a member of the group runs
        async with service.running(broker):
            for _ in range(2):
                await handled.acquire()
        print(f"booked again: {sum(booked.values()):.2f}")
        await broker.delete(SALES)  # only so that this example can run again


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("BROKERKIT_URL", "memory://")
    asyncio.run(main(url))
