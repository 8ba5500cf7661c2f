"""Records that go back to their queue: as copies, since brokers count every time they hand one out, whatever it was for.

A copy is a new record to the broker and carries what was really counted.  So a record whose count comes near the limit, at
which brokers drop it without a word, is rescued; and what is handed back without having failed counts nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

import msgspec

from ...driver import Record
from ...errors import BrokerError, BrokerUnavailable, Closed
from ._cluster import PAUSE
from ._copies import MARGIN, STORING, Store
from ._records import DUE, due, milliseconds
from ._share_locks import Lock

logger = logging.getLogger("brokerkit")

_LONG: Final = 5.0
"""Seconds between two attempts to store a copy, at most."""
_SLOW: Final = 5.0
"""Seconds after which it is a problem that something is not stored, although nobody has refused it."""
_STORED: Final = 5.0
"""Most seconds to wait until the broker knows that an original is done."""


class Lease(msgspec.Struct, eq=False):
    """A record in hand; the token of its delivery, if it was handed out."""

    lock: Lock
    record: Record
    count: int
    """How often the broker had handed it out when it was acquired, that time included."""
    since: float
    """When it was acquired, on the loop's clock."""
    settled: bool = False
    job: Any = None
    """The settlement that is under way for it, if it stores copies."""
    stored: tuple[Record, ...] = ()
    """Copies that are stored already, by a settlement that has failed at another one."""

    @property
    def deliveries(self) -> int:
        """How often it was somebody's own, this time included."""
        return self.record.deliveries + self.count

    def copy(self, *, counted: bool = False, rest: float = 0.0) -> Record:
        """Return what is stored in its place, with *counted* as one whose delivery has ended without an outcome.

        What has to wait for its time goes on waiting for the same point in time; a *rest* is the seconds until then.
        """
        record = self.record
        deliveries = self.deliveries if counted else self.deliveries - 1
        headers = record.headers
        if (when := due(self.lock.native)) is not None:
            headers = ((DUE, b"%d" % milliseconds(when)), *headers)
        return msgspec.structs.replace(record, headers=headers, deliveries=deliveries, delay=rest)


class Holder(Protocol):
    """Whose records these are: a `Share`."""

    def accept(self, lock: Lock, /) -> None:
        """Be done with *lock*."""
        ...

    def release(self, lock: Lock, /) -> None:
        """Hand *lock* back, counted."""
        ...

    def confirmed(self, lock: Lock, /) -> asyncio.Future[BrokerError | None]:
        """Return what becomes of an accepted *lock*."""
        ...

    async def sure(self, locks: Sequence[Lock], seconds: float, /) -> None:
        """Make sure of *locks*."""
        ...


