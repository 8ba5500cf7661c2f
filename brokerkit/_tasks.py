"""Background tasks that belong to an ``async with``, whichever tasks enter and leave it.

A task group entered in one task and left in another breaks (test fixtures do just that), and it wraps what the body raises.
So the groups live in a task of their own, which the ``async with`` starts, and waits for on leaving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Self, cast

import anyio


class Hosted:
    """Runs ``main(started)`` in a task of its own for as long as an ``async with`` lasts.

    *main* sets the result of *started* when entering is done, works until `stopping` is set, cleans up within deadlines of
    its own and returns.  What it raises comes out of entering or of leaving.
    """

    def __init__(self, name: str, main: Callable[[asyncio.Future[None]], Coroutine[Any, Any, None]]) -> None:
        self.stopping = asyncio.Event()
        self._name = name
        self._main = main
        self.task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = loop.create_future()
        task = self.task = loop.create_task(self._main(started), name=self._name)
        try:
            await asyncio.wait([task, started], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            await finished(task)
            if not task.cancelled():
                task.exception()
            raise
        if not started.done():
            started.cancel()
            _result(task)
            raise RuntimeError(f"{self._name} ended before it began")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stopping.set()
        if self.task is not None:
            await finished(self.task)
            _result(self.task)


def _result(task: asyncio.Task[None]) -> None:
    """Raise what *task* failed with, one error and not a group of ours."""
    try:
        task.result()
    except asyncio.CancelledError:
        pass
    except BaseException as group:
        error = first_error(group)
        raise error from error.__cause__


def first_error(error: BaseException) -> BaseException:
    """Return *error*, or the first one in it if it is a group: users see one error, not a group of ours."""
    while isinstance(error, BaseExceptionGroup):
        error = cast("BaseExceptionGroup[BaseException]", error).exceptions[0]
    return error


async def finished(task: asyncio.Future[None]) -> None:
    """Wait until *task* has ended, even while being cancelled; the cancellation goes on afterwards.

    For clean-up that is bounded by deadlines of its own.
    """
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled
