"""Moving a queue from a classic group to a share group: nothing is lost, and nothing comes twice without a crash."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from brokerkit import AuthorizationError, Broker, CapabilityError, ConfigError, NotFound, Queue, connect
from brokerkit.address import AnyQueue
from brokerkit.driver import StoredRecord
from brokerkit.drivers._log import Tracker
from brokerkit.drivers.kafka import _migrate
from brokerkit.drivers.kafka._coordinator import members, store_start
from brokerkit.drivers.kafka._migrate import migrate
from brokerkit.drivers.kafka._share_group import describe
from brokerkit.errors import BrokerUnavailable
from tests.servers.kafka import Right, shared_kafka

from .test_engine import PATIENCE, Process, allowed, named, on_topic, process, right

pytestmark = pytest.mark.asyncio


async def classic(r: Process, trackers: dict[int, Tracker]) -> None:
    """Leave the group behind as consumers of a classic one do."""
    notes = {number: (tracker.base, tracker.encode()) for number, tracker in trackers.items()}
    assert await store_start(r.cluster, r.queue.name, r.queue.name, notes, PATIENCE)


async def moved(r: Process) -> None:
    await migrate(r.context, r.queue, timeout=PATIENCE)


async def there(r: Process) -> list[StoredRecord]:
    return await r.seen(r.queue)


async def stored(r: Process, ids: Sequence[str], **options: Any) -> dict[str, tuple[int, int]]:
    """Store records; return partition and offset by id."""
    positions = await r.put(r.queue, ids, **options)
    return {id: spot(position) for id, position in zip(ids, positions, strict=True)}


def spot(position: str) -> tuple[int, int]:
    """Return partition and offset of a position."""
    head, _, offset = position.rpartition("-")
    return int(head[head.rindex("[") + 1 : head.rindex("]")]), int(offset)


async def test_what_is_done_does_not_come_again_and_what_is_not_keeps_what_is_known_of_it() -> None:
    async with process(named(), queue_partitions=1) as r:
        await r.make()
        now = time.time()
        await stored(r, [f"m{number}" for number in range(10)], timestamp=now - 50, attempts=1, deliveries=1)
        tracker = Tracker()
        tracker.hand_out_run(8)
        for offset in (0, 1, 3, 6):
            tracker.done(offset)
        tracker.hold(2, 4)
        tracker.release(5)  # without a count; 2, 4 and 7 were in hand when their process died
        await classic(r, {0: tracker})
        await moved(r)
        assert await r.engine() == "share"
        found = {one.record.id: one.record for one in await there(r)}
        assert list(found) == ["m8", "m9", "m2", "m4", "m5", "m7"]
        counts = {id: (record.attempts, record.deliveries) for id, record in found.items()}
        assert counts == {"m2": (4, 2), "m4": (1, 2), "m5": (1, 1), "m7": (1, 2), "m8": (1, 1), "m9": (1, 1)}
        assert {round(now - record.timestamp) for record in found.values()} == {50}
        assert (await r.places(1))[0].start == 8
        with shared_kafka().wire() as wire:
            assert wire.offset(r.queue.name, 0, end=False) == 8
        again = [one.position for one in await there(r)]
        await moved(r)  # nothing to do
        assert [one.position for one in await there(r)] == again


async def test_a_short_delay_and_the_end_of_its_life_go_with_a_message() -> None:
    async with process(named(), queue_partitions=1) as r:
        await r.make()
        await r.put(r.queue, ["a"], delay=0.5, ttl=100.0)
        tracker = Tracker()
        tracker.hand_out_run(1)
        await classic(r, {0: tracker})
        (before,) = await there(r)
        await moved(r)
        (after,) = await there(r)
        assert after.record.expires == before.record.expires is not None
        with shared_kafka().wire() as wire:
            assert wire.offset(r.queue.name, 0, end=True) == 2


async def test_a_queue_that_nobody_has_read_and_one_that_was_never_reserved() -> None:
    for reserved in (False, True):
        async with process(named()) as r:
            await r.make()
            await r.put(r.queue, [f"m{number}" for number in range(20)])
            if reserved:
                await classic(r, {number: Tracker() for number in range(4)})
            await moved(r)
            assert await r.engine() == "share"
            assert sum(place.lag for place in (await r.places()).values()) == 20


async def test_a_group_with_members_is_refused_and_stays_as_it_was() -> None:
    queue = named()
    async with process(queue) as r, connect(shared_kafka().url(), declare="never") as broker:
        await r.make()
        await classic(r, {0: Tracker()})
        await r.put(queue, ["m"])
        public = Queue(queue.name, str)
        async with broker.subscribe(public) as messages:
            with pytest.raises(ConfigError, match="1 live members"):
                await moved(r)
            (message,) = await messages.receive(limit=1, timeout=PATIENCE)
            await message.ack(confirm=True)
        await moved(r)
        assert await there(r) == []


async def test_who_joins_meanwhile_waits_and_keeps_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half moved is moved for nobody: the consumer finds each message once, the call says why it failed."""
    queue = named()
    copy = _migrate._copy
    waiting = asyncio.Event()

    async with process(queue, queue_partitions=1) as r, connect(shared_kafka().url(), declare="never") as broker:
        await r.make()
        await r.put(queue, ["a", "b", "c"])
        tracker = Tracker()
        tracker.hand_out_run(2)
        tracker.done(0)
        await classic(r, {0: tracker})
        taken: list[str] = []

        async def consume() -> None:
            async with broker.subscribe(Queue(queue.name, str)) as messages, asyncio.timeout(PATIENCE):
                while len(taken) < 2 or await messages.receive(limit=1, timeout=0.5):
                    for message in await messages.receive(limit=10, timeout=1):
                        taken.append(message.id)
                        await message.ack(confirm=True)

        async def slow(*args: Any) -> None:
            consuming.append(asyncio.create_task(consume()))
            async with asyncio.timeout(PATIENCE):
                while len(await members(r.cluster, queue.name, PATIENCE)) < 2:
                    await asyncio.sleep(0.02)
            waiting.set()
            assert not taken
            await copy(*args)

        consuming: list[asyncio.Task[None]] = []
        monkeypatch.setattr(_migrate, "_copy", slow)
        with pytest.raises(ConfigError, match="live members"):
            await moved(r)
        assert waiting.is_set()
        await consuming[0]
        assert sorted(taken) == ["b", "c"]
        monkeypatch.setattr(_migrate, "_copy", copy)
        await moved(r)
        assert await there(r) == []


