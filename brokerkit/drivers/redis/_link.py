"""`Link`: all commands of a driver over one connection, which mends itself.

Commands of one turn of the event loop leave in one write and are answered in order; a reply costs a future and no timer.
What was sent when the connection broke is sent again on the next one, if the caller says that it may be.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import anyio
import hiredis
from redis import exceptions as native

from ...errors import BrokerError, BrokerUnavailable, Closed
from ...policy import backoff
from ._checks import Facts, check
from ._errors import translate
from ._options import Settings
from ._scripts import Script, every
from ._wire import Wire, close, connect

logger = logging.getLogger("brokerkit")

GRACE: Final = 1.0
"""Seconds without a connection after which calls that were never sent fail, and consumers are told."""
POLL: Final = 1.0
"""Seconds after which consumers look for what nobody has told them of."""
_SWEEP: Final = 0.1
_MAX_WRITE: Final = 1024 * 1024
_RELOADS: Final = 5

Argument = bytes | str | int
Watcher = Callable[[bool], None]


def _pack(*args: Argument) -> bytes:
    pack: Callable[[tuple[Argument, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]
    return pack(args)


class Unanswered(BrokerUnavailable):
    """A call was sent and its answer is missing: it may have been executed."""


class _Call:
    __slots__ = ("again", "deadline", "future", "packed", "reloads", "script", "sent", "value")

    def __init__(
        self, packed: bytes, script: Script | None, deadline: float, again: bool, future: asyncio.Future[Any]
    ) -> None:
        self.packed = packed
        self.script = script
        self.deadline = deadline
        self.again = again
        self.future = future
        self.sent = 0.0
        self.reloads = 0
        self.value: Any = None


class Link:
    """One connection for many callers.  With *sealed*, a reply counts only when the server has it on disk (WAITAOF)."""

    def __init__(self, settings: Settings, *, sealed: bool = False) -> None:
        self.settings = settings
        self.watchers: set[Watcher] = set()
        """Called with True after each reconnect, before waiting calls leave, and with False after `GRACE` without one."""
        self.facts: Facts | None = None
        """What the server is, once connected."""
        self.problem: BrokerError | None = None
        """Why there is no connection, if there is none."""
        self._sealed = sealed
        self._warned: set[str] = set()
        self._wire: Wire | None = None
        self._waiting: deque[_Call] = deque()
        self._unanswered: deque[_Call] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._swept: asyncio.TimerHandle | None = None
        self._sweeps_at = math.inf
        self._gives_up: asyncio.TimerHandle | None = None
        self._scope: anyio.CancelScope | None = None
        self._sources: list[Callable[[], None]] = []
        self._unsealed: list[_Call] = []
        self._down_since = math.inf
        self._lost = False
        self._heard = 0.0
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        state = "up" if self.up else "closed" if self._closed else "down"
        return f"<Link {self.settings.shown} {state}>"

    @property
    def up(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._wire is not None

    # ------------------------------------------------------------------ calling

    def call(
        self,
        script: Script,
        keys: Sequence[bytes],
        args: Sequence[Argument],
        *,
        timeout: float,
        again: bool = True,
    ) -> asyncio.Future[Any]:
        """Run *script*; await the future for its reply.  It may be cancelled, which takes nothing back.

        With *again* the script must be idempotent: it is sent once more where a connection broke before the answer.

        The future fails with `BrokerUnavailable` if the script was certainly not run, `Unanswered` if that is not known
        after *timeout* seconds, or with what the server answered, as one of our errors.
        """
        return self._add(_pack(b"EVALSHA", script.sha, len(keys), *keys, *args), script, timeout, again)

    def command(self, *args: Argument, timeout: float, again: bool = True) -> asyncio.Future[Any]:
        """Run a plain command, as `call` does."""
        return self._add(_pack(*args), None, timeout, again)

    def _add(self, packed: bytes, script: Script | None, timeout: float, again: bool) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if self._wire is None and (refusal := self._refusal()) is not None:
            future.set_exception(refusal)
            return future
        now = loop.time()
        deadline = now + timeout
        self._waiting.append(_Call(packed, script, deadline, again, future))
        if self._wake is not None and self._wire is not None:
            self._stir()
        if self._swept is None or deadline < self._sweeps_at:
            self._sweep_by(loop, now, deadline)
        return future

    def was_sent(self, future: asyncio.Future[Any]) -> bool:
        """Return whether the call of *future* has left; one that has not never will if it is cancelled now."""
        return not any(call.future is future and not call.sent for call in self._waiting)

    async def idle(self) -> None:
        """Return when every call so far is answered, or given up."""
        while self._sources or self._waiting or self._unanswered or self._unsealed:
            futures = [call.future for line in (self._waiting, self._unanswered) for call in line]
            futures = [future for future in futures if not future.done()]
            if futures:
                await asyncio.wait(futures)
            else:
                await asyncio.sleep(_SWEEP)

    def soon(self, source: Callable[[], None]) -> None:
        """Run *source*, which calls, right before the next write: so what its callers add until then is one call."""
        if self._wire is None:
            source()
            return
        self._sources.append(source)
        if self._wake is not None:
            self._stir()

    def _refusal(self) -> BrokerError | None:
        """Return why nothing can be called; None if it is worth waiting."""
        if self._closed or self._loop is None:
            return Closed("the connection is closed")
        return self._unavailable() if self._lost else None

    def _unavailable(self) -> BrokerError:
        problem = self.problem
        error = BrokerUnavailable(f"no connection to {self.settings.shown}: {problem or 'it was closed'}")
        error.__cause__ = problem.__cause__ if problem is not None else None
        return error

    def _stir(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None and not wake.done():
            wake.set_result(None)

    # ------------------------------------------------------------------ life

    async def run(self, started: asyncio.Future[None]) -> None:
        """Connect, tell *started*, and stay connected until cancelled."""
        loop = self._loop = asyncio.get_running_loop()
        failures = 0
        try:
            while True:
                longest = 0.5
                try:
                    began = await self._connection(started, loop)
                except BrokerError as error:
                    if not started.done():
                        started.set_exception(error)
                        return
                    self._still_down(error)
                    longest = longest if error.retryable else 5.0
                else:
                    # One that is broken as soon as it is made is as good as none.
                    failures = 0 if loop.time() - began > GRACE else failures
                failures += 1
                if failures > 1:
                    await asyncio.sleep(backoff(failures, initial=0.02, longest=longest))
        finally:
            self._end()

    async def _connection(self, started: asyncio.Future[None], loop: asyncio.AbstractEventLoop) -> float:
        """Connect and serve until the connection breaks; return when it began."""
        wire = await self._open()
        try:
            self._connected(wire, loop)
            began = loop.time()
            if not started.done():
                started.set_result(None)
            async with anyio.create_task_group() as tasks:
                self._scope = tasks.cancel_scope
                tasks.start_soon(self._write, wire, tasks.cancel_scope)
                await self._read(wire)
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await close(wire)
            self._disconnected(loop)
        return began

    async def _open(self) -> Wire:
        wire: Wire = await connect(self.settings)
        try:
            self.facts = await check(wire, self.settings, self._warned)
            async with asyncio.timeout(self.settings.connect_timeout):
                await _load(wire, every())
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await close(wire)
            if isinstance(error, (BrokerError, asyncio.CancelledError)) or not isinstance(error, Exception):
                raise
            raise translate(error, f"connecting to {self.settings.shown}") from error
        return wire

    def _connected(self, wire: Wire, loop: asyncio.AbstractEventLoop) -> None:
        again, self._unanswered = self._unanswered, deque()
        waiting, self._waiting = self._waiting, deque()
        if self._down_since < math.inf:
            logger.info("connected to %s again", self.settings.shown)
        self._down_since = math.inf
        self._lost = False
        self.problem = None
        self._wire = wire
        self._heard = loop.time()
        for watcher in list(self.watchers):
            watcher(True)
        # What the watchers call goes first, then what has been sent before, in its order.
        self._waiting.extend(again)
        self._waiting.extend(waiting)

    def _disconnected(self, loop: asyncio.AbstractEventLoop) -> None:
        self._wire = self._scope = None
        self._down_since = loop.time()
        if self.problem is None:
            self.problem = BrokerUnavailable(f"the connection to {self.settings.shown} was lost")
        kept: deque[_Call] = deque()
        sent = [*self._unsealed, *self._unanswered, *(call for call in self._waiting if call.sent)]
        self._unsealed.clear()
        self._waiting = deque(call for call in self._waiting if not call.sent)
        for call in sent:
            if call.again and not call.future.done():
                kept.append(call)
            else:
                self._forget(call, Unanswered(f"the connection to {self.settings.shown} broke before the answer"))
        self._unanswered = kept
        if self._gives_up is not None:
            self._gives_up.cancel()
        self._gives_up = loop.call_later(GRACE, self._grace)
        self._run_sources()

    def _still_down(self, error: BrokerError) -> None:
        if self.problem is None or type(self.problem) is not type(error):
            logger.warning("no connection to %s: %s", self.settings.shown, error)
        self.problem = error

    def _grace(self) -> None:
        """Give up waiting for a connection that has been gone for too long."""
        if self._wire is not None or self._closed:
            return
        self._lost = True
        waiting, self._waiting = self._waiting, deque()
        for call in waiting:
            self._forget(call, self._unavailable())
        for watcher in list(self.watchers):
            watcher(False)

    def _end(self) -> None:
        self._closed = True
        for timer in (self._swept, self._gives_up):
            if timer is not None:
                timer.cancel()
        self._run_sources()
        for call in self._waiting:
            self._forget(call, Closed("the connection was closed"))
        for call in self._unanswered:
            self._forget(call, Unanswered("the connection was closed before the answer"))
        self._waiting.clear()
        self._unanswered.clear()

    def _forget(self, call: _Call, error: BrokerError) -> None:
        if not call.future.done():
            call.future.set_exception(error)

    # ------------------------------------------------------------------ writing and reading

    async def _write(self, wire: Wire, scope: anyio.CancelScope) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                if self._sources:
                    self._run_sources()
                if not self._waiting:
                    self._wake = loop.create_future()
                    await self._wake
                    continue
                await wire.send_packed_command(self._batch(loop.time()), check_health=False)
        except (OSError, native.RedisError) as error:
            self.problem = translate(error, f"writing to {self.settings.shown}")
            scope.cancel()

    def _run_sources(self) -> None:
        sources, self._sources = self._sources, []
        for source in sources:
            source()

    def _batch(self, now: float) -> bytes:
        """Take what is sent next, at least one call."""
        waiting, unanswered = self._waiting, self._unanswered
        parts: list[bytes] = []
        size = 0
        if not unanswered:
            self._heard = now
        while waiting and size < _MAX_WRITE:
            call = waiting.popleft()
            if call.future.done():  # cancelled, or too late: it was never sent, or may be forgotten
                continue
            call.sent = call.sent or now
            parts.append(call.packed)
            size += len(call.packed)
            unanswered.append(call)
        if self._sealed and parts:
            seal = _Call(_WAITAOF, None, math.inf, False, asyncio.get_running_loop().create_future())
            parts.append(seal.packed)
            unanswered.append(seal)
        return b"".join(parts)

    async def _read(self, wire: Wire) -> None:
        """Hand out replies until the connection breaks."""
        read, inf = wire.read_response, math.inf
        loop = asyncio.get_running_loop()
        while True:
            value: Any
            try:
                value = await read(timeout=inf)
            except native.ResponseError as error:
                value = error
            except (OSError, native.RedisError) as error:
                if self.problem is None:
                    self.problem = translate(error, f"reading from {self.settings.shown}")
                return
            self._heard = loop.time()
            if not self._unanswered:
                self.problem = BrokerUnavailable(f"{self.settings.shown} sent a reply that nobody waits for")
                return
            call = self._unanswered.popleft()
            if call.script is not None and value.__class__ is native.NoScriptError and call.reloads < _RELOADS:
                self._reload(call)
                continue
            if not self._sealed:
                if not call.future.done():
                    _answer(call, value)
            elif call.packed is not _WAITAOF:
                call.value = value
                self._unsealed.append(call)
            else:
                calls, self._unsealed = self._unsealed, []
                self._seal(call, value, calls)

    def _seal(self, seal: _Call, value: Any, calls: list[_Call]) -> None:
        """Answer *calls*, which the server has on disk now, unless *value* says that it has not."""
        seal.future.cancel()
        failed = isinstance(value, Exception) or not value or value[0] < 1
        for call in calls:
            if call.future.done():
                continue
            if failed and not isinstance(call.value, Exception):
                text = f"{self.settings.shown} did not confirm that it is on disk"
                call.future.set_exception(Unanswered(f"{text}: {value}" if isinstance(value, Exception) else text))
            else:
                _answer(call, call.value)

    def _reload(self, call: _Call) -> None:
        """Send *call* again behind its script, which the server has forgotten (SCRIPT FLUSH)."""
        assert call.script is not None
        call.reloads += 1
        loop = asyncio.get_running_loop()
        load = _Call(
            _pack(b"SCRIPT", b"LOAD", call.script.source),
            None,
            loop.time() + self.settings.timeout,
            False,
            loop.create_future(),
        )
        load.future.add_done_callback(ignore)
        self._waiting.extendleft((call, load))
        if self._wake is not None:
            self._stir()

    # ------------------------------------------------------------------ deadlines

    def _sweep(self) -> None:
        """Fail what is too late, and the connection if it owes an answer for too long."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._swept = None
        if now - self._sweeps_at > GRACE:
            # This process stood still, not the server: what it has answered meanwhile is read first.
            self._heard = now
            self._sweep_at(loop, now + _SWEEP)
            return
        for call in self._waiting:
            if now >= call.deadline and not call.future.done():
                if call.sent:
                    call.future.set_exception(Unanswered(f"no answer from {self.settings.shown} in time"))
                else:
                    call.future.set_exception(self._unavailable() if self._wire is None else self._slow())
        late = False
        for call in self._unanswered:
            if now >= call.deadline and not call.future.done():
                call.future.set_exception(Unanswered(f"no answer from {self.settings.shown} in time"))
            late = late or now - max(call.sent, self._heard) >= self.settings.timeout
        if self._wire is None:
            for line in (self._waiting, self._unanswered):
                for call in [call for call in line if call.future.done()]:
                    line.remove(call)
        elif late:
            self.problem = BrokerUnavailable(
                f"{self.settings.shown} has not answered for {self.settings.timeout:g} s; the connection is made anew"
            )
            if self._scope is not None:
                self._scope.cancel()
        if self._unanswered or (self._waiting and self._wire is None):
            self._sweep_at(loop, now + _SWEEP)
        elif self._waiting:  # since this turn: it is as if they came now
            self._sweep_by(loop, now, min(call.deadline for call in self._waiting))

    def _sweep_by(self, loop: asyncio.AbstractEventLoop, now: float, deadline: float) -> None:
        """Sweep in time for *deadline*, or when consumers look: what is answered at once costs no turn of the loop then."""
        when = min(next_poll(now), max(now + _SWEEP, min(deadline, now + self.settings.timeout)))
        if self._swept is None or when < self._sweeps_at:
            self._sweep_at(loop, when)

    def _sweep_at(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        if self._swept is not None:
            self._swept.cancel()
        self._sweeps_at = when
        self._swept = loop.call_at(when, self._sweep)

    def _slow(self) -> BrokerError:
        return BrokerUnavailable(f"{self.settings.shown} is too slow: a call waited for its turn until its deadline")


def next_poll(now: float) -> float:
    """Return when all who wait look next: together, which makes that one write, answered by one read."""
    return (now // POLL + 1) * POLL


_WAITAOF: Final = _pack(b"WAITAOF", b"1", b"0", b"0")


def _answer(call: _Call, value: Any) -> None:
    if isinstance(value, Exception):
        what = "the server refused a command" if call.script is None else f"script {call.script.name}"
        call.future.set_exception(translate(value, what))
    else:
        call.future.set_result(value)


def ignore(future: asyncio.Future[Any]) -> None:
    """Take note of what a call failed with that nobody waits for."""
    if not future.cancelled():
        future.exception()


async def _load(wire: Wire, scripts: Sequence[Script]) -> None:
    """Make the server know *scripts*."""
    await wire.send_packed_command(
        b"".join(_pack(b"SCRIPT", b"LOAD", script.source) for script in scripts), check_health=False
    )
    for _ in scripts:
        await wire.read_response()
