"""One partition in the hands of one reader: what it has done with it, and what it hands out next.

Records come out of the log in order, each once.  What was handed out before and is not done comes first: the owner before
this one has left a note which offsets those are, so reading begins at the lowest of them and passes over the others.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, Protocol

import msgspec

from ...address import AnyQueue, AnyTopic, Queue
from ...driver import Delivery, Record
from ...policy import LOG_AHEAD, LONE_DELIVERY
from .._log import Tracker
from ._records import DELAY, DUE, EXPIRES, TTL, Native, position, record_of

_REREAD = 256
"""Records that are looked at in one go for what was handed out before."""
_TIMES: Final = frozenset({DELAY, DUE, TTL, EXPIRES})


class Log(Protocol):
    """Where records come from."""

    def take(self, partition: int, most: int, /) -> Sequence[Native]:
        """Return up to *most* records, which come no more."""
        ...

    def next_offset(self, partition: int, /) -> int:
        """Return where *partition* goes on behind everything that was taken."""
        ...

    def ready(self) -> Collection[int]:
        """Return the partitions of which something can be taken."""
        ...


class Gate(Protocol):
    """What knows when records of queues may be handed out."""

    def wait(self, native: Native, expires: float | None, seen: float, /) -> float:
        """Return 0 for now, less than that if its time to live is over, or else in how many seconds to ask again.

        *seen* is when it was first at hand, by the loop's clock.
        """
        ...

    def now(self) -> float:
        """Return a time that the broker's clock has certainly reached."""
        ...


class Lease(msgspec.Struct, eq=False, gc=False):
    """The token of one delivery.  Each handing out makes a new one, so an older one of the same record proves nothing."""

    claim: Claim
    offset: int
    settled: bool = False
    job: Any = None
    """The settlement that is under way for it, if it stores copies."""
    stored: tuple[Record, ...] = ()
    """Copies that are stored already, by a settlement that has failed at another one."""


