"""What a consumer of a share group does with what it acquires, until it hands it out.

Records are acquired only for somebody who waits in `receive`: what nobody fetches goes back, so that others get it.  Before
anything is handed out it is sorted: what the broker is about to drop is rescued, what is not due waits, and what nobody has
survived several times comes alone.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
from asyncio import get_running_loop
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from ...address import AnyQueue
from ...driver import Delivery, Revoked
from ...errors import Closed, ConfigError
from ...events import Expired
from ...policy import LONE_DELIVERY
from .._lone import Lone
from ._context import Context
from ._engine import Terms
from ._life import Life
from ._records import due, record_of
from ._rescue import Lease, Returns
from ._share import Share
from ._share_locks import Lock
from ._time import EXPIRED

logger = logging.getLogger("brokerkit")

RESCUE: Final = 3
"""At which delivery that the broker counts a record is stored anew, if it does not drop records even earlier."""
ASIDE: Final = 1000
"""Records that may be in hand beside the prefetch: those that wait for their time, and those that are put back."""
HANDING_BACK: Final = 5.0
"""Seconds within which what is handed back must be stored as a copy; else the broker counts it."""
_SHORT: Final = 2.0
"""What has to wait for longer is not held, but put where such messages wait: it has got here by another way."""
_ABSENT: Final = 1.0
"""Seconds after which records that nobody fetches go back."""
_CANCELLED: Final = 0.05
"""The same where whoever was about to fetch them has changed its mind."""
_QUIET: Final = 1.0
"""Seconds to wait at once until nothing is under way."""
_LOOK: Final = 0.2
"""Seconds until it is looked again whether a record is certainly ours."""


class ShareReader(Life):
    """Sorts what a `Share` acquires, and hands it out."""

    def __init__(self, context: Context, queue: AnyQueue, prefetch: int, terms: Terms, revoked: Revoked) -> None:
        super().__init__(context, queue, revoked)
        self._queue = queue
        self._prefetch = prefetch
        self._terms = terms
        self._time = context.time
        self._threshold = min(RESCUE, terms.limit)
        self._share: Share | None = None
        self._returns: Returns | None = None
        self._leases: dict[Lock, Lease] = {}
        """All that is in hand."""
        self._held: dict[object, Delivery] = {}
        """What of it was received, by `Lease`."""
        self._ready: deque[Lease] = deque()
        """What of it may be received."""
        self._later: list[tuple[float, int, Lease]] = []
        """What of it waits, as a heap: when to look again."""
        self._laters = itertools.count()
        self._alarm: asyncio.TimerHandle | None = None
        self._suspects: deque[Lease] = deque()
        """What of it has to come alone."""
        self._alone = False
        """Whether nothing but one suspect is in hand, and what is proven, and nothing can come."""
        self._isolating = False
        self._lone = Lone(self._held, self._freed)
        """What was received alone."""
        self._careful = 0
        """How many are acquired at a time after a suspect; 0 for as many as there is room for."""
        self._changed = asyncio.Event()
        self._full_since = math.inf
        """Since when something is ready and there is no room for it."""
        self._prefixes: dict[int, str] = {}
        self._wanted = 0
        """How many somebody waits for."""
        self._waiter: asyncio.Future[None] | None = None
        self._receiving = False
        self._absent = True
        """Whether nobody has fetched anything for a while."""
        self._since = 0.0
        """Since when nobody does."""
        self._patience = _ABSENT
        self._absence: asyncio.TimerHandle | None = None
        self._leaving = False

    # ------------------------------------------------------------------ receiving

    @property
    def prefetch(self) -> int:
        """How many unsettled deliveries this consumer holds at most."""
        return self._prefetch

    @prefetch.setter
    def prefetch(self, value: int) -> None:
        self._prefetch = value
        if value > 0:
            self._give_back_surplus()
        else:
            self._give_back()
        self._make_room()
        self._wake()

    @property
    def ended(self) -> bool:
        """Never: a queue has no end."""
        return False

    @property
    def cursor(self) -> str | None:
        """None: what a queue's consumer owns comes again by itself."""
        return None

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery]:
        """Return 1 to *limit* deliveries, or none after *timeout* seconds."""
        if self._receiving:
            raise ConfigError("receive is called by one task at a time")
        loop = get_running_loop()
        deadline: float | None = None
        self._receiving, self._absent, self._patience = True, False, _ABSENT
        self._wanted = limit
        try:
            while True:
                if self._error is not None:
                    raise self._error.with_traceback(None)
                if not self._entered:
                    raise Closed("this consumer was left")
                if out := self._hand_out(limit):
                    return out
                self._make_room()
                now = loop.time()
                if deadline is None:
                    deadline = now + timeout
                if now >= deadline:
                    return out
                await self._wait(loop, deadline)
        except asyncio.CancelledError:
            self._wanted, self._patience = 0, _CANCELLED
            self._make_room()
            raise
        finally:
            self._receiving = False
            self._since = loop.time()
            if self._absence is None or self._patience < _ABSENT:
                self._watch(self._patience)

    async def _wait(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        self._waiter = waiter = loop.create_future()
        at = min(deadline, loop.time() + _LOOK) if self._ready or self._pressed() else deadline
        timer = loop.call_at(at, self._wake)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        self._changed.set()

    # ------------------------------------------------------------------ nobody is there

    def _watch(self, after: float) -> None:
        if self._absence is not None:
            self._absence.cancel()
        self._absence = get_running_loop().call_later(after, self._look_for_somebody)

    def _look_for_somebody(self) -> None:
        self._absence = None
        if self._receiving or self._leaving or not self._entered:
            return
        left = self._since + self._patience - get_running_loop().time()
        if left > 0:
            self._watch(left)
            return
        self._absent, self._wanted = True, 0
        self._make_room()
        self._give_back()

    def _give_back(self) -> None:
        """Let others have what nobody fetches here."""
        leases = [*self._ready, *self._suspects]
        self._ready.clear()
        self._suspects.clear()
        self._alone = False
        self._put_back(leases)
        self._wake()

    def _give_back_surplus(self) -> None:
        """Let others have what there is no room for here."""
        ready = self._ready
        most = max(0, self._prefetch - len(self._held))
        self._put_back([ready.pop() for _ in range(len(ready) - most)])
        self._full_since = math.inf

    def _put_back(self, leases: Collection[Lease], patience: float = HANDING_BACK) -> asyncio.Future[None] | None:
        """Have copies stored of *leases*, which are nowhere but in hand any more; nothing of it counts."""
        if not leases or self._returns is None:
            return None
        return self._returns.put([(lease, lease.copy()) for lease in leases], patience)

    # ------------------------------------------------------------------ room

    def _make_room(self) -> None:
        """Say how many more may be acquired."""
        share, returns = self._share, self._returns
        if share is None or returns is None:
            return
        lone = self._lone.active and self._lone.holds_up()
        if self._leaving or self._suspects or lone or self._error is not None or returns.pressing:
            room = 0
        else:
            waiting = len(self._ready) + share.untaken()
            room = min(self._wanted, self._prefetch - len(self._held)) - waiting
            if self._careful:
                room = min(room, self._careful - waiting)
            room = max(0, min(room, ASIDE - len(self._later) - len(returns)))
        if share.room != room:
            share.room = room

    # ------------------------------------------------------------------ what comes

    def arrived(self) -> None:
        """Sort what was acquired."""
        share = self._share
        if share is None:
            return
        try:
            self._sort(share.take(share.untaken()))
        except Exception as error:
            self._fail_broken(error)
        if self._absent:
            self._give_back()
        self._make_room()
        self._wake()

    def _sort(self, locks: Iterable[Lock]) -> None:
        queue, now = self._queue, get_running_loop().time()
        threshold, leases, ready = self._threshold, self._leases, self._ready
        rescued: list[Lease] = []
        for lock in locks:
            record = record_of(queue, lock.partition, lock.native)
            lease = leases[lock] = Lease(lock, record, lock.count, now)
            if lock.count >= threshold:
                rescued.append(lease)
            elif record.expires is not None or due(lock.native) is not None:
                self._look_at(lease, now)
            elif record.deliveries + lock.count >= LONE_DELIVERY:
                self._suspect(lease)
            else:
                ready.append(lease)
        self._rescue(rescued)

    def _rescue(self, leases: Collection[Lease]) -> None:
        """Store *leases* anew, for as long as that takes: the broker would drop them before long."""
        if leases and self._returns is not None:
            logger.info("%s: %d messages were handed out so often that they are stored anew", self._name, len(leases))
            self._returns.put([(lease, lease.copy()) for lease in leases], urgent=True)

    def _pressed(self) -> bool:
        """Return whether nothing may be handed out yet: whatever runs may end this process, and what is rescued with it."""
        return self._returns is not None and self._returns.pressing

    def _look_at(self, lease: Lease, now: float) -> None:
        """Have *lease* wait, or be received, or be no more."""
        native = lease.lock.native
        left = self._time.wait(native, lease.record.expires, lease.since)
        if left == EXPIRED:
            self._expire(lease)
        elif left > 0:
            when = due(native)
            if when is not None and left > _SHORT and self._returns is not None:
                rest = max(left, when - self._time.now())
                self._returns.put([(lease, lease.copy(rest=rest))])
            else:
                heapq.heappush(self._later, (now + left, next(self._laters), lease))
                self._set_alarm()
        elif lease.deliveries >= LONE_DELIVERY:
            self._suspect(lease)
        else:
            self._ready.append(lease)

    def _expire(self, lease: Lease) -> None:
        if self._share is not None:
            lease.settled = True
            self._leases.pop(lease.lock, None)
            self._share.accept(lease.lock)
            self._context.emit(Expired(address=self._name))

    def _set_alarm(self) -> None:
        at = self._later[0][0]
        if self._alarm is not None:
            if self._alarm.when() <= at:
                return
            self._alarm.cancel()
        self._alarm = get_running_loop().call_at(at, self._fall_due)

    def _fall_due(self) -> None:
        """Look again at what waits."""
        self._alarm = None
        if self._leaving or not self._entered:
            return
        later, now = self._later, get_running_loop().time()
        fallen: list[Lease] = []
        while later and later[0][0] <= now:
            fallen.append(heapq.heappop(later)[2])
        for lease in fallen:
            self._look_at(lease, now)
        if later:
            self._set_alarm()
        if fallen and self._absent:
            self._give_back()
        self._make_room()
        self._wake()

    # ------------------------------------------------------------------ handing out

    def _hand_out(self, limit: int) -> list[Delivery]:
        """Return up to *limit* deliveries, as far as there is room."""
        out: list[Delivery] = []
        ready, held = self._ready, self._held
        if (self._lone.active and self._lone.holds_up()) or self._pressed():
            return out
        now = get_running_loop().time()
        if self._suspects:
            mine = self._alone and self._lone.may_come()
            if mine and held and len(held) >= self._prefetch:
                self._give_back()  # else it would wait for as long as what is proven runs
            elif mine and len(held) < self._prefetch and self._suspects[0].lock.until > now:
                self._alone = False
                lease = self._suspects.popleft()
                if self._late(lease):
                    self._look_at(lease, now)
                    self._changed.set()
                    return out
                self._careful = 1
                out.append(self._deliver(lease))
                if self._share is not None:
                    self._lone.came(lease, self._share.lock)
            return out
        room = min(limit, self._prefetch - len(held))
        if ready and room <= 0:
            # What has waited for its time, while others have taken its place: it is next, but not for ever.
            self._full_since = min(self._full_since, now)
            if now - self._full_since >= _ABSENT:
                self._give_back_surplus()
            return out
        self._full_since = math.inf
        doubtful: list[Lease] = []
        while ready and room > 0:
            lease = ready.popleft()
            if lease.lock.until <= now:
                doubtful.append(lease)
            elif self._late(lease):
                self._look_at(lease, now)
            else:
                out.append(self._deliver(lease))
                room -= 1
        ready.extendleft(reversed(doubtful))
        if out:
            self._wanted = limit - len(out)
            if self._careful:
                self._careful = 2 * self._careful if 2 * self._careful < self._prefetch else 0
            self._make_room()
        return out

    def _late(self, lease: Lease) -> bool:
        """Return whether *lease* is to be looked at again: it may have expired while it was ready."""
        expires = lease.record.expires
        return expires is not None and self._time.wait(lease.lock.native, expires, lease.since) != 0

    def _deliver(self, lease: Lease) -> Delivery:
        lock = lease.lock
        prefix = self._prefixes.get(lock.partition)
        if prefix is None:
            prefix = self._prefixes[lock.partition] = f"{self._name}[{lock.partition}]@"
        native = lock.native
        place = f"{prefix}{native.timestamp or 0}-{lock.offset}"
        self._held[lease] = delivery = Delivery(lease.record, lease, place, lease.deliveries, native)
        return delivery

    def _freed(self) -> None:
        """Something that was received is in hand no more, or holds up nothing any more."""
        self._make_room()
        self._wake()

    # ------------------------------------------------------------------ one that comes alone

    def _suspect(self, lease: Lease) -> None:
        """Have *lease* come alone: it may be what ends processes, and nothing else must count a delivery for that."""
        self._suspects.append(lease)
        if not self._isolating:
            self._isolating = True
            self._spawn(self._isolate)

    async def _isolate(self) -> None:
        """Put back everything but one suspect, wait for what was received, and then let it be received."""
        try:
            while self._suspects and not self._leaving:
                self._changed.clear()
                self._make_room()
                others = [*itertools.islice(self._suspects, 1, None), *self._ready, *(each for *_, each in self._later)]
                if others:
                    first = self._suspects[0]
                    self._suspects.clear()
                    self._suspects.append(first)
                    self._ready.clear()
                    self._later.clear()
                    if (stored := self._put_back(others)) is not None:
                        await stored
                elif not self._lone.may_come() or self._puts_back():
                    await self._changed.wait()
                elif self._share is not None and await self._share.quiet(_QUIET) and self._nothing_else():
                    self._alone = True
                    self._wake()
                    await self._received_alone()
        finally:
            self._isolating = self._alone = False
        self._make_room()
        self._wake()

    def _puts_back(self) -> bool:
        """Return whether something is being put back, and that does not take for ever."""
        returns = self._returns
        return returns is not None and len(returns) > 0 and returns.problem is None

    def _nothing_else(self) -> bool:
        others = self._ready or self._later or not self._lone.may_come()
        return len(self._suspects) == 1 and not (others or self._puts_back())

    async def _received_alone(self) -> None:
        """Return when the suspect was received or is gone, or something else has come."""
        while self._alone and self._nothing_else():
            self._changed.clear()
            await self._changed.wait()
        self._alone = False

    # ------------------------------------------------------------------ what goes

    def _drop(self, leases: Collection[Lease]) -> None:
        """Have *leases*, which are lost, in hand no more."""
        gone = set(map(id, leases))
        for lease in leases:
            self._leases.pop(lease.lock, None)
            if self._returns is not None:
                self._returns.forget(lease)
        for waiting in (self._ready, self._suspects):
            if any(id(lease) in gone for lease in waiting):
                kept = [lease for lease in waiting if id(lease) not in gone]
                waiting.clear()
                waiting.extend(kept)
        if any(id(lease) in gone for *_, lease in self._later):
            self._later[:] = [entry for entry in self._later if id(entry[2]) not in gone]
            heapq.heapify(self._later)

    def _forget(self, lease: Lease) -> None:
        """Have *lease*, which was put back, in hand no more."""
        self._leases.pop(lease.lock, None)

    def _put_back_some(self) -> None:
        """Something was put back, or cannot be for now."""
        self._make_room()
        self._wake()
