"""What tests of publishing share: a driver, records, and what another client reads of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import confluent_kafka

from brokerkit.address import Address, AnyTopic, Topic
from brokerkit.driver import Receipt, Record
from brokerkit.drivers._url import Options, parse
from brokerkit.drivers.kafka import KafkaDriver
from brokerkit.drivers.kafka._cluster import Cluster
from brokerkit.drivers.kafka._publish import Outboxes
from brokerkit.errors import BrokerError
from tests.servers.kafka import Endpoints


@contextlib.asynccontextmanager
async def driver(url: str, **options: Any) -> AsyncIterator[KafkaDriver]:
    """Yield an open driver; what it leaves behind is looked at."""
    made = KafkaDriver(parse(url), Options(options, "kafka"), lambda event: None)
    async with made:
        yield made
    assert empty(made), "something still waits"


def cluster_of(made: KafkaDriver) -> Cluster:
    """Return its view of the cluster."""
    assert made._context is not None
    return made._context.cluster


def outboxes_of(made: KafkaDriver) -> Outboxes:
    """Return its outboxes."""
    assert made._context is not None
    return made._context.outboxes


def empty(made: KafkaDriver) -> bool:
    """Return whether nothing is kept of anything that was published."""
    boxes = outboxes_of(made)
    lanes = [lane for box in boxes._boxes.values() for lane in box.lanes]
    return not (boxes._calls.waiting or boxes._calls._bytes or any(lane.pending or lane.batches for lane in lanes))


def topic(name: str = "", partitions: int = 1) -> AnyTopic:
    """Return a topic that no other test has."""
    made: AnyTopic = Topic(name or f"p-{uuid.uuid4().hex[:12]}", bytes, partitions=partitions)
    return made


def record(address: Address, body: bytes | str | None, key: bytes | None = None, **more: Any) -> Record:
    """Return a record whose id is its body."""
    raw = body.encode() if isinstance(body, str) else body
    id = more.pop("id", (raw or b"none")[:20].decode("latin-1"))
    return Record(address, id, raw, key, timestamp=more.pop("timestamp", time.time()), **more)


def kinds(results: Sequence[Receipt | BrokerError]) -> list[type[Any]]:
    """Return what kind each result is."""
    return [type(result) for result in results]


async def until(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    """Wait for what no event tells."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def read(endpoints: Endpoints, name: str) -> list[Any]:
    """Return all that another client finds in a topic, partition by partition."""
    return list(_messages(endpoints, name))


def _messages(endpoints: Endpoints, name: str) -> Iterator[Any]:
    consumer = confluent_kafka.Consumer(
        {"bootstrap.servers": endpoints.bootstrap(), "group.id": "nobody", "enable.auto.commit": False}
    )
    try:
        count = len(consumer.list_topics(name, timeout=20).topics[name].partitions)
        for partition in range(count):
            place = confluent_kafka.TopicPartition(name, partition, 0)
            _, end = consumer.get_watermark_offsets(place, timeout=20)
            consumer.assign([place])
            at = 0
            while at < end:
                message = consumer.poll(20)
                assert message is not None, f"nothing comes of {name}[{partition}] at {at} of {end}"
                assert message.error() is None
                at = (message.offset() or 0) + 1
                yield message
    finally:
        consumer.close()
