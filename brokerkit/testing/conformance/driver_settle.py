"""The contract, `Consumer.settle`."""

from __future__ import annotations

import asyncio

from ...driver import Receipt, Settlement
from ...errors import BrokerError, BufferFull, DeliveryLost
from ._harness import Harness, Kind
from ._raw import copy, ids, names, raw, raw_address, raw_queue, raw_target, raw_topic
from ._runner import Suite, needs


class DriverSettle(Suite):
    """`Consumer.settle`."""

    async def test_a_settled_delivery_never_comes_again(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle: its delivery is acknowledged."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, names(10))
            async with r.consume(address) as consumer:
                assert len(await r.drain(consumer)) == 10
            assert await r.left(address) == []

    async def test_the_records_of_an_item_are_stored(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle: store the records of each item, of whatever addresses, then acknowledge its delivery."""
        address, out = raw_address(system, kind), [raw_address(system, kind, "out1"), raw_address(system, kind, "out2")]
        async with raw(system, address, *out) as r:
            await r.put(address, ["m"])
            async with r.consume(address) as consumer:
                (delivery,) = await r.take(consumer, 1)
                records = tuple(copy(delivery.record, a) for a in out)
                assert list(await consumer.settle([Settlement(delivery, records)])) == [None]
            assert await r.left(address) == []
            assert [ids(await r.left(a)) for a in out] == [["m"], ["m"]]

    async def test_a_copy_is_stored_as_it_was_given(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle: a retry copy keeps body, key, headers and times, and carries its failed attempts."""
        address, out = raw_address(system, kind), raw_address(system, kind, "out")
        async with raw(system, address, out) as r:
            headers = (("a", b"1"), ("bk-note", b"\xff"), ("b", "ü".encode()))
            key = b"k" if kind == "topic" else None
            sent = r.record(address, "m", b"\x00\xff", key=key, headers=headers)
            await r.publish([sent])
            async with r.consume(address) as consumer:
                (delivery,) = await r.take(consumer, 1)
                changed = copy(delivery.record, out, attempts=3, headers=(*delivery.record.headers, ("more", b"x")))
                assert list(await consumer.settle([Settlement(delivery, (changed,))])) == [None]
            (stored,) = await r.left(out)
            record = stored.record
            assert (record.id, record.body, record.key) == ("m", b"\x00\xff", key)
            assert [item for item in record.headers if item[0] in {"a", "bk-note", "b", "more"}] == [
                *headers,
                ("more", b"x"),
            ]
            assert record.attempts == 3
            assert abs(record.timestamp - sent.timestamp) < 0.002
            assert stored.deliveries == 1

    @needs("queue.delay")
    async def test_a_delayed_copy_comes_no_earlier_than_its_delay(self, system: Harness) -> None:
        """Record.delay: a retry copy is not delivered before so many seconds after the system accepted it."""
        queue = raw_queue(system)
        async with raw(system, queue) as r:
            await r.put(queue, ["m"])
            async with r.consume(queue) as consumer:
                (delivery,) = await r.take(consumer, 1)
                clock = asyncio.get_running_loop().time
                began = clock()
                again = copy(delivery.record, queue, delay=2 * system.quiet, attempts=1)
                assert list(await consumer.settle([Settlement(delivery, (again,))])) == [None]
                (second,) = await r.take(consumer, 1)
                assert clock() - began >= 2 * system.quiet
                assert (second.record.id, second.record.attempts) == ("m", 1)

    async def test_one_result_comes_for_each_item_in_order(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle: one result per item, in order; None is success."""
        address, missing = raw_address(system, kind), raw_target(system, "missing")
        async with raw(system, address) as r:
            await r.put(address, names(5))
            async with r.consume(address) as consumer:
                held = await r.take(consumer, 5)
                bad = {0, 3}
                items = [
                    Settlement(d, (copy(d.record, missing),) if number in bad else ()) for number, d in enumerate(held)
                ]
                results = await consumer.settle(items)
                assert [isinstance(result, BrokerError) for result in results] == [n in bad for n in range(5)]

    async def test_each_item_must_stand_alone(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle: a failed item leaves its delivery unsettled, and only that."""
        address, out, missing = raw_address(system, kind), raw_target(system), raw_target(system, "missing")
        async with raw(system, address, out) as r:
            await r.put(address, names(4))
            async with r.consume(address) as consumer:
                held = sorted(await r.take(consumer, 4), key=lambda d: d.record.id)
                items = [Settlement(d, (copy(d.record, out if n != 1 else missing),)) for n, d in enumerate(held)]
                results = await consumer.settle(items)
                assert [result is None for result in results] == [True, False, True, True]
            assert ids(await r.left(address)) == ["m0001"]
            assert ids(await r.left(out)) == ["m0000", "m0002", "m0003"]

    @needs("atomic")
    async def test_a_failed_item_stores_nothing_where_settling_is_atomic(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle: stores nothing where Capabilities.atomic, also not the records before the bad one."""
        address, out, missing = raw_address(system, kind), raw_target(system), raw_target(system, "missing")
        async with raw(system, address, out) as r:
            await r.put(address, ["m"])
            async with r.consume(address) as consumer:
                (delivery,) = await r.take(consumer, 1)
                records = (copy(delivery.record, out), copy(delivery.record, missing))
                (result,) = await consumer.settle([Settlement(delivery, records)])
                assert isinstance(result, BrokerError)
            assert await r.left(out) == []
            assert ids(await r.left(address)) == ["m"]

    async def test_a_failed_item_may_be_settled_again(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle: a failed item leaves its delivery unsettled, so another outcome can follow."""
        address, missing = raw_address(system, kind), raw_target(system, "missing")
        async with raw(system, address) as r:
            await r.put(address, ["m"])
            async with r.consume(address) as consumer:
                (delivery,) = await r.take(consumer, 1)
                (result,) = await consumer.settle([Settlement(delivery, (copy(delivery.record, missing),))])
                assert isinstance(result, BrokerError)
                await r.done(consumer, delivery)
            assert await r.left(address) == []

    async def test_a_lost_delivery_must_report_delivery_lost_and_publish_nothing(
        self, system: Harness, kind: Kind
    ) -> None:
        """Consumer.settle, A5: the new owner keeps it, and what the old one publishes with it is not stored."""
        address, out = raw_address(system, kind), raw_target(system)
        async with raw(system, address, out) as r, raw(system) as zombie, zombie.consume(address) as old:
            await r.put(address, ["m"])
            (stale,) = await zombie.take(old, 1)
            await system.freeze(zombie.broker)
            async with r.consume(address) as new:
                (fresh,) = await r.take(new, 1)
                await system.thaw(zombie.broker)
                (result,) = await old.settle([Settlement(stale, (copy(stale.record, out),))], confirm=True)
                assert isinstance(result, DeliveryLost)
                assert not result.published
                await r.done(new, fresh, confirm=True)
            assert await r.left(out) == []
            assert await r.left(address) == []

    async def test_a_lost_item_does_not_fail_the_others(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle, A8: one bad member of a batch reports at its index."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, raw(system) as zombie, zombie.consume(address) as old:
            await r.put(address, names(2))
            stale = await zombie.take(old, 2)
            await system.freeze(zombie.broker)
            async with r.consume(address) as new:
                await r.done(new, *(await r.take(new, 2)), confirm=True)
            await system.thaw(zombie.broker)
            await r.put(address, ["fresh"])
            try:
                (mine,) = await zombie.take(old, 1)
            except BrokerError:  # a driver may demand a new consumer once everything was lost
                results = await old.settle([Settlement(d) for d in stale], confirm=True)
                assert all(isinstance(result, DeliveryLost) for result in results)
            else:
                items = [Settlement(stale[0]), Settlement(mine), Settlement(stale[1])]
                results = await old.settle(items, confirm=True)
                assert [isinstance(result, DeliveryLost) for result in results] == [True, False, True]
                assert await r.left(address) == []

    async def test_settling_a_delivery_again_must_do_nothing_and_report_none(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle, A2: idempotent, also with records."""
        address, out = raw_address(system, kind), raw_target(system)
        async with raw(system, address, out) as r:
            await r.put(address, ["m"])
            async with r.consume(address) as consumer:
                (delivery,) = await r.take(consumer, 1)
                item = Settlement(delivery, (copy(delivery.record, out),))
                for confirm in (False, True, False):
                    assert list(await consumer.settle([item], confirm=confirm)) == [None]
            assert ids(await r.left(out)) == ["m"]

    async def test_a_delivery_twice_in_one_call_is_settled_once(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle: settling again does nothing, also within one call."""
        address, out = raw_address(system, kind), raw_target(system)
        async with raw(system, address, out) as r:
            await r.put(address, ["m"])
            async with r.consume(address) as consumer:
                (delivery,) = await r.take(consumer, 1)
                item = Settlement(delivery, (copy(delivery.record, out),))
                assert list(await consumer.settle([item, item])) == [None, None]
            assert ids(await r.left(out)) == ["m"]

    async def test_items_may_come_in_any_order(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle, A4: a log must not move its position past an unsettled record; seen after leaving."""
        address = raw_address(system, kind)
        key = b"k" if kind == "topic" else None
        async with raw(system, address) as r:
            await r.put(address, names(10), key=key)
            async with r.consume(address) as consumer:
                held = sorted(await r.take(consumer, 10), key=lambda d: d.record.id)
                for number in (9, 3, 7, 1, 5):
                    await r.done(consumer, held[number])
            assert ids(await r.left(address)) == [f"m{n:04}" for n in (0, 2, 4, 6, 8)]

    async def test_confirmed_acknowledgements_in_any_order_survive_a_crash(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle, A4 and A7: what is confirmed never comes again, what is not settled always does."""
        address = raw_address(system, kind)
        key = b"k" if kind == "topic" else None
        async with raw(system, address) as r:
            await r.put(address, names(10), key=key)
            async with raw(system) as dying, dying.consume(address) as consumer:
                held = sorted(await dying.take(consumer, 10), key=lambda d: d.record.id)
                await dying.done(consumer, *(held[n] for n in (9, 3, 7, 1, 5)), confirm=True)
                await system.crash(dying.broker)
                async with r.consume(address) as heir:
                    taken = await r.finish(heir, 5)
            assert ids(taken) == [f"m{n:04}" for n in (0, 2, 4, 6, 8)]

    async def test_a_confirmed_settlement_and_its_records_survive_a_crash(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle, A7: with *confirm* the call returns when the acknowledgement itself is stored."""
        address, out = raw_address(system, kind), raw_target(system)
        async with raw(system, address, out) as r:
            await r.put(address, ["m"])
            async with raw(system) as dying, dying.consume(address) as consumer:
                (delivery,) = await dying.take(consumer, 1)
                item = Settlement(delivery, (copy(delivery.record, out),))
                assert list(await consumer.settle([item], confirm=True)) == [None]
                await system.crash(dying.broker)
            await asyncio.sleep(system.gone(kind))
            assert await r.left(address) == []
            assert ids(await r.left(out)) == ["m"]

    async def test_what_is_settled_without_confirm_is_stored_on_leaving(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle: without *confirm* the system stores it by itself, at the latest when the consumer is left."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.put(address, names(50))
            async with raw(system) as other, other.consume(address) as consumer:
                await other.done(consumer, *(await other.take(consumer, 50)))
            assert await r.left(address) == []

    async def test_settle_may_be_called_concurrently(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle: methods may be called concurrently; every item counts once."""
        address, out = raw_address(system, kind), raw_target(system)
        async with raw(system, address, out) as r:
            await r.put(address, names(40))
            async with r.consume(address) as consumer:
                held = await r.take(consumer, 40)
                calls = [consumer.settle([Settlement(d, (copy(d.record, out),))]) for d in [*held, *held]]
                results = await asyncio.gather(*calls)
                assert [list(result) for result in results] == [[None]] * 80
            assert await r.left(address) == []
            assert ids(await r.left(out)) == names(40)

    async def test_settling_nothing_gives_no_results(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle: one result per item, so none for none."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, r.consume(address) as consumer:
            assert list(await consumer.settle([], confirm=True)) == []

    @needs("queue.dedup")
    async def test_records_published_by_settle_bypass_dedup(self, system: Harness) -> None:
        """Consumer.settle, U6: a retry copy has the id of a message that the window knows, and is stored all the same."""
        queue = raw_queue(system, dedup=system.deadline)
        async with raw(system, queue) as r:
            await r.put(queue, ["m"])
            async with r.consume(queue) as consumer:
                (delivery,) = await r.take(consumer, 1)
                again = copy(delivery.record, queue, attempts=1)
                assert list(await consumer.settle([Settlement(delivery, (again,))])) == [None]
                (second,) = await r.take(consumer, 1)
                assert second.record.attempts == 1
                await r.done(consumer, second)

    async def test_cancelling_settle_leaves_the_consumer_usable(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle: a cancelled call has taken effect or not, and the next ones work."""
        address, out = raw_address(system, kind), raw_target(system)
        async with raw(system, address, out) as r:
            await r.put(address, names(10))
            async with r.consume(address) as consumer:
                held = await r.take(consumer, 10)
                for number, delivery in enumerate(held):
                    item = Settlement(delivery, (copy(delivery.record, out),))
                    settling = asyncio.ensure_future(consumer.settle([item], confirm=True))
                    for _ in range(number):
                        await asyncio.sleep(0)
                    settling.cancel()
                    await asyncio.wait([settling])
                await r.done(consumer, *held, confirm=True)
            assert await r.left(address) == []
            stored = ids(await r.left(out))
            assert len(stored) == len(set(stored)), "settled twice"


class DriverCapacity(Suite):
    """A full system."""

    @needs("bounded")
    async def test_a_full_address_refuses_to_publish(self, system: Harness, kind: Kind) -> None:
        """Driver.publish, K3: BufferFull, and what was refused is not there."""
        address = raw_address(system, kind)
        async with raw(system, address, options=system.bounded) as r:
            await system.fill(r.broker, address)
            (result,) = await r.publish([r.record(address, "more")])
            assert isinstance(result, BufferFull), result
            async with r.consume(address) as consumer:
                taken = await r.drain(consumer)
            assert "more" not in ids(taken)

    @needs("bounded")
    async def test_records_published_by_settle_bypass_capacity(self, system: Harness, kind: Kind) -> None:
        """Consumer.settle: a retry or a dead letter finds room in a full system."""
        address, full = raw_address(system, kind, "small"), raw_queue(system, "full")
        async with raw(system, address, full, options=system.bounded) as r:
            await r.put(address, ["m"])
            async with r.consume(address) as consumer:
                (delivery,) = await r.take(consumer, 1)
                await system.fill(r.broker, full)
                assert list(await consumer.settle([Settlement(delivery, (copy(delivery.record, full),))])) == [None]
            async with r.consume(full) as consumer:
                assert "m" in ids(await r.drain(consumer))

    @needs("bounded")
    async def test_consuming_makes_room_in_a_full_address(self, system: Harness, kind: Kind) -> None:
        """Driver.publish, K3: a full system goes on working."""
        address = raw_address(system, kind)
        async with raw(system, address, options=system.bounded) as r:
            await system.fill(r.broker, address)
            async with r.consume(address) as consumer:
                await r.drain(consumer)
                await r.put(address, ["more"])
                assert ids(await r.take(consumer, 1)) == ["more"]

    @needs("bounded", "topic")
    async def test_making_room_takes_nothing_from_a_group_that_lags(self, system: Harness) -> None:
        """Driver.publish, K3: only what every group has settled makes way for what is new."""
        topic = raw_topic(system)
        async with raw(system, topic, options=system.bounded) as r:
            for group in ("quick", "slow"):
                async with r.consume(topic, group=group):
                    pass
            await system.fill(r.broker, topic)
            stored = ids(await r.left(topic, group="quick"))
            results = await r.publish([r.record(topic, f"more{n}") for n in range(20)])
            stored += [result.id for result in results if isinstance(result, Receipt)]
            assert ids(await r.left(topic, group="slow")) == sorted(stored)
