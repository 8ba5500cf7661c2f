"""Sending records: what failed for certain is sent again until the deadline, what may be stored never is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, TypeAlias

from .clock import Clock
from .driver import Driver, Receipt, Record
from .errors import BrokerError, BrokerUnavailable, BufferFull, NotAttempted
from .policy import backoff

Result: TypeAlias = Receipt | BrokerError
CHUNK: Final = 1000
"""Records in one call to the driver."""


async def send(driver: Driver, clock: Clock, records: Sequence[Record], timeout: float) -> list[Result]:
    """Store *records*, in order, and return one result each within *timeout* seconds."""
    until = clock.monotonic() + timeout
    results: list[Result] = []
    for first in range(0, len(records), CHUNK):
        chunk = records[first : first + CHUNK]
        answers = await driver.publish(chunk, timeout=max(until - clock.monotonic(), 0.001))
        results.extend(await resend(driver, clock, chunk, answers, until))
    return results


async def resend(
    driver: Driver, clock: Clock, records: Sequence[Record], answers: Sequence[Result], until: float
) -> list[Result]:
    """Send again what is certainly not stored, until all is or the time is up."""
    results = list(answers)
    failures = 0
    while True:
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


def _again(records: Sequence[Record], results: Sequence[Result]) -> list[int]:
    """Return the indices worth sending again: behind a final failure of its key, a record stays unsent."""
    open_: list[int] = []
    final: set[tuple[object, bytes]] = set()
    for index, (record, result) in enumerate(zip(records, results, strict=True)):
        if isinstance(result, Receipt):
            continue
        mark = None if record.key is None else (record.address, record.key)
        if isinstance(result, (BrokerUnavailable, BufferFull, NotAttempted)) and mark not in final:
            open_.append(index)
        elif mark is not None:
            final.add(mark)
    return open_
