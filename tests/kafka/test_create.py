"""Creating topics: their settings, who creates them, and who may not."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import ConfigResource
from confluent_kafka.admin._resource import ResourceType
from kio.schema.errors import ErrorCode

from brokerkit.address import Address, Topic, redrive_queue
from brokerkit.driver import Receipt
from brokerkit.drivers.kafka._create import create
from brokerkit.errors import AuthorizationError, BrokerUnavailable, ConfigError, InvalidName
from tests.servers.kafka import Endpoints, shared_kafka

from .guests import guest
from .pretender import CREATE, Pretender
from .publishing import cluster_of, driver, kinds, read, record, topic

pytestmark = pytest.mark.asyncio


def settings(endpoints: Endpoints, name: str) -> Mapping[str, str]:
    """Return what another client finds."""
    admin: Any = AdminClient({"bootstrap.servers": endpoints.bootstrap()})
    resource = ConfigResource(ResourceType.TOPIC, name)
    found: Mapping[str, Any] = admin.describe_configs([resource])[resource].result(10)
    return {key: entry.value for key, entry in found.items()}


@pytest.mark.parametrize(
    ("retention", "ms"), [(None, "-1"), (math.inf, "-1"), (1e300, "-1"), (3600.0, "3600000"), (1.5, "1500")]
)
async def test_a_topic_has_the_settings_of_its_address(retention: float | None, ms: str) -> None:
    endpoints = shared_kafka()
    address: Any = Topic(topic().name, bytes, partitions=3, retention=retention)
    async with driver(endpoints.url()) as made:
        info = await create(cluster_of(made), address, timeout=10)
        assert [place.leader for place in info.partitions] == [1, 1, 1]
        found = settings(endpoints, address.name)
        assert (found["retention.ms"], found["cleanup.policy"]) == (ms, "delete")
        # A body of the largest size fits, with its key and headers.
        (result,) = await made.publish([record(address, b"x" * (1024 * 1024), b"k" * 1024)], timeout=10)
        assert isinstance(result, Receipt)
        # What is there is left as it is.
        other: Any = Topic(address.name, bytes, partitions=5)
        assert len((await create(cluster_of(made), other, timeout=10)).partitions) == 3
        assert settings(endpoints, address.name)["retention.ms"] == ms
    with endpoints.wire() as admin:
        admin.delete([address.name])


@pytest.mark.parametrize(
    ("which", "partitions", "times"), [("letters", 1, "CreateTime"), ("again", 4, "LogAppendTime")]
)
async def test_a_derived_topic_takes_what_was_accepted_once_and_keeps_it(
    which: str, partitions: int, times: str
) -> None:
    """Larger than anything of brokerkit, and from a clock that is days ahead."""
    endpoints = shared_kafka()
    orders = topic()
    address: Address = orders.dead_letters("g") if which == "letters" else redrive_queue(orders, "g")
    body, ahead = b"x" * 3_000_000, time.time() + 5 * 86400
    async with driver(endpoints.url()) as made:
        results = await made.publish([record(address, body, timestamp=ahead), record(address, "b", b"k")], timeout=20)
        assert kinds(results) == [Receipt, Receipt]
        found = settings(endpoints, address.name)
        assert (found["retention.ms"], found["retention.bytes"]) == ("-1", "-1")
        assert found["message.timestamp.type"] == times
    messages = read(endpoints, address.name)
    with endpoints.wire() as admin:
        assert len(admin.cluster([address.name]).topics[address.name]) == partitions
        admin.delete([address.name])
    assert sorted(len(message.value()) for message in messages) == [1, len(body)]
    (large,) = [message for message in messages if len(message.value()) > 1]
    assert dict(large.headers())["bk-time"] == b"%d" % round(ahead * 1000)
    places = {f"{m.topic()}[{m.partition()}]@{m.timestamp()[1]}-{m.offset()}" for m in messages}
    assert {result.position for result in results if isinstance(result, Receipt)} == places


async def test_whoever_is_first_creates_it() -> None:
    async with Pretender(3) as three, driver(three.url) as one, driver(three.url) as two:
        address = topic("orders", 3)
        infos = await asyncio.gather(*(create(cluster_of(made), address, timeout=5) for made in (one, two) * 5))
        assert {info.id for info in infos} == {three.topics["orders"].id}


async def test_it_is_there_when_all_partitions_have_leaders() -> None:
    async with Pretender() as one, driver(one.url) as made:
        one.create("orders", 2)
        one.lead("orders", 1, -1)
        creating = asyncio.ensure_future(create(cluster_of(made), topic("orders", 2), timeout=5))
        await asyncio.sleep(0.2)
        assert not creating.done()
        one.lead("orders", 1, 1)
        assert (await creating).leader(1) == 1
        assert one.seen[CREATE] == 0
        one.lead("orders", 1, -1)
        with pytest.raises(BrokerUnavailable):
            await create(cluster_of(made), topic("orders", 2), timeout=0.3)


async def test_a_cluster_that_is_away_for_a_moment_is_waited_for() -> None:
    async with Pretender() as one, driver(one.url) as made:
        await one.stop(1)
        creating = asyncio.ensure_future(create(cluster_of(made), topic("orders", 2), timeout=5))
        await asyncio.sleep(0.2)
        await one.start(1)
        assert len((await creating).partitions) == 2
        one.slow[CREATE] = asyncio.Event()
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            await create(cluster_of(made), topic("other", 2), timeout=0.4)
        assert time.monotonic() - began < 5


async def test_who_may_not_create_is_told_at_once() -> None:
    async with Pretender() as one, driver(one.url) as made:
        one.creates = False
        with pytest.raises(AuthorizationError, match="CREATE on topic orders"):
            await create(cluster_of(made), topic("orders"), timeout=5)
        assert one.seen[CREATE] == 1
        one.denied["orders"] = ErrorCode.topic_authorization_failed
        with pytest.raises(AuthorizationError, match="DESCRIBE on topic orders"):
            await create(cluster_of(made), topic("orders"), timeout=5)
    with guest() as who:
        who.allow(who.right("topic", "describe"))
        async with driver(who.url().partition("?")[0]) as made:
            with pytest.raises(AuthorizationError, match="CREATE on topic"):
                await create(cluster_of(made), topic(who.prefix + "orders"), timeout=5)


async def test_settings_that_the_cluster_cannot_keep_are_told_at_once() -> None:
    endpoints = shared_kafka()
    async with driver(endpoints.url(), replication=3) as made:
        with pytest.raises(ConfigError, match="replication"):
            await create(cluster_of(made), topic(), timeout=5)


async def test_names_that_kafka_does_not_tell_apart_are_told() -> None:
    endpoints = shared_kafka()
    name = topic().name
    async with driver(endpoints.url()) as made:
        await create(cluster_of(made), topic(f"{name}.b"), timeout=10)
        with pytest.raises(InvalidName, match="collides with existing topic"):
            await create(cluster_of(made), topic(f"{name}_b"), timeout=10)
    with endpoints.wire() as admin:
        admin.delete([f"{name}.b"])
