"""The network before brokers: clients go through it wherever they are sent, and it breaks as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiokafka
import aiokafka.errors
import confluent_kafka
import pytest
from confluent_kafka.admin import AdminClient

from .kafka import Endpoints, KafkaCluster, Network
from .kafka.network import FIND_COORDINATOR, METADATA, PRODUCE
from .kafka.wire import Wire


@pytest.fixture(scope="module")
def endpoints() -> Iterator[Endpoints]:
    with KafkaCluster(brokers=3) as cluster, cluster.endpoints.wire() as admin:
        admin.create("topic", 6)
        yield cluster.endpoints


@contextlib.asynccontextmanager
async def producing(at: str) -> AsyncIterator[Any]:
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers=at, request_timeout_ms=3000)
    try:
        await producer.start()
        yield producer
    finally:
        await producer.stop()


def bootstrap(network: Network) -> str:
    return ",".join(f"127.0.0.1:{port}" for port in network.ports)


def test_clients_see_only_the_proxies(endpoints: Endpoints) -> None:
    """Also of the oldest and of newer versions of the protocol."""

    async def scenario() -> None:
        async with Network(endpoints) as network:
            async with producing(bootstrap(network)) as producer:
                for partition in range(6):
                    await producer.send_and_wait("topic", b"value", partition=partition)
            consumer = aiokafka.AIOKafkaConsumer(
                "topic", bootstrap_servers=bootstrap(network), group_id="group", auto_offset_reset="earliest"
            )
            await consumer.start()
            found: list[int] = []
            while len(found) < 6:
                for records in (await consumer.getmany(timeout_ms=500)).values():
                    found += [record.partition for record in records]
            await consumer.stop()
            assert sorted(found) == list(range(6))
            assert {PRODUCE, METADATA, FIND_COORDINATOR} <= set(network.seen)
            assert all(proxy.connections for proxy in network.nodes.values())
            await asyncio.to_thread(newer, bootstrap(network), set(network.ports))
            await asyncio.to_thread(oldest, network.ports)
        assert not any(proxy.open for proxy in network.nodes.values())

    def newer(at: str, ports: set[int]) -> None:
        admin = AdminClient({"bootstrap.servers": at})
        until = time.monotonic() + 30  # on a busy machine a broker may be late with its signs of life
        while {broker.port for broker in admin.list_topics(timeout=10).brokers.values()} != ports:
            assert time.monotonic() < until, "a broker is missing"
            time.sleep(0.1)
        consumer = confluent_kafka.Consumer({"bootstrap.servers": at, "group.id": "group"})
        (place,) = consumer.committed([confluent_kafka.TopicPartition("topic", 0)], timeout=10)
        assert place.error is None
        consumer.close()

    def oldest(ports: list[int]) -> None:
        with Wire(ports[0]) as admin:
            assert sorted(port for _, port in admin.cluster().brokers.values()) == sorted(ports)

    asyncio.run(scenario())


def test_a_lost_reply_is_that_of_a_publish_that_was_stored(endpoints: Endpoints) -> None:
    async def scenario() -> None:
        async with Network(endpoints) as network, producing(bootstrap(network)) as producer:
            before = sum(ends(endpoints))
            network.lose_replies(1)
            with contextlib.suppress(aiokafka.errors.KafkaError):  # it may well publish again
                await producer.send_and_wait("topic", b"value", partition=0)
            assert network.replies == 0
            assert sum(proxy.lost for proxy in network.nodes.values()) == 1
            async with asyncio.timeout(30):
                while sum(ends(endpoints)) <= before:  # the other brokers may have it a moment later
                    await asyncio.sleep(0.05)

    asyncio.run(scenario())


def ends(endpoints: Endpoints) -> list[int]:
    found = []
    for own in endpoints.ports.values():
        with Wire(own["PLAIN"]) as admin:
            for index, leader in admin.cluster(["topic"]).topics["topic"].items():
                if endpoints.ports[leader] is own:
                    found.append(admin.offset("topic", index, end=True))
    return found


def test_one_broker_is_cut_off_and_comes_back(endpoints: Endpoints) -> None:
    async def scenario() -> None:
        async with Network(endpoints) as network, producing(bootstrap(network)) as producer:
            with endpoints.wire() as admin:
                leaders = admin.cluster(["topic"]).topics["topic"]
            there, elsewhere = 0, next(index for index in leaders if leaders[index] != leaders[0])
            for index in (there, elsewhere):
                await producer.send_and_wait("topic", b"value", partition=index)
            network.nodes[leaders[there]].disconnect()
            with pytest.raises(aiokafka.errors.KafkaError):
                await producer.send_and_wait("topic", b"value", partition=there)
            await producer.send_and_wait("topic", b"value", partition=elsewhere)
            network.accept()
            network.freeze()
            sent = asyncio.ensure_future(producer.send_and_wait("topic", b"value", partition=there))
            await asyncio.sleep(0.1)
            assert not sent.done()
            network.thaw()
            await sent

    asyncio.run(scenario())


def test_of_a_killed_client_nothing_passes_any_more(endpoints: Endpoints) -> None:
    async def scenario() -> None:
        async with Network(endpoints) as network, producing(bootstrap(network)) as producer:
            await producer.send_and_wait("topic", b"value", partition=0)
            network.kill()
            network.accept()
            with pytest.raises(aiokafka.errors.KafkaError):
                await producer.send_and_wait("topic", b"value", partition=0)

    asyncio.run(scenario())
