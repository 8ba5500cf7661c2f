"""Queues on Redis: lost replies, broken connections, processes that stand still, cancelled calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from brokerkit.driver import Delivery, Record, Settlement
from brokerkit.drivers.redis._link import GRACE
from brokerkit.drivers.redis._scripts import (
    QUEUE_JOIN,
    QUEUE_LEAVE,
    QUEUE_OUTCOME,
    QUEUE_RECOVER,
    QUEUE_RELEASE,
    QUEUE_RENEW,
    QUEUE_SETTLE,
    QUEUE_TAKE,
)
from brokerkit.errors import BrokerUnavailable, DeliveryLost
from tests.servers import FLAVORS, Flavor, RedisServer

from .queues import LEASE, SOON, declare, done, drain, ids, left, process, queue, take

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


async def test_what_a_lost_reply_has_handed_out_comes_again_at_once_and_uncounted(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, p.consume(LONG) as consumer:
        await p.put(LONG, ["held"])
        held = await take(consumer, 1)
        await p.put(LONG, ["a", "b", "c"])
        p.proxy.lose_replies(1, [QUEUE_TAKE.sha])
        again = await take(consumer, 3)
        assert p.proxy.lost == 1
        assert [(d.record.id, d.deliveries) for d in again] == [("a", 1), ("b", 1), ("c", 1)]
        await done(consumer, [*held, *again])
        assert await left(server, LONG) == ["n"]
    assert not p.lost


async def test_replies_of_recovering_may_be_lost_too(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, p.consume(LONG) as consumer:
        await p.put(LONG, ["held", "a", "b"])
        held = await take(consumer, 1)
        p.proxy.lose_replies(4, [QUEUE_TAKE.sha, QUEUE_RECOVER.sha])
        again = await take(consumer, 2)
        assert p.proxy.lost == 4
        assert [(d.record.id, d.deliveries) for d in again] == [("a", 1), ("b", 1)]
        await done(consumer, [*held, *again], confirm=True)
        assert await left(server, LONG) == ["n"]


async def test_a_settlement_whose_reply_is_lost_counts_once(server: RedisServer) -> None:
    out = queue("out")
    await declare(server, LONG, out)
    async with process(server) as p, p.consume(LONG) as consumer, p.consume(out) as second:
        await p.put(LONG, [str(n) for n in range(20)])
        held = await take(consumer, 20)
        p.proxy.lose_replies(2, [QUEUE_SETTLE.sha, QUEUE_OUTCOME.sha])
        items = [Settlement(d, (Record(out, d.record.id, b"copy"),) if n % 2 else ()) for n, d in enumerate(held)]
        assert list(await consumer.settle(items)) == [None] * 20
        assert p.proxy.lost >= 1
        assert sorted(ids(await drain(second))) == sorted(str(n) for n in range(20) if n % 2)
        assert await left(server, LONG) == ["n"]
        assert list(await consumer.settle(items)) == [None] * 20


async def test_a_release_whose_reply_is_lost_is_one(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, p.consume(LONG) as consumer:
        await p.put(LONG, ["a", "b", "c"])
        held = await take(consumer, 3)
        p.proxy.lose_replies(1, [QUEUE_RELEASE.sha])
        await consumer.release(held[:2])
        assert p.proxy.lost == 1
        again = await take(consumer, 2)
        assert ids(again) == ["a", "b"]
        (result,) = await consumer.settle([Settlement(held[0])])
        assert isinstance(result, DeliveryLost)
        await done(consumer, [*again, held[2]])
        assert await left(server, LONG) == ["n"]


async def test_joining_leaving_and_renewing_survive_lost_replies(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p, process(server) as other:
        await p.put(QUEUE, ["a"])
        p.proxy.lose_replies(1, [QUEUE_JOIN.sha])
        async with p.consume(QUEUE) as consumer:
            await take(consumer, 1)
            p.proxy.lose_replies(2, [QUEUE_RENEW.sha])
            await asyncio.sleep(2 * LEASE)
            assert p.proxy.lost == 3
            assert not p.lost
            p.proxy.lose_replies(1, [QUEUE_LEAVE.sha])
        async with other.consume(QUEUE) as second:
            (again,) = await take(second, 1)
            assert again.deliveries == 1


async def test_a_session_that_died_is_told_and_replaced(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p, process(server) as other, p.consume(QUEUE) as consumer:
        await p.put(QUEUE, ["a", "b", "c"])
        a, b, c = await take(consumer, 3)
        p.proxy.freeze()
        async with other.consume(QUEUE) as second:
            taken = await take(second, 3)
            assert {d.deliveries for d in taken} == {2}
            p.proxy.thaw()
            results = await consumer.settle([Settlement(a), Settlement(b, (Record(QUEUE, "copy", b""),))])
            assert all(isinstance(result, DeliveryLost) for result in results)
            await consumer.release([a, b, c])
            async with asyncio.timeout(SOON):
                while sorted(p.lost) != ["b", "c"]:  # of a the settlement has told
                    await asyncio.sleep(0.01)
            await done(second, taken)
        await p.put(QUEUE, ["d"])
        assert ids(await take(consumer, 1)) == ["d"]


async def test_a_process_that_stood_still_hands_out_nothing_that_others_have(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p, process(server) as other, p.consume(QUEUE) as consumer:
        waiting = asyncio.ensure_future(consumer.receive(10, SOON))
        await asyncio.sleep(0.05)
        p.proxy.freeze()
        await other.put(QUEUE, ["a"])
        await asyncio.sleep(1.5 * LEASE)
        async with other.consume(QUEUE) as second:
            (a,) = await take(second, 1)
            p.proxy.thaw()
            await asyncio.sleep(0.2)
            assert not waiting.done()
            await done(second, [a])
            await other.put(QUEUE, ["b"])
        assert ids(await waiting) == ["b"]


async def test_receive_says_when_the_connection_is_gone_and_leaving_hands_back_later(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, process(server) as other:
        await p.put(LONG, ["a", "b"])
        async with p.consume(LONG) as consumer:
            held = await take(consumer, 2)
            p.proxy.disconnect()
            began = asyncio.get_running_loop().time()
            with pytest.raises(BrokerUnavailable):
                await consumer.receive(10, 30)
            assert asyncio.get_running_loop().time() - began < GRACE + 1
            (result,) = await consumer.settle([Settlement(held[0])])
            assert isinstance(result, BrokerUnavailable)
        async with other.consume(LONG) as second:
            assert not await second.receive(10, 0.1)
            p.proxy.accept()
            again = await take(second, 2)
            assert [(d.record.id, d.deliveries) for d in again] == [("a", 1), ("b", 1)]
            await done(second, again)


async def test_a_short_break_is_not_noticed(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, p.consume(LONG) as consumer:
        await p.put(LONG, ["a", "b"])
        held = await take(consumer, 2)
        waiting = asyncio.ensure_future(consumer.receive(10, SOON))
        await asyncio.sleep(0.05)
        p.proxy.reset()
        results = await consumer.settle([Settlement(d) for d in held])
        assert list(results) == [None, None]
        await p.put(LONG, ["c"])
        assert ids(await waiting) == ["c"]
        assert not p.lost


async def test_who_reconnects_under_a_new_name_keeps_what_it_holds(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, p.consume(LONG) as consumer:
        await p.put(LONG, ["held"])
        held = await take(consumer, 1)
        session = consumer.session
        assert session is not None
        p.proxy.disconnect()
        async with asyncio.timeout(SOON):
            while p.link.up:
                await asyncio.sleep(0.001)
            consumer.missed()
            while not session.past:
                await asyncio.sleep(0.001)
        session.owned -= 30  # so that it gives a sign of life as soon as it is connected
        p.proxy.accept()
        await p.up()
        await done(consumer, held, confirm=True)
        assert consumer.session is session
        assert await left(server, LONG) == ["n"]
    assert not p.lost


async def test_what_a_cancelled_receive_took_goes_to_whoever_is_there(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, process(server) as other, p.consume(LONG) as one, other.consume(LONG) as two:
        for n in range(25):
            waiting = [asyncio.ensure_future(consumer.receive(1, SOON)) for consumer in (one, two)]
            await asyncio.sleep(0.01)
            publishing = asyncio.ensure_future(p.put(LONG, [str(n)]))
            for _ in range(n):
                await asyncio.sleep(0)
            waiting[0].cancel()
            await publishing
            finished, rest = await asyncio.wait(waiting, timeout=0.5)
            taken = [d for task in finished if not task.cancelled() for d in task.result()]
            assert ids(taken) == [str(n)], n
            await done(two if waiting[0].cancelled() else one, taken)
            for task in rest:
                task.cancel()
            if rest:
                await asyncio.wait(rest)


async def test_receive_may_be_cancelled_anywhere(server: RedisServer) -> None:
    await declare(server, LONG)
    seen: list[str] = []
    async with process(server) as p, p.consume(LONG) as consumer:
        for n in range(60):
            waiting = asyncio.ensure_future(consumer.receive(1, SOON))
            publishing = asyncio.ensure_future(p.put(LONG, [str(n)]))
            for _ in range(n % 20):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting, publishing])
            if not waiting.cancelled():
                await done(consumer, waiting.result())
                seen += ids(waiting.result())
        taken = await drain(consumer)
        assert {d.deliveries for d in taken} <= {1}
        seen += ids(taken)
        assert sorted(map(int, seen)) == list(range(60))
        assert await left(server, LONG) == ["n", "w"]


async def test_settle_and_release_may_be_cancelled_anywhere(server: RedisServer) -> None:
    out = queue("out")
    await declare(server, LONG, out)
    async with process(server) as p, p.consume(LONG) as consumer:
        await p.put(LONG, [str(n) for n in range(40)])
        held = await take(consumer, 40)
        for n, delivery in enumerate(held[:20]):
            item = Settlement(delivery, (Record(out, delivery.record.id, b""),) if n % 2 else ())
            settling = asyncio.ensure_future(consumer.settle([item]))
            for _ in range(n // 2):
                await asyncio.sleep(0)
            settling.cancel()
            await asyncio.wait([settling])
            await done(consumer, [delivery])
        for n, delivery in enumerate(held[20:]):
            releasing = asyncio.ensure_future(consumer.release([delivery]))
            for _ in range(n // 2):
                await asyncio.sleep(0)
            releasing.cancel()
            await asyncio.wait([releasing])
            if releasing.cancelled():
                await consumer.release([delivery])
        again = await take(consumer, 20)
        assert sorted(map(int, ids(again))) == list(range(20, 40))
        await done(consumer, again)
        assert await left(server, LONG) == ["n"]
        async with p.consume(out) as second:
            copies = ids(await drain(second))
            assert len(copies) == len(set(copies))


async def test_a_consumer_may_be_left_while_it_takes(server: RedisServer) -> None:
    await declare(server, LONG)
    async with process(server) as p, process(server) as other:
        for n in range(30):
            await other.put(LONG, [str(n)])
            async with p.consume(LONG):
                pass
            consumer = p.consume(LONG)
            async with consumer:
                waiting = asyncio.ensure_future(consumer.receive(10, SOON))
                for _ in range(n // 3):
                    await asyncio.sleep(0)
            await asyncio.wait([waiting])
            waiting.exception()
        async with other.consume(LONG, 1000) as second:
            taken = await take(second, 30)
            assert sorted(map(int, ids(taken))) == list(range(30))
            assert {d.deliveries for d in taken} == {1}


async def test_late_calls_of_a_server_that_stood_still_do_nothing(server: RedisServer) -> None:
    """The server is frozen with a take in hand; the client gives up that connection and goes on on another one."""
    await declare(server, LONG)
    async with process(server, timeout=1) as p, process(server) as other:
        async with p.consume(LONG) as consumer:
            await other.put(LONG, ["a", "b", "c"])
            server.freeze()
            try:
                waiting = asyncio.ensure_future(consumer.receive(10, 30))
                await asyncio.sleep(2.0)
            finally:
                server.thaw()
            try:
                taken = list(await waiting)
            except BrokerUnavailable:
                taken = []
                await p.up()
            while len(taken) < 3:
                taken += await consumer.receive(10, SOON)
            assert sorted(ids(taken)) == ["a", "b", "c"]
            assert {d.deliveries for d in taken} == {1}
            await done(consumer, taken)
            assert not await consumer.receive(10, 0.2)
            assert set(await left(server, LONG)) <= {"n", "w"}


async def test_the_server_may_be_killed_and_started_again(server: RedisServer) -> None:
    flavor: Flavor = "redis" if server.flavor == "redis" else "valkey"
    with RedisServer(flavor, appendonly=True, appendfsync="always") as durable:
        await declare(durable, LONG)
        async with process(durable) as p, p.consume(LONG) as consumer:
            await p.put(LONG, [str(n) for n in range(100)])
            held = await take(consumer, 50)
            durable.kill()
            durable.start()
            results = await consumer.settle([Settlement(d) for d in held])
            assert list(results) == [None] * 50
            rest = await drain(consumer)
            assert sorted(map(int, ids(rest))) == list(range(50, 100))
            assert {d.deliveries for d in rest} == {1}


async def test_revoked_may_settle_in_vain_and_fail(server: RedisServer) -> None:
    await declare(server, QUEUE)
    told: list[str] = []

    async def revoked(deliveries: Sequence[Delivery]) -> None:
        told.extend(ids(deliveries))
        results = await consumer.settle([Settlement(d) for d in deliveries])
        assert all(isinstance(result, DeliveryLost) for result in results)
        raise LookupError

    async with process(server) as p, process(server) as other:
        consumer = p.consume(QUEUE, revoked=revoked)
        async with consumer:
            await p.put(QUEUE, ["a"])
            await take(consumer, 1)
            p.proxy.freeze()
            async with other.consume(QUEUE) as second:
                await done(second, await take(second, 1))
            p.proxy.thaw()
            async with asyncio.timeout(SOON):
                while not told:
                    await asyncio.sleep(0.01)
            await p.put(QUEUE, ["b"])
            assert ids(await take(consumer, 1)) == ["b"]
