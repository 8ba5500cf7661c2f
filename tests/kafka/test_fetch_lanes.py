"""How brokers are asked, against one that says what a test wants it to say."""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from kio.schema.errors import ErrorCode
from kio.schema.fetch.v13.request import FetchRequest
from kio.schema.fetch.v13.response import FetchableTopicResponse, FetchResponse, PartitionData
from kio.schema.request_header.v2.header import RequestHeader
from kio.serial import entity_reader

from brokerkit.drivers.kafka import _fetch
from brokerkit.drivers.kafka._errors import Unanswered
from brokerkit.drivers.kafka._fetch import ANSWER, LEAST, PARTITION
from brokerkit.drivers.kafka._view import Partition, TopicInfo
from brokerkit.errors import AuthenticationError, AuthorizationError, BrokerError, BrokerUnavailable, NotFound

from .logs import batch, offsets_of, spoilt
from .reading import reading

pytestmark = pytest.mark.asyncio

_response: Any = FetchResponse
_topic: Any = FetchableTopicResponse
_partition: Any = PartitionData
_read_header: Any = entity_reader(RequestHeader)
_read_request: Any = entity_reader(FetchRequest)


def request_of(request: Any) -> Any:
    """Return what a broker reads in *request*."""
    frame: bytes = request.frame(7)
    header, size = _read_header(frame, 4)
    assert (header.request_api_key, header.request_api_version, header.correlation_id) == (1, 13, 7)
    read, length = _read_request(frame, 4 + size)
    assert int.from_bytes(frame[:4], "big") + 4 == len(frame) == 4 + size + length
    return read


class Asked:
    """One request."""

    def __init__(self, node: int, request: Any, timeout: float) -> None:
        self.node = node
        self.timeout = timeout
        self.wait = request.max_wait.total_seconds()
        self.most = request.max_bytes
        self.parts = {part.partition: part for topic in request.topics for part in topic.partitions}


class Script:
    """A cluster of two brokers, whose answers are made by `answer`."""

    def __init__(self, leaders: tuple[int, ...] = (1,)) -> None:
        self.settings = SimpleNamespace(timeout=1.0, connect_timeout=1.0, shown="script")
        self.watchers: set[Callable[[], None]] = set()
        self.id = uuid.uuid4()
        self.leaders = leaders
        self.asked: list[Asked] = []
        self.stales = 0
        self.problem: BrokerError | None = None
        self.dropped: list[object] = []
        self.wires: set[tuple[int, object]] = set()
        self.log: dict[int, list[bytes]] = {}
        self.answer: Callable[[Asked], Any] = lambda asked: None
        """What is answered instead of the log; raised if it is an error; nothing for what is in the log."""
        self.changed = asyncio.Event()

    def known(self, name: str) -> TopicInfo | None:
        if self.problem is not None:
            return None
        return TopicInfo(name, self.id, tuple(Partition(index, node, 1) for index, node in enumerate(self.leaders)))

    def trouble(self, name: str) -> BrokerError | None:
        return self.problem

    def watch(self, name: str) -> None:
        pass

    def unwatch(self, name: str) -> None:
        pass

    def stale(self) -> None:
        self.stales += 1

    def drop(self, line: object) -> None:
        self.dropped.append(line)

    def look(self) -> None:
        for watcher in tuple(self.watchers):
            watcher()

    def put(self, partition: int, *data: bytes) -> None:
        self.log.setdefault(partition, []).extend(data)
        self.changed.set()

    def wire(self, node: int, line: object) -> Any:
        if (node, line) not in self.wires:
            return None
        return SimpleNamespace(send=functools.partial(self.send, node))

    async def open(self, node: int, line: object, *, timeout: float) -> Any:
        self.wires.add((node, line))
        return self.wire(node, line)

    async def send(self, node: int, request: Any, timeout: float) -> Any:
        loop = asyncio.get_running_loop()
        asked = Asked(node, request_of(request), timeout)
        self.asked.append(asked)
        answer = await _ready(self.answer(asked))
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            return answer
        end = loop.time() + asked.wait
        while not any(self.log.get(partition) for partition in asked.parts) and loop.time() < end:
            self.changed.clear()
            try:
                async with asyncio.timeout_at(end):
                    await self.changed.wait()
            except TimeoutError:
                break
        parts: list[Any] = []
        for partition in asked.parts:
            waiting = self.log.get(partition, [])
            parts.append(part(partition, waiting.pop(0) if waiting else b""))
        return said(*parts)


async def _ready(answer: Any) -> Any:
    return await answer if asyncio.isfuture(answer) else answer


