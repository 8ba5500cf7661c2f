"""The loop that tasks run on, and one run of a coroutine there, seen from the thread that waits for it."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import logging
import os
import threading
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded

from .._thread import LoopThread, Portal, acquire

logger = logging.getLogger("brokerkit")

GRACE = 5.0
"""Seconds that a coroutine has for its clean-up when it is cancelled; then it is left to itself."""
AGAIN = 1.0
"""Seconds until it is cancelled again: libraries swallow one cancellation."""


class Home:
    """The event loop of this process for tasks: a thread of its own, or a loop that a service lends.

    Never that of the connections to brokers: a task that blocks its loop must not hold up leases and acknowledgements.
    """

    def __init__(self) -> None:
        self._thread = LoopThread()
        self._lock = threading.Lock()
        self._portal: Portal | None = None
        self.known: asyncio.AbstractEventLoop | None = None
        os.register_at_fork(after_in_child=self._forked)
        atexit.register(self._end)

    def _forked(self) -> None:
        self._lock = threading.Lock()
        self._portal = self.known = None
        self._thread.forked()

    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop; the first call starts its thread, which lasts as long as the process."""
        loop = self.known
        if loop is None or loop.is_closed():
            with self._lock:
                loop = self.known
                if loop is None or loop.is_closed():
                    self._portal = self._thread.enter()
                    loop = self.known = self._portal.loop
        return loop

    @contextmanager
    def lend(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """Have tasks run on *loop* meanwhile."""
        before, self.known = self.known, loop
        try:
            yield
        finally:
            self.known = before

    def _end(self) -> None:
        if self._portal is not None:
            with suppress(Exception):
                self._portal.start_task_soon(_end_all).result(GRACE + AGAIN)


async def _end_all() -> None:
    """Cancel what tasks have left behind, so that it can clean up before the process ends."""
    loop = asyncio.get_running_loop()
    left = [task for task in asyncio.all_tasks(loop) if task is not asyncio.current_task()]
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=GRACE)
    await loop.shutdown_asyncgens()


HOME = Home()


class Stopped(BaseException):
    """A job of the pool that was stopped from outside: the tracer records nothing of it, the pool says why."""


class Control:
    """What is decided about a run from outside: its time limits, and that it is to stop."""

    def __init__(
        self,
        *,
        soft: float | None = None,
        hard: float | None = None,
        overdue: Callable[[], BaseException] = Stopped,
        warn: Callable[[], None] | None = None,
    ) -> None:
        self.soft = soft
        self.hard = hard
        self.overdue = overdue
        self.warn = warn
        self.run: Run | None = None
        self.reason: BaseException | None = None

    def stop(self, reason: BaseException) -> None:
        """Cancel the run, or keep it from beginning; *reason* is raised where it is waited for.  Any thread may call it."""
        if self.reason is None:
            self.reason = reason
        run = self.run
        if run is not None:
            run.stop()


control: ContextVar[Control | None] = ContextVar("brokerkit control of a task", default=None)
"""Set by a pool around a job."""

_current: ContextVar[asyncio.Task[Any] | None] = ContextVar("brokerkit run of a task", default=None)


def in_run() -> bool:
    """Tell whether the calling code is the coroutine of a task, on its loop."""
    run = _current.get()
    if run is None:
        return False
    try:
        return asyncio.current_task() is run
    except RuntimeError:
        return False  # in a thread that it started


class SoftLimit(SoftTimeLimitExceeded, asyncio.CancelledError):  # type: ignore[misc]  # Celery comes without types
    """The soft time limit, as the coroutine sees it: both, so that task groups and timeouts treat it as a cancellation."""


