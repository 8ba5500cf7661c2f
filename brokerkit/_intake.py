"""From deliveries to messages that may run now: reading, prefetch, reconnecting, handing back.

An `Intake` gathers what one subscription reads; a topic's group reads two sources, the topic and its private redrive queue.
Each source has a `Feed`, which keeps a consumer open for as long as the subscription lives.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskGroup

from . import events
from ._lanes import Lanes
from ._plan import Env, Plan
from ._redact import error_text
from ._session import Session
from ._tasks import first_error
from .driver import Consumer, Delivery, Source
from .errors import BrokerError, NotFound, PositionLost
from .message import Message
from .policy import Start, backoff

logger = logging.getLogger("brokerkit")

POLL = 30.0
"""Seconds after which a quiet receive returns, so that a feed looks after itself."""
AT_END = 1.0
"""Seconds between looks at an ``until_end`` source that has ended while its readers have not."""


class Intake:
    """Messages of one subscription that may run now, in the order in which they may."""

    def __init__(self, plans: Sequence[Plan], env: Env) -> None:
        self.ready: deque[Message[Any]] = deque()
        self.feeds: list[Feed] = [Feed(plan, env, self) for plan in plans]
        self._until_end = plans[0].source.until_end
        self.error: BrokerError | None = None
        """Why reading by hand cannot go on; raised by the next receive."""
        self.takers: deque[asyncio.Future[None]] = deque()
        """Who waits for messages."""
        self.waking: bool = False
        """Whether one of them was woken and has not looked yet."""
        self.closed: bool = False

    # ------------------------------------------------------------------ as a session's inbox

    def push(self, message: Message[Any]) -> None:
        """Let *message* be taken."""
        self.ready.append(message)
        if self.takers and not self.waking:
            self._wake_one()

    def push_all(self, messages: Sequence[Message[Any]]) -> None:
        """Let *messages* be taken, in their order."""
        self.ready.extend(messages)
        if self.takers and not self.waking and self.ready:
            self._wake_one()

    def push_front(self, messages: Sequence[Message[Any]]) -> None:
        """Let *messages* be taken before all others."""
        self.ready.extendleft(reversed(messages))
        self.wake_next()

    def drop(self, dropped: Callable[[Message[Any]], bool]) -> list[Message[Any]]:
        """Take out and return the messages of which *dropped* is true."""
        gone = [message for message in self.ready if dropped(message)]
        if gone:
            kept = [message for message in self.ready if not dropped(message)]
            self.ready.clear()
            self.ready.extend(kept)
        if self._until_end:
            self.wake_all()  # what was taken out may have been the last
        return gone

    # ------------------------------------------------------------------ taking

    async def wait(self) -> None:
        """Wait until there may be something to take.  One message wakes one waiter."""
        for feed in self.feeds:
            if feed.session is not None:
                feed.session.starved()
        taker: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.takers.append(taker)
        try:
            await taker
            self.waking = False
        except asyncio.CancelledError:
            if taker.done() and not taker.cancelled():
                self.waking = False
                self.wake_next()
            elif taker in self.takers:
                self.takers.remove(taker)
            raise

    def wake_next(self) -> None:
        """Let another waiter run if there is more to take: each taker calls it, so that a batch wakes them one by one."""
        if self.ready and self.takers and not self.waking:
            self._wake_one()

    def wake_ended(self) -> None:
        """Let all waiters see the end, if it is there: whoever took the last message calls it."""
        if self._until_end and self.takers and self.ended:
            self.wake_all()

    def _wake_one(self) -> None:
        takers = self.takers
        while takers:
            taker = takers.popleft()
            if not taker.done():
                taker.set_result(None)
                self.waking = True
                return

    def wake_all(self) -> None:
        """Let every waiter look again: the subscription ends, or has failed."""
        takers, self.takers = self.takers, deque()
        for taker in takers:
            if not taker.done():
                taker.set_result(None)

    @property
    def ended(self) -> bool:
        """Whether everything of an ``until_end`` source was handed out and nothing waits to be tried again."""
        return self._until_end and not self.ready and all(feed.ended for feed in self.feeds)

    # ------------------------------------------------------------------ life

    async def start(self, group: TaskGroup) -> None:
        """Open all feeds and return when they are ready, or raise what the first one failed with."""
        started: list[asyncio.Future[None]] = []
        for feed in self.feeds:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            started.append(future)
            group.start_soon(feed.run, future, name=f"brokerkit feed {feed.plan.name}")
        try:
            for future in started:
                await future
        finally:
            for future in started:
                future.cancel()
                if not future.cancelled():
                    future.exception()

    def stop_fetching(self) -> int:
        """Receive nothing more and hand back what has not started; return how many that were."""
        return sum(feed.stop_fetching() for feed in self.feeds)

    async def finish(self) -> None:
        """Store all outcomes, then leave the consumers.  Call `stop_fetching` before."""
        for feed in self.feeds:
            await feed.finish()

    def close(self) -> None:
        """Wake whoever waits for messages: there will be no more."""
        self.closed = True
        self.wake_all()

    def fail(self, error: BrokerError) -> None:
        """Let readers by hand see *error*."""
        self.error = error
        self.wake_all()

    def problems(self) -> list[str]:
        """Say which feeds do not work, for `Broker.health`."""
        return [feed.problem for feed in self.feeds if feed.problem]


class Feed:
    """Keeps one source open: a session for each connection, with full jitter between them."""

    def __init__(self, plan: Plan, env: Env, intake: Intake) -> None:
        self.plan = plan
        self.session: Session | None = None
        self.problem = "not started yet"
        self._env = env
        self._intake = intake
        self._fetching: anyio.CancelScope | None = None
        self._stopping = False
        self._lanes = Lanes() if plan.by_key else None
        self._start: Start | None = None
        """Where an ephemeral reader goes on after a lost connection."""
        self._finished = asyncio.Event()
        self._left = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether an ``until_end`` source is through; a feed without an end keeps no other from ending."""
        if not self.plan.source.until_end:
            return True
        session = self.session
        return session is not None and session.consumer.ended and not session.waiting

    async def run(self, started: asyncio.Future[None]) -> None:
        """Read until `finish`.  *started* gets a result when the source is ready for the first time."""
        failures = 0
        try:
            while not self._stopping:
                error = await self._connect(started, resumed=failures > 0)
                if error is None:
                    break
                if not started.done():
                    started.set_exception(error)
                    break
                if isinstance(error, PositionLost) and self._start is not None:
                    self._position_lost(error)
                    self._start = Start.EARLIEST
                    continue
                if self.plan.by_hand and not error.retryable:
                    self.problem = f"{self.plan.name}: {error_text(error)}"
                    self._intake.fail(error)
                    break
                failures = 0 if self.session is not None and self.session.settled else failures + 1
                await self._pause(error, failures)
                if isinstance(error, NotFound) and not self._stopping:
                    await self._env.restore(self.plan.source.address)
                failures = max(failures, 1)
            if started.done() and not started.cancelled() and started.exception() is None:
                self._tell(events.Unsubscribed)
        finally:
            self._left.set()
            self.session = None
            if not started.done():
                started.cancel()

    async def _connect(self, started: asyncio.Future[None], *, resumed: bool) -> BrokerError | None:
        """Open a consumer and read; return None when asked to stop, else why it failed."""
        plan, env = self.plan, self._env
        self.session = None
        revoked = _Revoked()
        ended: BrokerError | None = None
        try:
            async with env.driver.consume(self._source(), prefetch=plan.prefetch, revoked=revoked) as consumer:
                if self._lanes is not None and plan.letters is not None:
                    self._lanes = Lanes()  # what was in hand comes again; an ephemeral reader goes on with what it has
                session = self.session = revoked.session = Session(consumer, plan, env, self._intake, self._lanes)
                self.problem = ""
                self._tell(events.Resumed if resumed else events.Subscribed)
                if resumed:
                    logger.info("%s: consuming again", plan.name)
                if not started.done():
                    started.set_result(None)
                try:
                    async with anyio.create_task_group() as group:
                        group.start_soon(session.settling.run)
                        ended = await self._pump(consumer, session)
                        if ended is None:
                            await self._finished.wait()
                        group.cancel_scope.cancel()
                finally:
                    # Nothing may start any more: what is unsettled belongs to whoever owns it next.
                    session.stopping = session.stopping or self._stopping
                    session.settling.close()
                    if plan.letters is not None or session.stopping:
                        session.unstarted()
                    else:
                        # An ephemeral reader owes nothing for what it has, and goes on behind it.
                        self._start = Start.position(consumer.cursor) if consumer.cursor else None
        except BrokerError as error:
            return error
        except Exception as error:
            inner = first_error(error)
            logger.exception("%s: the driver failed", plan.name)
            failed = BrokerError(f"the driver failed: {type(inner).__name__}: {error_text(inner)}")
            failed.__cause__ = inner
            return failed
        return ended

    def _source(self) -> Source:
        source = self.plan.source
        return source if self._start is None else Source(source.address, None, self._start, source.until_end)

    async def _pump(self, consumer: Consumer, session: Session) -> BrokerError | None:
        settled, quiet, wait = 0, 0.0, min(POLL, self.plan.lease)
        with anyio.CancelScope() as self._fetching:
            while not self._stopping:
                try:
                    deliveries = await consumer.receive(max(consumer.prefetch, 1), wait)
                except PositionLost as error:
                    self._position_lost(error)
                    continue
                except BrokerError as error:
                    return error
                if deliveries:
                    session.admit(deliveries)
                    continue
                if consumer.ended:
                    self._intake.wake_all()
                    if self.plan.letters is None:
                        await anyio.sleep_forever()
                    await anyio.sleep(AT_END)  # what a member of the group hands back may come to this one
                    continue
                quiet = quiet + wait if session.settled == settled else 0.0
                settled = session.settled
                if 0 < session.held >= consumer.prefetch and quiet >= self.plan.lease and not self.plan.patient:
                    self._nothing_settled(session.held)
                    quiet = 0.0
        return None

    async def _pause(self, error: BrokerError, failures: int) -> None:
        wait = backoff(failures, longest=10.0 if error.retryable else 30.0)
        if not error.retryable:
            wait = max(wait, 1.0)
        self.problem = f"{self.plan.name}: {error_text(error)}"
        level = logging.WARNING if error.retryable else logging.ERROR
        logger.log(level, "%s: stopped consuming, again in %.3g s: %s", self.plan.name, wait, error_text(error))
        self._tell(events.Disconnected, error=type(error).__name__, wait=wait)
        if self._stopping:
            return
        with anyio.CancelScope() as self._fetching:
            await anyio.sleep(wait)

    @property
    def prefetch(self) -> int:
        """How many deliveries are held at once."""
        return self.plan.prefetch

    @prefetch.setter
    def prefetch(self, value: int) -> None:
        self.plan = msgspec.structs.replace(self.plan, prefetch=value)
        if self.session is not None:
            self.session.plan = self.plan
            self.session.consumer.prefetch = value

    # ------------------------------------------------------------------ stopping

    def stop_fetching(self) -> int:
        """Receive nothing more and hand back what has not started; return how many that were."""
        self._stopping = True
        if self._fetching is not None:
            self._fetching.cancel()
        session = self.session
        if session is None:
            return 0
        session.stopping = True
        waiting = session.unstarted()
        session.settling.release([Session._delivery(message) for message in waiting])
        return len(waiting)

    async def finish(self) -> None:
        """Store all outcomes, then leave the consumer.  Cancelling it leaves at once."""
        try:
            if self.session is not None:
                await self.session.settling.flush()
        finally:
            self._finished.set()
        await self._left.wait()

    # ------------------------------------------------------------------ telling

    def _tell(self, make: Callable[..., events.Event], **details: object) -> None:
        if self._env.emit is not None:
            source = self.plan.told
            self._env.emit(make(address=source.address.name, group=source.group, **details))

    def _position_lost(self, error: PositionLost) -> None:
        logger.error("%s: %s", self.plan.name, error_text(error))
        self._tell(events.PositionsLost, lost=error.lost or 0)
        if self.plan.by_hand:
            self._intake.fail(error)

    def _nothing_settled(self, held: int) -> None:
        logger.warning(
            "%s: all %d prefetched messages are in hand and nothing was settled for %.3g s: did you forget ack()?",
            self.plan.name,
            held,
            self.plan.lease,
        )
        self._tell(events.NothingSettled, in_flight=held)


class _Revoked:
    """The driver's callback, which is needed before its session exists."""

    session: Session | None = None

    async def __call__(self, deliveries: Sequence[Delivery]) -> None:
        if self.session is not None:
            await self.session.revoked(deliveries)
