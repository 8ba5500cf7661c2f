"""Records that brokers take and aiokafka's decoder does not: nobody who may write is to stop all who read.

Brokers do not look at what bytes the names of headers are, nor at a byte of each record that means nothing.
"""

from __future__ import annotations

import struct
from typing import Any, Final

from aiokafka.record.default_records import DefaultRecord  # pyright: ignore[reportMissingTypeStubs]

from ._records import Native

_HEAD: Final = struct.Struct(">qiibIhiqqqhii")
_APPENDED: Final = 0x08
"""The broker has set the time, one for all records."""

_Record: Any = DefaultRecord


def decoded(batch: memoryview) -> list[Native]:
    """Return the records of *batch*, which is not compressed; bytes of a header's name that are no text are escaped.

    Raises:
        ValueError: it is damaged.
    """
    base, _, _, _, _, attributes, _, first, last, _, _, _, count = _HEAD.unpack_from(batch)
    appended = bool(attributes & _APPENDED)
    reader = _Reader(bytes(batch), _HEAD.size)
    found: list[Native] = []
    for _ in range(count):
        end = reader.number() + reader.at
        reader.take(1)  # attributes: there are none
        when = first + reader.number()
        offset = base + reader.number()
        key, value = reader.data(), reader.data()
        headers = [(reader.text(), reader.data()) for _ in range(reader.count())]
        if reader.at != end:
            raise ValueError(f"the record at offset {offset} is not as long as it says")
        found.append(_Record(offset, last if appended else when, int(appended), key, value, headers))
    return found


class _Reader:
    """Reads what records are made of."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self.at = at

    def take(self, size: int) -> bytes:
        end = self.at + size
        if size < 0 or end > len(self._data):
            raise ValueError("a record goes beyond its batch")
        taken = self._data[self.at : end]
        self.at = end
        return taken

    def number(self) -> int:
        number = shift = 0
        while shift < 70:
            (byte,) = self.take(1)
            number |= (byte & 127) << shift
            if byte < 128:
                return number >> 1 ^ -(number & 1)
            shift += 7
        raise ValueError("a number has no end")

    def count(self) -> int:
        count = self.number()
        if not 0 <= count <= len(self._data) - self.at:
            raise ValueError("a record has more headers than bytes")
        return count

    def data(self) -> bytes | None:
        size = self.number()
        return None if size == -1 else self.take(size)

    def text(self) -> str:
        return self.take(self.number()).decode(errors="backslashreplace")
