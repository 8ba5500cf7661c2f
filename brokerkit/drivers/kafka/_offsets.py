"""Places in a topic: offsets by time, where reading begins, and looking at single records without reading the log."""

from __future__ import annotations

import asyncio
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, NamedTuple, TypeVar

import anyio
from kio.schema.errors import ErrorCode

from ...address import AnyTopic
from ...errors import BrokerError, BrokerUnavailable, ConfigError, NotFound, PositionLost
from ...policy import Start
from ._answer import Decoded, records, split
from ._api import schema
from ._cluster import PAUSE, Cluster, time_left
from ._errors import RETRY, STALE_LEADER, of_code
from ._records import parse_position
from ._view import TopicInfo

EARLIEST: Final = -2
LATEST: Final = -1
COMMITTED: Final = 1
"""Up to the first open transaction."""
UNCOMMITTED: Final = 0
_CURSOR: Final = re.compile(r"([^\[\]]+)\[\*\]@([0-9]{1,15}-[0-9]{1,19}(?:,[0-9]{1,15}-[0-9]{1,19})*)", re.ASCII)
_LONGEST: Final = 200_000
"""Characters of a cursor."""
_LAST: Final = 2**63 - 1
"""The last millisecond that can be asked for."""
_TRY: Final = 3.0
"""Seconds that a broker has for an answer before its partitions' leaders are looked up anew; more each time."""
_T = TypeVar("_T")

_fetch = schema("Fetch")
_list = schema("ListOffsets")


class Looked(NamedTuple):
    """Records of one partition, from an offset on."""

    records: Decoded
    next: int
    """Where the log goes on behind them."""
    start: int
    """The first offset that is still there."""
    end: int
    """Where the log ends, as far as it is committed."""


# ---------------------------------------------------------------------- asking leaders


async def _of_leaders(
    cluster: Cluster,
    info: TopicInfo,
    wanted: Mapping[int, int],
    request: Callable[[TopicInfo, Mapping[int, int]], Any],
    read: Callable[[Any, Mapping[int, int]], Mapping[int, _T | ErrorCode]],
    *,
    what: str,
    timeout: float,
) -> dict[int, _T]:
    """Ask the leader of each partition in *wanted*, again for those that fail, and return the answers by partition."""
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    left = dict(wanted)
    found: dict[int, _T] = {}
    problem: BrokerError | None = None
    id = info.id
    patience = _TRY

    async def ask(node: int, parts: Mapping[int, int]) -> None:
        nonlocal problem
        try:
            answer = await cluster.call(
                node, request(info, parts), timeout=max(PAUSE, min(patience, end - loop.time()))
            )
        except BrokerUnavailable as error:
            problem = error
            return
        for partition, outcome in read(answer, parts).items():
            if not isinstance(outcome, ErrorCode):
                found[partition] = outcome
                left.pop(partition, None)
            elif outcome in RETRY or outcome in STALE_LEADER:
                problem = of_code(int(outcome), f"{info.name}[{partition}]")
            else:
                raise of_code(int(outcome), what)

    while True:
        nodes: dict[int, dict[int, int]] = {}
        for partition, argument in left.items():
            nodes.setdefault(info.leader(partition), {})[partition] = argument
        nodes.pop(-1, None)
        await _all_at_once([functools.partial(ask, node, parts) for node, parts in nodes.items()])
        if not left:
            return found
        if loop.time() + PAUSE >= end:
            break
        await asyncio.sleep(PAUSE)
        patience *= 2
        info = await cluster.topic(info.name, timeout=time_left(end), fresh=True)
        if info.id != id:
            raise NotFound(f"topic {info.name} was deleted and made again")
    first = min(left)
    text = f"{info.name}[{first}] has no leader that answers" if problem is None else f"{info.name}[{first}]: {problem}"
    raise BrokerUnavailable(text) from problem


async def _all_at_once(calls: Sequence[Callable[[], Any]]) -> None:
    """Await *calls* and raise the first error of ours as it is, not as a group."""
    if len(calls) == 1:
        await calls[0]()
        return
    errors: list[BrokerError] = []

    async def one(call: Callable[[], Any]) -> None:
        try:
            await call()
        except BrokerError as error:
            errors.append(error)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for call in calls:
            tasks.start_soon(one, call)
    if errors:
        raise errors[0]