@pytest.mark.parametrize("step", ["_commit", "cut", "delete_groups", "decide"])
async def test_after_a_crash_it_goes_on(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost wherever it stopped; what was stored and not yet called done may come twice."""
    async with process(named(), queue_partitions=1) as r:
        await r.make()
        await r.put(r.queue, ["a", "b", "c", "d"])
        tracker = Tracker()
        tracker.hand_out_run(3)
        tracker.done(1)
        await classic(r, {0: tracker})

        async def crash(*args: Any, **options: Any) -> None:
            raise BrokerUnavailable("crashed")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_migrate, step, crash)
            with pytest.raises(BrokerUnavailable, match="crashed"):
                await moved(r)
        await moved(r)
        assert await r.engine() == "share"
        found = Counter(one.record.id for one in await there(r))
        assert found == (Counter("acdac") if step == "_commit" else Counter("acd"))
        found_group = await describe(r.cluster, r.queue.name, timeout=PATIENCE)
        assert found_group is not None
        assert found_group.members == ()


async def test_where_there_are_no_share_groups_it_is_refused() -> None:
    async with process(named(), shared_kafka("3.9.2").url()) as r:
        await r.make()
        await r.reserve()
        with pytest.raises(CapabilityError, match="no share groups"):
            await moved(r)
        assert await r.engine() == "classic"


async def test_a_queue_that_is_missing_is_not_found() -> None:
    async with process(named()) as r:
        with pytest.raises(NotFound, match="declare it"):
            await r.admin.migrate(r.queue)


@pytest.mark.parametrize(
    "missing", [("topic", "read"), ("topic", "write"), ("topic", "delete"), ("group", "read"), ("group", "delete")]
)
async def test_without_a_right_it_is_refused_with_its_name_and_nothing_is_lost(missing: tuple[str, str]) -> None:
    queue = named()
    given: list[Right] = [*on_topic(queue), right("topic", queue.name, "delete")]
    given += [right("group", queue.name, operation) for operation in ("read", "delete", "describe")]
    given = [one for one in given if (one.resource, one.operation) != missing]
    async with allowed(*given) as endpoints, process(queue, endpoints.url(), queue_partitions=1) as admin:
        await admin.make()
        await admin.put(queue, ["a", "b", "c"])
        tracker = Tracker()
        tracker.hand_out_run(2)
        tracker.done(0)
        await classic(admin, {0: tracker})
        async with process(queue, endpoints.url("SASL"), keep=True) as r:
            resource, operation = missing
            with pytest.raises(AuthorizationError, match=f"{operation.upper()} on {resource} {queue.name}"):
                await moved(r)
        await moved(admin)
        assert set(await admin.ids(queue)) == {"b", "c"}


async def test_under_load_nothing_is_lost_and_nothing_comes_twice() -> None:
    """Producers go on while consumers change over from one engine to the other."""
    prefix = f"e.{uuid.uuid4().hex[:12]}."
    queue = Queue("emails", str)
    real: AnyQueue = Queue("emails", bytes)._named(prefix + "emails")
    url = shared_kafka().url(query=f"prefix={prefix}&session=6")
    seen: Counter[str] = Counter()
    published: list[str] = []
    done = asyncio.Event()

    async def produce(broker: Broker) -> None:
        number = 0
        while not done.is_set():
            ids = [f"m{number + each}" for each in range(20)]
            await broker.publish_many(queue, [queue.outgoing("v", id=id) for id in ids])
            published.extend(ids)
            number += 20
            await asyncio.sleep(0.02)

    async def consume(broker: Broker, until: Any, skip: int) -> None:
        """Acknowledge in another order than that of the log; hold some back at the end."""
        async with broker.subscribe(queue, prefetch=200) as messages:
            held: list[Any] = []
            while not until():
                for message in await messages.receive(limit=50, timeout=0.2):
                    if skip and len(held) < 30 and hash(message.id) % skip == 0:
                        held.append(message)
                        continue
                    seen[message.id] += 1
                    await message.ack()

    async with process(real) as r, connect(url) as producer, connect(url) as one, connect(url) as two:
        await r.make()
        await classic(r, {number: Tracker() for number in range(4)})
        producing = asyncio.create_task(produce(producer))
        await asyncio.gather(*(consume(broker, lambda: len(seen) > 500, 7) for broker in (one, two)))
        assert await r.engine() == "classic"
        count = len(published)
        await producer.migrate(queue)
        assert await r.engine() == "share"
        assert len(published) > count, "nothing was published meanwhile"
        before = len(seen)
        async with connect(url) as three, connect(url) as four:
            waiting = [
                asyncio.create_task(
                    consume(broker, lambda: done.is_set() and producing.done() and len(seen) >= len(published), 0)
                )
                for broker in (three, four)
            ]
            async with asyncio.timeout(PATIENCE):
                while len(seen) < before + 500:
                    await asyncio.sleep(0.05)
            done.set()
            await producing
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*waiting)
            assert (await three.backlog(queue)).waiting == 0
        assert seen == Counter(published)
        await producer.delete(queue)
