"""The contract: describe, declare, delete, purge, seek, backlog, health, migrate."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime

import pytest

from ... import clock
from ...address import AnyQueue, AnyTopic
from ...errors import CapabilityError, NotFound, PositionLost
from ...policy import Start
from ._harness import Harness, Kind
from ._raw import (
    bury,
    ids,
    letters_of,
    names,
    raw,
    raw_address,
    raw_queue,
    raw_topic,
    source,
    source_of_letters,
)
from ._runner import Suite, needs


class DriverDeclare(Suite):
    """`Driver.declare`, `describe` and `delete`."""

    async def test_describe_tells_the_settings_that_exist(self, system: Harness, kind: Kind) -> None:
        """Driver.describe: by the names of the address's own, None if absent."""
        address = raw_address(system, kind)
        async with raw(system) as r:
            assert await r.driver.describe(address) is None
            await r.driver.declare(address)
            described = await r.driver.describe(address)
            assert described is not None
            assert described == {name: getattr(address, name) for name in described}
            assert "partitions" in described or kind == "queue"

    async def test_declare_must_never_alter_what_exists(self, system: Harness, kind: Kind) -> None:
        """Driver.declare: neither its settings nor what is in it."""
        if kind == "topic":
            first: AnyTopic | AnyQueue = raw_topic(system)
            second: AnyTopic | AnyQueue = raw_topic(system, partitions=7, retention=3600)
        else:
            first, second = raw_queue(system), raw_queue(system, lease=system.lease + 5)
        async with raw(system, first) as r:
            before = await r.driver.describe(first)
            await r.put(first, names(3))
            await r.driver.declare(second)
            await r.driver.declare(first)
            assert await r.driver.describe(first) == await r.driver.describe(second) == before
            assert ids(await r.left(first)) == names(3)

    async def test_declaring_at_once_from_many_processes_works(self, system: Harness, kind: Kind) -> None:
        """Driver.declare: create if missing, whoever is first."""
        address = raw_address(system, kind)
        async with raw(system) as a, raw(system) as b, raw(system) as c:
            await asyncio.gather(*(r.driver.declare(address) for r in (a, b, c, a, b, c)))
            await a.put(address, ["m"])
            assert ids(await b.left(address)) == ["m"]

    async def test_delete_removes_all_it_holds(self, system: Harness, kind: Kind) -> None:
        """Driver.delete: also its dead letters; declared anew it is empty."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await bury(r, address, names(2))
            await r.put(address, names(3))
            await r.driver.delete(address)
            assert await r.driver.describe(address) is None
            (result,) = await r.publish([r.record(address, "late")])
            assert isinstance(result, NotFound)
            await r.driver.declare(address)
            await r.put(address, ["new"])
            assert ids(await r.left(address)) == ["new"]
            with contextlib.suppress(NotFound):  # no dead letters yet, and nobody can tell the difference
                assert await r.driver.browse(letters_of(address), limit=10) == []

    async def test_deleting_what_is_missing_is_no_error(self, system: Harness, kind: Kind) -> None:
        """Driver.delete: what is missing already is no error."""
        address = raw_address(system, kind)
        async with raw(system) as r:
            await r.driver.delete(address)
            await r.driver.declare(address)
            await r.driver.delete(address)
            await r.driver.delete(address)

    @needs("topic")
    async def test_deleting_a_group_forgets_its_position_only(self, system: Harness) -> None:
        """Driver.delete: it begins anew; the topic and the other groups stay."""
        topic = raw_topic(system)
        async with raw(system, topic) as r:
            await r.put(topic, names(4))
            await r.left(topic, group="one")
            await r.left(topic, group="two")
            await r.driver.delete(topic, "one")
            await r.driver.delete(topic, "nobody")
            assert ids(await r.left(topic, group="one")) == names(4)
            assert await r.left(topic, group="two") == []


class DriverPurge(Suite):
    """`Driver.purge`."""

    @needs("queue")
    async def test_purge_removes_what_waits_and_tells_how_many(self, system: Harness) -> None:
        """Driver.purge: all that waits; what is in flight stays and can be settled."""
        queue = raw_queue(system)
        async with raw(system, queue) as r:
            await r.put(queue, names(10))
            async with r.consume(queue, prefetch=3) as consumer:
                held = await r.take(consumer, 3)
                consumer.prefetch = 0
                assert await r.driver.purge(queue) == 7
                assert await r.driver.purge(queue) == 0
                await consumer.release(held[:1])
                consumer.prefetch = 100
                assert ids(await r.take(consumer, 1)) == ids(held[:1])
                await r.done(consumer, *held[1:])
                await r.nothing(consumer)

    @needs("queue.delay")
    async def test_purge_removes_delayed_records_as_well(self, system: Harness) -> None:
        """Driver.purge: delayed records included."""
        queue = raw_queue(system)
        async with raw(system, queue) as r:
            await r.publish([r.record(queue, "late", delay=2 * system.quiet), r.record(queue, "now")])
            assert await r.driver.purge(queue) == 2
            async with r.consume(queue) as consumer:
                assert not await consumer.receive(10, 4 * system.quiet)

    async def test_dead_letters_can_be_purged(self, system: Harness, kind: Kind) -> None:
        """Driver.purge: of a dead letter address too; what it came from stays."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await bury(r, address, names(3))
            await r.put(address, ["alive"])
            assert await r.driver.purge(letters_of(address)) == 3
            assert await r.driver.browse(letters_of(address), limit=10) == []
            assert ids(await r.left(address)) == ["alive"]


