"""brokerkit's rows, on whatever backend the URL names."""

from __future__ import annotations

import asyncio

import brokerkit
from brokerkit import Message, Queue, Service, Topic

from .feeding import paced
from .frame import Row
from .job import Order


class Brokerkit(Row):
    """Ours; with `Work.keyed` a topic with a durable group, else a queue."""

    name = "brokerkit"
    ordered = True

    async def run(self) -> None:
        job, work = self.job, self.work
        got = job.timer() if work.metric == "latency" else job.counter()
        service = Service("bench")

        async def plain(message: Message[Order]) -> None:
            got(message.value)

        async def yielding(message: Message[Order]) -> None:
            await asyncio.sleep(0)
            got(message.value)

        handler = yielding if work.yields else plain
        topic, queue = Topic(job.entity, Order), Queue(job.entity, Order)
        if work.keyed:
            service.subscribe(topic, concurrency=work.handlers)(handler)
        else:
            service.subscribe(queue, concurrency=work.handlers)(handler)
        async with brokerkit.connect(job.url) as broker:
            async with service.running(broker):
                values = job.values()
                if work.metric == "latency":
                    job.begin()
                    await paced(values, lambda value: broker.publish(queue, value))
                elif work.batch > 1:
                    job.begin()
                    for at in range(0, job.n, work.batch):
                        some = values[at : at + work.batch]
                        if work.keyed:
                            await broker.publish_many(topic, [topic.outgoing(one, key=one.user) for one in some])
                        else:
                            await broker.publish_many(queue, some)
                        await job.room(at + work.batch)
                elif work.keyed:
                    job.begin()
                    for n, value in enumerate(values):
                        await broker.publish(topic, value, key=value.user)
                        await job.room(n)
                else:
                    job.begin()
                    for n, value in enumerate(values):
                        await broker.publish(queue, value)
                        await job.room(n)
                await job.finish()
            backlog = await (broker.backlog(topic, "bench") if work.keyed else broker.backlog(queue))
            job.unsettled = (backlog.waiting or 0) + (backlog.in_flight or 0) + (backlog.delayed or 0)
            job.unsettled += backlog.dead or 0
