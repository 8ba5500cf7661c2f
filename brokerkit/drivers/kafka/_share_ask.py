"""Requests of members of share groups, written by hand: they go out all the time, and say something of many records."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Final, TypeAlias

from kio.serial import entity_reader

from ._api import answer_at, framed, schema, varint

GAP, ACCEPT, RELEASE, REJECT, RENEW = range(5)
"""What may be said of a record; the first: that there is none at its offset."""
OPEN: Final = 0
"""The epoch that begins a session."""
CLOSE: Final = -1
"""The one that ends it."""

Said: TypeAlias = tuple[int, int, bytes]
"""First and last offset, and what is said of those: one byte for all of them, or one for each."""

_THROTTLED: Final = 60.0
"""The longest pause that a broker's quota is believed to want."""
_VERSION: Final = 2
_FETCH: Final = struct.Struct(">iiiiiib?")
"""Epoch, wait, fewest and most bytes, most records, records of a batch, how they are acquired, whether anything is renewed."""
_ACKNOWLEDGE: Final = struct.Struct(">i?")
_RANGE: Final = struct.Struct(">qq")
_INDEX: Final = struct.Struct(">i")
_BY_RECORDS: Final = 1
"""No more records than were asked for, even where that splits a batch."""
_ONE: Final = b"\2"  # arrays and texts say their length + 1
_NONE: Final = b"\1"
_END: Final = b"\0"
"""No more fields."""


def names(group: str, member: str) -> bytes:
    """Return what requests of *member* begin with."""
    return b"".join(varint(len(text) + 1) + text for text in (group.encode(), member.encode()))


class ShareFetch:
    """A request for records of one topic."""

    __slots__ = ("_body",)

    name = "ShareFetch"

    def __init__(
        self,
        names: bytes,
        epoch: int,
        id: uuid.UUID,
        parts: Iterable[tuple[int, Sequence[Said]]],
        *,
        forget: Sequence[int] = (),
        wait: float,
        size: int,
        records: int,
    ) -> None:
        """Ask for up to *records*, about *size* bytes of them, waiting up to *wait* seconds for the first.

        *parts* are the partitions that the session is to have besides those that it has, and those of which there is
        something to say; *forget* those that it is to have no more.
        """
        forgotten: tuple[bytes, ...] = (_NONE,)
        if forget:
            forgotten = (_ONE, id.bytes, varint(len(forget) + 1), *(_INDEX.pack(index) for index in forget), _END)
        self._body = b"".join((
            names,
            _FETCH.pack(epoch, round(wait * 1000), 1, size, records, records, _BY_RECORDS, False),
            _topics(id, parts),
            *forgotten,
            _END,
        ))  # fmt: skip

    def __repr__(self) -> str:
        return f"<ShareFetch of {len(self._body)} bytes>"

    def frame(self, number: int, /) -> bytes:
        """Return what is sent."""
        return framed(78, _VERSION, number, self._body)

    def read(self, frame: bytes, /) -> Any:
        """Return the answer, as Kafka's schema has it."""
        return _reader("ShareFetch")(frame, answer_at(frame))[0]


class ShareAcknowledge:
    """A request that says what becomes of records of one topic."""

    __slots__ = ("_body",)

    name = "ShareAcknowledge"

    def __init__(
        self, names: bytes, epoch: int, id: uuid.UUID, parts: Iterable[tuple[int, Sequence[Said]]], *, renew: bool
    ) -> None:
        """Say *parts*, by partition; *renew* tells whether `RENEW` is among it."""
        self._body = b"".join((names, _ACKNOWLEDGE.pack(epoch, renew), _topics(id, parts), _END))

    def __repr__(self) -> str:
        return f"<ShareAcknowledge of {len(self._body)} bytes>"

    def frame(self, number: int, /) -> bytes:
        """Return what is sent."""
        return framed(79, _VERSION, number, self._body)

    def read(self, frame: bytes, /) -> Any:
        """Return the answer, as Kafka's schema has it."""
        return _reader("ShareAcknowledge")(frame, answer_at(frame))[0]


def acknowledged(answer: Any) -> dict[int, int]:
    """Return what a broker answers to what was said, by partition."""
    return {int(data.partition_index): int(data.error_code) for topic in answer.responses for data in topic.partitions}


def throttled(answer: Any) -> float:
    """Return for how many seconds a broker wants to be asked for nothing."""
    seconds: float = answer.throttle_time.total_seconds()
    return min(seconds, _THROTTLED)


def _topics(id: uuid.UUID, parts: Iterable[tuple[int, Sequence[Said]]]) -> bytes:
    packed: list[bytes] = []
    count = 0
    for index, said in parts:
        count += 1
        packed += (_INDEX.pack(index), varint(len(said) + 1))
        for first, last, types in said:
            packed += (_RANGE.pack(first, last), varint(len(types) + 1), types, _END)
        packed.append(_END)
    if not count:
        return _NONE
    return b"".join((_ONE, id.bytes, varint(count + 1), *packed, _END))


@cache
def _reader(name: str) -> Any:
    return entity_reader(getattr(schema(name, "response"), f"{name}Response"))
