"""The life of a broker: opening, closing, and who may use it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack
from inspect import iscoroutinefunction
from typing import Any, Literal, Self
from weakref import WeakSet

import anyio

from . import drivers
from ._binding import Bindings, Bound, Declare, Records
from ._intake import Intake
from ._plan import Env
from ._requests import Inbox
from .address import Address, DeadLetters, Outgoing, reply_topic
from .clock import SYSTEM, Clock, current
from .driver import Record
from .errors import Closed, ConfigError
from .events import Event, Listener
from .middleware import Middleware

logger = logging.getLogger("brokerkit")

_forks = [0]
"""Forks between the process that imported brokerkit and this one."""


_open: WeakSet[Connection] = WeakSet()


def _forked() -> None:
    _forks[0] += 1
    for connection in _open:
        connection._gate = None


os.register_at_fork(after_in_child=_forked)


class Connection:
    """A driver, open inside ``async with``, in one event loop of one process."""

    def __init__(
        self,
        url: str,
        options: Mapping[str, object],
        declare: Declare,
        middleware: tuple[Middleware, ...],
        on_event: Listener | None,
    ) -> None:
        if declare not in ("auto", "check", "never"):
            raise ConfigError(f"declare must be 'auto', 'check' or 'never', not {declare!r}")
        for layer in middleware:
            if not callable(layer):
                raise ConfigError(f"middleware must be functions of a message and call_next, not {layer!r}")
        if on_event is not None and (not callable(on_event) or iscoroutinefunction(on_event)):
            raise ConfigError(f"on_event must be a function, not async, that takes an event, not {on_event!r}")
        loaded = drivers.load(url, options, self._emit)
        self.middleware = middleware
        self._url = loaded.shown
        self._prefix = loaded.prefix
        self._driver = loaded.driver
        self._listener = on_event
        self._bindings = Bindings(loaded.driver, loaded.prefix, declare)
        self._known = self._bindings.first
        self._state: Literal["new", "open", "closed"] = "new"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forks = _forks[0]
        self._gate: asyncio.AbstractEventLoop | None = None
        """The loop in which this is known to be usable: what the hot path checks."""
        self._clock: Clock = SYSTEM
        self._records = Records(SYSTEM)
        self._inbox: Inbox | None = None
        self._inbox_lock = asyncio.Lock()
        """Held while it is opened, which `_opening` cancels."""
        self._opening: anyio.CancelScope | None = None
        self._leaving = False
        self._intakes: set[Intake] = set()
        self._closers: dict[object, Callable[[], Coroutine[Any, Any, None]]] = {}

    def __repr__(self) -> str:
        return f"<Broker {self._url} {self._state}>"

    # ------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            BrokerUnavailable: no server answered in time.
            AuthenticationError: the credentials were refused.
        """
        if self._state != "new":
            raise Closed(f"{self!r} cannot be entered again: make a new one with connect()")
        self._loop = asyncio.get_running_loop()
        self._forks = _forks[0]
        self._clock = current()
        self._records = Records(self._clock)
        await self._driver.__aenter__()
        self._state = "open"
        _open.add(self)
        logger.info("connected to %s", self._url)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close what is still open on this broker, flush and disconnect."""
        if self._state != "open":
            return
        self._check()
        async with AsyncExitStack() as stack:
            # All of them, also when one of them fails or this is cancelled.
            stack.push_async_callback(self._disconnect)
            stack.push_async_callback(self._close_inbox)
            for close in reversed(self._closers.values()):
                stack.push_async_callback(close)

    async def _close_inbox(self) -> None:
        self._leaving = True
        if self._opening is not None:
            self._opening.cancel()
        async with self._inbox_lock:
            if self._inbox is not None:
                await self._inbox.close()

    async def _disconnect(self) -> None:
        self._state = "closed"
        self._gate = None
        await self._driver.__aexit__(None, None, None)
        logger.info("disconnected from %s", self._url)

    def _check(self) -> None:
        if self._state == "open":
            if self._forks != _forks[0]:
                raise ConfigError(f"{self!r} was opened before a fork: the child process must connect for itself")
            if asyncio.get_running_loop() is self._loop:
                self._gate = self._loop
                return
            raise ConfigError(f"{self!r} belongs to another event loop: connect once in each loop")
        if self._state == "new":
            raise Closed(f"{self!r} is not open yet: use it inside 'async with connect(...) as broker'")
        raise Closed(f"{self!r} is closed")

    def _emit(self, event: Event) -> None:
        if self._listener is not None:
            try:
                self._listener(event)
            except Exception:
                logger.exception("on_event raised at a %s event", type(event).__name__)

    async def bind(self, address: Address) -> Bound:
        """Check *address* against the backend, and create it as *declare* says: done by itself on first use."""
        self._check()
        return await self._bindings.bind(address)

    def env(self) -> Env:
        """Return what subscriptions need of this broker."""
        emit = None if self._listener is None else self._emit
        return Env(self._driver, self._clock, emit, self._stage, self._records.new_id, self._bindings.restore)

    @property
    def prefix(self) -> str:
        """What ``?prefix=`` puts before every address and group."""
        return self._prefix

    def attach(self, owner: object, intakes: Iterable[Intake], close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Know of *owner*, so that `health` sees its intakes and closing the broker closes it."""
        self._intakes.update(intakes)
        self._closers[owner] = close

    def detach(self, owner: object, intakes: Iterable[Intake]) -> None:
        """Forget *owner*, which has ended."""
        self._intakes.difference_update(intakes)
        self._closers.pop(owner, None)

    async def _publishable(self, address: Address) -> Bound:
        if isinstance(address, DeadLetters):
            raise ConfigError(f"{address!r}: nothing is published to dead letters; redrive moves them back")
        return await self._bindings.bind(address)

    async def _stage(self, item: Outgoing[Any]) -> Record:
        self._check()
        bound = self._bindings.get(item.address) or await self._publishable(item.address)
        return self._records.outgoing(bound, item)

    async def replies(self) -> Bound:
        """Return the topic of replies, bound: services that reply need it before their first answer."""
        return await self.bind(reply_topic())
