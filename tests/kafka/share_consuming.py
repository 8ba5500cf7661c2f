"""Consumers of queues that share groups serve, for the tests of them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from confluent_kafka import admin

from brokerkit.address import AnyQueue, Queue
from brokerkit.driver import Delivery, Record, Settlement, Source
from brokerkit.drivers.kafka._rescue import Lease
from brokerkit.drivers.kafka._share_consumer import ShareConsumer
from tests.servers.kafka import PREFIX, Endpoints

from .consuming import SOON, Process

QUIET = 0.5


def named(**options: Any) -> AnyQueue:
    """Return a queue of this test alone."""
    queue: AnyQueue = Queue("emails", bytes, **options)
    return queue._named(f"{PREFIX}{uuid.uuid4().hex[:12]}.emails")


@asynccontextmanager
async def consuming(p: Process, queue: AnyQueue, *, prefetch: int = 100) -> AsyncIterator[ShareConsumer]:
    async with p.driver.consume(Source(queue), prefetch=prefetch, revoked=p.told) as consumer:
        assert isinstance(consumer, ShareConsumer)
        yield consumer


async def take(consumer: ShareConsumer, count: int) -> list[Delivery]:
    """Receive exactly *count*."""
    taken: list[Delivery] = []
    async with asyncio.timeout(SOON):
        while len(taken) < count:
            taken += await consumer.receive(count - len(taken), SOON)
    return taken


async def done(consumer: ShareConsumer, deliveries: Sequence[Delivery], *, confirm: bool = False) -> None:
    results = await consumer.settle([Settlement(delivery) for delivery in deliveries], confirm=confirm)
    assert list(results) == [None] * len(deliveries), results


async def drain(consumer: ShareConsumer, quiet: float = QUIET) -> list[Delivery]:
    """Receive and settle until nothing comes any more."""
    taken: list[Delivery] = []
    while got := await consumer.receive(1000, quiet):
        taken += got
        await done(consumer, got)
    return taken


def lease_of(delivery: Delivery) -> Lease:
    lease = delivery.token
    assert isinstance(lease, Lease)
    return lease


def copied(record: Record, **changes: Any) -> Record:
    """Return a copy as a retry makes it."""
    return msgspec.structs.replace(record, deliveries=0, **changes)


def configure(endpoints: Endpoints, topic: str, name: str, value: str) -> None:
    """Set an option of a topic."""
    kafka: Any = admin
    entry = kafka.ConfigEntry(name, value, incremental_operation=kafka.AlterConfigOpType.SET)
    resource = kafka.ConfigResource("topic", topic, incremental_configs=[entry])
    client = kafka.AdminClient({"bootstrap.servers": endpoints.bootstrap()})
    for future in client.incremental_alter_configs([resource]).values():
        future.result(SOON)
