"""`Proxy`: a network between one client and a server, which tests can cut, freeze, slow down and slice."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Collection
from typing import Final, Literal, Self, TypeAlias, cast

from .ports import free_port

Direction: TypeAlias = Literal["up", "down"]
"""Up is to the server."""

_RESET: Final = struct.pack("ii", 1, 0)
_PIECE: Final = 65_536


class Proxy:
    """Passes bytes between clients of its `port` and a server; lives in the loop that starts it.

    Faults take effect at once, on open connections too.
    """

    def __init__(self, host: str, port: int) -> None:
        self.server = (host, port)
        self.port = 0
        self.slice = 0
        """The most bytes of one write; 0 for no limit."""
        self.delay = 0.0
        """Seconds by which bytes come later, in both directions."""
        self.frozen = False
        self.connections = 0
        """How many there have been."""
        self.passed: dict[Direction, int] = {"up": 0, "down": 0}
        """How many bytes have come through, in each direction."""
        self.lost = 0
        """How many replies `lose_replies` has swallowed."""
        self._left: dict[Direction, int | None] = {"up": None, "down": None}
        self._needles: tuple[bytes, ...] = ()
        self._replies = 0
        self._links: set[_Link] = set()
        self._listener: socket.socket | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        self.accept()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    def owed(self) -> int:
        """How many replies `lose_replies` has yet to swallow."""
        return self._replies

    @property
    def open(self) -> int:
        """How many connections are open."""
        return len(self._links)

    # ------------------------------------------------------------------ faults
    def accept(self) -> None:
        """Listen, on the same port as before `refuse`."""
        if self._listener is not None or self._closed:
            return
        port = self.port or free_port()
        self._listener = listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen(1000)
        except BaseException:
            self._listener = None
            listener.close()
            raise
        listener.setblocking(False)
        self.port = port
        asyncio.get_running_loop().add_reader(listener, self._incoming, listener)

    def _incoming(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except OSError:  # it has changed its mind
            return
        client.setblocking(False)
        link = _Link(self)
        self._links.add(link)
        link.accepting = asyncio.ensure_future(link.accept(client))

    def refuse(self) -> None:
        """Refuse new connections from now on."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def reset(self) -> None:
        """Break all open connections: both sides see a reset, and what is under way is gone."""
        for link in list(self._links):
            link.reset()

    def disconnect(self) -> None:
        """Cut the network, until `accept`: `reset` and `refuse`."""
        self.refuse()
        self.reset()

    def kill(self) -> None:
        """Behave as if the client's process had died: what it has sent arrives, nothing else ever will."""
        self._closed = True
        self.refuse()
        for link in list(self._links):
            link.hang_up()

    def freeze(self) -> None:
        """Hold all bytes, and connections that are being made, in both directions until `thaw`."""
        self.frozen = True
        self._changed()

    def thaw(self) -> None:
        """Let go what `freeze` has held."""
        self.frozen = False
        self._changed()

    def lose_replies(self, count: int, needles: Collection[bytes]) -> None:
        """Swallow the server's answer to each of the next *count* requests with one of *needles*, and reset the client."""
        self._replies += count
        self._needles = tuple(needles)

    def cut_after(self, size: int, direction: Direction) -> None:
        """Let *size* more bytes pass in one direction, of all connections together, then `reset` that connection."""
        self._left[direction] = size

    async def close(self) -> None:
        """Stop, and break what is open."""
        self._closed = True
        self.refuse()
        self.frozen = False
        self.reset()
        async with asyncio.timeout(10):
            while self._links:  # each goes when its transports have told it
                await asyncio.sleep(0)

    def _changed(self) -> None:
        for link in list(self._links):
            link.update()


