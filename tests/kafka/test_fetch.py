"""Reading partitions of a real broker, that others write to."""

from __future__ import annotations

import asyncio
import time

import pytest

from brokerkit.drivers.kafka import _fetch
from brokerkit.drivers.kafka._fetch import PARTITION
from brokerkit.errors import AuthorizationError, NotFound
from tests.servers.kafka import Network, Right, shared_kafka

from .reading import SOON, Reader, cluster, delete_before, made, name, numbered, reading, write, writer

pytestmark = pytest.mark.asyncio


# ---------------------------------------------------------------------- what is in a log


async def test_what_is_stored_comes_in_order_from_any_offset() -> None:
    kafka = shared_kafka()
    topic = made(kafka, 3)
    producer = writer(kafka)
    now = int(time.time() * 1000)
    for partition in range(3):
        write(producer, topic, numbered(1000), partition, key=b"k", headers=[("a", b"1"), ("a", None)], timestamp=now)
    end = 1000
    async with cluster(kafka.url()) as c:
        for most in (1, 7, 5000):
            async with reading(c, topic, {0: 0, 1: 999, 2: 500}) as reader:
                found = await reader.read(dict.fromkeys(range(3), 1000), most)
                assert found == {0: numbered(1000), 1: numbered(end - 999, 999), 2: numbered(500, 500)}
                record = reader.seen[0][7]
                assert (record.offset, record.timestamp, record.key, record.value) == (7, now, b"k", b"7")
                assert record.headers == [("a", b"1"), ("a", None)]
                assert [reader.fetcher.end(partition) for partition in range(3)] == [1000, end, 1000]
                write(producer, topic, numbered(2, end), 1)
                end += 2
                assert (await reader.read({1: end}))[1] == numbered(end - 999, 999)
                assert not reader.errors


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_what_others_have_compressed_is_read(codec: str) -> None:
    kafka = shared_kafka()
    topic = made(kafka)
    producer = writer(kafka, compression_type=codec, linger_ms=50)
    write(producer, topic, [value * 20 for value in numbered(3000)])
    async with cluster(kafka.url()) as c:
        for begin in (0, 1234, 2999):
            async with reading(c, topic, {0: begin}) as reader:
                found = await reader.read({0: 3000})
                assert found[0] == [value * 20 for value in numbered(3000 - begin, begin)]
        async with reading(c, topic, {0: 0}) as reader:
            await reader.until(reader.fetcher.ready)
            assert reader.fetcher._parts[0].at_hand < 100_000, "it was compressed"


async def test_transactions_are_read_when_they_are_committed_and_never_when_aborted() -> None:
    kafka = shared_kafka()
    topic = made(kafka)
    producer = writer(kafka, transactional_id=name("tx"))
    producer.init_transactions(SOON)
    plain = writer(kafka)
    async with cluster(kafka.url()) as c, reading(c, topic, {0: 0}) as reader:
        producer.begin_transaction()
        write(producer, topic, [b"a", b"b"])
        write(plain, topic, [b"between"])
        await reader.until(lambda: reader.fetcher.end(0) == 0)
        assert not reader.fetcher.ready(), "nothing is read beyond an open transaction"
        producer.commit_transaction(SOON)
        assert (await reader.read({0: 4}))[0] == [b"a", b"b", b"between"]

        producer.begin_transaction()
        write(producer, topic, [b"never", b"at all"])
        write(plain, topic, [b"meanwhile"])
        producer.abort_transaction(SOON)
        assert (await reader.read({0: 8}))[0][3:] == [b"meanwhile"]

        producer.begin_transaction()
        write(producer, topic, [b"never"] * 50)
        producer.abort_transaction(SOON)
        # Nothing is handed out, and yet the place moves on.
        assert (await reader.read({0: 59}))[0][4:] == []
        assert reader.fetcher.end(0) == 59

        producer.begin_transaction()
        write(producer, topic, [b"at last"])
        producer.commit_transaction(SOON)
        assert (await reader.read({0: 61}))[0][4:] == [b"at last"]
    async with cluster(kafka.url()) as c:
        for begin in range(61):
            async with reading(c, topic, {0: begin}) as reader:
                await reader.read({0: 61})
                seen = {record.offset: record.value for record in reader.seen.get(0, [])}
                whole = {0: b"a", 1: b"b", 2: b"between", 6: b"meanwhile", 59: b"at last"}
                assert seen == {offset: value for offset, value in whole.items() if offset >= begin}


