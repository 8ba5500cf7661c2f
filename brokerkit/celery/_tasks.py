"""The bodies of ``async def`` tasks: coroutines on one long-lived event loop per process, under Celery's own tracer.

The tracer calls a plain function, which runs the coroutine on the loop of the process and waits for it in its own thread:
results, retries, chains, chords and signals stay Celery's.  Inside of the coroutine `self.request` and `current_task` are those
of its task, also in threads that it starts with `asyncio.to_thread`.  `self.retry()` publishes nothing on the loop: the tracer's
thread does, once the coroutine has ended.  What else Celery offers to tasks blocks, and belongs into ``asyncio.to_thread``:
``await asyncio.to_thread(self.update_state, state="HALF")``.

Time limits: the soft one is raised in the coroutine, at the ``await`` where it is, as a `SoftTimeLimitExceeded` that is an
`asyncio.CancelledError` too, so that task groups end their children; the hard one cancels it.  A coroutine that never awaits
cannot be stopped, except by the prefork pool, which ends its process.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import types
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, cast

from billiard.process import current_process
from celery import _state as _celery_state
from celery.exceptions import Retry, TimeLimitExceeded
from celery.utils import threads as _celery_threads

from ..errors import ConfigError
from ._running import HOME, Control, Run, control, in_run

state: Any = _celery_state
threads: Any = _celery_threads

_BODY = "__brokerkit_body__"

_key: ContextVar[object | None] = ContextVar("brokerkit task of Celery", default=None)
"""Names the stacks of tasks and requests that belong to a coroutine, in place of a thread."""


def _ident() -> object:
    key = _key.get()
    return threads.get_ident() if key is None else key


def _share(stack: Any) -> None:
    """Let coroutines have a stack each, where Celery gives one to each thread."""
    if threads.USE_FAST_LOCALS:
        raise ConfigError("async def tasks cannot run with the environment variable USE_FAST_LOCALS: unset it")
    stack.__ident_func__ = _ident


class _Stacks:
    """Celery's stacks as they are in the calling thread, for a coroutine that runs elsewhere."""

    def __init__(self) -> None:
        self.tasks: list[Any] = list(state._task_stack.stack)
        self.requests: list[tuple[Any, list[Any]]] = []
        for task in dict.fromkeys(self.tasks):
            _share(task.request_stack)
            self.requests.append((task.request_stack, list(task.request_stack.stack)))

    @property
    def traced(self) -> bool:
        """Whether the tracer runs the task, other than by a plain call."""
        return bool(self.requests) and not self.request.called_directly

    @property
    def request(self) -> Any:
        """The request of the task on top."""
        return self.tasks[-1].request

    async def around(self, coroutine: Coroutine[Any, Any, object]) -> object:
        """Run *coroutine* with these stacks."""
        token = _key.set(object())
        try:
            for task in self.tasks:
                state._task_stack.push(task)
            for stack, requests in self.requests:
                for request in requests:
                    stack.push(request)
            return await coroutine
        finally:
            coroutine.close()  # what never began
            for stack, _ in self.requests:
                stack.__release_local__()
            state._task_stack.__release_local__()
            _key.reset(token)


