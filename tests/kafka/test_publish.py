"""Publishing: the contract of the driver, on brokers that answer as a test wants."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio
from kio.schema.errors import ErrorCode

from brokerkit.address import Topic
from brokerkit.driver import Receipt
from brokerkit.drivers.kafka import KafkaDriver, _calls
from brokerkit.errors import (
    AuthorizationError,
    BrokerUnavailable,
    BufferFull,
    Closed,
    NotAttempted,
    NotFound,
    PublishUnknown,
    TooLarge,
)
from brokerkit.policy import MAX_BODY

from .pretender import CREATE, INIT, METADATA, PRODUCE, Pretender
from .publishing import driver, empty, kinds, outboxes_of, record, topic, until

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


# ---------------------------------------------------------------------- the contract


async def test_one_result_each_in_order_of_several_addresses(brokers: Pretender) -> None:
    other = topic("other", 3)
    brokers.create("other", 3)
    async with driver(brokers.url) as made:
        records = [record((ORDERS, other)[n % 2], f"r{n}", b"k%d" % n) for n in range(20)]
        results = await made.publish(records, timeout=5)
        assert [result.id for result in results if isinstance(result, Receipt)] == [f"r{n}" for n in range(20)]
        assert values(brokers) == [b"r%d" % n for n in range(0, 20, 2)]
        assert list(await made.publish([], timeout=5)) == []


async def test_all_that_is_published_in_one_turn_travels_together(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        before = brokers.seen[PRODUCE]
        await asyncio.gather(*(publish(made, f"v{n}") for n in range(100)))
        assert brokers.seen[PRODUCE] == before + 1
        assert values(brokers)[1:] == [b"v%d" % n for n in range(100)]


async def test_what_comes_while_a_batch_is_under_way_is_the_next_batch(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        gate = asyncio.Event()
        brokers.verdicts.append(gate)
        brokers.arrived.clear()
        calls = [asyncio.ensure_future(publish(made, "a"))]
        await brokers.arrived.wait()
        calls += [asyncio.ensure_future(publish(made, f"b{n}")) for n in range(50)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*calls)
        assert brokers.seen[PRODUCE] == 3


async def test_positions_are_where_the_records_are(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        results = await made.publish(
            [record(ORDERS, "a", timestamp=1.0005), record(ORDERS, "b", timestamp=2.0)], timeout=5
        )
        assert [r.position for r in results if isinstance(r, Receipt)] == ["orders[0]@1001-0", "orders[0]@2000-1"]


async def test_a_missing_topic_is_not_found_and_not_made(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        missing: Any = Topic("missing", bytes)
        results = await made.publish(
            [record(missing, "a", b"k"), record(missing, "b", b"k"), record(ORDERS, "c")], timeout=5
        )
        assert kinds(results) == [NotFound, NotAttempted, Receipt]
        assert "missing" not in brokers.topics
        assert brokers.seen[CREATE] == 0


async def test_a_derived_topic_is_made(brokers: Pretender) -> None:
    derived = ORDERS.dead_letters("x")
    async with driver(brokers.url) as made:
        results = await asyncio.gather(*(made.publish([record(derived, f"v{n}")], timeout=5) for n in range(5)))
        assert [kinds(result) for result in results] == [[Receipt]] * 5
        brokers.topics.pop(derived.name)
        assert kinds(await made.publish([record(derived, "again")], timeout=5)) == [Receipt]
        assert values(brokers, derived.name) == [b"again"]
        brokers.topics.pop(derived.name)
        brokers.creates = False
        assert kinds(await made.publish([record(derived, "again")], timeout=5)) == [AuthorizationError]


async def test_a_body_over_the_limit_fails_alone_and_what_would_overtake_it(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        large = b"x" * (MAX_BODY + 1)
        records = [record(ORDERS, "a", b"k"), record(ORDERS, large, b"k"), record(ORDERS, "b", b"k")]
        records += [record(ORDERS, "c", b"l"), record(ORDERS, large), record(ORDERS, "d")]
        results = await made.publish(records, timeout=5)
        assert kinds(results) == [Receipt, TooLarge, NotAttempted, Receipt, TooLarge, Receipt]
        assert values(brokers) == [b"a", b"c", b"d"]
        assert kinds(await made.publish([record(ORDERS, large)], timeout=5)) == [TooLarge]
        # A copy of what was accepted once has to be accepted again.
        brokers.create(ORDERS.dead_letters("x").name).logs[0].limit *= 100
        letters = ORDERS.dead_letters("x")
        assert kinds(await made.publish([record(letters, large)], timeout=5)) == [Receipt]


async def test_records_with_all_that_they_can_have(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        headers = (("a", b"\xff\x00"), ("a", b""), ("ü", b"2"))
        records = [
            record(ORDERS, None, b"", headers=headers, attempts=3, deliveries=2, id="one"),
            record(ORDERS, b"", None, id="two"),
        ]
        assert kinds(await made.publish(records, timeout=5)) == [Receipt, Receipt]
        one, two = brokers.topics["orders"].logs[0].records
        assert (one.value, one.key) == (None, b"")
        assert one.headers == [("bk-id", b"one"), ("bk-attempts", b"3"), ("bk-deliveries", b"2"), *headers]
        assert (two.value, two.key, two.headers) == (b"", None, [("bk-id", b"two")])


@pytest.mark.parametrize("compression", ["gzip", "snappy", "lz4", "zstd"])
async def test_records_are_compressed(brokers: Pretender, compression: str) -> None:
    async with driver(brokers.url, compression=compression) as made:
        assert kinds(await made.publish([record(ORDERS, "x" * 10_000)] * 3, timeout=5)) == [Receipt] * 3
        assert values(brokers) == [b"x" * 10_000] * 3


async def test_records_without_a_key_go_everywhere(brokers: Pretender) -> None:
    wide = topic("wide", 8)
    brokers.create("wide", 8)
    async with driver(brokers.url) as made:
        for number in range(64):
            await made.publish([record(wide, f"v{number}")], timeout=5)
        assert all(len(log.records) == 8 for log in brokers.topics["wide"].logs)
        await made.publish([record(wide, "v")] * 8000, timeout=5)
        assert all(len(log.records) > 500 for log in brokers.topics["wide"].logs)


# ---------------------------------------------------------------------- records that are refused


async def test_a_record_that_is_too_large_for_the_topic_fails_alone(brokers: Pretender) -> None:
    brokers.topics["orders"].logs[0].limit = 100_000
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        bodies = [b"v%d" % n for n in range(20)]
        bodies[7] = b"7" * 120_000
        keys = [b"k" if n in {7, 12} else None for n in range(20)]
        results = await made.publish([record(ORDERS, b, k) for b, k in zip(bodies, keys, strict=True)], timeout=5)
        assert [n for n, result in enumerate(results) if isinstance(result, Receipt)] == [
            n for n in range(20) if n not in {7, 12}
        ]
        assert isinstance(results[7], TooLarge)
        assert isinstance(results[12], NotAttempted)
        assert values(brokers)[1:] == [b"v%d" % n for n in range(20) if n not in {7, 12}]
        await publish(made, "after")
        assert brokers.seen[INIT] == 1


async def test_records_that_are_refused_together_are_sent_apart(brokers: Pretender) -> None:
    brokers.topics["orders"].logs[0].limit = 100_000
    async with driver(brokers.url) as made:
        results = await made.publish([record(ORDERS, bytes([65 + n]) * 30_000) for n in range(8)], timeout=5)
        assert kinds(results) == [Receipt] * 8
        assert [value[:1] for value in values(brokers) if value] == [bytes([65 + n]) for n in range(8)]


async def test_a_refused_timestamp_fails_alone(brokers: Pretender) -> None:
    brokers.topics["orders"].logs[0].latest = int((time.time() + 3600) * 1000)
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        records = [record(ORDERS, f"v{n}", timestamp=time.time() + (432_000 if n == 3 else 0)) for n in range(9)]
        results = await made.publish(records, timeout=5)
        assert [isinstance(result, Receipt) for result in results] == [n != 3 for n in range(9)]
        assert "clock" in str(results[3])
        assert values(brokers)[1:] == [b"v%d" % n for n in range(9) if n != 3]
        await publish(made, "after")
        assert brokers.seen[INIT] == 1


async def test_missing_rights_are_told_at_once_and_break_nothing(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.always = ErrorCode.topic_authorization_failed
        began = time.monotonic()
        results = await publish(made, "a", "b", "c")
        assert kinds(results) == [AuthorizationError, NotAttempted, NotAttempted]
        assert "WRITE on topic orders" in str(results[0])
        assert time.monotonic() - began < 4.5
        brokers.always = None
        await publish(made, "d")
        assert values(brokers) == [b"first", b"d"]
        assert brokers.seen[INIT] == 1


async def test_a_producer_that_is_not_allowed_is_told_at_once(brokers: Pretender) -> None:
    brokers.introductions.append(ErrorCode.cluster_authorization_failed)
    async with driver(brokers.url) as made:
        results = await publish(made, "a", "b")
        assert kinds(results) == [AuthorizationError, NotAttempted]
        assert kinds(await publish(made, "c")) == [Receipt]
        assert values(brokers) == [b"c"]


async def test_a_producer_that_has_to_wait_waits(brokers: Pretender) -> None:
    brokers.introductions += [ErrorCode.coordinator_load_in_progress, ErrorCode.coordinator_not_available]
    async with driver(brokers.url) as made:
        assert kinds(await publish(made, "a")) == [Receipt]
        assert brokers.seen[INIT] == 3


@pytest.mark.parametrize(
    "code",
    [ErrorCode.not_enough_replicas, ErrorCode.not_leader_or_follower, ErrorCode.leader_not_available,
     ErrorCode.corrupt_message, ErrorCode.kafka_storage_error],
)  # fmt: skip
async def test_what_may_succeed_later_is_sent_again_in_order(brokers: Pretender, code: ErrorCode) -> None:
    async with driver(brokers.url) as made:
        brokers.verdicts += [code, code, code]
        results = await asyncio.gather(*(publish(made, f"v{n}") for n in range(5)))
        assert [kinds(result) for result in results] == [[Receipt]] * 5
        assert values(brokers) == [b"v%d" % n for n in range(5)]


async def test_copies_that_are_missing_are_refused_at_the_deadline_and_nothing_is_claimed(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.always = ErrorCode.not_enough_replicas
        before = brokers.seen[PRODUCE], brokers.seen[METADATA]
        (result,) = await publish(made, "a", timeout=0.5)
        assert type(result) is BrokerUnavailable
        assert "min.insync.replicas" in str(result)
        tries, looks = brokers.seen[PRODUCE] - before[0], brokers.seen[METADATA] - before[1]
        assert 2 <= tries <= 11
        assert looks <= 11
        brokers.always = None
        await publish(made, "b")
        assert values(brokers) == [b"first", b"b"]
        assert brokers.seen[INIT] == 1


# ---------------------------------------------------------------------- cancelling, room, closing


async def test_a_cancelled_publish_leaves_nothing_behind(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        gate = asyncio.Event()
        brokers.verdicts.append(gate)
        brokers.arrived.clear()
        calls = [asyncio.ensure_future(publish(made, "under way"))]
        await brokers.arrived.wait()
        calls += [asyncio.ensure_future(publish(made, f"waits {n}")) for n in range(10)]
        await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        gate.set()
        assert kinds(await publish(made, "after")) == [Receipt]
        assert values(brokers) == [b"first", b"under way", b"after"]
        assert empty(made)


async def test_a_cancelled_publish_in_doubt_leaves_nothing_behind(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.always = "lose"
        brokers.arrived.clear()
        call = asyncio.ensure_future(publish(made, "a"))
        await brokers.arrived.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        brokers.always = None
        assert kinds(await publish(made, "b")) == [Receipt]
        assert values(brokers) == [b"first", b"a", b"b"]
        assert empty(made)


async def test_cancelled_publishes_to_a_frozen_broker_are_gone_at_their_deadline(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.freeze()
        calls = [asyncio.ensure_future(publish(made, f"v{n}", timeout=0.3)) for n in range(50)]
        await asyncio.sleep(0.05)
        calls += [asyncio.ensure_future(publish(made, f"w{n}", timeout=0.3)) for n in range(50)]
        await asyncio.sleep(0.05)
        for call in calls:
            call.cancel()
        await until(lambda: not outboxes_of(made)._calls.waiting)
        (lane,) = outboxes_of(made)._boxes["orders"].lanes
        assert not lane.pending
        assert outboxes_of(made)._calls._bytes == 0
        brokers.thaw()
        assert kinds(await publish(made, "after")) == [Receipt]


async def test_too_much_that_waits_is_refused(brokers: Pretender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_calls, "MAX_WAITING", 10_000)
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.freeze()
        full = asyncio.ensure_future(made.publish([record(ORDERS, "x" * 1000)] * 11, timeout=5))
        await asyncio.sleep(0)
        results = await made.publish([record(ORDERS, "y", b"k"), record(ORDERS, "z", b"k")], timeout=5)
        assert kinds(results) == [BufferFull, NotAttempted]
        brokers.thaw()
        assert kinds(await full) == [Receipt] * 11
        assert kinds(await publish(made, "y")) == [Receipt]


async def test_closing_waits_for_what_is_under_way(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        gate = asyncio.Event()
        brokers.verdicts.append(gate)
        call = asyncio.ensure_future(publish(made, "a"))
        asyncio.get_running_loop().call_later(0.2, gate.set)
        await asyncio.sleep(0)
    assert kinds(await call) == [Receipt]
    with pytest.raises(Closed):
        await publish(made, "b")


async def test_closing_ends_soon_if_no_broker_answers(brokers: Pretender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brokerkit.drivers.kafka._driver._FLUSH", 0.5)
    async with driver(brokers.url) as made:
        await a_number_in_use(made)
        brokers.freeze()
        under_way = asyncio.ensure_future(publish(made, "a", timeout=60))
        await asyncio.sleep(0.05)
        waits = asyncio.ensure_future(publish(made, "b", timeout=60))
        opening = asyncio.ensure_future(made.publish([record(topic("other"), "c")], timeout=60))
        await asyncio.sleep(0.05)
        began = time.monotonic()
    assert time.monotonic() - began < 20
    assert kinds(await under_way) == [PublishUnknown]
    assert kinds(await waits) == [BrokerUnavailable]
    async with asyncio.timeout(20):
        assert kinds(await opening) == [Closed]
    brokers.thaw()
    await until(lambda: not brokers.open[1])


async def test_many_small_publishes_leave_nothing_behind(brokers: Pretender) -> None:
    async with driver(brokers.url) as made:
        await a_number_in_use(made)

        async def many() -> None:
            for _ in range(100):
                await made.publish([record(ORDERS, "v")], timeout=5)

        await asyncio.gather(*(many() for _ in range(20)))
        gc.collect()
        before = len(gc.get_objects())
        await asyncio.gather(*(many() for _ in range(20)))
        brokers.topics["orders"].logs[0].records.clear()
        gc.collect()
        assert len(gc.get_objects()) < before + 500
        boxes = outboxes_of(made)
        assert empty(made)
        assert boxes._sender is not None
        assert not boxes._sender._ready
        assert not boxes._sender._under_way
