"""What a broker answers to a fetch: record batches, taken apart no further than is needed.

Of each batch only the head is read at first; that tells where the log goes on and who wrote it.  Records are made, by
aiokafka's compiled classes, when somebody takes them.  What is not for readers (transaction markers, transactions that were
aborted, batches that compaction has emptied) is jumped.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, cast

from aiokafka.errors import UnsupportedCodecError  # pyright: ignore[reportMissingTypeStubs]
from aiokafka.record.default_records import DefaultRecord, DefaultRecordBatch  # pyright: ignore[reportMissingTypeStubs]
from aiokafka.record.legacy_records import LegacyRecordBatch  # pyright: ignore[reportMissingTypeStubs]

from ...errors import BrokerError, ConfigError
from ._inflate import inflated
from ._records import Native
from ._tolerant import decoded

# Base offset, length, leader epoch, format, checksum, attributes, last offset - base offset, timestamps of the first record
# and the latest, producer's id and epoch, sequence number, number of records.
_HEAD: Final = struct.Struct(">qiibIhiqqqhii")
_START: Final = struct.Struct(">qiib")
"""What all formats begin with; in the old ones the third is a checksum."""
_LAST: Final = struct.Struct(">i")
_LAST_AT: Final = 23
"""Where the difference between first and last offset is."""
_BEFORE: Final = 12
"""Bytes that the length does not count."""
_TRANSACTIONAL: Final = 0x10
_CONTROL: Final = 0x20
_CURRENT: Final = 2
"""The format of batches; those with a lower number hold one record, or a batch inside of it."""
_OLD_LEAST: Final = 26
"""Bytes that a record of the old formats has at least."""


class Aborted(Protocol):
    """A transaction that was aborted, as a broker's answer names it."""

    @property
    def producer_id(self) -> int:
        """Who wrote it."""
        ...

    @property
    def first_offset(self) -> int:
        """Where it begins; it ends with its marker."""
        ...


class _Decoder(Protocol):
    @property
    def compression_type(self) -> int: ...
    def validate_crc(self) -> bool: ...
    def __iter__(self) -> Iterator[Native]: ...


_current: Callable[[memoryview], _Decoder] = cast("Any", DefaultRecordBatch)
_old: Callable[[memoryview, int], _Decoder] = cast("Any", LegacyRecordBatch)
_record: Callable[..., Native] = cast("Any", DefaultRecord)


Decoded: TypeAlias = list[Native]


class Batch:
    """Records that follow one another."""

    __slots__ = ("_data", "_end", "_made", "_start", "base", "count", "dense", "next", "size")

    def __init__(
        self, data: bytes, start: int, end: int, base: int, next: int, count: int, made: Sequence[Native] | None
    ) -> None:
        self._data = data
        self._start = start
        self._end = end
        self._made = made
        self.base = base
        self.next = next
        """Where the log goes on behind it: further than its last record, where what follows is not for readers."""
        self.count = count
        """How many records it has."""
        self.dense = made is None and next - base == count
        """Whether there is one at each offset; `records` gives them one by one then."""
        self.size = end - start

    def records(self, place: str) -> Iterator[Native]:
        """Return its records, `count` of them; whether they have the offsets that they should have was not looked at if `dense`.

        Raises:
            BrokerError: it is damaged; the text names *place*.
        """
        if not self.dense:
            return iter(self.rest(place, self.base))
        return _read(self._bytes, self.base, place)

    def rest(self, place: str, offset: int) -> Decoded:
        """Return its records from *offset* on, also those that `records` has stopped at.

        Raises:
            BrokerError: it is damaged.
        """
        made = _whole(self._bytes, self.base, place) if self._made is None else self._made
        return [record for record in made if record.offset >= offset]

    @property
    def _bytes(self) -> memoryview:
        return memoryview(self._data)[self._start : self._end]


class Answer(NamedTuple):
    """What came from one partition."""

    batches: list[Batch]
    skipped: int
    """Where the log goes on behind what was jumped before the first of `batches`."""
    next: int
    """Where the log goes on behind all of it."""
    epoch: int
    """The leader under which the last batch was written; -1 if that is not known."""


def split(data: bytes | None, offset: int, aborted: Iterable[Aborted] | None, place: str) -> Answer:
    """Return what *data*, read from *offset* on, holds; what of it lies before *offset* is cut.

    Raises:
        BrokerError: it is damaged; the text names *place* and where.
    """
    batches: list[Batch] = []
    skipped = next = offset
    epoch = -1
    if not data:
        return Answer(batches, skipped, next, epoch)
    waiting = sorted(aborted, key=lambda one: one.first_offset, reverse=True) if aborted else []
    open: set[int] = set()
    at = 0
    size = len(data)
    head, least = _HEAD.unpack_from, _HEAD.size
    while at + least <= size:
        base, length, leader, form, _, attributes, delta, _, _, producer, _, _, count = head(data, at)
        if form != _CURRENT:
            break
        end = at + _BEFORE + length
        if length < least - _BEFORE or delta < 0 or count < 0:
            raise damaged(place, next, "its head makes no sense")
        if end > size:
            break
        behind = base + delta + 1
        made: Decoded | None = None
        if waiting:
            while waiting and waiting[-1].first_offset < behind:
                open.add(waiting.pop().producer_id)
        if attributes & _CONTROL:
            open.discard(producer)
            count = 0
        elif attributes & _TRANSACTIONAL and producer in open:
            count = 0
        if behind > next:
            epoch = leader
            if count and base < offset:
                made = [record for record in _whole(memoryview(data)[at:end], base, place) if record.offset >= offset]
                count = len(made)
            next = behind
            if count:
                batches.append(Batch(data, at, end, base, behind, count, made))
            elif batches:
                batches[-1].next = behind
            else:
                skipped = behind
        at = end
    if at < size:
        at, next = _split_old(data, at, offset, next, batches, place)
    if not at:
        raise damaged(place, next, "the first batch is not whole")
    return Answer(batches, skipped, next, epoch)


