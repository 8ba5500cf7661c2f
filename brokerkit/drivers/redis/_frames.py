"""Records as bytes; docs/wire-format.md has the layout.

A *frame* is one record.  What a queue stores is an *element*: fourteen bytes that scripts read and rewrite (sequence number,
ended deliveries, priority, expiry), then the frame.  A *blob* is what a script is handed to store.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from typing import Final
from zlib import crc32

from ...address import Address, DeadLetters, Queue, Topic
from ...driver import Headers, Record

MAGIC: Final = 0xB1
BROKEN: Final = b"application/x-brokerkit-broken"
"""The content type of a record whose frame cannot be read.  No codec takes it, so it goes to the dead letters."""
CONTENT_TYPE: Final = "bk-content-type"
PREFIX: Final = 14
"""Bytes of an element before its frame."""
_MAGIC = bytes([MAGIC])

# Flags of a frame.
_SHORT_ID: Final = 1
_KEY: Final = 2
_NULL: Final = 4
_TYPE: Final = 8
_HEADERS: Final = 16
_CARRIED: Final = 32
_PRIORITY: Final = 64
_KNOWN: Final = 127

_TYPES: Final = (b"application/json", b"application/octet-stream", b"text/plain", b"application/msgpack", BROKEN)
_TYPES_ALONE: Final[dict[int, Headers]] = {number: ((CONTENT_TYPE, name),) for number, name in enumerate(_TYPES)}
_HEAD = struct.Struct(">BBHd")
_PLAIN = struct.Struct(">BBHd10sI")  # with a short id
_TYPED = struct.Struct(">BBHd10sIB")  # and with a known content type and nothing else
_FRONT = struct.Struct(">HIBBHI")  # u48 | u8 | u8 | u48
_ELEMENT = struct.Struct(">HIBBHIBBHd10sIB")  # what stands before it in a queue, then the same
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_RELATIVE: Final = 1 << 47
_MAX_MS: Final = _RELATIVE - 1
_ID = re.compile(r"([0-9a-f]{20}-)([1-9][0-9]{0,9})", re.ASCII)
_CACHE: Final = 512

_prefixes: dict[str, bytes] = {}
_prefix_texts: dict[bytes, str] = {}
_written: dict[Headers, tuple[int, bytes]] = {}
_read: dict[bytes, tuple[Headers, int]] = {}


class Damaged(Exception):
    """These bytes are no frame."""


# ---------------------------------------------------------------------- writing


def frame(record: Record) -> bytes:
    """Return *record* without its queue options."""
    id, body = record.id, record.body
    flags, front = _written.get(record.headers) or _write_headers(record.headers)
    if body is None:
        flags, body = flags | _NULL, b""
    if record.key is not None or record.deliveries or record.priority:
        flags, front = _more(record, flags, front)
    attempts = record.attempts if record.attempts < 65536 else 65535
    raw = _prefixes.get(id[:21])
    if raw is None:
        raw = _prefix_of(id)
    if raw:
        number = id[21:]
        if number.isascii() and number.isdigit() and number[0] != "0" and (count := int(number)) < 1 << 32:
            if flags == _TYPE:
                return _TYPED.pack(MAGIC, _TYPE | _SHORT_ID, attempts, record.timestamp, raw, count, front[0]) + body
            return _PLAIN.pack(MAGIC, flags | _SHORT_ID, attempts, record.timestamp, raw, count) + front + body
    text = id.encode()
    return b"".join((_HEAD.pack(MAGIC, flags, attempts, record.timestamp), _U16.pack(len(text)), text, front, body))


def _more(record: Record, flags: int, front: bytes) -> tuple[int, bytes]:
    key = record.key
    if key is not None:
        flags |= _KEY
        front = _U16.pack(len(key)) + key + front
    if record.deliveries and isinstance(record.address, Topic):  # a queue keeps them before the frame
        flags |= _CARRIED
        front = b"%c%b" % (min(record.deliveries, 255), front)
    if record.priority and isinstance(record.address, DeadLetters):  # the same, and a redrive needs it again
        flags |= _PRIORITY
        front = b"%c%b" % (min(record.priority, 255), front)
    return flags, front


def _prefix_of(id: str) -> bytes:
    """Return the first part of a generated id as bytes, empty if it is none of those."""
    if _ID.fullmatch(id) is None:
        return b""
    if len(_prefixes) >= _CACHE:
        _prefixes.clear()
    raw = _prefixes[id[:21]] = bytes.fromhex(id[:20])
    return raw


def _write_headers(headers: Headers) -> tuple[int, bytes]:
    flags, out, rest = 0, b"", headers
    if headers and headers[0][0] == CONTENT_TYPE and headers[0][1] in _TYPES:
        flags, out, rest = _TYPE, bytes([_TYPES.index(headers[0][1])]), headers[1:]
    if rest:
        flags |= _HEADERS
        block = b"".join(
            b"%b%b%b%b" % (_U16.pack(len(name)), name, _U32.pack(len(value)), value)
            for name, value in ((name.encode(), value) for name, value in rest)
        )
        out += _U32.pack(len(block)) + block
    if len(out) <= 128:
        if len(_written) >= _CACHE:
            _written.clear()
        _written[headers] = flags, out
    return flags, out


def _whole(seconds: float) -> int:
    return min(_MAX_MS, max(0, -int(-seconds * 1000 // 1)))


def plain(record: Record) -> bool:
    """Return whether *record* has no options of queues."""
    return not (record.delay or record.deliveries or record.priority) and record.ttl is record.expires is None


def queue_blob(record: Record) -> bytes:
    """Return *record* as scripts store it in a queue."""
    return options(record) + frame(record)


def options(record: Record) -> bytes:
    """Return what stands before the frame of *record* in a queue."""
    if plain(record):
        return NO_OPTIONS
    delay = _whole(record.delay) if record.delay > 0 else 0
    if record.expires is not None:
        expires = max(1, _whole(record.expires))
    else:
        expires = 0 if record.ttl is None else _RELATIVE + _whole(record.ttl)
    deliveries = min(record.deliveries, 255)
    priority = min(max(record.priority, 0), 255)
    return _FRONT.pack(delay >> 32, delay & 0xFFFFFFFF, deliveries, priority, expires >> 32, expires & 0xFFFFFFFF)


NO_OPTIONS: Final = bytes(PREFIX)
"""What stands before the frame of a record without options."""


def topic_blob(record: Record, spread: int) -> bytes:
    """Return *record* as scripts store it in a topic; *spread* says where it goes if it has no key."""
    key = record.key
    return _U32.pack(crc32(key) if key is not None else spread & 0xFFFFFFFF) + frame(record)


def writer(address: Address) -> Callable[[Record], bytes]:
    """Return what makes blobs for *address*, a topic's for records with a key or a single partition."""
    if isinstance(address, Topic):
        return lambda record: topic_blob(record, 0)
    return queue_blob if isinstance(address, Queue) else frame


