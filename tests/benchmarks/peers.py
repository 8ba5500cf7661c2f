"""In-memory brokers of other libraries."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from .feeding import chunks, spread
from .frame import Row
from .job import Order


class FastStream(Row):
    """FastStream's in-memory test broker."""

    peer = True
    name = "faststream"
    note = (
        "TestRedisBroker: publish runs the handler itself (100 at once: published from 100 tasks); queue: a list, topic: a "
        "stream with a group, many: publish_batch, which it has for lists only"
    )

    async def run(self) -> None:
        from faststream import AckPolicy
        from faststream.redis import RedisBroker, StreamSub, TestRedisBroker

        job, work, name = self.job, self.work, self.job.entity
        got = job.counter()
        silent: Any = None
        broker = RedisBroker(logger=silent)

        async def handle(value: Order) -> None:
            if work.yields:
                await asyncio.sleep(0)
            got(value)

        if work.keyed:
            stream = StreamSub(name, group="bench", consumer="one")
            broker.subscriber(stream=stream, ack_policy=AckPolicy.NACK_ON_ERROR)(handle)
        else:
            broker.subscriber(list=name)(handle)
        values = job.values()
        async with TestRedisBroker(broker) as testing:
            job.begin()
            if work.batch > 1:
                batches = list(chunks(values, work.batch))
                await spread(batches, work.handlers, lambda batch: testing.publish_batch(*batch, list=name))
            elif work.keyed:
                await spread(values, work.handlers, lambda value: testing.publish(value, stream=name))
            else:
                await spread(values, work.handlers, lambda value: testing.publish(value, list=name))
            await job.finish()


class Taskiq(Row):
    """taskiq's in-memory broker."""

    peer = True
    name = "taskiq"
    note = "InMemoryBroker(await_inplace=True): kiq runs the task itself (100 at once: sent from 100 tasks); has no batches"

    async def run(self) -> None:
        from taskiq import InMemoryBroker

        job, work = self.job, self.work
        got = job.counter()
        logging.disable(logging.WARNING)
        broker = InMemoryBroker(await_inplace=True)

        @broker.task(task_name=job.entity)
        async def handle(value: Order) -> None:
            if work.yields:
                await asyncio.sleep(0)
            got(value)

        values = job.values()
        await broker.startup()
        job.begin()
        await spread(values, work.handlers, lambda value: handle.kiq(value))
        await job.finish()
        await broker.shutdown()
