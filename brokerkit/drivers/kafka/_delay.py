"""Delays: what waits in the topic beside a queue goes on when its time has come.

Every process that consumes the queue is a member of the group that reads that topic, so each partition has one reader.  Where
a message goes follows from the name of the topic alone.  It is copied and then done: a crash in between copies it once more.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import anyio

from ...address import AnyQueue
from ...driver import Delivery, Record, Settlement, Source
from ...errors import BrokerError, DeliveryLost, NotFound, PositionLost
from ...events import PartitionPaused, PartitionResumed
from ...policy import LOG_AHEAD, Start
from ._claim import Claim, Log, lease_of
from ._consumer import LEAVING, TopicConsumer
from ._context import Context
from ._offsets import EARLIEST, offsets_at
from ._records import DELAY, DUE, Native, due, is_tick
from ._tell import Teller
from ._tiers import TIERS, tier_of, waiting_for
from ._time import SOON, ServerTime, stamped
from ._view import TopicInfo

logger = logging.getLogger("brokerkit")

SLACK: Final = 0.1
"""Seconds that are not worth a hop of their own: a message may be late by so much."""
BATCH: Final = 1000
"""Messages that go on at once."""
HELD: Final = 250
"""Messages of a partition that are kept at hand for the rest of their time, which is less than the shortest tier..."""
SMALL: Final = 4096
"""...if their bodies have no more bytes: others wait where they are consumed."""
_BRIEF: Final = 0.005
"""Seconds that are waited for by nobody."""
_WAIT: Final = 5.0
_AGAIN: Final = 0.25
"""Seconds until it is tried again to move what could not be moved; longer each time."""
_LONGEST: Final = 30.0
_MARKS: Final = 1000
_NEVER_ALONE: Final = 1 << 62


def hop(queue: AnyQueue, delivery: Delivery, now: float) -> Record:
    """Return what a message that has waited becomes: one in *queue*, or one that waits again; *now* is the broker's time."""
    record = delivery.record
    native: Any = delivery.native
    headers = record.headers
    if stamped(native):
        when = due(native)
        rest = 0.0 if when is None else _up(when - now)
        headers = headers if when is None else ((DUE, b"%d" % math.ceil(when * 1000)), *headers)
    else:
        delay = _delay_of(native)
        rest = _up(delay - _tier(lease_of(delivery).claim.number, delay))
    if rest + SLACK < TIERS[0]:
        return _copy(record, queue, record.headers, max(0.0, rest))
    return _copy(record, waiting_for(queue), headers, max(rest, TIERS[tier_of(rest + SLACK)]))


def _copy(record: Record, address: AnyQueue, headers: tuple[tuple[str, bytes], ...], delay: float) -> Record:
    return Record(
        address,
        record.id,
        record.body,
        record.key,
        headers,
        record.timestamp,
        delay=delay,
        expires=record.expires,
        attempts=record.attempts,
        deliveries=record.deliveries,
    )


def _up(seconds: float) -> float:
    """Return *seconds* in whole milliseconds, as they are stored, and never less."""
    return math.ceil(seconds * 1000) / 1000


def _tier(number: int, delay: float) -> float:
    """Return how long a message of *delay* waits in partition *number*."""
    return min(TIERS[number] if number < len(TIERS) else TIERS[0], delay)


def _delay_of(native: Native) -> float:
    """Return the seconds that *native* itself names."""
    for name, value in native.headers:
        if name == DELAY:
            try:
                delay = float(value or b"0")
            except ValueError:
                break
            return delay if 0 < delay < math.inf else 0.0
    return 0.0


