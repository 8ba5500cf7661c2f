"""Results that can be awaited, of any result backend: a thread per app asks for what somebody waits for."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeAlias, cast

from celery import states
from celery.backends.base import DisabledBackend
from celery.result import EagerResult, ResultSet
from kombu.utils.functional import LRUCache
from typing_extensions import TypeVar

from .._thread import carry_out, settle, start
from ..errors import ConfigError

R = TypeVar("R", default=Any)

logger = logging.getLogger("brokerkit")

FIRST = 0.002
"""Seconds until a result is asked for a second time; then twice as long each time, up to `LONGEST`."""
LONGEST = 0.1
IDLE = 10.0
"""Seconds after which a thread that nobody waits for ends."""
KEPT = 10_000
"""Results over ``rpc://`` that came, and may be awaited later."""
PATIENCE = 30.0
"""Seconds that the result backend may fail for, until those who wait are told."""


class Result(Generic[R]):
    """What a task, chain, group or chord will return: ``value = await result``.

    Awaiting raises what the task has raised.  It may be awaited often, by several tasks, and by none.
    """

    def __init__(self, stock: Any, watcher: Watcher) -> None:
        self._stock = stock
        self._watcher = watcher

    def __repr__(self) -> str:
        return f"<Result {self.id}>"

    @property
    def id(self) -> str:
        """The id of the task, or that of the group."""
        return str(self._stock.id)

    @property
    def stock(self) -> object:
        """Celery's own result, an `AsyncResult` or a `GroupResult`, whose methods block."""
        return self._stock

    def __await__(self) -> Generator[Any, None, R]:
        return self.get().__await__()

    async def get(self, timeout: float | None = None) -> R:
        """Wait for the value, of a group for the list of its values; at most *timeout* seconds.

        Raises:
            TimeoutError: there is no result yet.
            ConfigError: the app has no result backend, or the task ignores its result.
        """
        self._watcher.check(self._stock)
        futures: dict[str, asyncio.Future[Any]] = {}
        try:
            async with asyncio.timeout(timeout):
                for leaf in _leaves(self._stock):
                    for node in (leaf, *_parents(leaf)):
                        if node.id not in futures:
                            futures[node.id] = self._watcher.watch(node.id)
                value: R = await _value(self._stock, futures)
                return value
        finally:
            for future in futures.values():
                future.cancel()

    async def revoke(self, *, terminate: bool = False) -> None:
        """Have workers not begin it, and with *terminate* stop it where it runs."""
        await asyncio.to_thread(self._stock.revoke, terminate=terminate)


def _leaves(stock: Any) -> Iterable[Any]:
    if isinstance(stock, ResultSet):
        for child in cast("list[Any]", stock.results):
            yield from _leaves(child)
    elif not isinstance(stock, EagerResult):
        yield stock


def _parents(stock: Any) -> Sequence[Any]:
    """Return the tasks before *stock* in its chain: when one of them fails, it never begins."""
    found: list[Any] = []
    node = stock.parent
    while node is not None:
        if not isinstance(node, (ResultSet, EagerResult)):
            found.append(node)
        node = node.parent
    return found


async def _value(stock: Any, futures: dict[str, asyncio.Future[Any]]) -> Any:
    if isinstance(stock, ResultSet):
        return [await _value(child, futures) for child in cast("list[Any]", stock.results)]
    if isinstance(stock, EagerResult):
        return stock.get(disable_sync_subtasks=False)
    mine = futures[stock.id]
    before = {futures[node.id]: node for node in _parents(stock)}
    while not mine.done():
        done, _ = await asyncio.wait([mine, *before], return_when=asyncio.FIRST_COMPLETED)
        for future in done:
            node = before.pop(future, None)
            if node is not None and not mine.done():
                _throw(node, future.result())  # its end if it has failed
    return _throw(stock, mine.result())


def _throw(stock: Any, meta: dict[str, Any]) -> Any:
    """Return what is in *meta*, or raise it."""
    if stock._cache is None:
        stock._set_cache(stock.backend.meta_from_decoded(meta))
    return stock.maybe_throw()


class _Watch:
    """Somebody who waits for one task."""

    __slots__ = ("due", "future", "id", "pause")

    def __init__(self, id: str) -> None:
        self.id = id
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.due = 0.0
        self.pause = FIRST


_Job: TypeAlias = tuple[asyncio.Future[Any], Callable[[], Any]]


def over_rpc(backend: object) -> bool:
    """Tell whether *backend* is that of ``rpc://``, which answers only the thread that asked."""
    return backend.__class__.__name__ == "RPCBackend"


