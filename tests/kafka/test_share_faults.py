"""A member of a share group and a broker that fails in every way there is; the broker is in the test's own process."""

from __future__ import annotations

import asyncio
import math
from collections import deque

import pytest
from kio.schema.errors import ErrorCode

from brokerkit.drivers.kafka._share_locks import HELD, LOST
from brokerkit.errors import AuthorizationError, DeliveryLost, NotFound

from .logs import batch, spoilt
from .reading import cluster
from .share_pretender import FETCH, SharePretender, said
from .sharing import member

pytestmark = pytest.mark.asyncio


async def test_what_comes_is_accepted_once_in_ranges() -> None:
    async with SharePretender(2) as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(50, 0)
        broker.put(30, 1)
        locks = await one.have(80)
        assert sorted((lock.partition, lock.offset) for lock in locks) == [
            *((0, offset) for offset in range(50)),
            *((1, offset) for offset in range(30)),
        ]
        assert {lock.count for lock in locks} == {1}
        assert await one.confirm(locks) == [None] * 80
        assert len(broker.done(0)) == 50
        assert len(broker.done(1)) == 30
        (heard,) = said(broker)
        assert heard.said == {0: [(0, 49, (1,))], 1: [(0, 29, (1,))]}
        assert one.share.owned_until == math.inf


async def test_what_is_scattered_is_said_in_few_words() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(10)
        locks = await one.have(10)
        one.share.release(locks[4])
        one.share.accept(locks[7])
        for lock in locks[:4]:
            one.share.accept(lock)
        await one.until(lambda: len(broker.done()) == 5)
        assert said(broker)[0].said == {0: [(0, 4, (1, 1, 1, 1, 2)), (7, 7, (1,))]}


async def test_what_is_handed_back_comes_again_and_counts() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(1)
        (lock,) = await one.have(1)
        one.share.release(lock)
        one.share.room += 1
        _, again = await one.have(2)
        assert again is not lock
        assert (again.offset, again.count, again.state) == (0, 2, HELD)
        assert await one.confirm([again]) == [None]
        assert broker.said_of(0) == "RA"


async def test_no_more_is_acquired_than_there_is_room_for() -> None:
    async with SharePretender(3, 3) as broker, cluster(broker.url) as c:
        for partition in range(3):
            broker.move(partition, partition + 1)
            broker.put(40, partition)
        async with member(c, "orders", room=7) as one:
            for round in range(1, 18):
                locks = await one.have(7 * round)
                assert len([lock for lock in locks if lock.state == HELD]) <= 7
                one.finish([lock for lock in locks if lock.state == HELD])
            await one.have(120)


async def test_with_room_for_one_all_brokers_have_their_turn() -> None:
    async with SharePretender(3, 3) as broker, cluster(broker.url) as c:
        for partition in range(3):
            broker.move(partition, partition + 1)
        broker.put(3, 2)
        async with member(c, "orders", room=1) as one:
            for round in range(1, 4):
                one.finish((await one.have(round, within=3))[-1:])
            broker.put(1, 0)
            broker.put(1, 1)
            for round in range(4, 6):
                one.finish((await one.have(round, within=3))[-1:])
            assert max(heard.records for heard in broker.heard) == 1


@pytest.mark.parametrize(
    "code",
    [
        ErrorCode.share_session_not_found,
        ErrorCode.invalid_share_session_epoch,
        ErrorCode.share_session_limit_reached,
        ErrorCode.unknown_server_error,
        ErrorCode.not_coordinator,
        ErrorCode.unknown_member_id,
        ErrorCode.fenced_member_epoch,
    ],
)
async def test_a_session_that_ends_is_begun_anew_and_its_records_are_ours_again(code: ErrorCode) -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(10)
        locks = await one.have(10)
        assert one.share.owned_until < math.inf
        broker.top.append(code)
        await one.until(lambda: len(one.back) == 10)
        assert len(one.taken) == 10
        assert {lock.count for lock in one.back} == {2}
        assert all(lock.until > 0 for lock in locks)
        assert await one.confirm(locks) == [None] * 10
        assert broker.counts() == [2] * 10
        assert one.gone == []


