"""The yardstick: aiokafka, used as its documentation shows, with nothing in between."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar, Final

import msgspec
import orjson

from ..job import Order
from ..on_servers.client import Got, Publisher, dumps, reading
from .log import Log
from .server import bootstrap

BIG: Final = 900_000
"""`max_batch_size` of those that send whole batches: the default of 16384 holds about a hundred messages."""
AT_ONCE: Final = 100
"""Messages that a consumer takes at a time."""
WAIT: Final = 100
"""Milliseconds that it waits for them, so that it can end."""


class Raw(Log):
    """aiokafka alone."""

    name = "raw"
    note = (
        "aiokafka, acks=1, no linger, json. send_and_wait; many: create_batch and send_batch, with max_batch_size raised; "
        "consuming: getmany(max_records=100), handlers one by one or 100 tasks of them, then one commit"
    )
    settings: ClassVar[dict[str, Any]] = {}
    automatic: ClassVar[bool] = False

    def body(self, item: Any) -> bytes:
        """Return what is stored for *item*."""
        return dumps(item).encode()

    def read(self, body: bytes) -> Any:
        """Return what the handler sees."""
        return json.loads(body)

    def key(self, item: Any) -> bytes | None:
        """Return the key of *item*."""
        return item["user"].encode() if self.work.keyed else None

    @contextlib.asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        from aiokafka import AIOKafkaProducer

        name, body, key = self.job.entity, self.body, self.key
        batches = {} if self.work.stores and self.work.batch == 1 else {"max_batch_size": BIG}
        async with AIOKafkaProducer(bootstrap_servers=bootstrap(self.job.url), **batches, **self.settings) as producer:
            # What a first publish would do besides is no part of what is measured.
            partitions = sorted(await producer.partitions_for(name))
            await asyncio.gather(*[producer.client.ready(one.nodeId) for one in producer.client.cluster.brokers()])

            if self.work.keyed:

                def one(item: Any) -> Any:
                    return producer.send_and_wait(name, body(item), key=key(item))

            else:

                def one(item: Any) -> Any:
                    return producer.send_and_wait(name, body(item))

            yield Publisher(one, self.many(producer, partitions))

    def many(self, producer: Any, partitions: Sequence[int]) -> Any:
        """Return how many messages are published."""
        from aiokafka.partitioner import DefaultPartitioner

        name, body, key, turns = self.job.entity, self.body, self.key, itertools.cycle(partitions)
        choose: Any = DefaultPartitioner()

        async def send(partition: int, items: Sequence[Any]) -> None:
            under_way, batch = [], producer.create_batch()
            for item in items:
                value = body(item)
                if batch.append(key=key(item), value=value, timestamp=None) is None:
                    under_way.append(await producer.send_batch(batch, name, partition=partition))
                    batch = producer.create_batch()
                    batch.append(key=key(item), value=value, timestamp=None)
            under_way.append(await producer.send_batch(batch, name, partition=partition))
            await asyncio.gather(*under_way)

        async def many(items: Sequence[Any]) -> None:
            if len(partitions) == 1 or not self.work.keyed:
                await send(next(turns), items)
                return
            parted: dict[int, list[Any]] = {}
            for item in items:
                parted.setdefault(choose(key(item), partitions, partitions), []).append(item)
            await asyncio.gather(*[send(partition, some) for partition, some in parted.items()])

        return many

    @contextlib.asynccontextmanager
    async def consumer(self, got: Got) -> AsyncIterator[None]:
        from aiokafka import AIOKafkaConsumer

        async with AIOKafkaConsumer(
            self.job.entity,
            bootstrap_servers=bootstrap(self.job.url),
            group_id=self.group,
            enable_auto_commit=self.automatic,
            auto_offset_reset="earliest",
        ) as consumer:
            async with reading(lambda stop: self.loop(consumer, got, stop)):
                yield

    async def loop(self, consumer: Any, got: Got, stop: asyncio.Event) -> None:
        """Read and handle until *stop*."""
        read, alone = self.read, self.work.handlers == 1

        async def handle(value: Any) -> None:
            got(value)

        while not stop.is_set():
            found = await consumer.getmany(timeout_ms=WAIT, max_records=AT_ONCE)
            for messages in found.values():
                if alone:
                    for message in messages:
                        await handle(read(message.value))
                else:
                    await asyncio.gather(*[handle(read(message.value)) for message in messages])
            if found:
                await self.settle(consumer, {place: messages[-1].offset + 1 for place, messages in found.items()})

    async def settle(self, consumer: Any, offsets: dict[Any, int]) -> None:
        """Note that all before *offsets* is done."""
        await consumer.commit(offsets)


class RawTyped(Raw):
    """The same with the codecs that brokerkit uses: what the yardstick would be with those."""

    name = "raw-typed"
    note = "as raw, with a dataclass, orjson and msgspec instead of a dict and json"

    def item(self, value: Order) -> Any:
        return value

    def body(self, item: Any) -> bytes:
        return orjson.dumps(item)

    def key(self, item: Any) -> bytes | None:
        return item.user.encode() if self.work.keyed else None

    def got(self) -> Got:
        self.decode = msgspec.json.Decoder(Order).decode
        return self.job.timer() if self.work.metric == "latency" else self.job.counter()

    def read(self, body: bytes) -> Any:
        return self.decode(body)


class RawSafe(Raw):
    """With the promises of brokerkit's publishing."""

    name = "raw-safe"
    note = "as raw, with acks=all and enable_idempotence, as brokerkit publishes"
    settings = {"acks": "all", "enable_idempotence": True}


class RawSend(Raw):
    """Leaves batches to aiokafka."""

    name = "raw-send"
    note = "as raw; many: send of each message, then gather of the futures"

    def many(self, producer: Any, partitions: Sequence[int]) -> Any:
        name, body, key = self.job.entity, self.body, self.key

        async def many(items: Sequence[Any]) -> None:
            await asyncio.gather(*[await producer.send(name, body(item), key=key(item)) for item in items])

        return many


class RawEach(Raw):
    """Commits each message."""

    name = "raw-each"
    note = "as raw, with a commit after each handler"
    least = 200

    async def loop(self, consumer: Any, got: Got, stop: asyncio.Event) -> None:
        read = self.read

        async def handle(value: Any) -> None:
            got(value)

        while not stop.is_set():
            for place, messages in (await consumer.getmany(timeout_ms=WAIT, max_records=AT_ONCE)).items():
                for message in messages:
                    await handle(read(message.value))
                    await consumer.commit({place: message.offset + 1})


class RawAutomatic(Raw):
    """Leaves commits to aiokafka."""

    name = "raw-automatic"
    note = "as raw, committed each 5 s whether handled or not: not at least once"
    automatic = True

    async def settle(self, consumer: Any, offsets: dict[Any, int]) -> None:
        pass
