"""`Wire`: asks a broker, as the administrator, the few things that tests need to know or to change behind brokerkit's back.

It has one connection and no threads, so that it may be used inside of a test that looks for both.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Self, TypeAlias

LIST_OFFSETS, METADATA, FIND_COORDINATOR, CREATE_TOPICS, DELETE_TOPICS, DESCRIBE_ACLS, CREATE_ACLS, DELETE_ACLS = (
    2,
    3,
    10,
    19,
    20,
    29,
    30,
    31,
)
ALTER_SCRAM = 51
PATIENCE: Final = 30.0

Resource: TypeAlias = Literal["topic", "group", "cluster", "transactional_id"]
_RESOURCES: Final[Mapping[Resource, int]] = {"topic": 2, "group": 3, "cluster": 4, "transactional_id": 5}
_OPERATIONS: Final = (
    "", "any", "all", "read", "write", "create", "delete", "alter", "describe", "cluster_action", "describe_configs",
    "alter_configs", "idempotent_write",
)  # fmt: skip
_LITERAL, _PREFIXED, _ALLOW = 3, 4, 3


@dataclass(frozen=True)
class Right:
    """That *user* may do *operation* with what is called *name*, or with all whose names begin so."""

    user: str
    resource: Resource
    name: str
    operation: str
    prefixed: bool = False

    def packed(self) -> bytes:
        pattern = _PREFIXED if self.prefixed else _LITERAL
        return (
            struct.pack(">b", _RESOURCES[self.resource])
            + text(self.name)
            + struct.pack(">b", pattern)
            + text(f"User:{self.user}")
            + text("*")
            + struct.pack(">bb", _OPERATIONS.index(self.operation), _ALLOW)
        )


@dataclass(frozen=True)
class Cluster:
    """What a broker knows about its cluster."""

    brokers: Mapping[int, tuple[str, int]]
    controller: int
    topics: Mapping[str, Mapping[int, int]]
    """By name, the leader of each partition: -1 where there is none."""


class Refused(Exception):
    """A broker has answered with an error."""


def text(value: str | None) -> bytes:
    """Return a text as it is sent."""
    if value is None:
        return struct.pack(">h", -1)
    data = value.encode()
    return struct.pack(">h", len(data)) + data


def array(items: Collection[bytes] | None) -> bytes:
    """Return packed *items* as they are sent; None stands for all."""
    return struct.pack(">i", -1) if items is None else struct.pack(">i", len(items)) + b"".join(items)


class Reader:
    """Reads an answer from its beginning to its end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def number(self, format: str) -> int:
        """Return the next number, in a format of `struct`."""
        (found,) = struct.unpack_from(f">{format}", self.data, self.at)
        self.at += struct.calcsize(f">{format}")
        return int(found)

    def text(self) -> str:
        """Return the next text, an empty one for none."""
        size = max(0, self.number("h"))
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def skip(self, size: int) -> None:
        """Go on so many bytes later."""
        self.at += size

    def items(self) -> range:
        """Return something as long as the array that follows."""
        return range(max(0, self.number("i")))

    def good(self, what: str, message: bool = True) -> None:
        """Read an error and perhaps its text, and raise `Refused` if it is one."""
        code = self.number("h")
        said = self.text() if message else ""
        if code:
            raise Refused(f"{what}: error {code} {said}")


