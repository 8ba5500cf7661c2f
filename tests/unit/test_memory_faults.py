"""Faults to order: what a test may do to one connection to a memory server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from brokerkit.address import AnyQueue, AnyTopic, Queue, Topic
from brokerkit.driver import Receipt, Record, Settlement
from brokerkit.errors import (
    BrokerUnavailable,
    DeliveryLost,
    NotAttempted,
    PublishUnknown,
    TooLarge,
)

from .memory_driver import (
    consuming,
    done,
    ids,
    opened,
    put,
    results,
    run,
    settled,
    take,
    turns,
)

LEASE = 30.0
SESSION = 10.0
JOBS: AnyQueue = Queue("jobs", bytes, lease=LEASE)
ORDERS: AnyTopic = Topic("orders", bytes, partitions=4)


def test_lost_replies_store_and_say_that_they_do_not_know() -> None:
    async def main() -> None:
        async with opened(JOBS) as made:
            made.faults.lose_replies(2)
            assert await results(made, JOBS, ["a", "b"]) == [PublishUnknown] * 2
            assert await results(made, JOBS, ["c"]) == [PublishUnknown]
            assert await results(made, JOBS, ["d"]) == [None]
            assert ids(await made.browse(JOBS, limit=10)) == ["a", "b", "c", "d"]

    run(main)


def test_what_comes_behind_a_failure_of_its_key_is_not_attempted() -> None:
    async def main() -> None:
        async with opened(JOBS, ORDERS) as made:
            records = [Record(ORDERS, f"m{n}", b"", key=key) for n, key in enumerate((b"a", b"b", b"a", None, b"b"))]
            records.append(Record(JOBS, "job", b"", key=b"a"))
            made.faults.fail_publishes(TooLarge("as ordered"))
            found = await made.publish(records, timeout=1)
            assert [type(result) for result in found] == [TooLarge, Receipt, NotAttempted, Receipt, Receipt, Receipt]
            records[1] = Record(ORDERS, "big", bytes(2 << 20), key=b"b")
            found = await made.publish(records, timeout=1)
            assert [type(result) for result in found] == [Receipt, TooLarge, Receipt, Receipt, NotAttempted, Receipt]
            made.faults.fail_publishes(BrokerUnavailable("as ordered"), 2)
            assert await results(made, JOBS, ["x"]) == [BrokerUnavailable]
            assert await results(made, JOBS, ["x", "y"]) == [BrokerUnavailable, None]

    run(main)


def test_a_settlement_that_fails_leaves_everything_as_it_was() -> None:
    async def main() -> None:
        async with opened(JOBS, ORDERS) as made, consuming(made, JOBS) as jobs, consuming(made, ORDERS) as orders:
            for address, consumer in ((JOBS, jobs), (ORDERS, orders)):
                await put(made, address, ["a", "b"])
                a, b = await take(consumer, 2)
                made.faults.fail_settles(BrokerUnavailable("as ordered"))
                copy = Record(JOBS.dead_letters, "a", b"")
                outcome = await consumer.settle([Settlement(a, (copy,)), Settlement(b)])
                assert [type(result) for result in outcome] == [BrokerUnavailable, type(None)]
                assert await made.browse(JOBS.dead_letters, limit=1) == []
                assert await settled(consumer, a, b) == [None, None]

    run(main)


@pytest.mark.parametrize("address", [JOBS, ORDERS])
def test_a_connection_that_was_cut_is_dead_for_ever(address: AnyQueue | AnyTopic) -> None:
    async def main() -> None:
        url = f"memory://cut-{address.kind}"
        async with opened(address, url=url) as made, opened(url=url) as other, consuming(made, address) as consumer:
            await put(made, address, ["a"])
            held = await take(consumer, 1)
            waiting = asyncio.ensure_future(consumer.receive(1, 100))
            await turns()
            made.faults.cut()
            with pytest.raises(BrokerUnavailable):
                await waiting
            made.faults.reconnect()
            made.faults.thaw()
            assert await results(made, address, ["b"]) == [BrokerUnavailable]
            assert await settled(consumer, *held) == [BrokerUnavailable]
            for call in (consumer.receive(1, 1), consumer.release(held), made.declare(address)):
                with pytest.raises(BrokerUnavailable):
                    await call
            with pytest.raises(BrokerUnavailable):
                async with consuming(made, address):
                    pass
            with pytest.raises(BrokerUnavailable):
                await made.__aexit__(None, None, None)
                await made.__aenter__()
            async with consuming(other, address) as heir:
                began = asyncio.get_running_loop().time()
                (again,) = await heir.receive(1, 100)
                gone = LEASE if address == JOBS else SESSION
                assert asyncio.get_running_loop().time() == pytest.approx(began + gone)
                assert again.deliveries == 2

    run(main)


@pytest.mark.parametrize("address", [JOBS, ORDERS])
def test_a_frozen_connection_does_nothing_until_it_thaws(address: AnyQueue | AnyTopic) -> None:
    async def main() -> None:
        url = f"memory://frozen-{address.kind}"
        async with opened(address, url=url) as made, opened(url=url) as other, consuming(made, address) as consumer:
            await put(made, address, ["a"])
            (held,) = await take(consumer, 1)
            made.faults.freeze()
            calls: list[asyncio.Future[Any]] = [
                asyncio.ensure_future(call)
                for call in (
                    made.publish([Record(address, "late", b"")], timeout=5),
                    made.publish([Record(address, "patient", b"")], timeout=50),
                    consumer.receive(9, 50),
                    consumer.settle([Settlement(held)]),
                    consumer.hold(held, 1),
                    made.describe(address),
                    made.health(),
                )
            ]
            await put(other, address, ["b"])
            await asyncio.sleep(SESSION - 1)
            assert not any(call.done() for call in calls)
            made.faults.thaw()
            await turns()
            late, patient, got, outcome, *_ = [call.result() for call in calls]
            assert [type(late[0]), type(patient[0])] == [BrokerUnavailable, Receipt]
            assert "b" in ids(got)
            assert outcome == [None]
            assert ids(await made.browse(address, limit=9))[-1] == "patient"
            cancelled = [asyncio.ensure_future(made.declare(address))]
            made.faults.freeze()
            cancelled.append(asyncio.ensure_future(made.declare(address)))
            await turns()
            cancelled[1].cancel()
            await turns()
            assert cancelled[1].cancelled()

    run(main)


def test_a_lost_network_breaks_consumers_and_their_leases_run_on() -> None:
    async def main() -> None:
        async with opened(JOBS, url="memory://net") as made, opened(url="memory://net") as other:
            await put(made, JOBS, ["a", "b"])
            async with consuming(made, JOBS, prefetch=2) as broken, consuming(other, JOBS) as heir:
                a, b = await take(broken, 2)
                made.faults.disconnect()
                assert await results(made, JOBS, ["x"]) == [BrokerUnavailable]
                assert await settled(broken, a) == [BrokerUnavailable]
                assert not (await made.health()).ok
                await asyncio.sleep(LEASE - 1)
                made.faults.reconnect()
                with pytest.raises(BrokerUnavailable):
                    await broken.receive(1, 1)
                assert await settled(broken, a) == [None], "late, but it is still its own"
                assert not await heir.receive(1, 0.9)
                assert [(d.record.id, d.deliveries) for d in await heir.receive(1, 1)] == [("b", 2)]
                assert await settled(broken, b) == [DeliveryLost]
                assert "network" in (await made.health()).problems[0]

    run(main)


def test_what_was_left_without_a_network_is_handed_back_when_it_returns() -> None:
    async def main() -> None:
        async with opened(JOBS, ORDERS, url="memory://back") as made, opened(url="memory://back") as other:
            await put(made, JOBS, ["job"])
            await put(made, ORDERS, ["order"])
            async with consuming(made, JOBS) as jobs, consuming(made, ORDERS) as orders:
                await take(jobs, 1)
                await take(orders, 1)
                made.faults.disconnect()
            async with consuming(other, JOBS) as jobs, consuming(other, ORDERS) as orders:
                assert not await jobs.receive(1, 5)
                made.faults.reconnect()
                got = [*await jobs.receive(1, 1), *await orders.receive(1, 1)]
                assert [(d.record.id, d.deliveries) for d in got] == [("job", 1), ("order", 1)]
            assert (await made.health()).ok

    run(main)


@pytest.mark.parametrize("address", [JOBS, ORDERS])
def test_a_second_fault_does_not_prolong_the_first(address: AnyQueue | AnyTopic) -> None:
    async def main() -> None:
        url = f"memory://twice-{address.kind}"
        gone = LEASE if address == JOBS else SESSION
        async with opened(address, url=url) as made, opened(url=url) as other, consuming(made, address) as consumer:
            await put(made, address, ["a"])
            await take(consumer, 1)
            made.faults.freeze()
            await asyncio.sleep(gone - 2)
            made.faults.disconnect()
            made.faults.lose_replies()
            async with consuming(other, address) as heir:
                assert not await heir.receive(1, 1.9)
                assert len(await heir.receive(1, 0.2)) == 1

    run(main)


@pytest.mark.parametrize("address", [JOBS, ORDERS])
def test_who_waited_when_it_froze_waits_again_when_it_thaws(address: AnyQueue | AnyTopic) -> None:
    async def main() -> None:
        url = f"memory://waits-{address.kind}"
        async with opened(address, url=url) as made, opened(url=url) as other, consuming(made, address) as consumer:
            for during in (False, True):
                waiting = asyncio.ensure_future(consumer.receive(1, 1000))
                await turns()
                made.faults.freeze()
                if during:
                    await put(other, address, ["during"])
                await asyncio.sleep(5)
                assert not waiting.done()
                made.faults.thaw()
                await turns()
                if not during:
                    assert not waiting.done()
                    await put(other, address, ["after"])
                await done(consumer, *await asyncio.wait_for(waiting, 1))

    run(main)


def test_a_frozen_connection_that_is_cut_ends_its_calls() -> None:
    async def main() -> None:
        async with opened(JOBS, url="memory://stopped") as made, opened(url="memory://stopped") as other:
            async with consuming(made, JOBS) as consumer:
                await put(made, JOBS, ["a"])
                await take(consumer, 1)
                made.faults.freeze()
                calls: list[asyncio.Future[Any]] = [
                    asyncio.ensure_future(made.describe(JOBS)),
                    asyncio.ensure_future(consumer.receive(1, 5)),
                ]
                await turns()
                made.faults.cut()
                for call in calls:
                    with pytest.raises(BrokerUnavailable):
                        await asyncio.wait_for(call, 1)
            assert len(other.server.queue(JOBS).sessions) == 1
            await asyncio.sleep(LEASE)
            assert not other.server.queue(JOBS).sessions, "the dead are forgotten"

    run(main)
