"""Ways to publish that rows share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from .job import RATE, Order

T = TypeVar("T")


def chunks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Split *values* into runs of *size*."""
    return (values[at : at + size] for at in range(0, len(values), size))


async def paced(values: Iterable[Order], publish: Callable[[Order], Awaitable[object]]) -> None:
    """Publish at `RATE` a second, each value stamped just before."""
    due = time.monotonic()
    for value in values:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        due += 1 / RATE
        value.t = time.monotonic_ns()
        await publish(value)


async def spread(values: Sequence[T], handlers: int, publish: Callable[[T], Awaitable[object]]) -> None:
    """Publish from *handlers* tasks: the peers' in-memory brokers run the handler inside of publish."""
    if handlers == 1:
        for value in values:
            await publish(value)
        return
    left = iter(values)

    async def one() -> None:
        for value in left:
            await publish(value)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(handlers):
            tasks.create_task(one())
