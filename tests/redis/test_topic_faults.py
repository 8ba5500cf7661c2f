"""Topics on Redis: lost replies, broken connections, processes that stand still, cancelled calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from brokerkit.driver import Delivery, Record, Settlement
from brokerkit.drivers.redis._keys import entity
from brokerkit.drivers.redis._link import GRACE
from brokerkit.drivers.redis._scripts import TOPIC_READ, TOPIC_SETTLE, TOPIC_START, TOPIC_SYNC
from brokerkit.errors import BrokerUnavailable, DeliveryLost
from brokerkit.policy import Start
from tests.servers import FLAVORS, RedisServer

from .queues import SOON, process
from .topics import GROUP, consume, declare, done, ids, left, names, rest, settle, take, topic

pytestmark = pytest.mark.asyncio
TOPIC = topic()
ONE = topic("one", partitions=1)
KEY = entity("one")
SESSION = 0.5


@pytest.fixture(scope="module", params=FLAVORS)
def running(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(request.param) as started:
        yield started


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    running.clear()
    return running


async def letters(server: RedisServer) -> int:
    return int(await server.command("XLEN", entity(ONE.dead_letters(GROUP).name) + b":l"))


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.sleep(0.005)


# ---------------------------------------------------------------------- lost replies


async def test_what_a_lost_reply_has_read_comes_again_uncounted(server: RedisServer) -> None:
    await declare(server, TOPIC)
    async with process(server) as p, consume(p, TOPIC) as consumer:
        await p.put(TOPIC, names(8))
        p.proxy.lose_replies(2, [TOPIC_READ.sha])
        taken = await take(consumer, 8)
        assert p.proxy.lost == 2
        assert sorted(ids(taken)) == names(8)
        assert {d.deliveries for d in taken} == {1}
        await done(consumer, taken)
    async with process(server) as p:
        assert await left(p, TOPIC) == []


async def test_copies_whose_reply_is_lost_are_stored_once(server: RedisServer) -> None:
    await declare(server, ONE)
    copy = Record(ONE.dead_letters(GROUP), "copy", b"x", timestamp=1.0)
    async with process(server) as p, consume(p, ONE) as consumer:
        await p.put(ONE, names(4))
        taken = await take(consumer, 4)
        p.proxy.lose_replies(2, [TOPIC_SETTLE.sha])
        assert await settle(consumer, taken[1:3], copy) == [None, None]
        assert p.proxy.lost == 2
        assert await letters(server) == 2
        assert await settle(consumer, taken[1:3], copy) == [None, None]
        assert await letters(server) == 2
    async with process(server) as p:
        assert await left(p, ONE) == ["m00000", "m00003"]


async def test_a_late_position_takes_nothing_back(server: RedisServer) -> None:
    """A read that carries positions is made again behind a settlement that was stored meanwhile."""
    await declare(server, ONE)
    copy = Record(ONE.dead_letters(GROUP), "copy", b"x", timestamp=1.0)
    async with process(server, session=SESSION) as p, consume(p, ONE) as consumer:
        await p.put(ONE, names(4))
        taken = await take(consumer, 2)
        await done(consumer, taken[:1])
        await asyncio.sleep(0.15)
        p.proxy.lose_replies(2, [TOPIC_READ.sha, TOPIC_SETTLE.sha])
        reading = asyncio.ensure_future(take(consumer, 2))
        await asyncio.sleep(0)
        assert await settle(consumer, taken[1:], copy) == [None]
        await reading
        assert await letters(server) == 1
        p.proxy.kill()
    async with process(server) as other, consume(other, ONE) as heir:
        assert sorted(ids(await take(heir, 2))) == names(4)[2:]


async def test_joining_and_leaving_survive_lost_replies(server: RedisServer) -> None:
    await declare(server, TOPIC)
    async with process(server) as p:
        await p.put(TOPIC, names(8))
        p.proxy.lose_replies(2, [TOPIC_START.sha, TOPIC_SYNC.sha])
        async with consume(p, TOPIC) as consumer:
            assert p.proxy.lost == 2
            taken = await take(consumer, 8)
            await done(consumer, taken[:4])
            p.proxy.lose_replies(1, [TOPIC_SYNC.sha])
        assert p.proxy.lost == 3
        async with consume(p, TOPIC) as heir:
            again = await take(heir, 4)
            assert sorted(ids(again)) == sorted(ids(taken[4:]))
            assert {d.deliveries for d in again} == {1}


async def test_a_call_to_join_that_comes_late_makes_no_ghost(server: RedisServer) -> None:
    """The answer of joining is lost, then the network: entering fails, and the next member gets everything at once."""
    await declare(server, TOPIC)
    async with process(server, session=30) as p, process(server, session=30) as other:
        p.proxy.lose_replies(1, [TOPIC_SYNC.sha])
        p.proxy.refuse()
        with pytest.raises(BrokerUnavailable):
            async with consume(p, TOPIC):
                pass
        p.proxy.accept()
        await p.up()
        async with consume(other, TOPIC) as consumer:
            await until(lambda: len(consumer.claims) == 4)
            assert await server.command("ZCARD", entity("topic") + b":m:" + GROUP.encode()) == 1


# ---------------------------------------------------------------------- breaks


async def test_a_short_break_is_not_noticed(server: RedisServer) -> None:
    await declare(server, TOPIC)
    async with process(server) as p, process(server) as other, consume(p, TOPIC) as consumer:
        await p.put(TOPIC, names(8))
        held = await take(consumer, 8)
        waiting = asyncio.ensure_future(consumer.receive(10, SOON))
        await asyncio.sleep(0.05)
        p.proxy.reset()
        await done(consumer, held, confirm=True)
        await other.put(TOPIC, ["c"])
        assert ids(await waiting) == ["c"]
        assert not p.lost


async def test_receive_says_when_the_connection_is_gone_and_leaving_is_made_up_for(server: RedisServer) -> None:
    await declare(server, TOPIC)
    async with process(server, session=30) as p, process(server, session=30) as other:
        await p.put(TOPIC, names(8))
        async with consume(p, TOPIC) as consumer:
            held = await take(consumer, 8)
            p.proxy.disconnect()
            began = asyncio.get_running_loop().time()
            with pytest.raises(BrokerUnavailable):
                await consumer.receive(10, 30)
            assert asyncio.get_running_loop().time() - began < GRACE + 1
            await done(consumer, held[:3])
        async with consume(other, TOPIC) as second:
            assert not await second.receive(10, 0.1)
            p.proxy.accept()
            again = await take(second, 5)
            assert sorted(ids(again)) == sorted(ids(held[3:]))
            assert {d.deliveries for d in again} == {1}


async def test_entering_gives_up_with_the_connection(server: RedisServer) -> None:
    await declare(server, TOPIC)
    async with process(server) as p:
        p.proxy.freeze()
        entering = asyncio.ensure_future(consume(p, TOPIC).__aenter__())
        await asyncio.sleep(0.05)
        p.proxy.disconnect()
        p.proxy.thaw()
        began = asyncio.get_running_loop().time()
        with pytest.raises(BrokerUnavailable):
            await entering
        assert asyncio.get_running_loop().time() - began < GRACE + 1


# ---------------------------------------------------------------------- standing still


async def test_who_stood_still_hears_what_it_has_lost_and_takes_part_again(server: RedisServer) -> None:
    await declare(server, ONE)
    copy = Record(ONE.dead_letters(GROUP), "copy", b"x", timestamp=1.0)
    async with process(server, session=SESSION) as p, process(server, session=SESSION) as other:
        async with consume(p, ONE) as consumer:
            await p.put(ONE, names(3))
            held = await take(consumer, 3)
            p.proxy.freeze()
            async with consume(other, ONE) as second:
                taken = await take(second, 3)
                assert {d.deliveries for d in taken} == {2}
                assert not p.lost
                p.proxy.thaw()
                results = await settle(consumer, held[:2], copy)
                assert all(isinstance(result, DeliveryLost) for result in results)
                await consumer.release(held)
                await until(lambda: sorted(p.lost) == names(3))
                assert await letters(server) == 0
                await done(second, taken)
            await p.put(ONE, ["later"])
            assert ids(await take(consumer, 1)) == ["later"]


async def test_who_stood_still_alone_loses_nothing(server: RedisServer) -> None:
    await declare(server, ONE)
    async with process(server, session=SESSION) as p, consume(p, ONE) as consumer:
        await p.put(ONE, names(3))
        held = await take(consumer, 3)
        await p.put(ONE, names(3, "n"))
        p.proxy.freeze()
        waiting = asyncio.ensure_future(take(consumer, 3))
        await asyncio.sleep(2 * SESSION)
        assert consumer.owned_until < asyncio.get_running_loop().time()
        p.proxy.thaw()
        assert ids(await waiting) == names(3, "n")
        assert consumer.owned_until > asyncio.get_running_loop().time()
        await done(consumer, held, confirm=True)


async def test_nothing_is_handed_out_after_the_deadline(server: RedisServer) -> None:
    await declare(server, ONE)
    async with process(server, session=SESSION) as p, process(server, session=SESSION) as other:
        async with consume(p, ONE) as consumer:
            waiting = asyncio.ensure_future(consumer.receive(10, SOON))
            await asyncio.sleep(0.05)
            p.proxy.freeze()
            await other.put(ONE, ["a"])
            await asyncio.sleep(1.5 * SESSION)
            async with consume(other, ONE) as second:
                (a,) = await take(second, 1)
                p.proxy.thaw()
                await asyncio.sleep(0.2)
                assert not waiting.done()
                await done(second, [a], confirm=True)
                await other.put(ONE, ["b"])
                assert ids(await take(second, 1)) == ["b"]
            assert ids(await waiting) == ["b"]


# ---------------------------------------------------------------------- handing over


async def test_a_member_that_lives_is_not_hurried(server: RedisServer) -> None:
    await declare(server, TOPIC)
    async with process(server, session=SESSION) as p, process(server, session=SESSION) as other:
        running = asyncio.Event()
        asked: list[Sequence[Delivery]] = []

        async def revoked(deliveries: Sequence[Delivery]) -> None:
            asked.append(deliveries)
            await running.wait()
            await done(consumer, deliveries)

        async with consume(p, TOPIC, revoked=revoked) as consumer:
            await p.put(TOPIC, names(40))
            held = await take(consumer, 40)
            async with consume(other, TOPIC) as second:
                await until(lambda: asked)
                assert not await second.receive(10, 3 * SESSION)
                running.set()
                await other.put(TOPIC, names(40, "n"))
                theirs = await take(second, 1)
                assert theirs[0].record.id.startswith("n")
                assert len(asked[0]) < 40
                await done(consumer, held, confirm=True)
                more = await asyncio.gather(rest(consumer), rest(second))
                assert sorted(ids([*theirs, *more[0], *more[1]])) == names(40, "n")
                await done(second, theirs)


async def test_a_program_that_does_not_let_go_keeps_what_runs_for_a_minute_only(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brokerkit.drivers.redis._topic.PATIENCE", 0.5)
    await declare(server, TOPIC)
    async with process(server, session=SESSION) as p, process(server, session=SESSION) as other:

        async def revoked(_: Sequence[Delivery]) -> None:
            await asyncio.Event().wait()

        async with consume(p, TOPIC, revoked=revoked) as consumer:
            await p.put(TOPIC, names(40))
            held = await take(consumer, 40)
            async with consume(other, TOPIC) as second:
                taken = await rest(second, 2 * SESSION)
                assert taken
                assert {d.deliveries for d in taken} == {2}
                results = await settle(consumer, held)
                lost = [d.record.id for d, result in zip(held, results, strict=True) if result is not None]
                assert sorted(lost) == sorted(ids(taken))


async def test_who_leaves_is_followed_at_once_and_who_dies_when_its_session_ends(server: RedisServer) -> None:
    await declare(server, TOPIC)
    clock = asyncio.get_running_loop().time
    async with process(server, session=1.0) as p, process(server, session=1.0) as dying, consume(p, TOPIC) as stays:
        leaving = consume(dying, TOPIC)
        await leaving.__aenter__()
        await until(lambda: len(stays.claims) == len(leaving.claims) == 2)
        began = clock()
        await leaving.__aexit__(None, None, None)
        await until(lambda: len(stays.claims) == 4)
        assert clock() - began < 0.3
        async with consume(dying, TOPIC) as doomed:
            await until(lambda: len(stays.claims) == len(doomed.claims) == 2)
            dying.proxy.kill()
            began = clock()
            await until(lambda: len(stays.claims) == 4)
            assert 0.5 < clock() - began < 1.3


# ---------------------------------------------------------------------- cancelling


async def test_what_a_cancelled_receive_waited_for_comes_out_of_the_next(server: RedisServer) -> None:
    await declare(server, TOPIC)
    for group in (GROUP, None):
        async with process(server) as p, consume(p, TOPIC, group=group, start=Start.LATEST) as consumer:
            taken: list[str] = []
            for number in range(40):
                waiting = asyncio.ensure_future(consumer.receive(1, SOON))
                await p.put(TOPIC, [f"{number:02}"])
                for _ in range(number % 8):
                    await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.wait([waiting])
                if not waiting.cancelled():
                    taken += ids(waiting.result())
                if number == 20 and group is None:
                    cursor = consumer.cursor
                    assert cursor is not None
                    async with consume(p, TOPIC, group=None, start=Start.position(cursor)) as behind:
                        assert sorted([*taken, *ids(await rest(behind))]) == [f"{n:02}" for n in range(21)]
            taken += ids(await rest(consumer))
            assert sorted(taken) == [f"{n:02}" for n in range(40)]


async def test_a_cancelled_settlement_is_carried_out_once(server: RedisServer) -> None:
    await declare(server, ONE)
    copy = Record(ONE.dead_letters(GROUP), "copy", b"x", timestamp=1.0)
    async with process(server) as p, consume(p, ONE) as consumer:
        await p.put(ONE, names(20))
        for number, delivery in enumerate(await take(consumer, 20)):
            settling = asyncio.ensure_future(consumer.settle([Settlement(delivery, (copy,))], confirm=True))
            for _ in range(number % 7):
                await asyncio.sleep(0)
            settling.cancel()
            await asyncio.wait([settling])
            assert await settle(consumer, [delivery], copy) == [None]
        assert await letters(server) == 20
    async with process(server) as p:
        assert await left(p, ONE) == []
