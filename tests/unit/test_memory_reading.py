"""Topics of the memory driver: where reading begins and ends, readers without a group, browsing, deleting."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from brokerkit import clock
from brokerkit.address import AnyTopic, Topic
from brokerkit.driver import Delivery, Settlement, Source, StoredRecord
from brokerkit.drivers.memory import MemoryDriver
from brokerkit.errors import ConfigError, DeliveryLost, NotFound
from brokerkit.policy import Start

from .memory_driver import consuming, done, ids, ignore, names, opened, put, rest, run, take, turns

SESSION = 10.0
ORDERS: AnyTopic = Topic("orders", bytes, partitions=4)
LINE: AnyTopic = Topic("line", bytes, partitions=1)


async def one_each(made: MemoryDriver, topic: AnyTopic = ORDERS) -> None:
    """Publish one record to each partition."""
    receipts = await put(made, topic, names(topic.partitions))
    assert len({receipt.position for receipt in receipts}) == topic.partitions


async def fail(deliveries: Sequence[Delivery]) -> None:
    raise AssertionError("nothing is revoked here")


# ---------------------------------------------------------------------- starts and readers


def test_a_position_begins_its_partition_there_and_the_others_at_its_time() -> None:
    async def main() -> None:
        async with opened(ORDERS) as made:
            first = await put(made, ORDERS, names(8, "a"))
            await asyncio.sleep(1)
            second = await put(made, ORDERS, names(8, "b"))
            await asyncio.sleep(1)
            await put(made, ORDERS, names(8, "c"))
            async with consuming(made, ORDERS, None, start=Start.position(second[4].position or "")) as reader:
                got = sorted(ids(await rest(reader)))
            assert got == sorted(set(names(8, "b")) - {"b0"} | set(names(8, "c")))
            async with consuming(made, ORDERS, None, start=Start.position(first[0].position or "")) as reader:
                assert len(await rest(reader)) == 24
            for wrong in ("orders[0]@99", "orders[9]@0", "other[0]@0", "orders@0", "x", "orders[-1]@0"):
                with pytest.raises(ConfigError, match="position"):
                    async with consuming(made, ORDERS, "g", start=Start.position(wrong)):
                        pass
                with pytest.raises(ConfigError):
                    await made.seek(Source(ORDERS, "g", Start.position(wrong)))
            assert (await made.backlog(Source(ORDERS, "g", Start.LATEST))).waiting == 0, "no such group was left behind"

    run(main)


def test_a_reader_leaves_nothing_behind() -> None:
    async def main() -> None:
        async with opened(ORDERS) as made:
            store = made.server.topic(ORDERS)
            async with consuming(made, ORDERS, None) as one, consuming(made, ORDERS, None) as two:
                await one_each(made)
                assert len(await rest(one)) == len(await rest(two)) == 4
                assert len(store.readers) == 2
            assert not store.readers
            assert not store.groups
            assert not any(partition.claims for partition in store.partitions)

    run(main)


def test_a_frozen_reader_loses_nothing_and_a_dead_one_is_forgotten() -> None:
    async def main() -> None:
        async with opened(ORDERS, url="memory://reader") as made, opened(url="memory://reader") as other:
            store = made.server.topic(ORDERS)
            async with consuming(other, ORDERS, None, revoked=fail) as reader:
                await one_each(made)
                held = await take(reader, 2)
                other.faults.freeze()
                await asyncio.sleep(10 * SESSION)
                other.faults.thaw()
                assert len(await rest(reader)) == 2
                await done(reader, *held)
                other.faults.cut()
                assert not store.readers

    run(main)


def test_until_end_ends_where_the_end_was() -> None:
    async def main() -> None:
        async with opened(ORDERS) as made:
            async with consuming(made, ORDERS, None, until_end=True) as reader:
                assert reader.ended
                await put(made, ORDERS, ["early"])
                assert await reader.receive(10, 50) == []
            await put(made, ORDERS, names(9))
            async with (
                consuming(made, ORDERS, "g", until_end=True) as one,
                consuming(made, ORDERS, "g", until_end=True) as two,
            ):
                await put(made, ORDERS, names(9, "late"))
                got = await one.receive(3, 1)
                both = await rest(one) + await rest(two)
                assert one.ended
                assert two.ended
                await one.release(got)
                assert not one.ended
                both += await rest(one)
                assert sorted(ids(both)) == sorted(["early", *names(9)])
                assert one.ended
                assert asyncio.get_running_loop().time() == 0.0, "an end is known at once"

    run(main)


def test_browsing_goes_through_all_partitions_in_the_order_of_storing() -> None:
    topic: AnyTopic = Topic("brief", bytes, partitions=3, retention=100)

    async def main() -> None:
        async with opened(topic) as made:
            old = await put(made, topic, names(10, "old"))
            await asyncio.sleep(50)
            await put(made, topic, names(10, "new"))
            pages: list[StoredRecord] = []
            while page := await made.browse(topic, limit=3, after=pages[-1].position if pages else None):
                pages += page
            assert ids(pages) == [*names(10, "old"), *names(10, "new")]
            begin = Start.at(datetime.fromtimestamp(clock.current().time(), UTC))
            assert ids(await made.browse(topic, limit=4, start=begin)) == names(4, "new")
            assert await made.browse(topic, limit=4, start=Start.LATEST) == []
            await asyncio.sleep(50)
            assert ids(await made.browse(topic, limit=99, after=old[4].position)) == names(10, "new")
            await asyncio.sleep(50)
            assert await made.browse(topic, limit=99, after=old[4].position) == []
            with pytest.raises(ConfigError):
                await made.browse(topic, limit=1, after="brief@4")

    run(main)


def test_seeking_needs_a_group_without_members() -> None:
    async def main() -> None:
        async with opened(ORDERS, url="memory://seek") as made, opened(url="memory://seek") as doomed:
            await one_each(made)
            async with consuming(doomed, ORDERS) as dying:
                held = await take(dying, 4)
                with pytest.raises(ConfigError, match="1 live members"):
                    await made.seek(Source(ORDERS, "workers", Start.LATEST))
                await dying.hold(held[0], 3)
                doomed.faults.cut()
            with pytest.raises(ConfigError, match="live members"):
                await made.seek(Source(ORDERS, "workers", Start.LATEST))
            await asyncio.sleep(SESSION)
            await made.seek(Source(ORDERS, "workers", Start.EARLIEST))
            async with consuming(made, ORDERS) as consumer:
                got = await take(consumer, 4)
                assert {(d.deliveries, d.record.attempts) for d in got} == {(1, 0)}, "it begins anew"
                await done(consumer, *got)
            await made.seek(Source(ORDERS, "new", Start.LATEST))
            await put(made, ORDERS, ["x"])
            async with consuming(made, ORDERS, "new") as consumer:
                assert ids(await rest(consumer)) == ["x"]
            with pytest.raises(ConfigError, match="group"):
                await made.seek(Source(ORDERS, None, Start.LATEST))

    run(main)


@pytest.mark.parametrize("what", ["topic", "group"])
def test_members_of_what_is_deleted_are_told(what: str) -> None:
    async def main() -> None:
        url = f"memory://deleted-{what}"
        async with opened(ORDERS, url=url) as made, opened(url=url) as sleeper, consuming(made, ORDERS) as consumer:
            await one_each(made)
            held = await take(consumer, 4)
            waiting = asyncio.ensure_future(consumer.receive(1, 50))
            async with consuming(sleeper, ORDERS, "other" if what == "topic" else "workers") as sleeping:
                await turns()
                sleeper.faults.freeze()
                await asyncio.sleep(SESSION)
                await made.delete(ORDERS, None if what == "topic" else "workers")
                with pytest.raises(NotFound, match="deleted"):
                    await waiting
                    await consumer.receive(1, 1)
                assert {type(r) for r in await consumer.settle([Settlement(d) for d in held])} == {DeliveryLost}
                sleeper.faults.thaw()
                await turns()
                with pytest.raises(NotFound, match="deleted"):
                    await sleeping.receive(1, 1)
            assert await made.describe(ORDERS) == (
                None if what == "topic" else {"partitions": 4, "retention": 604800.0}
            )

    run(main)


def test_an_ephemeral_reader_of_a_deleted_topic_is_told() -> None:
    async def main() -> None:
        async with opened(ORDERS) as made, consuming(made, ORDERS, None, revoked=ignore) as reader:
            await made.delete(ORDERS)
            with pytest.raises(NotFound, match="deleted"):
                await reader.receive(1, 1)

    run(main)
