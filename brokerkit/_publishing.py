"""Sending records: what failed for certain is sent again until the deadline, what may be stored never is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Self, TypeAlias

from ._tasks import finished
from .address import Address
from .clock import Clock
from .driver import Driver, Receipt, Record
from .errors import BrokerError, BrokerUnavailable, BufferFull, NotAttempted, NotFound
from .policy import backoff

Result: TypeAlias = Receipt | BrokerError
Line: TypeAlias = tuple[Address, bytes]
Restore: TypeAlias = Callable[[Address], Awaitable[bool]]
"""Creates an address anew that has vanished, and tells whether it may."""
CHUNK: Final = 500
"""Records in one call to the driver."""


async def never(_: Address) -> bool:
    """Create nothing."""
    return False


async def send(
    driver: Driver, clock: Clock, records: Sequence[Record], timeout: float, restore: Restore = never
) -> list[Result]:
    """Store *records*, in order, and return one result each within *timeout* seconds."""
    sending = Sending(driver, clock, timeout, restore)
    results: list[Result] = []
    for first in range(0, len(records), CHUNK):
        results.extend(await sending.step(records[first : first + CHUNK]))
    return results


class Sending:
    """One call's way to the driver, in as many steps as it takes: what fails in one holds back its key in the next."""

    def __init__(self, driver: Driver, clock: Clock, timeout: float, restore: Restore = never) -> None:
        self._driver = driver
        self._clock = clock
        self._restore = restore
        self._until = clock.monotonic() + timeout
        self._failed: set[Line] = set()

    async def step(self, records: Sequence[Record]) -> list[Result]:
        """Store at most `CHUNK` *records*, in order, and return one result each before the time is up."""
        failed = self._failed
        if not failed:
            results = await self._store(records)
        else:
            open_ = [record for record in records if line_of(record) not in failed]
            stored = iter(await self._store(open_) if open_ else ())
            results = [_held_back() if line_of(record) in failed else next(stored) for record in records]
        if not all(type(result) is Receipt for result in results):
            for record, result in zip(records, results, strict=True):
                line = line_of(record)
                if line is not None and type(result) is not Receipt:
                    failed.add(line)
        return results

    async def _store(self, records: Sequence[Record]) -> list[Result]:
        answers = await self._driver.publish(records, timeout=max(self._until - self._clock.monotonic(), 0.001))
        if all(type(answer) is Receipt for answer in answers):
            return list(answers)
        return await resend(self._driver, self._clock, records, answers, self._until, self._restore)


class Chunks:
    """Stores one chunk while its caller makes the next, in order; *results* gets each answer at its index."""

    def __init__(self, sending: Sending, results: list[Result]) -> None:
        self._sending = sending
        self._results = results
        self._storing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cancel what is under way, if the caller failed or was cancelled."""
        if self._storing is not None:
            self._storing.cancel()
            await finished(self._storing)

    async def begin(self, records: Sequence[Record], indices: Sequence[int]) -> None:
        """Begin to store *records* when the chunk before is stored."""
        await self._stored()
        self._storing = asyncio.get_running_loop().create_task(self._store(records, indices))
        for _ in range(3):  # let it be sent
            await asyncio.sleep(0)

    async def end(self, records: Sequence[Record], indices: Sequence[int]) -> None:
        """Store *records*, the last ones."""
        await self._stored()
        if records:
            await self._store(records, indices)

    async def _stored(self) -> None:
        if self._storing is not None:
            await self._storing
            self._storing = None

    async def _store(self, records: Sequence[Record], indices: Sequence[int]) -> None:
        for index, answer in zip(indices, await self._sending.step(records), strict=True):
            self._results[index] = answer


def _held_back() -> NotAttempted:
    return NotAttempted("an earlier message of the same key failed")


def line_of(record: Record) -> Line | None:
    """Return what *record* must stay in order with: the records of its address and key; None without a key."""
    return None if record.key is None else (record.address, record.key)


async def resend(
    driver: Driver,
    clock: Clock,
    records: Sequence[Record],
    answers: Sequence[Result],
    until: float,
    restore: Restore = never,
) -> list[Result]:
    """Send again what is certainly not stored, until all is or the time is up."""
    results = await _restored(records, answers, restore)
    failures = 0
    while not all(type(result) is Receipt for result in results):
        open_ = _again(records, results)
        failures += 1
        wait = backoff(failures, initial=0.02, longest=1.0)
        left = until - clock.monotonic()
        if not open_ or left <= wait:
            return results
        await asyncio.sleep(wait)
        answers = await driver.publish([records[index] for index in open_], timeout=max(left - wait, 0.001))
        for index, answer in zip(open_, answers, strict=True):
            results[index] = answer
    return results


async def _restored(records: Sequence[Record], answers: Sequence[Result], restore: Restore) -> list[Result]:
    """Return *answers* where what failed because its address has vanished may be sent again, once it was created anew."""
    missing = {record.address for record, answer in zip(records, answers, strict=True) if isinstance(answer, NotFound)}
    there = {address for address in missing if await restore(address)}
    return [
        NotAttempted(f"{record.address!r} was missing and was created anew")
        if isinstance(answer, NotFound) and record.address in there
        else answer
        for record, answer in zip(records, answers, strict=True)
    ]


def _again(records: Sequence[Record], results: Sequence[Result]) -> list[int]:
    """Return the indices worth sending again: behind a final failure of its key, a record stays unsent."""
    open_: list[int] = []
    final: set[Line] = set()
    for index, (record, result) in enumerate(zip(records, results, strict=True)):
        if isinstance(result, Receipt):
            continue
        mark = line_of(record)
        if isinstance(result, (BrokerUnavailable, BufferFull, NotAttempted)) and mark not in final:
            open_.append(index)
        elif mark is not None:
            final.add(mark)
    return open_