class _Link:
    """One connection through the proxy."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.client = _End(self, "up")
        self.server = _End(self, "down")
        self.client.peer, self.server.peer = self.server, self.client
        self.deaf = False
        """Whether the next bytes from the server are swallowed, and end this."""
        self.broken = False
        self.accepting: asyncio.Future[None] | None = None
        self.connecting: asyncio.Future[None] | None = None
        self.tail = b""

    async def accept(self, client: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: self.client, client)
        except OSError:  # it has gone again
            client.close()
            self.proxy._links.discard(self)

    def begin(self) -> None:
        """Begin when a client has come."""
        self.proxy.connections += 1
        if self.broken:
            self.client.abort()
        else:
            self.update()

    def update(self) -> None:
        """Apply the faults of now."""
        if self.connecting is None and not self.proxy.frozen and self.client.transport is not None:
            self.connecting = asyncio.ensure_future(self._connect())
        for end in (self.client, self.server):
            end.update()
            end.flush()

    async def _connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: self.server, *self.proxy.server)
        except OSError:
            self.client.abort()

    def ended(self) -> None:
        """Forget this when both sides are gone, or the server's side never came."""
        if self.client.gone and (self.server.gone or self.server.transport is None):
            if self.connecting is not None and not self.connecting.done():
                self.connecting.cancel()
                self.connecting.add_done_callback(lambda _: self.proxy._links.discard(self))
            else:
                self.proxy._links.discard(self)

    def reset(self) -> None:
        self.broken = True
        self.client.abort()
        self.server.abort()

    def hang_up(self) -> None:
        self.broken = True
        self.client.abort()
        self.server.close()

    def admit(self, data: bytes, direction: Direction) -> bytes:
        """Return what of *data* goes on, after the faults that look at bytes."""
        proxy = self.proxy
        if direction == "down" and self.deaf:
            self.deaf = False
            proxy.lost += 1
            self.hang_up()
            return b""
        if direction == "up" and proxy._replies and not self.deaf:
            seen = self.tail + data
            if any(needle in seen for needle in proxy._needles):
                proxy._replies -= 1
                self.deaf = True
            self.tail = seen[-64:]
        left = proxy._left[direction]
        if left is not None:
            data = data[:left]
            proxy._left[direction] = left - len(data)
        proxy.passed[direction] += len(data)
        return data

    def passed(self, direction: Direction) -> None:
        """Reset the connection when what `cut_after` allows is through."""
        if self.proxy._left[direction] == 0:
            self.proxy._left[direction] = None
            self.hang_up() if direction == "up" else self.cut()

    def cut(self) -> None:
        """End both sides once the client has what was let through."""
        self.client.close()
        self.server.abort()


class _End(asyncio.Protocol):
    """One side of a connection: reads from it, and writes what the other side has read."""

    peer: _End

    def __init__(self, link: _Link, direction: Direction) -> None:
        self.link = link
        self.direction: Direction = direction
        """Where what is read here goes."""
        self.transport: asyncio.Transport | None = None
        self.gone = False
        self.full = False
        self._closing = False
        self._queue: deque[tuple[float, bytes]] = deque()
        """What is to be written here, and when."""
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None

    # ------------------------------------------------------------------ what the transport tells
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        peer = self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # it is gone already
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.direction == "up":
            self.link.begin()
        elif self.peer.gone:
            self.abort()
        else:
            self.link.update()

    def data_received(self, data: bytes) -> None:
        data = self.link.admit(data, self.direction)
        if data:
            self.peer.put(data)
        self.link.passed(self.direction)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        if self._timer is not None:
            self._timer.cancel()
        self.peer.close()
        self.link.ended()

    def pause_writing(self) -> None:
        self.full = True
        self.peer.update()

    def resume_writing(self) -> None:
        self.full = False
        self.peer.update()
        self.flush()

    # ------------------------------------------------------------------ what the other side does
    def update(self) -> None:
        """Read, or do not: not while frozen, nor while the other side cannot take it."""
        if self.transport is not None and not self.transport.is_closing():
            if self.link.proxy.frozen or self.peer.full or self.peer.transport is None:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def put(self, data: bytes) -> None:
        """Write *data*, whole at once or as the faults want it."""
        proxy = self.link.proxy
        if not self._queue and not proxy.slice and not proxy.delay and not proxy.frozen:
            self._write(data)
            return
        due = asyncio.get_running_loop().time() + proxy.delay
        size = proxy.slice or _PIECE
        self._queue.extend((due, data[start : start + size]) for start in range(0, len(data), size))
        self.flush()

    def flush(self) -> None:
        """Write the next piece that is due, and come again for the others."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._queue or self.gone or self.full or self.link.proxy.frozen:
            return
        loop = asyncio.get_running_loop()
        due, data = self._queue[0]
        if loop.time() < due:
            self._timer = loop.call_at(due, self.flush)
            return
        self._queue.popleft()
        self._write(data)
        if self._queue:
            self._timer = loop.call_soon(self.flush)
        elif self._closing:
            self.close()

    def _write(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """Close this side when all is written."""
        self._closing = True
        if self.transport is not None and not self._queue:
            self.transport.close()

    def abort(self) -> None:
        """Close this side with a reset, whatever is unwritten."""
        self._queue.clear()
        if self.transport is not None and not self.gone:
            peer = self.transport.get_extra_info("socket")
            with contextlib.suppress(OSError):
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()
