"""The contract between brokerkit and a message system.

Application code never imports this module; drivers do.  What can be written once (codecs, retries, dead letters, request and
reply, order per key under concurrency, reconnecting, handlers) lives above it.  `brokerkit.testing.conformance` checks every
sentence here that says "must".

Names with ``..`` are derived (dead letters, redrive queues, replies): they need no declaration.  What is first stored at such
an address must create it, and a consumer of one that does not exist yet must wait for it.

Durations are seconds, points in time are seconds since the Unix epoch.  Every error that leaves a driver is a `BrokerError`
with the client library's own error as its cause.  Methods may be called concurrently unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Protocol, Self, TypeAlias

import msgspec

from .address import Address, AnyDeadLetters, AnyQueue
from .errors import BrokerError
from .policy import Start

Headers: TypeAlias = tuple[tuple[str, bytes], ...]


class Record(msgspec.Struct, frozen=True, gc=False):
    """One message as bytes."""

    address: Address
    id: str
    body: bytes | None
    """None only in topics that others write to (a Kafka null)."""
    key: bytes | None = None
    """Records of a topic with equal keys are in the same partition, in publish order."""
    headers: Headers = ()
    """In order.  Names beginning with ``bk-`` are brokerkit's own."""
    timestamp: float = 0.0
    """When it was first published, by the publisher's clock.  Copies keep it."""
    delay: float = 0.0
    """Queues: must not be delivered before so many seconds after the system accepted it."""
    ttl: float | None = None
    """Queues: seconds after acceptance from which it must not be delivered; see *expires*."""
    expires: float | None = None
    """The same as a point in time by the system's clock.  A driver sets it on acceptance and in deliveries, so that copies
    keep it; where both are set *expires* counts."""
    priority: int = 0
    attempts: int = 0
    """Handler runs that have failed so far."""
    deliveries: int = 0
    """Ownerships of earlier copies, to which the system's count is added."""


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """A record handed to one consumer, which owns it until it is settled, released or lost."""

    record: Record
    token: object
    """Identifies this very delivery to `Consumer.settle`."""
    position: str
    """Where the record is; opaque to everybody but the driver, and never reused within its address."""
    deliveries: int = 1
    """Ownerships including this one.  One that ended with `Consumer.release` does not count."""
    native: object = None
    """The client library's own message, if there is one."""


class StoredRecord(msgspec.Struct, frozen=True, gc=False):
    """A record to look at, owned by nobody."""

    record: Record
    position: str
    deliveries: int = 0


class Settlement(msgspec.Struct, frozen=True, gc=False):
    """The outcome of a delivery: *publish* is stored, then the delivery is acknowledged.

    An acknowledgement publishes nothing; a retry or a dead letter publishes one copy; replies and staged messages ride along.
    """

    delivery: Delivery
    publish: tuple[Record, ...] = ()


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """Proof that a message is stored, as durably as its backend promises."""

    id: str
    position: str | None = None
    """Where it is stored, if the backend tells: for `Start.position` on a topic."""
    duplicate: bool = False
    """A queue with ``dedup=`` had this id already; the message was not stored again."""


class Source(msgspec.Struct, frozen=True):
    """What one consumer reads.

    *group* is None for a queue, and for an ephemeral reader of a topic, which sees every record, keeps no position and must
    leave nothing behind.  *start* holds only while the group has no position yet.
    """

    address: Address
    group: str | None = None
    start: Start = Start.EARLIEST
    until_end: bool = False
    """End after the records that were there on entering; see `Consumer.ended`."""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a system honours for one address.  What is false is refused above the contract with `CapabilityError`."""

    backend: str
    """Its name in error texts."""
    durable: bool = False
    """Records survive a restart of the system."""
    replay: bool = False
    """Topics: `Start.at`, `Start.position`, and reading again what a group has read."""
    key_order: bool = False
    """Topics: records of a key stay in order."""
    delay: bool = False
    priority: bool = False
    ttl: bool = False
    dedup: bool = False
    shared: bool = False
    """More consumers than partitions take part."""
    atomic: bool = False
    """`Consumer.settle` applies both effects of a settlement or none."""
    migrate: bool = False


class Backlog(msgspec.Struct, frozen=True, kw_only=True):
    """What is left to do.  None where the system cannot tell; counts are approximate while others are busy."""

    waiting: int | None = None
    """Ready to be delivered."""
    in_flight: int | None = None
    """Delivered and not settled."""
    delayed: int | None = None
    """Waiting for their time."""
    dead: int | None = None
    """In the dead letters."""
    oldest_age: float | None = None
    """Seconds since the oldest unsettled message was published; None if there is none."""


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Whether everything that should run does.  *problems* has one line for each thing that does not."""

    ok: bool
    problems: tuple[str, ...] = ()
    connected: bool = True
    """Whether the message system has just answered: if so, the problems are those of some consumers."""