# ---------------------------------------------------------------------- reading


def elements(address: Address, several: Sequence[bytes]) -> list[tuple[int, int, Record]]:
    """Return what `element` does for each of *several*, quicker where they are as nearly all are."""
    found: list[tuple[int, int, Record]] = []
    texts, types, add = _prefix_texts, _TYPES_ALONE, found.append
    usual, size = _SHORT_ID | _TYPE, _ELEMENT.size
    for data in several:
        if len(data) >= size:
            high, low, deliveries, priority, until, low_until, magic, flags, attempts, time, raw, count, type_ = (
                _ELEMENT.unpack_from(data)
            )
            text, headers = texts.get(raw), types.get(type_)
            if flags == usual and magic == MAGIC and text and headers and not (until or low_until):
                id, body = f"{text}{count}", data[size:]
                record = Record(address, id, body, None, headers, time, 0.0, None, None, priority, attempts)
                add((high << 32 | low, deliveries, record))
                continue
        add(element(address, data))
    return found


def element(address: Address, data: bytes) -> tuple[int, int, Record]:
    """Return sequence number, ended deliveries and record of an element of a queue."""
    if len(data) < PREFIX:
        return 0, 0, broken(address, data, "0")
    high, low, deliveries, priority, until, until_low = _FRONT.unpack_from(data)
    number = high << 32 | low
    expires = None
    if until or until_low:
        expires = (until << 32 | until_low) / 1000
    return number, deliveries, read(address, data, PREFIX, number, priority, expires)


