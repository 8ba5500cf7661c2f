"""Offsets by time, where reading begins, and looking at single records, on a real broker."""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import confluent_kafka
import pytest

from brokerkit.address import AnyTopic, Topic
from brokerkit.drivers.kafka._cluster import Cluster
from brokerkit.drivers.kafka._offsets import (
    EARLIEST,
    LATEST,
    UNCOMMITTED,
    cursor,
    look,
    offsets_at,
    resolve,
)
from brokerkit.drivers.kafka._records import position
from brokerkit.drivers.kafka._view import Partition, TopicInfo
from brokerkit.errors import AuthorizationError, BrokerUnavailable, ConfigError, NotFound, PositionLost
from brokerkit.policy import Start
from tests.servers.kafka import Endpoints, Network, Right, shared_kafka

from .reading import SOON, cluster, delete_before, made, name, numbered, write, writer

pytestmark = pytest.mark.asyncio

NOW = int(time.time() * 1000)


def address(name: str) -> AnyTopic:
    return Topic(name, bytes)


def filled(kafka: Endpoints, partitions: int = 3) -> str:
    """Return a topic with 10 records in each partition, a second apart, partition by partition 100 ms later."""
    topic = made(kafka, partitions)
    producer = writer(kafka)
    for partition in range(partitions):
        for number in range(10):
            write_at(producer, topic, NOW - 20_000 + number * 1000 + partition * 100, partition)
    return topic


def write_at(producer: confluent_kafka.Producer, topic: str, when: int, partition: int = 0) -> None:
    write(producer, topic, [b"v"], partition, timestamp=when)


async def places(c: Cluster, topic: str, start: Start) -> list[int]:
    return await resolve(c, address(topic), start, timeout=SOON)


async def test_the_ends_of_a_topic_and_the_offset_of_a_time() -> None:
    kafka = shared_kafka()
    topic = filled(kafka)
    await delete_before(kafka, topic, 4, 1)
    async with cluster(kafka.url()) as c:
        info = await c.topic(topic, timeout=SOON)
        begin = NOW - 20_000
        assert await offsets_at(c, info, {0: EARLIEST, 1: EARLIEST, 2: LATEST}, timeout=SOON) == {
            0: (0, -1),
            1: (4, -1),
            2: (10, -1),
        }
        assert await offsets_at(c, info, dict.fromkeys(range(3), begin + 5001), timeout=SOON) == {
            0: (6, begin + 6000),
            1: (5, begin + 5100),
            2: (5, begin + 5200),
        }
        assert await offsets_at(c, info, {0: begin + 9001, 2: begin}, timeout=SOON) == {
            0: (-1, -1),
            2: (0, begin + 200),
        }
        assert await offsets_at(c, info, {}, timeout=SOON) == {}


async def test_reading_begins_at_an_end_or_at_a_time() -> None:
    kafka = shared_kafka()
    topic = filled(kafka)
    await delete_before(kafka, topic, 4, 1)
    async with cluster(kafka.url()) as c:
        assert await places(c, topic, Start.EARLIEST) == [0, 4, 0]
        assert await places(c, topic, Start.LATEST) == [10, 10, 10]

        def at(ms: int) -> Start:
            return Start.at(datetime.fromtimestamp((NOW - 20_000 + ms) / 1000, UTC))

        assert await places(c, topic, at(5050)) == [6, 5, 5]
        assert await places(c, topic, at(9150)) == [10, 10, 9]
        assert await places(c, topic, at(0)) == [0, 4, 0]
        assert await places(c, topic, Start.at(datetime.now(UTC) + timedelta(days=300))) == [10, 10, 10]
        assert await places(c, topic, Start.at(datetime(1960, 1, 1, tzinfo=UTC))) == [0, 4, 0]


async def test_the_end_is_where_the_first_open_transaction_begins() -> None:
    kafka = shared_kafka()
    topic = made(kafka)
    plain = writer(kafka)
    write(plain, topic, numbered(3))
    producer = writer(kafka, transactional_id=name("tx"))
    producer.init_transactions(SOON)
    producer.begin_transaction()
    write(producer, topic, numbered(2))
    write(plain, topic, numbered(4))
    async with cluster(kafka.url()) as c:
        info = await c.topic(topic, timeout=SOON)
        assert await offsets_at(c, info, {0: LATEST}, timeout=SOON) == {0: (3, -1)}
        assert await offsets_at(c, info, {0: LATEST}, timeout=SOON, isolation=UNCOMMITTED) == {0: (9, -1)}
        assert await places(c, topic, Start.LATEST) == [3], "what becomes visible later is read"
        producer.abort_transaction(SOON)
        async with asyncio.timeout(SOON):
            while await places(c, topic, Start.LATEST) != [10]:
                await asyncio.sleep(0.02)


