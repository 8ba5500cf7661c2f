"""Which kind of group serves a queue: decided once, by the cluster's own record of it, whoever asks."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from confluent_kafka import Consumer
from kio.schema.errors import ErrorCode

from brokerkit import AuthorizationError, Broker, ConfigError, Queue, connect
from brokerkit.address import AnyQueue
from brokerkit.drivers.kafka import _coordinator, _engine, _share_group
from brokerkit.drivers.kafka._coordinator import committed, persist, store_start
from brokerkit.drivers.kafka._create import create
from brokerkit.drivers.kafka._engine import Terms, engine_of, lease_of, reserve
from brokerkit.drivers.kafka._remove import delete_groups, delete_topics
from brokerkit.drivers.kafka._share_group import Place, begin, places, settings
from brokerkit.drivers.kafka._view import TopicInfo
from brokerkit.errors import BrokerUnavailable
from tests.servers.access import USER
from tests.servers.kafka import Endpoints, Right, rights, shared_kafka

from .administrator import Opened, opened
from .consuming import widen

pytestmark = pytest.mark.asyncio
PATIENCE = 20.0


def named(name: str = "emails", **options: Any) -> AnyQueue:
    """Return a queue of this test alone."""
    queue: AnyQueue = Queue(name, bytes, **options)
    return queue._named(f"e.{uuid.uuid4().hex[:12]}.{name}")


class Process(Opened):
    """An administrator of one queue."""

    queue: AnyQueue

    async def make(self) -> TopicInfo:
        return await create(self.cluster, self.queue, timeout=PATIENCE)

    async def reserve(self) -> Terms:
        info = await self.cluster.topic(self.queue.name, timeout=PATIENCE, fresh=True)
        return await reserve(self.cluster, self.queue, info, timeout=PATIENCE)

    async def engine(self) -> str | None:
        return await engine_of(self.cluster, self.queue.name, timeout=PATIENCE)

    async def places(self, count: int = 4) -> dict[int, Place]:
        return await places(self.cluster, self.queue.name, self.queue.name, range(count), timeout=PATIENCE)


async def heard(r: Process, reset: str = "earliest") -> dict[str, str]:
    """Return the settings of the group once brokers have heard of them."""
    async with asyncio.timeout(PATIENCE):
        while (found := await settings(r.cluster, r.queue.name, timeout=PATIENCE))[_share_group.RESET] != reset:
            await asyncio.sleep(0.05)
    return found


@contextlib.asynccontextmanager
async def process(
    queue: AnyQueue, url: str | None = None, *, keep: bool = False, **options: Any
) -> AsyncIterator[Process]:
    """Connect, and unless it is to be *kept* remove the queue at the end."""
    async with opened(url or shared_kafka().url(), **options) as r:
        made = Process(r.context, r.topic)
        made.queue = queue
        try:
            yield made
        finally:
            if not keep:
                await delete_topics(r.cluster, [queue.name], timeout=PATIENCE)
                await delete_groups(r.cluster, [queue.name], timeout=PATIENCE)


async def test_a_queue_is_served_by_a_share_group_from_its_first_message_on() -> None:
    async with process(named(lease=5)) as r:
        info = await r.make()
        assert len(info.partitions) == 4
        await r.put(r.queue, [str(number) for number in range(40)])
        assert await r.engine() is None
        terms = await r.reserve()
        assert terms == Terms("share", limit=terms.limit, lock=5.0, window=terms.window)
        assert await r.engine() == "share"
        found = await r.places()
        assert {place.start for place in found.values()} == {0}
        assert sum(place.lag for place in found.values()) == 40


async def test_it_has_the_settings_of_the_queue_and_the_widest_that_brokers_take() -> None:
    async with process(named(lease=7.5)) as r:
        await r.make()
        terms = await r.reserve()
        found = await heard(r)
        assert found[_share_group.LOCK] == "7500"
        assert found[_share_group.ISOLATION] == "read_committed"
        assert found[_share_group.RENEW] == "true"
        # As brokers are left by most operators: 10 deliveries and 4,000 records at most.
        assert (terms.limit, terms.window) == (10, 4000)
        assert (found[_share_group.LIMIT], found[_share_group.WINDOW]) == ("10", "4000")
        assert await r.reserve() == terms


async def test_the_oldest_brokers_with_share_groups_know_fewer_settings() -> None:
    """How often a record may be delivered is none of a group's, but it counts."""
    async with process(named(lease=7), shared_kafka("4.2.1").url()) as r:
        await r.make()
        assert await r.reserve() == Terms("share", limit=5, lock=7.0, window=2000)
        assert _share_group.LIMIT not in await heard(r)


