"""Looking at what is stored, without taking it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping
from typing import Final

import msgspec

from ...address import Address, AnyTopic
from ...driver import StoredRecord
from ...errors import ConfigError
from ...policy import Start
from ._cluster import Cluster, time_left
from ._look import Look, bounds
from ._offsets import LATEST, offsets_at, resolve
from ._records import Native, is_tick, parse_position, position, record_of
from ._view import TopicInfo

_KEPT: Final = 64
"""Pages of which it is known where the next one begins."""


class Place(msgspec.Struct, frozen=True):
    """Where a page ended: the next offset of each partition."""

    id: object
    """That of the topic."""
    offsets: tuple[int, ...]


class Places:
    """Where the latest pages ended, so that the next one goes on exactly there.

    A position alone says that only of its own partition.  In the others what is as late as its record comes next, which
    repeats a record where the times of publishers disagree; so it is kept what was shown.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Place] = {}

    def get(self, position: str, info: TopicInfo) -> Place | None:
        """Return where the page ended whose last record is at *position*."""
        place = self._kept.get(position)
        return place if place is not None and place.id == info.id else None

    def put(self, position: str, place: Place) -> None:
        """Keep *place*."""
        self._kept[position] = place
        if len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]


async def browse_topic(
    cluster: Cluster,
    topic: AnyTopic,
    limit: int,
    start: Start | None,
    after: str | None,
    places: Places,
    until: float,
) -> list[StoredRecord]:
    """Return *limit* records of *topic* from *start* on, behind position *after*, in the order of their times."""
    if after is not None and parse_position(after, topic.name) is None:
        raise ConfigError(f"{after[:100]!r} is no position in {topic.name}")
    info = await cluster.topic(topic.name, timeout=time_left(until), fresh=after is None)
    count = len(info.partitions)
    begin = [0] * count
    if after is not None:
        kept = places.get(after, info) or await _behind(cluster, info, after, until)
        begin = [*kept.offsets, *begin][:count]  # partitions may have been added since
    if start is not None and start.kind != "earliest":
        wanted = await resolve(cluster, topic, start, timeout=time_left(until))
        begin = [max(*pair) for pair in zip(begin, wanted, strict=False)]
        count = len(begin)
    look = Look(cluster, info, until, records=limit)
    for number, (first, end) in (await bounds(cluster, info, range(count), timeout=time_left(until))).items():
        look.begin(number, max(begin[number], first), end)
    found = await _merge(look, range(count), limit)
    stored = [_stored(topic, number, native) for number, native in found]
    if stored:
        offsets = tuple(look.at(number) for number in range(count))
        places.put(stored[-1].position, Place(info.id, offsets))
    return stored


async def _merge(
    look: Look, partitions: Collection[int], limit: int, wanted: Callable[[int, Native], bool] | None = None
) -> list[tuple[int, Native]]:
    """Take *limit* records that are *wanted* in the order of their times, each partition in its own order."""
    heads: list[tuple[int, int]] = []

    async def push(number: int) -> None:
        while (native := await look.first(number)) is not None:
            if wanted is None or wanted(number, native):
                heapq.heappush(heads, (native.timestamp or 0, number))  # the oldest format has no times
                return
            look.pop(number)

    for number in partitions:
        await push(number)
    found: list[tuple[int, Native]] = []
    while heads and len(found) < limit:
        _, number = heapq.heappop(heads)
        native = await look.first(number)
        assert native is not None
        look.pop(number)
        found.append((number, native))
        if len(found) < limit:
            await push(number)
    return found


async def _behind(cluster: Cluster, info: TopicInfo, after: str, until: float) -> Place:
    """Return what follows a position of which nothing else is known."""
    parsed = parse_position(after, info.name)
    assert parsed is not None
    partition, when, offset = parsed
    # Among equal times the lower partition comes first.
    wanted = {place.index: when + (place.index < partition) for place in info.partitions}
    ends = await offsets_at(cluster, info, dict.fromkeys(wanted, LATEST), timeout=time_left(until))
    found = await offsets_at(cluster, info, wanted, timeout=time_left(until))
    offsets = [found[number][0] if found[number][0] >= 0 else ends[number][0] for number in sorted(wanted)]
    if partition < len(offsets):
        offsets[partition] = offset + 1
    return Place(info.id, tuple(offsets))


async def browse_records(
    cluster: Cluster,
    address: Address,
    info: TopicInfo,
    limit: int,
    after: str | None,
    limits: Mapping[int, tuple[int, int]],
    undone: Mapping[int, Collection[int]],
    fresh: Mapping[int, int],
    places: Places,
    until: float,
    *,
    shown: Address | None = None,
) -> list[StoredRecord]:
    """Return *limit* records behind position *after* of what is read as a queue, in the order of their times.

    *limits* are where the partitions begin and end.  *fresh* has, by partition, the offset from which on nothing is done, and
    *undone* what is not done below it.  The records are those of *shown* if that is another address.
    """
    numbers = sorted(limits)
    begin = dict.fromkeys(numbers, 0)
    if after is not None:
        kept = places.get(after, info) or await _behind(cluster, info, after, until)
        begin |= dict(zip(numbers, kept.offsets, strict=False))
    look = Look(cluster, info, until, records=limit)
    for number, (first, end) in limits.items():
        lowest = min(undone.get(number, ()), default=fresh.get(number, first))
        look.begin(number, max(begin[number], first, lowest), end)

    def there(number: int, native: Native) -> bool:
        return native.offset >= fresh.get(number, 0) or native.offset in undone.get(number, ())

    found = await _merge(look, numbers, limit, lambda number, native: there(number, native) and not is_tick(native))
    stored = [_stored(address, number, native, shown) for number, native in found]
    if stored:
        places.put(stored[-1].position, Place(info.id, tuple(look.at(number) for number in numbers)))
    return stored


def _stored(address: Address, number: int, native: Native, shown: Address | None = None) -> StoredRecord:
    record = record_of(shown or address, number, native)
    place = position(address.name, number, native.timestamp or 0, native.offset)
    return StoredRecord(record, place, record.deliveries)
