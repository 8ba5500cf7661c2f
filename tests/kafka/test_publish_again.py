"""Publishing: answers that are lost, numbers, leaders that move and topics that go, on brokers that answer as a test wants."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio
from kio.schema.errors import ErrorCode

from brokerkit.driver import Receipt
from brokerkit.drivers.kafka import KafkaDriver
from brokerkit.errors import (
    AuthorizationError,
    BrokerUnavailable,
    NotAttempted,
    NotFound,
    PublishUnknown,
)

from .pretender import INIT, METADATA, PRODUCE, Pretender
from .publishing import cluster_of, driver, kinds, outboxes_of, record, topic, until

pytestmark = pytest.mark.asyncio

ORDERS = topic("orders", 1)


@pytest_asyncio.fixture
async def brokers() -> AsyncIterator[Pretender]:
    async with Pretender() as made:
        made.create("orders")
        yield made


def values(brokers: Pretender, name: str = "orders", partition: int = 0) -> list[bytes | None]:
    return brokers.topics[name].logs[partition].values


async def publish(made: KafkaDriver, *bodies: str, key: bytes | None = b"k", timeout: float = 5.0) -> Sequence[Any]:
    return await made.publish([record(ORDERS, body, key) for body in bodies], timeout=timeout)


async def a_number_in_use(made: KafkaDriver) -> None:
    (receipt,) = await publish(made, "first")
    assert isinstance(receipt, Receipt)


# ---------------------------------------------------------------------- answers that are lost


@pytest.mark.parametrize(
    "verdict",
    [
        "lose",
        "drop",
        "late:request_timed_out",
        "late:not_enough_replicas_after_append",
        "late:not_leader_or_follower",
        "late:unknown_server_error",
    ],
)
async def test_what_may_be_stored_is_sent_again_and_stored_once(brokers: Pretender, verdict: str) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.verdicts += [verdict, verdict, verdict]
        results = await publish(made, "a", "b", "c")
        assert [r.position.rpartition("-")[2] for r in results] == ["1", "2", "3"]
        assert values(brokers) == [b"first", b"a", b"b", b"c"]
        assert brokers.seen[INIT] == 1
        await publish(made, "d")
        assert values(brokers) == [b"first", b"a", b"b", b"c", b"d"]


async def test_no_answer_before_the_deadline_is_unknown_and_its_number_is_not_used_again(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.freeze()
        began = time.monotonic()
        (result,) = await publish(made, "a", timeout=0.3)
        assert 0.28 < time.monotonic() - began < 5
        assert isinstance(result, PublishUnknown)
        brokers.cut(1)  # the request is read by nobody
        brokers.thaw()
        # If this had the number of the other, and that was stored, this would be a duplicate.
        (result,) = await publish(made, "b")
        assert isinstance(result, Receipt)
        stored = brokers.topics["orders"].logs[0].records
        assert {record.value for record in stored} >= {b"first", b"b"}
        assert len({record.producer for record in stored if record.value in {b"first", b"b"}}) == 2


async def test_a_late_answer_to_what_was_given_up_loses_nothing(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.freeze()
        (result,) = await publish(made, "a", timeout=0.1)
        assert isinstance(result, PublishUnknown)
        late = asyncio.ensure_future(publish(made, "b"))
        await asyncio.sleep(0.05)
        brokers.thaw()
        assert kinds(await late) == [Receipt]
        assert values(brokers) == [b"first", b"a", b"b"]


async def test_a_lost_number_does_not_make_a_record_a_duplicate_of_an_abandoned_one(brokers: Pretender) -> None:
    """Stored, unanswered and given up: the next batch, of the same size, must not take its number."""
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.always = "lose"
        (result,) = await publish(made, "a", timeout=0.3)
        assert isinstance(result, PublishUnknown)
        brokers.always = None
        (result,) = await publish(made, "b")
        assert isinstance(result, Receipt)
        assert values(brokers) == [b"first", b"a", b"b"]
        assert str(result.position).endswith("-2")


async def test_an_error_that_may_come_after_storing_leaves_it_open(brokers: Pretender) -> None:
    """A leader that has lost its partition while it waited for copies says what one says that never had it."""
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.always = "late:not_leader_or_follower"
        assert kinds(await publish(made, "a", timeout=0.3)) == [PublishUnknown]
        brokers.always = None
        assert kinds(await publish(made, "b")) == [Receipt]
        assert values(brokers) == [b"first", b"a", b"b"]


async def test_of_a_batch_in_doubt_each_call_has_its_own_deadline(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.freeze()
        short = asyncio.ensure_future(publish(made, "short", timeout=0.2))
        long = asyncio.ensure_future(publish(made, "long", timeout=5))
        waits = asyncio.ensure_future(publish(made, "waits", timeout=0.2))
        began = time.monotonic()
        assert kinds(await short) == [PublishUnknown]
        assert kinds(await waits) == [PublishUnknown]
        assert time.monotonic() - began < 4
        assert not long.done()
        brokers.thaw()
        assert kinds(await long) == [Receipt]
        assert values(brokers) == [b"first", b"short", b"long", b"waits"]


async def test_what_was_never_sent_is_unavailable_at_the_deadline_and_never_stored(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        gate = asyncio.Event()
        brokers.verdicts.append(gate)
        brokers.arrived.clear()
        first = asyncio.ensure_future(publish(made, "under way"))
        await brokers.arrived.wait()
        (result,) = await publish(made, "behind it", timeout=0.1)
        assert type(result) is BrokerUnavailable
        gate.set()
        await first
        await publish(made, "last")
        assert values(brokers) == [b"first", b"under way", b"last"]


async def test_later_records_of_the_key_are_not_attempted_after_one_in_doubt(
    brokers: Pretender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brokerkit.drivers.kafka._batch.BATCH", 2)
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.freeze()
        records = [record(ORDERS, f"v{n}", key) for n, key in enumerate([b"a", b"b", b"a", b"c", b"c", None])]
        results = await made.publish(records, timeout=0.2)
        expected = [PublishUnknown, PublishUnknown, NotAttempted, BrokerUnavailable, NotAttempted, BrokerUnavailable]
        assert kinds(results) == expected
        brokers.thaw()


async def test_a_broker_that_is_gone_is_unavailable_and_comes_back(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        await brokers.stop(1)
        await until(lambda: not cluster_of(made).connected)
        began = time.monotonic()
        (result,) = await publish(made, "a", timeout=0.3)
        assert type(result) is BrokerUnavailable
        assert 0.28 < time.monotonic() - began < 5
        assert isinstance(result.__cause__, OSError), "an error is wrapped once"
        waiting = asyncio.ensure_future(publish(made, "b"))
        await asyncio.sleep(0.1)
        await brokers.start(1)
        assert kinds(await waiting) == [Receipt]
        assert values(brokers) == [b"first", b"b"]


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "code", [ErrorCode.out_of_order_sequence_number, ErrorCode.unknown_producer_id, ErrorCode.invalid_producer_epoch]
)
async def test_a_broker_that_has_lost_count_is_told_new_numbers(brokers: Pretender, code: ErrorCode) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.verdicts.append(code)
        assert kinds(await publish(made, "a", "b")) == [Receipt, Receipt]
        assert values(brokers) == [b"first", b"a", b"b"]
        assert brokers.seen[INIT] == 2


async def test_a_broker_that_never_counts_right_is_no_hot_loop(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.always = ErrorCode.out_of_order_sequence_number
        before = brokers.seen[PRODUCE]
        assert kinds(await publish(made, "a", timeout=0.5)) == [BrokerUnavailable]
        assert brokers.seen[PRODUCE] - before <= 11
        brokers.always = None
        assert kinds(await publish(made, "b")) == [Receipt]


async def test_what_is_in_doubt_when_the_count_is_lost_is_unknown(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.verdicts += ["lose", ErrorCode.out_of_order_sequence_number]
        assert kinds(await publish(made, "a")) == [PublishUnknown]
        assert kinds(await publish(made, "b")) == [Receipt]
        assert values(brokers) == [b"first", b"a", b"b"]


async def test_what_is_in_doubt_and_then_refused_is_unknown(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        for code in (ErrorCode.topic_authorization_failed, ErrorCode.message_too_large, ErrorCode.invalid_timestamp):
            brokers.verdicts += ["lose", code]
            assert kinds(await publish(made, "a", "b", key=None)) == [PublishUnknown, PublishUnknown]
        assert kinds(await publish(made, "c")) == [Receipt]
        assert Counter(values(brokers)) == {b"first": 1, b"a": 3, b"b": 3, b"c": 1}


async def test_a_duplicate_of_long_ago_is_stored(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        brokers.verdicts.append(ErrorCode.duplicate_sequence_number)
        (result,) = await publish(made, "a")
        assert isinstance(result, Receipt)
        assert result.position is None


async def test_numbers_begin_again_behind_the_largest(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        (lane,) = outboxes_of(made)._boxes["orders"].lanes
        log = brokers.topics["orders"].logs[0]
        log.batches.clear()
        lane.sequence = 0x7FFFFFFE
        await publish(made, "a", "b", "c")
        assert lane.sequence == 1
        assert [record.sequence for record in log.records[1:]] == [0x7FFFFFFE, 0x7FFFFFFF, 0x80000000]


# ---------------------------------------------------------------------- leaders


async def test_a_leader_that_moves_is_followed(brokers: Pretender) -> None:
    async with Pretender(2) as two:
        two.create("orders")
        async with driver(two.url) as made:
            await a_number_in_use(made)
            two.lead("orders", 0, 2)
            began = time.monotonic()
            await publish(made, "a")
            assert time.monotonic() - began < 4
            assert values(two) == [b"first", b"a"]
            assert two.seen[INIT] == 1


async def test_a_frozen_leader_is_left_when_another_leads(brokers: Pretender) -> None:
    """The answer of the old one is not waited for; the batch is sent to the new one under the same number."""
    async with Pretender(3) as three:
        three.create("orders")
        three.lead("orders", 0, 2)
        async with driver(three.url) as made:
            await a_number_in_use(made)
            three.freeze(2)
            waiting = asyncio.ensure_future(publish(made, "a", timeout=8))
            await asyncio.sleep(0.3)
            three.lead("orders", 0, 3)
            began = time.monotonic()
            assert kinds(await waiting) == [Receipt]
            assert time.monotonic() - began < 5.5  # an answer is waited for six seconds
            three.thaw(2)
            await publish(made, "b")
            assert values(three) == [b"first", b"a", b"b"]


async def test_a_partition_without_leader_longer_than_any_deadline_goes_on_when_it_has_one(brokers: Pretender) -> None:
    async with driver(brokers.url, timeout=0.3) as made:
        await a_number_in_use(made)
        brokers.lead("orders", 0, -1)
        results = await asyncio.gather(*(publish(made, f"v{n}", timeout=0.5) for n in range(3)))
        assert all(type(result) in {BrokerUnavailable, PublishUnknown} for (result,) in results)
        looks = brokers.seen[METADATA]
        assert kinds(await publish(made, "x", timeout=0.5)) == [BrokerUnavailable]
        assert brokers.seen[METADATA] - looks <= 12, "a hot loop"
        waiting = asyncio.ensure_future(publish(made, "a"))
        await asyncio.sleep(0.1)
        brokers.lead("orders", 0, 1)
        assert kinds(await waiting) == [Receipt]
        assert values(brokers) == [b"first", b"a"]
        assert len({record.key for record in brokers.topics["orders"].logs[0].records}) == 1


async def test_partitions_that_others_add_are_used(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.topics["orders"].logs += [type(brokers.topics["orders"].logs[0])() for _ in range(3)]
        await cluster_of(made).refreshed(5)
        await made.publish([record(ORDERS, f"v{n}", b"key%d" % n) for n in range(50)], timeout=5)
        assert all(log.records for log in brokers.topics["orders"].logs)


# ---------------------------------------------------------------------- topics that go and come


async def test_a_topic_that_is_deleted_is_not_found_and_found_again(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.topics.pop("orders")
        began = time.monotonic()
        assert kinds(await publish(made, "a", "b")) == [NotFound, NotAttempted]
        assert time.monotonic() - began < 4.5
        assert kinds(await publish(made, "c")) == [NotFound]
        log = brokers.create("orders").logs[0]
        assert kinds(await publish(made, "d")) == [Receipt]
        assert log.values == [b"d"]


async def test_a_topic_that_is_deleted_and_made_again_takes_what_waits(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        producer = brokers.topics["orders"].logs[0].records[0].producer
        brokers.lead("orders", 0, -1)
        await cluster_of(made).refreshed(5)
        waiting = asyncio.ensure_future(
            made.publish([record(ORDERS, f"v{n}", b"k%d" % n) for n in range(9)], timeout=5)
        )
        await asyncio.sleep(0.02)
        topic = brokers.create("orders", 3)
        assert kinds(await waiting) == [Receipt] * 9
        assert sorted(value for log in topic.logs for value in log.values if value) == [b"v%d" % n for n in range(9)]
        assert all(record.producer != producer for log in topic.logs for record in log.records)


async def test_what_is_under_way_when_a_topic_is_made_again_is_unknown(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        gate = asyncio.Event()
        brokers.verdicts.append(gate)
        brokers.arrived.clear()
        waiting = asyncio.ensure_future(publish(made, "a", "b"))
        await brokers.arrived.wait()
        behind = asyncio.ensure_future(publish(made, "c"))
        await asyncio.sleep(0)
        log = brokers.create("orders").logs[0]
        await cluster_of(made).refreshed(5)
        assert kinds(await waiting) == [PublishUnknown, PublishUnknown]
        gate.set()
        assert kinds(await behind) == [Receipt]
        assert log.values == [b"c"]


async def test_one_broker_that_lags_behind_makes_no_topic_vanish(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.blind.add(1)
        await cluster_of(made).refreshed(5)
        assert kinds(await publish(made, "a")) == [Receipt]
        brokers.blind.clear()
        assert kinds(await publish(made, "b")) == [Receipt]


async def test_what_is_under_way_when_a_topic_vanishes_leaves_its_number_unused(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        gate = asyncio.Event()
        brokers.verdicts.append(gate)
        brokers.arrived.clear()
        waiting = asyncio.ensure_future(publish(made, "a"))
        await brokers.arrived.wait()
        brokers.denied["orders"] = ErrorCode.topic_authorization_failed
        await cluster_of(made).refreshed(5)
        assert kinds(await waiting) == [PublishUnknown]
        gate.set()
        brokers.denied.clear()
        # With the number of the other this would be taken for it.
        assert kinds(await publish(made, "b")) == [Receipt]
        assert values(brokers) == [b"first", b"a", b"b"]


async def test_a_topic_that_may_not_be_seen_is_told_and_comes_back(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.denied["orders"] = ErrorCode.topic_authorization_failed
        await cluster_of(made).refreshed(5)
        results = await publish(made, "a")
        assert kinds(results) == [AuthorizationError]
        assert "DESCRIBE on topic orders" in str(results[0])
        brokers.denied.clear()
        assert kinds(await publish(made, "b")) == [Receipt]
        # Numbers go on where they were: with old ones this would be a duplicate of the first.
        assert values(brokers) == [b"first", b"b"]
