"""Members of a group that come, go, hang, and are cut off: what they own, and what the program hears of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence

import msgspec
import pytest
import pytest_asyncio

from brokerkit.address import AnyTopic
from brokerkit.driver import Delivery, Receipt, Record, Settlement
from brokerkit.drivers.kafka import _owner
from brokerkit.drivers.kafka._claim import lease_of
from brokerkit.errors import BrokerError, BrokerUnavailable, DeliveryLost, PositionLost
from tests.servers.kafka import Network, shared_kafka

from .consuming import SOON, Process, done, eventually, ids, left, named, names, process, rest, settle, take

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def url() -> str:
    return shared_kafka().url()


@pytest_asyncio.fixture
async def network() -> AsyncIterator[Network]:
    """A network of its own before the brokers, for one process."""
    async with Network(shared_kafka()) as made:
        yield made


def copy(delivery: Delivery, address: AnyTopic) -> Record:
    return msgspec.structs.replace(delivery.record, address=address)


class Hanging:
    """A program that does not let go before it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.go_on = asyncio.Event()

    async def __call__(self, deliveries: Sequence[Delivery]) -> None:
        self.asked += ids(deliveries)
        await self.go_on.wait()


async def test_what_runs_is_waited_for_and_the_rest_goes_on(url: str) -> None:
    topic = named(2)
    hanging = Hanging()
    async with process(url, topic) as p, process(url) as other:
        await p.put(topic, names(20), keyed=True)
        async with p.consume(topic, revoked=hanging) as one:
            held = await take(one, 20)
            joining = asyncio.ensure_future(_first(other, topic))
            await eventually(lambda: hanging.asked)
            moving = set(hanging.asked)
            assert moving < set(names(20))
            await p.put(topic, names(20, "n"), keyed=True)
            mine = await rest(one, 1.0)  # of the partition that stays
            assert mine
            assert not joining.done()
            await done(one, [delivery for delivery in held if delivery.record.id in moving], confirm=True)
            hanging.go_on.set()
            theirs = await joining
            assert {delivery.deliveries for delivery in [*mine, *theirs]} == {1}
            assert sorted(ids([*mine, *theirs])) == names(20, "n")
            await done(one, [delivery for delivery in held if delivery.record.id not in moving], confirm=True)
        assert await left(p, topic) == []


async def _first(p: Process, topic: AnyTopic) -> list[Delivery]:
    """Join, and return what comes within a second of the first."""
    async with p.consume(topic) as consumer:
        first = list(await consumer.receive(1000, SOON))
        await done(consumer, first)
        return [*first, *await rest(consumer, 1.0)]


async def test_a_program_that_never_lets_go_loses_it_and_it_counts(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_owner, "PATIENCE", 0.0)  # then it is one session
    topic = named(2)
    hanging = Hanging()
    async with process(url, topic) as p, process(url) as other:
        await p.put(topic, names(20), keyed=True)
        async with p.consume(topic, revoked=hanging) as one:
            held = await take(one, 20)
            async with other.consume(topic) as two:
                moved = [*await two.receive(100, SOON), *await two.receive(100, 0.5)]
                assert sorted(ids(moved)) == sorted(hanging.asked)
                assert {delivery.deliveries for delivery in moved} == {2}
                stale = [delivery for delivery in held if delivery.record.id in hanging.asked]
                results = await settle(one, stale)
                assert all(isinstance(result, DeliveryLost) for result in results)
                await done(two, moved, confirm=True)
            await done(one, [delivery for delivery in held if delivery.record.id not in hanging.asked])


async def test_who_was_cut_off_for_too_long_hears_what_it_has_lost_and_stores_nothing(
    url: str, network: Network
) -> None:
    topic, out = named(2), named(1)
    async with process(url, topic, out) as p, process(network.url()) as zombie:
        await p.put(topic, names(4), keyed=True)
        async with zombie.consume(topic) as old:
            stale = await take(old, 4)
            await old.hold(stale[0], 1)  # a note is stored
            network.freeze()
            async with p.consume(topic) as new:
                fresh = await take(new, 4)
                assert {delivery.deliveries for delivery in fresh} == {2}
                assert old.owned_until <= asyncio.get_running_loop().time()
                network.thaw()
                results = await settle(old, stale, copy(stale[0], out))
                assert [type(result) for result in results] == [DeliveryLost] * 4
                assert not any(isinstance(result, DeliveryLost) and result.published for result in results)
                await eventually(lambda: sorted(zombie.revoked) == names(4))
                await done(new, fresh, confirm=True)
        assert await left(p, out) == []
        assert await left(p, topic) == []