Revoked: TypeAlias = Callable[[Sequence[Delivery]], Awaitable[None]]


class Consumer(Protocol):
    """A reader of one source, yielded by `Driver.consume`."""

    @property
    def prefetch(self) -> int:
        """Credit: the consumer must never hold more unsettled deliveries than this.

        It may be changed while entered; lowering it takes nothing back.  An attribute will do.
        """
        ...

    @prefetch.setter
    def prefetch(self, value: int) -> None:
        """Change it."""
        ...

    @property
    def ended(self) -> bool:
        """With ``Source.until_end``: whether every record that was there on entering has been handed out."""
        ...

    @property
    def cursor(self) -> str | None:
        """Ephemeral readers: where reading goes on, in all partitions at once; None for queues and groups.

        `Start.position` of it must begin behind everything that was received, and nowhere else, on any connection.
        """
        ...

    @property
    def owned_until(self) -> float:
        """Until when, on the loop's monotonic clock, what it holds is certainly its own; infinity where nothing runs out.

        Nothing is started after that: a process that was frozen would otherwise begin what others have done meanwhile.
        """
        ...

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery]:
        """Return 1 to *limit* deliveries, or none after *timeout* seconds or at the end of an ``until_end`` source.

        Called by one task at a time.  Cancelling it must lose nothing: the records come out of a later call.  A record
        delivered for the third time or more without an outcome must come alone, and nothing else is handed to this consumer
        until it is settled or released; what was fetched with it is handed back without counting a delivery.  A queue's
        holds up others for one lease of the queue only: then they come beside it at once, and the next that must come
        alone may do so when nothing is in hand but what was for a lease.

        Raises:
            BrokerUnavailable: the connection is gone; leave the consumer and enter a new one.
            PositionLost: records were removed before they could be read.  The next call goes on behind them.
        """
        ...

    async def settle(self, items: Sequence[Settlement], *, confirm: bool = False) -> Sequence[BrokerError | None]:
        """Store the records of each item, then acknowledge its delivery.  One result per item, in order; None is success.

        Each item must stand alone: a failed one leaves its delivery unsettled, stores nothing where `Capabilities.atomic`,
        and reports at its index.  A delivery that has been lost must report `DeliveryLost` and publish nothing; where it is
        lost between the two, ``DeliveryLost(published=True)``.  Settling a delivery again must do nothing and report None.
        Items may come in any order: a log must not move its position past an unsettled record.  Records published here
        bypass ``dedup`` and capacity limits, and a copy of a record that was accepted once must be accepted.  With *confirm* the call returns when the acknowledgement itself is stored, as
        durably as the system promises; without, when the system will do so by itself.
        """
        ...

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Hand *deliveries* back at once: they must be delivered again, without counting a delivery or an attempt.

        A delivery of a log whose `Record.attempts` was raised by `hold` keeps that count.  Lost and settled ones are
        passed over.
        """
        ...

    async def hold(self, delivery: Delivery, attempts: int) -> None:
        """Topics: keep *delivery*, which has failed *attempts* times by now and will run again here.

        Whoever owns the record next must see that number in `Record.attempts`.

        Raises:
            DeliveryLost: it belongs to another consumer by now, and is not kept.
        """
        ...


class Driver(Protocol):
    """A connection to one message system, open inside ``async with``."""

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            BrokerUnavailable: no server answered in time.
            AuthenticationError: the credentials were refused.
        """
        ...

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None, /
    ) -> None:
        """Flush and disconnect.  All consumers are left by then."""
        ...

    async def capabilities(self, address: Address) -> Capabilities:
        """Return what is honoured for *address*.  Asked once per address, before its first use; the answer is kept."""
        ...

    async def publish(self, records: Sequence[Record], *, timeout: float) -> Sequence[Receipt | BrokerError]:
        """Store *records*; one result each, in order.  All results must be there after *timeout* seconds.

        The records may be of several addresses.  After a failure, later records of the same topic and key must be
        `NotAttempted`.  `BrokerUnavailable` means certainly not stored, `PublishUnknown` that the answer is missing; a
        driver sends again only where the system cannot store twice.  Cancelling it must leave the connection usable.
        Retries, `BufferFull` included, are made above the contract.
        """
        ...

    def consume(self, source: Source, *, prefetch: int, revoked: Revoked) -> AbstractAsyncContextManager[Consumer]:
        """Read *source*.

        Entering must return only when ready: with `Start.LATEST`, every record published afterwards is delivered, and a new
        group's start is stored.  While entered, leases are renewed; if that fails for good, `Consumer.receive` raises.
        *revoked* is awaited before ownership of deliveries moves to another consumer, or as soon as it is known to be lost;
        what is still unsettled afterwards is lost.  Leaving must release what is unsettled.
        """
        ...

    async def browse(
        self, address: Address, *, limit: int, start: Start | None = None, after: str | None = None
    ) -> Sequence[StoredRecord]:
        """Return up to *limit* stored records behind position *after*, oldest first.  Must change nothing.

        Raises:
            NotFound: the address does not exist.
        """
        ...

    async def redrive(
        self, letters: AnyDeadLetters, positions: Sequence[str], to: AnyQueue
    ) -> Sequence[BrokerError | None]:
        """Move letters to *to*: each is stored there, as `redriven` makes it, then gone here.

        One result each.  A letter that is already gone must report `NotFound` at its index and store nothing.
        """
        ...

    async def describe(self, address: Address) -> Mapping[str, object] | None:
        """Return the settings that exist, by the names of the address's own (``partitions``, ``lease``, …); None if absent."""
        ...

    async def health(self) -> Health:
        """Tell whether the connection and all consumers work.  Never raises."""
        ...

    async def declare(self, address: Address) -> None:
        """Create *address* with its settings if it is missing.  Must never alter what exists."""
        ...

    async def delete(self, address: Address, group: str | None = None) -> None:
        """Remove *address* with all it holds, or only *group*'s position.  What is missing already is no error."""
        ...

    async def purge(self, address: AnyQueue | AnyDeadLetters) -> int:
        """Remove all that waits, delayed records included, and return how many.  What is in flight stays."""
        ...

    async def seek(self, source: Source) -> None:
        """Move the position of ``source.group`` to ``source.start``.

        Raises:
            ConfigError: the group has live members.
            PositionLost: the position is gone.
        """
        ...

    async def backlog(self, source: Source) -> Backlog:
        """Return what is left to do; of a dead letter address, its letters are *waiting*."""
        ...

    async def migrate(self, queue: AnyQueue) -> None:
        """Move *queue* to the system's better kind of group; only where `Capabilities.migrate`."""
        ...


DEAD = "bk-dead-"
"""Headers of a dead letter begin with this."""


def redriven(record: Record, to: AnyQueue) -> Record:
    """Return the copy of a dead letter that a redrive stores in *to*: counters at zero, no trace of its death."""
    return Record(
        address=to,
        id=record.id,
        body=record.body,
        key=record.key,
        headers=tuple(item for item in record.headers if not item[0].startswith(DEAD)),
        timestamp=record.timestamp,
        priority=record.priority,
    )