async def offsets_at(
    cluster: Cluster, info: TopicInfo, wanted: Mapping[int, int], *, timeout: float, isolation: int = COMMITTED
) -> dict[int, tuple[int, int]]:
    """Return by partition the first offset whose timestamp is what is *wanted* or later, and that timestamp.

    Times are in milliseconds; `EARLIEST` and `LATEST` stand for the two ends.  Where nothing is that late both are -1.

    Raises:
        NotFound: the topic does not exist any more.
        AuthorizationError: it may not be described.
        BrokerUnavailable: a partition had no leader that answered in time.
    """

    def request(info: TopicInfo, parts: Mapping[int, int]) -> Any:
        epochs = {place.index: place.epoch for place in info.partitions}
        partitions = tuple(
            _list.ListOffsetsPartition(
                partition_index=index, current_leader_epoch=epochs.get(index, -1), timestamp=when
            )
            for index, when in parts.items()
        )
        return _list.ListOffsetsRequest(
            replica_id=-1,
            isolation_level=isolation,
            topics=(_list.ListOffsetsTopic(name=info.name, partitions=partitions),),
        )

    def read(answer: Any, parts: Mapping[int, int]) -> dict[int, tuple[int, int] | ErrorCode]:
        return {
            int(part.partition_index): (int(part.offset), int(part.timestamp))
            if part.error_code is ErrorCode.none
            else part.error_code
            for topic in answer.topics
            for part in topic.partitions
        }

    what = f"DESCRIBE on topic {info.name}"
    return await _of_leaders(cluster, info, wanted, request, read, what=what, timeout=timeout)


async def look(
    cluster: Cluster,
    info: TopicInfo,
    wanted: Mapping[int, int],
    *,
    timeout: float,
    size: int = 65_536,
    isolation: int = COMMITTED,
) -> dict[int, Looked]:
    """Return what is stored from the offsets *wanted* on, by partition: about *size* bytes of each, and at least one batch.

    Raises:
        PositionLost: an offset is not in the log.
        NotFound: the topic does not exist any more.
        AuthorizationError: it may not be read.
        BrokerUnavailable: a partition had no leader that answered in time.
    """

    def request(info: TopicInfo, parts: Mapping[int, int]) -> Any:
        epochs = {place.index: place.epoch for place in info.partitions}
        partitions = tuple(
            _fetch.FetchPartition(
                partition=index,
                current_leader_epoch=epochs.get(index, -1),
                fetch_offset=offset,
                partition_max_bytes=size,
            )
            for index, offset in parts.items()
        )
        return _fetch.FetchRequest(
            max_wait=timedelta(),
            min_bytes=0,
            max_bytes=2**24,
            isolation_level=isolation,
            topics=(_fetch.FetchTopic(topic_id=info.id, partitions=partitions),),
            forgotten_topics_data=(),
        )

    def read(answer: Any, parts: Mapping[int, int]) -> dict[int, Looked | ErrorCode]:
        found: dict[int, Looked | ErrorCode] = {}
        if answer.error_code is not ErrorCode.none:
            return {index: ErrorCode(answer.error_code) for index in parts}
        for topic in answer.responses:
            for part in topic.partitions:
                index = int(part.partition_index)
                place = f"{info.name}[{index}]"
                if part.error_code is ErrorCode.offset_out_of_range:
                    raise PositionLost(f"offset {parts[index]} of {place} is not there")
                if part.error_code is not ErrorCode.none:
                    found[index] = part.error_code
                    continue
                got = split(part.records, parts[index], part.aborted_transactions, place)
                start, end = int(part.log_start_offset), int(part.last_stable_offset)
                if not part.records and parts[index] < end and len(parts) > 1:
                    # Only the first batch of an answer may be larger than asked for: this one was not the first.
                    found[index] = ErrorCode.network_exception
                else:
                    found[index] = Looked(records(got, place), got.next, start, end)
        return found

    what = f"READ on topic {info.name}"
    return await _of_leaders(cluster, info, wanted, request, read, what=what, timeout=timeout)


# ---------------------------------------------------------------------- where reading begins


def cursor(name: str, offsets: Sequence[int], ms: int = 0) -> str:
    """Return the text for `Start.position` from which `resolve` makes *offsets* again."""
    return f"{name}[*]@{','.join(f'{ms}-{offset}' for offset in offsets)}"


