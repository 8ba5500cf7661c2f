"""What the tests of the bare driver share: they read and settle without any layer above the contract."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from ... import clock
from ...address import Address, AnyDeadLetters, AnyQueue, AnyTopic, Queue, Topic, redrive_queue, with_prefix
from ...broker import Broker
from ...driver import DEAD, Consumer, Delivery, Headers, Receipt, Record, Revoked, Settlement, Source
from ...errors import BrokerError
from ...policy import Start
from ._harness import Harness, Kind

GROUP = "workers"


async def ignore(deliveries: Sequence[Delivery]) -> None:
    """Let ownership move."""


def ids(deliveries: Iterable[Delivery]) -> list[str]:
    """Return the ids of *deliveries*, sorted."""
    return sorted(delivery.record.id for delivery in deliveries)


def names(count: int, prefix: str = "m") -> list[str]:
    """Return *count* ids that sort in their order."""
    return [f"{prefix}{number:04}" for number in range(count)]


def source(
    address: AnyTopic | AnyQueue,
    *,
    group: str | None = GROUP,
    start: Start = Start.EARLIEST,
    until_end: bool = False,
) -> Source:
    """Return *address* as a source: of *group* if it is a topic."""
    return Source(address, group if isinstance(address, Topic) else None, start, until_end)


def raw_topic(system: Harness, name: str = "topic", **options: Any) -> AnyTopic:
    """Return `Harness.topic` as drivers know it: behind the prefix of the URL."""
    named = with_prefix(system.topic(name, **options), system.connect()._prefix)
    assert isinstance(named, Topic)
    return named


def raw_queue(system: Harness, name: str = "queue", **options: Any) -> AnyQueue:
    """Return `Harness.queue` as drivers know it."""
    named = with_prefix(system.queue(name, **options), system.connect()._prefix)
    assert isinstance(named, Queue)
    return named


def raw_address(system: Harness, kind: Kind, name: str | None = None, *, leases: float = 1) -> AnyTopic | AnyQueue:
    """Return `Harness.address` as drivers know it; a queue with so many times the lease, for what must not end meanwhile."""
    if kind == "topic":
        return raw_topic(system, name or kind)
    return raw_queue(system, name or kind, lease=leases * system.lease)


def raw_target(system: Harness, name: str = "out") -> AnyTopic | AnyQueue:
    """Return `Harness.target` as drivers know it."""
    return raw_topic(system, name) if system.queues is None else raw_queue(system, name)


class Raw:
    """A broker's driver, and the few steps that most tests of it need."""

    def __init__(self, system: Harness, broker: Broker) -> None:
        self.system = system
        self.broker = broker
        self.driver = system.driver(broker)

    def record(
        self,
        address: Address,
        id: str,
        body: bytes | None = b"body",
        *,
        key: bytes | None = None,
        headers: Headers = (),
        delay: float = 0.0,
        ttl: float | None = None,
        priority: int = 0,
        attempts: int = 0,
        deliveries: int = 0,
    ) -> Record:
        """Return a record published now."""
        return Record(
            address=address,
            id=id,
            body=body,
            key=key,
            headers=headers,
            timestamp=clock.current().time(),
            delay=delay,
            ttl=ttl,
            priority=priority,
            attempts=attempts,
            deliveries=deliveries,
        )

    async def publish(self, records: Sequence[Record]) -> Sequence[Receipt | BrokerError]:
        """Publish with the harness's deadline."""
        return await self.driver.publish(records, timeout=self.system.deadline)

    async def put(
        self, address: Address, wanted: Iterable[str], *, key: bytes | None = None, spread: bool = False
    ) -> list[Receipt]:
        """Store a record for each id, and fail if one is refused; with *spread* each has its id as key."""
        receipts: list[Receipt] = []
        for result in await self.publish(
            [self.record(address, id, key=id.encode() if spread else key) for id in wanted]
        ):
            assert isinstance(result, Receipt), result
            receipts.append(result)
        return receipts

    def consume(
        self,
        address: AnyTopic | AnyQueue,
        *,
        group: str | None = GROUP,
        start: Start = Start.EARLIEST,
        prefetch: int = 100,
        until_end: bool = False,
        revoked: Revoked = ignore,
    ) -> AbstractAsyncContextManager[Consumer]:
        """Read *address*: as a member of *group* if it is a topic."""
        return self.driver.consume(
            source(address, group=group, start=start, until_end=until_end), prefetch=prefetch, revoked=revoked
        )

    async def take(self, consumer: Consumer, count: int) -> list[Delivery]:
        """Receive exactly *count* deliveries, or fail at the harness's deadline."""
        taken: list[Delivery] = []
        clock_ = asyncio.get_running_loop().time
        end = clock_() + self.system.deadline
        while len(taken) < count:
            left = end - clock_()
            assert left > 0, f"only {len(taken)} of {count} came: {ids(taken)}"
            taken += await consumer.receive(count - len(taken), left)
        return taken

    async def rest(self, consumer: Consumer) -> list[Delivery]:
        """Receive until nothing comes any more, settling nothing."""
        taken: list[Delivery] = []
        while got := await consumer.receive(1000, self.system.quiet):
            taken += got
        return taken

    async def drain(self, consumer: Consumer) -> list[Delivery]:
        """Receive and settle until nothing comes any more."""
        taken: list[Delivery] = []
        while got := await consumer.receive(1000, self.system.quiet):
            taken += got
            await self.done(consumer, *got)
        return taken

    async def finish(self, consumer: Consumer, count: int) -> list[Delivery]:
        """Receive and settle exactly *count* deliveries; fail if fewer or more come."""
        taken: list[Delivery] = []
        clock_ = asyncio.get_running_loop().time
        end = clock_() + self.system.deadline
        while len(taken) < count:
            left = end - clock_()
            assert left > 0, f"only {len(taken)} of {count} came: {ids(taken)}"
            got = await consumer.receive(1000, left)
            await self.done(consumer, *got)
            taken += got
        await self.nothing(consumer)
        assert len(taken) == count, ids(taken)
        return taken

    async def left(self, address: AnyTopic | AnyQueue, *, group: str | None = GROUP) -> list[Delivery]:
        """Return and settle all that a new consumer of *address* is given."""
        async with self.consume(address, group=group) as consumer:
            return await self.drain(consumer)

    async def nothing(self, consumer: Consumer) -> None:
        """Fail if anything comes."""
        got = await consumer.receive(1000, self.system.quiet)
        assert not got, f"unexpected: {[(d.record.id, d.deliveries) for d in got]}"

    async def done(self, consumer: Consumer, *deliveries: Delivery, confirm: bool = False) -> None:
        """Settle without publishing, and fail if that fails."""
        results = await consumer.settle([Settlement(delivery) for delivery in deliveries], confirm=confirm)
        assert list(results) == [None] * len(deliveries), results


