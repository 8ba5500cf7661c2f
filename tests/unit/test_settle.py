"""What gathers settlements: nothing is dropped that the system may yet store, and nothing is promised that it has not."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from brokerkit._settle import Settling, Watch
from brokerkit.address import Address, Queue
from brokerkit.driver import Delivery, Record, Settlement
from brokerkit.errors import BrokerError, BrokerUnavailable, Closed, DeliveryLost, NotFound, TooLarge
from brokerkit.testing import VirtualLoop

EMAILS = Queue("emails", str)


def settlement(id: str) -> Settlement:
    return Settlement(Delivery(Record(EMAILS, id, b"body"), object(), f"emails@{id}"))


class Recording:
    """A consumer that writes down what it is told to settle, and fails as it is told to."""

    prefetch = 100
    ended = False
    cursor = None
    owned_until = math.inf

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], bool]] = []
        self.failures: list[BrokerError] = []

    async def settle(self, items: Sequence[Settlement], *, confirm: bool = False) -> Sequence[BrokerError | None]:
        self.calls.append(([item.delivery.record.id for item in items], confirm))
        return [self.failures.pop(0) if self.failures else None for _ in items]

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery]:
        return []

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.calls.append(([delivery.record.id for delivery in deliveries], False))

    async def hold(self, delivery: Delivery, attempts: int) -> None:
        pass


class Stage:
    """A `Settling` at work, and what it has told."""

    def __init__(self, restore: Callable[[Address], Awaitable[bool]] | None = None) -> None:
        self.consumer = Recording()
        self.settled = 0
        self.errors: list[BrokerError] = []
        self.outcomes: list[BrokerError | None] = []
        self.settling = Settling(self.consumer, self._count, lambda delivery, error: self.errors.append(error), restore)

    def _count(self, count: int) -> None:
        self.settled += count

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Settling]:
        task = asyncio.ensure_future(self.settling.run())
        yield self.settling
        task.cancel()
        await asyncio.wait([task])


def run(main: object) -> None:
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(0)) as runner:
        runner.run(main)  # type: ignore[arg-type]


def test_what_is_added_in_one_turn_is_one_call() -> None:
    stage = Stage()

    async def main() -> None:
        async with stage.running() as settling:
            for id in "abc":
                settling.add(settlement(id))
            await settling.flush()

    run(main())
    assert stage.consumer.calls == [(["a", "b", "c"], False)]
    assert stage.settled == 3


def test_one_that_wants_confirmation_gets_it() -> None:
    stage = Stage()

    async def main() -> None:
        async with stage.running() as settling:
            settling.add(settlement("a"))
            settling.add(settlement("b"), confirm=True)
            await settling.flush()
            settling.add(settlement("c"))
            await settling.flush()

    run(main())
    assert stage.consumer.calls == [(["a", "b"], True), (["c"], False)]


@pytest.mark.parametrize("error", [BrokerUnavailable("no answer"), TooLarge("a copy is too large")])
def test_what_could_not_be_stored_is_tried_again(error: BrokerError) -> None:
    stage = Stage()
    stage.consumer.failures = [error, error]

    async def main() -> None:
        async with stage.running() as settling:
            settling.add(settlement("a"), Watch(done=stage.outcomes.append))
            await settling.flush()

    run(main())
    assert stage.consumer.calls == [(["a"], False)] * 3
    assert stage.errors == [error, error]
    assert stage.outcomes == [None]
    assert stage.settled == 1


def test_what_is_lost_is_not_tried_again() -> None:
    stage = Stage()
    lost = DeliveryLost()
    stage.consumer.failures = [lost]

    async def main() -> None:
        async with stage.running() as settling:
            settling.add(settlement("a"), Watch(done=stage.outcomes.append))
            await settling.flush()

    run(main())
    assert stage.consumer.calls == [(["a"], False)]
    assert stage.outcomes == [lost]
    assert stage.settled == 1


def test_a_failed_item_fails_alone() -> None:
    stage = Stage()
    stage.consumer.failures = [BrokerUnavailable("no answer")]

    async def main() -> None:
        async with stage.running() as settling:
            settling.add(settlement("a"))
            settling.add(settlement("b"))
            await settling.flush()

    run(main())
    assert stage.consumer.calls == [(["a", "b"], False), (["a"], False)]
    assert stage.settled == 2


def staging(id: str) -> Settlement:
    return Settlement(settlement(id).delivery, (Record(Queue("out", str), "copy", b"body"),))


def test_what_is_published_to_an_address_that_has_vanished_is_stored_once_it_is_there_again() -> None:
    restored: list[Address] = []

    async def restore(address: Address) -> bool:
        restored.append(address)
        return True

    stage = Stage(restore)
    stage.consumer.failures = [NotFound("out")]

    async def main() -> None:
        async with stage.running() as settling:
            settling.add(staging("a"), Watch(done=stage.outcomes.append))
            await settling.flush()

    run(main())
    assert restored == [Queue("out", str)]
    assert stage.outcomes == [None]


def test_what_is_known_is_told_before_an_address_is_created_anew() -> None:
    async def restore(address: Address) -> bool:
        await asyncio.sleep(30)
        return True

    stage = Stage(restore)
    stage.consumer.failures = [NotFound("out")]
    known: list[BrokerError | None] = []

    async def main() -> None:
        async with stage.running() as settling:
            settling.add(staging("a"), Watch(done=stage.outcomes.append))
            settling.add(settlement("b"), Watch(done=known.append))
            await asyncio.sleep(1)
            assert known == [None]

    run(main())
    assert [type(outcome) for outcome in stage.outcomes] == [DeliveryLost]


def test_a_closed_connection_is_not_asked_again() -> None:
    stage = Stage()
    stage.consumer.failures = [Closed("the connection is closed")]

    async def main() -> None:
        async with stage.running() as settling:
            settling.add(settlement("a"), Watch(done=stage.outcomes.append))
            await settling.flush()

    run(main())
    assert stage.consumer.calls == [(["a"], False)]
    assert [type(outcome) for outcome in stage.outcomes] == [DeliveryLost]


def test_what_is_left_when_the_consumer_is_left_is_lost() -> None:
    stage = Stage()

    async def main() -> None:
        stage.settling.add(settlement("a"), Watch(done=stage.outcomes.append))
        stage.settling.close()
        stage.settling.add(settlement("b"), Watch(done=stage.outcomes.append))

    run(main())
    assert stage.consumer.calls == []
    assert [type(outcome) for outcome in stage.outcomes] == [DeliveryLost, DeliveryLost]


def test_a_release_that_failed_is_tried_again() -> None:
    """Its lease is renewed as long as the consumer lives, so nobody else would get the message."""
    stage = Stage()
    stage.consumer.failures = [BrokerUnavailable("no answer"), BrokerUnavailable("no answer")]

    async def main() -> None:
        async with stage.running() as settling:
            settling.release([settlement("a").delivery])
            await settling.flush()
            assert stage.consumer.calls == [(["a"], False)]
            assert stage.settled == 1

    run(main())
    assert [type(error) for error in stage.errors] == [BrokerUnavailable, BrokerUnavailable]
