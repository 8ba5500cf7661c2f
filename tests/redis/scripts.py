"""What the tests of single scripts share: calls as a client in another language makes them, one after the other.

Nothing waits here for a lease to end: a test says when it has.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from brokerkit.address import Queue
from brokerkit.driver import Record
from brokerkit.drivers.redis._frames import element, queue_blob
from brokerkit.drivers.redis._keys import entity
from brokerkit.drivers.redis._publish import derived_settings, kind_of
from brokerkit.drivers.redis._scripts import PUBLISH, QUEUE_JOIN, QUEUE_TAKE, Script
from tests.servers import RedisServer

_batches = itertools.count(1)


async def call(server: RedisServer, script: Script, keys: Sequence[bytes], *args: str | bytes | int) -> Any:
    """Run a script."""
    return await server.command("EVAL", script.source, len(keys), *keys, *args)


def call_now(server: RedisServer, script: Script, keys: Sequence[bytes], *args: str | bytes | int) -> Any:
    """Do the same while the loop stands still."""
    return server.command_now("EVAL", script.source, len(keys), *keys, *args)


async def put(server: RedisServer, queue: Queue[Any], *ids: str, **fields: Any) -> list[int]:
    """Store records; return their numbers."""
    blobs = [queue_blob(Record(queue, id, id.encode(), timestamp=1.0, **fields)) for id in ids]
    keys, settings = [entity(queue.name)], derived_settings(queue)
    first = await call(server, PUBLISH, keys, "@p", next(_batches), kind_of(queue), settings, "0", *blobs)
    return list(range(int(first), int(first) + len(ids)))


class Held:
    """What a take has handed out."""

    def __init__(self, queue: Queue[Any], reply: list[Any]) -> None:
        self.owned, self.expired, self.state, self.hint, elements = reply
        found = [element(queue, data) for data in elements]
        self.ids = [record.id for _, _, record in found]
        self.ended = [ended for _, ended, _ in found]
        """Deliveries of each before this one."""
        self.numbers = [data[:6] for data in elements]


class Sessions:
    """The sessions of one queue."""

    def __init__(self, server: RedisServer, queue: Queue[Any]) -> None:
        self.server = server
        self.queue = queue
        self.key = entity(queue.name)

    async def call(self, script: Script, *args: str | bytes | int, more: Sequence[bytes] = ()) -> Any:
        return await call(self.server, script, [self.key, *more], *args)

    async def join(self, *names: str) -> None:
        for name in names:
            await self.call(QUEUE_JOIN, name, "")

    async def take(self, name: str, room: int = 100, *, proven: int | None = None) -> Held:
        more: tuple[str | int, ...] = () if proven is None else ("", proven)  # older clients do not say it
        return Held(self.queue, await self.call(QUEUE_TAKE, name, room, 0, 0, 0, *more))

    async def end(self, name: str) -> None:
        """Let the lease of a session be over."""
        await self.server.command("ZADD", self.key + b":n", "XX", 5, name)

    async def held(self, name: str) -> list[bytes]:
        return sorted(await self.server.command("HKEYS", self.key + b":h:" + name.encode()))
