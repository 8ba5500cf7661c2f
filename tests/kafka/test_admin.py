"""What exists, how much is left to do, and moving or removing it."""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from kio.schema.metadata.v12 import request as requests

from brokerkit import connect
from brokerkit.address import Topic, redrive_queue
from brokerkit.driver import Source
from brokerkit.drivers._log import Tracker
from brokerkit.drivers.kafka import _remove
from brokerkit.drivers.kafka._cut import cut
from brokerkit.errors import AuthorizationError, BrokerUnavailable, ConfigError, NotFound, PositionLost
from brokerkit.policy import Start
from tests.servers.access import USER
from tests.servers.kafka import Endpoints, KafkaCluster, Right, shared_kafka
from tests.servers.kafka.wire import Resource

from .administrator import GROUP, named, opened

pytestmark = pytest.mark.asyncio


def url() -> str:
    return shared_kafka().url()


@pytest.fixture(scope="module")
def pair() -> Iterator[Endpoints]:
    with KafkaCluster(brokers=2) as cluster:
        yield cluster.endpoints


# ---------------------------------------------------------------------- declare and describe


@pytest.mark.parametrize("retention", [None, 3600.0, 1.0, 1234.5678901, math.inf, 366 * 86400.0 * 100])
async def test_what_is_declared_is_described(retention: float | None) -> None:
    async with opened(url(), named(3, retention=retention)) as r:
        assert await r.admin.describe(r.topic) is None
        await r.admin.declare(r.topic)
        described = await r.admin.describe(r.topic)
        assert described == {"partitions": 3, "retention": r.topic.retention}
        await r.admin.declare(r.topic)
        assert await r.admin.describe(r.topic) == described


async def test_what_exists_is_not_altered() -> None:
    async with opened(url(), named(3, retention=3600)) as r:
        other = Topic(r.topic.name, bytes, partitions=5, retention=60)
        await r.admin.declare(r.topic)
        await r.put(r.topic, ["m"], timestamp=time.time())
        await r.admin.declare(other)
        assert await r.admin.describe(other) == {"partitions": 3, "retention": 3600.0}
        assert await r.ids(r.topic) == ["m"]


async def test_many_declare_at_once() -> None:
    topic = named(6)
    async with opened(url(), topic) as a, opened(url(), topic) as b:
        await asyncio.gather(*(r.admin.declare(topic) for r in (a, b, a, b)))
        assert len(await a.put(topic, ["m"])) == 1
        assert await b.ids(topic) == ["m"]


async def test_what_is_derived_is_described_without_settings() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        for address in (r.letters, r.again):
            assert await r.admin.describe(address) is None
            await r.admin.declare(address)
            assert await r.admin.describe(address) == {}


async def test_settings_that_cannot_be_are_refused() -> None:
    async with opened(url(), replication=7) as r:
        with pytest.raises(ConfigError, match=r"replication"):
            await r.admin.declare(r.topic)
        assert await r.admin.describe(r.topic) is None


@pytest.mark.parametrize("option, copies", [(1, 1), (-1, 2)], ids=["one", "as-the-cluster-does"])
async def test_topics_are_stored_as_often_as_asked_for(pair: Endpoints, option: int, copies: int) -> None:
    async with opened(pair.url(), named(3), replication=option) as r:
        for address in (r.topic, r.letters, r.again):
            await r.admin.declare(address)
        positions = await r.bury(["a"])
        assert await r.admin.redrive(r.letters, positions, r.again) == [None]  # makes the log of what is gone
        names = [*(address.name for address in (r.topic, r.letters, r.again)), f"{r.group_id}..gone"]
        entity: Any = requests
        request = entity.MetadataRequest(
            topics=tuple(entity.MetadataRequestTopic(topic_id=None, name=name) for name in names),
            allow_auto_topic_creation=False,
            include_topic_authorized_operations=False,
        )
        answer = await r.cluster.call(None, request, timeout=10)
        found = {str(topic.name): {len(place.replica_nodes) for place in topic.partitions} for topic in answer.topics}
        assert found == {name: {copies} for name in names}


