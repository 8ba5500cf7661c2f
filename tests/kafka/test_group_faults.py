"""Membership over a bad network, cancelled at any time, and under a name that others have, too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from brokerkit.drivers.kafka import _member
from brokerkit.drivers.kafka._cluster import Cluster
from brokerkit.drivers.kafka._coordinator import members
from brokerkit.errors import AuthorizationError, BrokerUnavailable, ConfigError
from tests.servers.kafka import Endpoints, Network, Right, shared_kafka

from .membership import SOON, Member, member, settled
from .reading import cluster, made

pytestmark = pytest.mark.asyncio
FIND_COORDINATOR, JOIN_GROUP, HEARTBEAT, SYNC_GROUP = 10, 11, 12, 14


@pytest.fixture(scope="module")
def endpoints() -> Endpoints:
    return shared_kafka()


@pytest_asyncio.fixture
async def kafka(endpoints: Endpoints) -> AsyncIterator[Cluster]:
    async with cluster(endpoints.url()) as opened:
        yield opened


# ---------------------------------------------------------------------- the network


async def test_what_is_ours_survives_broken_connections(endpoints: Endpoints) -> None:
    topic = made(endpoints, 4)
    async with Network(endpoints) as net, cluster(net.url()) as kafka, member(kafka, topic, session=3) as one:
        for _ in range(5):
            net.reset()
            await asyncio.sleep(0.2)
        net.disconnect()
        await asyncio.sleep(0.5)
        net.accept()
        await asyncio.sleep(0.5)
        assert one.left > 1
        assert await one.group.commit({0: (3, "")}, timeout=SOON) == {}
        assert one.told == [("assigned", (0, 1, 2, 3))]


async def test_rounds_survive_broken_connections(endpoints: Endpoints, kafka: Cluster) -> None:
    """While a join waits for the others, its connection breaks again and again."""
    topic = made(endpoints, 4)
    async with Network(endpoints) as net, cluster(net.url()) as bad, member(kafka, topic, session=2) as one:
        dead = Member(kafka, topic, session=2)
        dead.start()
        await dead.group.join()
        await settled([one, dead], 4)
        await dead.die()  # so that the next round takes a while
        two = Member(bad, topic, session=2)
        two.start()
        joining = asyncio.create_task(two.group.join())
        for _ in range(8):
            await asyncio.sleep(0.2)
            net.reset()
        await asyncio.wait_for(joining, SOON)
        await settled([one, two], 4)
        assert "lost" not in [what for what, _ in one.told + two.told]
        await two.stop()


async def test_who_was_cut_off_for_too_long_begins_anew(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints, 4)
    async with Network(endpoints) as net, cluster(net.url()) as bad, member(bad, topic, session=1) as one:
        net.freeze()
        begun = time.monotonic()
        async with member(kafka, topic, session=1) as two:
            await two.until(lambda: len(two.mine) == 4)
            assert one.left < 0  # it has stopped believing before the other began
            assert one.mine == {0, 1, 2, 3}
            assert time.monotonic() - begun > 0.5
            net.thaw()
            await one.until(lambda: len(one.told) > 1)
            assert [what for what, _ in one.told[1:3]] == ["lost", "late"]
            await settled([one, two], 4)
            assert one.left > 0


async def test_nobody_at_all_is_told_of_in_time(endpoints: Endpoints) -> None:
    topic = made(endpoints)
    async with Network(endpoints) as net, cluster(net.url(), timeout=1, connect_timeout=1) as kafka:
        net.disconnect()
        begun = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            async with member(kafka, topic):
                pass
        assert time.monotonic() - begun < 10
        net.accept()
        async with member(kafka, topic) as one:
            assert one.mine == {0}


@pytest.mark.parametrize("fault", ["freeze", "disconnect"])
async def test_leaving_takes_no_longer_than_it_may(endpoints: Endpoints, fault: str) -> None:
    topic = made(endpoints)
    async with Network(endpoints) as net, cluster(net.url()) as kafka:
        one = Member(kafka, topic)
        one.start()
        await one.group.join()
        getattr(net, fault)()
        begun = time.monotonic()
        await one.group.leave(timeout=0.5)
        assert time.monotonic() - begun < 5
        assert one.left < 0
        assert one.task is not None
        await asyncio.wait_for(one.task, SOON)
        net.thaw()


# ---------------------------------------------------------------------- cancelling


@pytest.mark.parametrize("turns", range(0, 60, 3))
async def test_who_gives_up_joining_leaves_nothing_behind(endpoints: Endpoints, turns: int) -> None:
    """After any number of the loop's turns; somebody left over would keep the next one waiting."""
    topic = made(endpoints, 2)
    async with cluster(endpoints.url()) as kafka:
        one = Member(kafka, topic, session=20)
        one.start()
        joining = asyncio.create_task(one.group.join())
        for _ in range(turns):
            await asyncio.sleep(0.0002)
        joining.cancel()
        await one.stop()
        assert not kafka.watchers
        begun = time.monotonic()
        async with member(kafka, topic, session=20) as other:
            assert other.mine == {0, 1}
        assert time.monotonic() - begun < 15
        assert await members(kafka, f"{topic}..billing", SOON) == []


