"""Workers in several processes share one queue: start this twice, then run `queue_producer.py`.

    python examples/queue_worker.py [URL]

Each picture goes to one worker, which takes some ahead: 16, unless prefetch= says otherwise (1 for few and slow ones).
A worker that is killed loses nothing: after the queue's lease the others get what it held.  Ctrl-C or SIGTERM lets it finish what it has begun.
"""

import asyncio
import logging
import os
import sys
from dataclasses import dataclass

import brokerkit
from brokerkit import Message, Queue, Service


@dataclass
class Picture:
    file: str
    width: int


PICTURES = Queue("pictures", Picture, lease=30)  # the producer imports it from here
service = Service("resizer")


@service.subscribe(PICTURES, concurrency=2)
async def resize(message: Message[Picture]) -> None:
    picture = message.value
    await asyncio.sleep(0.02)  # the work
    print(f"worker {os.getpid()}: {picture.file} is {picture.width} wide", flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)  # tells of start and stop
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("BROKERKIT_URL", "redis://localhost:6379/0")
    brokerkit.run(service, url)
