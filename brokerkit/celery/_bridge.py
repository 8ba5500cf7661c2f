"""Between the threads of Celery and the event loop: one broker per process and URL, on the loop thread."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar, TypeVarTuple, Unpack, cast

from .._redact import error_text
from .._thread import LOOP, Portal, begin, cancel, keep_inherited
from .._thread import acquire as acquire_lock
from ..broker import Broker
from ..errors import BrokerError, BrokerUnavailable, Closed
from ._collect import WouldBlock, frames
from ._envelope import Frame
from ._exchanges import Exchanges
from ._url import Target

T = TypeVar("T")
Args = TypeVarTuple("Args")

logger = logging.getLogger("brokerkit")

LINGER = 5.0
"""Seconds that a broker without users stays open: programs that connect again and again find it there."""
LEAVE = 10.0
"""Seconds that closing may take when the process ends."""
CALL = 30.0
"""Seconds that a call may take, where it does not say: a broker that is away must not hold a worker's thread for ever."""
MORE = 2.0
"""Seconds that publishing may take beyond its own timeout, until it is given up."""
ANSWER = 3.0
"""Seconds that a broker has to show that it is there, when somebody connects once more."""
TRAIL = 2.0
"""Seconds that closing waits for events that are on their way."""
TRAILS = 5000
"""Events that may be on their way."""


