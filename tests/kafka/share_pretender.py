"""Brokers within the test's own process that have share groups, of which one topic's records are kept as Kafka does.

What a broker does of its own accord (locks that run out, sessions that end with their connection, acknowledgements of a
partition that are all refused for one of them) happens here too; a test tells what goes wrong besides, and sees what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from kio.index import load_request_schema
from kio.schema.errors import ErrorCode
from kio.schema.share_acknowledge.v2 import response as acknowledging
from kio.schema.share_fetch.v2 import response as fetching
from kio.serial import entity_reader

from .liar import frame
from .logs import batch
from .pretender import NONE, Pretender

FETCH, ACKNOWLEDGE = 78, 79
_fetch: Any = fetching
_acknowledge: Any = acknowledging
DENIED: Final = {ErrorCode.group_authorization_failed, ErrorCode.topic_authorization_failed}


@dataclass
class Entry:
    """A record of a partition, or the lack of one."""

    batch: bytes = field(repr=False)
    """What it is in; nothing where there is none."""
    count: int = 0
    owner: Session | None = None
    until: float = 0.0
    done: bool = False
    history: list[str] = field(default_factory=list[str])
    """What was said of it, by type."""


@dataclass(eq=False)
class Session:
    """Of a member with one broker."""

    node: int
    member: str
    connection: object
    epoch: int = 1
    partitions: set[int] = field(default_factory=set[int])


@dataclass
class Heard:
    """A request of a member."""

    key: int
    epoch: int
    said: dict[int, list[tuple[int, int, tuple[int, ...]]]]
    records: int
    wait: float
    renew: bool


class SharePretender(Pretender):
    """One topic, ``orders``, and one group that reads it."""

    def __init__(self, partitions: int = 1, nodes: int = 1, *, lock: float = 30.0) -> None:
        super().__init__(nodes)
        self.lock = lock
        self.topic = self.create("orders", partitions)
        self.entries: list[list[Entry]] = [[] for _ in range(partitions)]
        self.sessions: dict[tuple[int, str], Session] = {}
        self.heard: list[Heard] = []
        self.top: deque[ErrorCode] = deque()
        """What the next requests are answered altogether, whatever they ask."""
        self.wrong: dict[int, deque[ErrorCode]] = {}
        """What the next fetches are answered for a partition."""
        self.refused: deque[int] = deque()
        """What is answered to the next acknowledgements of a partition, which are not done; below zero those that are."""
        self.hidden: set[int] = set()
        """Partitions of which nothing is handed out."""
        self.patience: asyncio.Event | None = None
        """Until when acknowledgements wait, if that is a test's matter."""
        self.news = asyncio.Event()
        self.limit = 1000
        self.archived: list[tuple[int, int]] = []
        """Partition and offset of what was handed out too often."""

    # ------------------------------------------------------------------ what there is

    def put(self, count: int, partition: int = 0, *, per_batch: int = 100) -> None:
        """Store records."""
        log = self.entries[partition]
        while count:
            some = min(count, per_batch)
            data = batch(*range(len(log), len(log) + some))
            log += [Entry(data) for _ in range(some)]
            count -= some
        self.tell()

    def put_batch(self, data: bytes, last: int, partition: int = 0) -> None:
        """Store a batch as it is, up to the offset *last*, which has to follow."""
        log = self.entries[partition]
        log += [Entry(data) for _ in range(last + 1 - len(log))]
        self.tell()

    def tell(self) -> None:
        """Have requests that wait look again."""
        news, self.news = self.news, asyncio.Event()
        news.set()

    def done(self, partition: int = 0) -> list[int]:
        """Return the offsets that were accepted."""
        return [offset for offset, entry in enumerate(self.entries[partition]) if entry.done]

    def counts(self, partition: int = 0) -> list[int]:
        """Return how often each record was handed out."""
        return [entry.count for entry in self.entries[partition]]

    def said_of(self, offset: int, partition: int = 0) -> str:
        """Return what was said of a record, and done."""
        return "".join(self.entries[partition][offset].history)

    def free(self, session: Session) -> None:
        """End a session; what it holds goes to others."""
        for log in self.entries:
            for entry in log:
                if entry.owner is session:
                    entry.owner = None
        for key in [key for key, each in self.sessions.items() if each is session]:
            del self.sessions[key]
        self.tell()

    def take_away(self, partition: int) -> None:
        """Have somebody else hold all that is not done."""
        other = Session(-1, "another", None)
        for entry in self.entries[partition]:
            if not entry.done:
                entry.owner, entry.until = other, asyncio.get_running_loop().time() + self.lock

    def move(self, partition: int, node: int) -> None:
        """Have *node* lead a partition; nothing of it is anybody's any more."""
        self.lead("orders", partition, node)
        for entry in self.entries[partition]:
            entry.owner = None
        self.tell()

    # ------------------------------------------------------------------ answers

    async def _serve(self, node: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        try:
            await super()._serve(node, reader, writer)
        finally:
            for session in [each for each in self.sessions.values() if each.connection is task]:
                self.free(session)

    async def _answer(self, node: int, request: bytes) -> bytes:
        key, version = int.from_bytes(request[:2], "big"), int.from_bytes(request[2:4], "big")
        if key not in {FETCH, ACKNOWLEDGE}:
            return await super()._answer(node, request)
        while node in self.frozen:
            await self.frozen[node].wait()
        self.seen[key] += 1
        self.asked.append((node, key))
        at = 10 + int.from_bytes(request[8:10], "big") + 1
        schema: Any = load_request_schema(key, version)
        asked: Any = entity_reader(schema)(request, at)[0]
        said = {
            int(part.partition_index): [
                (int(each.first_offset), int(each.last_offset), tuple(map(int, each.acknowledge_types)))
                for each in part.acknowledgement_batches
            ]
            for topic in asked.topics
            for part in topic.partitions
        }
        epoch = int(asked.share_session_epoch)
        fetches = key == FETCH
        records, wait = (int(asked.max_records), asked.max_wait.total_seconds()) if fetches else (0, 0.0)
        renew = bool(asked.is_renew_ack)
        told = {index: what for index, what in said.items() if what}
        self.heard.append(Heard(key, epoch, told, records, wait, renew))
        session: Session | None = None
        if self.top and self.top[0] in DENIED:
            code = self.top.popleft()  # rights come first
        else:
            code, session = self._session(node, str(asked.member_id), epoch, fetches, bool(told))
            if self.top:
                code = self.top.popleft()
        if code is not ErrorCode.none or session is None:
            if code is ErrorCode.invalid_share_session_epoch and session is not None:
                self.free(session)
            return frame(int.from_bytes(request[4:8], "big"), self._refusal(fetches, code))
        session.partitions |= set(said)
        if fetches:
            for topic in asked.forgotten_topics_data:
                session.partitions -= set(map(int, topic.partitions))
        if told and self.patience is not None:
            await self.patience.wait()
        codes = {index: self._acknowledge(session, index, what, renew) for index, what in told.items()}
        if any(codes.values()) is False and told:
            self.tell()
        if not fetches:
            if epoch == -1:
                self.free(session)
            answer = self._acknowledged(codes)
        else:
            assert not renew, "which is only for acknowledgements"
            answer = await self._fetch(session, codes, records, wait)
        return frame(int.from_bytes(request[4:8], "big"), answer)

    def _session(
        self, node: int, member: str, epoch: int, fetches: bool, telling: bool
    ) -> tuple[ErrorCode, Session | None]:
        key = node, member
        session = self.sessions.get(key)
        if epoch == 0:
            if not fetches:
                return ErrorCode.invalid_share_session_epoch, None
            if telling:
                return ErrorCode.invalid_request, None
            if session is not None:
                self.free(session)
            self.sessions[key] = session = Session(node, member, asyncio.current_task())
            return ErrorCode.none, session
        if session is None or session.connection is not asyncio.current_task():
            return ErrorCode.share_session_not_found, None
        if epoch not in {session.epoch, -1}:
            return ErrorCode.invalid_share_session_epoch, session
        session.epoch += 1
        return ErrorCode.none, session

    def _refusal(self, fetches: bool, code: ErrorCode) -> Any:
        kind = _fetch.ShareFetchResponse if fetches else _acknowledge.ShareAcknowledgeResponse
        return kind(
            throttle_time=NONE,
            error_code=code,
            error_message="as the test wants it",
            acquisition_lock_timeout=NONE,
            responses=(),
            node_endpoints=(),
        )

    def _acknowledge(
        self, session: Session, index: int, said: list[tuple[int, int, tuple[int, ...]]], renew: bool
    ) -> int:
        code = self.refused.popleft() if self.refused else 0
        if code > 0:
            return code
        now = asyncio.get_running_loop().time()
        log = self.entries[index]
        if self.topic.logs[index].leader != session.node:
            return int(ErrorCode.not_leader_or_follower)
        every: list[tuple[Entry, int]] = []
        for first, last, types in said:
            assert len(types) in {1, last - first + 1}
            for offset in range(first, last + 1):
                every.append((log[offset], types[0] if len(types) == 1 else types[offset - first]))
        if any(entry.owner is not session or entry.until <= now for entry, _ in every):
            return int(ErrorCode.invalid_record_state)
        for entry, what in every:
            entry.history.append("GARJN"[what])
            if what == 4:
                assert renew, "a renewal has to be announced"
                entry.until = now + self.lock
                continue
            entry.owner = None
            entry.done = what != 2
        return -code

    def _acquire(self, session: Session, records: int) -> dict[int, list[tuple[int, Entry]]]:
        now = asyncio.get_running_loop().time()
        found: dict[int, list[tuple[int, Entry]]] = {}
        for index in sorted(session.partitions - self.hidden):
            if self.topic.logs[index].leader != session.node:
                continue
            for offset, entry in enumerate(self.entries[index]):
                if records <= 0:
                    break
                if entry.done or (entry.owner is not None and entry.until > now):
                    continue
                if entry.count >= self.limit:
                    entry.done = True
                    self.archived.append((index, offset))
                    continue
                entry.owner, entry.until = session, now + self.lock
                entry.count += 1
                found.setdefault(index, []).append((offset, entry))
                records -= 1
        return found

    async def _fetch(self, session: Session, codes: dict[int, int], records: int, wait: float) -> Any:
        end = asyncio.get_running_loop().time() + wait
        wrong = {index: queue.popleft() for index, queue in self.wrong.items() if queue and index in session.partitions}
        for index in session.partitions:
            if self.topic.logs[index].leader != session.node:
                wrong[index] = ErrorCode.not_leader_or_follower
        found = self._acquire(session, records) if not wrong else {}
        while not found and not wrong and asyncio.get_running_loop().time() < end:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(0.01, wait)):
                    await self.news.wait()
            found = self._acquire(session, records)
            while session.node in self.frozen:
                await self.frozen[session.node].wait()
        parts = [
            _fetch.PartitionData(
                partition_index=index,
                error_code=wrong.get(index, ErrorCode.none),
                error_message="",
                acknowledge_error_message="",
                acknowledge_error_code=codes.get(index, 0),
                current_leader=_fetch.LeaderIdAndEpoch(leader_id=-1, leader_epoch=-1),
                records=b"".join(dict.fromkeys(entry.batch for _, entry in found.get(index, ()))),
                acquired_records=tuple(
                    _fetch.AcquiredRecords(first_offset=offset, last_offset=offset, delivery_count=entry.count)
                    for offset, entry in found.get(index, ())
                ),
            )
            for index in sorted({*found, *codes, *wrong})
        ]
        return _fetch.ShareFetchResponse(
            throttle_time=NONE,
            error_code=ErrorCode.none,
            acquisition_lock_timeout=dt.timedelta(seconds=self.lock),
            responses=(_fetch.ShareFetchableTopicResponse(topic_id=self.topic.id, partitions=tuple(parts)),)
            if parts
            else (),
            node_endpoints=(),
        )

    def _acknowledged(self, codes: dict[int, int]) -> Any:
        parts = [
            _acknowledge.PartitionData(
                partition_index=index,
                error_code=ErrorCode(code),
                error_message="",
                current_leader=_acknowledge.LeaderIdAndEpoch(leader_id=-1, leader_epoch=-1),
            )
            for index, code in codes.items()
        ]
        return _acknowledge.ShareAcknowledgeResponse(
            throttle_time=NONE,
            error_code=ErrorCode.none,
            acquisition_lock_timeout=dt.timedelta(seconds=self.lock),
            responses=(_acknowledge.ShareAcknowledgeTopicResponse(topic_id=self.topic.id, partitions=tuple(parts)),)
            if parts
            else (),
            node_endpoints=(),
        )


def said(broker: SharePretender) -> list[Heard]:
    """Return the requests that said something of records."""
    return [each for each in broker.heard if each.said]
