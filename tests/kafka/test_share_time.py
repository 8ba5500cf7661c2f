"""A member of a share group, and time: locks that are renewed or run out, what is made sure of, closing, and how often it asks."""

from __future__ import annotations

import asyncio
import time

import pytest

from brokerkit.drivers.kafka._share_locks import HELD, LOST, OVER
from brokerkit.drivers.kafka._share_session import SOON as SAID_AGAIN
from brokerkit.errors import BrokerUnavailable, DeliveryLost

from .reading import cluster
from .share_pretender import ACKNOWLEDGE, FETCH, SharePretender, said
from .sharing import Member, member

pytestmark = pytest.mark.asyncio


async def test_a_record_is_renewed_for_as_long_as_it_is_in_hand() -> None:
    async with SharePretender(lock=0.6) as broker, cluster(broker.url) as c, member(c, "orders") as one:
        one.eager = False
        broker.put(20)
        await one.until(lambda: one.share.untaken() == 20)
        taken = one.share.take(10)
        end = asyncio.get_running_loop().time() + 3
        while (now := asyncio.get_running_loop().time()) < end:
            assert one.share.owned_until > now
            await asyncio.sleep(0.05)
        rest = one.share.take(10)
        assert len(rest) == 10  # those that nobody had taken, too
        assert await one.confirm([*taken, *rest]) == [None] * 20
        assert broker.counts() == [1] * 20
        renewals = [heard for heard in broker.heard if heard.renew]
        assert 5 <= len(renewals) <= 60
        assert all(heard.key == ACKNOWLEDGE for heard in renewals)
        assert all(broker.said_of(offset).endswith("NA") for offset in range(20))


async def test_what_is_done_is_not_renewed_besides() -> None:
    async with SharePretender(lock=0.6) as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(20)
        locks = await one.have(20)
        await one.until(lambda: any(heard.renew for heard in broker.heard))
        for lock in locks:
            one.finish([lock])
            await asyncio.sleep(0.05)
        await one.until(lambda: len(broker.done()) == 20)
        assert broker.counts() == [1] * 20
        assert all(broker.said_of(offset).count("A") == 1 for offset in range(20))


async def test_who_has_nothing_in_hand_asks_more_seldom_until_something_comes() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        await one.until(lambda: len(broker.heard) >= 4)
        waits = [heard.wait for heard in broker.heard]
        assert waits[:4] == [0.5, 1.0, 2.0, 2.0]
        broker.put(1)
        locks = await one.have(1)
        assert await one.confirm(locks) == [None]
        before = len(broker.heard)
        await one.until(lambda: len(broker.heard) > before + 1)
        assert broker.heard[-1].wait <= 1.0


async def test_what_is_done_is_said_right_behind_what_comes_and_soon_if_nothing_does() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        begun = time.monotonic()
        for number in range(1, 61):
            broker.put(1)
            (lock,) = (await one.have(number))[-1:]
            one.finish([lock])
            await asyncio.sleep(0.005)
        await one.until(lambda: len(broker.done()) == 60)
        talks = [heard for heard in broker.heard if heard.said]
        assert all(heard.key == FETCH for heard in talks), "never on its own, where there is room"
        assert 3 <= len(talks) <= 2 + (time.monotonic() - begun) / SAID_AGAIN, "together with others"
        broker.put(1)
        locks = await one.have(61)
        one.finish(locks[-1:])
        begun = time.monotonic()
        await one.until(lambda: len(broker.done()) == 61)
        assert time.monotonic() - begun < 0.5


async def test_nothing_is_acknowledged_behind_its_deadline() -> None:
    async with SharePretender(lock=0.8) as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(5)
        locks = await one.have(5)
        broker.freeze()
        await one.until(lambda: one.share.owned_until == 0)
        one.finish(locks)
        assert all(lock.until == 0 for lock in locks)
        broker.thaw()
        await one.until(lambda: len(broker.done()) == 5)
        assert {broker.said_of(offset).lstrip("N") for offset in range(5)} == {"A"}
        assert len(one.taken) == 5


async def test_a_process_that_was_frozen_knows_that_what_it_has_may_be_others() -> None:
    async with SharePretender(lock=0.5) as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(5)
        locks = await one.have(5)
        time.sleep(1.0)
        assert one.share.owned_until < asyncio.get_running_loop().time()
        one.finish(locks)
        await one.until(lambda: len(broker.done()) == 5)
        assert min(broker.counts()) >= 2
        assert len(one.taken) == 5


async def test_the_lock_counts_from_when_it_was_asked_for() -> None:
    async with SharePretender(lock=2.0) as broker, cluster(broker.url) as c, member(c, "orders") as one:
        await one.until(lambda: broker.heard)
        loop = asyncio.get_running_loop()
        asked = loop.time()
        await asyncio.sleep(0.3)
        broker.put(1)
        (lock,) = await one.have(1)
        assert lock.until <= asked + 0.1 + 2.0 - 0.5


