"""Publishing tasks from asyncio: Celery's own code builds the messages, and no event loop waits for a broker.

What goes out in the end is awaited.  What Celery does on the way there runs on the caller's loop as long as nothing of it has
to wait (`_collect`); the first use of a queue, canvas, and brokers that are not brokerkit's take a thread.
"""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar, copy_context
from datetime import datetime
from functools import partial
from typing import Any, ParamSpec, Protocol, cast
from weakref import WeakKeyDictionary

import anyio
import anyio.to_thread
import kombu
from celery import Celery as StockCelery
from celery.canvas import Signature as StockSignature
from kombu.exceptions import OperationalError
from kombu.serialization import dumps

from .._thread import is_green
from ._collect import Frame, Loop, WouldBlock, frames
from ._envelope import Envelope
from ._errors import CONNECTION_ERRORS
from ._results import Result, Watcher, over_rpc
from .transport import Transport

P = ParamSpec("P")

THREADS = 8
"""Publishing calls at once, on each event loop, that Celery may wait in."""
AT_ONCE = 10
"""Calls of Celery in one turn of an event loop; each takes a fraction of a millisecond."""
MANY = 10_000
"""Queues that are remembered as declared."""
_SENDER = "_brokerkit_sender"

_async: ContextVar[bool] = ContextVar("brokerkit publishes for asyncio", default=False)
"""Set where results are awaited, and asked for by their `Watcher`: backends need not subscribe to them."""


class Sendable(Protocol):
    """A signature of Celery's: ``add.s(2, 3)``, a chain, a group, a chord."""

    def apply_async(self, *args: Any, **options: Any) -> Any:
        """Publish it."""


async def adelay(task: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> Result[Any]:
    """Publish a call of *task*, as its `delay` does, and return when it is stored.

    Raises:
        OperationalError: of `kombu.exceptions`: the broker did not take it in time.
    """
    stock: Any = task
    return await _send(stock.app, partial(stock.apply_async, args, kwargs))


async def apply(signature: Sendable, **options: object) -> Result[Any]:
    """Publish *signature*, with the options of its `apply_async`, and return when it is stored.

    Chains, groups and chords may talk to the result backend on the way: they are published in a thread.

    Raises:
        OperationalError: of `kombu.exceptions`: the broker did not take it in time.
    """
    stock: Any = signature
    plain = type(stock) is StockSignature or not isinstance(stock, StockSignature)
    return await _send(stock.app, partial(stock.apply_async, **options), plain=plain)


async def asend_task(
    app: StockCelery, name: str, args: Any = None, kwargs: Any = None, **options: object
) -> Result[Any]:
    """Publish a call of the task that workers know as *name*, whose code this program need not have.

    *app* says where to, as in `Celery.send_task`; it needs no tasks: ``Celery(broker="kafka://localhost:9092")``.

    Raises:
        OperationalError: of `kombu.exceptions`: the broker did not take it in time.
    """
    return await _send(app, partial(app.send_task, name, args, kwargs, **options))


def task_message(
    name: str,
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] = {},  # never changed
    *,
    queue: str = "celery",
    id: str | None = None,
    eta: datetime | None = None,
    expires: datetime | None = None,
    ignore_result: bool = False,
) -> Envelope:
    """Return a call of the task *name* as Celery stores it, to be published with brokerkit itself.

    ``await broker.publish(queue("celery"), task_message("shop.bill", (order.id,)))`` in a program without Celery's
    configuration; in a handler ``await message.publish(...)`` makes it one with the settlement of what is handled.
    """
    id = id or str(uuid.uuid4())
    headers, properties, body, _ = _plain_app().amqp.as_task_v2(
        id,
        name,
        list(args),
        dict(kwargs),
        eta=eta,
        expires=expires,
        ignore_result=ignore_result,
        root_id=id,
    )
    content_type, encoding, data = cast("tuple[str, str, str]", dumps(body, "json"))
    info = {"exchange": "", "routing_key": queue}
    return Envelope(
        body=data,
        content_type=content_type,
        content_encoding=encoding,
        headers=headers,
        properties={**properties, "delivery_mode": 2, "priority": 0, "delivery_info": info},
    )