async def test_a_position_is_a_place_and_a_time_for_the_other_partitions() -> None:
    kafka = shared_kafka()
    topic = filled(kafka)
    begin = NOW - 20_000
    async with cluster(kafka.url()) as c:
        for offset in (0, 3, 9):
            text = position(topic, 1, begin + offset * 1000 + 100, offset)
            assert await places(c, topic, Start.position(text)) == [min(offset + 1, 10), offset, offset]
        with pytest.raises(ConfigError, match=r"there is no position .* yet"):
            await places(c, topic, Start.position(position(topic, 1, NOW, 10)))
        with pytest.raises(PositionLost, match="there is no record"):
            await places(c, topic, Start.position(position(topic, 3, NOW, 1)))
        with pytest.raises(PositionLost, match="there is no record"):
            await places(c, topic, Start.position(position(topic, 1, begin, 3)))
        await delete_before(kafka, topic, 4, 1)
        with pytest.raises(PositionLost, match="3 records") as caught:
            await places(c, topic, Start.position(position(topic, 1, begin + 1100, 1)))
        assert caught.value.lost == 3


async def test_a_position_that_compaction_or_a_transaction_took_is_lost() -> None:
    kafka = shared_kafka()
    topic = made(kafka)
    producer = writer(kafka, transactional_id=name("tx"))
    producer.init_transactions(SOON)
    producer.begin_transaction()
    write(producer, topic, [b"v"], timestamp=NOW)
    producer.commit_transaction(SOON)
    async with cluster(kafka.url()) as c:
        assert await places(c, topic, Start.position(position(topic, 0, NOW, 0))) == [0]
        async with asyncio.timeout(SOON):  # the marker is the last thing there
            while (await places(c, topic, Start.LATEST)) != [2]:
                await asyncio.sleep(0.02)
        with pytest.raises(PositionLost):
            await places(c, topic, Start.position(position(topic, 0, NOW, 1)))


async def test_a_cursor_is_a_place_in_all_partitions() -> None:
    kafka = shared_kafka()
    topic = filled(kafka)
    async with cluster(kafka.url()) as c:
        for offsets in ([0, 0, 0], [3, 10, 7], [10, 10, 10]):
            assert await places(c, topic, Start.position(cursor(topic, offsets, NOW))) == offsets
        with pytest.raises(PositionLost, match="deleted and made again"):
            await places(c, topic, Start.position(cursor(topic, [3, 11, 7])))
        with pytest.raises(PositionLost, match="3 partitions"):
            await places(c, topic, Start.position(cursor(topic, [0, 0, 0, 0])))
        await delete_before(kafka, topic, 4, 0)
        await delete_before(kafka, topic, 8, 2)
        assert await places(c, topic, Start.position(cursor(topic, [4, 0, 8]))) == [4, 0, 8]
        with pytest.raises(PositionLost) as caught:
            await places(c, topic, Start.position(cursor(topic, [1, 0, 7])))
        assert caught.value.lost == 4
        assert await places(c, topic, Start.position(cursor(topic, [4, 5]))) == [4, 5, 8], "it was added since"


@pytest.mark.parametrize(
    "text",
    [
        "nonsense", "0", "-1", "9" * 20, "é", "0" * 10_000, "1-1-1-1", "{name}[0]@1", "{name}[x]@1-1", "{name}[0]@1-1,1-1",
        "other[0]@1-1", "other[*]@1-1", "{name}[*]@1-1,", "{name}[*]@", "{name}[0]@1-1\n", "{name}[*]@1-1\n",
        "{name}[0]@1-" + "9" * 30, "{name}[*]@1-" + "9" * 30,
    ],
)  # fmt: skip
async def test_what_is_no_position_is_refused_before_anything_is_asked(text: str) -> None:
    nowhere: Any = None
    topic = name()
    with pytest.raises(ConfigError, match="is no position in"):
        await resolve(nowhere, address(topic), Start.position(text.replace("{name}", topic)), timeout=1)


async def test_offsets_beyond_what_a_log_may_have_are_refused() -> None:
    kafka = shared_kafka()
    topic = filled(kafka)
    async with cluster(kafka.url()) as c:
        for text in (
            f"{topic}[0]@1-{'9' * 19}",
            f"{topic}[0]@{'9' * 19}-1",
            f"{topic}[0]@-{'9' * 19}-1",
            f"{topic}[{'9' * 10}]@1-1",
            f"{topic}[*]@1-{'9' * 19}",
        ):
            with pytest.raises((ConfigError, PositionLost)):
                await places(c, topic, Start.position(text))


async def test_a_topic_that_is_missing_is_named() -> None:
    kafka = shared_kafka()
    topic = name()
    async with cluster(kafka.url()) as c:
        with pytest.raises(NotFound, match=f"{topic}.* declare it"):
            await places(c, topic, Start.EARLIEST)