class Waiting(Claim):
    """A partition in which all wait equally long: nothing is looked at behind what is not due."""

    __slots__ = ("end_of", "marks", "time", "until")

    def __init__(
        self,
        address: AnyQueue,
        number: int,
        base: int,
        note: str,
        time: ServerTime,
        end_of: Callable[[int], int | None],
    ) -> None:
        super().__init__(address, number, base, note, time, asyncio.get_running_loop().time)
        self.time = time
        self.end_of = end_of
        self.lone = _NEVER_ALONE
        self.until = -math.inf
        """Until when its head waits at least, by the loop's clock."""
        self.marks: deque[tuple[int, float]] = deque()
        """Where the log ended, and when that was seen: how long something is there whose time is not the broker's."""

    @property
    def soon(self) -> float:
        """When something may be due."""
        return min(super().soon, self.until if self.stash else math.inf)

    def _left(self, native: Native) -> float:
        """Return in how many seconds to ask again whether *native* goes on; 0 if it does."""
        if stamped(native):
            self.time.observe(native.timestamp)
            when = due(native)
            if when is None:
                return 0.0
            return self.time.until(min(when, native.timestamp / 1000 + _tier(self.number, math.inf)))
        wait = _tier(self.number, _delay_of(native))
        return max(0.0, self._since(native.offset) + wait - self.now())

    def _rest(self, native: Native) -> float:
        """Return in how many seconds to ask again whether *native*, which has waited here, is due; 0 if that is for others."""
        when = due(native) if stamped(native) else None
        if when is None or not _BRIEF < when - self.time.now() < TIERS[0] - SLACK:
            return 0.0
        return self.time.until(when)

    def _since(self, offset: int) -> float:
        """Return a time, by the loop's clock, at which *offset* was there."""
        self._mark(offset + 1)
        marks = self.marks
        while marks[0][0] <= offset:
            marks.popleft()
        return marks[0][1]

    def _mark(self, end: int) -> None:
        """Remember how far the log goes by now: to *end* at least."""
        marks = self.marks
        end = max(self.end_of(self.number) or 0, end)
        if not marks or end > marks[-1][0]:
            marks.append((end, self.now()))
        if len(marks) > _MARKS:  # fewer are less exact, and nothing is early for that
            self.marks = deque(list(marks)[1::2])

    def _ask(self, offset: int, seen: float) -> None:
        native: Any = self.back[offset].native
        left = self._left(native) or self._rest(native)
        if left > 0:
            heapq.heappush(self.later, (self.now() + left, offset, seen))
        else:
            heapq.heappush(self.order, offset)

    def _go_on(self, log: Log, most: int, held: dict[object, Delivery], out: deque[Delivery]) -> None:
        """Hand out what is due."""
        tracker = self.tracker
        if self.marks:
            self._mark(0)
        while most > 0 and not (self.stash and self.now() < self.until):
            count = min(most, tracker.base + LOG_AHEAD - tracker.high)
            if count <= 0:
                self._stand(tracker.high)
                return
            natives = self._take(log, count)
            if not natives:
                self._jump(log.next_offset(self.number))
                return
            before = len(out)
            for place, native in enumerate(natives):
                if not self._next(native, held, out):
                    self._put_back(natives[place:])
                    return
            most -= len(out) - before

    def _next(self, native: Native, held: dict[object, Delivery], out: deque[Delivery]) -> bool:
        """Hand out *native*; return whether that is done."""
        offset, tracker = native.offset, self.tracker
        if offset < tracker.high:
            return True  # read again for the sake of one before it
        self._jump(offset)
        if tracker.high < offset:
            self._stand(offset)
            return False
        if is_tick(native):
            self._vanished(offset)
            return True
        if left := self._left(native):
            self.until = self.now() + left
            return False
        if len(self.later) < HELD and len(native.value or b"") <= SMALL and (rest := self._rest(native)):
            tracker.hand_out(offset)
            tracker.release(offset)
            self._keep(native)
            heapq.heappush(self.later, (self.now() + rest, offset, 0.0))
        else:
            self._run((native,), held, out)
        return True


class DelayReader(TopicConsumer):
    """Reads what waits for a queue.  What of it stands or goes on concerns nobody."""

    def __init__(self, context: Context, queue: AnyQueue, forwarder: Forwarder) -> None:
        address = waiting_for(queue)
        super().__init__(context, address, Source(address), BATCH, forwarder.let_go)

    def _make(self, number: int, base: int, note: str, end: int | None) -> Claim:
        assert self._fetcher is not None
        address: Any = self._address
        return Waiting(address, number, base, note, self._context.time, self._fetcher.end)

    async def _store_start(self, group: str, info: TopicInfo, start: Start) -> None:
        """Store nothing: without a position it begins where the log does, and one that came late would set the group back."""

    def _tell_of(self, make: type[PartitionPaused | PartitionResumed], claim: Claim) -> None:
        """Tell nobody."""