@asynccontextmanager
async def raw(system: Harness, *addresses: Address, options: Mapping[str, object] | None = None) -> AsyncIterator[Raw]:
    """Open a driver, as a process of its own to the faults, and declare *addresses*."""
    async with system.connect(options=options or {}) as broker:
        opened = Raw(system, broker)
        for address in addresses:
            await opened.driver.declare(address)
        yield opened


def copy(record: Record, address: Address, **changes: Any) -> Record:
    """Return a copy of *record* for *address*, as a retry or a dead letter makes it."""
    values: dict[str, Any] = {
        "id": record.id,
        "body": record.body,
        "key": record.key,
        "headers": record.headers,
        "timestamp": record.timestamp,
        "expires": record.expires,
        "priority": record.priority,
        "attempts": record.attempts,
        **changes,
    }
    return Record(address=address, **values)


def letters_of(address: AnyTopic | AnyQueue) -> AnyDeadLetters:
    """Return the dead letters of *address*, of the group of the tests if it is a topic."""
    return address.dead_letters(GROUP) if isinstance(address, Topic) else address.dead_letters


def revived(address: AnyTopic | AnyQueue) -> AnyQueue:
    """Return where letters of *address* are redriven to."""
    return redrive_queue(address, GROUP) if isinstance(address, Topic) else address


async def bury(r: Raw, address: AnyTopic | AnyQueue, wanted: list[str]) -> list[str]:
    """Publish messages, dead-letter each, and return the positions of the letters."""
    letters = letters_of(address)
    await r.put(address, wanted)
    async with r.consume(address) as consumer:
        for delivery in await r.take(consumer, len(wanted)):
            notes = ((DEAD + "reason", b"no good"), (DEAD + "attempts", b"5"))
            letter = copy(delivery.record, letters, attempts=5, headers=(*delivery.record.headers, *notes))
            assert list(await consumer.settle([Settlement(delivery, (letter,))])) == [None]
    stored = await r.driver.browse(letters, limit=1000)
    assert sorted(s.record.id for s in stored) == sorted(wanted)
    return [s.position for s in stored]


def source_of_letters(address: AnyTopic | AnyQueue) -> Source:
    """Return the dead letters of *address* as a source of `Driver.backlog`."""
    return Source(letters_of(address))
