"""Records on their way to one partition: calls and their entries, the batches these travel in, and the numbers that those bear."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, TypeAlias

import msgspec
from aiokafka.record.default_records import DefaultRecordBatchBuilder  # pyright: ignore[reportMissingTypeStubs]

from ...driver import Receipt, Record
from ...errors import BrokerError
from ._records import headers_of, milliseconds

Result: TypeAlias = Receipt | BrokerError

BATCH: Final = 2000
"""Most records in a batch."""
BATCH_BYTES: Final = 256 * 1024
"""Bytes after which a batch is full: the limit of a topic that brokerkit has not made is 1 MiB by default."""
LAST_MOMENT: Final = 0.03
"""Seconds before its deadline in which a record is not sent once more."""
_FEW: Final = 500
"""Entries that it does not matter to keep for a while."""
OVERHEAD: Final = 100
"""Bytes that a record takes beside body and key, roughly."""
CODECS: Final = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}

_NEVER: Final = 1 << 62

Kind: TypeAlias = Literal["topic", "queue", "letters"]
"""What a Kafka topic is here: the topic of somebody, a group's private queue, or dead letters."""

_Builder: Any = DefaultRecordBatchBuilder  # pyright: ignore[reportUnknownVariableType]


class Producer(msgspec.Struct, frozen=True):
    """Who sends, to a broker."""

    id: int
    epoch: int


class Call:
    """What one call publishes to one topic, several records."""

    __slots__ = ("deadline", "entries", "future", "left", "size")

    def __init__(
        self, records: Sequence[Record], size: int, deadline: float, future: asyncio.Future[list[Result]]
    ) -> None:
        self.entries: Sequence[Entry] = [Entry(record, self, future) for record in records]
        self.left = len(records)
        """Entries without a result."""
        self.size = size
        self.deadline = deadline
        self.future = future


class _Waiting:
    __slots__ = ("batch", "future", "record", "result")

    record: Record
    future: asyncio.Future[list[Result]]
    """Of its call."""
    result: Result | None
    batch: Batch | None

    @property
    def open(self) -> bool:
        """Whether somebody waits for its result."""
        return self.result is None and not self.future.done()

    @property
    def doubtful(self) -> bool:
        """Whether it may be stored."""
        return self.batch is not None and (self.batch.sent or self.batch.doubtful)


class Entry(_Waiting):
    """One record on its way."""

    __slots__ = ("call",)

    def __init__(self, record: Record, call: Call, future: asyncio.Future[list[Result]]) -> None:
        self.record = record
        self.call = call
        self.future = future
        self.result = None
        self.batch = None


class Alone(_Waiting):
    """A call that publishes one record, as most do: call and entry in one, as making and freeing both takes time."""

    __slots__ = ("deadline", "size")

    def __init__(self, record: Record, size: int, deadline: float, future: asyncio.Future[list[Result]]) -> None:
        self.record = record
        self.size = size
        self.deadline = deadline
        self.future = future
        self.result = None
        self.batch = None

    @property
    def call(self) -> Alone:
        """Itself."""
        return self

    @property
    def entries(self) -> Sequence[Alone]:
        """Itself alone."""
        return (self,)

    @property
    def left(self) -> int:
        """Entries without a result."""
        return int(self.result is None)


AnyEntry: TypeAlias = Entry | Alone
AnyCall: TypeAlias = Call | Alone


class Batch:
    """Records that are stored together or not at all."""

    __slots__ = ("data", "doubtful", "entries", "latest", "producer", "sent", "sequence", "times")

    def __init__(self, entries: list[AnyEntry]) -> None:
        self.entries = entries
        for entry in entries:
            entry.batch = self
        self.sent = False
        """Whether it is under way."""
        self.doubtful = False
        """Whether it was under way before, and nobody knows what has become of it: it must not be changed."""
        self.producer: Producer | None = None
        self.sequence = 0
        self.latest = _NEVER
        """The latest timestamp that records are written with."""
        self.data = b""
        self.times: Sequence[int] = ()
        """The timestamps that records are written with."""

    def number(self, producer: Producer, sequence: int, codec: int, kind: Kind) -> None:
        """Make the bytes, which bear *producer* and *sequence*; in doubt they stay what was sent before."""
        if self.doubtful or (self.data and self.producer == producer and self.sequence == sequence):
            return
        self.producer, self.sequence = producer, sequence
        if kind == "letters":
            # Brokers refuse a time ahead of theirs, and what could not be handled must find a place, whoever wrote it.
            self.latest = milliseconds(time.time())
        builder = _Builder(
            magic=2,
            compression_type=codec,
            is_transactional=0,
            producer_id=producer.id,
            producer_epoch=producer.epoch,
            base_sequence=sequence,
            batch_size=1 << 30,
        )
        append, latest, queue = builder.append, self.latest, kind == "queue"
        self.times = times = [milliseconds(entry.record.timestamp) for entry in self.entries]
        for offset, (entry, ms) in enumerate(zip(self.entries, times, strict=True)):
            record = entry.record
            if ms > latest:
                times[offset] = latest
                append(offset, latest, record.key, record.body, headers_of(record, timed=True))
            else:
                append(offset, ms, record.key, record.body, headers_of(record, timed=queue))
        self.data = bytes(builder.build())


