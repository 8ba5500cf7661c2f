"""A topic of the server: partitions that only grow at one end and are trimmed at the other."""

from __future__ import annotations

import bisect
import itertools
import math
import operator
import re
from collections.abc import Sequence
from typing import Protocol
from zlib import crc32

from ...address import AnyTopic
from ...driver import Receipt, Record, StoredRecord
from ...errors import BrokerError, ConfigError, PositionLost
from ...policy import MAX_BODY, Start
from .._log import Tracker
from ._stored import full, too_large
from ._timers import Timers

Entry = tuple[Record, str, float, int]
"""A record, its position, when it was stored and its number in the topic."""

_CURSOR = re.compile(r"([^\[\]]+)\[\*\]@([0-9]{1,18}(?:,[0-9]{1,18})*)")
_POSITION = re.compile(r"(.+)\[([0-9]{1,5})\]@([0-9]{1,18})", re.ASCII)


class Listening(Protocol):
    """A reader of a partition."""

    queued: bool

    def arrived(self) -> None:
        """Something was stored."""
        ...


class Following(Protocol):
    """Who reads a topic, with one tracker for each partition."""

    trackers: list[Tracker]

    def drop(self, why: str) -> None:
        """What was read is no more."""
        ...


class Partition:
    """One log."""

    __slots__ = ("carried", "claims", "entries", "first", "index", "name", "prefix")

    def __init__(self, name: str, index: int) -> None:
        self.name = name
        self.index = index
        self.prefix = f"{name}[{index}]@"
        self.entries: list[Entry] = []
        self.first = 0
        """The offset of the first entry."""
        self.claims: list[Listening] = []
        """Who reads it: one of each group, and ephemeral readers."""
        self.carried = False
        """Whether a record came with deliveries of earlier copies."""

    @property
    def end(self) -> int:
        """The offset of the next entry."""
        return self.first + len(self.entries)

    def since(self, when: float) -> int:
        """Return the offset of the first record stored at *when* or later."""
        return self.first + bisect.bisect_left(self.entries, when, key=operator.itemgetter(2))

    def after(self, number: int) -> int:
        """Return the offset of the first record whose number in the topic is above *number*."""
        return self.first + bisect.bisect_right(self.entries, number, key=operator.itemgetter(3))

    def trim(self, offset: int) -> int:
        """Remove what is before *offset* and return how many records that were."""
        count = min(offset, self.end) - self.first
        if count <= 0:
            return 0
        del self.entries[:count]
        self.first += count
        return count


