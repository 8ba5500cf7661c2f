"""The tracker of log-like sources: what a group has done with one partition.

Memory topics, Redis topics and Kafka's classic groups share it.  A log stores one position per group and partition, but
records are settled in any order, so the position goes with a note about what lies beyond it:

* *base*: everything below is done.
* *done*: what is done beyond the base.
* *high*: everything below has been handed out at least once.  It is written ahead: whoever hands out an offset stores the
  note first, so that a crash leaves a trace of what the process may have held.
* *waiting*: below *high*, not done and in nobody's hands: released, or taken over from an owner that died.
* *counts*: for what is not done, how many ownerships ended without an outcome, and how many attempts failed.

What is below *high*, not done and not waiting is in hand.  Acknowledging costs O(1).
"""

from __future__ import annotations

import base64
import binascii
import bisect
import heapq
import re
from typing import Final, Self

from ..policy import LOG_AHEAD, LOG_WINDOW

MAX_TEXT: Final = 4096
"""Longest note in characters: what a Kafka broker stores beside an offset."""

_VERSION = "bk1"
_FORM = re.compile(r"bk1\.(\d{1,20})\.(\d{1,5})\.([A-Za-z0-9_-]*)\.([A-Za-z0-9_-]*)", re.ASCII)
_NOTHING = (0, 0)


