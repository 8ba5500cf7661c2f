"""What comes of a partition to a member of a share group: whole batches, of which it has acquired some records.

A broker sends a batch again for each part of it that is acquired, so batches of which more is to be expected stay open.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from ...errors import BrokerError
from ._answer import Batch, split
from ._records import Native
from ._share_ask import GAP, RELEASE
from ._share_locks import Lock
from ._share_place import Place

KEPT: Final = 8 * 1024 * 1024
"""Bytes of records that are kept open altogether."""
_RECORD: Final = 300
"""Bytes that a record takes besides its value, about."""


class Acquired(Protocol):
    """Records that were acquired, as a broker's answer names them."""

    @property
    def first_offset(self) -> int:
        """The first."""
        ...

    @property
    def last_offset(self) -> int:
        """The last."""
        ...

    @property
    def delivery_count(self) -> int:
        """How often they were handed out."""
        ...


class Opener:
    """Takes records out of batches, for all partitions of a topic."""

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._kept: OrderedDict[tuple[int, int, int, int], tuple[int, list[Native]]] = OrderedDict()
        """What is open, by partition and its generation, first offset and the one behind the last; each with its size in bytes."""
        self._size = 0

    def __len__(self) -> int:
        """How many batches are open."""
        return len(self._kept)

    def take_in(
        self, place: Place, data: bytes | None, acquired: Iterable[Acquired], until: float
    ) -> tuple[list[Lock], BrokerError | None]:
        """Have *place* keep what was *acquired* of *data*, ours up to *until*; return what is ours again, and what was not readable.

        What cannot be read stays in hand without being handed to anybody: a broker that gets it back often enough drops it.
        """
        regained: list[Lock] = []
        broken: BrokerError | None = None
        name = f"{self._topic}[{place.index}]"
        batches: Sequence[Batch] = ()
        try:
            batches = split(data, 0, None, name).batches
        except BrokerError as error:
            broken = error
        at = 0
        for each in acquired:
            offset, last, count = each.first_offset, each.last_offset, each.delivery_count
            while offset <= last:
                while at < len(batches) and batches[at].next <= offset:
                    at += 1
                if at == len(batches):
                    if broken is not None:
                        place.seize(offset, last, count, until)
                    else:
                        place.holes.append((offset, last, RELEASE))  # the answer does not have it
                    break
                batch = batches[at]
                if batch.base > offset:
                    end = min(last, batch.base - 1)
                    place.holes.append((offset, end, GAP))
                    offset = end + 1
                    continue
                end = min(last, batch.next - 1)
                try:
                    natives = self._opened(place, batch, name, end)
                except BrokerError as error:
                    broken = error
                    place.seize(offset, end, count, until)
                else:
                    regained += _keep(place, batch, natives, offset, end, count, until)
                offset = end + 1
        return regained, broken

    def _opened(self, place: Place, batch: Batch, name: str, end: int) -> list[Native]:
        """Return the records of *batch*, of which those up to *end* are wanted."""
        key = place.index, place.generation, batch.base, batch.next  # another leader may have others there
        kept = self._kept.pop(key, None)
        if kept is None:
            natives = batch.rest(name, batch.base)
            size = 0
        else:
            size, natives = kept
            self._size -= size
        if end < batch.next - 1:
            if not size:
                size = len(natives) * _RECORD + sum([len(native.value or b"") for native in natives])
            self._kept[key] = size, natives
            self._size += size
            while self._size > KEPT:
                _, (gone, _) = self._kept.popitem(last=False)
                self._size -= gone
        return natives


def _keep(
    place: Place, batch: Batch, natives: Sequence[Native], first: int, last: int, count: int, until: float
) -> list[Lock]:
    base = batch.base
    if len(natives) == batch.next - base:
        part = natives if last - first + 1 == len(natives) else natives[first - base : last - base + 1]
        return place.keep(first, part, count, until)
    # Compaction has removed some, or they are no records but marks of transactions.
    regained: list[Lock] = []
    offset = first
    for native in natives:
        if not first <= native.offset <= last:
            continue
        if native.offset > offset:
            place.holes.append((offset, native.offset - 1, GAP))
        regained += place.keep(native.offset, (native,), count, until)
        offset = native.offset + 1
    if offset <= last:
        place.holes.append((offset, last, GAP))
    return regained
