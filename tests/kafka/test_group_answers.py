"""Membership against a coordinator that says what real ones say rarely: what each answer comes to."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from kio.schema.errors import ErrorCode

from brokerkit.drivers.kafka import _group
from brokerkit.drivers.kafka._assign import Claim, Share, read_claim, write_share
from brokerkit.drivers.kafka._cluster import Cluster
from brokerkit.drivers.kafka._errors import Unanswered
from brokerkit.drivers.kafka._view import Partition, TopicInfo
from brokerkit.errors import (
    AuthenticationError,
    AuthorizationError,
    BrokerError,
    BrokerUnavailable,
    ConfigError,
    DeliveryLost,
)

from .membership import Member

pytestmark = pytest.mark.asyncio
Handler = Callable[[Any], Any]
NONE = ErrorCode.none


class Coordinator:
    """Stands in for a cluster whose only group has one member, which it answers as *answers* say: the next one first.

    An answer is a code, an exception, or a function of the request.  Without one, everything is all right.
    """

    def __init__(self) -> None:
        self.settings = SimpleNamespace(timeout=1.0)
        self.watchers: set[Callable[[], None]] = set()
        self.answers: dict[str, list[ErrorCode | BaseException | Callable[[Any], Awaitable[ErrorCode]]]] = {}
        self.asked: list[str] = []
        self.requests: list[Any] = []
        self.generation = 0
        self.members = 0
        self.lost = 0
        """How often its place was forgotten."""
        self.share = Share(frozenset({0, 1}))
        self.dropped: asyncio.Future[None] | None = None

    # what a cluster has
    def watch(self, name: str) -> None: ...
    def unwatch(self, name: str) -> None: ...
    def known(self, name: str) -> TopicInfo:
        return TopicInfo(name, uuid.UUID(int=1), tuple(Partition(number, 1, 0) for number in range(2)))

    async def topic(self, name: str, **_: object) -> TopicInfo:
        return self.known(name)

    async def coordinator(self, group: str, *, timeout: float) -> int:
        return 1

    def forget_coordinator(self, group: str) -> None:
        self.lost += 1

    def drop(self, line: object) -> None:
        if self.dropped is not None and not self.dropped.done():
            self.dropped.set_exception(Unanswered("the connection is closed"))

    async def call(self, node: int, request: Any, *, timeout: float, line: object = None) -> Any:
        name = type(request).__name__.removesuffix("Request")
        self.asked.append(name)
        self.requests.append(request)
        await asyncio.sleep(0)
        planned = self.answers.get(name)
        answer = planned.pop(0) if planned else NONE
        if isinstance(answer, BaseException):
            raise answer
        code = answer if isinstance(answer, ErrorCode) else await answer(request)
        return getattr(self, name.lower())(request, code)

    async def never(self, _: Any) -> ErrorCode:
        """Leave a request unanswered until its connection is closed."""
        self.dropped = asyncio.get_running_loop().create_future()
        await self.dropped
        raise AssertionError

    # what it answers
    def joingroup(self, request: Any, code: ErrorCode) -> Any:
        id = request.member_id
        if code is NONE and not id and request.group_instance_id is None:
            code = ErrorCode.member_id_required
        if not id:
            self.members += 1
            id = f"m{self.members}"
        if code is NONE:
            self.generation += 1
        metadata = request.protocols[0].metadata
        return SimpleNamespace(
            error_code=code,
            generation_id=self.generation,
            leader=id,
            member_id=id,
            members=[SimpleNamespace(member_id=id, metadata=metadata)],
        )

    def syncgroup(self, request: Any, code: ErrorCode) -> Any:
        return SimpleNamespace(error_code=code, assignment=b"" if code else write_share("t", self.share))

    def heartbeat(self, request: Any, code: ErrorCode) -> Any:
        return SimpleNamespace(error_code=code)

    leavegroup = heartbeat

    def offsetfetch(self, request: Any, code: ErrorCode) -> Any:
        parts = [
            SimpleNamespace(partition_index=number, error_code=NONE, committed_offset=5, metadata="")
            for topic in request.topics
            for number in topic.partition_indexes
        ]
        return SimpleNamespace(error_code=code, topics=[SimpleNamespace(name="t", partitions=parts)])

    def offsetcommit(self, request: Any, code: ErrorCode) -> Any:
        parts = [
            SimpleNamespace(partition_index=part.partition_index, error_code=code)
            for part in request.topics[0].partitions
        ]
        return SimpleNamespace(topics=[SimpleNamespace(partitions=parts)])

    def claim(self) -> Claim:
        """Return what was claimed last."""
        last = next(request for request in reversed(self.requests) if type(request).__name__ == "JoinGroupRequest")
        claim = read_claim(last.protocols[0].metadata, "t")
        assert claim is not None
        return claim


@asynccontextmanager
async def taking_part(coordinator: Coordinator, *, join: bool = True, **options: Any) -> AsyncIterator[Member]:
    """Be a member at a stand-in."""
    one = Member(cast("Cluster", coordinator), "t", **{"session": 0.8, **options})
    one.start()
    try:
        if join:
            await asyncio.wait_for(one.group.join(), 10)
        yield one
    finally:
        await one.stop()


async def asked(coordinator: Coordinator, name: str, times: int = 1) -> None:
    """Return when something was asked so many times more."""
    wanted = coordinator.asked.count(name) + times
    async with asyncio.timeout(10):
        while coordinator.asked.count(name) < wanted:
            await asyncio.sleep(0.005)


BOTH = ("assigned", (0, 1))


async def test_it_asks_for_a_name_first_and_signs_off() -> None:
    kafka = Coordinator()
    async with taking_part(kafka) as one:
        assert one.told == [BOTH]
        assert kafka.asked[:4] == ["JoinGroup", "JoinGroup", "SyncGroup", "OffsetFetch"]
    assert kafka.asked[-1] == "LeaveGroup"
    assert kafka.requests[-1].members[0].member_id == "m1"


@pytest.mark.parametrize(
    "code",
    [
        ErrorCode.coordinator_load_in_progress,
        ErrorCode.coordinator_not_available,
        ErrorCode.not_coordinator,
        ErrorCode.rebalance_in_progress,
    ],
)
@pytest.mark.parametrize("name", ["JoinGroup", "SyncGroup", "OffsetFetch"])
async def test_what_passes_by_itself_is_tried_again(name: str, code: ErrorCode) -> None:
    if name == "OffsetFetch" and code is ErrorCode.rebalance_in_progress:
        code = ErrorCode.unstable_offset_commit
    kafka = Coordinator()
    kafka.answers[name] = [code, code, BrokerUnavailable("not sent"), Unanswered("lost")]
    async with taking_part(kafka) as one:
        assert one.told == [BOTH]
        assert kafka.lost >= 2
        assert one.group.problem is None or name == "OffsetFetch"


@pytest.mark.parametrize("name", ["JoinGroup", "SyncGroup"])
async def test_a_member_that_is_not_known_begins_with_a_new_name(name: str) -> None:
    kafka = Coordinator()
    kafka.answers[name] = [NONE, ErrorCode.unknown_member_id] if name == "JoinGroup" else [ErrorCode.unknown_member_id]
    async with taking_part(kafka) as one:
        assert one.told == [BOTH]
        assert kafka.members == 2


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (ErrorCode.inconsistent_group_protocol, ConfigError),
        (ErrorCode.invalid_session_timeout, ConfigError),
        (ErrorCode.fenced_instance_id, ConfigError),
        (ErrorCode.group_max_size_reached, ConfigError),
        (ErrorCode.unknown_server_error, BrokerError),
    ],
)
async def test_what_cannot_get_better_ends_joining(code: ErrorCode, error: type[BrokerError]) -> None:
    kafka = Coordinator()
    kafka.answers["JoinGroup"] = [NONE, code]
    with pytest.raises(error):
        async with taking_part(kafka):
            pass


async def test_credentials_that_are_refused_end_it() -> None:
    kafka = Coordinator()
    async with taking_part(kafka) as one:
        kafka.answers["Heartbeat"] = [AuthenticationError("no")]
        await one.until(lambda: one.errors)
        assert isinstance(one.errors[0], AuthenticationError)
        assert one.left < 0


async def test_joining_ends_when_nobody_answers() -> None:
    kafka = Coordinator()
    kafka.answers["JoinGroup"] = [BrokerUnavailable("not sent") for _ in range(100)]
    with pytest.raises(BrokerUnavailable, match="not sent"):
        async with taking_part(kafka):
            pass
    assert kafka.asked.count("JoinGroup") < 15  # it waits in between


async def test_a_generation_that_passed_costs_nothing() -> None:
    """The coordinator has moved, and knows only what was stored: the member is known, and so is what it holds."""
    kafka = Coordinator()
    async with taking_part(kafka) as one:
        kafka.answers["Heartbeat"] = [ErrorCode.illegal_generation]
        await asked(kafka, "SyncGroup")
        await asked(kafka, "Heartbeat", 2)
        assert one.told == [BOTH]
        assert kafka.claim() == Claim(frozenset({0, 1}), frozenset(), 1, 2)
        assert one.left > 0


async def test_a_rebalance_makes_it_come_again_with_what_it_holds() -> None:
    kafka = Coordinator()
    async with taking_part(kafka) as one:
        one.keep = True
        kafka.share = Share(frozenset({0}))
        kafka.answers["Heartbeat"] = [ErrorCode.rebalance_in_progress]
        await one.until(lambda: one.wanted)
        assert one.told == [BOTH, ("taken", (1,))]
        kafka.answers["Heartbeat"] = [ErrorCode.rebalance_in_progress]
        await asked(kafka, "SyncGroup")
        assert kafka.claim() == Claim(frozenset({0, 1}), frozenset({1}), 2, 2)
        one.let_go([1])
        await asked(kafka, "SyncGroup")
        assert kafka.claim() == Claim(frozenset({0}), frozenset(), 3, 2)
        assert one.told == [BOTH, ("taken", (1,))]


async def test_a_round_that_waits_at_a_dead_coordinator_is_made_at_the_next() -> None:
    kafka = Coordinator()
    async with taking_part(kafka) as one:
        kafka.answers["Heartbeat"] = [ErrorCode.rebalance_in_progress, NONE, Unanswered("frozen")]
        kafka.answers["JoinGroup"] = [kafka.never]
        await asked(kafka, "SyncGroup")
        assert one.told == [BOTH]
        assert kafka.lost


async def test_who_is_late_asks_what_only_a_coordinator_that_knows_the_group_answers() -> None:
    """One that has just taken over says yes to signs of life before it knows anything."""
    kafka = Coordinator()
    async with taking_part(kafka) as one:
        one.go_on = False
        for name in ("Heartbeat", "SyncGroup"):
            kafka.answers[name] = [Unanswered("frozen") for _ in range(100)]
        await asyncio.sleep(0.9)
        assert one.left < 0
        kafka.answers.clear()
        await one.until(lambda: ("late", ()) in one.told)
        assert kafka.asked[-1] == "SyncGroup"  # and not a sign of life
        assert one.left < 0
        one.group.go_on()
        assert one.left > 0
        assert one.told == [BOTH, ("late", ())]


async def test_signs_of_life_during_a_rebalance_help_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who lives and does not come again is dropped when the rebalance has taken two sessions."""
    kafka = Coordinator()
    monkeypatch.setattr(_group, "_PARKED", 60.0)
    async with taking_part(kafka, session=0.4) as one:
        kafka.answers["Heartbeat"] = [ErrorCode.rebalance_in_progress] * 1000
        kafka.answers["JoinGroup"] = [kafka.never]
        await asked(kafka, "JoinGroup")
        until = asyncio.get_running_loop().time() + 0.8
        await asked(kafka, "Heartbeat", 4)
        assert one.left > 0
        while one.left > 0:
            assert asyncio.get_running_loop().time() < until
            await asyncio.sleep(0.01)
        kafka.drop(None)