async def test_a_connection_that_breaks_while_a_request_waits_loses_nothing() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(10)
        locks = await one.have(10)
        done, kept = locks[:5], locks[5:]
        broker.cut(1)
        await one.until(lambda: one.share.owned_until == 0)
        one.finish(done)  # which nobody can be told now
        waiting = [one.share.confirmed(lock) for lock in done]
        await one.until(lambda: len(one.back) == 5)
        assert one.back == kept
        async with asyncio.timeout(5):
            assert await asyncio.gather(*waiting) == [None] * 5
        assert broker.done() == [0, 1, 2, 3, 4]
        assert len(one.taken) == 10
        assert one.share.owned_until > asyncio.get_running_loop().time()


async def test_what_was_accepted_without_an_answer_is_accepted_again() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(10)
        locks = await one.have(10)
        broker.patience = asyncio.Event()
        one.finish(locks)
        waiting = [one.share.confirmed(lock) for lock in locks]
        await one.until(lambda: said(broker))
        broker.cut(1)
        broker.patience = None
        async with asyncio.timeout(5):
            assert await asyncio.gather(*waiting) == [None] * 10
        assert len(one.taken) == 10
        assert len(broker.done()) == 10


async def test_a_connection_that_ends_while_nothing_is_asked_is_noticed() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders", room=5) as one:
        broker.put(5)
        locks = await one.have(5)
        await one.until(lambda: one.share.room == 0)
        broker.cut(1)
        await one.until(lambda: len(one.back) == 5)
        assert await one.confirm(locks) == [None] * 5


async def test_what_nobody_has_taken_is_dropped_with_its_session_and_comes_anew() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders", room=20) as one:
        one.eager = False
        broker.put(20)
        await one.until(lambda: one.share.untaken() == 20)
        taken = one.share.take(5)
        broker.cut(1)
        await one.until(lambda: len(one.back) == 5)
        await one.until(lambda: one.share.untaken() == 15)
        rest = one.share.take(100)
        assert [lock.offset for lock in rest] == list(range(5, 20))
        assert {lock.count for lock in rest} == {2}
        assert one.share.room == 0
        assert await one.confirm([*taken, *rest]) == [None] * 20


async def test_one_that_is_not_ours_is_split_off() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(40)
        locks = await one.have(40)
        broker.entries[0][17].owner = None  # nobody knows why
        broker.hidden.add(0)
        one.finish(locks)
        good = [one.share.confirmed(lock) for lock in locks if lock.offset != 17]
        async with asyncio.timeout(5):
            assert await asyncio.gather(*good) == [None] * 39
        broker.hidden.clear()
        async with asyncio.timeout(5):
            assert await one.share.confirmed(locks[17]) is None  # it came again and was accepted, without a word
        assert broker.counts()[17] == 2
        assert len(one.taken) == 40


@pytest.mark.parametrize(
    "code", [ErrorCode.not_leader_or_follower, ErrorCode.unknown_topic_or_partition, ErrorCode.unknown_topic_id]
)
async def test_acknowledgements_of_which_nobody_knows_are_made_again(code: ErrorCode) -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(10)
        locks = await one.have(10)
        broker.refused.append(int(code))
        one.finish(locks)
        waiting = [one.share.confirmed(lock) for lock in locks]
        await one.until(lambda: one.share.hand.adrift == 10)
        for entry in broker.entries[0]:
            entry.owner = None  # as another leader would have it
        async with asyncio.timeout(5):
            assert await asyncio.gather(*waiting) == [None] * 10
        assert len(one.taken) == 10


async def test_acknowledgements_that_a_broker_cannot_store_now_are_made_again_while_they_are_ours() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(3)
        locks = await one.have(3)
        broker.refused += [int(ErrorCode.coordinator_not_available)] * 3
        assert await one.confirm(locks) == [None] * 3
        assert broker.counts() == [1] * 3