def _split_old(data: bytes, at: int, offset: int, next: int, batches: list[Batch], place: str) -> tuple[int, int]:
    """Go on where records of an old format begin: they stay in a log for as long as it keeps them."""
    size = len(data)
    while at + _START.size <= size:
        base, length, _, form = _START.unpack_from(data, at)
        end = at + _BEFORE + length
        if form == _CURRENT:
            break
        if not 0 <= form < _CURRENT:
            raise damaged(place, next, f"nobody knows its format, {form}")
        if end > size:
            break
        if length < _OLD_LEAST - _BEFORE:
            raise damaged(place, next, "its head makes no sense")
        if base >= next:
            records = _opened(_old(memoryview(data)[at:end], form), base, place)
            made = [_renewed(record) for record in _all(records, base, place) if record.offset >= offset]
            next = base + 1
            if made:
                batches.append(Batch(data, at, end, made[0].offset, next, len(made), made))
        at = end
    return at, next


def _renewed(record: Native) -> Native:
    """Return *record* as one of the current format, in which each has a time: -1 where none was written."""
    timestamp: int | None = record.timestamp
    return _record(record.offset, -1 if timestamp is None else timestamp, 0, record.key, record.value, [])


def records(answer: Answer, place: str) -> Decoded:
    """Return all records of *answer* at once.

    Raises:
        BrokerError: a batch is damaged.
    """
    return [record for batch in answer.batches for record in batch.rest(place, batch.base)]


def _read(data: memoryview, base: int, place: str) -> Iterator[Native]:
    """Return the records of a batch of the current format, inflated within limits."""
    batch = _current(data)
    if batch.compression_type:
        if not batch.validate_crc():
            raise damaged(place, base, "its checksum is wrong")
        return _begun(_current(inflated(data, f"{place} at offset {base}")), base, place)
    return _opened(batch, base, place)


def _in_order(records: Decoded, first: int, end: int) -> bool:
    """Return whether *records* are one behind the other, from *first* on and below *end*.

    One whose meaningless byte means something to the decoder is read shifted by one field, offset and all.
    """
    offsets = [first - 1, *(record.offset for record in records), end]
    return all(one < other for one, other in pairwise(offsets))


def _whole(data: memoryview, base: int, place: str) -> Decoded:
    """Return all records of a batch of the current format, whatever somebody has made up."""
    (delta,) = _LAST.unpack_from(data, _LAST_AT)
    end = base + delta + 1
    problem: Exception
    try:
        made = list(_read(data, base, place))
        if _in_order(made, base, end):
            return made
        problem = ValueError("its offsets make no sense")
    except BrokerError:
        raise
    except Exception as error:
        problem = error
    try:
        made = decoded(inflated(data, f"{place} at offset {base}"))
    except (ValueError, struct.error):
        raise unreadable(place, base, problem) from problem
    if not _in_order(made, base, end):
        raise damaged(place, base, "its offsets make no sense")
    return made


def _opened(batch: _Decoder, base: int, place: str) -> Iterator[Native]:
    if not batch.validate_crc():
        raise damaged(place, base, "its checksum is wrong")
    return _begun(batch, base, place)


def _begun(batch: _Decoder, base: int, place: str) -> Iterator[Native]:
    try:
        return chain(iter(batch))  # which asks the batch once to begin: it refuses to do so later
    except Exception as error:
        raise unreadable(place, base, error) from error


def _all(records: Iterator[Native], base: int, place: str) -> Decoded:
    try:
        return list(records)
    except Exception as error:
        raise unreadable(place, base, error) from error


def damaged(place: str, offset: int, why: str) -> BrokerError:
    """Return the error that says that the log of *place* is damaged at *offset*."""
    return BrokerError(f"{place} is damaged at offset {offset}: {why}")


def unreadable(place: str, offset: int, error: Exception) -> BrokerError:
    """Return what it means that decoding a batch has raised *error*."""
    if isinstance(error, BrokerError):
        return error
    if isinstance(error, UnsupportedCodecError):
        return ConfigError(f"{place} at offset {offset} is compressed: {error}; install cramjam")
    return damaged(place, offset, f"{type(error).__name__}: {error}")
