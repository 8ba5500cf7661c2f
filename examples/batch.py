"""Several messages for one call of a handler: as many as there are, waiting a little for more.

Prints:

    10 rows
    10 rows
    5 rows
"""

import asyncio
from collections.abc import Sequence

from brokerkit import Batch, Message, Queue, Service, connect

ROWS = Queue("rows", int)
service = Service("loader")
total = 25
done = asyncio.Event()
stored: list[int] = []


@service.subscribe(ROWS, batch=Batch(max=10, wait=0.2))
async def load(messages: Sequence[Message[int]]) -> None:
    stored.extend(message.value for message in messages)
    print(len(messages), "rows")
    if len(stored) == total:
        done.set()


async def main() -> None:
    async with connect("memory://") as broker:
        await broker.publish_many(ROWS, range(total))
        async with service.running(broker):
            await done.wait()


asyncio.run(main())
