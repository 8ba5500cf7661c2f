"""What both kinds of consumer share: waiting for records, settling, and what happens when the connection breaks."""

from __future__ import annotations

import asyncio
import logging
import math
from abc import ABC, abstractmethod
from asyncio import _get_running_loop as running_loop  # None after a fork, instead of an error
from asyncio import get_running_loop
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

import anyio
from anyio.abc import TaskGroup

from ...driver import Delivery, Record, Revoked, Settlement
from ...errors import BrokerError, BrokerUnavailable, Closed, ConfigError, DeliveryLost
from ._faults import Faults
from ._server import Server, Store
from ._stored import Lease, Session

logger = logging.getLogger("brokerkit")

TURN = 100
"""Messages after which a call gives the event loop to others, since nothing else here ever waits."""


class Link(Protocol):
    """The connection of a consumer."""

    faults: Faults
    consumers: dict[Consumer, None]
    turns: int
    """Messages until the next `pause`."""

    @property
    def healthy(self) -> asyncio.AbstractEventLoop | None:
        """The loop in which calls go on at once; None while the connection is closed, broken or frozen."""
        ...

    @property
    def server(self) -> Server:
        """What it is connected to."""
        ...

    async def ready(self) -> None:
        """Return when a call may go on; raise if it never may."""
        ...

    async def thawed(self) -> None:
        """Return when the connection is not frozen."""
        ...

    async def pause(self) -> None:
        """Let others run."""
        ...

    def left_broken(self, consumer: Consumer) -> None:
        """Let *consumer* hand back when the connection is mended."""
        ...

    def stores(self, records: Sequence[Record]) -> list[Store]:
        """Return where copies are stored, or raise what is wrong with one of them."""
        ...


