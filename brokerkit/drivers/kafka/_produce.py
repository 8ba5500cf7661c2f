"""The request that carries records, written by hand: each publish that comes alone pays for it."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias, cast

from kio.schema.produce.v9.response import ProduceResponse
from kio.serial import entity_reader

from ._api import SPOKEN, answer_at, framed, varint

Parts: TypeAlias = Sequence[tuple[int, bytes]]
"""Records by partition, each as a batch with its number."""

_KEY: Final = 0
_VERSION: Final = 9
assert SPOKEN[_KEY] == ("Produce", _VERSION)
_START: Final = struct.Struct(">bhi")
_PARTITION: Final = struct.Struct(">i")
_read: Any = entity_reader(cast("Any", ProduceResponse))


class Produce:
    """Batches of records for one broker, which answers when all in-sync copies have them."""

    __slots__ = ("_body",)

    def __init__(self, topics: Mapping[str, Parts], timeout: float) -> None:
        """Have the copies wait for each other for *timeout* seconds at most."""
        pieces = [_START.pack(0, -1, int(timeout * 1000)), varint(len(topics) + 1)]
        add = pieces.append
        for topic, parts in topics.items():
            name = topic.encode()
            pieces += (varint(len(name) + 1), name, varint(len(parts) + 1))
            for partition, records in parts:
                add(_PARTITION.pack(partition))
                add(varint(len(records) + 1))
                add(records)
                add(b"\0")
            add(b"\0")
        add(b"\0")
        self._body = b"".join(pieces)

    @property
    def name(self) -> str:
        """What Kafka calls it."""
        return SPOKEN[_KEY][0]

    def frame(self, number: int, /) -> bytes:
        """Return what is sent."""
        return framed(_KEY, _VERSION, number, self._body)

    def read(self, frame: bytes, /) -> ProduceResponse:
        """Return what became of each batch."""
        return cast("ProduceResponse", _read(frame, answer_at(frame))[0])
