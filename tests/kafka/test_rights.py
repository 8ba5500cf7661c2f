"""The rights of README are what a program needs, and no more: without any one of them something is refused, and says what."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator

import pytest

from brokerkit import AuthorizationError, Broker, Message, NotFound, Start, Topic, connect
from tests.servers.kafka import Endpoints, Right, rights, shared_kafka

PATIENCE = 20.0


@contextlib.asynccontextmanager
async def allowed(given: list[Right], prefix: str) -> AsyncIterator[Endpoints]:
    """Give the user of the tests some rights for a while, and remove what it has made."""
    endpoints = shared_kafka(rights=True)
    with endpoints.wire() as admin:
        admin.allow(given)
        try:
            yield endpoints
        finally:
            admin.forbid(given)
            admin.delete([name for name in admin.cluster(None).topics if name.startswith(prefix)])


def fresh() -> str:
    return f"r.{uuid.uuid4().hex[:12]}."


def opened(endpoints: Endpoints, prefix: str, **options: object) -> Broker:
    return connect(endpoints.url("SASL", query=f"session=1&prefix={prefix}"), **options)  # type: ignore[arg-type]


ORDERS = Topic("orders", str, partitions=2)
DERIVED = ("orders..{}billing..dead", "orders..{}billing..again", "orders..{}billing..gone")


async def use(broker: Broker) -> None:
    """Do all that a program does whose topics exist."""
    for value in ("good", "bad"):
        await broker.publish(ORDERS, value, key=value)
    async with broker.subscribe(ORDERS, group="billing") as messages:
        for message in await take(messages.receive, 2):
            if message.value == "bad":
                await message.reject("no good")
            else:
                await message.ack(confirm=True)
    letters = [letter async for letter in broker.browse(ORDERS.dead_letters("billing"))]
    assert [letter.value for letter in letters] == ["bad"]
    assert (await broker.redrive(ORDERS.dead_letters("billing"))).moved == 1
    async with broker.subscribe(ORDERS, group="billing") as messages:
        (again,) = await take(messages.receive, 1)
        assert again.value == "bad"
        await again.ack(confirm=True)
    assert (await broker.backlog(ORDERS, "billing")).waiting == 0
    await broker.seek(ORDERS, "billing", Start.EARLIEST)
    assert (await broker.backlog(ORDERS, "billing")).waiting == 2
    assert sorted([stored.value async for stored in broker.browse(ORDERS)]) == ["bad", "good"]
    assert (await broker.health()).ok


async def take(receive: object, count: int) -> list[Message[str]]:
    found: list[Message[str]] = []
    async with asyncio.timeout(PATIENCE):
        while len(found) < count:
            found += await receive(limit=count - len(found), timeout=PATIENCE)  # type: ignore[operator]
    return found


async def manage(endpoints: Endpoints, prefix: str) -> None:
    """Do what only a program does that makes and removes its topics."""
    async with opened(endpoints, prefix) as broker:
        await broker.declare(ORDERS)
        await use(broker)
        async with opened(endpoints, prefix, declare="check") as other:
            await other.publish(ORDERS, "value")
        await broker.delete(ORDERS, "billing")
        await broker.delete(ORDERS)


def test_they_are_enough_to_make_use_and_remove_topics() -> None:
    async def scenario() -> None:
        prefix = fresh()
        async with allowed(rights(prefix), prefix) as endpoints:
            await manage(endpoints, prefix)
            with endpoints.wire() as admin:
                assert not [name for name in admin.cluster(None).topics if name.startswith(prefix)]

    asyncio.run(scenario())


def test_where_all_topics_exist_reading_and_writing_is_enough() -> None:
    async def scenario() -> None:
        prefix = fresh()
        async with allowed(rights(prefix, declare=False), prefix) as endpoints:
            with endpoints.wire() as admin:
                admin.create(prefix + "orders", 2)
                for name in DERIVED:
                    admin.create(
                        prefix + name.format(prefix),
                        1,
                        {"message.timestamp.type": "LogAppendTime"} if "dead" not in name else {},
                    )
            async with opened(endpoints, prefix, declare="never") as broker:
                await use(broker)

    asyncio.run(scenario())


def test_to_publish_writing_is_enough() -> None:
    async def scenario() -> None:
        prefix = fresh()
        given = [right for right in rights(prefix) if (right.resource, right.operation) == ("topic", "write")]
        async with allowed(given, prefix) as endpoints:
            with endpoints.wire() as admin:
                admin.create(prefix + "orders", 2)
            async with opened(endpoints, prefix, declare="never") as broker:
                await broker.publish(ORDERS, "value", key="key")
            with endpoints.wire() as admin:
                assert sum(admin.offsets(prefix + "orders", end=True).values()) == 1

    asyncio.run(scenario())


NEEDED = [right for right in rights("any.") if (right.resource, right.operation) != ("group", "alter_configs")]
"""The other one is for queues, which go on without it."""


@pytest.mark.parametrize("missing", NEEDED, ids=lambda right: f"{right.resource}-{right.operation}")
def test_each_is_needed_and_missing_it_is_named(missing: Right) -> None:
    async def scenario() -> None:
        prefix = fresh()
        given = [
            right
            for right in rights(prefix)
            if (right.resource, right.operation) != (missing.resource, missing.operation)
        ]
        async with allowed(given, prefix) as endpoints, asyncio.timeout(2 * PATIENCE):
            with pytest.raises(AuthorizationError) as caught:
                await manage(endpoints, prefix)
            assert missing.operation.upper() in str(caught.value), caught.value
            assert missing.resource in str(caught.value)
            assert prefix in str(caught.value)

    asyncio.run(scenario())


def test_a_user_without_any_is_refused_at_once() -> None:
    async def scenario() -> None:
        prefix = fresh()
        async with allowed([], prefix) as endpoints, asyncio.timeout(PATIENCE):
            for declare in ("auto", "check", "never"):
                async with opened(endpoints, prefix, declare=declare) as broker:
                    with pytest.raises((AuthorizationError, NotFound)):
                        await broker.publish(ORDERS, "value", timeout=PATIENCE)
                    with pytest.raises((AuthorizationError, NotFound)):
                        async with broker.subscribe(ORDERS, group="billing"):
                            pass

    asyncio.run(scenario())
