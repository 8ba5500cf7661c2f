"""The second connection of a driver, on which the server tells it that there may be something to read.

Nothing depends on it but speed: whoever waits for a wake looks by itself as well, only later.  It is a connection of its own,
because a server drops a subscriber that reads too slowly, and the commands of others must not go with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, cast

import anyio

from ...errors import BrokerError, BrokerUnavailable
from ...policy import backoff
from ._errors import translate
from ._options import Settings
from ._wire import Wire, close, connect

logger = logging.getLogger("brokerkit")

_SUBSCRIBE: Final = b"SSUBSCRIBE"
_UNSUBSCRIBE: Final = b"SUNSUBSCRIBE"
_PING: Final = b"PING"


class _Channel:
    """Who listens to one channel."""

    __slots__ = ("callbacks", "confirmed", "waiting")

    def __init__(self) -> None:
        self.callbacks: list[Callable[[bytes], None]] = []
        self.confirmed = False
        self.waiting: list[asyncio.Future[None]] = []
        """Those who wait to be confirmed."""

    def resolve(self, error: BrokerError | None = None) -> None:
        """Let go on who waits."""
        waiting, self.waiting = self.waiting, []
        for future in waiting:
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)


class _Owed(NamedTuple):
    """An answer that the server owes."""

    command: bytes
    name: bytes
    channel: _Channel | None
    since: float


class Wakes:
    """Subscriptions to sharded channels that outlive the connection."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._channels: dict[bytes, _Channel] = {}
        self._wire: Wire | None = None
        self._unsent: list[bytes] = []
        self._something = asyncio.Event()
        self._owed: deque[_Owed] = deque()
        """What the server has not answered yet, in order."""
        self._heard = 0.0
        self.problem: str | None = "the connection for wakes is not open yet"
        """Why nothing is heard at the moment."""
        self.refused: dict[bytes, str] = {}
        """Channels that the server refused, and why."""

    def __repr__(self) -> str:
        state = "up" if self._wire is not None else "down"
        return f"<Wakes {self._settings.shown} {state} channels={len(self._channels)}>"

    # ------------------------------------------------------------------ subscriptions

    async def subscribe(self, channel: bytes, callback: Callable[[bytes], None]) -> None:
        """Call *callback*, which must not block, with each message of *channel* from now on.

        It returns when the server has confirmed that, or at once while there is no connection.  With b"" it is told that it
        may have missed something: after each reconnect.

        Raises:
            AuthorizationError: the user may not listen to that channel.
        """
        found = self._channels.get(channel)
        if found is None:
            found = self._channels[channel] = _Channel()
            if self._wire is not None:
                self._send(self._wire, _SUBSCRIBE, channel, found)
        found.callbacks.append(callback)
        if self._wire is None or found.confirmed:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        found.waiting.append(future)
        try:
            await future
        except BaseException:
            self.unsubscribe(channel, callback)
            raise

    def unsubscribe(self, channel: bytes, callback: Callable[[bytes], None]) -> None:
        """Call *callback* no more; what is not subscribed is passed over."""
        found = self._channels.get(channel)
        if found is None or callback not in found.callbacks:
            return
        found.callbacks.remove(callback)
        if not found.callbacks:
            del self._channels[channel]
            self.refused.pop(channel, None)
            if self._wire is not None:
                self._send(self._wire, _UNSUBSCRIBE, channel)

    # ------------------------------------------------------------------ life

    async def run(self) -> None:
        """Keep the connection up until cancelled."""
        failures, told = 0, False
        while True:
            try:
                wire = await connect(self._settings)
            except BrokerError as error:
                if not told:
                    told = True
                    logger.warning("no wakes: %s; messages are looked for once a second meanwhile", error)
                self.problem = f"no wakes: {error}"
            else:
                failures, told = 0, False
                try:
                    await self._serve(wire)
                finally:
                    self._down()
                    await close(wire)
            await asyncio.sleep(backoff(failures))
            failures += 1

    async def _serve(self, wire: Wire) -> None:
        """Use *wire* until it breaks."""
        self._heard = asyncio.get_running_loop().time()
        self._wire = wire
        self.problem = None
        self.refused.clear()
        for channel, found in self._channels.items():
            self._send(wire, _SUBSCRIBE, channel, found)
        async with anyio.create_task_group() as group:

            async def until_broken(step: Callable[[Wire], Awaitable[None]]) -> None:
                try:
                    await step(wire)
                except Exception as error:
                    self.problem = (
                        self.problem or f"no wakes: {translate(error, f'listening to {self._settings.shown}')}"
                    )
                group.cancel_scope.cancel()

            for step in (self._write, self._watch, self._read):
                group.start_soon(until_broken, step)

    def _down(self) -> None:
        self._wire = None
        self._unsent.clear()
        self._owed.clear()
        for found in self._channels.values():
            found.confirmed = False
            found.resolve()

    # ------------------------------------------------------------------ one connection

    def _send(self, wire: Wire, command: bytes, name: bytes = b"", channel: _Channel | None = None) -> None:
        self._owed.append(_Owed(command, name, channel, asyncio.get_running_loop().time()))
        self._unsent += wire.pack_command(command, name) if name else wire.pack_command(command)
        self._something.set()

    async def _write(self, wire: Wire) -> None:
        # In a task of its own: redis-py closes a connection when somebody is cancelled while writing to it.
        while True:
            await self._something.wait()
            self._something.clear()
            unsent, self._unsent = self._unsent, []
            await wire.send_packed_command(unsent)

    async def _watch(self, wire: Wire) -> None:
        """Ask for a sign of life where there is silence, and give up where none comes."""
        loop, timeout = asyncio.get_running_loop(), self._settings.timeout
        tick = timeout / 4
        while True:
            await asyncio.sleep(tick)
            await asyncio.sleep(
                0
            )  # after a standstill of this process, let the reader see first what has come meanwhile
            now = loop.time()
            if self._owed and now - max(self._owed[0].since, self._heard) >= timeout - 2 * tick:
                raise BrokerUnavailable(f"the server was silent for {timeout:g} s")
            if not self._owed and now - self._heard >= tick / 2:
                self._send(wire, _PING)

    async def _read(self, wire: Wire) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                reply = await wire.read_response(push_request=True)
            except Exception as error:
                if not wire.is_connected or not self._owed:
                    raise
                self._was_refused(error)
                continue
            self._heard = loop.time()
            if isinstance(reply, list):
                kind, channel, *data = cast("list[bytes]", reply)
                self._pushed(kind, channel, data[0] if data else b"")
            elif self._owed and self._owed[0].command == _PING:
                self._owed.popleft()

    def _pushed(self, kind: bytes, name: bytes, data: bytes) -> None:
        if kind == b"smessage":
            self._tell(name, data)
        elif kind == b"ssubscribe":
            channel = self._answered(_SUBSCRIBE, name).channel
            if channel is not None and channel is self._channels.get(name):
                again = not channel.waiting
                channel.confirmed = True
                channel.resolve()
                if again:
                    self._tell(name, b"")
        elif kind == b"sunsubscribe":
            self._answered(_UNSUBSCRIBE, name)

    def _answered(self, command: bytes, name: bytes) -> _Owed:
        if not self._owed or (self._owed[0].command, self._owed[0].name) != (command, name):
            raise BrokerUnavailable("the server took a subscription back")
        return self._owed.popleft()

    def _was_refused(self, error: Exception) -> None:
        """The server says no to the oldest command that it has not answered."""
        owed = self._owed.popleft()
        if owed.command != _SUBSCRIBE or owed.channel is None or owed.channel is not self._channels.get(owed.name):
            return
        problem = translate(error, f"listening to {owed.name.decode('utf-8', 'replace')}")
        if not owed.channel.waiting:  # it was allowed before
            logger.warning("%s; messages are looked for once a second instead", problem)
        self.refused[owed.name] = str(problem)
        owed.channel.resolve(problem)

    def _tell(self, channel: bytes, data: bytes) -> None:
        found = self._channels.get(channel)
        for callback in tuple(found.callbacks) if found is not None else ():
            try:
                callback(data)
            except Exception:
                logger.exception("a callback of %r failed", channel)
