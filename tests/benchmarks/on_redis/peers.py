"""Other libraries on Redis, each set up as its documentation recommends for speed with an acknowledgement per message."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from .client import CONSUMER, GROUP, PAGE, Client, Got, Publisher
from .raw import Lists, Streams, dumps
from .server import client


class _FastStream(Client):
    """What its two rows share."""

    peer = True

    def subscribe(self, broker: Any) -> Any:
        """Return the decorator of handlers."""
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def consumer(self, got: Got) -> AsyncIterator[None]:
        from faststream.redis import RedisBroker

        silent: Any = None
        broker: Any = RedisBroker(self.job.url, logger=silent)

        # A dict is what it decodes quickest to.
        async def handle(value: dict[str, Any]) -> None:
            got(value)

        self.subscribe(broker)(handle)
        await broker.start()
        try:
            yield
        finally:
            await broker.stop()


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


class _Taskiq(Client):
    """What its two rows share."""

    peer = True
    least = 200

    def broker(self) -> Any:
        """Return the broker."""
        raise NotImplementedError

    def task(self, got: Got) -> tuple[Any, Any]:
        """Return the broker and its task."""
        logging.disable(logging.WARNING)
        broker = self.broker()

        async def handle(value: dict[str, Any]) -> None:
            got(value)

        return broker, broker.task(task_name="bench")(handle)

    @contextlib.asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        broker, task = self.task(lambda value: None)
        await broker.startup()
        try:
            yield Publisher(task.kiq, lambda items: asyncio.gather(*[task.kiq(item) for item in items]))
        finally:
            await broker.shutdown()

    @contextlib.asynccontextmanager
    async def consumer(self, got: Got) -> AsyncIterator[None]:
        from taskiq.acks import AcknowledgeType
        from taskiq.receiver import Receiver

        broker, _ = self.task(got)
        broker.is_worker_process = True
        await broker.startup()
        receiver = Receiver(
            broker,
            max_async_tasks=self.work.handlers,
            run_startup=False,
            ack_type=AcknowledgeType.WHEN_EXECUTED,
        )
        finish = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(receiver.listen(finish))
            try:
                yield
            finally:
                finish.set()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(listening, 8)
                await broker.shutdown()


class TaskiqStream(_Taskiq, Streams):
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


class TaskiqList(_Taskiq, Lists):
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
