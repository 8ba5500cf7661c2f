"""`Lone`: what comes alone holds up others until it is gone, or was in hand for a lease."""

from __future__ import annotations

import asyncio

from brokerkit.drivers._lone import Lone
from brokerkit.testing import VirtualLoop

LEASE = 30.0


class Consumer:
    """What is in hand, and when others were let in."""

    def __init__(self) -> None:
        self.held: dict[object, str] = {}
        self.woken: list[float] = []
        self.lone = Lone(self.held, lambda: self.woken.append(asyncio.get_running_loop().time()))

    def take(self, name: str) -> object:
        token = object()
        self.held[token] = name
        return token

    def come(self, name: str, lease: float = LEASE) -> object:
        assert not self.lone.holds_up()
        assert self.lone.may_come()
        token = self.take(name)
        self.lone.came(token, lease)
        return token


def timers() -> int:
    loop = asyncio.get_running_loop()
    return sum(not handle.cancelled() for handle in loop._scheduled)  # type: ignore[attr-defined]


def run(main: object) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main)  # type: ignore[arg-type]


def test_it_holds_up_others_for_one_lease_and_then_lets_them_in_at_once() -> None:
    async def main() -> None:
        c, loop = Consumer(), asyncio.get_running_loop()
        began = loop.time()
        c.come("a")
        await asyncio.sleep(LEASE - 0.01)
        assert c.lone.holds_up()
        assert not c.lone.may_come()
        assert not c.woken
        await asyncio.sleep(0.02)
        assert not c.lone.holds_up()
        assert c.lone.may_come()
        assert [LEASE <= at - began < LEASE + 0.01 for at in c.woken] == [True]
        assert timers() == 0

    run(main())


def test_each_comes_beside_those_that_are_proven_and_beside_nothing_else() -> None:
    async def main() -> None:
        c = Consumer()
        first = c.come("a")
        await asyncio.sleep(LEASE)
        second = c.come("b")
        assert c.lone.holds_up()
        assert list(c.lone.proven()) == [first]
        await asyncio.sleep(LEASE)
        other = c.take("other")
        assert not c.lone.may_come()
        assert not c.lone.holds_up()
        del c.held[first]
        assert not c.lone.may_come()
        del c.held[other]
        assert c.lone.may_come()
        assert list(c.lone.proven()) == [second]

    run(main())


def test_what_is_gone_holds_up_nothing_and_leaves_no_timer() -> None:
    async def main() -> None:
        c = Consumer()
        token = c.come("a")
        assert timers() == 1
        del c.held[token]
        assert not c.lone.holds_up()
        assert not c.lone.active
        assert timers() == 0
        await asyncio.sleep(2 * LEASE)
        assert not c.woken

    run(main())


def test_the_time_of_one_does_not_count_for_the_next() -> None:
    async def main() -> None:
        c = Consumer()
        del c.held[c.come("a")]
        await asyncio.sleep(LEASE - 1)
        assert not c.lone.holds_up()
        c.come("b")
        await asyncio.sleep(LEASE - 1)
        assert c.lone.holds_up()
        c.lone.close()
        assert timers() == 0

    run(main())


def test_without_a_lease_it_holds_up_others_until_it_is_gone() -> None:
    async def main() -> None:
        c = Consumer()
        c.come("a", float("inf"))
        assert timers() == 0
        await asyncio.sleep(1000 * LEASE)
        assert c.lone.holds_up()

    run(main())
