"""`Network`: a network between one client and a cluster, which tests can cut, freeze and slow down, of all brokers or of one."""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Mapping
from typing import Final, Self

from ..proxy import Direction, Link, Proxy
from .endpoints import Endpoints
from .settings import Listener

PRODUCE: Final = 0
METADATA: Final = 3
FIND_COORDINATOR: Final = 10
DESCRIBE_CLUSTER: Final = 60


class Network:
    """A `BrokerProxy` before each broker; the cluster is told to its client with their ports.  Not for listeners with TLS."""

    def __init__(self, endpoints: Endpoints, listener: Listener = "PLAIN") -> None:
        assert listener in {"PLAIN", "SASL"}, "the proxy has to understand what passes"
        self.nodes = {node: BrokerProxy(own[listener], self) for node, own in endpoints.ports.items()}
        """By the brokers' numbers."""
        self._endpoints = endpoints
        self._listener: Listener = listener
        self.seen: dict[int, int] = {}
        """How many requests there have been, by the numbers of Kafka's APIs."""
        self.replies = 0
        """How many answers to publishes are still to be lost."""

    async def __aenter__(self) -> Self:
        self.accept()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    @property
    def ports(self) -> list[int]:
        """Where a client is to connect to; those of the brokers are only behind them."""
        return [proxy.port for proxy in self.nodes.values()]

    def url(self, *, query: str = "") -> str:
        """Return the URL of the cluster as it is seen through this."""
        return self._endpoints.url(self._listener, ports=self.ports, query=query)

    @property
    def names(self) -> Mapping[int, int]:
        """The ports of the proxies by those of the brokers."""
        return {proxy.server[1]: proxy.port for proxy in self.nodes.values()}

    # ------------------------------------------------------------------ faults, of all brokers
    def accept(self) -> None:
        """Let connections be made, on the same ports as before `disconnect`."""
        for proxy in self.nodes.values():
            proxy.accept()

    def disconnect(self) -> None:
        """Cut the network until `accept`."""
        for proxy in self.nodes.values():
            proxy.disconnect()

    def reset(self) -> None:
        """Break all open connections."""
        for proxy in self.nodes.values():
            proxy.reset()

    def kill(self) -> None:
        """Behave as if the client's process had died."""
        for proxy in self.nodes.values():
            proxy.kill()

    def freeze(self) -> None:
        """Hold all bytes until `thaw`."""
        for proxy in self.nodes.values():
            proxy.freeze()

    def thaw(self) -> None:
        """Let go what `freeze` has held."""
        for proxy in self.nodes.values():
            proxy.thaw()

    def lose_replies(self, count: int) -> None:
        """Swallow the answers to the next *count* publishes, which are stored, and reset their connections."""
        self.replies += count

    def close(self) -> None:
        """Stop, and break what is open."""
        for proxy in self.nodes.values():
            proxy.close()


class BrokerProxy(Proxy):
    """The way to one broker of a `Network`."""

    def __init__(self, port: int, network: Network) -> None:
        super().__init__("127.0.0.1", port)
        self.network = network

    def _link(self, client: socket.socket) -> Link:
        return _Requests(self, client)


class _Requests(Link):
    """A connection whose requests and answers are told apart."""

    def __init__(self, proxy: BrokerProxy, client: socket.socket) -> None:
        super().__init__(proxy, client)
        self.network = proxy.network
        self.buffers: dict[Direction, bytes] = {"up": b"", "down": b""}
        self.asked: deque[tuple[int, int, bool]] = deque()
        """What has no answer yet: the API, its version, and whether the answer is to be lost."""

    def admit(self, data: bytes, direction: Direction) -> bytes:
        frames = self.frames(data, direction)
        if direction == "up":
            for frame in frames:
                self.request(frame)
            return super().admit(data, direction)
        told = b""
        for frame in frames:
            api, version, lost = self.asked.popleft()
            if lost:
                self.proxy.lost += 1
                self.hang_up()
                return b""
            told += self.answer(api, version, frame)
        return super().admit(told, direction) if told else b""

    def frames(self, data: bytes, direction: Direction) -> list[bytes]:
        """Return the frames that are whole by now, each with its size in front."""
        data = self.buffers[direction] + data
        found, at = [], 0
        while len(data) - at >= 4:
            (size,) = struct.unpack_from(">i", data, at)
            if len(data) - at < 4 + size:
                break
            found.append(data[at : at + 4 + size])
            at += 4 + size
        self.buffers[direction] = data[at:]
        return found

    def request(self, frame: bytes) -> None:
        api, version = struct.unpack_from(">hh", frame, 4)
        assert api != DESCRIBE_CLUSTER, "its answer names brokers, and nobody changes those"
        lost = api == PRODUCE and self.network.replies > 0
        if lost:
            self.network.replies -= 1
        self.network.seen[api] = self.network.seen.get(api, 0) + 1
        self.asked.append((api, version, lost))

    def answer(self, api: int, version: int, frame: bytes) -> bytes:
        """Return an answer, with the ports of proxies where it names brokers."""
        if api not in {METADATA, FIND_COORDINATOR}:
            return frame
        editor = _Editor(frame, flexible=version >= (9 if api == METADATA else 3))
        editor.skip(8)  # the size and the number
        editor.tags()
        if api == METADATA:
            if version >= 3:
                editor.skip(4)
            for _ in range(editor.count()):
                editor.skip(4)
                editor.text()
                editor.port(self.network.names)
                if version >= 1:
                    editor.text()
                editor.tags()
        else:
            assert version <= 3, "later ones answer about several groups"
            editor.skip(6 if version else 2)
            if version:
                editor.text()
            editor.skip(4)
            editor.text()
            editor.port(self.network.names)
        return bytes(editor.data)


class _Editor:
    """Goes through an answer, and changes numbers in it; nothing gets longer or shorter."""

    def __init__(self, frame: bytes, *, flexible: bool) -> None:
        self.data = bytearray(frame)
        self.at = 0
        self.flexible = flexible

    def skip(self, size: int) -> None:
        self.at += size

    def count(self) -> int:
        """Return the size of an array."""
        if self.flexible:
            return self.varint() - 1
        (count,) = struct.unpack_from(">i", self.data, self.at)
        self.at += 4
        return int(count)

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def text(self) -> None:
        """Pass a text, or none."""
        if self.flexible:
            size = self.varint() - 1
        else:
            (size,) = struct.unpack_from(">h", self.data, self.at)
            self.at += 2
        self.at += max(0, size)

    def tags(self) -> None:
        """Pass what later versions may have added."""
        if self.flexible:
            assert self.varint() == 0, "a broker adds something to its answer that is not known here"

    def port(self, names: Mapping[int, int]) -> None:
        """Put the port of a proxy in the place of a broker's; there is none where no broker is named."""
        (port,) = struct.unpack_from(">i", self.data, self.at)
        if port > 0:
            struct.pack_into(">i", self.data, self.at, names[port])
        self.at += 4
