"""The scripts of queues, call by call: who owns what, and what a call does that comes too late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
import redis.exceptions

from brokerkit.address import Queue
from brokerkit.driver import Record
from brokerkit.drivers.redis._admin import _REDRIVE as ADMIN_REDRIVE
from brokerkit.drivers.redis._frames import frame, queue_blob, topic_blob
from brokerkit.drivers.redis._keys import entity
from brokerkit.drivers.redis._scripts import (
    PUBLISH,
    PUBLISH_QUEUE,
    PUBLISH_TOPIC,
    QUEUE_JOIN,
    QUEUE_LEAVE,
    QUEUE_OUTCOME,
    QUEUE_RECOVER,
    QUEUE_RELEASE,
    QUEUE_RENEW,
    QUEUE_SETTLE,
    QUEUE_TAKE,
    Script,
)
from tests.servers import FLAVORS, RedisServer

from .queues import SOON, declare, done, ids, process, queue, take
from .scripts import Held, Sessions, call, call_now, put
from .topics import declare as declare_topics
from .topics import topic

pytestmark = pytest.mark.asyncio
QUEUE = queue(lease=60)
KEY = entity("queue")
OUT = queue("out")
TOPIC = topic("one", partitions=1)
LONELY = 1
DRAIN = 2


@pytest.fixture(scope="module", params=FLAVORS)
def running(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(request.param) as started:
        yield started


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    running.clear()
    return running


async def opened(server: RedisServer, *names: str, address: Queue[bytes] = QUEUE) -> Sessions:
    """Return a queue with sessions that hold nothing."""
    await declare(server, address, OUT)
    sessions = Sessions(server, address)
    await sessions.join(*names)
    return sessions


def copy(*ids: str, key: int = 2) -> list[str | bytes | int]:
    """Return copies, as the arguments of an outcome have them."""
    return [part for id in ids for part in (key, queue_blob(Record(OUT, id, b"copy", timestamp=1.0)))]


# ---------------------------------------------------------------------- who owns what


@pytest.mark.parametrize("priorities", [1, 2], ids=["plain", "priorities"])
async def test_what_the_dead_held_comes_before_what_is_new(server: RedisServer, priorities: int) -> None:
    sessions = await opened(server, "p/a", "p/b", address=queue(lease=60, priorities=priorities))
    await put(server, sessions.queue, "a", "b", "c")
    assert (await sessions.take("p/a")).ids == ["a", "b", "c"]
    await put(server, sessions.queue, "new")
    await sessions.end("p/a")
    again = await sessions.take("p/b")
    assert (again.ids, again.ended) == (["a", "b", "c", "new"], [1, 1, 1, 0])
    assert await sessions.held("p/b") == again.numbers
    assert await sessions.held("p/a") == []


@pytest.mark.parametrize("priorities", [1, 2], ids=["plain", "priorities"])
async def test_what_the_living_hold_is_theirs(server: RedisServer, priorities: int) -> None:
    sessions = await opened(server, "p/a", "p/b", address=queue(lease=60, priorities=priorities))
    await put(server, sessions.queue, "a", "b", "c")
    assert (await sessions.take("p/a", 2)).ids == ["a", "b"]
    assert (await sessions.take("p/b")).ids == ["c"]
    assert (await sessions.take("p/b")).ids == []


async def test_the_second_time_that_an_owner_dies_a_message_comes_alone(server: RedisServer) -> None:
    sessions = await opened(server, "p/a", "p/b", "p/c")
    await put(server, QUEUE, "a")
    for name in ("p/a", "p/b"):
        held = await sessions.take(name)
        assert (held.ids, held.state) == (["a"], 0)
        await sessions.end(name)
    await put(server, QUEUE, "other")
    alone = await sessions.take("p/c")
    assert (alone.ids, alone.ended, alone.state) == (["a"], [2], LONELY)


async def test_what_comes_alone_comes_beside_no_more_than_a_session_has_lived_with(server: RedisServer) -> None:
    sessions = await opened(server, "p/a")
    await put(server, QUEUE, "a", "b", "c", "d", deliveries=2)
    assert (await sessions.take("p/a", proven=0)).ids == ["a"]
    for proven in (None, 0):
        held = await sessions.take("p/a", proven=proven)
        assert (held.ids, held.state) == ([], DRAIN)
    held = await sessions.take("p/a", proven=1)
    assert (held.ids, held.state) == (["b"], LONELY)
    assert (await sessions.take("p/a", proven=1)).state == DRAIN
    assert (await sessions.take("p/a", proven=2)).ids == ["c"]


async def test_what_is_released_is_held_no_more_and_once_in_line(server: RedisServer) -> None:
    sessions = await opened(server, "p/a", "p/b")
    await put(server, QUEUE, "a", "b", "c", "d")
    held = await sessions.take("p/a", 3)
    first, second, third = held.numbers
    assert await sessions.call(QUEUE_RELEASE, "p/a", second, first, second) == 2
    assert await sessions.call(QUEUE_RELEASE, "p/a", first) == 0
    assert await sessions.held("p/a") == [third]
    again = await sessions.take("p/b")
    assert (again.ids, again.ended) == (["a", "b", "d"], [0, 0, 0])


async def test_what_is_due_is_handed_out_and_nothing_else(server: RedisServer) -> None:
    sessions = await opened(server, "p/a")
    await put(server, QUEUE, "later", delay=60.0)
    await put(server, QUEUE, "due", delay=30.0)
    waits = await sessions.take("p/a")
    assert waits.ids == []
    assert 29000 < waits.hint <= 30001
    element = (await server.command("ZRANGE", KEY + b":d", 0, 0))[0]
    await server.command("ZADD", KEY + b":d", 5, element)
    assert (await sessions.take("p/a")).ids == ["due"]
    assert await server.command("ZCARD", KEY + b":d") == 1


async def test_no_number_is_given_twice(server: RedisServer) -> None:
    sessions = await opened(server, "p/a")
    numbers = await put(server, QUEUE, "a", "b")
    plain = await call(server, PUBLISH_QUEUE, [KEY, KEY + b":r0"], "@q", 1, frame(Record(QUEUE, "c", b"")))
    numbers += [int(plain), *await put(server, QUEUE, "d", ttl=60.0), *await put(server, QUEUE, "e", delay=60.0)]
    assert numbers == [1, 2, 3, 4, 5]
    held = await sessions.take("p/a")
    again = queue_blob(Record(QUEUE, "a", b"", attempts=1))
    reply = await sessions.call(QUEUE_OUTCOME, "p/a", "q", "", held.numbers[0], 1, 2, again, more=[KEY])
    assert reply == [1, 1]
    assert (await sessions.take("p/a")).numbers == [(6).to_bytes(6)]


# ---------------------------------------------------------------------- both or none


async def test_of_copies_that_cannot_all_be_stored_none_is_and_the_message_is_still_held(server: RedisServer) -> None:
    sessions = await opened(server, "p/a")
    missing = queue("missing")
    await put(server, QUEUE, "a", "b")
    a, b = (await sessions.take("p/a")).numbers
    keys = [entity(OUT.name), entity(missing.name)]
    items = [a, 2, *copy("a"), *copy("a", key=3), b, 1, *copy("b")]
    reply = await sessions.call(QUEUE_OUTCOME, "p/a", "q", "", "q", "", *items, more=keys)
    assert reply == [1, b"BK NOTFOUND", 1]
    assert await sessions.held("p/a") == [a]
    assert await server.command("LLEN", entity(OUT.name) + b":r0") == 1
    reply = await sessions.call(QUEUE_OUTCOME, "p/a", "q", "", "q", "", *items, more=keys)
    assert reply == [1, b"BK NOTFOUND", 0], "settled before: not stored again"
    assert await server.command("LLEN", entity(OUT.name) + b":r0") == 1


async def test_two_redrives_at_once_move_each_letter_once(server: RedisServer) -> None:
    letters = QUEUE.dead_letters
    await opened(server)
    blob = frame(Record(letters, "a", b"", timestamp=1.0))
    await call(server, PUBLISH, [entity(letters.name)], "@p", 1, "d", "seq=0", "0", blob)
    for number, answer in enumerate((b"1", b"0", b"0")):
        keys = [entity(letters.name), entity(letters.name) + b":p:%d" % number, KEY]
        moved = queue_blob(Record(QUEUE, "a", b"", timestamp=1.0))
        assert await call(server, ADMIN_REDRIVE, keys, "", "1-0", moved) == answer
    assert await server.command("LLEN", KEY + b":r0") == 1


@pytest.mark.parametrize("script", [PUBLISH, PUBLISH_QUEUE, PUBLISH_TOPIC], ids=lambda script: script.name)
async def test_a_batch_is_stored_once_and_not_behind_a_later_one(server: RedisServer, script: Script) -> None:
    await opened(server)
    await declare_topics(server, TOPIC)
    key = entity(TOPIC.name) if script is PUBLISH_TOPIC else KEY
    keys = [key, KEY + b":r0"] if script is PUBLISH_QUEUE else [key]
    front: dict[Script, list[str | int]] = {PUBLISH: ["q", "", "0"], PUBLISH_QUEUE: [], PUBLISH_TOPIC: [1]}
    records = [Record(QUEUE, id, b"", timestamp=1.0) for id in ("a", "b")]
    blobs = {
        PUBLISH: [queue_blob(record) for record in records],
        PUBLISH_QUEUE: [frame(record) for record in records],
        PUBLISH_TOPIC: [topic_blob(record, 0) for record in records],
    }
    args = [*front[script], *blobs[script]]

    async def stored() -> int:
        return int(
            await server.command(*(("XLEN", key + b":0") if script is PUBLISH_TOPIC else ("LLEN", KEY + b":r0")))
        )

    first = await call(server, script, keys, "@p", 1, *args)
    assert await call(server, script, keys, "@p", 1, *args) == first
    assert await stored() == 2
    second = await call(server, script, keys, "@p", 2, *args)
    assert second != first
    with pytest.raises(redis.exceptions.ResponseError, match="BK STALE"):
        await call(server, script, keys, "@p", 1, *args)
    assert await call(server, script, keys, "@other", 1, *args) not in (first, second)
    assert await stored() == 6


# ---------------------------------------------------------------------- too late


async def test_calls_of_a_session_that_is_over_do_nothing(server: RedisServer) -> None:
    sessions = await opened(server, "p/a", "p/b")
    await put(server, QUEUE, "a", "b")
    (number,) = (await sessions.take("p/a", 1)).numbers
    await sessions.end("p/a")
    taken = await sessions.take("p/b", 1)
    assert taken.numbers == [number]
    assert await sessions.call(QUEUE_SETTLE, "p/a", number) == 0
    assert await sessions.call(QUEUE_RENEW, "p/a", "p/b") == [0, 60000]
    out = [entity(OUT.name)]
    assert await sessions.call(QUEUE_OUTCOME, "p/a", "q", "", number, 1, *copy("a"), more=out) == [0]
    assert await sessions.call(QUEUE_RELEASE, "p/a", number) == 0
    with pytest.raises(redis.exceptions.ResponseError, match="BK LOST"):
        await sessions.take("p/a")
    with pytest.raises(redis.exceptions.ResponseError, match="BK LOST"):
        await sessions.call(QUEUE_RECOVER, "p/c", 1, "p/a", number)
    assert await sessions.call(QUEUE_LEAVE, "p/a") == 0
    assert await sessions.held("p/b") == [number]
    assert await server.command("EXISTS", entity(OUT.name) + b":r0") == 0


async def test_calls_under_a_name_that_was_given_up_do_nothing(server: RedisServer) -> None:
    sessions = await opened(server, "p/a")
    await put(server, QUEUE, "a", "b", "c")
    known, unknown = (await sessions.take("p/a", 2)).numbers
    settled = (99).to_bytes(6)
    assert await sessions.call(QUEUE_RECOVER, "p/b", 1, "p/a", known, settled) == [60000, settled]
    with pytest.raises(redis.exceptions.ResponseError, match="BK LOST"):
        await sessions.take("p/a")
    assert await sessions.call(QUEUE_SETTLE, "p/a", known) == 0
    assert await sessions.call(QUEUE_RENEW, "p/a") == [0]
    assert await sessions.held("p/b") == [known]
    again = await sessions.take("p/b")
    assert (again.ids, again.ended) == (["b", "c"], [0, 0])
    assert again.numbers[0] == unknown


async def test_an_answer_that_is_read_too_late_hands_out_nothing(server: RedisServer) -> None:
    """The process stands still from when the take was sent until others have what it was handed."""
    lease = 0.3
    await declare(server, QUEUE)
    await server.command("HSET", KEY, "lease", str(lease))
    async with process(server) as p, p.consume(QUEUE) as consumer:
        await put(server, QUEUE, "a")
        assert consumer.session is not None
        held = KEY + b":h:" + consumer.session.name
        receiving = asyncio.ensure_future(consumer.receive(10, SOON))
        while not server.command_now("EXISTS", held):
            await asyncio.sleep(0)
        time.sleep(1.5 * lease)
        assert not receiving.done()
        call_now(server, QUEUE_JOIN, [KEY], "other/1", "")
        taken = Held(QUEUE, call_now(server, QUEUE_TAKE, [KEY], "other/1", 10, 0, 0, 0))
        assert (taken.ids, taken.ended) == (["a"], [1])
        await asyncio.wait([receiving], timeout=0.1)
        assert not receiving.done()
        await call(server, QUEUE_SETTLE, [KEY], "other/1", *taken.numbers)
        await put(server, QUEUE, "b")
        assert ids(await receiving) == ["b"]


# ---------------------------------------------------------------------- cancelled


async def test_what_a_cancelled_receive_is_handed_goes_to_another(server: RedisServer) -> None:
    await declare(server, QUEUE)
    async with process(server) as p, process(server) as other, p.consume(QUEUE) as one, other.consume(QUEUE) as two:
        await put(server, QUEUE, "a")
        p.proxy.freeze()
        receiving = asyncio.ensure_future(one.receive(1, SOON))
        while not p.link._unanswered:
            await asyncio.sleep(0)
        receiving.cancel()
        await asyncio.wait([receiving])
        waiting = asyncio.ensure_future(two.receive(1, 0))
        p.proxy.thaw()
        (a,) = await waiting or await take(two, 1)
        assert (a.record.id, a.deliveries) == ("a", 1)


async def test_what_a_cancelled_receive_was_given_goes_to_another(server: RedisServer) -> None:
    await declare(server, QUEUE)
    loop = asyncio.get_running_loop()
    late = 0
    async with process(server) as p, process(server) as other, p.consume(QUEUE) as one, other.consume(QUEUE) as two:
        hand = one.hand

        def handed(data: bytes, more: bool = False) -> None:
            hand(data, more)
            first.cancel()

        one.hand = handed  # type: ignore[method-assign]
        for n in range(10):
            first = asyncio.ensure_future(one.receive(1, SOON))
            await asyncio.sleep(0.02)
            second = asyncio.ensure_future(two.receive(1, SOON))
            await asyncio.sleep(0.02)
            began = loop.time()
            await put(server, QUEUE, str(n))
            (taken,) = await second
            late += loop.time() - began > 0.2
            assert late < 3, "found by polls"
            await asyncio.wait([first])
            await done(two, [taken])


async def test_messages_that_come_together_while_a_consumer_waits_are_there_at_once(server: RedisServer) -> None:
    await declare(server, QUEUE)
    loop = asyncio.get_running_loop()
    late = 0
    async with process(server) as p, process(server) as other, p.consume(QUEUE) as consumer:
        for _ in range(10):
            waiting = asyncio.ensure_future(consumer.receive(10, SOON))
            await asyncio.sleep(0.02)
            began = loop.time()
            await other.put(QUEUE, ["a", "b"])
            taken = await waiting
            late += loop.time() - began > 0.2
            assert late < 3, "found by polls"
            await done(consumer, taken or await take(consumer, 1))
            while len(taken) < 2:
                taken = [*taken, *await take(consumer, 1)]
                await done(consumer, taken[-1:])
