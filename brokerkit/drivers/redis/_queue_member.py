"""`Member`: a consumer's session on the server, from joining to leaving, through lost replies and lost leases."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

import anyio
from anyio.abc import TaskGroup

from ..._tasks import Hosted
from ...address import AnyQueue
from ...driver import Delivery, Revoked
from ...errors import BrokerError, Closed, DeliveryLost, NotFound
from ._context import Context
from ._keys import entity
from ._link import Link, Unanswered
from ._publish import derived_settings
from ._queue_bell import Bell
from ._queue_session import Lease, Session
from ._queue_wait import Waiting
from ._scripts import QUEUE_JOIN, QUEUE_RECOVER, QUEUE_RELEASE, Script

logger = logging.getLogger("brokerkit")

LEAVE: Final = 2.0
"""Seconds that leaving waits for the server to know."""
_numbers = itertools.count(1)


class Member(ABC):
    """Who takes part in a queue.

    To the server it is a *session*, which owns what it was handed for as long as it gives signs of life; nothing is renewed
    one by one.  A session whose replies were lost finds out what it holds; one that is over is replaced by a new one.
    """

    def __init__(self, context: Context, queue: AnyQueue, revoked: Revoked) -> None:
        self.session: Session | None = None
        """What it holds; None while it has no session."""
        self.problem: BrokerError | None = None
        """Why nothing comes out of it, if nothing does."""
        self._context = context
        self._link: Link = context.link
        self._queue = queue
        self._revoked = revoked
        self._keys = (entity(queue.name),)
        self._timeout = context.settings.timeout
        self._waiting = Waiting()
        self._bell = Bell(context, queue.name)
        self._hosted: Hosted | None = None
        self._tasks: TaskGroup | None = None
        self._entered = False
        self._joining = asyncio.Lock()

    def __repr__(self) -> str:
        held = 0 if self.session is None else len(self.session.held)
        return f"<{type(self).__name__} {self._queue.name} in_flight={held}>"

    @property
    def owned_until(self) -> float:
        """Until when what it holds is certainly its own; after that only the server can tell, and may extend it."""
        return 0.0 if self.session is None else self.session.owned

    @abstractmethod
    def ring(self) -> bool:
        """There may be something to take.  Return whether it is going to look."""

    @abstractmethod
    def hand(self, data: bytes, more: bool = False) -> None:
        """The server has given it the element *data*, and with *more* goes on to count it as waiting."""

    def missed(self) -> None:
        """It may have been given something without hearing of it."""
        session = self.session
        if session is not None:
            session.unsure = True
            self.mend_soon(session)

    # ------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        """Return when ready."""
        self._hosted = Hosted(f"brokerkit queue {self._queue.name}", self._host)
        await self._hosted.__aenter__()
        for reader in self._context.readers:
            if isinstance(reader, Member) and reader._queue.name == self._queue.name:
                self._bell = reader._bell
                break
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
        left = None if session is None else self._end(session)
        self._waiting.close()
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
            name, lease, sent = await self._joined()
            if not self._entered:
                self._bell.leave([name])
                raise Closed("this consumer was left")
            self._bell.lease = lease / 1000
            self.session = session = Session(name, sent + lease / 1000, self._waiting.wake)
            self._bell.admit(self, session)
            return session

    async def _joined(self) -> tuple[bytes, int, float]:
        """Return the name of a new session, its lease in milliseconds, and when it was asked for.

        A call to join is never sent again: were it executed late, its name would live again after it was left.
        """
        while True:
            name, sent = self._new_name(), time.monotonic()
            try:
                lease: int = await self._call(QUEUE_JOIN, (name, derived_settings(self._queue)))
            except Unanswered:
                self._bell.leave([name])
                continue
            except asyncio.CancelledError:
                self._bell.leave([name])
                raise
            return name, lease, sent

    async def _call(self, script: Script, args: Sequence[bytes | int]) -> Any:
        try:
            return await self._link.call(script, self._keys, args, timeout=self._timeout, again=False)
        except NotFound:
            raise NotFound(f"{self._queue!r} does not exist; declare it") from None

    # ------------------------------------------------------------------ calling

    async def _ask(
        self,
        session: Session,
        script: Script,
        keys: Sequence[bytes],
        args: Sequence[bytes | int],
        *,
        confirm: bool = False,
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
            session.asking += 1
            try:
                reply: Any = await link.call(script, keys, (name, *args), timeout=self._timeout, again=False)
            except Unanswered:
                session.unsure = True
                if time.monotonic() >= end:
                    raise
                continue
            except (NotFound, Closed):  # there is no way to settle it any more
                self.lose(session)
                return 0
            finally:
                session.asking -= 1
            # Of several results the first one tells whether the session lives.
            results: Any = reply if reply.__class__ is int else reply[1:]
            if results or script is QUEUE_RELEASE:
                return results
            if session.name == name:
                self.lose(session)

    # ------------------------------------------------------------------ when replies were lost, and when the session is

    def mend_soon(self, session: Session) -> None:
        """Find out what *session* holds."""
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
                session.listed = session.kept = session.drains = session.pressed = False
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
                        self.mend_soon(session)
                    if isinstance(error, (DeliveryLost, NotFound, Closed)):
                        self.lose(session)
                        return
                    raise
                session.past.clear()
                session.owned = sent + owned / 1000
                if missing:
                    self._forget(session, tokens, set(missing))
        self._waiting.wake()

    def _forget(self, session: Session, tokens: Sequence[Lease], gone: set[bytes]) -> None:
        """Of *tokens* those with a number in *gone* are not held any more: they were settled, released, or taken back."""
        lost: list[Delivery] = []
        for lease in tokens:
            if lease.number in gone and (delivery := session.held.pop(lease, None)) is not None:
                lease.settled = lease.tried
                if not lease.settled:
                    lost.append(delivery)
        if lost and self._tasks is not None and self._entered:
            self._tasks.start_soon(self._tell, lost)

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
        self._waiting.wake()

    def _end(self, session: Session) -> asyncio.Future[None]:
        """Let others have what *session* holds; return when that is sure."""
        session.lost = True
        session.held.clear()
        session.lone.close()
        self._bell.dismiss(session)
        return self._bell.leave([*session.past, session.name])

    async def _tell(self, deliveries: Sequence[Delivery]) -> None:
        try:
            await self._revoked(deliveries)
        except Exception:
            logger.exception("the callback for revoked deliveries failed")