def said(*parts: Any, throttled: float = 0.0, code: ErrorCode = ErrorCode.none) -> Any:
    """Return an answer."""
    return _response(
        throttle_time=timedelta(seconds=throttled),
        error_code=code,
        responses=(_topic(topic_id=uuid.uuid4(), partitions=parts),),
    )


def part(index: int, data: bytes = b"", code: ErrorCode = ErrorCode.none, end: int = 100) -> Any:
    """Return what is answered of one partition."""
    return _partition(
        partition_index=index, error_code=code, high_watermark=end, last_stable_offset=end, log_start_offset=0,
        aborted_transactions=None, records=data,
    )  # fmt: skip


def follow(script: Script, *partitions: int, wait: float = 0.5) -> Any:
    cluster: Any = script
    return reading(cluster, "orders", dict.fromkeys(partitions, 0), wait=wait)


async def taken(reader: Any, partition: int, count: int) -> list[int]:
    seen: list[Any] = []
    async with asyncio.timeout(5):
        while len(seen) < count:
            reader.told.clear()
            seen += reader.fetcher.take(partition, count)
            if len(seen) < count:
                await reader.told.wait()
    return offsets_of(seen)


async def rest(seconds: float) -> None:
    await asyncio.sleep(seconds)


# ---------------------------------------------------------------------- what is asked for


async def test_one_request_waits_for_all_partitions_of_a_broker() -> None:
    script = Script((1, 2, 1))
    async with follow(script, 0, 1, 2):
        await rest(0.2)
        assert {asked.node: list(asked.parts) for asked in script.asked} == {1: [0, 2], 2: [1]}
        assert [asked.wait for asked in script.asked] == [0.0, 0.0, 0.5, 0.5], "where all ends is said at once"
        for asked in script.asked:
            assert asked.timeout == asked.wait + _fetch.MARGIN
            assert asked.most == ANSWER
            assert all(one.partition_max_bytes == PARTITION for one in asked.parts.values())
            assert all(one.current_leader_epoch == 1 for one in asked.parts.values())
    assert len(script.dropped) == 4


async def test_the_first_answer_does_not_wait_for_records() -> None:
    script = Script((1,))
    async with follow(script, 0, wait=30.0) as reader:
        await reader.until(lambda: reader.fetcher.end(0) == 100, within=5)
        await rest(0.02)
        assert [asked.wait for asked in script.asked] == [0.0, 30.0]
        script.put(0, batch(0))
        assert await taken(reader, 0, 1) == [0]


async def test_the_next_request_goes_on_behind_the_last_batch() -> None:
    script = Script((1,))
    script.put(0, batch(0, 1, last=4, epoch=1), batch(5, 6, epoch=2))
    async with follow(script, 0) as reader:
        assert await taken(reader, 0, 4) == [0, 1, 5, 6]
        await rest(0.05)
        places = [(asked.parts[0].fetch_offset, asked.parts[0].last_fetched_epoch) for asked in script.asked]
        assert places == [(0, -1), (5, 1), (7, 2)]


async def test_who_had_something_is_asked_for_behind_the_others() -> None:
    script = Script((1, 1, 1))
    async with follow(script, 0, 1, 2) as reader:
        await rest(0.01)
        script.put(0, batch(0))
        await taken(reader, 0, 1)
        await rest(0.01)
        assert list(script.asked[-1].parts) == [1, 2, 0]


