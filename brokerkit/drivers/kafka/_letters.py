"""Dead letters: what is still there, and moving or removing it.

Letters lie in a topic, from which nothing but a beginning can be removed.  Which of them are gone stands in a log beside it,
the topic ``…..gone``: a redrive claims letters there before it copies them, and says behind it which are gone.  The order
of that log decides between two who want the same letter.  A committed offset would not do: Kafka forgets those of a group
without members after a week, and the letters would come back.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import msgspec

from ... import clock
from ..._tasks import finished
from ...address import AnyDeadLetters, AnyQueue, AnyTopic, Topic, internal
from ...driver import Receipt, Record, StoredRecord, redriven
from ...errors import AuthorizationError, BrokerError, BrokerUnavailable, ConfigError, NotFound
from ._cluster import PAUSE, loop_time, time_left
from ._context import Context
from ._cut import cut
from ._look import Look, bounds
from ._records import Native, parse_position, position, record_of
from ._view import TopicInfo

logger = logging.getLogger("brokerkit")

TIMEOUT: Final = 30.0
"""Seconds that one call may take; what an administrator asks for has no deadline of its own."""
_HELD: Final = 10.0
"""Seconds in which who has claimed letters must have moved them."""
_ALIVE: Final = 2 * _HELD
"""Seconds for which others wait for that: clocks run at different speeds, and answers take their time."""
_LONG_AGO: Final = 600.0
"""Age, by the clocks of two machines, of a claim that nobody waits for."""
_AT_ONCE: Final = 100
"""Letters in one claim."""
_ROOM: Final = 8 * 1024 * 1024
"""Bytes of letters that are copied at once."""
_NEAR: Final = 1000
"""Letters between two that are wanted which are read along with them."""
_CUT: Final = 1000
"""Letters at the beginning that are gone before they are removed from the disk."""
_MOST: Final = 100
"""Addresses of which something is kept."""


class Mark(msgspec.Struct, frozen=True, omit_defaults=True):
    """One record of the log of what is gone."""

    of: str
    """The id of the topic whose letters are meant: one that is made anew begins with none gone."""
    by: str
    """Who writes this: the same in a claim and its end."""
    claim: tuple[int, ...] | None = None
    """Offsets of letters that will be moved."""
    gone: tuple[int, ...] | None = None
    """Offsets of letters that are gone; this ends the claim."""
    below: int | None = None
    """All letters below this offset are gone."""


class _Claim(msgspec.Struct):
    at: int
    """Where it stands in the log."""
    letters: frozenset[int]
    until: float
    """Until when, on the loop's clock, it may be alive."""


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Mark)


