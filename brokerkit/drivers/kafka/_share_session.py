"""A member's session at one broker: it asks for records there and says what becomes of them, one request at a time.

A broker counts the requests of a session, answers them one after the other, and ends the session with its connection; what was
acquired in it then goes to others.  What is said of records travels with the next request for more of them; on its own only
where there is no room for more, or where locks are renewed, which may not be done together.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Sequence
from typing import Any, Final, Protocol

from kio.schema.errors import ErrorCode

from ...errors import AuthenticationError, BrokerError, BrokerUnavailable, ConfigError
from ._cluster import PAUSE, Cluster
from ._errors import DENIED, RETRY, STALE_LEADER, of_code
from ._share_ask import CLOSE, OPEN, Said, ShareAcknowledge, ShareFetch, acknowledged, throttled
from ._share_locks import Hand, Lock, Parcel
from ._share_open import Opener
from ._share_place import Place
from ._wire import Wire

logger = logging.getLogger("brokerkit")

ANSWER: Final = 4 * 1024 * 1024
"""Bytes of one answer; a single batch may be larger."""
WAIT: Final = 0.5
"""Seconds that a request waits at the broker while nothing is in hand.  It doubles while nothing comes, up to"""
IDLE: Final = 2.0
SHORT: Final = 0.02
"""The same while something is: what is said of it waits behind that.  It doubles while nothing happens, up to"""
LONG: Final = 0.1
LINGER: Final = 0.005
"""Seconds that a member waits for more room before it asks for little, where much is to be had."""
DEFERRED: Final = 0.05
"""Seconds for which little is not said, unless somebody waits for it: what arrives comes no sooner than that is stored."""
SOON: Final = 0.04
"""The same where something has just come: what comes next may take as long as storing does."""
RENEWED: Final = 0.6
"""How much of a lock is left when it is renewed: a process may stand still for half of it, and a request takes time."""
ANSWERED: Final = 5.0
"""Seconds behind its wait until a request counts as lost; for one that ends with the session's losing something:"""
FAILOVER: Final = 20.0
"""The broker may have to wait for the one that keeps what is said."""
_REFUSED: Final = 1.0
"""Seconds until a broker is asked again that refuses, or that fails for a reason nobody knows."""
_SESSION: Final = frozenset({ErrorCode.share_session_not_found, ErrorCode.invalid_share_session_epoch})
_FULL: Final = ErrorCode.share_session_limit_reached
_LAST_EPOCH: Final = 0x7FFFFFFF


class Owner(Protocol):
    """Whose sessions they are."""

    cluster: Cluster
    names: bytes
    topic: str
    group: str
    id: uuid.UUID
    hand: Hand
    opener: Opener
    lock: float
    """For how long the broker locks a record, by what it said last."""

    def credit(self, session: Session, /) -> int:
        """Return how many records *session* may ask for; with 0 it is woken when there may be some."""
        ...

    @property
    def quarter(self) -> int:
        """What is little to ask for."""
        ...

    @property
    def contended(self) -> bool:
        """Whether other sessions wait for room."""
        ...

    def learn(self, lock: float, /) -> None:
        """Take in what the broker says `lock` is."""
        ...

    def changed(self, regained: list[Lock] = ..., /) -> None:
        """Take in that something may have come, and what is ours again."""
        ...

    def fail(self, error: BrokerError, /) -> None:
        """Take in why nothing comes of some partition."""
        ...

    def damaged(self, error: BrokerError, /) -> None:
        """Take in that something cannot be read, by nobody."""
        ...