class Forwarder:
    """Moves on what waits for one queue, while this process consumes it."""

    def __init__(self, context: Context, queue: AnyQueue) -> None:
        self._context = context
        self._queue = queue
        self._teller = Teller(context.emit, queue.name, "delay")
        self._left: list[Delivery] = []
        """What could not be moved."""
        self._again = 0.0
        """When to try it again, by the loop's clock."""
        self._failures = 0
        self._sending = anyio.CancelScope()
        """What is under way."""

    def __repr__(self) -> str:
        return f"<Forwarder {self._queue.name}>"

    @property
    def problem(self) -> BrokerError | None:
        """Why delayed messages do not go on, if that is so."""
        return self._teller.problem

    async def let_go(self, deliveries: Sequence[Delivery]) -> None:
        """Have nothing to do with *deliveries* any more: others have them."""
        gone = {delivery.token for delivery in deliveries}
        self._left = [delivery for delivery in self._left if delivery.token not in gone]

    def hurry(self) -> None:
        """Be done soon with what is under way: nothing else is begun."""
        self._sending.deadline = asyncio.get_running_loop().time() + LEAVING / 2

    async def run(self) -> None:
        """Move messages on until cancelled."""
        failures = 0
        while True:
            try:
                async with DelayReader(self._context, self._queue, self) as reader:
                    failures = 0
                    await self._move(reader)
            except NotFound:
                pass  # it was deleted; there may be another one some day
            except BrokerError as error:
                self._teller.failed(error)
            except Exception as error:
                logger.exception("%r has broken", self)
                self._teller.failed(BrokerError(f"the driver failed: {type(error).__name__}"))
            self._left.clear()
            await anyio.sleep(min(_LONGEST, _AGAIN * 2.0**failures))
            failures = min(failures + 1, 10)

    async def _move(self, reader: DelayReader) -> None:
        now = asyncio.get_running_loop().time
        while True:
            wait = max(SOON, min(_WAIT, self._again - now())) if self._left else _WAIT
            try:
                got = list(await reader.receive(BATCH, wait))
            except PositionLost as error:
                logger.info("%r: %s", self, error)  # they were purged
                continue
            if self._left and now() >= self._again:
                got, self._left = self._left + got, []
            if got:
                await self._move_some(reader, got)

    async def _move_some(self, reader: DelayReader, deliveries: Sequence[Delivery]) -> None:
        """Move *deliveries* on, and keep those that could not be moved."""
        try:
            starts = await self._starts(deliveries)
            time = self._context.time.now()
            items = [
                Settlement(delivery, (hop(self._queue, delivery, time),) if _there(delivery, starts) else ())
                for delivery in deliveries
            ]
            results: Sequence[BrokerError | None] = ()
            # What was sent is stored, whoever stops: cut off here, it would come once more.
            with anyio.CancelScope(shield=True) as self._sending:
                results = await reader.settle(items)
            if len(results) < len(items):
                return
        except NotFound:
            raise  # so does the reader, or will
        except BrokerError as error:
            results = [error] * len(deliveries)
        failure: BrokerError | None = None
        for delivery, result in zip(deliveries, results, strict=True):
            if result is not None and not isinstance(result, DeliveryLost):
                failure = failure or result
                self._left.append(delivery)
        if failure is not None:
            self._failures = min(self._failures + 1, 10)
            self._again = asyncio.get_running_loop().time() + min(_LONGEST, _AGAIN * 2.0**self._failures)
            self._teller.failed(failure)
        elif not self._left:
            self._failures = 0
            self._teller.works()

    async def _starts(self, deliveries: Sequence[Delivery]) -> dict[int, int]:
        """Return where the logs begin: what lies before that was purged, and we may have had it at hand."""
        context = self._context
        timeout = context.settings.timeout
        info = await context.cluster.topic(waiting_for(self._queue).name, timeout=timeout)
        wanted = dict.fromkeys({lease_of(delivery).claim.number for delivery in deliveries}, EARLIEST)
        found = await offsets_at(context.cluster, info, wanted, timeout=timeout)
        return {number: offset for number, (offset, _) in found.items()}


def _there(delivery: Delivery, starts: dict[int, int]) -> bool:
    lease = lease_of(delivery)
    return lease.offset >= starts.get(lease.claim.number, 0)
