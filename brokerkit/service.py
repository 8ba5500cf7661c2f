"""Services: handlers, what they subscribe to, and how they run.

A service is a plain value made at import; it meets a broker only in `Service.running` or `run`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, overload

from typing_extensions import TypeVar

from ._registration import Member, Registration
from ._running import Running
from .address import Queue, Reply, Topic, check_name
from .broker import Broker
from .errors import ConfigError
from .message import Message
from .policy import (
    EVERY_REPLICA,
    MAX_CONCURRENCY,
    MAX_PREFETCH,
    TOPIC_WAIT,
    Batch,
    EveryReplica,
    RetryPolicy,
    Start,
    seconds,
    whole,
)

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S", default=None)
S1 = TypeVar("S1")

_DEFAULT_RETRY = RetryPolicy()


class Handles(Generic[T, S1, R]):
    """The decorator: takes a handler of (message) or (message, resources), ``async def`` or ``def``, and gives it back."""

    def __init__(self, register: Callable[[Callable[..., object]], None]) -> None:
        self._register = register

    @overload
    def __call__(self, handler: Callable[[T], Coroutine[Any, Any, R]], /) -> Callable[[T], Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(
        self, handler: Callable[[T, S1], Coroutine[Any, Any, R]], /
    ) -> Callable[[T, S1], Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(self, handler: Callable[[T], R], /) -> Callable[[T], R]: ...
    @overload
    def __call__(self, handler: Callable[[T, S1], R], /) -> Callable[[T, S1], R]: ...
    def __call__(self, handler: Callable[..., Any], /) -> Callable[..., Any]:
        self._register(handler)
        return handler


class Service(Generic[S]):
    """Handlers that run together.  *name* is the durable group of its topic subscriptions.

    *lifespan* takes no arguments and returns an async context manager, entered once for each `running`; what it yields is
    passed to handlers that have a second required positional parameter.
    """

    @overload
    def __init__(self: Service[None], name: str) -> None: ...
    @overload
    def __init__(self, name: str, *, lifespan: Callable[[], AbstractAsyncContextManager[S]]) -> None: ...
    def __init__(self, name: str, *, lifespan: Callable[[], AbstractAsyncContextManager[Any]] | None = None) -> None:
        self._name = check_name(name, "service name")
        if lifespan is not None and not callable(lifespan):
            raise ConfigError(f"Service({name!r}): lifespan must be a function that returns an async context manager")
        if isinstance(lifespan, AbstractAsyncContextManager):
            raise ConfigError(f"Service({name!r}): pass the lifespan's function itself, without calling it")
        if inspect.isgeneratorfunction(lifespan) or inspect.isasyncgenfunction(lifespan):
            raise ConfigError(
                f"Service({name!r}): the lifespan is a generator: it needs @asynccontextmanager before it"
            )
        self.lifespan = lifespan
        """The function that gives the resources, or None."""
        self.registrations: list[Registration] = []
        """The service's own subscriptions."""
        self.included: list[Service[Any]] = []
        """The services taken in by `include`."""
        self._running: list[Running] = []

    @property
    def name(self) -> str:
        """The name, which is also the group of topic subscriptions."""
        return self._name

    def __repr__(self) -> str:
        return f"<Service {self._name} handlers={len(self.registrations)}>"

    @overload
    def subscribe(
        self,
        address: Topic[T],
        *,
        group: str | EveryReplica = ...,
        start: Start | None = None,
        concurrency: int = 1,
        prefetch: int = ...,
        retry: RetryPolicy = ...,
        max_deliveries: int = 10,
        timeout: float | None = 900,
        batch: None = None,
    ) -> Handles[Message[T], S, None]: ...
    @overload
    def subscribe(
        self,
        address: Topic[T],
        *,
        group: str | EveryReplica = ...,
        start: Start | None = None,
        concurrency: int = 1,
        prefetch: int = ...,
        retry: RetryPolicy = ...,
        max_deliveries: int = 10,
        timeout: float | None = 900,
        batch: Batch,
    ) -> Handles[Sequence[Message[T]], S, None]: ...
    @overload
    def subscribe(
        self,
        address: Queue[T, Reply[R]],
        *,
        concurrency: int = 1,
        prefetch: int = ...,
        retry: RetryPolicy = ...,
        max_deliveries: int = 10,
        timeout: float | None = 900,
    ) -> Handles[Message[T], S, R]: ...
    @overload
    def subscribe(
        self,
        address: Queue[T],
        *,
        concurrency: int = 1,
        prefetch: int = ...,
        retry: RetryPolicy = ...,
        max_deliveries: int = 10,
        timeout: float | None = 900,
        batch: None = None,
    ) -> Handles[Message[T], S, None]: ...
    @overload
    def subscribe(
        self,
        address: Queue[T],
        *,
        concurrency: int = 1,
        prefetch: int = ...,
        retry: RetryPolicy = ...,
        max_deliveries: int = 10,
        timeout: float | None = 900,
        batch: Batch,
    ) -> Handles[Sequence[Message[T]], S, None]: ...
    def subscribe(
        self,
        address: Topic[Any] | Queue[Any, Any],
        *,
        group: str | EveryReplica | None = None,
        start: Start | None = None,
        concurrency: int = 1,
        prefetch: int | None = None,
        retry: RetryPolicy = _DEFAULT_RETRY,
        max_deliveries: int = 10,
        timeout: float | None = 900,
        batch: Batch | None = None,
    ) -> Handles[Any, Any, Any]:
        """Return a decorator that subscribes a handler to *address*.

        A topic is read by the durable *group*, the service's name unless given, from EARLIEST; `EVERY_REPLICA` makes each
        process read all of it.  *concurrency* handlers run at once, of each key of a topic one.  *prefetch* messages are
        owned at once: twice the concurrency and at least 16, unless given.  *retry* decides what follows a failure,
        *max_deliveries* is a guard against messages that crash their process.  A handler over its *timeout* (seconds) is
        cancelled, and has failed.  *batch* hands over several messages in one call.

        A handler that returns acknowledges; the value it returns is the reply on a queue that replies.  ``def`` handlers run
        in a thread.

        Raises:
            ConfigError: an option is out of range, or not for this kind of address.
        """
        where = f"{self._name}.subscribe({address!r})"
        if not isinstance(address, (Topic, Queue)):
            raise ConfigError(f"{where}: subscribe to a Topic or a Queue")
        if isinstance(address, Queue) and (group is not None or start is not None):
            raise ConfigError(f"{where}: group and start are options of topics")
        if isinstance(group, str):
            check_name(group, "group name")
        elif group is not None and group is not EVERY_REPLICA:
            raise ConfigError(f"{where}: group must be a name or EVERY_REPLICA, not {group!r}")
        if start is not None and not isinstance(start, Start):
            raise ConfigError(f"{where}: start must be a Start, like Start.EARLIEST, not {start!r}")
        whole(f"{where}: concurrency", concurrency, low=1, high=MAX_CONCURRENCY)
        whole(f"{where}: max_deliveries", max_deliveries, low=1, high=1_000_000)
        if timeout is not None and seconds(f"{where}: timeout", timeout) <= 0:
            raise ConfigError(f"{where}: timeout must be more than 0 seconds, or None")
        _check_retry(where, address, retry)
        if batch is not None:
            if not isinstance(batch, Batch):
                raise ConfigError(f"{where}: batch must be a Batch, not {batch!r}")
            if isinstance(address, Queue) and address.reply is not None:
                raise ConfigError(f"{where}: a queue that replies has no batch handlers")
        held = _prefetch(where, prefetch, concurrency, batch)

        def register(handler: Callable[..., object]) -> None:
            if self._running:
                raise ConfigError(f"{where}: {self!r} is running, and would not call it: subscribe before that")
            wants = _wants_resources(where, handler, has_lifespan=self.lifespan is not None)
            self.registrations.append(
                Registration(
                    address=address,
                    handler=handler,
                    name=getattr(handler, "__qualname__", None) or type(handler).__name__,
                    group=None if isinstance(address, Queue) else group or self._name,
                    start=start,
                    concurrency=concurrency,
                    prefetch=held,
                    retry=retry,
                    max_deliveries=max_deliveries,
                    timeout=timeout,
                    batch=batch,
                    wants_resources=wants,
                    plain=not _is_async(handler),
                )
            )

        return Handles(register)

    def include(self, other: Service[Any], /) -> None:
        """Run *other*'s handlers too, with their own name, group, lifespan and resources.

        Raises:
            ConfigError: a service would include itself.
        """
        if not isinstance(other, Service):
            raise ConfigError(f"include a Service, not {other!r}")
        if self in other.everything() or other in self.included:
            raise ConfigError(f"{self!r} includes {other!r} already, or would include itself")
        if self._running:
            raise ConfigError(f"{self!r} is running, and would not run {other!r}: include it before that")
        self.included.append(other)

    def everything(self) -> Iterator[Service[Any]]:
        """Iterate over this service and all that it includes, each once."""
        seen: list[Service[Any]] = []
        todo: list[Service[Any]] = [self]
        while todo:
            service = todo.pop(0)
            if service not in seen:
                seen.append(service)
                todo.extend(service.included)
                yield service

    def running(self, broker: Broker, *, drain: float = 25) -> Running:
        """Run all handlers on *broker* for as long as the ``async with`` lasts.

        Entered when every subscription is ready.  Leaving drains: nothing more is received, what has not started is handed
        back, running handlers get *drain* seconds to finish and are cancelled then, outcomes are stored.

        Raises:
            ConfigError: no handlers, no broker, or an address in two forms.
            CapabilityError: the backend cannot honour an option.
            NotFound, SettingsMismatch: with ``declare="check"``.
        """
        if not isinstance(broker, Broker):
            raise ConfigError(
                f"a service runs on a broker, as connect(url) returns it, not on a {type(broker).__name__}"
            )
        services = list(self.everything())
        members = [Member(service.name, service.lifespan, service.registrations) for service in services]
        registers = [service._running for service in services]
        return Running(members, broker, seconds("drain", drain, high=86400.0), registers)

    def stop(self) -> None:
        """Begin to drain: may be called from a handler or a signal handler of the same event loop.

        A service that another one includes stops together with it.
        """
        for running in list(self._running):
            running.stop()


