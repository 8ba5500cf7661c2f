"""What time it is by the broker's clock, as far as that is certain.

A broker tells its time with whatever it stores: it stamps records as they are appended, and answers with the stamp.  So a
stamp that was seen is a time that the broker's clock had reached by then.  What is told here is never ahead of that clock,
however wrong our own is; it is up to date after a *tick*, a record that is written to be stamped.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final

from ... import clock
from ._records import Native, due

EXPIRED: Final = -1.0
"""What `ServerTime.wait` says of a record whose time to live is over."""
DRIFT: Final = 0.0005
"""How much faster our clock may run than the broker's, which may be slewed."""
KEPT: Final = 60.0
"""Seconds for which a tick counts."""
QUICK: Final = 1.0
"""Seconds within which a tick must be answered to tell the time closely."""
SOON: Final = 0.05
"""Seconds until it is asked again what a tick has said."""
_LONG: Final = 30.0
"""The longest time after which it is asked again: clocks may be set meanwhile."""
_WRONG: Final = 120.0
"""How far ahead of the broker's our wall clock may be, where there is nothing else to go by."""
_SET: Final = 1.0
"""Seconds by which our two clocks may part before one of them counts as set, or the machine as suspended."""
_CUT: Final = 0.001
"""What a stamp, in whole milliseconds, leaves out."""
_APPEND: Final = 1


def stamped(native: Native) -> bool:
    """Return whether the broker has set the time of *native*, and not who wrote it."""
    kind: int = getattr(native, "timestamp_type", _APPEND)
    return kind == _APPEND


class ServerTime:
    """The broker's clock, seen from here."""

    def __init__(self) -> None:
        self._monotonic = asyncio.get_running_loop().time
        self._wall = clock.current().time
        self._reached = -math.inf
        """A time that the broker's clock had reached..."""
        self._at = 0.0
        """...at this point of ours."""
        self._latest = math.inf
        """What it showed at most..."""
        self._heard = 0.0
        """...at this point of ours."""
        self._ticked = -math.inf
        """When a tick was last answered quickly."""
        self._apart = 0.0
        """How far our own two clocks were apart then."""
        self.tickers = 0
        """How many there are that write a tick when `wanted` is set."""
        self.wanted = asyncio.Event()
        self.watchers: set[Callable[[], None]] = set()
        """Called after each tick."""

    def __repr__(self) -> str:
        return f"<ServerTime {self.now():.3f} exact={self.exact}>"

    # ------------------------------------------------------------------ hearing

    def observe(self, ms: int) -> None:
        """Take note of a broker's stamp that is seen now; one that contradicts a tick is of a clock that is wrong."""
        if self.now() < ms / 1000 <= self.latest():
            self._reached, self._at = ms / 1000, self._monotonic()

    def answered(self, ms: int, sent: float) -> None:
        """Take note of the stamp in an answer that comes now, of a record that was *sent* then by the loop's clock."""
        now = self._monotonic()
        time = ms / 1000
        latest = time + _CUT + now - sent
        # Else the clock was set back, or it is another broker's, which is behind.
        if time > self.now() or latest < self.now():
            self._reached, self._at = time, now
        if not time <= self.latest() <= latest:
            self._latest, self._heard, self._apart = latest, now, self._wall() - now
        if now - sent <= QUICK:
            self._ticked = now
        for watcher in tuple(self.watchers):
            watcher()

    # ------------------------------------------------------------------ asking

    def now(self) -> float:
        """Return a time that the broker's clock has certainly reached; minus infinity while nothing is known."""
        return self._reached + (self._monotonic() - self._at) * (1 - DRIFT)

    @property
    def exact(self) -> bool:
        """Whether `now` is only just behind."""
        return self._monotonic() - self._ticked < KEPT and not self._was_set()

    def _was_set(self) -> bool:
        return abs(self._wall() - self._monotonic() - self._apart) > _SET

    def latest(self) -> float:
        """Return a time that the broker's clock has hardly reached; infinity while nothing is known."""
        if self._was_set():
            return math.inf
        return self._latest + (self._monotonic() - self._heard) * (1 + DRIFT)

    def want(self) -> None:
        """Have a tick written soon."""
        self.wanted.set()

    def until(self, point: float) -> float:
        """Return 0 if the broker's clock has certainly reached *point*, else in how many seconds to ask again."""
        left = point - self.now()
        if left <= 0:
            return 0.0
        if self.exact:
            return min(_LONG, left / (1 - DRIFT) + 0.001)
        left = point - self.latest()
        if left > 0:
            return min(_LONG, left)
        self.want()
        return SOON

    def wait(self, native: Native, expires: float | None, seen: float) -> float:
        """Return 0 if *native* may be delivered now, `EXPIRED`, or else in how many seconds to ask again.

        *seen* is when we first had it, by the loop's clock: no wait is longer than its delay from then on.
        """
        if expires is not None and (left := self._expiry(expires)):
            return left
        when = due(native)
        if when is None:
            return 0.0
        delay = when - max(native.timestamp or 0, 0) / 1000
        rest = seen + delay - self._monotonic()
        if rest <= 0:
            return 0.0
        if not stamped(native):  # by a clock that may be wrong
            return min(rest, _LONG)
        self.observe(native.timestamp)
        left = when - self.now()
        if left > 0 and delay > QUICK:  # less is not worth a tick
            if self.tickers:
                left = self.until(when)
            elif self._wall() - _WRONG >= when:
                return 0.0
        return max(0.0, min(left, rest, _LONG))

    def _expiry(self, expires: float) -> float:
        """Return 0 for what has not expired."""
        now = self.now()
        if now >= expires:
            return EXPIRED
        latest = self.latest()
        if latest < expires:
            return 0.0
        if not self.exact:
            self.want()
        # Between the two it is known a moment later: a tick may have taken its time.
        if latest < math.inf or self.tickers:
            return SOON
        return EXPIRED if max(now, self._wall()) >= expires else 0.0
