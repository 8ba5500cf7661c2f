"""Processes that consume a queue whose messages are delayed, and whose clocks are wrong, for the tests of delays."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from brokerkit.address import AnyQueue, Queue
from brokerkit.driver import Delivery, Record, Settlement, Source
from brokerkit.drivers.kafka._consumer import TopicConsumer
from brokerkit.drivers.kafka._create import create
from brokerkit.drivers.kafka._tiers import waiting_for
from brokerkit.drivers.kafka._upkeep import Upkeep
from brokerkit.drivers.kafka._view import TopicInfo
from tests.servers.kafka import PREFIX

from .consuming import SOON, Process, process

LATE = 2.0
"""Seconds that a message may be late on a machine that is busy; what is promised is that none is early."""


class WrongClock:
    """A wall clock that is off."""

    def __init__(self, off: float) -> None:
        self.off = off

    def time(self) -> float:
        return time.time() + self.off

    def monotonic(self) -> float:
        return time.monotonic()


def be_wrong(off: float) -> None:
    """Have all that is opened from now on be *off* seconds ahead of the broker."""
    asyncio.get_running_loop().clock = WrongClock(off)  # type: ignore[attr-defined]


def queue(what: str = "mails") -> AnyQueue:
    """Return a queue of this test alone."""
    return Queue(f"{PREFIX}{uuid.uuid4().hex[:12]}.{what}", bytes)


class Worker(Process):
    """A process that publishes to a queue, and consumes it."""

    queue: AnyQueue
    published: dict[str, tuple[float, float]]
    """When each message was sent and confirmed, by the clock of this machine, which is the broker's."""
    upkeep: Upkeep
    _calls: int

    def begin(self, queue: AnyQueue) -> None:
        self.queue, self.published = queue, {}
        self.upkeep = Upkeep(self.context)

    async def make(self) -> tuple[TopicInfo, TopicInfo]:
        """Create the topics of the queue."""
        cluster = self.context.cluster
        info = await create(cluster, self.queue, timeout=SOON)
        return info, await create(cluster, waiting_for(self.queue), timeout=SOON)

    def count_calls(self) -> int:
        """Return how many requests were made that are answered once; counts from the first call on."""
        cluster = self.context.cluster
        if not hasattr(self, "_calls"):
            self._calls = 0
            call = cluster.call

            async def counted(node: int | None, request: Any, *, timeout: float, line: object = None) -> Any:
                self._calls += 1
                return await call(node, request, timeout=timeout, line=line)

            cluster.call = counted  # type: ignore[method-assign]
        return self._calls

    async def publish(self, ids: Sequence[str], *, delay: float = 0.0, ttl: float | None = None) -> None:
        before = time.time()
        await self.put(self.queue, ids, delay=delay, ttl=ttl)
        after = time.time()
        self.published.update(dict.fromkeys(ids, (before, after)))

    @asynccontextmanager
    async def consuming(self, prefetch: int = 1000) -> AsyncIterator[TopicConsumer]:
        """Consume the queue as a member of a classic group."""
        source = Source(self.queue)
        async with (
            self.upkeep.of(self.queue),
            TopicConsumer(self.context, self.queue, source, prefetch, self.told) as consumer,
        ):
            yield consumer


@asynccontextmanager
async def worker(url: str, of: AnyQueue, **options: object) -> AsyncIterator[Worker]:
    """Connect; the queue is deleted by `finished`.

    Its session is long: a member that a busy machine keeps from its signs of life is one that has died, and things repeat.
    """
    made = Worker(url, **{"session": 10.0, **options})
    async with made.driver:
        made.begin(of)
        yield made


class Seen:
    """What was delivered, and when."""

    def __init__(self) -> None:
        self.at: dict[str, list[float]] = {}
        self.records: dict[str, Record] = {}

    def take(self, deliveries: Sequence[Delivery]) -> None:
        now = time.time()
        for delivery in deliveries:
            self.at.setdefault(delivery.record.id, []).append(now)
            self.records[delivery.record.id] = delivery.record

    @property
    def count(self) -> int:
        return sum(map(len, self.at.values()))


async def drain(consumer: TopicConsumer, seen: Seen, count: int, *, limit: float = SOON) -> None:
    """Receive and settle until so many different messages were seen."""
    async with asyncio.timeout(limit):
        while len(seen.at) < count:
            got = await consumer.receive(1000, 1.0)
            seen.take(got)
            results = await consumer.settle([Settlement(delivery) for delivery in got])
            assert list(results) == [None] * len(got)


async def quiet(consumer: TopicConsumer, seen: Seen, seconds: float) -> None:
    """Go on receiving until nothing has come for a while."""
    while got := await consumer.receive(1000, seconds):
        seen.take(got)
        await consumer.settle([Settlement(delivery) for delivery in got])


async def finished(url: str, queue: AnyQueue) -> None:
    """Leave nothing behind."""
    async with process(url) as p:
        await p.driver.delete(queue)
