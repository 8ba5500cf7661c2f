"""A client of the Redis format that knows nothing of brokerkit but docs/wire-format.md: redis-py, struct, and the scripts as files."""

from __future__ import annotations

import base64
import secrets
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import redis

LUA: Final = Path(__file__).parents[1] / "brokerkit" / "drivers" / "redis" / "lua"
MAGIC: Final = 0xB1
SHORT_ID, KEY, NULL, TYPE, HEADERS, DELIVERIES, PRIORITY = 1, 2, 4, 8, 16, 32, 64
TYPES: Final = (
    b"application/json",
    b"application/octet-stream",
    b"text/plain",
    b"application/msgpack",
    b"application/x-brokerkit-broken",
)
RELATIVE: Final = 1 << 47


@dataclass
class Wired:
    """A record as the page describes it."""

    id: str
    body: bytes | None
    key: bytes | None = None
    headers: list[tuple[str, bytes]] = field(default_factory=list[tuple[str, bytes]])
    timestamp: float = field(default_factory=time.time)
    attempts: int = 0
    deliveries: int = 0
    priority: int = 0


def pack(record: Wired) -> bytes:
    """Return a frame, without any of the shorter forms."""
    flags = (KEY if record.key is not None else 0) | (NULL if record.body is None else 0)
    flags |= HEADERS if record.headers else 0
    id = record.id.encode()
    out = struct.pack(">BBHdH", MAGIC, flags, record.attempts, record.timestamp, len(id)) + id
    if record.key is not None:
        out += struct.pack(">H", len(record.key)) + record.key
    if record.headers:
        block = b"".join(
            struct.pack(">H", len(name.encode())) + name.encode() + struct.pack(">I", len(value)) + value
            for name, value in record.headers
        )
        out += struct.pack(">I", len(block)) + block
    return out + (record.body or b"")


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def take(self, size: int) -> bytes:
        assert self.at + size <= len(self.data), "the frame ends too early"
        self.at += size
        return self.data[self.at - size : self.at]


def unpack(data: bytes) -> Wired:
    """Return the record of a frame in whatever form."""
    cursor = _Cursor(data)
    assert cursor.number(1) == MAGIC
    flags, attempts = cursor.number(1), cursor.number(2)
    timestamp: float = struct.unpack(">d", cursor.take(8))[0]
    id = f"{cursor.take(10).hex()}-{cursor.number(4)}" if flags & SHORT_ID else cursor.take(cursor.number(2)).decode()
    priority = cursor.number(1) if flags & PRIORITY else 0
    deliveries = cursor.number(1) if flags & DELIVERIES else 0
    key = cursor.take(cursor.number(2)) if flags & KEY else None
    headers: list[tuple[str, bytes]] = []
    if flags & TYPE:
        headers.append(("bk-content-type", TYPES[cursor.number(1)]))
    if flags & HEADERS:
        block = _Cursor(cursor.take(cursor.number(4)))
        while block.at < len(block.data):
            name = block.take(block.number(2)).decode()
            headers.append((name, block.take(block.number(4))))
    body = None if flags & NULL else data[cursor.at :]
    return Wired(id, body, key, headers, timestamp, attempts, deliveries, priority)


def queue_blob(record: Wired, *, delay: int = 0, ttl: int | None = None, priority: int = 0) -> bytes:
    expires = 0 if ttl is None else RELATIVE + ttl
    return delay.to_bytes(6, "big") + bytes([0, priority]) + expires.to_bytes(6, "big") + pack(record)


def topic_blob(record: Wired) -> bytes:
    spread = secrets.randbits(32) if record.key is None else zlib.crc32(record.key)
    return spread.to_bytes(4, "big") + pack(record)


@dataclass
class Taken:
    """What a session was handed."""

    number: bytes
    deliveries: int
    priority: int
    expires: int
    record: Wired


def element(data: bytes) -> Taken:
    return Taken(data[:6], data[6] + 1, data[7], int.from_bytes(data[8:14], "big"), unpack(data[14:]))


@dataclass
class Note:
    """What a group has done with a partition beyond its position."""

    high: int
    done: set[int]
    waiting: set[int]
    counts: dict[int, tuple[int, int]]


