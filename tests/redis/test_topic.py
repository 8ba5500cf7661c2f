"""Topics on Redis: what the conformance suite cannot see from outside."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator, Sequence
from zlib import crc32

import pytest

from brokerkit.driver import Record, Source
from brokerkit.drivers.redis._keys import entity
from brokerkit.drivers.redis._topic import TopicConsumer
from brokerkit.drivers.redis._topic_place import backlog, seek
from brokerkit.errors import BrokerError, ConfigError, DeliveryLost, NotFound, PositionLost
from brokerkit.events import PartitionPaused, PartitionResumed
from brokerkit.policy import LOG_AHEAD, Start
from tests.servers import FLAVORS, RedisServer

from .queues import SOON, process
from .topics import GROUP, consume, declare, done, ids, left, names, rest, settle, take, topic

pytestmark = pytest.mark.asyncio
TOPIC = topic()
ONE = topic("one", partitions=1)
KEY = entity("one")


@pytest.fixture(scope="module", params=FLAVORS)
def running(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(request.param) as started:
        yield started


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    running.clear()
    return running


# ---------------------------------------------------------------------- foreign and broken entries


async def test_an_entry_that_others_wrote_is_passed_over_and_told_of(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    await declare(server, ONE)
    async with process(server) as p:
        await server.command("XADD", KEY + b":0", "*", "f", "before the first one of ours nobody reads")
        await p.put(ONE, names(1))
        first = await server.command("XADD", KEY + b":0", "*", "f", "no frame of ours")
        await p.put(ONE, names(3)[1:])
        second = await server.command("XADD", KEY + b":0", "*", "name", "value", "more", "values")
        await p.put(ONE, names(2, "n"))
        async with consume(p, ONE) as consumer:
            with caplog.at_level(logging.ERROR, "brokerkit"):
                assert ids(await rest(consumer)) == [*names(3), *names(2, "n")]
            told = [record.getMessage() for record in caplog.records]
            assert len(told) == 2
            assert all(
                f"{KEY.decode()}:0" in text and id.decode() in text
                for text, id in zip(told, (first, second), strict=True)
            )
            await p.put(ONE, ["later"])
            assert ids(await take(consumer, 1)) == ["later"]
    assert await consumed(server) == 5  # what was received last was handed back


async def consumed(server: RedisServer) -> int:
    """Return the offset below which everything of `ONE` is settled."""
    position = await server.command("HGET", KEY + b":g:" + GROUP.encode(), "c0")
    return int(position.split(b" ")[0].split(b"-")[1])


async def test_a_damaged_entry_in_the_place_of_ours_comes_as_broken(server: RedisServer) -> None:
    await declare(server, ONE)
    async with process(server) as p:
        await p.put(ONE, names(3))
        entries = await server.command("XRANGE", KEY + b":0", "-", "+")
        await server.command("DEL", KEY + b":0")
        for id, fields in entries:
            frame = b"\x00garbage" if id.endswith(b"-1") else fields[1]
            await server.command("XADD", KEY + b":0", id, "f", frame)
        async with consume(p, ONE) as consumer:
            taken = await take(consumer, 3)
            assert [d.record.id.startswith("broken") for d in taken] == [False, True, False]
            assert taken[1].record.body == b"\x00garbage"
            await done(consumer, taken)
        assert await left(p, ONE) == []


async def test_a_removed_entry_is_a_position_lost(server: RedisServer) -> None:
    await declare(server, ONE)
    async with process(server) as p:
        await p.put(ONE, names(5))
        entries = await server.command("XRANGE", KEY + b":0", "-", "+")
        await server.command("XDEL", KEY + b":0", entries[2][0], entries[3][0])
        async with consume(p, ONE) as consumer:
            with pytest.raises(PositionLost) as caught:
                await consumer.receive(10, SOON)
            assert caught.value.lost == 2
            assert ids(await take(consumer, 3)) == ["m00000", "m00001", "m00004"]


async def test_what_is_trimmed_away_to_the_end_is_lost_once(server: RedisServer) -> None:
    await declare(server, ONE)
    async with process(server) as p:
        await p.put(ONE, names(5))
        async with consume(p, ONE) as consumer:
            await server.command("XTRIM", KEY + b":0", "MAXLEN", 0)
            with pytest.raises(PositionLost) as caught:
                await consumer.receive(1, SOON)
            assert caught.value.lost == 5
            await p.put(ONE, ["new"])
            assert ids(await rest(consumer)) == ["new"]
        assert await left(p, ONE) == []


async def test_what_was_held_and_released_is_lost_when_it_is_trimmed_before_another_member_comes(
    server: RedisServer,
) -> None:
    await declare(server, ONE)
    async with process(server) as p:
        await p.put(ONE, names(6))
        async with consume(p, ONE) as consumer:
            taken = await take(consumer, 4)
            await done(consumer, taken[1:2])
        entries = await server.command("XRANGE", KEY + b":0", "-", "+")
        await server.command("XTRIM", KEY + b":0", "MINID", entries[3][0])
        async with consume(p, ONE) as consumer:
            got: list[str] = []
            lost = 0
            async with asyncio.timeout(SOON):
                while len(got) < 3 or not lost:
                    try:
                        got += ids(await consumer.receive(10, SOON))
                    except PositionLost as error:
                        lost += error.lost or 0
            assert (got, lost) == (names(6)[3:], 2)


# ---------------------------------------------------------------------- what is gone


@pytest.mark.parametrize("group", [GROUP, None])
async def test_a_reader_of_a_topic_that_is_gone_says_so(server: RedisServer, group: str | None) -> None:
    await declare(server, TOPIC)
    async with process(server) as p, consume(p, TOPIC, group=group) as consumer:
        await p.put(TOPIC, names(10))
        await take(consumer, 5)
        await server.command("FLUSHALL")
        with pytest.raises(NotFound):
            await take(consumer, 100)
        assert isinstance(consumer.problem, NotFound)


@pytest.mark.parametrize("group", [GROUP, None])
async def test_a_reader_of_a_topic_that_was_made_anew_says_so(server: RedisServer, group: str | None) -> None:
    await declare(server, ONE)
    async with process(server) as p, consume(p, ONE, group=group) as consumer:
        await p.put(ONE, names(10))
        await take(consumer, 10)
        await server.command("FLUSHALL")
        await declare(server, ONE)
        await p.put(ONE, names(20))
        with pytest.raises(NotFound):
            await take(consumer, 100)


async def test_a_member_of_a_group_that_is_gone_says_so_and_stores_nothing(server: RedisServer) -> None:
    await declare(server, ONE)
    async with process(server) as p, consume(p, ONE) as consumer:
        await p.put(ONE, names(10))
        taken = await take(consumer, 5)
        await server.command("DEL", KEY + b":g:" + GROUP.encode(), KEY + b":m:" + GROUP.encode())
        (result,) = await settle(consumer, taken[:1], confirm=True)
        assert isinstance(result, DeliveryLost)
        with pytest.raises(NotFound):
            await take(consumer, 100)
    assert await server.command("EXISTS", KEY + b":g:" + GROUP.encode(), KEY + b":m:" + GROUP.encode()) == 0


async def test_an_ephemeral_reader_writes_nothing(server: RedisServer) -> None:
    await declare(server, TOPIC)
    async with process(server) as p:
        await p.put(TOPIC, names(10))
        before = sorted(await server.command("KEYS", "*"))
        async with consume(p, TOPIC, group=None) as consumer:
            await consumer.release(await take(consumer, 5))
            assert len(await rest(consumer)) == 10
        assert sorted(await server.command("KEYS", "*")) == before


# ---------------------------------------------------------------------- far ahead


async def test_a_partition_stands_far_ahead_of_its_oldest_message_and_goes_on_then(server: RedisServer) -> None:
    await declare(server, ONE)
    async with process(server) as p, consume(p, ONE, prefetch=100) as consumer:
        await p.put(ONE, names(LOG_AHEAD + 50))
        (oldest,) = await take(consumer, 1)
        taken = 1
        while got := await consumer.receive(100, 0.3):
            await done(consumer, got)
            taken += len(got)
        assert taken == LOG_AHEAD
        assert [event.partition for event in p.events if isinstance(event, PartitionPaused)] == [0]
        assert not [event for event in p.events if isinstance(event, PartitionResumed)]
        await done(consumer, [oldest])
        assert len(await rest(consumer)) == 50
        assert [event.partition for event in p.events if isinstance(event, PartitionResumed)] == [0]
    async with process(server) as p:
        assert await left(p, ONE) == []


# ---------------------------------------------------------------------- large messages

BIG = 900_000


async def test_large_messages_come_a_few_at_a_time(server: RedisServer) -> None:
    await declare(server, ONE)
    async with process(server) as p:
        for id in names(30):
            await p.outboxes.publish([Record(ONE, id, bytes(BIG), timestamp=1.0)], SOON)
        async with consume(p, ONE) as consumer:
            taken: list[str] = []
            while len(taken) < 30:
                got = await consumer.receive(100, SOON)
                assert 1 <= len(got) <= 5
                taken += ids(got)
            assert taken == names(30)


async def test_an_heir_of_large_messages_reads_what_is_left_a_few_at_a_time(server: RedisServer) -> None:
    await declare(server, ONE)
    async with process(server) as r:
        for id in names(40):
            await r.outboxes.publish([Record(ONE, id, bytes(BIG), timestamp=1.0)], SOON)
        async with process(server, session=0.5) as p, consume(p, ONE) as dying:
            held = await take(dying, 30)
            await done(dying, [held[n] for n in range(30) if n not in {0, 1, 2, 20, 29}], confirm=True)
            p.proxy.kill()
            async with consume(r, ONE) as heir:
                taken = await take(heir, 15)
        assert ids(taken) == [names(40)[n] for n in (0, 1, 2, 20, 29, *range(30, 40))]
        assert [d.deliveries for d in taken] == [2] * 5 + [1] * 10


# ---------------------------------------------------------------------- counting


async def test_a_crash_counts_exactly_what_was_handed_out(server: RedisServer) -> None:
    await declare(server, ONE)
    async with process(server, session=0.5) as r, process(server, session=0.5) as p:
        async with consume(p, ONE) as dying:
            await p.put(ONE, names(10))
            taken = await take(dying, 6, limit=3)
            await done(dying, taken[1:3], confirm=True)
            await dying.release(taken[4:5])
            p.proxy.kill()
            async with consume(r, ONE) as heir:
                again = await take(heir, 8)
            assert {d.record.id: d.deliveries for d in again} == {
                "m00000": 2,
                "m00003": 2,
                "m00004": 1,
                "m00005": 2,
                **dict.fromkeys(names(10)[6:], 1),
            }
        async with consume(r, ONE) as heir:
            assert [d.deliveries for d in await take(heir, 8)] == [2, 2, 1, 2, 1, 1, 1, 1]


async def test_each_crash_counts_until_a_message_comes_alone(server: RedisServer) -> None:
    await declare(server, ONE)
    async with process(server) as r:
        await r.put(ONE, names(4))
        seen: list[list[int]] = []
        for _ in range(4):
            async with process(server, session=0.5) as p, consume(p, ONE) as dying:
                async with asyncio.timeout(SOON):
                    while not (got := await dying.receive(100, SOON)):
                        pass
                seen.append([d.deliveries for d in got])
                p.proxy.kill()
        assert seen == [[1, 1, 1, 1], [2, 2, 2, 2], [3], [4]]
        async with consume(r, ONE) as heir:
            async with asyncio.timeout(SOON):
                assert [d.deliveries for d in await take(heir, 1)] == [5]
            assert not await heir.receive(10, 0.2)


# ---------------------------------------------------------------------- looking and moving


async def test_the_backlog_of_a_group_that_was_never_there(server: RedisServer) -> None:
    await declare(server, TOPIC)
    async with process(server) as p:
        await p.put(TOPIC, names(7))
        for start, waiting in ((Start.EARLIEST, 7), (Start.LATEST, 0)):
            found = await backlog(p.link, Source(TOPIC, "nobody", start), 3)
            assert (found.waiting, found.in_flight, found.dead) == (waiting, 0, 3)
            assert (found.oldest_age is None) == (waiting == 0)
        assert await server.command("EXISTS", entity("topic") + b":g:nobody") == 0


async def test_a_group_is_not_moved_while_a_member_lives_and_then_it_is(server: RedisServer) -> None:
    await declare(server, TOPIC)
    async with process(server) as p:
        await p.put(TOPIC, names(8))
        async with consume(p, TOPIC) as consumer:
            await rest(consumer)
            with pytest.raises(ConfigError, match="1 live member"):
                await seek(p.link, Source(TOPIC, GROUP, Start.EARLIEST))
        await seek(p.link, Source(TOPIC, GROUP, Start.EARLIEST))
        assert len(await left(p, TOPIC)) == 8
        assert await left(p, TOPIC) == []


async def test_places_that_cannot_be_are_refused(server: RedisServer) -> None:
    await declare(server, TOPIC)
    async with process(server) as p:
        await p.put(TOPIC, names(8))
        async with consume(p, TOPIC, group=None) as consumer:
            position = (await take(consumer, 1))[0].position
        wrong = (
            "topic[9]@1-1",
            position.replace("topic", "other"),
            position[:-1] + "99",
            "topic[0]@1-0",
            "topic[*]@1-1",
            "topic[*]@1-9,1-9,1-9,1-9",
        )
        for text in wrong:
            with pytest.raises((ConfigError, PositionLost)):
                async with consume(p, TOPIC, group=None, start=Start.position(text)):
                    pass
            with pytest.raises(BrokerError):
                await seek(p.link, Source(TOPIC, GROUP, Start.position(text)))


# ---------------------------------------------------------------------- sharing


async def test_many_members_share_evenly_and_each_partition_has_one_owner(server: RedisServer) -> None:
    many = topic("many", partitions=32)
    await declare(server, many)
    async with process(server, session=5) as p:
        members = [consume(p, many) for _ in range(12)]
        for member in members:
            await member.__aenter__()
        await even(members, 32)
        for member in members[3:]:
            await member.__aexit__(None, None, None)
        await even(members[:3], 32)
        await p.put(many, names(200))
        taken = await asyncio.gather(*(rest(member, 0.5) for member in members[:3]))
        assert sorted(ids([d for got in taken for d in got])) == names(200)
        for member in members[:3]:
            await member.__aexit__(None, None, None)
        assert not p.lost


async def test_a_hundred_members_that_come_at_once_share_without_waiting(server: RedisServer) -> None:
    many = topic("many", partitions=256)
    await declare(server, many)
    async with process(server, session=60) as p:  # nobody looks by itself before the test is over
        members = [consume(p, many) for _ in range(100)]
        await asyncio.gather(*(member.__aenter__() for member in members))
        await even(members, 256)
        await p.put(many, names(500))
        taken = await asyncio.gather(*(rest(member, 0.5) for member in members))
        assert sorted(ids([d for got in taken for d in got])) == names(500)
        await asyncio.gather(*(member.__aexit__(None, None, None) for member in members))
        assert not p.lost


async def test_members_that_come_and_go_in_any_order_share_evenly(server: RedisServer) -> None:
    many = topic("many", partitions=13)
    await declare(server, many)
    draw = random.Random(7)
    async with process(server, session=60) as p:
        members: list[TopicConsumer] = []
        for _ in range(40):
            if members and draw.random() < 0.45:
                await members.pop(draw.randrange(len(members))).__aexit__(None, None, None)
            else:
                members.append(consume(p, many))
                await members[-1].__aenter__()
            if members:
                await even(members, 13)
        for member in members:
            await member.__aexit__(None, None, None)


async def even(members: Sequence[TopicConsumer], partitions: int) -> None:
    """Wait until *members* own all partitions, as equally as can be."""
    share, more = divmod(partitions, len(members))
    async with asyncio.timeout(SOON):
        while True:
            owned = [sorted(member.claims) for member in members]
            sizes = sorted(len(each) for each in owned)
            if sizes == [share] * (len(members) - more) + [share + 1] * more:
                break
            await asyncio.sleep(0.01)
    assert sorted(number for each in owned for number in each) == list(range(partitions))


async def test_only_as_many_partitions_move_as_must(server: RedisServer) -> None:
    many = topic("many", partitions=64)
    await declare(server, many)
    async with process(server, session=5) as p, consume(p, many) as one, consume(p, many) as two:
        async with consume(p, many) as three:
            await even([one, two, three], 64)
            before = [set(member.claims) for member in (one, two, three)]
            async with consume(p, many) as four:
                await even([one, two, three, four], 64)
                moved = sum(len(had - set(m.claims)) for had, m in zip(before, (one, two, three), strict=True))
                assert moved == 16


async def test_copies_are_stored_with_the_position_or_not_at_all(server: RedisServer) -> None:
    await declare(server, ONE)
    letters, missing = ONE.dead_letters(GROUP), topic("missing")
    async with process(server) as p, consume(p, ONE) as consumer:
        await p.put(ONE, names(3))
        taken = await take(consumer, 3)
        copy = Record(letters, "copy", b"x", timestamp=1.0)
        bad = Record(missing, "copy", b"x", timestamp=1.0)
        (refused,) = await settle(consumer, taken[:1], copy, bad)
        assert isinstance(refused, NotFound)
        assert "missing" in str(refused)
        assert await server.command("EXISTS", entity(letters.name) + b":l") == 0
        assert await settle(consumer, taken[1:2], copy) == [None]
        assert await server.command("XLEN", entity(letters.name) + b":l") == 1
    async with process(server) as p:
        assert await left(p, ONE) == ["m00000", "m00002"]


async def test_outcomes_are_stored_before_a_suspect_comes_and_before_anything_comes_behind_it(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what ends the process would make the others count a delivery as well, again and again."""
    monkeypatch.setattr("brokerkit.drivers.redis._topic_commit.EVERY", 60.0)
    monkeypatch.setattr("brokerkit.drivers.redis._topic_commit.RIDE", 60.0)
    two = topic("two", partitions=2)
    await declare(server, two)
    async with process(server) as r, process(server, session=0.5) as p, consume(p, two) as dying:
        keys = [next(k for n in range(99) if crc32(k := b"%d" % n) % 2 == p) for p in range(2)]
        record = Record(two, "innocent", b"", keys[0], timestamp=1.0)
        await p.outboxes.publish([record], SOON)
        await done(dying, await take(dying, 1))
        for id, key in (("suspect", 1), ("another", 0)):
            record = Record(two, id, b"", keys[key], timestamp=1.0, deliveries=2)
            await p.outboxes.publish([record], SOON)
            (suspect,) = await take(dying, 1)
            assert (suspect.record.id, suspect.deliveries) == (id, 3)
            notes = await server.command("HMGET", entity("two") + b":g:" + GROUP.encode(), "c0", "c1")
            bases = [int(note.split()[0].split(b"-")[1]) for note in notes]
            assert bases == ([1, 0] if id == "suspect" else [1, 1])
            await done(dying, [suspect])
        await p.put(two, ["last"])
        last = await take(dying, 1)
        p.proxy.kill()
        async with consume(r, two) as heir:
            assert [(d.record.id, d.deliveries) for d in await take(heir, 1)] == [(last[0].record.id, 2)]
            assert not await heir.receive(10, 0.2)
