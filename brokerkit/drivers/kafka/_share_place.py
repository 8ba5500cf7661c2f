"""One partition, to a member of a share group: what of it is in hand, and what its broker is to be told.

A record in hand is *adrift* while nobody knows whether it is still ours: its session has ended, its lock has run out, or the
broker says that it is not.  Either it comes again soon, as the member that gets it may be this one, and is ours again under the
lock of that; or it is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, cast

from ._records import Native
from ._share_locks import ACCEPTED, HELD, LOST, OVER, RELEASED, Hand, Hole, Lock, Parcel, lost_error, tell

GRACE: Final = 1.0
"""Seconds that its partition is read again, without its coming, until what is adrift is lost."""
PATIENCE: Final = 5.0
"""Seconds until it is lost at least, where its partition cannot be read."""
MEMORY: Final = 60.0
"""Seconds for which it is known what was done and lost."""
_MEMORIES: Final = 10_000
_NOTHING: Final = cast("Native", None)


class Place:
    """One partition: what of it is in hand, and what its broker is to be told."""

    __slots__ = ("_memory", "adrift", "due", "generation", "hand", "high", "holes", "index", "locks", "renew", "resting", "single", "until", "urgent", "working")  # fmt: skip

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
        self.urgent = False
        """Whether somebody waits for what is to be told."""
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
        """Until when it is known that what was lost was done, by offset; not of what somebody was told is lost."""

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
            self.urgent = True
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
        self.urgent = True
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

    @property
    def patient(self) -> bool:
        """Whether what there is to say may be said a little later."""
        return not (self.urgent or self.renew or self.holes or self.single)

    def parcel(self, now: float) -> Parcel | None:
        """Return what is to be said now, of what is still ours, and forget that it is."""
        self.urgent = False
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
                tell(lock.waiting, None)
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
            elif lock.waiting is None:
                self._memory[offset] = now + MEMORY
            lock.state = LOST
            if lock.waiting is not None:
                tell(lock.waiting, lost_error())
        if self._memory:
            self._forget(now)
        return lost

    def forget(self, offset: int) -> None:
        """Forget that what is at *offset* was done: somebody is told that it was lost."""
        self._memory.pop(offset, None)

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
