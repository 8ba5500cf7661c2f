"""Programs on Redis that misbehave, for the tests of the harness."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from brokerkit import Broker

from ..on_servers.altering import Doubles, Keeps, Loses
from ..on_servers.client import GROUP, Got, Publisher
from ..on_servers.ours import OurQueue, OurTopic
from .raw import BLOCK, CONSUMER, Raw, RawList


class RawLoses(Loses, Raw):
    """raw, losing."""

    name = "raw-loses"


class RawDoubles(Doubles, Raw):
    """raw, doubling."""

    name = "raw-doubles"


class RawKeeps(Keeps, Raw):
    """raw, swapping."""

    name = "raw-keeps"


class ListLoses(Loses, RawList):
    """raw-list, losing."""

    name = "list-loses"


class RawForeign(Raw):
    """Publishes something without a number besides."""

    name = "raw-foreign"

    @contextlib.asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        async with super().publisher() as to:
            await to.one({"pad": "x"})
            yield to


class QueueLoses(Loses, OurQueue):
    """Ours, losing."""

    name = "queue-loses"


class QueueDoubles(Doubles, OurQueue):
    """Ours, doubling."""

    name = "queue-doubles"


class TopicKeeps(Keeps, OurTopic):
    """Ours, swapping."""

    name = "topic-keeps"


class Unacknowledged(Raw):
    """Handles all, acknowledges nothing."""

    name = "unacknowledged"

    async def loop(self, redis: Any, got: Got, stop: asyncio.Event) -> None:
        while not stop.is_set():
            for _, page in await redis.xreadgroup(GROUP, CONSUMER, {self.job.entity: ">"}, count=100, block=BLOCK):
                for _, fields in page:
                    got(json.loads(fields[b"d"]))


class HandlesTwice(Raw):
    """Handles number 7 twice."""

    name = "handles-twice"

    async def loop(self, redis: Any, got: Got, stop: asyncio.Event) -> None:
        def twice(value: dict[str, Any]) -> None:
            got(value)
            if value["n"] == 7:
                got(value)

        await super().loop(redis, twice, stop)


class HandlesLate(Raw):
    """Handles number 7 once more when all seemed done."""

    name = "handles-late"

    async def loop(self, redis: Any, got: Got, stop: asyncio.Event) -> None:
        async def late() -> None:
            await asyncio.sleep(0.15)
            got({"n": 7, "t": 0})

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(late())
            await super().loop(redis, got, stop)


class Skips(Raw):
    """Acknowledges number 7 and never handles it."""

    name = "skips"

    async def loop(self, redis: Any, got: Got, stop: asyncio.Event) -> None:
        def skipping(value: dict[str, Any]) -> None:
            if value["n"] != 7:
                got(value)

        await super().loop(redis, skipping, stop)


class QueueSwallows(OurQueue):
    """Ours, with messages that leave the backlog unhandled."""

    name = "queue-swallows"
    behind = 300

    def address(self, broker: Broker) -> Publisher:
        to = super().address(broker)

        async def many(items: Sequence[Any]) -> None:
            await to.many([item for item in items if item.n != self.job.n + self.job.behind - 1])

        return Publisher(to.one, many)