def close(app: StockCelery) -> None:
    """Let go of the connection that *app* publishes with here."""
    sender: _Sender | None = vars(app).pop(_SENDER, None)
    if sender is not None:
        sender.close()


_nameless: list[Any] = []


def _plain_app() -> Any:
    if not _nameless:
        _nameless.append(StockCelery("brokerkit", set_as_current=False, autofinalize=False))
    return _nameless[0]


# ---------------------------------------------------------------------- how


async def _send(app: Any, call: Callable[..., Any], *, plain: bool = True) -> Result[Any]:
    app = getattr(app, "_get_current_object", lambda: app)()  # not the proxy that shared tasks have
    sender: _Sender | None = vars(app).get(_SENDER)
    if sender is None or sender.process != os.getpid():
        sender = vars(app)[_SENDER] = _Sender(app)
    return Result(await sender.send(call, plain), sender.watcher)


class _Sender:
    """What one app publishes with in this process."""

    def __init__(self, app: Any) -> None:
        self.process = os.getpid()
        self.watcher = Watcher(app)
        self._app = app
        self._lock = threading.Lock()
        self._producer: Any = None
        self._ours = True
        self._lines: WeakKeyDictionary[asyncio.AbstractEventLoop, _Line] = WeakKeyDictionary()

    async def send(self, call: Callable[..., Any], plain: bool) -> Any:
        """Make *call*, and return what it returns when all of its messages are stored."""
        loop = asyncio.get_running_loop()
        line = self._lines.get(loop)
        if line is None:
            line = self._lines[loop] = _Line()
        token = _async.set(True)
        try:
            if plain and self._ours:
                await line.turn()
                sent = self._now(call)
                if sent is not None:
                    result, out = sent
                    for frame in out:
                        await self._store(line, frame)
                    return result
            if over_rpc(self._app.backend):
                return await self.watcher.call(call)  # the answers come to the thread that asked
            return await line.in_thread(self._waiting, call)
        finally:
            _async.reset(token)

    def _now(self, call: Callable[..., Any]) -> tuple[Any, list[Frame]] | None:
        """Make *call* without waiting for anything; None if it would have had to wait."""
        if self._producer is None or self._app.conf.task_always_eager or not self._lock.acquire(blocking=False):
            return None
        out: list[Frame] = []
        token = frames.set(out)
        try:
            self._quiet()
            return call(producer=self._producer), out
        except WouldBlock:
            return None
        finally:
            frames.reset(token)
            self._lock.release()

    def _waiting(self, call: Callable[..., Any]) -> Any:
        """Make *call* in a thread, and prepare what later ones need."""
        self._quiet()
        if not self._ours or not self._lock.acquire(blocking=False):
            return call()
        try:
            if self._producer is None:
                connection = self._app.connection_for_write()
                if not isinstance(connection.transport, Transport):
                    self._ours = False
                    connection.release()
                    return call()
                self._producer = _Producer(connection)
            return call(producer=self._producer)
        finally:
            self._lock.release()

    def _quiet(self) -> None:
        """Have the result backend of this thread not subscribe to results that `Watcher` asks for."""
        backend: Any = self._app.backend
        stock = backend.on_task_call
        if over_rpc(backend) or hasattr(stock, _SENDER):
            return

        def on_task_call(producer: object, task_id: str) -> object:
            return None if _async.get() else stock(producer, task_id)

        setattr(on_task_call, _SENDER, True)
        backend.on_task_call = on_task_call

    async def _store(self, line: _Line, frame: Frame) -> None:
        """Publish *frame*, as often as Celery's configuration says."""
        conf = self._app.conf
        policy: Mapping[str, Any] = conf.task_publish_retry_policy or {}
        left = policy.get("max_retries", 3) if conf.task_publish_retry else 0
        pause = policy.get("interval_start", 0)
        while True:
            try:
                await line.send(frame)
            except CONNECTION_ERRORS as error:
                if left is not None:
                    left -= 1
                    if left < 0:
                        raise OperationalError(str(error)) from error
                await asyncio.sleep(pause)
                pause = min(pause + policy.get("interval_step", 0.2), policy.get("interval_max", 1))
            else:
                return

    def close(self) -> None:
        with self._lock:
            producer, self._producer = self._producer, None
        if producer is not None and self.process == os.getpid():
            producer.connection.release()