class Claim:
    """One partition, as its reader knows it."""

    __slots__ = (
        "address",
        "alone",
        "anew",
        "back",
        "end",
        "expired",
        "gate",
        "gone",
        "later",
        "lone",
        "lost",
        "missing",
        "ms",
        "now",
        "number",
        "order",
        "prefix",
        "queue",
        "repeats",
        "revoking",
        "standing",
        "stash",
        "tracker",
        "wall",
    )

    def __init__(
        self,
        address: AnyTopic | AnyQueue,
        number: int,
        base: int,
        note: str,
        gate: Gate,
        now: Callable[[], float],
        end: int | None = None,
    ) -> None:
        """Go on at *base*, with the *note* that its last owner has left there; *now* is the loop's clock."""
        tracker = Tracker.decode(base, note)
        tracker.crashed()
        self.address = address
        self.number = number
        self.tracker = tracker
        self.gate = gate
        self.now = now
        self.end = end
        """Where an ``until_end`` source ends."""
        self.prefix = f"{address.name}[{number}]@"
        self.queue = isinstance(address, Queue)
        """Whether records may be due later."""
        self.missing = _waiting(tracker)
        """Offsets that wait and are not read yet, ascending."""
        self.back: dict[int, Delivery] = {}
        """Records that wait and are at hand, as they were delivered, or as they will be."""
        self.order: list[int] = []
        """Offsets of what is at hand and may be handed out, as a heap."""
        self.later: list[tuple[float, int, float]] = []
        """When to ask again about which of what is at hand, and since when it is, as a heap."""
        self.expired = 0
        """How many have expired, until that is told."""
        self.stash: deque[Native] = deque()
        """Records that were taken out of the log and not looked at."""
        self.ms = 0
        """The time of the last fresh record."""
        self.anew = False
        """Whether it is a partition that nobody has read: what was removed from it is no loss."""
        self.alone = False
        """Whether the next record has to come alone."""
        self.lone = LONE_DELIVERY
        """From which delivery on that is so."""
        self.repeats = False
        """Whether something was handed out that was delivered before."""
        self.revoking = False
        """Whether it is about to move: nothing more is handed out."""
        self.gone = False
        """Whether it belongs to somebody else by now."""
        self.lost = False
        """Whether it was taken away, with what was in hand."""
        self.standing = False
        """Whether it waits for its oldest unsettled record."""
        self.wall = 0
        """What is too far ahead to be handed out, while it stands."""

    def __repr__(self) -> str:
        return f"<Claim {self.prefix} {self.tracker!r}>"

    @property
    def start(self) -> int:
        """Where reading begins."""
        return self.missing[0] if self.missing else self.tracker.high

    @property
    def ended(self) -> bool:
        """Whether everything before its end was handed out."""
        return self.end is not None and self.tracker.next >= self.end

    @property
    def full(self) -> bool:
        """Whether what stands in the way of `wall` is still unsettled."""
        tracker = self.tracker
        return self.wall - tracker.base >= LOG_AHEAD and tracker.base < tracker.high

    @property
    def ready(self) -> bool:
        """Whether something is at hand."""
        return bool(self.order or self.stash)

    @property
    def soon(self) -> float:
        """When something at hand may be due, by the loop's clock."""
        return self.later[0][0] if self.later else math.inf

    def note(self) -> tuple[int, str]:
        """Return what is stored of it."""
        return self.tracker.base, self.tracker.encode()

    def overtaken(self, at: int, start: int) -> int:
        """Pass over what was removed, from *at* up to *start*; return how many records that were not handed out."""
        tracker, missing = self.tracker, self.missing
        fresh = max(at, tracker.high)
        lost = 0
        while missing and missing[0] < start:
            self._vanished(missing.popleft())
            lost += 1
        lost += max(0, start - fresh)
        if not self.stash:  # what is in there comes first, and `_jump` passes the gap behind it
            self._jump(start)
        return lost

    def purged(self, at: int, start: int) -> None:
        """Hand out nothing of what waits below *start*, where the log begins by now; it was read up to *at*."""
        for offset in [offset for offset in self.back if offset < start]:
            del self.back[offset]
            self._vanished(offset)
        self.order = sorted(offset for offset in self.order if offset >= start)
        self.later = sorted(each for each in self.later if each[1] >= start)
        while self.stash and self.stash[0].offset < start:
            self.stash.popleft()
        self.overtaken(at, start)

    def _vanished(self, offset: int) -> None:
        """Count *offset*, which waits, as done: it is no more."""
        self.tracker.hand_out(offset)
        self.tracker.done(offset)

    # ------------------------------------------------------------------ handing out

    def hand_out(self, log: Log, most: int, held: dict[object, Delivery], out: deque[Delivery]) -> None:
        """Hand out up to *most* records; where the next one has to come `alone`, not that one and nothing behind it."""
        if self.later:
            self._fall_due()
        left = most
        order, missing = self.order, self.missing
        while left > 0 and (order or missing):
            if not order or (missing and missing[0] < order[0]):
                if not self._read_again(log):
                    return
                continue
            if self._over(order[0]):
                continue
            if self.deliveries(order[0]) >= self.lone:
                self.alone = True
                return
            out.append(self._again(heapq.heappop(order), held))
            left -= 1
        if left > 0:
            self._go_on(log, left, held, out)

    def hand_out_alone(self, held: dict[object, Delivery]) -> Delivery | None:
        """Hand out the record that has to come alone, if there is one."""
        self.alone = False
        order = self.order
        if not order or self._over(order[0]) or self.deliveries(order[0]) < self.lone:
            return None
        return self._again(heapq.heappop(order), held)

    def deliveries(self, offset: int) -> int:
        """Return the deliveries of a record at hand, the next one included."""
        return self.tracker.deliveries(offset) + 1 + self.back[offset].record.deliveries

    def hand_back(self, lease: Lease, delivery: Delivery) -> None:
        """Let *delivery* wait again, uncounted."""
        if self.tracker.release(lease.offset):
            self.back[lease.offset] = delivery
            self._ask(lease.offset, self.now())

    def _again(self, offset: int, held: dict[object, Delivery]) -> Delivery:
        tracker, known = self.tracker, self.back.pop(offset)
        record, attempts = known.record, tracker.attempts(offset)
        if attempts and attempts != record.attempts:
            record = msgspec.structs.replace(record, attempts=attempts)
        deliveries = tracker.hand_out(offset) + record.deliveries
        if deliveries > 1:
            self.repeats = True
        lease = Lease(self, offset)
        held[lease] = delivery = Delivery(record, lease, known.position, deliveries, known.native)
        return delivery

    def _wait(self, native: Native) -> None:
        """Have a record that waits at hand."""
        self._keep(native)
        self._ask(native.offset, self.now())

    def _keep(self, native: Native) -> None:
        address, offset = self.address, native.offset
        record = record_of(address, self.number, native)
        place = position(address.name, self.number, native.timestamp or 0, offset)
        self.back[offset] = Delivery(record, None, place, 0, native)

    def _ask(self, offset: int, seen: float) -> None:
        """Find out whether what waits at hand may be handed out."""
        known = self.back[offset]
        native: Any = known.native
        left = self.gate.wait(native, known.record.expires, seen) if self.queue else 0.0
        if left == 0:
            heapq.heappush(self.order, offset)
        elif left > 0:
            heapq.heappush(self.later, (self.now() + left, offset, seen))
        else:
            self._expire(offset)

    def _expire(self, offset: int) -> None:
        self.back.pop(offset, None)
        self._vanished(offset)
        self.expired += 1

    def _over(self, offset: int) -> bool:
        """Return whether the first of `order` has expired, and is none of it any more."""
        expires = self.back[offset].record.expires
        if expires is None or not self.queue or self.gate.now() < expires:
            return False
        heapq.heappop(self.order)
        self._expire(offset)
        return True

    def _fall_due(self) -> None:
        now, later = self.now(), self.later
        while later and later[0][0] <= now:
            _, offset, seen = heapq.heappop(later)
            self._ask(offset, seen)

    # ------------------------------------------------------------------ out of the log

    def _take(self, log: Log, most: int) -> Sequence[Native]:
        stash = self.stash
        if stash:
            return [stash.popleft() for _ in range(min(most, len(stash)))]
        return log.take(self.number, most)

    def _put_back(self, natives: Sequence[Native]) -> None:
        self.stash.extendleft(reversed(natives))

    def _wait_or_put_back(self, natives: Sequence[Native], place: int) -> None:
        try:
            self._wait(natives[place])
        except Exception:
            self._put_back(natives[place:])
            raise

    def _read_again(self, log: Log) -> bool:
        """Look for what was handed out before; return whether some of it was found, or found to be no more."""
        missing = self.missing
        before = len(missing)
        natives = self._take(log, _REREAD)
        for place, native in enumerate(natives):
            while missing and missing[0] < native.offset:
                self._vanished(missing.popleft())
            if not missing:
                self._put_back(natives[place:])
                break
            if missing[0] == native.offset:
                self._wait_or_put_back(natives, place)
                missing.popleft()
        if not natives:
            at = log.next_offset(self.number)
            while missing and missing[0] < at:
                self._vanished(missing.popleft())
        return bool(natives) or len(missing) < before

    def _go_on(self, log: Log, most: int, held: dict[object, Delivery], out: deque[Delivery]) -> None:
        """Hand out what was never handed out."""
        tracker, end = self.tracker, self.end
        found = len(out)
        while len(out) == found:  # there may be much that is done already, or not due
            high = tracker.high
            count = min(most, tracker.base + LOG_AHEAD - high)
            if end is not None:
                count = min(count, end - high)
            if count <= 0:
                if (end is None or high < end) and (self.stash or self.number in log.ready()):
                    self._stand(high)
                return
            natives = self._take(log, count)
            if not natives:
                self._jump(log.next_offset(self.number))
                return
            first, last = natives[0].offset, natives[-1].offset
            dense = first == high and last - first + 1 == len(natives)
            if dense and not (self.queue and any(map(_timed, natives))):
                self._run(natives, held, out)
            elif not self._one_by_one(natives, held, out):
                return
            if self.alone:
                return

    def _run(self, natives: Sequence[Native], held: dict[object, Delivery], out: deque[Delivery]) -> None:
        """Hand out records whose offsets follow each other."""
        address, number, prefix = self.address, self.number, self.prefix
        first = offset = natives[0].offset
        native = natives[0]
        alone = False
        try:
            for native in natives:
                record = record_of(address, number, native)
                if record.deliveries:
                    self.repeats = True
                    if record.deliveries >= self.lone - 1:
                        alone = True
                        break
                lease = Lease(self, offset)
                place = f"{prefix}{native.timestamp or 0}-{offset}"  # none: written before Kafka 0.10
                held[lease] = delivery = Delivery(record, lease, place, 1 + record.deliveries, native)
                out.append(delivery)
                offset += 1
        finally:  # also where one cannot be read: nothing of the others is lost
            count = offset - first
            self.ms = native.timestamp or 0
            self.tracker.hand_out_run(count)
            if count < len(natives):
                self._put_back(natives[count + alone :])
        if alone:
            self._comes_alone(natives[count])

    def _comes_alone(self, native: Native) -> None:
        """Have a fresh record wait until nothing else is in hand."""
        self.tracker.hand_out(native.offset)
        self.tracker.release(native.offset)
        self._wait(native)
        self.alone = True

    def _one_by_one(self, natives: Sequence[Native], held: dict[object, Delivery], out: deque[Delivery]) -> bool:
        """Hand out records between which others are missing, or that may be due later; return whether more may follow."""
        tracker = self.tracker
        for place, native in enumerate(natives):
            offset = native.offset
            if offset < tracker.high:
                continue  # read again for the sake of one before it
            if self.end is not None and offset >= self.end:
                self._jump(offset)
                return False
            self._jump(offset)
            if tracker.high < offset:
                self._stand(offset)
                self._put_back(natives[place:])
                return False
            if self.queue and _timed(native) and self._not_now(native):
                continue
            try:
                self._run((native,), held, out)
            except Exception:
                self.stash.popleft()
                self._put_back(natives[place:])
                raise
            if self.alone:
                self._put_back(natives[place + 1 :])
                return False
        return True

    def _not_now(self, native: Native) -> bool:
        """Return whether a fresh record, which says when it may be handed out, is not: it waits then, or has expired."""
        offset, seen = native.offset, self.now()
        left = self.gate.wait(native, record_of(self.address, self.number, native).expires, seen)
        if left == 0:
            return False
        self.ms = native.timestamp or 0
        if left < 0:
            self._expire(offset)
        else:
            self.tracker.hand_out(offset)
            self.tracker.release(offset)
            self._keep(native)
            heapq.heappush(self.later, (seen + left, offset, seen))
        return True

    def _jump(self, offset: int) -> None:
        """Pass over what is before *offset* and was not in the log, if that is not too far ahead."""
        tracker = self.tracker
        if self.end is not None:
            offset = min(offset, self.end)
        if offset > tracker.high and (tracker.base == tracker.high or offset - tracker.base < LOG_AHEAD):
            tracker.skip(tracker.high, offset)

    def _stand(self, wall: int) -> None:
        self.standing = True
        self.wall = wall


def _timed(native: Native) -> bool:
    """Return whether *native* says from when on, or until when, it may be handed out."""
    return any(name in _TIMES for name, _ in native.headers)


def _waiting(tracker: Tracker) -> deque[int]:
    """Return all offsets that wait, in order."""
    offsets: deque[int] = deque()
    if not tracker.fresh:
        copy = tracker.copy()
        while not copy.fresh:
            offset = copy.next
            copy.hand_out(offset)
            offsets.append(offset)
    return offsets


def lease_of(delivery: Delivery) -> Lease:
    """Return the token of one of our own deliveries."""
    lease = delivery.token
    assert isinstance(lease, Lease)
    return lease
