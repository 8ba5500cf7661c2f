"""`QueueConsumer`: takes records of a queue, in competition with others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final, Self

from ...address import AnyQueue
from ...driver import Delivery, Revoked, Settlement, Source
from ...errors import BrokerError, CapabilityError, Closed, ConfigError, DeliveryLost, NotFound
from ...events import Expired
from .._lone import Lone
from ._context import Context
from ._frames import elements
from ._link import Unanswered
from ._queue_copies import Copies
from ._queue_member import Member
from ._queue_session import Lease, Session, unheld
from ._scripts import QUEUE_RELEASE, QUEUE_SETTLE, QUEUE_TAKE

ENOUGH: Final = 1024 * 1024
"""Bytes in one reply to a take, if it is more than one message."""
_LONELY: Final = 1
_DRAIN: Final = 2
_UNKNOWN: Final = 3
_FLAGS: Final = (b"0", b"1")
GIFTS: Final = 8
"""Messages that the server may give it before it asks again: more, if it stood still, would wait for the end of its lease."""
SPARSE: Final = 0.002
"""Seconds between two messages from which on several gifts are allowed: of what comes faster, several are taken at once."""


class QueueConsumer(Member):
    """A consumer of one queue, and its context manager."""

    def __init__(self, context: Context, queue: AnyQueue, source: Source, prefetch: int, revoked: Revoked) -> None:
        super().__init__(context, queue, revoked)
        self._source = source
        self._prefetch = prefetch
        self._position = f"{queue.name}@"
        self._copies = Copies(queue)
        self._size = 0  # of the messages that came last, on average
        self._looking = False  # somebody is in `receive`
        self._rung = False  # meanwhile there may have come something
        self._came = 0.0  # when the last message came
        self._sparse = True  # whether it came long after the one before

    async def __aenter__(self) -> Self:
        """Return when ready."""
        if self._source.until_end:
            raise CapabilityError(f"until_end is for topics; {self._queue!r} on redis has no end")
        return await super().__aenter__()

    # ------------------------------------------------------------------ receiving

    @property
    def prefetch(self) -> int:
        """How many unsettled deliveries this consumer holds at most."""
        return self._prefetch

    @prefetch.setter
    def prefetch(self, value: int) -> None:
        self._prefetch = value
        self._waiting.wake()

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
                if session.given:
                    given, session.given = session.given[:limit], session.given[limit:]
                    return given
                if session.unsure or session.lock.locked():
                    await self._mend(session)
                    continue
                room = self._room(session, limit)
                if room > 0 and (self._rung or not session.kept or timeout <= 0):
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
                if self._rung:
                    self._rung = False
                    self._bell.pass_on(self)
                hungry = room > 0 or session.drains
                if hungry:
                    self._bell.wait(self)
                try:
                    await self._waiting.until(deadline, hungry=hungry)
                except asyncio.CancelledError:
                    self._rung = self._rung or (hungry and self._waiting.woken)
                    raise
                finally:
                    self._bell.waiting.pop(self, None)
        except BrokerError as error:
            self.problem = error
            raise
        finally:
            self._looking = False
            if self.session is not None and self.session.given:
                self._refuse(self.session)
            if self._rung:
                self._rung = False
                self._bell.pass_on(self)

    def _room(self, session: Session, limit: int) -> int:
        held, lone = session.held, session.lone
        if not held:
            return min(limit, self._prefetch)
        if (lone.active and lone.holds_up()) or (session.drains and not session.pressed and not lone.may_come()):
            return 0
        return min(limit, self._prefetch - len(held))

    async def _take(self, session: Session, room: int, waits: bool) -> Sequence[Delivery] | None:
        """Return what the server hands out; None if it is worth asking again at once."""
        flags, name = _FLAGS, session.name
        if self._size > 8192:
            room = min(room, max(1, ENOUGH // self._size))
        known = b"" if session.asking else len(session.held)
        proven = _proven(session.lone) if session.lone.active else 0
        sent = time.monotonic()
        session.kept = False
        gifts = (min(room, GIFTS) if self._sparse else 1) if waits else 0
        try:
            reply = await self._link.call(
                QUEUE_TAKE,
                self._keys,
                (name, room, gifts, flags[session.listed], flags[session.drains], known, proven),
                timeout=self._timeout,
                again=False,
            )
        except asyncio.CancelledError:
            # The server may have handed out something: it goes back, to be taken by the next call, or by another consumer.
            session.unsure = True
            self.mend_soon(session)
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
        owned, expired, state, hint, handed = reply
        session.owned = sent + owned / 1000
        self.problem = None
        if expired:
            self._context.emit(Expired(address=self._queue.name, count=expired))
        if session.lost or session.name != name:
            # Meanwhile `_mend` has found out what it holds: what this call took was unknown, and handed back.
            return None
        if time.monotonic() >= session.owned or state == _UNKNOWN:
            # This process stood still for so long that others may have this by now; or it has not heard of what it was given.
            session.unsure = True
            return None
        session.drains = state == _DRAIN
        session.pressed = False
        if handed:
            session.listed = False
            self._came_now()
            self._size = sum(map(len, handed)) // len(handed)
            taken = self._deliver(session, handed)
            if state == _LONELY:
                session.lone.came(taken[0].token, self._bell.lease)
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

    def _came_now(self) -> float:
        now = time.monotonic()
        self._sparse = now - self._came >= SPARSE
        self._came = now
        return now

    def _deliver(self, session: Session, handed: Sequence[bytes]) -> list[Delivery]:
        position, held = self._position, session.held
        taken: list[Delivery] = []
        for data, (number, deliveries, record) in zip(handed, elements(self._queue, handed), strict=True):
            lease = Lease(data[:6])
            held[lease] = delivery = Delivery(record, lease, f"{position}{number}", deliveries + 1)
            taken.append(delivery)
        return taken

    def ring(self) -> bool:
        """There may be something to take.  Return whether it is going to look."""
        waiting, session = self._waiting, self.session
        if waiting.active:
            if not waiting.hungry or session is None or waiting.cancelled:
                return False
            session.pressed = True
            session.kept = False
            waiting.wake()
            return True
        self._rung = self._looking
        return self._looking

    def hand(self, data: bytes, more: bool = False) -> None:
        """The server has given it the element *data*, and with *more* goes on to count it as waiting."""
        session, waiting = self.session, self._waiting
        if session is None:
            return
        session.listed = session.kept = more
        if self._came_now() >= session.owned:  # this process stood still: others may have it by now
            self.missed()
            return
        session.given += self._deliver(session, (data,))
        ready = waiting.active and waiting.hungry and not waiting.cancelled and not session.unsure
        if not ready or len(session.held) > self._prefetch:
            self._refuse(session)
            self._rung = self._looking and not waiting.active  # it is listed no more: it has to ask again
        waiting.wake()

    def _refuse(self, session: Session) -> None:
        """Hand back what was given and cannot be handed out."""
        if session.kept:
            self._bell.pass_on(self)  # else it would be given the next one, too
        pop = session.held.pop
        refused = [delivery for delivery in session.given if pop(delivery.token, None) is not None]
        numbers: list[bytes] = [delivery.token.number for delivery in refused]  # type: ignore[attr-defined]
        session.given.clear()

        def handed_back(call: asyncio.Future[int]) -> None:
            if call.cancelled() or call.exception() is not None:
                session.unsure = True
                self.mend_soon(session)

        args = (session.name, *numbers)
        call = self._link.call(QUEUE_RELEASE, self._keys, args, timeout=self._timeout, again=False)
        call.add_done_callback(handed_back)

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

    def _freed(self, session: Session) -> None:
        """Let whoever waits for room go on; who waits for messages is told by the server."""
        if not self._waiting.hungry or session.drains:
            self._waiting.wake()

    async def _settle(self, session: Session, done: Sequence[Delivery], confirm: bool) -> BrokerError | None:
        """Acknowledge *done*; return why that is not possible, if it is not."""
        if not done:
            return None
        numbers: list[bytes] = [delivery.token.number for delivery in done]  # type: ignore[attr-defined]
        session.flights.append(numbers)
        sealed = confirm and self._context.sealed is not self._link
        if not sealed:  # whoever waits for room takes with the same write
            self._freed(session)
        try:
            lives = await self._ask(session, QUEUE_SETTLE, self._keys, numbers, confirm=confirm)
        except BaseException as error:
            self._restore(session, done, tried=True)
            if isinstance(error, BrokerError):
                return error
            raise
        finally:
            session.flights.remove(numbers)
        if sealed:
            self._freed(session)
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
            for index in part.indexes:
                lease: Lease = items[index].delivery.token  # type: ignore[assignment]
                lease.tried = True
            try:
                reply = await self._ask(
                    session, self._copies.script, (*self._keys, *part.keys), part.args, confirm=confirm
                )
            except BrokerError as error:
                for index in part.indexes:
                    results[index] = error
                continue
            for index, status in zip(part.indexes, reply or [0] * len(part.indexes), strict=True):
                lease = items[index].delivery.token  # type: ignore[assignment]
                if not reply:
                    results[index] = unheld(lease)
                elif isinstance(status, bytes):
                    results[index] = self._copies.refused(items[index], status)
                else:
                    session.held.pop(lease, None)
                    lease.settled = True
            self._freed(session)

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
            self.mend_soon(session)
            raise
        finally:
            self._freed(session)

    async def hold(self, delivery: Delivery, attempts: int) -> None:
        """Keep nothing: a queue's message is settled by its retry."""
        session = self.session
        if session is None or delivery.token not in session.held:
            lost = unheld(delivery.token)
            if lost is not None:
                raise lost


def _proven(lone: Lone) -> int:
    """Return beside how many that the server knows to be held one may come that has to be alone; 0 if something else is held.

    What is being settled does not count: it is unknown whether the server knows it as held.
    """
    if not lone.may_come():
        return 0
    tokens: Sequence[Lease] = lone.proven()  # type: ignore[assignment]
    return sum(not lease.tried for lease in tokens)
