"""What a process knows of a cluster, and its connections."""

from __future__ import annotations

import asyncio
import contextvars
import datetime as dt
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from kio.schema.errors import ErrorCode
from kio.schema.init_producer_id.v4 import request as init

from brokerkit.drivers.kafka._cluster import PAUSE, Cluster
from brokerkit.drivers.kafka._errors import Unanswered
from brokerkit.errors import AuthorizationError, BrokerUnavailable, Closed, NotFound

from .liar import Liar
from .pretender import COORDINATOR, INIT, METADATA, Pretender
from .publishing import cluster_of, driver, until

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def brokers() -> AsyncIterator[Pretender]:
    async with Pretender() as made:
        made.create("orders", 2)
        yield made


def request() -> Any:
    """Return one that any broker answers, and that metadata has nothing to do with."""
    kind: Any = init.InitProducerIdRequest
    return kind(transactional_id=None, transaction_timeout=dt.timedelta(minutes=1))


def leaders(cluster: Cluster, name: str = "orders") -> list[int]:
    info = cluster.known(name)
    assert info is not None
    return [place.leader for place in info.partitions]


# ---------------------------------------------------------------------- connecting


async def test_an_address_that_refuses_is_passed_over(brokers: Pretender) -> None:
    async with Liar() as gone:
        port = gone.port
    async with driver(f"kafka://127.0.0.1:{port},127.0.0.1:{brokers.ports[1]}") as made:
        assert (await cluster_of(made).topic("orders", timeout=1)).partitions


async def test_an_address_that_is_frozen_is_passed_over(brokers: Pretender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brokerkit.drivers.kafka._cluster._LOOK", 0.3)
    async with Liar(mute=True) as frozen:
        began = time.monotonic()
        async with driver(f"kafka://127.0.0.1:{frozen.port},127.0.0.1:{brokers.ports[1]}") as made:
            assert time.monotonic() - began < 4.5
            assert (await cluster_of(made).topic("orders", timeout=1)).partitions
        await frozen.idle.wait()


async def test_no_broker_that_answers_is_told_in_time() -> None:
    async with Liar(mute=True) as frozen:
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            async with driver(f"kafka://127.0.0.1:{frozen.port}", connect_timeout=0.3):
                pass
        assert 0.25 < time.monotonic() - began < 4.5
        await frozen.idle.wait()
    with pytest.raises(BrokerUnavailable, match=str(frozen.port)):
        async with driver(f"kafka://127.0.0.1:{frozen.port}"):
            pass


async def test_connections_are_shared_and_closed(brokers: Pretender) -> None:
    line = object()
    async with driver(brokers.url) as made:
        cluster = cluster_of(made)
        before = brokers.connections
        await asyncio.gather(*(cluster.call(1, request(), timeout=5, line=line) for _ in range(20)))
        await asyncio.gather(*(cluster.call(1, request(), timeout=5, line=line) for _ in range(20)))
        assert brokers.connections == before + 1
        assert brokers.open[1] == before + 1
        assert cluster.connected
        cluster.drop(line)
        await until(lambda: brokers.open[1] == before)
        await cluster.call(1, request(), timeout=5, line=line)
        assert brokers.connections == before + 2
    await until(lambda: not brokers.open[1])
    assert not cluster.connected


async def test_a_connection_that_is_dropped_while_it_is_made_is_not_left_open() -> None:
    async with Pretender(2) as two, driver(two.url) as made:
        cluster, line = cluster_of(made), object()
        two.freeze(2)
        call = asyncio.ensure_future(cluster.call(2, request(), timeout=5, line=line))
        await until(lambda: two.open[2] == 1)
        cluster.drop(line)
        two.thaw(2)
        with pytest.raises(BrokerUnavailable):
            await call
        await until(lambda: not two.open[2])


async def test_closing_ends_what_waits_for_a_connection() -> None:
    async with Pretender(2) as two:
        async with driver(two.url) as made:
            cluster = cluster_of(made)
            two.freeze(1)
            two.freeze(2)
            calls = [asyncio.ensure_future(cluster.call(2, request(), timeout=60, line=object())) for _ in range(3)]
            calls.append(asyncio.ensure_future(cluster.call(1, request(), timeout=60)))
            calls.append(asyncio.ensure_future(cluster.topic("orders", timeout=60)))
            calls.append(asyncio.ensure_future(cluster.refreshed(60)))
            await asyncio.sleep(0.1)
        async with asyncio.timeout(20):
            results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, Closed | BrokerUnavailable) for result in results)
        with pytest.raises(Closed):
            await cluster.refreshed(1)
        two.thaw(1)
        two.thaw(2)
        await until(lambda: not sum(two.open.values()))


