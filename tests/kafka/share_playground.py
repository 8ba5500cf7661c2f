"""A queue and its share group within the test's process, in virtual time: for consumers that are tried at random.

What a broker does is kept here in its simplest form: it counts each time that it hands a record out, to whatever end; it drops
a record that comes back at the limit; a connection that breaks gives all that was acquired over it to whoever asks next.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from brokerkit import clock
from brokerkit.address import AnyQueue, Queue
from brokerkit.driver import Receipt, Record
from brokerkit.drivers.kafka import _share_consumer
from brokerkit.drivers.kafka._engine import Terms
from brokerkit.drivers.kafka._records import headers_of
from brokerkit.drivers.kafka._share_locks import Lock
from brokerkit.drivers.kafka._time import ServerTime
from brokerkit.errors import BrokerError, BrokerUnavailable, DeliveryLost
from brokerkit.events import Event

LIMIT = 5
LEASE = 4.0
TERMS = Terms("share", limit=LIMIT, lock=LEASE)


class Entry:
    """A record in the log, and what the group knows of it."""

    def __init__(self, offset: int, record: Record, now: float) -> None:
        self.offset = offset
        self.id = record.id
        self.timestamp = int(now * 1000)
        self.timestamp_type = 1
        self.key = record.key
        self.value = record.body
        self.headers: list[tuple[str, bytes | None]] = [*headers_of(record, timed=True)]
        self.count = 0
        self.owner: FakeShare | None = None
        self.done = False
        self.dropped = False


class World:
    """A queue, its group, and where other copies go."""

    def __init__(self, seed: int = 0, *, limit: int = LIMIT) -> None:
        self.random = random.Random(seed)
        self.queue: AnyQueue = Queue("emails", bytes)
        self.limit = limit
        self.log: list[Entry] = []
        self.copies: list[Record] = []
        """What was stored elsewhere."""
        self.trouble = 0.0
        """How often something fails."""
        self.refused: BrokerError | None = None
        """Why nothing can be stored."""
        self.slow = 0.01
        self.copying = 0.0
        """Seconds that storing takes at least."""
        self.excused: set[str] = set()
        """What was taken away from somebody, or from somebody who was killed: it may be done twice."""
        self.shares: list[FakeShare] = []
        self.readers: dict[Any, None] = {}
        self.events: list[Event] = []
        self.news = asyncio.Event()
        self.time = ServerTime()

    def context(self) -> Any:
        async def topic(name: str, *, timeout: float, fresh: bool = False) -> Any:
            return SimpleNamespace(name=name)

        settings = SimpleNamespace(session=10.0, timeout=5.0, shown="kafka://here")
        cluster = SimpleNamespace(settings=settings, topic=topic, problem=None, world=self)
        return SimpleNamespace(
            cluster=cluster,
            outboxes=self,
            settings=settings,
            emit=self.events.append,
            readers=self.readers,
            time=self.time,
        )

    def store(self, id: str, **changes: Any) -> Entry:
        """Append a record to the queue."""
        return self._append(Record(self.queue, id, b"body", timestamp=1.0, **changes))

    def _append(self, record: Record) -> Entry:
        entry = Entry(len(self.log), record, clock.current().time())
        self.log.append(entry)
        self.stir()
        return entry

    def stir(self) -> None:
        """Have everybody look."""
        self.news.set()
        self.news = asyncio.Event()

    async def pause(self, longest: float | None = None) -> None:
        await asyncio.sleep(self.random.random() ** 3 * (self.slow if longest is None else longest))

    def unlucky(self) -> bool:
        return self.random.random() < self.trouble

    async def copy(self, records: Sequence[Record], timeout: float) -> list[Receipt | BrokerError]:
        """Store copies."""
        await asyncio.sleep(self.copying)
        await self.pause()
        if self.refused is not None:
            await asyncio.sleep(min(timeout, 1.0))
            return [self.refused for _ in records]
        results: list[Receipt | BrokerError] = []
        for record in records:
            if self.unlucky():
                results.append(BrokerUnavailable("no leader"))
                continue
            if record.address.name == self.queue.name and record.delay < 1:
                self._append(record)
            else:
                self.copies.append(record)
            results.append(Receipt(record.id))
        await self.pause()
        return results

    # ------------------------------------------------------------------ the broker

    def free(self, entry: Entry) -> None:
        """Nobody has *entry* any more."""
        entry.owner = None
        if entry.count >= self.limit:
            entry.done = entry.dropped = True
        self.stir()

    @property
    def dropped(self) -> list[str]:
        return [entry.id for entry in self.log if entry.dropped]

    @property
    def left(self) -> list[Entry]:
        return [entry for entry in self.log if not entry.done]


class FakeShare:
    """One member's locks."""

    def __init__(
        self,
        cluster: Any,
        topic: str,
        group: str,
        member: str,
        told: Any,
        *,
        timeout: float,
        lock: float | None,
        window: int,
        widens: bool,
    ) -> None:
        self.world: World = cluster.world
        self.lock = lock or LEASE
        self.told = told
        self.problem: BrokerError | None = None
        self.arrivals: deque[Lock] = deque()
        self.locks: dict[int, Lock] = {}
        """All that is in hand, by offset."""
        self.acks: dict[int, Lock] = {}
        """What is accepted, and the broker does not know that."""
        self.answers: dict[int, asyncio.Future[BrokerError | None]] = {}
        self.asking = False
        self.closed = False
        self.most = 0
        """The most that was ever in hand."""
        self._room = 0
        self._wish = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.world.shares.append(self)

    @property
    def room(self) -> int:
        return self._room

    @room.setter
    def room(self, room: int) -> None:
        self._room = room
        self._wish.set()

    async def run(self) -> None:
        world = self.world
        try:
            while True:
                self._wish.clear()
                news = world.news
                limit = self._room
                if limit > 0 and not self.closed:
                    self.asking = True
                    await world.pause()
                    self.acquire(limit)
                    self.asking = False
                waits = [asyncio.ensure_future(event.wait()) for event in (self._wish, news)]
                try:
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for wait in waits:
                        wait.cancel()
        finally:
            self.give_up()

    def acquire(self, limit: int) -> None:
        found = list(itertools.islice((e for e in self.world.log if e.owner is None and not e.done), limit))
        for entry in found:
            entry.owner = self
            entry.count += 1
            lock = Lock(0, entry.offset, entry.count, entry, asyncio.get_running_loop().time() + 1000.0)
            self.locks[entry.offset] = lock
            self.arrivals.append(lock)
        self._room -= len(found)
        self.most = max(self.most, len(self.locks))
        if found:
            self.told.arrived()

    def take(self, most: int) -> list[Lock]:
        return [self.arrivals.popleft() for _ in range(min(most, len(self.arrivals)))]

    def untaken(self) -> int:
        return len(self.arrivals)

    def accept(self, lock: Lock) -> None:
        if self.locks.pop(lock.offset, None) is not lock:
            return
        self.acks[lock.offset] = lock
        self.answers[lock.offset] = asyncio.get_running_loop().create_future()
        self._begin(self._tell(lock))

    async def _tell(self, lock: Lock) -> None:
        await self.world.pause()
        self._settle(lock)

    def _settle(self, lock: Lock) -> None:
        if self.acks.pop(lock.offset, None) is None:
            return
        entry = self.world.log[lock.offset]
        mine = entry.owner is self
        if mine:
            entry.done, entry.owner = True, None
        answer = self.answers[lock.offset]
        if not answer.done():
            answer.set_result(None if mine else DeliveryLost())

    def _begin(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def release(self, lock: Lock) -> None:
        if self.locks.pop(lock.offset, None) is lock:
            self.world.free(self.world.log[lock.offset])

    def confirmed(self, lock: Lock) -> asyncio.Future[BrokerError | None]:
        return self.answers[lock.offset]

    async def sure(self, locks: Sequence[Lock], seconds: float) -> None:
        await self.world.pause()
        if self.world.unlucky():
            raise BrokerUnavailable("no answer")

    async def quiet(self, seconds: float) -> bool:
        assert self._room <= 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.asking or self.acks:
                    await asyncio.sleep(0.001)
        return not self.asking and not self.acks

    def going(self) -> int:
        return len(self.acks)

    @property
    def owned_until(self) -> float:
        return min((lock.until for lock in self.locks.values()), default=math.inf)

    async def close(self) -> None:
        self.closed = True
        await self.world.pause()
        for lock in list(self.acks.values()):
            self._settle(lock)
        self.give_up()

    # ------------------------------------------------------------------ faults

    def give_up(self) -> None:
        """The connection breaks, and nobody makes another one."""
        for lock in [*self.locks.values(), *self.acks.values()]:
            entry = self.world.log[lock.offset]
            if not self.closed:
                self.world.excused.add(entry.id)
            if entry.owner is self:
                self.world.free(entry)
        self.locks.clear()
        self.arrivals.clear()
        for offset, answer in self.answers.items():
            self.acks.pop(offset, None)
            if not answer.done():
                answer.set_result(DeliveryLost())

    def cut(self, fate: float = 0.5) -> None:
        """The connection breaks; of what was taken about so much comes back, and the rest is somebody else's."""
        taken = [lock for lock in self.locks.values() if lock not in self.arrivals]
        for lock in self.arrivals:
            self.locks.pop(lock.offset)
            self.world.free(self.world.log[lock.offset])
        self.arrivals.clear()
        back: list[Lock] = []
        lost: list[Lock] = []
        for lock in taken:
            entry = self.world.log[lock.offset]
            if entry.count < self.world.limit and self.world.random.random() < fate:
                entry.count += 1
                lock.count = entry.count
                back.append(lock)
            else:
                del self.locks[lock.offset]
                self.world.excused.add(entry.id)
                self.world.free(entry)
                lost.append(lock)
        if lost:
            self.told.lost(lost)
        if back:
            self.told.regained(back)


class FakeMember:
    """A member without a group."""

    def __init__(self, cluster: Any, group: str, topic: str, fail: Any) -> None:
        self.id = "member"
        self.problem: BrokerError | None = None
        self.world: World = cluster.world

    async def run(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def join(self, *, timeout: float) -> None:
        await self.world.pause()

    async def leave(self, *, timeout: float) -> None:
        await self.world.pause()


def installed(patch: pytest.MonkeyPatch) -> None:
    """Have consumers live in a `World`."""
    patch.setattr(_share_consumer, "Share", FakeShare)
    patch.setattr(_share_consumer, "ShareMember", FakeMember)


def copied(record: Record, **changes: Any) -> Record:
    """Return a copy as a retry makes it."""
    return msgspec.structs.replace(record, deliveries=0, **changes)