async def test_copies_are_not_sent_by_who_may_have_lost_the_delivery(url: str, network: Network) -> None:
    topic, out = named(1), named(1)
    async with process(url, topic, out) as p, process(network.url(), timeout=0.5) as cut:
        await p.put(topic, ["m"])
        async with cut.consume(topic) as consumer:
            held = await take(consumer, 1)
            await consumer.hold(held[0], 1)
            network.freeze()
            await eventually(lambda: consumer.owned_until <= asyncio.get_running_loop().time())
            (result,) = await settle(consumer, held, copy(held[0], out))
            assert isinstance(result, BrokerUnavailable)
            assert await consumer.receive(10, 0.1) == [], "nothing is handed out meanwhile"
        assert await left(p, out) == []


async def test_an_outage_that_outlasts_the_session_is_said(url: str, network: Network) -> None:
    topic = named(2)
    async with process(url, topic) as p, process(network.url()) as cut:
        await p.put(topic, names(2))
        async with cut.consume(topic) as consumer:
            await take(consumer, 2)
            network.disconnect()
            with pytest.raises(BrokerUnavailable, match="no broker answers"):
                async with asyncio.timeout(SOON):
                    while True:
                        await consumer.receive(10, SOON)
            assert isinstance(consumer.problem, BrokerUnavailable)
            began = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - began < 10, "leaving waits for nobody who is not there"
        assert sorted(ids(await left(p, topic))) == names(2)


async def test_a_short_outage_is_not_noticed(url: str, network: Network) -> None:
    topic = named(2)
    async with process(url, topic) as p, process(network.url(), session=6.0) as cut:
        await p.put(topic, names(10), keyed=True)
        async with cut.consume(topic) as consumer:
            held = await take(consumer, 10)
            network.disconnect()
            await p.put(topic, names(10, "n"), keyed=True)
            await asyncio.sleep(0.5)
            network.accept()
            more = await take(consumer, 10)
            assert ids(more) != []
            assert {delivery.deliveries for delivery in more} == {1}
            await done(consumer, [*held, *more], confirm=True)
            assert cut.revoked == []
        assert await left(p, topic) == []


async def test_a_log_that_was_cut_is_read_again(url: str) -> None:
    topic = named(1)
    async with process(url, topic) as p:
        await p.put(topic, names(10))
        async with p.consume(topic) as consumer:
            held = await take(consumer, 10)
            await done(consumer, held[:3])
            consumer.truncated(0, 10, 6)
            await eventually(lambda: p.revoked == names(10)[3:])
            again = await take(consumer, 7)
            assert ids(again) == names(10)[3:]
            (result,) = await settle(consumer, held[8:9])
            assert isinstance(result, DeliveryLost)
            await done(consumer, again, confirm=True)
        assert await left(p, topic) == []


async def test_a_confirmation_is_none_where_the_partition_was_lost_before_it_was_stored(url: str) -> None:
    topic, out = named(1), named(1)
    async with process(url, topic, out) as p:
        await p.put(topic, names(2))
        async with p.consume(topic) as consumer:
            held = await take(consumer, 2)
            assert consumer._group is not None

            async def refused(offsets: Mapping[int, tuple[int, str]], *, timeout: float) -> dict[int, BrokerError]:
                return {partition: DeliveryLost() for partition in offsets}

            consumer._group.commit = refused  # type: ignore[method-assign]
            items = [Settlement(held[0], (copy(held[0], out),)), Settlement(held[1])]
            first, second = await consumer.settle(items, confirm=True)
            assert isinstance(first, DeliveryLost)
            assert first.published
            assert isinstance(second, DeliveryLost)
            assert not second.published


async def test_a_confirmation_is_none_where_a_hand_over_gave_up_storing(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_owner, "STORING", 0.2)
    topic = named(1)
    async with process(url, topic) as p:
        await p.put(topic, ["m"])
        async with p.consume(topic) as consumer:
            held = await take(consumer, 1)
            await consumer.hold(held[0], 1)
            group = consumer._group
            assert group is not None
            go_on, let_go = asyncio.Event(), asyncio.Event()

            async def slow(offsets: Mapping[int, tuple[int, str]], *, timeout: float) -> dict[int, BrokerError]:
                await go_on.wait()
                return {partition: DeliveryLost() for partition in offsets}

            def gone(partitions: Collection[int]) -> None:
                let_go.set()

            group.commit = slow  # type: ignore[method-assign]
            group.let_go = gone  # type: ignore[method-assign]
            confirming = asyncio.ensure_future(consumer.settle([Settlement(held[0])], confirm=True))
            await asyncio.sleep(0)
            consumer.taken([0])
            await let_go.wait()
            go_on.set()
            (result,) = await confirming
            assert isinstance(result, DeliveryLost)


