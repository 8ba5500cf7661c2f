"""Processes that read topics of a real cluster, for the tests of consumers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions

from brokerkit import clock
from brokerkit.address import Address, AnyQueue, AnyTopic, Queue, Topic
from brokerkit.driver import Delivery, Receipt, Record, Settlement, Source
from brokerkit.drivers._url import Options, parse
from brokerkit.drivers.kafka._consumer import TopicConsumer
from brokerkit.drivers.kafka._context import Context
from brokerkit.drivers.kafka._driver import KafkaDriver
from brokerkit.errors import BrokerError
from brokerkit.events import Event
from brokerkit.policy import Start
from tests.servers.kafka import PREFIX, Endpoints

GROUP = "billing"
SOON = 20.0


def named(partitions: int = 4, **options: Any) -> AnyTopic:
    """Return a topic of this test alone."""
    return Topic(f"{PREFIX}{uuid.uuid4().hex[:12]}.orders", bytes, partitions=partitions, **options)


def names(count: int, prefix: str = "m") -> list[str]:
    return [f"{prefix}{number:05}" for number in range(count)]


def ids(deliveries: Iterable[Delivery]) -> list[str]:
    return [delivery.record.id for delivery in deliveries]


class Process:
    """A process of its own: its driver, what happened in it and what it was told to let go of."""

    def __init__(self, url: str, **options: object) -> None:
        self.events: list[Event] = []
        self.revoked: list[str] = []
        self.driver = KafkaDriver(parse(url), Options({"session": 1.0, **options}, "kafka://"), self.events.append)

    @property
    def context(self) -> Context:
        assert self.driver._context is not None
        return self.driver._context

    async def die(self) -> None:
        """Break all connections; nothing is said any more."""
        hosted = self.driver._hosted
        assert hosted is not None
        assert hosted.task is not None
        hosted.task.cancel()
        await asyncio.wait([hosted.task])

    async def put(
        self, address: Address, wanted: Iterable[str], *, keyed: bool = False, **options: Any
    ) -> list[Receipt]:
        """Store a record for each id, with *keyed* under itself as key."""
        now = clock.current().time()
        records = [
            Record(address, id, b"body", id.encode() if keyed else options.get("key"), timestamp=now, **_rest(options))
            for id in wanted
        ]
        results = await self.driver.publish(records, timeout=SOON)
        receipts = [result for result in results if isinstance(result, Receipt)]
        assert len(receipts) == len(records), results
        return receipts

    def consume(
        self,
        address: AnyTopic | AnyQueue,
        *,
        group: str | None = GROUP,
        start: Start = Start.EARLIEST,
        prefetch: int = 100,
        until_end: bool = False,
        revoked: Any = None,
    ) -> TopicConsumer:
        source = Source(address, group if isinstance(address, Topic) else None, start, until_end)
        if isinstance(address, Queue):  # without what the driver has beside it
            return TopicConsumer(self.context, address, source, prefetch, revoked or self.told)
        consumer = self.driver.consume(source, prefetch=prefetch, revoked=revoked or self.told)
        assert isinstance(consumer, TopicConsumer)
        return consumer

    async def told(self, deliveries: Sequence[Delivery]) -> None:
        """Let go at once."""
        self.revoked += ids(deliveries)


def _rest(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "key"}


@asynccontextmanager
async def process(url: str, *addresses: AnyTopic, **options: object) -> AsyncIterator[Process]:
    """Connect, and declare *addresses*."""
    made = Process(url, **options)
    async with made.driver:
        for address in addresses:
            await made.driver.declare(address)
        yield made


async def take(consumer: TopicConsumer, count: int, limit: int = 1000) -> list[Delivery]:
    """Receive exactly *count*."""
    taken: list[Delivery] = []
    async with asyncio.timeout(SOON):
        while len(taken) < count:
            taken += await consumer.receive(min(limit, count - len(taken)), SOON)
    return taken


async def done(consumer: TopicConsumer, deliveries: Sequence[Delivery], *, confirm: bool = False) -> None:
    results = await consumer.settle([Settlement(delivery) for delivery in deliveries], confirm=confirm)
    assert list(results) == [None] * len(deliveries), results


async def settle(
    consumer: TopicConsumer, deliveries: Sequence[Delivery], *copies: Record, confirm: bool = False
) -> list[BrokerError | None]:
    return list(await consumer.settle([Settlement(delivery, copies) for delivery in deliveries], confirm=confirm))


async def rest(consumer: TopicConsumer, quiet: float = 0.3) -> list[Delivery]:
    """Receive and settle until nothing comes any more."""
    taken: list[Delivery] = []
    while got := await consumer.receive(1000, quiet):
        taken += got
        await done(consumer, got)
    return taken


async def left(p: Process, address: AnyTopic, **options: Any) -> list[Delivery]:
    """Return and settle what a new member of the group is given."""
    async with p.consume(address, **options) as consumer:
        return await rest(consumer)


async def widen(endpoints: Endpoints, topic: str, partitions: int) -> None:
    """Add partitions."""
    admin: Any = AdminClient({"bootstrap.servers": endpoints.bootstrap()})
    futures = admin.create_partitions([NewPartitions(topic, partitions)])
    await asyncio.to_thread(lambda: [future.result() for future in futures.values()])


async def eventually(predicate: Any, what: str = "") -> None:
    """Wait until *predicate* holds."""
    async with asyncio.timeout(SOON):
        while not predicate():
            await asyncio.sleep(0.01)
