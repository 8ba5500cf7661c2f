"""Records on their way to one partition: entries, the batches that they travel in, and the numbers that these bear."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

import msgspec
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from ...driver import Receipt, Record
from ...errors import BrokerError
from ._records import KafkaHeaders, headers_of, milliseconds

Result: TypeAlias = Receipt | BrokerError

BATCH: Final = 2000
"""Most records in a batch."""
BATCH_BYTES: Final = 256 * 1024
"""Bytes after which a batch is full: the limit of a topic that brokerkit has not made is 1 MiB by default."""
OVERHEAD: Final = 100
"""Bytes that a record takes beside body and key, roughly."""
CODECS: Final = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}

_Builder: Any = DefaultRecordBatchBuilder  # pyright: ignore[reportUnknownVariableType]


class Producer(msgspec.Struct, frozen=True):
    """Who sends, to a broker."""

    id: int
    epoch: int


class Item:
    """The records of one call."""

    __slots__ = ("deadline", "future", "left", "results", "size")

    def __init__(self, count: int, size: int, deadline: float, future: asyncio.Future[list[Result]]) -> None:
        self.results: list[Result | None] = [None] * count
        self.left = count
        """Records whose result is not known."""
        self.size = size
        self.deadline = deadline
        self.future = future


class Entry:
    """One record on its way."""

    __slots__ = ("batch", "body", "headers", "index", "item", "key", "record", "time")

    def __init__(self, record: Record, item: Item, index: int, *, queue: bool) -> None:
        self.record = record
        self.item = item
        self.index = index
        """Its place in the call."""
        self.key = record.key
        self.body = record.body
        self.headers: KafkaHeaders = headers_of(record, queue=queue)
        self.time = milliseconds(record.timestamp)
        self.batch: Batch | None = None

    @property
    def open(self) -> bool:
        """Whether somebody waits for its result."""
        return self.item.results[self.index] is None and not self.item.future.done()

    @property
    def doubtful(self) -> bool:
        """Whether it may be stored."""
        return self.batch is not None and (self.batch.sent or self.batch.doubtful)


class Batch:
    """Records that are stored together or not at all."""

    __slots__ = ("data", "doubtful", "entries", "producer", "sent", "sequence")

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = list(entries)
        for entry in self.entries:
            entry.batch = self
        self.sent = False
        """Whether it is under way."""
        self.doubtful = False
        """Whether it was under way before, and nobody knows what has become of it."""
        self.producer: Producer | None = None
        self.sequence = 0
        self.data = b""

    def number(self, producer: Producer, sequence: int, codec: int) -> None:
        """Make the bytes, which bear *producer* and *sequence*."""
        self.producer, self.sequence = producer, sequence
        builder = _Builder(
            magic=2,
            compression_type=codec,
            is_transactional=0,
            producer_id=producer.id,
            producer_epoch=producer.epoch,
            base_sequence=sequence,
            batch_size=1 << 30,
        )
        append = builder.append
        for offset, entry in enumerate(self.entries):
            append(offset, entry.time, entry.key, entry.body, entry.headers)
        self.data = bytes(builder.build())


class Lane:
    """One partition, as its producer sees it."""

    __slots__ = ("batches", "busy", "lost", "not_before", "number", "pending", "producer", "sequence")

    def __init__(self, number: int) -> None:
        self.number = number
        self.pending: deque[Entry] = deque()
        self.batches: deque[Batch] = deque()
        """Cut and not stored, in order; more than one only where a broker has refused one and it was split."""
        self.busy = False
        """Whether the first batch is under way."""
        self.not_before = 0.0
        self.producer: Producer | None = None
        """None before the first batch, and where the numbers were lost."""
        self.lost: Producer | None = None
        """Whose numbers were lost: it must not be used again, or a record might be taken for one that is stored."""
        self.sequence = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way."""
        return not self.busy and not self.pending and not self.batches

    def lose_numbers(self) -> None:
        """Go on as another producer: what the broker knows of this one is not certain."""
        self.lost = self.producer or self.lost
        self.producer, self.sequence = None, 0

    def stored(self) -> None:
        """The first batch is stored."""
        # Numbers begin at zero again behind the largest of 32 bits, as the broker counts.
        self.sequence = (self.sequence + len(self.batches.popleft().entries)) & 0x7FFFFFFF

    def first(self, drop: Callable[[Entry], None]) -> Batch | None:
        """Return the batch to send next, cut from what waits; *drop* is told of entries that nobody waits for."""
        while self.batches:
            batch = self.batches[0]
            if batch.doubtful:
                if any(entry.open for entry in batch.entries):
                    return batch
                # Nobody wants to know any more whether it is stored.
                self.batches.popleft()
                self.lose_numbers()
            else:
                kept = [entry for entry in batch.entries if entry.open]
                if len(kept) < len(batch.entries):
                    batch.data = b""
                    for entry in batch.entries:
                        if not entry.open:
                            drop(entry)
                    batch.entries = kept
                if kept:
                    return batch
                self.batches.popleft()
        entries = self._cut(drop)
        if not entries:
            return None
        batch = Batch(entries)
        self.batches.append(batch)
        return batch

    def _cut(self, drop: Callable[[Entry], None]) -> list[Entry]:
        pending = self.pending
        entries: list[Entry] = []
        size = 0
        while pending and len(entries) < BATCH:
            entry = pending[0]
            if not entry.open:
                drop(pending.popleft())
                continue
            size += OVERHEAD + len(entry.body or b"") + len(entry.key or b"")
            if entries and size > BATCH_BYTES:
                break
            entries.append(pending.popleft())
        return entries

    def split(self) -> None:
        """Make two of the first batch: one record in it was refused."""
        batch = self.batches.popleft()
        half = len(batch.entries) // 2
        self.batches.extendleft((Batch(batch.entries[half:]), Batch(batch.entries[:half])))

    def later(self, entry: Entry) -> Iterator[Entry]:
        """Yield the entries behind *entry* that are of the same call and key."""
        if entry.key is None:
            return
        found = False
        for other in (*(each for batch in self.batches for each in batch.entries), *self.pending):
            if other is entry:
                found = True
            elif found and other.item is entry.item and other.key == entry.key:
                yield other

    def take_all(self) -> list[Entry]:
        """Take out everything, in order."""
        entries = [entry for batch in self.batches for entry in batch.entries]
        entries += self.pending
        self.batches.clear()
        self.pending.clear()
        return entries