class Letters:
    """What is there of one dead letter address, as far as it was looked at."""

    def __init__(self, context: Context, letters: AnyDeadLetters) -> None:
        self.address = letters
        self._cluster = context.cluster
        self._outboxes = context.outboxes
        self._lock = asyncio.Lock()
        log: AnyTopic = Topic("gone", bytes, partitions=1, retention=None)
        self._log = log._named(gone_log(letters))
        self._no_log = False
        self._forget(None)
        self._of = uuid.UUID(int=0)
        self.start = self.end = 0
        """Where the topic begins and ends."""

    def _forget(self, log: uuid.UUID | None) -> None:
        self._seen = log
        self._begins = 0
        self._at = -1
        self._gone: set[int] = set()
        self._below = 0
        self._claims: dict[str, _Claim] = {}

    # ------------------------------------------------------------------ asking

    def here(self, offset: int) -> bool:
        """Return whether that letter is there."""
        return max(self.start, self._below) <= offset < self.end and offset not in self._gone

    @property
    def first(self) -> int:
        """The offset of the oldest letter that is there; `end` if there is none."""
        offset = min(max(self.start, self._below), self.end)
        while offset in self._gone:
            offset += 1
        return offset

    @property
    def count(self) -> int:
        """How many letters are there."""
        beginning = min(max(self.start, self._below), self.end)
        return self.end - beginning - sum(beginning <= offset < self.end for offset in self._gone)

    async def look(self, until: float, *, fresh: bool = True) -> TopicInfo:
        """See what is there now.

        Raises:
            NotFound: nothing has died yet.
        """
        async with self._lock:
            info, log = await asyncio.gather(
                self._cluster.topic(self.address.name, timeout=time_left(until), fresh=fresh),
                self._find_log(until, fresh=fresh),
                return_exceptions=True,
            )
            if isinstance(info, BaseException):
                raise info
            # First where the letters end, then what is gone: so nothing that is gone counts as there.
            places = await bounds(self._cluster, info, (0,), timeout=time_left(until))
            if info.id != self._of:
                self._of = info.id
                self._forget(None)
            self.start, self.end = places[0]
            if isinstance(log, TopicInfo):
                await self._read(log, until)
            elif isinstance(log, NotFound):
                self._forget(None)
            else:
                raise log
            return info

    async def _find_log(self, until: float, *, fresh: bool) -> TopicInfo:
        """Return the log of what is gone; unless *fresh* it is believed that there is still none."""
        if self._no_log and not fresh and self._cluster.known(self._log.name) is None:
            raise NotFound(self._log.name)
        try:
            return await self._cluster.topic(self._log.name, timeout=time_left(until), fresh=fresh)
        except NotFound:
            self._no_log = True
            raise

    async def _read(self, log: TopicInfo, until: float) -> None:
        """Read on in the log of what is gone."""
        ((start, end),) = (await bounds(self._cluster, log, (0,), timeout=time_left(until))).values()
        if log.id != self._seen or end < self._at:
            self._forget(log.id)
        self._begins = start
        at = max(self._at, start)
        if at < end:
            look = Look(self._cluster, log, until, records=1000)
            look.begin(0, at, end)
            while (native := await look.first(0)) is not None:
                look.pop(0)
                self._take_in(native)
        self._at = max(at, end)
        self._gone = {offset for offset in self._gone if offset >= self.start}

    def _take_in(self, native: Native) -> None:
        try:
            mark = _decoder.decode(native.value or b"")
        except msgspec.DecodeError:
            return  # nothing that we have written
        if mark.of != self._of.hex:
            return
        if mark.claim is not None:
            now = loop_time()
            age = clock.current().time() - native.timestamp / 1000
            until = now + _ALIVE if age < _LONG_AGO else now
            self._claims[mark.by] = _Claim(native.offset, frozenset(mark.claim), until)
        if mark.gone is not None:
            self._gone.update(mark.gone)
            self._claims.pop(mark.by, None)
        if mark.below is not None:
            self._below = max(self._below, mark.below)
            self._gone = {offset for offset in self._gone if offset >= self._below}

    def _claimed(self, offsets: Collection[int], before: int) -> set[int]:
        """Return those of *offsets* that are claimed *before* an offset of the log, by somebody who may be alive."""
        now = loop_time()
        self._claims = {by: claim for by, claim in self._claims.items() if claim.until > now}
        held: set[int] = set()
        for claim in self._claims.values():
            if claim.at < before:
                held.update(claim.letters.intersection(offsets))
        return held

    # ------------------------------------------------------------------ looking

    def offset_of(self, text: str) -> int:
        """Return the offset of a position.

        Raises:
            ConfigError: it is no position here.
        """
        place = parse_position(text, self.address.name)
        if place is None or place[0]:
            raise ConfigError(f"{text[:100]!r} is no position in {self.address.name}")
        return place[2]

    async def browse(self, limit: int, after: str | None) -> list[StoredRecord]:
        """Return *limit* letters behind position *after*."""
        until = loop_time() + TIMEOUT
        offset = -1 if after is None else self.offset_of(after)
        info = await self.look(until, fresh=after is None)
        look = Look(self._cluster, info, until, records=limit)
        look.begin(0, max(offset + 1, self.first), self.end)
        stored: list[StoredRecord] = []
        while len(stored) < limit and (native := await look.first(0)) is not None:
            look.pop(0)
            if self.here(native.offset):
                stored.append(_letter(self.address, native))
        return stored

    async def oldest(self, info: TopicInfo, until: float) -> float | None:
        """Return when the oldest letter was first published."""
        look = Look(self._cluster, info, until, records=1)
        look.begin(0, self.first, self.end)
        native = await look.first(0)
        return None if native is None else record_of(self.address, 0, native).timestamp

    # ------------------------------------------------------------------ moving

    async def redrive(self, positions: Sequence[str], to: AnyQueue) -> list[BrokerError | None]:
        """Move letters to *to*; one result each."""
        offsets = [self.offset_of(text) for text in positions]
        wanted = list(dict.fromkeys(offsets))
        found: dict[int, BrokerError | None] = {}
        for start in range(0, len(wanted), _AT_ONCE):
            part = wanted[start : start + _AT_ONCE]
            try:
                found |= await self._move(part, to)
            except BrokerError as error:
                if not found:
                    raise
                found |= dict.fromkeys(wanted[start:], error)  # what was moved before is moved
                break
        results: list[BrokerError | None] = []
        for offset, text in zip(offsets, positions, strict=True):
            result = found.get(offset)
            results.append(_gone(text) if isinstance(result, NotFound) else result)
            found[offset] = NotFound()  # the second time
        return results

    async def _move(self, offsets: Sequence[int], to: AnyQueue) -> dict[int, BrokerError | None]:
        loop = asyncio.get_running_loop()
        until = loop.time() + TIMEOUT
        results: dict[int, BrokerError | None] = {}
        rest = set(offsets)
        while rest:
            info = await self.look(until, fresh=False)
            for offset in [offset for offset in rest if not self.here(offset)]:
                results[offset] = NotFound()
                rest.discard(offset)
            if free := rest - self._claimed(rest, self._at):
                # Whoever is cancelled leaves no copy behind of a letter that is still there.
                moving = asyncio.ensure_future(self._claim(info, sorted(free), to, until, results))
                try:
                    await finished(moving)
                except asyncio.CancelledError:
                    if not moving.cancelled():
                        moving.exception()  # nobody else will ask
                    raise
                moving.result()
                rest -= results.keys()
                await self._cut(info, until)
            elif rest and loop.time() + PAUSE > until:
                error = BrokerUnavailable(f"letters of {self.address.name} are being moved by somebody else")
                results |= dict.fromkeys(rest, error)
                break
            elif rest:
                await asyncio.sleep(2 * PAUSE)
        return results

    async def _claim(
        self,
        info: TopicInfo,
        offsets: Sequence[int],
        to: AnyQueue,
        until: float,
        results: dict[int, BrokerError | None],
    ) -> None:
        """Claim letters, and move those that nobody has claimed before: what became of these is put into *results*."""
        loop = asyncio.get_running_loop()
        by = os.urandom(8).hex()
        end = min(until, loop.time() + _HELD)
        at = await self._note(Mark(info.id.hex, by, claim=tuple(offsets)), end)
        try:
            await self.look(end, fresh=False)
        except BrokerError:
            await self._note(Mark(info.id.hex, by, gone=()), end)
            raise
        mine = [offset for offset in offsets if self.here(offset)]
        taken = self._claimed(mine, at)
        copied = await self._copy(info, [offset for offset in mine if offset not in taken], to, end)
        gone = tuple(offset for offset, error in copied.items() if error is None)
        try:
            at = await self._note(Mark(info.id.hex, by, gone=gone), max(end, loop.time() + _HELD / 2))
        except BrokerError as error:  # copied, but it cannot be said that they are gone
            copied |= dict.fromkeys(gone, error)
        else:
            self._gone.update(gone)
            self._claims.pop(by, None)
            if at == self._at:  # nobody else has written meanwhile
                self._at = at + 1
        results |= copied

    async def _note(self, mark: Mark, until: float) -> int:
        """Write *mark* into the log of what is gone; return where."""
        record = Record(self._log, mark.by, _encoder.encode(mark), timestamp=clock.current().time())
        problem: BrokerError = BrokerUnavailable(f"{self._log.name} could not be written in time")
        while loop_time() < until:
            (result,) = await self._outboxes.publish([record], time_left(until))
            if isinstance(result, Receipt):
                place = parse_position(result.position or "", self._log.name)
                assert place is not None
                return place[2]
            problem = result
            if not result.retryable:
                break
            await asyncio.sleep(PAUSE)
        raise problem

    async def _copy(
        self, info: TopicInfo, offsets: Sequence[int], to: AnyQueue, until: float
    ) -> dict[int, BrokerError | None]:
        """Store copies of letters in *to*, some at a time."""
        results: dict[int, BrokerError | None] = {offset: NotFound() for offset in offsets}
        pending: list[tuple[int, Record]] = []
        size = 0
        try:
            for run in _runs(offsets):
                look = Look(self._cluster, info, until, records=len(run))
                look.begin(0, run[0], run[-1] + 1)
                wanted = set(run)
                while (native := await look.first(0)) is not None:
                    look.pop(0)
                    if native.offset not in wanted:
                        continue
                    record = _letter(self.address, native).record
                    pending.append((native.offset, redriven(record, to)))
                    size += len(record.body or b"")
                    if size > _ROOM:
                        await self._store(pending, results, until)
                        size = 0
            await self._store(pending, results, until)
        except BrokerError as error:  # of what was not copied by now it is known that it was not
            results |= {offset: error for offset, result in results.items() if result is not None}
        return results

    async def _store(
        self, pending: list[tuple[int, Record]], results: dict[int, BrokerError | None], until: float
    ) -> None:
        if not pending:
            return
        stored = await self._outboxes.copy([record for _, record in pending], time_left(until))
        for (offset, _), result in zip(pending, stored, strict=True):
            error = None if isinstance(result, Receipt) else result
            # Where NotFound is said of a letter, it is the letter that is missing.
            results[offset] = BrokerError(str(error)) if isinstance(error, NotFound) else error
        pending.clear()

    # ------------------------------------------------------------------ removing

    async def purge(self) -> int:
        """Remove all letters and return how many."""
        until = loop_time() + TIMEOUT
        info = await self.look(until)
        count, end = self.count, self.end
        if not count:
            return 0
        try:
            await cut(self._cluster, info, {0: end}, timeout=time_left(until))
        except AuthorizationError:  # they can be called gone without the right to delete them
            await self._note(Mark(info.id.hex, os.urandom(8).hex(), below=end), until)
            self._below = max(self._below, end)
        else:
            self.start = max(self.start, end)
        await self._cut(info, until)
        return count

    async def _cut(self, info: TopicInfo, until: float) -> None:
        """Remove from the disk what is gone, where that is allowed and worth it; it changes nothing else."""
        first = self.first
        try:
            if first - self.start >= _CUT or self.start < first == self.end:
                await cut(self._cluster, info, {0: first}, timeout=time_left(until))
                self.start = max(self.start, first)
            self._claimed((), 0)
            nothing = self._below <= self.start and max(self._gone, default=-1) < self.start
            if nothing and not self._claims and self._seen is not None and self._begins < self._at:
                log = await self._cluster.topic(self._log.name, timeout=time_left(until))
                if log.id == self._seen:
                    await cut(self._cluster, log, {0: self._at}, timeout=time_left(until))
                    self._begins = self._at
        except BrokerError as error:
            logger.debug("%s: what is gone stays on the disk: %s", self.address.name, error)


def letters_in(known: dict[str, Letters], context: Context, address: AnyDeadLetters) -> Letters:
    """Return what is kept of *address*, which is then the latest of *known*."""
    found = known.pop(address.name, None) or Letters(context, address)
    known[address.name] = found
    if len(known) > _MOST:
        del known[next(iter(known))]
    return found


def gone_log(letters: AnyDeadLetters) -> str:
    """Return the name of the log of what is gone of *letters*."""
    return internal(*letters.name.split("..")[:-1], "gone")


def _letter(letters: AnyDeadLetters, native: Native) -> StoredRecord:
    record = record_of(letters, 0, native)
    return StoredRecord(record, position(letters.name, 0, native.timestamp, native.offset), record.deliveries)


def _gone(text: str) -> NotFound:
    return NotFound(f"there is no letter {text}")


def _runs(offsets: Iterable[int]) -> list[list[int]]:
    """Return ascending *offsets* in runs without wide gaps."""
    runs: list[list[int]] = []
    for offset in offsets:
        if runs and offset - runs[-1][-1] <= _NEAR:
            runs[-1].append(offset)
        else:
            runs.append([offset])
    return runs
