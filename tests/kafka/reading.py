"""A reader of partitions, and others who write to them, for the tests of fetching."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import confluent_kafka
from confluent_kafka.admin import AdminClient

from brokerkit._tasks import Hosted
from brokerkit.drivers._url import Options, parse
from brokerkit.drivers.kafka._cluster import Cluster
from brokerkit.drivers.kafka._fetch import Fetcher
from brokerkit.drivers.kafka._options import settings
from brokerkit.errors import BrokerError
from tests.servers.kafka import PREFIX, Endpoints

SOON = 20.0


def name(what: str = "log") -> str:
    """Return the name of a topic of this test alone."""
    return f"{PREFIX}{uuid.uuid4().hex[:12]}.{what}"


def made(endpoints: Endpoints, partitions: int = 1, **options: str) -> str:
    """Create a topic and return its name; settings have underscores for dots."""
    topic = name()
    with endpoints.wire() as admin:
        admin.create(topic, partitions, {key.replace("_", "."): value for key, value in options.items()})
    return topic


def writer(endpoints: Endpoints, **options: Any) -> confluent_kafka.Producer:
    """Return another client, that writes in order."""
    settings = {"bootstrap.servers": endpoints.bootstrap(), "linger.ms": 5, "enable.idempotence": True}
    return confluent_kafka.Producer(settings | {key.replace("_", "."): value for key, value in options.items()})


def write(
    producer: confluent_kafka.Producer, topic: str, values: Sequence[bytes | None], partition: int = 0, **options: Any
) -> None:
    """Write records, and return when they are stored."""
    failed: list[object] = []

    def stored(error: object, _: object) -> None:
        if error is not None:
            failed.append(error)

    for value in values:
        producer.produce(topic, value, partition=partition, on_delivery=stored, **options)
    assert producer.flush(SOON) == 0
    assert not failed, failed


async def delete_before(endpoints: Endpoints, topic: str, offset: int, partition: int = 0) -> None:
    """Have the broker delete what lies before *offset*."""
    admin: Any = AdminClient({"bootstrap.servers": endpoints.bootstrap()})
    futures = admin.delete_records([confluent_kafka.TopicPartition(topic, partition, offset)])
    await asyncio.to_thread(lambda: [future.result() for future in futures.values()])


def numbered(count: int, first: int = 0) -> list[bytes]:
    """Return the values of *count* records."""
    return [b"%d" % number for number in range(first, first + count)]


@asynccontextmanager
async def cluster(url: str, **options: object) -> AsyncIterator[Cluster]:
    """Connect to a cluster."""
    parsed = parse(url)
    opened = Cluster(settings(parsed, Options(options, "kafka://")))
    hosted = Hosted("cluster", lambda started: opened.run(started, hosted.stopping))
    async with hosted:
        yield opened


class Reader:
    """Takes what comes, and remembers what it was told."""

    def __init__(self, cluster: Cluster, topic: str, **options: Any) -> None:
        self.fetcher = Fetcher(cluster, topic, self, **options)
        self.overtaken_by: list[tuple[int, int, int]] = []
        self.cut: list[tuple[int, int, int]] = []
        self.errors: list[BrokerError] = []
        self.seen: dict[int, list[Any]] = {}
        self.task: asyncio.Task[None] | None = None
        self.told = asyncio.Event()
        self.eager = False
        """Whether all is taken as it comes."""
        self.slowest = 0.0
        """The longest time between a record's own and its arrival."""

    def arrived(self) -> None:
        if self.eager:
            self.take_all()
        self.told.set()

    def overtaken(self, partition: int, at: int, start: int) -> None:
        self.overtaken_by.append((partition, at, start))
        self.told.set()

    def truncated(self, partition: int, at: int, to: int) -> None:
        self.cut.append((partition, at, to))
        self.told.set()

    def fail(self, error: BrokerError) -> None:
        self.errors.append(error)
        self.told.set()

    async def until(self, condition: Callable[[], object], *, within: float = SOON) -> None:
        """Return when *condition* holds, which is looked at whenever something is told."""
        async with asyncio.timeout(within):
            while not condition():
                self.told.clear()
                await self.told.wait()

    def take_all(self, most: int = 500) -> None:
        """Take what is there."""
        while ready := self.fetcher.ready():
            for partition in ready:
                taken = self.fetcher.take(partition, most)
                self.seen.setdefault(partition, []).extend(taken)
                if taken:
                    self.slowest = max(self.slowest, time.time() - taken[0].timestamp / 1000)

    async def read(self, ends: Mapping[int, int], most: int = 500, *, within: float = SOON) -> dict[int, list[bytes]]:
        """Take all up to *ends*, by partition, and return the values of what was ever taken."""

        def through() -> bool:
            self.take_all(most)
            return all(self.fetcher.next_offset(partition) >= end for partition, end in ends.items())

        await self.until(through, within=within)
        return {partition: self.values(partition) for partition in ends}

    def values(self, partition: int = 0) -> list[bytes]:
        """Return the values of what was taken, whose offsets have to grow."""
        records = self.seen.get(partition, [])
        offsets = [record.offset for record in records]
        assert offsets == sorted(set(offsets)), offsets
        return [record.value for record in records]


@asynccontextmanager
async def reading(cluster: Cluster, topic: str, begin: Mapping[int, int], **options: Any) -> AsyncIterator[Reader]:
    """Read a topic from offsets on."""
    reader = Reader(cluster, topic, **options)
    for partition, offset in begin.items():
        reader.fetcher.begin(partition, offset)
    reader.task = asyncio.create_task(reader.fetcher.run())
    try:
        yield reader
    finally:
        reader.task.cancel()
        await asyncio.wait([reader.task])
        assert reader.task.cancelled(), reader.task.exception()
