"""Reading partitions: a request waits at each broker that leads some, and what comes is kept until it is taken.

A broker is asked for those partitions only of which little is at hand, so a reader that takes nothing is sent nothing, and
keeps nobody waiting.  One request is under way on each *lane*.  A broker has two: on the first a request waits for as long
as nothing comes; the second is for partitions that come to be asked for in the meantime.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import anyio
from anyio.abc import TaskGroup
from kio.schema.errors import ErrorCode

from ...errors import AuthenticationError, BrokerError, ConfigError, NotFound
from ._ask import Fetch
from ._cluster import PAUSE, Cluster, again
from ._errors import DENIED, RETRY, STALE_LEADER, Unanswered, of_code
from ._offsets import EARLIEST, LATEST, UNCOMMITTED, offsets_at
from ._part import Part
from ._records import Native
from ._view import TopicInfo

logger = logging.getLogger("brokerkit")

PARTITION: Final = 1024 * 1024
"""Bytes that are asked for of one partition, when half as many or more of an earlier answer have been taken; a single batch
may be larger."""
ANSWER: Final = 4 * PARTITION
"""Bytes of one answer: while it is taken in, some milliseconds, nothing else runs."""
HELD: Final = 64 * PARTITION
"""Bytes that many partitions share: each is asked for less."""
LEAST: Final = 64 * 1024
"""What is asked for at least of a partition, and in one answer of a broker that is slow."""
LONGEST: Final = 2.0
"""Seconds that a request waits at the broker at most, where nothing has come for long: what comes is answered at once."""
BRIEF: Final = 0.05
"""Seconds that a request waits at the broker while others may have to follow it."""
MARGIN: Final = 3.0
"""Seconds behind its wait until a request counts as lost; more after each one that was."""
_LONGEST: Final = 30.0
"""The most that this becomes."""
_REFUSED: Final = 1.0
"""Seconds until a partition is asked for again that may not be read, or that fails for a reason nobody knows."""
_THROTTLED: Final = 60.0
"""The longest pause that a broker's quota is believed to want."""
_LOOKS: Final = 0.25
"""Seconds between looks for the leader of a partition that has none."""
_ABSENT: Final = 1.0
"""Seconds until it is believed that a topic has gone, or may not be seen any more."""


class FetchTold(Protocol):
    """Who is told of what comes; all of it is called between two steps of the event loop and must not wait."""

    def arrived(self) -> None:
        """There is something to take, or a log goes on further than was known."""
        ...

    def overtaken(self, partition: int, at: int, start: int) -> None:
        """The records from *at* up to *start* were removed before they were read.  It goes on at *start*."""
        ...

    def truncated(self, partition: int, at: int, to: int) -> None:
        """The log has lost its end, which had been read up to *at*.  It goes on at *to*, with records of other content."""
        ...

    def fail(self, error: BrokerError) -> None:
        """Nothing comes of some partition any more: the topic is gone, may not be read, or is damaged."""
        ...


