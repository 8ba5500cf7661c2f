"""A connection that breaks at each byte: what is published is stored once or not at all, what is consumed is not lost."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest

from brokerkit import Broker, Queue, Topic, connect
from brokerkit.drivers.redis import _link, _wake
from tests.servers import FLAVORS, Flavor, Proxy, RedisServer, shared

from ..servers.proxy import Direction

QUEUE: Final = Queue("queue", str, lease=60)
TOPIC: Final = Topic("topic", str, partitions=1)
DONE: Final = Queue("done", str)
ADDRESSES: Final[dict[str, Queue[str] | Topic[str]]] = {"queue": QUEUE, "topic": TOPIC}
DIRECTIONS: Final[tuple[Direction, ...]] = ("up", "down")


@pytest.fixture(autouse=True)
def reconnect_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that break one after the other are made again ever slower, which is not what is tested here."""
    for module in (_link, _wake):
        monkeypatch.setattr(module, "backoff", lambda *_, **__: 0.0)


@asynccontextmanager
async def proxied(flavor: Flavor) -> AsyncGenerator[tuple[RedisServer, Proxy, str]]:
    server = shared(flavor)
    server.clear()
    async with Proxy(server.host, server.port) as proxy:
        yield server, proxy, server.url(port=proxy.port)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(100):
            await scenario()

    asyncio.run(main())


def share(flavor: Flavor, size: int) -> range:
    """Return where to break: the two servers share the bytes, if not everything is to be tested."""
    everything = bool(os.environ.get("BROKERKIT_FAULTS"))
    return range(size + 1) if everything else range(FLAVORS.index(flavor), size + 1, len(FLAVORS))


async def stored(broker: Broker, of: str) -> list[str]:
    address = ADDRESSES[of]
    if isinstance(address, Topic):
        return [item.id async for item in broker.browse(address, limit=1_000_000)]
    return [item.id async for item in broker.browse(address, limit=1_000_000)]


async def publish(broker: Broker, of: str, id: str, value: str) -> None:
    address = ADDRESSES[of]
    if isinstance(address, Topic):
        receipt = await broker.publish(address, value, id=id, key="key", timeout=20)
    else:
        receipt = await broker.publish(address, value, id=id, timeout=20)
    assert receipt.id == id


async def _exchange(proxy: Proxy, broker: Broker, of: str, direction: Direction) -> int:
    """Return how many bytes a publish and its answer have."""
    sizes: list[int] = []
    for number in range(3):
        before = proxy.passed[direction]
        await publish(broker, of, f"probe{number}", f"value {number}")
        sizes.append(proxy.passed[direction] - before)
    return max(sizes[1:])  # the first one declares the address


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("of", ADDRESSES)
@pytest.mark.parametrize("flavor", FLAVORS)
def test_publishing_survives_each_byte(flavor: Flavor, of: str, direction: Direction) -> None:
    """Whatever was sent before the break is sent again, and stored once; receipts tell the truth."""

    async def scenario() -> None:
        async with proxied(flavor) as (server, proxy, url), connect(url) as broker, connect(server.url()) as direct:
            size = await _exchange(proxy, broker, of, direction)
            assert size > 3
            sizes = share(flavor, size)
            for n in sizes:
                broke = proxy.connections
                proxy.cut_after(n, direction)
                await publish(broker, of, f"message{n}", f"value {n}")
                if n < size - 3:  # receipts have more digits than the probes had, never less
                    assert proxy.connections > broke or n >= size, f"nothing broke after {n} of {size} bytes"
            found = [id for id in await stored(direct, of) if id.startswith("message")]
            assert sorted(found) == sorted(f"message{n}" for n in sizes)
            assert proxy.connections > len(sizes) / 2

    run(scenario)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("of", ADDRESSES)
@pytest.mark.parametrize("flavor", FLAVORS)
def test_consuming_survives_each_byte(flavor: Flavor, of: str, direction: Direction) -> None:
    """A message whose delivery or acknowledgement was cut comes, and comes again only if it is not acknowledged."""

    async def scenario() -> None:
        async with proxied(flavor) as (server, proxy, url), connect(url) as broker, connect(server.url()) as direct:
            address = ADDRESSES[of]
            if isinstance(address, Topic):
                subscription = broker.subscribe(address, group="readers")
            else:
                subscription = broker.subscribe(address)
            async with subscription as messages:
                size = await _cycle(proxy, direct, messages.receive, of, direction)
                await direct.purge(DONE)
                sizes = share(flavor, size)
                seen: list[str] = []
                for n in sizes:
                    await publish(direct, of, f"message{n}", f"value {n}")
                    proxy.cut_after(n, direction)
                    while f"message{n}" not in seen:
                        received = await messages.receive(timeout=20)
                        assert received, f"message{n} has not come: cut after {n} bytes {direction}"
                        for message in received:
                            await message.publish(DONE, message.id)
                            await message.ack(confirm=True)
                            seen.append(message.id)
                assert sorted(set(seen)) == sorted(f"message{n}" for n in sizes)
                assert len(seen) == len(set(seen)), "acknowledged, and delivered again"
            assert proxy.connections > len(sizes) / 4  # not each byte comes each time
            done = [item.value async for item in direct.browse(DONE, limit=1_000_000)]
            assert sorted(done) == sorted(f"message{n}" for n in sizes), "what was stored with an acknowledgement"
            left = await (direct.backlog(TOPIC, "readers") if of == "topic" else direct.backlog(QUEUE))
            assert (left.waiting, left.in_flight or 0) == (0, 0)

    run(scenario)


async def _cycle(proxy: Proxy, direct: Broker, receive: Callable[..., Any], of: str, direction: Direction) -> int:
    """Return how many bytes it takes to receive a message and to acknowledge it."""
    sizes: list[int] = []
    for number in range(3):
        before = proxy.passed[direction]
        await publish(direct, of, f"probe{number}", f"value {number}")
        (message,) = await receive(timeout=10)
        await message.publish(DONE, "probe")
        await message.ack(confirm=True)
        sizes.append(proxy.passed[direction] - before)
    return max(sizes[1:])
