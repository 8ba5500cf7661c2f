"""How far a classic group is, as its coordinator has it and as its members in this process know better."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

import msgspec

from ...address import Address, AnyQueue, AnyTopic, Topic
from ...policy import Start
from .._log import Tracker
from ._cluster import time_left
from ._consumer import trackers
from ._context import Context
from ._coordinator import committed
from ._look import Look, bounds
from ._offsets import resolve
from ._records import record_of
from ._view import TopicInfo

_KEPT: Final = 1000
"""Partitions of which the time of the oldest unsettled record is kept."""


class Progress(msgspec.Struct, frozen=True):
    """How far a group is."""

    address: AnyTopic | AnyQueue
    info: TopicInfo
    bounds: Mapping[int, tuple[int, int]]
    """Where the partitions begin and end."""
    trackers: Mapping[int, Tracker]

    @property
    def waiting(self) -> int:
        """How many records wait."""
        found = self.trackers.items()
        return sum(max(0, self.bounds[n][1] - max(own.high, self.bounds[n][0])) + own.waiting for n, own in found)

    @property
    def in_flight(self) -> int:
        """How many records are in hand."""
        return sum(tracker.in_hand for tracker in self.trackers.values())

    def oldest(self) -> dict[int, int]:
        """Return the first record that is not done of each partition that has one."""
        firsts = ((n, max(own.base, self.bounds[n][0])) for n, own in self.trackers.items())
        return {number: first for number, first in firsts if first < self.bounds[number][1]}


async def progress(
    context: Context, address: AnyTopic | AnyQueue, group_id: str, start: Start, until: float
) -> Progress:
    """Return how far a group is in a topic, or in the queue that it alone reads.

    Raises:
        NotFound: there is no such topic.
        AuthorizationError: the group or the topic may not be described.
        BrokerUnavailable: no answer until then.
    """
    cluster = context.cluster
    info = await cluster.topic(address.name, timeout=time_left(until), fresh=True)
    numbers = range(len(info.partitions))
    stored = await committed(cluster, group_id, info.name, numbers, time_left(until))
    # Where the log ends is asked last: what was done meanwhile is never more than there is.
    found = await bounds(cluster, info, timeout=time_left(until))
    begin = {number: found[number][0] for number in numbers}
    if all(note is None for note in stored.values()) and start != Start.EARLIEST and isinstance(address, Topic):
        begin = dict(enumerate(await resolve(cluster, address, start, timeout=time_left(until))))
    own = trackers(context.readers, group_id)()
    known: dict[int, Tracker] = {}
    for number in numbers:
        note = stored.get(number)
        mine = own.get(number)
        tracker = mine.copy() if mine is not None else Tracker(begin.get(number, 0))
        if mine is None and note is not None:
            tracker = Tracker.decode(*note)
        tracker.skip(tracker.base, found[number][0])  # what was removed is nothing to do
        known[number] = tracker
    return Progress(address, info, found, known)


def undone(tracker: Tracker) -> Collection[int]:
    """Return what is below `Tracker.high` and not done."""
    copy = tracker.copy()
    copy.crashed()
    found: set[int] = set()
    while not copy.fresh:
        found.add(copy.next)
        copy.hand_out(copy.next)
    return found


class Ages:
    """When records were published, as far as that was asked before."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._times: dict[tuple[object, int, int], float] = {}

    async def oldest(
        self,
        address: Address,
        info: TopicInfo,
        firsts: Mapping[int, int],
        limits: Mapping[int, tuple[int, int]],
        until: float,
    ) -> float | None:
        """Return when the oldest was published of the records from *firsts* on, by partition; None if there are none.

        Raises:
            NotFound: the topic was deleted meanwhile.
            BrokerUnavailable: they could not be read until then.
        """
        look = Look(self._context.cluster, info, until, records=len(firsts))
        times: list[float] = []
        wanted: list[int] = []
        for number, first in firsts.items():
            if (known := self._times.get((info.id, number, first))) is not None:
                times.append(known)
            else:
                look.begin(number, first, limits[number][1])
                wanted.append(number)
        for number in wanted:
            native = await look.first(number)
            if native is not None:
                time = self._times[info.id, number, firsts[number]] = record_of(address, number, native).timestamp
                times.append(time)
        self._forget()
        return min(times, default=None)

    def _forget(self) -> None:
        for key in list(self._times)[: max(0, len(self._times) - _KEPT)]:
            del self._times[key]


def earliest(times: Iterable[float | None]) -> float | None:
    """Return the earliest of *times*, None if there is none."""
    return min((time for time in times if time is not None), default=None)
