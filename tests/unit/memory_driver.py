"""What the tests of the memory driver share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from brokerkit.address import Address, Topic
from brokerkit.driver import Consumer, Delivery, Driver, Receipt, Record, Revoked, Settlement, Source
from brokerkit.drivers import load
from brokerkit.drivers.memory import MemoryDriver
from brokerkit.errors import BrokerError
from brokerkit.events import Event
from brokerkit.policy import Start
from brokerkit.testing import run

__all__ = ["run"]


def driver(url: str = "memory://", *, emit: Callable[[Event], None] | None = None, **options: object) -> MemoryDriver:
    """Return a driver that is not open."""
    made: Driver = load(url, options, emit or (lambda _: None)).driver
    assert isinstance(made, MemoryDriver)
    return made


@asynccontextmanager
async def opened(
    *addresses: Address, url: str = "memory://", emit: Callable[[Event], None] | None = None, **options: object
) -> AsyncIterator[MemoryDriver]:
    """Open a connection and declare *addresses*."""
    async with driver(url, emit=emit, **options) as made:
        for address in addresses:
            await made.declare(address)
        yield made


async def ignore(deliveries: Sequence[Delivery]) -> None:
    """Let ownership move."""


@asynccontextmanager
async def consuming(
    made: MemoryDriver,
    address: Address,
    group: str | None = "workers",
    *,
    prefetch: int = 1000,
    start: Start = Start.EARLIEST,
    until_end: bool = False,
    revoked: Revoked = ignore,
) -> AsyncIterator[Consumer]:
    """Read *address*, a topic for *group*."""
    source = Source(address, group if isinstance(address, Topic) else None, start, until_end)
    async with made.consume(source, prefetch=prefetch, revoked=revoked) as consumer:
        yield consumer


async def put(made: MemoryDriver, address: Address, ids: Iterable[str], **fields: Any) -> list[Receipt]:
    """Publish records of those *ids* in one call; every one must be stored."""
    results = await made.publish([Record(address, id, b"body", **fields) for id in ids], timeout=5)
    stored = [result for result in results if isinstance(result, Receipt)]
    assert len(stored) == len(results), results
    return stored


async def results(
    made: MemoryDriver, address: Address, ids: Iterable[str], **fields: Any
) -> list[type[BrokerError] | None]:
    """Publish records of those *ids* in one call; return the classes of their errors."""
    found = await made.publish([Record(address, id, b"body", **fields) for id in ids], timeout=5)
    return [type(result) if isinstance(result, BrokerError) else None for result in found]


async def take(consumer: Consumer, count: int, *, within: float = 1.0) -> list[Delivery]:
    """Receive exactly *count* deliveries."""
    taken: list[Delivery] = []
    while len(taken) < count:
        got = await consumer.receive(count - len(taken), within)
        assert got, f"{[d.record.id for d in taken]} came, {count - len(taken)} are missing"
        taken += got
    return taken


async def rest(consumer: Consumer) -> list[Delivery]:
    """Receive and settle whatever comes at once."""
    taken: list[Delivery] = []
    while got := await consumer.receive(1000, 0):
        taken += got
        await done(consumer, *got)
    return taken


async def done(consumer: Consumer, *deliveries: Delivery) -> None:
    """Settle *deliveries*, which must be possible."""
    assert set(await consumer.settle([Settlement(d) for d in deliveries])) <= {None}


async def settled(consumer: Consumer, *deliveries: Delivery) -> list[type[BrokerError] | None]:
    """Settle *deliveries* and return the classes of the errors."""
    return [None if r is None else type(r) for r in await consumer.settle([Settlement(d) for d in deliveries])]


def ids(deliveries: Iterable[Any]) -> list[str]:
    """Return the ids of deliveries or stored records, in order."""
    return [d.record.id for d in deliveries]


def names(count: int, prefix: str = "m") -> list[str]:
    """Return *count* ids."""
    return [f"{prefix}{n}" for n in range(count)]


async def turns(count: int = 10) -> None:
    """Let every task that can run do some steps."""
    for _ in range(count):
        await asyncio.sleep(0)


def at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run *coroutine*, which must not wait for anything."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise AssertionError("it waits")