# ---------------------------------------------------------------------- delete


def left_of(name: str) -> list[str]:
    with shared_kafka().wire() as wire:
        return sorted(topic for topic in wire.cluster(None).topics if topic.startswith(name))


async def test_deleting_leaves_nothing_behind() -> None:
    async with opened(url()) as r:
        beside = Topic(r.topic.name + "-too", bytes, partitions=1)
        for address in (r.topic, beside):
            await r.admin.declare(address)
        await r.put(r.topic, ["a"])
        positions = await r.bury(["b", "c"])
        await r.admin.redrive(r.letters, positions[:1], r.again)
        await r.commit({0: 0, 1: 0})
        await r.commit({0: 0}, r.topic.name + "..others")
        assert left_of(r.topic.name) == sorted(
            [r.topic.name, beside.name, *(f"{r.topic.name}..{GROUP}..{last}" for last in ("again", "dead", "gone"))]
        )
        await r.admin.delete(r.topic, None)
        assert left_of(r.topic.name) == [beside.name]
        assert await r.admin.describe(r.topic) is None
        assert await r.admin.describe(r.letters) is None
        await r.admin.delete(r.topic, None)
        await r.admin.declare(r.topic)
        assert set((await r.stored()).values()) == {None}
        assert await r.seen(r.topic) == await r.seen(r.letters) == []


async def test_deleting_a_group_leaves_the_others() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        positions = await r.bury(["a", "b"])
        await r.admin.redrive(r.letters, positions[:1], r.again)
        other = r.topic.dead_letters("other")
        await r.put(other, ["c"])
        await r.commit({0: 0})
        await r.commit({0: 0}, r.topic.name + "..other")
        await r.admin.delete(r.topic, GROUP)
        await r.admin.delete(r.topic, GROUP)
        assert left_of(r.topic.name) == [r.topic.name, other.name]
        assert set((await r.stored()).values()) == {None}
        assert (await r.stored(r.topic.name + "..other"))[0] == (0, "")
        assert await r.ids(other) == ["c"]


async def test_deleting_letters_leaves_the_topic() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        positions = await r.bury(["a", "b"])
        await r.admin.redrive(r.letters, positions[:1], r.again)
        await r.admin.delete(r.letters, None)
        assert left_of(r.topic.name) == [r.topic.name, r.again.name]
        await r.bury(["c"])  # in a topic of the same name, that begins with the offset that was moved in the old one
        assert await r.ids(r.letters) == ["c"]
        with pytest.raises(ConfigError, match="no groups"):
            await r.admin.delete(r.letters, GROUP)


async def test_many_derived_topics_are_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_remove, "_AT_ONCE", 5)
    async with opened(url(), named(1)) as r:
        await r.admin.declare(r.topic)
        with shared_kafka().wire() as wire:
            for number in range(12):
                wire.create(f"{r.topic.name}..g{number}..dead")
        await r.admin.delete(r.topic, None)
        assert left_of(r.topic.name) == []


async def test_deleting_goes_on_at_another_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(url(), named(1)) as r:
        await r.admin.declare(r.topic)
        some, calls = _remove._delete_some, itertools.count()

        async def unlucky(*args: Any) -> Any:
            if not next(calls):
                raise BrokerUnavailable("that one is down")
            return await some(*args)

        monkeypatch.setattr(_remove, "_delete_some", unlucky)
        await r.admin.delete(r.topic, None)
        assert left_of(r.topic.name) == []
        assert next(calls) == 2


# ---------------------------------------------------------------------- backlog


async def test_a_group_that_has_not_begun_has_everything_to_do() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        found = await r.admin.backlog(Source(r.topic, GROUP))
        assert (found.waiting, found.in_flight, found.delayed, found.dead, found.oldest_age) == (0, 0, 0, 0, None)
        now = time.time()
        for number in range(5):
            await r.put(r.topic, [f"m{number}"], key=b"%d" % number, timestamp=now - 50 + number)
        found = await r.admin.backlog(Source(r.topic, GROUP))
        assert (found.waiting, found.in_flight) == (5, 0)
        assert found.oldest_age is not None
        assert 50 <= found.oldest_age < 60
        assert (await r.admin.backlog(Source(r.topic, GROUP, Start.LATEST))).waiting == 0


