"""The time of a server, and what it has to do later: one timer of the event loop for all of it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable

from ... import clock


class Timers:
    """A clock that goes on while the server lives, whatever event loop it is used in, and never goes back."""

    def __init__(self) -> None:
        self.clock: clock.Clock = clock.SYSTEM
        """That of the event loop."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._began = 0.0
        self._offset = 0.0
        self._shift = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._handle: asyncio.TimerHandle | None = None
        self._armed = 0.0

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Use the clock and the timers of *loop* from now on.  The time while nothing was bound has passed."""
        new: clock.Clock = getattr(loop, "clock", clock.SYSTEM)
        if self._loop is None or new is not self.clock:
            # Two clocks have nothing in common but the time of day.
            wall = new.time()
            passed, epoch = (0.0, wall) if self._loop is None else (self.now(), self.epoch())
            self._offset = passed + max(0.0, wall - epoch)
            self._shift = max(wall, epoch) - self._offset
            self._began = new.monotonic()
        self.unbind()
        self._loop = loop
        self.clock = new
        self._arm()

    def unbind(self) -> None:
        """Stop waiting, because the loop ends; what is due later stays due."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def now(self) -> float:
        """Return the seconds that this server has lived: for delays and leases.  The wall clock does not move it."""
        return self._offset + self.clock.monotonic() - self._began

    def epoch(self) -> float:
        """Return `now` as seconds since the Unix epoch: for points in time that travel with records."""
        return self.now() + self._shift

    def at(self, when: float, callback: Callable[[], None]) -> None:
        """Call *callback* when `now` has reached *when*, never before."""
        heapq.heappush(self._heap, (when, next(self._numbers), callback))
        if self._handle is None or when < self._armed:
            self._arm()

    def _arm(self, least: float = 0.0) -> None:
        self.unbind()
        if self._heap and self._loop is not None and not self._loop.is_closed():
            self._armed = self._heap[0][0]
            self._handle = self._loop.call_later(max(self._armed - self.now(), least), self._fire)

    def _fire(self) -> None:
        self._handle = None
        heap, now = self._heap, self.now()
        early = bool(heap) and heap[0][0] > now  # loops round their timers
        try:
            while heap and heap[0][0] <= now:
                heapq.heappop(heap)[2]()
        finally:
            self._arm(0.001 if early else 0.0)
