"""Messages as Kafka records: plain ones, that any client can read and write.

The value is the body, the key is the key, the timestamp is when it was first published, in milliseconds.  Headers are the
message's own, behind ours: ``bk-id``, and where there is something to tell ``bk-attempts``, ``bk-deliveries``, ``bk-delay``,
``bk-time``, ``bk-ttl`` and ``bk-expires``.  A record that another client has written has none of them, and is called by its
position.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, Protocol, TypeAlias

from ...address import Address
from ...driver import Record
from ...policy import MAX_DELAY, MAX_ID

ID: Final = "bk-id"
ATTEMPTS: Final = "bk-attempts"
DELIVERIES: Final = "bk-deliveries"
DELAY: Final = "bk-delay"
"""Seconds behind the record's timestamp before which it is not delivered: in queues, whose broker sets that."""
DUE: Final = "bk-due"
"""The same as a point in time by the broker's clock, in milliseconds: of what has waited for a part of its time."""
TICK: Final = "bk-tick"
"""What bears it is no message: it was written to find out what time it is."""
TTL: Final = "bk-ttl"
"""Seconds behind the record's timestamp from which it is not delivered."""
EXPIRES: Final = "bk-expires"
"""The same as a point in time by the broker's clock, in milliseconds, which copies keep."""
TIME: Final = "bk-time"
"""When it was first published, in milliseconds: where the broker sets the timestamp."""
_MOST: Final = 1_000_000
"""Highest count that is believed."""
_OURS: Final = frozenset({ID, ATTEMPTS, DELIVERIES, DELAY, TIME, DUE, TICK, TTL, EXPIRES})
_POSITION = re.compile(r"(.*)\[(\d{1,10})\]@(-?\d{1,19})-(\d{1,19})", re.ASCII)
_LAST: Final = 253_402_300_799.0
"""The end of the year 9999, behind which Python knows no time; other clients may write any."""
_LAST_MS: Final = int(_LAST) * 1000

KafkaHeaders: TypeAlias = list[tuple[str, bytes]]


class Native(Protocol):
    """A record as aiokafka decodes it."""

    @property
    def offset(self) -> int:
        """Where it is in its partition."""
        ...

    @property
    def timestamp(self) -> int:
        """When it was published, or stored if the broker says so, in milliseconds."""
        ...

    @property
    def key(self) -> bytes | None:
        """What decides on its partition."""
        ...

    @property
    def value(self) -> bytes | None:
        """The body."""
        ...

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]:
        """In order."""
        ...


def milliseconds(timestamp: float) -> int:
    """Return a point in time as Kafka counts it."""
    return int(timestamp * 1000 + 0.5)


def headers_of(record: Record, *, timed: bool) -> KafkaHeaders:
    """Return the headers of *record*; *timed* has them tell when it was published, as the timestamp does not."""
    plain = not (timed or record.attempts or record.deliveries or record.delay > 0)
    if plain and record.expires is None and record.ttl is None:
        return [(ID, record.id.encode()), *record.headers]
    ours: KafkaHeaders = [(ID, record.id.encode())]
    if record.attempts:
        ours.append((ATTEMPTS, b"%d" % record.attempts))
    if record.deliveries:
        ours.append((DELIVERIES, b"%d" % record.deliveries))
    if timed:
        ours.append((TIME, b"%d" % milliseconds(record.timestamp)))
    if record.delay > 0:
        ours.append((DELAY, f"{record.delay:.3f}".encode()))
    if record.expires is not None:
        ours.append((EXPIRES, b"%d" % max(0, milliseconds(record.expires))))
    elif record.ttl is not None:
        ours.append((TTL, f"{record.ttl:.3f}".encode()))
    if record.headers:
        ours.extend(record.headers)
    return ours


def record_of(address: Address, partition: int, native: Native) -> Record:
    """Return what *native*, read from *partition*, says."""
    headers = native.headers
    timestamp = native.timestamp
    id = ""
    own: tuple[tuple[str, bytes], ...] = ()
    if len(headers) > 1:
        (first, told), (name, value) = headers[0], headers[1]
        if len(headers) > 2 or first != ID or name in _OURS:
            return _with_headers(address, partition, native, headers)
        id = _text(told)  # and a content type: as most are that brokerkit writes
        own = ((name, value or b""),)
    elif headers:
        ((name, value),) = headers
        if name == ID:
            id = _text(value)
        else:
            own = ((name, value or b""),)
    if not id:
        id = position(address.name, partition, timestamp, native.offset)
    return Record(address, id, native.value, native.key, own, _time(timestamp))