async def test_what_was_done_is_not_in_the_backlog() -> None:
    async with opened(url(), named(2)) as r:
        await r.admin.declare(r.topic)
        now = time.time()
        for number in range(20):
            await r.put(r.topic, [f"m{number:02}"], key=b"%d" % number, timestamp=now - 100 + number)
        everything = await r.seen(r.topic)
        sizes = [sum(f"[{partition}]@" in stored.position for stored in everything) for partition in (0, 1)]
        tracker = Tracker()
        tracker.hand_out_run(5)
        for offset in (0, 2, 3):
            tracker.done(offset)
        tracker.release(4)
        await r.commit({0: tracker, 1: sizes[1]})
        found = await r.admin.backlog(Source(r.topic, GROUP))
        # 1 is in hand, 4 waits again, and so does what lies behind it
        assert (found.waiting, found.in_flight) == (1 + sizes[0] - 5, 1)
        there = [stored for stored in everything if "[0]@" in stored.position]
        assert found.oldest_age == pytest.approx(time.time() - there[1].record.timestamp, abs=5)
        assert (await r.admin.backlog(Source(r.topic, "another"))).waiting == 20


async def test_what_was_removed_is_not_in_the_backlog() -> None:
    async with opened(url(), named(1)) as r:
        await r.admin.declare(r.topic)
        await r.put(r.topic, [f"m{number}" for number in range(10)], timestamp=time.time())
        tracker = Tracker(2)
        tracker.hand_out_run(3)
        tracker.release(3)
        await r.commit({0: tracker})
        info = await r.cluster.topic(r.topic.name, timeout=5)
        await cut(r.cluster, info, {0: 6}, timeout=5)
        found = await r.admin.backlog(Source(r.topic, GROUP))
        assert (found.waiting, found.in_flight) == (4, 2)  # in hand they may be still, but nobody gets 3 again
        await cut(r.cluster, info, {0: 10}, timeout=5)
        found = await r.admin.backlog(Source(r.topic, GROUP))
        assert (found.waiting, found.in_flight, found.oldest_age) == (0, 2, None)


async def test_letters_and_what_comes_back_are_counted() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        now = time.time()
        assert (await r.admin.backlog(Source(r.letters))).waiting == 0
        positions = await r.bury(["a", "b", "c"], timestamp=now - 30)
        assert (await r.admin.backlog(Source(r.topic, GROUP))).dead == 3
        found = await r.admin.backlog(Source(r.letters))
        assert (found.waiting, found.in_flight, found.dead) == (3, 0, None)
        assert found.oldest_age == pytest.approx(30, abs=5)
        await r.admin.redrive(r.letters, positions[:2], r.again)
        assert (await r.admin.backlog(Source(r.topic, GROUP))).dead == 1
        assert (await r.admin.backlog(Source(r.letters))).waiting == 1
        found = await r.admin.backlog(Source(r.again))
        assert (found.waiting, found.in_flight, found.dead) == (2, 0, None)
        assert found.oldest_age == pytest.approx(30, abs=5)  # since it was first published


async def test_the_backlog_of_what_does_not_exist_is_not_found() -> None:
    async with opened(url()) as r:
        for source in (Source(r.topic), Source(r.topic, GROUP), Source(r.letters), Source(r.again)):
            with pytest.raises(NotFound, match="orders"):
                await r.admin.backlog(source)
        await r.admin.declare(r.topic)
        assert (await r.admin.backlog(Source(r.topic))).waiting is None
        with pytest.raises(NotFound):
            await r.admin.backlog(Source(redrive_queue(r.topic, "nobody")))


