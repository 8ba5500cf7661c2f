"""What a member of a share group has acquired: which records, until when they are its own, and what is to be said of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Protocol

import msgspec

from ...errors import BrokerError
from ._records import Native

HELD: Final = 0
"""In hand."""
ACCEPTED: Final = 1
"""Done with; the broker may have to be told yet."""
RELEASED: Final = 2
"""Handed back; the broker may have to be told yet."""
OVER: Final = 3
"""The broker was told, and has agreed."""
LOST: Final = 4
"""Others may have it."""


class Lock(msgspec.Struct, eq=False):
    """A record that was acquired."""

    partition: int
    offset: int
    count: int
    """How often the broker has handed it out, this time included.  It grows when it is acquired again while in hand."""
    native: Native
    until: float
    """Until when it is certainly ours, on the loop's clock; 0 while it is adrift: lost, or about to be acquired again."""
    state: int = HELD
    """One of the constants above."""
    waiting: asyncio.Future[BrokerError | None] | None = None
    """Who wants to know what becomes of an acceptance."""


class ShareTold(Protocol):
    """Who is told of what comes; all of it is called between two steps of the event loop and must not wait."""

    def arrived(self) -> None:
        """There is something to take."""
        ...

    def lost(self, locks: Sequence[Lock]) -> None:
        """Drop *locks*, which were taken: others may have them by now."""
        ...

    def regained(self, locks: Sequence[Lock]) -> None:
        """*locks*, which were taken, were adrift and are ours again; each `Lock.count` has grown."""
        ...

    def fail(self, error: BrokerError) -> None:
        """Nothing comes of some partition for now: the topic is gone, may not be read, or is damaged.  Told once, until it works again."""
        ...

    def stalled(self, partition: int, ahead: int, window: int) -> None:
        """The oldest record in hand keeps *partition* from going on soon: *ahead* of *window* records behind it were handed out."""
        ...

    def resumed(self, partition: int) -> None:
        """What `stalled` said of *partition* is over."""
        ...
