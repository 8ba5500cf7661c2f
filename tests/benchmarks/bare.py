"""The yardstick of rows in one process: the same work without a broker."""

from __future__ import annotations

import asyncio

import msgspec
import orjson

from .feeding import paced
from .frame import Row
from .job import Order


class Bare(Row):
    """What the same work costs without any broker: nothing is acknowledged, ordered, retried or bounded in time."""

    name = "bare"
    note = "asyncio.Queue(1000) of bytes, orjson.dumps, msgspec decode, one task per handler; the yardstick"

    async def run(self) -> None:
        job, work = self.job, self.work
        got = job.timer() if work.metric == "latency" else job.counter()
        queue: asyncio.Queue[bytes] = asyncio.Queue(1000)
        decode = msgspec.json.Decoder(Order).decode

        async def handle(value: Order) -> None:
            if work.yields:
                await asyncio.sleep(0)
            got(value)

        async def consume() -> None:
            while True:
                await handle(decode(await queue.get()))

        async def publish(value: Order) -> None:
            await queue.put(orjson.dumps(value))

        values = job.values()
        async with asyncio.TaskGroup() as tasks:
            consumers = [tasks.create_task(consume()) for _ in range(work.handlers)]
            job.begin()
            if work.metric == "latency":
                await paced(values, publish)
            else:
                for value in values:
                    await queue.put(orjson.dumps(value))
            await job.finish()
            for consumer in consumers:
                consumer.cancel()
        job.unsettled = queue.qsize()
