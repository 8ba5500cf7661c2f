"""The scripts of topics, call by call: who owns what, and what a call does that comes too late."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest

from brokerkit.driver import Record
from brokerkit.drivers.redis._frames import topic_blob
from brokerkit.drivers.redis._keys import entity
from brokerkit.drivers.redis._scripts import (
    PUBLISH,
    PUBLISH_TOPIC,
    TOPIC_NOTE,
    TOPIC_READ,
    TOPIC_SETTLE,
    TOPIC_START,
    TOPIC_SYNC,
    Script,
)
from tests.servers import FLAVORS, RedisServer

from .queues import SOON, process
from .scripts import call, call_now
from .topics import GROUP, consume, declare, ids, names, take, topic

pytestmark = pytest.mark.asyncio
ONE = topic("one", partitions=1)
KEY = entity("one")
G, M = KEY + b":g:" + GROUP.encode(), KEY + b":m:" + GROUP.encode()
SESSION = 60000
_batches = itertools.count(1)


@pytest.fixture(scope="module", params=FLAVORS)
def running(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(request.param) as started:
        yield started


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    running.clear()
    return running


async def put(server: RedisServer, *ids: str) -> list[str]:
    """Store records in `ONE`; return the ids of their entries."""
    blobs = [topic_blob(Record(ONE, id, b"", timestamp=1.0), 0) for id in ids]
    reply = await call(server, PUBLISH, [KEY], "@p", next(_batches), "t", "", "0", *blobs)
    _, _, ms, first = reply.decode().split()
    return [f"{ms}-{offset}" for offset in range(int(first), int(first) + len(ids))]


async def ask(server: RedisServer, script: Script, *args: str | bytes | int) -> Any:
    return await call(server, script, [KEY], *args)


async def joined(server: RedisServer, member: str) -> tuple[int, str, bytes]:
    """Let *member* take part; return epoch, position and high mark of the partition that it owns by then."""
    soonest, _, number, epoch, position, mark = await ask(server, TOPIC_SYNC, GROUP, member, SESSION, 2, "")
    assert (soonest, number) == (-1, 0)
    return epoch, position.decode(), mark


async def read(server: RedisServer, member: str, epoch: int, place: str, number: int = 0, position: str = "") -> Any:
    """Read what follows *place*."""
    offset = place.partition("-")[2]
    return await ask(server, TOPIC_READ, GROUP, member, number, 100, 0, epoch, offset, place, 100, "", position)


async def test_what_a_member_may_have_held_is_known_to_who_follows_it(server: RedisServer) -> None:
    await declare(server, ONE)
    await put(server, *names(3))
    await ask(server, TOPIC_START, "", GROUP, "earliest")
    epoch, position, mark = await joined(server, "a")
    place = position.strip()
    assert mark == b""
    ((_, what, _, _, _, *found),) = await read(server, "a", epoch, place)
    assert (what, len(found)) == (b"run", 6)
    await server.command("ZADD", M, 5, "a")
    later, position, mark = await joined(server, "b")
    assert later > epoch
    assert (position.strip(), mark) == (place, b"3")


async def test_a_member_without_the_partition_reads_and_stores_nothing(server: RedisServer) -> None:
    await declare(server, ONE)
    ends = await put(server, *names(3))
    await ask(server, TOPIC_START, "", GROUP, "earliest")
    epoch, position, _ = await joined(server, "a")
    place = position.strip()
    await server.command("ZADD", M, 5, "a")
    later, _, _ = await joined(server, "b")
    before = await server.command("HGETALL", G)
    for member, old in (("a", epoch), ("a", later), ("b", epoch)):
        assert [row[:2] for row in await read(server, member, old, place, 1, f"{ends[2]} ")] == [[0, b"lost"]]
        blob = topic_blob(Record(ONE, "copy", b"", timestamp=1.0), 0)
        args = (GROUP, member, 1, 1, 0, old, f"{ends[2]} ", 0, 1, 0, "t", "", blob)
        assert await call(server, TOPIC_SETTLE, [KEY, KEY], *args) == [b"done", 0]
        for word in (0, 1) if member == "a" else (0,):
            assert await ask(server, TOPIC_SYNC, GROUP, member, SESSION, word, "", 0, old, f"{ends[2]} ")
        assert await server.command("HGETALL", G) == before
    assert await server.command("XLEN", KEY + b":0") == 3
    ((_, what, _, _, _, *_),) = await read(server, "b", later, place)
    assert what == b"run"


async def test_where_a_group_begins_is_stored_before_anybody_reads(server: RedisServer) -> None:
    await declare(server, ONE)
    ends = await put(server, *names(3))
    await ask(server, TOPIC_START, "", GROUP, "latest")
    await ask(server, TOPIC_START, "", "other", "time", int(ends[2].partition("-")[0]))
    await put(server, "new")
    for start in ("earliest", "latest"):
        await ask(server, TOPIC_START, "", GROUP, start)
    _, position, _ = await joined(server, "a")
    assert position.strip().partition("-")[2] == "3"
    (other,) = await server.command("HMGET", KEY + b":g:other", "c0")
    assert other.decode().strip() == ends[0]


async def test_retention_removes_what_is_too_old_and_nothing_else(server: RedisServer) -> None:
    day = 86400
    await declare(server, topic("one", partitions=1, retention=day))
    seconds, _ = await server.command("TIME")
    now = int(seconds) * 1000
    blob = topic_blob(Record(ONE, "old", b"", timestamp=1.0), 0)
    for storing in ("publish", "publish_topic", "read"):
        await server.command("DEL", KEY + b":0")
        for offset, age in enumerate((2 * day, day + 60, day - 60, 60)):
            await server.command("XADD", KEY + b":0", f"{now - age * 1000}-{offset}", "f", blob[4:])
        await server.command("HSET", KEY, "o0", 4, "m0", now - 60000, "trimmed", 0)
        if storing == "publish":
            await call(server, PUBLISH, [KEY], "@p", next(_batches), "t", "", "0", blob)
        elif storing == "publish_topic":
            await call(server, PUBLISH_TOPIC, [KEY], "@p", next(_batches), 1, blob)
        else:
            await ask(server, TOPIC_READ, "", "", 0, 100, 0, 0, 0, "0-0", 100, "", "")
        kept = [int(id.partition(b"-")[2]) for id, _ in await server.command("XRANGE", KEY + b":0", "-", "+")]
        assert kept == ([2, 3] if storing == "read" else [2, 3, 4]), storing


async def test_a_record_that_comes_while_a_reader_waits_is_there_at_once(server: RedisServer) -> None:
    await declare(server, ONE)
    loop = asyncio.get_running_loop()
    async with process(server) as p, process(server) as other:
        for group in (GROUP, None):
            async with consume(p, ONE, group=group) as consumer:
                taken = await consumer.receive(1000, 0.01)
                late = 0
                for n in range(12):
                    waiting = asyncio.ensure_future(consumer.receive(10, 5))
                    await asyncio.sleep(0.01)
                    began = loop.time()
                    await other.put(ONE, [f"{group}-{n}"])
                    taken = await waiting
                    assert ids(taken) == [f"{group}-{n}"]
                    late += loop.time() - began > 0.2
                    assert late < 3, "found by polls"


async def test_what_was_read_before_this_process_stood_still_is_not_handed_out_after_it(server: RedisServer) -> None:
    await declare(server, ONE)
    session = 0.5
    async with process(server, session=session) as p, consume(p, ONE) as consumer:
        await p.put(ONE, names(3))
        held = await take(consumer, 1, limit=1)
        waiting = asyncio.ensure_future(consumer.receive(10, SOON))
        while not consumer._reading:
            await asyncio.sleep(0)
        waiting.cancel()
        while not consumer._fetched:
            await asyncio.sleep(0)
        time.sleep(1.5 * session)
        _, _, number, _, _, mark = call_now(server, TOPIC_SYNC, [KEY], GROUP, "other", SESSION, 2, "")
        assert (number, mark) == (0, b"3")
        assert not await consumer.receive(10, 0.2)
        async with asyncio.timeout(SOON):
            while p.lost != ids(held):
                await asyncio.sleep(0.005)


async def test_ownership_counts_from_when_it_was_asked_for(server: RedisServer) -> None:
    await declare(server, ONE)
    session = 0.5
    async with process(server, session=session) as p, consume(p, ONE) as consumer:
        loop = asyncio.get_running_loop()
        for _ in range(3):
            assert consumer._membership is not None
            before = consumer.owned_until
            asked = loop.time()
            consumer._membership.soon()
            await asyncio.sleep(0)
            while consumer.owned_until == before:
                time.sleep(0.002)  # the answer is late
                await asyncio.sleep(0)
            assert asked <= consumer.owned_until - session < asked + 0.002


async def test_a_read_or_a_note_that_comes_late_lowers_no_high_mark(server: RedisServer) -> None:
    await declare(server, ONE)
    first, *_ = await put(server, *names(10))
    await ask(server, TOPIC_START, "", GROUP, "earliest")
    epoch, place, _ = await joined(server, "me")
    for offset, start in ((0, place), (4, first.rpartition("-")[0] + "-4"), (0, place)):
        await ask(server, TOPIC_READ, GROUP, "me", 0, 4, 0, epoch, offset, start.strip(), 4, "", "")
    assert await server.command("HGET", G, "h0") == b"8"
    assert await ask(server, TOPIC_NOTE, GROUP, "me", 0, epoch, 9) == 1
    assert await ask(server, TOPIC_NOTE, GROUP, "me", 0, epoch, 3) == 1
    assert await ask(server, TOPIC_NOTE, GROUP, "you", 0, epoch, 10) == 0
    assert await server.command("HGET", G, "h0") == b"9"


async def test_who_has_left_for_good_does_not_join_again(server: RedisServer) -> None:
    await declare(server, ONE)
    await ask(server, TOPIC_START, "", GROUP, "earliest")
    await joined(server, "me")
    assert (await ask(server, TOPIC_SYNC, GROUP, "me", SESSION, 3, ""))[1:] == [0]
    for how in (2, 0):
        assert await ask(server, TOPIC_SYNC, GROUP, "me", SESSION, how, "") == [-2, 0]
    assert await server.command("EXISTS", M) == 0
    await joined(server, "you")
    assert await server.command("HGET", G, "own0") == b"you:2"
