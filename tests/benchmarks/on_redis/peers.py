"""Other libraries on Redis, each set up as its documentation recommends for speed with an acknowledgement per message."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from ..on_servers.client import GROUP, PAGE, Client, Got, Publisher, dumps
from ..on_servers.libraries import FastStreamClient, TaskiqClient
from .raw import CONSUMER, Lists, Streams
from .server import client


@contextlib.asynccontextmanager
async def _faststream(url: str, connections: int) -> AsyncIterator[tuple[Any, Any]]:
    """Yield a broker that publishes, and its client, whose pool is warm."""
    from faststream.redis import RedisBroker

    silent: Any = None
    broker: Any = RedisBroker(url, logger=silent)
    redis = await broker.connect()
    await asyncio.gather(*[redis.ping() for _ in range(connections)])
    try:
        yield broker, redis
    finally:
        await broker.stop()


class _FastStream(FastStreamClient):
    """What its two rows share."""

    def broker(self) -> Any:
        from faststream.redis import RedisBroker

        silent: Any = None
        return RedisBroker(self.job.url, logger=silent)


class FastStreamStream(_FastStream, Streams):
    """FastStream on a stream with a group."""

    name = "faststream-stream"
    note = (
        "StreamSub(group, consumer, max_records=100), NACK_ON_ERROR, max_workers=handlers; many: publish(pipeline=) of 100, "
        "as its publish_batch is for lists only"
    )

    def subscribe(self, broker: Any) -> Any:
        from faststream import AckPolicy
        from faststream.redis import StreamSub

        stream = StreamSub(self.job.entity, group=GROUP, consumer=CONSUMER, max_records=100)
        return broker.subscriber(stream=stream, max_workers=self.work.handlers, ack_policy=AckPolicy.NACK_ON_ERROR)

    @contextlib.asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        name = self.job.entity
        async with _faststream(self.job.url, self.work.handlers if self.work.stores else 1) as (broker, redis):

            async def many(items: Sequence[Any]) -> None:
                async with redis.pipeline(transaction=False) as pipe:
                    for item in items:
                        await broker.publish(item, stream=name, pipeline=pipe)
                    await pipe.execute()

            yield Publisher(lambda item: broker.publish(item, stream=name), many)


class FastStreamList(_FastStream, Lists):
    """FastStream on a list."""

    name = "faststream-list"
    note = "list=: BLPOP, at most once; many: publish_batch of 100"

    def subscribe(self, broker: Any) -> Any:
        return broker.subscriber(list=self.job.entity, max_workers=self.work.handlers)

    @contextlib.asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        name = self.job.entity
        async with _faststream(self.job.url, self.work.handlers if self.work.stores else 1) as (broker, _):
            yield Publisher(
                lambda item: broker.publish(item, list=name),
                lambda items: broker.publish_batch(*items, list=name),
            )


class TaskiqStream(TaskiqClient, Streams):
    """taskiq on a stream with a group."""

    name = "taskiq-stream"
    note = "RedisStreamBroker, Receiver(max_async_tasks=handlers, WHEN_EXECUTED), no results; many: gather of 100 kiq()"

    def broker(self) -> Any:
        from taskiq_redis import RedisStreamBroker

        return RedisStreamBroker(
            self.job.url,
            queue_name=self.job.entity,
            consumer_group_name=GROUP,
            consumer_name=CONSUMER,
            consumer_id="0",
        )


class TaskiqList(TaskiqClient, Lists):
    """taskiq on a list."""

    name = "taskiq-list"
    note = "ListQueueBroker: LPUSH and BRPOP, at most once; many: gather of 100 kiq()"

    def broker(self) -> Any:
        from taskiq_redis import ListQueueBroker

        return ListQueueBroker(self.job.url, queue_name=self.job.entity)


class Streaq(Client):
    """streaq, on coredis."""

    peer = True
    name = "streaq"
    note = (
        "Worker(concurrency=handlers), JSON serializer, task(ttl=0, silent=True): no results; many: enqueue_many of 100"
    )
    least = 200

    def worker(self, got: Got, concurrency: int = 16) -> tuple[Any, Any]:
        """Return the worker and its task."""
        import json

        import streaq

        logging.disable(logging.WARNING)
        make: Any = streaq.Worker
        worker = make(
            redis_url=self.job.url,
            queue_name=self.job.entity,
            concurrency=concurrency,
            serializer=dumps,
            deserializer=json.loads,
            handle_signals=False,
        )

        async def handle(value: dict[str, Any]) -> None:
            got(value)

        return worker, worker.task(name="bench", ttl=0, silent=True)(handle)

    @contextlib.asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        worker, task = self.worker(lambda value: None)

        async def one(item: Any) -> None:
            await task.enqueue(item)

        async with worker:
            yield Publisher(one, lambda items: worker.enqueue_many([task.enqueue(item) for item in items]))

    @contextlib.asynccontextmanager
    async def consumer(self, got: Got) -> AsyncIterator[None]:
        import anyio

        worker, _ = self.worker(got, self.work.handlers)
        async with anyio.create_task_group() as tasks:
            await tasks.start(worker.run_async)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()

    @property
    def stream(self) -> str:
        """Its stream."""
        return f"streaq:{self.job.entity}:queues:normal"

    def found(self) -> Iterator[bytes]:
        with client(self.job.url) as asking:
            after = "-"
            while page := asking.xrange(self.stream, min=after, count=PAGE):
                ids = [fields[b"task_id"].decode() for _, fields in page]
                yield from (
                    value or b"" for value in asking.mget([f"streaq:{self.job.entity}:task:data:{one}" for one in ids])
                )
                after = f"({page[-1][0].decode()}"

    def pending(self) -> int:
        with client(self.job.url) as asking:
            return int(asking.xpending(self.stream, "workers")["pending"])
