"""Queues on Redis: messages that are given to who waits, wakes that nobody hears, and what is slow."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from brokerkit.driver import Delivery, Record
from brokerkit.drivers.redis._keys import entity
from brokerkit.drivers.redis._queue import GIFTS, QueueConsumer
from brokerkit.drivers.redis._scripts import Script
from brokerkit.errors import BrokerError
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


async def test_a_process_that_stands_still_is_given_nothing_for_long(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, process(server) as frozen, process(server) as publisher:
        async with frozen.consume(LONG) as deaf, p.consume(LONG) as consumer:
            sleeping = asyncio.ensure_future(deaf.receive(10, 60))
            await asyncio.sleep(0.1)  # it has waited the longest
            frozen.proxy.freeze()
            await asyncio.sleep(1.3)
            for n in range(3):
                waiting = asyncio.ensure_future(consumer.receive(10, SOON))
                await asyncio.sleep(0.05)
                began = asyncio.get_running_loop().time()
                await publisher.put(LONG, [str(n)])
                await done(consumer, await waiting)
                assert asyncio.get_running_loop().time() - began < 2
            sleeping.cancel()
            await asyncio.wait([sleeping])
            frozen.proxy.thaw()


async def test_what_was_given_and_got_lost_is_found_by_looking(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, process(server) as other, p.consume(LONG) as consumer:
        waiting = asyncio.ensure_future(consumer.receive(10, SOON))
        await asyncio.sleep(0.05)
        hand, given = consumer.hand, list[bytes]()
        consumer.hand = lambda data, more=False: given.append(data)  # type: ignore[method-assign]
        await other.put(LONG, ["a"])
        async with asyncio.timeout(SOON):
            while not given:
                await asyncio.sleep(0.001)
        consumer.hand = hand  # type: ignore[method-assign]
        (a,) = await waiting
        assert (a.record.id, a.deliveries) == ("a", 1)
        await done(consumer, [a])
    assert await left(server, LONG) == []


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


async def test_who_gets_messages_now_and_then_need_not_ask_for_each(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, process(server) as other, p.consume(LONG) as consumer:
        call, asked = p.link.call, list[str]()

        def counted(script: Script, *args: Any, **options: Any) -> asyncio.Future[Any]:
            asked.append(script.name)
            return call(script, *args, **options)

        p.link.call = counted  # type: ignore[method-assign]
        for n in range(4 * GIFTS):
            waiting = asyncio.ensure_future(consumer.receive(10, SOON))
            await asyncio.sleep(0.01)
            await other.put(LONG, [str(n)])
            (m,) = await waiting
            assert m.record.id == str(n)
            await done(consumer, [m])
        assert 3 <= asked.count("queue_take") <= 2 * GIFTS


async def test_who_waits_is_given_messages_in_turn(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, process(server) as other, p.consume(LONG) as one, p.consume(LONG) as two:
        held: list[list[Delivery]] = [[], []]

        async def gather(consumer: QueueConsumer, into: list[Delivery]) -> None:
            while True:
                into += await consumer.receive(10, SOON)

        gathering = [asyncio.ensure_future(gather(*pair)) for pair in zip((one, two), held, strict=True)]
        await asyncio.sleep(0.05)
        for n in range(GIFTS):
            await other.put(LONG, [str(n)])
            async with asyncio.timeout(SOON):
                while sum(map(len, held)) <= n:
                    await asyncio.sleep(0.005)
        for task in gathering:
            task.cancel()
        await asyncio.wait(gathering)
        assert abs(len(held[0]) - len(held[1])) <= 2, "one of them has too many"


async def test_more_is_not_given_until_it_asks_again(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, process(server) as other, p.consume(LONG) as consumer:
        waiting = asyncio.ensure_future(consumer.receive(100, SOON))
        await asyncio.sleep(0.05)
        hand, given = consumer.hand, list[bytes]()
        consumer.hand = lambda data, more=False: given.append(data)  # type: ignore[method-assign]
        consumer.ring = lambda: True  # type: ignore[method-assign]
        for n in range(2 * GIFTS):
            await other.put(LONG, [str(n)])
        assert len(given) <= GIFTS
        consumer.hand = hand  # type: ignore[method-assign]
        del consumer.ring
        consumer.missed()
        held = list(await waiting)
        while len(held) < 2 * GIFTS:
            held += await consumer.receive(100, SOON)
        assert sorted(map(int, ids(held))) == list(range(2 * GIFTS))
        assert {m.deliveries for m in held} == {1}


async def test_who_does_not_look_is_given_one_and_no_more(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, process(server) as other, other.consume(LONG) as second:
        async with p.consume(LONG) as consumer:
            hand, given = consumer.hand, list[bytes]()

            def handed(data: bytes, more: bool = False) -> None:
                given.append(data)
                hand(data, more)

            consumer.hand = handed  # type: ignore[method-assign]
            waiting = asyncio.ensure_future(second.receive(10, SOON))
            await asyncio.sleep(0.05)
            assert not await consumer.receive(10, 0.05)  # it is still in the list of those who wait
            for n in range(6):
                await other.put(LONG, [str(n)])
                (m,) = await waiting
                assert (m.record.id, m.deliveries) == (str(n), 1)
                await done(second, [m])
                waiting = asyncio.ensure_future(second.receive(10, SOON))
                await asyncio.sleep(0.05)
            waiting.cancel()
            await asyncio.wait([waiting])
            assert len(given) == 1


async def test_what_has_a_priority_is_given_and_overtakes_nothing_urgent(server: RedisServer) -> None:
    urgent = queue("urgent", lease=60, priorities=3)
    await declare(server, urgent)
    async with process(server) as p, process(server) as other, p.consume(urgent) as consumer:
        hand, given = consumer.hand, list[bytes]()

        def handed(data: bytes, more: bool = False) -> None:
            given.append(data)
            hand(data, more)

        consumer.hand = handed  # type: ignore[method-assign]
        for n, priority in enumerate((0, 1, 2, 9)):
            waiting = asyncio.ensure_future(consumer.receive(10, SOON))
            await asyncio.sleep(0.02)
            await other.put(urgent, [str(n)], priority=priority)
            (m,) = await waiting
            assert (m.record.id, len(given)) == (str(n), n + 1)
            await done(consumer, [m])
        waiting = asyncio.ensure_future(consumer.receive(10, SOON))
        await asyncio.sleep(0.02)
        await server.command("RPUSH", entity(urgent.name) + b":r2", "another's")
        await other.put(urgent, ["last"])
        held = list(await waiting)
        while len(held) < 2:
            held += await consumer.receive(10, SOON)
        assert len(given) == 4
        assert held[0].record.id.startswith("broken-")
        assert held[1].record.id == "last"


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


async def test_what_the_server_refuses_on_the_way_is_not_lost(server: RedisServer) -> None:
    urgent = queue("urgent", lease=60, priorities=2)
    await declare(server, LONG, urgent)
    await server.command("ACL", "SETUSER", "worker", "on", ">secret", "~*", "&*", "+@all")
    async with process(server) as p, process(server, user="worker", password="secret") as worker:
        for address in (LONG, urgent):
            await p.put(address, ["a", "b", "c"])
            async with worker.consume(address) as consumer:
                for right in ("hset", "lrange", "ltrim"):
                    await server.command("ACL", "SETUSER", "worker", f"-{right}")
                    with pytest.raises(BrokerError):
                        await consumer.receive(10, 1)
                    await server.command("ACL", "SETUSER", "worker", f"+{right}")
                held = await take(consumer, 3)
                for right in ("lpush", "hdel"):
                    await server.command("ACL", "SETUSER", "worker", f"-{right}")
                    with pytest.raises(BrokerError):
                        await consumer.release(held[:1])
                    await server.command("ACL", "SETUSER", "worker", f"+{right}")
            async with p.consume(address) as consumer:
                assert {"a", "b", "c"} == set(ids(await drain(consumer)))
