"""Messages as handlers and readers see them.

`Stored` is a message to look at, `Message` one in hand that can be settled, `Letter` a dead one.  What settling does is
decided by the `Settler` behind a message, so this module knows neither brokers nor drivers' connections.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final, Generic, Literal, Protocol, cast, final, overload

import msgspec
from typing_extensions import TypeVar

from .address import Outgoing, Queue, Topic
from .driver import DEAD, Delivery, Record, StoredRecord
from .errors import AlreadySettled
from .policy import RetryPolicy

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

CONTENT_TYPE: Final = "bk-content-type"
FIRST_FAILED: Final = "bk-first-failed"
_UNREAD: Final = object()
_RETRY: Final = RetryPolicy()


@final
class Outcome(msgspec.Struct, frozen=True):
    """How a message was settled.  *delay* belongs to a nack, *reason* to a reject; a release counts no attempt."""

    kind: Literal["ack", "nack", "reject", "release"]
    delay: float = 0.0
    reason: str = ""


_ACK: Final = Outcome("ack")
_RELEASE: Final = Outcome("release")


class Reader(Protocol):
    """Reads the body of a record: the codec that an address is bound to."""

    def read(self, record: Record) -> object:
        """Return the value, or raise `DecodeError`."""
        ...


class Settler(Protocol):
    """What settles messages: a subscription, or a recorder in tests."""

    async def settle(self, message: Message[Any], outcome: Outcome, confirm: bool) -> None:
        """Carry *outcome* out; with *confirm* return when it is stored."""
        ...

    async def failed(self, message: Message[Any], error: BaseException, retry: RetryPolicy) -> None:
        """Settle *message* as its failed attempt demands: retry, or dead letter."""
        ...

    async def stage(self, message: Message[Any], item: Outgoing[object]) -> Record:
        """Check and encode *item*, to be stored with the acknowledgement of *message*."""
        ...

    def check(self, outcome: Outcome) -> None:
        """Raise if messages of this settler cannot have *outcome*."""
        ...


class Stored(Generic[T_co]):
    """A message to look at: what `Broker.browse` yields."""

    __slots__ = ("_headers", "_item", "_reader", "_value")

    def __init__(self, item: StoredRecord | Delivery, reader: Reader) -> None:
        self._item = item
        self._reader = reader
        self._value: object = _UNREAD
        self._headers: Mapping[str, str] | None = None

    @property
    def value(self) -> T_co:
        """The payload.

        Raises:
            DecodeError: the body is not what the address says.
        """
        value: Any = self._value
        if value is _UNREAD:
            value = self._value = self._reader.read(self._item.record)
        return value  # type: ignore[no-any-return]

    @property
    def body(self) -> bytes:
        """The payload as it is stored; empty for a Kafka null."""
        return self._item.record.body or b""

    @property
    def key(self) -> str | None:
        """The key; bytes that are not UTF-8 are kept as lone surrogates (PEP 383)."""
        key = self._item.record.key
        return None if key is None else key.decode("utf-8", "surrogateescape")

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers set by the publisher.  Of a name that comes twice the last counts."""
        if self._headers is None:
            self._headers = {
                name: value.decode("utf-8", "surrogateescape")
                for name, value in self._item.record.headers
                if not name.startswith("bk-")
            }
        return self._headers

    @property
    def id(self) -> str:
        """What identifies the message; every copy of it (retry, dead letter, redrive) has the same."""
        return self._item.record.id

    @property
    def timestamp(self) -> datetime:
        """When it was first published, by the publisher's clock; aware, in UTC."""
        return datetime.fromtimestamp(self._item.record.timestamp, UTC)

    @property
    def attempt(self) -> int:
        """1 for the first run of a handler, one more after each failed run."""
        return self._item.record.attempts + 1

    @property
    def deliveries(self) -> int:
        """How often it was handed to a consumer, this time included; restarts and crashes raise it, releases do not."""
        return self._item.deliveries

    @property
    def position(self) -> str:
        """Where it is stored, for `Start.position`."""
        return self._item.position

    @property
    def native(self) -> object:
        """The client library's own message, or None: for code that is willing to depend on it."""
        return self._item.native if isinstance(self._item, Delivery) else None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._item.record.address.name} id={self.id} attempt={self.attempt}>"


