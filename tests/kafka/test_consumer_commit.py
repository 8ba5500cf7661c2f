"""Storing how far a reader is: rarely while much happens, at once when it is quiet, and never two at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import pytest

from brokerkit.address import Topic
from brokerkit.driver import Delivery
from brokerkit.drivers.kafka._claim import Claim
from brokerkit.drivers.kafka._commit import APART, BURST, EVERY, Commits
from brokerkit.errors import AuthorizationError, BrokerError, BrokerUnavailable, DeliveryLost
from brokerkit.testing import VirtualLoop

from .test_consumer_claim import FakeLog, Watch

TOPIC = Topic("orders", bytes)


class FakeGroup:
    """A coordinator that takes *takes* seconds to store something."""

    def __init__(self) -> None:
        self.takes = 0.01
        self.calls: list[tuple[float, dict[int, tuple[int, str]]]] = []
        self.answers: deque[Mapping[int, BrokerError] | Exception] = deque()
        self.under_way = 0
        self.most = 0

    async def commit(self, offsets: Mapping[int, tuple[int, str]], *, timeout: float) -> Mapping[int, BrokerError]:
        self.calls.append((asyncio.get_running_loop().time(), dict(offsets)))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(min(self.takes, timeout))
        finally:
            self.under_way -= 1
        answer = self.answers.popleft() if self.answers else dict[int, BrokerError]()
        if isinstance(answer, Exception):
            raise answer
        return answer


class Stage:
    """A `Commits` with two claims."""

    def __init__(self) -> None:
        self.group = FakeGroup()
        self.lost: list[Claim] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.held: dict[object, Delivery] = {}
        self.commits = Commits("g", self.group, 10.0, self.spawn, self.lost.extend)
        self.claims = [Claim(TOPIC, number, 0, "", Watch(), lambda: 0.0) for number in range(2)]
        self.logs = [FakeLog(range(2000)), FakeLog(range(2000))]

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.ensure_future(work())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def hand_out(self, number: int = 0, count: int = 1) -> None:
        self.claims[number].hand_out(self.logs[number], count, self.held, deque())
        self.commits.ahead([self.claims[number]])

    def settle(self, offset: int, number: int = 0) -> None:
        assert self.claims[number].tracker.done(offset)
        self.commits.touch(self.claims[number])

    @property
    def last(self) -> dict[int, tuple[int, str]]:
        return self.group.calls[-1][1]


def staged(test: Callable[[Stage], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run *test* in virtual time."""

    def run() -> None:
        async def main() -> None:
            await test(Stage())

        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@staged
async def test_what_is_handed_out_is_noted_at_once(stage: Stage) -> None:
    stage.hand_out(0, 3)
    assert stage.commits.unsent
    await asyncio.sleep(0)
    assert not stage.commits.unsent
    assert stage.last == {0: stage.claims[0].note()}
    assert stage.last[0][1], "the note says what is in hand"


@staged
async def test_a_busy_reader_stores_at_a_bounded_rate(stage: Stage) -> None:
    seconds = 4.0
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while loop.time() < end:
        stage.hand_out()
        stage.settle(stage.claims[0].tracker.base)
        await asyncio.sleep(0.003)
    assert len(stage.group.calls) <= seconds / APART + BURST + 1
    assert len(stage.group.calls) >= 0.7 * seconds / APART
    assert stage.group.most == 1


@staged
async def test_only_one_commit_is_under_way(stage: Stage) -> None:
    stage.group.takes = 0.5
    waiting: list[asyncio.Future[None]] = []
    for offset in range(5):
        stage.hand_out()
        stage.settle(offset)
        waiting.append(stage.commits.stored())
        await asyncio.sleep(0.05)
    await asyncio.gather(*waiting)
    assert stage.group.most == 1
    assert len(stage.group.calls) == 2
    assert stage.last[0][0] == 5