async def test_being_sure_renews_what_does_not_last() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(5)
        locks = await one.have(5)
        await one.share.sure(locks, 20)
        for lock in locks[:2]:
            lock.until -= 15  # as if that time had passed
        await one.share.sure(locks, 10)
        assert not any(heard.renew for heard in broker.heard)
        await one.share.sure(locks, 1000)  # no broker locks for so long
        assert [heard.said for heard in broker.heard if heard.renew] == [{0: [(0, 1, (4,))]}]
        now = asyncio.get_running_loop().time()
        assert all(lock.until >= now + 20 for lock in locks)
        one.finish(locks)
        await one.share.sure(locks, 1000)
        assert sum(heard.renew for heard in broker.heard) == 1


async def test_being_sure_waits_for_what_is_adrift() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders", timeout=8.0) as one:
        broker.put(2)
        locks = await one.have(2)
        broker.cut(1)
        await one.until(lambda: one.share.owned_until == 0)
        await one.share.sure(locks, 5)
        assert all(lock.until > asyncio.get_running_loop().time() + 5 for lock in locks)
        broker.hidden.add(0)
        broker.cut(1)
        await one.until(lambda: one.share.owned_until == 0)
        await one.share.sure(locks, 5)
        assert {lock.state for lock in locks} == {LOST}


async def test_nobody_can_be_sure_of_a_broker_that_says_nothing() -> None:
    async with SharePretender(lock=6.0) as broker, cluster(broker.url) as c, member(c, "orders", timeout=0.5) as one:
        broker.put(2)
        locks = await one.have(2)
        await asyncio.sleep(1.2)
        broker.freeze()
        with pytest.raises(BrokerUnavailable, match="2 records of orders"):
            await one.share.sure(locks, 40)
        broker.thaw()


async def test_closing_says_what_is_done_and_hands_back_the_rest() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c:
        async with member(c, "orders") as one:
            broker.put(10)
            locks = await one.have(10)
            one.finish(locks[:4])
        assert broker.done() == [0, 1, 2, 3]
        assert {lock.state for lock in locks[:4]} == {OVER}
        assert {lock.state for lock in locks[4:]} == {LOST}
        async with member(c, "orders") as other:
            await other.have(6)
            assert {lock.count for lock in other.taken} == {2}


async def test_closing_hears_what_is_under_way() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c:
        async with member(c, "orders") as one:
            broker.put(10)
            locks = await one.have(10)
            broker.patience = asyncio.Event()
            one.finish(locks)
            await one.until(lambda: said(broker))
            asyncio.get_running_loop().call_later(0.2, broker.patience.set)
        assert len(broker.done()) == 10
        assert {lock.state for lock in locks} == {OVER}


async def test_closing_takes_no_longer_than_it_may_where_a_broker_says_nothing() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c:
        one = Member(c, "orders")
        async with one:
            broker.put(10)
            locks = await one.have(10)
            broker.freeze()
            one.finish(locks)
            waiting = one.share.confirmed(locks[0])
            begun = asyncio.get_running_loop().time()
        assert 2 < asyncio.get_running_loop().time() - begun < 4
        assert isinstance(await waiting, DeliveryLost)
        broker.thaw()


async def test_closing_an_idle_member_waits_for_nothing() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c:
        async with member(c, "orders"):
            await asyncio.sleep(0.3)
            begun = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - begun < 0.1


async def test_one_that_holds_up_the_others_is_told_until_it_does_no_more() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders", window=100) as one:
        broker.put(300)
        async with asyncio.timeout(20):
            while len(one.taken) < 300:
                await one.until(lambda: any(lock.state == HELD for lock in one.taken[1:]))
                one.finish([lock for lock in one.taken[1:] if lock.state == HELD])
                await asyncio.sleep(0)
        assert one.stalls == []
        await one.until(lambda: one.stalls)
        assert one.stalls == [(0, 299, 100)]
        assert one.goes_on == []
        one.finish(one.taken[:1])
        await one.until(lambda: one.goes_on == [0])
        assert len(one.stalls) == 1


async def test_an_idle_member_asks_seldom_and_one_with_something_in_hand_often() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        await one.until(lambda: len(broker.heard) >= 2)
        before = len(broker.heard)
        await asyncio.sleep(1.2)
        assert len(broker.heard) - before <= 4
        broker.put(1)
        await one.have(1)
        before = len(broker.heard)
        await asyncio.sleep(1.0)
        assert 8 <= len(broker.heard) - before <= 20
        assert await one.confirm(one.taken, within=0.5) == [None]
