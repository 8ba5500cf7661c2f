"""Queues on Redis: messages that are given to who waits, wakes that nobody hears, and what is slow."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from brokerkit.driver import Delivery, Record
from tests.servers import FLAVORS, RedisServer

from .queues import SOON, declare, done, drain, ids, left, process, queue, take

pytestmark = pytest.mark.asyncio
QUEUE = queue()
LONG = queue("long", lease=60)


@pytest.fixture(scope="module", params=FLAVORS)
def running(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(request.param) as started:
        yield started


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    running.clear()
    return running


async def test_a_wake_that_nobody_hears_costs_little_time(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, process(server) as frozen, process(server) as publisher:
        async with frozen.consume(LONG) as deaf, p.consume(LONG) as consumer:
            sleeping = asyncio.ensure_future(deaf.receive(10, 60))
            await asyncio.sleep(0.1)  # it has waited the longest
            frozen.proxy.freeze()
            for n in range(3):
                waiting = asyncio.ensure_future(consumer.receive(10, SOON))
                await asyncio.sleep(0.05)
                began = asyncio.get_running_loop().time()
                await publisher.put(LONG, [str(n)])
                await done(consumer, await waiting)
                assert asyncio.get_running_loop().time() - began < 3
            frozen.proxy.thaw()
            await asyncio.sleep(0.3)
            assert not sleeping.done(), "it was handed what another one had by then"
            await publisher.put(LONG, ["last"])
            finished, _ = await asyncio.wait([sleeping, asyncio.ensure_future(consumer.receive(10, 1))])
            assert [d.record.id for task in finished for d in task.result()] == ["last"]


async def test_what_is_given_to_one_that_does_not_look_goes_back(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, process(server) as other, p.consume(LONG, 1) as consumer:
        assert not await consumer.receive(10, 0.05)  # it is still in the list of those who wait
        await other.put(LONG, ["a"])
        await asyncio.sleep(0.1)
        async with other.consume(LONG) as second:
            (a,) = await take(second, 1)
            assert a.deliveries == 1
            await second.release([a])
        (a,) = await take(consumer, 1)
        waiting = asyncio.ensure_future(consumer.receive(10, 0.3))
        await asyncio.sleep(0.05)
        await other.put(LONG, ["b"])
        assert not await waiting, "more than its prefetch"
        await done(consumer, [a])
        for n in range(20):
            waiting = asyncio.ensure_future(consumer.receive(10, SOON))
            await asyncio.sleep(0.005)
            consumer.prefetch = n % 2
            await other.put(LONG, [str(n)])
            consumer.prefetch = 1
            await done(consumer, await waiting)
        assert ids(await drain(consumer)) == ["19"]


async def test_what_was_given_and_not_heard_of_comes_after_reconnecting(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, process(server) as other, p.consume(LONG) as consumer:
        for n in range(5):
            waiting = asyncio.ensure_future(consumer.receive(10, SOON))
            await asyncio.sleep(0.05)
            p.proxy.freeze()
            await other.put(LONG, [str(n)])
            p.proxy.reset()
            p.proxy.thaw()
            (m,) = await waiting
            assert (m.record.id, m.deliveries) == (str(n), 1)
            await done(consumer, [m])


async def test_what_could_not_be_left_is_left_later(server: RedisServer) -> None:
    await declare(server, QUEUE)
    await server.command("ACL", "SETUSER", "worker", "on", ">secret", "~*", "&*", "+@all")
    async with process(server, user="worker", password="secret") as p, process(server) as other:
        async with p.consume(QUEUE) as consumer:
            await p.put(QUEUE, ["m"])
            await take(consumer, 1)
            await server.command("ACL", "SETUSER", "worker", "-evalsha")
        await server.command("ACL", "SETUSER", "worker", "+evalsha")
        async with other.consume(QUEUE) as second:
            (m,) = await take(second, 1)
            assert m.deliveries == 1


async def test_replies_that_come_while_it_finds_out_what_it_holds_are_handed_out_once(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, process(server) as other, p.consume(LONG, 1000) as consumer:
        seen: list[str] = []
        held: list[Delivery] = []
        for n in range(40):
            waiting = asyncio.ensure_future(consumer.receive(10, SOON))
            publishing = asyncio.ensure_future(other.put(LONG, [str(2 * n), str(2 * n + 1)]))
            for _ in range(n):
                await asyncio.sleep(0)
            consumer.missed()
            await publishing
            held += await waiting
            while len(held) < 2 * (n + 1):
                held += await consumer.receive(10, SOON)
            assert sorted(map(int, ids(held))) == list(range(2 * (n + 1)))
        seen += ids(held)
        assert not await consumer.receive(10, 0.1)
        await done(consumer, held)
        assert len(seen) == len(set(seen))


async def test_large_messages_come_over_a_slow_network(server: RedisServer) -> None:
    await declare(server, LONG)
    large = bytes(900_000)
    async with process(server, timeout=1) as p, process(server) as other:
        for n in range(6):
            records = [Record(LONG, str(n), large)]
            await other.outboxes.publish(records, SOON)
        for n in range(6, 40):
            await other.put(LONG, [str(n)])
        p.proxy.slice, p.proxy.delay = 20_000, 0
        async with p.consume(LONG, 100) as consumer:
            first = await consumer.receive(100, SOON)
            assert ids(first) == ["0"]
            rest = await take(consumer, 39)
            assert ids(rest) == [str(n) for n in range(1, 40)]
            await done(consumer, [*first, *rest])
    assert await left(server, LONG) == []


async def test_who_enters_beside_one_that_is_cancelled_hears_all_the_same(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, process(server) as other:
        for steps in range(8):
            one, two = p.consume(LONG), p.consume(LONG)
            entering = [asyncio.ensure_future(consumer.__aenter__()) for consumer in (one, two)]
            for _ in range(steps):
                await asyncio.sleep(0)
            entering[0].cancel()
            await asyncio.wait(entering)
            waiting = asyncio.ensure_future(two.receive(1, SOON))
            await asyncio.sleep(0.05)
            began = asyncio.get_running_loop().time()
            await other.put(LONG, ["m"])
            (m,) = await waiting
            assert asyncio.get_running_loop().time() - began < 0.3, "found by a poll"
            await done(two, [m])
            await two.__aexit__(None, None, None)
            if not entering[0].cancelled():
                await one.__aexit__(None, None, None)


async def test_a_gift_is_taken_back_in_spite_of_a_backlog(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, process(server) as frozen, process(server) as publisher:
        async with frozen.consume(LONG) as deaf, p.consume(LONG, 2) as consumer:
            sleeping = asyncio.ensure_future(deaf.receive(10, 60))
            await asyncio.sleep(0.05)
            frozen.proxy.freeze()
            await publisher.put(LONG, ["given"])
            await publisher.put(LONG, [str(n) for n in range(2000)])
            seen: list[str] = []
            async with asyncio.timeout(SOON):
                while "given" not in seen:
                    got = await consumer.receive(2, SOON)
                    seen += ids(got)
                    await done(consumer, got)
                    await asyncio.sleep(0.005)
            assert len(seen) < 2000
            sleeping.cancel()
            await asyncio.wait([sleeping])
            frozen.proxy.thaw()