async def test_a_topic_that_was_made_again_is_not_mistaken_for_the_old_one() -> None:
    kafka = shared_kafka()
    topic = filled(kafka)
    async with cluster(kafka.url()) as c:
        info = await c.topic(topic, timeout=SOON)
        with kafka.wire() as admin:
            admin.delete([topic])
            admin.create(topic, 3)
        with pytest.raises((NotFound, PositionLost)):
            await look(c, info, {0: 3}, timeout=SOON)


async def test_a_missing_right_is_named() -> None:
    kafka = shared_kafka(rights=True)
    topic = name().replace("t.", "u.", 1)
    rights = [Right("brokerkit", "topic", topic, "describe")]
    with kafka.wire() as admin:
        admin.create(topic)
        admin.allow(rights)
    async with cluster(kafka.url("SASL")) as c, asyncio.timeout(SOON):
        info = None
        while info is None:  # rights take effect a moment after they were given
            with contextlib.suppress(AuthorizationError):
                info = await c.topic(topic, timeout=SOON)
        with pytest.raises(AuthorizationError, match=f"READ on topic {topic}"):
            await look(c, info, {0: 0}, timeout=SOON)
        with kafka.wire() as admin:
            admin.forbid(rights)
        with pytest.raises(AuthorizationError, match=f"DESCRIBE on topic {topic}"):
            while await offsets_at(c, info, {0: LATEST}, timeout=SOON):
                await asyncio.sleep(0.02)


async def test_looking_returns_records_and_where_they_are() -> None:
    kafka = shared_kafka()
    topic = made(kafka, 2)
    producer = writer(kafka, batch_size=1000)
    write(producer, topic, numbered(500))
    write(producer, topic, numbered(3), 1)
    await delete_before(kafka, topic, 7, 0)
    async with cluster(kafka.url()) as c:
        info = await c.topic(topic, timeout=SOON)
        looked = await look(c, info, {0: 20, 1: 0}, timeout=SOON, size=1500)
        assert (looked[0].start, looked[0].end) == (7, 500)
        values = [record.value for record in looked[0].records]
        assert values == numbered(len(values), 20)
        assert 0 < len(values) < 400
        assert looked[0].next == 20 + len(values)
        assert [record.value for record in looked[1].records] == numbered(3)
        assert (await look(c, info, {0: 500}, timeout=SOON))[0].records == []
        for offset in (6, 501):
            with pytest.raises(PositionLost):
                await look(c, info, {0: offset}, timeout=SOON)


async def test_looking_at_large_records_in_several_partitions() -> None:
    kafka = shared_kafka()
    topic = made(kafka, 3, max_message_bytes="10000000")
    producer = writer(kafka, message_max_bytes=10_000_000)
    for partition in range(3):
        write(producer, topic, [b"x" * 2_000_000], partition)
    async with cluster(kafka.url()) as c:
        info = await c.topic(topic, timeout=SOON)
        looked = await look(c, info, dict.fromkeys(range(3), 0), timeout=SOON, size=1000)
        assert [len(looked[partition].records) for partition in range(3)] == [1, 1, 1]


async def test_what_gets_no_answer_ends_in_time() -> None:
    kafka = shared_kafka()
    topic = filled(kafka)
    async with Network(kafka) as network, cluster(network.url(), connect_timeout=1) as c:
        info = await c.topic(topic, timeout=SOON)
        nobody = TopicInfo(info.name, info.id, (Partition(0, -1, 0), *info.partitions[1:]))
        assert (await offsets_at(c, nobody, {0: LATEST}, timeout=SOON))[0] == (10, -1), "it is looked for"
        network.freeze()
        begun = time.monotonic()
        with pytest.raises(BrokerUnavailable, match=topic):
            await offsets_at(c, info, {0: LATEST}, timeout=0.5)
        assert time.monotonic() - begun < 2
        network.thaw()
        assert (await offsets_at(c, info, {0: LATEST}, timeout=SOON))[0] == (10, -1)
        network.disconnect()
        with pytest.raises(BrokerUnavailable):
            await resolve(c, address(topic), Start.LATEST, timeout=0.5)
        network.accept()
        assert await places(c, topic, Start.LATEST) == [10, 10, 10]


async def test_a_leader_that_is_not_one_any_more_is_asked_no_more() -> None:
    kafka = shared_kafka()
    topic = filled(kafka)
    async with cluster(kafka.url()) as c:
        info = await c.topic(topic, timeout=SOON)
        old = TopicInfo(info.name, info.id, tuple(Partition(part.index, 77, part.epoch) for part in info.partitions))
        assert (await offsets_at(c, old, {0: LATEST, 1: EARLIEST}, timeout=SOON)) == {0: (10, -1), 1: (0, -1)}
        newer = TopicInfo(
            info.name, info.id, tuple(Partition(part.index, part.leader, part.epoch + 1) for part in info.partitions)
        )
        assert (await offsets_at(c, newer, {0: LATEST}, timeout=SOON)) == {0: (10, -1)}
        assert len((await look(c, newer, {0: 0}, timeout=SOON))[0].records) == 10
