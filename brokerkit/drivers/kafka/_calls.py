"""Calls that wait for what they publish to be stored: their results, in order, and their deadlines."""

from __future__ import annotations

import asyncio
import itertools
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
_GRAINS: Final = 100
"""In a second: calls with a deadline in the same grain of time are kept together, and fail at its end."""
_MOST: Final = 500
"""Calls that fail in one turn of the loop: after an outage there may be very many, and others have work to do, too."""


class Calls:
    """All calls of one driver that wait."""

    def __init__(self, shown: str, expired: Callable[[], None]) -> None:
        self.problem: BrokerError | None = None
        """Why nothing was stored the last time."""
        self.closed = False
        self._shown = shown
        self._expired = expired
        """Called when entries have got their results that may wait to be sent still."""
        self._grains: dict[int, dict[AnyCall, None]] = {}
        """By when they have to be over."""
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
        self._enter(call)
        return call

    def add_one(self, record: Record, deadline: float) -> Alone | None:
        """Let *record* wait; None if that fails, as `add` tells."""
        if self.closed or self._bytes > MAX_WAITING:
            return None
        size = OVERHEAD + len(record.body or b"")
        self._bytes += size
        call = Alone(record, size, deadline, self._loop.create_future())
        self._enter(call)
        return call

    def _enter(self, call: AnyCall) -> None:
        grain = int(call.deadline * _GRAINS)
        calls = self._grains.get(grain)
        if calls is None:
            self._grains[grain] = {call: None}
            if call.deadline < self._timer_at:
                self._arm((grain + 1) / _GRAINS)
        else:
            calls[call] = None

    def _leave(self, call: AnyCall) -> None:
        self._bytes -= call.size
        grain = int(call.deadline * _GRAINS)
        calls = self._grains[grain]
        del calls[call]
        if not calls:
            del self._grains[grain]

    @property
    def waiting(self) -> list[AnyCall]:
        """All calls that are not over; some may have been cancelled."""
        return [call for calls in self._grains.values() for call in calls]

    async def idle(self) -> None:
        """Return when nobody waits."""
        while waiting := [call.future for call in self.waiting if not call.future.done()]:
            await asyncio.wait(waiting)

    def close(self) -> None:
        """Fail what waits, and what comes."""
        self.closed = True
        self.problem = Closed("the connection was closed")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        error = self._overdue()
        for call in self.waiting:
            self.fail(call.entries, error)

    # ------------------------------------------------------------------ results

    def stored(self, entries: Iterable[AnyEntry], place: str, times: Iterable[int], offset: int) -> None:
        """Give *entries* receipts: the first is at *offset*, and positions are *place*, one of *times*, and the offset."""
        for entry, ms in zip(entries, times, strict=True):
            if entry.result is None:
                receipt = Receipt(entry.record.id, f"{place}{ms}-{offset}")
                if type(entry) is Alone:
                    entry.result = receipt
                    self._leave(entry)
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
        self._leave(call)
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
        self._timer, self._timer_at = None, math.inf
        now = self._loop.time()
        error = self._overdue()
        room = _MOST
        for grain in sorted([grain for grain in self._grains if grain + 1 <= now * _GRAINS]):
            due = list(itertools.islice(self._grains[grain], room))
            for call in due:
                self.fail(call.entries, error)
            room -= len(due)
            if not room:
                break
        if room < _MOST:
            self._expired()
        if self._grains:
            self._arm((min(self._grains) + 1) / _GRAINS)

    def _overdue(self) -> BrokerError:
        """Return why a call whose time is up has failed."""
        problem = self.problem
        error = BrokerUnavailable("not stored before the deadline" + (f": {problem}" if problem else ""))
        error.__cause__ = problem.__cause__ if problem else None
        return error


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