async def test_a_problem_is_told_until_that_very_thing_works_again() -> None:
    """Signs of life are answered, and say nothing about a round that fails."""
    kafka = Coordinator()
    async with taking_part(kafka) as one:
        kafka.answers["Heartbeat"] = [ErrorCode.rebalance_in_progress]
        kafka.answers["JoinGroup"] = [ErrorCode.group_authorization_failed]
        await asked(kafka, "JoinGroup")
        await asked(kafka, "Heartbeat", 3)
        assert isinstance(one.group.problem, AuthorizationError)
        assert one.left > 0
        await asked(kafka, "SyncGroup")
        await asked(kafka, "Heartbeat")
        assert one.group.problem is None
        assert one.told == [BOTH]


async def test_a_failure_of_ours_is_survived(caplog: pytest.LogCaptureFixture) -> None:
    kafka = Coordinator()
    async with taking_part(kafka, session=2.5) as one:
        kafka.answers["Heartbeat"] = [ZeroDivisionError("bug"), NONE, ErrorCode.rebalance_in_progress]
        kafka.answers["JoinGroup"] = [ZeroDivisionError("bug")]
        await asked(kafka, "SyncGroup")
        assert one.told == [BOTH]
        assert one.left > 0
    assert caplog.text.count("ZeroDivisionError: bug") == 2


