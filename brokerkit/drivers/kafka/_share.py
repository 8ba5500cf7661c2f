"""A member of a share group: it acquires records of one topic, keeps them for as long as they are in hand, and acknowledges each.

Every member reads every partition: which of them the group's coordinator has meant for it, no broker asks.  So nobody idles
while another has more than it can do.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Sequence
from typing import Final

import anyio
from anyio.abc import TaskGroup

from ...errors import BrokerError, BrokerUnavailable, ConfigError, NotFound
from ._cluster import Cluster, again
from ._share_ask import names
from ._share_locks import ACCEPTED, HELD, LOST, OVER, Hand, Lock, ShareTold, lost_error
from ._share_open import Opener
from ._share_place import Place
from ._share_session import Session
from ._view import TopicInfo

logger = logging.getLogger("brokerkit")

CLOSING: Final = 3.0
"""Seconds that closing takes at most."""
_TICK: Final = 0.25
"""Seconds between looks at what runs out, at most; with nothing in hand that could:"""
_IDLE: Final = 1.0
_LOCK: Final = 30.0
"""For how long brokers lock a record unless they are told otherwise."""
_LATE: Final = 1.5
"""Seconds behind its wait after which an answer is late: the broker may not lead its partitions any more."""
_STALL: Final = 1.0
"""Seconds for which the oldest record in hand has to be the same until it holds up the others."""
_ABSENT: Final = 1.0
"""Seconds until it is believed that a topic has gone, or may not be seen any more."""
_WHOLE: Final = 0.8
"""How much of a lock `Share.sure` makes sure of at most: renewing it takes time, too."""
_MOST: Final = 10_000
"""Records that are asked for at once."""


class Share:
    """What one member acquires of one topic, from all brokers that lead its partitions."""

    def __init__(
        self,
        cluster: Cluster,
        topic: str,
        group: str,
        member: str,
        told: ShareTold,
        *,
        timeout: float,
        lock: float | None,
        window: int = 2000,
        widens: bool = True,
    ) -> None:
        """*lock* is how long the broker is expected to lock a record for, until it says so itself.

        *window* is how many a partition hands out behind the oldest that is not done; *widens*, whether partitions that are
        added are read, too: a broker might begin them at their end.
        """
        self.cluster = cluster
        self.topic = topic
        self.group = group
        self.names = names(group, member)
        self.id = uuid.UUID(int=0)
        self.hand = Hand()
        self.opener = Opener(topic)
        self.lock = lock or _LOCK
        self._learned = False
        self.hand.margin = min(1.0, self.lock / 4)
        self._told = told
        self._timeout = timeout
        self._window = window
        self._widens = widens
        self._width = 0
        """How many partitions there were at first."""
        self._info: TopicInfo | None = None
        self._places: dict[int, Place] = {}
        self._sessions: dict[int, Session] = {}
        """By node."""
        self._led: dict[int, Session] = {}
        """Who reads a partition."""
        self._hungry: dict[Session, None] = {}
        """Sessions that wait for room, in the order in which they came."""
        self._unsure: list[asyncio.Future[None]] = []
        self._stalls: dict[int, tuple[int, float, bool]] = {}
        """Of each partition the oldest offset in hand, since when it is, and whether that was told."""
        self._stalls_at = 0.0
        self._tasks: TaskGroup | None = None
        self._closing = False
        self._absent: float | None = None
        """Since when there is no topic."""
        self._broken: BrokerError | None = None
        self._narrowed: BrokerError | None = None
        self._missing: BrokerError | None = None

    def __repr__(self) -> str:
        return f"<Share {self.topic} room={self.room} held={self.hand.held} adrift={self.hand.adrift}>"

    @property
    def problem(self) -> BrokerError | None:
        """Why nothing comes of some partition, if that is known."""
        sessions = (session.problem for session in self._sessions.values() if session.places)
        found = next((error for error in sessions if error is not None), None)
        return self._broken or self._missing or found or self._narrowed

    # ------------------------------------------------------------------ what comes

    @property
    def room(self) -> int:
        """How many more records may be acquired.

        It becomes less by itself with each that comes, and more with each untaken one that is dropped; set it to what it
        should be by now whenever that changes, which wakes who asks the brokers.  It may fall below zero: while something
        is adrift as much is acquired beyond it.
        """
        return self.hand.room

    @room.setter
    def room(self, room: int) -> None:
        self.hand.room = room
        if self._hungry and room > 0:
            self._feed()

    def take(self, most: int) -> list[Lock]:
        """Return up to *most* that were acquired, in order of arrival, all ours at the moment."""
        now = asyncio.get_running_loop().time()
        taken, late = self.hand.take(most, now)
        for lock in late:
            self._places[lock.partition].leave(lock, now)
        return taken

    def untaken(self) -> int:
        """Return how many could be taken."""
        return self.hand.untaken

    @property
    def owned_until(self) -> float:
        """Until when all that is in hand (acquired, neither accepted nor released) is certainly ours, at least.

        0 while some of it is adrift, infinity with nothing in hand.
        """
        if not self.hand.held:
            return math.inf
        if self.hand.astray:
            return 0.0
        return min([session.soonest for session in self._sessions.values()])

    # ------------------------------------------------------------------ what is said

    def accept(self, lock: Lock) -> None:
        """Be done with *lock*, for good.  The broker is told soon, together with others: at once where `confirmed` is called.

        One that is adrift is accepted if it is acquired again.  Doing it again, or for one that is lost, does nothing.
        """
        if lock.state == HELD:
            self._places[lock.partition].accept(lock)
            self._speak(lock.partition)

    def release(self, lock: Lock) -> None:
        """Hand *lock* back: somebody gets it at once, which the broker counts."""
        if lock.state == HELD:
            self._places[lock.partition].release(lock)
            self._speak(lock.partition)

    def _hurry(self, partition: int) -> None:
        self._places[partition].urgent = True
        self._speak(partition)

    def _speak(self, partition: int) -> None:
        session = self._led.get(partition)
        if session is not None and session.waiter is not None:
            session.wake()

    def confirmed(self, lock: Lock) -> asyncio.Future[BrokerError | None]:
        """Return what becomes of an accepted *lock*: None when the broker has stored that, or `DeliveryLost`.

        What that is said of comes as a new one if it is ever acquired again; any other is accepted then without a word.
        """
        if lock.waiting is None:
            lock.waiting = asyncio.get_running_loop().create_future()
            if lock.state == OVER:
                lock.waiting.set_result(None)
            elif lock.state == ACCEPTED:
                self._hurry(lock.partition)
            else:
                self._places[lock.partition].forget(lock.offset)
                lock.waiting.set_result(lost_error())
        return lock.waiting

    async def sure(self, locks: Sequence[Lock], seconds: float) -> None:
        """Make sure of *locks*: on return each is ours for *seconds* more (or as long as the broker locks for), or lost.

        Raises:
            BrokerUnavailable: that cannot be found out in time.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self._timeout
        while True:
            now = loop.time()
            until = now + min(seconds, _WHOLE * (self.lock - self.hand.margin))
            short = [lock for lock in locks if lock.state == HELD and lock.until < until]
            if not short:
                return
            for lock in short:
                if lock.until > now:
                    self._places[lock.partition].renew[lock.offset] = lock
                    self._speak(lock.partition)
            if not await self._news(end):
                text = f"whether {len(short)} records of {self.topic} are still ours cannot be found out"
                raise BrokerUnavailable(text)

    def going(self) -> int:
        """Return how many were accepted or released, and the broker has not agreed yet."""
        return sum([len(place.locks) for place in self._places.values()]) - self.hand.held

    async def quiet(self, seconds: float) -> bool:
        """Return whether, within *seconds*, nothing goes on: all that was said is agreed to, and nothing more can come.

        That takes a `room` of 0 or less.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        for index in self._places:
            self._hurry(index)
        while self.going() or self.hand.adrift or any(session.asked for session in self._sessions.values()):
            if not await self._news(end):
                return False
        return self.room <= 0

    async def _news(self, end: float) -> bool:
        """Return whether something has changed before *end*."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unsure.append(waiting)
        try:
            async with asyncio.timeout_at(end):
                await waiting
        except TimeoutError:
            return False
        finally:
            if waiting in self._unsure:
                self._unsure.remove(waiting)
        return True

    async def close(self) -> None:
        """Tell the brokers what is accepted, hand back all else, and acquire nothing more; before `run` is cancelled."""
        self._closing = True
        with anyio.move_on_after(CLOSING, shield=True):
            await asyncio.gather(*(session.finish(CLOSING) for session in self._sessions.values()))
        for place in self._places.values():
            for lock in place.locks.values():
                lock.state = LOST
                lock.until = 0.0
                if lock.waiting is not None and not lock.waiting.done():
                    lock.waiting.set_result(lost_error())
            place.locks.clear()
        self.hand.held = self.hand.untaken = self.hand.astray = 0
        self._wake_unsure()

    # ------------------------------------------------------------------ life

    async def run(self) -> None:
        """Acquire, renew and acknowledge until cancelled."""
        self.cluster.watch(self.topic)
        self.cluster.watchers.add(self._look)
        try:
            async with anyio.create_task_group() as self._tasks:
                self._look()
                await self._tick()
        finally:
            self._tasks = None
            self.cluster.watchers.discard(self._look)
            self.cluster.unwatch(self.topic)
            for session in self._sessions.values():
                self.cluster.drop(session)

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            idle = self._learned and not any(place.locks for place in self._places.values())
            await asyncio.sleep(min(_IDLE if idle else _TICK, self.lock / 16))
            try:
                self._look_after(loop.time())
            except Exception:
                logger.exception("%r: what runs out was not looked at", self)

    def _look_after(self, now: float) -> None:
        """Do what time brings."""
        for session in self._sessions.values():
            session.check()
            session.scan(now)
            if session.since is not None and now > session.since + _LATE:
                self.cluster.stale()
        self._give_up(now)
        if now >= self._stalls_at:
            self._stalls_at = now + _STALL / 2
            self._find_stalls(now)
        self._find_topic(now)

    def _give_up(self, now: float) -> None:
        """Tell what is lost by now."""
        if not self.hand.adrift:
            return
        lost = [lock for place in self._places.values() if place.adrift for lock in place.lose(now)]
        if lost:
            self._told.lost(lost)
        self._wake_unsure()

    def _find_stalls(self, now: float) -> None:
        """Tell which partitions do not go on soon, and which do again."""
        for index, place in self._places.items():
            since, told = now, False
            known = self._stalls.get(index)
            if known is None and not place.locks:
                continue
            oldest = place.oldest()
            if known is not None:
                _, since, told = known
                if known[0] != oldest:
                    since = now
            ahead = 0 if oldest is None else place.high - oldest
            if oldest is None or 2 * ahead < self._window:
                self._stalls.pop(index, None)
                if told:
                    self._told.resumed(index)
                continue
            if not told and now >= since + _STALL:
                told = True
                self._told.stalled(index, ahead, self._window)
            self._stalls[index] = oldest, since, told

    # ------------------------------------------------------------------ where to ask

    def _look(self) -> None:
        """Take in what is known of the topic by now."""
        info = self.cluster.known(self.topic)
        if info is not None and self._missing is None:
            if self._info is not None and info.id != self._info.id:
                self._end(NotFound(f"topic {self.topic} was deleted and made again"))
            self.id = info.id
        if self._missing is not None or self._closing or self._tasks is None:
            return
        self._info = info or self._info
        if info is None:
            return
        width = len(info.partitions)
        if not self._widens:
            self._width = self._width or width
            if width > self._width:
                self._narrow(width)
                width = self._width
        for partition in info.partitions[:width]:
            self._place(partition.index, partition.leader, self._tasks)

    def _narrow(self, width: int) -> None:
        """Tell that partitions which were added are not read."""
        error = ConfigError(
            f"{self.topic} has {width - self._width} partitions more than before, which are not read until all its consumers"
            f" have been left at once: allow ALTER_CONFIGS on group {self.group}, so that it need not be so"
        )
        if self._narrowed is None:
            logger.error("%s", error)
        self._narrowed = error

    def _place(self, index: int, node: int, tasks: TaskGroup) -> None:
        """Have a partition read from *node*, its leader."""
        place = self._places.get(index)
        if place is None:
            place = self._places[index] = Place(index, self.hand)
        before = self._led.get(index)
        if before is not None and before.node == node:
            return
        if before is not None:
            del self._led[index], before.places[index]
            place.drift(asyncio.get_running_loop().time())
            if not before.places:
                self._hungry.pop(before, None)
            before.wake()
        if node < 0:
            return
        session = self._sessions.get(node)
        if session is None:
            session = self._sessions[node] = Session(self, node)
            tasks.start_soon(session.run)
        self._led[index] = session
        session.places[index] = place
        session.wake()

    def _find_topic(self, now: float) -> None:
        """Have the cluster looked at for as long as a partition has no leader, and tell if the topic is gone."""
        if self._missing is not None:
            return
        if self._info is not None and len(self._led) == len(self._places) and self.cluster.known(self.topic):
            self._absent = None
            return
        trouble = self.cluster.trouble(self.topic)
        if trouble is None:
            self._absent = None
        elif self._absent is None:
            self._absent = now  # a broker that has just started may not know it yet
        elif now >= self._absent + _ABSENT:
            self._absent = now
            if isinstance(trouble, NotFound):
                self._end(trouble)
            else:
                self._told.fail(again(trouble))
        self.cluster.stale()

    def _end(self, error: BrokerError) -> None:
        """Take in that the topic is gone, and with it all that is in hand."""
        self._missing = error
        now = asyncio.get_running_loop().time()
        for index, session in self._led.items():
            session.places.pop(index, None)
            session.wake()
        self._led.clear()
        for place in self._places.values():
            place.drift(now)
        self._told.fail(again(error))

    # ------------------------------------------------------------------ what sessions ask and tell

    def credit(self, session: Session) -> int:
        """Return how many records *session* may ask for; with 0 it is woken when there may be some."""
        if self._closing:
            return 0
        free = self.hand.room + self.hand.adrift - sum([each.asked for each in self._sessions.values()])
        if free <= 0:
            self._hungry[session] = None
            return 0
        self._hungry.pop(session, None)
        if len(self._sessions) == 1:
            return min(free, _MOST)
        if not session.busy:
            return min(-(-free // (4 * len(self._sessions))), _MOST)
        rivals = sum([each.busy and not each.asked and bool(each.places) for each in self._sessions.values()])
        return min(-(-free // max(1, rivals)), _MOST)

    @property
    def quarter(self) -> int:
        """What is little to ask for."""
        return (self.hand.room + self.hand.held - self.hand.astray) // 4

    @property
    def contended(self) -> bool:
        """Whether sessions wait for room."""
        return bool(self._hungry)

    def _feed(self) -> None:
        for session in self._hungry:
            session.wake()

    def learn(self, lock: float) -> None:
        """Take in for how long the broker locks a record."""
        self._learned = True
        if lock != self.lock:
            self.lock = lock
            self.hand.margin = min(1.0, lock / 4)

    def changed(self, regained: Sequence[Lock] = ()) -> None:
        """Take in that something may have come, and what is ours again."""
        if regained:
            self._told.regained(regained)
        if self.hand.untaken:
            self._told.arrived()
        if self._unsure:
            self._wake_unsure()
        if self._hungry and self.hand.room + self.hand.adrift > 0:
            self._feed()

    def fail(self, error: BrokerError) -> None:
        """Take in why nothing comes of some partition."""
        self._told.fail(again(error))

    def damaged(self, error: BrokerError) -> None:
        """Take in that something cannot be read, by nobody."""
        told = self._broken is not None and str(self._broken) == str(error)
        self._broken = error
        if not told:
            logger.error("%r: %s", self, error)
            self._told.damaged(again(error))

    def _wake_unsure(self) -> None:
        unsure, self._unsure = self._unsure, []
        for waiting in unsure:
            if not waiting.done():
                waiting.set_result(None)
