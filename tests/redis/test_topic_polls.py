"""Readers of topics that nobody tells of anything: when they look, and how many writes that takes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from brokerkit.drivers.redis._link import POLL, Link
from brokerkit.drivers.redis._scripts import TOPIC_READ
from brokerkit.drivers.redis._topic import TopicConsumer
from tests.servers import FLAVORS, RedisServer

from .queues import SOON, Process, process
from .topics import GROUP, consume, declare, ids, topic

pytestmark = pytest.mark.asyncio
SLACK = 0.5
"""Seconds that a busy machine takes for a look."""


@pytest.fixture(scope="module", params=FLAVORS)
def running(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(request.param) as started:
        yield started


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    running.clear()
    return running


def deafen(p: Process, consumer: TopicConsumer) -> None:
    """Let *consumer* miss every wake."""
    for claim in consumer._claims.values():
        if claim.listener is not None:
            p.context.wakes.unsubscribe(consumer._channel_of(claim), claim.listener)


async def test_readers_that_wait_look_together(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [topic(f"topic{number}") for number in range(5)]
    await declare(server, *addresses)
    writes: list[int] = []
    sweeps: list[float] = []
    batch, sweep = Link._batch, Link._sweep

    def counted(link: Link, now: float) -> bytes:
        data = batch(link, now)
        writes.append(data.count(TOPIC_READ.sha))
        return data

    def timed(link: Link) -> None:
        sweeps.append(link._sweeps_at)
        sweep(link)

    async with process(server) as p, asyncio.TaskGroup() as tasks:
        consumers = [consume(p, address, group=None) for address in addresses]
        waiting: list[asyncio.Task[object]] = []
        for consumer in consumers:
            await consumer.__aenter__()
            waiting.append(tasks.create_task(consumer.receive(1, SOON)))
            await asyncio.sleep(POLL / len(consumers) / 2)  # they begin at different times
        monkeypatch.setattr(Link, "_batch", counted)
        monkeypatch.setattr(Link, "_sweep", timed)
        async with asyncio.timeout(SOON):
            while sum(writes) < 3 * len(consumers):
                await asyncio.sleep(POLL / 4)
        monkeypatch.undo()
        for task, consumer in zip(waiting, consumers, strict=True):
            task.cancel()
            await consumer.__aexit__(None, None, None)
    looks = [count for count in writes if count]
    assert set(looks) == {len(consumers)}, writes
    # The first may be that of a call before.
    assert sweeps[1:] == [at for at in sweeps[1:] if at % POLL == 0], "the loop is woken besides"


@pytest.mark.parametrize("group", [GROUP, None])
@pytest.mark.parametrize("patience", [SOON, 0.3], ids=["waits", "comes and goes"])
async def test_who_misses_a_wake_finds_what_there_is_within_a_second(
    server: RedisServer, group: str | None, patience: float
) -> None:
    one = topic("one", partitions=1)
    await declare(server, one)
    loop = asyncio.get_running_loop()
    async with process(server) as p, consume(p, one, group=group) as consumer:
        await p.put(one, ["first"])
        assert ids(await consumer.receive(1, SOON)) == ["first"]
        deafen(p, consumer)

        async def program() -> float:
            while not await consumer.receive(1, patience):
                await asyncio.sleep(0.1)  # a poll may fall into that
            return loop.time()

        for number in range(3):
            searching = asyncio.ensure_future(program())
            await asyncio.sleep(0.35 * number + 0.1)  # wherever it is in its second
            await p.put(one, [f"missed{number}"])
            stored = loop.time()
            assert await searching - stored < POLL + 0.1 + SLACK