class DriverSeek(Suite):
    """`Driver.seek`."""

    @needs("topic.replay")
    async def test_seek_moves_the_position_of_a_group(self, system: Harness) -> None:
        """Driver.seek: to the earliest, the latest, a time and a position; only of that group."""
        topic = raw_topic(system, partitions=1)
        async with raw(system, topic) as r:
            await r.put(topic, names(3, "a"))
            await asyncio.sleep(system.quiet)
            when = datetime.fromtimestamp(clock.current().time(), UTC)
            await asyncio.sleep(system.quiet)
            receipts = await r.put(topic, names(3, "b"))
            await r.left(topic)
            await r.left(topic, group="others")
            position = receipts[1].position or (await r.driver.browse(topic, limit=10))[4].position
            everything = names(3, "a") + names(3, "b")
            for start, expected in (
                (Start.EARLIEST, everything),
                (Start.LATEST, []),
                (Start.at(when), everything[3:]),
                (Start.position(position), everything[4:]),
            ):
                await r.driver.seek(source(topic, start=start))
                assert ids(await r.left(topic)) == expected, start
            assert await r.left(topic, group="others") == []

    @needs("topic.replay")
    async def test_seeking_to_a_lost_position_is_refused(self, system: Harness) -> None:
        """Driver.seek: PositionLost where the position is gone."""
        topic = raw_topic(system, partitions=1, retention=system.retention)
        async with raw(system, topic) as r:
            await r.put(topic, names(3))
            (first, *_) = await r.left(topic)
            await system.expire(r.broker, topic)
            await r.put(topic, ["new"])
            with pytest.raises(PositionLost):
                await r.driver.seek(source(topic, start=Start.position(first.position)))


