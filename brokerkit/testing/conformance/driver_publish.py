"""The contract: `Driver.publish` and what a record carries."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from ... import clock
from ...driver import Delivery, Receipt, Settlement
from ...errors import BrokerError, BrokerUnavailable, NotAttempted, NotFound, PublishUnknown
from ._harness import Harness, Kind
from ._raw import copy, ids, names, raw, raw_address, raw_queue, raw_topic
from ._runner import Suite, needs


class DriverPublish(Suite):
    """`Driver.publish`."""

    async def test_publish_gives_one_result_each_in_order(self, system: Harness, kind: Kind) -> None:
        """Driver.publish: one result each, in order, of several addresses in one call."""
        one, two = raw_address(system, kind, "one"), raw_address(system, kind, "two")
        async with raw(system, one, two) as r:
            records = [r.record(one if n % 2 else two, id) for n, id in enumerate(names(10))]
            results = await r.publish(records)
            assert [result.id for result in results if isinstance(result, Receipt)] == names(10)
            assert ids(await r.left(one)) == names(10)[1::2]
            assert ids(await r.left(two)) == names(10)[::2]

    async def test_publishing_nothing_gives_no_results(self, system: Harness) -> None:
        """Driver.publish: none for none."""
        async with raw(system) as r:
            assert list(await r.publish([])) == []

    async def test_a_record_for_a_missing_address_fails_alone(self, system: Harness, kind: Kind) -> None:
        """Driver.publish: NotFound at its index; the others are stored."""
        address, missing = raw_address(system, kind), raw_address(system, kind, "missing")
        async with raw(system, address) as r:
            records = [r.record(missing if id == "m0001" else address, id) for id in names(3)]
            results = await r.publish(records)
            assert [isinstance(result, NotFound) for result in results] == [False, True, False]
            assert ids(await r.left(address)) == ["m0000", "m0002"]
            assert await r.driver.describe(missing) is None

    @needs("topic")
    async def test_after_a_failure_later_records_of_that_key_must_be_not_attempted(self, system: Harness) -> None:
        """Driver.publish: of the same topic and key; other keys and topics go on."""
        topic, missing = raw_topic(system), raw_topic(system, "missing")
        async with raw(system, topic) as r:
            wanted = [(missing, b"a"), (topic, b"a"), (missing, b"a"), (missing, b"b"), (topic, b"b"), (missing, None)]
            records = [r.record(a, f"r{n}", key=key) for n, (a, key) in enumerate(wanted)]
            results = await r.publish(records)
            expected: list[type[Any]] = [NotFound, Receipt, NotAttempted, NotFound, Receipt, NotFound]
            assert [type(result) for result in results] == expected
            assert ids(await r.left(topic)) == ["r1", "r4"]

    @needs("topic")
    async def test_equal_keys_are_in_one_partition_in_publish_order(self, system: Harness) -> None:
        """Record.key: records of a topic with equal keys are in the same partition, in publish order."""
        topic = raw_topic(system)
        async with raw(system, topic) as r, raw(system) as other:
            keys = [f"key{n}".encode() for n in range(12)]
            for round_ in range(5):
                await r.publish([r.record(topic, f"{key.decode()}-{round_}", key=key) for key in keys])
            async with r.consume(topic) as one, other.consume(topic) as two:
                seen: list[tuple[int, Delivery]] = []
                while len(seen) < 60:
                    for number, (side, consumer) in enumerate(((r, one), (other, two))):
                        got = await consumer.receive(100, system.quiet)
                        await side.done(consumer, *got)
                        seen += [(number, d) for d in got]
            owners = {key: {n for n, d in seen if d.record.key == key} for key in keys}
            assert {len(found) for found in owners.values()} == {1}, "a key was in two hands"
            for key in keys:
                order = [d.record.id.rpartition("-")[2] for _, d in seen if d.record.key == key]
                assert order == [str(n) for n in range(5)]

    async def test_a_record_arrives_as_it_was_published(self, system: Harness, kind: Kind) -> None:
        """Record: id, body, key, headers in order with duplicates, timestamp, attempts."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            key = b"\x00\xffkey" if kind == "topic" else None
            headers = (("a", b"1"), ("A", b"2"), ("bk-x", bytes(range(256))), ("a", b"3"), ("", b""))[:4]
            sent = r.record(address, "id: ü/\\ 'x'", bytes(range(256)), key=key, headers=headers, attempts=7)
            (receipt,) = await r.publish([sent])
            assert isinstance(receipt, Receipt)
            (delivery,) = await r.left(address)
            got = delivery.record
            assert (got.id, got.body, got.key, got.attempts) == (sent.id, sent.body, sent.key, 7)
            assert tuple(item for item in got.headers if item in headers) == headers
            assert abs(got.timestamp - sent.timestamp) < 0.002
            assert receipt.position in {None, delivery.position}

    async def test_positions_are_never_reused(self, system: Harness, kind: Kind) -> None:
        """Delivery.position: never reused within its address, also by copies of the same id, or once it is empty."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            positions: list[str] = []
            for _ in range(5):
                await r.put(address, ["same", "same", "other"], key=b"k" if kind == "topic" else None)
                positions += [d.position for d in await r.left(address)]
            assert len(set(positions)) == len(positions) == 15

    async def test_deliveries_of_earlier_copies_are_added(self, system: Harness, kind: Kind) -> None:
        """Record.deliveries: ownerships of earlier copies, to which the system's count is added."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await r.publish([r.record(address, "m", deliveries=4)])
            (delivery,) = await r.left(address)
            assert delivery.deliveries == 5

    @needs("queue.delay")
    async def test_a_delayed_record_must_not_come_before_its_delay(self, system: Harness) -> None:
        """Record.delay: not before so many seconds after the system accepted it, and then soon."""
        queue = raw_queue(system)
        async with raw(system, queue) as r, r.consume(queue) as consumer:
            began = system.now()
            await r.publish(
                [r.record(queue, "late", delay=3 * system.quiet), r.record(queue, "soon", delay=system.quiet)]
            )
            assert ids(await r.take(consumer, 1)) == ["soon"]
            assert system.quiet <= system.now() - began < 3 * system.quiet
            assert ids(await r.take(consumer, 1)) == ["late"]
            assert 3 * system.quiet <= system.now() - began < 3 * system.quiet + system.deadline / 2

    @needs("queue.ttl")
    async def test_a_record_must_not_come_after_its_time_to_live(self, system: Harness) -> None:
        """Record.ttl: seconds after acceptance from which it must not be delivered."""
        queue = raw_queue(system)
        async with raw(system, queue) as r:
            await r.publish(
                [r.record(queue, "short", ttl=system.quiet), r.record(queue, "long", ttl=20 * system.quiet)]
            )
            await asyncio.sleep(1.01 * system.quiet)
            assert ids(await r.left(queue)) == ["long"]

    @needs("queue.ttl")
    async def test_the_expiry_is_set_on_acceptance_and_kept_by_copies(self, system: Harness) -> None:
        """Record.expires: a driver sets it on acceptance and in deliveries; in a copy it counts, not *ttl*."""
        queue = raw_queue(system)
        async with raw(system, queue) as r:
            wall = clock.current().time()
            await r.publish([r.record(queue, "m", ttl=20 * system.quiet)])
            async with r.consume(queue) as consumer:
                (delivery,) = await r.take(consumer, 1)
                expires = delivery.record.expires
                assert expires is not None
                assert abs(expires - wall - 20 * system.quiet) < system.quiet
                await asyncio.sleep(system.quiet)
                again = copy(delivery.record, queue, ttl=100 * system.quiet)
                assert list(await consumer.settle([Settlement(delivery, (again,))])) == [None]
                (second,) = await r.take(consumer, 1)
                assert second.record.expires is not None
                assert abs(second.record.expires - expires) < 0.01

    @needs("queue.priority")
    async def test_higher_priorities_come_first(self, system: Harness) -> None:
        """Record.priority: among what is ready the higher comes first."""
        queue = raw_queue(system, priorities=3)
        async with raw(system, queue) as r:
            order = [0, 2, 1, 0, 2, 1]
            await r.publish([r.record(queue, f"{p}-{n}", priority=p) for n, p in enumerate(order)])
            async with r.consume(queue, prefetch=1) as consumer:
                seen: list[int] = []
                for _ in order:
                    (delivery,) = await r.take(consumer, 1)
                    seen.append(delivery.record.priority)
                    await r.done(consumer, delivery)
            assert seen == sorted(order, reverse=True)

    @needs("queue.dedup")
    async def test_a_second_record_of_an_id_is_dropped(self, system: Harness) -> None:
        """Receipt.duplicate: the message was not stored again; also within one call."""
        queue = raw_queue(system, dedup=system.deadline)
        async with raw(system, queue) as r:
            results = await r.publish([r.record(queue, id) for id in ("a", "b", "a")])
            assert [r_.duplicate for r_ in results if isinstance(r_, Receipt)] == [False, False, True]
            (again,) = await r.put(queue, ["b"])
            assert again.duplicate
            assert ids(await r.left(queue)) == ["a", "b"]

    async def test_all_results_must_be_there_after_the_timeout(self, system: Harness, kind: Kind) -> None:
        """Driver.publish: a system that cannot be reached does not hold the caller."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await system.disconnect(r.broker)
            began = system.now()
            results = await r.driver.publish([r.record(address, id) for id in names(3)], timeout=system.quiet)
            assert system.now() - began <= system.quiet + 1
            assert len(results) == 3
            assert all(isinstance(x, (BrokerUnavailable, NotAttempted, PublishUnknown)) for x in results), results
            await system.reconnect(r.broker)

    async def test_unavailable_means_certainly_not_stored(self, system: Harness, kind: Kind) -> None:
        """Driver.publish, P3: also not later, when the connection is back."""
        address = raw_address(system, kind)
        async with raw(system, address) as r, raw(system) as other:
            await system.disconnect(r.broker)
            results = await r.driver.publish([r.record(address, id) for id in names(3)], timeout=system.quiet)
            await system.reconnect(r.broker)
            unknown = {id for id, x in zip(names(3), results, strict=True) if isinstance(x, PublishUnknown)}
            async with other.consume(address) as consumer:
                assert {d.record.id for d in await other.drain(consumer)} <= unknown

    async def test_a_lost_answer_is_publish_unknown_or_recognised(self, system: Harness, kind: Kind) -> None:
        """Driver.publish, P4: a driver sends again only where the system cannot store twice."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await system.lose_replies(r.broker)
            (result,) = await r.driver.publish([r.record(address, "m")], timeout=system.quiet)
            assert isinstance(result, (Receipt, PublishUnknown)), result
            assert ids(await r.left(address)) == ["m"]

    async def test_cancelling_publish_leaves_the_connection_usable(self, system: Harness, kind: Kind) -> None:
        """Driver.publish, P8: and no result of the cancelled call is taken for another's."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            for number in range(20):
                doomed = asyncio.ensure_future(r.publish([r.record(address, f"doomed{number}")]))
                for _ in range(number % 7):
                    await asyncio.sleep(0)
                doomed.cancel()
                (receipt,) = await r.put(address, [f"kept{number:02}"])
                assert receipt.id == f"kept{number:02}"
                await asyncio.wait([doomed])
            taken = ids(await r.left(address))
            assert len(taken) == len(set(taken))
            assert [id for id in taken if id.startswith("kept")] == [f"kept{n:02}" for n in range(20)]

    async def test_errors_of_a_driver_are_of_the_tree(self, system: Harness, kind: Kind) -> None:
        """driver.py: every error that leaves a driver is a BrokerError."""
        address = raw_address(system, kind)
        async with raw(system, address) as r:
            await system.crash(r.broker)
            results = await r.driver.publish([r.record(address, "m")], timeout=system.quiet)
            assert all(isinstance(result, BrokerError) for result in results)
            for call in (r.driver.declare, r.driver.describe, r.driver.delete, r.driver.capabilities):
                with contextlib.suppress(BrokerError):
                    await call(address)

    async def test_capabilities_are_asked_once_and_need_no_declaration(self, system: Harness, kind: Kind) -> None:
        """Driver.capabilities: before first use; the answer is kept and is what the harness claims."""
        address = raw_address(system, kind, "undeclared")
        async with raw(system) as r:
            claimed = system.topics if kind == "topic" else system.queues
            assert await r.driver.capabilities(address) == claimed
            assert await r.driver.capabilities(address) == claimed
            assert await r.driver.describe(address) is None
