"""The contract, `Consumer`: prefetch, ended, receive."""

from __future__ import annotations

import asyncio

import pytest

from ...driver import Delivery
from ...errors import PositionLost
from ...policy import Start
from ._harness import Harness, Kind
from ._raw import ids, names, raw, raw_address, raw_queue, raw_topic
from ._runner import Suite, needs


class DriverPrefetch(Suite):
    """`Consumer.prefetch`."""

    async def test_a_consumer_never_holds_more_unsettled_deliveries_than_its_prefetch(
        self, system: Harness, kind: Kind
    ) -> None:
        """Consumer.prefetch: the consumer must never hold more unsettled deliveries than this."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, names(20))
            async with r.consume(address, prefetch=5) as consumer:
                held = await r.take(consumer, 5)
                await r.nothing(consumer)
                await r.done(consumer, *held[:2])
                held = held[2:] + await r.take(consumer, 2)
                await r.nothing(consumer)
                assert len(held) == 5

    async def test_a_delivery_that_is_released_gives_its_credit_back(self, system: Harness, kind: Kind) -> None:
        """Consumer.prefetch: unsettled deliveries count, and a released one is no delivery any more."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, names(6))
            async with r.consume(address, prefetch=3) as consumer:
                await consumer.release(await r.take(consumer, 3))
                assert len(await r.drain(consumer)) == 6

    async def test_a_raised_prefetch_lets_more_in_at_once(self, system: Harness, kind: Kind) -> None:
        """Consumer.prefetch: it may be changed while entered."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, names(20))
            async with r.consume(address, prefetch=2) as consumer:
                await r.take(consumer, 2)
                consumer.prefetch = 7
                await r.take(consumer, 5)
                await r.nothing(consumer)

    async def test_a_prefetch_raised_during_receive_wakes_it(self, system: Harness, kind: Kind) -> None:
        """Consumer.prefetch: it may be changed while entered, also while somebody waits in receive."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, names(4))
            async with r.consume(address, prefetch=1) as consumer:
                await r.take(consumer, 1)
                waiting = asyncio.ensure_future(r.take(consumer, 3))
                await system.settle_down()
                assert not waiting.done()
                consumer.prefetch = 4
                assert len(await waiting) == 3

    async def test_settling_gives_credit_to_a_receive_that_waits_for_it(self, system: Harness, kind: Kind) -> None:
        """Consumer.prefetch: what is settled counts no more, also while somebody waits in receive."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, r.consume(address, prefetch=1) as consumer:
            await r.put(address, names(2))
            (first,) = await r.take(consumer, 1)
            waiting = asyncio.ensure_future(consumer.receive(1, system.deadline))
            await system.settle_down()
            assert not waiting.done()
            await r.done(consumer, first)
            began = system.now()
            assert len(await waiting) == 1
            assert system.now() - began < system.deadline / 2

    async def test_a_lowered_prefetch_takes_nothing_back(self, system: Harness, kind: Kind) -> None:
        """Consumer.prefetch: lowering it takes nothing back."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, names(20))
            async with r.consume(address, prefetch=8) as consumer:
                held = await r.take(consumer, 8)
                consumer.prefetch = 3
                await r.nothing(consumer)
                await r.done(consumer, *held[:5])
                await r.nothing(consumer)
                await r.done(consumer, *held[5:])
                assert len(await r.take(consumer, 3)) == 3
                await r.nothing(consumer)


