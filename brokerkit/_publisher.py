"""What a broker publishes: messages, many of them, and requests."""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop as running_loop  # None after a fork, instead of an error
from builtins import id as id_of
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, cast, overload

import anyio
from typing_extensions import TypeVar

from ._binding import check_timeout
from ._connection import Connection
from ._publishing import CHUNK, Chunks, Result, Sending, resend, send
from ._requests import Inbox
from .address import Address, Outgoing, Queue, Reply, Topic
from .driver import Receipt, Record
from .errors import BrokerError, BrokerUnavailable, Closed, ConfigError
from .message import CONTENT_TYPE
from .policy import backoff

T = TypeVar("T")
R = TypeVar("R")
P = TypeVar("P")


class Publisher(Connection):
    """The publishing half of a broker."""

    @overload
    async def publish(
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
    async def publish(
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
    async def publish(
        self,
        address: Topic[Any] | Queue[Any, Any],
        value: object,
        *,
        key: str | bytes | None = None,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float | datetime = 0,
        ttl: float | None = None,
        priority: int = 0,
        timeout: float = 30,
    ) -> Receipt:
        """Publish *value* and return when it is stored.

        Messages of a topic with equal *key* stay in order.  *id* identifies the message, it never deduplicates by itself.
        *delay* is seconds, never early, or an aware datetime by this machine's clock; after *ttl* seconds the message is
        dropped; higher *priority* goes first.  What is certainly not stored is sent again until *timeout* seconds are over.
        Cancelling leaves it open whether the message is stored.

        Raises:
            PublishUnknown: no answer in time; the message may be stored.
            BrokerUnavailable, BufferFull: not stored.
            EncodeError, TooLarge, ConfigError, CapabilityError: not sent.
            NotFound: the address does not exist.
        """
        if running_loop() is not self._gate:
            self._check()
        bound = self._known.get(id_of(address))
        if bound is None:
            until = self._clock.monotonic() + check_timeout(timeout)
            bound = await self._in_time(until, partial(self._publishable, address), address)
            timeout = max(until - self._clock.monotonic(), 0.001)
        if id is None and headers is None and ttl is None and delay == 0 and priority == 0:
            record = self._records.simple(bound, value, key)
        else:
            record = self._records.make(bound, value, key, id, headers, delay, ttl, priority)
        if timeout != 30:
            check_timeout(timeout)
        result: Result = (await self._driver.publish((record,), timeout=timeout))[0]
        if type(result) is Receipt:
            return result
        return await self._publish_again(record, result, timeout)

    async def _publish_again(self, record: Record, result: Result, timeout: float) -> Receipt:
        # The hot path looks at no second clock: the record knows when it was made.
        spent = min(max(self._clock.time() - record.timestamp, 0.0), timeout)
        until = self._clock.monotonic() + timeout - spent
        last = (await resend(self._driver, self._clock, (record,), (result,), until, self._bindings.restore))[0]
        if isinstance(last, BrokerError):
            raise last
        return last

    @overload
    async def publish_many(
        self, address: Topic[T] | Queue[T, Any], values: Iterable[T], *, timeout: float = 30
    ) -> list[Receipt | BrokerError]: ...
    @overload
    async def publish_many(
        self, address: Topic[T] | Queue[T, Any], values: Iterable[Outgoing[T]], *, timeout: float = 30
    ) -> list[Receipt | BrokerError]: ...
    async def publish_many(
        self, address: Topic[Any] | Queue[Any, Any], values: Iterable[Any], *, timeout: float = 30
    ) -> list[Receipt | BrokerError]:
        """Publish *values*, or items of ``address.outgoing(...)``, in order; return one receipt or error each.

        A bad item fails alone.  After one that could not be stored, later ones of the same key are `NotAttempted`.
        """
        self._check()
        until = self._clock.monotonic() + check_timeout(timeout)
        bound = self._bindings.get(address)
        if bound is None:
            bound = await self._in_time(until, partial(self._publishable, address), address)
        records: list[Record] = []
        indices: list[int] = []
        results: list[Receipt | BrokerError] = []
        make, simple = self._records.outgoing, self._records.simple
        left = max(until - self._clock.monotonic(), 0.001)
        sending = Sending(self._driver, self._clock, left, self._bindings.restore)
        waiting = Closed("not sent yet")
        async with Chunks(sending, results) as chunks:
            for item in values:
                try:
                    outgoing = _as_outgoing(item)
                    if outgoing is not None:
                        if outgoing.address != address:
                            raise ConfigError(f"an item for {outgoing.address!r} in publish_many of {address!r}")
                        record = make(bound, outgoing)
                    else:
                        record = simple(bound, item, None)
                except BrokerError as error:
                    results.append(error)
                    continue
                indices.append(len(results))
                results.append(waiting)
                records.append(record)
                if len(records) == CHUNK:
                    await chunks.begin(records, indices)
                    records, indices = [], []
            await chunks.end(records, indices)
        return results

    async def request(
        self, queue: Queue[T, Reply[R]], value: T, *, timeout: float, headers: Mapping[str, str] | None = None
    ) -> R:
        """Publish *value* to a queue that replies and return the answer.

        The request expires with *timeout* (seconds), so nobody works on what nobody waits for.

        Raises:
            RequestTimeout: nobody answered in time.
            RemoteError: the replier failed for good; its text is redacted.
            DecodeError: the answer is not of the queue's reply type.
        """
        self._check()
        until = self._clock.monotonic() + check_timeout(timeout)
        bound = self._bindings.get(queue)
        if bound is None:
            bound = await self._in_time(until, partial(self._publishable, queue), queue)
        if bound.reply_codec is None:
            raise ConfigError(f"{queue!r} does not reply: declare it with reply=")
        inbox = self._inbox
        if inbox is None:
            inbox = await self._in_time(until, self._open_inbox, queue)
        correlation, mine = inbox.headers()
        try:
            left = max(until - self._clock.monotonic(), 0.001)
            plain = self._records.make(bound, value, headers=headers, ttl=left)
            record = Record(
                plain.address, plain.id, plain.body, None, (*plain.headers, *mine), plain.timestamp, ttl=plain.ttl
            )
            sent = (await send(self._driver, self._clock, (record,), left, self._bindings.restore))[0]
            if isinstance(sent, BrokerError):
                raise sent
            left = max(until - self._clock.monotonic(), 0.001)
            answer = await inbox.reply(correlation, left, repr(queue), timeout)
        finally:
            inbox.forget(correlation)
        types = {name: content.decode("utf-8", "replace") for name, content in answer.headers}
        return cast(R, bound.reply_codec.decode(answer.body, types.get(CONTENT_TYPE), {}))

    async def _in_time(self, until: float, prepare: Callable[[], Awaitable[P]], address: Address) -> P:
        """Return what *prepare* does, the first time that *address* is used, trying again until *until* as publishing does."""
        failures = 0
        last: BrokerError | None = None
        try:
            async with asyncio.timeout(max(until - self._clock.monotonic(), 0.001)):
                while True:
                    try:
                        return await prepare()
                    except BrokerError as error:
                        if not error.retryable:
                            raise
                        last = error
                    failures += 1
                    await asyncio.sleep(backoff(failures, initial=0.02, longest=1.0))
        except TimeoutError:
            raise last or BrokerUnavailable(f"no answer in time about {address!r}; nothing was sent") from None

    async def _open_inbox(self) -> Inbox:
        if self._inbox is None:
            async with self._inbox_lock:
                if self._inbox is None:
                    self._inbox = await self._make_inbox()
        return self._inbox

    async def _make_inbox(self) -> Inbox:
        with anyio.CancelScope() as self._opening:
            if not self._leaving:
                inbox = Inbox(await self.replies(), self.env())
                await inbox.open()
                return inbox
        raise Closed(f"{self!r} is closed")


def _as_outgoing(item: object) -> Outgoing[Any] | None:
    return item if isinstance(item, Outgoing) else None  # pyright: ignore[reportUnknownVariableType]