# ---------------------------------------------------------------------- calls


async def test_no_answer_in_time_ends_the_connection_and_the_next_call_makes_another(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        cluster = cluster_of(made)
        await cluster.call(1, request(), timeout=20)
        brokers.slow[INIT] = asyncio.Event()
        first = asyncio.ensure_future(cluster.call(1, request(), timeout=60))
        began = time.monotonic()
        with pytest.raises(Unanswered):
            await cluster.call(1, request(), timeout=0.2)
        assert time.monotonic() - began < 20
        with pytest.raises(Unanswered):
            await first
        brokers.slow.pop(INIT).set()
        assert (await cluster.call(1, request(), timeout=5)).error_code is ErrorCode.none


async def test_a_cancelled_call_leaves_the_connection_usable(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        cluster = cluster_of(made)
        await cluster.call(1, request(), timeout=5)
        before = brokers.connections
        gate = brokers.slow[INIT] = asyncio.Event()
        call = asyncio.ensure_future(cluster.call(1, request(), timeout=5))
        after = asyncio.ensure_future(cluster.call(1, request(), timeout=5))
        await asyncio.sleep(0.02)
        call.cancel()
        gate.set()
        assert (await after).error_code is ErrorCode.none
        assert brokers.connections == before


async def test_any_broker_is_one_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brokerkit.drivers.kafka._cluster._LOOK", 2.0)
    async with Pretender(3) as three, driver(three.url) as made:
        cluster = cluster_of(made)
        await cluster.call(None, request(), timeout=5)
        used = next(node for node, key in three.asked if key == INIT)
        three.freeze(used)
        began = time.monotonic()
        await cluster.call(None, request(), timeout=10)
        assert time.monotonic() - began < 9
        began = time.monotonic()
        await cluster.call(None, request(), timeout=5)  # nobody asks the frozen one again
        assert time.monotonic() - began < 1.9
        three.thaw(used)


async def test_a_broker_that_is_not_known_is_unavailable(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        with pytest.raises(BrokerUnavailable, match="no broker 17"):
            await cluster_of(made).call(17, request(), timeout=5)


async def test_metadata_does_not_wait_behind_slow_requests(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        cluster = cluster_of(made)
        gate = brokers.slow[INIT] = asyncio.Event()
        slow = asyncio.ensure_future(cluster.call(None, request(), timeout=5))
        await asyncio.sleep(0.05)
        await cluster.refreshed(0.5)
        gate.set()
        await slow


# ---------------------------------------------------------------------- topics


async def test_what_is_known_of_a_topic_is_not_asked_again(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        cluster = cluster_of(made)
        info = await cluster.topic("orders", timeout=5)
        assert (info.name, info.id, len(info.partitions)) == ("orders", brokers.topics["orders"].id, 2)
        assert (info.leader(1), info.leader(2)) == (1, -1)
        looks = brokers.seen[METADATA]
        assert await cluster.topic("orders", timeout=5) is info
        assert brokers.seen[METADATA] == looks
        assert await cluster.topic("orders", timeout=5, fresh=True) is info
        assert brokers.seen[METADATA] == looks + 1


async def test_a_topic_that_is_not_there(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        cluster = cluster_of(made)
        with pytest.raises(NotFound):
            await cluster.topic("absent", timeout=5)
        assert cluster.known("absent") is None
        assert isinstance(cluster.trouble("absent"), NotFound)
        brokers.create("absent")
        assert (await cluster.topic("absent", timeout=5)).partitions
        assert cluster.trouble("absent") is None


async def test_a_topic_that_may_not_be_seen(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        brokers.denied["orders"] = ErrorCode.topic_authorization_failed
        for _ in range(2):
            with pytest.raises(AuthorizationError, match="DESCRIBE on topic orders"):
                await cluster_of(made).topic("orders", timeout=5)
        brokers.denied.clear()
        assert (await cluster_of(made).topic("orders", timeout=5)).partitions


async def test_a_topic_that_is_being_made_is_waited_for(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        brokers.denied["orders"] = ErrorCode.leader_not_available
        with pytest.raises(BrokerUnavailable):
            await cluster_of(made).topic("orders", timeout=0.2)
        waiting = asyncio.ensure_future(cluster_of(made).topic("orders", timeout=5))
        await asyncio.sleep(0.1)
        brokers.denied.clear()
        assert (await waiting).partitions


async def test_no_broker_that_answers_is_told_at_the_end_of_the_time(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        cluster = cluster_of(made)
        await brokers.stop(1)
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            await cluster.topic("orders", timeout=0.4)
        assert 0.35 < time.monotonic() - began < 4
        assert isinstance(cluster.problem, BrokerUnavailable)
        waiting = asyncio.ensure_future(cluster.topic("orders", timeout=5))
        await asyncio.sleep(0.1)
        await brokers.start(1)
        assert (await waiting).partitions
        assert cluster.problem is None


async def test_one_broker_that_knows_less_is_not_believed_at_once(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        cluster = cluster_of(made)
        await cluster.topic("orders", timeout=5)
        brokers.blind.add(1)
        asked = asyncio.ensure_future(cluster.topic("orders", timeout=5, fresh=True))
        await cluster.refreshed(5)
        assert cluster.known("orders") is not None
        brokers.blind.clear()
        assert (await asked).partitions
        brokers.blind.add(1)
        began = time.monotonic()
        with pytest.raises(NotFound):
            await cluster.topic("orders", timeout=5, fresh=True)
        assert 0.25 < time.monotonic() - began < 4.5
        assert cluster.known("orders") is None


async def test_a_leader_of_before_is_not_believed(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        cluster = cluster_of(made)
        brokers.lead("orders", 0, 1)
        await cluster.topic("orders", timeout=5)
        log = brokers.topics["orders"].logs[0]
        log.leader, log.epoch = 2, 0
        await cluster.refreshed(5)
        assert leaders(cluster) == [1, 1]
        log.epoch = 2
        await cluster.refreshed(5)
        assert leaders(cluster) == [2, 1]


async def test_a_topic_that_was_made_again_is_another_one(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        cluster = cluster_of(made)
        for _ in range(3):
            brokers.lead("orders", 0, 1)
        before = await cluster.topic("orders", timeout=5)
        brokers.create("orders", 1)
        await cluster.refreshed(5)
        after = await cluster.topic("orders", timeout=5)
        assert after.id != before.id
        assert [place.epoch for place in after.partitions] == [0]


async def test_partitions_that_are_added_are_seen_and_none_vanish(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        cluster = cluster_of(made)
        await cluster.topic("orders", timeout=5)
        logs = brokers.topics["orders"].logs
        logs.append(type(logs[0])())
        await cluster.refreshed(5)
        assert leaders(cluster) == [1, 1, 1]
        last = logs.pop()  # as a broker that lags behind says
        await cluster.refreshed(5)
        assert leaders(cluster) == [1, 1, 1]
        logs.append(last)


async def test_who_waits_is_not_paced_until_there_were_many(brokers: Pretender) -> None:
    names = [f"orders-{number}" for number in range(40)]
    for name in names:
        brokers.create(name, 1)
    async with driver(brokers.url) as made:
        cluster = cluster_of(made)
        began = time.monotonic()
        for name in names[:15]:
            await cluster.topic(name, timeout=5)
        assert time.monotonic() - began < 8 * PAUSE
        for name in names[15:]:
            await cluster.topic(name, timeout=5)
        assert time.monotonic() - began > 18 * PAUSE


async def test_looks_are_paced_and_shared(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        cluster = cluster_of(made)
        await cluster.refreshed(5)
        before = brokers.seen[METADATA]
        await asyncio.gather(*(cluster.refreshed(5) for _ in range(100)))
        assert brokers.seen[METADATA] - before <= 2
        before, began = brokers.seen[METADATA], time.monotonic()
        while time.monotonic() - began < 10 * PAUSE:
            cluster.stale()
            await asyncio.sleep(0)
        assert 2 <= brokers.seen[METADATA] - before <= 11
        await asyncio.sleep(2 * PAUSE)
        before = brokers.seen[METADATA]
        await asyncio.sleep(4 * PAUSE)
        assert brokers.seen[METADATA] == before, "nobody asks without a cause"


async def test_a_topic_that_is_waited_for_is_looked_for(brokers: Pretender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brokerkit.drivers.kafka._cluster._ABSENT", 0.1)
    async with driver(brokers.url) as made:
        cluster, changed = cluster_of(made), asyncio.Event()
        cluster.watchers.add(changed.set)
        cluster.watch("later")
        cluster.watch("later")
        while cluster.known("later") is None:
            changed.clear()
            async with asyncio.timeout(5):
                await changed.wait()
            if brokers.seen[METADATA] > 3:
                brokers.topics.setdefault("later", brokers.topics["orders"])
        cluster.unwatch("later")
        brokers.names.clear()
        await cluster.refreshed(5)
        assert "later" in brokers.names
        cluster.unwatch("later")
        brokers.topics.pop("later")
        while cluster.known("later") is not None:
            await cluster.refreshed(5)
        brokers.names.clear()
        await cluster.refreshed(5)
        assert "later" not in brokers.names, "nobody wants to know"


async def test_a_broker_that_moves_is_found(brokers: Pretender) -> None:
    async with Pretender(2) as two:
        two.create("orders").logs[0].leader = 2
        async with driver(two.url) as made:
            cluster = cluster_of(made)
            await cluster.call(2, request(), timeout=5)
            await two.stop(2)
            two.ports.pop(2)
            await two.start(2)
            await cluster.refreshed(5)
            assert cluster.brokers[2] == ("127.0.0.1", two.ports[2])
            assert await cluster.call(2, request(), timeout=5)


# ---------------------------------------------------------------------- coordinators


async def test_a_coordinator_is_asked_for_once(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        cluster = cluster_of(made)
        assert await cluster.coordinator("group", timeout=5) == 1
        assert await cluster.coordinator("group", timeout=5) == 1
        assert brokers.seen[COORDINATOR] == 1
        cluster.forget_coordinator("group")
        assert await cluster.coordinator("group", timeout=5) == 1
        assert brokers.seen[COORDINATOR] == 2


async def test_a_coordinator_that_is_not_there_is_waited_for_at_a_pace(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        cluster = cluster_of(made)
        brokers.denied["group"] = ErrorCode.coordinator_not_available
        with pytest.raises(BrokerUnavailable, match="group group"):
            await cluster.coordinator("group", timeout=0.5)
        assert brokers.seen[COORDINATOR] <= 6
        waiting = asyncio.ensure_future(cluster.coordinator("group", timeout=5))
        await asyncio.sleep(0.05)
        brokers.denied.clear()
        assert await waiting == 1


async def test_a_group_that_may_not_be_seen(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        brokers.denied["group"] = ErrorCode.group_authorization_failed
        with pytest.raises(AuthorizationError, match="group group"):
            await cluster_of(made).coordinator("group", timeout=5)
        assert brokers.seen[COORDINATOR] == 1


async def test_what_is_begun_for_a_caller_knows_nothing_of_its_context(brokers: Pretender) -> None:
    """A connection outlives the call that it was made for by far."""
    span: contextvars.ContextVar[str] = contextvars.ContextVar("span", default="none")
    seen: list[str] = []

    async def task() -> None:
        seen.append(span.get())

    async with driver(brokers.url) as made:
        span.set("of the caller")
        cluster_of(made).begin(task)
        await asyncio.sleep(0)
        assert seen == ["none"]