def read(
    address: Address,
    data: bytes,
    at: int = 0,
    number: object = 0,
    priority: int = 0,
    expires: float | None = None,
) -> Record:
    """Return the record of the frame in *data* from *at* on; one with *number* in its id if there is none."""
    try:
        magic, flags, attempts, timestamp = _HEAD.unpack_from(data, at)
        if magic != MAGIC or flags & ~_KNOWN:  # damaged, or of a later release
            raise Damaged
        at += 12
        if flags & _SHORT_ID:
            raw = data[at : at + 10]
            id = f"{_prefix_texts.get(raw) or _text_of(raw)}{_U32.unpack_from(data, at + 10)[0]}"
            at += 14
        else:
            end = at + 2 + _U16.unpack_from(data, at)[0]
            id = _slice(data, at + 2, end).decode()
            at = end
        carried = 0
        if flags & _PRIORITY:
            priority = data[at]
            at += 1
        if flags & _CARRIED:
            carried = data[at]
            at += 1
        key = None
        if flags & _KEY:
            end = at + 2 + _U16.unpack_from(data, at)[0]
            key = _slice(data, at + 2, end)
            at = end
        headers: Headers = ()
        if flags & (_TYPE | _HEADERS):
            headers, at = _headers(data, at, flags)
        body = None if flags & _NULL else data[at:]
    except (Damaged, struct.error, UnicodeDecodeError, IndexError):
        return broken(address, data, number)
    return Record(address, id, body, key, headers, timestamp, 0.0, None, expires, priority, attempts, carried)


def broken(address: Address, data: bytes, number: object) -> Record:
    """Return *data*, which somebody else has put there or damaged, as a record that no codec takes."""
    return Record(address, f"broken-{number}", data, None, ((CONTENT_TYPE, BROKEN),))


def _slice(data: bytes, start: int, end: int) -> bytes:
    if end > len(data):
        raise Damaged
    return data[start:end]


def _text_of(raw: bytes) -> str:
    if len(raw) != 10:
        raise Damaged
    if len(_prefix_texts) >= _CACHE:
        _prefix_texts.clear()
    text = _prefix_texts[raw] = f"{raw.hex()}-"
    return text


def _headers(data: bytes, at: int, flags: int) -> tuple[Headers, int]:
    end = at + 1 if flags & _TYPE else at
    if flags & _HEADERS:
        end += 4 + _U32.unpack_from(data, end)[0]
    block = _slice(data, at, end)
    known = _read.get(block)
    if known is not None and known[1] == flags & (_TYPE | _HEADERS):
        return known[0], end
    headers = _parse_headers(block, flags)
    if len(block) <= 128:
        if len(_read) >= _CACHE:
            _read.clear()
        _read[block] = headers, flags & (_TYPE | _HEADERS)
    return headers, end


def _parse_headers(block: bytes, flags: int) -> Headers:
    headers: list[tuple[str, bytes]] = []
    at = 0
    if flags & _TYPE:
        headers.append((CONTENT_TYPE, _TYPES[block[0]]))
        at = 1
    if flags & _HEADERS:
        at += 4
        while at < len(block):
            end = at + 2 + _U16.unpack_from(block, at)[0]
            name = _slice(block, at + 2, end).decode()
            at = end + 4
            end = at + _U32.unpack_from(block, end)[0]
            headers.append((name, _slice(block, at, end)))
            at = end
    return tuple(headers)
