"""Consumers of a share group, one rule at a time: what comes alone, what is rescued, what goes back."""

from __future__ import annotations

import asyncio

import pytest

from brokerkit.driver import Settlement
from brokerkit.drivers.kafka._engine import Terms
from brokerkit.errors import (
    BrokerUnavailable,
    DeliveryLost,
    TooLarge,
)

from .share_playground import LEASE, LIMIT, World
from .share_rules import SOON, eventually, held, ids, names, play, reading

# ---------------------------------------------------------------------- alone


def test_a_suspect_comes_alone_and_what_came_with_it_counts_nothing() -> None:
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


def test_a_suspect_waits_for_what_is_in_hand() -> None:
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


def test_suspects_come_one_by_one() -> None:
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


def test_a_suspect_that_is_released_holds_nothing_up() -> None:
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


def test_what_was_in_hand_for_a_lease_holds_up_nothing() -> None:
    async def main(world: World) -> None:
        loop = asyncio.get_running_loop()
        for id in names(3):
            world.store(id, deliveries=2)
        async with reading(world, prefetch=5) as r:
            taken: list[str] = []
            for _ in range(3):
                began = loop.time()
                taken += ids(await r.consumer.receive(100, SOON))
                assert len(taken) == 1 or LEASE - 0.1 < loop.time() - began < LEASE + 0.1
            assert sorted(taken) == names(3)
            for id in names(3, "n"):
                world.store(id)
            began = loop.time()
            others = await r.take(2)
            assert LEASE - 0.1 < loop.time() - began < LEASE + 0.1
            await r.nothing()
            await r.done(*others)
            assert len(await r.drain()) == 1
            assert len(held(r)) == 3

    play(main)


def test_a_suspect_that_has_no_room_beside_long_ones_goes_to_others() -> None:
    async def main(world: World) -> None:
        world.store("first", deliveries=2)
        async with reading(world, prefetch=3) as one, reading(world) as other:
            assert not await other.consumer.receive(10, 0)
            assert ids(await one.take(1)) == ["first"]
            world.store("m")
            short = await one.take(1)
            waiting = asyncio.ensure_future(one.consumer.receive(10, SOON))
            await asyncio.sleep(0)
            world.store("second", deliveries=2)
            await eventually(lambda: bool(one.consumer._suspects))
            one.consumer.prefetch = 1
            await one.done(*short)
            assert ids(await other.take(1)) == ["second"]
            assert not await waiting
            assert ids(held(one)) == ["first"]

    play(main)


def test_a_suspect_that_nobody_fetches_goes_to_others() -> None:
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


def test_a_record_is_rescued_before_anything_else() -> None:
    async def main(world: World) -> None:
        entry = world.store("m")
        entry.count = 2
        async with reading(world) as r:
            (delivery,) = await r.take(1)
            assert delivery.deliveries == 3
            await eventually(lambda: entry.done)
            assert (world.log[-1].id, world.log[-1].count) == ("m", 1)

    play(main)


def test_what_cannot_be_rescued_is_kept_and_never_handed_out() -> None:
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


def test_the_limit_of_the_group_may_be_lower() -> None:
    async def main(world: World) -> None:
        world.limit = 2
        entry = world.store("m")
        entry.count = 1
        async with reading(world, terms=Terms("share", limit=2)) as r:
            (delivery,) = await r.take(1)
            assert delivery.deliveries == 2
            await eventually(lambda: entry.done)

    play(main)


def test_what_runs_while_connections_break_is_stored_before_it_is_dropped() -> None:
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


def test_nothing_is_handed_out_before_everything_is_rescued() -> None:
    """A program that dies of whatever it is handed loses nothing: what comes near the limit is safe before it dies again."""

    async def main(world: World) -> None:
        world.copying = 0.2
        for id in names(400):
            world.store(id)
        for _ in range(25):
            async with reading(world) as r:
                assert await r.consumer.receive(100, SOON)
                await r.die()
        assert not world.dropped
        async with reading(world) as r:
            seen: set[str] = set()
            while len(seen) < 400:
                got = await r.consumer.receive(100, SOON)
                await r.done(*got)
                seen |= set(ids(got))
        assert sorted(seen) == names(400)

    play(main)


def test_what_the_broker_could_drop_next_holds_everything_up_while_it_cannot_be_stored() -> None:
    async def main(world: World) -> None:
        world.refused = BrokerUnavailable("too few copies")
        entry = world.store("m")
        entry.count = LIMIT - 2
        async with reading(world) as r:
            for id in names(5, "n"):
                world.store(id)
            assert not await r.consumer.receive(100, 30.0)
            world.refused = TooLarge("for good")  # which nothing can be done about
            assert sorted(ids(await r.take(5))) == names(5, "n")
            await r.done(*held(r))
            world.refused = None
            assert ids(await r.take(1)) == ["m"]

    play(main)


def test_ten_kills_lose_nothing_and_count_what_was_in_hand() -> None:
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
def test_leaving_hands_everything_back_uncounted(again: int) -> None:
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


def test_what_cannot_be_copied_in_time_is_handed_back_itself() -> None:
    async def main(world: World) -> None:
        for id in names(3):
            world.store(id)
        loop = asyncio.get_running_loop()
        async with reading(world) as r:
            await r.take(3)
            world.refused = BrokerUnavailable("too few copies")
            began = loop.time()
        assert loop.time() - began < 9
        world.refused = None
        async with reading(world) as r:
            assert {delivery.deliveries for delivery in await r.drain()} == {2}

    play(main)


def test_releasing_does_not_let_the_broker_drop_anything() -> None:
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