async def test_a_partition_that_moves_is_read_from_its_new_leader() -> None:
    async with SharePretender(2, 2) as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(10, 0)
        broker.put(10, 1)
        locks = await one.have(20)
        broker.move(1, 2)
        await one.until(lambda: len(one.back) == 10)
        assert {lock.partition for lock in one.back} == {1}
        assert await one.confirm(locks) == [None] * 20
        assert broker.counts(0) == [1] * 10
        assert broker.counts(1) == [2] * 10
        broker.put(5, 1)
        assert await one.confirm((await one.have(25))[20:]) == [None] * 5


@pytest.mark.parametrize(
    "code", [ErrorCode.not_leader_or_follower, ErrorCode.kafka_storage_error, ErrorCode.invalid_request]
)
async def test_a_partition_that_cannot_be_read_for_a_moment_holds_up_no_other(code: ErrorCode) -> None:
    async with SharePretender(2) as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(5, 0)
        broker.put(5, 1)
        locks = await one.have(10)
        broker.wrong[1] = deque([code])
        for entry in broker.entries[1]:
            entry.owner = None
        await one.until(lambda: len(one.back) == 5)
        assert await one.confirm(locks) == [None] * 10
        assert broker.counts(0) == [1] * 5


async def test_a_partition_that_cannot_be_read_for_long_does_not_slow_down_the_others() -> None:
    async with SharePretender(2) as broker, cluster(broker.url) as c, member(c, "orders", room=10) as one:
        broker.wrong[1] = deque([ErrorCode.unknown_server_error] * 100)
        broker.put(300, 0)
        broker.put(10, 1)
        begun = asyncio.get_running_loop().time()
        async for batch in one.batches(300):
            one.finish(batch)
        assert asyncio.get_running_loop().time() - begun < 5
        assert {lock.partition for lock in one.taken} == {0}
        assert one.share.problem is not None
        assert len(broker.wrong[1]) > 90
        broker.wrong.clear()
        await one.have(310)
        assert await one.confirm(one.taken[300:]) == [None] * 10
        await one.until(lambda: one.share.problem is None)


async def test_what_others_got_is_lost_and_stays_so() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders", room=10) as one:
        broker.put(10)
        locks = await one.have(10)
        broker.hidden.add(0)
        broker.cut(1)
        await one.until(lambda: one.share.owned_until == 0)
        broker.take_away(0)
        broker.hidden.clear()
        begun = asyncio.get_running_loop().time()
        await one.until(lambda: len(one.gone) == 10)
        assert asyncio.get_running_loop().time() - begun < 3
        assert {lock.state for lock in locks} == {LOST}
        assert all(isinstance(error, DeliveryLost) for error in await one.confirm(locks))
        await asyncio.sleep(0.2)
        assert not said(broker)
        assert one.share.owned_until == math.inf


async def test_what_was_done_and_lost_is_accepted_if_it_ever_comes_again() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(3)
        locks = await one.have(3)
        broker.hidden.add(0)
        broker.cut(1)
        one.finish(locks)
        await one.until(lambda: locks[0].state == LOST)
        broker.hidden.clear()
        await one.until(lambda: len(broker.done()) == 3)
        assert len(one.taken) == 3


async def test_what_somebody_was_told_is_lost_comes_as_a_new_one() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(2)
        locks = list(await one.have(2))
        broker.hidden.add(0)
        broker.cut(1)
        one.finish(locks)
        assert isinstance(await one.share.confirmed(locks[0]), DeliveryLost)
        await one.until(lambda: locks[1].state == LOST)
        assert isinstance(await one.share.confirmed(locks[1]), DeliveryLost)
        broker.hidden.clear()
        await one.have(4)
        assert one.offsets == [0, 1, 0, 1]
        assert broker.done() == []


