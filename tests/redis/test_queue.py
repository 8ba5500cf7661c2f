"""Queues on Redis: taking, settling, handing back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from brokerkit.address import Topic, redrive_queue
from brokerkit.driver import Record, Settlement, Source
from brokerkit.drivers.redis._queue import QueueConsumer
from brokerkit.errors import BrokerError, CapabilityError, DeliveryLost, NotFound
from brokerkit.events import Expired
from tests.servers import FLAVORS, RedisServer

from .queues import LEASE, SOON, declare, done, drain, ids, left, process, queue, take

pytestmark = pytest.mark.asyncio
QUEUE = queue()


@pytest.fixture(scope="module", params=FLAVORS)
def running(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(request.param) as started:
        yield started


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    running.clear()
    return running


async def test_what_was_published_comes_in_order_and_leaves_nothing_behind(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p:
        await p.put(QUEUE, [str(n) for n in range(1200)])
        async with p.consume(QUEUE, 1000) as consumer:
            first = await take(consumer, 1000)
            assert ids(first) == [str(n) for n in range(1000)]
            assert [d.position for d in first[:2]] == ["queue@1", "queue@2"]
            assert first[0].record.body == b"0"
            assert not await consumer.receive(10, 0.05), "more than prefetch"
            await done(consumer, first)
            assert len(await drain(consumer)) == 200
        assert await left(server, QUEUE) == []


async def test_a_message_that_comes_while_a_consumer_waits_is_there_at_once(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p, process(server) as other, p.consume(QUEUE) as consumer:
        loop = asyncio.get_running_loop()
        for n in range(20):
            waiting = asyncio.ensure_future(consumer.receive(10, 5))
            await asyncio.sleep(0.01)
            began = loop.time()
            await other.put(QUEUE, [str(n)])
            (got,) = await waiting
            assert loop.time() - began < 0.2, "found by a poll"
            await done(consumer, [got])


async def test_settling_with_copies_stores_them_and_forgets_the_original(server: RedisServer) -> None:
    out, missing = queue("out"), queue("missing")
    await declare(server, QUEUE, out)
    async with process(server) as p:
        await p.put(QUEUE, ["a", "b", "c"])
        async with p.consume(QUEUE) as consumer, p.consume(out) as second:
            a, b, c = await take(consumer, 3)
            items = [
                Settlement(a, (Record(out, "a", b"copy"), Record(QUEUE.dead_letters, "dead", b"x"))),
                Settlement(b, (Record(out, "b", b"copy"), Record(missing, "b", b"copy"))),
                Settlement(c),
                Settlement(a, (Record(out, "a", b"copy"),)),
            ]
            results = await consumer.settle(items)
            assert [type(result) for result in results] == [type(None), NotFound, type(None), type(None)]
            assert "missing" in str(results[1])
            assert ids(await drain(second)) == ["a"]
            await done(consumer, [b])
        assert await left(server, QUEUE) == []


async def test_what_is_released_comes_again_first_and_uncounted(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p:
        await p.put(QUEUE, ["a", "b", "c", "d"])
        async with p.consume(QUEUE) as consumer:
            held = await take(consumer, 3)
            await consumer.release(held[1:])
            again = await take(consumer, 3)
            assert [(d.record.id, d.deliveries) for d in again] == [("b", 1), ("c", 1), ("d", 1)]
            (result,) = await consumer.settle([Settlement(held[1])])
            assert isinstance(result, DeliveryLost)
            await consumer.release(held)
            assert ids(await take(consumer, 1)) == ["a"]


async def test_leaving_hands_back_more_than_one_call_moves(server: RedisServer) -> None:
    await declare(server, QUEUE)
    wanted = [str(n) for n in range(3000)]
    async with process(server) as p:
        await p.put(QUEUE, wanted)
        async with p.consume(QUEUE, 3000) as consumer:
            await done(consumer, (await take(consumer, 3000))[:1])
        assert await left(server, QUEUE) == ["r0"]
        async with p.consume(QUEUE, 3000) as consumer:
            again = await drain(consumer)
            assert sorted(map(int, ids(again))) == list(range(1, 3000))
            assert {d.deliveries for d in again} == {1}


async def test_what_dead_sessions_held_comes_again_in_pieces(server: RedisServer) -> None:
    await declare(server, QUEUE)
    wanted = [f"{n:04}" for n in range(3000)]
    async with process(server) as p, process(server) as dying:
        await p.put(QUEUE, wanted)
        first, second = dying.consume(QUEUE, 1500), dying.consume(QUEUE, 1500)
        async with first, second:
            await take(first, 1500)
            await take(second, 1500)
            dying.proxy.kill()
        async with p.consume(QUEUE, 3000) as consumer:
            again = await take(consumer, 3000)
            assert sorted(ids(again)) == wanted
            assert {d.deliveries for d in again} == {2}
            await done(consumer, again)
            assert not await consumer.receive(1, 0.05)
        assert await left(server, QUEUE) == []


async def test_priorities(server: RedisServer) -> None:
    urgent = queue(priorities=3)
    await declare(server, urgent)
    async with process(server) as p:
        for priority in (0, 2, 1, 2, 0):
            await p.put(urgent, [f"p{priority}"], priority=priority)
        async with p.consume(urgent) as consumer:
            assert ids(await take(consumer, 2)) == ["p2", "p2"]
            rest = await take(consumer, 3)
            assert ids(rest) == ["p1", "p0", "p0"]
            await consumer.release(rest)
            assert ids(await take(consumer, 3)) == ["p1", "p0", "p0"]


async def test_expired_messages_are_dropped_and_counted_also_behind_many(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p:
        await p.put(QUEUE, [str(n) for n in range(1500)], ttl=0.02)
        await p.put(QUEUE, ["stays"])
        await asyncio.sleep(0.05)
        async with p.consume(QUEUE, 1) as consumer:
            assert ids(await take(consumer, 1)) == ["stays"]
        assert sum(e.count for e in p.events if isinstance(e, Expired)) == 1500
        assert {e.address for e in p.events} == {"queue"}


async def test_a_suspect_comes_alone_and_is_not_starved(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p, p.consume(QUEUE, 3) as consumer:
        await p.put(QUEUE, ["a", "b"])
        a, b = await take(consumer, 2)
        await p.put(QUEUE, ["suspect"], deliveries=2)
        await p.put(QUEUE, [str(n) for n in range(5)])
        assert not await consumer.receive(10, 0.1), "it has to finish what it has first"
        await done(consumer, [a])
        assert not await consumer.receive(10, 0.1)
        await done(consumer, [b])
        (suspect,) = await consumer.receive(10, 1)
        assert (suspect.record.id, suspect.deliveries) == ("suspect", 3)
        assert not await consumer.receive(10, 0.1), "something came with it"
        await done(consumer, [suspect])
        assert ids(await drain(consumer)) == [str(n) for n in range(5)]


async def test_who_drained_goes_on_when_another_takes_the_suspect(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p, process(server) as other, p.consume(QUEUE, 3) as consumer:
        await p.put(QUEUE, ["a"])
        (a,) = await take(consumer, 1)
        await p.put(QUEUE, ["suspect"], deliveries=2)
        waiting = asyncio.ensure_future(consumer.receive(10, 5))
        await asyncio.sleep(0.05)
        async with other.consume(QUEUE) as second:
            (suspect,) = await take(second, 1)
            await other.put(QUEUE, ["next"])
            began = asyncio.get_running_loop().time()
            (got,) = await waiting
            assert asyncio.get_running_loop().time() - began < 0.3, "found by a poll"
            assert got.record.id == "next"
            await done(second, [suspect])
            await done(consumer, [a, got])
    assert await left(server, QUEUE) == []


async def test_delayed_messages_are_never_early_and_not_late(server: RedisServer) -> None:
    await declare(server, QUEUE)
    loop = asyncio.get_running_loop()
    due: dict[str, float] = {}
    late: list[float] = []
    async with process(server) as p, p.consume(QUEUE) as consumer:
        for n in range(30):
            delay = 0.1 + 0.02 * (n * 7 % 30)
            due[str(n)] = loop.time() + delay
            await p.put(QUEUE, [str(n)], delay=delay)
        while due:
            for delivery in await consumer.receive(100, SOON):
                late.append(loop.time() - due.pop(delivery.record.id))
                await done(consumer, [delivery])
        for n in range(10):  # an earlier one has to be told to who waits for a later one
            await p.put(QUEUE, [str(n)], delay=60)
            waiting = asyncio.ensure_future(take(consumer, 1))
            await asyncio.sleep(0.01)
            began = loop.time()
            await p.put(QUEUE, ["m"], delay=0.05)
            (got,) = await waiting
            late.append(loop.time() - began - 0.05)
            await done(consumer, [got])
    assert min(late) >= 0
    assert sorted(late)[len(late) // 2] < 0.05, "found by polls"


async def test_messages_are_shared_among_who_waits(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p, process(server) as other:
        async with p.consume(QUEUE) as one, other.consume(QUEUE) as two, p.consume(QUEUE) as three:
            waiting = [asyncio.ensure_future(consumer.receive(100, 5)) for consumer in (one, two, three)]
            await asyncio.sleep(0.05)
            await p.put(QUEUE, [str(n) for n in range(30)])
            got = await asyncio.gather(*waiting)
            assert all(len(part) >= 5 for part in got), [len(part) for part in got]


async def test_foreign_elements_come_out_as_broken_records(server: RedisServer) -> None:
    await declare(server, QUEUE)
    foreign = [b"", b"x", b"0123456789", b"a text that somebody else has put here"]
    async with process(server) as p:
        await p.put(QUEUE, ["good"])
        for element in foreign:
            await server.command("RPUSH", "bk:{queue}:r0", element)
        await server.command("ZADD", "bk:{queue}:d", 5, b"short")
        async with p.consume(QUEUE) as consumer:
            held = await take(consumer, 6)
            broken = [d for d in held if d.record.id != "good"]
            assert sorted(d.record.body or b"" for d in broken) == sorted([*foreign, b"short"])
            assert len({d.position for d in held}) == 6
            await consumer.release(held)
            again = await take(consumer, 6)
            assert sorted(d.record.body or b"" for d in again) == sorted([*foreign, b"short", b"good"])
            await done(consumer, again)
    assert await left(server, QUEUE) == []


async def test_a_key_of_another_type_is_named(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p, p.consume(QUEUE) as consumer:
        await server.command("SET", "bk:{queue}:r0", "mine")
        with pytest.raises(BrokerError, match=r"bk:\{queue\}:r0 holds a string"):
            await consumer.receive(1, 1)
        assert consumer.problem is not None
        await server.command("DEL", "bk:{queue}:r0")
        await p.put(QUEUE, ["m"])
        assert ids(await take(consumer, 1)) == ["m"]
        assert consumer.problem is None


async def test_a_queue_that_is_gone_is_not_found(server: RedisServer) -> None:
    with pytest.raises(NotFound, match="queue"):
        async with process(server) as p, p.consume(QUEUE):
            pass
    await declare(server, QUEUE)
    async with process(server) as p, p.consume(QUEUE) as consumer:
        await p.put(QUEUE, ["m"])
        (m,) = await take(consumer, 1)
        waiting = asyncio.ensure_future(consumer.receive(1, 5))
        await asyncio.sleep(0.05)
        await server.command("FLUSHALL")
        with pytest.raises(NotFound, match="queue"):
            await waiting
        (result,) = await consumer.settle([Settlement(m)])
        assert isinstance(result, DeliveryLost)


async def test_a_derived_queue_is_made_by_who_reads_it(server: RedisServer) -> None:
    again = redrive_queue(Topic("topic", bytes), "group")
    async with process(server) as p, p.consume(again) as consumer:
        await p.put(again, ["m"])
        assert ids(await take(consumer, 1)) == ["m"]


async def test_a_queue_has_no_end(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p:
        consumer = QueueConsumer(p.context, QUEUE, Source(QUEUE, until_end=True), 1, p.revoked)
        with pytest.raises(CapabilityError, match="until_end"):
            async with consumer:
                pass


async def test_scripts_that_were_flushed_are_loaded_again(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p, p.consume(QUEUE) as consumer:
        for n in range(5):
            await p.put(QUEUE, [str(n)])
            await server.command("SCRIPT", "FLUSH")
            (m,) = await take(consumer, 1)
            await server.command("SCRIPT", "FLUSH")
            await done(consumer, [m])
    assert await left(server, QUEUE) == []


async def test_leases_are_renewed_while_a_consumer_does_nothing(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p, process(server) as other:
        await p.put(QUEUE, ["m"])
        async with p.consume(QUEUE, 1) as consumer, other.consume(QUEUE) as second:
            held = await take(consumer, 1)
            assert not await second.receive(1, 3 * LEASE)
            await done(consumer, held)
        assert not p.lost


async def test_who_died_before_the_clock_was_set_back_owns_nothing_for_longer_than_a_lease(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p:
        await p.put(QUEUE, ["m"])
        element = await server.command("LPOP", "bk:{queue}:r0")
        await server.command("HSET", "bk:{queue}:h:dead/1", element[:6], element)
        seconds, _ = await server.command("TIME")
        await server.command("ZADD", "bk:{queue}:n", (int(seconds) + 3600) * 1000, "dead/1")
        async with p.consume(QUEUE) as consumer:
            (m,) = await take(consumer, 1)
            assert m.deliveries == 2
            await done(consumer, [m])
    assert await left(server, QUEUE) == []


async def test_a_purge_takes_what_waits_and_lets_who_drains_go_on(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p, p.consume(QUEUE) as consumer:
        await p.put(QUEUE, ["held"])
        held = await take(consumer, 1)
        await p.put(QUEUE, ["suspect"], deliveries=2)
        assert not await consumer.receive(1, 0.05)
        await server.command("DEL", "bk:{queue}:x", "bk:{queue}:r0", "bk:{queue}:d")
        await p.put(QUEUE, ["m"])
        assert ids(await take(consumer, 1)) == ["m"]
        await p.put(QUEUE, ["another"], deliveries=2)
        assert not await consumer.receive(1, 0.05)
        await done(consumer, held)


async def test_elements_are_counted_as_deliveries_only_when_an_owner_dies(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p:
        await p.put(QUEUE, ["m"])
        for deliveries in (1, 2, 3, 3):
            async with process(server) as other, other.consume(QUEUE) as consumer:
                for _ in range(3):
                    (m,) = await take(consumer, 1)
                    assert m.deliveries == deliveries
                    await consumer.release([m])
                await take(consumer, 1)
                if deliveries < 3:
                    other.proxy.kill()


async def test_the_next_suspect_comes_a_lease_later_without_a_poll_and_is_settled_as_others_are(
    server: RedisServer,
) -> None:
    brief = queue(lease=1)
    await declare(server, brief)
    async with process(server) as p, p.consume(brief, 8) as consumer:
        await p.put(brief, ["first", "second"], deliveries=2)
        (first,) = await consumer.receive(8, 1)
        await p.put(brief, ["other"])
        began = asyncio.get_running_loop().time()
        (second,) = await consumer.receive(8, 5)
        assert second.record.id == "second"
        assert 0.9 < asyncio.get_running_loop().time() - began < 1.5, "found by a poll"
        copy = Record(brief, "copy", b"body", timestamp=1.0)
        settling = asyncio.ensure_future(consumer.settle([Settlement(second, (copy,))]))
        (other, copied) = await take(consumer, 2)
        assert {other.record.id, copied.record.id} == {"other", "copy"}
        assert await settling == [None]
        await done(consumer, [first, other, copied])
    assert await left(server, brief) == []
