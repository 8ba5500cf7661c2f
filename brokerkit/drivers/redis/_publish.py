"""Publishing: what is published to one address in one turn of the event loop is stored by one script call.

Each address has one batch under way; what is added meanwhile is the next one.  So a batch whose answer was lost is sent again
under its number, and the server, which keeps the last batch of each producer, stores it once.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final

from ...address import Address, Queue, Topic
from ...driver import Receipt, Record
from ...errors import BrokerError, BrokerUnavailable, BufferFull, NotAttempted, NotFound, PublishUnknown, TooLarge
from ...policy import MAX_BODY
from ._frames import NO_OPTIONS, frame, plain, queue_blob, topic_blob
from ._keys import entity
from ._link import Link, Unanswered
from ._scripts import PUBLISH, PUBLISH_QUEUE, PUBLISH_TOPIC, Script

BATCH: Final = 1000
"""Records in one script call: the server does nothing else meanwhile."""
MAX_WAITING: Final = 64 * 1024 * 1024
"""Bytes that may wait to be published or answered; beyond it publishing is refused."""
BATCH_BYTES: Final = 1024 * 1024
"""Bytes in one script call, if it has more than one record."""

Result = Receipt | BrokerError


def kind_of(address: Address) -> bytes:
    """Return the letter that scripts know this kind of address by."""
    return b"t" if isinstance(address, Topic) else b"q" if isinstance(address, Queue) else b"d"


def settings_of(address: Address) -> bytes:
    """Return what *address* is created with, as scripts take it."""
    if isinstance(address, Topic):
        retention = "" if address.retention is None else repr(address.retention)
        return f"partitions={address.partitions} retention={retention}".encode()
    if isinstance(address, Queue):
        return f"priorities={address.priorities} dedup={address.dedup!r} lease={address.lease!r}".encode()
    return b"seq=0"


def derived_settings(address: Address) -> bytes:
    """Return the same for derived addresses, which what is first stored there creates; nothing for others."""
    return settings_of(address) if ".." in address.name else b""


def too_large(record: Record) -> TooLarge:
    """Return the error for a body over the limit."""
    return TooLarge(
        f"a body of {len(record.body or b'')} bytes for {record.address.name} is over the limit of {MAX_BODY}; "
        "publish a reference instead"
    )


class Room:
    """Bytes that wait to be published or answered, of all outboxes of a driver together."""

    __slots__ = ("used",)

    def __init__(self) -> None:
        self.used = 0


class _Item:
    __slots__ = ("blobs", "deadline", "future", "plain", "records", "sent", "size")

    def __init__(
        self,
        records: Sequence[Record],
        blobs: Sequence[bytes],
        plain: bool,
        deadline: float,
        future: asyncio.Future[list[Result]],
    ) -> None:
        self.records = records
        self.blobs = blobs
        self.plain = plain
        """Whether the blobs are frames alone, without the options of queues."""
        self.deadline = deadline
        self.future = future
        self.sent = False
        self.size = len(blobs[0]) if len(blobs) == 1 else sum(map(len, blobs))


class Outbox:
    """What is published to one address."""

    def __init__(self, link: Link, address: Address, producer: bytes, room: Room) -> None:
        key = entity(address.name)
        self._link = link
        self._room = room
        self._address = address
        self._name = address.name
        self._producer = b"@" + producer
        self._ids = isinstance(address, Queue) and address.dedup > 0
        self._kind = kind_of(address)
        self._create = derived_settings(address)
        self._key = key
        self._topic = isinstance(address, Topic)
        self._partitions = address.partitions if isinstance(address, Topic) else 0
        self._may_be_plain = isinstance(address, Queue) and not self._create and not self._ids
        self._keys = (key, key + b":r0") if self._may_be_plain else (key,)
        self._spread = int.from_bytes(producer[:3], "big")
        self._items: deque[_Item] = deque()
        self._sent: list[_Item] = []
        self._call: asyncio.Future[Any] | None = None
        self._number = 0
        self._busy = False
        self._coming = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    # ------------------------------------------------------------------ adding

    def add_one(self, records: Sequence[Record], timeout: float) -> asyncio.Future[list[Result]]:
        """Do what `add` does, for one record, which is nearly always what is published."""
        (record,) = records
        if self._may_be_plain and plain(record):
            blob, is_plain = frame(record), True
        else:
            blob, is_plain = self._blob(record), False
        return self._add(records, (blob,), is_plain, timeout)

    def add(self, records: Sequence[Record], timeout: float) -> asyncio.Future[list[Result]]:
        """Store *records*, whose bodies are within the limit; the future has one result each."""
        if self._may_be_plain and all(map(plain, records)):
            return self._add(records, list(map(frame, records)), True, timeout)
        return self._add(records, [self._blob(record) for record in records], False, timeout)

    def _add(
        self, records: Sequence[Record], blobs: Sequence[bytes], is_plain: bool, timeout: float
    ) -> asyncio.Future[list[Result]]:
        loop = self._loop or asyncio.get_running_loop()
        self._loop = loop
        future: asyncio.Future[list[Result]] = loop.create_future()
        deadline = loop.time() + timeout
        item = _Item(records, blobs, is_plain, deadline, future)
        if self._room.used > MAX_WAITING:
            text = f"{self._room.used} bytes wait to be published on {self._link.settings.shown} already"
            future.set_result(failures(records, BufferFull(text)))
            return future
        self._room.used += item.size
        self._items.append(item)
        if deadline < self._timer_at:
            self._arm(loop, deadline)
        if not self._busy and not self._coming:
            self._coming = True
            self._link.soon(self._flush)
        return future

    def _blob(self, record: Record) -> bytes:
        if self._topic:
            self._spread = spread = self._spread + 1
            return topic_blob(record, spread)
        return queue_blob(record) if self._kind == b"q" else frame(record)

    def _flush(self) -> None:
        """Send the next batch."""
        self._coming = False
        items, sent = self._items, self._sent
        if self._busy or not items:
            return
        deadline, count, size, is_plain = 0.0, 0, 0, True
        while items:
            item = items[0]
            if item.future.done():  # nobody waits for it any more
                self._room.used -= items.popleft().size
                continue
            count += len(item.blobs)
            size += item.size
            if sent and (count > BATCH or size > BATCH_BYTES):
                break
            items.popleft()
            item.sent = True
            sent.append(item)
            is_plain = is_plain and item.plain
            deadline = max(deadline, item.deadline)
        if not sent:
            return
        self._busy = True
        self._number += 1
        left = max(0.001, deadline - asyncio.get_running_loop().time())
        script, args = self._batch(sent, is_plain)
        self._call = self._link.call(script, self._keys, args, timeout=left)
        self._call.add_done_callback(self._answered)

    def _batch(self, items: list[_Item], is_plain: bool) -> tuple[Script, list[bytes | int]]:
        """Return the script for *items*, and its arguments."""
        args: list[bytes | int] = [self._producer, self._number]
        if is_plain or (self._topic and not self._create):
            if not is_plain:
                args.append(self._partitions)
            for item in items:
                args += item.blobs
            return PUBLISH_QUEUE if is_plain else PUBLISH_TOPIC, args
        args += [self._kind, self._create, b"1" if self._ids else b"0"]
        for item in items:
            blobs = [NO_OPTIONS + blob for blob in item.blobs] if item.plain else item.blobs
            if not self._ids:
                args += blobs
                continue
            for record, blob in zip(item.records, blobs, strict=True):
                args += (blob, record.id.encode())
        return PUBLISH, args

    # ------------------------------------------------------------------ results

    def _answered(self, answer: asyncio.Future[Any]) -> None:
        if answer.cancelled():  # recalled
            return
        items, self._sent = self._sent, []
        self._room.used -= sum([item.size for item in items])
        self._busy = False
        self._go_on()
        error = answer.exception()
        if error is not None:
            for item in items:
                self._fail(item, error)
            return
        positions = self._positions(items, answer.result())
        for item in items:
            results: list[Result] = [
                Receipt(record.id, position, position is None)
                for record, position in zip(item.records, positions, strict=False)
            ]
            if not item.future.done():
                item.future.set_result(results)

    def _positions(self, items: list[_Item], reply: bytes) -> Iterator[str | None]:
        """Yield where each record of *items* is, in order; None for a duplicate."""
        name = self._name
        if self._ids:
            return (None if number == b"0" else f"{name}@{number.decode()}" for number in reply.split())
        if not self._topic:
            return map(f"{name}@%d".__mod__, itertools.count(int(reply)))
        return self._places(items, reply.split())

    def _places(self, items: list[_Item], numbers: list[bytes]) -> Iterator[str]:
        name, partitions = self._name, int(numbers[0])
        fronts: dict[int, str] = {}
        offsets: dict[int, int] = {}
        for p, ms, first in zip(numbers[1::3], numbers[2::3], numbers[3::3], strict=True):
            fronts[int(p)] = f"{name}[{p.decode()}]@{ms.decode()}-"
            offsets[int(p)] = int(first)
        for item in items:
            for blob in item.blobs:
                partition = int.from_bytes(blob[:4], "big") % partitions
                offset = offsets[partition]
                offsets[partition] = offset + 1
                yield f"{fronts[partition]}{offset}"

    def _fail(self, item: _Item, error: BaseException) -> None:
        """Let *item* fail: its first record of each key with *error*, those behind it as not attempted."""
        if item.future.done():
            return
        if isinstance(error, Unanswered):
            failure: BrokerError = PublishUnknown(f"publishing to {self._address.name}: {error}")
            failure.__cause__ = error.__cause__
        elif isinstance(error, NotFound):
            failure = NotFound(f"{self._address!r} does not exist; declare it")
        else:
            failure = error if isinstance(error, BrokerError) else BrokerError(str(error))
        item.future.set_result(failures(item.records, failure))

    # ------------------------------------------------------------------ deadlines

    def _arm(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(when, self._late)
        self._timer_at = when

    def _late(self) -> None:
        """Fail what is over its deadline, and set the timer for what is next."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._timer = None
        self._timer_at = nearest = math.inf
        if self._call is not None and self._busy and not self._call.done() and not self._link.was_sent(self._call):
            self._recall(self._call)
        answered = self._call is not None and self._call.done()  # who waits is told in this very turn
        for item in (*self._sent, *self._items):
            if item.future.done():
                continue
            if now < item.deadline or (item.sent and answered):
                nearest = min(nearest, item.deadline)
            elif item.sent:
                self._fail(item, Unanswered("no answer before the deadline"))
            else:
                self._fail(item, BrokerUnavailable(f"publishing to {self._address.name}: not sent before the deadline"))
        if nearest < math.inf:
            self._arm(loop, nearest)
        self._go_on()

    def _recall(self, call: asyncio.Future[Any]) -> None:
        """Take back a batch that waits for a connection: what is too late by now must never be sent."""
        call.cancel()
        for item in self._sent:
            item.sent = False
        self._items.extendleft(reversed(self._sent))
        self._sent = []
        self._busy = False

    def _go_on(self) -> None:
        if self._items and not self._busy and not self._coming:
            self._coming = True
            self._link.soon(self._flush)

    def close(self) -> None:
        """Set no more timers."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def failures(records: Sequence[Record], error: BrokerError) -> list[Result]:
    """Return *error* for each record, but `NotAttempted` for those that would overtake a failed one of their key."""
    results: list[Result] = []
    failed: set[bytes] = set()
    for record in records:
        if record.key is not None and isinstance(record.address, Topic):
            if record.key in failed:
                results.append(_overtakes(record))
                continue
            failed.add(record.key)
        results.append(error)
    return results


def _overtakes(record: Record) -> NotAttempted:
    return NotAttempted(f"an earlier message of the key {record.key!r} was not stored")


def _parts(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """Yield *records* in parts that one script call may have."""
    first = size = 0
    for index, record in enumerate(records):
        size += len(record.body or b"")
        if index > first and (index - first >= BATCH or size > BATCH_BYTES):
            yield records[first:index]
            first, size = index, len(record.body or b"")
    yield records[first:] if first else records


class Outboxes:
    """All outboxes of a driver."""

    def __init__(self, link: Link, producer: bytes) -> None:
        self._link = link
        self._producer = producer
        self._room = Room()
        self._boxes: dict[str, Outbox] = {}
        self.quick: dict[int, Outbox] = {}
        """By `id()` of an address that is kept meanwhile: the hot path."""
        self._known: list[Address] = []

    def of(self, address: Address) -> Outbox:
        """Return the outbox of *address*."""
        box = self._boxes.get(address.name)
        if box is None:
            box = self._boxes[address.name] = Outbox(self._link, address, self._producer, self._room)
        if len(self._known) >= 1024:
            self.quick.clear()
            self._known.clear()
        self._known.append(address)  # as long as it is kept, its id is its own
        self.quick[id(address)] = box
        return box

    async def publish(self, records: Sequence[Record], timeout: float) -> list[Result]:
        """Store *records*, in order within each address; one result each."""
        if not records:
            return []
        first = records[0].address
        if all(record.address is first and len(record.body or b"") <= MAX_BODY for record in records):
            return await self._several(self.quick.get(id(first)) or self.of(first), records, timeout)
        return await self._mixed(records, timeout)

    async def _several(self, box: Outbox, records: Sequence[Record], timeout: float) -> list[Result]:
        """Store *records* of one address, in as many steps as keep each within `BATCH` and `BATCH_BYTES`."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        results: list[Result] = []
        failed: set[bytes] = set()
        for part in _parts(records):
            left = max(end - loop.time(), 0.001)
            if not failed:
                stored = await box.add(part, left)
            else:
                open_ = [record for record in part if record.key not in failed]
                answers = iter(await box.add(open_, left) if open_ else ())
                stored = [_overtakes(record) if record.key in failed else next(answers) for record in part]
            results += stored
            if len(part) < len(records) and isinstance(records[0].address, Topic):
                failed |= {
                    record.key
                    for record, result in zip(part, stored, strict=True)
                    if record.key is not None and not isinstance(result, Receipt)
                }
        return results

    async def _mixed(self, records: Sequence[Record], timeout: float) -> list[Result]:
        """Store records of several addresses, or among which some are too large."""
        results: list[Result | None] = [None] * len(records)
        lines: dict[str, list[int]] = {}
        refused: set[tuple[str, bytes | None]] = set()
        for index, record in enumerate(records):
            line = (record.address.name, record.key)
            if len(record.body or b"") > MAX_BODY:
                results[index] = too_large(record)
                if isinstance(record.address, Topic) and record.key is not None:
                    refused.add(line)
            elif line in refused:
                results[index] = _overtakes(record)
            else:
                lines.setdefault(record.address.name, []).append(index)
        calls = [
            self._several(self.of(records[indexes[0]].address), [records[index] for index in indexes], timeout)
            for indexes in lines.values()
        ]
        for indexes, stored in zip(lines.values(), await asyncio.gather(*calls), strict=True):
            for index, result in zip(indexes, stored, strict=True):
                results[index] = result
        return [result for result in results if result is not None]

    def close(self) -> None:
        """Set no more timers."""
        for box in self._boxes.values():
            box.close()
