"""The yardstick: redis-py, used as its documentation shows, with nothing in between."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Final

import msgspec
import orjson

from ..job import Order
from ..on_servers.client import GROUP, PAGE, Client, Got, Publisher, dumps, reading
from .server import client

CONSUMER: Final = "one"
BLOCK: Final = 100
"""Milliseconds that a read waits, so that a consumer can end."""


class Streams(Client):
    """Those that put one stream entry per message, and their audit."""

    async def prepare(self) -> None:
        with client(self.job.url) as asking:
            asking.xgroup_create(self.job.entity, GROUP, id="0", mkstream=True)

    def found(self) -> Iterator[bytes]:
        with client(self.job.url) as asking:
            after = "-"
            while page := asking.xrange(self.job.entity, min=after, count=PAGE):
                yield from (b"".join(fields.values()) for _, fields in page)
                after = f"({page[-1][0].decode()}"

    def pending(self) -> int:
        with client(self.job.url) as asking:
            return int(asking.xpending(self.job.entity, GROUP)["pending"])


class Lists(Client):
    """Those that put one list element per message: it is gone once it is read."""

    def found(self) -> Iterator[bytes]:
        with client(self.job.url) as asking:
            yield from asking.lrange(self.job.entity, 0, -1)

    def pending(self) -> int:
        with client(self.job.url) as asking:
            return int(asking.llen(self.job.entity))


@contextlib.asynccontextmanager
async def connected(url: str, connections: int) -> AsyncIterator[Any]:
    """Yield a client whose pool is warm: connecting is no part of what is measured."""
    from redis.asyncio import Redis

    async with Redis.from_url(url) as made:
        some: Any = made
        await asyncio.gather(*[some.ping() for _ in range(connections)])
        yield some


class Raw(Streams):
    """One stream and a consumer group."""

    name = "raw"
    note = (
        "redis-py asyncio, json. XADD; many: pipeline(transaction=False) of 100; consuming: XREADGROUP COUNT 100, then one by "
        "one, handler and XACK, or 100 tasks of handler and XACK"
    )

    def body(self, item: Any) -> Any:
        """Return what is stored for *item*."""
        return dumps(item)

    def read(self, body: bytes) -> Any:
        """Return what the handler sees."""
        return json.loads(body)

    @contextlib.asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        name, body = self.job.entity, self.body
        async with connected(self.job.url, self.work.handlers if self.work.stores else 1) as redis:

            async def many(items: Sequence[Any]) -> None:
                pipe = redis.pipeline(transaction=False)
                for item in items:
                    pipe.xadd(name, {"d": body(item)})
                await pipe.execute()

            yield Publisher(lambda item: redis.xadd(name, {"d": body(item)}), many)

    @contextlib.asynccontextmanager
    async def consumer(self, got: Got) -> AsyncIterator[None]:
        async with (
            connected(self.job.url, self.work.handlers) as redis,
            reading(lambda stop: self.loop(redis, got, stop)),
        ):
            yield

    async def loop(self, redis: Any, got: Got, stop: asyncio.Event) -> None:
        """Read and handle until *stop*."""
        name, read, alone = self.job.entity, self.read, self.work.handlers == 1

        async def handle(value: Any) -> None:
            got(value)

        async def one(at: bytes, fields: dict[bytes, bytes]) -> None:
            await handle(read(fields[b"d"]))
            await redis.xack(name, GROUP, at)

        while not stop.is_set():
            for _, page in await redis.xreadgroup(GROUP, CONSUMER, {name: ">"}, count=100, block=BLOCK):
                if alone:
                    for at, fields in page:
                        await one(at, fields)
                else:
                    await asyncio.gather(*[one(at, fields) for at, fields in page])


class RawBatchAck(Raw):
    """Acknowledges a hundred at a time: a crash repeats all of them."""

    name = "raw-batchack"
    note = "as raw, with one XACK of the 100 ids after the handlers of the batch"

    async def loop(self, redis: Any, got: Got, stop: asyncio.Event) -> None:
        name, read, alone = self.job.entity, self.read, self.work.handlers == 1

        async def handle(value: Any) -> None:
            got(value)

        while not stop.is_set():
            for _, page in await redis.xreadgroup(GROUP, CONSUMER, {name: ">"}, count=100, block=BLOCK):
                if alone:
                    for _, fields in page:
                        await handle(read(fields[b"d"]))
                else:
                    await asyncio.gather(*[handle(read(fields[b"d"])) for _, fields in page])
                await redis.xack(name, GROUP, *[at for at, _ in page])


class RawTyped(Raw):
    """The same with the codecs that brokerkit uses: what the yardstick would be with those."""

    name = "raw-typed"
    note = "as raw, with a dataclass, orjson and msgspec instead of a dict and json"

    def item(self, value: Order) -> Any:
        return value

    def body(self, item: Any) -> Any:
        return orjson.dumps(item)

    def got(self) -> Got:
        self.decode = msgspec.json.Decoder(Order).decode
        return self.job.timer() if self.work.metric == "latency" else self.job.counter()

    def read(self, body: bytes) -> Any:
        return self.decode(body)


class RawBytes(Raw):
    """The same with bodies that are made before the clocks start."""

    name = "raw-bytes"
    note = "as raw, with 100 bytes that are made before"

    def item(self, value: Order) -> Any:
        return orjson.dumps(value)

    def body(self, item: Any) -> Any:
        return item


class RawList(Lists):
    """One list; what a crash takes is lost."""

    name = "raw-list"
    note = "redis-py asyncio, json. RPUSH; many: one RPUSH with 100 values; consuming: BLPOP one by one, at most once"

    def body(self, item: Any) -> Any:
        """Return what is stored for *item*."""
        return dumps(item)

    @contextlib.asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        name, body = self.job.entity, self.body
        async with connected(self.job.url, self.work.handlers if self.work.stores else 1) as redis:
            yield Publisher(
                lambda item: redis.rpush(name, body(item)),
                lambda items: redis.rpush(name, *[body(item) for item in items]),
            )

    @contextlib.asynccontextmanager
    async def consumer(self, got: Got) -> AsyncIterator[None]:
        async with connected(self.job.url, 1) as redis, reading(lambda stop: self.loop(redis, got, stop)):
            yield

    async def loop(self, redis: Any, got: Got, stop: asyncio.Event) -> None:
        """Read and handle until *stop*."""
        name, alone = self.job.entity, self.work.handlers == 1

        async def handle(value: Any) -> None:
            got(value)

        async with asyncio.TaskGroup() as tasks:
            while not stop.is_set():
                if found := await redis.blpop(name, timeout=BLOCK / 1000):
                    if alone:
                        await handle(json.loads(found[1]))
                    else:
                        tasks.create_task(handle(json.loads(found[1])))


class RawListTyped(RawList):
    """The same with the codec that brokerkit uses."""

    name = "raw-list-typed"
    note = "as raw-list, with a dataclass and orjson instead of a dict and json"

    def item(self, value: Order) -> Any:
        return value

    def body(self, item: Any) -> Any:
        return orjson.dumps(item)


class RawListBytes(RawListTyped):
    """The same with bodies that are made before the clocks start."""

    name = "raw-list-bytes"
    note = "as raw-list, with 100 bytes that are made before"

    def item(self, value: Order) -> Any:
        return orjson.dumps(value)

    def body(self, item: Any) -> Any:
        return item
