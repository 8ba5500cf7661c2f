"""A queue of the server: what waits, what is delayed, who holds what."""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import msgspec

from ...address import AnyQueue
from ...driver import Backlog, Delivery, Receipt, Record, StoredRecord
from ...errors import BrokerError, NotFound
from ...policy import LONE_DELIVERY, MAX_BODY
from ._stored import Lease, Session, full, lease_of, too_large
from ._timers import Timers

DEDUP_FACTOR = 10
"""A dedup window remembers at most so many times the ids that the queue can hold."""


class QueueStore:
    """One queue.  A record waits as the very `Delivery` that will be handed out, so that this costs nothing more."""

    def __init__(self, address: AnyQueue, limit: int, timers: Timers) -> None:
        self.name = address.name
        self.address = address
        self.waiters: dict[Session, None] = {}
        """Sessions whose owners wait for a record, the longest first."""
        self.sessions: dict[Session, None] = {}
        self._timers = timers
        self._limit = limit
        self._levels: list[deque[Delivery]] = [deque() for _ in range(address.priorities)]
        self._lowest = self._levels[0]
        self._suspects: deque[Delivery] = deque()
        self._draining: dict[Session, None] = {}
        self._delayed: list[tuple[float, int, Delivery]] = []
        self._armed = math.inf
        self._stored = 0
        self._sequence = 0
        self._coming = 0  # sessions whose owners were woken and have not looked yet
        self._timed = False
        self._dropped = 0
        self._gone = False
        self._simple = not address.dedup and address.priorities == 1
        self._careful = not self._simple
        self._seen: dict[str, None] = {}
        self._forget: deque[tuple[float, str]] = deque()

    # ------------------------------------------------------------------ storing

    def put(self, record: Record, at: float = 0.0) -> Receipt | BrokerError:
        """Store a published *record* if there is room and its id is new to the dedup window."""
        body = record.body
        if body is not None and len(body) > MAX_BODY:
            return too_large(record)
        if not self._simple and self.address.dedup:
            return self._put_once(record)
        if self._stored >= self._limit and not self.room():
            return full(self.name, self._limit)
        if self._simple and not record.delay and record.ttl is record.expires is None and not record.deliveries:
            # The same as `keep`, without a call: nearly every message of a benchmark and of real life.
            self._sequence = number = self._sequence + 1
            self._stored += 1
            position = f"{self.name}@{number}"
            self._lowest.append(Delivery(record, Lease(number), position, 1))
            if self.waiters:
                self.wake(1)
            return Receipt(record.id, position)
        return self.keep(record)

    def keep(self, record: Record, at: float = 0.0) -> Receipt:
        """Store *record* whatever the limits say: the copies that a settlement makes."""
        self._sequence = number = self._sequence + 1
        self._stored += 1
        position = f"{self.name}@{number}"
        if record.ttl is not None and record.expires is None:
            record = msgspec.structs.replace(record, expires=self._timers.epoch() + record.ttl)
        if record.expires is not None:
            self._timed = self._careful = True
        delivery = Delivery(record, Lease(number), position, record.deliveries + 1)
        if record.delay > 0:
            self._delay(delivery, number, record.delay)
        else:
            self._enqueue(delivery)
            if self.waiters:
                self.wake(1)
        return Receipt(record.id, position)

    def _put_once(self, record: Record) -> Receipt | BrokerError:
        now = self._timers.now()
        while self._forget and self._forget[0][0] <= now:
            self._seen.pop(self._forget.popleft()[1], None)
        if record.id in self._seen:
            return Receipt(record.id, None, duplicate=True)
        if not self.room() or len(self._seen) >= self._limit * DEDUP_FACTOR:
            return full(self.name, self._limit)
        self._seen[record.id] = None
        self._forget.append((now + self.address.dedup, record.id))
        return self.keep(record)

    def _level(self, record: Record) -> deque[Delivery]:
        return self._levels[max(0, min(record.priority, len(self._levels) - 1))]

    def _enqueue(self, delivery: Delivery, *, first: bool = False) -> None:
        if delivery.deliveries >= LONE_DELIVERY:
            self._careful = True
            line = self._suspects
        else:
            line = self._level(delivery.record)
        if first:
            line.appendleft(delivery)
        else:
            line.append(delivery)

    def _delay(self, delivery: Delivery, number: int, delay: float) -> None:
        due = self._timers.now() + delay
        heapq.heappush(self._delayed, (due, number, delivery))
        if due < self._armed:
            self._armed = due
            self._timers.at(due, self._due)

    def _due(self) -> None:
        now, count = self._timers.now(), 0
        while self._delayed and self._delayed[0][0] <= now:
            self._enqueue(heapq.heappop(self._delayed)[2])
            count += 1
        self._armed = math.inf
        if self._delayed:
            self._armed = self._delayed[0][0]
            self._timers.at(self._armed, self._due)
        self.wake(count)

    def room(self) -> bool:
        """Return whether there is room, after dropping what has expired if need be."""
        if self._stored >= self._limit:
            self._sweep()
        return self._stored < self._limit

    def _sweep(self) -> None:
        if not self._timed:
            return
        epoch, before = self._timers.epoch(), self._stored
        for line in (*self._levels, self._suspects):
            kept = [delivery for delivery in line if not _expired(delivery, epoch)]
            self._stored -= len(line) - len(kept)
            line.clear()
            line.extend(kept)
        kept_delayed = [entry for entry in self._delayed if not _expired(entry[2], epoch)]
        self._stored -= len(self._delayed) - len(kept_delayed)
        self._delayed = kept_delayed
        heapq.heapify(self._delayed)
        self._undrain()
        self._dropped += before - self._stored

    def _tell(self, expired: Callable[[int], None]) -> None:
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            expired(dropped)

    # ------------------------------------------------------------------ handing out

    def take(self, session: Session, expired: Callable[[int], None], limit: int) -> list[Delivery]:
        """Hand out up to *limit* records to *session*; tell *expired* how many were dropped instead."""
        held, lowest = session.held, self._lowest
        room = min(session.prefetch - len(held), limit)
        least = 0
        if session.woken:
            session.woken = False
            self._coming -= 1
            least = 1
        if room <= 0:
            session.blocked = True
            if least:
                self.pass_on(session)
            return []
        if self._careful or session.lone.active:
            return self._take_carefully(session, room, least, expired)
        session.blocked = False
        ready = len(lowest)
        if self._coming:
            room = self._share(room, least, ready)
        if room == 1 and ready:
            delivery = lowest.popleft()
            held[delivery.token] = delivery
            if ready > 1 and self.waiters and not self._coming:
                self.wake(1)
            return [delivery]
        if room >= ready:
            taken = list(lowest)
            lowest.clear()
        else:
            popleft = lowest.popleft
            taken = [popleft() for _ in range(room)]
            if self.waiters and not self._coming:
                self.wake(1)
        for delivery in taken:
            held[delivery.token] = delivery
        return taken

    def _share(self, room: int, least: int, ready: int) -> int:
        """Return how much may be taken of what is *ready*, so that all who were woken find their share of it."""
        return min(room, max(least, ready // (self._coming + 1)))

    def _take_carefully(
        self, session: Session, room: int, least: int, expired: Callable[[int], None]
    ) -> list[Delivery]:
        held, lone = session.held, session.lone
        session.blocked = lone.holds_up()
        if session.blocked:
            if least:
                self.pass_on(session)
            return []
        epoch, before = self._timers.epoch(), self._stored
        taken: list[Delivery] = []
        while self._suspects and not taken and lone.may_come():
            delivery = self._suspects.popleft()
            if _expired(delivery, epoch):
                self._stored -= 1
            else:
                taken.append(delivery)
                lone.came(lease_of(delivery), self.address.lease)
        self._undrain(session)
        if not taken:
            if self._drains(session):
                session.blocked = True
            else:
                self._sweep_heads(epoch)
                room = self._share(room, least, sum(map(len, self._levels)))
                for line in reversed(self._levels):
                    while line and len(taken) < room:
                        delivery = line.popleft()
                        if _expired(delivery, epoch):
                            self._stored -= 1
                        else:
                            taken.append(delivery)
        for delivery in taken:
            held[lease_of(delivery)] = delivery
        self._dropped += before - self._stored
        self._tell(expired)
        self._timed = self._timed and self._stored > 0
        self._careful = bool(self._suspects) or self._timed or not self._simple
        if self.waiters and not self._coming and any(self._levels):
            self.wake(1)
        return taken

    def _sweep_heads(self, epoch: float) -> None:
        """Drop what has expired at the front of each line, so that it is nobody's share."""
        for line in self._levels if self._timed else ():
            while line and _expired(line[0], epoch):
                line.popleft()
                self._stored -= 1

    def _drains(self, session: Session) -> bool:
        """Return whether *session* has to have its hands free before it gets more, so that it can take a suspect."""
        if session not in self._draining and len(self._draining) < len(self._suspects):
            self._draining[session] = None
        return session in self._draining

    def _undrain(self, *gone: Session) -> None:
        """Forget that *gone* drain, and let others go on who need not drain any more."""
        for session in gone:
            self._draining.pop(session, None)
        while len(self._draining) > len(self._suspects):
            self._draining.popitem()[0].owner.wake()

    def wake(self, count: int) -> None:
        """Let up to *count* owners look, those who have waited longest first; all of them if one may have to be alone."""
        waiters = self.waiters
        if self._suspects:
            count = len(waiters)
        while waiters and count > 0:
            session = next(iter(waiters))
            del waiters[session]
            if session.owner.wake():
                session.woken = True
                self._coming += 1
                count -= 1

    def pass_on(self, session: Session) -> None:
        """Wake another one, because *session*, which may have been woken, does not come."""
        if session.woken:
            session.woken = False
            self._coming -= 1
        if self._suspects or any(self._levels):
            self.wake(1)

    # ------------------------------------------------------------------ settling

    def settled(self, leases: Sequence[Lease]) -> None:
        """Forget *leases*, which their session has let go of: they are done."""
        self._stored -= len(leases)

    def hand_back(self, session: Session, deliveries: Sequence[Delivery], *, counted: bool) -> None:
        """Let *deliveries*, if *session* holds them, wait again, first in line; *counted* if an ownership ended by it."""
        count = 0
        for delivery in reversed(deliveries):
            if session.held.pop(delivery.token, None) is not None:
                again = Lease(lease_of(delivery).number)
                number = delivery.deliveries + 1 if counted else delivery.deliveries
                self._enqueue(Delivery(delivery.record, again, delivery.position, number), first=True)
                count += 1
        self.wake(count)

    # ------------------------------------------------------------------ sessions

    def join(self, session: Session) -> None:
        """Begin to serve *session*."""
        self.sessions[session] = None

    def leave(self, session: Session) -> None:
        """Hand back what *session* holds and forget it."""
        self._forget_session(session)
        self.sessions.pop(session, None)
        self.hand_back(session, list(session.held.values()), counted=False)

    def suspend(self, session: Session) -> None:
        """*session* shows no sign of life: what it holds is taken from it after the lease."""
        if session.deadline is None:
            self._forget_session(session)
            session.deadline = deadline = self._timers.now() + self.address.lease
            self._timers.at(deadline, functools.partial(self._expire, session, deadline))

    def resume(self, session: Session) -> None:
        """*session* lives."""
        session.deadline = None
        if self._gone:
            session.owner.fail(self._deleted())
        else:
            self.sessions[session] = None
            session.owner.wake()

    def _forget_session(self, session: Session) -> None:
        self.waiters.pop(session, None)
        self._undrain(session)
        self.pass_on(session)

    def _expire(self, session: Session, deadline: float) -> None:
        if session.deadline == deadline:
            lost = list(session.held.values())
            self.sessions.pop(session, None)
            self.hand_back(session, lost, counted=True)
            session.owner.lost(lost)

    def drop(self) -> None:
        """Delete the queue."""
        self._gone = True
        for session in self.sessions:
            session.held.clear()
            session.woken = False
            session.owner.fail(self._deleted())
        self.sessions.clear()
        self.waiters.clear()

    def _deleted(self) -> NotFound:
        return NotFound(f"the queue {self.name} was deleted")

    # ------------------------------------------------------------------ looking

    def _held(self) -> Iterator[Delivery]:
        return itertools.chain.from_iterable(session.held.values() for session in self.sessions)

    def browse(self, limit: int, after: int) -> list[StoredRecord]:
        """Return up to *limit* records with numbers above *after*: waiting, delayed and in flight."""
        waiting = itertools.chain(*self._levels, self._suspects, (entry[2] for entry in self._delayed))
        epoch = self._timers.epoch()
        found = [
            (lease_of(delivery).number, delivery, deliveries)
            for deliveries, line in ((-1, waiting), (0, self._held()))
            for delivery in line
            if lease_of(delivery).number > after and (deliveries == 0 or not _expired(delivery, epoch))
        ]
        first = heapq.nsmallest(limit, found, key=lambda entry: entry[0])
        return [StoredRecord(delivery.record, delivery.position, delivery.deliveries + n) for _, delivery, n in first]

    def backlog(self, dead: int, expired: Callable[[int], None]) -> Backlog:
        """Return what is left to do."""
        self._sweep()
        self._tell(expired)
        waiting = itertools.chain(*self._levels, self._suspects, (entry[2] for entry in self._delayed), self._held())
        oldest = min((delivery.record.timestamp for delivery in waiting), default=None)
        delayed = len(self._delayed)
        in_flight = sum(len(session.held) for session in self.sessions)
        return Backlog(
            waiting=sum(map(len, self._levels)) + len(self._suspects),
            in_flight=in_flight,
            delayed=delayed,
            dead=dead,
            oldest_age=None if oldest is None else max(0.0, self._timers.epoch() - oldest),
        )

    def purge(self) -> int:
        """Remove all that waits and return how many."""
        count = sum(map(len, self._levels)) + len(self._suspects) + len(self._delayed)
        for line in (*self._levels, self._suspects):
            line.clear()
        self._delayed.clear()
        self._stored -= count
        self._undrain()
        return count


def _expired(delivery: Delivery, epoch: float) -> bool:
    expires = delivery.record.expires
    return expires is not None and expires <= epoch
