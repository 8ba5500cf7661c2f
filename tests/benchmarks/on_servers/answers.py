"""What fresh processes find out for the probes on servers, through brokerkit's public interface."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Sequence
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
TOPICS: Final = 16
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
    times: list[float]
    """Seconds from the start to each of the samples behind the first."""
    seconds: float
    unsettled: int

    @property
    def grown(self) -> float:
        """MiB beyond those of the connected consumer that had not read anything."""
        return max(self.samples) - self.samples[0]

    @property
    def rate(self) -> float:
        """Messages a second, from the first fiftieth on: without connecting."""
        return self.handled * (len(self.times) - 1) / len(self.times) / (self.times[-1] - self.times[0])


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


def addresses(kind: str) -> Sequence[Topic[Order] | Queue[Order]]:
    """Return what is filled and consumed where *kind* is asked for."""
    if kind == "wide":
        return [Topic("bench-wide", Order, partitions=PARTITIONS)]
    if kind == "topics":
        return [Topic(f"bench-{number}", Order) for number in range(TOPICS)]
    if kind == "topic":
        return [Topic("bench", Order)]
    return [Queue(f"bench-{number}", Order) for number in range(QUEUES if kind == "queues" else 1)]


async def _fill(question: Ask) -> float:
    """Store *n* messages; return how long that took."""
    (address,) = addresses(question.kind)
    began = time.perf_counter()
    async with brokerkit.connect(question.url) as broker:
        for at in range(0, question.n, PAGE):
            values = [order(number, KEYS) for number in range(at, min(at + PAGE, question.n))]
            if isinstance(address, Topic):
                receipts = await broker.publish_many(
                    address, [address.outgoing(value, key=value.user) for value in values]
                )
            else:
                receipts = await broker.publish_many(address, values)
            for receipt in receipts:
                if isinstance(receipt, brokerkit.BrokerError):
                    raise receipt
    return time.perf_counter() - began


async def _drain(question: Ask) -> Drain:
    n = question.n
    found = Drain(handled=0, doubles=0, samples=[], times=[], seconds=0.0, unsettled=0)
    seen, reached, step = bytearray(n), asyncio.Event(), max(1, n // 50)
    service, began = Service(GROUP), 0.0

    async def handle(message: Message[Order]) -> None:
        number = message.value.n
        found.doubles += seen[number]
        found.handled += not seen[number]
        seen[number] = 1
        if not found.handled % step:
            found.samples.append(resident())
            found.times.append(time.perf_counter() - began)
            if found.handled == n:
                reached.set()

    (address,) = addresses(question.kind)
    _subscribe(service, address, prefetch=question.prefetch)(handle)
    async with brokerkit.connect(question.url) as broker:
        await _backlog(broker, address)
        found.samples.append(resident())
        began = time.perf_counter()
        async with service.running(broker):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reached.wait(), 200)
            found.seconds = time.perf_counter() - began
            await asyncio.sleep(0.25)
        found.unsettled = _unsettled(await _backlog(broker, address))
    return found


def _unsettled(backlog: Backlog) -> int:
    return (backlog.waiting or 0) + (backlog.in_flight or 0) + (backlog.delayed or 0) + (backlog.dead or 0)


async def _backlog(broker: Broker, address: Topic[Order] | Queue[Order]) -> Backlog:
    return await (broker.backlog(address, GROUP) if isinstance(address, Topic) else broker.backlog(address))


def _subscribe(
    service: Service[Any],
    address: Topic[Order] | Queue[Order],
    concurrency: int = HANDLERS,
    prefetch: int | None = None,
) -> Any:
    options: dict[str, Any] = {} if prefetch is None else {"prefetch": prefetch}
    if isinstance(address, Topic):
        return service.subscribe(address, concurrency=concurrency, **options)
    return service.subscribe(address, concurrency=concurrency, **options)


async def _idle(question: Ask) -> float:
    """Return the share of a core that consumers take which have nothing to do."""
    service = Service(GROUP)

    async def handle(message: Message[Order]) -> None:
        raise AssertionError("nothing was published")

    for kind in question.kind.split():
        for address in addresses(kind):
            _subscribe(service, address)(handle)
    async with brokerkit.connect(question.url) as broker, service.running(broker):
        await asyncio.sleep(1)
        wall, cpu = time.perf_counter(), time.process_time()
        await asyncio.sleep(question.seconds)
        return (time.process_time() - cpu) / (time.perf_counter() - wall)


async def _crowd(question: Ask) -> Crowd:
    """Run *n* consumers, each with a broker of its own, or one broker where there are many addresses, until the input ends."""
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
        if len(addresses(question.kind)) > 1:
            service = Service(GROUP)
            for number, address in enumerate(addresses(question.kind)):
                _subscribe(service, address, 10)(handler(number))
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
    (address,) = addresses(question.kind)
    _subscribe(service, address, 10)(handle)
    async with brokerkit.connect(question.url) as broker, service.running(broker):
        yield


async def _feed(question: Ask) -> float:
    """Publish `PACED` messages slowly and *n* at once; return how long those take until all are handled."""
    n, to = question.n, addresses(question.kind)
    async with brokerkit.connect(question.url) as broker:

        async def one(value: Order) -> None:
            address = to[value.n % len(to)]
            if isinstance(address, Topic):
                await broker.publish(address, value, key=value.user)
            else:
                await broker.publish(address, value)

        async def backlog() -> int:
            return sum([_unsettled(await _backlog(broker, address)) for address in to])

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