class _RetryLater(Retry):  # type: ignore[misc]  # Celery comes without types
    """Ends a coroutine that called ``self.retry()``; the tracer's thread then calls Celery's."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(exc=options["exc"], when=options["eta"] or options["countdown"])
        self.options = options


def body(function: Callable[..., Coroutine[Any, Any, object]]) -> Callable[..., object]:
    """Return what runs *function*, an ``async def``, for callers that are not async; the same one each time.

    Where an event loop runs, a plain call gives the coroutine itself: ``await add(2, 3)`` works in async code.
    """
    made: Callable[..., object] | None = getattr(function, _BODY, None)
    if made is not None:
        return made
    _share(state._task_stack)

    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> object:
        stacks = _Stacks()
        running = _running_loop()
        coroutine = function(*args, **kwargs)
        if running is not None and not stacks.traced:
            return stacks.around(coroutine)
        if running is not None and running is HOME.known:
            coroutine.close()
            raise RuntimeError(
                f"{function.__qualname__} would wait for the event loop that it blocks: "
                "await adelay(...) it, or call Celery in asyncio.to_thread"
            )
        return _wait(stacks, coroutine)

    run.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]  # where Celery looks for arguments
    with suppress(AttributeError):  # a method: made anew, by whom registers it once
        setattr(function, _BODY, run)
    return run


def is_async(task: object) -> bool:
    """Tell whether the body of *task* is an ``async def``."""
    run: object = getattr(task, "_orig_run", None) or getattr(task, "run", None)
    return inspect.iscoroutinefunction(inspect.unwrap(cast("Callable[..., Any]", run))) if callable(run) else False


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _wait(stacks: _Stacks, coroutine: Coroutine[Any, Any, object]) -> object:
    """Run *coroutine* on the loop of the process, and wait for it here."""
    mine = control.get()
    if mine is None or mine.run is not None:
        mine = _limits(stacks)
    name = getattr(coroutine, "__qualname__", "task")
    running = Run(name, stacks.around(coroutine), mine)
    try:
        return running.result(HOME.loop())
    except _RetryLater as later:
        options = later.options
    finally:
        del running
    # Not in the handler: Celery looks at the exception that is being handled.
    return stacks.tasks[-1].retry(**options)


def _limits(stacks: _Stacks) -> Control:
    """Return the time limits of a task where its pool has none: in threads, solo and gevent."""
    if not stacks.traced or stacks.request.is_eager or current_process()._parent_pid is not None:
        return Control()
    task, request = stacks.tasks[-1], stacks.request
    hard, soft = request.timelimit or (None, None)
    hard, soft = hard or task.time_limit, soft or task.soft_time_limit
    return Control(soft=soft, hard=hard, overdue=lambda: TimeLimitExceeded(hard))


def prepare(task: Any) -> Any:
    """Have *task*, whose body is async, retry without blocking the loop; return it."""
    _share(task.request_stack)
    stock = task.retry
    if getattr(stock, _BODY, None) is not None:
        return task

    @functools.wraps(stock)
    def retry(
        args: Any = None,
        kwargs: Any = None,
        exc: BaseException | None = None,
        throw: bool = True,
        eta: Any = None,
        countdown: float | None = None,
        max_retries: int | None = None,
        **options: Any,
    ) -> Any:
        limit = task.max_retries if max_retries is None else max_retries
        request = task.request
        left = limit is None or request.retries < limit
        options.update(args=args, kwargs=kwargs, exc=exc, eta=eta, countdown=countdown, max_retries=max_retries)
        if throw and left and in_run() and not request.called_directly and not request.is_eager:
            raise _RetryLater(options)
        return stock(throw=throw, **options)

    setattr(retry, _BODY, stock)
    task.retry = retry
    return task


class AsyncTasks:
    """The half of an app that takes ``async def`` tasks; to be inherited before `celery.Celery`."""

    def _task_from_fun(self, fun: Callable[..., Any], *args: Any, **options: Any) -> Any:
        stock: Any = super()
        if not inspect.iscoroutinefunction(fun):
            return stock._task_from_fun(fun, *args, **options)
        return prepare(stock._task_from_fun(body(fun), *args, **options))

    def register_task(self, task: Any, **options: Any) -> Any:
        """Register a task that is a class, or an instance of it, as Celery does; its `run` may be an ``async def``."""
        stock: Any = super()
        task = task() if inspect.isclass(task) else task
        if not inspect.iscoroutinefunction(task.run):
            return stock.register_task(task, **options)
        run = task.run
        task.run = types.MethodType(body(run.__func__), task) if inspect.ismethod(run) else body(run)
        return prepare(stock.register_task(task, **options))
