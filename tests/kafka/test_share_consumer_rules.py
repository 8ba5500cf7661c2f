"""Consumers of a share group, one rule at a time, at a broker that is kept simple (`share_playground`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from brokerkit import clock
from brokerkit.driver import Delivery, Settlement, Source
from brokerkit.drivers.kafka._engine import Terms
from brokerkit.drivers.kafka._share_consumer import ShareConsumer
from brokerkit.errors import BrokerUnavailable, CapabilityError, Closed, ConfigError, DeliveryLost
from brokerkit.events import Expired, PartitionPaused, PartitionResumed
from brokerkit.testing import VirtualLoop

from .share_playground import LIMIT, TERMS, FakeShare, World, copied, installed

SOON = 20.0
QUIET = 0.5


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[World], Awaitable[None]]], None]:
    """Run something with a world of its own, in virtual time."""
    installed(monkeypatch)

    def run(main: Callable[[World], Awaitable[None]]) -> None:
        async def begin() -> None:
            await main(World())

        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(begin())

    return run


class Reader:
    """A consumer and what it was told."""

    def __init__(self, consumer: ShareConsumer, revoked: list[str]) -> None:
        self.consumer = consumer
        self.revoked = revoked

    @property
    def share(self) -> FakeShare:
        share = self.consumer._share
        assert isinstance(share, FakeShare)
        return share

    async def take(self, count: int) -> list[Delivery]:
        taken: list[Delivery] = []
        async with asyncio.timeout(SOON):
            while len(taken) < count:
                taken += await self.consumer.receive(count - len(taken), SOON)
        return taken

    async def nothing(self) -> None:
        got = await self.consumer.receive(100, QUIET)
        assert not got, ids(got)

    async def done(self, *deliveries: Delivery, confirm: bool = False) -> None:
        results = await self.consumer.settle([Settlement(delivery) for delivery in deliveries], confirm=confirm)
        assert list(results) == [None] * len(deliveries)

    async def drain(self) -> list[Delivery]:
        taken: list[Delivery] = []
        while got := await self.consumer.receive(100, QUIET):
            taken += got
            await self.done(*got)
        return taken

    async def die(self) -> None:
        """End as a process does that is killed."""
        hosted = self.consumer._hosted
        assert hosted is not None
        assert hosted.task is not None
        hosted.task.cancel()
        await asyncio.wait([hosted.task])


@asynccontextmanager
async def reading(world: World, *, prefetch: int = 100, terms: Terms = TERMS) -> AsyncIterator[Reader]:
    revoked: list[str] = []

    async def told(deliveries: Sequence[Delivery]) -> None:
        revoked.extend(ids(deliveries))

    async with ShareConsumer(world.context(), world.queue, Source(world.queue), prefetch, told, terms) as consumer:
        yield Reader(consumer, revoked)


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.record.id for delivery in deliveries]


def names(count: int, prefix: str = "m") -> list[str]:
    return [f"{prefix}{number:04}" for number in range(count)]


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.sleep(0.001)


# ---------------------------------------------------------------------- receiving


def test_it_acquires_only_for_who_waits(play: Any) -> None:
    async def main(world: World) -> None:
        async with reading(world) as r:
            for id in names(10):
                world.store(id)
            await asyncio.sleep(1)
            assert all(entry.count == 0 for entry in world.log)
            assert ids(await r.take(3)) == names(3)
            await asyncio.sleep(1)
            assert sum(entry.count for entry in world.log) == 3

    play(main)


def test_prefetch_holds_at_any_time(play: Any) -> None:
    async def main(world: World) -> None:
        for id in names(30):
            world.store(id)
        async with reading(world, prefetch=5) as r:
            held = await r.take(5)
            await r.nothing()
            r.consumer.prefetch = 8
            held += await r.take(3)
            await r.nothing()
            r.consumer.prefetch = 2
            await r.done(*held[:6])
            await r.nothing()
            await r.done(held[6])
            await r.take(1)
            await r.nothing()
            assert r.share.most <= 8

    play(main)


def test_a_receive_that_is_cancelled_loses_nothing_and_keeps_nothing(play: Any) -> None:
    async def main(world: World) -> None:
        async with reading(world) as one, reading(world) as other:
            for number in range(30):
                receiving = asyncio.ensure_future(one.consumer.receive(1, SOON))
                world.store(f"m{number}")
                await asyncio.sleep(number * 0.0005)
                receiving.cancel()
                await asyncio.wait([receiving])
                if receiving.cancelled():
                    assert ids(await other.take(1)) == [f"m{number}"]
                    assert world.log[-1].count <= 1

    play(main)


def test_what_nobody_fetches_goes_to_others(play: Any) -> None:
    async def main(world: World) -> None:
        async with reading(world) as one, reading(world) as other:
            assert not await one.consumer.receive(10, 0)  # it has asked for ten
            for id in names(10):
                world.store(id)
            taken = await other.take(10)
            assert sorted(ids(taken)) == names(10)
            assert {delivery.deliveries for delivery in taken} == {1}

    play(main)


def test_one_task_receives_at_a_time(play: Any) -> None:
    async def main(world: World) -> None:
        async with reading(world) as r:
            first = asyncio.ensure_future(r.consumer.receive(1, SOON))
            await asyncio.sleep(0)
            with pytest.raises(ConfigError):
                await r.consumer.receive(1, 0)
            world.store("m")
            assert ids(await first) == ["m"]
        with pytest.raises(Closed):
            await r.consumer.receive(1, 0)

    play(main)


def test_until_the_end_is_refused(play: Any) -> None:
    async def main(world: World) -> None:
        consumer = ShareConsumer(world.context(), world.queue, Source(world.queue, until_end=True), 1, None, TERMS)  # type: ignore[arg-type]
        with pytest.raises(CapabilityError):
            await consumer.__aenter__()

    play(main)


# ---------------------------------------------------------------------- what waits


def test_what_waits_for_its_time_uses_up_no_prefetch(play: Any) -> None:
    async def main(world: World) -> None:
        loop = asyncio.get_running_loop()
        async with reading(world, prefetch=10) as r:
            for id in names(50):
                world.store(id, delay=0.5)
            began = loop.time()
            for id in names(20, "n"):
                world.store(id)
            assert ids(await r.take(10)) == names(10, "n")
            assert loop.time() - began < 0.3
            await r.done(*list(held(r)))
            await r.done(*await r.take(10))
            assert loop.time() - began < 0.5
            taken: list[Delivery] = []
            while len(taken) < 50:
                got = await r.take(1)
                assert loop.time() - began >= 0.49
                await r.done(*got)
                taken += got
            assert sorted(ids(taken)) == names(50)
            assert {delivery.deliveries for delivery in taken} == {1}

    play(main)


def held(r: Reader) -> list[Delivery]:
    return list(r.consumer._held.values())


def test_what_is_due_and_finds_no_room_goes_to_others(play: Any) -> None:
    async def main(world: World) -> None:
        async with reading(world, prefetch=1) as busy, reading(world) as other:
            receiving = asyncio.ensure_future(busy.take(1))
            world.store("late", delay=0.5)
            await asyncio.sleep(0.1)
            world.store("now")
            assert ids(await receiving) == ["now"]
            waiting = asyncio.ensure_future(busy.consumer.receive(1, SOON))
            assert ids(await other.take(1)) == ["late"]
            waiting.cancel()

    play(main)


def test_what_would_wait_for_long_is_put_where_that_is_done(play: Any) -> None:
    async def main(world: World) -> None:
        async with reading(world) as r:
            world.store("m", delay=30.0)
            await r.nothing()
            (copy,) = world.copies
            assert copy.id == "m"
            assert 29 <= copy.delay <= 30
            assert not world.left

    play(main)


def test_what_has_expired_is_dropped_and_told_of(play: Any) -> None:
    async def main(world: World) -> None:
        now = clock.current().time()
        world.time.answered(int(now * 1000), asyncio.get_running_loop().time())
        async with reading(world) as r:
            world.store("late", expires=now - 1)
            world.store("early", expires=now + 1000)
            assert ids(await r.take(1)) == ["early"]
            await r.nothing()
            assert [event.count for event in world.events if isinstance(event, Expired)] == [1]
            assert [entry.done for entry in world.log] == [True, False]

    play(main)


def test_what_expires_while_it_is_ready_is_not_handed_out(play: Any) -> None:
    async def main(world: World) -> None:
        loop = asyncio.get_running_loop()
        now = clock.current().time()
        world.time.answered(int(now * 1000), loop.time())
        async with reading(world, prefetch=2) as r:
            first = asyncio.ensure_future(r.consumer.receive(2, SOON))
            await asyncio.sleep(0.01)
            world.store("one")
            assert ids(await first) == ["one"]
            world.store("two", expires=now + 0.5)
            await asyncio.sleep(0.8)
            await r.nothing()

    play(main)


# ---------------------------------------------------------------------- alone


def test_a_suspect_comes_alone_and_what_came_with_it_counts_nothing(play: Any) -> None:
    async def main(world: World) -> None:
        for id in names(3):
            world.store(id)
        world.store("poison", deliveries=2)
        for id in names(3, "n"):
            world.store(id)
        async with reading(world) as r:
            (poison,) = await r.consumer.receive(100, SOON)
            assert (poison.record.id, poison.deliveries) == ("poison", 3)
            await r.nothing()
            assert [entry.count for entry in world.left if entry.id != "poison"] == [0] * 6
            await r.done(poison)
            others = await r.drain()
            assert sorted(ids(others)) == [*names(3), *names(3, "n")]
            assert {delivery.deliveries for delivery in others} == {1}

    play(main)


def test_a_suspect_waits_for_what_is_in_hand(play: Any) -> None:
    async def main(world: World) -> None:
        async with reading(world) as r:
            world.store("m")
            taken = await r.take(1)
            world.store("poison", deliveries=5)
            await r.nothing()
            world.store("n")
            await r.nothing()
            await r.done(*taken)
            assert ids(await r.consumer.receive(100, SOON)) == ["poison"]
            await r.nothing()

    play(main)


def test_suspects_come_one_by_one(play: Any) -> None:
    async def main(world: World) -> None:
        for id in names(30):
            world.store(id, deliveries=3)
        for id in names(30, "n"):
            world.store(id)
        async with reading(world) as r:
            seen: list[str] = []
            while len(seen) < 60:
                got = await r.consumer.receive(100, SOON)
                assert got
                assert len(got) == 1 or all(delivery.deliveries < 3 for delivery in got)
                await r.done(*got)
                seen += ids(got)
            assert sorted(seen) == [*names(30), *names(30, "n")]
            copies = len(world.log) - 60
            assert copies < 300  # what comes with a suspect is stored anew, a few at a time
            assert r.consumer._careful != 1

    play(main)


def test_a_suspect_that_is_released_holds_nothing_up(play: Any) -> None:
    async def main(world: World) -> None:
        world.store("poison", deliveries=2)
        async with reading(world) as r:
            alone = await r.take(1)
            for id in names(5):
                world.store(id)
            await r.nothing()
            await r.consumer.release(alone)
            taken = await r.drain()
            assert sorted(ids(taken)) == [*names(5), "poison"]
            assert [d.deliveries for d in taken if d.record.id == "poison"] == [3]

    play(main)


def test_a_suspect_that_nobody_fetches_goes_to_others(play: Any) -> None:
    async def main(world: World) -> None:
        async with reading(world) as one, reading(world) as other:
            assert not await one.consumer.receive(10, 0)
            world.store("poison", deliveries=2)
            (alone,) = await other.take(1)
            assert alone.deliveries == 3
            assert ids(await other.consumer.receive(1, 0)) == []
            await other.done(alone)
            world.store("m")
            assert ids(await one.take(1)) == ["m"]

    play(main)


# ---------------------------------------------------------------------- rescue


def test_a_record_is_rescued_before_anything_else(play: Any) -> None:
    async def main(world: World) -> None:
        entry = world.store("m")
        entry.count = 2
        async with reading(world) as r:
            (delivery,) = await r.take(1)
            assert delivery.deliveries == 3
            await eventually(lambda: entry.done)
            assert (world.log[-1].id, world.log[-1].count) == ("m", 1)

    play(main)


def test_what_cannot_be_rescued_is_kept_and_never_handed_out(play: Any) -> None:
    async def main(world: World) -> None:
        world.refused = BrokerUnavailable("too few copies")
        entry = world.store("m")
        entry.count = 2
        async with reading(world) as r:
            for _ in range(30):
                await r.nothing()
            assert entry.owner is r.share
            assert entry.count == 3
            assert isinstance(r.consumer.problem, BrokerUnavailable)
            world.store("n")  # and everything else goes on
            assert ids(await r.take(1)) == ["n"]
            await r.done(*held(r))
            world.refused = None
            (delivery,) = await r.take(1)
            assert (delivery.record.id, delivery.deliveries) == ("m", 3)
            await eventually(lambda: r.consumer.problem is None)

    play(main)


def test_the_limit_of_the_group_may_be_lower(play: Any) -> None:
    async def main(world: World) -> None:
        world.limit = 2
        entry = world.store("m")
        entry.count = 1
        async with reading(world, terms=Terms("share", limit=2)) as r:
            (delivery,) = await r.take(1)
            assert delivery.deliveries == 2
            await eventually(lambda: entry.done)

    play(main)


def test_what_runs_while_connections_break_is_stored_before_it_is_dropped(play: Any) -> None:
    async def main(world: World) -> None:
        world.store("m")
        async with reading(world) as r:
            (first,) = await r.take(1)
            for _ in range(LIMIT - 1):
                assert not r.revoked
                r.share.cut(1.0)
                await asyncio.sleep(0)
            assert r.revoked == ["m"]
            (result,) = await r.consumer.settle([Settlement(first)])
            assert isinstance(result, DeliveryLost)
            (again,) = await r.take(1)
            assert (again.record.id, again.deliveries) == ("m", 2)
            await r.done(again, confirm=True)
        assert not world.left
        assert not world.dropped

    play(main)


def test_ten_kills_lose_nothing_and_count_what_was_in_hand(play: Any) -> None:
    async def main(world: World) -> None:
        for id in names(20):
            world.store(id)
        counts: dict[str, int] = {}
        for _ in range(10):
            async with reading(world) as r:
                for delivery in await r.consumer.receive(100, SOON):
                    assert delivery.deliveries == counts.get(delivery.record.id, 0) + 1
                    counts[delivery.record.id] = delivery.deliveries
                await r.die()
        async with reading(world) as r:
            seen = await r.drain()
        assert sorted(ids(seen)) == names(20)
        assert not world.dropped

    play(main)


# ---------------------------------------------------------------------- leaving and handing back


@pytest.mark.parametrize("again", range(3))
def test_leaving_hands_everything_back_uncounted(play: Any, again: int) -> None:
    async def main(world: World) -> None:
        for id in names(50):
            world.store(id)
        world.store("later", delay=0.9)
        for _ in range(10):
            async with reading(world) as r:
                assert len(await r.take(40)) == 40
                receiving = asyncio.ensure_future(r.consumer.receive(100, SOON))
                await asyncio.sleep(again * 0.005)
                receiving.cancel()
        async with reading(world) as r:
            seen = await r.take(51)
        assert sorted(ids(seen)) == ["later", *names(50)]
        assert {delivery.deliveries for delivery in seen} == {1}

    play(main)


def test_what_cannot_be_copied_in_time_is_handed_back_itself(play: Any) -> None:
    async def main(world: World) -> None:
        for id in names(3):
            world.store(id)
        loop = asyncio.get_running_loop()
        async with reading(world) as r:
            await r.take(3)
            world.refused = BrokerUnavailable("too few copies")
            began = loop.time()
        assert loop.time() - began < 6
        world.refused = None
        async with reading(world) as r:
            assert {delivery.deliveries for delivery in await r.drain()} == {2}

    play(main)


def test_releasing_does_not_let_the_broker_drop_anything(play: Any) -> None:
    async def main(world: World) -> None:
        world.store("m")
        async with reading(world) as r:
            (delivery,) = await r.take(1)
            world.log[0].count = delivery.token.lock.count = LIMIT  # type: ignore[attr-defined]
            world.refused = BrokerUnavailable("too few copies")
            await asyncio.wait_for(r.consumer.release([delivery]), 8)
            assert world.log[0].owner is r.share
            world.refused = None
            (again,) = await r.take(1)
            assert again.deliveries == 1
            await r.done(again)
        assert not world.dropped

    play(main)


# ---------------------------------------------------------------------- settling and losing


def test_what_was_lost_is_told_and_settled_no_more(play: Any) -> None:
    async def main(world: World) -> None:
        for id in names(3):
            world.store(id)
        async with reading(world) as r:
            taken = await r.take(3)
            r.share.cut(0.0)
            await asyncio.sleep(0.01)
            assert sorted(r.revoked) == names(3)
            out = copied(taken[0].record, address=world.queue)
            results = await r.consumer.settle([Settlement(taken[0]), Settlement(taken[1], (out,))])
            assert all(isinstance(result, DeliveryLost) and not result.published for result in results)
            assert len(world.log) == 3

    play(main)


def test_what_is_settled_too_late_is_lost_and_comes_again(play: Any) -> None:
    async def main(world: World) -> None:
        world.store("m")
        async with reading(world) as r:
            (delivery,) = await r.take(1)
            lock = r.share.locks[0]
            lock.until = asyncio.get_running_loop().time()
            (result,) = await r.consumer.settle([Settlement(delivery)])
            assert isinstance(result, DeliveryLost)
            lock.until = 1000.0  # it is ours after all
            (again,) = await r.take(1)
            assert again.deliveries == 2
            (result,) = await r.consumer.settle([Settlement(delivery)])
            assert isinstance(result, DeliveryLost)
            await r.done(again)

    play(main)


def test_what_is_lost_while_its_copy_is_stored_says_so(play: Any) -> None:
    async def main(world: World) -> None:
        world.slow = 1.0
        world.store("m")
        async with reading(world) as r:
            (delivery,) = await r.take(1)
            settling = asyncio.ensure_future(r.consumer.settle([Settlement(delivery, (copied(delivery.record),))]))
            while len(world.log) < 2:
                await asyncio.sleep(0.01)
            r.share.cut(0.0)
            (result,) = await settling
            assert isinstance(result, DeliveryLost)
            assert result.published

    play(main)


def test_a_partition_that_stands_is_told_of(play: Any) -> None:
    async def main(world: World) -> None:
        async with reading(world) as r:
            r.consumer.stalled(3, 1000, 2000)
            r.consumer.resumed(3)
        told = [(type(e), e.partition) for e in world.events if isinstance(e, (PartitionPaused, PartitionResumed))]
        assert told == [(PartitionPaused, 3), (PartitionResumed, 3)]

    play(main)


def test_it_tells_what_it_has_to_who_counts(play: Any) -> None:
    async def main(world: World) -> None:
        world.store("later", delay=0.9)
        world.store("now")
        async with reading(world) as r:
            taken = await r.take(1)
            assert sorted(r.consumer.holding()) == [(0, 0, True), (0, 1, False)]
            world.slow = 1.0
            await r.done(*taken)
            assert r.consumer.going() == 1
            assert list(r.consumer.holding()) == [(0, 0, True)]

    play(main)
