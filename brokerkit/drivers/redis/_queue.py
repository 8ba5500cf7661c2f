"""`QueueConsumer`: takes records of a queue, in competition with others.

It is a *session* to the server, which owns what it was handed for as long as it gives signs of life; nothing is renewed one by
one.  A session whose replies were lost finds out what it holds by `_mend`; one that is over is replaced by a new one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

import anyio
from anyio.abc import TaskGroup

from ..._tasks import Hosted
from ...address import AnyQueue
from ...driver import Delivery, Revoked, Settlement, Source
from ...errors import (
    BrokerError,
    BrokerUnavailable,
    CapabilityError,
    Closed,
    ConfigError,
    DeliveryLost,
    NotFound,
)
from ...events import Expired
from ._context import Context
from ._frames import element
from ._keys import entity
from ._link import Link, Unanswered
from ._publish import derived_settings
from ._queue_bell import Bell, Lease, Session
from ._queue_copies import Copies
from ._scripts import QUEUE_JOIN, QUEUE_RECOVER, QUEUE_RELEASE, QUEUE_SETTLE, QUEUE_TAKE, Script

logger = logging.getLogger("brokerkit")

LEAVE: Final = 2.0
"""Seconds that leaving waits for the server to know."""
_LONELY: Final = 1
_DRAIN: Final = 2
_FLAGS: Final = (b"0", b"1")
_numbers = itertools.count(1)


class QueueConsumer:
    """A consumer of one queue, and its context manager."""

    def __init__(
        self, context: Context, queue: AnyQueue, source: Source, prefetch: int, revoked: Revoked
    ) -> None:
        self.session: Session | None = None
        """What it holds; None while it has no session."""
        self.problem: BrokerError | None = None
        """Why nothing comes out of it, if nothing does."""
        self._context = context
        self._link: Link = context.link
        self._queue = queue
        self._source = source
        self._prefetch = prefetch
        self._revoked = revoked
        self._keys = (entity(queue.name),)
        self._timeout = context.settings.timeout
        self._position = f"{queue.name}@"
        self._copies = Copies(queue)
        self._bell = self._find_bell()
        self._hosted: Hosted | None = None
        self._tasks: TaskGroup | None = None
        self._entered = False
        self._joining = asyncio.Lock()
        self._looking = False  # somebody is in `receive`
        self._rung = False  # meanwhile there may have come something
        self._waiter: asyncio.Future[None] | None = None
        self._hungry = False  # whoever waits would take something
        self._deadline = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def __repr__(self) -> str:
        held = 0 if self.session is None else len(self.session.held)
        return f"<QueueConsumer {self._queue.name} in_flight={held}>"

    def _find_bell(self) -> Bell:
        for reader in self._context.readers:
            if isinstance(reader, QueueConsumer) and reader._queue.name == self._queue.name:
                return reader._bell
        return Bell(self._context, self._queue.name)

    # ------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        """Return when ready."""
        if self._source.until_end:
            raise CapabilityError(f"until_end is for topics; {self._queue!r} on redis has no end")
        self._hosted = Hosted(f"brokerkit queue {self._queue.name}", self._host)
        await self._hosted.__aenter__()
        self._context.readers[self] = None
        try:
            await self._bell.enter()
            try:
                self._entered = True
                await self._join()
            except BaseException:
                self._entered = False
                self._bell.exit()
                raise
        except BaseException:
            self._context.readers.pop(self, None)
            await self._hosted.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Hand back what is unsettled: at once, or as soon as there is a connection again."""
        self._entered = False
        self._context.readers.pop(self, None)
        session, self.session = self.session, None
        left: asyncio.Future[None] | None = None
        if session is not None:
            left = self._end(session)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()
        self._bell.exit()
        if left is not None and self._link.up:
            with anyio.move_on_after(LEAVE, shield=True):
                await left
        if self._hosted is not None:
            await self._hosted.__aexit__(None, None, None)

    async def _host(self, started: asyncio.Future[None]) -> None:
        """Run tasks until the consumer is left."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            started.set_result(None)
            assert self._hosted is not None
            await self._hosted.stopping.wait()
            tasks.cancel_scope.cancel()
        self._tasks = None

    def _new_name(self) -> bytes:
        return b"%b/%d" % (self._context.process, next(_numbers))

    async def _join(self) -> Session:
        """Return the session; a new one if there is none."""
        async with self._joining:
            if self.session is not None:
                return self.session
            if not self._entered:
                raise Closed("this consumer was left")
            name, sent = self._new_name(), time.monotonic()
            try:
                lease = await self._call(QUEUE_JOIN, (name, derived_settings(self._queue)), again=True)
            except BaseException as error:
                if not isinstance(error, BrokerError) or isinstance(error, BrokerUnavailable):
                    self._bell.leave([name])
                raise
            if not self._entered:
                self._bell.leave([name])
                raise Closed("this consumer was left")
            self._bell.lease = lease / 1000
            self.session = session = Session(name, sent + lease / 1000)
            self._bell.admit(self, session)
            return session

    async def _call(self, script: Script, args: Sequence[bytes | int], *, again: bool = False) -> Any:
        try:
            return await self._link.call(script, self._keys, args, timeout=self._timeout, again=again)
        except NotFound:
            raise NotFound(f"{self._queue!r} does not exist; declare it") from None

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
        """Never: a queue has no end."""
        return False

    @property
    def cursor(self) -> str | None:
        """None: what a queue's consumer owns comes again by itself."""
        return None

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery]:
        """Return 1 to *limit* deliveries, or none after *timeout* seconds."""
        if self._looking:
            raise ConfigError("receive is called by one task at a time")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        self._looking = True
        try:
            while True:
                if not self._entered:
                    raise Closed("this consumer was left")
                session = self.session or await self._join()
                if session.unsure or session.lock.locked():
                    await self._mend(session)
                    continue
                room = self._room(session, limit)
                if room > 0:
                    self._rung = False
                    taken = await self._take(session, room, timeout > 0)
                    if taken is None:
                        continue
                    if taken:
                        return taken
                    if self._rung and timeout > 0:
                        continue
                if loop.time() >= deadline:
                    return ()
                await self._wait(deadline, hungry=room > 0 or session.drains)
        except BrokerError as error:
            self.problem = error
            raise
        finally:
            self._looking = False
            if self._rung:
                self._rung = False
                self._bell.pass_on(self)

    def _room(self, session: Session, limit: int) -> int:
        held = session.held
        if not held:
            session.lone = None
            return min(limit, self._prefetch)
        if session.drains:
            return 0
        if session.lone is not None:
            if session.lone in held:
                return 0
            session.lone = None
        return min(limit, self._prefetch - len(held))

    async def _take(self, session: Session, room: int, waits: bool) -> Sequence[Delivery] | None:
        """Return what the server hands out; None if it is worth asking again at once."""
        flags = _FLAGS
        sent = time.monotonic()
        try:
            reply = await self._link.call(
                QUEUE_TAKE,
                self._keys,
                (session.name, room, flags[waits], flags[session.listed], flags[session.drains]),
                timeout=self._timeout,
                again=False,
            )
        except asyncio.CancelledError:
            # The server may have handed out something: it goes back, to be taken by the next call, or by another consumer.
            session.unsure = True
            self._mend_soon(session)
            raise
        except Unanswered:
            session.unsure = True
            return None
        except DeliveryLost:
            self.lose(session)
            return None
        except NotFound:
            self.lose(session)
            raise NotFound(f"{self._queue!r} was deleted") from None
        owned, expired, state, hint, elements = reply
        session.owned = sent + owned / 1000
        self.problem = None
        if expired:
            self._context.emit(Expired(address=self._queue.name, count=expired))
        if session.lost or self.session is not session or time.monotonic() >= session.owned:
            # This process stood still for so long that others may have this by now.
            self.lose(session)
            return None
        session.drains = state == _DRAIN
        if elements:
            session.listed = False
            taken = self._deliver(session, elements)
            if state == _LONELY:
                session.lone = next(iter(session.held))  # type: ignore[assignment]
            return taken
        if session.drains:
            session.listed = False
        elif hint == 0:
            return None
        else:
            session.listed = session.listed or waits
            if hint > 0:
                self._bell.hint(hint)
        return ()

    def _deliver(self, session: Session, elements: Sequence[bytes]) -> list[Delivery]:
        queue, position, held = self._queue, self._position, session.held
        taken: list[Delivery] = []
        for data in elements:
            number, deliveries, record = element(queue, data)
            lease = Lease(data[:6])
            held[lease] = delivery = Delivery(record, lease, f"{position}{number}", deliveries + 1)
            taken.append(delivery)
        return taken

    # ------------------------------------------------------------------ waiting

    async def _wait(self, deadline: float, *, hungry: bool) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = waiter = loop.create_future()
        self._hungry = hungry
        self._deadline = deadline
        # A timer of an earlier call stays: it finds out that it is too early.  So a busy consumer sets none.
        if deadline < self._timer_at:
            self._arm(loop, deadline)
        if hungry:
            self._bell.wait(self)
        try:
            await waiter
        except asyncio.CancelledError:
            if hungry and waiter.done() and not waiter.cancelled():
                self._bell.pass_on(self)
            raise
        finally:
            self._waiter = None
            if hungry:
                self._bell.waiting.pop(self, None)

    def ring(self) -> bool:
        """There may be something to take.  Return whether it is going to look."""
        session = self.session
        if self._waiter is not None:
            if not self._hungry or session is None or self._waiter.cancelled():
                return False
            session.drains = False
            self._wake()
            return True
        if self._looking:
            self._rung = True
            return True
        return False

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _arm(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(when, self._ring_late)
        self._timer_at = when

    def _ring_late(self) -> None:
        self._timer = None
        self._timer_at = math.inf
        if self._waiter is not None:
            loop = asyncio.get_running_loop()
            if loop.time() < self._deadline:
                self._arm(loop, self._deadline)
            else:
                self._wake()

    # ------------------------------------------------------------------ settling

    async def settle(self, items: Sequence[Settlement], *, confirm: bool = False) -> Sequence[BrokerError | None]:
        """Store the records of each item and acknowledge its delivery, both or none; one result each."""
        session = self.session
        results: list[BrokerError | None] = []
        done: list[Delivery] = []
        copied: list[int] = []
        held: dict[object, Delivery] = {} if session is None else session.held
        pop = held.pop
        for item in items:
            delivery = item.delivery
            lease: Lease = delivery.token  # type: ignore[assignment]
            if item.publish:
                results.append(None)
                if lease in held:
                    copied.append(len(results) - 1)
                else:
                    results[-1] = unheld(lease)
            elif pop(lease, None) is None:
                results.append(unheld(lease))
            else:
                lease.settled = True
                done.append(delivery)
                results.append(None)
        if session is None or not (done or copied):
            return results
        if copied:
            failed, _ = await asyncio.gather(
                self._settle(session, done, confirm),
                self._settle_copies(session, items, copied, results, confirm),
            )
        else:
            failed = await self._settle(session, done, confirm)
        if failed is not None:
            tokens = {delivery.token for delivery in done}
            results = [
                failed if result is None and item.delivery.token in tokens else result
                for item, result in zip(items, results, strict=True)
            ]
        return results

    async def _settle(self, session: Session, done: Sequence[Delivery], confirm: bool) -> BrokerError | None:
        """Acknowledge *done*; return why that is not possible, if it is not."""
        if not done:
            return None
        numbers: list[bytes] = [delivery.token.number for delivery in done]  # type: ignore[attr-defined]
        session.flights.append(numbers)
        # Whoever waits for room takes with the same write what is settled by it.
        if not (confirm and self._context.sealed is not self._link):
            self._wake()
        try:
            lives = await self._ask(session, QUEUE_SETTLE, self._keys, numbers, confirm=confirm)
        except BaseException as error:
            self._restore(session, done, tried=True)
            if isinstance(error, BrokerError):
                return error
            raise
        finally:
            session.flights.remove(numbers)
        self._wake()
        if lives:
            return None
        self._restore(session, done, tried=False)
        return DeliveryLost()

    def _restore(self, session: Session, done: Sequence[Delivery], *, tried: bool) -> None:
        """*done* are not settled after all, or nobody knows."""
        for delivery in done:
            lease = delivery.token
            assert isinstance(lease, Lease)
            lease.settled = False
            lease.tried = tried
            if not session.lost:
                session.held[lease] = delivery

    async def _settle_copies(
        self,
        session: Session,
        items: Sequence[Settlement],
        copied: Sequence[int],
        results: list[BrokerError | None],
        confirm: bool,
    ) -> None:
        """Settle those of *items* that publish, and write into *results* what failed."""
        for part in self._copies.parts(items, copied, results):
            try:
                reply = await self._ask(session, self._copies.script, (*self._keys, *part.keys), part.args, confirm=confirm)
            except BrokerError as error:
                for index in part.indexes:
                    results[index] = error
                continue
            for index, status in zip(part.indexes, reply or [0] * len(part.indexes), strict=True):
                lease: Lease = items[index].delivery.token  # type: ignore[assignment]
                if not reply:
                    results[index] = unheld(lease)
                elif isinstance(status, bytes):
                    results[index] = self._copies.refused(items[index], status)
                else:
                    session.held.pop(lease, None)
                    lease.settled = True
            self._wake()

    async def _ask(
        self, session: Session, script: Script, keys: Sequence[bytes], args: Sequence[bytes | int], *, confirm: bool = False
    ) -> Any:
        """Run a script that may be run twice, until it is answered; return 0 if the session is over."""
        link = self._context.sealed if confirm else self._link
        end = time.monotonic() + 2 * self._timeout
        while True:
            if session.unsure or session.lock.locked():
                await self._mend(session)
            if session.lost:
                return 0
            name = session.name
            try:
                reply = await link.call(script, keys, (name, *args), timeout=self._timeout, again=False)
            except Unanswered:
                session.unsure = True
                if time.monotonic() >= end:
                    raise
                continue
            except NotFound:
                self.lose(session)
                return 0
            if isinstance(reply, list):
                reply = reply[1:]  # the first one tells whether the session lives
            if reply or script is QUEUE_RELEASE:
                return reply
            if session.name == name:
                self.lose(session)

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Hand *deliveries* back, uncounted."""
        session = self.session
        if session is None:
            return
        given = [delivery for delivery in deliveries if session.held.pop(delivery.token, None) is not None]
        if not given:
            return
        numbers: list[bytes] = [delivery.token.number for delivery in given]  # type: ignore[attr-defined]
        try:
            await self._ask(session, QUEUE_RELEASE, self._keys, numbers)
        except BrokerError:
            self._restore(session, given, tried=False)
            raise
        except asyncio.CancelledError:
            # What it does not know that it holds goes back.
            session.unsure = True
            self._mend_soon(session)
            raise
        finally:
            self._wake()

    async def hold(self, delivery: Delivery, attempts: int) -> None:
        """Keep nothing: a queue's message is settled by its retry."""
        session = self.session
        if session is None or delivery.token not in session.held:
            lost = unheld(delivery.token)
            if lost is not None:
                raise lost

    # ------------------------------------------------------------------ when replies were lost, and sessions

    def _mend_soon(self, session: Session) -> None:
        if self._tasks is not None and self._entered:
            self._tasks.start_soon(self._mend_quietly, session)

    async def _mend_quietly(self, session: Session) -> None:
        try:
            await self._mend(session)
        except BrokerError as error:
            logger.debug("%s: %s; tried again by whoever needs it", self._queue.name, error)

    async def _mend(self, session: Session) -> None:
        """Agree with the server on what *session* holds: what it does not know of goes back, what is not there is gone.

        It goes on under a new name.  So what was sent before and is executed only now, by a server that stood still or from a
        connection that was given up, does nothing any more.
        """
        async with session.lock:
            while session.unsure and not session.lost:
                name = self._new_name()
                self._bell.dismiss(session)
                session.past.append(session.name)
                session.name = name
                self._bell.admit(self, session)
                session.listed = session.drains = False
                tokens: list[Lease] = list(session.held)  # type: ignore[arg-type]
                known = [lease.number for lease in tokens]
                flying = [number for numbers in session.flights for number in numbers]
                sent = time.monotonic()
                session.unsure = False  # unless a reply gets lost from now on
                try:
                    owned, *missing = await self._call(
                        QUEUE_RECOVER, (name, len(session.past), *session.past, *known, *flying)
                    )
                except BaseException as error:
                    session.unsure = True
                    if isinstance(error, Unanswered):
                        continue
                    if isinstance(error, asyncio.CancelledError):
                        self._mend_soon(session)
                    if isinstance(error, (DeliveryLost, NotFound)):
                        self.lose(session)
                        return
                    raise
                session.past.clear()
                session.owned = sent + owned / 1000
                gone = set(missing)
                for lease in tokens if gone else ():
                    if lease.number in gone and session.held.pop(lease, None) is not None:
                        lease.settled = lease.tried
        self._wake()

    def lose(self, session: Session) -> None:
        """What *session* holds belongs to others by now: say so, and go on with a new one."""
        if session.lost:
            return
        held = list(session.held.values())
        self._end(session)
        if self.session is session:
            self.session = None
        if held and self._tasks is not None and self._entered:
            self._tasks.start_soon(self._tell, held)
        self._wake()

    def _end(self, session: Session) -> asyncio.Future[None]:
        """Let others have what *session* holds; return when that is sure."""
        session.lost = True
        session.held.clear()
        self._bell.dismiss(session)
        return self._bell.leave([*session.past, session.name])

    async def _tell(self, deliveries: Sequence[Delivery]) -> None:
        try:
            await self._revoked(deliveries)
        except Exception:
            logger.exception("the callback for revoked deliveries failed")


def unheld(lease: object) -> DeliveryLost | None:
    """Return what settling *lease*, which is not held, comes to: nothing if it was settled before."""
    return None if isinstance(lease, Lease) and lease.settled else DeliveryLost()