class Watcher:
    """Asks the result backend of one app, in a thread of its own, as backends belong to threads."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._changed = threading.Condition()
        self._new: list[_Watch] = []
        self._watches: list[_Watch] = []
        """What the thread asks for; its own."""
        self._jobs: list[_Job] = []
        self._running = False
        self._failing: float | None = None

    def check(self, stock: Any) -> None:
        """Raise if there will be no result."""
        if getattr(stock, "ignored", False):
            raise ConfigError(f"task {stock.id} ignores its result")
        if isinstance(self._app.backend, DisabledBackend) and not isinstance(stock, EagerResult):
            raise ConfigError("the app has no result backend: set result_backend to await results")

    def watch(self, id: str) -> asyncio.Future[Any]:
        """Return a future of what the backend stores of task *id* when it has ended."""
        watch = _Watch(id)
        with self._changed:
            self._new.append(watch)
            self._wake()
        return watch.future

    def call(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """Have *function* called in the thread, and return a future of what it returns."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        with self._changed:
            self._jobs.append((future, function))
            self._wake()
        return future

    def _wake(self) -> None:
        if self._running:
            self._changed.notify()
        else:
            self._running = True
            start(self._main, "brokerkit results of Celery")

    def _main(self) -> None:
        # Nothing may end the thread but `_next`, or keep those who wait from an answer: there is no other one.
        with suppress(Exception):  # which whoever waits is told, when the backend is asked
            self._keep_all()
        while (jobs := self._next()) is not None:
            for future, function in jobs:
                carry_out(future, function)
            try:
                self._ask()
            except BaseException as error:
                logger.exception("asking for results failed")
                for watch in self._watches:
                    settle(watch.future, error=RuntimeError(f"asking for the result failed: {error!r}"))
                self._watches = []

    def _keep_all(self) -> None:
        """Have the backend of this thread find each result over ``rpc://``, whichever it looks for when that comes.

        It would forget the others; and a group would have it consume what comes, which nobody drains.
        """
        backend: Any = self._app.backend
        if not over_rpc(backend):
            return
        mine, stock = threading.get_ident(), backend.result_consumer.consume_from

        def consume_from(task_id: str) -> object:
            return None if threading.get_ident() == mine else stock(task_id)

        backend.result_consumer.consume_from = consume_from
        backend._cache = LRUCache(limit=KEPT)

    def _next(self) -> list[_Job] | None:
        """Wait until there is something to do, and return what is to be called; None ends the thread."""
        with self._changed:
            if not self._new and not self._jobs:
                wait = min((watch.due for watch in self._watches), default=time.monotonic() + IDLE) - time.monotonic()
                if wait > 0:
                    self._changed.wait(wait)
            if not self._new and not self._jobs and not self._watches:
                self._running = False
                return None
            self._watches += self._new
            jobs = self._jobs
            self._new, self._jobs = [], []
            return jobs

    def _ask(self) -> None:
        """Ask for all that is due at once, and tell those whose results are there."""
        self._watches = [watch for watch in self._watches if not watch.future.done()]
        now = time.monotonic()
        asked = [watch for watch in self._watches if watch.due <= now]
        if asked:
            told = self._look(asked)
            self._watches = [watch for watch in self._watches if watch not in told]

    def _look(self, asked: list[_Watch]) -> set[_Watch]:
        try:
            found = self._fetch({watch.id for watch in asked})
            self._failing = None
        except Exception as error:
            now = time.monotonic()
            if self._failing is None:
                self._failing = now
                logger.warning("the result backend failed, and is asked again: %r", error)
            if now - self._failing > PATIENCE:
                for watch in asked:
                    settle(watch.future, error=error)
                return set(asked)
            found = {}
        now = time.monotonic()
        told: set[_Watch] = set()
        for watch in asked:
            try:
                meta = self._meta(found.get(watch.id))
            except Exception as error:  # something else than a result is stored there
                settle(watch.future, error=error)
                told.add(watch)
                continue
            if meta is not None:
                settle(watch.future, meta)
                told.add(watch)
            else:
                watch.due = now + watch.pause
                watch.pause = min(watch.pause * 2, LONGEST)
        return told

    def _fetch(self, ids: set[str]) -> dict[str, Any]:
        """Return what the backend has of *ids*, encoded where it gives all at once."""
        backend: Any = self._app.backend
        if hasattr(backend, "mget") and hasattr(backend, "get_key_for_task"):
            order = list(ids)
            keys = [backend.get_key_for_task(id) for id in order]
            values = backend.mget(keys)
            if hasattr(values, "items"):  # of what is there, by key
                values = [values.get(key, values.get(backend.key_t(key))) for key in keys]
            return dict(zip(order, values, strict=True))
        return {id: backend.get_task_meta(id) for id in ids}

    def _meta(self, stored: Any) -> dict[str, Any] | None:
        """Return what *stored* says of a task that has ended, None of others."""
        if not stored:
            return None
        meta: dict[str, Any] = stored if isinstance(stored, dict) else self._app.backend.decode_result(stored)
        return meta if meta["status"] in states.READY_STATES else None
