"""Publishes work for `queue_worker.py`, and waits until it is done.

    python examples/queue_producer.py [URL]

Without a worker it waits.  Prints:

    40 pictures to resize
    all done
"""

import asyncio
import os
import sys

from queue_worker import PICTURES, Picture

from brokerkit import BrokerError, connect


async def main(url: str) -> None:
    async with connect(url) as broker:
        pictures = [Picture(f"{number:02}.jpg", width) for number in range(20) for width in (320, 1280)]
        for receipt in await broker.publish_many(PICTURES, pictures):
            if isinstance(receipt, BrokerError):  # each has a receipt or an error of its own
                raise receipt
        print(len(pictures), "pictures to resize", flush=True)
        while (left := await broker.backlog(PICTURES)).waiting or left.in_flight:
            await asyncio.sleep(0.1)
        print("all done")


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("BROKERKIT_URL", "redis://localhost:6379/0")
    asyncio.run(main(url))