@pytest.mark.parametrize("lease", [100.0, 86400.0])
async def test_a_lease_that_brokers_do_not_take_is_the_next_that_they_do(
    lease: float, caplog: pytest.LogCaptureFixture
) -> None:
    async with process(named(lease=lease)) as r:
        await r.make()
        assert (await r.reserve()).lock == 60.0

        async def told(wanted: float) -> float | None:
            return await lease_of(r.cluster, r.queue.name, wanted, timeout=PATIENCE)

        # It is no other setting than the program says: no number of that size makes another one.
        assert await told(lease) == lease
        assert f"allow no lease of {lease:g} s: 60 s count (group.share.max.record" in caplog.text
        caplog.clear()
        assert await told(61.0) == 61.0
        assert caplog.text
        caplog.clear()
        assert await told(60.0) == 60.0
        assert await told(59.0) == 60.0
        assert not caplog.text


async def test_a_lease_that_is_too_short_is_the_next_one_too() -> None:
    """Not as long as an operator may ask for."""

    async def takes(cluster: object, group: str, name: str, value: int, *, timeout: float) -> bool:
        return 15_000 <= value <= 60_000

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_engine, "takes", takes)
        end = asyncio.get_running_loop().time() + 5
        for wanted, expected in ((1_000, 15_000), (14_999, 15_000), (86_400_000, 60_000), (30_500, 30_500)):
            assert await _engine._lock_for(None, "g", wanted, end) == expected  # type: ignore[arg-type]


async def test_who_reserves_it_takes_the_lease_that_the_queue_was_made_with() -> None:
    queue = named(lease=7)
    other: AnyQueue = Queue("emails", bytes, lease=9)
    async with process(queue) as r, process(other._named(queue.name), keep=True) as later:
        await r.make()
        assert (await later.reserve()).lock == 7.0


async def test_reserving_at_once_from_many_processes_is_reserving_once() -> None:
    queue = named()
    async with process(queue) as a, process(queue) as b, process(queue) as c:
        await a.make()
        await a.put(queue, ["m"])
        found = await asyncio.gather(*(r.reserve() for r in (a, b, c, a, b, c)))
        assert len(set(map(repr, found))) == 1
        assert sum(place.lag for place in (await a.places()).values()) == 1


async def test_reserving_again_never_sets_a_position_back() -> None:
    async with process(named()) as r:
        await r.make()
        await r.reserve()
        await r.put(r.queue, [str(number) for number in range(20)])
        await begin(r.cluster, r.queue.name, r.queue.name, {0: 3, 1: 2}, timeout=PATIENCE)
        await r.reserve()
        found = await r.places()
        assert [found[number].start for number in range(4)] == [3, 2, 0, 0]


