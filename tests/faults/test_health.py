"""What stands still is told, what can go on by itself does, and what is late has no effect."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest

from brokerkit import (
    AuthenticationError,
    AuthorizationError,
    Broker,
    BrokerError,
    Message,
    Queue,
    Service,
    Topic,
    connect,
)
from tests.servers import FLAVORS, USER, Flavor, RedisServer, rules, shared

QUEUE: Final = Queue("queue", str)
TOPIC: Final = Topic("topic", str, partitions=1)
RESUMED: Final = 20.0

each = pytest.mark.parametrize("flavor", FLAVORS)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(main())


async def until(held: Callable[[], Awaitable[object]], timeout: float = RESUMED) -> None:
    async with asyncio.timeout(timeout):
        while not await held():
            await asyncio.sleep(0.02)


class Working:
    """A service that remembers what it has handled, of a queue and of a topic."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.handled: list[str] = []
        self.service = Service("workers")
        self.service.subscribe(QUEUE)(self.handle)
        self.service.subscribe(TOPIC)(self.handle)

    async def handle(self, message: Message[str]) -> None:
        self.handled.append(message.value)

    async def works(self, of: str, text: str) -> None:
        """Publish, and return when it is handled."""
        if of == "queue":
            await self.broker.publish(QUEUE, text)
        else:
            await self.broker.publish(TOPIC, text)

        async def came() -> bool:
            return text in self.handled

        await until(came)

    async def healthy(self) -> bool:
        return (await self.broker.health()).ok

    async def ill(self) -> bool:
        return not (await self.broker.health()).ok


@asynccontextmanager
async def working(server: RedisServer) -> AsyncGenerator[Working]:
    async with connect(server.url(query="session=2")) as broker:
        it = Working(broker)
        async with it.service.running(broker):
            for of in ("queue", "topic"):
                await it.works(of, f"first of {of}")
            assert await it.healthy()
            yield it


FOREIGN: Final = {"queue": "bk:{queue}:r0", "topic": "bk:{topic}:0"}


@pytest.mark.parametrize("flavor, of", [("redis", "queue"), ("valkey", "topic")])
def test_a_subscription_that_stands_is_told_although_the_connection_pings(flavor: Flavor, of: str) -> None:
    """Somebody puts a foreign key in the place of ours; without it, work goes on by itself."""
    server = shared(flavor)
    server.clear()

    async def scenario() -> None:
        async with working(server) as it:
            await server.command("DEL", FOREIGN[of])
            await server.command("SET", FOREIGN[of], "foreign")
            await until(it.ill)
            assert server.command_now("PING") == b"PONG"
            health = await it.broker.health()
            assert any(of in problem for problem in health.problems), health
            other = "topic" if of == "queue" else "queue"
            await it.works(other, "the other works on")
            await server.command("DEL", FOREIGN[of])
            await until(it.healthy)
            await it.works(of, "second")

    run(scenario)


@pytest.mark.parametrize("flavor", ["redis"])
def test_rights_that_are_taken_away_and_given_back(flavor: Flavor) -> None:
    with RedisServer(flavor) as server:

        async def scenario() -> None:
            async with working(server) as it:
                await server.command("ACL", "SETUSER", USER, "-evalsha")
                await until(it.ill)
                problems = (await it.broker.health()).problems
                assert any("evalsha" in problem.lower() for problem in problems), problems
                with pytest.raises(AuthorizationError):
                    await it.broker.publish(QUEUE, "refused", timeout=2)
                await server.command("ACL", "SETUSER", USER, *rules(newer=flavor == "valkey").split())
                await until(it.healthy, 15)
                for of in ("queue", "topic"):
                    await it.works(of, f"second of {of}")

        run(scenario)


