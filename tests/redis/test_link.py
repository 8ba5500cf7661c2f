"""The connection that mends itself: what becomes of calls when it breaks, stalls or is answered late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import anyio
import pytest

from brokerkit.drivers._url import Options, parse
from brokerkit.drivers.redis._link import GRACE, Link, Unanswered
from brokerkit.drivers.redis._options import Settings, settings
from brokerkit.drivers.redis._scripts import PUBLISH_QUEUE
from brokerkit.errors import AuthenticationError, BrokerError, BrokerUnavailable, Closed
from tests.servers import ADMIN, Proxy, RedisServer

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer("redis") as started:
        yield started


def read(url: str, **options: object) -> Settings:
    parsed = parse(url)
    return settings(parsed, Options({**parsed.query, **options}, "redis://"))


@asynccontextmanager
async def running(link: Link) -> AsyncIterator[Link]:
    async with anyio.create_task_group() as tasks:
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        tasks.start_soon(link.run, started)
        await started
        yield link
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def linked(server: RedisServer, **options: object) -> AsyncIterator[tuple[Link, Proxy]]:
    async with Proxy(server.host, server.port) as proxy:
        async with running(Link(read(server.url(user=ADMIN, port=proxy.port), **options))) as link:
            yield link, proxy


def count(link: Link, key: str, *, again: bool = True, timeout: float = 10) -> asyncio.Future[object]:
    return link.command(b"INCR", key, timeout=timeout, again=again)


async def up(link: Link) -> None:
    while not link.up:
        await asyncio.sleep(0.001)


async def down(link: Link) -> None:
    while link.up:
        await asyncio.sleep(0.001)


async def test_answers_come_to_those_who_asked_even_if_others_were_cancelled(server: RedisServer) -> None:
    async with linked(server) as (link, _):
        futures = [link.command(b"ECHO", str(n), timeout=10) for n in range(3000)]
        for future in futures[::3]:
            future.cancel()
        await asyncio.sleep(0)
        later = [link.command(b"ECHO", str(n), timeout=10) for n in range(3000, 3100)]
        for n, future in enumerate(futures):
            if n % 3:
                assert await future == str(n).encode()
        for n, future in enumerate(later, 3000):
            assert await future == str(n).encode()


async def test_calls_wait_for_a_connection_that_comes_back_soon(server: RedisServer) -> None:
    async with linked(server) as (link, proxy):
        for _ in range(5):
            proxy.reset()
            await down(link)
            assert await link.command(b"ECHO", b"x", timeout=10) == b"x"


async def test_what_was_sent_is_sent_again_unless_it_must_not_be(server: RedisServer) -> None:
    async with linked(server) as (link, proxy):
        proxy.lose_replies(1, [b"INCR"])
        assert await count(link, "again") == 2
        proxy.lose_replies(1, [b"INCR"])
        with pytest.raises(Unanswered):
            await count(link, "once", again=False)
        assert await count(link, "once") == 2


async def test_calls_keep_their_order_across_a_reconnect(server: RedisServer) -> None:
    async with linked(server) as (link, proxy):
        await link.command(b"DEL", b"log", timeout=10)
        proxy.lose_replies(1, [b"RPUSH"])
        first = link.command(b"RPUSH", b"log", b"a", timeout=3)
        await down(link)
        second = link.command(b"RPUSH", b"log", b"b", timeout=3)
        async with asyncio.timeout(3):
            assert [await first, await second] == [2, 3]
        assert await link.command(b"LRANGE", b"log", 0, -1, timeout=10) == [b"a", b"a", b"b"]


async def test_the_answer_to_who_has_gone_is_nobody_elses(server: RedisServer) -> None:
    async with linked(server) as (link, proxy):
        proxy.freeze()
        gone, *others = [link.command(b"ECHO", str(n), timeout=10) for n in range(3)]
        while len(link._unanswered) < 3:
            await asyncio.sleep(0)
        gone.cancel()
        proxy.thaw()
        assert [await other for other in others] == [b"1", b"2"]


async def test_a_call_that_was_never_sent_fails_as_certain_when_the_connection_stays_away(server: RedisServer) -> None:
    async with linked(server) as (link, proxy):
        told: list[bool] = []
        link.watchers.add(told.append)
        proxy.disconnect()
        await down(link)
        waiting = link.command(b"PING", timeout=30)
        with pytest.raises(BrokerUnavailable) as caught:
            await asyncio.wait_for(waiting, GRACE + 5)
        assert not isinstance(caught.value, Unanswered)
        assert told == [False]
        with pytest.raises(BrokerUnavailable):  # at once, now
            await asyncio.wait_for(link.command(b"PING", timeout=30), 0.5)
        proxy.accept()
        await up(link)
        assert told == [False, True]
        assert await link.command(b"ECHO", b"x", timeout=10) == b"x"


async def test_a_call_that_was_sent_stays_open_until_its_deadline(server: RedisServer) -> None:
    async with linked(server) as (link, proxy):
        proxy.lose_replies(1, [b"INCR"])
        proxy.refuse()
        future = count(link, "open", timeout=2 * GRACE)
        await asyncio.sleep(1.5 * GRACE)
        assert not future.done()
        proxy.accept()
        assert await future == 2


async def test_a_deadline_passes_while_the_server_stands_still(server: RedisServer) -> None:
    async with linked(server) as (link, _):
        server.freeze()
        try:
            with pytest.raises(Unanswered):
                await asyncio.wait_for(link.command(b"PING", timeout=0.3), 2)
            assert link.up
        finally:
            server.thaw()
        assert await link.command(b"ECHO", b"x", timeout=10) == b"x"


async def test_a_connection_that_owes_an_answer_for_too_long_is_made_anew(server: RedisServer) -> None:
    async with linked(server, timeout=0.5) as (link, proxy):
        proxy.freeze()
        future = link.command(b"ECHO", b"x", timeout=30)
        await asyncio.wait_for(down(link), 5)
        proxy.thaw()
        assert await asyncio.wait_for(future, 5) == b"x"
        assert proxy.connections >= 2


async def test_scripts_that_the_server_forgot_are_loaded_again(server: RedisServer) -> None:
    async with linked(server) as (link, _):
        for i in range(20):
            await server.command("HSET", f"bk:{{s{i}}}", "kind", "q")
        for n in range(1, 4):
            await server.command("SCRIPT", "FLUSH")
            calls = [
                link.call(PUBLISH_QUEUE, (b"bk:{s%d}" % i, b"bk:{s%d}:r0" % i), [b"@p", n, b"frame"], timeout=10)
                for i in range(20)
            ]
            assert [await call for call in calls] == [b"%d" % n] * 20


async def test_what_the_server_refuses_fails_alone(server: RedisServer) -> None:
    async with linked(server) as (link, _):
        bad = link.command(b"NOSUCH", timeout=10)
        good = link.command(b"ECHO", b"x", timeout=10)
        with pytest.raises(BrokerError, match=r"(?i)unknown command"):
            await bad
        assert await good == b"x"
        assert link.up


async def test_a_lost_server_is_no_answer_at_the_start(server: RedisServer) -> None:
    async with Proxy(server.host, server.port) as proxy:
        proxy.refuse()
        with pytest.raises(BaseException) as caught:
            async with running(Link(read(server.url(port=proxy.port)))):
                pass
        assert caught.group_contains(BrokerUnavailable)


async def test_a_wrong_password_is_told_at_once(server: RedisServer) -> None:
    with pytest.raises(BaseException) as caught:
        async with running(Link(read(server.url(password="wrong")))):
            pass
    assert caught.group_contains(AuthenticationError)


async def test_closing_fails_what_is_open_and_what_comes_later(server: RedisServer) -> None:
    async with linked(server) as (link, proxy):
        proxy.freeze()
        sent = link.command(b"PING", timeout=30)
        await asyncio.sleep(0.05)
        unsent = link.command(b"PING", timeout=30)
    with pytest.raises(Unanswered):
        await sent
    with pytest.raises((BrokerUnavailable, Closed)):
        await unsent
    with pytest.raises(Closed):
        await link.command(b"PING", timeout=30)


async def test_a_sealed_answer_waits_for_the_disk() -> None:
    with RedisServer("valkey", appendonly=True, appendfsync="everysec") as server:
        link = Link(read(server.url(user=ADMIN), durability="aof"), sealed=True)
        async with running(link):
            for n in range(3):
                futures = [count(link, f"sealed{n}") for _ in range(100)]
                assert [await future for future in futures] == list(range(1, 101))
                server.kill()
                server.start()
            assert int(await count(link, "sealed0")) == 101  # type: ignore[call-overload]


async def test_an_answer_that_was_not_sealed_is_none() -> None:
    """The server has run the command, and does not say that it is on disk."""
    with RedisServer("valkey", appendonly=True, appendfsync="everysec") as server:
        link = Link(read(server.url(user=ADMIN), durability="aof"), sealed=True)
        async with running(link):
            assert await count(link, "key") == 1
            await server.command("CONFIG", "SET", "appendfsync", "no")
            future = count(link, "key", again=False)
            blocked: list[bytes] = []
            while not blocked:
                clients = await server.command("CLIENT", "LIST")
                blocked = [line for line in clients.splitlines() if b" cmd=waitaof " in line and b" flags=b" in line]
            assert await server.command("CLIENT", "UNBLOCK", blocked[0].partition(b" ")[0].removeprefix(b"id=")) == 1
            with pytest.raises(Unanswered, match="on disk"):
                await future
            await server.command("CONFIG", "SET", "appendonly", "no")
            with pytest.raises(Unanswered, match="on disk"):
                await count(link, "key", again=False)
            assert await server.command("GET", "key") == b"3"


async def test_a_process_that_stood_still_keeps_a_connection_that_is_well(server: RedisServer) -> None:
    async with linked(server, timeout=0.5) as (link, proxy):
        answer = link.command(b"ECHO", b"x", timeout=30)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        time.sleep(2.5)  # the whole loop
        assert await answer == b"x"
        await asyncio.sleep(0.3)
        assert proxy.connections == 1
