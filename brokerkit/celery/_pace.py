"""How far ahead of its credit a channel fetches."""

from __future__ import annotations

from typing import Final

WINDOW: Final = 0.05
"""What is done in so many seconds is fetched ahead of the credit: a round trip for every few messages would be the limit."""
AHEAD: Final = 128
FEW: Final = 8
"""A channel that does less than this in a window fetches nothing ahead: its messages may be long."""


class Pace:
    """Counts what is settled, window by window."""

    __slots__ = ("_began", "_done", "ahead")

    def __init__(self) -> None:
        self.ahead = 0
        """How much may be fetched for which there is no credit yet."""
        self._done = 0
        """Messages that were settled in this window."""
        self._began = 0.0

    def count(self, settled: int, now: float) -> bool:
        """Note that so many more are settled at *now*; return whether to fetch ahead from now on, if a window has ended."""
        self._done += settled
        past = now - self._began
        if past < WINDOW:
            return False
        pace = round(self._done * WINDOW / past)
        self.ahead = min(pace, AHEAD) if pace >= FEW else 0
        self._done, self._began = 0, now
        return self.ahead > 0
