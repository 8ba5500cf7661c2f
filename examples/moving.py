"""A service moves from Redis to Kafka: the same code with another URL, and nothing is lost on the way.

    python examples/moving.py [OLD] [NEW]

The service runs at both places for a while.  First it starts at the new one, then the producers get the new URL, and when
nothing is left at the old one, what is delayed or tried again included, it stops there.  Prints:

    redis: 20 reminders published
    kafka: the service runs here, too
    kafka: 20 reminders published
    redis: 19 sent, 1 dead letter, nothing left
    kafka: 19 sent, 1 dead letter, nothing left
"""

import asyncio
import logging
import os
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass

from brokerkit import Message, Queue, Reject, RetryPolicy, Service, connect


@dataclass
class Reminder:
    to: str
    text: str


REMINDERS = Queue("example-reminders", Reminder, lease=30)


class Place:
    """One of the two: its broker, and what is sent from there."""

    def __init__(self, url: str) -> None:
        self.name = url.partition(":")[0]
        self.broker = connect(url)  # all that differs
        self.sent: set[str] = set()

    def service(self) -> Service:
        """Return the service, which does not know where it runs."""
        service = Service("mailer")

        @service.subscribe(REMINDERS, concurrency=4, retry=RetryPolicy(attempts=3, wait_initial=0.2))
        async def send(message: Message[Reminder]) -> None:
            if "@" not in message.value.to:
                raise Reject("not an address")
            if message.value.to.startswith("busy") and message.attempt == 1:
                raise TimeoutError("the mail server is busy")
            self.sent.add(message.id)  # what comes again has the same id

        return service

    async def produce(self) -> None:
        """Publish 20 reminders: some for later, two to hosts that are busy at first, one to nobody."""
        hosts = {3: "busy@post.example", 7: "busy@mail.example", 11: "nobody"}
        for number in range(20):
            reminder = Reminder(hosts.get(number, f"c{number}@post.example"), "your order is ready")
            await self.broker.publish(REMINDERS, reminder, delay=1.5 if number % 5 == 0 else 0)
        print(f"{self.name}: 20 reminders published")

    async def finish(self) -> None:
        """Wait until nothing is left."""
        while (left := await self.broker.backlog(REMINDERS)).waiting or left.in_flight or left.delayed:
            await asyncio.sleep(0.1)
        print(f"{self.name}: {len(self.sent)} sent, {left.dead} dead letter, nothing left")


async def main(old: Place, new: Place) -> None:
    async with old.broker, new.broker, AsyncExitStack() as later:
        for place in (old, new):
            later.push_async_callback(place.broker.delete, REMINDERS)  # only so that this example can run again
        async with old.service().running(old.broker):
            await old.produce()
            await later.enter_async_context(new.service().running(new.broker))
            print(f"{new.name}: the service runs here, too")
            await new.produce()  # the producers were told the new URL
            await old.finish()
        await new.finish()


if __name__ == "__main__":
    logging.getLogger("brokerkit").setLevel(logging.CRITICAL)  # it logs each retry and each dead letter
    old = sys.argv[1] if len(sys.argv) > 1 else "redis://localhost:6379/0"
    new = sys.argv[2] if len(sys.argv) > 2 else os.environ.get("BROKERKIT_URL", "kafka://localhost:9092")
    asyncio.run(main(Place(old), Place(new)))