class Wire:
    """A connection to a broker; use with ``with``."""

    def __init__(self, port: int, *, timeout: float = PATIENCE) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def ask(self, key: int, version: int, body: bytes, *, flexible: bool = False) -> Reader:
        """Send a request and return the answer to it."""
        self._number += 1
        head = struct.pack(">hhi", key, version, self._number) + text("tests") + (b"\0" if flexible else b"")
        self._socket.sendall(struct.pack(">i", len(head) + len(body)) + head + body)
        (size,) = struct.unpack(">i", self._read(4))
        reader = Reader(self._read(size))
        assert reader.number("i") == self._number
        if flexible:
            reader.at += 1
        return reader

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._socket.recv(size - len(data))
            if not piece:
                raise ConnectionResetError("the broker has hung up")
            data += piece
        return data

    def cluster(self, topics: Collection[str] | None = ()) -> Cluster:
        """Return what the broker knows, with some topics or, for None, with all."""
        answer = self.ask(METADATA, 1, array(None if topics is None else [text(name) for name in topics]))
        brokers: dict[int, tuple[str, int]] = {}
        for _ in answer.items():
            node = answer.number("i")
            brokers[node] = (answer.text(), answer.number("i"))
            answer.text()
        controller = answer.number("i")
        found: dict[str, dict[int, int]] = {}
        for _ in answer.items():
            error, name, _ = answer.number("h"), answer.text(), answer.number("b")
            partitions: dict[int, int] = {}
            for _ in answer.items():
                _, index, leader = answer.number("h"), answer.number("i"), answer.number("i")
                partitions[index] = leader
                for _ in range(2):
                    answer.skip(4 * len(answer.items()))
            if not error:
                found[name] = partitions
        return Cluster(brokers, controller, found)

    def coordinator(self, group: str) -> int:
        """Return which broker looks after *group*; the first time that anybody asks a cluster makes the topic for that."""
        end = time.monotonic() + PATIENCE
        while True:
            answer = self.ask(FIND_COORDINATOR, 1, text(group) + b"\0")
            answer.number("i")
            code, said = answer.number("h"), answer.text()
            if not code:
                return answer.number("i")
            if time.monotonic() > end:
                raise Refused(f"coordinator: error {code} {said}")
            time.sleep(0.02)

    def keeper(self) -> None:
        """Have the cluster make the topic where it keeps what share groups hold, and return when somebody looks after it."""
        end = time.monotonic() + PATIENCE
        key = _compact(f"group:{'A' * 21}Q:0".encode())
        while True:
            answer = self.ask(FIND_COORDINATOR, 6, b"\2\2" + key + b"\0", flexible=True)
            answer.skip(4 + 1)  # for how long it throttles us, and that it tells of one
            answer.skip(answer.number("B") - 1 + 4)  # the key, and who it is
            answer.skip(answer.number("B") - 1 + 4)  # where that is
            if not (code := answer.number("h")):
                return
            assert time.monotonic() < end, f"nobody keeps what share groups hold: error {code}"
            time.sleep(0.02)

    def create(self, topic: str, partitions: int = 1, settings: Mapping[str, str] | None = None) -> None:
        """Create a topic, stored as often as the cluster does by default; return when this broker knows it."""
        configs = array([text(name) + text(value) for name, value in (settings or {}).items()])
        packed = text(topic) + struct.pack(">ih", partitions, -1) + array(()) + configs
        answer = self.ask(CREATE_TOPICS, 4, array([packed]) + struct.pack(">ib", int(PATIENCE * 1000), 0))
        answer.number("i")
        for _ in answer.items():
            answer.good(f"create {answer.text()}")
        end = time.monotonic() + PATIENCE
        while (found := self.cluster([topic]).topics.get(topic)) is None or -1 in found.values():
            assert time.monotonic() < end, f"{topic} does not appear"
            time.sleep(0.005)

    def delete(self, topics: Collection[str]) -> None:
        """Delete topics; those that are gone are no error."""
        packed = array([text(name) for name in topics])
        answer = self.ask(DELETE_TOPICS, 1, packed + struct.pack(">i", int(PATIENCE * 1000)))
        answer.number("i")
        for _ in answer.items():
            name, code = answer.text(), answer.number("h")
            if code not in {0, 3}:
                raise Refused(f"delete {name}: error {code}")

    def offset(self, topic: str, partition: int, *, end: bool) -> int:
        """Return the first offset that is there, or the *end*, of a partition that this broker leads, or will in a moment."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return self._offset(topic, partition, end=end)
            except Refused as refused:
                if not str(refused).rstrip().endswith(("error 3", "error 6")) or time.monotonic() > until:
                    raise
                time.sleep(0.02)

    def _offset(self, topic: str, partition: int, *, end: bool) -> int:
        wanted = struct.pack(">iq", partition, -1 if end else -2)
        answer = self.ask(LIST_OFFSETS, 1, struct.pack(">i", -1) + array([text(topic) + array([wanted])]))
        answer.items()
        answer.text()
        answer.items()
        answer.number("i")
        answer.good(f"{topic} {partition}", message=False)
        answer.number("q")
        return answer.number("q")

    def offsets(self, topic: str, *, end: bool) -> dict[int, int]:
        """Return the same of all partitions; this broker leads them all."""
        return {index: self.offset(topic, index, end=end) for index in self.cluster([topic]).topics[topic]}

    def allow(self, rights: Sequence[Right]) -> None:
        """Give rights; return when this broker knows."""
        answer = self.ask(CREATE_ACLS, 1, array([right.packed() for right in rights]))
        answer.number("i")
        for _ in answer.items():
            answer.good("allow")
        self._told(rights, held=True)

    def _told(self, rights: Sequence[Right], *, held: bool) -> None:
        """Return when this broker has heard of what a controller has decided."""
        end = time.monotonic() + PATIENCE
        for right in rights:
            while self._holds(right) != held:
                assert time.monotonic() < end, f"the broker does not hear of {right}"
                time.sleep(0.005)

    def _holds(self, right: Right) -> bool:
        answer = self.ask(DESCRIBE_ACLS, 1, right.packed())
        answer.number("i")
        answer.good("rights")
        return len(answer.items()) > 0

    def forbid(self, rights: Sequence[Right]) -> int:
        """Take rights away; return how many there were, when this broker knows."""
        answer = self.ask(DELETE_ACLS, 1, array([right.packed() for right in rights]))
        answer.number("i")
        count = 0
        for _ in answer.items():
            answer.good("forbid")
            for _ in answer.items():
                answer.good("forbid")
                count += 1
                answer.skip(1)
                answer.text()
                answer.skip(1)
                for _ in ("user", "host"):
                    answer.text()
                answer.skip(2)
        self._told(rights, held=False)
        return count

    def passwd(self, user: str, password: str, *, iterations: int = 4096) -> None:
        """Give *user* another password for SCRAM; who is logged in stays so."""
        for number, name in ((1, "sha256"), (2, "sha512")):
            salt = os.urandom(16)
            salted = hashlib.pbkdf2_hmac(name, password.encode(), salt, iterations)
            stored = (
                _compact(user.encode()) + struct.pack(">bi", number, iterations) + _compact(salt) + _compact(salted)
            )
            answer = self.ask(ALTER_SCRAM, 0, b"\1\2" + stored + b"\0\0", flexible=True)
            answer.number("i")
            answer.number("B")
            answer.skip(answer.number("B") - 1)
            code, size = answer.number("h"), answer.number("B")
            if code:
                said = answer.data[answer.at : answer.at + size - 1].decode()
                raise Refused(f"password of {user}: error {code} {said}")


def _compact(data: bytes) -> bytes:
    assert len(data) < 127
    return struct.pack(">B", len(data) + 1) + data


def wire(ports: Sequence[int]) -> Wire:
    """Connect to the first of *ports* where a broker answers, which a frozen one does not."""
    for port in ports:
        with contextlib.suppress(OSError):
            with Wire(port, timeout=2) as probe:
                probe.cluster()
            return Wire(port)
    raise ConnectionRefusedError(f"no broker answers on {ports}")
