"""What fresh processes find out for the probes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import msgspec
import uvloop

import brokerkit
from brokerkit import Message, Queue, Service, Topic

from .job import WINDOW, Order, order
from .probes import Ask, Growth


def answer(question: Ask) -> bytes:
    """Answer *question*, in JSON."""

    async def main() -> object:
        return await _grow(question.kind, question.n) if question.what == "memory" else await _idle(question.seconds)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return msgspec.json.encode(runner.run(main()))


def resident() -> float:
    """Return the MiB of memory that this process holds."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096 / 2**20


async def _grow(kind: str, n: int) -> Growth:
    growth = Growth(handled=0, doubles=0, samples=[], seconds=0.0)
    seen = bytearray(n)
    reached = asyncio.Event()
    mark = n
    service = Service("bench")
    topic, queue = Topic("bench", Order), Queue("bench", Order)

    async def handle(message: Message[Order]) -> None:
        number = message.value.n
        growth.doubles += seen[number]
        growth.handled += not seen[number]
        seen[number] = 1
        if growth.handled == mark:
            reached.set()

    async def until(count: int) -> None:
        nonlocal mark
        mark = count
        reached.clear()
        if growth.handled < count:
            await asyncio.wait_for(reached.wait(), 60)

    if kind == "topic":
        service.subscribe(topic, concurrency=10)(handle)
    else:
        service.subscribe(queue, concurrency=10)(handle)

    async with brokerkit.connect("memory://") as broker:
        async with service.running(broker):
            began = time.perf_counter()
            for at in range(0, n, 100):
                values: Sequence[Order] = [order(number) for number in range(at, at + 100)]
                if kind == "topic":
                    await broker.publish_many(topic, [topic.outgoing(value, key=value.user) for value in values])
                else:
                    await broker.publish_many(queue, values)
                if at + 100 - growth.handled > WINDOW:
                    await until(at + 100 - WINDOW // 2)
                if (at + 100) % (n // 50) == 0:
                    growth.samples.append(resident())
            await until(n)
            growth.seconds = time.perf_counter() - began
    return growth


async def _idle(seconds: float) -> float:
    service = Service("bench")

    async def handle(message: Message[Order]) -> None:
        raise AssertionError("nothing was published")

    service.subscribe(Topic("events", Order), concurrency=100)(handle)
    service.subscribe(Queue("work", Order), concurrency=100)(handle)
    async with brokerkit.connect("memory://") as broker, service.running(broker):
        await asyncio.sleep(0.2)
        wall, cpu = time.perf_counter(), time.process_time()
        await asyncio.sleep(seconds)
        return (time.process_time() - cpu) / (time.perf_counter() - wall)