class Run:
    """One coroutine on the loop of tasks.  Only `result` waits, and it is called once."""

    def __init__(self, name: str, coroutine: Coroutine[Any, Any, object], mine: Control) -> None:
        self._name = name
        self._coroutine = coroutine
        self._control = mine
        self._context = copy_context()
        self._ended = False
        self._waiting = threading.Lock()
        self._waiting.acquire()
        self._value: object = None
        self._error: BaseException | None = None
        self._soft: SoftLimit | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._task: asyncio.Task[object] | None = None
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None

    # ------------------------------------------------------------------ in the waiting thread

    def result(self, loop: asyncio.AbstractEventLoop) -> object:
        """Run it on *loop*, wait, and return what it returns; what interrupts the waiting cancels it."""
        mine = self._control
        self._loop = loop
        mine.run = self
        try:
            loop.call_soon_threadsafe(self._begin)
            self._wait()
            reason = mine.reason
            if reason is not None:
                raise reason
            error = self._error
            if error is None:
                return self._value
            if isinstance(error, SoftLimit):
                raise SoftTimeLimitExceeded(*error.args) from error
            if isinstance(error, asyncio.CancelledError):
                raise concurrent.futures.CancelledError(f"the coroutine of {self._name} was cancelled") from error
            raise error
        finally:
            error = reason = None  # no cycle through the traceback
            self._error = None
            mine.run = None

    def _wait(self) -> None:
        hard = self._control.hard
        longest = None if hard is None else hard + GRACE + AGAIN
        while True:
            try:
                if not acquire(self._waiting, longest):
                    # Not even the loop's own timers came: something blocks it.
                    self._control.stop(self._control.overdue())
                    logger.error("%s is overdue and blocks the event loop: it is left to itself", self._name)
            except SoftTimeLimitExceeded as limit:
                # The prefork pool's signal, which can only come to this thread.
                self._post(self._raise_soft, limit.args)
            except BaseException:
                self._control.stop(Stopped())
                raise
            else:
                return

    def _post(self, function: Callable[..., object], *args: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function, *args)

    def stop(self) -> None:
        """Cancel it; any thread may call it."""
        self._post(self._cancel)

    # ------------------------------------------------------------------ on the loop

    def _begin(self) -> None:
        mine = self._control
        if mine.reason is not None:
            self._coroutine.close()
            self._end()
            return
        assert self._loop is not None
        self._task = self._loop.create_task(self._main(), name=f"brokerkit task {self._name}", context=self._context)
        self._task.add_done_callback(self._finish)
        if mine.soft:
            self._timers.append(self._loop.call_later(mine.soft, self._overdue_softly))
        if mine.hard:
            self._timers.append(self._loop.call_later(mine.hard, self._overdue))

    async def _main(self) -> None:
        _current.set(self._task)
        try:
            self._value = await self._steer()
        except BaseException as error:  # SystemExit too: it would end the loop
            self._error = error

    @types.coroutine
    def _steer(self) -> Generator[Any, None, object]:
        """Run the coroutine step by step: a cancellation that stands for the soft limit is raised in it as that."""
        coroutine = self._coroutine
        error: BaseException | None = None
        while True:
            try:
                waited = coroutine.send(None) if error is None else coroutine.throw(error)
            except StopIteration as end:
                return end.value
            error = None
            try:
                yield waited
            except asyncio.CancelledError as cancelled:
                error = cancelled
                if self._soft is not None:
                    error, self._soft = self._soft, None
                    assert self._task is not None
                    self._task.uncancel()
            except BaseException as other:
                error = other

    def _finish(self, task: asyncio.Task[object]) -> None:
        for timer in self._timers:
            timer.cancel()
        if task.cancelled():
            self._coroutine.close()  # cancelled before its first step
            self._error = asyncio.CancelledError()
        self._end()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._waiting.release()

    def _overdue_softly(self) -> None:
        mine = self._control
        if mine.warn is not None:
            mine.warn()
        self._raise_soft((mine.soft,))

    def _raise_soft(self, args: tuple[object, ...]) -> None:
        task = self._task
        if task is None or task.done() or self._stopping:
            return
        self._soft = SoftLimit(*args)
        task.cancel()

    def _overdue(self) -> None:
        self._control.stop(self._control.overdue())

    def _cancel(self) -> None:
        task = self._task
        if task is None or task.done():
            return
        assert self._loop is not None
        self._soft = None
        if not self._stopping:
            self._stopping = True
            self._timers.append(self._loop.call_later(GRACE, self._give_up))
        task.cancel()
        self._timers.append(self._loop.call_later(AGAIN, self._cancel))

    def _give_up(self) -> None:
        if not self._ended:
            logger.error("%s was cancelled %g s ago and goes on: it is left to itself", self._name, GRACE)
            self._end()