async def test_many_partitions_share_what_is_held() -> None:
    script = Script((1,) * 5000)
    async with follow(script, *range(256)) as reader:
        await rest(0.2)
        assert {one.partition_max_bytes for one in script.asked[-1].parts.values()} == {PARTITION // 4}
        for partition in range(256, 5000):
            reader.fetcher.begin(partition, 0)
        await rest(1.5)
        assert {one.partition_max_bytes for one in script.asked[-1].parts.values()} == {LEAST}


async def test_a_partition_with_enough_at_hand_is_not_asked_for_and_the_others_do_not_wait_long() -> None:
    script = Script((1, 1))
    large = [batch(*range(first, first + 12_000)) for first in range(0, 120_000, 12_000)]
    script.put(0, *large)
    async with follow(script, 0, 1) as reader:
        await rest(0.4)
        held = sum(len(data) for data in large) - sum(len(data) for data in script.log[0])
        assert PARTITION // 2 < held < PARTITION
        before = len(script.asked)
        await rest(0.3)
        later = script.asked[before:]
        assert 4 <= len(later) <= 8
        assert all(list(asked.parts) == [1] and asked.wait == _fetch.BRIEF for asked in later)
        seen: list[Any] = []
        while reader.fetcher.ready() == [0] and len(seen) < 60_000:
            seen += reader.fetcher.take(0, 1000)
        begun = asyncio.get_running_loop().time()
        await taken(reader, 0, 1000)
        assert asyncio.get_running_loop().time() - begun < 0.04, (
            "it does not wait for the request that waits for the other"
        )
        await rest(0.7)
        while reader.fetcher.ready():
            reader.fetcher.take(0, 10_000)
            await rest(0)
        await rest(0.7)
        assert script.asked[-1].wait >= 0.5, "one request for both again"
        assert sorted(script.asked[-1].parts) == [0, 1]


async def test_a_partition_follows_its_leader_and_what_the_old_one_says_is_dropped() -> None:
    script = Script((1,))
    late = asyncio.get_running_loop().create_future()
    script.answer = lambda asked: late if asked.node == 1 else None
    async with follow(script, 0) as reader:
        await rest(0.01)
        script.leaders = (2,)
        script.look()
        await rest(0.01)
        assert [asked.node for asked in script.asked] == [1, 2, 2]
        late.set_result(said(part(0, batch(0))))
        await rest(0.05)
        assert reader.fetcher.ready() == []
        script.put(0, batch(0, 1))
        assert await taken(reader, 0, 2) == [0, 1]
        await rest(0.05)
        assert [asked.node for asked in script.asked] == [1, 2, 2, 2]


async def test_what_comes_for_a_place_that_was_left_is_dropped() -> None:
    script = Script((1,))
    late = asyncio.get_running_loop().create_future()
    script.answer = lambda asked: late if asked is script.asked[0] else None
    async with follow(script, 0) as reader:
        await rest(0.01)
        reader.fetcher.begin(0, 1)
        await rest(0.01)
        late.set_result(said(part(0, batch(0, 1, 2))))
        await rest(0.05)
        assert reader.fetcher.ready() == []
        assert reader.fetcher.next_offset(0) == 1
        assert script.asked[-1].parts[0].fetch_offset == 1
        reader.fetcher.stop(0)
        script.put(0, batch(1))
        await rest(0.05)
        assert reader.fetcher.ready() == []
        assert reader.fetcher.end(0) is None
        assert not reader.errors


# ---------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "answer",
    [
        lambda: BrokerUnavailable("no connection"),
        lambda: Unanswered("no answer"),
        lambda: ValueError("unexpected"),
        lambda: said(code=ErrorCode.unknown_server_error),
        lambda: said(part(0, code=ErrorCode.not_leader_or_follower)),
        lambda: said(part(0, code=ErrorCode.fenced_leader_epoch)),
        lambda: said(part(0, code=ErrorCode.unknown_topic_id)),
        lambda: said(part(0, code=ErrorCode.kafka_storage_error)),
        lambda: said(part(0, code=ErrorCode.offset_not_available)),
        lambda: said(part(0, code=ErrorCode.unknown_server_error)),
        lambda: said(part(0, code=ErrorCode.corrupt_message)),
        lambda: said(part(0)),
        lambda: said(),
        lambda: said(part(7, batch(0))),
    ],
)
async def test_whatever_goes_wrong_is_tried_again_but_not_all_the_time(answer: Callable[[], Any]) -> None:
    script = Script((1, 1))
    script.answer = lambda asked: answer()
    async with follow(script, 0) as reader:
        await rest(0.6)
        assert 1 <= len(script.asked) <= 13, "not more often than each 50 ms"
        script.answer = lambda asked: None
        script.put(0, batch(0, 1))
        assert await taken(reader, 0, 2) == [0, 1]


async def test_errors_that_nobody_can_mend_are_told() -> None:
    script = Script((1,))
    answers: list[Any] = [
        said(part(0, code=ErrorCode.corrupt_message)),
        said(part(0, code=ErrorCode.unknown_server_error)),
        said(part(0, code=ErrorCode.topic_authorization_failed)),
        AuthenticationError("no"),
    ]
    errors: list[BrokerError] = []
    script.answer = lambda asked: answers[len(errors)]
    while len(errors) < len(answers):
        async with follow(script, 0) as reader:
            await reader.until(lambda: reader.errors)
            errors += reader.errors[:1]
    assert "orders[0] at offset 0" in str(errors[0])
    assert "orders[0] at offset 0" in str(errors[1])
    assert isinstance(errors[2], AuthorizationError)
    assert "READ on topic orders" in str(errors[2])
    assert isinstance(errors[3], AuthenticationError)