async def test_what_compaction_has_removed_is_jumped() -> None:
    kafka = shared_kafka()
    topic = made(
        kafka,
        cleanup_policy="compact",
        segment_ms="100",
        min_cleanable_dirty_ratio="0.01",
        delete_retention_ms="0",
        max_compaction_lag_ms="1000",
    )
    producer = writer(kafka)
    for number in range(30):
        write(producer, topic, numbered(10, number * 10), key=b"%d" % (number % 3))
    await asyncio.sleep(0.2)
    write(producer, topic, [b"last"], key=b"last")
    async with cluster(kafka.url()) as c, asyncio.timeout(60):

        async def stored(begin: int) -> list[int]:
            async with reading(c, topic, {0: begin}) as reader:
                await reader.read({0: 301})
                return [record.offset for record in reader.seen[0] if record.offset < 301]

        while len(offsets := await stored(0)) >= 200:  # the broker compacts when it likes
            write(producer, topic, [b"more"], key=b"more")
            await asyncio.sleep(0.3)
        for begin in (1, 5, 150, 271, 299):
            while True:
                seen, before = await stored(begin), offsets
                offsets = await stored(0)
                if offsets == before:  # nor has it compacted once more in between
                    break
            assert seen == [offset for offset in offsets if offset >= begin]


async def test_a_record_larger_than_what_is_asked_for_comes_though_others_always_have_something() -> None:
    kafka = shared_kafka()
    topic = made(kafka, 3, max_message_bytes="10000000")
    producer = writer(kafka, message_max_bytes=10_000_000)
    large = b"x" * (3 * PARTITION)
    write(producer, topic, [large, b"small"], 2)
    for partition in (0, 1):
        write(producer, topic, [b"y" * 100_000] * 100, partition)
    async with cluster(kafka.url()) as c, reading(c, topic, {0: 0, 1: 0, 2: 0}) as reader:
        assert (await reader.read({2: 2}))[2] == [large, b"small"]
        assert reader.fetcher.next_offset(0) < 100, "it did not come last"
        assert len((await reader.read({0: 100, 1: 100}))[1]) == 100


# ---------------------------------------------------------------------- beginning and stopping


async def test_what_was_asked_for_before_is_forgotten() -> None:
    kafka = shared_kafka()
    topic = made(kafka)
    producer = writer(kafka)
    write(producer, topic, numbered(100))
    async with cluster(kafka.url()) as c, reading(c, topic, {0: 0}) as reader:
        fetcher = reader.fetcher
        await reader.until(fetcher.ready)
        assert len(fetcher.take(0, 10)) == 10
        fetcher.begin(0, 90)
        assert (list(fetcher.ready()), fetcher.next_offset(0), fetcher.take(0, 10)) == ([], 90, [])
        assert (await reader.read({0: 100}))[0] == numbered(10, 90)
        reader.seen.clear()
        # A request for what follows is under way: its answer belongs to nobody.
        await asyncio.sleep(0)
        fetcher.begin(0, 50)
        write(producer, topic, numbered(1, 100))
        assert (await reader.read({0: 101}))[0] == numbered(51, 50)
        fetcher.stop(0)
        write(producer, topic, numbered(1, 101))
        assert fetcher.take(0, 10) == []
        assert fetcher.end(0) is None
        fetcher.stop(0)
        fetcher.begin(0, 101)
        assert (await reader.read({0: 102}))[0] == numbered(52, 50)


