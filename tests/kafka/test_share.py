"""Members of share groups on a real broker."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions

from brokerkit.drivers.kafka._cluster import Cluster
from brokerkit.drivers.kafka._share_group import LOCK, WINDOW, begin, places, set_one
from brokerkit.drivers.kafka._share_locks import HELD, LOST, OVER
from brokerkit.errors import NotFound
from tests.servers.kafka import Network, Refused, shared_kafka

from .consuming import widen
from .reading import cluster, delete_before, made, numbered, write, writer
from .sharing import SOON, Member, member

pytestmark = pytest.mark.asyncio


@asynccontextmanager
async def group(
    partitions: int = 1,
    *,
    lock: int | None = None,
    settings: Mapping[str, str] | None = None,
    options: Mapping[str, str] | None = None,
) -> AsyncIterator[tuple[Cluster, str]]:
    """Make a topic and a share group of its name, which begins where the topic does."""
    endpoints = shared_kafka()
    topic = made(endpoints, partitions, **(options or {}))
    async with cluster(endpoints.url()) as c:
        await c.topic(topic, timeout=SOON)
        every = dict(settings or {}) | ({} if lock is None else {LOCK: str(lock)})
        for name, value in every.items():
            assert await set_one(c, topic, name, value, timeout=SOON) is None
        assert await begin(c, topic, topic, dict.fromkeys(range(partitions), 0), timeout=SOON)
        yield c, topic
    with endpoints.wire() as admin, contextlib.suppress(Refused):
        admin.delete([topic])


def store(topic: str, count: int, partition: int = 0, first: int = 0, **options: object) -> None:
    producer = writer(shared_kafka(), **options)
    write(producer, topic, numbered(count, first), partition)


async def all_done(c: Cluster, topic: str, partitions: int = 1) -> None:
    """Return when there is nothing that nobody has accepted."""
    async with asyncio.timeout(SOON):
        while any(place.lag for place in (await places(c, topic, topic, range(partitions), timeout=SOON)).values()):
            await asyncio.sleep(0.05)


async def test_all_that_is_stored_comes_once_and_is_gone_when_it_is_accepted() -> None:
    async with group(3) as (c, topic):
        for partition in range(3):
            store(topic, 2000, partition)
        async with member(c, topic, room=300) as one:
            async for batch in one.batches(6000):
                assert len(batch) <= 300
                one.finish(batch)
            assert await asyncio.gather(*map(one.share.confirmed, one.taken)) == [None] * 6000
            assert {lock.count for lock in one.taken} == {1}
            values = Counter((lock.partition, lock.native.value) for lock in one.taken)
            assert len(values) == 6000
            assert all(lock.native.offset == lock.offset for lock in one.taken)
            assert one.share.owned_until == math.inf
            await all_done(c, topic, 3)


async def test_several_members_share_a_partition() -> None:
    async with group() as (c, topic):
        async with member(c, topic, room=10) as one, member(c, topic, room=10) as two:
            store(topic, 20)
            await asyncio.gather(one.have(10), two.have(10))
            assert sorted(one.offsets + two.offsets) == list(range(20))
            assert await one.confirm(one.taken) == [None] * 10
            assert await two.confirm(two.taken) == [None] * 10


async def test_what_comes_later_comes_soon() -> None:
    async with group() as (c, topic), member(c, topic) as one:
        producer = writer(shared_kafka(), linger_ms=0)
        write(producer, topic, [b""])
        one.finish(await one.have(1))
        took: list[float] = []
        for number in range(2, 7):
            await asyncio.sleep(0.6)  # by now its requests wait for long
            write(producer, topic, [b""])
            begun = asyncio.get_running_loop().time()
            await one.have(number)
            took.append(asyncio.get_running_loop().time() - begun)
            one.finish(one.taken[-1:])
        assert min(took) < 0.1


async def test_what_is_handed_back_comes_again_at_once() -> None:
    async with group() as (c, topic), member(c, topic) as one:
        store(topic, 3)
        first = list(await one.have(3))
        one.share.release(first[1])
        one.share.room += 1
        await one.have(4)
        again = one.taken[3]
        assert (again.offset, again.count) == (1, 2)
        assert first[1].state == OVER
        assert await one.confirm([first[0], again, first[2]]) == [None] * 3
        await all_done(c, topic)


async def test_a_record_stays_ours_for_much_longer_than_its_lock() -> None:
    async with group(lock=1000) as (c, topic), member(c, topic, lock=1.0) as one, member(c, topic) as other:
        one.share.room = 5
        other.share.room = 0
        store(topic, 5)
        locks = await one.have(5)
        other.share.room = 5
        end = asyncio.get_running_loop().time() + 5
        while (now := asyncio.get_running_loop().time()) < end:
            assert one.share.owned_until > now
            await asyncio.sleep(0.05)
        assert other.taken == []
        assert await one.confirm(locks) == [None] * 5
        await all_done(c, topic)


async def test_what_runs_out_goes_to_others_and_nothing_is_said_of_it() -> None:
    async with group(lock=1000) as (c, topic), Network(shared_kafka()) as network, cluster(network.url()) as through:
        async with member(through, topic, lock=1.0) as one, member(c, topic) as other:
            other.share.room = 0
            store(topic, 5)
            locks = await one.have(5)
            network.freeze()
            await one.until(lambda: one.share.owned_until == 0)
            other.share.room = 5
            await other.have(5)
            assert {lock.count for lock in other.taken} == {2}
            one.finish(locks)
            network.thaw()
            assert {type(error).__name__ for error in await one.confirm(locks)} == {"DeliveryLost"}
            assert {lock.state for lock in locks} == {LOST}
            assert await other.confirm(other.taken) == [None] * 5


async def test_a_connection_that_breaks_is_made_again_and_what_is_in_hand_stays_so() -> None:
    async with group() as (c, topic), Network(shared_kafka()) as network, cluster(network.url()) as through:
        async with member(through, topic) as one:
            store(topic, 10)
            locks = await one.have(10)
            for round in range(2, 5):
                network.reset()
                await one.until(lambda: len(one.back) == 10 * (round - 1))  # noqa: B023 - it is called here
                assert {lock.count for lock in locks} == {round}
            assert await one.confirm(locks) == [None] * 10
            assert one.gone == []
            assert len(one.taken) == 10
            await all_done(c, topic)


async def test_what_was_accepted_while_the_connection_broke_is_not_handled_again() -> None:
    async with group() as (c, topic), Network(shared_kafka()) as network, cluster(network.url()) as through:
        async with member(through, topic, room=50) as one:
            for round in range(5):
                store(topic, 50, first=50 * round)
                locks = (await one.have(50 * (round + 1)))[-50:]
                one.finish(locks[:25])
                network.reset()
                one.finish(locks[25:])
                async with asyncio.timeout(SOON):
                    assert await asyncio.gather(*map(one.share.confirmed, locks)) == [None] * 50
            assert len(one.taken) == 250
            await all_done(c, topic)


async def test_a_member_that_dies_leaves_its_records_to_others_at_once() -> None:
    async with group() as (c, topic), cluster(shared_kafka().url()) as own, member(c, topic) as other:
        other.share.room = 0
        one = Member(own, topic)
        await one.__aenter__()
        store(topic, 20)
        await one.have(20)
        other.share.room = 20
        await one.die()
        await other.have(20, within=3)
        assert {lock.count for lock in other.taken} == {2}
        assert await other.confirm(other.taken) == [None] * 20


async def test_closing_says_what_is_done_and_hands_back_the_rest() -> None:
    async with group() as (c, topic):
        store(topic, 20)
        async with member(c, topic) as one:
            await one.have(20)
            one.finish(one.taken[:10])
        assert {lock.state for lock in one.taken[:10]} == {OVER}
        async with member(c, topic) as other:
            await other.have(10, within=3)
            assert other.offsets == list(range(10, 20))
            assert {lock.count for lock in other.taken} == {2}
            assert await other.confirm(other.taken) == [None] * 10


async def test_marks_of_transactions_are_passed_over() -> None:
    async with group() as (c, topic):
        producer = confluent_kafka.Producer(
            {"bootstrap.servers": shared_kafka().bootstrap(), "transactional.id": topic, "linger.ms": 0}
        )
        await asyncio.to_thread(producer.init_transactions)
        for commits in (True, True, False, True):
            producer.begin_transaction()
            write(producer, topic, [b"yes" if commits else b"no"] * 3)
            await asyncio.to_thread(producer.commit_transaction if commits else producer.abort_transaction)
        async with member(c, topic) as one:
            await one.until(lambda: sum(lock.native.value == b"yes" for lock in one.taken) == 9)
            one.finish(one.taken)
            await all_done(c, topic)


async def test_what_compaction_has_removed_holds_up_nothing() -> None:
    options = {
        "cleanup_policy": "compact",
        "segment_ms": "100",
        "min_cleanable_dirty_ratio": "0.001",
        "max_compaction_lag_ms": "1",
    }
    async with group(options=options) as (c, topic):
        producer = writer(shared_kafka())
        for number in range(30):
            write(producer, topic, [b"%d" % number], key=b"%d" % (number % 3))
        await asyncio.sleep(0.3)
        write(producer, topic, [b"last"], key=b"other")
        async with member(c, topic) as one:
            await one.until(lambda: any(lock.native.value == b"last" for lock in one.taken))
            one.finish(one.taken)
            await all_done(c, topic)


async def test_large_batches_come_in_parts() -> None:
    async with group() as (c, topic):
        store(topic, 3000, linger_ms=500, batch_size=1_000_000, compression_type="lz4")
        async with member(c, topic, room=70) as one:
            async for batch in one.batches(3000):
                one.finish(batch)
            assert [lock.native.value for lock in one.taken] == numbered(3000)
            assert len(one.share.opener) == 0, "nothing more is expected of them"


async def test_what_is_deleted_below_is_passed_over() -> None:
    async with group() as (c, topic):
        store(topic, 100)
        async with member(c, topic, room=10) as one:
            locks = list(await one.have(10))
            await delete_before(shared_kafka(), topic, -1)
            store(topic, 5, first=100)
            assert await one.confirm(locks) == [None] * 10
            await one.until(lambda: any(lock.offset == 104 for lock in one.taken))
            one.finish([lock for lock in one.taken if lock.state == HELD])


async def test_one_in_hand_lets_no_more_pass_than_the_window() -> None:
    async with group(settings={WINDOW: "100"}) as (c, topic), member(c, topic, room=20, window=100) as one:
        one.eager = True
        producer = writer(shared_kafka(), linger_ms=0)
        for first in range(0, 400, 10):
            write(producer, topic, numbered(10, first))
        (held, *_) = await one.have(1)

        def go_on() -> bool:
            one.finish([lock for lock in one.taken if lock.state == HELD and lock is not held])
            return bool(one.stalls)

        await one.until(go_on)
        ((partition, ahead, window),) = one.stalls
        assert (partition, window) == (0, 100)
        assert 50 <= ahead <= 120
        await asyncio.sleep(0.5)
        go_on()
        assert len(one.taken) < 130, "the partition stands"
        one.finish([held])
        await one.until(lambda: (go_on(), len(one.taken) == 400)[1])
        assert one.goes_on == [0]


async def test_partitions_that_are_added_are_read() -> None:
    async with group() as (c, topic), member(c, topic) as one:
        store(topic, 1)
        await one.have(1)
        admin: Any = AdminClient({"bootstrap.servers": shared_kafka().bootstrap()})
        await asyncio.to_thread(admin.create_partitions([NewPartitions(topic, 2)])[topic].result)
        await begin(c, topic, topic, {1: 0}, timeout=SOON)
        store(topic, 5, 1)
        c.stale()
        await one.have(6)
        assert await one.confirm(one.taken) == [None] * 6


async def test_a_topic_that_is_deleted_is_told() -> None:
    async with group() as (c, topic), member(c, topic) as one:
        store(topic, 1)
        await one.have(1)
        with shared_kafka().wire() as admin:
            admin.delete([topic])
        await one.until(lambda: one.errors)
        assert isinstance(one.errors[-1], NotFound)
        assert isinstance(one.share.problem, NotFound)


async def test_what_is_added_is_left_alone_where_the_broker_might_begin_it_at_its_end() -> None:
    endpoints = shared_kafka()
    async with group() as (c, topic), member(c, topic, widens=False) as narrow:
        await widen(endpoints, topic, 2)
        store(topic, 3, partition=1)
        store(topic, 2, partition=0)
        async with asyncio.timeout(SOON):
            while len(narrow.taken) < 2 or narrow.share.problem is None:
                c.stale()
                await asyncio.sleep(0.05)
        assert {lock.partition for lock in narrow.taken} == {0}
        assert "1 partitions more than before" in str(narrow.share.problem)
        assert (await places(c, topic, topic, [1], timeout=SOON))[1].start < 0  # who comes when it is left begins it