async def test_who_left_before_it_began_never_begins(endpoints: Endpoints, kafka: Cluster) -> None:
    one = Member(kafka, made(endpoints))
    await one.group.leave(timeout=1)
    await asyncio.wait_for(one.group.run(), SOON)


async def test_a_commit_can_be_cancelled_and_has_a_deadline(endpoints: Endpoints) -> None:
    topic = made(endpoints)
    async with Network(endpoints) as net, cluster(net.url()) as kafka, member(kafka, topic, session=20) as one:
        net.freeze()
        begun = time.monotonic()
        failed = await one.group.commit({0: (1, "")}, timeout=0.3)
        assert isinstance(failed[0], BrokerUnavailable)
        assert time.monotonic() - begun < 5
        commit = asyncio.create_task(one.group.commit({0: (1, "")}, timeout=SOON))
        await asyncio.sleep(0.1)
        commit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await commit
        net.thaw()
        assert await one.group.commit({0: (2, "")}, timeout=SOON) == {}


# ---------------------------------------------------------------------- names


async def test_a_member_with_a_name_comes_back_without_a_rebalance(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints, 4)
    async with member(kafka, topic, session=10) as other:
        async with member(kafka, topic, session=10, instance="worker-1") as one:
            await settled([one, other], 4)
            before, told = one.mine, list(other.told)
            generation = one.group._member.generation
        assert any("worker-1" in name for name in await members(kafka, f"{topic}..billing", SOON))
        begun = time.monotonic()
        async with member(kafka, topic, session=10, instance="worker-1") as again:
            assert time.monotonic() - begun < 8
            assert again.mine == before
            assert again.group._member.generation == generation
            assert other.told == told
            assert await again.group.commit(dict.fromkeys(before, (1, "")), timeout=SOON) == {}
            async with member(kafka, topic, session=10) as third:  # what it has is known from now on, too
                await settled([again, other, third], 4)


async def test_what_was_on_its_way_from_a_member_with_a_name_goes_on_when_that_is_back(
    endpoints: Endpoints, kafka: Cluster
) -> None:
    """It is given its share without a rebalance, and knows nothing of what it was about to let go."""
    topic = made(endpoints, 2)
    one = Member(kafka, topic, session=20, instance="w")
    one.keep = True
    one.start()
    await one.group.join()
    async with member(kafka, topic, session=20) as other:
        await one.until(lambda: one.wanted)
        await one.die()
        async with member(kafka, topic, session=20, instance="w") as again:
            await settled([again, other], 2)


async def test_members_of_one_process_have_names_of_their_own(endpoints: Endpoints, kafka: Cluster) -> None:
    topic = made(endpoints, 4)
    async with member(kafka, topic, instance="w") as one, member(kafka, topic, instance="w") as two:
        await settled([one, two], 4)
        assert {one.group._member.instance, two.group._member.instance} == {"w..0", "w..1"}
        async with member(kafka, made(endpoints), instance="w") as elsewhere:
            assert elsewhere.group._member.instance == "w..0"


async def test_of_two_processes_with_one_name_the_older_one_ends(
    endpoints: Endpoints, kafka: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = made(endpoints, 4)
    async with member(kafka, topic, session=1, instance="w") as older:
        monkeypatch.setattr(_member, "_instances", set())  # as in another process
        async with member(kafka, topic, session=1, instance="w") as newer:
            await older.until(lambda: older.errors)
            assert isinstance(older.errors[0], ConfigError)
            assert "instance=" in str(older.errors[0])
            assert older.left < 0
            assert older.task is not None
            await asyncio.wait_for(older.task, SOON)
            told = list(newer.told)
            await asyncio.sleep(1.5)
            assert newer.told == told == [("assigned", (0, 1, 2, 3))]
            assert newer.left > 0
            assert len(older.errors) == 1


# ---------------------------------------------------------------------- rights


async def test_rights_that_are_missing_are_named_and_work_goes_on_when_they_are_back() -> None:
    endpoints = shared_kafka(rights=True)
    topic = made(endpoints, 2)
    user, password = f"member-{topic[2:14]}", "secret"
    groups = [Right(user, "group", topic, "read", prefixed=True)]
    with endpoints.wire() as admin:
        admin.passwd(user, password)
        admin.allow([Right(user, "topic", topic, "read")])
        async with cluster(endpoints.url("SASL", user=user, password=password)) as kafka:
            with pytest.raises(AuthorizationError, match=f"group {topic}..billing"):
                async with member(kafka, topic):
                    pass
            admin.allow(groups)
            async with member(kafka, topic, session=1) as one:
                admin.forbid(groups)
                await asyncio.sleep(1.5)
                assert one.left < 0
                assert isinstance(one.group.problem, AuthorizationError)
                failed = await one.group.commit({0: (1, "")}, timeout=SOON)
                assert isinstance(failed[0], AuthorizationError)
                assert not one.errors
                admin.allow(groups)
                await one.until(lambda: ("assigned", (0, 1)) in one.told[1:])
                assert one.left > 0
                assert one.group.problem is None
                assert await one.group.commit({0: (1, "")}, timeout=SOON) == {}
