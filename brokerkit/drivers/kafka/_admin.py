"""Everything but publishing and consuming: what exists, what is in it, and what moves or goes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

from kio.schema.describe_configs.v4 import request as requests
from kio.schema.errors import ErrorCode

from ... import clock
from ...address import Address, AnyDeadLetters, AnyQueue, AnyTopic, DeadLetters, Queue, Topic, internal, letters_of
from ...driver import Backlog, Source, StoredRecord
from ...errors import AuthorizationError, BrokerError, CapabilityError, ConfigError, NotFound
from ...policy import Start
from .._log import Tracker
from ._browse import Places, browse_log, browse_topic
from ._cluster import PAUSE
from ._consumer import group_of, trackers
from ._context import Context
from ._coordinator import committed, members, store_start
from ._create import create
from ._errors import RETRY, of_code
from ._letters import TIMEOUT, Letters, gone_log, letters_in
from ._look import Look, bounds
from ._offsets import resolve
from ._records import record_of
from ._remove import delete_groups, delete_topics, groups_like, topics_like
from ._view import TopicInfo

_TOPIC: Final = 2
"""A topic, among the kinds of things that have settings."""
_RETENTION: Final = "retention.ms"
_FOR_EVER: Final = -1
_KEPT: Final = 1000
"""Partitions of which the time of the oldest unsettled record is kept."""


class _Progress(NamedTuple):
    """How far a group is."""

    address: AnyTopic | AnyQueue
    info: TopicInfo
    bounds: Mapping[int, tuple[int, int]]
    trackers: Mapping[int, Tracker]


class Admin:
    """What a driver does for an administrator."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._cluster = context.cluster
        self._places = Places()
        self._letters: dict[str, Letters] = {}
        self._times: dict[tuple[object, int, int], float] = {}

    def _named(self, error: NotFound, address: Address) -> NotFound:
        """Return *error* with what to do."""
        if type(error.__cause__) is NotFound:
            return error
        named = NotFound(f"{address!r} does not exist on {self._context.settings.shown}; declare it")
        named.__cause__ = error
        return named

    # ------------------------------------------------------------------ what exists

    async def declare(self, address: Address) -> None:
        """Create *address* with its settings if it is missing."""
        await create(self._cluster, address, timeout=TIMEOUT)

    async def describe(self, address: Address) -> Mapping[str, object] | None:
        """Return the settings that exist, None if *address* is missing."""
        until = _clock() + TIMEOUT
        try:
            info = await self._cluster.topic(address.name, timeout=TIMEOUT, fresh=True)
        except NotFound:
            return None
        if not isinstance(address, Topic):
            return {}
        topic: AnyTopic = address
        found: dict[str, object] = {"partitions": len(info.partitions)}
        if topic.owned:
            found["retention"] = _retention(topic, await self._kept(info, until))
        return found

    async def _kept(self, info: TopicInfo, until: float) -> int:
        """Return for how many milliseconds a topic keeps its records.

        Raises:
            AuthorizationError: its settings may not be read.
        """
        entity: Any = requests
        request = entity.DescribeConfigsRequest(
            resources=(
                entity.DescribeConfigsResource(
                    resource_type=_TOPIC, resource_name=info.name, configuration_keys=(_RETENTION,)
                ),
            )
        )
        while True:
            answer = await self._cluster.call(None, request, timeout=_left(until))
            (result,) = answer.results
            code = cast("ErrorCode", result.error_code)
            if code is ErrorCode.none:
                values = {config.name: config.value for config in result.configs}
                return int(values.get(_RETENTION) or _FOR_EVER)
            error = of_code(int(code), f"DESCRIBE_CONFIGS on topic {info.name}", result.error_message)
            if code not in RETRY or _clock() > until:
                raise error
            await asyncio.sleep(PAUSE)

    async def delete(self, address: Address, group: str | None) -> None:
        """Remove *address* with all that is derived from it, or only what belongs to *group*."""
        if group is not None and not isinstance(address, Topic):
            raise ConfigError(f"{address!r} has no groups; only topics do")
        until = _clock() + TIMEOUT
        if isinstance(address, DeadLetters):
            await delete_topics(self._cluster, [address.name, gone_log(address)], timeout=TIMEOUT)
            return
        if group is not None:
            await self._delete_group(address, group, until)
            return
        beginning = address.name + ".."
        names = await topics_like(self._cluster, beginning, timeout=_left(until))
        groups = await groups_like(self._cluster, beginning, timeout=_left(until))
        await delete_topics(self._cluster, [address.name, *names], timeout=_left(until))
        # What a group keeps of a topic goes with the topic; what is left of it is its name, while members live.
        await delete_groups(self._cluster, groups, timeout=_left(until))

    async def _delete_group(self, address: Address, group: str, until: float) -> None:
        own = internal(address.name, group)
        again = internal(own, "again")
        # A group with members is refused before anything is gone.
        for name in (own, again):
            failed = await delete_groups(self._cluster, [name], timeout=_left(until))
            if name in failed:
                raise failed[name]
        names = await topics_like(self._cluster, own + "..", timeout=_left(until))
        if names:
            await delete_topics(self._cluster, names, timeout=_left(until))

    # ------------------------------------------------------------------ what is in it

    async def browse(
        self, address: Address, *, limit: int, start: Start | None, after: str | None
    ) -> Sequence[StoredRecord]:
        """Return up to *limit* stored records behind position *after*, the oldest first."""
        if not isinstance(address, Topic) and start not in {None, Start.EARLIEST}:
            raise CapabilityError(f"start is for topics; {address!r} on kafka is browsed from its oldest message")
        until = _clock() + TIMEOUT
        try:
            if isinstance(address, Topic):
                return await browse_topic(self._cluster, address, limit, start, after, self._places, until)
            if isinstance(address, Queue):
                done = await self._progress(address, address.name, Start.EARLIEST, until)
                rest = {number: (tracker.high, _undone(tracker)) for number, tracker in done.trackers.items()}
                return await browse_log(self._cluster, address, limit, after, rest, until)
            return await self._of(address).browse(limit, after)
        except NotFound as error:
            if isinstance(address, DeadLetters) and await self._exists(address.of):
                return []
            raise self._named(error, address) from error.__cause__

    def _of(self, address: AnyDeadLetters) -> Letters:
        return letters_in(self._letters, self._context, address)

    async def _exists(self, address: Address) -> bool:
        try:
            await self._cluster.topic(address.name, timeout=TIMEOUT)
        except NotFound:
            return False
        return True

    async def backlog(self, source: Source) -> Backlog:
        """Return what is left to do."""
        address = source.address
        until = _clock() + TIMEOUT
        try:
            if isinstance(address, DeadLetters):
                return await self._backlog_of_letters(address, until)
            if isinstance(address, Topic) and source.group is None:
                await self._cluster.topic(address.name, timeout=TIMEOUT, fresh=True)
                return Backlog()
            found, dead = await asyncio.gather(
                self._progress(address, group_of(source) or "", source.start, until),
                self._count(address, source.group, until),
            )
            return await self._backlog(found, dead, until)
        except NotFound as error:
            raise self._named(error, address) from error.__cause__

    async def _backlog(self, found: _Progress, dead: int | None, until: float) -> Backlog:
        waiting = in_flight = 0
        oldest: dict[int, int] = {}
        for number, (start, end) in found.bounds.items():
            tracker = found.trackers[number]
            waiting += max(0, end - max(tracker.high, start)) + tracker.waiting
            in_flight += tracker.in_hand
            if (first := max(tracker.base, start)) < end:
                oldest[number] = first
        times = [await self._time_of(found, number, first, until) for number, first in oldest.items()]
        ages = [clock.current().time() - time for time in times if time is not None]
        return Backlog(
            waiting=waiting,
            in_flight=in_flight,
            delayed=0,  # in a redrive queue, what waits for its next attempt is told as waiting
            dead=dead,
            oldest_age=max(0.0, *ages) if ages else None,
        )

    async def _time_of(self, found: _Progress, number: int, offset: int, until: float) -> float | None:
        """Return when the record was published that is the first one from *offset* on."""
        key = (found.info.id, number, offset)
        if (known := self._times.get(key)) is not None:
            return known
        look = Look(self._cluster, found.info, until, records=1)
        look.begin(number, offset, found.bounds[number][1])
        native = await look.first(number)
        if native is None:
            return None
        self._times[key] = time = record_of(found.address, number, native).timestamp
        if len(self._times) > _KEPT:
            del self._times[next(iter(self._times))]
        return time

    async def _count(self, address: Address, group: str | None, until: float) -> int | None:
        """Return how many dead letters *group* has."""
        if not isinstance(address, Topic):
            return None
        letters = self._of(letters_of(address, group))
        try:
            await letters.look(until)
        except NotFound:
            return 0
        return letters.count

    async def _backlog_of_letters(self, address: AnyDeadLetters, until: float) -> Backlog:
        letters = self._of(address)
        try:
            info = await letters.look(until)
        except NotFound:
            if not await self._exists(address.of):
                raise
            return Backlog(waiting=0, in_flight=0, delayed=0)
        oldest = await letters.oldest(info, until)
        age = None if oldest is None else max(0.0, clock.current().time() - oldest)
        return Backlog(waiting=letters.count, in_flight=0, delayed=0, oldest_age=age)

    async def _progress(self, address: AnyTopic | AnyQueue, group_id: str, start: Start, until: float) -> _Progress:
        """Return how far a group is in a topic, or in the queue that it alone reads."""
        info = await self._cluster.topic(address.name, timeout=_left(until), fresh=True)
        numbers = range(len(info.partitions))
        stored = await committed(self._cluster, group_id, info.name, numbers, _left(until))
        # Where the log ends is asked last: what was done meanwhile is never more than there is.
        found = await bounds(self._cluster, info, timeout=_left(until))
        begin = {number: found[number][0] for number in numbers}
        if all(note is None for note in stored.values()) and start != Start.EARLIEST and isinstance(address, Topic):
            begin = dict(enumerate(await resolve(self._cluster, address, start, timeout=_left(until))))
        own = trackers(self._context.readers, group_id)()
        known: dict[int, Tracker] = {}
        for number in numbers:
            note = stored.get(number)
            mine = own.get(number)
            tracker = mine.copy() if mine is not None else Tracker(begin.get(number, 0))
            if mine is None and note is not None:
                tracker = Tracker.decode(*note)
            tracker.skip(tracker.base, found[number][0])  # what was removed is nothing to do
            known[number] = tracker
        return _Progress(address, info, found, known)

    # ------------------------------------------------------------------ what moves or goes

    async def purge(self, address: AnyQueue | AnyDeadLetters) -> int:
        """Remove all letters and return how many."""
        if not isinstance(address, DeadLetters):
            raise CapabilityError(f"{address!r} on kafka cannot be purged; its dead letters can")
        try:
            return await self._of(address).purge()
        except NotFound as error:
            if await self._exists(address.of):
                return 0
            raise self._named(error, address) from error.__cause__

    async def redrive(
        self, letters: AnyDeadLetters, positions: Sequence[str], to: AnyQueue
    ) -> Sequence[BrokerError | None]:
        """Move letters to *to*; one result each."""
        if ".." not in to.name:
            try:
                await self._cluster.topic(to.name, timeout=TIMEOUT)
            except NotFound as error:
                raise self._named(error, to) from error.__cause__
            raise CapabilityError(f"letters on kafka go to their group's private queue, not to {to!r}")
        try:
            return await self._of(letters).redrive(positions, to)
        except NotFound as error:
            raise self._named(error, letters) from error.__cause__

    async def seek(self, source: Source) -> None:
        """Move the position of a group without members, or store that of a new one."""
        topic, group = source.address, source.group
        if not isinstance(topic, Topic):
            raise ConfigError(f"{topic!r} has no groups; only topics do")
        if group is None:
            raise ConfigError("only a group has a position")
        until = _clock() + TIMEOUT
        id = internal(topic.name, group)
        try:
            await self._cluster.topic(topic.name, timeout=TIMEOUT, fresh=True)
        except NotFound as error:
            raise self._named(error, topic) from error.__cause__
        offsets = await resolve(self._cluster, topic, source.start, timeout=_left(until))
        places = {number: (offset, "") for number, offset in enumerate(offsets)}
        if not await store_start(self._cluster, id, topic.name, places, _left(until)):
            try:
                count = len(await members(self._cluster, id, _left(until)))
            except AuthorizationError:
                count = 0
            raise ConfigError(
                f"group {group!r} of {topic.name} has {count or 'some'} live members; stop them first"
                " (one that died counts until its session has ended)"
            )


def _undone(tracker: Tracker) -> Collection[int]:
    """Return what is below `Tracker.high` and not done."""
    copy = tracker.copy()
    copy.crashed()
    found: set[int] = set()
    while not copy.fresh:
        found.add(copy.next)
        copy.hand_out(copy.next)
    return found


def _retention(topic: AnyTopic, kept: int) -> float | None:
    """Return how long a topic keeps its records, in the words of its address where they mean the same."""
    wanted = topic.retention
    if kept < 0:
        return wanted if wanted == math.inf else None
    return wanted if wanted is not None and wanted < math.inf and round(wanted * 1000) == kept else kept / 1000


def _clock() -> float:
    return asyncio.get_running_loop().time()


def _left(until: float) -> float:
    return max(PAUSE, until - _clock())