async def test_who_was_held_up_after_looking_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was frozen, and meanwhile another process has reserved the group and worked: it would begin anew."""
    async with process(named()) as r:
        await r.make()
        look, begun, looks = _share_group.describe, _share_group.begin, 0

        async def late(*args: Any, **options: Any) -> Any:
            nonlocal looks
            looks += 1
            found = await look(*args, **options)
            monkeypatch.setattr(_engine, "_FRESH", -1.0 if looks == 1 else 1.0)
            return found

        calls = 0

        async def counted(*args: Any, **options: Any) -> bool:
            nonlocal calls
            calls += 1
            assert looks > 1, "it goes by what it saw before"
            return await begun(*args, **options)

        monkeypatch.setattr(_engine, "describe", late)
        monkeypatch.setattr(_engine, "begin", counted)
        assert (await r.reserve()).engine == "share"
        assert calls == 1


@pytest.mark.parametrize("version", ["4.3.1", "3.9.2"])
async def test_what_takes_long_to_be_carried_out_goes_by_another_look(
    version: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that is loading: meanwhile another process reserves the group, works, and leaves."""
    queue, url = named(), shared_kafka(version).url()
    async with process(queue, url, queue_partitions=2) as quick, process(queue, url, keep=True) as slow:
        await quick.make()
        await quick.put(queue, ["a", "b"])
        asked = persist

        async def loading(cluster: object, group: str, request: Any, codes: Any, what: str, timeout: float) -> Any:
            if cluster is not slow.cluster or "storing" not in what:
                return await asked(cluster, group, request, codes, what, timeout)  # type: ignore[arg-type]
            monkeypatch.undo()
            await quick.reserve()
            if version == "3.9.2":
                await store_start(quick.cluster, queue.name, queue.name, {0: (1, ""), 1: (1, "")}, PATIENCE)
            else:
                await begin(quick.cluster, queue.name, queue.name, {0: 1, 1: 1}, timeout=PATIENCE)
            assert timeout <= 1.0
            raise BrokerUnavailable("the group's coordinator is loading what it knows")

        monkeypatch.setattr(_share_group, "persist", loading)
        monkeypatch.setattr(_coordinator, "persist", loading)
        assert (await slow.reserve()).engine == ("classic" if version == "3.9.2" else "share")
        if version == "3.9.2":
            stored = await committed(slow.cluster, queue.name, queue.name, range(2), PATIENCE)
            assert set(stored.values()) == {(1, "")}
        else:
            assert {place.start for place in (await slow.places(2)).values()} == {1}


async def test_a_topic_that_was_made_again_is_read_from_its_first_message_on() -> None:
    async with process(named()) as r:
        await r.make()
        await r.reserve()
        await delete_topics(r.cluster, [r.queue.name], timeout=PATIENCE)
        await r.make()
        await r.put(r.queue, ["m"])
        assert {place.start for place in (await r.places()).values()} == {-1}
        await r.reserve()
        found = await r.places()
        assert {place.start for place in found.values()} == {0}
        assert sum(place.lag for place in found.values()) == 1


async def test_partitions_that_are_added_are_read_from_their_first_message_on() -> None:
    async with process(named()) as r:
        await r.make()
        await r.reserve()
        await widen(shared_kafka(), r.queue.name, 6)
        async with asyncio.timeout(PATIENCE):
            while len((await r.cluster.topic(r.queue.name, timeout=PATIENCE, fresh=True)).partitions) < 6:
                await asyncio.sleep(0.05)
        assert (await r.places(6))[5].start == -1
        await r.reserve()
        assert {place.start for place in (await r.places(6)).values()} == {0}


# ---------------------------------------------------------------------- brokers without share groups


async def test_without_share_groups_a_queue_is_served_by_a_classic_group() -> None:
    async with process(named(), shared_kafka("3.9.2").url()) as r:
        assert len((await r.make()).partitions) == 32
        await r.put(r.queue, ["m"])
        assert await r.engine() is None
        assert await r.reserve() == Terms("classic")
        assert await r.engine() == "classic"
        stored = await committed(r.cluster, r.queue.name, r.queue.name, range(32), PATIENCE)
        assert set(stored.values()) == {(0, "")}
        await store_start(r.cluster, r.queue.name, r.queue.name, {3: (1, "")}, PATIENCE)
        assert await r.reserve() == Terms("classic")
        stored = await committed(r.cluster, r.queue.name, r.queue.name, range(32), PATIENCE)
        assert stored[3] == (1, "")


