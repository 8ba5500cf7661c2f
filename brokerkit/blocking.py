"""The same broker for code that is not async: Django, Flask, scripts, threads.

::

    with brokerkit.blocking.connect("redis://localhost") as broker:
        broker.publish(ORDERS, Order("o1", 10.0))

One event loop in a thread of its own does the work for all threads and all brokers of a process.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future, wait
from datetime import datetime
from functools import partial
from typing import Any, Literal, Self, overload

from typing_extensions import TypeVar

from . import broker as _async
from ._binding import Declare
from ._thread import LOOP, Portal, result
from .address import Outgoing, Queue, Reply, Topic
from .driver import Receipt
from .errors import BrokerError, Closed, ConfigError
from .events import Listener

__all__ = ["Broker", "connect"]

T = TypeVar("T")
R = TypeVar("R")


def connect(
    url: str,
    *,
    options: Mapping[str, object] = {},  # never changed
    declare: Declare = "auto",
    on_event: Listener | None = None,
) -> Broker:
    """Return a broker for *url*, to be entered with ``with``.  No I/O before that.

    The parameters are those of `brokerkit.connect`; *on_event* is called in the broker's own thread.

    Raises:
        ConfigError: the URL or an option makes no sense.
        InsecureCredentials: a password would travel in plaintext.
    """
    return Broker(partial(_async.connect, url, options=options, declare=declare, on_event=on_event))


class Broker:
    """A connection that any thread may use, made by `connect`.

    A program without a place for ``with``, such as a web application that connects when it starts, calls `open`; what is
    still open when the process ends is closed then.  Processes that fork connect afterwards, each for itself.
    """

    def __init__(self, make: Callable[[], _async.Broker]) -> None:
        self._make = make
        self._broker = make()  # what is wrong with the options is raised here
        self._state: Literal["new", "open", "closed"] = "new"
        self._lock = threading.Lock()
        self._portal: Portal | None = None
        self._calls: set[Future[Any]] = set()
        self._process = os.getpid()

    def __repr__(self) -> str:
        return f"<blocking {self._broker!r}>"

    def __enter__(self) -> Self:
        """Connect, as `open` does."""
        return self.open()

    def __exit__(self, *_: object) -> None:
        """Close, as `close` does."""
        self.close()

    def open(self) -> Self:
        """Connect, and return this broker.

        Raises:
            BrokerUnavailable: no server answered in time; it may be tried again.
            AuthenticationError: the credentials were refused.
            ConfigError: called where an event loop runs, which it would block.
        """
        self._demand_free_thread()
        if self._state != "new":
            self._demand_same_process()
        with self._lock:
            if self._state != "new":
                raise Closed(f"{self!r} cannot be opened again: make a new one with connect()")
            self._process = os.getpid()
            portal = LOOP.enter()
            try:
                result(portal.start_task_soon(self._broker.__aenter__))
            except BaseException:
                LOOP.leave()
                self._broker = self._make()  # a broker is entered once
                raise
            self._portal = portal
            self._state = "open"
            atexit.register(self.close)
        return self

    def close(self) -> None:
        """Wait for the calls that other threads are in, and disconnect.  Closing again does nothing."""
        if self._process != os.getpid():
            return  # the connection is the parent's
        self._demand_free_thread()
        with self._lock:
            portal, self._portal = self._portal, None
            self._state = "closed"
        if portal is None:
            return
        atexit.unregister(self.close)
        try:
            wait(tuple(self._calls))
            result(portal.start_task_soon(self._broker.__aexit__, None, None, None))
        finally:
            LOOP.leave()

    @overload
    def publish(
        self,
        address: Topic[T],
        value: T,
        *,
        key: str | bytes | None = None,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30,
    ) -> Receipt: ...
    @overload
    def publish(
        self,
        address: Queue[T, Any],
        value: T,
        *,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float | datetime = 0,
        ttl: float | None = None,
        priority: int = 0,
        timeout: float = 30,
    ) -> Receipt: ...
    def publish(self, address: Topic[Any] | Queue[Any, Any], value: object, **options: object) -> Receipt:
        """Publish *value* and return when it is stored; options and errors are those of `brokerkit.Broker.publish`."""
        return self._call(self._broker.publish, address, value, **options)

    @overload
    def publish_many(
        self, address: Topic[T] | Queue[T, Any], values: Iterable[T], *, timeout: float = 30
    ) -> list[Receipt | BrokerError]: ...
    @overload
    def publish_many(
        self, address: Topic[T] | Queue[T, Any], values: Iterable[Outgoing[T]], *, timeout: float = 30
    ) -> list[Receipt | BrokerError]: ...
    def publish_many(
        self, address: Topic[Any] | Queue[Any, Any], values: Iterable[object], **options: object
    ) -> list[Receipt | BrokerError]:
        """Publish *values*, or items of ``address.outgoing(...)``, in order; return one receipt or error each.

        *values* is read to its end first, in the calling thread: it may be a query of the calling thread's database.
        """
        return self._call(self._broker.publish_many, address, list(values), **options)

    def request(
        self, queue: Queue[T, Reply[R]], value: T, *, timeout: float, headers: Mapping[str, str] | None = None
    ) -> R:
        """Publish *value* to a queue that replies and return the answer; see `brokerkit.Broker.request`."""
        answer: R = self._call(self._broker.request, queue, value, timeout=timeout, headers=headers)
        return answer

    def _call(self, function: Callable[..., Coroutine[Any, Any, T]], /, *arguments: object, **options: object) -> T:
        self._demand_free_thread()
        self._demand_same_process()
        future: Future[T] | None = None
        try:
            with self._lock:
                if self._portal is None:
                    state = "is closed" if self._state == "closed" else "is not open yet: use it in 'with connect(...)'"
                    raise Closed(f"{self!r} {state}")
                future = self._portal.start_task_soon(partial(function, *arguments, **options))
                self._calls.add(future)
            future.add_done_callback(self._calls.discard)
            return result(future)
        except BaseException:
            if future is not None:
                future.cancel()  # the caller was interrupted; a call that failed is done already
            raise

    def _demand_same_process(self) -> None:
        if self._process != os.getpid():
            raise ConfigError(f"{self!r} was opened before a fork: the child process must connect for itself")

    def _demand_free_thread(self) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        raise ConfigError(
            f"{self!r} would block the event loop of this thread: use 'async with brokerkit.connect(...)' here"
        )