@each
def test_a_reader_by_hand_is_told_what_stops_it(flavor: Flavor) -> None:
    with RedisServer(flavor) as server:

        async def scenario() -> None:
            async with connect(server.url()) as broker:
                async with broker.subscribe(QUEUE) as messages:
                    assert (await broker.health()).ok
                    await server.command("ACL", "SETUSER", USER, "-evalsha")
                    with pytest.raises(AuthorizationError):
                        await messages.receive(timeout=RESUMED)
                    assert not (await broker.health()).ok
                    await server.command("ACL", "SETUSER", USER, *rules(newer=flavor == "valkey").split())
                assert (await broker.health()).ok, "nothing that should run stands still"

        run(scenario)


@pytest.mark.parametrize("flavor", ["redis"])
def test_a_server_that_is_away_is_told(flavor: Flavor) -> None:
    with RedisServer(flavor, appendonly=True, appendfsync="always") as server:

        async def scenario() -> None:
            async with working(server) as it:
                server.kill()
                await until(it.ill)
                began = time.monotonic()
                assert await it.ill()
                assert time.monotonic() - began < 8, "asking for health takes too long"
                server.start()
                await until(it.healthy)
                for of in ("queue", "topic"):
                    await it.works(of, f"second of {of}")

        run(scenario)


@pytest.mark.parametrize("flavor", ["valkey"])
def test_a_frozen_server_is_told_in_time(flavor: Flavor) -> None:
    with RedisServer(flavor) as server:

        async def scenario() -> None:
            async with working(server) as it:
                server.freeze()
                began = time.monotonic()
                assert await it.ill()
                assert time.monotonic() - began < 8, "asking for health takes too long"
                server.thaw()
                await until(it.healthy)
                for of in ("queue", "topic"):
                    await it.works(of, f"second of {of}")

        run(scenario)


@each
def test_a_wrong_password_is_told_at_once(flavor: Flavor) -> None:
    server = shared(flavor)

    async def scenario() -> None:
        began = time.monotonic()
        with pytest.raises(AuthenticationError) as raised:
            async with connect(server.url(password="canary")):
                pass
        assert time.monotonic() - began < 4.5, "it was tried again"
        assert "canary" not in f"{raised.value!r} {raised.value.__cause__!r}"

    run(scenario)


@pytest.mark.parametrize("of", ["queue", "topic"])
@each
def test_a_request_that_arrives_late_stores_nothing(flavor: Flavor, of: str) -> None:
    """What a network holds back, and the client has sent again, may arrive after what the client has published since."""
    with RedisServer(flavor, config={"slowlog-log-slower-than": "0", "slowlog-max-len": "1000"}) as server:

        async def scenario() -> None:
            async with connect(server.url()) as broker:

                async def stored() -> list[str]:
                    if of == "queue":
                        return [item.value async for item in broker.browse(QUEUE)]
                    return [item.value async for item in broker.browse(TOPIC)]

                for text in ("zero", "one", "two"):
                    if of == "queue":
                        await broker.publish(QUEUE, text, timeout=5)
                    else:
                        await broker.publish(TOPIC, text, key="key", timeout=5)
                calls = [entry[3] for entry in await server.command("SLOWLOG", "GET", "1000")]
                late = [call for call in calls if call[0].upper() == b"EVALSHA" and call[-1].endswith(b"one")]
                assert len(late) == 1, calls
                for _ in range(2):
                    try:
                        await server.command(*late[0])
                    except Exception as error:
                        assert "BK" in str(error)
                assert await stored() == ["zero", "one", "two"]

        run(scenario)


@each
def test_errors_are_of_one_tree(flavor: Flavor) -> None:
    """Whatever the server refuses reaches the program as a `BrokerError`."""
    server = shared(flavor)
    server.clear()

    async def scenario() -> None:
        async with connect(server.url()) as broker:
            await broker.publish(QUEUE, "one")
            await server.command("DEL", "bk:{queue}")
            await server.command("SET", "bk:{queue}", "foreign")
            with pytest.raises(BrokerError, match="queue"):
                await broker.publish(QUEUE, "two", timeout=2)

    run(scenario)