def read_note(base: int, text: str) -> Note:
    """Return what a note says."""
    if not text:
        return Note(base, set(), set(), {})
    version, start, span, bits, runs = text.split(".")
    assert (version, int(start)) == ("bk1", base)
    bitmap, numbers = _from_base64(bits), _numbers(_from_base64(runs))
    done = {base + 8 * i + j for i, byte in enumerate(bitmap) for j in range(8) if byte & 1 << j}
    rest = iter([offset for offset in range(base, base + int(span)) if offset not in done])
    note = Note(base + int(span), done, set(), {})
    while numbers:
        head = numbers.pop(0)
        counted = (numbers.pop(0), numbers.pop(0)) if head & 2 else None
        for _ in range(head >> 2):
            offset = next(rest)
            if head & 1:
                note.waiting.add(offset)
            if counted is not None:
                note.counts[offset] = counted
    return note


def _from_base64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _numbers(data: bytes) -> list[int]:
    numbers, number, shift = list[int](), 0, 0
    for byte in data:
        number |= (byte & 127) << shift
        shift += 7
        if not byte & 128:
            numbers.append(number)
            number = shift = 0
    return numbers


class Client:
    """One connection and the scripts."""

    def __init__(self, url: str) -> None:
        self.native = redis.Redis.from_url(url)
        self._run: Callable[..., Any] = getattr(self.native, "execute_command")  # noqa: B009 - it has no types
        self._shas: dict[str, bytes] = {}
        self.producer = secrets.token_hex(8)
        self.process = secrets.token_hex(8)
        self._batches: dict[str, int] = {}

    def close(self) -> None:
        self.native.close()

    def listen(self) -> redis.client.PubSub:
        """Return a connection for channels."""
        make: Callable[[], redis.client.PubSub] = getattr(self.native, "pubsub")  # noqa: B009 - it has no types
        return make()

    def call(self, script: str, keys: Sequence[str], *args: str | bytes | int) -> Any:
        if script not in self._shas:
            self._shas[script] = self._run("SCRIPT LOAD", source(script))
        return self._run("EVALSHA", self._shas[script], len(keys), *keys, *args)

    def publish(self, E: str, kind: str, *blobs: bytes, settings: str = "") -> bytes:
        """Store a batch; return the reply."""
        number = self._batches[E] = self._batches.get(E, 0) + 1
        return self.send_again(E, kind, number, *blobs, settings=settings)

    def send_again(self, E: str, kind: str, number: int, *blobs: bytes, settings: str = "") -> bytes:
        reply: bytes = self.call("publish", [E], f"@{self.producer}", number, kind, settings, "0", *blobs)
        return reply


def source(script: str) -> bytes:
    """Return a script put together from its files."""
    text = (LUA / f"{script}.lua").read_text(encoding="utf-8")
    said = dict(line[3:].split(": ", 1) for line in text.splitlines() if line.startswith(("-- flags: ", "-- uses: ")))
    head = "#!lua" + (f" flags={said['flags']}" if "flags" in said else "") + "\n"
    used = [(LUA / f"{name}.lua").read_text(encoding="utf-8") for name in said.get("uses", "").split()]
    return (head + "\n".join([*used, text])).encode()


class Session:
    """A consumer of a queue."""

    def __init__(self, client: Client, E: str, settings: str = "") -> None:
        self.client, self.E = client, E
        self.name = f"{client.process}/{secrets.token_hex(4)}"
        self.lease: int = client.call("queue_join", [E], self.name, settings)

    def take(self, most: int, *, wait: bool = False) -> list[Taken]:
        reply = self.client.call("queue_take", [self.E], self.name, most, int(wait), int(wait), 0, "", 0)
        owned, _, _, _, elements = reply
        assert 0 < owned <= self.lease
        return [element(data) for data in elements]

    def woken(self, message: bytes) -> list[Taken]:
        """Return what it was given with a message of its channel, or takes because of it."""
        name, given, rest = message.partition(b" ")
        assert f"{self.client.process}/{name.decode()}" == self.name
        if not given:
            return self.take(1)
        return [element(rest)]

    def settle(self, *taken: Taken) -> int:
        done: int = self.client.call("queue_settle", [self.E], self.name, *(each.number for each in taken))
        return done

    def outcome(self, taken: Taken, *copies: tuple[str, str, str, bytes]) -> list[Any]:
        """Settle together with copies: key, kind, settings and blob of each."""
        keys = list(dict.fromkeys(copy[0] for copy in copies))
        heads = {key: (kind, settings) for key, kind, settings, _ in copies}
        args: list[str | bytes | int] = [part for key in keys for part in heads[key]]
        args += [taken.number, len(copies)]
        for key, _, _, blob in copies:
            args += [keys.index(key) + 2, blob]
        reply: list[Any] = self.client.call("queue_outcome", [self.E, *keys], self.name, *args)
        return reply

    def renew(self) -> int:
        owned: int = self.client.call("queue_renew", [self.E], self.name)[0]
        return owned

    def release(self, *taken: Taken) -> int:
        back: int = self.client.call("queue_release", [self.E], self.name, *(each.number for each in taken))
        return back

    def recover(self, *known: Taken) -> list[bytes]:
        """Go on under a new name; return what of *known* it does not hold."""
        old, self.name = self.name, f"{self.client.process}/{secrets.token_hex(4)}"
        numbers = [each.number for each in known]
        gone: list[bytes]
        owned, *gone = self.client.call("queue_recover", [self.E], self.name, 1, old, *numbers)
        assert 0 < owned <= self.lease
        return gone

    def leave(self) -> None:
        while self.client.call("queue_leave", [self.E], self.name):
            pass