class Session:
    """What one member and one broker have with each other."""

    def __init__(self, owner: Owner, node: int) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self.node = node
        self.places: dict[int, Place] = {}
        """The partitions that the broker leads."""
        self.waiter: asyncio.Future[None] | None = None
        """What wakes it while it rests."""
        self.asked = 0
        """How many records the request that is under way may bring."""
        self.since: float | None = None
        """When that is to be answered at the latest, if nothing comes."""
        self.busy = True
        """Whether there was as much as was asked for."""
        self.soonest = math.inf
        """Until when what is in hand of it is ours, at least."""
        self.over = False
        self.problem: BrokerError | None = None
        """Why nothing comes, if nothing does."""
        self._telling = False  # whether the request that is under way says something
        self._renewing = False
        self._epoch = OPEN
        self._wire: Wire | None = None
        self._known: set[int] = set()
        """The partitions that the broker has in the session."""
        self._until = 0.0  # nothing is asked for before
        self._spoke = 0.0  # when it last said something
        self._fresh = False  # whether the last request has brought something
        self._wait = SHORT
        self._idle = WAIT
        self._failures = 0
        self._said = ""

    def __repr__(self) -> str:
        return f"<Session at broker {self.node} epoch={self._epoch} places={sorted(self.places)}>"

    # ------------------------------------------------------------------ life

    def wake(self) -> None:
        """Look again for something to say or to ask for."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def run(self) -> None:
        """Ask and say until cancelled, or `finish`."""
        while not self.over:
            try:
                pause = await self._step()
            except Exception as error:
                if self.over:
                    break
                self._broken(error)
                pause = min(_REFUSED, PAUSE * 2 ** min(self._failures - 1, 8))
            if pause:
                await asyncio.sleep(pause)

    async def finish(self, timeout: float) -> None:
        """Say what is left to be said, and end the session, which hands back all else."""
        self.over = True
        self.wake()
        wire, owner = self._wire, self._owner
        try:
            parcels = self._parcels(self._loop.time())
            if wire is None or wire.closed or self._epoch == OPEN or not (parcels or self._telling):
                return  # the connection's end says enough
            # It may come behind a request that waits for records: what that brings is handed back, too.
            for parcel in parcels.values():
                parcel.renewed = []  # what is handed back
            said = [(index, parcel.said()) for index, parcel in parcels.items() if parcel]
            answer = await wire.send(ShareAcknowledge(owner.names, CLOSE, owner.id, said, renew=False), timeout)
            if answer.error_code is ErrorCode.none:
                self._hear(parcels, acknowledged(answer), 0.0)
        except BrokerError as error:
            logger.debug("%r: %s", self, error)
        finally:
            owner.cluster.drop(self, self.node)

    def check(self) -> None:
        """Notice that the connection is gone, while nothing is asked."""
        if self._epoch != OPEN and self.since is None and (self._wire is None or self._wire.closed):
            self._lose()
            self.wake()

    def scan(self, now: float) -> None:
        """Notice what has run out, and have renewed what is to be renewed by now."""
        if self.soonest <= now:
            expired = [place.expire(now) for place in self.places.values()]
            if any(expired):
                self._owner.changed()
        lock = self._owner.lock
        if self._renewing or self.soonest - now > lock * RENEWED:
            return
        before = now + (lock * (1 + RENEWED) - self._owner.hand.margin) / 2
        self.soonest = min((place.renew_from(before) for place in self.places.values()), default=math.inf)
        if any(place.renew for place in self.places.values()):
            self.wake()

    # ------------------------------------------------------------------ one request

    async def _step(self) -> float:
        """Do what is to be done next; return how long to do nothing."""
        owner = self._owner
        if self._epoch != OPEN and (self._wire is None or self._wire.closed or not self.places):
            self._lose()
        now = self._loop.time()
        credit = owner.credit(self) if now >= self._until and self._wanted(now) else 0
        talk = self._epoch != OPEN and any(place.talkative and place.until <= now for place in self.places.values())
        if not credit and not talk:
            await self._rest(now)
            return 0
        if self.busy and 0 < credit < owner.quarter:
            await asyncio.sleep(LINGER)
            now = self._loop.time()
            credit = owner.credit(self)
        if self._epoch == OPEN:
            return await self._fetch(credit, {}) if credit else 0
        parcels = {} if credit and self._defers(now) else self._parcels(now)
        if not credit or any(parcel.renewed for parcel in parcels.values()):
            return await self._acknowledge(parcels) if parcels else 0
        return await self._fetch(credit, parcels)

    def _defers(self, now: float) -> bool:
        """Return whether what there is to say is said later."""
        if self.busy or now >= self._spoke + (SOON if self._fresh else DEFERRED):
            return False
        return all(place.patient for place in self.places.values())

    async def _rest(self, now: float) -> None:
        times = [place.until for place in self.places.values() if place.talkative]
        times += [max(self._until, place.resting) for place in self.places.values()]
        until = min((time for time in times if time > now), default=math.inf)
        self.waiter = self._loop.create_future()
        timer = self._loop.call_at(until, self.wake) if until < math.inf else None
        try:
            await self.waiter
        finally:
            self.waiter = None
            if timer is not None:
                timer.cancel()

    def _wanted(self, now: float) -> set[int]:
        """Return the partitions to be asked for."""
        return {index for index, place in self.places.items() if place.resting <= now}

    def _parcels(self, now: float) -> dict[int, Parcel]:
        parcels: dict[int, Parcel] = {}
        for index, place in self.places.items():
            if place.until <= now and place.talkative:
                parcel = place.parcel(now)
                if parcel is not None:
                    parcels[index] = parcel
        return parcels

    async def _send(self, request: Any, patience: float, *, wait: float = 0.0, telling: bool) -> Any:
        wire = self._wire
        if wire is None:
            cluster = self._owner.cluster
            wire = await cluster.open(self.node, self, timeout=cluster.settings.connect_timeout)
            self._wire = wire
        now = self._loop.time()
        self.since = now + wait
        self._telling = telling
        if telling:
            self._spoke = now
        try:
            return await wire.send(request, patience)
        finally:
            self.since = None
            self._telling = False

    async def _acknowledge(self, parcels: dict[int, Parcel]) -> float:
        owner = self._owner
        renew = any(parcel.renewed for parcel in parcels.values())
        said = [(index, parcel.said()) for index, parcel in parcels.items()]
        sent = self._loop.time()
        request = ShareAcknowledge(owner.names, self._epoch, owner.id, said, renew=renew)
        self._renewing = renew
        try:
            answer = await self._send(request, FAILOVER, telling=True)
        finally:
            self._renewing = False
        if answer.error_code is not ErrorCode.none:
            return self._refused(answer, parcels)
        self._count()
        if renew:
            self._learn(answer)
        self._hear(parcels, acknowledged(answer), sent + owner.lock - owner.hand.margin)
        self._wait = SHORT
        owner.changed()
        return throttled(answer)

    async def _fetch(self, records: int, parcels: dict[int, Parcel]) -> float:
        owner = self._owner
        sent = self._loop.time()
        wanted = self._wanted(sent)
        parts: dict[int, Sequence[Said]] = dict.fromkeys(wanted - self._known, ())
        parts |= {index: parcel.said() for index, parcel in parcels.items()}
        holds = any(place.locks for place in self.places.values())
        wait = self._longest(holds)
        if not parcels and any(place.due for place in self.places.values()):
            wait = min(wait, max(0.001, self._spoke + DEFERRED - sent))
        request = ShareFetch(
            owner.names,
            self._epoch,
            owner.id,
            parts.items(),
            forget=[*(self._known - wanted)],
            wait=wait,
            size=ANSWER,
            records=records,
        )
        self.asked = records
        try:
            answer = await self._send(request, wait + self._patience(holds), wait=wait, telling=bool(parcels))
        finally:
            self.asked = 0
        if answer.error_code is not ErrorCode.none:
            return self._refused(answer, parcels)
        self._known = wanted
        self._count()
        self._learn(answer)
        until = sent + owner.lock - owner.hand.margin
        parts_of = {int(data.partition_index): data for topic in answer.responses for data in topic.partitions}
        # First what was said: a record that was handed back may have come again already.
        self._hear(parcels, {index: data.acknowledge_error_code for index, data in parts_of.items()}, until)
        if self.over:
            return 0
        got = self._take_in(parts_of, wanted, until)
        self.busy = 2 * got >= records
        self._fresh = got > 0
        self._wait = SHORT if got or parcels else min(LONG, 2 * self._wait)
        self._idle = WAIT if got or parcels or holds else min(IDLE, 2 * self._idle)
        now = self._loop.time()
        if not got and not parcels and now < sent + wait / 2:
            self._until = max(self._until, now + PAUSE)
        pause = throttled(answer)
        if not pause and (got or owner.contended):
            await asyncio.sleep(0)  # so that what came is handed out, and who waits for room comes first
        return pause

    def _patience(self, holds: bool) -> float:
        """Return how long an answer may take: what an answer that is given up may have brought counts as handed out."""
        return FAILOVER if holds else min(FAILOVER, ANSWERED * 2 ** min(self._failures, 8))

    def _longest(self, holds: bool) -> float:
        """Return how long the broker may wait for something to come."""
        owner = self._owner
        if owner.contended:
            return SHORT
        return min(self._wait, owner.lock / 10) if holds else min(self._idle, owner.lock / 4)

    def _count(self) -> None:
        self._epoch = OPEN + 1 if self._epoch == _LAST_EPOCH else self._epoch + 1
        self._failures = 0
        self._said = ""

    def _learn(self, answer: Any) -> None:
        lock = answer.acquisition_lock_timeout.total_seconds()
        if lock > 0:
            self._owner.learn(lock)

    # ------------------------------------------------------------------ what is answered

    def _take_in(self, parts: dict[int, Any], wanted: set[int], until: float) -> int:
        """Take in what comes, and return how many records that are."""
        owner = self._owner
        now = self._loop.time()
        got = 0
        fine = True
        regained: list[Lock] = []
        for index in wanted:
            place = self.places.get(index)
            if place is not None and place.adrift:
                place.works(now)
        for index, data in parts.items():
            place = self.places.get(index)
            if place is None:
                continue
            if data.error_code is not ErrorCode.none:
                fine = False
                self._failed(place, data.error_code, data.error_message, now)
            elif data.acquired_records:
                acquired = data.acquired_records
                again, broken = owner.opener.take_in(place, data.records, acquired, until)
                regained += again
                got += sum([each.last_offset - each.first_offset + 1 for each in acquired])
                if broken is not None:
                    owner.damaged(broken)
        if got:
            self.soonest = min(self.soonest, until)
        if fine and len(wanted) == len(self.places):
            self.problem = None
        owner.changed(regained)
        return got

    def _hear(self, parcels: dict[int, Parcel], codes: dict[int, int], until: float) -> None:
        """Take in what the broker says to *parcels*."""
        now = self._loop.time()
        for index, parcel in parcels.items():
            place = self.places.get(index)
            if place is None:
                continue
            code = codes.get(index)
            if code == 0:
                place.agreed(parcel, until)
            elif code == ErrorCode.invalid_record_state:
                place.refused(parcel, now)
            elif code in STALE_LEADER:
                place.drift(now)  # what the broker has done of it is not known
                self._owner.cluster.stale()
            else:
                denied = code in DENIED
                place.postpone(parcel, now + (_REFUSED if denied else 2 * PAUSE))
                if denied and code is not None:
                    self._fail(of_code(code, self._what(code)))

    def _failed(self, place: Place, code: ErrorCode, said: str | None, now: float) -> None:
        if code in DENIED:
            self._until = now + _REFUSED
            self._fail(of_code(int(code), self._what(int(code))))
            return  # what is in hand stays so
        place.resting = now + PAUSE
        place.drift(now)
        self._owner.cluster.stale()
        if code not in STALE_LEADER and code not in RETRY:
            place.resting = now + _REFUSED
            error = of_code(int(code), f"{self._owner.topic}[{place.index}]", said)
            if str(error) != str(self.problem):
                logger.warning("%r: %s", self, error)
            self.problem = error

    def _refused(self, answer: Any, parcels: dict[int, Parcel]) -> float:
        """Do what is to be done about a request of which nothing was done; return how long to do nothing."""
        code = answer.error_code
        now = self._loop.time()
        if code in DENIED:
            for index, parcel in parcels.items():
                place = self.places.get(index)
                if place is not None:
                    place.postpone(parcel, now + _REFUSED)
            self._until = now + _REFUSED
            self._fail(of_code(int(code), self._what(int(code)), answer.error_message))
            return 0
        session = f"the session of group {self._owner.group} at broker {self.node}"
        error = of_code(int(code), session, answer.error_message)
        if code in _SESSION:
            logger.info("%r: %s", self, error)
            self._lose()
            return PAUSE  # so that the broker has seen the connection end before another begins
        if code is _FULL:
            self.problem = error
            self._lose()
            return _REFUSED
        raise error

    def _what(self, code: int) -> str:
        topic = code == ErrorCode.topic_authorization_failed
        return f"READ on topic {self._owner.topic}" if topic else f"READ on group {self._owner.group}"

    # ------------------------------------------------------------------ what goes wrong

    def _fail(self, error: BrokerError) -> None:
        """Tell why nothing comes, unless that was told."""
        told = self.problem is not None and str(self.problem) == str(error)
        self.problem = error
        if not told:
            self._owner.fail(error)

    def _lose(self) -> None:
        """Begin anew: with the session, all that was acquired in it has gone."""
        self._epoch = OPEN
        self._known = set()
        self._wire = None
        self._owner.cluster.drop(self, self.node)
        now = self._loop.time()
        for place in self.places.values():
            place.drift(now)
        self.soonest = math.inf
        self.busy = True
        self._owner.changed()

    def _broken(self, error: Exception) -> None:
        self._failures += 1
        self._lose()
        self._owner.cluster.stale()
        said = f"{type(error).__name__}: {error}"
        if said != self._said:
            self._said = said
            unexpected = not isinstance(error, BrokerError)
            logger.warning("%r: %s", self, said, exc_info=error if unexpected else None)
        if isinstance(error, (AuthenticationError, ConfigError)):
            self._fail(error)
        elif isinstance(error, BrokerError):
            self.problem = error
        else:
            self.problem = BrokerUnavailable(f"the driver failed: {type(error).__name__}")