async def test_a_damaged_batch_is_told_once_and_asked_for_no_more() -> None:
    script = Script((1, 1))
    script.put(0, batch(0), spoilt(batch(1)), batch(2))
    async with follow(script, 0, 1) as reader:
        assert await taken(reader, 0, 1) == [0]
        await reader.until(lambda: reader.fetcher.ready() and not reader.fetcher.take(0, 5))
        assert [str(error) for error in reader.errors] == ["orders[0] is damaged at offset 1: its checksum is wrong"]
        script.put(1, batch(0))
        assert await taken(reader, 1, 1) == [0]
        await rest(0.7)
        assert list(script.asked[-1].parts) == [1]
        assert len(reader.errors) == 1
        assert reader.fetcher.take(0, 5) == []
        script.log.clear()
        reader.fetcher.begin(0, 2)
        script.put(0, batch(2))
        assert await taken(reader, 0, 1) == [2]


async def test_answers_that_do_not_come_in_time_become_smaller_and_may_take_longer() -> None:
    script = Script((1,))
    script.answer = lambda asked: Unanswered("no answer")
    async with follow(script, 0) as reader:
        async with asyncio.timeout(5):
            while len(script.asked) < 4:
                await rest(0.01)
        sizes, times = [asked.most for asked in script.asked], [asked.timeout for asked in script.asked]
        assert sizes[:4] == [ANSWER, ANSWER // 4, ANSWER // 16, ANSWER // 64]
        assert times[:4] == [3.0, 6.0, 12.0, 24.0]
        script.answer = lambda asked: None
        for number in range(8):
            script.put(0, batch(number))
            await taken(reader, 0, 1)
        await rest(0.02)
        assert (script.asked[-1].most, script.asked[-1].timeout) == (ANSWER, 3.5)


async def test_a_broker_that_wants_to_be_left_alone_is() -> None:
    script = Script((1,))
    script.answer = lambda asked: said(part(0, batch(0)), throttled=0.4)
    async with follow(script, 0) as reader:
        assert await taken(reader, 0, 1) == [0], "what came is there at once"
        await rest(0.3)
        assert len(script.asked) == 1
        script.answer = lambda asked: None
        await rest(0.2)
        assert len(script.asked) == 2


async def test_a_partition_without_a_leader_is_looked_for() -> None:
    script = Script((-1, 1))
    script.put(0, batch(0))
    script.put(1, batch(0))
    async with follow(script, 0, 1, 5) as reader:
        assert await taken(reader, 1, 1) == [0]
        await rest(0.6)
        assert 2 <= script.stales <= 4
        script.leaders = (1, 1, 1, 1, 1, 1)
        script.look()
        assert await taken(reader, 0, 1) == [0]
        stales = script.stales
        await rest(0.6)
        assert script.stales <= stales + 1


async def test_a_topic_that_was_away_for_a_moment_is_read_on_if_it_is_the_same() -> None:
    script = Script((1,))
    async with follow(script, 0) as reader:
        script.put(0, batch(0))
        assert await taken(reader, 0, 1) == [0]
        script.problem = NotFound("there is no topic orders")
        script.look()
        await rest(0.5)
        assert not reader.errors, "a broker that has just started may not know it yet"
        script.problem = None
        script.look()
        script.put(0, batch(1))
        assert await taken(reader, 0, 1) == [1]
        script.problem = NotFound("there is no topic orders")
        script.look()
        await rest(0.2)
        script.id, script.problem = uuid.uuid4(), None
        script.put(0, batch(2))
        script.look()
        await reader.until(lambda: reader.errors)
        assert isinstance(reader.errors[0], NotFound)
        await rest(0.1)
        assert reader.fetcher.take(0, 1) == []


async def test_a_topic_that_is_gone_is_asked_for_no_more() -> None:
    script = Script((1,))
    async with follow(script, 0) as reader:
        await rest(0.01)
        script.problem = NotFound("there is no topic orders")
        script.look()
        await reader.until(lambda: reader.errors)
        assert [str(error) for error in reader.errors] == ["there is no topic orders"]
        asked, stales = len(script.asked), script.stales
        script.problem = None
        script.look()
        await rest(1.5)
        assert (len(script.asked), len(reader.errors)) == (asked, 1)
        assert script.stales <= stales + 1


async def test_a_topic_that_may_not_be_seen_is_read_on_when_it_may() -> None:
    script = Script((1,))
    async with follow(script, 0) as reader:
        await rest(0.01)
        script.problem = AuthorizationError("DESCRIBE on topic orders")
        script.look()
        await rest(3)
        assert 1 <= len(reader.errors) <= 3
        script.problem = None
        script.look()
        script.put(0, batch(0))
        assert await taken(reader, 0, 1) == [0]
