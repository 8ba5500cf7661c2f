"""What a member of a share group has acquired: which records, until when they are its own, and what is said of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Final, Protocol, TypeAlias

import msgspec

from ...errors import BrokerError, DeliveryLost
from ._records import Native
from ._share_ask import ACCEPT, RELEASE, RENEW, Said

HELD: Final = 0
"""In hand."""
ACCEPTED: Final = ACCEPT
"""Done with; the broker may have to be told yet."""
RELEASED: Final = RELEASE
"""Handed back; the broker may have to be told yet."""
OVER: Final = 3
"""The broker was told, and has agreed."""
LOST: Final = 4
"""Others may have it."""

Hole: TypeAlias = tuple[int, int, int]
"""First and last offset of what cannot be handed to anybody, and what is said of it."""


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
    taken: bool = False
    hidden: bool = False
    """Whether it cannot be read: nobody is handed it, and it has no `native`."""
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
        """Nothing comes of some partition for now: the topic is gone, or may not be read.  Told once, until it works again."""
        ...

    def damaged(self, error: BrokerError) -> None:
        """Some records cannot be read, here or by anybody; all others go on.  They are kept, as the broker drops what it gets back often."""
        ...

    def stalled(self, partition: int, ahead: int, window: int) -> None:
        """The oldest record in hand keeps *partition* from going on soon: *ahead* of *window* records behind it were handed out."""
        ...

    def resumed(self, partition: int) -> None:
        """What `stalled` said of *partition* is over."""
        ...


class Hand:
    """What is in hand of all partitions, in numbers."""

    __slots__ = ("adrift", "arrived", "astray", "held", "margin", "room", "untaken")

    def __init__(self) -> None:
        self.room = 0
        """How many more may be acquired."""
        self.held = 0
        """What is in hand, taken or not."""
        self.untaken = 0
        self.adrift = 0
        """How many are adrift, and of these"""
        self.astray = 0
        """how many are not done."""
        self.margin = 0.0
        """By how many seconds `Lock.until` is earlier than what the broker says."""
        self.arrived: deque[Lock] = deque()
        """What was acquired, with some that was dropped since."""

    def take(self, most: int, now: float) -> tuple[list[Lock], list[Lock]]:
        """Return up to *most* of what was acquired and is ours, and what has run out in front of it."""
        arrived = self.arrived
        taken: list[Lock] = []
        late: list[Lock] = []
        while arrived and len(taken) < most:
            lock = arrived.popleft()
            if lock.state != HELD:
                continue
            if lock.until > now:
                lock.taken = True
                taken.append(lock)
            else:
                late.append(lock)
        self.untaken -= len(taken)
        return taken, late

    def tidy(self) -> None:
        """Forget what was dropped before it was taken."""
        if len(self.arrived) != self.untaken:
            self.arrived = deque(lock for lock in self.arrived if lock.state == HELD)


class Parcel:
    """What one request says of one partition."""

    __slots__ = ("done", "generation", "holes", "renewed")

    def __init__(self, generation: int, done: list[Lock], renewed: list[Lock], holes: list[Hole]) -> None:
        self.generation = generation
        self.done = done
        self.renewed = renewed
        self.holes = holes

    def __len__(self) -> int:
        return len(self.done) + len(self.renewed) + len(self.holes)

    def said(self) -> list[Said]:
        """Return what is said, as ranges."""
        if not self.renewed and not self.holes:
            offsets = sorted([lock.offset for lock in self.done])
            state = self.done[0].state
            if all(lock.state == state for lock in self.done):
                return _ranges(offsets, bytes((state,)))
        types = {lock.offset: lock.state for lock in self.done} | {lock.offset: RENEW for lock in self.renewed}
        said = [(first, last, bytes((what,))) for first, last, what in self.holes]
        return sorted(said + _runs(sorted(types.items())))

    def split(self) -> tuple[Parcel, Parcel]:
        """Return two parcels that say the same; there has to be more than one record or hole."""
        done, renewed, holes = self.done, self.renewed, self.holes
        if done and (renewed or holes):
            return Parcel(self.generation, done, [], []), Parcel(self.generation, [], renewed, holes)
        if renewed and holes:
            return Parcel(self.generation, [], renewed, []), Parcel(self.generation, [], [], holes)
        first, second = len(done) // 2, len(renewed) // 2
        third = len(holes) // 2
        return (
            Parcel(self.generation, done[:first], renewed[:second], holes[:third]),
            Parcel(self.generation, done[first:], renewed[second:], holes[third:]),
        )


def _ranges(offsets: Sequence[int], what: bytes) -> list[Said]:
    first, last = offsets[0], offsets[-1]
    if last - first == len(offsets) - 1:
        return [(first, last, what)]
    said: list[Said] = []
    last = first
    for offset in islice(offsets, 1, None):
        if offset != last + 1:
            said.append((first, last, what))
            first = offset
        last = offset
    said.append((first, last, what))
    return said


def _runs(types: Sequence[tuple[int, int]]) -> list[Said]:
    said: list[Said] = []
    run = bytearray()
    first = 0
    for offset, what in types:
        if run and offset != first + len(run):
            said.append(_run(first, run))
            run = bytearray()
        if not run:
            first = offset
        run.append(what)
    if run:
        said.append(_run(first, run))
    return said


def _run(first: int, run: bytearray) -> Said:
    last = first + len(run) - 1
    return first, last, bytes(run[:1]) if run.count(run[0]) == len(run) else bytes(run)


def lost_error() -> DeliveryLost:
    """Return what is said of a lock that is lost."""
    return DeliveryLost("others may have the record by now")


def tell(waiting: asyncio.Future[BrokerError | None], error: BrokerError | None) -> None:
    """Answer who waits for *error*, or none."""
    if not waiting.done():
        waiting.set_result(error)
