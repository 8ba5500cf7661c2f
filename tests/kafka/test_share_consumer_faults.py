"""Consumers of a share group while brokers are missing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from brokerkit.driver import Delivery
from brokerkit.errors import BrokerUnavailable
from tests.servers.kafka import KafkaCluster

from .consuming import SOON, eventually, ids, names, process
from .share_consuming import QUIET, configure, consuming, done, named, take

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def three() -> Iterator[KafkaCluster]:
    with KafkaCluster(brokers=3, listeners=("PLAIN",)) as brokers:
        yield brokers


async def test_a_rescue_waits_for_enough_copies(three: KafkaCluster) -> None:
    """Nobody gets what could be dropped next, also not when whoever rescues it is killed; it comes when it is safe."""
    queue, url = named(), three.endpoints.url(query="queue_partitions=1&timeout=3")
    async with process(url, queue) as p:  # type: ignore[arg-type]
        await p.put(queue, names(3))
        for _ in range(2):
            async with process(url) as dying, consuming(dying, queue) as consumer:
                await take(consumer, 3)
                await dying.die()
        configure(three.endpoints, queue.name, "min.insync.replicas", "3")
        node = next(node for node in three.nodes if node != three.leader(queue.name))
        await asyncio.to_thread(three.kill, node)
        async with process(url) as dying, consuming(dying, queue) as consumer:
            receiving = asyncio.ensure_future(consumer.receive(100, SOON))
            await eventually(lambda: isinstance(consumer._returns and consumer._returns.problem, BrokerUnavailable))
            assert not receiving.done()
            receiving.cancel()
            await dying.die()
        async with consuming(p, queue) as consumer:
            assert not await consumer.receive(100, 6.0)
            assert not (await p.driver.health()).ok
            await asyncio.to_thread(three.revive, node)
            seen: list[Delivery] = []
            while set(ids(seen)) != set(names(3)):
                got = await take(consumer, 1)
                assert got[0].deliveries >= 3
                await done(consumer, got, confirm=True)
                seen += got
            await consumer.receive(100, QUIET)
            assert consumer.problem is None
