"""Publishing: records gather per partition and leave together; what may be stored is sent again under the same number only.

Each partition has at most one batch under way, with the producer's id and a sequence number that the broker keeps (KIP-98):
a batch whose answer was lost is sent again as it was, and stored once.  A batch that was refused has used no number, so it
breaks nothing; where the numbers are lost all the same, that partition goes on under a new id.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

from anyio.abc import TaskGroup
from kio.schema.errors import ErrorCode
from kio.schema.init_producer_id.v4 import request as init
from kio.schema.produce.v9 import request as produce

from ...address import Address
from ...driver import Receipt, Record
from ...errors import (
    AuthorizationError,
    BrokerError,
    BrokerUnavailable,
    BufferFull,
    Closed,
    NotAttempted,
    NotFound,
    PublishUnknown,
    TooLarge,
)
from ...policy import MAX_BODY
from ._batch import CODECS, OVERHEAD, Batch, Entry, Item, Lane, Producer, Result
from ._cluster import PAUSE, Cluster
from ._create import create
from ._errors import LOST_SESSION, Unanswered, of_code
from ._outbox import Outbox, failures, overtakes
from ._records import position

logger = logging.getLogger("brokerkit")

MAX_WAITING: Final = 64 * 1024 * 1024
"""Bytes that may wait to be stored."""
_LINE: Final = "publishing"
_MARGIN: Final = 1.0
"""Seconds that an answer is waited for beyond what the broker may take."""
_init: Any = init
_produce: Any = produce

_ONE_RECORD: Final = frozenset(
    {
        ErrorCode.message_too_large,
        ErrorCode.record_list_too_large,
        ErrorCode.invalid_record,
        ErrorCode.invalid_timestamp,
        ErrorCode.corrupt_message,
        ErrorCode.unsupported_for_message_format,
    }
)
"""A broker refuses a batch for one record in it."""
_DOUBT: Final = frozenset(
    {ErrorCode.request_timed_out, ErrorCode.not_enough_replicas_after_append, ErrorCode.unknown_server_error}
)
"""The batch may be stored."""


class Outboxes:
    """All publishing of one driver."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._codec = CODECS[cluster.settings.compression]
        self._tasks: TaskGroup | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._boxes: dict[str, Outbox] = {}
        self._producer: asyncio.Future[Producer] | None = None
        self._items: dict[Item, list[Entry]] = {}
        self._waiting = 0
        """Bytes."""
        self._ready: dict[Lane, Outbox] = {}
        self._coming = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._later: asyncio.TimerHandle | None = None
        self._idle: asyncio.Future[None] | None = None
        self._problem: BrokerError | None = None

    def start(self, tasks: TaskGroup) -> None:
        """Send in *tasks* from now on."""
        self._tasks, self._loop = tasks, asyncio.get_running_loop()

    # ------------------------------------------------------------------ adding

    async def publish(self, records: Sequence[Record], timeout: float) -> list[Result]:
        """Store *records*, in order within each address and key; one result each, after *timeout* seconds at the latest."""
        if not records:
            return []
        if self._loop is None or self._tasks is None:
            raise Closed("the connection is closed")
        end = self._loop.time() + timeout
        first = records[0].address
        if all(record.address is first for record in records):
            return await self._one(first, records, end)
        results: list[Result | None] = [None] * len(records)
        parts: dict[str, list[int]] = {}
        for index, record in enumerate(records):
            parts.setdefault(record.address.name, []).append(index)
        calls = [
            self._one(records[places[0]].address, [records[place] for place in places], end)
            for places in parts.values()
        ]
        for places, stored in zip(parts.values(), await asyncio.gather(*calls), strict=True):
            for place, result in zip(places, stored, strict=True):
                results[place] = result
        return [result for result in results if result is not None]

    async def _one(self, address: Address, records: Sequence[Record], end: float) -> list[Result]:
        """Store *records*, which are all of *address*."""
        box = self._boxes.get(address.name)
        if box is None or box.info is None:
            try:
                box = await self._open(address, end)
            except BrokerError as error:
                return failures(records, error)
        limit = MAX_BODY if ".." not in box.name else math.inf
        if all(len(record.body or b"") <= limit for record in records):
            return await self._add(box, records, end)
        results: list[Result | None] = [None] * len(records)
        refused: set[bytes] = set()
        places: list[int] = []
        for index, record in enumerate(records):
            if len(record.body or b"") > limit:
                results[index] = TooLarge(f"the body has {len(record.body or b'')} bytes, more than {MAX_BODY}")
                if record.key is not None:
                    refused.add(record.key)
            elif record.key in refused:
                results[index] = overtakes(record)
            else:
                places.append(index)
        if places:
            stored = await self._add(box, [records[place] for place in places], end)
            for place, result in zip(places, stored, strict=True):
                results[place] = result
        return [result for result in results if result is not None]

    async def _open(self, address: Address, end: float) -> Outbox:
        """Find out what there is of *address*; a derived one is created."""
        assert self._loop is not None
        left = max(0.001, end - self._loop.time())
        try:
            info = await self._cluster.topic(address.name, timeout=left)
        except NotFound:
            if ".." not in address.name:
                raise NotFound(f"{address!r} does not exist; declare it") from None
            info = await create(self._cluster, address, timeout=max(0.001, end - self._loop.time()))
        box = self._boxes.setdefault(address.name, Outbox(address))
        if box.info is None:
            box.adopt(info)
        return box

    def _add(self, box: Outbox, records: Sequence[Record], end: float) -> asyncio.Future[list[Result]]:
        assert self._loop is not None
        future: asyncio.Future[list[Result]] = self._loop.create_future()
        if self._waiting > MAX_WAITING:
            text = f"{self._waiting} bytes wait to be published on {self._cluster.settings.shown} already"
            future.set_result(failures(records, BufferFull(text)))
            return future
        size = sum([OVERHEAD + len(record.body or b"") for record in records])
        self._waiting += size
        item = Item(len(records), size, end, future)
        entries = [Entry(record, item, index, queue=box.queue) for index, record in enumerate(records)]
        self._items[item] = entries
        ready = self._ready
        for entry in entries:
            lane = box.lane(entry.key)
            lane.pending.append(entry)
            ready[lane] = box
        if end < self._timer_at:
            self._arm(end)
        self._soon()
        return future

    # ------------------------------------------------------------------ sending

    def _soon(self) -> None:
        """Send, in a moment: what is published in the same turn of the loop travels together."""
        if not self._coming and self._loop is not None:
            self._coming = True
            self._loop.call_soon(self._flush)

    def _wait(self) -> None:
        """Send, after a pause."""
        if self._later is None and self._loop is not None:
            self._later = self._loop.call_later(PAUSE, self._resume)

    def _resume(self) -> None:
        self._later = None
        self._flush()

    def _flush(self) -> None:
        """Send what may be sent."""
        self._coming = False
        if self._tasks is None or self._loop is None:
            return
        now = self._loop.time()
        work: dict[int, list[tuple[Outbox, Lane, Batch]]] = {}
        for lane, box in list(self._ready.items()):
            if lane.busy or not self._up_to_date(box):
                continue
            if now < lane.not_before:
                self._wait()
                continue
            batch = lane.first(self._drop)
            if batch is None:
                self._ready.pop(lane, None)
                continue
            assert box.info is not None
            leader = box.info.leader(lane.number)
            if leader < 0:
                self._problem = BrokerUnavailable(f"{box.name}[{lane.number}] has no leader at the moment")
                self._cluster.stale()
                self._wait()
                continue
            lane.busy = True
            work.setdefault(leader, []).append((box, lane, batch))
            if any(entry.key is None for entry in batch.entries):
                box.move_on()
        for node, batches in work.items():
            self._tasks.start_soon(self._send, node, batches)
        if not self._ready and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _up_to_date(self, box: Outbox) -> bool:
        """Have *box* know the topic as it is; return whether there is one."""
        info = self._cluster.known(box.name)
        if info is None:
            if not box.opening and self._tasks is not None:
                box.opening = True
                self._tasks.start_soon(self._reopen, box)
            return False
        if info is not box.info:
            for lane in [lane for lane, other in self._ready.items() if other is box]:
                if info.id != (box.info.id if box.info else None):
                    del self._ready[lane]
            for entry in box.adopt(info):
                if entry.doubtful:
                    self._put(entry, PublishUnknown(f"{box.name} was deleted and made again meanwhile"))
                elif entry.open:
                    entry.batch = None
                    lane = box.lane(entry.key)
                    lane.pending.append(entry)
                    self._ready[lane] = box
                else:
                    self._drop(entry)
        return True

    async def _reopen(self, box: Outbox) -> None:
        """Find out what has become of the topic of *box*."""
        try:
            await self._cluster.topic(box.name, timeout=self._cluster.settings.timeout, fresh=True)
        except NotFound as error:
            if ".." not in box.name:
                self._fail_all(box, NotFound(f"{box.address!r} does not exist; declare it"))
            else:
                await self._make(box, error)
        except (BrokerUnavailable, Closed) as error:
            self._problem = error
            await asyncio.sleep(PAUSE)
        except BrokerError as error:
            self._fail_all(box, error)
        finally:
            box.opening = False
        self._soon()

    async def _make(self, box: Outbox, error: BrokerError) -> None:
        try:
            await create(self._cluster, box.address, timeout=self._cluster.settings.timeout)
        except BrokerUnavailable as failure:
            self._problem = failure
        except BrokerError as failure:
            self._fail_all(box, failure)

    def _fail_all(self, box: Outbox, error: BrokerError) -> None:
        for lane in box.lanes:
            self._ready.pop(lane, None)
            for entry in lane.take_all():
                self._fail(lane, entry, error)
        box.info, box.lanes = None, []

    async def _send(self, node: int, work: list[tuple[Outbox, Lane, Batch]]) -> None:
        """Send one batch of each lane, and see what becomes of it."""
        assert self._loop is not None
        batches = [batch for _, _, batch in work]
        try:
            request = await self._request(work)
            for batch in batches:
                batch.sent = True
            timeout = self._cluster.settings.timeout + _MARGIN
            answer = await self._cluster.call(node, request, timeout=timeout, line=_LINE)
            self._answered(work, answer)
        except Unanswered as error:
            for batch in batches:
                batch.doubtful = True
            self._missed(work, error)
        except BrokerUnavailable as error:
            self._missed(work, error)
        except BrokerError as error:
            for _, lane, batch in work:
                self._refuse(lane, batch, error)
        except Exception as error:
            logger.exception("%s: publishing failed", self._cluster.settings.shown)
            for _, lane, batch in work:
                self._refuse(lane, batch, BrokerError(f"the driver failed: {type(error).__name__}"))
        finally:
            for batch in batches:
                batch.sent = False
            for _, lane, _ in work:
                lane.busy = False
        self._flush()

    async def _request(self, work: list[tuple[Outbox, Lane, Batch]]) -> Any:
        """Return the request that carries all batches, each with its number."""
        topics: dict[str, list[Any]] = {}
        for box, lane, batch in work:
            if lane.producer is None:
                lane.producer, lane.sequence = await self._introduce(box, lane.lost), 0
            numbers = (batch.producer, batch.sequence)
            if not batch.doubtful and (not batch.data or numbers != (lane.producer, lane.sequence)):
                batch.number(lane.producer, lane.sequence, self._codec)
            part = _produce.PartitionProduceData(index=lane.number, records=batch.data)
            topics.setdefault(box.name, []).append(part)
        return _produce.ProduceRequest(
            acks=-1,
            timeout=timedelta(seconds=self._cluster.settings.timeout),
            topic_data=tuple(
                _produce.TopicProduceData(name=name, partition_data=tuple(parts)) for name, parts in topics.items()
            ),
        )

    async def _introduce(self, box: Outbox, lost: Producer | None) -> Producer:
        """Return a producer id, which is not the one that is *lost*."""
        if self._producer is None or (self._producer.done() and self._producer.result() == lost):
            assert self._loop is not None
            self._producer = self._loop.create_future()
            try:
                answer = await self._cluster.call(
                    None,
                    _init.InitProducerIdRequest(transactional_id=None, transaction_timeout=timedelta(minutes=1)),
                    timeout=self._cluster.settings.timeout,
                )
                if answer.error_code is not ErrorCode.none:
                    raise _introduction_failed(answer.error_code, box)
                self._producer.set_result(Producer(int(answer.producer_id), int(answer.producer_epoch)))
            except BaseException as error:
                failed, self._producer = self._producer, None
                failed.set_exception(error if isinstance(error, BrokerError) else BrokerUnavailable("no producer id"))
                failed.exception()
                raise
        return await asyncio.shield(self._producer)

    # ------------------------------------------------------------------ answers

    def _answered(self, work: list[tuple[Outbox, Lane, Batch]], answer: Any) -> None:
        parts = {(topic.name, part.index): part for topic in answer.responses for part in topic.partition_responses}
        for box, lane, batch in work:
            part = parts.get((box.name, lane.number))
            if part is None or not lane.batches or lane.batches[0] is not batch:
                continue  # taken away meanwhile
            code: ErrorCode = part.error_code
            if code in {ErrorCode.none, ErrorCode.duplicate_sequence_number}:
                self._stored(box, lane, batch, part)
            elif code in _ONE_RECORD:
                self._one_is_bad(lane, batch, part)
            elif code in LOST_SESSION:
                self._numbers_lost(lane, batch, code)
            elif code in _DOUBT or code.retriable:
                batch.doubtful = batch.doubtful or code in _DOUBT
                self._missed([(box, lane, batch)], of_code(int(code), f"WRITE on topic {box.name}"))
            else:
                self._refuse(lane, batch, of_code(int(code), f"WRITE on topic {box.name}"))

    def _stored(self, box: Outbox, lane: Lane, batch: Batch, part: Any) -> None:
        lane.stored()
        self._problem = None
        base, name, number = int(part.base_offset), box.name, lane.number
        appended = part.log_append_time
        at = None if appended is None else int(appended.timestamp() * 1000)
        for offset, entry in enumerate(batch.entries, base):
            place = position(name, number, entry.time if at is None else at, offset) if base >= 0 else None
            self._put(entry, Receipt(entry.record.id, place))

    def _one_is_bad(self, lane: Lane, batch: Batch, part: Any) -> None:
        """One record is refused: it fails alone, the others are sent again."""
        if len(batch.entries) > 1:
            lane.split()
            return
        lane.batches.popleft()
        (entry,) = batch.entries
        size = len(entry.body or b"")
        code: ErrorCode = part.error_code
        if code in {ErrorCode.message_too_large, ErrorCode.record_list_too_large}:
            error: BrokerError = TooLarge(f"a body of {size} bytes is more than max.message.bytes of the topic allows")
        else:
            error = of_code(int(code), f"the record is refused: {part.error_message or code.name}")
        self._fail(lane, entry, error)

    def _numbers_lost(self, lane: Lane, batch: Batch, code: ErrorCode) -> None:
        lane.lose_numbers()
        if batch.doubtful:
            lane.batches.popleft()
            for entry in batch.entries:
                self._fail(
                    lane, entry, PublishUnknown(f"the broker has lost count of what was published ({code.name})")
                )

    def _missed(self, work: list[tuple[Outbox, Lane, Batch]], error: BrokerError) -> None:
        """Nothing came of it this time."""
        assert self._loop is not None
        self._problem = error
        self._cluster.stale()
        for _, lane, _ in work:
            lane.not_before = self._loop.time() + PAUSE
        self._wait()

    def _refuse(self, lane: Lane, batch: Batch, error: BrokerError) -> None:
        """It will never be stored."""
        if not lane.batches or lane.batches[0] is not batch:
            return
        lane.batches.popleft()
        if batch.doubtful:
            lane.lose_numbers()
            error = _unknown(error)
        for entry in batch.entries:
            self._fail(lane, entry, error)

    # ------------------------------------------------------------------ results

    def _put(self, entry: Entry, result: Result) -> None:
        """Give *entry* its result."""
        item = entry.item
        if item.results[entry.index] is None:
            item.results[entry.index] = result
            item.left -= 1
            if not item.left:
                self._items.pop(item, None)
                self._waiting -= item.size
                if not item.future.done():
                    item.future.set_result(item.results)  # type: ignore[arg-type]

    def _drop(self, entry: Entry) -> None:
        """Nobody waits for *entry*."""
        self._put(entry, NotAttempted("nobody waits for it"))

    def _fail(self, lane: Lane, entry: Entry, error: BrokerError) -> None:
        """Let *entry* fail, and what would overtake it."""
        later = list(lane.later(entry)) if not isinstance(error, PublishUnknown) else []
        self._put(entry, error)
        for other in later:
            if not other.doubtful:
                self._put(other, overtakes(other.record))

    # ------------------------------------------------------------------ deadlines

    def _arm(self, when: float) -> None:
        assert self._loop is not None
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._late)
        self._timer_at = when

    def _late(self) -> None:
        """Fail what is over its deadline, and set the timer for what is next."""
        assert self._loop is not None
        now = self._loop.time()
        self._timer, self._timer_at = None, math.inf
        nearest = math.inf
        for item, entries in list(self._items.items()):
            if now < item.deadline:
                nearest = min(nearest, item.deadline)
            else:
                self._expire(entries)
        if nearest < math.inf:
            self._arm(nearest)
        self._soon()

    def _expire(self, entries: Sequence[Entry]) -> None:
        """The time of a call is up."""
        failed: set[bytes] = set()
        why = f": {self._problem}" if self._problem is not None else ""
        for entry in entries:
            if not entry.open:
                continue
            if entry.doubtful:
                self._put(entry, PublishUnknown(f"no answer before the deadline{why}"))
            elif entry.key in failed:
                self._put(entry, overtakes(entry.record))
            else:
                self._put(entry, BrokerUnavailable(f"not stored before the deadline{why}"))
            if entry.key is not None:
                failed.add(entry.key)

    async def idle(self) -> None:
        """Return when nothing is on its way."""
        assert self._loop is not None
        while self._items:
            self._idle = self._loop.create_future()
            self._soon()
            await self._idle

    def close(self) -> None:
        """Send nothing more, and fail what waits."""
        self._tasks = None
        for handle in (self._timer, self._later):
            if handle is not None:
                handle.cancel()
        self._timer = self._later = None
        self._problem = Closed("the connection is closed")
        for entries in list(self._items.values()):
            self._expire(entries)


def _unknown(error: BrokerError) -> PublishUnknown:
    unknown = PublishUnknown(f"it may be stored: {error}")
    unknown.__cause__ = error
    return unknown


def _introduction_failed(code: ErrorCode, box: Outbox) -> BrokerError:
    if code is ErrorCode.cluster_authorization_failed:
        return AuthorizationError(f"WRITE on topic {box.name} is not allowed (nor IDEMPOTENT_WRITE on the cluster)")
    return of_code(int(code), "asking for a producer id")
