"""Programs that use Celery: what differs between them is the URL of the broker."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, ClassVar, Final

import brokerkit

from ..feeding import spread
from ..frame import Part, Row, Work
from ..job import RATE
from ..on_kafka.server import bootstrap
from . import server, stored
from .app import Settings, build
from .worker import working

POOLS: Final = {
    "prefork-1": ("-P", "prefork", "-c", "1"),
    "prefork-2": ("-P", "prefork", "-c", "2"),
    "solo": ("-P", "solo"),
    "threads-8": ("-P", "threads", "-c", "8"),
    "latency": ("-P", "prefork", "-c", "2"),
}
"""How the workers of a work are started; all else is as Celery has it by default."""
FEED_AFTER: Final = 200_000_000
"""Nanoseconds after the first task of a latency, with which its publisher connects, until the second one is published."""
LATE: Final = 0.25
"""Seconds that second executions are given."""


class Program(Row):
    """Publishes tasks with `delay`, or has a worker execute those that were published."""

    least = 200
    stops: ClassVar[bool] = True
    """Whether a worker is stopped as an operator does it, so that what it leaves behind can be looked at."""

    @classmethod
    def parts(cls, work: Work) -> frozenset[Part]:
        """What is published is counted in the server; what is executed is stored before, or, for a latency, fed beside."""
        if work.stores:
            return frozenset({"run", "audit"})
        parts: set[Part] = {"feed" if work.metric == "latency" else "fill", "run"}
        return frozenset(parts | {"audit"} if cls.stops else parts)

    def broker(self) -> str:
        """Return the URL of the broker, as Celery is given it."""
        raise NotImplementedError

    def stored(self) -> AsyncIterator[str]:
        """Yield the arguments of each task that the server has, in JSON."""
        raise NotImplementedError

    async def waiting(self) -> int:
        """Return how many tasks the server has, those that a worker has in hand too."""
        raise NotImplementedError

    # ------------------------------------------------------------------ publishing

    def numbers(self) -> Iterator[int]:
        """Yield the number of each task that is published."""
        return iter(range(self.job.n))

    def task(self) -> Any:
        """Return the task, which can be published."""
        return build(Settings(self.broker(), self.job.entity)).tick

    async def publish(self, begin: Callable[[], None] = lambda: None) -> None:
        """Publish all tasks, by one thread; *begin* is called when the first one, which connects, is stored."""

        def publish() -> None:
            delay, numbers = self.task().delay, self.numbers()
            delay(next(numbers))
            begin()
            for number in numbers:
                delay(number)

        await asyncio.to_thread(publish)  # as in a program without a loop

    async def fill(self) -> None:
        await self.publish()

    async def feed(self) -> None:
        def publish() -> None:
            delay, numbers = self.task().delay, self.numbers()
            delay(next(numbers), time.monotonic_ns())  # connects: what is late for that would be a burst
            begun = time.monotonic_ns() + FEED_AFTER
            for number in numbers:
                due = begun + number * 1_000_000_000 // RATE
                time.sleep(max(0, due - time.monotonic_ns()) / 1e9)
                delay(number, time.monotonic_ns())

        await asyncio.to_thread(publish)

    async def run(self) -> None:
        if self.work.stores:
            await self.publish(self.job.begin)
            self.job.stop()
        else:
            await self.execute()

    # ------------------------------------------------------------------ executing

    async def execute(self) -> None:
        """Have a worker execute what is stored, and take the time from the first execution to the last."""
        job = self.job
        async with working(self.broker(), job.entity, POOLS[self.work.name]) as worker:
            try:
                await worker.ready()
                job.ready()
                await worker.executed(1)
                before = worker.cpu()
                await worker.executed(job.n)
                cpu = worker.cpu() - before
                await asyncio.sleep(LATE)
                if self.stops:
                    await worker.stop()
            finally:
                done = worker.executions()
                job.seen += [one.number for one in done]
            job.took((done[job.n - 1].at - done[0].at) / 1e9, cpu)
            if self.work.metric == "latency":
                job.delays([one.at - one.sent for one in done])

    async def audit(self) -> None:
        if self.work.stores:
            async for arguments in self.stored():
                (number, *_) = json.loads(arguments)[0] or [-1]
                self.job.seen.append(number)
        else:
            self.job.unsettled = await self.waiting()


class StockRedis(Program):
    """Kombu's own transport for Redis."""

    name = "stock-redis"
    note = "kombu's transport for Redis; the yardstick"
    peer = True

    def broker(self) -> str:
        return server.redis(self.job.url)

    async def stored(self) -> AsyncIterator[str]:
        for message in stored.of_list(self.broker(), self.job.entity):
            yield _body(message)

    async def waiting(self) -> int:
        return stored.in_list(self.broker(), self.job.entity)


