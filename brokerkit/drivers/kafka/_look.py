"""Reading what is in a topic without taking part in a group: it leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection
from typing import Final

import msgspec

from ...errors import BrokerUnavailable, PositionLost
from ._cluster import Cluster, time_left
from ._offsets import EARLIEST, LATEST, look, offsets_at
from ._records import Native
from ._view import TopicInfo

_SMALLEST: Final = 16 * 1024
_LARGEST: Final = 1024 * 1024
"""Bytes of one partition in one answer; a single batch may be larger."""
_EACH: Final = 2048
"""Bytes of a record, as a guess."""


class _Part(msgspec.Struct):
    """One partition: what was read and not yet taken, and how far to read."""

    at: int
    end: int
    records: deque[Native] = msgspec.field(default_factory=lambda: deque[Native]())


class Look:
    """A look at partitions of one topic, from given offsets to where they ended when it began."""

    def __init__(self, cluster: Cluster, info: TopicInfo, until: float, *, records: int) -> None:
        """Be done by *until*, on the loop's clock; about so many *records* are wanted altogether."""
        self._info = info
        self._cluster = cluster
        self._until = until
        self._parts: dict[int, _Part] = {}
        self._size = min(max(records * _EACH // max(1, len(info.partitions)), _SMALLEST), _LARGEST)

    def begin(self, partition: int, at: int, end: int) -> None:
        """Look at *partition* from offset *at* on, below *end*."""
        self._parts[partition] = _Part(at, end)

    def at(self, partition: int) -> int:
        """Return the offset that follows what was taken."""
        part = self._parts[partition]
        return part.records[0].offset if part.records else part.at

    async def first(self, partition: int) -> Native | None:
        """Return the record that comes next, None behind the last one; `pop` takes it.

        Raises:
            NotFound: the topic was deleted meanwhile.
            BrokerUnavailable: the time is up.
        """
        part = self._parts[partition]
        if not part.records and part.at < part.end:
            await self._fill()
        return part.records[0] if part.records else None

    def pop(self, partition: int) -> None:
        """Take what `first` has returned."""
        self._parts[partition].records.popleft()

    async def _fill(self) -> None:
        """Read until each partition has a record to show or is through."""
        while wanted := {p: part for p, part in self._parts.items() if not part.records and part.at < part.end}:
            places = {number: part.at for number, part in wanted.items()}
            left = self._until - asyncio.get_running_loop().time()
            if left <= 0:
                raise BrokerUnavailable(f"topic {self._info.name} could not be read in time")
            try:
                found = await look(self._cluster, self._info, places, size=self._size, timeout=left)
            except PositionLost:
                await self._catch_up(wanted, left)
                continue
            for number, part in wanted.items():
                part.at = found[number].next
                part.records.extend(record for record in found[number].records if record.offset < part.end)
            self._size = min(2 * self._size, _LARGEST)

    async def _catch_up(self, parts: dict[int, _Part], timeout: float) -> None:
        """Go on at the first records that are left: older ones were removed meanwhile."""
        found = await bounds(self._cluster, self._info, parts, timeout=timeout)
        for number, part in parts.items():
            start, end = found[number]
            part.end = min(part.end, end)
            part.at = max(part.at, start)


async def bounds(
    cluster: Cluster, info: TopicInfo, partitions: Collection[int] | None = None, *, timeout: float
) -> dict[int, tuple[int, int]]:
    """Return where partitions begin and end at the moment; all of them, or some."""
    loop = asyncio.get_running_loop()
    until = loop.time() + timeout
    numbers = range(len(info.partitions)) if partitions is None else partitions
    starts = await offsets_at(cluster, info, dict.fromkeys(numbers, EARLIEST), timeout=timeout)
    left = time_left(until)
    ends = await offsets_at(cluster, info, dict.fromkeys(numbers, LATEST), timeout=left)
    return {number: (starts[number][0], max(starts[number][0], ends[number][0])) for number in numbers}