def _prefetch(where: str, prefetch: int | None, concurrency: int, batch: Batch | None) -> int:
    most = 0 if batch is None else batch.max
    if prefetch is None:
        return min(MAX_PREFETCH, max(16, 2 * concurrency, concurrency * most + most))
    whole(f"{where}: prefetch", prefetch, low=1, high=MAX_PREFETCH)
    if prefetch < most:
        raise ConfigError(f"{where}: a prefetch of {prefetch} never fills a batch of {most}")
    return prefetch


def _check_retry(where: str, address: object, retry: RetryPolicy) -> None:
    if not isinstance(retry, RetryPolicy):
        raise ConfigError(f"{where}: retry must be a RetryPolicy, not {retry!r}")
    if isinstance(address, Topic):
        for name in ("wait_initial", "wait_max"):
            wait: float | None = getattr(retry, name)
            if wait is not None and wait > TOPIC_WAIT and (name == "wait_max" or retry.wait_max is None):
                raise ConfigError(
                    f"{where}: {name}={wait:g}: a topic's message holds its key while it waits, at most 60 s"
                )


def _is_async(handler: Callable[..., object]) -> bool:
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004


def _wants_resources(where: str, handler: Callable[..., object], *, has_lifespan: bool) -> bool:
    if not callable(handler):
        raise ConfigError(f"{where}: the handler {handler!r} is no function")
    if inspect.isgeneratorfunction(handler) or inspect.isasyncgenfunction(handler):
        raise ConfigError(f"{where}: the handler {handler!r} is a generator; a handler returns once")
    try:
        parameters = list(inspect.signature(handler).parameters.values())
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    keyword = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    variable = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if keyword or len(required) > 2 or (not positional and not variable):
        raise ConfigError(
            f"{where}: a handler takes (message) or (message, resources), not {inspect.signature(handler)}"
        )
    if len(required) == 2 and not has_lifespan:
        raise ConfigError(f"{where}: the handler wants resources, but the service has no lifespan")
    return len(required) == 2
