"""The contract: `Driver.browse` and `Driver.redrive`."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from ... import clock
from ...address import redrive_queue
from ...driver import DEAD, Settlement
from ...errors import NotFound
from ...policy import Start
from ._harness import Harness, Kind
from ._raw import (
    GROUP,
    bury,
    copy,
    ids,
    letters_of,
    names,
    raw,
    raw_address,
    raw_queue,
    raw_topic,
    revived,
    source,
    source_of_letters,
)
from ._runner import Suite, needs


class DriverBrowse(Suite):
    """`Driver.browse`."""

    async def test_browsing_must_change_nothing(self, system: Harness, kind: Kind) -> None:
        """Driver.browse: what is looked at is delivered all the same, for the first time."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.left(address)  # the group exists
            await r.put(address, names(6))
            before = await r.driver.backlog(source(address))
            looks = [[s.record.id for s in await r.driver.browse(address, limit=100)] for _ in range(3)]
            assert [sorted(look) for look in looks] == [names(6)] * 3
            assert looks[0] == looks[1] == looks[2]
            after = await r.driver.backlog(source(address))
            assert (after.waiting, after.in_flight) == (before.waiting, before.in_flight)
            taken = await r.left(address)
            assert ids(taken) == names(6)
            assert {d.deliveries for d in taken} == {1}

    async def test_browsing_beside_a_consumer_takes_nothing_from_it(self, system: Harness, kind: Kind) -> None:
        """Driver.browse: ownership stays where it is."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, raw(system) as other:
            await r.put(address, names(6))
            async with r.consume(address, prefetch=3) as consumer:
                held = await r.take(consumer, 3)
                await other.driver.browse(address, limit=100)
                await r.done(consumer, *held, confirm=True)
                assert len(await r.drain(consumer)) == 3

    async def test_browse_returns_whole_records_with_their_positions(self, system: Harness, kind: Kind) -> None:
        """Driver.browse: what is seen is what will be delivered, where it is."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            headers = (("a", b"1"), ("bk-x", b"\xff"))
            await r.publish([r.record(address, "m", b"\x00body", headers=headers, attempts=2)])
            (seen,) = await r.driver.browse(address, limit=10)
            (delivery,) = await r.left(address)
            assert (seen.record.id, seen.record.body, seen.record.attempts) == ("m", b"\x00body", 2)
            assert tuple(item for item in seen.record.headers if item in headers) == headers
            assert seen.position == delivery.position

    async def test_browsing_goes_on_behind_a_position(self, system: Harness, kind: Kind) -> None:
        """Driver.browse: up to *limit* behind position *after*, oldest first of each key; all pages are everything."""
        address = raw_address(system, kind)
        key = b"k" if kind == "topic" else None
        async with raw(system, address) as r:
            await r.put(address, names(25), key=key)
            seen: list[str] = []
            after = None
            while page := await r.driver.browse(address, limit=10, after=after):
                assert len(page) <= 10
                seen += [s.record.id for s in page]
                after = page[-1].position
            # Without a key, what was stored in the same moment in several partitions has no order.
            ordered = key is not None or system.queues is None or system.queues.atomic
            assert (seen if ordered else sorted(seen)) == names(25)

    async def test_dead_letters_are_browsed_the_same_way(self, system: Harness, kind: Kind) -> None:
        """Driver.browse: page after page, and nothing changes."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            positions = await bury(r, address, names(7))
            assert len(set(positions)) == 7
            page = await r.driver.browse(letters_of(address), limit=3)
            rest = await r.driver.browse(letters_of(address), limit=100, after=page[-1].position)
            assert [s.position for s in (*page, *rest)] == positions
            assert (await r.driver.backlog(source_of_letters(address))).waiting in {None, 7}

    async def test_browsing_a_missing_address_is_not_found(self, system: Harness, kind: Kind) -> None:
        """Driver.browse: NotFound where the address does not exist."""
        missing = raw_address(system, kind, "missing")
        async with raw(system) as r:
            with pytest.raises(NotFound, match=missing.name):
                await r.driver.browse(missing, limit=1)

    @needs("topic.replay")
    async def test_a_topic_is_browsed_from_a_start(self, system: Harness) -> None:
        """Driver.browse: *start* is a time or a position of a topic."""
        topic = raw_topic(system, partitions=1)
        async with raw(system, topic) as r:
            await r.put(topic, names(3, "old"))
            await asyncio.sleep(system.quiet)
            when = datetime.fromtimestamp(clock.current().time(), UTC)
            await asyncio.sleep(system.quiet)
            await r.put(topic, names(3))
            seen = await r.driver.browse(topic, limit=10, start=Start.at(when))
            assert [s.record.id for s in seen] == names(3)
            again = await r.driver.browse(topic, limit=10, start=Start.position(seen[1].position))
            assert [s.record.id for s in again] == names(3)[1:]
            assert await r.driver.browse(topic, limit=10, start=Start.LATEST) == []


class DriverRedrive(Suite):
    """`Driver.redrive`."""

    async def test_a_letter_is_stored_there_and_then_gone_here(self, system: Harness, kind: Kind) -> None:
        """Driver.redrive: each letter moves once, with its counters at zero and no trace of its death."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            to = revived(address)
            await r.driver.declare(to)
            positions = await bury(r, address, names(3))
            before = {s.position: s.record for s in await r.driver.browse(letters_of(address), limit=10)}
            results = await r.driver.redrive(letters_of(address), positions[:2], to)
            assert list(results) == [None, None]
            left = await r.driver.browse(letters_of(address), limit=10)
            assert [s.position for s in left] == positions[2:]
            moved = await r.left(to)
            assert ids(moved) == sorted(before[position].id for position in positions[:2])
            for delivery in moved:
                record = delivery.record
                assert (record.attempts, delivery.deliveries) == (0, 1)
                assert record.body == b"body"
                assert not [name for name, _ in record.headers if name.startswith(DEAD)]

    async def test_a_letter_that_is_gone_must_report_not_found_at_its_index(self, system: Harness, kind: Kind) -> None:
        """Driver.redrive: and store nothing; the others are moved."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            to = revived(address)
            await r.driver.declare(to)
            positions = await bury(r, address, names(3))
            assert list(await r.driver.redrive(letters_of(address), [positions[1]], to)) == [None]
            results = await r.driver.redrive(letters_of(address), positions, to)
            assert [type(result) for result in results] == [type(None), NotFound, type(None)]
            assert ids(await r.left(to)) == names(3)
            assert await r.driver.browse(letters_of(address), limit=10) == []

    async def test_a_position_twice_in_one_call_moves_once(self, system: Harness, kind: Kind) -> None:
        """Driver.redrive: the second time it is gone already."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            to = revived(address)
            await r.driver.declare(to)
            (position,) = await bury(r, address, ["m"])
            results = await r.driver.redrive(letters_of(address), [position, position], to)
            assert [type(result) for result in results] == [type(None), NotFound]
            assert ids(await r.left(to)) == ["m"]

    async def test_concurrent_redrives_move_each_letter_once(self, system: Harness, kind: Kind) -> None:
        """Driver.redrive: two processes want the same letters."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, raw(system) as other:
            to = revived(address)
            await r.driver.declare(to)
            positions = await bury(r, address, names(20))
            calls = [d.driver.redrive(letters_of(address), positions, to) for d in (r, other)]
            both = await asyncio.gather(*calls)
            for mine, others in zip(*both, strict=True):
                assert {type(mine), type(others)} == {type(None), NotFound}
            assert ids(await r.left(to)) == names(20)

    @needs("queue")
    async def test_a_redrive_to_a_missing_queue_keeps_the_letters(self, system: Harness, kind: Kind) -> None:
        """Driver.redrive: stored there, *then* gone here; a missing queue is the error of the call, no letter is gone."""
        address, missing = raw_address(system, kind), raw_queue(system, "missing")
        async with raw(system, address) as r:
            positions = await bury(r, address, names(2))
            with pytest.raises(NotFound, match="missing"):
                await r.driver.redrive(letters_of(address), positions, missing)
            assert [s.position for s in await r.driver.browse(letters_of(address), limit=10)] == positions

    @needs("topic")
    async def test_a_derived_queue_that_does_not_exist_yet_must_be_waited_for(self, system: Harness) -> None:
        """Module docstring: a group's redrive queue is read before anything was ever redriven."""
        topic = raw_topic(system)
        async with raw(system, topic) as r, r.consume(redrive_queue(topic, GROUP)) as consumer:
            await r.nothing(consumer)
            positions = await bury(r, topic, ["m"])
            assert list(await r.driver.redrive(letters_of(topic), positions, redrive_queue(topic, GROUP))) == [None]
            (delivery,) = await r.take(consumer, 1)
            assert delivery.record.id == "m"

    @needs("queue.dedup")
    async def test_a_redrive_bypasses_dedup(self, system: Harness) -> None:
        """Driver.redrive, U6: the window knows the id, and the letter comes back all the same."""
        queue = raw_queue(system, dedup=system.deadline)
        async with raw(system, queue) as r:
            positions = await bury(r, queue, ["m"])
            assert list(await r.driver.redrive(queue.dead_letters, positions, queue)) == [None]
            assert ids(await r.left(queue)) == ["m"]

    async def test_a_zombies_acknowledgement_after_a_redrive_has_no_effect(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle: what a zombie held has died and come back since; the message is handled once more."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, raw(system) as zombie:
            to = revived(address)
            await r.driver.declare(to)
            await r.put(address, ["m"])
            async with zombie.consume(address) as old:
                stale = await zombie.take(old, 1)
                await system.freeze(zombie.broker)
                letters = letters_of(address)
                async with r.consume(address) as new:
                    (delivery,) = await r.take(new, 1)
                    dead = Settlement(delivery, (copy(delivery.record, letters),))
                    assert list(await new.settle([dead], confirm=True)) == [None]
                (letter,) = await r.driver.browse(letters, limit=10)
                assert list(await r.driver.redrive(letters, [letter.position], to)) == [None]
                await system.thaw(zombie.broker)
                await old.settle([Settlement(d) for d in stale], confirm=True)
            async with r.consume(to) as consumer:
                await r.finish(consumer, 1)
