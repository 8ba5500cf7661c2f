"""A full server: publishing is refused, and whoever starts then drains it all the same."""

from __future__ import annotations

import asyncio

import pytest

from brokerkit import BufferFull, Message, Queue, Service, Topic, connect
from tests.servers import Flavor, RedisServer

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