class DriverBacklog(Suite):
    """`Driver.backlog`."""

    async def test_the_backlog_tells_what_is_left_to_do(self, system: Harness, kind: Kind) -> None:
        """Driver.backlog: waiting and in flight, and the age of the oldest; None only where the system cannot tell."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.left(address)  # the group exists
            empty = await r.driver.backlog(source(address))
            assert empty.waiting in {None, 0}
            assert empty.in_flight in {None, 0}
            assert empty.oldest_age is None
            await r.put(address, names(5))
            await asyncio.sleep(system.quiet)
            full = await r.driver.backlog(source(address))
            assert full.waiting in {None, 5}
            # a system may count milliseconds
            assert full.oldest_age is None or system.quiet - 0.002 <= full.oldest_age < system.quiet + system.deadline
            async with r.consume(address, prefetch=2) as consumer:
                held = await r.take(consumer, 2)
                some = await r.driver.backlog(source(address))
                assert (some.waiting, some.in_flight) in {(3, 2), (5, None), (None, None)}
                await r.done(consumer, *held, confirm=True)
                consumer.prefetch = 100
                await r.drain(consumer)
            after = await r.driver.backlog(source(address))
            assert after.waiting in {None, 0}
            assert after.in_flight in {None, 0}

    @needs("topic")
    async def test_each_group_has_a_backlog_of_its_own(self, system: Harness) -> None:
        """Driver.backlog: what one group has done is left to do for the other."""
        topic = raw_topic(system)
        async with raw(system, topic) as r:
            await r.put(topic, names(4))
            await r.left(topic, group="done")
            async with r.consume(topic, group="new"):
                pass
            for group, expected in (("done", 0), ("new", 4)):
                found = await r.driver.backlog(source(topic, group=group))
                assert found.waiting in {None, expected}, group

    @needs("queue.delay")
    async def test_delayed_records_are_counted_apart(self, system: Harness) -> None:
        """Driver.backlog: delayed is not waiting."""
        queue = raw_queue(system)
        async with raw(system, queue) as r:
            await r.publish([r.record(queue, "late", delay=2 * system.quiet), r.record(queue, "now")])
            found = await r.driver.backlog(source(queue))
            assert found.waiting in {None, 1}
            assert found.delayed in {None, 1}

    async def test_letters_are_counted_with_their_address(self, system: Harness, kind: Kind) -> None:
        """Driver.backlog: *dead* of the address, *waiting* of a dead letter address."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await bury(r, address, names(3))
            assert (await r.driver.backlog(source(address))).dead in {None, 3}
            assert (await r.driver.backlog(source_of_letters(address))).waiting in {None, 3}


class DriverHealth(Suite):
    """`Driver.health` and `migrate`."""

    async def test_health_is_good_while_everything_works(self, system: Harness, kind: Kind) -> None:
        """Driver.health: connection and consumers work, so there are no problems."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, r.consume(address):
            health = await r.driver.health()
            assert (health.ok, health.problems, health.connected) == (True, (), True)

    async def test_health_is_bad_while_disconnected_and_good_again_afterwards(self, system: Harness) -> None:
        """Driver.health: it never raises, and says in a line what does not work."""
        async with raw(system) as r:
            await system.disconnect(r.broker)
            health = await r.driver.health()
            assert not health.ok
            assert not health.connected
            assert health.problems
            assert all("\n" not in problem for problem in health.problems)
            await system.reconnect(r.broker)

            async def good() -> bool:
                return (await r.driver.health()).ok

            await system.eventually(good, "healthy after reconnecting")

    async def test_health_never_raises(self, system: Harness) -> None:
        """Driver.health: not even of a process that is cut off for ever."""
        async with raw(system) as r:
            await system.crash(r.broker)
            assert not (await r.driver.health()).ok

    async def test_health_is_bad_when_a_consumed_address_is_gone(self, system: Harness, kind: Kind) -> None:
        """Driver.health: the connection pings, the consumer does not work (peers E10b)."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, raw(system) as admin, r.consume(address) as consumer:
            await admin.driver.delete(address)
            receiving = asyncio.ensure_future(consumer.receive(1, system.quiet))
            await asyncio.wait([receiving])

            async def bad() -> bool:
                health = await r.driver.health()
                return not health.ok and health.connected

            if receiving.exception() is None:
                await system.eventually(bad, "a consumer of a deleted address is a problem")

    @needs("queue")
    async def test_migrate_is_refused_where_it_is_not_claimed(self, system: Harness) -> None:
        """Driver.migrate: only where Capabilities.migrate; a queue keeps what it holds."""
        queue = raw_queue(system)
        async with raw(system, queue) as r:
            await r.put(queue, names(3))
            assert system.queues is not None
            if system.queues.migrate:
                await r.driver.migrate(queue)
            else:
                with pytest.raises(CapabilityError):
                    await r.driver.migrate(queue)
            assert ids(await r.left(queue)) == names(3)