async def test_share_groups_that_are_switched_off_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = persist

    async def off(*args: Any) -> Any:
        answer = await asked(*args)
        if type(answer).__name__ == "ShareGroupDescribeResponse":
            (group,) = answer.groups
            object.__setattr__(group, "error_code", ErrorCode.unsupported_version)
        return answer

    monkeypatch.setattr(_share_group, "persist", off)
    async with process(named()) as r:
        assert len((await r.make()).partitions) == 32
        assert await r.reserve() == Terms("classic")
        assert await r.engine() == "classic"


async def test_the_number_of_partitions_can_be_chosen() -> None:
    for version in ("4.3.1", "3.9.2"):
        async with process(named(), shared_kafka(version).url(), queue_partitions=3) as r:
            assert len((await r.make()).partitions) == 3


async def test_a_classic_group_stays_one_where_share_groups_are_new() -> None:
    """After an upgrade of the brokers: until it is moved."""
    async with process(named()) as r:
        await r.make()
        await store_start(r.cluster, r.queue.name, r.queue.name, {0: (0, "")}, PATIENCE)
        assert await r.reserve() == Terms("classic")


async def test_who_takes_the_cluster_for_an_older_one_is_refused() -> None:
    """While brokers are upgraded one by one: the brokers refuse to let two engines serve one queue."""
    queue = named()
    async with process(queue) as new, process(queue) as old:
        await new.make()
        await new.reserve()

        async def none(*, timeout: float) -> bool:
            return False

        old.cluster.shares = none  # type: ignore[method-assign]
        with pytest.raises(ConfigError, match="of another kind"):
            await old.reserve()
        assert await new.engine() == "share"


async def test_a_group_of_another_kind_is_refused() -> None:
    async with process(named()) as r:
        await r.make()
        consumer = Consumer({
            "bootstrap.servers": shared_kafka().bootstrap(),
            "group.id": r.queue.name,
            "group.protocol": "consumer",
        })  # fmt: skip
        try:
            consumer.subscribe([r.queue.name])
            async with asyncio.timeout(PATIENCE):
                while not consumer.assignment():
                    await asyncio.to_thread(consumer.poll, 0.1)
            with pytest.raises(ConfigError, match="another kind"):
                await r.reserve()
        finally:
            consumer.close()


async def test_an_answer_that_never_comes_is_no_decision() -> None:
    async with process(named()) as r:
        info = await r.make()

        async def silent(*args: Any, **options: Any) -> Any:
            raise BrokerUnavailable("no answer")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_share_group, "persist", silent)
            with pytest.raises(BrokerUnavailable):
                await reserve(r.cluster, r.queue, info, timeout=0.5)
        assert await r.engine() is None


# ---------------------------------------------------------------------- rights


@contextlib.asynccontextmanager
async def allowed(*given: Right) -> AsyncIterator[Endpoints]:
    endpoints = shared_kafka(rights=True)
    with endpoints.wire() as admin:
        admin.allow(given)
        try:
            yield endpoints
        finally:
            admin.forbid(given)


def right(resource: Any, name: str, operation: str) -> Right:
    return Right(USER, resource, name, operation)


def on_topic(queue: AnyQueue) -> list[Right]:
    return [right("topic", queue.name, operation) for operation in ("read", "write", "create")]


@pytest.mark.parametrize(
    ("held", "named_"),
    [([], "DESCRIBE on group"), (["describe"], "READ on group"), (["delete", "alter_configs"], "READ on group")],
)
async def test_who_may_not_use_the_group_is_refused_and_decides_nothing(held: list[str], named_: str) -> None:
    queue = named()
    given = [*on_topic(queue), *(right("group", queue.name, operation) for operation in held)]
    async with allowed(*given) as endpoints, process(queue, endpoints.url()) as admin:
        async with process(queue, endpoints.url("SASL"), keep=True) as r:
            await r.make()
            with pytest.raises(AuthorizationError, match=named_) as caught:
                await r.reserve()
            assert queue.name in str(caught.value)
            assert await admin.engine() is None
            await admin.reserve()
            with pytest.raises(AuthorizationError, match=named_):
                await begin_or_reserve(r)
            assert await admin.engine() == "share"