def _with_headers(
    address: Address, partition: int, native: Native, headers: Sequence[tuple[str, bytes | None]]
) -> Record:
    ours: dict[str, bytes | None] = {}
    own: list[tuple[str, bytes]] = []
    for name, value in headers:
        if name in _OURS:
            ours.setdefault(name, value)
        else:
            own.append((name, value or b""))
    id = _text(ours.get(ID))
    timestamp = _number(ours[TIME]) if TIME in ours else native.timestamp
    return Record(
        address,
        id or position(address.name, partition, native.timestamp, native.offset),
        native.value,
        native.key,
        tuple(own),
        _time(timestamp),
        expires=_expires(ours, native) if EXPIRES in ours or TTL in ours else None,
        attempts=min(_number(ours.get(ATTEMPTS)), _MOST),
        deliveries=min(_number(ours.get(DELIVERIES)), _MOST),
    )


def _expires(ours: Mapping[str, bytes | None], native: Native) -> float | None:
    if EXPIRES in ours:
        return _time(_number(ours[EXPIRES]))
    ttl = _seconds(ours[TTL])
    return None if ttl is None else _time(native.timestamp) + ttl


def _time(ms: int) -> float:
    if not ms:  # None: it was written before Kafka 0.10
        return 0.0
    return ms / 1000 if 0 <= ms < _LAST_MS else min(max(ms / 1000, 0.0), _LAST)


def due(native: Native) -> float | None:
    """Return the point in time, by the broker's clock, before which *native* is not delivered; None if that is at once."""
    delay: float | None = None
    for name, value in native.headers:
        if name == DUE:
            return _time(_number(value)) or None
        if name == DELAY:
            delay = _seconds(value)
    return None if delay is None else _time(native.timestamp) + delay


def is_tick(native: Native) -> bool:
    """Return whether *native* is no message."""
    return any(name == TICK for name, _ in native.headers)


def _seconds(value: bytes | None) -> float | None:
    """Return a time to wait; None for one that is none, as another client may write it."""
    try:
        seconds = float(value or b"0")
    except ValueError:
        return None
    return min(seconds, MAX_DELAY) if math.isfinite(seconds) and seconds > 0 else None


def _text(value: bytes | None) -> str:
    """Return an id; nothing for one that breaks the rules, as another client may write one."""
    if not value or len(value) > 4 * MAX_ID:
        return ""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return ""
    return text if len(text) <= MAX_ID else ""


def _number(value: bytes | None) -> int:
    return int(value) if value is not None and len(value) <= 15 and value.isdigit() else 0


# ---------------------------------------------------------------------- places


def position(name: str, partition: int, timestamp: int, offset: int) -> str:
    """Return the position of a record; the timestamp, in milliseconds, is for `Start.position` in other partitions."""
    return f"{name}[{partition}]@{timestamp or 0}-{offset}"


def place(name: str, partition: int) -> str:
    """Return what the positions of a partition begin with."""
    return f"{name}[{partition}]@"


def parse_position(text: str, name: str) -> tuple[int, int, int] | None:
    """Return partition, timestamp in milliseconds (0 for what is before it) and offset; None if *text* is no position in *name*."""
    match = _POSITION.fullmatch(text)
    if match is None or match[1] != name:
        return None
    return int(match[2]), max(0, int(match[3])), int(match[4])


_WORDS: Final = struct.Struct("<I")
_MIX: Final = 0x5BD1E995
_SEED: Final = 0x9747B28C
_32_BITS: Final = 0xFFFFFFFF


@lru_cache(maxsize=8192)
def hash_of(key: bytes) -> int:
    """Return the number that decides, modulo the number of partitions, where records of *key* go: murmur2, as Java's client."""
    whole = len(key) & ~3
    number = _SEED ^ len(key)
    for (word,) in _WORDS.iter_unpack(key[:whole]):
        word = word * _MIX & _32_BITS  # noqa: PLW2901
        word = (word ^ word >> 24) * _MIX & _32_BITS  # noqa: PLW2901
        number = number * _MIX & _32_BITS ^ word
    if whole < len(key):
        number = (number ^ int.from_bytes(key[whole:], "little")) * _MIX & _32_BITS
    number = (number ^ number >> 13) * _MIX & _32_BITS
    return (number ^ number >> 15) & 0x7FFFFFFF
