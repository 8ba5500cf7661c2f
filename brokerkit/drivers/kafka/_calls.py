"""Calls that wait for what they publish to be stored: their results, in order, and their deadlines."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from ...address import Topic
from ...driver import Receipt, Record
from ...errors import BrokerError, BrokerUnavailable, BufferFull, Closed, NotAttempted, PublishUnknown
from ._batch import OVERHEAD, Alone, AnyCall, AnyEntry, Call, Result
from ._cluster import again

MAX_WAITING: Final = 64 * 1024 * 1024
"""Bytes that may wait to be stored."""
_GRAIN: Final = 0.005
"""Seconds between two looks at deadlines, at least."""


class Calls:
    """All calls of one driver that wait."""

    def __init__(self, shown: str, expired: Callable[[], None]) -> None:
        self.problem: BrokerError | None = None
        """Why nothing was stored the last time."""
        self.closed = False
        self._shown = shown
        self._expired = expired
        """Called when entries have got their results that may wait to be sent still."""
        self._calls: dict[AnyCall, None] = {}
        self._bytes = 0
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def add(self, records: Sequence[Record], deadline: float) -> Call:
        """Let *records* wait; the call is over at once if there is no room for them."""
        future: asyncio.Future[list[Result]] = self._loop.create_future()
        if self.closed:
            future.set_result(failures(records, Closed("the connection was closed")))
            return Call((), 0, deadline, future)
        if self._bytes > MAX_WAITING:
            text = f"{self._bytes} bytes wait to be published on {self._shown} already"
            future.set_result(failures(records, BufferFull(text)))
            return Call((), 0, deadline, future)
        size = OVERHEAD * len(records)
        for record in records:
            if record.body is not None:
                size += len(record.body)
        self._bytes += size
        call = Call(records, size, deadline, future)
        self._calls[call] = None
        if deadline < self._timer_at:
            self._arm(deadline)
        return call

    def add_one(self, record: Record, deadline: float) -> Alone | None:
        """Let *record* wait; None if that fails, as `add` tells."""
        if self.closed or self._bytes > MAX_WAITING:
            return None
        size = OVERHEAD + len(record.body or b"")
        self._bytes += size
        call = Alone(record, size, deadline, self._loop.create_future())
        self._calls[call] = None
        if deadline < self._timer_at:
            self._arm(deadline)
        return call

    async def idle(self) -> None:
        """Return when nobody waits."""
        while waiting := [call.future for call in self._calls if not call.future.done()]:
            await asyncio.wait(waiting)

    def close(self) -> None:
        """Fail what waits, and what comes."""
        self.closed = True
        self.problem = Closed("the connection was closed")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for call in list(self._calls):
            self._expire(call)

    # ------------------------------------------------------------------ results

    def stored(self, entries: Iterable[AnyEntry], place: str, times: Iterable[int], offset: int) -> None:
        """Give *entries* receipts: the first is at *offset*, and positions are *place*, one of *times*, and the offset."""
        for entry, ms in zip(entries, times, strict=True):
            if entry.result is None:
                receipt = Receipt(entry.record.id, f"{place}{ms}-{offset}")
                if type(entry) is Alone:
                    entry.result = receipt
                    del self._calls[entry]
                    self._bytes -= entry.size
                    if not entry.future.done():
                        entry.future.set_result([receipt])
                else:
                    self.put(entry, receipt)
            offset += 1

    def put(self, entry: AnyEntry, result: Result) -> None:
        """Give *entry* its result."""
        if entry.result is not None:
            return
        entry.result = result
        call = entry.call
        if isinstance(call, Call):
            call.left -= 1
            if call.left:
                return
        del self._calls[call]
        self._bytes -= call.size
        if not call.future.done():
            call.future.set_result([entry.result for entry in call.entries if entry.result is not None])
        if isinstance(call, Call):
            call.entries = ()  # they know their call: only the garbage collector would free them

    def drop(self, entry: AnyEntry) -> None:
        """Nobody waits for *entry*."""
        self.put(entry, NotAttempted("nobody waits for it"))

    def fail(self, entries: Iterable[AnyEntry], error: BrokerError) -> None:
        """Let *entries*, in order, fail, and of their calls what would overtake one of them."""
        failed: dict[AnyCall, tuple[BrokerError, set[bytes]]] = {}
        for entry in entries:
            if entry.result is not None:
                continue
            call, key = entry.call, entry.record.key
            if call not in failed:
                failed[call] = again(error), set()  # each call may raise its own
            own, keys = failed[call]
            if entry.doubtful:
                self.put(entry, _unknown(own))
            elif key in keys:
                self.put(entry, overtakes(entry.record))
            else:
                self.put(entry, own)
            if key is not None:
                keys.add(key)
        for call, (_, keys) in failed.items():
            if keys and call.left:
                for other in call.entries:
                    if other.result is None and other.record.key in keys and not other.doubtful:
                        self.put(other, overtakes(other.record))

    # ------------------------------------------------------------------ deadlines

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._late)
        self._timer_at = when

    def _late(self) -> None:
        """Fail what is over its deadline, and set the timer for what is next."""
        now = self._loop.time()
        self._timer, self._timer_at = None, math.inf
        nearest = math.inf
        expired = False
        for call in list(self._calls):
            if now < call.deadline:
                nearest = min(nearest, call.deadline)
            else:
                expired = True
                self._expire(call)
        if expired:
            self._expired()
        if nearest < math.inf:
            self._arm(max(nearest, now + _GRAIN))

    def _expire(self, call: AnyCall) -> None:
        """The time of *call* is up."""
        error = BrokerUnavailable("not stored before the deadline" + (f": {self.problem}" if self.problem else ""))
        error.__cause__ = self.problem.__cause__ if self.problem else None
        self.fail(call.entries, error)


def _unknown(error: BrokerError) -> PublishUnknown:
    """Return *error* as it is for a record that may be stored."""
    if isinstance(error, PublishUnknown):
        return error
    unknown = PublishUnknown(f"it may be stored: {error}")
    unknown.__cause__ = error.__cause__
    return unknown


def failures(records: Sequence[Record], error: BrokerError) -> list[Result]:
    """Return *error* for each record, but `NotAttempted` for those that would overtake a failed one of their key."""
    results: list[Result] = []
    failed: set[bytes] = set()
    for record in records:
        if record.key is not None and isinstance(record.address, Topic):
            if record.key in failed:
                results.append(overtakes(record))
                continue
            failed.add(record.key)
        results.append(error)
    return results


def overtakes(record: Record) -> NotAttempted:
    """Return why *record* is not sent."""
    return NotAttempted(f"an earlier message of the key {record.key!r} was not stored")
