"""Queues on Redis: many of them, many consumers, and what they cost while nothing happens."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest

from tests.servers import FLAVORS, RedisServer

from .queues import SOON, declare, done, ids, left, process, queue

pytestmark = pytest.mark.asyncio
QUEUE = queue(lease=60)


@pytest.fixture(scope="module", params=FLAVORS)
def running(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(request.param) as started:
        yield started


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    running.clear()
    return running


async def test_a_hundred_consumers_of_a_queue_get_each_message_once(server: RedisServer) -> None:
    await declare(server, QUEUE)
    seen: Counter[str] = Counter()
    async with (
        process(server) as p,
        process(server) as publisher,
        AsyncExitStack() as stack,
        asyncio.TaskGroup() as tasks,
    ):
        consumers = [await stack.enter_async_context(p.consume(QUEUE, 10)) for _ in range(100)]

        async def work(number: int) -> None:
            while seen.total() < 5000:
                got = await consumers[number].receive(10, 0.1)
                await asyncio.sleep(0.001 * (number % 5))
                seen.update(ids(got))
                await done(consumers[number], got)

        for number in range(100):
            tasks.create_task(work(number))
        for start in range(0, 5000, 100):
            await publisher.put(QUEUE, [str(n) for n in range(start, start + 100)])
    assert seen == Counter(str(n) for n in range(5000))
    assert await left(server, QUEUE) == []


async def test_of_a_hundred_that_wait_one_is_woken_by_a_message(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p, AsyncExitStack() as stack:
        consumers = [await stack.enter_async_context(p.consume(QUEUE, 10)) for _ in range(100)]
        waiting = [asyncio.ensure_future(consumer.receive(10, SOON)) for consumer in consumers]
        await asyncio.sleep(0.2)
        before = await calls(server)
        for n in range(50):
            await p.put(QUEUE, [str(n)])
        async with asyncio.timeout(SOON):
            while sum(task.done() for task in waiting) < 50:
                await asyncio.sleep(0.01)
        assert await calls(server) - before <= 50 + 50 + 20, "scripts for 50 messages that are published and taken"
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def calls(server: RedisServer) -> int:
    """Return how many scripts were run."""
    info: bytes = await server.command("INFO", "commandstats")
    (line,) = [line for line in info.decode().splitlines() if line.startswith("cmdstat_evalsha:")]
    return int(line.partition("calls=")[2].partition(",")[0])


async def test_a_hundred_queues_that_are_idle_cost_little(server: RedisServer) -> None:
    queues = [queue(f"queue{n}", lease=60) for n in range(100)]
    await declare(server, *queues)
    async with process(server) as p, AsyncExitStack() as stack:
        consumers = [await stack.enter_async_context(p.consume(each)) for each in queues]
        waiting = [asyncio.ensure_future(consumer.receive(10, 60)) for consumer in consumers]
        await asyncio.sleep(1.1)
        began, before = time.process_time(), await calls(server)
        await asyncio.sleep(3)
        spent = (time.process_time() - began) / 3
        assert spent < 0.05, f"{100 * spent:.1f} % of a core"
        assert await calls(server) - before <= 4 * 100
        await p.put(queues[50], ["m"])
        assert ids(await waiting[50]) == ["m"]
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
