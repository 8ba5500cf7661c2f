"""The worker's pool for ``async def`` tasks: ``celery -A app worker -P brokerkit -c 200``.

In an app's configuration it is ``worker_pool = "brokerkit.celery.pool:TaskPool"``.

Each slot is a thread that runs Celery's own tracer; the coroutines of all tasks run on one event loop.  Threads are started
when they are needed.  A plain ``def`` task runs in its slot's thread, as in Celery's pool of threads.

==================================  =============================  ==========================================
what                                ``async def``                  ``def``
==================================  =============================  ==========================================
soft time limit                     raised in the coroutine        not served, with one warning
hard time limit                     the coroutine is cancelled     not served, with one warning
``revoke(terminate=True)``          the coroutine is cancelled     runs to its end
cold shutdown                       the coroutines are cancelled   left behind; it does not hold up the end
==================================  =============================  ==========================================
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated, WorkerLostError
from celery import signals
from celery.concurrency.base import BasePool

from ._running import Control, Stopped, control
from ._tasks import is_async

__all__ = ["TaskPool"]

logger = logging.getLogger("brokerkit")


class _Overdue(Stopped):
    """The hard time limit."""


class _Terminated(Stopped):
    """Somebody revoked the task, or its connection is gone; the argument is the signal that a process would get."""


class _Job:
    """A task in the pool; Celery knows it as the result of `TaskPool.apply_async`."""

    __slots__ = ("__weakref__", "_args", "_callbacks", "_control", "_kwargs", "_pool", "_target", "_tellable")

    def __init__(
        self,
        pool: TaskPool,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        callbacks: Mapping[str, Callable[..., object] | None],
        limits: tuple[float | None, float | None],
    ) -> None:
        soft, hard = limits
        self._pool = pool
        self._target = target
        self._args = args
        self._kwargs = kwargs
        self._callbacks = callbacks
        self._control = Control(soft=soft, hard=hard, overdue=_Overdue, warn=partial(self._tell, "timeout", True, soft))

    def terminate(self, signal: object) -> None:
        """Stop the task, as `revoke` with ``terminate=True`` asks for."""
        self._control.stop(_Terminated(signal))

    def discard(self) -> None:
        """Stop the task and tell nobody: what is not acknowledged is delivered again."""
        self._control.stop(Stopped())

    def run(self) -> None:
        """Run the task in this thread, and tell the worker what came out of it."""
        if type(self._control.reason) is Stopped:
            return
        self._tell("accept", os.getpid(), time.monotonic())
        if self._control.reason is not None:
            return  # revoked while it waited for a thread: the worker has said so by now
        token = control.set(self._control)
        try:
            value = self._target(*self._args, **self._kwargs)
        except _Overdue:
            self._tell("timeout", False, self._control.hard)
        except _Terminated as stopped:
            self._fail(Terminated(*stopped.args))
        except Stopped:
            pass
        except Exception:
            self._tell("error", ExceptionInfo())
        except BaseException as error:  # SystemExit and the like: of a process they would be its end
            self._fail(WorkerLostError(repr(error)))
        else:
            if self._control.reason is None:
                self._tell("done", value)
        finally:
            control.reset(token)

    def _fail(self, error: Exception) -> None:
        try:
            raise error
        except Exception:
            self._tell("error", ExceptionInfo())

    def _tell(self, which: str, *args: object) -> None:
        callback = self._callbacks[which]
        if callback is None:
            return
        try:
            callback(*args)
        except Exception:
            logger.exception("telling the worker what came out of a task failed")


class TaskPool(BasePool):  # type: ignore[misc]  # Celery comes without types
    """Runs many ``async def`` tasks at once, each up to its time limits; ``def`` tasks too."""

    body_can_be_buffer = True
    signal_safe = False

    def __init__(self, limit: int | None = None, **options: Any) -> None:
        super().__init__(limit, **options)
        self.limit: int = limit or 1
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._jobs: set[_Job] = set()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._open = True
        self._count = 0
        self._warned: set[str] = set()

    # ------------------------------------------------------------------ what the worker asks for

    def on_start(self) -> None:
        """Tell those who prepare processes that this one will run tasks, as the solo pool does."""
        _, hostname = self.options.get("initargs") or (None, None)
        signals.worker_process_init.send(sender=hostname)

    def on_apply(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        callback: Callable[..., object] | None = None,
        accept_callback: Callable[..., object] | None = None,
        timeout_callback: Callable[..., object] | None = None,
        error_callback: Callable[..., object] | None = None,
        soft_timeout: float | None = None,
        timeout: float | None = None,
        **_: object,
    ) -> object:
        """Have *target* run in a thread of the pool; return what `terminate` is called on."""
        limits = (soft_timeout or self.options.get("soft_timeout"), timeout or self.options.get("timeout"))
        if args and limits != (None, None):
            self._warn(args[0])
        callbacks = {"accept": accept_callback, "done": callback, "timeout": timeout_callback, "error": error_callback}
        job = _Job(self, target, args or (), kwargs or {}, callbacks, limits)
        with self._changed:
            self._jobs.add(job)
            self._waiting.append(job)
            if self._idle >= len(self._waiting):
                self._changed.notify()
            elif len(self._threads) < self.limit:
                self._begin()
        return job

    def terminate_job(self, pid: int, signal: object = None) -> None:
        """Do nothing: the job itself is stopped, by its own `terminate`; *pid* is that of all jobs here."""

    def grow(self, n: int = 1) -> None:
        """Add *n* slots."""
        with self._changed:
            self.limit += n
            for _ in range(min(n, len(self._waiting))):
                self._begin()

    def shrink(self, n: int = 1) -> None:
        """Take *n* slots away, each when its task has ended."""
        with self._changed:
            self.limit = max(self.limit - n, 1)
            self._changed.notify_all()

    def on_close(self) -> None:
        """Begin nothing more: what waits stays unacknowledged, for other workers."""
        with self._changed:
            self._close()

    def on_stop(self) -> None:
        """Wait for the tasks that run."""
        with self._changed:
            self._close()
            while self._jobs:
                self._changed.wait()

    def cancel(self) -> None:
        """Cancel the tasks that run; those that are not acknowledged are delivered again.  Any thread may call it."""
        with self._changed:
            self._close()
            jobs = list(self._jobs)
        for job in jobs:
            job.discard()

    def on_terminate(self) -> None:
        """Do so, and wait for their clean-up."""
        self.cancel()
        until = time.monotonic() + 10
        with self._changed:
            while self._jobs and self._changed.wait(until - time.monotonic()):
                pass

    def _get_info(self) -> dict[str, object]:
        info: dict[str, object] = super()._get_info()
        with self._changed:
            info.update(
                {
                    "threads": len(self._threads),
                    "idle": self._idle,
                    "running": len(self._jobs) - len(self._waiting),
                    "waiting": len(self._waiting),
                    "processes": [os.getpid()],
                    "timeouts": (self.options.get("soft_timeout") or 0, self.options.get("timeout") or 0),
                }
            )
        return info

    # ------------------------------------------------------------------ threads

    def _close(self) -> None:
        self._open = False
        self._jobs.difference_update(self._waiting)
        self._waiting.clear()
        self._changed.notify_all()

    def _begin(self) -> None:
        self._count += 1
        # A daemon: what a def task does after a cold shutdown must not keep the process.
        thread = threading.Thread(target=self._work, name=f"brokerkit task slot {self._count}", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _work(self) -> None:
        job = self._next(None)
        while job is not None:
            try:
                job.run()
            except Exception:
                logger.exception("a slot of the pool failed")
            job = self._next(job)

    def _next(self, done: _Job | None) -> _Job | None:
        """Wait for a job; None ends the thread."""
        with self._changed:
            if done is not None:
                self._jobs.discard(done)
                if not self._open:
                    self._changed.notify_all()
            self._idle += 1
            try:
                while self._open and not self._waiting and len(self._threads) <= self.limit:
                    self._changed.wait()
            finally:
                self._idle -= 1
            if self._open and len(self._threads) <= self.limit:
                return self._waiting.popleft()
            self._threads.discard(threading.current_thread())
            self._changed.notify_all()
            return None

    def _warn(self, name: object) -> None:
        task = self.app.tasks.get(name) if self.app is not None else None
        if task is None or name in self._warned or is_async(task):
            return
        self._warned.add(str(name))
        logger.warning(
            "%s has a time limit, which is not served: it is no async def, and threads cannot be ended", name
        )
