"""Channels without Kombu: what its synchronous side asks of the event loop, by hand."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypeAlias

import brokerkit
from brokerkit.celery._envelope import seal
from brokerkit.celery._exchanges import Exchanges
from brokerkit.celery._intake import Intake
from brokerkit.celery._item import Item
from tests.servers import shared
from tests.servers.kafka import PREFIX, shared_kafka

from .systems import forget

Name: TypeAlias = Literal["memory", "redis", "kafka"]
SYSTEMS: Final[tuple[Name, ...]] = ("memory", "redis", "kafka")
WAIT: Final = 30.0
"""Seconds that nothing here needs."""
QUIET: Final[dict[Name, float]] = {"memory": 0.1, "redis": 0.3, "kafka": 0.8}
"""Seconds after which nothing comes any more."""


class Place:
    """Names of a test's own in one broker."""

    def __init__(self, name: Name, url: str, prefix: str) -> None:
        self.name: Name = name
        self.quiet = QUIET[name]
        self.url = url
        self.prefix = prefix
        self._options = {"prefix": prefix}

    @asynccontextmanager
    async def process(self, **settings: Any) -> AsyncGenerator[Process]:
        """Give what one process of Celery has."""
        async with brokerkit.connect(self.url, options=self._options) as broker, AsyncExitStack() as stack:
            process = Process(self, broker, Exchanges(broker, self.name, {"lease": 2, **settings}))
            stack.push_async_callback(process.close)
            yield process


@contextmanager
def placed(name: Name) -> Generator[Place]:
    """Give a place, and remove at last what a test has left there."""
    token = secrets.token_hex(4)
    prefix = f"{PREFIX}i{token}."
    if name == "memory":
        yield Place(name, f"memory://{token}", prefix)
    elif name == "redis":
        yield Place(name, shared("redis").url(), prefix)
    else:
        endpoints = shared_kafka()
        try:
            yield Place(name, endpoints.url(), prefix)
        finally:
            forget(endpoints, prefix)


class Process:
    """The exchanges of one process, and its channels."""

    def __init__(self, place: Place, broker: brokerkit.Broker, exchanges: Exchanges) -> None:
        self.place = place
        self.broker = broker
        self.exchanges = exchanges
        self.channels: list[Channel] = []

    async def close(self) -> None:
        """Close all channels, as Celery does when it stops."""
        for channel in self.channels:
            await channel.intake.close()
        await self.exchanges.close()

    async def channel(self, *queues: str, prefetch: int | None = None) -> Channel:
        """Return a channel that consumes *queues*."""
        channel = Channel(self)
        self.channels.append(channel)
        channel.intake.prefetch(prefetch)
        for queue in queues:
            await channel.intake.consume(queue)
        return channel

    async def put(self, queue: str, *bodies: str, **headers: Any) -> None:
        """Publish tasks to *queue*."""
        for body in bodies:
            await self.exchanges.publish(task(body, queue, **headers))

    async def letters(self, queue: str) -> list[Any]:
        """Return the dead letters of *queue*."""
        address = self.exchanges.names.queue(queue)
        return [letter async for letter in self.broker.browse(address.dead_letters)]


class Channel:
    """One channel, with what was delivered to it."""

    def __init__(self, process: Process) -> None:
        self.place = process.place
        self.failures: list[BaseException] = []
        self._items: asyncio.Queue[Item] = asyncio.Queue()
        self.intake = Intake(process.exchanges, self._deliver, self.failures.append)

    def _deliver(self, items: Sequence[Item]) -> None:
        for item in items:
            self._items.put_nowait(item)

    async def take(self, count: int) -> list[Item]:
        """Return the next *count* items."""
        async with asyncio.timeout(WAIT):
            return [await self._items.get() for _ in range(count)]

    async def nothing(self) -> None:
        """Fail if anything comes."""
        await asyncio.sleep(self.place.quiet)
        assert self._items.empty(), body_of(self._items.get_nowait())

    @property
    def count(self) -> int:
        """How much was delivered and not taken."""
        return self._items.qsize()


def message(body: str, **options: Any) -> dict[str, Any]:
    """Return what Kombu prepares for *body*; *options* are headers, beside some properties."""
    properties = {name: options.pop(name) for name in ("priority", "expiration") if name in options}
    return {
        "body": body,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": options,
        "properties": {"delivery_info": {}, **properties},
    }


def task(body: str, queue: str, **options: Any) -> Any:
    """Return a task, to be published to *queue* by the default exchange."""
    return seal(message(body, task="jobs.add", id=body, **options), "", "direct", queue)


def plain(body: str, exchange: str, key: str, type: str = "direct", **options: Any) -> Any:
    """Return what is no task, to be published to *exchange*."""
    return seal(message(body, **options), exchange, type, key)


def body_of(item: Item) -> Any:
    """Return the body of *item*."""
    return item.payload["body"]


def bodies(items: Iterable[Item]) -> list[Any]:
    """Return the bodies of *items*, whatever their order."""
    return sorted(body_of(item) for item in items)


async def taken(channel: Channel, count: int) -> list[Any]:
    """Return the bodies of the next *count* items of *channel*, acknowledged."""
    items = await channel.take(count)
    channel.intake.ack(items)
    return [body_of(item) for item in items]


async def left(process: Process, queue: str) -> list[Any]:
    """Return what a channel of another process still finds in *queue*."""
    other = await process.channel(queue)
    await asyncio.sleep(4 * process.place.quiet)
    got = bodies(await other.take(other.count))
    await other.intake.close()
    return got


def at(seconds: float) -> str:
    """Return the point in time that is *seconds* from now, as Celery writes it."""
    return datetime.fromtimestamp(time.time() + seconds, UTC).isoformat()


def redelivered(item: Item) -> bool:
    """Return whether *item* says that it was delivered before."""
    return bool(item.payload["properties"]["delivery_info"].get("redelivered"))


async def eventually(holds: Any) -> None:
    """Wait until *holds* does."""
    async with asyncio.timeout(WAIT):
        while not holds():
            await asyncio.sleep(0.01)


async def eventually_table(exchanges: Any, exchange: str, wanted: dict[str, str]) -> None:
    """Wait until the bindings of *exchange* are *wanted*: queues by routing key."""
    async with asyncio.timeout(30):
        while {key: queue for key, _, queue in await exchanges.table(exchange)} != wanted:
            await asyncio.sleep(0.02)