async def begin_or_reserve(r: Process) -> None:
    """Do what a consumer does that knows the engine: who may only look at the group is refused when it joins."""
    await r.reserve()
    await begin(r.cluster, r.queue.name, r.queue.name, {0: 0}, timeout=PATIENCE)


async def test_without_the_right_to_configure_the_group_nothing_is_missed_either(
    caplog: pytest.LogCaptureFixture,
) -> None:
    queue = named()
    given = [*on_topic(queue), right("group", queue.name, "read")]
    async with allowed(*given) as endpoints, process(queue, endpoints.url()) as admin:
        async with process(queue, endpoints.url("SASL"), keep=True) as r:
            await r.make()
            await r.put(queue, [str(number) for number in range(10)])
            # What may not be read is the least: so nothing is dropped that could have been kept.
            terms = await r.reserve()
            assert (terms.engine, terms.limit) == ("share", 2)
            assert "partitions that are added to it while it is consumed" in caplog.text
            assert f"on group {queue.name}" in caplog.text
            found = await admin.places()
            assert {place.start for place in found.values()} == {0}
            assert sum(place.lag for place in found.values()) == 10
            assert (await settings(admin.cluster, queue.name, timeout=PATIENCE))[_share_group.RESET] == "latest"


async def test_who_may_not_let_live_members_begin_with_the_first_message_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Others have made the group, it is live, and has partitions that it has not read: messages would be missed."""
    queue = named()
    given = [*on_topic(queue), right("group", queue.name, "read"), right("group", queue.name, "describe_configs")]
    async with (
        allowed(*given) as endpoints,
        process(queue, endpoints.url()),
        process(queue, endpoints.url("SASL"), keep=True) as r,
    ):
        await r.make()
        await r.reserve()

        async def nothing(*args: Any, **options: Any) -> dict[int, Place]:
            return {0: Place(-1, -1)}

        async def live(*args: Any, **options: Any) -> bool:
            return False

        monkeypatch.setattr(_engine, "places", nothing)
        monkeypatch.setattr(_engine, "begin", live)
        with pytest.raises(AuthorizationError, match="ALTER_CONFIGS on group"):
            await r.reserve()


@pytest.mark.parametrize("first", ["allowed", "refused"])
async def test_two_processes_at_once_of_which_one_may_not_use_the_group(first: str) -> None:
    """It is refused, and serves the queue by no other engine: every message is handled once."""
    prefix = f"e.{uuid.uuid4().hex[:12]}."
    queue = Queue("emails", str)
    others = [one for one in rights(prefix) if one.resource != "group"]
    seen: Counter[str] = Counter()
    async with allowed(*others) as endpoints:
        able = connect(endpoints.url(query=f"prefix={prefix}"))
        unable = connect(endpoints.url("SASL", query=f"prefix={prefix}"))
        async with able, unable:
            await unable.declare(queue)
            await unable.publish_many(queue, [f"v{number}" for number in range(50)])

            async def refused() -> None:
                with pytest.raises(AuthorizationError, match=f"DESCRIBE on group {prefix}emails"):
                    await drain(unable, queue, seen)

            await asyncio.gather(*([drain(able, queue, seen), refused()][:: 1 if first == "allowed" else -1]))
            await refused()
            await able.delete(queue)
    assert seen == Counter(f"v{number}" for number in range(50))


async def drain(broker: Broker, queue: Queue[str], seen: Counter[str]) -> None:
    async with broker.subscribe(queue) as messages, asyncio.timeout(PATIENCE):
        while len(seen) < 50 or await messages.receive(limit=1, timeout=0.5):
            for message in await messages.receive(limit=100, timeout=1):
                seen[message.value] += 1
                await message.ack(confirm=True)
