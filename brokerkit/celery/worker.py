"""A Celery worker inside of an asyncio service: its ``async def`` tasks run on the service's own event loop.

::

    async with AsyncWorker(app, concurrency=100), broker, service:
        ...

It is Celery's worker, in a thread, with the pool of `brokerkit.celery.pool`: remote control, events, rate limits, time limits,
retries and chords are those of ``celery worker``.  One at a time in a process, and of one app.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack, suppress
from typing import Any, Self

from celery import Celery as StockCelery

from ..errors import BrokerUnavailable, ConfigError
from ._running import HOME

__all__ = ["AsyncWorker"]

logger = logging.getLogger("brokerkit")

COLD = 30.0
"""Seconds that a worker has to end after its tasks were cancelled."""

_one = threading.Lock()


class AsyncWorker:
    """Runs tasks of *app* for as long as its ``async with`` lasts; entered when it consumes.

    *concurrency* tasks run at once.  Without *queues* it takes those that the app's configuration names.  Further *options* are
    those of ``celery worker``, like ``prefetch_multiplier=1``, ``task_events=True`` or ``without_gossip=True``.

    Leaving stops it warmly: nothing more is begun, and what runs has *stop_timeout* seconds, after which it is cancelled; what
    is not acknowledged then runs elsewhere.  Entering gives up after *start_timeout* seconds without a broker.

    Raises:
        ConfigError: this process has another worker, or the app is not what it should be.
        BrokerUnavailable: on entering: there was no broker in time.
    """

    def __init__(
        self,
        app: StockCelery,
        *,
        concurrency: int = 100,
        queues: Iterable[str] | None = None,
        hostname: str | None = None,
        start_timeout: float = 30,
        stop_timeout: float = 30,
        **options: object,
    ) -> None:
        self._app: Any = app
        self._hostname = hostname
        self._options = {**options, "concurrency": concurrency}
        if queues is not None:
            self._options["queues"] = list(queues)
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._worker: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stack: AsyncExitStack | None = None
        self._ended: _Event | None = None

    def __repr__(self) -> str:
        return f"<AsyncWorker {self._worker or 'new'}>"

    @property
    def stock(self) -> object:
        """Celery's own worker, a `WorkController`, while it runs."""
        return self._worker

    async def __aenter__(self) -> Self:
        """Start, and return when tasks are consumed."""
        if not _one.acquire(blocking=False):
            raise ConfigError("this process has a worker: Celery keeps what a worker does once per process")
        async with AsyncExitStack() as stack:
            stack.callback(_one.release)
            loop = asyncio.get_running_loop()
            stack.enter_context(HOME.lend(loop))
            ready, ended = _Event(loop), _Event(loop)
            self._thread = threading.Thread(
                target=self._main, args=(ready.set, ended.set), name="brokerkit worker of Celery", daemon=True
            )
            self._thread.start()
            stack.push_async_callback(self._stop, ended)
            waiting = [loop.create_task(event.wait()) for event in (ready, ended)]
            try:
                await asyncio.wait(waiting, timeout=self._start_timeout, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in waiting:
                    task.cancel()
            if self._error is not None:
                raise self._error
            if ended.is_set():
                raise BrokerUnavailable("the worker ended before it consumed: Celery's log says why")
            if not ready.is_set():
                raise BrokerUnavailable(f"the worker does not consume after {self._start_timeout:g} s")
            self._ended = ended
            _let_join()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop warmly, within the time that `stop_timeout` gives."""
        stack, self._stack = self._stack, None
        if stack is not None:
            await stack.aclose()

    async def wait(self) -> None:
        """Wait until the worker has ended: left, or shut down by remote control.

        Raises:
            Exception: what made it fail.
        """
        if self._ended is not None:
            await self._ended.wait()
        if self._error is not None:
            raise self._error

    # ------------------------------------------------------------------ in the thread

    def _main(self, ready: Callable[[], None], ended: Callable[[], None]) -> None:
        try:
            self._run(ready)
        except BaseException as error:  # SystemExit is how Celery ends a worker
            self._error = error if isinstance(error, Exception) else None
            if self._error is not None:
                logger.exception("the worker failed")
        finally:
            ended()

    def _run(self, ready: Callable[[], None]) -> None:
        from celery.app import trace
        from celery.utils.nodenames import default_nodename
        from celery.worker import WorkController

        from .pool import TaskPool

        app = self._app
        name: Any = default_nodename
        hostname = name(self._hostname)
        setup: Any = trace.setup_worker_optimizations
        setup(app, hostname)  # else the pool's threads have no app
        make: Any = WorkController
        self._worker = make(
            app=app,
            hostname=hostname,
            pool_cls=TaskPool,
            ready_callback=lambda consumer: ready(),
            **{"loglevel": "WARNING", **self._options},
        )
        self._worker.start()

    # ------------------------------------------------------------------ the end

    async def _stop(self, ended: _Event) -> None:
        from celery.worker import state
        from kombu.asynchronous import set_event_loop

        worker_state: Any = state
        try:
            worker_state.should_stop = 0  # the exit code
            self._wake()
            try:
                async with asyncio.timeout(self._stop_timeout):
                    await ended.wait()
            except BaseException as error:
                worker_state.should_terminate = 0
                await self._end_cold(ended)
                if not isinstance(error, TimeoutError):
                    raise
        finally:
            worker_state.should_stop = worker_state.should_terminate = None
            set_event_loop(None)
            _let_join()
            self._worker = None

    async def _end_cold(self, ended: _Event) -> None:
        """Cancel what runs, which ends the wait for it, and wait for the rest; being cancelled does not cut it short."""
        pool = getattr(self._worker, "pool", None)
        if pool is not None:
            pool.cancel()
        self._wake()
        waiting = asyncio.get_running_loop().create_task(ended.wait())
        cancelled: asyncio.CancelledError | None = None
        until = asyncio.get_running_loop().time() + COLD
        while not waiting.done() and (left := until - asyncio.get_running_loop().time()) > 0:
            try:
                await asyncio.wait([waiting], timeout=left)
            except asyncio.CancelledError as error:
                cancelled = error
        if not waiting.done():
            waiting.cancel()
            logger.error("the worker has not ended in %g s: its thread is left to itself", COLD)
        if cancelled is not None:
            raise cancelled

    def _wake(self) -> None:
        """Have the worker's loop look at the state that it has."""
        hub = getattr(self._worker, "hub", None)
        if hub is not None:
            with suppress(Exception):
                hub.call_soon(_nothing)


def _let_join() -> None:
    """Let the program's threads wait for results, which Celery forbids in a process of a worker: its tasks must not."""
    from celery import _state

    state: Any = _state
    state._set_task_join_will_block(False)


def _nothing() -> None:
    pass


class _Event:
    """An event that another thread sets."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._event = asyncio.Event()
        self._happened = False

    def set(self) -> None:
        """Set it, from any thread."""
        self._happened = True
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._event.set)

    def is_set(self) -> bool:
        return self._happened

    async def wait(self) -> None:
        await self._event.wait()