@final
class Message(Stored[T_co]):
    """A message in hand: this subscription owns it until it is settled.

    A service settles what its handler leaves unsettled: a return acknowledges, an exception retries.  By hand, settle each
    message once, or use `process`.  Methods may be called from any task of the event loop.
    """

    __slots__ = (
        "__weakref__",
        "_attempts",
        "_cleared",
        "_first_failed",
        "_outcome",
        "_published",
        "_settler",
        "_single",
        "_staged",
    )

    def __init__(self, item: Delivery, reader: Reader, settler: Settler, attempts: int) -> None:
        self._item = item
        self._reader = reader
        self._value = _UNREAD
        self._headers = None
        self._settler = settler
        self._attempts = attempts
        self._outcome: Outcome | None = None
        self._staged: list[Record] | None = None
        self._published: list[Outgoing[object]] | None = None
        self._first_failed: float | None = None
        self._single = False
        self._cleared = False

    @property
    def attempt(self) -> int:
        """1 for the first run of a handler, one more after each failed run."""
        return self._attempts + 1

    @property
    def outcome(self) -> Outcome | None:
        """How the message was settled, or None while it is not."""
        return self._outcome

    @property
    def published(self) -> Sequence[Outgoing[object]]:
        """What `publish` has staged on this message."""
        return tuple(self._published or ())

    async def ack(self, confirm: bool = False) -> None:
        """Settle the message as done.

        Returns at once and the acknowledgement follows; with *confirm* it returns when the acknowledgement is stored.  Doing
        it again is no error.  Cancelling does not take it back.

        Raises:
            AlreadySettled: it has another outcome.
            DeliveryLost: with *confirm*: the message belongs to another consumer by now.
            BrokerUnavailable: with *confirm*: no answer; it may be called again.
            Closed: the subscription has ended.
        """
        await self._settle(_ACK, confirm)

    async def nack(self, delay: float = 0) -> None:
        """Have the message run again in *delay* seconds, as a failed attempt; after the last one it is dead-lettered.

        Raises:
            ValueError: above 60 s on a topic, where the message holds its key meanwhile.
            AlreadySettled: it has another outcome.
        """
        await self._settle(Outcome("nack", delay=delay), False)

    async def reject(self, reason: str) -> None:
        """Dead-letter the message at once.

        Raises:
            AlreadySettled: it has another outcome.
        """
        await self._settle(Outcome("reject", reason=reason), False)

    async def release(self) -> None:
        """Hand the message back at once, for any consumer to run.  It counts neither as an attempt nor as a delivery.

        Of a topic, what waits behind its key goes back too.  Of an ephemeral reader nothing is owned, so nothing happens.

        Raises:
            AlreadySettled: it has another outcome.
        """
        await self._settle(_RELEASE, False)

    async def _settle(self, outcome: Outcome, confirm: bool) -> None:
        before = self._outcome
        if before is None:
            self._settler.check(outcome)
            self._outcome = outcome
        elif before.kind != outcome.kind:
            raise AlreadySettled(f"message {self.id} has the outcome {before.kind} already")
        elif not confirm:
            return
        await self._settler.settle(self, outcome, confirm)

    def process(self, retry: RetryPolicy = _RETRY) -> AbstractAsyncContextManager[None]:
        """Settle the message by how the block ends: ack at its end; an exception retries, then dead-letters.

        The exception ends here; it is logged and, at last, kept in the dead letter.  Cancellation hands the message back
        without counting an attempt, and goes on.  A message that the block settles itself keeps that outcome.
        """
        return self._process(retry)

    @asynccontextmanager
    async def _process(self, retry: RetryPolicy) -> AsyncGenerator[None]:
        try:
            yield
        except Exception as error:
            if self._outcome is None:
                await self._settler.failed(self, error, retry)
        except BaseException:
            if self._outcome is None:
                await self._settle(_RELEASE, False)
            raise
        else:
            if self._outcome is None:
                await self.ack()

    @overload
    async def publish(
        self,
        address: Topic[T],
        value: T,
        *,
        key: str | bytes | None = None,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None: ...
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
    ) -> None: ...
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
    ) -> None:
        """Publish together with this message's acknowledgement.

        Checked and encoded at once; stored only when the message is acknowledged, and dropped on a retry, a reject and a
        release.  Options are those of `Broker.publish`.

        Raises:
            AlreadySettled: the message is settled.
            ConfigError: it belongs to an ephemeral reader, which settles nothing.
        """
        if self._outcome is not None:
            raise AlreadySettled(f"message {self.id} is settled: it can publish no more")
        item: Outgoing[object] = Outgoing(address, value, key, id, headers, delay, ttl, priority)
        record = await self._settler.stage(self, item)
        if self._outcome is not None:
            raise AlreadySettled(f"message {self.id} was settled meanwhile: this is not published")
        if self._staged is None:
            self._staged = []
            self._published = []
        self._staged.append(record)
        cast("list[Outgoing[object]]", self._published).append(item)


@final
class Dead(msgspec.Struct, frozen=True):
    """Why a message died.

    *reason* says it in words, *error* is the class name of the last exception and *text* its text with secrets masked.
    *attempts* is how many handler runs failed, *origin* the address that it came from, and *group* the topic's group.
    """

    reason: str
    error: str
    text: str
    attempts: int
    first_failed: datetime
    last_failed: datetime
    origin: str
    group: str | None


@final
class Letter(Stored[T_co]):
    """A dead letter.  `body` is always there; `value` may raise `DecodeError`."""

    __slots__ = ()

    @property
    def attempt(self) -> int:
        """The number of the last run of a handler; 1 also where none began."""
        return max(1, self._item.record.attempts)

    @property
    def dead(self) -> Dead:
        """Why it died."""
        notes = {
            name[len(DEAD) :]: value.decode("utf-8", "replace")
            for name, value in self._item.record.headers
            if name.startswith(DEAD)
        }
        return Dead(
            reason=notes.get("reason", ""),
            error=notes.get("error", ""),
            text=notes.get("text", ""),
            attempts=_whole(notes.get("attempts")),
            first_failed=_time(notes.get("first"), self.timestamp),
            last_failed=_time(notes.get("last"), self.timestamp),
            origin=notes.get("origin", ""),
            group=notes.get("group"),
        )


def _whole(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) <= 9 else 0


def _time(text: str | None, otherwise: datetime) -> datetime:
    try:
        return datetime.fromtimestamp(float(text or ""), UTC)
    except (ValueError, OverflowError, OSError):
        return otherwise