async def test_the_time_of_the_oldest_is_looked_up_once() -> None:
    async with opened(url(), named(1)) as r:
        await r.admin.declare(r.topic)
        await r.put(r.topic, ["a", "b"], timestamp=time.time())
        await r.admin.backlog(Source(r.topic, GROUP))
        assert len(r.admin._ages._times) == 1
        await r.admin.backlog(Source(r.topic, GROUP))
        assert len(r.admin._ages._times) == 1


# ---------------------------------------------------------------------- seek


async def test_seek_stores_where_a_group_goes_on() -> None:
    async with opened(url(), named(1)) as r:
        await r.admin.declare(r.topic)
        positions = await r.put(r.topic, ["a", "b"], timestamp=1e9) + await r.put(r.topic, ["c", "d"], timestamp=1.1e9)
        tracker = Tracker()
        tracker.hand_out_run(3)
        await r.commit({0: tracker})
        for start, expected in (
            (Start.LATEST, 4),
            (Start.EARLIEST, 0),
            (Start.at(datetime.fromtimestamp(1.05e9, UTC)), 2),
            (Start.position(positions[1]), 1),
        ):
            await r.admin.seek(Source(r.topic, GROUP, start))
            assert (await r.stored())[0] == (expected, ""), start
        assert (await r.stored(r.topic.name + "..others"))[0] is None


async def test_seek_is_refused_where_it_makes_no_sense() -> None:
    async with opened(url(), named(1)) as r:
        with pytest.raises(NotFound, match="declare it"):
            await r.admin.seek(Source(r.topic, GROUP, Start.EARLIEST))
        await r.admin.declare(r.topic)
        positions = await r.put(r.topic, ["a", "b"])
        with pytest.raises(ConfigError, match="no groups"):
            await r.admin.seek(Source(r.again, GROUP, Start.EARLIEST))
        with pytest.raises(ConfigError, match="only a group"):
            await r.admin.seek(Source(r.topic, None, Start.EARLIEST))
        with pytest.raises(ConfigError, match="no position"):
            await r.admin.seek(Source(r.topic, GROUP, Start.position("nonsense")))
        info = await r.cluster.topic(r.topic.name, timeout=5)
        await cut(r.cluster, info, {0: 1}, timeout=5)
        with pytest.raises(PositionLost):
            await r.admin.seek(Source(r.topic, GROUP, Start.position(positions[0])))
        assert (await r.stored())[0] is None


async def test_a_group_with_live_members_is_neither_moved_nor_deleted() -> None:
    async with opened(url()) as r, connect(url()) as broker:
        async with broker.subscribe(r.topic, group=GROUP):
            for refused in (r.admin.seek(Source(r.topic, GROUP, Start.LATEST)), r.admin.delete(r.topic, GROUP)):
                with pytest.raises(ConfigError, match="live members; stop them first"):
                    await refused
            assert [place for place in (await r.stored()).values() if place] == [(0, "")] * 4
        await r.admin.seek(Source(r.topic, GROUP, Start.LATEST))
        await r.admin.delete(r.topic, GROUP)
        assert set((await r.stored()).values()) == {None}


async def test_a_topic_is_deleted_under_its_members() -> None:
    async with opened(url()) as r, connect(url()) as broker:
        async with broker.subscribe(r.topic, group=GROUP):
            await r.admin.delete(r.topic, None)
            assert await r.admin.describe(r.topic) is None


# ---------------------------------------------------------------------- rights


@contextmanager
def allowed(beginning: str, **operations: str) -> Iterator[None]:
    """Let the user of the tests do *operations*, by kind of resource, with what is called so."""
    wanted: list[tuple[Resource, str]] = [
        ("topic", operations.get("topic", "")),
        ("group", operations.get("group", "")),
    ]
    rights = [
        Right(USER, resource, beginning, operation, prefixed=True)
        for resource, words in wanted
        for operation in words.split()
    ]
    with shared_kafka(rights=True).wire() as wire:
        wire.allow(rights)
        try:
            yield
        finally:
            wire.forbid(rights)


