"""The clock that tests drive.

Whoever needs the time asks `current()` once, when it is opened.  An event loop that keeps its own time (the virtual loop of
`brokerkit.testing`) carries its clock as the attribute ``clock``; on every other loop it is the system's.  Waiting is done
with the loop's own timers, so a virtual loop moves both together.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Two readings of the same time, in seconds."""

    def time(self) -> float:
        """Return the seconds since the Unix epoch."""
        ...

    def monotonic(self) -> float:
        """Return seconds that never go back and compare only with other readings of this clock."""
        ...


class _SystemClock:
    def __init__(self) -> None:
        self.time = time.time
        self.monotonic = time.monotonic


SYSTEM: Clock = _SystemClock()


def current() -> Clock:
    """Return the clock of the running event loop."""
    clock: Clock = getattr(asyncio.get_running_loop(), "clock", SYSTEM)
    return clock