async def test_seeking_all_the_time_neither_loses_nor_repeats() -> None:
    kafka = shared_kafka()
    topic = made(kafka, 2)
    producer = writer(kafka)
    for partition in (0, 1):
        write(producer, topic, numbered(300), partition)
    async with cluster(kafka.url()) as c, reading(c, topic, {0: 0, 1: 0}) as reader:
        fetcher = reader.fetcher
        for turn in range(60):
            begin = turn * 37 % 300
            fetcher.begin(0, begin)
            if turn % 3:
                await asyncio.sleep(0.002 * (turn % 5))
            taken = fetcher.take(0, 7)
            assert [record.offset for record in taken] == list(range(begin, begin + len(taken)))
            assert fetcher.next_offset(0) == begin + len(taken)
            reader.seen.setdefault(1, []).extend(fetcher.take(1, 5))
        assert (await reader.read({1: 300}))[1] == numbered(300)


async def test_a_partition_that_is_begun_later_does_not_wait_for_the_others() -> None:
    kafka = shared_kafka()
    topic = made(kafka, 3)
    producer = writer(kafka)
    write(producer, topic, numbered(10), 1)
    async with cluster(kafka.url()) as c, reading(c, topic, {0: 0}, wait=30) as reader:
        async with asyncio.timeout(5):
            while reader.fetcher._parts[0].asked is None:
                await asyncio.sleep(0.01)
        reader.fetcher.begin(1, 0)
        reader.fetcher.begin(2, 0)
        assert (await reader.read({1: 10}, within=5))[1] == numbered(10)
        write(producer, topic, numbered(10), 2)
        assert (await reader.read({2: 10}, within=5))[2] == numbered(10)
        write(producer, topic, numbered(1), 0)
        assert (await reader.read({0: 1}, within=5))[0] == numbered(1)


# ---------------------------------------------------------------------- keeping up


async def test_what_nobody_takes_is_not_read_and_holds_nobody_up() -> None:
    kafka = shared_kafka()
    topic = made(kafka, 2)
    producer = writer(kafka)
    write(producer, topic, [b"x" * 50_000] * 100, 0)
    async with cluster(kafka.url()) as c, reading(c, topic, {0: 0, 1: 0}) as reader:
        fetcher = reader.fetcher
        for turn in range(20):
            write(producer, topic, numbered(1, turn), 1)
            async with asyncio.timeout(5):
                while not (taken := fetcher.take(1, 10)):
                    reader.told.clear()
                    await reader.told.wait()
            assert [record.value for record in taken] == numbered(1, turn)
        held = fetcher._parts[0].at_hand
        assert PARTITION // 2 <= held < 2 * PARTITION
        assert len((await reader.read({0: 100}))[0]) == 100


async def test_much_is_asked_for_at_once_and_never_more_than_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    kafka = shared_kafka()
    topic = made(kafka, 8)
    producer = writer(kafka, batch_size=50_000)
    for partition in range(8):
        write(producer, topic, [b"x" * 20_000] * 60, partition)
    monkeypatch.setattr(_fetch, "HELD", 2 * PARTITION)
    async with cluster(kafka.url()) as c, reading(c, topic, dict.fromkeys(range(8), 0)) as reader:
        fetcher = reader.fetcher
        await reader.until(lambda: len(fetcher.ready()) == 8)
        await asyncio.sleep(0.3)
        assert sum(part.at_hand for part in fetcher._parts.values()) < 3 * PARTITION + 8 * 2**15
        found = await reader.read(dict.fromkeys(range(8), 60), 3)
        assert all(len(values) == 60 for values in found.values())


