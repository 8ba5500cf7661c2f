"""Consumers of a share group, one rule at a time: what they acquire, what waits, what is settled and lost."""

from __future__ import annotations

import asyncio

import pytest

from brokerkit import clock
from brokerkit.driver import Delivery, Settlement, Source
from brokerkit.drivers.kafka._queue import QueueConsumer
from brokerkit.errors import (
    BrokerError,
    CapabilityError,
    Closed,
    ConfigError,
    DeliveryLost,
)
from brokerkit.events import Expired, PartitionPaused, PartitionResumed

from .share_playground import World, copied
from .share_rules import SOON, held, ids, names, play, reading

# ---------------------------------------------------------------------- receiving


def test_it_acquires_only_for_who_waits() -> None:
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


def test_prefetch_holds_at_any_time() -> None:
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


def test_a_receive_that_is_cancelled_loses_nothing_and_keeps_nothing() -> None:
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


def test_what_nobody_fetches_goes_to_others() -> None:
    async def main(world: World) -> None:
        async with reading(world) as one, reading(world) as other:
            assert not await one.consumer.receive(10, 0)  # it has asked for ten
            for id in names(10):
                world.store(id)
            taken = await other.take(10)
            assert sorted(ids(taken)) == names(10)
            assert {delivery.deliveries for delivery in taken} == {1}

    play(main)


def test_one_task_receives_at_a_time() -> None:
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


def test_until_the_end_is_refused() -> None:
    async def main(world: World) -> None:
        consumer = QueueConsumer(world.context(), None, world.queue, Source(world.queue, until_end=True), 1, None)  # type: ignore[arg-type]
        with pytest.raises(CapabilityError):
            await consumer.__aenter__()

    play(main)


# ---------------------------------------------------------------------- what waits


def test_what_waits_for_its_time_uses_up_no_prefetch() -> None:
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


def test_what_is_due_and_finds_no_room_goes_to_others() -> None:
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


def test_what_would_wait_for_long_is_put_where_that_is_done() -> None:
    async def main(world: World) -> None:
        async with reading(world) as r:
            world.store("m", delay=30.0)
            await r.nothing()
            (copy,) = world.copies
            assert copy.id == "m"
            assert 29 <= copy.delay <= 30
            assert not world.left

    play(main)


def test_what_has_expired_is_dropped_and_told_of() -> None:
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


def test_what_expires_while_it_is_ready_is_not_handed_out() -> None:
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


def test_what_expires_while_it_waits_to_come_alone_is_not_handed_out() -> None:
    async def main(world: World) -> None:
        now = clock.current().time()
        world.time.answered(int(now * 1000), asyncio.get_running_loop().time())
        async with reading(world) as r:
            world.store("slow")
            taken = await r.take(1)
            world.store("poison", deliveries=2, expires=now + 2)
            await r.nothing()
            await asyncio.sleep(2)
            await r.nothing()
            await r.done(*taken)
            await r.nothing()
            assert not world.left
            world.store("m")
            assert ids(await r.take(1)) == ["m"]

    play(main)


# ---------------------------------------------------------------------- settling and losing


def test_what_was_lost_is_told_and_settled_no_more() -> None:
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


def test_what_is_settled_too_late_is_lost_and_comes_again() -> None:
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


def test_what_is_lost_while_its_copy_is_stored_says_so() -> None:
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


def test_what_is_adrift_when_its_copy_is_stored_may_be_lost_still() -> None:
    async def main(world: World) -> None:
        world.slow = 1.0
        world.store("m")
        async with reading(world) as r:
            (delivery,) = await r.take(1)
            settling = asyncio.ensure_future(r.consumer.settle([Settlement(delivery, (copied(delivery.record),))]))
            while len(world.log) < 2:
                await asyncio.sleep(0.01)
            r.share.locks[0].until = 0.0
            world.log[0].owner = None  # somebody else gets it
            (result,) = await settling
            assert isinstance(result, DeliveryLost)
            assert result.published

    play(main)


def test_what_cannot_be_read_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main(world: World) -> None:
        async with reading(world) as r:
            r.consumer.damaged(BrokerError("a batch of another client"))
            world.store("m")
            assert ids(await r.take(1)) == ["m"]
        assert "a batch of another client" in caplog.text

    play(main)


def test_a_partition_that_stands_is_told_of() -> None:
    async def main(world: World) -> None:
        async with reading(world) as r:
            r.consumer.stalled(3, 1000, 2000)
            r.consumer.resumed(3)
        told = [(type(e), e.partition) for e in world.events if isinstance(e, (PartitionPaused, PartitionResumed))]
        assert told == [(PartitionPaused, 3), (PartitionResumed, 3)]

    play(main)


def test_it_tells_what_it_has_to_who_counts() -> None:
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