class StockKafka(Program):
    """Kombu's own transport for Kafka."""

    name = "stock-kafka"
    note = (
        "kombu's transport for Kafka (confluentkafka://): one partition, acknowledges whatever it has read, so that a worker "
        "that is killed loses tasks; its workers are killed at the end, as stopping one takes 12 s"
    )
    peer = True
    stops = False

    def broker(self) -> str:
        return f"confluentkafka://{bootstrap(server.kafka(self.job.url))}"

    async def stored(self) -> AsyncIterator[str]:
        for message in stored.of_log(server.kafka(self.job.url), self.job.entity):
            yield _body(message)


class Ours(Program):
    """brokerkit's transport."""

    priorities: ClassVar[int] = 10

    def plain(self) -> str:
        """Return the server's URL."""
        raise NotImplementedError

    def broker(self) -> str:
        return f"brokerkit+{self.plain()}"

    def queue(self) -> Any:
        """Return what the queue is called in brokerkit."""
        from brokerkit.celery import queue

        return queue(self.job.entity, priorities=self.priorities)

    async def stored(self) -> AsyncIterator[str]:
        async with (
            brokerkit.connect(self.plain()) as broker,
            broker.subscribe(self.queue(), prefetch=1000) as messages,
        ):
            # Twice nothing, if some are missing: a busy machine is no loss.
            tries, found = 2, 0
            while tries and (tries == 2 or found < self.job.n):
                some = await messages.receive(limit=1000, timeout=0.5)
                tries -= not some
                for message in some:
                    found += 1
                    yield message.value.body
                    await message.ack()

    async def waiting(self) -> int:
        async with brokerkit.connect(self.plain()) as broker:
            left = await broker.backlog(self.queue())
        return sum(count or 0 for count in (left.waiting, left.in_flight, left.delayed, left.dead))


class OurRedis(Ours):
    """On Redis."""

    name = "brokerkit-redis"
    note = "brokerkit+redis://"

    def plain(self) -> str:
        return server.redis(self.job.url)


class OurKafka(Ours):
    """On Kafka."""

    name = "brokerkit-kafka"
    note = "brokerkit+kafka://; acks=all, each task is acknowledged by itself"
    priorities = 1

    def plain(self) -> str:
        return server.kafka(self.job.url)


class Async(Ours):
    """Awaits `adelay`, from as many tasks as the work says."""

    async def publish(self, begin: Callable[[], None] = lambda: None) -> None:
        from brokerkit.celery import adelay

        task, numbers = self.task(), self.numbers()
        await adelay(task, next(numbers))
        begin()
        await spread(list(numbers), self.work.handlers, lambda number: adelay(task, number))


class AsyncRedis(Async, OurRedis):
    """On Redis."""

    name = "adelay-redis"
    note = "await adelay(...) on brokerkit+redis://"


class AsyncKafka(Async, OurKafka):
    """On Kafka."""

    name = "adelay-kafka"
    note = "await adelay(...) on brokerkit+kafka://"


def _body(message: bytes) -> str:
    """Return the arguments in a message as kombu stores it."""
    told: dict[str, Any] = json.loads(message)
    body = told["body"]
    return base64.b64decode(body).decode() if told["properties"].get("body_encoding") == "base64" else body