async def test_what_a_broker_has_none_of_is_said_to_be_a_gap() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put_batch(batch(0, 2, 3, 7, last=9), 9)
        broker.put_batch(batch(12, 13), 13)  # before it a batch is gone as a whole
        broker.put_batch(batch(14, control=True, producer=7), 14)
        await one.have(6)
        assert one.offsets == [0, 2, 3, 7, 12, 13]
        await one.until(lambda: len(broker.done()) == 9)
        assert "".join(broker.said_of(offset) or "-" for offset in range(15)) == "-G--GGG-GGGG--G"
        assert await one.confirm(one.taken) == [None] * 6
        assert len(broker.done()) == 15
        assert one.share.room == 100


async def test_what_cannot_be_read_is_told_and_kept_while_all_else_goes_on() -> None:
    async with SharePretender(2, lock=0.6) as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(2)
        broker.put_batch(spoilt(batch(2, 3, 4)), 4)
        await one.until(lambda: one.unreadable)
        assert "orders[0]" in str(one.unreadable[0])
        assert "offset 2" in str(one.unreadable[0])
        assert str(one.share.problem) == str(one.unreadable[0])
        broker.put_batch(batch(5, 6), 6)
        broker.put(3, 1)
        await one.have(7)
        await asyncio.sleep(1.5)
        assert sorted(one.offsets) == [0, 0, 1, 1, 2, 5, 6]
        assert await one.confirm(one.taken) == [None] * 7
        assert len(one.unreadable) == 1
        assert one.errors == []
        assert broker.counts() == [1] * 7
        assert all(set(broker.said_of(offset)) == {"N"} for offset in (2, 3, 4))
        assert one.share.room == 100
        broker.cut(1)
        await one.until(lambda: broker.counts() == [1, 1, 2, 2, 2, 1, 1])
        assert one.gone == []
        assert one.back == []
        assert len(one.unreadable) == 1


@pytest.mark.parametrize("code", [ErrorCode.group_authorization_failed, ErrorCode.topic_authorization_failed])
async def test_rights_that_are_taken_for_a_while_are_told_once_and_cost_nothing(code: ErrorCode) -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(5)
        locks = await one.have(5)
        broker.top += [code, code]
        await one.until(lambda: one.errors)
        assert isinstance(one.errors[0], AuthorizationError)
        assert isinstance(one.share.problem, AuthorizationError)
        assert await one.confirm(locks) == [None] * 5
        assert len(one.errors) == 1
        assert broker.counts() == [1] * 5
        await one.until(lambda: one.share.problem is None)


async def test_a_right_to_the_topic_that_is_missing_is_told_once() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(5)
        locks = await one.have(5)
        broker.wrong[0] = deque([ErrorCode.topic_authorization_failed])
        await one.until(lambda: one.errors)
        assert isinstance(one.errors[0], AuthorizationError)
        assert await one.confirm(locks) == [None] * 5
        assert broker.counts() == [1] * 5


async def test_a_topic_that_goes_is_told() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders") as one:
        broker.put(5)
        await one.have(5)
        del broker.topics["orders"]
        broker.wrong[0] = deque([ErrorCode.unknown_topic_id])
        await one.until(lambda: one.errors)
        assert isinstance(one.errors[0], NotFound)
        assert isinstance(one.share.problem, NotFound)


async def test_results_count_before_the_records_of_the_same_answer() -> None:
    async with SharePretender() as broker, cluster(broker.url) as c, member(c, "orders", room=3) as one:
        broker.put(3)
        for round in range(1, 6):
            locks = (await one.have(3 * round))[-3:]
            assert {lock.count for lock in locks} == {round}
            for lock in locks:
                one.share.release(lock)
            one.share.room += 3
        both = [heard for heard in broker.heard if heard.key == FETCH and heard.said]
        assert len(both) >= 4, "it goes with a request for more"


async def test_a_broker_that_comes_late_is_found() -> None:
    async with SharePretender(2, 2) as broker, cluster(broker.url) as c:
        broker.lead("orders", 1, -1)
        async with member(c, "orders") as one:
            broker.put(5, 0)
            broker.put(5, 1)
            await one.have(5)
            broker.move(1, 2)
            await one.have(10)
            assert await one.confirm(one.taken) == [None] * 10