class DriverEnded(Suite):
    """`Consumer.ended`."""

    @needs("topic")
    async def test_a_source_until_its_end_ends_after_what_was_there_on_entering(self, system: Harness) -> None:
        """Consumer.ended: every record that was there on entering has been handed out."""
        topic = raw_topic(system)
        async with raw(system, topic) as r:
            await r.put(topic, names(10))
            async with r.consume(topic, group=None, until_end=True) as consumer:
                await r.put(topic, names(5, "later"))
                taken: list[Delivery] = []
                while not consumer.ended:
                    assert len(taken) < 10, "everything is handed out, and it does not end"
                    taken += await consumer.receive(3, system.deadline)
                assert ids(taken) == names(10)

    @needs("topic")
    async def test_receive_at_the_end_returns_nothing_without_waiting(self, system: Harness) -> None:
        """Consumer.receive: none at the end of an until_end source, long before *timeout*."""
        topic = raw_topic(system)
        async with raw(system, topic) as r:
            await r.put(topic, names(3))
            async with r.consume(topic, group=None, until_end=True) as consumer:
                await r.take(consumer, 3)
                began = asyncio.get_running_loop().time()
                assert not await consumer.receive(100, system.deadline)
                assert asyncio.get_running_loop().time() - began < system.deadline / 2
                assert consumer.ended

    @needs("topic")
    async def test_an_empty_source_until_its_end_has_ended_on_entering(self, system: Harness) -> None:
        """Consumer.ended: nothing was there, so everything has been handed out."""
        topic = raw_topic(system)
        async with raw(system, topic) as r, r.consume(topic, group=None, until_end=True) as consumer:
            await r.put(topic, names(2))
            assert not await consumer.receive(100, system.quiet)
            assert consumer.ended

    @needs("topic")
    async def test_a_group_reads_until_the_end_from_its_position(self, system: Harness) -> None:
        """Consumer.ended: for a group the end is the same, its beginning is what it has not settled."""
        topic = raw_topic(system)
        async with raw(system, topic) as r:
            await r.put(topic, names(4))
            assert len(await r.left(topic)) == 4
            await r.put(topic, names(3, "new"))
            async with r.consume(topic, until_end=True) as consumer:
                taken: list[Delivery] = []
                while not consumer.ended:
                    got = await consumer.receive(100, system.deadline)
                    await r.done(consumer, *got)
                    taken += got
                assert ids(taken) == names(3, "new")

    async def test_a_source_without_end_never_ends(self, system: Harness, kind: Kind) -> None:
        """Consumer.ended: only with Source.until_end."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, names(2))
            async with r.consume(address) as consumer:
                await r.drain(consumer)
                assert not consumer.ended
                await r.put(address, ["more"])
                assert ids(await r.take(consumer, 1)) == ["more"]


class DriverReceive(Suite):
    """`Consumer.receive`."""

    async def test_receive_returns_one_to_limit_deliveries(self, system: Harness, kind: Kind) -> None:
        """Consumer.receive: return 1 to *limit* deliveries."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, names(10))
            async with r.consume(address) as consumer:
                taken = 0
                while taken < 10:
                    got = await consumer.receive(3, system.deadline)
                    assert 1 <= len(got) <= 3
                    taken += len(got)

    async def test_receive_returns_none_after_its_timeout(self, system: Harness, kind: Kind) -> None:
        """Consumer.receive: or none after *timeout* seconds, not before and not much later."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, r.consume(address) as consumer:
            clock = asyncio.get_running_loop().time
            began = clock()
            assert not await consumer.receive(10, system.quiet)
            assert system.quiet * 0.9 <= clock() - began < system.quiet + system.deadline / 2

    async def test_receive_without_time_returns_at_once(self, system: Harness, kind: Kind) -> None:
        """Consumer.receive: a timeout of 0 asks and does not wait."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, r.consume(address) as consumer:
            began = asyncio.get_running_loop().time()
            assert not await consumer.receive(10, 0)
            assert asyncio.get_running_loop().time() - began < system.deadline / 2

    async def test_receive_returns_as_soon_as_a_record_is_there(self, system: Harness, kind: Kind) -> None:
        """Consumer.receive: it does not sit out its timeout."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, r.consume(address) as consumer:
            waiting = asyncio.ensure_future(consumer.receive(10, system.deadline))
            await system.settle_down()
            began = asyncio.get_running_loop().time()
            await r.put(address, ["m"])
            assert ids(await waiting) == ["m"]
            assert asyncio.get_running_loop().time() - began < system.deadline / 2

    async def test_cancelling_receive_loses_nothing(self, system: Harness, kind: Kind) -> None:
        """Consumer.receive, C1: the records come out of a later call, each once."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, r.consume(address) as consumer:
            taken: list[Delivery] = []
            for number, id in enumerate(names(20)):
                waiting = asyncio.ensure_future(consumer.receive(1, system.deadline))
                publishing = asyncio.ensure_future(r.put(address, [id]))
                for _ in range(number):
                    await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.wait([waiting, publishing])
                if not waiting.cancelled():
                    taken += waiting.result()
            taken += await r.rest(consumer)
            assert ids(taken) == names(20)

    @needs("shared")
    async def test_what_a_cancelled_receive_was_woken_for_goes_to_another(self, system: Harness, kind: Kind) -> None:
        """Consumer.receive, C1: the record waits for nobody who does not come."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, r.consume(address) as one, r.consume(address) as other:
            for number in range(8):
                receiving = [asyncio.ensure_future(consumer.receive(1, system.deadline)) for consumer in (one, other)]
                await system.settle_down()
                publishing = asyncio.ensure_future(r.put(address, [f"m{number}"]))
                for _ in range(number):
                    await asyncio.sleep(0)
                receiving[0].cancel()
                await publishing
                done, waiting = await asyncio.wait(receiving, timeout=system.quiet)
                taken = [delivery for task in done if not task.cancelled() for delivery in task.result()]
                assert ids(taken) == [f"m{number}"]
                consumer = other if receiving[0].cancelled() else one
                await r.done(consumer, *taken)
                for task in waiting:
                    task.cancel()
                if waiting:
                    await asyncio.wait(waiting)

    async def test_a_record_delivered_for_the_third_time_comes_alone(self, system: Harness, kind: Kind) -> None:
        """Consumer.receive: it must come alone, and nothing else until it is settled."""
        address = raw_address(system, kind, leases=6)
        async with raw(system, address) as r:
            key = b"k" if kind == "topic" else None  # one partition: the driver fetches them together
            await r.put(address, ["before"], key=key)
            await r.publish([r.record(address, "poison", key=key, deliveries=2)])
            await r.put(address, names(5), key=key)
            async with r.consume(address) as consumer:
                while True:
                    got = await consumer.receive(100, system.deadline)
                    if any(d.record.id == "poison" for d in got):
                        break
                    await r.done(consumer, *got)
                assert ids(got) == ["poison"]
                assert got[0].deliveries == 3
                await r.nothing(consumer)
                await r.done(consumer, *got)
                await r.drain(consumer)

    async def test_after_a_lone_delivery_is_settled_the_others_come(self, system: Harness, kind: Kind) -> None:
        """Consumer.receive: nothing else until it is settled or released, and everything after it."""
        address = raw_address(system, kind, leases=6)
        async with raw(system, address) as r:
            await r.publish([r.record(address, "poison", deliveries=2)])
            async with r.consume(address) as consumer:
                alone = await r.take(consumer, 1)
                await r.put(address, names(5))
                await r.nothing(consumer)
                await r.done(consumer, *alone)
                assert ids(await r.take(consumer, 5)) == names(5)

    async def test_after_a_lone_delivery_is_released_the_others_come(self, system: Harness, kind: Kind) -> None:
        """Consumer.receive: a released one holds nothing up, and does not count."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.publish([r.record(address, "poison", deliveries=2)])
            async with r.consume(address) as consumer:
                alone = await r.take(consumer, 1)
                await r.put(address, names(5))
                await consumer.release(alone)
                taken = await r.drain(consumer)
                assert ids(taken) == [*names(5), "poison"]
                assert [d.deliveries for d in taken if d.record.id == "poison"] == [3]

    async def test_what_was_fetched_with_a_lone_delivery_counts_no_delivery(self, system: Harness, kind: Kind) -> None:
        """Consumer.receive: what was fetched with it is handed back without counting a delivery."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            key = b"k" if kind == "topic" else None
            await r.publish([r.record(address, "poison", key=key, deliveries=2)])
            await r.put(address, names(10), key=key)
            async with raw(system) as dying, dying.consume(address) as consumer:
                got = await dying.take(consumer, 1)
                settled = 0
                while got[0].record.id != "poison":
                    await dying.done(consumer, *got, confirm=True)
                    settled += 1
                    got = await dying.take(consumer, 1)
                await system.crash(dying.broker)
                async with r.consume(address) as heir:
                    taken = await r.finish(heir, 11 - settled)
            assert {d.record.id: d.deliveries for d in taken if d.record.id == "poison"} == {"poison": 4}
            assert {d.deliveries for d in taken if d.record.id != "poison"} == {1}

    async def test_each_of_several_poisonous_records_comes_alone(self, system: Harness, kind: Kind) -> None:
        """Consumer.receive: two lone deliveries are never in hand together."""
        address = raw_address(system, kind, leases=6)
        async with raw(system, address) as r:
            await r.publish([r.record(address, id, deliveries=5) for id in names(4)])
            async with r.consume(address) as consumer:
                for _ in range(4):
                    got = await consumer.receive(100, system.deadline)
                    assert len(got) == 1
                    await r.nothing(consumer)
                    await r.done(consumer, *got)

    @needs("queue")
    async def test_before_its_lease_is_over_nothing_comes_beside_a_lone_delivery(self, system: Harness) -> None:
        """Consumer.receive: nothing else for one lease, neither another that must come alone nor any other."""
        queue = raw_queue(system, lease=4 * system.lease)
        async with raw(system, queue) as r:
            await r.publish([r.record(queue, id, deliveries=2) for id in names(2)])
            async with r.consume(queue) as consumer:
                began = system.now()
                alone = await r.take(consumer, 1)
                await r.put(queue, names(3, "other"))
                assert not await consumer.receive(100, began + 3 * system.lease - system.now())
                await r.done(consumer, *alone)
                assert len(await r.drain(consumer)) == 4

    @needs("queue")
    async def test_a_lease_later_others_come_beside_a_lone_delivery(self, system: Harness) -> None:
        """Consumer.receive: after one lease in hand it holds up nothing, and stays its owner's."""
        queue = raw_queue(system)
        async with raw(system, queue) as r:
            await r.publish([r.record(queue, "poison", deliveries=2)])
            async with r.consume(queue, prefetch=4) as consumer:
                began = system.now()
                alone = await r.take(consumer, 1)
                came = system.now()
                await r.put(queue, names(5))
                others = await r.take(consumer, 3)
                assert began + 0.99 * system.lease <= system.now() < came + system.lease + system.deadline / 4
                await r.nothing(consumer)  # it counts for the credit
                await r.done(consumer, *others, confirm=True)
                others += await r.take(consumer, 2)
                await asyncio.sleep(system.lease)
                await r.done(consumer, *alone, confirm=True)
                await r.done(consumer, *others[3:], confirm=True)
                assert ids(others) == names(5)
                assert {delivery.deliveries for delivery in others} == {1}
            assert not await r.left(queue)

    @needs("queue")
    async def test_the_next_that_must_come_alone_comes_a_lease_later(self, system: Harness) -> None:
        """Consumer.receive: one after the other, each beside those that were in hand for one lease, and beside nothing else."""
        queue = raw_queue(system)
        async with raw(system, queue) as r:
            await r.publish([r.record(queue, id, deliveries=2) for id in names(3)])
            async with r.consume(queue) as consumer:
                began, taken = system.now(), await r.take(consumer, 1)
                for number in (1, 2):
                    taken += await r.take(consumer, 1)
                    assert system.now() - began >= 0.99 * number * system.lease
                await r.put(queue, ["other"])
                other = await r.take(consumer, 1)
                assert system.now() - began >= 0.99 * 3 * system.lease
                await r.publish([r.record(queue, "last", deliveries=2)])
                await r.nothing(consumer)
                await r.done(consumer, *other)
                taken += await r.take(consumer, 1)
                await r.done(consumer, *taken)
                assert ids(taken) == ["last", *names(3)]

    async def test_a_crash_counts_one_delivery(self, system: Harness, kind: Kind) -> None:
        """Delivery.deliveries: ownerships including this one."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, ["m"])
            async with raw(system) as dying, dying.consume(address) as consumer:
                assert (await dying.take(consumer, 1))[0].deliveries == 1
                await system.crash(dying.broker)
                async with r.consume(address) as heir:
                    assert (await r.take(heir, 1))[0].deliveries == 2

    @needs("topic")
    async def test_removed_records_are_reported_and_reading_goes_on_behind_them(self, system: Harness) -> None:
        """Consumer.receive: PositionLost, and the next call goes on behind them."""
        topic = raw_topic(system, partitions=1, retention=system.retention)
        async with raw(system, topic) as r:
            await r.put(topic, ["first"])
            assert len(await r.left(topic)) == 1
            await r.put(topic, names(5, "old"))
            await system.expire(r.broker, topic)
            await r.put(topic, names(3))
            async with r.consume(topic) as consumer:
                with pytest.raises(PositionLost) as caught:
                    await consumer.receive(100, system.deadline)
                assert caught.value.lost in {None, 5}
                assert ids(await r.take(consumer, 3)) == names(3)


class DriverCursor(Suite):
    """`Consumer.cursor`."""

    @needs("topic")
    async def test_a_cursor_must_begin_behind_everything_that_was_received(self, system: Harness) -> None:
        """Consumer.cursor: in all partitions at once, and nowhere else: nothing is missed and nothing repeated."""
        topic = raw_topic(system)
        async with raw(system, topic) as r, raw(system) as other:
            for id in names(40):
                await r.put(topic, [id], key=id.encode())
            async with r.consume(topic, group=None) as consumer:
                seen = await r.take(consumer, 13)
                cursor = consumer.cursor
            assert cursor is not None
            await r.put(topic, names(5, "new"))
            async with other.consume(topic, group=None, start=Start.position(cursor)) as consumer:
                rest = await other.rest(consumer)
            assert ids([*seen, *rest]) == [*names(40), *names(5, "new")]

    @needs("topic")
    async def test_a_cursor_moves_with_what_is_received_and_not_with_what_is_settled(self, system: Harness) -> None:
        """Consumer.cursor: an ephemeral reader owes nothing for what it has."""
        topic = raw_topic(system)
        async with raw(system, topic) as r:
            await r.put(topic, names(10))
            async with r.consume(topic, group=None) as consumer:
                seen: list[Delivery] = []
                while len(seen) < 10:
                    seen += await consumer.receive(1, system.deadline)
                    assert consumer.cursor is not None
                    async with r.consume(topic, group=None, start=Start.position(consumer.cursor)) as heir:
                        assert ids([*seen, *await r.rest(heir)]) == names(10)

    @needs("topic")
    async def test_a_cursor_before_the_first_record_is_where_the_reader_began(self, system: Harness) -> None:
        """Consumer.cursor: at the latest: what came since is not missed; at the earliest: everything."""
        topic = raw_topic(system)
        async with raw(system, topic) as r:
            await r.put(topic, names(4, "history"))
            cursors: list[str | None] = []
            for start in (Start.LATEST, Start.EARLIEST):
                async with r.consume(topic, group=None, start=start) as consumer:
                    cursors.append(consumer.cursor)
            await r.put(topic, names(4))
            for cursor, expected in zip(cursors, (names(4), [*names(4, "history"), *names(4)]), strict=True):
                assert cursor is not None
                async with r.consume(topic, group=None, start=Start.position(cursor)) as consumer:
                    assert ids(await r.rest(consumer)) == expected

    @needs("topic")
    async def test_a_cursor_can_be_asked_for_when_the_connection_is_gone(self, system: Harness) -> None:
        """Consumer.cursor: that is when it is needed; it works on any connection."""
        topic = raw_topic(system)
        async with raw(system, topic) as r, raw(system) as cut, cut.consume(topic, group=None) as consumer:
            await r.put(topic, names(6))
            seen = await cut.take(consumer, 4)
            await system.disconnect(cut.broker)
            cursor = consumer.cursor
            assert cursor is not None
            async with r.consume(topic, group=None, start=Start.position(cursor)) as heir:
                assert ids([*seen, *await r.rest(heir)]) == names(6)

    @needs("topic")
    async def test_a_cursor_that_was_overtaken_is_reported(self, system: Harness) -> None:
        """Consumer.cursor: PositionLost, on entering or by the first receive, as for any other position."""
        topic = raw_topic(system, partitions=1, retention=system.retention)
        async with raw(system, topic) as r:
            await r.put(topic, names(5))
            async with r.consume(topic, group=None) as consumer:
                await r.take(consumer, 2)
                cursor = consumer.cursor
            assert cursor is not None
            await system.expire(r.broker, topic)
            await r.put(topic, ["new"])
            with pytest.raises(PositionLost):
                async with r.consume(topic, group=None, start=Start.position(cursor)) as consumer:
                    await consumer.receive(10, system.deadline)

    async def test_queues_and_groups_have_no_cursor(self, system: Harness, kind: Kind) -> None:
        """Consumer.cursor: None: what they own comes again by itself."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, names(2))
            async with r.consume(address) as consumer:
                assert consumer.cursor is None
                await r.take(consumer, 2)
                assert consumer.cursor is None
