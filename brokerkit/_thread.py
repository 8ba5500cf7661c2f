"""The event loop of a process that is not async: one thread, shared by the blocking facade and by Celery."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import selectors
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from inspect import isawaitable
from typing import Any, TypeVar, cast, overload

T = TypeVar("T")

logger = logging.getLogger("brokerkit")

_AGAIN = 0.1
"""Seconds until a task that is still there is cancelled again: a cancellation that meets an answer may get lost."""

_LOOK = 0.5
"""Seconds after which a greenlet that waits for another thread looks itself: gevent may lose what wakes it from there, and takes
one for stuck that waits without a timeout for what no other greenlet does."""

_inherited: list[object] = []
"""What a child process got by its fork, kept so that nothing of it is ever finalized: it is the parent's."""


def keep_inherited(*things: object) -> None:
    """Keep *things*, which a child process got by its fork."""
    _inherited.append(things)


class Portal:
    """The way into the loop, for other threads."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.stopped = False
        self.tasks: set[asyncio.Task[None]] = set()

    @overload
    def start_task_soon(self, function: Callable[..., Coroutine[Any, Any, T]], *args: object) -> Future[T]: ...
    @overload
    def start_task_soon(self, function: Callable[..., T], *args: object) -> Future[T]: ...
    def start_task_soon(self, function: Callable[..., Any], *args: object) -> Future[Any]:
        """Call *function* on the loop, and await what it returns if that can be; cancelling the future cancels it.

        Raises:
            RuntimeError: the loop has ended.
        """
        future: Future[Any] = promise()
        self.loop.call_soon_threadsafe(self._begin, future, function, args)
        return future

    def _begin(self, future: Future[Any], function: Callable[..., Any], args: tuple[object, ...]) -> None:
        if self.stopped:
            future.cancel()
        if future.cancelled():
            return
        task = self.loop.create_task(_carry_out(future, function, args))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

        def given_up(future: Future[Any]) -> None:
            if future.cancelled():
                with suppress(RuntimeError):  # the loop has ended, with all its tasks
                    self.loop.call_soon_threadsafe(cancel, task)

        future.add_done_callback(given_up)

    def stop(self) -> None:
        """Have the loop come to its end, on the loop."""
        self.stopped = True
        self.loop.stop()

    async def end(self) -> None:
        """Cancel what was begun, and wait for it."""
        for task in self.tasks:
            cancel(task)
        if self.tasks:
            await asyncio.wait(self.tasks)


async def _carry_out(future: Future[Any], function: Callable[..., Any], args: tuple[object, ...]) -> None:
    try:
        value = function(*args)
        if isawaitable(value):
            value = await value
    except asyncio.CancelledError:
        future.cancel()
        raise
    except BaseException as error:
        if future.set_running_or_notify_cancel():
            future.set_exception(error)
    else:
        if future.set_running_or_notify_cancel():
            future.set_result(value)


def cancel(task: asyncio.Task[Any]) -> None:
    """Cancel *task*, on its loop, until it has ended."""
    if not task.done():
        task.cancel()
        task.get_loop().call_later(_AGAIN, cancel, task)


def begin(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Return a task of *coroutine* that has begun already, where a plain one begins at the next turn of *loop*.

    Not from inside of a task.
    """
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=loop, eager_start=True)
    held: list[asyncio.Handle] = []

    def hold(callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, loop, context)
        held.append(handle)
        return handle

    # A task announces its first step by call_soon(), once; other threads use call_soon_threadsafe().
    own = vars(loop)
    own["call_soon"] = hold
    try:
        task = loop.create_task(coroutine)
    finally:
        del own["call_soon"]
    for handle in held:
        handle._run()
    return task


_Started = Future[Portal]


class LoopThread:
    """An event loop in a thread that does not keep the process from ending; it runs while it has users."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew: in the child of a fork the thread is the parent's."""
        self._lock = threading.Lock()
        self._users = 0
        self._portal: Portal | None = None
        self._join: Callable[[], object] | None = None

    def forked(self) -> None:
        """Begin anew in a child process, and let nothing that it does reach the parent's connections."""
        if self._portal is not None:
            loop = self._portal.loop
            keep_inherited(self._portal, self._join, asyncio.all_tasks(loop))
            _let_go(loop)
        self.forget()

    def enter(self) -> Portal:
        """Return the way into the loop, which runs until the last user left; if it broke down, there is a new one."""
        with self._lock:
            if self._portal is None or self._portal.loop.is_closed():
                started: _Started = promise()
                self._join = start(partial(_run, started), "brokerkit loop")
                self._portal = result(started)
            self._users += 1
            return self._portal

    def leave(self) -> None:
        """End the loop if this was its last user."""
        with self._lock:
            self._users -= 1
            if self._users or self._portal is None or self._join is None:
                return
            with suppress(RuntimeError):  # it broke down
                self._portal.loop.call_soon_threadsafe(self._portal.stop)
            self._join()
            self._portal = self._join = None


