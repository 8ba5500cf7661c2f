"""The contract: `Consumer.release`, `Consumer.hold` and `Driver.consume`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import pytest

from ...driver import Delivery, Settlement
from ...errors import ConfigError, DeliveryLost, NotFound
from ...policy import Start
from ._harness import Harness, Kind
from ._raw import ids, names, raw, raw_address, raw_queue, raw_target, raw_topic, source
from ._runner import Suite, needs, seeds


class DriverRelease(Suite):
    """`Consumer.release`."""

    async def test_what_is_released_must_be_delivered_again_at_once(self, system: Harness, kind: Kind) -> None:
        """Consumer.release: hand back at once, long before a lease would end."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, names(5))
            async with r.consume(address) as consumer:
                await consumer.release(await r.take(consumer, 5))
                began = system.now()
                assert ids(await r.take(consumer, 5)) == names(5)
                assert system.now() - began <= system.quiet

    @needs("queue.shared")
    async def test_what_is_released_may_go_to_another_consumer(self, system: Harness) -> None:
        """Consumer.release: whoever is there gets it at once."""
        queue = raw_queue(system)
        async with raw(system, queue) as r, raw(system) as other:
            await r.put(queue, ["m"])
            async with r.consume(queue, prefetch=1) as one:
                held = await r.take(one, 1)
                async with other.consume(queue) as two:
                    await other.nothing(two)
                    one.prefetch = 0
                    await one.release(held)
                    began = system.now()
                    assert ids(await other.take(two, 1)) == ["m"]
                    assert system.now() - began <= system.quiet

    async def test_a_release_counts_neither_a_delivery_nor_an_attempt(self, system: Harness, kind: Kind) -> None:
        """Consumer.release: twenty releases later it is still the first delivery."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, ["m"])
            async with r.consume(address) as consumer:
                for _ in range(20):
                    (delivery,) = await r.take(consumer, 1)
                    assert (delivery.deliveries, delivery.record.attempts) == (1, 0)
                    await consumer.release([delivery])

    async def test_a_release_keeps_the_deliveries_counted_before(self, system: Harness, kind: Kind) -> None:
        """Consumer.release: what a crash has counted stays counted."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, ["m"])
            async with raw(system) as dying, dying.consume(address) as consumer:
                await dying.take(consumer, 1)
                await system.crash(dying.broker)
                async with r.consume(address) as heir:
                    for _ in range(3):
                        (delivery,) = await r.take(heir, 1)
                        assert delivery.deliveries == 2
                        await heir.release([delivery])

    async def test_settled_deliveries_are_passed_over(self, system: Harness, kind: Kind) -> None:
        """Consumer.release: lost and settled ones are passed over, the others are released."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, names(2))
            async with r.consume(address) as consumer:
                held = sorted(await r.take(consumer, 2), key=lambda d: d.record.id)
                await r.done(consumer, held[0])
                await consumer.release(held)
                assert ids(await r.drain(consumer)) == ["m0001"]

    async def test_releasing_twice_is_releasing_once(self, system: Harness, kind: Kind) -> None:
        """Consumer.release: the second call does not take back what has been delivered again."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, ["m"])
            async with r.consume(address) as consumer:
                held = await r.take(consumer, 1)
                await consumer.release(held)
                (again,) = await r.take(consumer, 1)
                await consumer.release(held)
                await r.nothing(consumer)
                await r.done(consumer, again)

    async def test_a_zombies_acknowledgement_after_its_release_has_no_effect(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle: a delivery that was released is another one's now, even in the same consumer."""
        address, out = raw_address(system, kind), raw_target(system)
        async with raw(system, address, out) as r:
            await r.put(address, ["m"])
            async with r.consume(address) as consumer:
                (old,) = await r.take(consumer, 1)
                await consumer.release([old])
                (fresh,) = await r.take(consumer, 1)
                (result,) = await consumer.settle([Settlement(old, (r.record(out, "copy"),))])
                assert isinstance(result, DeliveryLost)
                await r.done(consumer, fresh)
            assert await r.left(out) == []

    async def test_releasing_what_was_lost_leaves_its_new_owner_alone(self, system: Harness, kind: Kind) -> None:
        """Consumer.release: lost ones are passed over."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, raw(system) as zombie, zombie.consume(address) as old:
            await r.put(address, ["m"])
            stale = await zombie.take(old, 1)
            await system.freeze(zombie.broker)
            async with r.consume(address) as new:
                (fresh,) = await r.take(new, 1)
                await system.thaw(zombie.broker)
                await old.release(stale)
                await r.nothing(new)
                await r.done(new, fresh, confirm=True)


class DriverHold(Suite):
    """`Consumer.hold`."""

    @needs("topic")
    async def test_whoever_owns_a_held_record_next_must_see_its_attempts(self, system: Harness) -> None:
        """Consumer.hold: the count survives the death of the process that counted."""
        topic = raw_topic(system)
        async with raw(system, topic) as r:
            await r.put(topic, names(3), key=b"k")
            async with raw(system) as dying, dying.consume(topic) as consumer:
                held = sorted(await dying.take(consumer, 3), key=lambda d: d.record.id)
                await consumer.hold(held[0], 2)
                await consumer.hold(held[1], 1)
                await consumer.hold(held[1], 3)
                await asyncio.sleep(system.quiet)
                await system.crash(dying.broker)
                async with r.consume(topic) as heir:
                    taken = await r.finish(heir, 3)
            assert {d.record.id: d.record.attempts for d in taken} == {"m0000": 2, "m0001": 3, "m0002": 0}

    @needs("topic")
    async def test_a_held_record_keeps_its_attempts_when_it_is_released(self, system: Harness) -> None:
        """Consumer.release: a delivery of a log whose attempts were raised by `hold` keeps that count."""
        topic = raw_topic(system)
        async with raw(system, topic) as r:
            await r.put(topic, ["m"], key=b"k")
            async with r.consume(topic) as consumer:
                held = await r.take(consumer, 1)
                await consumer.hold(held[0], 2)
                await consumer.release(held)
                (again,) = await r.take(consumer, 1)
                assert again.record.attempts == 2
            (last,) = await r.left(topic)
            assert last.record.attempts == 2

    @needs("topic")
    async def test_a_held_record_is_not_delivered_again_meanwhile(self, system: Harness) -> None:
        """Consumer.hold: keep *delivery*, which will run again here."""
        topic = raw_topic(system)
        async with raw(system, topic) as r:
            await r.put(topic, ["m"], key=b"k")
            async with r.consume(topic) as consumer:
                (held,) = await r.take(consumer, 1)
                await consumer.hold(held, 1)
                assert not await consumer.receive(10, 2 * system.session)
                await r.done(consumer, held)
            assert await r.left(topic) == []

    @needs("topic")
    async def test_holding_for_one_group_changes_nothing_for_another(self, system: Harness) -> None:
        """Consumer.hold: each group has attempts of its own."""
        topic = raw_topic(system)
        async with raw(system, topic) as r:
            await r.put(topic, ["m"], key=b"k")
            async with r.consume(topic) as consumer:
                (held,) = await r.take(consumer, 1)
                await consumer.hold(held, 4)
            (seen,) = await r.left(topic, group="others")
            assert (seen.record.attempts, seen.deliveries) == (0, 1)


class DriverConsume(Suite):
    """`Driver.consume`."""

    async def test_consuming_a_missing_address_is_not_found(self, system: Harness, kind: Kind) -> None:
        """Driver.consume: an address that was never declared has no readers."""
        address = raw_address(system, kind)
        async with raw(system) as r:
            with pytest.raises(NotFound, match=address.name):
                async with r.consume(address):
                    pass
            assert await r.driver.describe(address) is None

    @needs("topic")
    async def test_entering_must_return_only_when_latest_is_ready(self, system: Harness) -> None:
        """Driver.consume: with LATEST every record published afterwards is delivered, and none published before."""
        topic = raw_topic(system)
        async with raw(system, topic) as r, raw(system) as publisher:
            for number in range(10):
                await publisher.put(topic, [f"before{number}"])
                group = None if number % 2 else f"group{number}"
                async with r.consume(topic, group=group, start=Start.LATEST) as consumer:
                    await publisher.put(topic, [f"after{number}"])
                    assert ids(await r.take(consumer, 1)) == [f"after{number}"]
                    await r.nothing(consumer)

    @needs("topic")
    async def test_a_new_groups_start_must_be_stored_on_entering(self, system: Harness) -> None:
        """Driver.consume: a LATEST group that handled nothing yet continues from where it began."""
        topic = raw_topic(system)
        async with raw(system, topic) as r:
            await r.put(topic, names(3, "history"))
            async with r.consume(topic, start=Start.LATEST):
                pass
            await r.put(topic, names(3))
            async with r.consume(topic, start=Start.EARLIEST) as consumer:
                await r.finish(consumer, 3)
            async with r.consume(topic, start=Start.LATEST) as consumer:
                await r.put(topic, ["last"])
                assert ids(await r.take(consumer, 1)) == ["last"]

    @needs("topic")
    async def test_a_new_groups_start_survives_the_death_of_its_first_member(self, system: Harness) -> None:
        """Driver.consume: stored on entering, not by the first acknowledgement."""
        topic = raw_topic(system)
        async with raw(system, topic) as r:
            await r.put(topic, names(3, "history"))
            async with raw(system) as dying, dying.consume(topic, start=Start.LATEST):
                await system.crash(dying.broker)
                await r.put(topic, names(3))
                async with r.consume(topic, start=Start.LATEST) as heir:
                    assert ids(await r.finish(heir, 3)) == names(3)

    @needs("topic")
    async def test_an_ephemeral_reader_leaves_nothing_behind(self, system: Harness) -> None:
        """Source.group: without a group it sees every record, keeps no position and must leave nothing behind."""
        topic = raw_topic(system)
        async with raw(system, topic) as r:
            await r.put(topic, names(5))
            before = await r.driver.describe(topic)
            for _ in range(3):
                async with r.consume(topic, group=None) as consumer:
                    taken = await r.drain(consumer)
                    assert ids(taken) == names(5)
                    assert {d.deliveries for d in taken} == {1}
            assert await r.driver.describe(topic) == before
            assert ids(await r.left(topic)) == names(5)

    async def test_leases_are_renewed_while_entered(self, system: Harness, kind: Kind) -> None:
        """Driver.consume: what is in hand stays in hand, far longer than its lease."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, raw(system) as other:
            async with r.consume(address) as one, other.consume(address) as two:
                await asyncio.gather(r.nothing(one), other.nothing(two))  # who owns what is settled by then
                await r.put(address, names(8))
                held = await asyncio.gather(r.rest(one), other.rest(two))
                assert sorted(ids(held[0]) + ids(held[1])) == names(8)
                for _ in range(3):
                    later = await asyncio.gather(*(c.receive(10, system.gone(kind)) for c in (one, two)))
                    assert [len(got) for got in later] == [0, 0]
                await r.done(one, *held[0], confirm=True)
                await other.done(two, *held[1], confirm=True)
            assert await r.left(address) == []

    async def test_leaving_must_release_what_is_unsettled(self, system: Harness, kind: Kind) -> None:
        """Driver.consume: handed back at once, and not counted."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, names(10))
            async with r.consume(address) as consumer:
                held = await r.take(consumer, 6)
                await r.done(consumer, *held[:2])
            began = system.now()
            async with r.consume(address) as consumer:
                taken = await r.take(consumer, 8)
                assert system.now() - began <= system.quiet
                assert ids(taken) == sorted(set(names(10)) - {d.record.id for d in held[:2]})
                assert {(d.deliveries, d.record.attempts) for d in taken} == {(1, 0)}

    async def test_leaving_with_an_error_releases_as_well(self, system: Harness, kind: Kind) -> None:
        """Driver.consume: leaving must release what is unsettled, however it is left."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, names(4))
            with contextlib.suppress(LookupError):
                async with r.consume(address) as consumer:
                    await r.take(consumer, 4)
                    raise LookupError
            taken = await r.left(address)
            assert ids(taken) == names(4)
            assert {d.deliveries for d in taken} == {1}

    async def test_leaving_while_cancelled_releases_as_well(self, system: Harness, kind: Kind) -> None:
        """Driver.consume: a cancelled task leaves its consumer too."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, names(4))
            taking: list[Delivery] = []

            async def reader() -> None:
                async with r.consume(address) as consumer:
                    taking.extend(await r.take(consumer, 4))
                    await consumer.receive(1, system.deadline)

            task = asyncio.ensure_future(reader())
            await system.eventually(lambda: len(taking) == 4)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            taken = await r.left(address)
            assert ids(taken) == names(4)
            assert {d.deliveries for d in taken} == {1}

    @needs("topic")
    async def test_revoked_runs_before_ownership_moves(self, system: Harness) -> None:
        """Driver.consume: *revoked* is awaited before deliveries move; what is still unsettled afterwards is lost."""
        topic = raw_topic(system)
        wanted = names(40)
        async with raw(system, topic) as r, raw(system) as other:
            await r.put(topic, wanted, spread=True)
            revoked: set[str] = set()
            waiting = False

            async def leave(deliveries: Sequence[Delivery]) -> None:
                nonlocal waiting
                waiting = True
                revoked.update(d.record.id for d in deliveries)
                await asyncio.sleep(system.quiet / 4)
                await r.done(consumer, *deliveries[::2], confirm=True)
                waiting = False

            async with r.consume(topic, revoked=leave) as consumer:
                held = {d.record.id: d for d in await r.take(consumer, 40)}
                async with other.consume(topic) as second:
                    got: list[Delivery] = []
                    while not got:
                        got = list(await second.receive(100, system.deadline))
                        assert not waiting, "a delivery moved while revoked was running"
                    got += await other.rest(second)
                    assert revoked, "ownership moved, and nobody was told"
                    moved = {d.record.id for d in got}
                    assert moved < revoked, "only what is unsettled after revoked may move"
                    results = await consumer.settle([Settlement(held[id]) for id in sorted(moved)])
                    assert all(isinstance(result, DeliveryLost) for result in results)
                    mine = [d for id, d in held.items() if id not in revoked]
                    await r.done(consumer, *mine, confirm=True)
                    await other.done(second, *got, confirm=True)
            assert await r.left(topic) == []

    @needs("topic")
    async def test_nothing_is_handed_out_in_vain_while_ownership_moves(self, system: Harness) -> None:
        """Driver.consume: what is received while *revoked* runs stays with who received it."""
        topic = raw_topic(system)
        early, late = names(40), names(40, "n")
        async with raw(system, topic) as r, raw(system) as other:
            await r.put(topic, early, spread=True)
            moving, moved = asyncio.Event(), asyncio.Event()
            theirs: list[Delivery] = []

            async def leave(deliveries: Sequence[Delivery]) -> None:
                await r.done(consumer, *deliveries)
                moving.set()
                await moved.wait()

            async def join() -> None:
                async with other.consume(topic) as second:
                    await moved.wait()
                    await system.settle_down()
                    theirs.extend(await other.drain(second))

            async with r.consume(topic, revoked=leave) as consumer:
                mine = await r.take(consumer, 40)
                joining = asyncio.ensure_future(join())
                await moving.wait()
                await r.put(topic, late, spread=True)
                mine += await consumer.receive(100, system.quiet / 4)
                moved.set()
                await system.settle_down()
                await r.done(consumer, *mine)
                mine += await r.drain(consumer)
                await joining
            assert theirs, "ownership did not move"
            assert ids([*mine, *theirs]) == early + late
            assert {d.deliveries for d in (*mine, *theirs)} == {1}

    async def test_revoked_is_told_of_what_was_lost(self, system: Harness, kind: Kind) -> None:
        """Driver.consume: or as soon as it is known to be lost."""
        address = raw_address(system, kind)
        lost: set[str] = set()

        async def leave(deliveries: Sequence[Delivery]) -> None:
            lost.update(d.record.id for d in deliveries)

        async with raw(system, address) as r, raw(system) as zombie, zombie.consume(address, revoked=leave) as old:
            await r.put(address, names(3))
            await zombie.take(old, 3)
            await system.freeze(zombie.broker)
            async with r.consume(address) as new:
                await r.finish(new, 3)
                # Where freezing is holding the network, its own clock may have told it already.
                assert not lost or not system.virtual
                await system.thaw(zombie.broker)
                told = 2 * system.gone(kind)
                await system.eventually(lambda: lost == set(names(3)), "revoked told of all three", within=told)

    @seeds(1)
    async def test_entering_and_leaving_many_times_loses_nothing(self, system: Harness, kind: Kind) -> None:
        """Driver.consume, G3: each round takes some and settles half of them."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, names(60))
            handled: list[str] = []
            for _ in range(20):
                async with r.consume(address, prefetch=10) as consumer:
                    got = await r.take(consumer, 4)
                    await r.done(consumer, *got[::2])
                    handled += [d.record.id for d in got[::2]]
            handled += [d.record.id for d in await r.left(address)]
            assert sorted(handled) == names(60)

    async def test_a_consumer_that_is_disconnected_says_so(self, system: Harness, kind: Kind) -> None:
        """Consumer.receive: BrokerUnavailable or what it had; and a new consumer works after reconnecting."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, raw(system) as publisher:
            await publisher.put(address, names(2))
            await system.disconnect(r.broker)
            await asyncio.sleep(system.quiet)
            await system.reconnect(r.broker)

            async def works() -> bool:
                return (await r.driver.health()).ok

            await system.eventually(works, "healthy after reconnecting")
            async with r.consume(address) as consumer:
                await r.finish(consumer, 2)

    @needs("topic")
    async def test_seek_is_refused_while_a_member_lives(self, system: Harness) -> None:
        """Driver.seek: ConfigError while the group has live members; the position stays."""
        topic = raw_topic(system)
        async with raw(system, topic) as r:
            await r.put(topic, names(3))
            await r.left(topic)
            async with r.consume(topic) as consumer:
                with pytest.raises(ConfigError):
                    await r.driver.seek(source(topic, start=Start.EARLIEST))
                await r.nothing(consumer)
