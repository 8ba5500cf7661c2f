"""An event loop that keeps its own time: tests of delays, leases and retries take no time and have one outcome per seed.

When nothing is ready, the clock jumps to the next timer instead of waiting for it.  With a seed, tasks that are ready at the
same moment take their turns in an order drawn from it, so that a race shows under some seed and again under the same one.

What asyncio promises still holds.  Only the steps of different tasks change places, and only while nothing but other task
steps stands between them in the ready queue: a plain callback (``call_soon``, a timer, a done callback, a transport's) never
moves and nothing moves past it, and ``sleep(0)`` still lets every ready task take one step.  A seed fixes the jitter of
brokerkit's retries too, so it gives the same run again as far as the program is repeatable: threads and the order in which
Python iterates over sets of objects are not.

Limits: time stands still while ``run_in_executor`` or ``anyio.to_thread`` works, but it does not wait for sockets,
subprocesses or threads of another kind.  Real I/O is served, but its timeouts pass at once; use a usual loop for it.
`datetime.now` and `time.time` tell the real time; `now` tells the loop's.

This is the one place that relies on private names of asyncio: ``_run_once``, ``_ready``, ``_clock_resolution`` and
``Handle._callback``, equal in Python 3.11 to 3.13; tests/unit/test_loop.py fails where they change.
"""

from __future__ import annotations

import asyncio
import math
import random
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from datetime import UTC, datetime
from types import CodeType
from typing import Any, Final, TypeVar, TypeVarTuple

from .. import clock as _clock
from .. import policy
from ..errors import BrokerError

R = TypeVar("R")
Ts = TypeVarTuple("Ts")
_Events = list[tuple[selectors.SelectorKey, int]]

EPOCH: Final = 1893456000.0
"""The wall clock of a new virtual loop: 2030-01-01T00:00:00Z."""
PATIENCE: Final = 0.25
"""Real seconds that time stands still for a thread.  After that it passes at its real speed, or a thread that waits for a
timer of the loop would wait for ever."""
LAST_PATIENCE: Final = 2.0
"""Real seconds that another thread or a socket gets to wake a loop in which nothing else can happen."""

# What the callback of a task's step or wake-up is called, in C and in Python; a bound ``Task.cancel`` is none of them.
_STEPS: Final = frozenset((None, "task_wakeup", "__step", "__wakeup"))


class Deadlock(BrokerError):
    """Nothing can ever happen any more in a virtual loop; the text names the tasks that wait, and where."""


class _VirtualClock:
    """The wall clock and the monotonic clock of a virtual loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.monotonic = loop.time

    def time(self) -> float:
        return EPOCH + self.monotonic()


class _JumpingSelector(selectors.DefaultSelector):
    """Asks the loop instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.decide: Callable[[float | None], _Events] = self.poll

    def select(self, timeout: float | None = None) -> _Events:
        return self.decide(timeout)

    def poll(self, timeout: float | None) -> _Events:
        return super().select(timeout)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop with virtual time, and with *seed* a shuffled order of ready tasks.

    It starts at 0 s, `EPOCH` by its `clock`.  What can never end raises `Deadlock` out of the running call.
    """

    horizon = 400 * 86400.0
    """The virtual time at which `Deadlock` is raised: only timers that repeat get a loop there."""
    jumps = 1_000_000
    """How many jumps a loop makes before it raises `Deadlock`: timers that repeat in short steps."""

    _ready: deque[asyncio.Handle]
    _clock_resolution: float

    def __init__(self, seed: int | None = None) -> None:
        self._now = 0.0
        self._jumped = 0
        self.moves = 0
        """How often something came from outside of the ready queue: a jump, a thread's call, I/O."""
        self._quiet: dict[asyncio.Future[None], int] = {}
        self._working = 0  # calls of run_in_executor that have not finished
        self._grace: float | None = None  # the real time until which virtual time stands still for a thread
        self._shuffler = None if seed is None else random.Random(seed)
        if seed is not None:
            policy._RANDOM.seed(seed)  # the jitter of retries and reconnects
        self.seed = seed
        self.clock: _clock.Clock = _VirtualClock(self)
        """What `brokerkit.clock.current` returns in this loop."""
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        self._advance(0)
        self._jumping.decide = self._select

    def __repr__(self) -> str:
        return (
            f"<VirtualLoop at {self._now:g} s seed={self.seed} running={self.is_running()} closed={self.is_closed()}>"
        )

    def time(self) -> float:
        """Return the virtual seconds since the loop was made."""
        return self._now

    async def quiet(self, after: int = -1) -> None:
        """Wait until everything that is ready has run, before time moves; and *after* that many `moves`, if it is given.

        It must be awaited under a timeout: what waits here keeps no loop from a deadlock.
        """
        waiter: asyncio.Future[None] = self.create_future()
        self._quiet[waiter] = after
        try:
            await waiter
        finally:
            del self._quiet[waiter]

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], R], *args: *Ts) -> asyncio.Future[R]:
        """Run *func* in a thread; time stands still until it returns or nobody waits for it any more."""
        future = super().run_in_executor(executor, func, *args)
        self._working += 1
        future.add_done_callback(self._worked)
        return future

    def _worked(self, future: asyncio.Future[Any]) -> None:
        self._working -= 1
        self._grace = None

    async def shutdown_default_executor(self, *args: Any) -> None:
        # It waits in a thread of its own, with a timer that must not be jumped to.
        self._working += 1
        try:
            await super().shutdown_default_executor(*args)
        finally:
            self._working -= 1

    def _run_once(self) -> None:
        if self._shuffler is not None and len(self._ready) > 1:
            self._shuffle(self._shuffler)
        super()._run_once()  # type: ignore[misc]

    def _shuffle(self, draw: random.Random) -> None:
        # Other threads append at the right meanwhile, so handles are taken from the left and put back there.
        ready = self._ready
        handles = [ready.popleft() for _ in range(len(ready))]
        start = 0
        for end in range(len(handles) + 1):
            if end == len(handles) or not _is_step(handles[end]):
                if end - start > 1:
                    steps = handles[start:end]
                    draw.shuffle(steps)
                    handles[start:end] = steps
                start = end + 1
        ready.extendleft(reversed(handles))

    def _select(self, timeout: float | None) -> _Events:
        """Return the I/O that is there; *timeout* is 0, or the time to the next timer, or None if there is none."""
        events = self._jumping.poll(0)
        if events:
            self.moves += 1
        if events or timeout == 0 or self._ready:  # ready by now: a thread has just called call_soon_threadsafe
            return events
        if self._working or _anyio_works(self):
            self.moves += 1
            return self._wait_for_thread(timeout)
        self._grace = None
        if self._tell_quiet():
            return events
        self.moves += 1
        if timeout is not None:
            self._jump(timeout)
            return events
        alien = len(self._jumping.get_map()) > 1 or threading.active_count() > 1  # 1: the loop's own wake-up socket
        events = self._jumping.poll(LAST_PATIENCE if alien else 0)
        if events or self._ready:
            return events
        raise Deadlock(f"nothing can happen any more: no timer runs, no thread works; {_waiting(self)}")

    def _tell_quiet(self) -> bool:
        waiters = [waiter for waiter, after in self._quiet.items() if after < self.moves and not waiter.done()]
        for waiter in waiters:
            waiter.set_result(None)
        return bool(waiters)

    def _jump(self, seconds: float) -> None:
        self._jumped += 1
        self._advance(seconds)
        if self._now >= self.horizon or self._jumped > self.jumps:
            passed = f"{self._jumped} jumps to {self._now:g} virtual seconds"
            raise Deadlock(f"only timers run, and that for ever: {passed}; {_waiting(self)}")

    def _wait_for_thread(self, timeout: float | None) -> _Events:
        began = time.monotonic()
        if self._grace is None:
            self._grace = began + PATIENCE
        if began < self._grace:
            return self._jumping.poll(self._grace - began)
        events = self._jumping.poll(timeout)
        passed = time.monotonic() - began
        if timeout is not None:
            self._advance(min(passed, timeout) if events else timeout)
        return events

    def _advance(self, seconds: float) -> None:
        self._now += seconds
        # A timer is due before now + resolution.  The smallest step of the float at hand runs none early, and none of those
        # due now is left behind, which the usual 1 ns would do beyond 97 days.
        self._clock_resolution = math.ulp(self._now)


