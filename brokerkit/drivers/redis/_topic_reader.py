"""What a reader of a topic does to get records: waiting for them, reading, and handing them out.

One call reads all partitions that have something new, for as many records as there is room; it begins when somebody waits in
`receive`, so nothing is fetched, and so noted as handed out, that nobody asked for.  What a cancelled `receive` was waiting
for comes out of the next one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from asyncio import get_running_loop
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from ...address import AnyTopic
from ...driver import Delivery, Source
from ...errors import BrokerError, Closed, ConfigError, NotFound, PositionLost
from ...events import PartitionPaused, PartitionResumed
from ...policy import LOG_AHEAD, LONE_DELIVERY
from ._context import Context
from ._keys import entity
from ._link import POLL, Argument, next_poll
from ._scripts import TOPIC_NOTE, TOPIC_READ
from ._topic_claim import Claim, Lease, Plan, lease_of
from ._topic_commit import Commits
from ._topic_member import PATIENT, Membership
from ._topic_place import all_ended

logger = logging.getLogger("brokerkit")

END_LOOKS: Final = 0.2
"""Seconds between looks whether the other members of a group have come to the end, too."""
_CLAIMS: Final = 256
"""Most partitions in one call."""


class TopicReader:
    """Reads the partitions in `_claims`."""

    def __init__(self, context: Context, topic: AnyTopic, source: Source, prefetch: int) -> None:
        self._context = context
        self._link = context.link
        self._topic = topic
        self._source = source
        self._group = source.group
        self._prefetch = prefetch
        self._keys = [entity(topic.name)]
        self._session = context.settings.session
        self._held: dict[object, Delivery] = {}
        """What is in hand, by `Lease`: the oldest first."""
        self._fetched: deque[Delivery] = deque()
        """What of it was not received yet."""
        self._claims: dict[int, Claim] = {}
        self._joined = b"g " + (source.group or "").encode()
        self._news: dict[Claim, None] = {}
        """Partitions that may have something to hand out, in the order in which they are looked at."""
        self._membership: Membership | None = None
        self._commits: Commits | None = None
        self._ends: list[int] | None = None
        self._others_ended = False
        self._looked = -math.inf
        self._suspect: Claim | None = None
        """Its next record has to come alone, as soon as nothing is in hand."""
        self._lone: Lease | None = None
        """What came alone, until its outcome is stored."""
        self._storing = False
        self._overtaken: deque[PositionLost] = deque()
        self._reading: list[Claim] = []
        self._poll_at = math.inf
        self._limit = 0
        self._waiter: asyncio.Future[None] | None = None
        self._until = math.inf
        self._once = False
        """Whether the waiting `receive` wants the answer of one read and no more."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._error: BrokerError | None = None
        self._entered = False

    def __repr__(self) -> str:
        partitions = sorted(self._claims)
        return f"<TopicConsumer {self._topic.name} group={self._group} {partitions=} in_flight={len(self._held)}>"

    @property
    def problem(self) -> BrokerError | None:
        """Why nothing comes, if nothing does."""
        return self._error

    def fail(self, error: BrokerError) -> None:
        """Let `receive` raise *error* from now on."""
        if self._error is None:
            self._error = error
            self._wake()

    def _doubtful(self) -> bool:
        """Return whether others may own everything by now: then nothing is handed out until the server has said."""
        member = self._membership
        return member is not None and get_running_loop().time() >= member.deadline

    # ------------------------------------------------------------------ receiving

    @property
    def prefetch(self) -> int:
        """How many unsettled deliveries this consumer holds at most."""
        return self._prefetch

    @prefetch.setter
    def prefetch(self, value: int) -> None:
        self._prefetch = value
        self._pump()

    @property
    def ended(self) -> bool:
        """Whether everything that was there on entering was handed out."""
        return self._ends is not None and not self._fetched and self._through() and self._others_ended

    def _through(self) -> bool:
        """Whether our own partitions are at their ends."""
        if self._ends is None or any(not claim.ended for claim in self._claims.values()):
            return False
        if len(self._claims) == len(self._ends):
            self._others_ended = True
        return True

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery]:
        """Return 1 to *limit* deliveries, or none after *timeout* seconds."""
        loop = get_running_loop()
        fetched = self._fetched
        deadline = None
        while True:
            if self._error is not None:
                raise self._error.with_traceback(None)
            if not self._entered:
                raise Closed("this consumer was left")
            now = loop.time()
            if self._overtaken:
                raise self._overtaken.popleft()
            if fetched and not self._doubtful():
                return [fetched.popleft() for _ in range(min(limit, len(fetched)))]
            if self._ends is not None and self._through() and (self._others_ended or await self._look_at_others()):
                return []
            if deadline is None:
                deadline = now + timeout
            elif now >= deadline:
                return []
            await self._wait(loop, limit, deadline)

    async def _wait(self, loop: asyncio.AbstractEventLoop, limit: int, deadline: float) -> None:
        if self._waiter is not None:
            raise ConfigError("receive is called by one task at a time")
        self._limit = limit
        self._waiter = waiter = loop.create_future()
        try:
            self._pump()
            self._once = bool(self._reading) and deadline <= loop.time()  # it asks, however little time it has
            self._until = deadline + POLL if self._once else deadline
            deadline = self._until
            # A timer of an earlier call stays: it finds out that it is too early.  So a busy consumer sets none.
            if deadline < self._timer_at or self._timer is None:
                self._arm(loop)
            await waiter
        finally:
            self._waiter = None

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        now = loop.time()
        if self._poll_at == math.inf:
            self._poll_at = next_poll(now)
        self._timer_at = min(self._until, self._poll_at, math.inf if self._ends is None else now + END_LOOKS)
        self._timer = loop.call_at(self._timer_at, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._timer_at = math.inf
        if self._waiter is None:
            return
        loop = get_running_loop()
        now = loop.time()
        if now >= self._until or self._ends is not None:
            self._wake()
        if now >= self._poll_at:
            self._poll_at = next_poll(now)
            # Consumers of queues, which wake now, call in the next turn.
            loop.call_soon(self._look_at_all)
        if self._waiter is not None and not self._waiter.done():
            self._arm(loop)

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _told(self, message: bytes) -> None:
        """Somebody has joined a group or left it, or nobody knows."""
        if not message:
            self._look_at_all()
        elif self._membership is not None and message == self._joined:
            self._membership.soon()

    def _heard(self, claim: Claim, message: bytes) -> None:
        """There is something new in a partition: *message*, or more, or nobody knows."""
        if not (message and self._at_hand(claim, message)):
            self._news[claim] = None
            self._pump()

    def _at_hand(self, claim: Claim, message: bytes) -> bool:
        """Hand *message* out if it is what comes next."""
        tracker, waiter = claim.tracker, self._waiter
        id, _, frame = message.partition(b" ")
        if (
            waiter is None
            or waiter.done()
            or self._reading
            or self._fetched
            or self._suspect is not None
            or self._lone is not None
            or int(id.partition(b"-")[2]) != tracker.high
            or not tracker.fresh
            or claim.gone
            or claim.revoking
            or self._room() <= 0
            or self._ahead(claim) <= 0
            or not self._link.up
        ):
            return False
        claim.after = b"(" + id
        if not claim.run((id,), (frame,), self._held, self._fetched):
            self._has_to_come_alone(claim)
            return False
        if self._membership is not None:
            # This is written before the program sees the record, which is at least a turn of the event loop later.
            args = (self._joined[2:], self._membership.name, claim.text, claim.epoch, tracker.high)
            self._link.call(TOPIC_NOTE, self._keys, args, timeout=PATIENT).add_done_callback(self._noted)
        self._wake()
        return True

    def _noted(self, answer: asyncio.Future[Any]) -> None:
        if answer.exception() is None and not answer.result() and self._membership is not None:
            self._membership.soon()

    def _room(self) -> int:
        """Return how many records may be handed out now."""
        held = self._held
        if self._error is not None or self._doubtful() or (self._lone is not None and self._lone in held):
            return 0
        return min(self._prefetch - len(held), self._limit)

    def _look_at_all(self) -> None:
        for claim in self._claims.values():
            self._news[claim] = None
        self._pump()

    async def _look_at_others(self) -> bool:
        """Return whether the other members of the group are at the end."""
        now = get_running_loop().time()
        if self._ends is None or now - self._looked < END_LOOKS:
            return False
        self._looked = now
        self._others_ended = await all_ended(self._link, self._topic, self._source, self._ends, self._claims)
        return self._others_ended and self._through() and not self._fetched

    # ------------------------------------------------------------------ reading

    def _pump(self) -> None:
        """Read, if somebody waits for it, there is room, and there may be something."""
        if self._waiter is None or self._reading or self._fetched or not self._news:
            return
        held, room = self._held, self._room()
        if room <= 0:
            return
        suspect = self._suspect
        if suspect is not None and (suspect.gone or suspect.revoking or suspect.tracker.fresh):
            suspect = self._suspect = None
        if suspect is not None and held:
            return
        if (suspect is not None or self._lone is not None) and not self._all_stored():
            return
        self._lone = None
        reading: list[Claim] = []
        rows: list[tuple[Claim, int, bytes]] = []
        left = room
        for claim in [suspect] if suspect is not None else list(itertools.islice(self._news, _CLAIMS)):
            if claim.gone or claim.revoking:
                self._news.pop(claim, None)
            elif claim.tracker.fresh:
                self._news.pop(claim)
                most = self._ahead(claim)
                if most > 0:
                    reading.append(claim)
                    rows.append((claim, most, b""))
            elif left > 0 and not (self._commits is not None and self._commits.busy):
                plan = claim.plan(left, empty=not held and not reading)
                if plan is Plan.LATER:
                    self._suspect = claim
                    break
                if plan is Plan.ALONE and not self._all_stored():
                    claim.unplan()
                    self._suspect = claim
                    break
                self._news.pop(claim, None)
                left -= len(claim.planned)
                reading.append(claim)
                rows.append((claim, 0, claim.wanted()))
                if plan is Plan.ALONE:
                    break
        if reading:
            self._read(reading, rows, left)

    def _all_stored(self) -> bool:
        """Return whether all outcomes are stored; else see to it, and read then.

        What comes next, or came last, may be what ends processes: nothing else must count a delivery for that.
        """
        if self._commits is None or not self._commits.pending:
            return True
        if not self._storing:
            self._storing = True
            self._commits.stored().add_done_callback(self._stored)
        return False

    def _stored(self, answer: asyncio.Future[None]) -> None:
        self._storing = False
        if answer.cancelled() or answer.exception() is not None:
            get_running_loop().call_later(END_LOOKS, self._pump)
        else:
            self._pump()

    def _ahead(self, claim: Claim) -> int:
        """Return how many fresh records of *claim* may be read; it stands where there may be none for now."""
        tracker = claim.tracker
        most = tracker.base + LOG_AHEAD - tracker.high
        if most <= 0:
            self._stands(claim)
        return most if claim.end is None else min(most, claim.end - tracker.high)

    def _read(self, reading: list[Claim], rows: list[tuple[Claim, int, bytes]], room: int) -> None:
        commits, member = self._commits, self._membership
        number, positions = (0, {}) if commits is None else commits.ride(reading, get_running_loop().time())
        args: list[Argument] = [self._group or "", b"" if member is None else member.name, number, room]
        for claim, most, wanted in rows:
            start = claim.scan if claim.planned else claim.start()
            args += (
                claim.text,
                claim.epoch,
                claim.tracker.high,
                start,
                most,
                wanted,
                positions.get(claim, b""),
            )
        self._reading = reading
        answer = self._link.call(TOPIC_READ, self._keys, args, timeout=PATIENT)
        answer.add_done_callback(self._answered)

    def _answered(self, answer: asyncio.Future[Any]) -> None:
        reading, self._reading = self._reading, []
        error = answer.exception()
        if not self._entered:
            return
        try:
            if error is not None:
                for claim in reading:
                    claim.unplan()
                raise error
            if self._commits is not None:
                self._commits.rode()
            self._take_in(reading, answer.result())
        except NotFound:
            self.fail(NotFound(f"{self._topic.name} was deleted"))
        except BrokerError as failure:
            self.fail(failure)
        except Exception as failure:
            logger.exception("%s: a reply cannot be read", self._topic.name)
            self.fail(BrokerError(f"the driver failed: {type(failure).__name__}"))
        if self._once or self._fetched or self._overtaken or self._ends is not None:
            self._wake()
        else:
            self._pump()

    def _take_in(self, reading: list[Claim], rows: list[list[Any]]) -> None:
        """Hand out what a read has brought."""
        found = {row[0]: row for row in rows}
        for place, claim in enumerate(reading):
            row = found.get(place)
            if claim.gone:
                continue
            if row is not None and row[1] == b"lost":
                claim.unplan()
                if self._membership is not None:
                    self._membership.soon()
            elif claim.planned:
                self._again(claim, row or [])
            elif row is None:
                continue
            elif row[1] == b"anew":
                raise NotFound
            elif row[1] == b"skip":
                self._news[claim] = None
            elif not claim.revoking:
                self._follow(claim, row)

    def _again(self, claim: Claim, row: list[Any]) -> None:
        """Hand out what was handed out before."""
        planned, lost = claim.unplan(row)
        if lost:
            self._lose(claim, lost)
        self._news[claim] = None
        if claim.revoking:
            return
        for offset in planned:
            if offset not in claim.back:
                continue
            alone = claim.deliveries(offset) >= LONE_DELIVERY
            if alone and not claim.alone:  # it was not known before
                self._suspect = claim
                break
            delivery = claim.hand_out(offset, self._held)
            self._fetched.append(delivery)
            if alone:
                self._lone, self._suspect = lease_of(delivery), None
                break
        self._touch(claim)

    def _follow(self, claim: Claim, row: list[Any]) -> None:
        """Hand out what follows in a partition."""
        _, what, finish, last, foreign = row[:5]
        tracker, held, fetched = claim.tracker, self._held, self._fetched
        for id in foreign:
            claim.tell_foreign(id)
        through = True
        if what == b"run":
            through = claim.run(row[5::2], row[6::2], held, fetched)
        else:
            if what == b"more" and not claim.after:
                claim.scan, last = last, b""
            elif len(row) == 5 and not foreign:
                through = self._jumped(claim, finish)
            for id, frame in zip(row[5::2], row[6::2], strict=True):
                offset = int(id.partition(b"-")[2])
                if offset > tracker.high and not self._jumped(claim, offset):
                    return
                claim.after = b"(" + id
                if not claim.run((id,), (frame,), held, fetched):
                    through, last = False, id
                    break
        if last:
            claim.after = b"(" + last
        if tracker.high < finish and (claim.end is None or tracker.high < claim.end):
            if tracker.room > 0:
                self._news[claim] = None
            else:
                self._stands(claim)
        if not through and not tracker.fresh:
            self._has_to_come_alone(claim)

    def _has_to_come_alone(self, claim: Claim) -> None:
        """Hand out nothing before the next record of *claim*, and that one when nothing else is in hand."""
        self._suspect = claim
        self._news[claim] = None
        self._touch(claim)

    def _jumped(self, claim: Claim, offset: int) -> bool:
        """Go on at *offset* behind a gap; return False where that has to wait for what is unsettled."""
        lost = claim.jump(offset)
        if lost:
            self._lose(claim, lost)
        if claim.tracker.high >= offset and claim.tracker.room > 0:
            return True
        self._stands(claim)
        return False

    def _lose(self, claim: Claim, lost: int) -> None:
        text = f"{lost} records of {self._topic.name}[{claim.number}] were removed before they were read"
        self._overtaken.append(PositionLost(text, lost=lost))
        self._touch(claim)

    def _stands(self, claim: Claim) -> None:
        if not claim.standing and (claim.end is None or claim.tracker.high < claim.end):
            claim.standing = True
            self._context.emit(PartitionPaused(address=self._topic.name, group=self._group, partition=claim.number))

    def _freed(self, claim: Claim) -> None:
        """Something of *claim* is done: there is room."""
        if claim.standing and claim.tracker.room > 0:
            claim.standing = False
            self._context.emit(PartitionResumed(address=self._topic.name, group=self._group, partition=claim.number))
            self._news[claim] = None
        if self._waiter is not None:
            self._pump()

    def _touch(self, claim: Claim) -> None:
        if self._commits is not None:
            self._commits.touch(claim)
