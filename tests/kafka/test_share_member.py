"""Membership of a share group: what a member makes of each answer."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from kio.schema.errors import ErrorCode

from brokerkit.drivers.kafka import _share_member
from brokerkit.drivers.kafka._errors import Unanswered
from brokerkit.drivers.kafka._share_member import ShareMember
from brokerkit.errors import AuthorizationError, BrokerError, BrokerUnavailable, ConfigError
from brokerkit.testing import VirtualLoop

BEAT = 2.0


class Coordinator:
    """Answers with what it was told to, then with success."""

    def __init__(self, *answers: ErrorCode | BrokerError) -> None:
        self.answers: list[ErrorCode | BrokerError] = [*answers]
        self.asked: list[tuple[int, tuple[str, ...] | None]] = []
        """Epoch and topics of each request."""
        self.at: list[float] = []
        self.forgotten: list[str] = []
        self.failures: list[BrokerError] = []
        self.member = ShareMember(self, "emails", "emails", self.failures.append)  # type: ignore[arg-type]
        self.running: asyncio.Future[None] | None = None

    async def ask(self, cluster: Any, group: str, request: Any, *, timeout: float, line: object) -> Any:
        self.asked.append((int(request.member_epoch), request.subscribed_topic_names))
        self.at.append(asyncio.get_running_loop().time())
        assert request.member_id == self.member.id
        answer = self.answers.pop(0) if self.answers else ErrorCode.none
        if isinstance(answer, BrokerError):
            raise answer
        return SimpleNamespace(
            error_code=answer,
            error_message=None,
            member_epoch=len(self.asked),
            heartbeat_interval=dt.timedelta(seconds=BEAT),
        )

    def forget_coordinator(self, group: str) -> None:
        self.forgotten.append(group)

    @property
    def epochs(self) -> list[int]:
        return [epoch for epoch, _ in self.asked]

    def start(self) -> None:
        self.running = asyncio.ensure_future(self.member.run())

    async def stop(self) -> None:
        await self.member.leave(timeout=5)
        assert self.running is not None
        await asyncio.wait_for(self.running, 5)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run something with a member whose coordinator gives certain answers."""

    def run(main: Callable[[Coordinator], Awaitable[None]], *answers: ErrorCode | BrokerError) -> None:
        async def begin() -> None:
            coordinator = Coordinator(*answers)
            monkeypatch.setattr(_share_member, "ask", coordinator.ask)
            coordinator.start()
            await main(coordinator)
            await coordinator.stop()

        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(begin())

    return run


def test_it_joins_gives_signs_of_life_and_leaves(play: Any) -> None:
    async def main(c: Coordinator) -> None:
        await c.member.join(timeout=1)
        await asyncio.sleep(2.5 * BEAT)
        assert c.asked == [(0, ("emails",)), (1, None), (2, None)]
        assert c.at == [0.0, BEAT, 2 * BEAT]
        await c.stop()
        assert c.epochs[-1] == -1
        count = len(c.asked)
        await asyncio.sleep(3 * BEAT)
        assert len(c.asked) == count

    play(main)


@pytest.mark.parametrize("code", [ErrorCode.unknown_member_id, ErrorCode.fenced_member_epoch])
def test_who_was_forgotten_joins_again_at_once_as_the_same(play: Any, code: ErrorCode) -> None:
    async def main(c: Coordinator) -> None:
        id = c.member.id
        await asyncio.sleep(BEAT + 1)
        assert c.epochs == [0, 1, 0]
        assert c.member.id == id
        assert c.member.problem is None

    play(main, ErrorCode.none, code)


@pytest.mark.parametrize(
    "code",
    [ErrorCode.not_coordinator, ErrorCode.coordinator_not_available, ErrorCode.coordinator_load_in_progress],
)
def test_a_coordinator_that_has_moved_is_looked_for(play: Any, code: ErrorCode) -> None:
    async def main(c: Coordinator) -> None:
        await c.member.join(timeout=1)
        assert c.epochs == [0, 0, 0]
        assert c.forgotten == (["emails"] * 2 if code is not ErrorCode.coordinator_load_in_progress else c.forgotten)
        assert not c.failures

    play(main, code, code)


def test_a_coordinator_that_does_not_answer_is_asked_again(play: Any) -> None:
    async def main(c: Coordinator) -> None:
        with pytest.raises(BrokerUnavailable, match="nobody"):
            await c.member.join(timeout=0.05)
        await c.member.join(timeout=1)
        assert c.member.problem is None
        assert c.epochs[:3] == [0, 0, 0]

    play(main, Unanswered("no"), BrokerUnavailable("no"))


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (ErrorCode.group_authorization_failed, AuthorizationError),
        (ErrorCode.topic_authorization_failed, AuthorizationError),
        (ErrorCode.group_id_not_found, ConfigError),
        (ErrorCode.group_max_size_reached, ConfigError),
        (ErrorCode.unsupported_version, ConfigError),
        (ErrorCode.invalid_request, BrokerError),
    ],
)
def test_what_will_not_change_is_told_before_it_has_joined(
    play: Any, code: ErrorCode, error: type[BrokerError]
) -> None:
    async def main(c: Coordinator) -> None:
        await asyncio.sleep(3 * BEAT)
        assert [type(failure) for failure in c.failures] == [error]
        assert "emails" in str(c.failures[0])
        assert c.epochs == [0]

    play(main, code)


def test_a_right_that_is_taken_away_and_given_back_ends_nothing(play: Any) -> None:
    async def main(c: Coordinator) -> None:
        await asyncio.sleep(BEAT + 0.5)
        assert isinstance(c.member.problem, AuthorizationError)
        await asyncio.sleep(2)
        assert c.member.problem is None
        assert not c.failures
        assert c.epochs[:3] == [0, 1, 1]

    play(main, ErrorCode.none, ErrorCode.group_authorization_failed)


def test_a_group_that_has_become_another_ends_it(play: Any) -> None:
    async def main(c: Coordinator) -> None:
        await asyncio.sleep(2 * BEAT)
        assert [type(failure) for failure in c.failures] == [ConfigError]

    play(main, ErrorCode.none, ErrorCode.group_id_not_found)


def test_leaving_asks_again_and_does_not_take_for_ever(play: Any) -> None:
    async def main(c: Coordinator) -> None:
        await c.member.join(timeout=1)
        c.answers = [BrokerUnavailable("no"), ErrorCode.not_coordinator]
        await c.stop()
        assert c.epochs == [0, -1, -1, -1]
        c.member._epoch = 1
        c.answers = [BrokerUnavailable("no") for _ in range(1000)]
        began = asyncio.get_running_loop().time()
        await c.member.leave(timeout=1.0)
        assert asyncio.get_running_loop().time() - began <= 1.0

    play(main)
