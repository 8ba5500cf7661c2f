"""Storing what a reader has done: positions in the background, and what settlements publish, both in one script call.

A member has one such call under way.  Each has a number that the server keeps, so that one whose answer was lost is made
again and does nothing twice, and one that comes late does not take a position back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from ...address import Address, Topic
from ...driver import Delivery, Record
from ...errors import BrokerError, BrokerUnavailable, DeliveryLost, NotFound, SettingsMismatch
from ...policy import MAX_BODY
from ._frames import topic_blob, writer
from ._keys import entity
from ._link import Argument, Link, Unanswered
from ._publish import derived_settings, kind_of, too_large
from ._scripts import TOPIC_SETTLE
from ._topic_claim import Claim, Lease
from ._topic_member import PATIENT

EVERY: Final = 0.4
"""Seconds after which what is done is stored, if nothing has taken it along before."""
RIDE: Final = 0.1
"""Seconds between positions that are stored together with a read."""
_JOBS: Final = 200
_BYTES: Final = 1024 * 1024
_AGAIN: Final = 0.1


class Job:
    """One settlement that publishes."""

    __slots__ = ("claim", "copies", "future", "lease", "names", "size")

    def __init__(self, lease: Lease, records: Sequence[Record], spread: int) -> None:
        self.lease = lease
        self.claim = lease.claim
        self.names = [record.address for record in records]
        self.copies: list[tuple[bytes, bytes, bytes, bytes]] = []
        for record in records:
            if len(record.body or b"") > MAX_BODY:
                raise too_large(record)
            address = record.address
            keyless = isinstance(address, Topic) and record.key is None
            blob = topic_blob(record, spread) if keyless else writer(address)(record)
            self.copies.append((entity(address.name), kind_of(address), derived_settings(address), blob))
        self.size = sum(len(copy[3]) for copy in self.copies)
        self.future: asyncio.Future[BrokerError | None] = asyncio.get_running_loop().create_future()

    def end(self, error: BrokerError | None) -> None:
        """Tell who waits for it."""
        self.lease.job = None
        if not self.future.done():
            self.future.set_result(error)


class _Flight(msgspec.Struct, eq=False):
    """A call that is under way."""

    link: Link
    keys: list[bytes]
    args: list[Argument]
    claims: list[Claim]
    jobs: list[Job]
    waiting: list[asyncio.Future[None]]
    doubt: bool = False
    """Whether it may have been carried out already."""


class Commits:
    """What one member of a group has still to store."""

    def __init__(
        self,
        link: Link,
        sealed: Link,
        topic: str,
        group: str,
        member: bytes,
        held: dict[object, Delivery],
        lost: Callable[[list[Claim]], None],
        done: Callable[[Claim], None],
        quiet: Callable[[], None],
    ) -> None:
        self._link = link
        self._sealed = sealed
        self._key = entity(topic)
        self._group = group
        self._held = held
        self._lost = lost
        self._done = done
        self._on_quiet = quiet
        self._member = member
        self._number = 0
        self._dirty: dict[Claim, None] = {}
        self._riding: dict[Claim, None] = {}
        """Claims whose positions went with a read that is not answered yet."""
        self._jobs: deque[Job] = deque()
        self._waiting: list[asyncio.Future[None]] = []
        self._quiet: list[asyncio.Future[None]] = []
        self._flight: _Flight | None = None
        self._coming = False
        self._timer: asyncio.TimerHandle | None = None
        self._rode = 0.0
        self._closed = False
        self._spread = 0

    # ------------------------------------------------------------------ asking

    @property
    def busy(self) -> bool:
        """Whether a call is under way; no position may be stored beside it."""
        return self._flight is not None

    @property
    def pending(self) -> bool:
        """Whether an outcome is not stored yet."""
        return bool(self._dirty or self._riding or self._jobs or self._flight is not None)

    def touch(self, claim: Claim) -> None:
        """Have the position of *claim* stored soon."""
        self._dirty[claim] = None
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(EVERY, self._tick)

    def add(self, lease: Lease, records: Sequence[Record]) -> Job:
        """Have *records* stored and the delivery of *lease* settled, both or none.

        Raises:
            TooLarge: a record is over the limit.
        """
        self._spread += 1
        job = lease.job = Job(lease, records, self._spread)
        self._jobs.append(job)
        self._soon()
        return job

    def stored(self) -> asyncio.Future[None]:
        """Store everything that is done by now; the future has a result when that is so."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._soon()
        return future

    def ride(self, claims: Sequence[Claim], now: float) -> tuple[int, dict[Claim, bytes]]:
        """Return the number and the positions that a read takes along: of *claims* that read again, and others by and by."""
        regular = now - self._rode >= RIDE and not self._flight
        taken: dict[Claim, bytes] = {}
        for claim in claims:
            if claim.planned or (regular and claim in self._dirty):
                taken[claim] = claim.position(claim.tracker)
                self._dirty.pop(claim, None)
        if not taken:
            return 0, taken
        if regular:
            self._rode = now
        self._riding = dict.fromkeys(taken)
        self._number += 1
        return self._number, taken

    def rode(self) -> None:
        """The read is answered: what it took along is stored."""
        if self._riding:
            self._riding = {}

    def carries(self, claims: Sequence[Claim]) -> bool:
        """Return whether the outcome of a settlement of *claims* is not known yet."""
        return self._flight is not None and any(job.claim in claims for job in self._flight.jobs)

    async def quiet(self) -> None:
        """Return when the call that is under way is answered."""
        if self._flight is not None:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._quiet.append(future)
            await future

    def drop(self, claims: Sequence[Claim]) -> None:
        """Store nothing of *claims* any more: they are gone."""
        for claim in claims:
            self._dirty.pop(claim, None)
            self._riding.pop(claim, None)

    def abort(self) -> None:
        """Carry nothing out any more: the reader is left."""
        flight, self._flight = self._flight, None
        jobs = [*(flight.jobs if flight else ()), *self._jobs]
        waiting = [*(flight.waiting if flight else ()), *self._waiting]
        self._jobs.clear()
        self._waiting = []
        self._dirty.clear()
        self._riding = {}
        for job in jobs:
            job.end(DeliveryLost())
        for future in waiting:
            if not future.done():
                future.set_exception(DeliveryLost())
        self._tell_quiet()

    def rename(self, member: bytes) -> None:
        """Store as *member* from now on, which has stored nothing yet."""
        self._member, self._number = member, 0

    def close(self) -> None:
        """Start nothing more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ------------------------------------------------------------------ sending

    def _tick(self) -> None:
        self._timer = None
        if self._dirty and not self._closed:
            if self._flight is None:
                self._send()
            self._timer = asyncio.get_running_loop().call_later(EVERY, self._tick)

    def _soon(self) -> None:
        if self._flight is None and not self._coming:
            self._coming = True
            self._sealed.soon(self._send)

    def _send(self) -> None:
        self._coming = False
        if self._flight is not None or self._closed:
            return
        jobs = self._take_jobs()
        waiting, self._waiting = self._waiting, []
        ahead: dict[Claim, list[int]] = {}
        for job in jobs:
            ahead.setdefault(job.claim, []).append(job.lease.offset)
        self._dirty.update(self._riding)  # on another connection, this may overtake the read
        claims = list(dict.fromkeys((*ahead, *self._dirty)))
        if not claims:
            for future in waiting:
                if not future.done():
                    future.set_result(None)
            return
        self._dirty.clear()
        self._number += 1
        args: list[Argument] = [self._group, self._member, self._number, len(claims)]
        for claim in claims:
            tracker = claim.tracker
            if claim in ahead:
                tracker = tracker.copy()
                for offset in ahead[claim]:
                    tracker.done(offset)
            args += (claim.text, claim.epoch, claim.position(tracker))
        keys = [self._key]
        places: dict[bytes, int] = {}
        at = {claim: index for index, claim in enumerate(claims)}
        for job in jobs:
            args += (at[job.claim], len(job.copies))
            for key, kind, settings, blob in job.copies:
                place = places.get(key)
                if place is None:
                    place = places[key] = len(places)
                    keys.append(key)
                args += (place, kind, settings, blob)
        link = self._sealed if jobs or waiting else self._link
        self._flight = flight = _Flight(link, keys, args, claims, jobs, waiting)
        self._call(flight)

    def _take_jobs(self) -> list[Job]:
        jobs: list[Job] = []
        size = 0
        while self._jobs and len(jobs) < _JOBS and size < _BYTES:
            job = self._jobs.popleft()
            if job.lease in self._held:
                jobs.append(job)
                size += job.size
            else:
                job.end(None if job.lease.settled else DeliveryLost())
        return jobs

    def _call(self, flight: _Flight) -> None:
        if flight is self._flight:
            future = flight.link.call(TOPIC_SETTLE, flight.keys, flight.args, timeout=PATIENT)
            future.add_done_callback(partial(self._answered, flight))

    # ------------------------------------------------------------------ answers

    def _answered(self, flight: _Flight, answer: asyncio.Future[Any]) -> None:
        error = answer.exception()
        if flight is not self._flight:
            return  # everything was lost meanwhile
        flight.doubt = flight.doubt or isinstance(error, Unanswered)
        if flight.doubt and isinstance(error, BrokerUnavailable) and not self._closed:
            # Whether it was done only the same call can find out.
            asyncio.get_running_loop().call_later(_AGAIN, self._call, flight)
            return
        self._flight = None
        if error is not None:
            failure = error if isinstance(error, BrokerError) else BrokerError(str(error))
            self._failed(flight, failure)
        else:
            reply = answer.result()
            if reply[0] == b"no":
                self._refused(flight, reply)
            else:
                self._carried_out(flight, reply)
        self._tell_quiet()
        if (self._jobs or self._waiting) and not self._closed:
            self._soon()

    def _failed(self, flight: _Flight, error: BrokerError) -> None:
        for claim in flight.claims:
            if not claim.gone:
                self.touch(claim)
        for job in flight.jobs:
            job.end(error)
        for future in flight.waiting:
            if not future.done():
                future.set_exception(error)

    def _refused(self, flight: _Flight, reply: list[Any]) -> None:
        for claim in flight.claims:
            if not claim.gone:
                self.touch(claim)
        problems = {
            int(place): _problem(flight.jobs[int(place)].names[int(copy)], text)
            for place, copy, text in zip(reply[1::3], reply[2::3], reply[3::3], strict=True)
        }
        again: list[Job] = []
        for place, job in enumerate(flight.jobs):
            if place in problems:
                job.end(problems[place])
            else:
                again.append(job)
        self._jobs.extendleft(reversed(again))
        self._waiting = flight.waiting + self._waiting
        if self._waiting or self._jobs:
            self._soon()

    def _carried_out(self, flight: _Flight, reply: list[Any]) -> None:
        lost = [flight.claims[int(place)] for place in reply[1:]]
        for job in flight.jobs:
            lease = job.lease
            if job.claim in lost:
                job.end(DeliveryLost())
                continue
            if self._held.pop(lease, None) is not None:
                job.claim.tracker.done(lease.offset)
            lease.settled = True
            self._done(job.claim)
            job.end(None)
        for future in flight.waiting:
            if not future.done():
                future.set_result(None)
        lost = [claim for claim in lost if not claim.gone]
        if lost:
            self._lost(lost)

    def _tell_quiet(self) -> None:
        quiet, self._quiet = self._quiet, []
        for future in quiet:
            if not future.done():
                future.set_result(None)
        if not self._closed:
            self._on_quiet()


def _problem(address: Address, text: bytes) -> BrokerError:
    """Return what a script found wrong with *address*."""
    if text.startswith(b"BK NOTFOUND"):
        return NotFound(f"{address!r} does not exist; declare it")
    return SettingsMismatch(f"{address!r}: {text.decode('utf-8', 'replace').removeprefix('BK MISMATCH ')}")
