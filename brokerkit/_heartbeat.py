"""Notices a handler that blocks the event loop, and names it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from . import events
from .clock import SYSTEM, Clock
from .events import Listener

logger = logging.getLogger("brokerkit")

BLOCKED = 1.0
"""Seconds without the loop that are worth a warning."""
_BEAT = 0.2


class Heartbeat:
    """A timer that beats while handlers run; a late beat means that one of them kept the loop to itself."""

    def __init__(
        self, service: str, clock: Clock, emit: Listener | None, suspects: Callable[[float], Iterable[str]]
    ) -> None:
        self.armed = clock is not SYSTEM  # virtual time stands while code runs: it cannot be late
        self._service = service
        self._clock = clock
        self._emit = emit
        self._suspects = suspects
        self._due = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def arm(self) -> None:
        """Beat until no handler has run since the last beat."""
        self.armed = True
        self._due = self._clock.monotonic() + _BEAT
        self._handle = asyncio.get_running_loop().call_later(_BEAT, self._beat)

    def _beat(self) -> None:
        since = self._due - _BEAT
        blocked = self._clock.monotonic() - self._due + _BEAT
        names = sorted(set(self._suspects(since)))
        if blocked >= BLOCKED:
            name = " or ".join(names) or "something outside its handlers"
            logger.warning(
                "%s: %s blocked the event loop for %.1f s; nothing else ran meanwhile", self._service, name, blocked
            )
            if self._emit is not None:
                self._emit(events.LoopBlocked(address=self._service, handler=name, seconds=blocked))
        if names:
            self.arm()
        else:
            self.armed = False

    def close(self) -> None:
        """Beat no more."""
        if self._handle is not None:
            self._handle.cancel()
