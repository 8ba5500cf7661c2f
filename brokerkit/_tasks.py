"""Background tasks that belong to an ``async with``, whichever tasks enter and leave it.

A task group entered in one task and left in another breaks (test fixtures do just that), and it wraps what the body raises.
So the group lives in a task of its own, which the ``async with`` starts, and waits for on leaving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVarTuple

import anyio
from anyio.abc import TaskGroup

Ts = TypeVarTuple("Ts")


class Background:
    """A task group in a task of its own.  Leaving cancels what still runs and raises the first error of a task."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._host: asyncio.Task[None] | None = None
        self._group: TaskGroup | None = None
        self._ready: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._host = loop.create_task(self._run(self._ready), name=self._name)
        await self._ready
        return self

    async def _run(self, ready: asyncio.Future[None]) -> None:
        try:
            async with anyio.create_task_group() as group:
                self._group = group
                ready.set_result(None)
                await anyio.sleep_forever()
        finally:
            self._group = None
            if not ready.done():
                ready.cancel()

    def start(self, run: Callable[[*Ts], Coroutine[Any, Any, object]], *args: *Ts, name: str | None = None) -> None:
        """Run ``run(*args)`` in the background until it ends or the ``async with`` is left."""
        if self._group is None:
            raise RuntimeError(f"{self._name} is not running")
        self._group.start_soon(run, *args, name=name)

    @property
    def running(self) -> bool:
        """Whether tasks can be started."""
        return self._group is not None

    async def __aexit__(self, *_: object) -> None:
        if self._host is None:
            return
        if self._group is not None:
            self._group.cancel_scope.cancel()
        await finished(self._host)
        try:
            self._host.result()
        except asyncio.CancelledError:
            pass
        except BaseExceptionGroup as group:
            error = first_error(group)
            raise error from error.__cause__


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first real error in *group*: users see one error, not a group of ours."""
    for error in group.exceptions:
        return first_error(error) if isinstance(error, BaseExceptionGroup) else error
    return group


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