async def test_a_consumer_that_fails_to_take_note_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    kafka = Coordinator()
    one = Member(cast("Cluster", kafka), "t", session=0.8)
    one.places = {0: None}  # so that it refuses what it is given
    one.start()
    await one.group.join()
    await asked(kafka, "Heartbeat", 2)
    await one.stop()
    assert "AssertionError" in caplog.text


# ---------------------------------------------------------------------- committing


@pytest.mark.parametrize(
    "code",
    [
        ErrorCode.coordinator_load_in_progress,
        ErrorCode.not_coordinator,
        ErrorCode.request_timed_out,
        ErrorCode.illegal_generation,
        ErrorCode.rebalance_in_progress,
    ],
)
async def test_a_commit_is_made_again_where_that_helps(code: ErrorCode) -> None:
    kafka = Coordinator()
    async with taking_part(kafka) as one:
        kafka.answers["OffsetCommit"] = [code, BrokerUnavailable("not sent"), Unanswered("lost")]
        assert await one.group.commit({0: (7, "n")}, timeout=10) == {}
        assert kafka.asked.count("OffsetCommit") == 4
        assert one.told == [BOTH]


async def test_a_commit_waits_while_a_generation_begins() -> None:
    kafka = Coordinator()
    ready = asyncio.Event()

    async def later(_: Any) -> ErrorCode:
        await ready.wait()
        return NONE

    async with taking_part(kafka) as one:
        kafka.answers["Heartbeat"] = [ErrorCode.rebalance_in_progress]
        kafka.answers["SyncGroup"] = [later]
        await asked(kafka, "SyncGroup")
        failed = await one.group.commit({0: (7, "n")}, timeout=0.1)
        assert isinstance(failed[0], BrokerUnavailable)
        commit = asyncio.create_task(one.group.commit({0: (7, "n")}, timeout=10))
        await asyncio.sleep(0.05)
        assert "OffsetCommit" not in kafka.asked
        ready.set()
        assert await commit == {}
        (request,) = [one for one in kafka.requests if type(one).__name__ == "OffsetCommitRequest"]
        assert request.generation_id_or_member_epoch == 2


async def test_a_commit_is_sent_before_it_waits() -> None:
    kafka = Coordinator()
    async with taking_part(kafka) as one:
        commit = one.group.commit({0: (7, "n")}, timeout=10)
        commit.send(None)
        assert kafka.asked[-1] == "OffsetCommit"
        commit.close()


async def test_a_commit_of_who_is_no_member_is_lost() -> None:
    kafka = Coordinator()
    async with taking_part(kafka) as one:
        kafka.answers["OffsetCommit"] = [ErrorCode.unknown_member_id]
        failed = await one.group.commit({0: (7, "n"), 1: (7, "n")}, timeout=10)
        assert {type(error) for error in failed.values()} == {DeliveryLost}
        await one.until(lambda: len(one.told) == 4)
        assert one.told[1:] == [("lost", (0, 1)), ("late", ()), BOTH]


async def test_a_commit_that_is_answered_is_a_sign_of_life() -> None:
    kafka = Coordinator()
    async with taking_part(kafka) as one:
        kafka.answers["Heartbeat"] = [Unanswered("lost") for _ in range(1000)]
        for _ in range(12):
            await asyncio.sleep(0.1)
            assert await one.group.commit({0: (7, "n")}, timeout=10) == {}
            assert one.left > 0
