"""Membership at a real coordinator: joining, sharing out, committing and leaving."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from brokerkit.drivers.kafka._cluster import Cluster
from brokerkit.drivers.kafka._coordinator import committed, members, store_start
from brokerkit.errors import ConfigError, DeliveryLost, NotFound
from tests.servers.kafka import Endpoints, shared_kafka

from .membership import SOON, Member, another_kind, grow, member, remove, settled
from .reading import cluster, made

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def endpoints() -> Endpoints:
    return shared_kafka()


@pytest_asyncio.fixture
async def kafka(endpoints: Endpoints) -> AsyncIterator[Cluster]:
    async with cluster(endpoints.url()) as opened:
        yield opened


# ---------------------------------------------------------------------- alone


async def test_who_is_alone_joins_at_once_and_has_everything(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints, 4)
    await kafka.coordinator(f"{topic}..billing", timeout=SOON)
    begun = time.monotonic()
    async with member(kafka, topic) as one:
        assert one.places == dict.fromkeys(range(4))
        assert one.told == [("assigned", (0, 1, 2, 3))]
        left = one.left
        assert 6 - (time.monotonic() - begun) <= left <= 6
        assert await members(kafka, f"{topic}..billing", SOON) != []
    assert await members(kafka, f"{topic}..billing", SOON) == []


async def test_who_has_left_is_missed_at_once(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints, 2)
    for _ in range(3):
        begun = time.monotonic()
        async with member(kafka, topic, session=30) as one:
            assert one.mine == {0, 1}
        assert time.monotonic() - begun < 15


async def test_positions_come_with_the_partitions(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints, 3)
    group = f"{topic}..billing"
    assert await committed(kafka, group, topic, range(3), SOON) == {0: None, 1: None, 2: None}
    assert await store_start(kafka, group, topic, {0: (5, "note"), 2: (0, "")}, SOON)
    assert await committed(kafka, group, topic, range(3), SOON) == {0: (5, "note"), 1: None, 2: (0, "")}
    assert await committed(kafka, group, topic, (), SOON) == {}
    async with member(kafka, topic) as one:
        assert one.places == {0: (5, "note"), 1: None, 2: (0, "")}
        assert await one.group.commit({0: (7, "x" * 4096), 1: (1, "")}, timeout=SOON) == {}
    async with member(kafka, topic) as other:
        assert other.places == {0: (7, "x" * 4096), 1: (1, ""), 2: (0, "")}


async def test_a_start_is_not_stored_where_there_are_members(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints)
    async with member(kafka, topic):
        assert not await store_start(kafka, f"{topic}..billing", topic, {0: (3, "")}, SOON)
    assert await store_start(kafka, f"{topic}..billing", topic, {0: (4, "")}, SOON)
    assert await committed(kafka, f"{topic}..billing", topic, [0], SOON) == {0: (4, "")}


async def test_a_start_is_not_stored_for_what_does_not_exist(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints)
    with pytest.raises(NotFound):
        await store_start(kafka, f"{topic}..billing", topic, {7: (3, "")}, 0.3)


async def test_a_note_that_is_too_long_fails_alone(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints, 2)
    async with member(kafka, topic) as one:
        failed = await one.group.commit({0: (7, "x" * 4097), 1: (1, "")}, timeout=SOON)
        assert list(failed) == [0]
        assert "offset.metadata.max.bytes" in str(failed[0])
        assert await committed(kafka, f"{topic}..billing", topic, range(2), SOON) == {0: None, 1: (1, "")}


async def test_signs_of_life_keep_what_is_ours(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints)
    async with member(kafka, topic, session=1) as one:
        seen = []
        for _ in range(8):
            await asyncio.sleep(0.2)
            seen.append(one.left)
        assert min(seen) > 0.4
        assert one.told == [("assigned", (0,))]


async def test_a_topic_may_come_later(endpoints: Endpoints, kafka: Cluster) -> None:
    """A member without partitions waits for them, and new ones are shared out when they are seen."""
    topic = f"{made(endpoints)}.later"
    with endpoints.wire() as admin:
        async with member(kafka, topic) as one, member(kafka, topic) as other:
            assert one.mine | other.mine == set()
            admin.create(topic, 4)
            await settled([one, other], 4)


# ---------------------------------------------------------------------- together


async def test_partitions_move_without_stopping_what_stays(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints, 5)
    async with member(kafka, topic) as one, member(kafka, topic) as two:
        await settled([one, two], 5)
        async with member(kafka, topic) as three:
            await settled([one, two, three], 5)
        await settled([one, two], 5)
        for some in (one, two):
            kinds = [what for what, _ in some.told]
            assert "lost" not in kinds
            assert "late" not in kinds
        # Of the five, two went to the second member, and then one to the third.
        assert sum(len(which) for one in (one, two) for what, which in one.told if what == "taken") == 3


async def test_a_partition_goes_on_only_when_it_was_let_go(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints, 4)
    async with member(kafka, topic) as one:
        one.keep = True
        async with member(kafka, topic) as two:
            await one.until(lambda: one.wanted)
            assert len(one.wanted) == 2
            first, second = one.wanted
            async with member(kafka, topic) as three:
                await asyncio.sleep(0.5)
                assert two.mine | three.mine == set()
                assert one.mine == {0, 1, 2, 3}
                assert await one.group.commit({first: (5, "mine"), second: (6, "mine")}, timeout=SOON) == {}
                one.let_go([first])
                await settled_on(first, two, three)
                assert (two.places | three.places)[first] == (5, "mine")
                assert second in one.mine
                assert list(await one.group.commit({first: (9, ""), second: (7, "")}, timeout=SOON)) == [first]
                one.let_go([partition for partition in one.wanted if partition != first])
                await settled([one, two, three], 4)


async def settled_on(partition: int, *members: Member) -> None:
    """Return when one of *members* has *partition*."""

    async def has(one: Member) -> None:
        await one.until(lambda: partition in one.mine)

    waits = [asyncio.create_task(has(one)) for one in members]
    assert (await asyncio.wait(waits, timeout=SOON, return_when=asyncio.FIRST_COMPLETED))[0]
    for wait in waits:
        wait.cancel()


async def test_commits_go_on_during_a_rebalance(endpoints: Endpoints, kafka: Cluster) -> None:
    """A member that has died holds it up for its session; the others go on meanwhile, and their time does not run out."""
    topic = made(endpoints, 4)
    async with member(kafka, topic, session=2) as one:
        dead = Member(kafka, topic, session=2)
        dead.start()
        await dead.group.join()
        await settled([one, dead], 4)
        await dead.die()
        begun, number = time.monotonic(), 0
        two = Member(kafka, topic, session=2)
        two.start()
        joining = asyncio.create_task(two.group.join())
        while not joining.done():
            number += 1
            assert await one.group.commit(dict.fromkeys(one.mine, (number, "")), timeout=SOON) == {}
            assert one.left > 0
            assert time.monotonic() - begun < SOON
            await asyncio.sleep(0.05)
        await joining
        assert number > 10
        assert len(one.mine) == 2  # what it kept all the time
        await settled([one, two], 4)
        await two.stop()


async def test_who_dies_is_missed_when_its_session_ends(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints, 4)
    async with member(kafka, topic, session=1) as one:
        dead = Member(kafka, topic, session=1)
        dead.start()
        await dead.group.join()
        await settled([one, dead], 4)
        await dead.die()
        until = dead.group.owned_until
        begun = time.monotonic()
        await one.until(lambda: len(one.mine) == 4)
        assert asyncio.get_running_loop().time() > until
        assert time.monotonic() - begun < 15


async def test_partitions_that_are_added_are_shared_out(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints, 2)
    async with member(kafka, topic) as one, member(kafka, topic) as two:
        await settled([one, two], 2)
        grow(endpoints, topic, 5)
        kafka.stale()
        await settled([one, two], 5)


async def test_members_that_come_and_go_leave_the_others_in_peace(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints, 6)
    async with member(kafka, topic, session=6) as one:
        for _ in range(6):
            async with member(kafka, topic, session=6) as other:
                await asyncio.sleep(0.2)
                held = [*one.places, *other.places]
                assert len(held) == len(set(held))
                assert one.left > 0
            assert len(one.mine) >= 3
        await one.until(lambda: len(one.mine) == 6)
        assert "lost" not in [what for what, _ in one.told]


# ---------------------------------------------------------------------- what cannot be


async def test_a_session_that_brokers_refuse_is_named(endpoints: Endpoints, kafka: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"session=.*group\.min\.session\.timeout\.ms"):
        async with member(kafka, made(endpoints), session=7200):
            pass


async def test_a_group_of_another_kind_of_client_is_refused(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints)
    with another_kind(endpoints, topic, f"{topic}..billing"):
        with pytest.raises(ConfigError, match="another kind of client"):
            async with member(kafka, topic):
                pass


async def test_membership_that_is_lost_is_told_and_begun_anew(endpoints: Endpoints, kafka: Cluster) -> None:
    """Somebody removes the member, as an administrator may."""
    topic = made(endpoints, 2)
    async with member(kafka, topic) as one:
        one.go_on = False
        await remove(kafka, one.group)
        await one.until(lambda: len(one.told) >= 4)
        assert one.told[1:4] == [("lost", (0, 1)), ("late", ()), ("assigned", (0, 1))]
        assert one.left < 0
        one.group.go_on()
        assert one.left > 3


async def test_a_commit_of_what_is_not_ours_is_lost(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints, 2)
    async with member(kafka, topic) as one:
        await remove(kafka, one.group)
        failed = await one.group.commit({0: (1, "")}, timeout=SOON)
        assert isinstance(failed[0], DeliveryLost)
        await one.until(lambda: ("assigned", (0, 1)) in one.told[1:])
        assert await one.group.commit({0: (1, "")}, timeout=SOON) == {}
        assert isinstance((await one.group.commit({5: (1, "")}, timeout=SOON))[5], DeliveryLost)
