"""Topics of the memory driver: partitions, and who reads which."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brokerkit.address import AnyTopic, Topic
from brokerkit.driver import Consumer, Delivery, Settlement, Source
from brokerkit.drivers.memory import MemoryDriver
from brokerkit.drivers.memory._group import Group, Member
from brokerkit.drivers.memory._readers import PATIENCE, TopicConsumer
from brokerkit.drivers.memory._timers import Timers
from brokerkit.drivers.memory._topic import TopicStore
from brokerkit.errors import DeliveryLost

from .memory_driver import consuming, done, ids, names, opened, put, rest, run, settled, take, turns

SESSION = 10.0
ORDERS: AnyTopic = Topic("orders", bytes, partitions=4)
LINE: AnyTopic = Topic("line", bytes, partitions=1)


def owned(consumer: Consumer) -> set[int]:
    assert isinstance(consumer, TopicConsumer)
    return set(consumer._member.claims)


async def one_each(made: MemoryDriver, topic: AnyTopic = ORDERS) -> None:
    """Publish one record to each partition."""
    receipts = await put(made, topic, names(topic.partitions))
    assert len({receipt.position for receipt in receipts}) == topic.partitions


# ---------------------------------------------------------------------- partitions


def test_equal_keys_share_a_partition_and_the_keyless_are_spread() -> None:
    async def main() -> None:
        async with opened(ORDERS) as made:
            places: dict[bytes, set[str]] = {}
            for number in range(60):
                key = b"key%d" % (number % 20)
                (receipt,) = await put(made, ORDERS, [f"m{number}"], key=key)
                places.setdefault(key, set()).add((receipt.position or "").partition("@")[0])
            assert all(len(found) == 1 for found in places.values())
            assert len(set.union(*places.values())) == 4
            # The same in every process: a consumer of tomorrow finds its keys where they are today.
            assert places[b"key0"] == {"orders[2]"}
            assert places[b"key1"] == {"orders[0]"}
            (empty,) = await put(made, ORDERS, ["empty"], key=b"")
            assert (empty.position or "").startswith("orders[0]@")
            spread = [(receipt.position or "").partition("@")[0] for receipt in await put(made, ORDERS, names(8))]
            assert sorted(spread) == sorted([f"orders[{n}]" for n in range(4)] * 2)

    run(main)


# ---------------------------------------------------------------------- members


class Nobody:
    """An owner that lets go at once."""

    def wake(self) -> bool:
        return False

    def fail(self, error: Exception) -> None:
        raise AssertionError

    def lost(self, deliveries: Sequence[Delivery]) -> None:
        raise AssertionError

    def revoke(self, deliveries: Sequence[Delivery], moved: object) -> None:
        raise AssertionError


@given(partitions=st.integers(1, 12), steps=st.lists(st.integers(-6, 6), max_size=30))
@settings(deadline=None)
def test_partitions_are_shared_equally_and_as_few_as_possible_move(partitions: int, steps: list[int]) -> None:
    topic = TopicStore(Topic("t", bytes, partitions=partitions), 10, Timers(), derived=False)
    group = Group(topic, "g", [0] * partitions, Timers())
    members: list[Member] = []
    for step in steps:
        before = {index: member for member in members for index in member.claims}
        if step > 0 or not members:
            members.append(Member(Nobody(), 10, SESSION))
            group.join(members[-1])
        else:
            gone = members.pop(step % len(members))
            group.leave(gone)
            assert not gone.claims
        after = {index: member for member in members for index in member.claims}
        shares = sorted(len(member.claims) for member in members)
        if not members:
            assert after == {}
            continue
        assert sorted(after) == list(range(partitions))
        assert shares[-1] - shares[0] <= 1
        least, more = divmod(partitions, len(members))
        kept = sum(before.get(index) is member for index, member in after.items())
        had = sorted((sum(owner is member for owner in before.values()) for member in members), reverse=True)
        possible = sum(min(have, least + (place < more)) for place, have in enumerate(had))
        assert kept == possible
        for member in members:
            assert all(claim.partition.claims == [claim] for claim in member.claims.values())


def test_only_what_moves_is_revoked_and_the_rest_goes_on() -> None:
    told: list[str] = []
    running = asyncio.Event()
    let_go = asyncio.Event()

    async def revoked(deliveries: Sequence[Delivery]) -> None:
        told.extend(d.position for d in deliveries)
        running.set()
        await let_go.wait()

    async def main() -> None:
        async with opened(ORDERS) as made, consuming(made, ORDERS, revoked=revoked) as first:
            await one_each(made)
            held = await take(first, 4)
            moving = [d for d in held if d.position[7] in "23"]
            staying = [d for d in held if d not in moving]
            async with consuming(made, ORDERS) as second:
                await running.wait()
                assert sorted(told) == sorted(d.position for d in moving)
                await put(made, ORDERS, names(8, "new"))
                got = await rest(first)
                assert {d.position[7] for d in got} == {"0", "1"}
                assert not await second.receive(10, 5)
                let_go.set()
                await turns()
                assert (owned(first), owned(second)) == ({0, 1}, {2, 3})
                assert await settled(first, *moving, *staying) == [DeliveryLost, DeliveryLost, None, None]
                again = await rest(second)
                assert sorted([*ids(again), *ids(got)]) == sorted([*ids(moving), *names(8, "new")])
                assert {d.deliveries for d in again} == {1}, "they never ran: no suspects"

    run(main)


def test_an_owner_settles_what_runs_before_its_partition_moves() -> None:
    async def revoked(deliveries: Sequence[Delivery]) -> None:
        await asyncio.sleep(PATIENCE - 1)
        await done(consumers[0], *deliveries)

    async def main() -> None:
        async with opened(ORDERS) as made, consuming(made, ORDERS, revoked=revoked) as first:
            consumers.append(first)
            await one_each(made)
            await take(first, 4)
            async with consuming(made, ORDERS) as second:
                assert not await second.receive(10, PATIENCE - 2)
                assert not await second.receive(10, 10)
                assert (owned(first), owned(second)) == ({0, 1}, {2, 3})
                await put(made, ORDERS, names(4, "new"))
                assert sorted(ids(await rest(first)) + ids(await rest(second))) == names(4, "new")

    consumers: list[Consumer] = []
    run(main)


def test_what_moves_away_leaves_room_for_more() -> None:
    async def main() -> None:
        async with opened(ORDERS) as made, consuming(made, ORDERS, prefetch=4) as first:
            await one_each(made)
            await take(first, 4)
            waiting = asyncio.ensure_future(first.receive(10, 100))
            await put(made, ORDERS, names(8, "new"))
            await turns()
            assert not waiting.done()
            async with consuming(made, ORDERS):
                got = await asyncio.wait_for(waiting, 1)
                assert len(got) == 2
                assert {int(d.position[7]) for d in got} <= owned(first)

    run(main)


def test_patience_with_what_runs_has_an_end_and_counts() -> None:
    async def revoked(deliveries: Sequence[Delivery]) -> None:
        await asyncio.sleep(10_000)

    async def main() -> None:
        async with opened(ORDERS) as made, consuming(made, ORDERS, revoked=revoked) as first:
            await one_each(made)
            held = await take(first, 4)
            async with consuming(made, ORDERS) as second:
                began = asyncio.get_running_loop().time()
                (one,) = await second.receive(1, 10_000)
                assert asyncio.get_running_loop().time() == pytest.approx(began + PATIENCE)
                assert one.deliveries == 2
                assert sorted(r is None for r in await settled(first, *held)) == [False, False, True, True]

    run(main)


def test_a_callback_that_fails_is_logged_and_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    async def revoked(deliveries: Sequence[Delivery]) -> None:
        raise RuntimeError("broken callback")

    async def main() -> None:
        async with opened(ORDERS) as made, consuming(made, ORDERS, revoked=revoked) as first:
            await one_each(made)
            await take(first, 4)
            async with consuming(made, ORDERS) as second:
                assert len(await take(second, 2)) == 2

    with caplog.at_level(logging.ERROR, "brokerkit"):
        run(main)
    assert "broken callback" in caplog.text


def test_leaving_while_revoked_runs_ends_it_and_moves_everything() -> None:
    ended: list[bool] = []

    async def revoked(deliveries: Sequence[Delivery]) -> None:
        try:
            await asyncio.sleep(10_000)
        finally:
            ended.append(True)

    async def main() -> None:
        async with opened(ORDERS) as made:
            await one_each(made)
            left = asyncio.Event()

            async def second() -> list[str]:
                async with consuming(made, ORDERS) as consumer:
                    await left.wait()
                    return ids(await rest(consumer))

            async with consuming(made, ORDERS, revoked=revoked) as first:
                await take(first, 4)
                joining = asyncio.ensure_future(second())
                await turns()
            assert ended == [True]
            left.set()
            assert sorted(await joining) == names(4)

    run(main)


def test_members_beyond_the_partitions_wait_for_their_turn() -> None:
    async def main() -> None:
        async with opened(LINE) as made:
            async with consuming(made, LINE) as first:
                async with consuming(made, LINE) as second:
                    await put(made, LINE, ["a", "b"])
                    assert not await second.receive(10, 5)
                    assert ids(await take(first, 2)) == ["a", "b"]
                    waiting = asyncio.ensure_future(second.receive(10, 5))
                    await turns()
                    first_ = first
                    assert isinstance(first_, TopicConsumer)
                    first_.leave()
                    assert ids(await waiting) == ["a", "b"]
            assert (await made.backlog(Source(LINE, "workers"))).waiting == 2

    run(main)


def test_a_dead_member_is_replaced_after_its_session_and_only_then() -> None:
    async def main() -> None:
        async with opened(ORDERS, url="memory://dead") as made, opened(url="memory://dead", session=3) as doomed:
            await one_each(made)
            async with consuming(doomed, ORDERS) as dying, consuming(made, ORDERS) as living:
                held = await take(dying, 2)
                assert {d.deliveries for d in held} == {1}
                doomed.faults.cut()
                loop = asyncio.get_running_loop()
                began = loop.time()
                assert len(await rest(living)) == 2
                waiting = await living.receive(10, 100)
                assert loop.time() == pytest.approx(began + 3)
                assert (sorted(ids(waiting)), {d.deliveries for d in waiting}) == (sorted(ids(held)), {2})

    run(main)


def test_a_member_that_thaws_in_time_keeps_everything() -> None:
    async def main() -> None:
        async with opened(ORDERS, url="memory://thaw") as made, opened(url="memory://thaw") as sleeper:
            await one_each(made)
            async with consuming(sleeper, ORDERS, revoked=fail) as sleeping:
                held = await take(sleeping, 4)
                for _ in range(3):
                    sleeper.faults.freeze()
                    await asyncio.sleep(SESSION - 0.1)
                    sleeper.faults.thaw()
                await asyncio.sleep(SESSION)
                await done(sleeping, *held)
            assert (await made.backlog(Source(ORDERS, "workers"))).waiting == 0

    run(main)


async def fail(deliveries: Sequence[Delivery]) -> None:
    raise AssertionError("nothing is revoked here")


def test_a_member_that_thaws_too_late_is_told_first_and_then_takes_part_again() -> None:
    told: list[list[str]] = []
    later = asyncio.Event()

    async def revoked(deliveries: Sequence[Delivery]) -> None:
        told.append(sorted(ids(deliveries)))
        await later.wait()

    async def main() -> None:
        async with opened(ORDERS, url="memory://late") as made, opened(url="memory://late") as sleeper:
            await one_each(made)
            async with consuming(sleeper, ORDERS, revoked=revoked) as sleeping:
                held = await take(sleeping, 4)
                sleeper.faults.freeze()
                receiving = asyncio.ensure_future(sleeping.receive(10, 5))
                settling = asyncio.ensure_future(sleeping.settle([Settlement(d) for d in held]))
                await asyncio.sleep(SESSION)
                async with consuming(made, ORDERS) as living:
                    got = await take(living, 4)
                    assert told == []
                    assert not receiving.done()
                    assert not settling.done()
                    sleeper.faults.thaw()
                    assert [type(r) for r in await settling] == [DeliveryLost] * 4
                    await turns()
                    assert told == [names(4)]
                    assert owned(sleeping) == set(), "not before it has been told"
                    later.set()
                    await turns()
                    assert len(owned(sleeping)) == 2
                    assert sorted(ids(await receiving)) == sorted(
                        d.record.id for d in got if int(d.position[7]) in owned(sleeping)
                    )
            assert (await made.backlog(Source(ORDERS, "workers"))).waiting == 4

    run(main)


def test_two_groups_have_nothing_to_do_with_each_other() -> None:
    async def main() -> None:
        async with opened(ORDERS) as made:
            await one_each(made)
            async with consuming(made, ORDERS, "a") as a, consuming(made, ORDERS, "b") as b:
                assert len(await rest(a)) == len(await rest(b)) == 4
                waiting = [asyncio.ensure_future(consumer.receive(10, 5)) for consumer in (a, b)]
                await turns()
                await put(made, ORDERS, ["new"])
                assert [ids(await task) for task in waiting] == [["new"], ["new"]]
            await made.delete(ORDERS, "a")
            assert (await made.backlog(Source(ORDERS, "a"))).waiting == 5
            assert (await made.backlog(Source(ORDERS, "b"))).waiting == 1

    run(main)
