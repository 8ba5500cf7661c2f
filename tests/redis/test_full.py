"""A full server: publishing is refused, and whoever starts then drains it all the same."""

from __future__ import annotations

import asyncio

import pytest

from brokerkit import AuthorizationError, BufferFull, Message, Queue, Service, Topic, connect
from tests.servers import Flavor, RedisServer, rules

pytestmark = pytest.mark.asyncio

EMAILS = Queue("emails", bytes)
ORDERS = Topic("orders", bytes)


@pytest.mark.parametrize("flavor", ["redis", "valkey"])
async def test_who_starts_on_a_full_server_drains_it(flavor: Flavor) -> None:
    with RedisServer(flavor) as server:
        async with connect(server.url()) as broker:
            for number in range(20):
                await broker.publish(EMAILS, b"%d" % number)
                await broker.publish(ORDERS, b"%d" % number)
        await server.command("CONFIG", "SET", "maxmemory", 1)
        service = Service("late")
        handled: list[bytes] = []
        through = asyncio.Event()

        @service.subscribe(EMAILS)
        async def send(message: Message[bytes]) -> None:
            handled.append(message.value)
            if len(handled) == 40:
                through.set()

        @service.subscribe(ORDERS)
        async def bill(message: Message[bytes]) -> None:
            await send(message)

        async with connect(server.url()) as broker, service.running(broker):
            with pytest.raises(BufferFull):
                await broker.publish(EMAILS, b"more", timeout=0.2)
            await asyncio.wait_for(through.wait(), 20)
            await server.command("CONFIG", "SET", "maxmemory", 0)
            await broker.publish(EMAILS, b"more", timeout=10)


async def test_health_tells_when_nothing_can_be_put_on_disk() -> None:
    with RedisServer("valkey", appendonly=True) as server:
        async with connect(server.url(query="durability=aof")) as broker:
            await broker.publish(EMAILS, b"body")
            assert (await broker.health()).ok
            await server.command("ACL", "SETUSER", "brokerkit", "-waitaof")
            assert not (await broker.health()).ok


async def test_a_user_without_channels_is_refused_at_the_start() -> None:
    rights = " ".join(right for right in rules(newer=False).split() if not right.startswith("&"))
    with RedisServer(users={"mute": rights}) as server:
        with pytest.raises(AuthorizationError, match="channel"):
            async with connect(server.url(user="mute")):
                pass


async def test_rights_to_channels_that_are_taken_away_lose_nothing() -> None:
    with RedisServer() as server:
        async with connect(server.url()) as broker:
            await broker.publish(EMAILS, b"0")
            await broker.publish(ORDERS, b"0")
            await server.command("ACL", "SETUSER", "brokerkit", "resetchannels")
            for number in range(1, 4):
                await broker.publish(EMAILS, b"%d" % number)
                await broker.publish(ORDERS, b"%d" % number)
            await server.command("ACL", "SETUSER", "brokerkit", "&bk:*")
            stored = [message.value async for message in broker.browse(EMAILS)]
            assert stored == [b"0", b"1", b"2", b"3"]
            assert len([message async for message in broker.browse(ORDERS)]) == 4


async def test_a_right_that_is_missing_is_named_and_nothing_is_stored() -> None:
    with RedisServer() as server:
        async with connect(server.url()) as broker:
            await broker.publish(EMAILS, b"0")
            await broker.publish(ORDERS, b"0")
            await server.command("ACL", "SETUSER", "brokerkit", "-xadd", "-rpush")
            for address in (EMAILS, ORDERS):
                with pytest.raises(AuthorizationError, match="README"):
                    await broker.publish(address, b"1")
            await server.command("ACL", "SETUSER", "brokerkit", "+xadd", "+rpush")
            await broker.publish(EMAILS, b"2")
            await broker.publish(ORDERS, b"2")
            assert [message.value async for message in broker.browse(EMAILS)] == [b"0", b"2"]
            assert sorted([message.value async for message in broker.browse(ORDERS)]) == [b"0", b"2"]