def _is_step(handle: asyncio.Handle) -> bool:
    callback = handle._callback  # type: ignore[attr-defined]
    owner = getattr(callback, "__self__", None)
    return owner is not None and asyncio.isfuture(owner) and getattr(callback, "__name__", None) in _STEPS


def _anyio_works(loop: asyncio.AbstractEventLoop) -> bool:
    # anyio keeps threads of its own, which the loop is not told of.  One is busy until the loop has put it back among the
    # idle ones, so nothing is missed between its result and the wake-up.
    if threading.active_count() == 1:
        return False
    return any(
        thread.name == "AnyIO worker thread"
        and getattr(thread, "loop", None) is loop
        and not getattr(thread, "stopping", True)
        and thread not in getattr(thread, "idle_workers", (thread,))
        for thread in threading.enumerate()
    )


def _waiting(loop: asyncio.AbstractEventLoop) -> str:
    """Return one line for each task that waits: its name and the chain of calls it waits in, innermost last."""
    tasks = sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
    shown = [f"  {task.get_name()}: {_where(task)}" for task in tasks[:20]]
    if len(tasks) > len(shown):
        shown.append(f"  and {len(tasks) - len(shown)} more")
    return "\n".join([f"{len(tasks)} tasks wait:", *shown])


def _where(task: asyncio.Task[Any]) -> str:
    calls: list[str] = []
    awaitable: object = task.get_coro()
    while awaitable is not None and len(calls) < 50:
        frame = next((found for name in _FRAMES if (found := getattr(awaitable, name, None)) is not None), None)
        if frame is not None:
            code: CodeType = frame.f_code
            calls.append(f"{code.co_name} ({code.co_filename.rpartition('/')[2]}:{frame.f_lineno})")
        awaitable = next((found for name in _INNER if (found := getattr(awaitable, name, None)) is not None), None)
    return " > ".join(calls) or repr(task)


_FRAMES: Final = ("cr_frame", "gi_frame", "ag_frame")
_INNER: Final = ("cr_await", "gi_yieldfrom", "ag_await")


def virtual_loop(seed: int | None = None) -> Callable[[], VirtualLoop]:
    """Return a loop factory, for ``asyncio.Runner(loop_factory=...)`` and anyio's ``backend_options``."""
    return lambda: VirtualLoop(seed)


def run(main: Callable[[], Coroutine[Any, Any, R]] | Coroutine[Any, Any, R], *, seed: int | None = None) -> R:
    """Run *main*, a coroutine function or coroutine, in a new `VirtualLoop` and return its result.

    Raises:
        Deadlock: nothing can ever happen any more.
    """
    with asyncio.Runner(loop_factory=virtual_loop(seed)) as runner:
        return runner.run(main() if callable(main) else main)


def now() -> datetime:
    """Return the running loop's wall clock time, for ``delay=`` and `Start.at`; in a usual loop it is the system's."""
    return datetime.fromtimestamp(_clock.current().time(), UTC)