async def test_an_idle_reader_asks_seldom() -> None:
    kafka = shared_kafka()
    topic = made(kafka, 4)
    async with Network(kafka) as network, cluster(network.url()) as c:
        async with reading(c, topic, dict.fromkeys(range(4), 0)):
            await asyncio.sleep(1.2)
            before = network.seen[1]
            await asyncio.sleep(4.5)
            assert 2 <= network.seen[1] - before <= 6, "more seldom while nothing comes, but not for ever"


# ---------------------------------------------------------------------- what is not there


async def test_records_that_were_deleted_before_they_were_read_are_told_of() -> None:
    kafka = shared_kafka()
    topic = made(kafka, 2)
    producer = writer(kafka)
    for partition in (0, 1):
        write(producer, topic, numbered(100), partition)
    await delete_before(kafka, topic, 40)
    async with cluster(kafka.url()) as c, reading(c, topic, {0: 3, 1: 0}) as reader:
        found = await reader.read({0: 100, 1: 100})
        assert found == {0: numbered(60, 40), 1: numbered(100)}
        assert reader.overtaken_by == [(0, 3, 40)]
        assert not reader.errors
        assert not reader.cut


async def test_what_was_read_before_a_deletion_is_handed_out_first() -> None:
    kafka = shared_kafka()
    topic = made(kafka)
    producer = writer(kafka)
    write(producer, topic, numbered(10))
    async with cluster(kafka.url()) as c, reading(c, topic, {0: 0}) as reader:
        await reader.until(reader.fetcher.ready)
        write(producer, topic, [b"x" * 900_000] * 3 + numbered(20, 13))
        await delete_before(kafka, topic, 30)
        found = await reader.read({0: 33})
        last = [record.offset for record in reader.seen[0] if record.offset < 30][-1]
        assert found[0][:10] == numbered(10)
        assert found[0][-3:] == numbered(3, 30)
        assert reader.overtaken_by in ([], [(0, last + 1, 30)])
        assert reader.overtaken_by or last == 29


async def test_a_place_behind_the_end_is_told_of() -> None:
    kafka = shared_kafka()
    topic = made(kafka)
    write(writer(kafka), topic, numbered(5))
    async with cluster(kafka.url()) as c, reading(c, topic, {0: 50}) as reader:
        await reader.until(lambda: reader.cut)
        assert (await reader.read({0: 5}))[0] == numbered(5)
        assert reader.cut == [(0, 50, 0)]


async def test_a_topic_that_is_deleted_is_told_of() -> None:
    kafka = shared_kafka()
    topic = made(kafka, 2)
    write(writer(kafka), topic, numbered(5))
    async with cluster(kafka.url()) as c, reading(c, topic, {0: 0, 1: 0}) as reader:
        await reader.read({0: 5})
        with kafka.wire() as admin:
            admin.delete([topic])
        await reader.until(lambda: reader.errors, within=8)
        assert isinstance(reader.errors[0], NotFound)
        assert topic in str(reader.errors[0])


async def test_a_topic_that_is_deleted_and_made_again_is_told_of() -> None:
    kafka = shared_kafka()
    topic = made(kafka)
    write(writer(kafka), topic, numbered(5))
    async with cluster(kafka.url()) as c, reading(c, topic, {0: 0}) as reader:
        await reader.read({0: 5})
        with kafka.wire() as admin:
            admin.delete([topic])
            admin.create(topic)
        write(writer(kafka), topic, numbered(9))
        await reader.until(lambda: reader.errors, within=8)
        assert isinstance(reader.errors[0], NotFound)
        assert reader.values() == numbered(5), "nothing of the other topic was read"


