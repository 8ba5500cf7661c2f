"""What fresh processes do for the probe of how consumers share a queue."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import Final

import msgspec
import uvloop

import brokerkit
from brokerkit import Message, Queue, Service

from ..job import Order, order
from ..on_servers.client import PAGE
from ..probes import READY, Ask

SHARED: Final = Queue("bench-shared", Order)
HANDLERS: Final = 10
"""Of each consumer, at once."""
PREFETCH: Final = 20
TAKES: Final = 0.02
"""Seconds that a handler takes."""
PATIENCE: Final = 120.0


class Shared(msgspec.Struct):
    """What the consumers of one process saw, each for itself."""

    seen: list[list[int]]


def expected(consumers: int) -> float:
    """Return how many messages a second so many handle if none of them ever waits."""
    return consumers * HANDLERS / TAKES


def answer(question: Ask) -> bytes:
    """Answer *question*, in JSON."""
    work = {"consume": _consume, "feed": _feed}[question.what]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return msgspec.json.encode(runner.run(work(question)))


async def _consume(question: Ask) -> Shared:
    """Run *n* consumers, each with a broker of its own, until the input ends."""
    found = Shared(seen=[[] for _ in range(question.n)])
    async with contextlib.AsyncExitStack() as stack:
        for seen in found.seen:
            broker = await stack.enter_async_context(brokerkit.connect(question.url))
            await stack.enter_async_context(_service(seen).running(broker))
        print(READY, flush=True)
        await asyncio.to_thread(sys.stdin.read)
    return found


def _service(seen: list[int]) -> Service[None]:
    service = Service("bench")

    @service.subscribe(SHARED, concurrency=HANDLERS, prefetch=PREFETCH)
    async def handle(message: Message[Order]) -> None:
        await asyncio.sleep(TAKES)
        seen.append(message.value.n)

    return service


async def _feed(question: Ask) -> float:
    """Publish *n* messages as quickly as it goes; return how long it takes until all are handled."""
    began = time.perf_counter()
    async with brokerkit.connect(question.url) as broker:
        for at in range(0, question.n, PAGE):
            values = [order(number) for number in range(at, min(at + PAGE, question.n))]
            for receipt in await broker.publish_many(SHARED, values):
                if isinstance(receipt, brokerkit.BrokerError):
                    raise receipt
        async with asyncio.timeout(PATIENCE):
            while (left := await broker.backlog(SHARED)).waiting or left.in_flight or left.delayed:
                await asyncio.sleep(0.05)
    return time.perf_counter() - began
