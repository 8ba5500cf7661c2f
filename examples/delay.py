"""A message for later: delivered after its delay, never before.

Prints:

    now: tea
    later: biscuits, after at least 0.2 s
"""

import asyncio
import time

from brokerkit import Queue, connect

ERRANDS = Queue("errands", str)


async def main() -> None:
    async with connect("memory://") as broker, broker.subscribe(ERRANDS) as messages:
        began = time.monotonic()
        await broker.publish(ERRANDS, "biscuits", delay=0.2)
        await broker.publish(ERRANDS, "tea")
        for when in ("now", "later"):
            [message] = await messages.receive(timeout=5)
            async with message.process():
                late = time.monotonic() - began >= 0.2
                print(f"{when}: {message.value}{', after at least 0.2 s' if late else ''}")


asyncio.run(main())