async def test_a_missing_right_is_told_of_and_reading_goes_on_when_it_is_given() -> None:
    kafka = shared_kafka(rights=True)
    topic = name().replace("t.", "u.", 1)
    describe, read = (Right("brokerkit", "topic", topic, operation) for operation in ("describe", "read"))
    with kafka.wire() as admin:
        admin.create(topic)
        admin.allow([describe])
    write(writer(kafka), topic, numbered(5))
    async with cluster(kafka.url("SASL")) as c, reading(c, topic, {0: 0}) as reader:
        await reader.until(lambda: reader.errors, within=8)
        assert isinstance(reader.errors[0], AuthorizationError)
        assert f"READ on topic {topic}" in str(reader.errors[0])
        with kafka.wire() as admin:
            admin.allow([read])
        assert (await reader.read({0: 5}))[0] == numbered(5)
        with kafka.wire() as admin:
            admin.forbid([read])
        reader.errors.clear()
        await reader.until(lambda: reader.errors, within=8)
        assert len(reader.errors) < 3, "and not all the time"
        with kafka.wire() as admin:
            admin.allow([read])
        write(writer(kafka), topic, numbered(5, 5))
        assert (await reader.read({0: 10}))[0] == numbered(10)
        with kafka.wire() as admin:
            admin.forbid([read, describe])
        reader.errors.clear()
        await reader.until(lambda: reader.errors, within=8)
        assert isinstance(reader.errors[0], AuthorizationError)
        c.stale()
        await asyncio.sleep(3)
        assert len(reader.errors) < 6
        with kafka.wire() as admin:
            admin.allow([read])
        write(writer(kafka), topic, numbered(5, 10))
        assert (await reader.read({0: 15}))[0] == numbered(15)
        with kafka.wire() as admin:
            admin.forbid([read])


# ---------------------------------------------------------------------- faults


async def test_reading_goes_on_after_the_connections_broke() -> None:
    kafka = shared_kafka()
    topic = made(kafka, 2)
    producer = writer(kafka)
    async with Network(kafka) as network, cluster(network.url()) as c, reading(c, topic, {0: 0, 1: 0}) as reader:
        for turn in range(5):
            for partition in (0, 1):
                write(producer, topic, numbered(200, turn * 200), partition)
            if turn % 2:
                network.reset()
            else:
                network.disconnect()
                await asyncio.sleep(0.2)
                network.accept()
            found = await reader.read(dict.fromkeys((0, 1), 200 * (turn + 1)), 13)
            assert found == dict.fromkeys((0, 1), numbered(200 * (turn + 1)))
        assert not reader.errors


async def test_a_broker_that_hangs_is_given_up_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    kafka = shared_kafka()
    topic = made(kafka)
    producer = writer(kafka)
    monkeypatch.setattr(_fetch, "MARGIN", 0.5)
    async with Network(kafka) as network, cluster(network.url(), connect_timeout=1) as c:
        async with reading(c, topic, {0: 0}, wait=0.2) as reader:
            write(producer, topic, numbered(5))
            await reader.read({0: 5})
            for turn in range(2):
                network.freeze()
                write(producer, topic, numbered(5, 5 + turn * 5))
                await asyncio.sleep(2)
                assert not reader.fetcher.ready()
                network.thaw()
                assert (await reader.read({0: 10 + turn * 5}))[0] == numbered(10 + turn * 5)


async def test_being_cancelled_leaves_nothing_behind() -> None:
    kafka = shared_kafka()
    topic = made(kafka, 4)
    producer = writer(kafka)
    write(producer, topic, numbered(1000))
    async with cluster(kafka.url()) as c:
        await c.topic(topic, timeout=5)
        before = len(asyncio.all_tasks())
        watchers = len(c.watchers)
        for turn in range(30):
            reader = Reader(c, topic)
            for partition in range(4):
                reader.fetcher.begin(partition, 0)
            task = asyncio.create_task(reader.fetcher.run())
            for _ in range(turn):
                await asyncio.sleep(0)
            if turn % 3 == 0:
                await asyncio.sleep(0.001 * turn)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            assert len(c.watchers) == watchers
            assert not [line for _, line in c._lines if isinstance(line, _fetch._Lane)]
        async with asyncio.timeout(5):
            while len(asyncio.all_tasks()) > before:
                await asyncio.sleep(0.01)