async def test_partitions_that_move_do_not_wait_for_one_another(url: str) -> None:
    topic = named(2)
    slow = asyncio.Event()
    async with process(url, topic) as p:
        await p.put(topic, names(20), keyed=True)
        numbers: dict[str, int] = {}

        async def program(deliveries: Sequence[Delivery]) -> None:
            if any(numbers[delivery.record.id] == 1 for delivery in deliveries):
                await slow.wait()

        async with p.consume(topic, revoked=program) as consumer:
            for delivery in await take(consumer, 20):
                numbers[delivery.record.id] = lease_of(delivery).claim.number
            assert consumer._group is not None
            free: list[int] = []
            consumer._group.let_go = free.extend  # type: ignore[method-assign, assignment]
            consumer.taken([0, 1])
            await eventually(lambda: free == [0])
            slow.set()
            await eventually(lambda: free == [0, 1])


async def test_a_log_that_is_cut_while_it_moves_is_let_go(url: str) -> None:
    topic = named(1)
    hanging = Hanging()
    async with process(url, topic) as p:
        await p.put(topic, names(10))
        async with p.consume(topic, revoked=hanging) as consumer:
            await take(consumer, 10)
            assert consumer._group is not None
            free: list[int] = []
            consumer._group.let_go = free.extend  # type: ignore[method-assign, assignment]
            consumer.taken([0])
            await eventually(lambda: hanging.asked)
            consumer.truncated(0, 10, 5)
            assert free == [0]
            assert not consumer.claims
            hanging.go_on.set()


async def test_what_is_removed_of_a_new_partition_is_a_loss_once_it_was_read(url: str) -> None:
    topic = named(1)
    async with process(url, topic) as p:
        await p.put(topic, names(3))
        async with p.consume(topic) as consumer:
            await done(consumer, await take(consumer, 3))
            consumer.claims[0].anew = True
            consumer.overtaken(0, 3, 5)
            with pytest.raises(PositionLost) as caught:
                await consumer.receive(10, SOON)
            assert caught.value.lost == 2


# ---------------------------------------------------------------------- leaving


class SlowStore:
    """Stores copies when it is told to."""

    def __init__(self, p: Process) -> None:
        self.outboxes = p.context.outboxes
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()

    async def copy(self, records: Sequence[Record], timeout: float) -> Sequence[Receipt | BrokerError]:
        self.begun.set()
        await self.go_on.wait()
        return await self.outboxes.copy(records, timeout)


async def test_cancelling_a_settlement_does_not_store_its_copies_twice(url: str) -> None:
    topic, out = named(1), named(1)
    async with process(url, topic, out) as p:
        await p.put(topic, ["m"])
        async with p.consume(topic) as consumer:
            (delivery,) = await take(consumer, 1)
            assert consumer._copies is not None
            consumer._copies._store = slow = SlowStore(p)
            settling = asyncio.ensure_future(settle(consumer, [delivery], copy(delivery, out)))
            await slow.begun.wait()
            settling.cancel()
            await asyncio.wait([settling])
            again = asyncio.ensure_future(consumer.settle([Settlement(delivery)], confirm=True))
            await asyncio.sleep(0)
            slow.go_on.set()
            assert list(await again) == [None]
        assert ids(await left(p, out)) == ["m"]
        assert await left(p, topic) == []


async def test_leaving_waits_for_copies_and_not_for_ever(url: str) -> None:
    topic, out = named(1), named(1)
    async with process(url, topic, out) as p:
        await p.put(topic, names(2))
        async with p.consume(topic) as consumer:
            held = await take(consumer, 2)
            assert consumer._copies is not None
            consumer._copies._store = slow = SlowStore(p)
            settling = asyncio.ensure_future(settle(consumer, held[:1], copy(held[0], out)))
            await slow.begun.wait()
        (result,) = await settling
        assert isinstance(result, DeliveryLost)
        again = await left(p, topic)
        # Whether the copy of the first is stored nobody knows, so it was not handed back cleanly.
        assert [(delivery.record.id, delivery.deliveries) for delivery in again] == [("m00000", 2), ("m00001", 1)]


async def test_a_callback_that_fails_holds_nothing_up(url: str) -> None:
    topic = named(2)

    async def broken(deliveries: Sequence[Delivery]) -> None:
        raise ZeroDivisionError

    async with process(url, topic) as p, process(url) as other:
        await p.put(topic, names(20), keyed=True)
        async with p.consume(topic, revoked=broken) as one, other.consume(topic) as two:
            taken: list[Delivery] = []
            async with asyncio.timeout(SOON):
                while len(taken) < 20:
                    for consumer in (one, two):
                        got = await consumer.receive(10, 0.1)
                        taken += got
                        await done(consumer, got)
            await eventually(lambda: len(one.claims) == len(two.claims) == 1)
            assert sorted(ids(taken)) == names(20)
