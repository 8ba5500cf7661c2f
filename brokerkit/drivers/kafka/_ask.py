"""Requests for records, written by hand: one goes out for each answer, and says something of each partition."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterable
from functools import cache
from typing import Any, Final

from kio.serial import entity_reader

from ._api import answer_at, framed, schema, varint

_KEY, _VERSION = 1, 13
_HEAD: Final = struct.Struct(">iiiibii")
"""Replica, wait, fewest and most bytes, isolation, session and its epoch."""
_PART: Final = struct.Struct(">iiqiqib")
"""Partition, the leader's epoch, offset, the epoch in front of that, a replica's first offset, most bytes; no more fields."""
_NOBODY: Final = -1
_COMMITTED: Final = 1
_ONE_TOPIC: Final = b"\2"  # arrays and texts say their length + 1
_REST: Final = b"\0\1\1\0"
"""No more fields of the topic, no topics to forget, no rack, no more fields."""


class Fetch:
    """A request for records of one topic, committed ones."""

    __slots__ = ("_body",)

    name = "Fetch"

    def __init__(
        self, id: uuid.UUID, parts: Iterable[tuple[int, int, int, int, int]], *, wait: float, most: int
    ) -> None:
        """Ask, in this order, for *parts*: partition, leader's epoch, offset, the epoch in front of it, most bytes.

        The broker waits up to *wait* seconds for the first of them, and sends about *most* bytes altogether.
        """
        pack = _PART.pack
        packed = [pack(index, leader, offset, epoch, -1, size, 0) for index, leader, offset, epoch, size in parts]
        self._body = b"".join((
            _HEAD.pack(_NOBODY, round(wait * 1000), 1, most, _COMMITTED, 0, -1),
            _ONE_TOPIC,
            id.bytes,
            varint(len(packed) + 1),
            *packed,
            _REST,
        ))  # fmt: skip

    def __repr__(self) -> str:
        return f"<Fetch of {len(self._body)} bytes>"

    def frame(self, number: int, /) -> bytes:
        """Return what is sent."""
        return framed(_KEY, _VERSION, number, self._body)

    def read(self, frame: bytes, /) -> Any:
        """Return the answer, as Kafka's schema has it."""
        return _reader()(frame, answer_at(frame))[0]


@cache
def _reader() -> Any:
    return entity_reader(schema("Fetch", "response").FetchResponse)