class TopicStore:
    """One topic."""

    def __init__(self, address: AnyTopic, limit: int, timers: Timers, *, derived: bool) -> None:
        self.name = address.name
        self.address = address
        self.partitions = [Partition(address.name, index) for index in range(address.partitions)]
        self._count = len(self.partitions)
        self.timers = timers
        self._limit = limit
        self.groups: dict[str, Following] = {}
        self.readers: dict[Following, None] = {}
        self._derived = derived
        self._stored = 0
        self._sequence = 0
        self._spread = 0
        self._latest: float = 0.0
        self._retention: float = math.inf if address.retention is None else address.retention
        self.trim_at: float = math.inf
        """When the oldest record is too old."""

    # ------------------------------------------------------------------ storing

    def put(self, record: Record, at: float = 0.0) -> Receipt | BrokerError:
        """Store a published *record* at the time *at*, by default now, if there is room."""
        body = record.body
        if body is not None and len(body) > MAX_BODY:
            return too_large(record)
        if self._stored >= self._limit and not self._made_room():
            return full(self.name, self._limit)
        return self.keep(record, at)

    def keep(self, record: Record, at: float = 0.0) -> Receipt:
        """Store *record* whatever the limits say, in the place of what nobody needs any more if there is such."""
        if self._stored >= self._limit:
            self._made_room()
        at = at or self.timers.clock.time()
        if at < self._latest:  # noqa: PLR1730 - a log does not go back with the wall clock; max() takes longer
            at = self._latest
        self._latest = at
        key = record.key
        if key is None:
            self._spread = index = (self._spread + 1) % self._count
        else:
            index = crc32(key) % self._count
        partition = self.partitions[index]
        entries = partition.entries
        position = f"{partition.prefix}{partition.first + len(entries)}"
        self._sequence = number = self._sequence + 1
        self._stored += 1
        entries.append((record, position, at, number))
        if self._stored == 1:
            self.trim_at = at + self._retention
        elif at >= self.trim_at:
            self._expire(at)
        if record.deliveries:
            partition.carried = True
        for claim in partition.claims:
            if not claim.queued:
                claim.arrived()
        return Receipt(record.id, position)

    def _expire(self, now: float) -> None:
        """Remove what is older than the retention, and remember when to look again."""
        horizon = now - self._retention
        for partition in self.partitions:
            self._stored -= partition.trim(partition.since(math.nextafter(horizon, math.inf)))
        oldest = min((partition.entries[0][2] for partition in self.partitions if partition.entries), default=math.inf)
        self.trim_at = oldest + self._retention

    def refresh(self) -> None:
        """Remove what is too old by now."""
        now = self.timers.clock.time()
        if now >= self.trim_at:
            self._expire(now)

    def _made_room(self) -> bool:
        """Drop the oldest of what every reader has settled; return whether there is room now."""
        self.refresh()
        spare = [max(0, self._settled(partition) - partition.first) for partition in self.partitions]
        total = sum(spare)
        if total:
            part = min(1.0, (self._limit // 16 + 1) / total)
            for partition, count in zip(self.partitions, spare, strict=True):
                self._stored -= partition.trim(partition.first + math.ceil(count * part))
        return self._stored < self._limit

    def _settled(self, partition: Partition) -> int:
        """Return the offset up to which nobody needs *partition* any more."""
        if self._derived:  # replies and the like: the oldest are worth least
            return partition.end
        # Readers leave nothing behind, but where no group reads they are the only ones who know what has been seen.
        following = self.groups.values() or self.readers
        return min((follower.trackers[partition.index].base for follower in following), default=partition.first)

    # ------------------------------------------------------------------ looking

    def resolve(self, start: Start) -> list[int]:
        """Return the offset of each partition at which *start* begins.

        Raises:
            ConfigError: the position is of another topic.
            PositionLost: the position is gone.
        """
        self.refresh()
        match start.kind:
            case "earliest":
                return [partition.first for partition in self.partitions]
            case "latest":
                return [partition.end for partition in self.partitions]
            case "time":
                return [partition.since(float(start.value)) for partition in self.partitions]
            case "position" if (cursor := _CURSOR.fullmatch(str(start.value))) is not None:
                return self._resume(cursor[1], [int(offset) for offset in cursor[2].split(",")])
            case "position":
                index, offset = self.place(str(start.value))
                partition = self.partitions[index]
                if offset < partition.first:
                    lost = partition.first - offset
                    raise PositionLost(f"{start.value} was removed, with {lost - 1} records behind it", lost=lost)
                if offset >= partition.end:
                    raise ConfigError(f"there is no position {start.value!r} yet")
                when = partition.entries[offset - partition.first][2]
                offsets = [partition.since(when) for partition in self.partitions]
                offsets[index] = offset
                return offsets

    def cursor(self, offsets: Sequence[int]) -> str:
        """Return the text from which `resolve` makes *offsets* again."""
        return f"{self.name}[*]@{','.join(map(str, offsets))}"

    def _resume(self, name: str, offsets: list[int]) -> list[int]:
        if name != self.name or len(offsets) != self._count:
            raise ConfigError(f"a cursor of {name} is no position in {self.name}")
        lost = sum(max(0, partition.first - offset) for partition, offset in zip(self.partitions, offsets, strict=True))
        if lost:
            raise PositionLost(f"{lost} records of {self.name} were removed before they were read", lost=lost)
        return offsets

    def place(self, position: str) -> tuple[int, int]:
        """Return partition and offset of *position*, or raise `ConfigError`."""
        match = _POSITION.fullmatch(position)
        if match is None or match[1] != self.name or int(match[2]) >= self._count:
            raise ConfigError(f"{position!r} is no position in {self.name}")
        return int(match[2]), int(match[3])

    def browse(self, limit: int, start: Start | None, after: str | None) -> list[StoredRecord]:
        """Return up to *limit* records from *start* on, behind *after*, in the order of storing."""
        offsets = self.resolve(start or Start.EARLIEST)
        if after is not None:
            index, offset = self.place(after)
            partition = self.partitions[index]
            if partition.first <= offset < partition.end:
                number = partition.entries[offset - partition.first][3]
            elif partition.entries and offset < partition.first:  # removed: go on with what followed it
                number = partition.entries[0][3] - 1
            else:
                number = self._sequence
            offsets = [
                max(offset, partition.after(number)) for partition, offset in zip(self.partitions, offsets, strict=True)
            ]
        found = itertools.chain.from_iterable(
            partition.entries[offset - partition.first : offset - partition.first + limit]
            for partition, offset in zip(self.partitions, offsets, strict=True)
        )
        first = sorted(found, key=operator.itemgetter(3))[:limit]
        return [StoredRecord(record, position) for record, position, _, _ in first]
