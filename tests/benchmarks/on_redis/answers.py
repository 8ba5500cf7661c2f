"""What fresh processes find out for the probes on Redis, through brokerkit's public interface."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import msgspec
import uvloop

import brokerkit
from brokerkit import Backlog, Broker, Message, Queue, Service, Topic

from ..answers import resident
from ..feeding import paced
from ..job import Order, order
from ..probes import READY, Ask
from .client import GROUP, PAGE

KEYS: Final = 1000
QUEUES: Final = 100
PARTITIONS: Final = 128
PACED: Final = 400
"""Messages at the rate of `paced`, whose way to the handler is timed, before the burst."""
HANDLERS: Final = 100


class Drain(msgspec.Struct):
    """How a stored backlog was consumed."""

    handled: int
    doubles: int
    samples: list[float]
    """MiB resident, from before the first message on."""
    seconds: float
    unsettled: int

    @property
    def grown(self) -> float:
        """MiB beyond those of the connected consumer that had not read anything."""
        return max(self.samples) - self.samples[0]


class Crowd(msgspec.Struct):
    """What the consumers of one process saw."""

    seen: list[int]
    delays: list[int]
    """Nanoseconds from publish to handler of those that were timed."""
    busy: int
    """How many of its consumers handled anything."""


def answer(question: Ask) -> bytes:
    """Answer *question*, in JSON."""
    work = {"fill": _fill, "drain": _drain, "idle": _idle, "crowd": _crowd, "feed": _feed}[question.what]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return msgspec.json.encode(runner.run(work(question)))


def queue(number: int = 0) -> Queue[Order]:
    """Return one of the queues."""
    return Queue(f"bench-{number}", Order)


TOPIC: Final = Topic("bench", Order)
WIDE: Final = Topic("bench-wide", Order, partitions=PARTITIONS)


async def _fill(question: Ask) -> float:
    """Store *n* messages in the queue or the topic."""
    began = time.perf_counter()
    async with brokerkit.connect(question.url) as broker:
        for at in range(0, question.n, PAGE):
            values = [order(number, KEYS) for number in range(at, min(at + PAGE, question.n))]
            if question.kind == "topic":
                receipts = await broker.publish_many(TOPIC, [TOPIC.outgoing(value, key=value.user) for value in values])
            else:
                receipts = await broker.publish_many(queue(), values)
            for receipt in receipts:
                if isinstance(receipt, brokerkit.BrokerError):
                    raise receipt
    return time.perf_counter() - began


async def _drain(question: Ask) -> Drain:
    n = question.n
    found = Drain(handled=0, doubles=0, samples=[], seconds=0.0, unsettled=0)
    seen, reached, step = bytearray(n), asyncio.Event(), max(1, n // 50)
    service = Service(GROUP)

    async def handle(message: Message[Order]) -> None:
        number = message.value.n
        found.doubles += seen[number]
        found.handled += not seen[number]
        seen[number] = 1
        if not found.handled % step:
            found.samples.append(resident())
            if found.handled == n:
                reached.set()

    _subscribe(service, question.kind)(handle)
    async with brokerkit.connect(question.url) as broker:
        await _backlog(broker, question.kind)
        found.samples.append(resident())
        began = time.perf_counter()
        async with service.running(broker):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reached.wait(), 200)
            found.seconds = time.perf_counter() - began
            await asyncio.sleep(0.25)
        backlog = await _backlog(broker, question.kind)
        found.unsettled = _unsettled(backlog)
    return found


def _unsettled(backlog: Backlog) -> int:
    return (backlog.waiting or 0) + (backlog.in_flight or 0) + (backlog.delayed or 0) + (backlog.dead or 0)


async def _backlog(broker: Broker, kind: str) -> Backlog:
    if kind in {"topic", "wide"}:
        return await broker.backlog(TOPIC if kind == "topic" else WIDE, GROUP)
    return await broker.backlog(queue())


def _subscribe(service: Service[Any], kind: str, concurrency: int = HANDLERS) -> Callable[[Any], Any]:
    if kind in {"topic", "wide"}:
        return service.subscribe(TOPIC if kind == "topic" else WIDE, concurrency=concurrency)
    return service.subscribe(queue(), concurrency=concurrency)


async def _idle(question: Ask) -> float:
    """Return the share of a core that consumers take which have nothing to do."""
    service = Service(GROUP)

    async def handle(message: Message[Order]) -> None:
        raise AssertionError("nothing was published")

    _subscribe(service, "topic")(handle)
    _subscribe(service, "queue")(handle)
    async with brokerkit.connect(question.url) as broker, service.running(broker):
        await asyncio.sleep(1)
        wall, cpu = time.perf_counter(), time.process_time()
        await asyncio.sleep(question.seconds)
        return (time.process_time() - cpu) / (time.perf_counter() - wall)


async def _crowd(question: Ask) -> Crowd:
    """Run *n* consumers, each with a broker of its own, or one broker with *n* queues, until the input ends."""
    found = Crowd(seen=[], delays=[], busy=0)
    busy: set[int] = set()

    def handler(number: int) -> Any:
        async def handle(message: Message[Order]) -> None:
            value = message.value
            if value.t:
                found.delays.append(time.monotonic_ns() - value.t)
            found.seen.append(value.n)
            busy.add(number)

        return handle

    async with contextlib.AsyncExitStack() as stack:
        if question.kind == "queues":
            service = Service(GROUP)
            for number in range(question.n):
                service.subscribe(queue(number), concurrency=10)(handler(number))
            broker = await stack.enter_async_context(brokerkit.connect(question.url))
            await stack.enter_async_context(service.running(broker))
        else:
            await asyncio.gather(*[stack.enter_async_context(_member(question, handler(n))) for n in range(question.n)])
        print(READY, flush=True)
        await asyncio.to_thread(sys.stdin.read)
    found.busy = len(busy)
    return found


@contextlib.asynccontextmanager
async def _member(question: Ask, handle: Any) -> AsyncIterator[None]:
    service = Service(GROUP)
    _subscribe(service, question.kind, 10)(handle)
    async with brokerkit.connect(question.url) as broker, service.running(broker):
        yield


async def _feed(question: Ask) -> float:
    """Publish `PACED` messages slowly and *n* at once; return how long those take until all are handled."""
    n, kind = question.n, question.kind
    queues = [queue(number) for number in range(QUEUES if kind == "queues" else 1)]
    async with brokerkit.connect(question.url) as broker:

        async def one(value: Order) -> None:
            if kind == "wide":
                await broker.publish(WIDE, value, key=value.user)
            else:
                await broker.publish(queues[value.n % len(queues)], value)

        async def backlog() -> int:
            if kind == "wide":
                return _unsettled(await broker.backlog(WIDE, GROUP))
            return sum([_unsettled(await broker.backlog(one)) for one in queues])

        await paced([order(number, KEYS) for number in range(PACED)], one)
        began = time.perf_counter()
        values = iter([order(number, KEYS) for number in range(PACED, PACED + n)])

        async def some() -> None:
            for value in values:
                await one(value)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(HANDLERS):
                tasks.create_task(some())
        async with asyncio.timeout(120):
            while await backlog():
                await asyncio.sleep(0.02)
        return time.perf_counter() - began
