"""`Proxy`: a network between one client and a server, which tests can cut, freeze, slow down and slice."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Collection
from typing import Final, Literal, Self, TypeAlias

from .ports import free_port, kept

Direction: TypeAlias = Literal["up", "down"]
"""Up is to the server."""

_RESET: Final = struct.pack("ii", 1, 0)
_PIECE: Final = 65_536
_MOST: Final = 1_048_576
"""Bytes that wait to be written on one side; then the other is not read."""


class Proxy:
    """Passes bytes between clients of its `port` and a server; lives in the loop that starts it, and has no tasks there.

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
        self._links: set[Link] = set()
        self._listener: socket.socket | None = None
        self._keeper: socket.socket | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        self.accept()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

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
        listener, self._keeper = self._keeper or kept(self.port or free_port()), None
        listener.listen(1000)
        self._listener, self.port = listener, listener.getsockname()[1]
        asyncio.get_running_loop().add_reader(listener, self._incoming, listener)

    def _incoming(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the client has changed its mind
            client, _ = listener.accept()
            self.connections += 1
            link = self._link(client)
            self._links.add(link)
            link.update()

    def _link(self, client: socket.socket) -> Link:
        return Link(self, client)

    def refuse(self) -> None:
        """Refuse new connections from now on."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            if not self._closed:
                self._keeper = kept(self.port)

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
            link.client.drain()
            link.hang_up()

    def freeze(self) -> None:
        """Hold all bytes, and connections that are being made, in both directions until `thaw`.

        What the client has sent before still arrives, as it does when its process stops.
        """
        for link in list(self._links):
            link.client.drain()
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

    def close(self) -> None:
        """Stop, and break what is open."""
        self._closed = True
        self.disconnect()
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None

    def _changed(self) -> None:
        for link in list(self._links):
            link.update()


class Link:
    """One connection through the proxy."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self.proxy = proxy
        self.client = _End(self, "up")
        self.server = _End(self, "down")
        self.client.peer, self.server.peer = self.server, self.client
        self.client.open(client)
        self.deaf = False
        """Whether the next bytes from the server are swallowed, and end this."""
        self.tail = b""

    def update(self) -> None:
        """Apply the faults of now."""
        if self.server.socket is None and not self.server.gone and not self.proxy.frozen:
            try:
                # This machine's: its kernel answers at once for whoever listens.
                self.server.open(socket.create_connection(self.proxy.server, timeout=10))
            except OSError:
                self.reset()
        for end in (self.client, self.server):
            end.update()

    def reset(self) -> None:
        self.client.abort()
        self.server.abort()

    def hang_up(self) -> None:
        self.client.abort()
        self.server.finish()

    def ended(self) -> None:
        if self.client.gone and self.server.gone:
            self.proxy._links.discard(self)

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
        """End the connection when what `cut_after` allows is through."""
        if self.proxy._left[direction] == 0:
            self.proxy._left[direction] = None
            if direction == "up":
                self.hang_up()
            else:
                self.client.finish()
                self.server.abort()


class _End:
    """One side of a connection: reads from it, and writes what the other side has read."""

    peer: _End

    def __init__(self, link: Link, direction: Direction) -> None:
        self.link = link
        self.direction: Direction = direction
        """Where what is read here goes."""
        self.socket: socket.socket | None = None
        self.gone = False
        self.last = False
        """Whether nothing more is to be written than what waits, and what is still read is dropped."""
        self._queue: deque[tuple[float, bytes]] = deque()
        """What is to be written here, and when."""
        self._waiting = 0
        self._reads = self._writes = False
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None

    def open(self, opened: socket.socket) -> None:
        opened.setblocking(False)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = opened

    def update(self) -> None:
        """Read, write, or do not: not while frozen, nor while the other side takes no more."""
        if self.socket is None or self.gone:
            return
        loop, frozen = asyncio.get_running_loop(), self.link.proxy.frozen
        reads = not frozen and (self.last or (self.peer.socket is not None and self.peer._waiting < _MOST))
        if reads != self._reads:
            self._reads = reads
            if reads:
                loop.add_reader(self.socket, self._readable)
            else:
                loop.remove_reader(self.socket)
        if not frozen and self._timer is None and self._queue:
            self._flush()

    def _readable(self) -> None:
        assert self.socket is not None
        try:
            data = self.socket.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if self.last:
            if not data:
                self._close()
            return
        if not data:
            self._close()
            self.peer.finish()
            return
        data = self.link.admit(data, self.direction)
        if data:
            self.peer.put(data)
        self.link.passed(self.direction)
        self.update()

    def drain(self) -> None:
        """Pass on what has arrived here and was not read yet."""
        while self.socket is not None and not self.gone and not self.last:
            try:
                data = self.socket.recv(_PIECE)
            except OSError:
                return
            if not data:
                return
            data = self.link.admit(data, self.direction)
            if data:
                self.peer.put(data)

    def put(self, data: bytes) -> None:
        """Write *data*, whole at once or as the faults want it."""
        if self.gone or self.last:
            return
        proxy = self.link.proxy
        due = asyncio.get_running_loop().time() + proxy.delay if proxy.delay else 0.0
        size = proxy.slice or len(data)
        self._queue.extend((due, data[start : start + size]) for start in range(0, len(data), size))
        self._waiting += len(data)
        if self._timer is None and not self._writes:
            self._flush()

    def _flush(self) -> None:
        """Write what is due, a piece at a time where they are sliced, and come again for the others."""
        self._timer = None
        loop, proxy = asyncio.get_running_loop(), self.link.proxy
        while self._queue and not self.gone and not proxy.frozen:
            due, data = self._queue[0]
            if due and loop.time() < due:
                self._timer = loop.call_at(due, self._flush)
                return
            assert self.socket is not None
            try:
                sent = self.socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._close()
                self.peer.finish()
                return
            self._waiting -= sent
            if sent < len(data):
                self._queue[0] = (due, data[sent:])
                self._write_later()
                return
            self._queue.popleft()
            self.peer.update()
            if self._queue and proxy.slice:
                self._timer = loop.call_soon(self._flush)
                return
        if self.last and not self._queue:
            self._farewell()

    def _write_later(self) -> None:
        if not self._writes and self.socket is not None:
            self._writes = True
            asyncio.get_running_loop().add_writer(self.socket, self._writable)

    def _writable(self) -> None:
        self._no_writer()
        self._flush()

    def _no_writer(self) -> None:
        if self._writes and self.socket is not None:
            self._writes = False
            asyncio.get_running_loop().remove_writer(self.socket)

    def finish(self) -> None:
        """Close this side when what waits is written, and when the other end has seen all of it."""
        if self.gone or self.last:
            return
        if self.socket is None:
            self._close()
            return
        self.last = True
        if not self._queue:
            self._farewell()
        self.update()

    def _farewell(self) -> None:
        assert self.socket is not None
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._close()

    def abort(self) -> None:
        """Close this side with a reset, whatever is unwritten."""
        if self.socket is not None and not self.gone:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._close()

    def _close(self) -> None:
        if self.gone:
            return
        self.gone = True
        self._queue.clear()
        self._waiting = 0
        if self._timer is not None:
            self._timer.cancel()
        if self.socket is not None:
            self._no_writer()
            if self._reads:
                asyncio.get_running_loop().remove_reader(self.socket)
            self.socket.close()
        self.link.ended()