def _run(started: _Started) -> None:
    # In a greenlet the loop would run in the thread of all other greenlets: to asyncio each of them would be inside of it.
    with asyncio.Runner(loop_factory=_native_loop if is_green() else None) as runner:
        portal = Portal(runner.get_loop())
        vars(portal.loop)["shutdown_default_executor"] = partial(_end_executor, portal.loop.shutdown_default_executor)
        started.set_result(portal)
        while not portal.stopped:
            try:
                portal.loop.run_forever()
            except (SystemExit, KeyboardInterrupt):
                # asyncio lets these two out, of any task and callback; this thread is not the program.
                logger.exception("a task or callback would have ended an event loop that others use: it goes on")
            except Exception:
                logger.exception("an event loop broke down: what runs on it is cancelled")
                portal.stopped = True
        runner.run(portal.end())


async def _end_executor(stock: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
    # It has a thread of its own wait for those of the executor.  As a program ends, Python 3.12 starts none any more:
    # those of executors have all ended by then.
    with suppress(RuntimeError):
        await stock(*args)


def _let_go(loop: asyncio.AbstractEventLoop) -> None:
    """Put /dev/null in the place of every descriptor of *loop* in this process.

    The connections are shared with the parent, and so is the list that epoll keeps of them: without this, a socket that the
    child happens to close could be taken off the parent's list, and a server would see no end of a parent that was killed.
    """
    selector: Any = getattr(loop, "_selector", None)
    if selector is None:
        return
    descriptors = list(selector.get_map() or ())
    with suppress(AttributeError, OSError, ValueError):  # poll() and select() have none of their own
        descriptors.append(selector.fileno())
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        for descriptor in descriptors:
            os.dup2(nothing, descriptor, inheritable=False)
    finally:
        os.close(nothing)


# ---------------------------------------------------------------------- where gevent has patched the standard library


def is_green() -> bool:
    """Tell whether threads are greenlets here: gevent has put its own into their place."""
    monkey: Any = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def result(future: Future[T]) -> T:
    """Return the result of *future*, which another thread sets; other greenlets go on meanwhile."""
    if not is_green():
        return future.result()
    while True:
        try:
            return future.result(_LOOK)
        except TimeoutError:
            if future.done():
                return future.result()


def promise() -> Future[Any]:
    """Return a future for `result`.

    Where gevent is, its lock is not gevent's: of what wakes a greenlet from another thread some is lost, and who met that lock
    while the other thread had it would wait for ever.
    """
    made: Future[Any] = Future()
    if is_green():
        made._condition = threading.Condition(_original("_thread", "allocate_lock")())
    return made


def start(function: Callable[[], object], name: str) -> Callable[[], object]:
    """Run *function* in a thread of the system, which keeps no process from ending; return what waits for its end.

    Where gevent is, a thread that others start is a greenlet, in the thread of all others.
    """
    if not is_green():
        thread = threading.Thread(target=function, name=name, daemon=True)
        thread.start()
        return thread.join
    ended: Future[None] = promise()

    def main() -> None:
        try:
            function()
        finally:
            ended.set_result(None)

    _original("_thread", "start_new_thread")(main, ())
    return partial(result, ended)


def settle(future: asyncio.Future[T], value: T | None = None, error: BaseException | None = None) -> None:
    """Give *future*, of an event loop in another thread, its result, unless it has one or its loop has ended."""

    def now() -> None:
        if not future.done():
            if error is None:
                future.set_result(cast(T, value))
            else:
                future.set_exception(error)

    with suppress(RuntimeError):
        future.get_loop().call_soon_threadsafe(now)


def carry_out(future: asyncio.Future[T], function: Callable[[], T]) -> None:
    """Call *function* here, and give *future*, of an event loop in another thread, what comes of it."""
    try:
        value = function()
    except BaseException as error:
        settle(future, error=error)
    else:
        settle(future, value)


def acquire(lock: threading.Lock, timeout: float | None) -> bool:
    """Acquire *lock*, which another thread releases, within *timeout* seconds; other greenlets go on meanwhile."""
    if not is_green():
        return lock.acquire() if timeout is None else lock.acquire(timeout=timeout)
    end = math.inf if timeout is None else time.monotonic() + timeout
    while not lock.acquire(timeout=max(0.0, min(_LOOK, end - time.monotonic()))):
        if time.monotonic() >= end:
            return False
    return True


def _original(module: str, name: str) -> Any:
    """Return what gevent has replaced."""
    monkey: Any = sys.modules["gevent.monkey"]
    return monkey.get_original(module, name)


def _native_loop() -> asyncio.AbstractEventLoop:
    class Loop(asyncio.SelectorEventLoop):
        def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
            # The stock one begins a greenlet, which this thread would never come to.
            future: asyncio.Future[Any] = self.create_future()
            start(partial(carry_out, future, partial(func, *args)), "brokerkit executor")
            return future

    epoll = hasattr(selectors, "EpollSelector") or "EpollSelector" in _saved("selectors")
    return Loop(_original("selectors", "EpollSelector" if epoll else "DefaultSelector")())


def _saved(module: str) -> dict[str, object]:
    monkey: Any = sys.modules["gevent.monkey"]
    return cast("dict[str, object]", monkey.saved.get(module, {}))


LOOP = LoopThread()
"""The one of this process."""
os.register_at_fork(after_in_child=LOOP.forked)
