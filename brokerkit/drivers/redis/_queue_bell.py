"""What the consumers of one queue in one process share: being woken, timers, renewing, and leaving in spite of a lost connection."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, Protocol

from ...errors import BrokerError, Closed, NotFound
from ._context import Context
from ._keys import entity
from ._link import ignore, next_poll
from ._queue_session import Session
from ._scripts import QUEUE_LEAVE, QUEUE_PASS, QUEUE_RENEW

RENEWALS: Final = 3
"""Times in a lease that it is renewed."""


class Ringer(Protocol):
    """A consumer, as its bell knows it."""

    @property
    def session(self) -> Session | None:
        """What it holds; None while it has no session."""
        ...

    def ring(self) -> bool:
        """There may be something to take.  Return whether it is going to look."""
        ...

    def hand(self, data: bytes, more: bool = False) -> None:
        """The server has given it the element *data*, and with *more* goes on to count it as waiting."""
        ...

    def missed(self) -> None:
        """It may have been given something without hearing of it."""
        ...

    def mend_soon(self, session: Session) -> None:
        """Find out what *session* holds."""
        ...

    def lose(self, session: Session) -> None:
        """What *session* holds belongs to others by now."""
        ...


class Bell:
    """Rings consumers of one queue."""

    def __init__(self, context: Context, name: str) -> None:
        self.name = name
        self.members: dict[bytes, Ringer] = {}
        """By the name of their session."""
        self.waiting: dict[Ringer, None] = {}
        """Those who would take something now, the longest first."""
        self.lease = 60.0
        self._users = 0
        self._listens = False
        self._entering = asyncio.Lock()
        self._link = context.link
        self._wakes = context.wakes
        key = entity(name)
        self._keys = (key,)
        self._channel = key + b":c:" + context.process
        self._process = context.process
        self._prefix = len(context.process) + 1
        self._timeout = context.settings.timeout
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._poll_at = math.inf
        self._hint_at = math.inf
        self._renew_at = math.inf
        self._orphans: list[tuple[Sequence[bytes], float]] = []
        """Sessions that were left while there was no connection, and until when that matters."""

    # ------------------------------------------------------------------ life

    async def enter(self) -> None:
        """Listen, for one more consumer."""
        self._users += 1
        self._link.watchers.add(self._link_changed)
        try:
            async with self._entering:
                # If who came first is cancelled there, the next one does it.
                if not self._listens:
                    await self._wakes.subscribe(self._channel, self._told)
                    self._listens = True
        except BaseException:
            self.exit()
            raise

    def exit(self) -> None:
        """Listen for one consumer less."""
        self._users -= 1
        if self._users:
            return
        if self._listens:
            self._wakes.unsubscribe(self._channel, self._told)
            self._listens = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = self._poll_at = self._hint_at = self._renew_at = math.inf
        if self._orphans:
            self._renew_soon()
        else:
            self._link.watchers.discard(self._link_changed)

    def admit(self, ringer: Ringer, session: Session) -> None:
        """Ring *ringer* when the server says the name of *session*."""
        self.members[session.name[self._prefix :]] = ringer
        self._renew_soon()

    def dismiss(self, session: Session) -> None:
        """Forget *session*."""
        self.members.pop(session.name[self._prefix :], None)

    # ------------------------------------------------------------------ ringing

    def _told(self, data: bytes) -> None:
        """The server names a session for which there may be something, or which it has given something."""
        if not data:
            for member in list(self.members.values()):
                member.missed()
            return
        name, given, element = data.partition(b" ")
        more = name.endswith(b"+")
        ringer = self.members.get(name[:-1] if more else name)
        if given:
            # What a session is given that was left, or has another name by now, has been handed back by that.
            if ringer is not None:
                ringer.hand(element, more)
        elif ringer is None:
            self._call_pass(self._process + b"/" + name)
        elif not ringer.ring():
            self.pass_on(ringer)

    def _ring_all(self) -> None:
        for ringer in list(self.waiting):
            ringer.ring()

    def pass_on(self, ringer: Ringer) -> None:
        """Let another one look, because *ringer*, which was woken, does not come."""
        session = ringer.session
        if session is not None:
            session.listed = session.kept = False
            self._call_pass(session.name)

    def _call_pass(self, name: bytes) -> None:
        self._link.call(QUEUE_PASS, self._keys, (name,), timeout=self._timeout).add_done_callback(ignore)

    def _link_changed(self, up: bool) -> None:
        if up:
            self._leave_orphans()
            if not self._users:
                self._link.watchers.discard(self._link_changed)
                return
            self._renew()
        self._ring_all()

    # ------------------------------------------------------------------ timers

    def wait(self, ringer: Ringer) -> None:
        """*ringer* waits for something to take."""
        self.waiting[ringer] = None
        if self._poll_at == math.inf:
            # A wake may be lost, a clock may be set.
            self._poll_at = next_poll(asyncio.get_running_loop().time())
            self._arm()

    def hint(self, ms: int) -> None:
        """In so many milliseconds there may be something without a wake."""
        when = asyncio.get_running_loop().time() + ms / 1000
        if when < self._hint_at:
            self._hint_at = when
            self._arm()

    def _renew_soon(self) -> None:
        self._renew_at = min(self._renew_at, asyncio.get_running_loop().time() + self.lease / RENEWALS)
        self._arm()

    def _arm(self) -> None:
        when = min(self._poll_at, self._hint_at, self._renew_at)
        if when < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(when, self._tick)
            self._timer_at = when

    def _tick(self) -> None:
        self._timer = None
        self._timer_at = math.inf
        now = asyncio.get_running_loop().time()
        if now >= min(self._poll_at, self._hint_at):
            hinted = now >= self._hint_at
            if hinted:
                self._hint_at = math.inf
            if any(ringer.ring() for ringer in list(self.waiting)):
                self._poll_at = next_poll(now)
            else:
                self._poll_at = math.inf
                if hinted:  # another process may have somebody who waits
                    self._call_pass(b"")
        if now >= self._renew_at:
            self._renew_at = now + self.lease / RENEWALS if self.members or self._orphans else math.inf
            self._renew()
            self._leave_orphans()
        self._arm()

    # ------------------------------------------------------------------ renewing

    def _renew(self) -> None:
        """Give a sign of life for all sessions that have given none for a while."""
        now = time.monotonic()
        renewed: list[tuple[Ringer, Session, bytes]] = []
        for ringer in list(self.members.values()):
            session = ringer.session
            if session is None:
                continue
            if session.unsure:
                ringer.mend_soon(session)
            elif session.past:
                continue  # the server may not know its name yet: what tells it is under way, and renews
            elif session.owned - now < self.lease * 0.8:
                renewed.append((ringer, session, session.name))
        if renewed:
            names = [name for _, _, name in renewed]
            call = self._link.call(QUEUE_RENEW, self._keys, names, timeout=self._timeout, again=False)
            call.add_done_callback(partial(self._renewed, renewed, now))

    def _renewed(self, renewed: list[tuple[Ringer, Session, bytes]], sent: float, call: asyncio.Future[Any]) -> None:
        if call.cancelled() or call.exception() is not None:
            return
        for (ringer, session, name), ms in zip(renewed, call.result(), strict=True):
            if ms > 0:
                session.owned = max(session.owned, sent + ms / 1000)
            elif session.name == name and not session.past:
                ringer.lose(session)

    # ------------------------------------------------------------------ leaving

    def leave(self, names: Sequence[bytes]) -> asyncio.Future[None]:
        """Hand back what a session that had *names* still holds; the future is done when that is under way for sure."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._leave(names, loop.time() + self.lease, done)
        return done

    def _leave(self, names: Sequence[bytes], until: float, done: asyncio.Future[None] | None) -> None:
        left = until - asyncio.get_running_loop().time()
        if left <= 0:  # by now others have taken it
            _resolve(done)
            return
        call = self._link.call(QUEUE_LEAVE, self._keys, names, timeout=left)
        call.add_done_callback(partial(self._left, names, until, done))

    def _left(
        self, names: Sequence[bytes], until: float, done: asyncio.Future[None] | None, call: asyncio.Future[Any]
    ) -> None:
        error = None if call.cancelled() else call.exception()
        if error is None and not call.cancelled() and call.result():
            self._leave(names, until, done)
            return
        if isinstance(error, BrokerError) and not isinstance(error, (Closed, NotFound)):
            # Again when there is a connection, or at the next renewal; after the lease others take what is held.
            self._orphans.append((names, until))
            self._link.watchers.add(self._link_changed)
            self._renew_soon()
        _resolve(done)

    def _leave_orphans(self) -> None:
        orphans, self._orphans = self._orphans, []
        for names, until in orphans:
            self._leave(names, until, None)


def _resolve(done: asyncio.Future[None] | None) -> None:
    if done is not None and not done.done():
        done.set_result(None)
