"""Settlements that publish: the copies are stored first, then the delivery is done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

from ...address import Address, DeadLetters
from ...driver import Delivery, Receipt, Record
from ...errors import BrokerError, DeliveryLost, TooLarge
from ...policy import MAX_BODY
from ._tiers import DELAY

logger = logging.getLogger("brokerkit")

MARGIN: Final = 2.0
"""Most seconds for which a delivery must be owned still when its copies are sent."""


STORING: Final = 30.0
"""Least seconds until the storing of copies is given up.  Up to then a lost answer is asked for again under the same number;
what is settled again afterwards may be stored twice.
"""


class Store(Protocol):
    """Where copies go."""

    async def copy(self, records: Sequence[Record], timeout: float, /) -> Sequence[Receipt | BrokerError]:
        """Store *records*; one result each."""
        ...


class Token(Protocol):
    """What stands for a delivery that is settled."""

    settled: bool
    job: Any
    """The settlement that is under way for it, if it stores copies."""
    stored: tuple[Record, ...]
    """Copies that are stored already, by a settlement that has failed at another one."""


L = TypeVar("L", bound=Token)


class Job(Generic[L]):
    """One settlement that publishes: concurrent ones of the same delivery wait for the first."""

    __slots__ = ("future", "lease", "records")

    def __init__(self, lease: L, records: Sequence[Record]) -> None:
        self.lease = lease
        stored = {id(record) for record in lease.stored}
        self.records = [record for record in records if id(record) not in stored]
        self.future: asyncio.Future[BrokerError | None] = asyncio.get_running_loop().create_future()

    def end(self, error: BrokerError | None) -> None:
        """Tell who waits for it."""
        self.lease.job = None
        if not self.future.done():
            self.future.set_result(error)


class Copies(Generic[L]):
    """The settlements of one reader that publish."""

    def __init__(
        self,
        store: Store,
        sure: Callable[[Sequence[L]], Awaitable[None]],
        held: dict[object, Delivery],
        timeout: float,
        spawn: Callable[[Callable[[], Coroutine[Any, Any, None]]], None],
        done: Callable[[L], None],
    ) -> None:
        """Settle what is in *held*.

        *sure* returns when each of what it is given is certainly ours for a while, or not in *held* any more; *done* is told
        of a delivery whose copies are stored, and which is not in *held* any more.
        """
        self._store = store
        self._sure = sure
        self._held = held
        self._timeout = timeout
        self._spawn = spawn
        self._done = done
        self._jobs: dict[Job[L], None] = {}
        self._fresh: list[Job[L]] = []

    def add(self, lease: L, records: Sequence[Record]) -> Job[L]:
        """Have *records* stored and the delivery of *lease* settled."""
        job = lease.job = Job(lease, records)
        self._jobs[job] = None
        if not self._fresh:
            self._spawn(self._carry_out)
        self._fresh.append(job)
        return job

    def under_way(self, of: Callable[[L], bool]) -> list[asyncio.Future[BrokerError | None]]:
        """Return what ends with the settlements under way *of* which that is true."""
        return [job.future for job in self._jobs if of(job.lease)]

    def abort(self) -> None:
        """Carry nothing out any more: the reader is left."""
        jobs, self._jobs = self._jobs, {}
        for job in jobs:
            job.end(DeliveryLost("the consumer was left before this was settled"))

    async def _carry_out(self) -> None:
        """Store the copies of all settlements that have come together, in one call."""
        jobs, self._fresh = self._fresh, []
        try:
            await self._store_copies(jobs)
        except BrokerError as error:
            for job in jobs:
                self._end(job, error)
        except Exception as error:
            logger.exception("storing copies failed")
            broken = BrokerError(f"the driver failed: {type(error).__name__}")
            broken.__cause__ = error
            for job in jobs:
                self._end(job, broken)
        finally:
            for job in jobs:  # cancelled
                self._end(job, DeliveryLost("the consumer was left before this was settled"))

    async def _store_copies(self, jobs: list[Job[L]]) -> None:
        held = self._held
        await self._sure([job.lease for job in jobs if job.lease in held])
        owned: list[Job[L]] = []
        for job in jobs:
            if job.lease in held:
                large = oversized(job.records, held[job.lease].record.address)
                if large is None:
                    owned.append(job)
                else:
                    self._end(job, large)
            else:
                self._end(job, None if job.lease.settled else DeliveryLost())
        records = [record for job in owned for record in job.records]
        results = iter(await self._store.copy(records, max(STORING, self._timeout)) if records else ())
        for job in owned:
            failure: BrokerError | None = None
            stored: list[Record] = []
            for record in job.records:
                result = next(results)
                if isinstance(result, BrokerError):
                    failure = failure or result
                else:
                    stored.append(record)
            lease = job.lease
            if stored:
                lease.stored = (*lease.stored, *stored)
            if failure is None and held.pop(lease, None) is not None:
                lease.settled = True
                self._end(job, None)
                self._done(lease)
            elif lease in held:
                self._end(job, failure)
            else:
                self._end(job, DeliveryLost(published=bool(lease.stored)))

    def _end(self, job: Job[L], error: BrokerError | None) -> None:
        if self._jobs.pop(job, self) is None:
            job.end(error)


def oversized(records: Sequence[Record], own: Address) -> TooLarge | None:
    """Return why *records* cannot be stored as part of the outcome of a message of *own*, if one is too large for that.

    Copies of that message, which another client may have written, are not: those of a retry, and dead letters.
    """
    home = own.name.removesuffix(f"..{DELAY}")  # where what has waited goes
    for record in records:
        size = len(record.body or b"")
        copy = record.address.name in {own.name, home} or isinstance(record.address, DeadLetters)
        if size > MAX_BODY and not copy:
            return TooLarge(
                f"a body of {size} bytes for {record.address.name} is over the limit of {MAX_BODY}; publish a reference instead"
            )
    return None
