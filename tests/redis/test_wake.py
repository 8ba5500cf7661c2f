"""The connection on which a driver is woken: what is heard, what is heard again after a break, and what is noticed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from brokerkit.drivers._url import Options, parse
from brokerkit.drivers.redis._options import settings
from brokerkit.drivers.redis._wake import Wakes
from brokerkit.errors import AuthorizationError
from tests.servers import FLAVORS, USER, Flavor, Proxy, RedisServer, shared

pytestmark = pytest.mark.asyncio

CHANNEL = b"bk:{q}:c:one"
DEADLINE = 10.0


@pytest.fixture(params=FLAVORS)
def flavor(request: pytest.FixtureRequest) -> Flavor:
    found: Flavor = request.param
    return found


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(DEADLINE):
        while not holds():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def listening(url: str, *, timeout: float = 5.0, connected: bool = True) -> AsyncIterator[Wakes]:
    """Run wakes, and wait until they are up unless nobody is there."""
    parsed = parse(url)
    options = Options({**parsed.query, "timeout": timeout, "connect_timeout": 2}, "redis://")
    wakes = Wakes(settings(parsed, options))
    running = asyncio.ensure_future(wakes.run())
    try:
        if connected:
            await until(lambda: wakes.problem is None)
        yield wakes
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.wait([running])


async def publish(server: RedisServer, data: bytes, channel: bytes = CHANNEL) -> int:
    """Publish, and return how many have got it."""
    count: int = await server.command("SPUBLISH", channel, data)
    return count


async def test_what_is_published_after_subscribing_is_heard(flavor: Flavor) -> None:
    server, heard = shared(flavor), list[bytes]()
    async with listening(server.url()) as wakes:
        await wakes.subscribe(CHANNEL, heard.append)
        for number in range(20):
            assert await publish(server, b"%d" % number) == 1
        await until(lambda: len(heard) == 20)
        assert heard == [b"%d" % number for number in range(20)]
    assert await publish(server, b"nobody") == 0


async def test_a_channel_serves_several_until_the_last_one_leaves(flavor: Flavor) -> None:
    server, first, second = shared(flavor), list[bytes](), list[bytes]()
    async with listening(server.url()) as wakes:
        await asyncio.gather(wakes.subscribe(CHANNEL, first.append), wakes.subscribe(CHANNEL, second.append))
        await publish(server, b"a")
        await until(lambda: first == second == [b"a"])
        wakes.unsubscribe(CHANNEL, first.append)
        wakes.unsubscribe(CHANNEL, first.append)
        await publish(server, b"b")
        await until(lambda: second == [b"a", b"b"])
        assert first == [b"a"]
        wakes.unsubscribe(CHANNEL, second.append)
        async with asyncio.timeout(DEADLINE):
            while await publish(server, b"c"):
                await asyncio.sleep(0.002)
        assert second == [b"a", b"b"] or second[2:] == [b"c"] * (len(second) - 2)


async def test_leaving_and_coming_back_in_one_turn_is_heard(flavor: Flavor) -> None:
    server, heard = shared(flavor), list[bytes]()
    async with listening(server.url()) as wakes:
        for _ in range(5):
            await wakes.subscribe(CHANNEL, heard.append)
            wakes.unsubscribe(CHANNEL, heard.append)
        await wakes.subscribe(CHANNEL, heard.append)
        assert await publish(server, b"a") == 1
        await until(lambda: heard == [b"a"])


async def test_hundreds_of_channels_and_nobody_hears_for_another(flavor: Flavor) -> None:
    server = shared(flavor)
    names = [b"bk:{q%d}:c:one" % number for number in range(300)]
    heard: dict[bytes, list[bytes]] = {name: [] for name in names}
    async with listening(server.url()) as wakes:
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*(wakes.subscribe(name, heard[name].append) for name in names))
        for name in names[::7]:
            await publish(server, name, name)
        await until(lambda: all(heard[name] for name in names[::7]))
        assert {name: data for name, data in heard.items() if data} == {name: [name] for name in names[::7]}


async def test_after_a_break_everybody_looks_again_and_hears_on(flavor: Flavor) -> None:
    server, heard = shared(flavor), list[bytes]()
    async with listening(server.url()) as wakes:
        await wakes.subscribe(CHANNEL, heard.append)
        for round_ in range(3):
            heard.clear()
            await server.command("CLIENT", "KILL", "USER", USER)
            await until(lambda: heard == [b""])
            assert await publish(server, b"%d" % round_) == 1
            await until(lambda: heard == [b"", b"%d" % round_])  # noqa: B023
        assert wakes.problem is None


async def test_who_subscribes_while_nobody_is_there_is_told_later(flavor: Flavor) -> None:
    server, heard = shared(flavor), list[bytes]()
    async with Proxy(server.host, server.port) as proxy:
        proxy.disconnect()
        async with listening(server.url(port=proxy.port), connected=False) as wakes:
            async with asyncio.timeout(DEADLINE):
                await wakes.subscribe(CHANNEL, heard.append)
            await until(lambda: "connecting to redis://" in (wakes.problem or ""))
            assert heard == []
            proxy.accept()
            await until(lambda: heard == [b""])
            assert wakes.problem is None
            assert await publish(server, b"a") == 1
            await until(lambda: heard == [b"", b"a"])


async def test_a_break_while_subscribing_lets_go_on() -> None:
    with RedisServer("redis") as server:
        async with listening(server.url()) as wakes:
            server.freeze()
            subscribing = asyncio.ensure_future(wakes.subscribe(CHANNEL, list[bytes]().append))
            await asyncio.sleep(0.05)
            assert not subscribing.done()
            server.kill()
            async with asyncio.timeout(DEADLINE):
                await subscribing


async def test_a_server_that_is_silent_is_noticed_and_forgiven() -> None:
    with RedisServer("redis") as server:
        heard = list[bytes]()
        async with listening(server.url(), timeout=0.4) as wakes:
            await wakes.subscribe(CHANNEL, heard.append)
            await asyncio.sleep(1.0)  # it is asked now and then, and answers
            assert wakes.problem is None
            assert heard == []
            server.freeze()
            began = asyncio.get_running_loop().time()
            await until(lambda: wakes.problem is not None)
            assert asyncio.get_running_loop().time() - began < 2.0
            assert "silent for 0.4 s" in (wakes.problem or "")
            server.thaw()
            await until(lambda: heard == [b""])
            assert await publish(server, b"a") >= 1
            await until(lambda: heard[1:] == [b"a"])


async def test_a_cancelled_subscriber_leaves_nothing_behind() -> None:
    with RedisServer("redis") as server:
        heard = list[bytes]()
        async with listening(server.url()) as wakes:
            server.freeze()
            subscribing = asyncio.ensure_future(wakes.subscribe(CHANNEL, heard.append))
            await asyncio.sleep(0.05)
            subscribing.cancel()
            await asyncio.wait([subscribing])
            assert subscribing.cancelled()
            server.thaw()
            async with asyncio.timeout(DEADLINE):
                while await publish(server, b"a"):
                    await asyncio.sleep(0.002)
            assert heard == []
            await wakes.subscribe(CHANNEL, heard.append)
            await publish(server, b"b")
            await until(lambda: heard == [b"b"])


async def test_a_channel_that_is_not_allowed_is_refused_alone(flavor: Flavor) -> None:
    server, heard = shared(flavor), list[bytes]()
    async with listening(server.url()) as wakes:
        with pytest.raises(AuthorizationError, match=r"listening to foreign.*README"):
            await wakes.subscribe(b"foreign", heard.append)
        await wakes.subscribe(CHANNEL, heard.append)
        assert await publish(server, b"a") == 1
        await until(lambda: heard == [b"a"])
        assert wakes.problem is None


async def test_a_callback_that_fails_stops_nobody(flavor: Flavor, caplog: pytest.LogCaptureFixture) -> None:
    server, heard = shared(flavor), list[bytes]()

    def fails(data: bytes) -> None:
        raise ValueError("no")

    async with listening(server.url()) as wakes:
        await wakes.subscribe(CHANNEL, fails)
        await wakes.subscribe(CHANNEL, heard.append)
        await publish(server, b"a")
        await publish(server, b"b")
        await until(lambda: heard == [b"a", b"b"])
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2


async def test_a_password_that_was_changed_is_told_of_once_and_read_again(
    flavor: Flavor, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path_factory.mktemp("secret") / "password"
    heard = list[bytes]()
    with RedisServer(flavor) as server:
        old = server.passwords[USER]
        path.write_text(old)
        url = f"redis://{USER}@{server.host}:{server.port}?password_file={path}"
        async with listening(url) as wakes:
            await wakes.subscribe(CHANNEL, heard.append)
            await server.passwd(USER, "n3w-Canary")
            await server.command("CLIENT", "KILL", "USER", USER)
            await until(lambda: "refused the user name or password" in (wakes.problem or ""))
            await asyncio.sleep(0.5)  # several attempts
            path.write_text("n3w-Canary")
            await until(lambda: heard == [b""])
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert old not in caplog.text
    assert "n3w-Canary" not in caplog.text
