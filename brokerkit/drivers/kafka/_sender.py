"""Batches of records on their way to the brokers that lead their partitions, and what becomes of them.

Each partition has at most one batch under way, with the producer's id and a sequence number that the broker keeps (KIP-98):
a batch whose answer was lost is sent again as it was, and stored once.  A batch that was refused has used no number, so it
breaks nothing; where the numbers are lost all the same, that partition goes on under a new id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

from kio.schema.errors import ErrorCode
from kio.schema.init_producer_id.v4 import request as init

from ...driver import Receipt
from ...errors import BrokerError, BrokerUnavailable, Closed
from ._batch import CODECS, Batch, Lane, Producer
from ._calls import Calls
from ._cluster import PAUSE, Cluster
from ._errors import LOST_SESSION, STALE_LEADER, of_code
from ._produce import Produce
from ._records import milliseconds, place
from ._wire import Wire

logger = logging.getLogger("brokerkit")

_LINE: Final = "publishing"
_REQUEST: Final = 8 * 1024 * 1024
"""Bytes after which a request is full, where it has batches of several partitions."""
_MARGIN: Final = 1.0
"""Seconds that an answer is waited for beyond what the broker may take."""
_SLOW: Final = 1.0
"""Seconds without an answer after which to look who leads by now."""
_init: Any = init

_ONE_RECORD: Final = frozenset({
    ErrorCode.message_too_large, ErrorCode.record_list_too_large, ErrorCode.invalid_record, ErrorCode.invalid_timestamp,
    ErrorCode.unsupported_for_message_format,
})  # fmt: skip
"""A broker refuses a batch for one record in it."""
_NOT_STORED: Final = frozenset({
    ErrorCode.corrupt_message, ErrorCode.not_enough_replicas, ErrorCode.unknown_topic_or_partition,
    ErrorCode.throttling_quota_exceeded,
})  # fmt: skip
"""Answers after which sending again can help.  All others like that may also come behind the storing, as when a leader loses
its partition while it waits for the copies."""


class _Sent:
    """A request under way."""

    __slots__ = ("node", "since", "work")

    def __init__(self, node: int, since: float, work: Sequence[tuple[Lane, Batch]]) -> None:
        self.node = node
        self.since = since
        self.work = work


class Sender:
    """Sends what waits in lanes, and gives the results to calls."""

    def __init__(self, cluster: Cluster, calls: Calls) -> None:
        self.producer: Producer | None = None
        """Who sends, where nobody has before."""
        self._cluster = cluster
        self._calls = calls
        self._timeout = cluster.settings.timeout
        self._codec = CODECS[cluster.settings.compression]
        self._loop = asyncio.get_running_loop()
        self._introducing = asyncio.Lock()
        self._ready: dict[Lane, None] = {}
        """What has something to send and nothing under way."""
        self._under_way: dict[asyncio.Future[Any], _Sent] = {}
        self._coming = False
        self._later: asyncio.TimerHandle | None = None
        self._slow: asyncio.TimerHandle | None = None
        self._closed = False

    def close(self) -> None:
        """Send nothing more."""
        self._closed = True
        for handle in (self._later, self._slow):
            if handle is not None:
                handle.cancel()
        self._later = self._slow = None
        self._ready.clear()

    def add(self, lane: Lane) -> None:
        """Send what waits in *lane*, in a moment: what is published in the same turn of the loop travels together."""
        if not lane.busy:
            self._ready[lane] = None
            if not self._coming:
                self._coming = True
                self._loop.call_soon(self._flush)

    # ------------------------------------------------------------------ sending

    def _flush(self) -> None:
        """Send what may be sent."""
        self._coming = False
        if self._closed:
            return
        now = self._loop.time()
        work: dict[int, list[Lane]] = {}
        wait = False
        for lane in list(self._ready):
            if now < lane.not_before:
                wait = True
            elif lane.leader < 0:
                lane.sweep(self._calls.drop)
                if lane.waiting:
                    self._calls.problem = BrokerUnavailable(f"{lane!r} has no leader at the moment")
                    self._cluster.stale()
                    wait = True
                else:
                    del self._ready[lane]
            else:
                del self._ready[lane]
                work.setdefault(lane.leader, []).append(lane)
        if wait and self._later is None:
            self._later = self._loop.call_later(PAUSE, self._resume)
        for node, lanes in work.items():
            self._send(node, lanes, now)

    def _resume(self) -> None:
        """Go on after a pause."""
        self._later = None
        self._flush()

    def _send(self, node: int, lanes: Sequence[Lane], now: float) -> None:
        """Send one batch of each lane."""
        wire = self._cluster.wire(node, _LINE)
        if wire is None or not all(lane.takes(self.producer) for lane in lanes):
            for lane in lanes:
                lane.busy = True
            self._cluster.begin(self._prepare, node, lanes)
            return
        work: list[tuple[Lane, Batch]] = []
        size = 0
        for lane in lanes:
            batch = lane.first(now, self._calls.drop)
            if batch is None:
                continue
            if not lane.takes(self.producer):  # it was given up in this moment
                self.add(lane)
                continue
            if not self._number(lane, batch):
                continue
            if size and size + len(batch.data) > _REQUEST:
                self._dispatch(wire, node, work, now)
                work, size = [], 0
            work.append((lane, batch))
            size += len(batch.data)
        if work:
            self._dispatch(wire, node, work, now)

    def _number(self, lane: Lane, batch: Batch) -> bool:
        """Give *batch* its number; return whether it can be sent."""
        if lane.producer is None:
            lane.producer, lane.sequence = self.producer, 0
        assert lane.producer is not None
        try:
            batch.number(lane.producer, lane.sequence, self._codec, lane.kind)
        except Exception as error:
            logger.exception("%s: records for %r cannot be written", self._cluster.settings.shown, lane)
            self._refuse(lane, batch, BrokerError(f"the driver failed: {type(error).__name__}"))
            self._go_on(lane)
            return False
        return True

    def _dispatch(self, wire: Wire, node: int, work: Sequence[tuple[Lane, Batch]], now: float) -> None:
        topics: dict[str, list[tuple[int, bytes]]] = {}
        for lane, batch in work:
            topics.setdefault(lane.topic, []).append((lane.number, batch.data))
        try:
            answer = wire.send(Produce(topics, self._timeout), self._timeout + _MARGIN)
        except BrokerError as error:  # it was closed in this very turn
            for lane, _ in work:
                self._missed(lane, error)
                self._go_on(lane)
            return
        for lane, batch in work:
            lane.busy = batch.sent = True
        self._under_way[answer] = _Sent(node, now, work)
        answer.add_done_callback(self._answered)
        if self._slow is None:
            self._slow = self._loop.call_later(_SLOW, self._look_around)

    def _go_on(self, lane: Lane) -> None:
        """Send what else there is in *lane*."""
        if lane.waiting:
            self.add(lane)

    async def _prepare(self, node: int, lanes: Sequence[Lane]) -> None:
        """Get what is needed to send: a number to send under, and a connection."""
        failure: BrokerError | None = None
        try:
            await self._introduce(lanes)
            await self._cluster.open(node, _LINE, timeout=self._timeout)
        except BrokerUnavailable as error:
            for lane in lanes:
                self._missed(lane, error)
        except BrokerError as error:
            failure = error
        except Exception as error:
            logger.exception("%s: publishing failed", self._cluster.settings.shown)
            failure = BrokerError(f"the driver failed: {type(error).__name__}")
        for lane in lanes:
            lane.busy = False
            if failure is not None:
                self._calls.fail(lane.take_all(), failure)
            self._go_on(lane)

    async def _introduce(self, lanes: Sequence[Lane]) -> None:
        """Make sure that there is a producer whose numbers none of *lanes* has lost."""
        async with self._introducing:
            if all(lane.takes(self.producer) for lane in lanes):
                return
            request = _init.InitProducerIdRequest(transactional_id=None, transaction_timeout=timedelta(minutes=1))
            answer = await self._cluster.call(None, request, timeout=self._timeout)
            code: ErrorCode = answer.error_code
            if code is ErrorCode.cluster_authorization_failed:
                raise of_code(int(code), f"WRITE on topic {lanes[0].topic} (or on any other)")
            if code is not ErrorCode.none:
                raise of_code(int(code), "asking for a producer id")
            self.producer = Producer(int(answer.producer_id), int(answer.producer_epoch))

    # ------------------------------------------------------------------ leaders that do not answer

    def _look_around(self) -> None:
        """Look at the cluster if an answer takes long."""
        self._slow = None
        if self._under_way and not self._closed:
            now = self._loop.time()
            if any(now - sent.since >= _SLOW for sent in self._under_way.values()):
                self._cluster.stale()
            self._slow = self._loop.call_later(_SLOW, self._look_around)

    def moved(self) -> None:
        """Wait no longer for a leader that is none by now: one that is frozen does not say so."""
        now = self._loop.time()
        for node in {
            sent.node
            for sent in self._under_way.values()
            if now - sent.since >= _SLOW and any(lane.leader not in {-1, sent.node} for lane, _ in sent.work)
        }:
            self._cluster.drop(_LINE, node)

    # ------------------------------------------------------------------ answers

    def _answered(self, future: asyncio.Future[Any]) -> None:
        sent = self._under_way.pop(future)
        for lane, batch in sent.work:
            lane.busy = batch.sent = False
        error = Closed("it was cancelled") if future.cancelled() else future.exception()
        parts: dict[tuple[str, int], Any] = {}
        if error is None:
            for topic in future.result().responses:
                for part in topic.partition_responses:
                    parts[topic.name, part.index] = part
        for lane, batch in sent.work:
            part = parts.get((lane.topic, lane.number))
            if not lane.batches or lane.batches[0] is not batch:
                pass  # taken away meanwhile
            elif part is not None:
                self._judge(lane, batch, part)
            else:
                # Whatever it is: it was sent, and nobody knows what has become of it.
                batch.doubtful = True
                self._missed(lane, error or BrokerUnavailable(f"the broker says nothing of {lane!r}"))
            self._go_on(lane)

    def _judge(self, lane: Lane, batch: Batch, part: Any) -> None:
        """See what a broker says of *batch*."""
        code: ErrorCode = part.error_code
        if code is ErrorCode.none or code is ErrorCode.duplicate_sequence_number:
            self._stored(lane, batch, part)
            return
        what = f"WRITE on topic {lane.topic}"
        if code in _ONE_RECORD and not batch.doubtful:
            if len(batch.entries) > 1:
                lane.split()  # one of them shall fail alone
                return
            if code is ErrorCode.message_too_large:
                what = f"a body of {len(batch.entries[0].record.body or b'')} bytes for topic {lane.topic}"
        error = of_code(int(code), what, part.error_message)
        if code in LOST_SESSION and not batch.doubtful:
            lane.lose_numbers()
            self._missed(lane, error, look=False)
        elif code.retriable or code is ErrorCode.unknown_server_error:
            batch.doubtful = batch.doubtful or code not in _NOT_STORED
            self._missed(lane, error, look=code in STALE_LEADER)
        else:
            self._refuse(lane, batch, error)

    def _stored(self, lane: Lane, batch: Batch, part: Any) -> None:
        lane.stored()
        self._calls.problem = None
        base: int = part.base_offset
        if base < 0:  # so long ago that the broker does not remember where
            for entry in batch.entries:
                self._calls.put(entry, Receipt(entry.record.id))
            return
        times, appended = batch.times, part.log_append_time
        if appended is not None:
            at = milliseconds(appended.timestamp())
            # Of a batch that was stored before a broker tells the latest of its own times, as if it had set them.
            if at != max(times):
                times = [at] * len(batch.entries)
        self._calls.stored(batch.entries, place(lane.topic, lane.number), times, base)
        batch.entries = []  # they know their batch: only the garbage collector would free them

    def _missed(self, lane: Lane, error: BaseException, *, look: bool = True) -> None:
        """Nothing came of it this time; *look* who leads by now."""
        if isinstance(error, BrokerError):
            self._calls.problem = error
        if look:
            self._cluster.stale()
        lane.not_before = self._loop.time() + PAUSE

    def _refuse(self, lane: Lane, batch: Batch, error: BrokerError) -> None:
        """It will never be stored."""
        lane.batches.popleft()
        if batch.doubtful:
            lane.lose_numbers()
        self._calls.fail(batch.entries, error)