@staged
async def test_what_is_done_is_stored_soon_without_being_asked(stage: Stage) -> None:
    stage.hand_out()
    await stage.commits.stored()
    began = asyncio.get_running_loop().time()
    stage.settle(0)
    await asyncio.sleep(EVERY + 0.05)
    assert stage.last == {0: (1, "")}
    assert stage.group.calls[-1][0] - began <= EVERY + APART
    count = len(stage.group.calls)
    await asyncio.sleep(5)
    assert len(stage.group.calls) == count, "nothing has changed, so nothing is stored"


@staged
async def test_a_confirmation_waits_for_a_commit_that_has_it(stage: Stage) -> None:
    stage.group.takes = 0.2
    stage.hand_out()
    await asyncio.sleep(0.05)  # the note is under way
    stage.settle(0)
    await stage.commits.stored()
    assert stage.last == {0: (1, "")}
    assert len(stage.group.calls) == 2


@staged
async def test_nothing_to_store_is_stored_already(stage: Stage) -> None:
    await stage.commits.stored()
    assert not stage.group.calls


@staged
async def test_partitions_travel_together(stage: Stage) -> None:
    stage.hand_out(0, 2)
    stage.hand_out(1, 4)
    await stage.commits.stored()
    assert len(stage.group.calls) == 1
    assert stage.last == {0: stage.claims[0].note(), 1: stage.claims[1].note()}


@staged
async def test_what_others_own_is_lost_and_the_rest_is_stored(stage: Stage) -> None:
    stage.group.answers.append({0: DeliveryLost()})
    stage.hand_out(0)
    stage.hand_out(1)
    await stage.commits.stored()
    assert stage.lost == [stage.claims[0]]
    assert not stage.commits.pending


@pytest.mark.parametrize("error", [BrokerUnavailable("no"), AuthorizationError("READ on group g")])
@pytest.mark.parametrize("raised", [False, True])
def test_a_failure_is_told_and_tried_again(error: BrokerError, raised: bool) -> None:
    @staged
    async def test(stage: Stage) -> None:
        stage.group.answers.append(error if raised else {0: error})
        stage.hand_out()
        stage.settle(0)
        with pytest.raises(type(error)) as caught:
            await stage.commits.stored()
        assert caught.value is not error, "each waiter has an error of its own"
        assert stage.commits.problem is error
        assert stage.commits.pending
        await asyncio.sleep(3)
        assert stage.last == {0: (1, "")}
        assert not stage.commits.pending
        assert stage.commits.problem is None

    test()


@staged
async def test_a_coordinator_that_keeps_failing_is_asked_less_and_less(stage: Stage) -> None:
    stage.group.answers.extend([BrokerUnavailable("no")] * 100)
    stage.hand_out()
    for _ in range(1000):
        await asyncio.sleep(0.03)
        stage.hand_out()
        stage.settle(stage.claims[0].tracker.base)
    assert 10 <= len(stage.group.calls) <= 25


@staged
async def test_a_bug_below_is_an_error_and_not_a_hang(stage: Stage) -> None:
    stage.group.answers.append(ZeroDivisionError())
    stage.hand_out()
    with pytest.raises(BrokerError, match="ZeroDivisionError"):
        await stage.commits.stored()
    await stage.commits.stored()


@staged
async def test_what_is_dropped_is_not_stored(stage: Stage) -> None:
    stage.group.takes = 0.1
    stage.hand_out(0)
    await asyncio.sleep(0.01)
    stage.hand_out(0)
    stage.hand_out(1)
    assert stage.commits.concerns([stage.claims[0]])
    stage.commits.drop([stage.claims[0]])
    assert stage.commits.concerns([stage.claims[0]]), "it is in the commit that is under way"
    await stage.commits.quiet()
    assert not stage.commits.concerns([stage.claims[0]])
    await stage.commits.stored()
    assert set(stage.last) == {1}


@staged
async def test_closing_ends_all_waiting(stage: Stage) -> None:
    stage.group.takes = 5.0
    stage.hand_out()
    await asyncio.sleep(0)
    waiting = [stage.commits.stored()]
    stage.commits.close()
    waiting.append(stage.commits.stored())
    for future in waiting:
        with pytest.raises(DeliveryLost):
            await future
    await asyncio.sleep(10)
    assert len(stage.group.calls) == 1
