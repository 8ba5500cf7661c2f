"""The frame of all programs on a server: what is measured is decided here, alike for all of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from ..feeding import chunks, paced, spread
from ..frame import Part, Row, Work
from ..job import Order

GROUP: Final = "bench"
PAGE: Final = 1000
"""Messages per call where a backlog is filled in or looked at, which is not measured."""
NUMBER: Final = re.compile(rb'"n": ?(\d+)')
dumps: Final = json.JSONEncoder(separators=(",", ":")).encode
Got = Callable[[Any], None]


@dataclass(frozen=True)
class Publisher:
    """How a program publishes."""

    one: Callable[[Any], Awaitable[object]]
    many: Callable[[Sequence[Any]], Awaitable[object]]


class Client(Row):
    """A program that publishes to and consumes from one entity of its own, named ``job.entity``."""

    chunk: ClassVar[int] = 100
    """Messages that `Publisher.many` is given where a backlog is filled in."""

    @classmethod
    def parts(cls, work: Work) -> frozenset[Part]:
        """What is published is counted in the server; what is consumed is stored before, or, for a latency, fed beside."""
        if work.stores:
            return frozenset({"fill", "run", "audit"} if cls.behind else {"run", "audit"})
        return frozenset({"feed" if work.metric == "latency" else "fill", "run", "audit"})

    def item(self, value: Order) -> Any:
        """Return what the publisher is given for *value*; peers publish a dict."""
        return vars(value)

    def publisher(self) -> AbstractAsyncContextManager[Publisher]:
        """Return what yields a publisher that is connected."""
        raise NotImplementedError

    def consumer(self, got: Got) -> AbstractAsyncContextManager[None]:
        """Return what is entered when the consumer is ready, and left when all is acknowledged."""
        raise NotImplementedError

    async def prepare(self) -> None:
        """Create what must exist before the first message."""

    def found(self) -> Iterator[bytes]:
        """Yield all stored messages, asked of the server in plain words."""
        raise NotImplementedError

    def pending(self) -> int:
        """Return how many messages are delivered and not acknowledged."""
        raise NotImplementedError

    def got(self) -> Got:
        """Return what handlers call with what they see."""
        return self.job.dicts(timed=self.work.metric == "latency")

    async def fill(self) -> None:
        await self.prepare()
        items = [
            self.item(value) for value in (self.job.stock()[self.job.n :] if self.work.stores else self.job.stock())
        ]
        async with self.publisher() as to:
            for some in chunks(items, self.chunk):
                await to.many(some)

    async def run(self) -> None:
        job, work = self.job, self.work
        if not work.stores:
            got = self.got()
            if work.metric == "latency":
                await self.prepare()
            job.drain()
            async with self.consumer(got):
                job.ready()
                await job.finish()
            return
        async with self.publisher() as to:
            items = [self.item(value) for value in job.values()]
            batches = list(chunks(items, work.batch))
            job.begin()
            if work.batch > 1:
                for some in batches:
                    await to.many(some)
            else:
                await spread(items, work.handlers, to.one)
            job.stop()

    async def feed(self) -> None:
        async with self.publisher() as to:
            await asyncio.sleep(0.2)
            await paced(self.job.values(), lambda value: to.one(self.item(value)))

    async def audit(self) -> None:
        if self.work.stores:
            for message in self.found():
                match = NUMBER.search(message)
                # A message without a number is none of ours: -1 is never published.
                self.job.seen.append(int(match[1]) if match else -1)
        else:
            self.job.unsettled = self.pending()


@contextlib.asynccontextmanager
async def reading(loop: Callable[[asyncio.Event], Awaitable[None]]) -> AsyncIterator[None]:
    """Run *loop* until it ends by itself, after its event was set."""
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_until(loop, stop))
        try:
            yield
        finally:
            stop.set()


async def _until(loop: Callable[[asyncio.Event], Awaitable[None]], stop: asyncio.Event) -> None:
    await loop(stop)