class Returns:
    """What one consumer puts back."""

    def __init__(
        self,
        name: str,
        store: Store,
        holder: Holder,
        limit: int,
        spawn: Callable[[Callable[[], Coroutine[Any, Any, None]]], None],
        gone: Callable[[Lease], None],
        over: Callable[[], None],
    ) -> None:
        """*limit* is how often the broker hands a record out.

        *gone* is told of each that is in hand no more, *over* whenever something of `pressing` or `problem` may have changed.
        """
        self._name = name
        self._store = store
        self._holder = holder
        self._limit = limit
        self._spawn = spawn
        self._gone = gone
        self._over = over
        self._parts: dict[_Part, None] = {}
        self._held: dict[Lease, Record] = {}
        """What is to be put back, with its copy."""

    @property
    def problem(self) -> BrokerError | None:
        """Why something cannot be put back at the moment."""
        return next((problem for part in self._parts if (problem := self._trouble(part)) is not None), None)

    def _trouble(self, part: _Part) -> BrokerError | None:
        if part.problem is None and part.copies and asyncio.get_running_loop().time() > part.since + _SLOW:
            return BrokerUnavailable(
                f"{len(part.copies)} messages of {self._name} are to be stored anew, and still are not"
            )
        return part.problem

    @property
    def pressing(self) -> bool:
        """Whether something is to be safe before anything is handed out that may end this process.

        What cannot be stored for the time being holds nothing up, unless the broker could drop it the next time.
        """
        for part in self._parts:
            if part.urgent:
                trouble = self._trouble(part)
                if trouble is None or (
                    trouble.retryable and any(lease.lock.count >= self._limit - 1 for lease in part.copies)
                ):
                    return True
        return False

    @property
    def under_way(self) -> bool:
        """Whether something is being put back, and is not given up."""
        return any(not part.future.done() for part in self._parts)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, lease: object) -> bool:
        return lease in self._held

    def put(
        self, copies: Iterable[tuple[Lease, Record]], patience: float = math.inf, *, urgent: bool = False
    ) -> asyncio.Future[None]:
        """Store copies, each in the place of its original, and return what ends when the broker knows that.

        What cannot be stored within *patience* seconds is handed back itself, which counts; unless that could end it: then
        it is kept, and tried again.
        """
        part = _Part(dict(copies), asyncio.get_running_loop().time() + patience, urgent)
        self._held.update(part.copies)
        self._parts[part] = None
        self._spawn(part.run(self._run))
        return part.future

    def hurry(self, patience: float) -> list[asyncio.Future[None]]:
        """Have everything put back within *patience* seconds; return what ends when that is so."""
        end = asyncio.get_running_loop().time() + patience
        for part in self._parts:
            part.hurry(end)
        return [part.future for part in self._parts]

    def forget(self, lease: Lease) -> None:
        """Have nothing to do with *lease* any more: it is lost."""
        self._held.pop(lease, None)

    async def possible(self) -> bool:
        """Return whether there is anything that stores: not when the connection was closed before the consumer is left."""
        try:
            await self._store.copy((), 0.0)
        except Closed:
            return False
        return True

    def abort(self) -> None:
        """Put nothing back any more: the consumer is left."""
        self._held.clear()
        parts, self._parts = self._parts, {}
        for part in parts:
            part.end()

    async def _run(self, part: _Part) -> None:
        try:
            stored = await self._put_back(part)
            if stored:
                await asyncio.wait(stored, timeout=_STORED)
        finally:
            self._parts.pop(part, None)
            part.end()
            self._over()

    async def _put_back(self, part: _Part) -> list[asyncio.Future[BrokerError | None]]:
        """Put back everything of *part*; return what the broker has to say to that."""
        loop, held, copies = asyncio.get_running_loop(), self._held, part.copies
        stored: list[asyncio.Future[BrokerError | None]] = []
        pause = PAUSE
        while True:
            for lease in [lease for lease in copies if lease not in held]:
                del copies[lease]  # lost
            if not copies:
                return stored
            before = len(copies)
            left = part.end_at - loop.time()
            if left > 0:
                stored += await self._attempt(part, left)
            if copies and loop.time() >= part.end_at:
                self._hand_back(part)
                if copies:  # they must not be handed back: whoever waits need not wait for them
                    part.end_at = math.inf
                    part.end()
            if not copies:
                return stored
            pause = PAUSE if len(copies) < before else min(2 * pause, _LONG)
            await part.wait(min(pause, part.end_at - loop.time()))

    async def _attempt(self, part: _Part, left: float) -> list[asyncio.Future[BrokerError | None]]:
        """Store the copies of *part* that are left, once."""
        held, copies, holder = self._held, part.copies, self._holder
        problem: BrokerError | None = None
        stored: list[asyncio.Future[BrokerError | None]] = []
        try:
            async with part.trying(left):
                await holder.sure([lease.lock for lease in copies], MARGIN)
                wanted = [(lease, record) for lease, record in copies.items() if lease in held]
                results = await self._store.copy([record for _, record in wanted], min(STORING, max(left, PAUSE)))
        except TimeoutError:
            return stored
        except BrokerError as error:
            problem = error
            if isinstance(error, Closed):
                part.end_at = 0.0
        else:
            part.since = asyncio.get_running_loop().time()
            for (lease, _), result in zip(wanted, results, strict=True):
                if isinstance(result, BrokerError):
                    problem = problem or result
                elif held.pop(lease, None) is not None:
                    del copies[lease]
                    holder.accept(lease.lock)
                    stored.append(holder.confirmed(lease.lock))
                    self._gone(lease)
        if problem is not None and part.problem is None and not isinstance(problem, Closed):
            logger.warning("%s: %d messages cannot be put back for now: %s", self._name, len(copies), problem)
        part.problem = problem
        self._over()
        return stored

    def _hand_back(self, part: _Part) -> None:
        """Hand back what could not be copied in time, but for what the broker would drop then."""
        for lease in list(part.copies):
            if lease.lock.count < self._limit and self._held.pop(lease, None) is not None:
                del part.copies[lease]
                self._holder.release(lease.lock)
                self._gone(lease)


class _Part:
    """What was put back by one call."""

    __slots__ = ("_patience", "copies", "end_at", "future", "news", "problem", "since", "urgent")

    def __init__(self, copies: dict[Lease, Record], end_at: float, urgent: bool) -> None:
        self.copies = copies
        self.urgent = urgent
        self.end_at = end_at
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.news = asyncio.Event()
        self.problem: BrokerError | None = None
        self._patience: asyncio.Timeout | None = None
        """Of the attempt that is under way."""
        self.since = asyncio.get_running_loop().time()
        """When it was put back, or when the cluster has last said something about it."""

    def run(self, work: Callable[[_Part], Coroutine[Any, Any, None]]) -> Callable[[], Coroutine[Any, Any, None]]:
        """Return *work* on this."""

        def begin() -> Coroutine[Any, Any, None]:
            return work(self)

        return begin

    def hurry(self, end_at: float) -> None:
        """Let it end then at the latest."""
        self.end_at = min(self.end_at, end_at)
        self.news.set()
        if self._patience is not None:
            self._patience.reschedule(self.end_at)

    @asynccontextmanager
    async def trying(self, left: float) -> AsyncIterator[None]:
        """Give up what is done inside after *left* seconds, or when it has to hurry."""
        try:
            async with asyncio.timeout(None if left == math.inf else left) as self._patience:
                yield
        finally:
            self._patience = None

    def end(self) -> None:
        """Tell who waits."""
        if not self.future.done():
            self.future.set_result(None)

    async def wait(self, seconds: float) -> None:
        """Return after *seconds*, or when it has to hurry."""
        self.news.clear()
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self.news.wait()
        except TimeoutError:
            pass
