"""Queues for an administrator: what is in them and beside them, and removing it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from typing import Final

import msgspec

from ... import clock
from ...address import AnyQueue
from ...driver import Backlog, StoredRecord
from ...errors import AuthorizationError, ConfigError, NotFound
from ...policy import Start
from ._browse import Places, browse_records
from ._cluster import PAUSE, time_left
from ._consumer import purged
from ._context import Context
from ._create import create
from ._cut import ALL, cut
from ._engine import decide, engine_of, lease_of
from ._look import Look, bounds
from ._progress import Ages, Progress, earliest, progress, undone
from ._records import is_tick, parse_position
from ._share_consumer import ShareConsumer
from ._share_group import Place, describe, places
from ._tiers import tiered, waiting_for
from ._topic_settings import check_queue, lease_at_birth
from ._view import TopicInfo

logger = logging.getLogger("brokerkit")

_COUNTED: Final = 1000
"""Records that wait for the shortest time, up to which each is looked at: some are no messages."""

_FEW: Final = 20
"""Records that wait, up to which they are counted exactly."""
_LOOKS: Final = 3
"""How often that is tried."""


class Left(msgspec.Struct):
    """What is left to do in a queue itself."""

    info: TopicInfo
    bounds: Mapping[int, tuple[int, int]]
    firsts: Mapping[int, int]
    """From where on anything may be left, by partition; partitions with nothing left are missing."""
    undone: Mapping[int, Collection[int]]
    """What is left below an offset of `fresh`."""
    fresh: Mapping[int, int]
    """From where on everything is left."""
    waiting: int
    in_flight: int | None
    delayed: int = 0


class QueueAdmin:
    """What a driver does for an administrator of queues."""

    def __init__(self, context: Context, ages: Ages) -> None:
        self._context = context
        self._cluster = context.cluster
        self._ages = ages
        self._places = Places()

    # ------------------------------------------------------------------ what exists

    async def declare(self, queue: AnyQueue, until: float) -> None:
        """Create the topic of *queue* if it is missing, and reserve its group where that is allowed.

        Who only publishes need not have any right on groups: whoever consumes first reserves it then.
        """
        info = await create(self._cluster, queue, timeout=time_left(until))
        if not tiered(queue):
            return
        await check_queue(self._cluster, queue, self._context.settings.shown, timeout=time_left(until))
        try:
            await decide(self._cluster, queue, info, timeout=time_left(until))
        except AuthorizationError as error:
            logger.debug("%r: its first consumer decides what serves it: %s", queue, error)

    async def describe(self, queue: AnyQueue, until: float) -> Mapping[str, object]:
        """Return the settings of *queue*, which exists.

        A share group says what its lease is.  Where there is none, what the queue was made with will be, once there is one.
        """
        if not tiered(queue):
            return {}
        try:
            if await engine_of(self._cluster, queue.name, timeout=time_left(until)) == "share":
                lease = await lease_of(self._cluster, queue.name, queue.lease, timeout=time_left(until))
                return {} if lease is None else {"lease": lease}
        except AuthorizationError as error:
            logger.debug("%r: its lease is what it was made with: %s", queue, error)
        kept = await lease_at_birth(self._cluster, queue, self._context.settings.shown, timeout=time_left(until))
        return {} if kept is None else {"lease": kept}

    # ------------------------------------------------------------------ what is in it

    async def backlog(self, queue: AnyQueue, until: float) -> Backlog:
        """Return what is left to do, but for how much is dead."""
        left, later = await asyncio.gather(self._left(queue, until), self._later(queue, until))
        times = [await self._ages.oldest(queue, left.info, left.firsts, left.bounds, until)]
        delayed = left.delayed
        if later is not None:
            delayed += later.waiting + later.in_flight - await self._ticks(later, until)
            times.append(await self._ages.oldest(queue, later.info, later.oldest(), later.bounds, until))
        oldest = earliest(times)
        return Backlog(
            waiting=left.waiting,
            in_flight=left.in_flight,
            delayed=max(0, delayed),
            oldest_age=None if oldest is None else max(0.0, clock.current().time() - oldest),
        )

    async def _left(self, queue: AnyQueue, until: float) -> Left:
        """Return what is left in the queue itself.

        Raises:
            NotFound: there is no such queue.
        """
        info = await self._cluster.topic(queue.name, timeout=time_left(until), fresh=True)
        group = await describe(self._cluster, queue.name, timeout=time_left(until)) if tiered(queue) else None
        if group is not None and group.engine == "share":
            return await self._left_of_share(info, group.members, until)
        found = await progress(self._context, queue, queue.name, Start.EARLIEST, until)
        return Left(
            found.info,
            found.bounds,
            found.oldest(),
            {number: undone(tracker) for number, tracker in found.trackers.items()},
            {number: tracker.high for number, tracker in found.trackers.items()},
            found.waiting,
            found.in_flight,
        )

    async def _left_of_share(self, info: TopicInfo, members: tuple[str, ...], until: float) -> Left:
        """Return what a share group has left to do.

        The cluster tells how many records of a partition are not done, and from where on.  Which of those are in somebody's
        hands only that process knows.
        """
        looks = 0
        while True:
            looks += 1
            before = self._in_hand(info.name)
            numbers = range(len(info.partitions))
            found = await places(self._cluster, info.name, info.name, numbers, timeout=time_left(until))
            left = self._less_own(
                info, found, await bounds(self._cluster, info, timeout=time_left(until)), before, members
            )
            # Of few it is worth knowing exactly how many, which needs a moment in which nothing comes or goes.
            if looks == _LOOKS or left.waiting > _FEW or (before == self._in_hand(info.name) and not before[1]):
                return left
            await asyncio.sleep(PAUSE)

    def _in_hand(self, group: str) -> tuple[list[tuple[int, int, bool]], int]:
        """Return what consumers of this process have in hand, and how much they have done that is not confirmed."""
        own = self._own(group)
        return sorted(lock for reader in own for lock in reader.holding()), sum(reader.going() for reader in own)

    def _own(self, group: str) -> list[ShareConsumer]:
        return [one for one in self._context.readers if isinstance(one, ShareConsumer) and one.group == group]

    def _less_own(
        self,
        info: TopicInfo,
        found: Mapping[int, Place],
        ends: Mapping[int, tuple[int, int]],
        own: tuple[list[tuple[int, int, bool]], int],
        members: tuple[str, ...],
    ) -> Left:
        """Return what is left according to the cluster, less what is in hand here."""
        held, going = own
        firsts: dict[int, int] = {}
        fresh: dict[int, int] = {}
        count = 0
        for number, (begin, end) in ends.items():
            place = found.get(number, Place(-1, -1))
            fresh[number] = first = max(begin, place.start)
            # Until something is acknowledged, the cluster does not know of what was removed.
            rest = max(0, end - first)
            if 0 <= place.lag < rest:
                rest = place.lag
            if rest:
                firsts[number] = first
            else:
                fresh[number] = end
            count += rest
        there = [later for number, offset, later in held if number in ends and offset >= ends[number][0]]
        delayed = sum(later for *_, later in held)
        names = tuple(f"{reader.member} at " for reader in self._own(info.name))
        alone = all(member.startswith(names) for member in members)
        taken = len(there) if alone else sum(there)
        waiting = max(0, count - taken - going)
        return Left(info, ends, firsts, {}, fresh, waiting, len(held) - delayed if alone else None, delayed)

    async def _later(self, queue: AnyQueue, until: float) -> Progress | None:
        """Return how far those are that wait for their time, None if none ever did."""
        if not tiered(queue):
            return None
        address = waiting_for(queue)
        try:
            return await progress(self._context, address, address.name, Start.EARLIEST, until)
        except NotFound:
            return None

    async def _ticks(self, later: Progress, until: float) -> int:
        """Return how many of those that wait are no messages: they lie where it is waited for the shortest time."""
        tracker = later.trackers[0]
        begin, end = later.bounds[0]
        rest = max(0, end - max(tracker.high, begin)) + tracker.waiting + tracker.in_hand
        if not 0 < rest <= _COUNTED:
            return 0
        below = undone(tracker)
        look = Look(self._cluster, later.info, until, records=rest)
        look.begin(0, min(below, default=max(tracker.high, begin)), end)
        count = 0
        while (native := await look.first(0)) is not None:
            look.pop(0)
            count += is_tick(native) and (native.offset >= tracker.high or native.offset in below)
        return count

    async def browse(self, queue: AnyQueue, limit: int, after: str | None, until: float) -> list[StoredRecord]:
        """Return up to *limit* records behind position *after*: those of the queue, then those that wait for their time."""
        waiting = waiting_for(queue)
        stored: list[StoredRecord] = []
        later = after is not None and parse_position(after, waiting.name) is not None
        if not later:
            if after is not None and parse_position(after, queue.name) is None:
                raise ConfigError(f"{after[:100]!r} is no position in {queue.name}")
            left = await self._left(queue, until)
            stored = await browse_records(
                self._cluster, queue, left.info, limit, after, left.bounds, left.undone, left.fresh, self._places, until
            )
            if len(stored) == limit:
                return stored
        found = await self._later(queue, until)
        if found is None:
            return stored
        rest = {number: undone(tracker) for number, tracker in found.trackers.items()}
        fresh = {number: tracker.high for number, tracker in found.trackers.items()}
        stored += await browse_records(
            self._cluster,
            waiting,
            found.info,
            limit - len(stored),
            after if later else None,
            found.bounds,
            rest,
            fresh,
            self._places,
            until,
            shown=queue,
        )
        return stored

    # ------------------------------------------------------------------ what goes

    async def purge(self, queue: AnyQueue, until: float) -> int:
        """Remove all that waits and return how many.

        What is in flight stays with who has it.
        """
        left, later = await asyncio.gather(self._left(queue, until), self._later(queue, until))
        count = left.waiting + await self._cut(left.info, left.bounds, until)
        if later is not None:
            ticks = await self._ticks(later, until)
            count += later.waiting + later.in_flight - ticks + await self._cut(later.info, later.bounds, until)
        return max(0, count)

    async def _cut(self, info: TopicInfo, ends: Mapping[int, tuple[int, int]], until: float) -> int:
        """Remove everything; return how many records there were by then behind the *ends*."""
        # Above the position of a share group only everything may be removed: a log that begins within a batch stalls it.
        begins = await cut(self._cluster, info, dict.fromkeys(ends, ALL), timeout=time_left(until))
        purged(self._context.readers, info.name, begins)
        return sum(max(0, begin - ends[number][1]) for number, begin in begins.items())
