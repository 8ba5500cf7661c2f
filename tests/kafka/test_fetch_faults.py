"""Reading while brokers die, freeze and come back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka import admin as administrator

from tests.servers.kafka import KafkaCluster

from .reading import SOON, Reader, cluster, made, name, numbered, reading, write, writer

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def three() -> Iterator[KafkaCluster]:
    with KafkaCluster(brokers=3, listeners=("PLAIN",)) as brokers:
        yield brokers


@contextmanager
def writing(kafka: KafkaCluster, topic: str, partitions: int) -> Iterator[list[int]]:
    """Write numbers to each partition, in order, all the time; in the end there is how many that were."""
    producer = writer(kafka.endpoints, message_timeout_ms=120_000, socket_timeout_ms=2000, request_timeout_ms=2000)
    stop = threading.Event()
    counts = [0] * partitions

    def run() -> None:
        while not stop.wait(0.01):
            for partition in range(partitions):
                producer.produce(topic, b"%d" % counts[partition], partition=partition)
                counts[partition] += 1
            producer.poll(0)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield counts
    finally:
        stop.set()
        thread.join()
        assert producer.flush(60) == 0


@asynccontextmanager
async def followed(kafka: KafkaCluster, *, slowest: float, partitions: int = 3) -> AsyncIterator[tuple[str, Reader]]:
    """Read a topic that is written to all the time; in the end, all of it came, once and in order."""
    topic = made(kafka.endpoints, partitions, message_timestamp_type="LogAppendTime")
    places = dict.fromkeys(range(partitions), 0)
    async with cluster(kafka.endpoints.url()) as c, reading(c, topic, places) as reader:
        with writing(kafka, topic, partitions) as counts:
            await reader.read(dict.fromkeys(places, 20))
            reader.eager, reader.slowest = True, 0.0
            yield topic, reader
            ends = dict.fromkeys(places, counts[0] + 20)
            await reader.read(ends, within=60)
        assert reader.slowest < slowest, "from the broker's log to the reader"
        found = await reader.read(dict(enumerate(counts)))
        assert found == {partition: numbered(count) for partition, count in enumerate(counts)}
        assert not reader.errors
        assert not reader.cut
        assert not reader.overtaken_by


async def in_thread(call: object, *args: int) -> None:
    assert callable(call)
    await asyncio.to_thread(call, *args)


async def keeps_coming(reader: Reader, count: int = 50, *, within: float = SOON) -> None:
    """Return when *count* more records of each partition came."""
    ends = {partition: reader.fetcher.next_offset(partition) + count for partition in reader.seen}
    await reader.read(ends, within=within)


async def test_a_leader_dies_and_comes_back(three: KafkaCluster) -> None:
    async with followed(three, slowest=8) as (topic, reader):
        leader = three.leader(topic)
        await in_thread(three.kill, leader)
        await keeps_coming(reader)
        await in_thread(three.revive, leader)
        await keeps_coming(reader)


async def test_a_leader_freezes(three: KafkaCluster) -> None:
    async with followed(three, slowest=10) as (topic, reader):
        leader = three.leader(topic)
        three.freeze(leader)
        try:
            await keeps_coming(reader, within=40)
        finally:
            three.thaw(leader)
        await keeps_coming(reader)


async def test_all_brokers_die_and_come_back(three: KafkaCluster) -> None:
    async with followed(three, slowest=60) as (_, reader):
        for node in three.nodes:
            await in_thread(three.kill, node)
        await asyncio.sleep(2)
        await asyncio.gather(*(in_thread(three._launch, node) for node in three.nodes))
        await keeps_coming(reader, within=60)


async def test_a_log_that_lost_its_end_is_noticed(three: KafkaCluster) -> None:
    """An unclean election: who takes over has not got what was read last."""
    kafka = three.endpoints
    topic = name()
    library: Any = administrator
    admin = library.AdminClient({"bootstrap.servers": kafka.bootstrap()})
    settings = {"min.insync.replicas": "1", "unclean.leader.election.enable": "true"}
    (asked,) = admin.create_topics([library.NewTopic(topic, 1, 2, config=settings)]).values()
    await asyncio.to_thread(asked.result)
    producer = writer(kafka)
    write(producer, topic, numbered(100))
    async with cluster(kafka.url()) as c, reading(c, topic, {0: 0}) as reader:
        await reader.read({0: 100})
        leader = three.leader(topic)
        (found,) = admin.describe_topics(confluent_kafka.TopicCollection([topic])).values()
        described = await asyncio.to_thread(found.result)
        (follower,) = [node.id for node in described.partitions[0].replicas if node.id != leader]
        await in_thread(three.kill, follower)
        await asyncio.to_thread(write, producer, topic, numbered(50, 100))
        await reader.read({0: 150})
        await in_thread(three.kill, leader)
        await in_thread(three.revive, follower)
        await reader.until(lambda: reader.cut, within=60)
        assert reader.cut == [(0, 150, 100)]
        await asyncio.to_thread(write, writer(kafka), topic, [b"other"] * 70)
        reader.seen.clear()
        assert (await reader.read({0: 170}))[0] == [b"other"] * 70
        await in_thread(three.revive, leader)
        assert not reader.errors
        assert not reader.overtaken_by
        assert len(reader.cut) == 1
