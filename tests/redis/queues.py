"""What the tests of queues share: a process with consumers, on a network that can be broken."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio

from brokerkit._tasks import Hosted
from brokerkit.address import Queue, Topic
from brokerkit.driver import Delivery, Receipt, Record, Settlement, Source
from brokerkit.drivers._url import Options, parse
from brokerkit.drivers.redis._context import Context
from brokerkit.drivers.redis._keys import entity
from brokerkit.drivers.redis._link import Link
from brokerkit.drivers.redis._options import settings
from brokerkit.drivers.redis._publish import Outboxes, settings_of
from brokerkit.drivers.redis._queue import QueueConsumer
from brokerkit.drivers.redis._wake import Wakes
from brokerkit.events import Event
from tests.servers import ADMIN, Proxy, RedisServer

SOON = 10.0
"""Seconds after which a test that waits for something fails."""
LEASE = 1.0


def queue(name: str = "queue", **options: Any) -> Queue[bytes]:
    options.setdefault("lease", LEASE)
    return Queue(name, bytes, **options)


class Process:
    """One process: its connections, what it publishes and what it is told."""

    def __init__(self, context: Context, outboxes: Outboxes, proxy: Proxy, events: list[Event]) -> None:
        self.context = context
        self.outboxes = outboxes
        self.proxy = proxy
        self.events = events
        self.lost: list[str] = []

    @property
    def link(self) -> Link:
        return self.context.link

    async def revoked(self, deliveries: Sequence[Delivery]) -> None:
        self.lost += [delivery.record.id for delivery in deliveries]

    def consume(self, address: Queue[Any], prefetch: int = 100, revoked: Any = None) -> QueueConsumer:
        return QueueConsumer(self.context, address, Source(address), prefetch, revoked or self.revoked)

    async def put(self, address: Queue[Any] | Topic[Any], ids: Sequence[str], **fields: Any) -> None:
        records = [Record(address, id, id.encode(), timestamp=1.0, **fields) for id in ids]
        for result in await self.outboxes.publish(records, SOON):
            assert isinstance(result, Receipt), result

    async def up(self) -> None:
        async with asyncio.timeout(SOON):
            while not self.link.up:
                await asyncio.sleep(0.001)


@asynccontextmanager
async def process(
    server: RedisServer, *, user: str = ADMIN, password: str | None = None, **options: object
) -> AsyncIterator[Process]:
    """Open one, on a network of its own."""
    async with Proxy(server.host, server.port) as proxy:
        parsed = parse(server.url(user=user, password=password, port=proxy.port))
        read = settings(parsed, Options({**parsed.query, **options}, "redis://"))
        link, wakes = Link(read), Wakes(read)

        async def run(started: asyncio.Future[None]) -> None:
            connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(link.run, connected)
                tasks.start_soon(wakes.run)
                await connected
                while wakes.problem is not None:
                    await asyncio.sleep(0.001)
                started.set_result(None)
                await hosted.stopping.wait()
                tasks.cancel_scope.cancel()

        hosted = Hosted("process", run)
        async with hosted:
            name = os.urandom(8).hex().encode()
            events: list[Event] = []
            yield Process(
                Context(link, link, wakes, name, read, events.append, {}), Outboxes(link, name), proxy, events
            )


async def declare(server: RedisServer, *addresses: Queue[Any]) -> None:
    for address in addresses:
        fields = [part for pair in settings_of(address).decode().split() for part in pair.split("=")]
        await server.command("HSET", entity(address.name), "kind", "q", *fields)


async def take(consumer: QueueConsumer, count: int, limit: int = 1000) -> list[Delivery]:
    taken: list[Delivery] = []
    async with asyncio.timeout(SOON):
        while len(taken) < count:
            taken += await consumer.receive(min(limit, count - len(taken)), SOON)
    return taken


async def done(consumer: QueueConsumer, deliveries: Sequence[Delivery], *, confirm: bool = False) -> None:
    results = await consumer.settle([Settlement(delivery) for delivery in deliveries], confirm=confirm)
    assert list(results) == [None] * len(deliveries), results


async def drain(consumer: QueueConsumer, quiet: float = 0.2) -> list[Delivery]:
    taken: list[Delivery] = []
    while got := await consumer.receive(1000, quiet):
        taken += got
        await done(consumer, got)
    return taken


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.record.id for delivery in deliveries]


async def left(server: RedisServer, address: Queue[Any]) -> list[str]:
    """Return the kinds of keys that *address* has besides its settings."""
    key = entity(address.name).decode()
    found = await server.command("KEYS", "*")
    names = [name.decode() if isinstance(name, bytes) else name for name in found]
    return sorted(name[len(key) + 1 :] for name in names if name.startswith(key + ":") and ":p:" not in name)
