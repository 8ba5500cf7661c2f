"""One partition in the hands of one reader: what it has done with it, and from where it reads on."""

from __future__ import annotations

import enum
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from ...address import AnyTopic
from ...driver import Delivery, Record
from ...policy import LONE_DELIVERY
from .._log import Tracker
from ._frames import read
from ._keys import entity
from ._topic_place import tracker_at

logger = logging.getLogger("brokerkit")

WANTED: Final = 256
"""Most records that were handed out before and are read again in one call."""


class Lease(msgspec.Struct, eq=False, gc=False):
    """The token of one delivery.  Each handing out makes a new one, so an older one of the same record proves nothing."""

    claim: Claim
    offset: int
    settled: bool = False
    job: Any = None
    """The settlement that is under way for it, if it stores copies."""


class Plan(enum.Enum):
    """What is read again."""

    SOME = 1
    ALONE = 2
    """One record that has to come alone, and nothing else."""
    LATER = 3
    """The next record has to come alone, and something else is in hand."""


class Claim:
    """One partition, as its reader knows it."""

    __slots__ = (
        "address",
        "after",
        "alone",
        "back",
        "end",
        "epoch",
        "gone",
        "listener",
        "lost",
        "number",
        "places",
        "planned",
        "prefix",
        "revoking",
        "scan",
        "standing",
        "text",
        "tracker",
    )

    def __init__(
        self, address: AnyTopic, number: int, epoch: int, position: str, mark: bytes = b"", end: int | None = None
    ) -> None:
        """Go on at *position*, an id and a note; *mark* is the offset up to which records may have been handed out."""
        tracker = tracker_at(position, mark)
        tracker.crashed()
        id = position.partition(" ")[0]
        self.address = address
        self.number = number
        self.text = b"%d" % number
        self.epoch = epoch
        self.tracker = tracker
        self.end = end
        """Where an ``until_end`` source ends."""
        self.prefix = f"{address.name}[{number}]@"
        self.places: deque[tuple[int, int]] = deque([(tracker.base, int(id.partition("-")[0]))])
        """Offsets with their times, ascending: the first one is not above the base."""
        self.scan = id.encode()
        """An id that is not behind any record that waits."""
        self.after = b""
        """The last entry looked at, in exclusive form; everything that follows has a higher offset."""
        self.back: dict[int, tuple[Record, str]] = {}
        """Records that wait and are at hand."""
        self.planned: list[int] = []
        """Offsets below the high mark that are being read again."""
        self.revoking = False
        """Whether it is about to move: nothing more is handed out."""
        self.gone = False
        """Whether it belongs to somebody else by now."""
        self.lost = False
        """Whether it was taken away, with what was in hand."""
        self.alone = False
        """Whether what is planned is a record that has to come alone."""
        self.listener: Callable[[bytes], None] | None = None
        """Who hears of news of it."""
        self.standing = False
        """Whether it waits for its oldest unsettled record."""

    def __repr__(self) -> str:
        return f"<Claim {self.prefix} epoch={self.epoch} {self.tracker!r}>"

    @property
    def ended(self) -> bool:
        """Whether everything before its end was handed out."""
        return self.end is not None and self.tracker.next >= self.end

    def tell_foreign(self, id: bytes) -> None:
        """Say that the stream has an entry that is none of ours."""
        key = entity(self.address.name).decode()
        shown = id.decode("utf-8", "replace")
        logger.error("%s:%d has an entry %s that brokerkit did not write: it is passed over", key, self.number, shown)

    # ------------------------------------------------------------------ positions

    def position(self, tracker: Tracker) -> bytes:
        """Return what is stored of *tracker*, this claim's own one or a copy that is ahead of it."""
        places, base = self.places, tracker.base
        while len(places) > 1 and places[1][0] <= self.tracker.base:
            places.popleft()
        ms = places[0][1]
        for offset, at in places:
            if offset > base:
                break
            ms = at
        return f"{ms}-{base} {tracker.encode()}".encode()

    def place(self) -> str:
        """Return the id from which another reader has what was never handed out."""
        ms = (self.after[1:] or self.scan).partition(b"-")[0].decode()
        return f"{ms}-{self.tracker.high}"

    def start(self) -> bytes:
        """Return from which id fresh records are read."""
        return self.after or self.scan

    # ------------------------------------------------------------------ reading again

    def plan(self, most: int, empty: bool) -> Plan:
        """Put up to *most* waiting records in hand, to be read again; *empty* tells whether nothing else is in hand."""
        tracker, planned = self.tracker, self.planned
        first = tracker.next
        self.alone = False
        while len(planned) < most and not tracker.fresh:
            offset = tracker.next
            if offset - first >= WANTED or (self.end is not None and offset >= self.end):
                break
            known = self.back.get(offset)
            deliveries = tracker.deliveries(offset) + 1 + (0 if known is None else known[0].deliveries)
            if deliveries >= LONE_DELIVERY:
                if planned:
                    break
                if not empty:
                    return Plan.LATER
                self.alone = True
            tracker.hand_out(offset)
            planned.append(offset)
            if self.alone:
                return Plan.ALONE
        return Plan.SOME

    def wanted(self) -> bytes:
        """Return the planned offsets that have to be read."""
        return " ".join(str(offset) for offset in self.planned if offset not in self.back).encode()

    def unplan(self, row: Sequence[Any] = ()) -> tuple[list[int], int]:
        """Let what was planned wait again, with the entries of *row* at hand.

        Return the offsets, and how many are no more if there is a row.
        """
        planned, self.planned = self.planned, []
        for id, data in zip(row[5::2], row[6::2], strict=True):
            position = self.prefix + id.decode()
            self.back[int(id.partition(b"-")[2])] = (read(self.address, data, 0, position), position)
            self.scan = id
        lost = 0
        through = bool(row) and row[1] != b"more"
        if row and not through:
            self.scan = row[3]
        for offset in planned:
            if offset in self.back or not through:
                self.tracker.release(offset)
            else:
                self.tracker.done(offset)
                lost += 1
        return planned, lost

    def hand_out(self, offset: int, held: dict[object, Delivery]) -> Delivery:
        """Hand out a record that is at hand, with what is known about it."""
        tracker = self.tracker
        record, position = self.back.pop(offset)
        attempts = tracker.attempts(offset)
        if attempts:
            record = msgspec.structs.replace(record, attempts=attempts)
        deliveries = tracker.hand_out(offset) + record.deliveries
        lease = Lease(self, offset)
        held[lease] = delivery = Delivery(record, lease, position, deliveries)
        return delivery

    def deliveries(self, offset: int) -> int:
        """Return the deliveries of a record at hand, the next one included."""
        return self.tracker.deliveries(offset) + 1 + self.back[offset][0].deliveries

    def hand_back(self, lease: Lease, delivery: Delivery) -> None:
        """Let *delivery* wait again, uncounted."""
        if self.tracker.release(lease.offset):
            self.back[lease.offset] = (delivery.record, delivery.position)

    # ------------------------------------------------------------------ reading on

    def run(
        self, ids: Sequence[bytes], frames: Sequence[bytes], held: dict[object, Delivery], out: deque[Delivery]
    ) -> bool:
        """Hand out entries whose offsets follow each other; return False where one has to come alone, and waits."""
        address, prefix = self.address, self.prefix
        first = offset = self.tracker.hand_out_run(len(ids))
        if first > self.places[-1][0]:
            self.places.append((first, int(ids[0].partition(b"-")[0])))
        for id, data in zip(ids, frames, strict=True):
            position = prefix + id.decode()
            record = read(address, data, 0, position)
            if record.deliveries >= LONE_DELIVERY - 1:
                self._wait(offset, ids[offset - first :], frames[offset - first :])
                return False
            lease = Lease(self, offset)
            held[lease] = delivery = Delivery(record, lease, position, 1 + record.deliveries)
            out.append(delivery)
            offset += 1
        return True

    def _wait(self, offset: int, ids: Sequence[bytes], frames: Sequence[bytes]) -> None:
        """Have entries that were read wait at hand."""
        for id, data in zip(ids, frames, strict=True):
            position = self.prefix + id.decode()
            self.tracker.release(offset)
            self.back[offset] = (read(self.address, data, 0, position), position)
            offset += 1

    def jump(self, offset: int) -> int:
        """Pass over what is before *offset* and was not read: it is no more.  Return how many records that were.

        Where that is too far ahead of what is unsettled, only a part is passed over.
        """
        return self.tracker.skip(self.tracker.high, offset)


def lease_of(delivery: Delivery) -> Lease:
    """Return the token of one of our own deliveries."""
    lease = delivery.token
    assert isinstance(lease, Lease)
    return lease
