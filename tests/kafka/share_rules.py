"""A consumer of a share group at a broker that is kept simple, for tests of one rule at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from brokerkit.driver import Delivery, Settlement
from brokerkit.drivers.kafka._engine import Terms
from brokerkit.drivers.kafka._share_consumer import ShareConsumer
from brokerkit.testing import VirtualLoop

from .share_playground import TERMS, FakeShare, World, installed

SOON = 20.0
QUIET = 0.5


def play(main: Callable[[World], Awaitable[None]]) -> None:
    """Run *main* with a world of its own, in virtual time."""

    async def begin() -> None:
        await main(World())

    with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=VirtualLoop) as runner:
        installed(patch)
        runner.run(begin())


class Reader:
    """A consumer and what it was told."""

    def __init__(self, consumer: ShareConsumer, revoked: list[str]) -> None:
        self.consumer = consumer
        self.revoked = revoked

    @property
    def share(self) -> FakeShare:
        share = self.consumer._share
        assert isinstance(share, FakeShare)
        return share

    async def take(self, count: int) -> list[Delivery]:
        taken: list[Delivery] = []
        async with asyncio.timeout(SOON):
            while len(taken) < count:
                taken += await self.consumer.receive(count - len(taken), SOON)
        return taken

    async def nothing(self) -> None:
        got = await self.consumer.receive(100, QUIET)
        assert not got, ids(got)

    async def done(self, *deliveries: Delivery, confirm: bool = False) -> None:
        results = await self.consumer.settle([Settlement(delivery) for delivery in deliveries], confirm=confirm)
        assert list(results) == [None] * len(deliveries)

    async def drain(self) -> list[Delivery]:
        taken: list[Delivery] = []
        while got := await self.consumer.receive(100, QUIET):
            taken += got
            await self.done(*got)
        return taken

    async def die(self) -> None:
        """End as a process does that is killed."""
        hosted = self.consumer._hosted
        assert hosted is not None
        assert hosted.task is not None
        hosted.task.cancel()
        await asyncio.wait([hosted.task])


@asynccontextmanager
async def reading(world: World, *, prefetch: int = 100, terms: Terms = TERMS) -> AsyncIterator[Reader]:
    revoked: list[str] = []

    async def told(deliveries: Sequence[Delivery]) -> None:
        revoked.extend(ids(deliveries))

    async with ShareConsumer(world.context(), world.queue, prefetch, told, terms) as consumer:
        yield Reader(consumer, revoked)


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.record.id for delivery in deliveries]


def names(count: int, prefix: str = "m") -> list[str]:
    return [f"{prefix}{number:04}" for number in range(count)]


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.sleep(0.001)


def held(r: Reader) -> list[Delivery]:
    return list(r.consumer._held.values())
