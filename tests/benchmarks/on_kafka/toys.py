"""Programs on Kafka that misbehave, for the tests of the harness."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import brokerkit
from brokerkit import Message, Nack, Service

from ..job import Order
from ..on_servers.altering import Doubles, Keeps, Loses
from ..on_servers.client import GROUP, Got, Publisher, reading
from .ours import OurQueue, Ours
from .raw import Raw


class RawLoses(Loses, Raw):
    """raw, losing."""

    name = "raw-loses"


class RawDoubles(Doubles, Raw):
    """raw, doubling."""

    name = "raw-doubles"


class RawKeeps(Keeps, Raw):
    """raw, swapping."""

    name = "raw-keeps"


class OursLoses(Loses, Ours):
    """Ours, losing."""

    name = "ours-loses"


class OursKeeps(Keeps, Ours):
    """Ours, swapping."""

    name = "ours-keeps"


class QueueLoses(Loses, OurQueue):
    """A queue, losing."""

    name = "queue-loses"


class QueueDoubles(Doubles, OurQueue):
    """A queue, doubling."""

    name = "queue-doubles"


class QueuePostpones(OurQueue):
    """Handles number 7, and asks for it again later than anybody waits."""

    name = "queue-postpones"

    @contextlib.asynccontextmanager
    async def consumer(self, got: Got) -> AsyncIterator[None]:
        service = Service(GROUP)

        async def handle(message: Message[Order]) -> None:
            got(message.value)
            if message.value.n == 7:
                raise Nack(delay=3600)

        self.subscribe(service)(handle)
        async with brokerkit.connect(self.job.url) as broker, service.running(broker):
            yield


class QueueForgets(OurQueue):
    """Receives all, and does not acknowledge number 7."""

    name = "queue-forgets"

    @contextlib.asynccontextmanager
    async def consumer(self, got: Got) -> AsyncIterator[None]:
        async def loop(stop: asyncio.Event) -> None:
            async with brokerkit.connect(self.job.url) as broker, broker.subscribe(self.queue) as messages:
                while not stop.is_set():
                    for message in await messages.receive(limit=100, timeout=0.1):
                        got(message.value)
                        if message.value.n != 7:
                            await message.ack()

        async with reading(loop):
            yield


class RawForeign(Raw):
    """Publishes something without a number besides."""

    name = "raw-foreign"

    @contextlib.asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        async with super().publisher() as to:
            await to.one({"pad": "x", "user": "x"})
            yield to


class Uncommitted(Raw):
    """Handles all, commits nothing."""

    name = "uncommitted"

    async def settle(self, consumer: Any, offsets: dict[Any, int]) -> None:
        pass


class Behind(Raw):
    """Commits all but the last of each batch."""

    name = "behind"

    async def settle(self, consumer: Any, offsets: dict[Any, int]) -> None:
        await super().settle(consumer, {place: offset - 1 for place, offset in offsets.items()})


class HandlesTwice(Raw):
    """Handles number 7 twice."""

    name = "handles-twice"

    async def loop(self, consumer: Any, got: Got, stop: asyncio.Event) -> None:
        def twice(value: dict[str, Any]) -> None:
            got(value)
            if value["n"] == 7:
                got(value)

        await super().loop(consumer, twice, stop)


class Skips(Raw):
    """Commits number 7 and never handles it."""

    name = "skips"

    async def loop(self, consumer: Any, got: Got, stop: asyncio.Event) -> None:
        def skipping(value: dict[str, Any]) -> None:
            if value["n"] != 7:
                got(value)

        await super().loop(consumer, skipping, stop)


class Reorders(Raw):
    """Promises order per key, and handles each batch backwards."""

    name = "reorders"
    ordered = True

    async def loop(self, consumer: Any, got: Got, stop: asyncio.Event) -> None:
        held: list[dict[str, Any]] = []

        def backwards(value: dict[str, Any]) -> None:
            held.append(value)
            if len(held) == self.job.n:
                for one in reversed(held):
                    got(one)

        await super().loop(consumer, backwards, stop)
