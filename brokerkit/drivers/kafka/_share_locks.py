"""What a member of a share group has acquired: which records, until when they are its own, and what is to be said of them.

Of each partition there is a `Place`.  A record in hand is *adrift* while nobody knows whether it is still ours: its session
has ended, its lock has run out, or the broker says that it is not.  Either it comes again soon, as the member that gets it may
be this one, and is ours again under the lock of that; or it is lost.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Final, Protocol, TypeAlias, cast

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
GRACE: Final = 1.0
"""Seconds that its partition is read again, without its coming, until what is adrift is lost."""
PATIENCE: Final = 5.0
"""Seconds until it is lost at least, where its partition cannot be read."""
MEMORY: Final = 60.0
"""Seconds for which it is known what was done and lost."""
_MEMORIES: Final = 10_000
_NOTHING: Final = cast("Native", None)

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
        """Nothing comes of some partition for now: the topic is gone, may not be read, or is damaged.  Told once, until it works again."""
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


class Place:
    """One partition: what of it is in hand, and what its broker is to be told."""

    __slots__ = ("_memory", "adrift", "due", "generation", "hand", "high", "holes", "index", "locks", "renew", "resting", "single", "until", "working")  # fmt: skip

    def __init__(self, index: int, hand: Hand) -> None:
        self.index = index
        self.hand = hand
        self.locks: dict[int, Lock] = {}
        """What is in hand, and what is done with but may have to be said again, by offset."""
        self.adrift: dict[int, float] = {}
        """Until when what is adrift may come again, by offset."""
        self.due: list[Lock] = []
        """What the broker is to be told of."""
        self.renew: dict[int, Lock] = {}
        """What is to be renewed."""
        self.holes: list[Hole] = []
        self.single: deque[Parcel] = deque()
        """What is said again, one at a time, as the broker has refused it together with others."""
        self.generation = 0
        """Another one whenever everything goes adrift: an answer to what was said before is none any more."""
        self.working: float | None = None
        """Since when it is read again without anything's going adrift."""
        self.until = 0.0
        """Nothing is said before."""
        self.resting = 0.0
        """Nothing of it is asked for before."""
        self.high = -1
        """The highest offset that has come."""
        self._memory: dict[int, float] = {}
        """Until when it is known that what was lost was done, by offset."""

    def __repr__(self) -> str:
        return f"<Place {self.index} locks={len(self.locks)} adrift={len(self.adrift)} due={len(self.due)}>"

    # ------------------------------------------------------------------ what comes

    def keep(self, first: int, natives: Sequence[Native], count: int, until: float) -> list[Lock]:
        """Keep *natives*, one at each offset from *first* on; return those that are ours again and not done.

        New ones are appended to what has arrived.
        """
        index, locks, hand = self.index, self.locks, self.hand
        last = first + len(natives) - 1
        self.high = max(self.high, last)
        if self._memory or not locks.keys().isdisjoint(range(first, last + 1)):
            return self._keep_some(first, natives, count, until)
        fresh = [Lock(index, offset, count, native, until) for offset, native in enumerate(natives, first)]
        for lock in fresh:
            locks[lock.offset] = lock
        self._arrive(fresh)
        hand.room -= len(fresh)
        return []

    def _arrive(self, fresh: Sequence[Lock]) -> None:
        hand = self.hand
        hand.arrived.extend(fresh)
        hand.held += len(fresh)
        hand.untaken += len(fresh)

    def _keep_some(self, first: int, natives: Sequence[Native], count: int, until: float) -> list[Lock]:
        """The same where some were in hand before."""
        regained: list[Lock] = []
        for offset, native in enumerate(natives, first):
            lock = self.locks.get(offset)
            if lock is not None:
                if self._adopt(lock, count, until):
                    regained.append(lock)
                continue
            lock = self.locks[offset] = Lock(self.index, offset, count, native, until)
            if self._memory.pop(offset, None) is not None:
                lock.state = ACCEPTED
                self.due.append(lock)
                continue
            self._arrive((lock,))
            self.hand.room -= 1
        return regained

    def seize(self, first: int, last: int, count: int, until: float) -> None:
        """Keep what cannot be read, from everybody."""
        for offset in range(first, last + 1):
            lock = self.locks.get(offset)
            if lock is not None:
                self._adopt(lock, count, until)
            else:
                self.locks[offset] = Lock(self.index, offset, count, _NOTHING, until, taken=True, hidden=True)
                self.hand.held += 1

    def _adopt(self, lock: Lock, count: int, until: float) -> bool:
        """Have *lock* be ours again; return whether that is worth telling."""
        offset = lock.offset
        drifting = self.adrift.pop(offset, None) is not None
        lock.count = count
        lock.until = until
        if drifting:
            self.hand.adrift -= 1
        if lock.state == HELD:
            if drifting:
                self.hand.astray -= 1
            return lock.taken and not lock.hidden
        if drifting:
            self.due.append(lock)  # else the broker is to be told anyway
        return False

    # ------------------------------------------------------------------ what is said

    def accept(self, lock: Lock) -> None:
        """Be done with *lock*, which is in hand."""
        lock.state = ACCEPTED
        self._put_down(lock)
        if lock.until:
            self.due.append(lock)
        else:
            self.hand.astray -= 1

    def release(self, lock: Lock) -> None:
        """Hand back *lock*, which is in hand."""
        lock.state = RELEASED
        self._put_down(lock)
        if lock.until:
            self.due.append(lock)
            return
        self.hand.astray -= 1
        self._come_ashore(lock)
        lock.state = OVER
        del self.locks[lock.offset]

    def _put_down(self, lock: Lock) -> None:
        self.hand.held -= 1
        if not lock.taken:
            self.hand.untaken -= 1

    @property
    def talkative(self) -> bool:
        """Whether there is something to say."""
        return bool(self.due or self.renew or self.holes or self.single)

    def parcel(self, now: float) -> Parcel | None:
        """Return what is to be said now, of what is still ours, and forget that it is."""
        if self.single:
            parcel = self.single.popleft()
            done, renewed, holes = parcel.done, parcel.renewed, parcel.holes
        else:
            done, self.due = self.due, []
            renewed, self.renew = [*self.renew.values()], {}
            holes, self.holes = self.holes, []
        late = [lock for lock in done if lock.until <= now]
        if late:
            done = [lock for lock in done if lock.until > now]
            for lock in late:
                self.leave(lock, now)
        renewed = [lock for lock in renewed if lock.state == HELD and lock.until > now]
        return Parcel(self.generation, done, renewed, holes) if done or renewed or holes else None

    def agreed(self, parcel: Parcel, until: float) -> None:
        """Take in that the broker has agreed to *parcel*; what it renews is ours up to *until*."""
        if parcel.generation != self.generation:
            return
        forget = self.locks.pop
        for lock in parcel.done:
            lock.state = OVER
            forget(lock.offset, None)
            if lock.waiting is not None:
                _tell(lock.waiting, None)
        for lock in parcel.renewed:
            if lock.until:
                lock.until = until

    def refused(self, parcel: Parcel, now: float) -> None:
        """Take in that some of *parcel* is not ours: the broker has done nothing of it."""
        if parcel.generation != self.generation:
            return
        if len(parcel) > 1:
            self.single.extend(parcel.split())
            return
        for lock in (*parcel.done, *parcel.renewed):
            self.leave(lock, now)

    def postpone(self, parcel: Parcel, until: float) -> None:
        """Say *parcel* again, not before *until*: the broker could do nothing of it."""
        if parcel.generation == self.generation:
            self.due += parcel.done
            self.holes += parcel.holes
            self.until = until

    # ------------------------------------------------------------------ what goes adrift

    def drift(self, now: float) -> None:
        """Take in that nothing is certainly ours any more."""
        self.generation += 1
        self.due.clear()
        self.renew.clear()
        self.holes.clear()
        self.single.clear()
        self.working = None
        for lock in [lock for lock in self.locks.values() if lock.until]:
            self.leave(lock, now)
        self.hand.tidy()

    def expire(self, now: float) -> int:
        """Take in what locks have run out; return how many."""
        late = [lock for lock in self.locks.values() if lock.state == HELD and 0 < lock.until <= now]
        for lock in late:
            self.leave(lock, now)
        return len(late)

    def leave(self, lock: Lock, now: float) -> None:
        """Take in that nobody knows whether *lock* is ours; what nobody has taken or done is dropped."""
        if not lock.until or self.locks.get(lock.offset) is not lock:
            return
        hand = self.hand
        if lock.state == HELD and not lock.taken:
            lock.state = LOST
            lock.until = 0.0
            del self.locks[lock.offset]
            self._put_down(lock)
            hand.room += 1
            return
        if lock.state == RELEASED:
            lock.state = OVER
            lock.until = 0.0
            del self.locks[lock.offset]
            return
        self.adrift[lock.offset] = max(lock.until + hand.margin, now + PATIENCE)
        self.working = None
        lock.until = 0.0
        hand.adrift += 1
        if lock.state == HELD:
            hand.astray += 1

    def _come_ashore(self, lock: Lock) -> None:
        del self.adrift[lock.offset]
        self.hand.adrift -= 1

    def works(self, now: float) -> None:
        """Take in that the partition is read."""
        if self.working is None:
            self.working = now

    def lose(self, now: float) -> list[Lock]:
        """Give up what has been adrift for too long; return what of it was in hand."""
        if self.working is not None and now >= self.working + GRACE:
            gone = list(self.adrift)
        else:
            gone = [offset for offset, end in self.adrift.items() if now >= end]
        lost: list[Lock] = []
        for offset in gone:
            lock = self.locks.pop(offset)
            self._come_ashore(lock)
            if lock.state == HELD:
                self.hand.astray -= 1
                self._put_down(lock)
                if not lock.hidden:
                    lost.append(lock)
            else:
                self._memory[offset] = now + MEMORY
            lock.state = LOST
            if lock.waiting is not None:
                _tell(lock.waiting, lost_error())
        if self._memory:
            self._forget(now)
        return lost

    def _forget(self, now: float) -> None:
        memory = self._memory
        while memory:
            oldest = next(iter(memory))
            if memory[oldest] > now and len(memory) <= _MEMORIES:
                break
            del memory[oldest]

    def renew_from(self, before: float) -> float:
        """Have everything renewed that is ours up to *before* or less; return until when all else is, at least."""
        soonest = float("inf")
        for lock in self.locks.values():
            if lock.state == HELD and lock.until:
                if lock.until <= before:
                    self.renew[lock.offset] = lock
                soonest = min(soonest, lock.until)
        return soonest

    def oldest(self) -> int | None:
        """Return the lowest offset in hand."""
        return min((lock.offset for lock in self.locks.values() if lock.state == HELD), default=None)


def lost_error() -> DeliveryLost:
    """Return what is said of a lock that is lost."""
    return DeliveryLost("others may have the record by now")


def _tell(waiting: asyncio.Future[BrokerError | None], error: BrokerError | None) -> None:
    if not waiting.done():
        waiting.set_result(error)