class Fetcher:
    """What is in the log of one topic, partition by partition."""

    def __init__(self, cluster: Cluster, topic: str, told: FetchTold, *, wait: float = 0.5) -> None:
        self._cluster = cluster
        self._topic = topic
        self._told = told
        self.wait = wait
        self._parts: dict[int, Part] = {}
        """In the order in which they are asked for: only the first of an answer may be larger than it was to be."""
        self._ready: dict[int, None] = {}
        self._share = PARTITION
        self._info: TopicInfo | None = None
        self._id: uuid.UUID | None = None
        self._lanes: dict[int, tuple[_Lane, _Lane]] = {}
        self._tasks: TaskGroup | None = None
        self._changed = asyncio.Event()
        self._gone = False
        self.purged: Callable[[int, int], None] | None = None
        """Told of each partition that begins later than before, where what is at hand counts for nothing then: see `skip`."""

    def __repr__(self) -> str:
        return f"<Fetcher {self._topic} partitions={sorted(self._parts)} ready={sorted(self._ready)}>"

    # ------------------------------------------------------------------ what is read

    def begin(self, partition: int, offset: int) -> None:
        """Read *partition* from *offset* on; what was read of it before is forgotten."""
        self.stop(partition)
        part = self._parts[partition] = Part(self._topic, partition, offset)
        self._share = min(PARTITION, max(LEAST, HELD // len(self._parts)))
        self._place(part)

    def stop(self, partition: int) -> None:
        """Do not read *partition* any more."""
        self._parts.pop(partition, None)
        self._ready.pop(partition, None)

    def ready(self) -> Sequence[int]:
        """Return the partitions of which something can be taken, first the one from which nothing was taken for longest."""
        return list(self._ready)

    def next_offset(self, partition: int) -> int:
        """Return where the log of *partition* goes on behind what was taken."""
        return self._parts[partition].next

    def end(self, partition: int) -> int | None:
        """Return where *partition* ended for readers when the broker last said so."""
        part = self._parts.get(partition)
        return None if part is None else part.end

    def take(self, partition: int, most: int) -> list[Native]:
        """Return up to *most* records of *partition*, in order, and go on behind them."""
        part = self._parts.get(partition)
        if part is None or self._ready.pop(partition, self) is self:
            return []
        taken = part.take(most)
        if part.ready:
            self._ready[partition] = None
        if part.asked is None and part.at_hand <= self._share >> 1:
            self._wake(part.node)
        if part.broken is not None:
            self._told.fail(part.broken)
        return taken

    def skip(self, partition: int, start: int) -> int:
        """Go on at *start*, if that is further on than what was taken; return where that was."""
        part = self._parts[partition]
        at = part.next
        if at < start:
            part.asked = None  # what is on its way was removed
            part.go(start)
            self._ready.pop(partition, None)
            self._wake(part.node)
        return at

    # ------------------------------------------------------------------ where to read

    async def run(self) -> None:
        """Read until cancelled."""
        self._cluster.watch(self._topic)
        self._cluster.watchers.add(self._look)
        try:
            async with anyio.create_task_group() as self._tasks:
                self._look()
                await self._find_leaders()
        finally:
            self._tasks = None
            self._cluster.watchers.discard(self._look)
            self._cluster.unwatch(self._topic)
            for lanes in self._lanes.values():
                for lane in lanes:
                    self._cluster.drop(lane)
            self._lanes.clear()

    async def _find_leaders(self) -> None:
        """Have the cluster looked at for as long as a partition has no leader, and tell if the topic is gone."""
        loop = asyncio.get_running_loop()
        while True:
            await self._changed.wait()
            self._changed.clear()
            since = loop.time()
            while not self._gone and any(part.node < 0 for part in self._parts.values()):
                trouble = self._cluster.trouble(self._topic) if self._info is None else None
                if trouble is None:
                    since = loop.time()
                elif loop.time() >= since + _ABSENT:  # a broker that has just started may not know it yet
                    since = loop.time()
                    self._gone = isinstance(trouble, NotFound)
                    self._told.fail(again(trouble))
                self._cluster.stale()
                await asyncio.sleep(_LOOKS)

    def _look(self) -> None:
        """Take in what is known of the topic by now."""
        info = self._cluster.known(self._topic)
        if info is not None and not self._gone:
            if self._id is not None and self._id != info.id:
                self._gone = True
                self._told.fail(NotFound(f"topic {self._topic} was deleted and made again"))
            self._id = info.id
        if self._gone:
            return
        self._info = info
        for part in self._parts.values():
            self._place(part)

    def _place(self, part: Part) -> None:
        """Have *part* read from its leader."""
        info = self._info
        node = -1 if info is None else info.leader(part.index)
        if node != part.node:
            part.node = node
            part.asked = None  # what another broker may still answer is not waited for
            part.until = -math.inf
        if node < 0:
            self._changed.set()
            return
        tasks = self._tasks
        if tasks is None:
            return
        if node not in self._lanes:
            first = _Lane(self, node, None)
            self._lanes[node] = (first, _Lane(self, node, first))
            for lane in self._lanes[node]:
                tasks.start_soon(lane.run)
        self._wake(node)

    def _wake(self, node: int) -> None:
        for lane in self._lanes.get(node, ()):
            lane.wake()

    def wanted(self, node: int, first: _Lane | None, now: float) -> tuple[list[Part], bool, float]:
        """Return the partitions to ask *node* for, whether these are all that it leads, and when there may be others.

        With *first*, the broker's first lane, these are those that should not have to wait for it.
        """
        parts: list[Part] = []
        every = True
        soon = math.inf
        if self._gone or self._info is None:
            return parts, every, soon
        for part in self._parts.values():
            if part.node != node or part.broken is not None:
                continue
            if part.asked is not None or part.at_hand > self._share >> 1:
                every = False
            elif part.until > now:
                every = False
                soon = min(soon, part.until)
            elif first is None or first.waits or (first.busy and part.busy):
                parts.append(part)
        return parts, every, soon

    # ------------------------------------------------------------------ one request

    async def ask(self, lane: _Lane, parts: Sequence[Part], wait: float) -> tuple[bool, float]:
        """Ask for *parts* and take in the answer; return whether it said anything, and how long to ask for nothing."""
        info = self._info
        assert info is not None
        share, places = self._share, info.partitions
        request = Fetch(
            info.id,
            [(part.index, places[part.index].epoch, part.fetch, part.epoch, share) for part in parts],
            wait=wait,
            most=lane.most,
        )
        token = object()
        for part in parts:
            part.asked = token
        try:
            wire = self._cluster.wire(lane.node, lane)
            if wire is None:
                wire = await self._cluster.open(lane.node, lane, timeout=self._cluster.settings.connect_timeout)
            answer = await wire.send(request, wait + lane.margin)
            return self._take_in(answer, token), answer.throttle_time.total_seconds()
        finally:
            for part in parts:
                if part.asked is token:
                    part.asked = None

    def _take_in(self, answer: Any, token: object) -> bool:
        if answer.error_code is not ErrorCode.none:
            raise of_code(int(answer.error_code), f"READ on topic {self._topic}")
        found = arrived = False
        now = asyncio.get_running_loop().time()
        for topic in answer.responses:
            for data in topic.partitions:
                index = int(data.partition_index)
                part = self._parts.get(index)
                if part is None or part.asked is not token:
                    continue
                part.asked = None
                if data.error_code is not ErrorCode.none:
                    found = True
                    self._failed(part, data.error_code, now)
                elif data.diverging_epoch.epoch >= 0 or data.diverging_epoch.end_offset >= 0:
                    found = arrived = True
                    self._cut(part, int(data.diverging_epoch.end_offset), int(data.log_start_offset))
                else:
                    stable = int(data.last_stable_offset)
                    first, moved = part.end is None, stable != part.end
                    part.end = stable
                    part.busy = bool(data.records)
                    if self.purged is not None and data.log_start_offset > part.start:
                        part.start = int(data.log_start_offset)
                        self.purged(index, part.start)
                    if data.records:
                        found = arrived = True
                        self._keep(part, data.records, data.aborted_transactions)
                    elif moved:
                        found, arrived = found or first, True
        if arrived:
            self._told.arrived()
        return found

    def _keep(self, part: Part, data: bytes, aborted: Any) -> None:
        """Keep what came, and ask for this partition behind all others next time."""
        part.keep(data, aborted)
        index = part.index
        if part.ready:
            self._ready.setdefault(index)
        self._parts[index] = self._parts.pop(index)
        if part.broken is not None:
            self._told.fail(part.broken)

    # ------------------------------------------------------------------ what goes wrong

    def _failed(self, part: Part, code: ErrorCode, now: float) -> None:
        part.until = now + PAUSE
        if code is ErrorCode.offset_out_of_range:
            if part.ready:
                part.until = now + 4 * PAUSE  # first what is at hand
            elif self._tasks is not None:
                part.asked = self
                self._tasks.start_soon(self._find_place, part)
        elif code in STALE_LEADER:
            self._cluster.stale()
        elif code in DENIED:
            part.until = now + _REFUSED
            self._told.fail(of_code(int(code), f"READ on topic {self._topic}"))
        elif code in RETRY and code is not ErrorCode.corrupt_message:
            self._cluster.stale()
        else:
            part.until = now + _REFUSED
            error = of_code(int(code), f"{self._topic}[{part.index}] at offset {part.fetch}")
            logger.error("%s", error)
            self._told.fail(error)

    async def _find_place(self, part: Part) -> None:
        """Find out where to go on in a log that does not have what is asked for."""
        index, info = part.index, self._info
        try:
            if info is None:
                return
            timeout = self._cluster.settings.timeout
            ((start, _),) = (await offsets_at(self._cluster, info, {index: EARLIEST}, timeout=timeout)).values()
            ((end, _),) = (
                await offsets_at(self._cluster, info, {index: LATEST}, timeout=timeout, isolation=UNCOMMITTED)
            ).values()
        except Exception as error:
            logger.warning("%s[%s] at offset %s: %s", self._topic, index, part.fetch, error)
            part.until = asyncio.get_running_loop().time() + 4 * PAUSE
        else:
            if self._parts.get(index) is part and part.asked is self:
                self._move(part, start, end)
        finally:
            if part.asked is self:
                part.asked = None
            self._wake(part.node)

    def _move(self, part: Part, start: int, end: int) -> None:
        at = part.next
        part.epoch = -1
        if at < start:
            part.go(start)
            self._told.overtaken(part.index, at, start)
        elif at > end:
            part.go(start)
            logger.error("%s[%s] ends at %s, but was read up to %s", self._topic, part.index, end, at)
            self._told.truncated(part.index, at, start)
        self._told.arrived()

    def _cut(self, part: Part, end: int, start: int) -> None:
        """Go on where the log has become another one: at *end*, if that is known."""
        to = max(end, start) if end >= 0 else max(start, 0)
        at = part.next
        self._ready.pop(part.index, None)
        part.go(min(at, to))
        if to < at:
            logger.error("%s[%s] was cut at %s, but was read up to %s", self._topic, part.index, to, at)
            self._told.truncated(part.index, at, to)

    def note(self, error: Exception) -> None:
        """Do what is to be done about a lane that gets no answer."""
        if isinstance(error, (AuthenticationError, ConfigError)):
            self._told.fail(error)
        self._cluster.stale()


class _Lane:
    """One request after the other to one broker."""

    def __init__(self, fetcher: Fetcher, node: int, first: _Lane | None) -> None:
        self._fetcher = fetcher
        self._first = first
        self._waiter: asyncio.Future[None] | None = None
        self._said = ""
        self.node = node
        self.busy = False
        """Whether a request is under way."""
        self.waits = False
        """Whether that may wait for long."""
        self.most = ANSWER
        """Bytes of an answer: less where these take too long."""
        self.margin = MARGIN
        self._wait = fetcher.wait
        """Seconds that a request waits for something to come: more while nothing does."""

    def __repr__(self) -> str:
        return f"<Lane {'1' if self._first is None else '2'} to broker {self.node} of {self._fetcher!r}>"

    def wake(self) -> None:
        """Look again for something to ask for."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def run(self) -> None:
        """Ask until cancelled."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            parts, every, soon = self._fetcher.wanted(self.node, self._first, loop.time())
            if not parts:
                await self._rest(soon)
                continue
            # Whoever enters waits for the first answers: those say at once where everything ends.
            wait = 0.0 if any(part.end is None for part in parts) else self._wait
            try:
                pause = await self._ask(parts, wait if every and self._first is None else min(wait, BRIEF))
            except Exception as error:
                failures += 1
                self._note(error)
                self._wait = self._fetcher.wait
                pause = min(_REFUSED, PAUSE * 2 ** min(failures - 1, 8))
            else:
                failures = 0
                self._said = ""
            await asyncio.sleep(pause)  # also for no time at all: whoever was told comes first

    async def _rest(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_at(until, self.wake) if until < math.inf else None
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    async def _ask(self, parts: Sequence[Part], wait: float) -> float:
        """Ask once, and return how long to pause."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        self.busy = True
        self.waits = wait > BRIEF
        try:
            found, throttled = await self._fetcher.ask(self, parts, wait)
        except Unanswered:
            # A broker that does nothing looks like one that is slow: the next answer may be smaller, and take longer.
            self.most = max(LEAST, self.most // 4)
            self.margin = min(_LONGEST, self.margin * 2)
            raise
        finally:
            self.busy = self.waits = False
        self.most = min(ANSWER, self.most * 2)
        self.margin = max(MARGIN, self.margin / 2)
        if throttled > 0:
            return min(throttled, _THROTTLED)
        if found or not wait or loop.time() < begun + wait / 2:
            return 0 if found else PAUSE
        if wait == self._wait:
            self._wait = max(wait, min(LONGEST, 2 * wait))
        return 0

    def _note(self, error: Exception) -> None:
        self._fetcher.note(error)
        said = f"{type(error).__name__}: {error}"
        if said != self._said:
            self._said = said
            unexpected = not isinstance(error, BrokerError)
            logger.warning("%r: %s", self, said, exc_info=error if unexpected else None)
