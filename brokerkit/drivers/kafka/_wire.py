"""One connection to a broker: frames go out at once, answers come back in order, each with its own deadline.

It is our own, not that of aiokafka, which logs requests with passwords in them, has one timeout for all requests, takes frames
of any size and waits without end for a peer that does not read when it is closed.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, Final, cast

from ...errors import BrokerError, BrokerUnavailable, ConfigError
from ._api import Asking, Versions
from ._errors import Unanswered, one_line, translate

LARGEST: Final = 256 * 1024 * 1024
"""Bytes of an answer; more is no answer of a broker."""

_SIZE: Final = 4
"""Bytes of a frame that tell how long the rest is."""


class _Asked:
    """A request that was sent."""

    __slots__ = ("answer", "number", "request", "timer")

    def __init__(self, number: int, request: Asking, answer: asyncio.Future[Any]) -> None:
        self.number = number
        self.request = request
        self.answer = answer
        self.timer: asyncio.TimerHandle | None = None


class Wire(asyncio.Protocol):
    """An open connection; made by `connect`.

    A request that is not answered in time closes it, as answers come in order: those behind would come later still.
    """

    def __init__(self, place: str, *, certificate: bool = False) -> None:
        self.place = place
        """Host and port, for texts."""
        self.closed = False
        """Whether it takes no more requests."""
        self.on_close: Callable[[], None] | None = None
        """Called once, when it is over."""
        self.versions: Versions = {}
        """What the broker speaks."""
        self._certificate = certificate
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._asked: deque[_Asked] = deque()
        self._number = 0
        self._over = False
        self._expiry: asyncio.TimerHandle | None = None
        self._parts: list[bytes] = []
        self._have = 0
        self._need = _SIZE

    def __repr__(self) -> str:
        return f"<Wire {self.place}{' closed' if self.closed else ''}>"

    # ------------------------------------------------------------------ asking

    def send(self, request: Asking, timeout: float) -> asyncio.Future[Any]:
        """Write *request* at once, and return what its answer will be.  Cancelling that leaves the connection usable.

        Raises:
            BrokerUnavailable: the connection is closed; nothing was sent.
            Unanswered: (out of the future) no answer came within *timeout* seconds, or the connection broke before.
        """
        transport = self._transport
        if self.closed or transport is None or transport.is_closing():
            raise BrokerUnavailable(f"the connection to {self.place} is closed")
        number = self._number = (self._number + 1) & 0x7FFFFFFF
        transport.write(request.frame(number))
        asked = _Asked(number, request, self._loop.create_future())
        asked.timer = self._loop.call_later(timeout, self._late, asked, timeout)
        self._asked.append(asked)
        return asked.answer

    def close(self) -> None:
        """Close it at once, whatever state it is in."""
        self._end(None, "it was closed")

    def expire(self, after: float) -> None:
        """Take no requests from then on: the broker, which has set a limit to log-ins, is about to close it."""
        self._expiry = self._loop.call_later(after, self._retire)

    def _retire(self) -> None:
        """Take no more requests, and be over when those that were sent are answered."""
        self.closed = True
        if not self._asked:
            self._end(None, "it was closed")

    def _late(self, asked: _Asked, timeout: float) -> None:
        if not asked.answer.done():
            _fail(asked.answer, Unanswered(f"{self.place} did not answer {asked.request.name} within {timeout:g} s"))
        self._end(None, f"it did not answer {asked.request.name} within {timeout:g} s")

    def _end(self, cause: BaseException | None, text: str) -> None:
        if self._over:
            return
        self.closed = self._over = True
        if self._expiry is not None:
            self._expiry.cancel()
        if self._transport is not None:
            # Without waiting for a peer that may not read any more.
            self._transport.abort()
        asked, self._asked = self._asked, deque()
        self._parts.clear()
        for each in asked:
            if each.timer is not None:
                each.timer.cancel()
            if not each.answer.done():
                _fail(each.answer, self._lost(cause, text))
        if self.on_close is not None:
            callback, self.on_close = self.on_close, None
            callback()

    def _lost(self, cause: BaseException | None, text: str) -> BrokerError:
        if isinstance(cause, BrokerError):
            return caused(type(cause)(*cause.args), cause.__cause__)
        if isinstance(cause, ssl.SSLError):
            error = translate(cause, f"the connection to {self.place}", certificate=self._certificate)
            return caused(Unanswered(str(error)), cause) if isinstance(error, BrokerUnavailable) else error
        return caused(Unanswered(f"the connection to {self.place} is lost: {text}"), cause)

    # ------------------------------------------------------------------ the loop calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        if self._over:
            self._transport.abort()
            return
        connected = transport.get_extra_info("socket")
        if connected is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that it is closed."""
        self._end(exc, "the broker closed it" if exc is None else one_line(str(exc)) or type(exc).__name__)

    def data_received(self, data: bytes) -> None:
        """Take in what comes, and hand out each answer when it is there as a whole."""
        if self._parts:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return
            data = self._joined()
            if self._over:
                return
        at, end, need = 0, len(data), _SIZE
        while end - at >= _SIZE:
            size = int.from_bytes(data[at : at + _SIZE], "big", signed=True)
            if not 4 <= size <= LARGEST:
                self._end(error := self._strange(data[at : at + _SIZE]), str(error))
                return
            if end - at < _SIZE + size:
                need = _SIZE + size
                break
            self._take(data[at + _SIZE : at + _SIZE + size])
            if self._over:
                return
            at += _SIZE + size
        if at < end:
            self._parts.append(data[at:] if at else data)
            self._have, self._need = end - at, need

    def _joined(self) -> bytes:
        """Return what has come in parts; a long answer is put together without its size, and handed out."""
        parts: list[bytes | memoryview] = [*self._parts]
        self._parts.clear()
        if self._need == _SIZE:
            return b"".join(parts)
        last = parts[-1]
        whole = len(last) - (self._have - self._need)
        parts[-1] = memoryview(last)[:whole]
        parts[0] = memoryview(parts[0])[_SIZE:]
        self._take(b"".join(parts))
        return bytes(last[whole:])

    def _take(self, frame: bytes) -> None:
        """Hand out an answer."""
        if not self._asked or self._asked[0].number != int.from_bytes(frame[:4], "big", signed=True):
            error = BrokerError(f"{self.place} answered what was not asked")
            self._end(error, str(error))
            return
        asked = self._asked.popleft()
        if asked.timer is not None:
            asked.timer.cancel()
        if not asked.answer.done():  # else it was cancelled: nobody waits
            self._answer(asked, frame)
        if self.closed and not self._asked:
            self._end(None, "it was closed")

    def _answer(self, asked: _Asked, frame: bytes) -> None:
        try:
            answer = asked.request.read(frame)
        except Exception as cause:
            text = f"the answer of {self.place} to {asked.request.name} cannot be read (is the broker newer than kio?)"
            unreadable = caused(BrokerError(f"{text}: {type(cause).__name__}: {one_line(str(cause))}"), cause)
            _fail(asked.answer, unreadable)
            self._end(unreadable, str(unreadable))
        else:
            asked.answer.set_result(answer)

    def _strange(self, head: bytes) -> BrokerError:
        """Return what is wrong with a frame that begins with *head*."""
        if head[0] in {20, 21, 22} and head[1] == 3:
            return ConfigError(f"{self.place} speaks TLS; use kafka+ssl://")
        if head == b"HTTP":
            return ConfigError(f"{self.place} speaks HTTP: it is no broker of Kafka")
        return BrokerError(f"{self.place} does not answer as Kafka does")


def _fail(answer: asyncio.Future[Any], error: BaseException) -> None:
    answer.set_exception(error)
    answer.exception()  # nobody may wait for it any more


def caused(error: BrokerError, cause: BaseException | None) -> BrokerError:
    """Return *error*, made from *cause*."""
    error.__cause__ = cause
    return error