class _Producer(kombu.Producer):  # type: ignore[misc]  # it comes without types
    """Kombu's producer, for calls that must not wait, and that are many."""

    def __init__(self, connection: Any) -> None:
        super().__init__(connection, auto_declare=False)
        self._declared: dict[int, object] = {}
        """Queues and exchanges by their identity: that of Kombu's own memory is made of copies, at each publishing."""

    def revive(self, channel: Any) -> None:
        self._declared = {}
        super().revive(channel)

    def maybe_declare(self, entity: Any, retry: bool = False, **policy: Any) -> object:
        """Declare *entity* if that was not done here before."""
        if id(entity) in self._declared:
            return False
        declared: object = super().maybe_declare(entity, retry, **policy)
        if entity.can_cache_declaration:
            if len(self._declared) >= MANY:
                self._declared.clear()
            self._declared[id(entity)] = entity
        return declared

    def publish(self, body: Any, *args: Any, retry: bool = False, **options: Any) -> object:
        """Publish, which is tried again by `_Sender` where it is only collected here."""
        result: object = super().publish(body, *args, retry=retry and frames.get() is None, **options)
        return result


class _Line:
    """From one event loop to those of the bridges: all frames of a turn go in one step, and so do the answers."""

    # It does not know its loop, which would keep both of them for ever.

    def __init__(self) -> None:
        self.threads = anyio.CapacityLimiter(THREADS)
        self._out: dict[int, tuple[Loop, list[_Sent]]] = {}
        self._back: deque[_Sent] = deque()
        self._coming = False
        self._calls = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    async def in_thread(self, function: Callable[..., Any], *args: object) -> Any:
        """Return what *function* returns, which may block."""
        if is_green():  # threads that others start are greenlets, which this loop's thread never comes to
            return await asyncio.get_running_loop().run_in_executor(None, partial(copy_context().run, function, *args))
        return await anyio.to_thread.run_sync(function, *args, limiter=self.threads, abandon_on_cancel=True)

    async def turn(self) -> None:
        """Wait until Celery may be called: other tasks of the loop go on between each few calls."""
        if self._calls < AT_ONCE and not self._queue:
            self._count()
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(future)
        await future

    def _count(self) -> None:
        if not self._calls:
            asyncio.get_running_loop().call_soon(self._next_turn)
        self._calls += 1

    def _next_turn(self) -> None:
        self._calls = 0
        while self._queue and self._calls < AT_ONCE:
            future = self._queue.popleft()
            if not future.done():
                future.set_result(None)
                self._count()

    async def send(self, frame: Frame) -> None:
        """Have *frame* published on its bridge's loop, and wait for it."""
        loop = asyncio.get_running_loop()
        sent = _Sent(frame, loop.create_future())
        if not self._out:
            loop.call_soon(self._flush)
        self._out.setdefault(id(frame.bridge), (frame.bridge, []))[1].append(sent)
        await sent.future

    def _flush(self) -> None:
        out, self._out = self._out, {}
        for bridge, batch in out.values():
            bridge.post(self._publish, batch)

    def _publish(self, batch: list[_Sent]) -> None:  # on the bridge's loop
        loop = asyncio.get_running_loop()
        for sent in batch:
            sent.task = loop.create_task(sent.frame.function(*sent.frame.args))
            sent.task.add_done_callback(partial(self._done, sent))

    def _done(self, sent: _Sent, task: asyncio.Task[object]) -> None:
        self._back.append(sent)
        if not self._coming:
            self._coming = True
            task.get_loop().call_soon(self._answer, sent.future.get_loop())

    def _answer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._coming = False  # what came back may be settled by now, with what came before: it is no way to the loop
        with suppress(RuntimeError):  # the caller's loop has ended
            loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:  # on the caller's loop
        while self._back:
            sent = self._back.popleft()
            task, future = sent.task, sent.future
            assert task is not None
            if task.cancelled():
                future.cancel()
                continue
            error = task.exception()
            if future.done():
                continue  # the caller was cancelled meanwhile
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)


class _Sent:
    """A frame under way."""

    __slots__ = ("frame", "future", "task")

    def __init__(self, frame: Frame, future: asyncio.Future[None]) -> None:
        self.frame = frame
        self.future = future
        self.task: asyncio.Task[object] | None = None
