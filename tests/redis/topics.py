"""What the tests of topics share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from brokerkit.address import Topic
from brokerkit.driver import Delivery, Record, Settlement, Source
from brokerkit.drivers.redis._keys import entity
from brokerkit.drivers.redis._publish import settings_of
from brokerkit.drivers.redis._topic import TopicConsumer
from brokerkit.errors import BrokerError
from brokerkit.policy import Start
from tests.servers import RedisServer

from .queues import SOON, Process

GROUP = "g"


def topic(name: str = "topic", **options: Any) -> Topic[bytes]:
    options.setdefault("partitions", 4)
    return Topic(name, bytes, **options)


def consume(
    p: Process,
    address: Topic[Any],
    *,
    group: str | None = GROUP,
    start: Start = Start.EARLIEST,
    prefetch: int = 100,
    until_end: bool = False,
    revoked: Any = None,
) -> TopicConsumer:
    source = Source(address, group, start, until_end)
    return TopicConsumer(p.context, address, source, prefetch, revoked or p.revoked)


async def declare(server: RedisServer, *addresses: Topic[Any]) -> None:
    for address in addresses:
        for pair in ("kind=t", *settings_of(address).decode().split()):
            name, _, value = pair.partition("=")
            await server.command("HSET", entity(address.name), name, value)


async def take(consumer: TopicConsumer, count: int, limit: int = 1000) -> list[Delivery]:
    taken: list[Delivery] = []
    async with asyncio.timeout(SOON):
        while len(taken) < count:
            taken += await consumer.receive(min(limit, count - len(taken)), SOON)
    return taken


async def settle(
    consumer: TopicConsumer, deliveries: Sequence[Delivery], *copies: Record, confirm: bool = False
) -> list[BrokerError | None]:
    items = [Settlement(delivery, copies) for delivery in deliveries]
    return list(await consumer.settle(items, confirm=confirm))


async def done(consumer: TopicConsumer, deliveries: Sequence[Delivery], *, confirm: bool = False) -> None:
    assert await settle(consumer, deliveries, confirm=confirm) == [None] * len(deliveries)


async def rest(consumer: TopicConsumer, quiet: float = 0.2) -> list[Delivery]:
    """Receive and settle until nothing comes any more."""
    taken: list[Delivery] = []
    while got := await consumer.receive(1000, quiet):
        taken += got
        await done(consumer, got)
    return taken


async def left(p: Process, address: Topic[Any], **options: Any) -> list[str]:
    """Return and settle what a new member of the group is given."""
    async with consume(p, address, **options) as consumer:
        return ids(await rest(consumer))


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.record.id for delivery in deliveries]


def names(count: int, prefix: str = "m") -> list[str]:
    return [f"{prefix}{number:05}" for number in range(count)]
