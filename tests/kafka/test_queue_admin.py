"""Queues as an administrator sees them, beside what the conformance suite asks of every system."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from brokerkit import AuthorizationError, Broker, Message, Queue, SettingsMismatch, Topic, connect
from brokerkit.address import AnyQueue
from brokerkit.driver import Source
from brokerkit.drivers.kafka import _queue_admin
from brokerkit.drivers.kafka._tiers import waiting_for
from brokerkit.errors import CapabilityError, ConfigError
from tests.servers.kafka import rights, shared_kafka

from .test_engine import PATIENCE, allowed, heard, named, process

pytestmark = pytest.mark.asyncio


@asynccontextmanager
async def brokers(count: int = 1, version: Any = "4.3.1") -> AsyncIterator[list[Broker]]:
    """Connect some brokers with a prefix of this test alone, and remove its queue at the end."""
    prefix = f"e.{uuid.uuid4().hex[:12]}."
    url = shared_kafka(version).url(query=f"prefix={prefix}&session=6")
    opened = [connect(url) for _ in range(count)]
    async with opened[0]:
        for broker in opened[1:]:
            await broker.__aenter__()
        try:
            yield opened
        finally:
            for broker in opened[1:]:
                await broker.__aexit__(None, None, None)
            await opened[0].delete(EMAILS)


EMAILS = Queue("emails", str)


async def take(messages: Any, count: int) -> list[Message[str]]:
    found: list[Message[str]] = []
    async with asyncio.timeout(PATIENCE):
        while len(found) < count:
            found += await messages.receive(limit=count - len(found), timeout=PATIENCE)
    return found


async def put(broker: Broker, count: int, start: int = 0) -> None:
    await broker.publish_many(EMAILS, [f"v{number}" for number in range(start, start + count)])


# ---------------------------------------------------------------------- backlog


async def test_what_another_process_has_in_hand_is_not_known() -> None:
    async with brokers(2) as (one, two):
        await put(one, 10)
        async with one.subscribe(EMAILS, prefetch=3) as messages:
            await take(messages, 3)
            own = await one.backlog(EMAILS)
            assert (own.waiting, own.in_flight, own.delayed, own.dead) == (7, 3, 0, 0)
            other = await two.backlog(EMAILS)
            assert (other.waiting, other.in_flight) == (10, None)


async def test_a_message_that_is_held_for_less_than_a_second_is_delayed() -> None:
    async with brokers() as (broker,), broker.subscribe(EMAILS) as messages:
        await broker.publish(EMAILS, "soon", delay=0.9)
        async with asyncio.timeout(PATIENCE):
            while (found := await broker.backlog(EMAILS)).delayed != 1:
                await asyncio.sleep(0.02)
        assert (found.waiting, found.in_flight) == (0, 0)
        (message,) = await take(messages, 1)
        await message.ack(confirm=True)
        found = await broker.backlog(EMAILS)
        assert (found.waiting, found.in_flight, found.delayed, found.oldest_age) == (0, 0, 0, None)


@pytest.mark.parametrize("version", ["4.3.1", "3.9.2"])
async def test_what_keeps_time_is_no_message(version: str) -> None:
    """It lies among those that wait, and is written while a consumer waits for them."""
    async with brokers(2, version) as (one, two):
        await one.publish(EMAILS, "late", delay=2)
        seen: set[int | None] = set()
        async with one.subscribe(EMAILS) as messages:
            receiving = asyncio.ensure_future(take(messages, 1))
            while not receiving.done():
                for broker in (one, two):
                    found = await broker.backlog(EMAILS)
                    if found.waiting == 0 and not found.in_flight:
                        seen.add(found.delayed)
                await asyncio.sleep(0.05)
            (message,) = await receiving
            await message.ack(confirm=True)
        assert seen <= {0, 1}, seen
        assert 1 in seen
        assert [stored async for stored in two.browse(EMAILS)] == []


async def test_messages_are_counted_apart_from_what_keeps_time() -> None:
    async with process(named()) as r:
        await r.admin.declare(r.queue)
        later = waiting_for(r.queue)
        await r.put(r.queue, ["late", "later"], delay=1.5)
        await r.put(r.queue, ["much later"], delay=4000.0)
        await r.put(later, ["tick"], headers=(("bk-tick", b"1"),), delay=1.0)
        found = await r.admin.backlog(Source(r.queue))
        assert (found.waiting, found.delayed) == (0, 3)
        assert await r.ids(r.queue) == ["late", "later", "much later"]
        with pytest.MonkeyPatch.context() as patch:  # of very many it is not looked at each
            patch.setattr(_queue_admin, "_COUNTED", 2)
            assert (await r.admin.backlog(Source(r.queue))).delayed == 4
        assert await r.admin.purge(r.queue) == 3
        assert await r.ids(r.queue) == []
        await r.admin.delete(r.queue, None)


# ---------------------------------------------------------------------- browsing


async def test_pages_go_on_with_what_waits_for_its_time() -> None:
    async with process(named()) as r:
        await r.admin.declare(r.queue)
        await r.put(r.queue, [f"now{number:02}" for number in range(15)])
        await r.put(r.queue, [f"late{number:02}" for number in range(15)], delay=70.0)
        seen: list[str] = []
        after = None
        while page := await r.seen(r.queue, limit=4, after=after):
            assert len(page) <= 4
            seen += [one.record.id for one in page]
            assert {one.record.address for one in page} == {r.queue}
            after = page[-1].position
        assert sorted(seen[:15]) == [f"now{number:02}" for number in range(15)]
        assert seen[15:] == [f"late{number:02}" for number in range(15)]
        with pytest.raises(ConfigError, match="no position"):
            await r.seen(r.queue, after="nonsense")
        async with process(r.queue, keep=True) as other:  # which has not seen the pages before
            assert [one.record.id for one in await other.seen(r.queue, after=after)] == []
        await r.admin.delete(r.queue, None)


@pytest.mark.parametrize("version", ["4.3.1", "3.9.2"])
async def test_what_is_done_is_not_shown(version: str) -> None:
    async with brokers(2, version) as (one, two):
        await put(one, 40)
        async with one.subscribe(EMAILS, prefetch=100) as messages:
            for message in await take(messages, 40):
                await message.ack(confirm=True)
        assert [stored async for stored in two.browse(EMAILS)] == []
        await put(one, 3, 40)
        shown = {stored.value async for stored in two.browse(EMAILS)}
        assert {"v40", "v41", "v42"} <= shown
        # A share group's position is one acknowledgement behind in each partition, which nothing tells beside new messages.
        assert len(shown) <= (7 if version == "4.3.1" else 3), shown


# ---------------------------------------------------------------------- purging


@pytest.mark.parametrize("version", ["4.3.1", "3.9.2"])
async def test_after_a_purge_the_queue_goes_on_and_what_is_in_flight_stays(version: str) -> None:
    async with brokers(2, version) as (one, two):
        await put(one, 20)
        async with one.subscribe(EMAILS, prefetch=3) as messages:
            held = await take(messages, 3)
            assert await one.purge(EMAILS) == 17
            assert await one.purge(EMAILS) == 0
            await put(two, 5, 20)
            found = await one.backlog(EMAILS)
            assert (found.waiting, found.in_flight) == (5, 3)
            await held[0].ack(confirm=True)
            await held[1].nack()
            await held[2].reject("no")
            rest = [*await take(messages, 3)]
            for message in rest:
                await message.ack(confirm=True)
            rest += await take(messages, 3)
            for message in rest[3:]:
                await message.ack(confirm=True)
            assert {message.value for message in rest} == {held[1].value, *(f"v{number}" for number in range(20, 25))}
            found = await one.backlog(EMAILS)
            assert (found.waiting, found.in_flight, found.dead) == (0, 0, 1)


async def test_a_purge_needs_the_right_to_delete_and_says_so() -> None:
    queue = named()
    given = [one for one in rights(queue.name) if (one.resource, one.operation) != ("topic", "delete")]
    async with allowed(*given) as endpoints, process(queue, endpoints.url()) as admin:
        await admin.admin.declare(queue)
        await admin.put(queue, ["m"])
        async with process(queue, endpoints.url("SASL"), keep=True) as r:
            with pytest.raises(AuthorizationError, match=f"DELETE on topic {queue.name}"):
                await r.admin.purge(queue)
            with pytest.raises(AuthorizationError, match=f"DELETE on topic {queue.name}"):
                await r.admin.delete(queue, None)
            assert await r.ids(queue) == ["m"]
        for no in (Topic(queue.name, bytes), r.again):
            with pytest.raises(CapabilityError, match="cannot be purged"):
                await admin.admin.purge(cast("AnyQueue", no))


# ---------------------------------------------------------------------- what exists


async def test_the_lease_of_a_queue_is_compared() -> None:
    for version in ("4.3.1", "3.9.2"):
        url = shared_kafka(version).url()
        queue = named(lease=7)
        async with process(queue, url) as r:
            await r.admin.declare(queue)
            assert await r.admin.describe(queue) == {"lease": 7}
            same, other = Queue(queue.name, bytes, lease=7), Queue(queue.name, bytes, lease=9)
            async with connect(url, declare="check") as broker:
                await broker.publish(same, b"v")
            async with connect(url, declare="check") as broker:
                with pytest.raises(SettingsMismatch, match=r"lease=7\.0, the program says 9"):
                    await broker.publish(other, b"v")
            await r.admin.declare(other)
            assert await r.admin.describe(queue) == {"lease": 7}
            assert await r.admin.describe(other) == {"lease": 7}


async def test_who_has_no_right_to_the_group_declares_and_publishes() -> None:
    queue = named(lease=7)
    given = [one for one in rights(queue.name) if one.resource == "topic"]
    async with allowed(*given) as endpoints, process(queue, endpoints.url()) as admin:
        async with process(queue, endpoints.url("SASL"), keep=True) as r:
            await r.admin.declare(queue)
            assert await r.admin.describe(queue) == {"lease": 7}
            await r.put(queue, ["m"])
            for call in (r.admin.backlog(Source(queue)), r.seen(queue)):
                with pytest.raises(AuthorizationError, match=f"DESCRIBE on group {queue.name}"):
                    await call
        assert await admin.engine() is None
        assert len((await admin.cluster.topic(queue.name, timeout=PATIENCE)).partitions) == 4
        found = await admin.admin.backlog(Source(queue))
        assert (found.waiting, found.in_flight) == (1, 0)


async def test_a_topic_that_others_have_made_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    async with process(named()) as r:
        with shared_kafka().wire() as wire:
            wire.create(r.queue.name, 2, {"retention.ms": "60000", "cleanup.policy": "compact"})
        with caplog.at_level(logging.WARNING, "brokerkit"):
            await r.admin.declare(r.queue)
        told = [record.getMessage() for record in caplog.records]
        for name in ("message.timestamp.type=CreateTime", "retention.ms=60000", "cleanup.policy=compact"):
            assert any(name in text for text in told), name
        assert not any("retention.bytes" in text for text in told)
        caplog.clear()
        made = named()
        async with process(made) as other:
            await other.admin.declare(made)
        assert not caplog.records


async def test_deleting_removes_all_that_belongs_to_a_queue() -> None:
    async with process(named()) as r:
        await r.admin.declare(r.queue)
        await r.put(r.queue, ["now"])
        await r.put(r.queue, ["late"], delay=100.0)
        await r.put(r.queue.dead_letters, ["dead"])
        await heard(r)
        await r.admin.delete(r.queue, None)
        with shared_kafka().wire() as wire:
            assert not [name for name in wire.cluster(None).topics if name.startswith(r.queue.name)]
        assert await r.engine() is None
        await heard(r, "latest")
        await r.admin.delete(r.queue, None)


async def test_a_queue_that_is_deleted_under_its_consumer_can_be_made_again() -> None:
    async with brokers(2) as (one, two):
        await put(one, 3)
        async with one.subscribe(EMAILS) as messages:
            await take(messages, 3)
            await two.delete(EMAILS)
            await two.declare(EMAILS)
            await put(two, 2, 3)
            async with two.subscribe(EMAILS) as others:
                found = await take(others, 1)
                assert {message.value for message in found} <= {"v3", "v4"}


# ---------------------------------------------------------------------- redriving


@pytest.mark.parametrize("version", ["4.3.1", "3.9.2"])
async def test_letters_come_back_to_the_queue_or_to_another(version: str) -> None:
    other = Queue("others", str)
    async with brokers(1, version) as (broker,):
        await put(broker, 4)
        async with broker.subscribe(EMAILS) as messages:
            for message in await take(messages, 4):
                await message.reject("no")
            async with asyncio.timeout(PATIENCE):
                while (await broker.backlog(EMAILS)).dead != 4:
                    await asyncio.sleep(0.02)
            assert (await broker.redrive(EMAILS.dead_letters, limit=2)).moved == 2
            for message in await take(messages, 2):
                assert (message.attempt, message.deliveries) == (1, 1)
                await message.ack(confirm=True)
        await broker.declare(other)
        assert (await broker.redrive(EMAILS.dead_letters, to=other)).moved == 2
        assert (await broker.backlog(EMAILS)).dead == 0
        assert (await broker.backlog(other)).waiting == 2
        await broker.delete(other)


async def test_letters_of_a_topic_do_not_come_back_to_the_topic() -> None:
    async with process(named()) as r:
        await r.admin.declare(r.topic)
        positions = await r.bury(["a"])
        wrong: AnyQueue = Queue("orders", bytes)
        with pytest.raises(CapabilityError, match="private queue"):
            await r.admin.redrive(r.letters, positions, wrong._named(r.topic.name))
        await r.admin.declare(r.queue)
        assert list(await r.admin.redrive(r.letters, positions, r.queue)) == [None]
        assert await r.ids(r.queue) == ["a"]
        await r.admin.delete(r.topic, None)


async def test_a_name_is_a_topic_or_a_queue() -> None:
    for version in ("4.3.1", "3.9.2"):
        prefix = f"e.{uuid.uuid4().hex[:12]}."
        url = shared_kafka(version).url(query=f"prefix={prefix}")
        topic, queue = Topic("name", str), Queue("name", str)
        for first, second in ((topic, queue), (queue, topic)):
            async with connect(url) as broker:
                await broker.declare(first)
            for declare in ("auto", "check"):
                async with connect(url, declare=declare) as broker:
                    with pytest.raises(SettingsMismatch, match=r"Queue\('.*name'\)|Topic\('.*name'\)"):
                        await broker.publish(cast("Topic[str]", second), "v")
            async with connect(url) as broker:
                await broker.delete(first)
        async with process(named()) as r:  # the group was not reserved for a queue that is none
            other: AnyQueue = Queue("name", bytes)
            r.queue = other._named(prefix + "name")
            assert await r.engine() is None