@dataclass
class Part:
    """A partition in the hands of a member."""

    number: int
    epoch: int
    position: str
    mark: bytes
    next: int
    id: str

    def place(self) -> str:
        """Return the position of somebody who has done all that was read, in order, and writes no note."""
        return f"{self.id.lstrip('(').partition('-')[0]}-{self.next} "


class Member:
    """A member of a topic's group."""

    def __init__(self, client: Client, E: str, group: str, session: int = 10_000) -> None:
        self.client, self.E, self.group, self.session = client, E, group, session
        self.name = secrets.token_hex(10)
        self.parts: dict[int, Part] = {}
        self._calls = 0
        self._joined = False
        started = client.call("topic_start", [E], "", group, "earliest")
        assert started[0] == b"ok"
        self.sync()

    def sync(self, *letting: Part, leave: bool = False) -> int:
        """Give a sign of life; return how many partitions are too many."""
        for part in letting:
            del self.parts[part.number]
        known = " ".join(f"{part.number}:{part.epoch}" for part in self.parts.values())
        let = [value for part in letting for value in (part.number, part.epoch, part.place())]
        what = 1 if leave else 0 if self._joined else 2
        self._joined = True
        reply = self.client.call("topic_sync", [self.E], self.group, self.name, self.session, what, known, *let)
        assert reply[0] >= -1, "it is no member any more"
        mine = {int(reply[at]): reply[at : at + 4] for at in range(2, len(reply), 4)}
        for number, (_, epoch, position, mark) in mine.items():
            if number not in self.parts or self.parts[number].epoch != epoch:
                id = position.decode().partition(" ")[0]
                offset = int(id.rpartition("-")[2])
                self.parts[number] = Part(number, epoch, position.decode(), mark, offset, id)
        for number in [number for number in self.parts if number not in mine]:
            del self.parts[number]
        surplus: int = reply[1]
        return surplus

    def read(self, most: int) -> list[tuple[int, int, Wired]]:
        """Return what comes next: partition, offset, record."""
        parts = list(self.parts.values())
        args = [value for part in parts for value in (part.number, part.epoch, part.next, part.id, most, "", "")]
        records: list[tuple[int, int, Wired]] = []
        for place, what, _, last, _, *found in self.client.call(
            "topic_read", [self.E], self.group, self.name, 0, most, *args
        ):
            assert what in {b"run", b"any", b"skip"}, what
            part = parts[place]
            for id, frame in zip(found[::2], found[1::2], strict=True):
                part.next = int(id.rpartition(b"-")[2]) + 1
                records.append((part.number, part.next - 1, unpack(frame)))
            if last:
                part.id = f"({last.decode()}"
        return records

    def commit(self) -> list[Any]:
        """Store how far it is."""
        self._calls += 1
        parts = list(self.parts.values())
        args = [value for part in parts for value in (part.number, part.epoch, part.place())]
        reply: list[Any] = self.client.call(
            "topic_settle", [self.E], self.group, self.name, self._calls, len(parts), *args
        )
        return reply

    def leave(self) -> None:
        self.sync(*list(self.parts.values()), leave=True)
