"""Brokers within the test's own process, with logs in memory that count producers' numbers as Kafka does.

A test tells them what to answer to a publish, and sees all that was asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import uuid
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final, Self, TypeAlias

from aiokafka.record.memory_records import MemoryRecords  # pyright: ignore[reportMissingTypeStubs]
from kio.index import load_request_schema
from kio.schema.create_topics.v7 import response as creating
from kio.schema.errors import ErrorCode
from kio.schema.find_coordinator.v3.response import FindCoordinatorResponse
from kio.schema.init_producer_id.v4.response import InitProducerIdResponse
from kio.schema.metadata.v12 import response as metadata
from kio.schema.produce.v9 import response as producing
from kio.serial import entity_reader

from .liar import VERSIONS, frame, versions

PRODUCE, METADATA, COORDINATOR, CREATE, INIT = 0, 3, 10, 19, 22
NONE: Final = dt.timedelta()
_produce: Any = producing
_metadata: Any = metadata
_create: Any = creating
_records: Any = MemoryRecords


class HangUp(Exception):
    """Ends a connection instead of answering."""


class Stored:
    """A record in a log."""

    def __init__(self, producer: int, sequence: int, record: Any) -> None:
        self.producer = producer
        self.sequence = sequence
        self.key: bytes | None = record.key
        self.value: bytes | None = record.value
        self.headers: list[tuple[str, bytes]] = list(record.headers)
        self.timestamp: int = record.timestamp


class Log:
    """A partition."""

    def __init__(self) -> None:
        self.leader = 1
        self.epoch = 0
        self.records: list[Stored] = []
        self.batches: dict[int, deque[tuple[int, int, int]]] = {}
        """The last batches of each producer: first and last number, and the first offset."""
        self.limit = 1_048_588
        self.latest: int | None = None
        """Later timestamps are refused."""

    @property
    def values(self) -> list[bytes | None]:
        """What is stored, in order."""
        return [record.value for record in self.records]

    def append(self, data: bytes) -> tuple[ErrorCode, int]:
        """Store a batch as Kafka would; return the answer and the first offset."""
        batch = _records(data).next_batch()
        producer, first = int(batch.producer_id), int(batch.base_sequence)
        records = list(batch)
        last = first + len(records) - 1
        if len(data) > self.limit:
            return ErrorCode.message_too_large, -1
        if self.latest is not None and any(record.timestamp > self.latest for record in records):
            return ErrorCode.invalid_timestamp, -1
        known = self.batches.setdefault(producer, deque(maxlen=5))
        for begin, end, offset in known:
            if (begin, end) == (first, last):
                return ErrorCode.none, offset
        if known and first != known[-1][1] + 1:
            return ErrorCode.out_of_order_sequence_number, -1
        base = len(self.records)
        known.append((first, last, base))
        self.records += [Stored(producer, first + number, record) for number, record in enumerate(records)]
        return ErrorCode.none, base


class Topic:
    """A topic."""

    def __init__(self, partitions: int) -> None:
        self.id = uuid.uuid4()
        self.logs = [Log() for _ in range(partitions)]


Verdict: TypeAlias = "ErrorCode | str | asyncio.Event | None"
"""What becomes of a publish: None as Kafka does; an error, and it is not stored; ``lose``: stored, and the connection ends
without an answer; ``drop``: not stored, and the connection ends; ``late:<code>``: stored, and answered with that error; an
event: stored and answered when it is set."""


class Pretender:
    """*nodes* brokers, numbered from 1 on, as long as an ``async with`` lasts."""

    def __init__(self, nodes: int = 1) -> None:
        self.topics: dict[str, Topic] = {}
        self.verdicts: deque[Verdict] = deque()
        """Of the next publishes, in order, each of a whole request."""
        self.always: Verdict = None
        """Of all others."""
        self.seen: Counter[int] = Counter()
        """Requests by API."""
        self.asked: deque[tuple[int, int]] = deque(maxlen=10_000)
        """The node and the API of each request."""
        self.names: set[str] = set()
        """All topics that were asked about."""
        self.denied: dict[str, ErrorCode] = {}
        """What is said of a topic instead of what it is like."""
        self.introductions: deque[ErrorCode] = deque()
        """What is said to those who want to be a producer."""
        self.frozen: dict[int, asyncio.Event] = {}
        """Nodes that answer nothing until this is set."""
        self.slow: dict[int, asyncio.Event] = {}
        """APIs that are answered when this is set, one request of a connection after the other."""
        self.blind: set[int] = set()
        """Nodes that know of no topics: they lag behind."""
        self.down: set[int] = set()
        """Nodes that others do not tell of."""
        self.arrived = asyncio.Event()
        """Set whenever a publish comes."""
        self.creates = True
        self.ports: dict[int, int] = {}
        self.open: Counter[int] = Counter()
        """Connections by node."""
        self.connections = 0
        self._nodes = nodes
        self._producer = 1000
        self._servers: dict[int, asyncio.Server] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: dict[asyncio.StreamWriter, int] = {}

    async def __aenter__(self) -> Self:
        for node in range(1, self._nodes + 1):
            await self.start(node)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for node in list(self._servers):
            await self.stop(node)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """Where they are, in order."""
        return "kafka://" + ",".join(f"127.0.0.1:{port}" for port in self.ports.values())

    async def start(self, node: int) -> None:
        """Listen, on the same port as before `stop`."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._serve(node, reader, writer)

        server = await asyncio.start_server(serve, "127.0.0.1", self.ports.get(node, 0))
        self._servers[node] = server
        self.ports[node] = server.sockets[0].getsockname()[1]

    async def stop(self, node: int) -> None:
        """Refuse connections, and break those that are open."""
        self._servers.pop(node).close()
        self.cut(node)

    def cut(self, node: int) -> None:
        """Break what is open."""
        for writer, number in list(self._writers.items()):
            if number == node:
                writer.transport.abort()

    def freeze(self, node: int = 1) -> None:
        """Answer nothing until `thaw`."""
        self.frozen[node] = asyncio.Event()

    def thaw(self, node: int = 1) -> None:
        """Do all that was asked meanwhile."""
        self.frozen.pop(node).set()

    def create(self, name: str, partitions: int = 1) -> Topic:
        """Make a topic, or make it anew."""
        self.topics[name] = Topic(partitions)
        return self.topics[name]

    def lead(self, name: str, partition: int, node: int) -> None:
        """Have *node* lead a partition from now on; -1 for none."""
        log = self.topics[name].logs[partition]
        log.leader = node
        log.epoch += 1

    # ------------------------------------------------------------------ connections

    async def _serve(self, node: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers[writer] = node
        self.open[node] += 1
        self.connections += 1
        try:
            with contextlib.suppress(OSError, EOFError, HangUp, asyncio.CancelledError):
                while True:
                    request = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
                    answer = await self._answer(node, request)
                    writer.write(len(answer).to_bytes(4, "big") + answer)
        finally:
            self._tasks.discard(task)
            del self._writers[writer]
            self.open[node] -= 1
            writer.transport.abort()

    async def _answer(self, node: int, request: bytes) -> bytes:
        while node in self.frozen:
            await self.frozen[node].wait()
        key, version = int.from_bytes(request[:2], "big"), int.from_bytes(request[2:4], "big")
        number = int.from_bytes(request[4:8], "big")
        self.seen[key] += 1
        self.asked.append((node, key))
        if key == VERSIONS:
            return versions()(number)
        if key in self.slow:
            await self.slow[key].wait()
        schema: Any = load_request_schema(key, version)
        at = 10 + int.from_bytes(request[8:10], "big") + 1
        entity = entity_reader(schema)(request, at)[0]
        if key == PRODUCE:
            return frame(number, await self._publish(node, entity))
        answers: dict[int, Callable[[int, Any], Any]] = {
            METADATA: self._describe,
            INIT: self._introduce,
            CREATE: self._create,
            COORDINATOR: self._coordinate,
        }
        return frame(number, answers[key](node, entity))

    # ------------------------------------------------------------------ answers

    def _describe(self, node: int, request: Any) -> Any:
        assert not request.allow_auto_topic_creation, "a look must not create topics"
        self.names |= {each.name for each in request.topics}
        return _metadata.MetadataResponse(
            throttle_time=NONE,
            brokers=tuple(
                _metadata.MetadataResponseBroker(node_id=number, host="127.0.0.1", port=port, rack=None)
                for number, port in self.ports.items()
                if number not in self.down
            ),
            cluster_id="pretended",
            controller_id=1,
            topics=tuple(self._topic(node, each.name) for each in request.topics),
        )

    def _topic(self, node: int, name: str) -> Any:
        topic = self.topics.get(name)
        code = ErrorCode.none
        if name in self.denied:
            code, topic = self.denied[name], None
        elif topic is None or node in self.blind:
            code, topic = ErrorCode.unknown_topic_or_partition, None
        return _metadata.MetadataResponseTopic(
            error_code=code,
            name=name,
            topic_id=None if topic is None else topic.id,
            partitions=tuple(
                _metadata.MetadataResponsePartition(
                    error_code=ErrorCode.none if log.leader > 0 else ErrorCode.leader_not_available,
                    partition_index=index,
                    leader_id=log.leader,
                    leader_epoch=log.epoch,
                )
                for index, log in enumerate(topic.logs if topic else ())
            ),
        )

    def _introduce(self, node: int, request: Any) -> Any:
        code = self.introductions.popleft() if self.introductions else ErrorCode.none
        self._producer += 1
        kind: Any = InitProducerIdResponse
        return kind(throttle_time=NONE, error_code=code, producer_id=self._producer, producer_epoch=0)

    def _create(self, node: int, request: Any) -> Any:
        results: list[Any] = []
        for each in request.topics:
            code = ErrorCode.topic_already_exists
            if not self.creates:
                code = ErrorCode.topic_authorization_failed
            elif each.name not in self.topics:
                self.create(each.name, each.num_partitions)
                code = ErrorCode.none
            results.append(
                _create.CreatableTopicResult(
                    name=each.name, topic_id=None, error_code=code, error_message=None, configs=None
                )
            )
        return _create.CreateTopicsResponse(throttle_time=NONE, topics=tuple(results))

    def _coordinate(self, node: int, request: Any) -> Any:
        kind: Any = FindCoordinatorResponse
        code = self.denied.get(request.key, ErrorCode.none)
        return kind(
            throttle_time=NONE,
            error_code=code,
            error_message=None,
            node_id=1 if code is ErrorCode.none else -1,
            host="127.0.0.1",
            port=self.ports[1],
        )

    async def _publish(self, node: int, request: Any) -> Any:
        assert request.acks == -1
        verdict = self.verdicts.popleft() if self.verdicts else self.always
        self.arrived.set()
        if verdict == "drop":
            raise HangUp
        responses: list[Any] = []
        for each in request.topic_data:
            parts: list[Any] = []
            for part in each.partition_data:
                code, base = self._store(node, each.name, part, verdict)
                parts.append(
                    _produce.PartitionProduceResponse(
                        index=part.index,
                        error_code=code,
                        base_offset=base,
                        record_errors=(),
                    )
                )
            responses.append(_produce.TopicProduceResponse(name=each.name, partition_responses=tuple(parts)))
        if verdict == "lose":
            raise HangUp
        if isinstance(verdict, asyncio.Event):
            await verdict.wait()
        return _produce.ProduceResponse(responses=tuple(responses), throttle_time=NONE)

    def _store(self, node: int, name: str, part: Any, verdict: Verdict) -> tuple[ErrorCode, int]:
        if isinstance(verdict, ErrorCode):
            return verdict, -1
        topic = self.topics.get(name)
        if topic is None or part.index >= len(topic.logs):
            return ErrorCode.unknown_topic_or_partition, -1
        log = topic.logs[int(part.index)]
        if log.leader != node:
            return ErrorCode.not_leader_or_follower, -1
        code, base = log.append(part.records)
        if isinstance(verdict, str) and verdict.startswith("late:"):
            return ErrorCode[verdict.removeprefix("late:")], -1
        return code, base