class Lane:
    """One partition, as its producer sees it."""

    __slots__ = (
        "batches",
        "busy",
        "cuts",
        "kind",
        "leader",
        "lost",
        "not_before",
        "number",
        "pending",
        "producer",
        "sequence",
        "swept",
        "topic",
    )

    def __init__(self, topic: str, number: int, kind: Kind, lost: Producer | None) -> None:
        self.topic = topic
        self.number = number
        self.kind: Kind = kind
        self.leader = -1
        """The node to send to; -1 while there is none."""
        self.pending: deque[AnyEntry] = deque()
        self.swept = _FEW
        """How much was left when all of it was swept."""
        self.batches: deque[Batch] = deque()
        """Cut and not stored, in order; more than one only where a broker has refused one and it was split."""
        self.busy = False
        """Whether the first batch is under way, or about to be."""
        self.cuts = 0
        """Batches that were cut."""
        self.not_before = 0.0
        self.producer: Producer | None = None
        """None before the first batch, and where the numbers were lost."""
        self.lost = lost
        """Who must not be used: a record might be taken for one that was sent under the same number before."""
        self.sequence = 0

    def __repr__(self) -> str:
        return f"{self.topic}[{self.number}]"

    @property
    def waiting(self) -> bool:
        """Whether there is anything to send."""
        return bool(self.batches or self.pending)

    def takes(self, producer: Producer | None) -> bool:
        """Return whether there is somebody to send as, *producer* if nobody was before."""
        return self.producer is not None or (producer is not None and producer != self.lost)

    def lose_numbers(self) -> None:
        """Go on as another producer: what the broker knows of this one is not certain."""
        self.lost = self.producer or self.lost
        self.producer, self.sequence = None, 0

    def first(self, now: float, drop: Callable[[AnyEntry], None]) -> Batch | None:
        """Return the batch to send next, cut from what waits; *drop* is told of entries that nobody waits for."""
        while self.batches:
            batch = self.batches[0]
            if batch.doubtful:
                if any(entry.open for entry in batch.entries):
                    return batch
                self.abandon(drop)
            elif self._thin_out(batch, now, drop):
                return batch
            else:
                self.batches.popleft()
        entries = self._cut(drop)
        if not entries:
            return None
        batch = Batch(entries)
        self.batches.append(batch)
        self.cuts += 1
        return batch

    def _thin_out(self, batch: Batch, now: float, drop: Callable[[AnyEntry], None]) -> bool:
        """Leave in *batch*, which is certainly not stored, what is worth sending; return whether there is anything."""
        kept: list[AnyEntry] = []
        for entry in batch.entries:
            if not entry.open:
                drop(entry)
            elif batch.producer is not None and entry.call.deadline < now + LAST_MOMENT:
                # It was refused before and will be again: at its deadline it shall not be in doubt.
                entry.batch = None
            else:
                kept.append(entry)
        if len(kept) < len(batch.entries):
            batch.entries, batch.data = kept, b""
        return bool(kept)

    def _cut(self, drop: Callable[[AnyEntry], None]) -> list[AnyEntry]:
        pending = self.pending
        if len(pending) <= BATCH and self._fit():
            whole = list(pending)
            pending.clear()
            return whole
        entries: list[AnyEntry] = []
        size = 0
        while pending and len(entries) < BATCH:
            entry = pending[0]
            if not entry.open:
                drop(pending.popleft())
                continue
            record = entry.record
            size += OVERHEAD + len(record.body or b"") + len(record.key or b"")
            if entries and size > BATCH_BYTES:
                break
            entries.append(pending.popleft())
        return entries

    def _fit(self) -> bool:
        """Return whether all that is pending is open, and small enough for one batch."""
        size = OVERHEAD * len(self.pending)
        for entry in self.pending:
            if entry.result is not None or entry.future.done():
                return False
            record = entry.record
            size += len(record.body or b"") + len(record.key or b"")
        return size <= BATCH_BYTES

    def abandon(self, drop: Callable[[AnyEntry], None]) -> None:
        """Give up the first batch, which may be stored and nobody waits for: its numbers are not used again."""
        for entry in self.batches.popleft().entries:
            drop(entry)
        self.lose_numbers()

    def stored(self) -> None:
        """The first batch is stored."""
        # Behind the largest of 32 bits numbers begin at zero again, as the broker counts.
        self.sequence = (self.sequence + len(self.batches.popleft().entries)) & 0x7FFFFFFF

    def split(self) -> None:
        """Make two of the first batch: one record in it was refused."""
        entries = self.batches.popleft().entries
        half = len(entries) // 2
        self.batches.extendleft((Batch(entries[half:]), Batch(entries[:half])))

    def sweep(self, drop: Callable[[AnyEntry], None]) -> None:
        """Forget entries that nobody waits for, where they wait to be sent; those behind others only now and then."""
        pending = self.pending
        while pending and not pending[0].open:
            drop(pending.popleft())
        if len(pending) > 2 * self.swept:
            self.pending = deque()
            for entry in pending:
                if entry.open:
                    self.pending.append(entry)
                else:
                    drop(entry)
            self.swept = max(_FEW, len(self.pending))

    def take_all(self) -> list[AnyEntry]:
        """Take out everything, in order."""
        if any(batch.sent or batch.doubtful for batch in self.batches):
            self.lose_numbers()
        entries = [entry for batch in self.batches for entry in batch.entries]
        entries += self.pending
        self.batches.clear()
        self.pending.clear()
        return entries