class Call:
    """One call from another thread: it runs on the loop, and the caller waits for a lock."""

    __slots__ = ("_error", "_given_up", "_lock", "_task", "_value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._given_up = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._task: asyncio.Task[None] | None = None

    def begin(self, function: Callable[..., Coroutine[Any, Any, Any]], args: tuple[Any, ...]) -> None:
        """Begin, on the loop."""
        if not self._given_up:
            self._task = begin(asyncio.get_running_loop(), self._main(function, args))

    async def _main(self, function: Callable[..., Coroutine[Any, Any, Any]], args: tuple[Any, ...]) -> None:
        # The caller is let go from inside of the task: a callback of the task would be another turn of the loop later.
        try:
            self._value = await function(*args)
        except asyncio.CancelledError:
            self._error = Closed("the connection was closed meanwhile")
            raise
        except BaseException as error:
            self._error = error
        finally:
            self._lock.release()

    def wait(self, timeout: float | None) -> bool:
        """Wait for the end; False if it did not come in time."""
        return acquire_lock(self._lock, timeout)

    def give_up(self) -> None:
        """Stop it, on the loop."""
        if self._task is None:
            self._given_up = True
        else:
            cancel(self._task)

    def result(self) -> Any:
        """Return what it returned, or raise what it raised."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error, self  # no cycle through the traceback
        return self._value


class Bridge:
    """An open broker on the loop thread, for the threads of one process.

    Use `acquire` and `release`; methods may be called by any thread.
    """

    broker: Broker
    exchanges: Exchanges
    loop: asyncio.AbstractEventLoop

    def __init__(self, target: Target, all: _Bridges) -> None:
        self.target = target
        self.system = target.system
        self.users = 0
        self._all = all
        self._process = os.getpid()
        self._thread = 0
        """The loop's."""
        self._opening = threading.Lock()
        self.opened = False
        """Whether it was connected, and not closed."""
        self._posts: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._posted = False
        self._leaving: asyncio.TimerHandle | None = None
        self._trails: set[asyncio.Task[None]] = set()
        self._lost = 0

    def __repr__(self) -> str:
        return f"<Bridge {self.target.url}>"

    # ------------------------------------------------------------------ life

    def connect(self) -> None:
        """Connect; where that was done before, see whether the broker is there.

        Who connects again after an error, be it a worker or a publisher, so waits as Celery's settings say.
        """
        with self._opening:
            if not self.opened:
                self.broker = self.target.connect()
                self.loop = self._all.loop()
                self._run(self._enter, ())
                self.opened = True
                return
        self._run(self._look, (), ANSWER)
        if self._leaving is not None:
            self.post(self._stay)

    async def _look(self) -> None:
        health = await self.broker.health()
        if not health.connected:
            raise BrokerUnavailable(health.problems[0])

    async def _enter(self) -> None:
        self._thread = threading.get_ident()
        await self.broker.__aenter__()
        self.exchanges = Exchanges(self.broker, self.system, dict(self.target.own))

    def release(self) -> None:
        """Say that it is used no more; when nobody uses it, it is closed soon after."""
        if self._process == os.getpid() and self._all.release(self):
            self.post(self._linger)

    def _linger(self) -> None:
        if self._leaving is None:
            self._leaving = self.loop.call_later(LINGER, self._leave)

    def _stay(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    def _leave(self) -> None:
        self._leaving = None
        self._all.leave(self)

    async def close(self) -> None:
        """Close it, on the loop."""
        opened, self.opened = self.opened, False
        if not opened:
            return
        try:
            async with asyncio.timeout(LEAVE):
                if self._trails:
                    await asyncio.wait(self._trails, timeout=TRAIL)
                try:
                    await self.exchanges.close()
                finally:
                    await self.broker.__aexit__(None, None, None)
        except Exception:
            logger.exception("closing %r failed", self)

    # ------------------------------------------------------------------ calls

    def call(
        self,
        function: Callable[[Unpack[Args]], Coroutine[Any, Any, T]],
        *args: *Args,
        timeout: float | None = None,
    ) -> T:
        """Run *function* on the loop and return what it returns; what interrupts the caller cancels it.

        Raises:
            Closed: called in a process that was forked from the one that opened it.
            BrokerUnavailable: nothing came back in *timeout* seconds, or 30.
        """
        if self._process != os.getpid():
            raise Closed(f"the connection to {self.system} belongs to the parent process: connect again after a fork")
        return cast(T, self._run(function, args, CALL if timeout is None else timeout))

    def _run(
        self, function: Callable[..., Coroutine[Any, Any, Any]], args: tuple[Any, ...], timeout: float | None = None
    ) -> Any:
        if frames.get() is not None:
            raise WouldBlock
        if threading.get_ident() == self._thread:
            # Such as from a handler of log records; waiting here for the loop would keep all leases from being renewed.
            raise RuntimeError(
                f"{self!r} is called from the thread of its own event loop, which cannot wait for itself"
            )
        call = Call()
        try:
            try:
                self.loop.call_soon_threadsafe(call.begin, function, args)
            except RuntimeError:
                raise Closed(f"the connection to {self.system} is closed") from None
            if not call.wait(timeout):
                raise BrokerUnavailable(f"{self.system} did not answer within {timeout:g} s")
        except BaseException:
            # A signal may interrupt anywhere above, as soft time limits do.
            with suppress(RuntimeError):
                self.loop.call_soon_threadsafe(call.give_up)
            raise
        return call.result()

    def post(self, function: Callable[[Unpack[Args]], object], *args: *Args) -> None:
        """Have *function* called on the loop soon, in order; what gathers until then costs one wake-up.

        In a process that was forked, and after the end, it does nothing.
        """
        self._posts.append((function, args))
        if not self._posted:
            try:
                self._posted = True
                if self._process != os.getpid():
                    return
                with suppress(RuntimeError):
                    self.loop.call_soon_threadsafe(self._run_posts)
            except BaseException:  # a soft time limit may interrupt anything
                self._posted = False
                raise

    def trail(self, frame: Frame, timeout: float) -> None:
        """Publish what nobody waits for, such as an event of a worker; what cannot be published is dropped."""
        self.post(self._trail, frame, timeout)

    def _trail(self, frame: Frame, timeout: float) -> None:
        if len(self._trails) >= TRAILS:
            self._drop("too many wait")
            return
        task = self.loop.create_task(self._publish(frame, timeout))
        self._trails.add(task)
        task.add_done_callback(self._trails.discard)

    async def _publish(self, frame: Frame, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout + MORE):
                await self.exchanges.publish(frame, timeout)
        except (BrokerError, TimeoutError) as error:
            self._drop(error_text(error))
        else:
            self._lost = 0

    def _drop(self, why: str) -> None:
        self._lost += 1
        if self._lost == 1:
            logger.warning("%r: events of Celery are dropped until they can be published again: %s", self, why)

    def _run_posts(self) -> None:
        self._posted = False  # before the first: what comes from now on wakes again
        posts = self._posts
        while posts:
            function, args = posts.popleft()
            try:
                function(*args)
            except BaseException:  # those behind it are posted as well
                logger.exception("%r failed", function)


class _Bridges:
    """The bridges of this process."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin without any."""
        self._lock = threading.Lock()
        self._open: dict[Target, Bridge] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._portal: Portal | None = None

    def forked(self) -> None:
        """Begin anew in a child process; what came through the fork is kept, so that nothing finalizes it."""
        keep_inherited(self._open, self._closing)
        self.begin()

    def acquire(self, target: Target) -> Bridge:
        """Do what `acquire` says."""
        with self._lock:
            bridge = self._open.get(target)
            if bridge is None:
                bridge = self._open[target] = Bridge(target, self)
            bridge.users += 1
        try:
            bridge.connect()
        except BaseException:
            if bridge.opened:
                bridge.release()
                raise
            with self._lock:
                bridge.users -= 1
                if self._open.get(target) is bridge:
                    del self._open[target]
            raise
        with self._lock:
            self._open[target] = bridge  # another thread may have failed, and forgotten it, while this one waited
        return bridge

    def release(self, bridge: Bridge) -> bool:
        """Count one user less; True if it was the last one."""
        with self._lock:
            bridge.users -= 1
            return bridge.users == 0

    def leave(self, bridge: Bridge) -> None:
        """Close *bridge*, on the loop, if nobody uses it."""
        with self._lock:
            if bridge.users:
                return
            if self._open.get(bridge.target) is bridge:
                del self._open[bridge.target]
        task = bridge.loop.create_task(bridge.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop, which then runs until the process ends: closing happens on it, and cannot wait for it."""
        with self._lock:
            if self._portal is None:
                self._portal = LOOP.enter()
        return self._portal.loop

    def close(self) -> None:
        """Close all: the process ends."""
        with self._lock:
            bridges = list(self._open.values())
            self._open.clear()
            portal, self._portal = self._portal, None
        if portal is None:
            return
        try:
            portal.start_task_soon(self._close, bridges).result(LEAVE + 1)
        except Exception:
            logger.exception("closing the connections of Celery failed")
        LOOP.leave()

    async def _close(self, bridges: list[Bridge]) -> None:
        await asyncio.gather(*self._closing, *(bridge.close() for bridge in bridges))


_bridges = _Bridges()
os.register_at_fork(after_in_child=_bridges.forked)
atexit.register(_bridges.close)


def acquire(target: Target) -> Bridge:
    """Return the bridge to *target* of this process, connected; each `acquire` has its `Bridge.release`.

    Raises:
        BrokerUnavailable: no server answered in time.
        AuthenticationError: the credentials were refused.
        ConfigError: the URL or an option makes no sense.
    """
    return _bridges.acquire(target)


def bridge_of(consumer: Any) -> Bridge | None:
    """Return the bridge over which *consumer*, a worker's of Celery, is connected; None if it has another transport."""
    connection = getattr(consumer, "connection", None)
    bridge = None if connection is None else getattr(connection.transport, "bridge", None)
    return bridge if isinstance(bridge, Bridge) else None