async def test_a_missing_right_is_named() -> None:
    endpoints = shared_kafka(rights=True)
    topic = Topic(f"d{uuid.uuid4().hex[:12]}.orders", bytes, partitions=2, retention=3600)
    name = re.escape(topic.name)
    async with opened(endpoints.url("SASL"), topic) as r:
        calls: list[tuple[Callable[[], Awaitable[object]], str]] = [
            (lambda: r.admin.declare(topic), rf"topic {name}"),
            (lambda: r.admin.describe(topic), rf"DESCRIBE on topic {name}"),
            (lambda: r.seen(topic), rf"DESCRIBE on topic {name}"),
            (lambda: r.seen(r.letters), rf"DESCRIBE on topic {name}"),
            (lambda: r.admin.backlog(Source(topic, GROUP)), rf"DESCRIBE on (topic|group) {name}"),
            (lambda: r.admin.seek(Source(topic, GROUP)), rf"DESCRIBE on topic {name}"),
            (lambda: r.admin.delete(topic, None), rf"DELETE on topic {name}"),
            (lambda: r.admin.delete(topic, GROUP), rf"(DELETE|DESCRIBE) on group {name}\.\.{GROUP}"),
        ]
        for call, text in calls:
            with pytest.raises(AuthorizationError, match=text):
                await call()
        with endpoints.wire() as wire:
            wire.create(topic.name, 2, {"retention.ms": "3600000"})
        with allowed(topic.name, topic="describe"):
            await eventually(lambda: r.admin.declare(topic))
            with pytest.raises(AuthorizationError, match=rf"DESCRIBE_CONFIGS on topic {name}"):
                await r.admin.describe(topic)
            foreign = Topic(topic.name, bytes, owned=False)
            assert await r.admin.describe(foreign) == {"partitions": 2}
            assert (await r.admin.backlog(Source(r.letters))).waiting == 0
            for call, text in (
                (lambda: r.admin.delete(topic, None), rf"DELETE on topic {name}"),
                (lambda: r.admin.backlog(Source(topic, GROUP)), rf"DESCRIBE on group {name}"),
                (lambda: r.admin.seek(Source(topic, GROUP)), rf"(READ|DESCRIBE) on group {name}"),
            ):
                with pytest.raises(AuthorizationError, match=text):
                    await call()
            with allowed(topic.name, topic="describe_configs write", group="read"):
                await eventually(lambda: r.put(topic, ["m"], timestamp=time.time()))
                assert await r.admin.describe(topic) == {"partitions": 2, "retention": 3600.0}
                with pytest.raises(AuthorizationError, match=rf"READ on topic {name}"):
                    await r.seen(topic)
                with pytest.raises(AuthorizationError, match=rf"READ on topic {name}"):
                    await r.admin.backlog(Source(topic, GROUP))
        with endpoints.wire() as wire:
            wire.delete([topic.name])


async def test_letters_are_purged_without_the_right_to_delete() -> None:
    endpoints = shared_kafka(rights=True)
    topic = Topic(f"d{uuid.uuid4().hex[:12]}.orders", bytes, partitions=1, retention=None)
    async with opened(endpoints.url("SASL"), topic) as r:
        with allowed(topic.name, topic="create read write", group="read"):
            await eventually(lambda: r.admin.declare(topic))
            positions = await r.bury(["a", "b", "c"])
            assert await r.admin.redrive(r.letters, positions[1:2], r.again) == [None]
            assert await r.admin.purge(r.letters) == 2
            assert await r.admin.purge(r.letters) == 0
            assert await r.seen(r.letters) == []
            await r.bury(["d"])
            assert await r.ids(r.letters) == ["d"]
            assert (await r.admin.backlog(Source(r.letters))).waiting == 1
        async with opened(endpoints.url(), topic) as other:
            with endpoints.wire() as wire:
                assert wire.offset(r.letters.name, 0, end=False) == 0
            assert await other.ids(r.letters) == ["d"]
            await other.admin.delete(topic, None)


async def eventually(call: Callable[[], Awaitable[object]]) -> None:
    """Await *call* until the rights have reached the broker."""
    end = time.monotonic() + 30
    while True:
        try:
            await call()
        except AuthorizationError:
            if time.monotonic() > end:
                raise
        else:
            return
