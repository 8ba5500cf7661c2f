"""The network of the tests: what each fault does to the client and to the server."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from .proxy import Direction, Proxy


class Server:
    """Answers each line with itself in capitals, and remembers it."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.ends: list[str] = []
        self.came = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                self.lines.append(line)
                self.came.set()
                writer.write(line.upper())
            self.ends.append("closed")
        except ConnectionError:
            self.ends.append("reset")
        finally:
            self.came.set()
            writer.close()

    async def until(self, held: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not held():
                self.came.clear()
                await self.came.wait()


@asynccontextmanager
async def world() -> AsyncIterator[tuple[Server, Proxy]]:
    server = Server()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with Proxy("127.0.0.1", listener.sockets[0].getsockname()[1]) as proxy:
        yield server, proxy
        assert proxy.open >= 0
    assert proxy.open == 0
    listener.close()


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def say(self, line: bytes) -> None:
        self.writer.write(line)

    async def hear(self) -> bytes:
        return await asyncio.wait_for(self.reader.readline(), 10)

    async def silence(self) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(self.reader.read(1), 0.05)


@asynccontextmanager
async def client(proxy: Proxy) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)


def test(scenario: Callable[[Server, Proxy], Awaitable[None]]) -> Callable[[], None]:
    """Run a scenario in a world of its own."""

    def plain() -> None:
        async def main() -> None:
            async with asyncio.timeout(60), world() as (server, proxy):
                await scenario(server, proxy)

        asyncio.run(main(), debug=True)

    plain.__name__ = scenario.__name__
    return plain


test.__test__ = False  # type: ignore[attr-defined]


@test
async def test_bytes_pass(server: Server, proxy: Proxy) -> None:
    async with client(proxy) as one, client(proxy) as two:
        for each, text in itertools.product((one, two), (b"a\n", b"b\n")):
            each.say(text)
            assert await each.hear() == text.upper()
        line = b"x" * 9_999 + b"\n"
        one.say(300 * line)  # more than the buffers of all sockets
        assert await asyncio.wait_for(one.reader.readexactly(300 * len(line)), 30) == 300 * line.upper()
        assert proxy.open == proxy.connections == 2
    await server.until(lambda: len(server.ends) == 2)


@test
async def test_a_cut_network_resets_and_refuses_until_it_is_mended(server: Server, proxy: Proxy) -> None:
    port = proxy.port
    async with client(proxy) as one:
        one.say(b"a\n")
        await one.hear()
        proxy.disconnect()
        with pytest.raises(ConnectionResetError):
            await one.hear()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        await server.until(lambda: server.ends == ["reset"])
        with socket.socket() as other, pytest.raises(OSError):
            other.bind(("127.0.0.1", port))  # it is kept
        proxy.accept()
        assert proxy.port == port
        async with client(proxy) as two:
            two.say(b"b\n")
            assert await two.hear() == b"B\n"


@test
async def test_of_a_killed_client_arrives_what_it_had_sent_and_nothing_else(server: Server, proxy: Proxy) -> None:
    async with client(proxy) as one:
        one.say(b"last words\n")
        await one.hear()
        proxy.kill()
        one.say(b"never\n")
        await server.until(lambda: server.ends)
        proxy.accept()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", proxy.port)
        assert (server.lines, server.ends) == ([b"last words\n"], ["closed"])


@test
async def test_frozen_nothing_passes_until_it_thaws(server: Server, proxy: Proxy) -> None:
    async with client(proxy) as one:
        one.say(b"a\n")
        await one.hear()
        proxy.freeze()
        one.say(b"b\n")
        async with client(proxy) as two:
            two.say(b"c\n")
            await two.silence()
            await one.silence()
            assert server.lines == [b"a\n"]
            proxy.thaw()
            assert (await one.hear(), await two.hear()) == (b"B\n", b"C\n")


@test
async def test_a_lost_reply_is_that_of_a_request_that_was_served(server: Server, proxy: Proxy) -> None:
    proxy.lose_replies(2, [b"needle", b"pin"])
    for number, text in enumerate((b"a needle\n", b"a pin\n")):
        async with client(proxy) as one:
            one.say(b"hay\n")
            assert await one.hear() == b"HAY\n"
            one.say(text[:4])
            await asyncio.sleep(0.01)
            one.say(text[4:])
            with pytest.raises(ConnectionResetError):
                await one.hear()
            await server.until(lambda number=number: len(server.ends) == number + 1)  # type: ignore[misc]
    assert server.lines == [b"hay\n", b"a needle\n", b"hay\n", b"a pin\n"]
    assert server.ends == ["closed", "closed"]
    assert (proxy.lost, proxy.owed) == (2, 0)
    async with client(proxy) as one:
        one.say(b"a needle\n")
        assert await one.hear() == b"A NEEDLE\n"


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("size", [0, 1, 3, 4])
def test_a_connection_breaks_after_so_many_bytes(direction: Direction, size: int) -> None:
    async def scenario(server: Server, proxy: Proxy) -> None:
        async with client(proxy) as one:
            one.say(b"abc\n")
            assert await one.hear() == b"ABC\n"
            proxy.cut_after(size, direction)
            one.say(b"def\n")
            heard = b""
            try:
                while data := await asyncio.wait_for(one.reader.read(1), 10):
                    heard += data
            except ConnectionError:
                pass
            await server.until(lambda: server.ends)
            if direction == "down":
                assert heard == b"DEF\n"[:size]
                assert server.lines == [b"abc\n", b"def\n"]
            else:
                assert server.lines == [b"abc\n"] + [b"def\n"[:size]] * bool(size)
        async with client(proxy) as two:
            two.say(b"ghi\n")
            assert await two.hear() == b"GHI\n"

    test(scenario)()


@test
async def test_slices_are_separate_writes(server: Server, proxy: Proxy) -> None:
    proxy.slice = 1
    async with client(proxy) as one:
        pieces: list[bytes] = []
        one.say(b"abcdef\n")
        while b"".join(pieces) != b"ABCDEF\n":
            pieces.append(await asyncio.wait_for(one.reader.read(100), 10))
        assert len(pieces) > 1
    assert server.lines == [b"abcdef\n"]


@test
async def test_a_delay_is_that_of_both_directions(server: Server, proxy: Proxy) -> None:
    proxy.delay = 0.05
    clock = asyncio.get_running_loop().time
    async with client(proxy) as one:
        began = clock()
        one.say(b"a\n")
        one.say(b"b\n")
        assert (await one.hear(), await one.hear()) == (b"A\n", b"B\n")
        assert clock() - began >= 0.1


@test
async def test_a_server_that_is_gone_refuses(server: Server, proxy: Proxy) -> None:
    proxy.server = ("127.0.0.1", 1)
    with pytest.raises(ConnectionResetError):
        async with client(proxy) as one:
            await one.hear()
