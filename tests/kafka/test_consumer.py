"""Consumers at a real broker: what comes out of them, and what is stored of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest

from brokerkit.address import Address, redrive_queue
from brokerkit.driver import Delivery, Record
from brokerkit.drivers._log import Tracker
from brokerkit.drivers.kafka import _commit
from brokerkit.drivers.kafka._claim import lease_of
from brokerkit.drivers.kafka._consumer import TopicConsumer
from brokerkit.drivers.kafka._coordinator import committed
from brokerkit.errors import BrokerError, ConfigError, DeliveryLost, NotFound, PositionLost
from brokerkit.events import PartitionPaused, PartitionResumed
from brokerkit.policy import LOG_AHEAD, Start
from tests.servers.kafka import shared_kafka

from .consuming import (
    GROUP,
    SOON,
    Process,
    done,
    eventually,
    ids,
    left,
    named,
    names,
    process,
    rest,
    settle,
    take,
    widen,
)
from .reading import delete_before

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def url() -> str:
    return shared_kafka().url()


async def stored(p: Process, group_id: str, topic: str, count: int) -> dict[int, tuple[int, str] | None]:
    return dict(await committed(p.context.cluster, group_id, topic, range(count), SOON))


# ---------------------------------------------------------------------- receiving


async def test_partitions_are_read_in_turn(url: str) -> None:
    topic = named(4)
    async with process(url, topic) as p:
        await p.put(topic, names(400), keyed=True)
        async with p.consume(topic, prefetch=400) as consumer:
            async with asyncio.timeout(SOON):
                while len(consumer._fetcher.ready() if consumer._fetcher else ()) < 4:
                    await asyncio.sleep(0.01)
            first = await take(consumer, 40, limit=10)
            seen = Counter(lease_of(delivery).claim.number for delivery in first)
            assert seen.keys() == {0, 1, 2, 3}
            assert max(seen.values()) - min(seen.values()) <= 4, seen
            one_by_one = [lease_of((await consumer.receive(1, SOON))[0]).claim.number for _ in range(8)]
            assert Counter(one_by_one) == dict.fromkeys(range(4), 2)


async def test_what_is_handed_out_is_noted_before_the_program_sees_it(url: str) -> None:
    topic = named(1)
    async with process(url, topic) as p:
        await p.put(topic, names(3))
        async with p.consume(topic) as consumer:
            await take(consumer, 3)
            assert consumer._commits is not None
            assert not consumer._commits.unsent
            # The note is on its way: another request on that connection is answered behind it.
            place = (await stored(p, f"{topic.name}..{GROUP}", topic.name, 1))[0]
            assert place is not None
            tracker = Tracker.decode(*place)
            assert (tracker.high, tracker.in_hand) == (3, 3)


async def test_a_record_that_comes_again_is_noted_before_it_is_handed_out(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = named(1)
    async with process(url, topic) as p:
        await p.put(topic, ["m"], deliveries=1)
        async with p.consume(topic) as consumer:
            assert consumer._group is not None
            commit = consumer._group.commit
            noted: list[bool] = []
            go_on = asyncio.Event()

            async def slow(offsets: dict[int, tuple[int, str]], *, timeout: float) -> dict[int, BrokerError]:
                await go_on.wait()
                failed = await commit(offsets, timeout=timeout)
                noted.append(not failed)
                return failed

            monkeypatch.setattr(consumer._group, "commit", slow)
            assert not await consumer.receive(10, 0.3)
            go_on.set()
            (delivery,) = await consumer.receive(10, SOON)
            assert noted == [True]
            assert delivery.deliveries == 2


async def test_nothing_is_lost_by_receives_that_are_cancelled_at_any_moment(url: str) -> None:
    topic = named(2)
    async with process(url, topic) as p:
        wanted = names(60)
        async with p.consume(topic, prefetch=1000) as consumer:
            taken: list[Delivery] = []
            for number, id in enumerate(wanted):
                waiting = asyncio.ensure_future(consumer.receive(3, SOON))
                publishing = asyncio.ensure_future(p.put(topic, [id], keyed=True))
                for _ in range(number):
                    await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.wait([waiting, publishing])
                if not waiting.cancelled():
                    taken += waiting.result()
            taken += await take(consumer, len(wanted) - len(taken))
            assert sorted(ids(taken)) == wanted
            assert {delivery.deliveries for delivery in taken} == {1}


async def test_a_partition_stands_and_goes_on(url: str) -> None:
    topic = named(1)
    count = LOG_AHEAD + 500
    async with process(url, topic) as p:
        await p.put(topic, names(count))
        async with p.consume(topic, prefetch=count) as consumer:
            held = await take(consumer, LOG_AHEAD)
            assert not await consumer.receive(1000, 0.5)
            assert [type(event) for event in p.events] == [PartitionPaused]
            await done(consumer, held[1:])
            assert not await consumer.receive(1000, 0.2)
            await done(consumer, held[:1])
            assert len(await take(consumer, 500)) == 500
            assert [type(event) for event in p.events] == [PartitionPaused, PartitionResumed]
            assert {getattr(event, "partition", None) for event in p.events} == {0}


async def test_what_was_removed_is_told_once_and_reading_goes_on(url: str) -> None:
    topic = named(1)
    endpoints = shared_kafka()
    async with process(url, topic) as p:
        await p.put(topic, names(20))
        async with p.consume(topic) as consumer:
            await done(consumer, await take(consumer, 5), confirm=True)
        await delete_before(endpoints, topic.name, 15)
        async with p.consume(topic) as consumer:
            with pytest.raises(PositionLost) as caught:
                await consumer.receive(100, SOON)
            assert caught.value.lost == 10
            assert ids(await take(consumer, 5)) == names(20)[15:]
            assert not await consumer.receive(100, 0.3)


async def test_a_topic_that_is_deleted_is_not_found(url: str) -> None:
    topic = named(2)
    async with process(url, topic) as p, process(url) as other:
        await p.put(topic, ["m"])
        async with p.consume(topic) as consumer, p.consume(topic, group=None) as reader:
            await take(consumer, 1)
            await take(reader, 1)
            await other.driver.delete(topic)
            for each in (consumer, reader):
                with pytest.raises(NotFound, match=topic.name):
                    async with asyncio.timeout(SOON):
                        while True:
                            await each.receive(10, SOON)
                assert each.problem is not None


# ---------------------------------------------------------------------- storing


async def test_a_busy_consumer_stores_rarely(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    topic = named(4)
    count = 5000
    async with process(url, topic) as p:
        await p.put(topic, names(count), keyed=True)
        async with p.consume(topic, prefetch=10) as consumer:
            assert consumer._group is not None
            commit = consumer._group.commit
            calls = 0

            async def counted(offsets: dict[int, tuple[int, str]], *, timeout: float) -> dict[int, BrokerError]:
                nonlocal calls
                calls += 1
                return await commit(offsets, timeout=timeout)

            monkeypatch.setattr(consumer._group, "commit", counted)
            clock = asyncio.get_running_loop().time
            began, seen = clock(), 0
            while seen < count:
                got = await consumer.receive(10, SOON)
                seen += len(got)
                await done(consumer, got)
            assert calls <= (clock() - began) / _commit.APART + _commit.BURST + 2
            await eventually(lambda: consumer._commits is not None and not consumer._commits.pending)
            places = await stored(p, f"{topic.name}..{GROUP}", topic.name, 4)
            assert sum(place[0] for place in places.values() if place is not None) == count


async def test_a_busy_consumer_that_dies_repeats_little(url: str) -> None:
    topic = named(1)
    async with process(url, topic) as p:
        await p.put(topic, names(2000))
        async with process(url) as dying, dying.consume(topic) as consumer:
            taken = await take(consumer, 100)
            await done(consumer, taken[:50], confirm=True)
            await done(consumer, taken[60:])
            await dying.die()
            async with p.consume(topic, prefetch=2000) as heir:
                again = await take(heir, 1)
                assert lease_of(again[0]).offset == 50
                assert again[0].deliveries == 2


async def test_copies_are_stored_once_however_often_it_is_settled(url: str) -> None:
    topic, out = named(2), named(1)
    async with process(url, topic, out) as p:
        await p.put(topic, names(30), keyed=True)
        async with p.consume(topic) as consumer:
            held = await take(consumer, 30)
            calls = [
                settle(consumer, [delivery], _copy(delivery, out), confirm=bool(number % 2))
                for number, delivery in enumerate(held)
                for _ in range(3)
            ]
            assert await asyncio.gather(*calls) == [[None]] * 90
            assert await settle(consumer, held) == [None] * 30
        assert sorted(ids(await left(p, out))) == names(30)
        assert await left(p, topic) == []


async def test_an_item_that_failed_stores_what_it_has_stored_no_second_time(url: str) -> None:
    topic, out, missing = named(1), named(1), named(1)
    async with process(url, topic, out) as p:
        await p.put(topic, ["m"])
        async with p.consume(topic) as consumer:
            held = await take(consumer, 1)
            copies = (_copy(held[0], out), _copy(held[0], missing))
            (result,) = await settle(consumer, held, *copies)
            assert isinstance(result, NotFound)
            await p.driver.declare(missing)
            assert await settle(consumer, held, *copies) == [None]
        assert ids(await left(p, out)) == ids(await left(p, missing)) == ["m"]


async def test_a_delivery_that_is_lost_while_its_copy_is_stored_says_so(url: str) -> None:
    topic, out = named(1), named(1)
    async with process(url, topic, out) as p:
        await p.put(topic, ["m"])
        async with p.consume(topic) as consumer:
            held = await take(consumer, 1)
            outboxes = p.context.outboxes
            assert consumer._copies is not None

            class Slow:
                async def copy(self, records: Sequence[object], timeout: float) -> Sequence[object]:
                    results = await outboxes.copy(records, timeout)  # type: ignore[arg-type]
                    consumer.lost([0])
                    return results

            consumer._copies._store = Slow()  # type: ignore[assignment]
            (result,) = await settle(consumer, held, _copy(held[0], out))
            assert isinstance(result, DeliveryLost)
            assert result.published
        assert p.revoked == ["m"]
        assert ids(await left(p, out)) == ["m"]


async def test_a_reader_without_a_group_settles_nothing_with_copies(url: str) -> None:
    topic, out = named(1), named(1)
    async with process(url, topic, out) as p:
        await p.put(topic, ["m"])
        async with p.consume(topic, group=None) as reader:
            held = await take(reader, 1)
            (result,) = await settle(reader, held, _copy(held[0], out))
            assert isinstance(result, ConfigError)
            await done(reader, held, confirm=True)


async def test_leaving_hands_back_what_is_in_hand_and_what_was_not_received(url: str) -> None:
    topic = named(3)
    async with process(url, topic) as p:
        await p.put(topic, names(60), keyed=True)
        async with p.consume(topic) as consumer:
            got = await take(consumer, 20)
            await done(consumer, got[::2])
            await take(consumer, 20)
        again = await left(p, topic)
        assert sorted(ids(again)) == sorted(set(names(60)) - set(ids(got[::2])))
        assert {delivery.deliveries for delivery in again} == {1}


# ---------------------------------------------------------------------- members


async def test_two_members_share_and_each_record_comes_once(url: str) -> None:
    topic = named(4)
    wanted = names(400)
    async with process(url, topic) as p, process(url) as other:
        await p.put(topic, wanted[:200], keyed=True)
        async with p.consume(topic, prefetch=20) as one:
            seen: Counter[str] = Counter()

            async def work(consumer: TopicConsumer) -> None:
                while len(seen) < len(wanted):
                    got = await consumer.receive(10, 0.1)
                    seen.update(ids(got))
                    await done(consumer, got)

            working = asyncio.ensure_future(work(one))
            async with other.consume(topic, prefetch=20) as two, asyncio.timeout(SOON):
                await eventually(lambda: len(two.claims) == 2)
                await p.put(topic, wanted[200:], keyed=True)
                await asyncio.gather(working, work(two))
                assert len(one.claims) == len(two.claims) == 2
        assert seen == Counter(wanted)


async def test_a_group_ends_when_all_its_members_are_at_the_end(url: str) -> None:
    topic = named(4)
    async with process(url, topic) as p, process(url) as other:
        await p.put(topic, names(100), keyed=True)
        async with p.consume(topic, until_end=True) as one, other.consume(topic) as two:
            await eventually(lambda: len(one.claims) == len(two.claims) == 2)
            mine = await rest(one, 1.0)
            assert not one.ended, "the other member has done nothing yet"
            theirs = await rest(two)
            async with asyncio.timeout(SOON):
                while not one.ended:
                    assert not await one.receive(10, SOON)
            assert sorted(ids([*mine, *theirs])) == names(100)


async def test_a_new_partition_of_a_known_group_is_read_from_its_beginning(url: str) -> None:
    topic = named(1)
    async with process(url, topic) as p:
        await p.put(topic, ["old"])
        async with p.consume(topic, start=Start.LATEST) as consumer:
            await widen(shared_kafka(), topic.name, 3)
            async with asyncio.timeout(SOON):
                while len(consumer.claims) < 3:  # it would look by itself, after half a minute
                    await p.context.cluster.refreshed(SOON)
                    await asyncio.sleep(0.1)
            assert {number: claim.tracker.base for number, claim in consumer.claims.items()} == {0: 1, 1: 0, 2: 0}


async def test_the_start_of_a_group_is_stored_once(url: str) -> None:
    topic = named(2)
    async with process(url, topic) as p, process(url) as other:
        await p.put(topic, names(10), keyed=True)
        async with p.consume(topic, start=Start.LATEST), other.consume(topic, start=Start.EARLIEST) as late:
            assert not await late.receive(10, 0.5)
        assert await left(p, topic, start=Start.EARLIEST) == []


# ---------------------------------------------------------------------- the redrive queue


async def test_the_redrive_queue_is_waited_for_and_minds_delays(url: str) -> None:
    topic = named(2)
    again = redrive_queue(topic, GROUP)
    async with process(url, topic) as p, p.consume(again) as consumer:
        assert not await consumer.receive(10, 0.2)
        clock = asyncio.get_running_loop().time
        await p.put(again, ["first"])
        assert ids(await take(consumer, 1)) == ["first"]
        began = clock()
        await p.put(again, ["late"], delay=3.0)
        await p.put(again, ["early"])
        assert ids(await take(consumer, 1)) == ["early"]
        assert clock() - began < 2.9
        (late,) = await take(consumer, 1)
        assert 2.95 <= clock() - began < 10
        assert (late.record.id, late.deliveries) == ("late", 1)


async def test_what_is_delayed_survives_its_reader(url: str) -> None:
    topic = named(2)
    again = redrive_queue(topic, GROUP)
    async with process(url, topic) as p:
        async with p.consume(again) as consumer:
            await p.put(again, ["a", "b"], delay=1.5)
            await p.put(again, ["now"])
            await done(consumer, await take(consumer, 1))
        async with p.consume(again) as consumer:
            taken = await take(consumer, 2)
            assert sorted(ids(taken)) == ["a", "b"]
            assert {delivery.deliveries for delivery in taken} == {1}
            await done(consumer, taken)
        async with p.consume(again) as consumer:
            assert not await consumer.receive(10, 0.3)


# ---------------------------------------------------------------------- using it wrongly


async def test_receive_is_called_by_one_task_at_a_time(url: str) -> None:
    topic = named(1)
    async with process(url, topic) as p, p.consume(topic) as consumer:
        waiting = asyncio.ensure_future(consumer.receive(1, SOON))
        await asyncio.sleep(0)
        with pytest.raises(ConfigError):
            await consumer.receive(1, SOON)
        waiting.cancel()


async def test_what_does_not_exist_is_not_found_and_says_what_to_do(url: str) -> None:
    topic = named(1)
    async with process(url) as p:
        for group in (None, GROUP):
            with pytest.raises(NotFound, match="declare it"):
                async with p.consume(topic, group=group):
                    pass
        assert not p.context.readers


def _copy(delivery: Delivery, address: Address) -> Record:
    return msgspec.structs.replace(delivery.record, address=address)