class Consumer(ABC):
    """A reader of one source, and its context manager."""

    owned_until = math.inf  # the server, which is in this process, tells; while it does, nothing is certain
    _session: Session
    # These two are where the time goes; a subclass binds them to its store, which spares a call each.
    _take: Callable[[int], Sequence[Delivery]]
    _settled: Callable[[list[Lease]], None]

    def __init__(self, link: Link, revoked: Revoked) -> None:
        self._link = link
        self._revoked = revoked
        self._held: dict[object, Delivery] = {}
        self.losing = False
        """Whether the program is being told what it has lost; it takes part again after that."""
        self.running: asyncio.AbstractEventLoop | None = None
        """The loop in which `receive` goes on at once, None if it has to look why not."""
        self._entered = False
        self._error: BrokerError | None = None
        self._tasks: TaskGroup | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._deadline = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    # ------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        """Return when ready, with the start stored."""
        await self._link.ready()
        tasks = anyio.create_task_group()
        await tasks.__aenter__()
        self._tasks = tasks
        try:
            self._join()
        except BaseException:
            await tasks.__aexit__(None, None, None)
            raise
        self._link.consumers[self] = None
        self._entered = True
        self.check()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Hand back what is unsettled, unless the connection is broken: then it is lost when the lease ends."""
        self.leave()
        if self._tasks is not None:
            tasks, self._tasks = self._tasks, None
            tasks.cancel_scope.cancel()
            # Without the exception of the body, which would come out in a group.
            await tasks.__aexit__(None, None, None)

    def leave(self) -> None:
        """Leave the source at once."""
        self._entered = False
        self.running = None
        self._link.consumers.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._session.lone.close()
        faults = self._link.faults
        if faults.dead or faults.away or faults.frozen:
            self.suspend()
            self._link.left_broken(self)
        else:
            self.left()
        self.wake()

    @abstractmethod
    def _join(self) -> None: ...

    @abstractmethod
    def left(self) -> None:
        """Let the server hand out again what is held."""

    @abstractmethod
    def suspend(self) -> None:
        """The connection shows no sign of life."""

    @abstractmethod
    def resume(self) -> None:
        """The connection lives."""

    # ------------------------------------------------------------------ receiving

    @property
    def prefetch(self) -> int:
        """How many unsettled deliveries this consumer holds at most."""
        return self._session.prefetch

    @prefetch.setter
    def prefetch(self, value: int) -> None:
        self._session.prefetch = value
        self.wake()

    @property
    def ended(self) -> bool:
        """Whether everything that was there on entering was handed out."""
        return False

    @property
    def cursor(self) -> str | None:
        """Where an ephemeral reader goes on; None for queues and groups."""
        return None

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery]:
        """Return 1 to *limit* deliveries, or none after *timeout* seconds."""
        link, deadline = self._link, None
        if link.turns < 0:
            await link.pause()
        while True:
            loop = running_loop()
            if loop is None or loop is not self.running:
                await self._ready()
                continue
            taken = self._take(limit)
            if taken:
                link.turns -= len(taken)
                return taken
            if timeout <= 0 or self.ended:
                return taken
            now = loop.time()
            if deadline is None:
                deadline = now + timeout
            elif now >= deadline:
                return taken
            await self._wait(deadline)

    async def _ready(self) -> None:
        """Return when `receive` may go on, or raise why it never may."""
        await self._link.ready()
        if self._error is not None:
            raise self._error.with_traceback(None)
        if not self._entered:
            raise Closed("this consumer was left")
        self.check()

    def check(self) -> None:
        """Find out again whether calls go on at once."""
        self.running = self._link.healthy if self._entered and self._error is None else None

    async def _wait(self, deadline: float) -> None:
        if self._waiter is not None:
            raise ConfigError("receive is called by one task at a time")
        loop = get_running_loop()
        self._waiter = waiter = loop.create_future()
        self._deadline = deadline
        # A timer of an earlier call stays: it finds out that it is too early.  So a busy consumer sets none.
        if deadline < self._timer_at or (self._timer is None and deadline < math.inf):
            self._arm(loop, deadline)
        self._enlist()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._pass_on()
            raise
        finally:
            self._waiter = None
            self._delist()

    @abstractmethod
    def _enlist(self) -> None: ...

    @abstractmethod
    def _delist(self) -> None: ...

    @abstractmethod
    def _pass_on(self) -> None: ...

    def wake(self) -> bool:
        """Let a waiting `receive` look again; return whether one was waiting."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return False
        waiter.set_result(None)
        return True

    def _arm(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(when, self._ring)
        self._timer_at = when

    def _ring(self) -> None:
        self._timer = None
        self._timer_at = math.inf
        if self._waiter is not None:
            loop = get_running_loop()
            if loop.time() < self._deadline < math.inf:
                self._arm(loop, self._deadline)
            else:
                self.wake()

    # ------------------------------------------------------------------ settling

    async def settle(self, items: Sequence[Settlement], *, confirm: bool = False) -> Sequence[BrokerError | None]:
        """Store the records of each item and acknowledge its delivery, both or none; one result each."""
        link = self._link
        if running_loop() is not link.healthy:
            try:
                await link.ready()
            except BrokerUnavailable as error:
                return [error] * len(items)
        pop = self._held.pop
        done: list[Lease] = []
        results: list[BrokerError | None] = []
        careful = link.faults.settles
        for item in items:
            lease: Lease = item.delivery.token  # type: ignore[assignment]
            if item.publish or careful:
                results.append(self._settle_one(item, done))
            elif pop(lease, None) is None:
                results.append(unheld(lease))
            else:
                lease.settled = True
                done.append(lease)
                results.append(None)
        if done:
            self._settled(done)
            if self._session.blocked:
                self.wake()
        return results

    def _settle_one(self, item: Settlement, done: list[Lease]) -> BrokerError | None:
        lease = item.delivery.token
        if lease not in self._held:
            return unheld(lease)
        assert isinstance(lease, Lease)
        faults = self._link.faults
        if faults.settles:
            return faults.settles.pop(0)
        try:
            stores = self._link.stores(item.publish)
        except BrokerError as error:
            return error
        at = self._link.server.timers.clock.time()
        for store, record in zip(stores, item.publish, strict=True):
            store.keep(record, at)
        del self._held[lease]
        lease.settled = True
        done.append(lease)
        return None

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Hand *deliveries* back, uncounted."""
        if running_loop() is not self._link.healthy:
            await self._link.ready()
        self._release(deliveries)
        if self._session.blocked:
            self.wake()

    @abstractmethod
    def _release(self, deliveries: Sequence[Delivery]) -> None: ...

    async def hold(self, delivery: Delivery, attempts: int) -> None:
        """Keep the failed attempts of a topic's delivery."""
        if running_loop() is not self._link.healthy:
            await self._link.ready()
        if delivery.token not in self._held and (lost := unheld(delivery.token)) is not None:
            raise lost
        self._hold(delivery, attempts)

    @abstractmethod
    def _hold(self, delivery: Delivery, attempts: int) -> None: ...

    # ------------------------------------------------------------------ told by the server

    @property
    def error(self) -> BrokerError | None:
        """Why nothing will come any more."""
        return self._error

    def fail(self, error: BrokerError) -> None:
        """Let `receive` raise *error* from now on."""
        if self._error is None:
            self._error = error
            self.running = None
            self.wake()

    def lost(self, deliveries: Sequence[Delivery]) -> None:
        """*deliveries* belong to others by now."""
        if self._tasks is not None and not self._link.faults.dead:
            self.losing, self.owned_until = True, 0.0
            self._tasks.start_soon(self._tell_lost, deliveries)

    async def _tell_lost(self, deliveries: Sequence[Delivery]) -> None:
        await self._link.thawed()
        if deliveries:
            await self._tell(deliveries)
        await self._link.thawed()
        self.losing, self.owned_until = False, math.inf
        if self.running is not None:
            self.resume()

    def revoke(self, deliveries: Sequence[Delivery], moved: Callable[[bool], None]) -> None:
        """*deliveries* are about to move; call *moved* with whether the program has let go of them in time."""
        if self._tasks is not None and not self._link.faults.dead:
            self._tasks.start_soon(self._let_go, deliveries, moved)

    async def _let_go(self, deliveries: Sequence[Delivery], moved: Callable[[bool], None]) -> None:
        await self._link.thawed()
        with anyio.move_on_after(self._patience()) as patience:
            await self._tell([delivery for delivery in deliveries if delivery.token in self._held])
        await self._link.thawed()
        if self._link.healthy is not None:  # else the server finds out by itself
            moved(not patience.cancelled_caught)

    @abstractmethod
    def _patience(self) -> float:
        """Return how many seconds ownership waits for the program to let go."""

    async def _tell(self, deliveries: Sequence[Delivery]) -> None:
        try:
            await self._revoked(deliveries)
        except Exception:
            logger.exception("the callback for revoked deliveries failed")


def unheld(lease: object) -> DeliveryLost | None:
    """Return what settling *lease*, which is not held, comes to: nothing if it was settled before."""
    return None if isinstance(lease, Lease) and lease.settled else DeliveryLost()