class Tracker:
    """What one group has done with one partition, from *base* on."""

    __slots__ = ("_counts", "_done", "_heap", "_waiting", "base", "fresh", "high")

    def __init__(self, base: int = 0) -> None:
        self.base = base
        """The lowest offset that is not done."""
        self.high = base
        """The lowest offset that was never handed out."""
        self.fresh = True
        """Whether `next` is *high*: nothing waits to be handed out again."""
        self._done: set[int] = set()
        self._waiting: set[int] = set()
        self._heap: list[int] = []
        self._counts: dict[int, tuple[int, int]] = {}

    def copy(self) -> Self:
        """Return a tracker of its own with the same state: to see what a note would be before it is so."""
        copy = type(self)(self.base)
        copy.high, copy.fresh = self.high, self.fresh
        copy._done, copy._waiting = self._done.copy(), self._waiting.copy()
        copy._heap, copy._counts = self._heap.copy(), self._counts.copy()
        return copy

    def __repr__(self) -> str:
        return f"<Tracker base={self.base} high={self.high} in_hand={self.in_hand} waiting={len(self._waiting)}>"

    # ------------------------------------------------------------------ asking

    @property
    def next(self) -> int:
        """The offset to hand out next: the lowest that waits, else *high*."""
        if self.fresh:
            return self.high
        waiting, heap = self._waiting, self._heap
        while heap[0] not in waiting:
            heapq.heappop(heap)
        return heap[0]

    @property
    def room(self) -> int:
        """How many offsets beyond *high* may be handed out before the base has to move."""
        return self.base + LOG_AHEAD - self.high

    @property
    def in_hand(self) -> int:
        """How many offsets are handed out and neither done nor released."""
        return self.high - self.base - len(self._done) - len(self._waiting)

    @property
    def waiting(self) -> int:
        """How many offsets wait to be handed out again."""
        return len(self._waiting)

    def holds(self, offset: int) -> bool:
        """Return whether *offset* is in hand."""
        return self.base <= offset < self.high and offset not in self._done and offset not in self._waiting

    def deliveries(self, offset: int) -> int:
        """Return how many ownerships of *offset* have ended without an outcome, releases not counted."""
        return self._counts.get(offset, _NOTHING)[0]

    def attempts(self, offset: int) -> int:
        """Return how many attempts at *offset* have failed, as told to `hold`."""
        return self._counts.get(offset, _NOTHING)[1]

    # ------------------------------------------------------------------ handing out and settling

    def hand_out(self, offset: int) -> int:
        """Put *offset* in hand and return its deliveries, this one included.

        Where it is beyond *high*, what lies between never arrives: it counts as done.

        Raises:
            ValueError: the offset is done or in hand, or beyond the window.
        """
        if offset in self._waiting:
            self._waiting.discard(offset)
            if not self._waiting:
                self._all_fresh()
        elif offset < self.high:
            raise ValueError(f"{offset} is done or in hand")
        else:
            if offset > self.high:
                if self.base < self.high and offset - self.base >= LOG_WINDOW:
                    raise ValueError(f"{offset} is beyond the window of {LOG_WINDOW} from {self.base} on")
                self.skip(self.high, offset)
            elif offset - self.base >= LOG_WINDOW:
                raise ValueError(f"{offset} is beyond the window of {LOG_WINDOW} from {self.base} on")
            self.high = offset + 1
        return self.deliveries(offset) + 1

    def hand_out_run(self, count: int) -> int:
        """Put the next *count* offsets from *high* on in hand, each for the first time; return the first of them."""
        first = self.high
        if first + count - self.base > LOG_WINDOW:
            raise ValueError(f"{count} offsets from {first} on leave the window of {LOG_WINDOW} from {self.base} on")
        self.high = first + count
        return first

    def done(self, offset: int) -> bool:
        """Settle *offset* if it is in hand; return whether it was."""
        base = self.base
        if offset == base:
            if offset == self.high or offset in self._waiting:
                return False
            if self._counts:
                self._counts.pop(offset, None)
            self.base = base + 1
            if self._done:
                self._advance()
            return True
        if offset < base or offset >= self.high or offset in self._done or offset in self._waiting:
            return False
        if self._counts:
            self._counts.pop(offset, None)
        self._done.add(offset)
        return True

    def _all_fresh(self) -> None:
        self._heap.clear()
        self.fresh = True

    def _advance(self) -> None:
        base, done = self.base, self._done
        while base in done:
            done.discard(base)
            base += 1
        self.base = base

    def skip(self, first: int, end: int) -> int:
        """Count the offsets from *first* up to *end* as done where they are not in hand: they will never arrive.

        Return how many of them were not done.  A part beyond the window is not skipped while something before it is in
        hand; call again when the base has moved, or hand out what follows.
        """
        first = max(first, self.base)
        if end <= first:
            return 0
        lost = 0
        for offset in [offset for offset in self._waiting if first <= offset < end]:
            self._waiting.discard(offset)
            self._counts.pop(offset, None)
            self._done.add(offset)
            lost += 1
        if not self._waiting:
            self._all_fresh()
        self._advance()
        first = max(first, self.high)
        if end > first == self.high:
            if self.base == self.high:
                self.base = self.high = end
                return lost + end - first
            end = min(end, self.base + LOG_WINDOW)
            if end > first:
                self._done.update(range(first, end))
                self.high = end
                lost += end - first
        return lost

    def hold(self, offset: int, attempts: int) -> None:
        """Keep that *attempts* at *offset*, which is in hand, have failed."""
        if self.holds(offset):
            self._counts[offset] = (self.deliveries(offset), attempts)

    def release(self, offset: int) -> bool:
        """Let *offset* wait again without counting a delivery, if it is in hand; return whether it was."""
        if not self.holds(offset):
            return False
        self._waiting.add(offset)
        heapq.heappush(self._heap, offset)
        self.fresh = False
        return True

    def crashed(self) -> int:
        """Let everything in hand wait again, each with one delivery more: its owner is gone.  Return how many."""
        done, waiting, counts = self._done, self._waiting, self._counts
        gone = [o for o in range(self.base, self.high) if o not in done and o not in waiting] if self.in_hand else []
        for offset in gone:
            deliveries, attempts = counts.get(offset, _NOTHING)
            counts[offset] = (deliveries + 1, attempts)
            waiting.add(offset)
        if gone:
            self._heap = sorted(waiting)
            self.fresh = False
        return len(gone)

    # ------------------------------------------------------------------ the note

    def encode(self) -> str:
        """Return the note to store beside *base*: ASCII, at most `MAX_TEXT` characters, empty where there is nothing to say.

        What is done always fits.  If the rest does not, deliveries and attempts are dropped, the smallest numbers first:
        with the least t that makes it fit, every offset whose deliveries and attempts are both at most t is noted as in
        hand and never counted.  So the guilty one, whose numbers are the highest, is forgotten last.
        """
        span = self.high - self.base
        if not span:
            return ""
        bits = bytearray()
        if self._done:
            bits = bytearray((max(self._done) - self.base >> 3) + 1)
            for offset in self._done:
                place = offset - self.base
                bits[place >> 3] |= 1 << (place & 7)
        text = f"{_VERSION}.{self.base}.{span}.{_ascii(bits)}."
        if not self._waiting and not self._counts:
            return text
        left = MAX_TEXT - len(text)
        runs = _ascii(self._runs(-1))
        if len(runs) > left:
            thresholds = sorted({0, *(max(both) for both in self._counts.values())})
            fits = bisect.bisect_left(thresholds, True, key=lambda least: len(_ascii(self._runs(least))) <= left)
            runs = _ascii(self._runs(thresholds[fits]))
        return text + runs

    def _runs(self, least: int) -> bytearray:
        """Return the states of what is not done, run by run: length, whether it waits, deliveries, attempts."""
        out = bytearray()
        done, waiting, counts = self._done, self._waiting, self._counts
        last, length = (False, 0, 0), 0
        for offset in range(self.base, self.high):
            if offset in done:
                continue
            deliveries, attempts = counts.get(offset, _NOTHING)
            state = (offset in waiting, deliveries, attempts) if max(deliveries, attempts) > least else (False, 0, 0)
            if state != last:
                _put_run(out, length, last)
                last, length = state, 0
            length += 1
        if last != (False, 0, 0):  # that everything else is in hand for the first time goes without saying
            _put_run(out, length, last)
        return out

    @classmethod
    def decode(cls, base: int, text: str | None) -> Self:
        """Return the tracker whose note *text* was stored beside *base*; call `crashed` on it if its owner is gone.

        A note that is empty, of another program, of another base or damaged is none: then everything from *base* on is
        handed out again for the first time.
        """
        match = _FORM.fullmatch(text) if text and len(text) <= MAX_TEXT else None
        if match is None or int(match[1]) != base:
            return cls(base)
        span = int(match[2])
        bits, runs = _bytes(match[3]), _bytes(match[4])
        if bits is None or runs is None or not 0 < span <= LOG_WINDOW or len(bits) * 8 >= span + 8:
            return cls(base)
        tracker = cls(base)
        tracker.high = base + span
        tracker._done = {base + 8 * i + j for i, byte in enumerate(bits) if byte for j in range(8) if byte >> j & 1}
        if base in tracker._done or (tracker._done and max(tracker._done) >= tracker.high):
            return cls(base)
        return tracker if tracker._read_runs(runs) else cls(base)

    def _read_runs(self, data: bytes) -> bool:
        undone = [offset for offset in range(self.base, self.high) if offset not in self._done] if data else []
        numbers = _numbers(data)
        if numbers is None:
            return False
        at = place = 0
        while place < len(numbers):
            head = numbers[place]
            length, counted, waits = head >> 2, head & 2, bool(head & 1)
            deliveries = attempts = 0
            if counted:
                if place + 2 >= len(numbers):
                    return False
                deliveries, attempts = numbers[place + 1], numbers[place + 2]
            place += 3 if counted else 1
            if not 0 < length <= len(undone) - at:
                return False
            for offset in undone[at : at + length]:
                if waits:
                    self._waiting.add(offset)
                if counted:
                    self._counts[offset] = (deliveries, attempts)
            at += length
        self._heap = sorted(self._waiting)
        self.fresh = not self._waiting
        return True


def _put_run(out: bytearray, length: int, state: tuple[bool, int, int]) -> None:
    if not length:
        return
    waits, deliveries, attempts = state
    counted = bool(deliveries or attempts)
    _put(out, length << 2 | counted << 1 | waits)
    if counted:
        _put(out, deliveries)
        _put(out, attempts)


def _put(out: bytearray, number: int) -> None:
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)


def _numbers(data: bytes) -> list[int] | None:
    numbers: list[int] = []
    number = shift = 0
    for byte in data:
        number |= (byte & 127) << shift
        if byte & 128:
            shift += 7
            if shift > 35:
                return None
        else:
            numbers.append(number)
            number = shift = 0
    return None if shift else numbers


def _ascii(data: bytes | bytearray) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bytes(text: str) -> bytes | None:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        return None
