"""An administrator at a real server, for the tests of what one asks for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from brokerkit.address import Address, AnyQueue, Queue, Topic, redrive_queue
from brokerkit.driver import Receipt, Record, StoredRecord
from brokerkit.drivers._url import Options, parse
from brokerkit.drivers.redis._admin import Admin
from brokerkit.drivers.redis._context import Context
from brokerkit.drivers.redis._keys import entity
from brokerkit.drivers.redis._link import Link
from brokerkit.drivers.redis._options import settings
from brokerkit.drivers.redis._publish import Outboxes
from brokerkit.drivers.redis._wake import Wakes
from tests.servers import Proxy, RedisServer

QUEUE = Queue("emails", bytes, priorities=3, dedup=1.5, lease=7)
TOPIC = Topic("orders", bytes, partitions=4, retention=3600)
GROUP = "billing"
LETTERS = QUEUE.dead_letters
BURIED = TOPIC.dead_letters(GROUP)
AGAIN = redrive_queue(TOPIC, GROUP)


class Opened:
    """An administrator at a server."""

    def __init__(self, server: RedisServer, proxy: Proxy, context: Context) -> None:
        self.server = server
        self.proxy = proxy
        self.admin = Admin(context)
        self.boxes = Outboxes(context.sealed, context.process)

    async def put(self, address: Address, ids: Sequence[str], **options: Any) -> list[str]:
        """Store a record for each id; return the positions."""
        results = await self.boxes.publish([record(address, id, **options) for id in ids], 10)
        assert all(isinstance(result, Receipt) for result in results), results
        return [result.position or "" for result in results if isinstance(result, Receipt)]

    async def seen(self, address: Address, limit: int = 1000, **options: Any) -> list[StoredRecord]:
        """Browse."""
        values: dict[str, Any] = {"start": None, "after": None, **options}
        return list(await self.admin.browse(address, limit=limit, **values))

    async def ids(self, address: Address, **options: Any) -> list[str]:
        """Browse, and return the ids."""
        return [stored.record.id for stored in await self.seen(address, **options)]

    async def keys(self) -> list[str]:
        """Return all keys but those that end by themselves."""
        keys = [key.decode() for key in await self.server.command("KEYS", "*")]
        return sorted(key for key in keys if ":p:" not in key)

    async def take(self, session: str, seqs: Sequence[int], queue: AnyQueue = QUEUE, *, dead: bool = False) -> None:
        """Put messages in flight, as a consumer does."""
        key = entity(queue.name).decode()
        for seq in seqs:
            element = await self.server.command("LPOP", f"{key}:r0")
            assert int.from_bytes(element[:6], "big") == seq
            await self.server.command("HSET", f"{key}:h:{session}", element[:6], element)
        until = (time.time() + (-1 if dead else 60)) * 1000
        await self.server.command("ZADD", f"{key}:n", int(until), session)


def record(address: Address, id: str, **options: Any) -> Record:
    return Record(address, id, options.pop("body", b"body"), timestamp=options.pop("timestamp", 1e9), **options)


@asynccontextmanager
async def opened(server: RedisServer) -> AsyncIterator[Opened]:
    server.clear()
    async with Proxy(server.host, server.port) as proxy:
        made = settings(parse(server.url(port=proxy.port)), Options({}, "redis://"))
        link = Link(made)
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        running = asyncio.ensure_future(link.run(started))
        await started
        found = Opened(server, proxy, Context(link, link, Wakes(made), b"process", made, lambda _: None, {}))
        try:
            yield found
        finally:
            found.boxes.close()
            running.cancel()
            await asyncio.wait([running])
