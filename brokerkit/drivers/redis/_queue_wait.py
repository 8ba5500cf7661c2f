"""`Waiting`: one task waits until there is a reason to look, or until its time is up."""

from __future__ import annotations

import asyncio
import math


class Waiting:
    """What a waiting `receive` is woken by."""

    __slots__ = ("_deadline", "_future", "_timer", "_timer_at", "hungry", "woken")

    def __init__(self) -> None:
        self.hungry = False
        """Whether whoever waits would take something; else it waits for room."""
        self.woken = False
        """Whether the last one that waited was woken, even if it was cancelled then."""
        self._future: asyncio.Future[None] | None = None
        self._deadline = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    @property
    def active(self) -> bool:
        """Whether somebody waits."""
        return self._future is not None

    @property
    def cancelled(self) -> bool:
        """Whether whoever waits is cancelled, and does not know it yet."""
        return self._future is not None and self._future.cancelled()

    async def until(self, deadline: float, *, hungry: bool) -> None:
        """Wait, until *deadline* at the longest."""
        loop = asyncio.get_running_loop()
        self._future = future = loop.create_future()
        self.hungry = hungry
        self._deadline = deadline
        # A timer of an earlier call stays: it finds out that it is too early.  So a busy consumer sets none.
        if deadline < self._timer_at:
            self._arm(loop, deadline)
        try:
            await future
        finally:
            self._future = None
            self.woken = not future.cancelled()

    def wake(self) -> None:
        """Let whoever waits look."""
        future = self._future
        if future is not None and not future.done():
            future.set_result(None)

    def close(self) -> None:
        """Set no more timers, and let whoever waits see that this is the end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.wake()

    def _arm(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(when, self._ring)
        self._timer_at = when

    def _ring(self) -> None:
        self._timer = None
        self._timer_at = math.inf
        if self._future is not None:
            loop = asyncio.get_running_loop()
            if loop.time() < self._deadline:
                self._arm(loop, self._deadline)
            else:
                self.wake()
