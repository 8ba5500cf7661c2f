"""A topic keeps its messages: read them again, from the beginning, from a moment or from a position, up to the end.

Prints:

    from the beginning: a b c d
    from c on: c d
    from the moment of c on: c d
"""

import asyncio
from datetime import UTC, datetime

from brokerkit import Broker, Start, Topic, connect

LETTERS = Topic("letters", str, partitions=1)


async def read(broker: Broker, start: Start) -> str:
    async with broker.subscribe(LETTERS, start=start, until_end=True) as messages:
        return " ".join([message.value async for message in messages])


async def main() -> None:
    async with connect("memory://") as broker:
        await broker.publish_many(LETTERS, "ab")
        await asyncio.sleep(0.01)
        moment = datetime.now(UTC)
        receipt = await broker.publish(LETTERS, "c")
        await broker.publish(LETTERS, "d")
        print("from the beginning:", await read(broker, Start.EARLIEST))
        if receipt.position is not None:
            print("from c on:", await read(broker, Start.position(receipt.position)))
        print("from the moment of c on:", await read(broker, Start.at(moment)))


asyncio.run(main())