async def resolve(cluster: Cluster, topic: AnyTopic, start: Start, *, timeout: float) -> list[int]:
    """Return the offset of each partition at which *start* begins.

    Raises:
        NotFound: the topic does not exist.
        ConfigError: it is no position in *topic*.
        PositionLost: the position is gone.
        BrokerUnavailable: a partition had no leader that answered in time.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    place = places = None
    if start.kind == "position":  # what can be said without asking anybody is said first
        text = str(start.value)
        place = parse_position(text, topic.name)
        if place is None and (places := _places(text, topic.name)) is None:
            raise ConfigError(f"{text[:100]!r} is no position in {topic.name}")
    try:
        info = await cluster.topic(topic.name, timeout=timeout)
    except NotFound as error:
        raise NotFound(f"{topic!r} does not exist on {cluster.settings.shown}; declare it") from error

    asking = _Asking(cluster, info, end)
    match start.kind:
        case "earliest":
            return await asking.all(EARLIEST)
        case "latest":
            return await asking.all(LATEST)
        case "time":
            return await asking.since(max(0, math.floor(float(start.value) * 1000)))
        case "position" if place is not None:
            return await _at_position(asking, str(start.value), *place)
        case "position":
            return await _at_cursor(asking, str(start.value), places or [])


def _places(text: str, name: str) -> list[int] | None:
    """Return the offsets of a cursor; None if *text* is none of *name*."""
    found = _CURSOR.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None or found[1] != name:
        return None
    return [int(place.partition("-")[2]) for place in found[2].split(",")]


class _Asking:
    """Offsets in all partitions of one topic, until a deadline."""

    def __init__(self, cluster: Cluster, info: TopicInfo, end: float) -> None:
        self.cluster = cluster
        self.info = info
        self._end = end

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return time_left(self._end)

    async def all(self, when: int, isolation: int = COMMITTED) -> list[int]:
        """Return the first offset of each partition from *when* on."""
        wanted = {place.index: when for place in self.info.partitions}
        found = await offsets_at(self.cluster, self.info, wanted, timeout=self.left, isolation=isolation)
        return [found[place.index][0] for place in self.info.partitions]

    async def since(self, when: int) -> list[int]:
        """Return the same, and the end where nothing is as late as *when*."""
        # The ends first: what is stored in between is read, rather than missed.
        ends = await self.all(LATEST)
        found = await self.all(min(when, _LAST))
        return [end if offset < 0 else offset for offset, end in zip(found, ends, strict=True)]


async def _at_position(asking: _Asking, shown: str, partition: int, when: int, offset: int) -> list[int]:
    name = asking.info.name
    if partition >= len(asking.info.partitions):
        raise PositionLost(f"there is no record at {shown}")
    ends = await asking.all(LATEST, UNCOMMITTED)
    if offset >= ends[partition]:
        raise ConfigError(f"there is no position {shown} yet")
    first = (await asking.all(EARLIEST))[partition]
    if offset < first:
        lost = first - offset
        raise PositionLost(f"{lost} records of {name} behind {shown} were removed", lost=lost)
    offsets = await asking.since(when)
    looked = await look(
        asking.cluster, asking.info, {partition: offset}, timeout=asking.left, size=1024, isolation=UNCOMMITTED
    )
    found = looked[partition].records
    if not found or found[0].offset != offset or max(0, found[0].timestamp or 0) != when:
        raise PositionLost(f"there is no record at {shown}")
    offsets[partition] = offset
    return offsets


async def _at_cursor(asking: _Asking, shown: str, offsets: list[int]) -> list[int]:
    name, count = asking.info.name, len(asking.info.partitions)
    if len(offsets) > count:
        raise PositionLost(f"{name} has {count} partitions by now: {shown[:200]} is gone")
    ends = await asking.all(LATEST, UNCOMMITTED)
    starts = await asking.all(EARLIEST)
    # Partitions that were added since hold nothing that was there when the cursor was taken.
    offsets = offsets + starts[len(offsets) :]
    if any(offset > end for offset, end in zip(offsets, ends, strict=True)):
        raise PositionLost(f"{name} was deleted and made again: {shown[:200]} is gone")
    lost = sum(max(0, start - offset) for start, offset in zip(starts, offsets, strict=True))
    if lost:
        raise PositionLost(f"{lost} records of {name} behind {shown[:200]} were removed", lost=lost)
    return offsets
