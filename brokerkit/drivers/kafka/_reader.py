"""What a reader of a topic does to get records: waiting for them, and handing them out.

Records lie in the fetcher's buffers; what is taken out of them is what somebody asked for, so nothing is noted as handed out
that nobody wanted.  What a cancelled `receive` was about to return comes out of the next one.
"""

from __future__ import annotations

import asyncio
import logging
import math
from asyncio import get_running_loop
from collections import deque
from collections.abc import Collection
from typing import Final

from ...address import AnyQueue, AnyTopic, Queue
from ...driver import Delivery, Revoked, Source
from ...errors import BrokerError, Closed, ConfigError, PositionLost
from ...events import Expired, PartitionPaused, PartitionResumed
from .._lone import Lone
from ._claim import Claim, Lease, lease_of
from ._commit import Commits
from ._context import Context
from ._fetch import Fetcher
from ._group import Group
from ._life import Life

logger = logging.getLogger("brokerkit")

POLL: Final = 1.0
"""Seconds after which all partitions are looked at although nobody has told of anything new; without a group, with which time
brings nothing:"""
_IDLE: Final = 10.0
END_LOOKS: Final = 0.2
"""Seconds between looks whether the end is reached, by this member and by the others of its group."""
_AGAIN: Final = 0.2


class Reader(Life):
    """Hands out the records of the partitions in `_claims`."""

    def __init__(
        self, context: Context, address: AnyTopic | AnyQueue, source: Source, prefetch: int, revoked: Revoked
    ) -> None:
        super().__init__(context, address, revoked)
        self._cluster = context.cluster
        self._address = address
        self._source = source
        self._prefetch = prefetch
        self._session = context.settings.session
        self._held: dict[object, Delivery] = {}
        """What is in hand, by `Lease`: the oldest first."""
        self._fetched: deque[Delivery] = deque()
        """What of it was not received yet."""
        self._claims: dict[int, Claim] = {}
        self._news: dict[Claim, None] = {}
        """Partitions that may have something to hand out, in the order in which they are looked at."""
        self._fetcher: Fetcher | None = None
        self._arrival = asyncio.Event()
        self._group: Group | None = None
        self._commits: Commits | None = None
        self._ends: list[int] | None = None
        self._others_ended = False
        self._looked = -math.inf
        self._suspect: Claim | None = None
        """Its next record has to come alone, as soon as nothing is in hand that is not proven."""
        self._lone = Lone(self._held, self._wake)
        """What was received alone.  Of a topic, which has no lease, it is never proven."""
        self._solo: Lease | None = None
        """What comes alone, until it is received."""
        self._doubt = False
        """Whether outcomes must be stored before others come, since something came alone."""
        self._storing = False
        self._unnoted = False
        """Whether what was handed out must not be received before that is stored."""
        self._overtaken: deque[PositionLost] = deque()
        self._blocked = False
        """Whether it is for want of room that nothing is handed out."""
        self._waiter: asyncio.Future[None] | None = None
        self._until = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def __repr__(self) -> str:
        partitions = sorted(self._claims)
        group = self._source.group
        return f"<TopicConsumer {self._address.name} group={group} {partitions=} in_flight={len(self._held)}>"

    @property
    def problem(self) -> BrokerError | None:
        """Why nothing comes, or is stored, if that is so."""
        group, commits = self._group, self._commits
        return (
            self._error or (None if group is None else group.problem) or (None if commits is None else commits.problem)
        )

    def _doubtful(self) -> bool:
        """Return whether others may own everything by now: then nothing is handed out until the cluster has said."""
        group = self._group
        return group is not None and get_running_loop().time() >= group.owned_until

    # ------------------------------------------------------------------ receiving

    @property
    def prefetch(self) -> int:
        """How many unsettled deliveries this consumer holds at most."""
        return self._prefetch

    @prefetch.setter
    def prefetch(self, value: int) -> None:
        self._prefetch = value
        self._wake()

    @property
    def ended(self) -> bool:
        """Whether everything that was there on entering was handed out."""
        return self._at_end() and self._others_ended

    def _at_end(self) -> bool:
        """Return whether our own partitions are at their ends."""
        if self._ends is None or self._fetched or not all(claim.ended for claim in self._claims.values()):
            return False
        if len(self._claims) >= len(self._ends):
            self._others_ended = True
        return True

    async def receive(self, limit: int, timeout: float) -> list[Delivery]:
        """Return 1 to *limit* deliveries, or none after *timeout* seconds."""
        loop = get_running_loop()
        fetched = self._fetched
        deadline = None
        while True:
            if self._error is not None:
                raise self._error.with_traceback(None)
            if not self._entered:
                raise Closed("this consumer was left")
            if self._overtaken:
                raise self._overtaken.popleft()
            if not fetched:
                self._hand_out(limit)
            if fetched and not self._unnoted and not self._doubtful():
                if self._commits is None or not self._commits.unsent:
                    if self._solo is not None:
                        self._received_alone()
                    return [fetched.popleft() for _ in range(min(limit, len(fetched)))]
                self._commits.unsent = False
                await asyncio.sleep(0)  # the note is written before the program sees what it is about
                continue
            if self._at_end() and (self._others_ended or await self._look_at_others()):
                return []
            now = loop.time()
            if deadline is None:
                deadline = now + timeout
            if now >= deadline:
                return []
            await self._wait(loop, deadline)

    async def _wait(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        if self._waiter is not None:
            raise ConfigError("receive is called by one task at a time")
        self._waiter = waiter = loop.create_future()
        self._until = deadline
        # A timer of an earlier call stays: it finds out that it is too early.  So a busy consumer sets none.
        if min(deadline, loop.time() + self._due()) < self._timer_at or self._timer is None:
            self._arm(loop)
        try:
            await waiter
        finally:
            self._waiter = None

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        now = loop.time()
        looks = END_LOOKS if self._ends is not None else _IDLE if self._group is None and not self._held else POLL
        self._timer_at = at = min(self._until, now + min(looks, self._due()))
        self._timer = loop.call_at(at, self._ring)

    def _due(self) -> float:
        """Return in how many seconds the first of what waits for its time is due."""
        if not isinstance(self._address, Queue):
            return math.inf
        waits = [claim.soon - claim.now() for claim in self._claims.values()]
        return max(0.001, min(waits, default=POLL))

    def _ring(self) -> None:
        """Look at everything, if somebody waits."""
        self._timer = None
        self._timer_at = math.inf
        if self._waiter is not None:
            self._news.update(dict.fromkeys(self._claims.values()))
            self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def arrived(self) -> None:
        """Something was fetched, or a log goes on further than was known."""
        self._arrival.set()
        if self._waiter is not None:
            if self._fetcher is not None and not self._fetcher.ready():
                self._news.update(dict.fromkeys(self._claims.values()))
            self._wake()

    async def _look_at_others(self) -> bool:
        """Return whether the other members of the group are at the end."""
        raise NotImplementedError

    # ------------------------------------------------------------------ handing out

    def _hand_out(self, limit: int) -> None:
        """Hand out what there is, as far as there is room."""
        held, fetcher = self._held, self._fetcher
        room = min(self._prefetch - len(held), limit)
        lone, suspect = self._lone, self._suspect
        self._blocked = True
        if fetcher is None or room <= 0 or (lone.active and lone.holds_up()) or self._doubtful():
            return
        if suspect is not None and (suspect.gone or suspect.revoking or not suspect.alone):
            suspect = self._suspect = None
        if suspect is not None and not lone.may_come():
            return
        if (suspect is not None or self._doubt) and not self._all_stored():
            return
        self._doubt = False
        if suspect is not None and self._hand_out_alone(suspect):
            return
        self._blocked = False
        news, claims = self._news, self._claims
        for number in fetcher.ready():
            claim = claims.get(number)
            if claim is not None:
                news.setdefault(claim)
        if news:
            self._hand_out_fairly(fetcher, room)

    def _hand_out_fairly(self, fetcher: Fetcher, room: int) -> None:
        """Hand out up to *room* records, some of each partition."""
        held, fetched, news = self._held, self._fetched, self._news
        touched: list[Claim] = []
        turn = list(news)
        count = len(turn)
        for place, claim in enumerate(turn):
            if claim.gone or claim.revoking:
                del news[claim]
                continue
            share = -(-room // (count - place))
            if share <= 0:
                break
            del news[claim]
            before, tracker, stood = len(fetched), claim.tracker, claim.standing
            base, high = tracker.base, tracker.high
            claim.hand_out(fetcher, share, held, fetched)
            taken = len(fetched) - before
            if claim.expired:
                self._tell_expired(claim)
            if taken:
                touched.append(claim)
                room -= taken
            elif tracker.base != base or tracker.high != high:
                self._touch(claim)  # a gap
            if taken == share or claim.ready:
                news[claim] = None  # and others first
            if claim.standing and not stood:
                self._tell_of(PartitionPaused, claim)
            if claim.alone:
                self._suspect = claim
                news[claim] = None
                self._blocked = True
                break
        if touched:
            self._note(touched)
        elif self._suspect is not None and self._lone.may_come() and self._all_stored():
            self._hand_out_alone(self._suspect)

    def _hand_out_alone(self, claim: Claim) -> bool:
        """Hand out the record that has to come alone; return whether there is one."""
        self._suspect = None
        delivery = claim.hand_out_alone(self._held)
        if delivery is None:
            return False
        self._solo = lease_of(delivery)
        self._doubt = True
        self._fetched.append(delivery)
        self._news[claim] = None
        self._blocked = True
        self._note([claim])
        return True

    def _received_alone(self) -> None:
        """What came alone is received: from now on it is proven, or not, that the program lives on with it."""
        lease, self._solo = self._solo, None
        self._lone.came(lease, self._address.lease if isinstance(self._address, Queue) else math.inf)

    def _note(self, claims: Collection[Claim]) -> None:
        """Have it noted that records of *claims* are handed out; before one comes again, that is awaited."""
        commits = self._commits
        if commits is None:
            return
        commits.ahead(claims)
        repeats = False
        for claim in claims:
            if claim.repeats:
                claim.repeats, repeats = False, True
        if repeats:
            self._unnoted = True
            self._store_notes()

    def _store_notes(self) -> None:
        if self._commits is not None and self._unnoted:
            self._commits.stored().add_done_callback(self._noted)

    def _noted(self, answer: asyncio.Future[None]) -> None:
        if not answer.cancelled() and answer.exception() is None:
            self._unnoted = False
            self._wake()
        elif self._entered:
            get_running_loop().call_later(_AGAIN, self._store_notes)

    def _all_stored(self) -> bool:
        """Return whether all outcomes are stored; else see to it, and hand out then.

        What comes next, or came last, may be what ends processes: nothing else must count a delivery for that.
        """
        commits = self._commits
        if commits is None or not commits.pending:
            return True
        if not self._storing:
            self._storing = True
            commits.stored().add_done_callback(self._stored)
        return False

    def _stored(self, answer: asyncio.Future[None]) -> None:
        self._storing = False
        if answer.cancelled() or answer.exception() is not None:
            get_running_loop().call_later(_AGAIN, self._wake)
        else:
            self._wake()

    # ------------------------------------------------------------------ partitions

    def _freed(self, claim: Claim) -> None:
        """Something of *claim*, which stood, is done."""
        if not claim.full:
            claim.standing = False
            self._news[claim] = None
            self._tell_of(PartitionResumed, claim)

    def _tell_of(self, make: type[PartitionPaused | PartitionResumed], claim: Claim) -> None:
        self._context.emit(make(address=self._address.name, group=self._source.group, partition=claim.number))

    def _tell_expired(self, claim: Claim) -> None:
        count, claim.expired = claim.expired, 0
        self._touch(claim)
        self._context.emit(Expired(address=self._address.name, count=count))

    def _touch(self, claim: Claim) -> None:
        if self._commits is not None:
            self._commits.touch(claim)

    def overtaken(self, partition: int, at: int, start: int) -> None:
        """Records of *partition* from *at* up to *start* were removed."""
        claim = self._claims.get(partition)
        if claim is None:
            return
        unread = claim.anew and claim.tracker.high == 0
        lost = claim.overtaken(at, start)
        if lost and isinstance(self._address, Queue):  # nothing goes by itself there: somebody has purged it
            logger.info("%s[%d]: %d records were removed before they were read", self._address.name, partition, lost)
        elif lost and not unread:
            text = f"{lost} records of {self._address.name}[{partition}] were removed before they were read"
            self._overtaken.append(PositionLost(text, lost=lost))
        claim.anew = False
        self._touch(claim)
        self._news[claim] = None
        self._wake()
