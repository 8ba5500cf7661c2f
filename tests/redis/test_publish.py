"""Publishing: stored once however often it is sent, in order, and never later than its deadline says."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import anyio
import pytest

from brokerkit.address import Address, Queue, Topic
from brokerkit.driver import Receipt, Record
from brokerkit.drivers._url import Options, parse
from brokerkit.drivers.redis._keys import entity
from brokerkit.drivers.redis._link import GRACE, Link
from brokerkit.drivers.redis._options import settings
from brokerkit.drivers.redis._publish import Outboxes, kind_of, settings_of
from brokerkit.errors import BrokerUnavailable, BufferFull, NotAttempted, NotFound, PublishUnknown, TooLarge
from brokerkit.policy import MAX_BODY
from tests.servers import ADMIN, Proxy, RedisServer

pytestmark = pytest.mark.asyncio

QUEUE: Address = Queue("q", bytes)
ONCE: Address = Queue("once", bytes, dedup=60)
TOPIC: Address = Topic("t", bytes, partitions=4)
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer("redis") as started:
        yield started


@asynccontextmanager
async def published(server: RedisServer) -> AsyncIterator[tuple[Outboxes, Proxy]]:
    server.clear()
    async with Proxy(server.host, server.port) as proxy, anyio.create_task_group() as tasks:
        url = parse(server.url(user=ADMIN, port=proxy.port))
        link = Link(settings(url, Options({}, "redis://")))
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        tasks.start_soon(link.run, started)
        await started
        for address in (QUEUE, ONCE, TOPIC):
            fields = [part for item in settings_of(address).decode().split(" ") for part in item.split("=")]
            await link.command(b"HSET", entity(address.name), b"kind", kind_of(address), *fields, timeout=10)
        boxes = Outboxes(link, b"%d" % next(_numbers))
        yield boxes, proxy
        boxes.close()
        tasks.cancel_scope.cancel()


def record(address: Address, id: str, key: str | None = None, body: bytes = b"body") -> Record:
    return Record(address, id, body, None if key is None else key.encode())


async def stored(server: RedisServer, address: Address) -> list[bytes]:
    key = entity(address.name)
    if not isinstance(address, Topic):
        return list(await server.command("LRANGE", key + b":r0", 0, -1))
    found: list[bytes] = []
    for partition in range(address.partitions):
        found += [fields[1] for _, fields in await server.command("XRANGE", key + b":%d" % partition, "-", "+")]
    return found


@pytest.mark.parametrize("address", [QUEUE, ONCE, TOPIC], ids=["queue", "dedup", "topic"])
async def test_a_batch_whose_answer_was_lost_is_stored_once_and_its_receipts_are_those_of_the_first(
    server: RedisServer, address: Address
) -> None:
    async with published(server) as (boxes, proxy):
        proxy.lose_replies(2, [b"EVALSHA"])
        results = await boxes.publish([record(address, f"m{n}", f"k{n % 3}") for n in range(10)], 30)
        assert all(isinstance(result, Receipt) and not result.duplicate for result in results)
        positions = {result.position for result in results if isinstance(result, Receipt)}
        assert len(positions) == 10
        assert len(await stored(server, address)) == 10
        assert proxy.connections == 3


@pytest.mark.parametrize("address", [QUEUE, TOPIC], ids=["queue", "topic"])
async def test_many_publishers_and_a_connection_that_breaks_all_the_time_lose_and_repeat_nothing(
    server: RedisServer, address: Address
) -> None:
    async with published(server) as (boxes, proxy):
        done = itertools.count(1)

        async def publish(line: int) -> None:
            for n in range(40):
                (result,) = await boxes.publish([record(address, f"{line}-{n}", f"k{line}")], 30)
                assert isinstance(result, Receipt), result
                match next(done) % 80:
                    case 0:
                        proxy.reset()
                    case 40:
                        proxy.lose_replies(1, [b"EVALSHA"])

        await asyncio.gather(*(publish(line) for line in range(20)))
        assert len(await stored(server, address)) == 800
        assert proxy.connections > 5


async def test_positions_say_where_each_record_is(server: RedisServer) -> None:
    async with published(server) as (boxes, _):
        for _ in range(3):
            results = await boxes.publish([record(TOPIC, f"m{n}", f"k{n}") for n in range(50)], 10)
            for n, result in enumerate(results):
                assert isinstance(result, Receipt)
                assert result.position is not None
                partition, _, id = result.position.removeprefix("t[").partition("]@")
                ((_, fields),) = await server.command("XRANGE", f"bk:{{t}}:{partition}", id, id)
                assert f"m{n}".encode() in fields[1]


async def test_records_without_a_key_are_spread(server: RedisServer) -> None:
    async with published(server) as (boxes, _):
        for n in range(40):
            await boxes.publish([record(TOPIC, f"m{n}")], 10)
        for partition in range(4):
            assert await server.command("XLEN", f"bk:{{t}}:{partition}") == 10


async def test_a_missing_address_is_told_and_what_follows_a_failure_of_its_key_is_not_attempted(
    server: RedisServer,
) -> None:
    async with published(server) as (boxes, _):
        missing: Address = Topic("missing", bytes)
        results = await boxes.publish(
            [record(missing, "a", "k"), record(TOPIC, "b", "k"), record(missing, "c", "k"), record(missing, "d")], 10
        )
        assert [type(result) for result in results] == [NotFound, Receipt, NotAttempted, NotFound]


async def test_a_body_that_is_too_large_fails_alone(server: RedisServer) -> None:
    async with published(server) as (boxes, _):
        large = bytes(MAX_BODY + 1)
        (alone,) = await boxes.publish([record(QUEUE, "a", body=large)], 10)
        assert isinstance(alone, TooLarge)
        results = await boxes.publish(
            [record(TOPIC, "a", "k"), record(TOPIC, "b", "k", large), record(TOPIC, "c", "k"), record(TOPIC, "d", "j")],
            10,
        )
        assert [type(result) for result in results] == [Receipt, TooLarge, NotAttempted, Receipt]


async def test_without_a_connection_the_outcome_is_certain_and_without_an_answer_it_is_not(
    server: RedisServer,
) -> None:
    async with published(server) as (boxes, proxy):
        server.freeze()
        try:
            (unknown,) = await boxes.publish([record(QUEUE, "a")], 0.3)
            (unsent,) = await boxes.publish([record(QUEUE, "b")], 0.3)
        finally:
            server.thaw()
        assert isinstance(unknown, PublishUnknown)
        assert isinstance(unsent, (PublishUnknown, BrokerUnavailable))
        await boxes.publish([record(QUEUE, "c")], 10)
        proxy.disconnect()
        while boxes._link.up:
            await asyncio.sleep(0.001)
        results = await asyncio.wait_for(boxes.publish([record(QUEUE, "d")], 30), GRACE + 5)
        assert isinstance(results[0], BrokerUnavailable)
        proxy.accept()


async def test_a_cancelled_publish_leaves_the_others_alone(server: RedisServer) -> None:
    async with published(server) as (boxes, _):
        tasks = [asyncio.ensure_future(boxes.publish([record(QUEUE, f"m{n}")], 10)) for n in range(100)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(isinstance(task.result()[0], Receipt) for task in tasks[1::2])
        (after,) = await boxes.publish([record(QUEUE, "after")], 10)
        assert isinstance(after, Receipt)


async def test_a_full_server_refuses_and_takes_again_when_there_is_room(server: RedisServer) -> None:
    async with published(server) as (boxes, _):
        await server.command("CONFIG", "SET", "maxmemory", 1)
        try:
            results = await boxes.publish([record(QUEUE, "a"), record(QUEUE, "b")], 10)
        finally:
            await server.command("CONFIG", "SET", "maxmemory", 0)
        assert [type(result) for result in results] == [BufferFull, BufferFull]
        (after,) = await boxes.publish([record(QUEUE, "after")], 10)
        assert isinstance(after, Receipt)
        assert len(await stored(server, QUEUE)) == 1


async def test_a_foreign_entry_in_a_stream_stops_nobody(server: RedisServer) -> None:
    async with published(server) as (boxes, _):
        for partition in range(4):
            await server.command("XADD", f"bk:{{t}}:{partition}", "99999999999999-0", "x", "y")
        results = await boxes.publish([record(TOPIC, f"m{n}", f"k{n}") for n in range(20)], 10)
        assert all(isinstance(result, Receipt) for result in results)


async def test_a_foreign_key_is_an_error_that_names_it(server: RedisServer) -> None:
    async with published(server) as (boxes, _):
        await server.command("SET", "bk:{foreign}", "x")
        (result,) = await boxes.publish([record(Queue("foreign", bytes), "a")], 10)
        assert not isinstance(result, Receipt)
        assert "foreign" in str(result)


async def test_what_was_too_late_while_there_was_no_connection_is_certain_and_never_sent(server: RedisServer) -> None:
    async with published(server) as (boxes, proxy):
        proxy.disconnect()
        while boxes._link.up:
            await asyncio.sleep(0.001)
        late = asyncio.ensure_future(boxes.publish([record(QUEUE, "late")], 0.1))
        patient = asyncio.ensure_future(boxes.publish([record(QUEUE, "patient")], 30))
        (result,) = await late
        assert isinstance(result, BrokerUnavailable)
        proxy.accept()
        (result,) = await patient
        assert isinstance(result, Receipt)
        (only,) = await stored(server, QUEUE)
        assert b"patient" in only


async def test_one_call_is_never_more_than_a_server_can_do_in_a_moment(server: RedisServer) -> None:
    async with published(server) as (boxes, _):
        await server.command("CONFIG", "RESETSTAT")
        results = await boxes.publish([record(QUEUE, f"m{n}", body=bytes(MAX_BODY // 2)) for n in range(20)], 30)
        assert all(isinstance(result, Receipt) for result in results)
        calls = next(line for line in (await server.command("INFO", "commandstats")).splitlines() if b"evalsha" in line)
        assert int(calls.partition(b"calls=")[2].partition(b",")[0]) >= 10
        results = await boxes.publish([record(QUEUE, f"n{n}") for n in range(2500)], 30)
        assert len({result.position for result in results if isinstance(result, Receipt)}) == 2500


async def test_after_a_failed_part_of_a_long_call_its_keys_are_not_attempted(server: RedisServer) -> None:
    async with published(server) as (boxes, _):
        records = [record(TOPIC, f"m{n}", "k") for n in range(1500)]
        await server.command("CONFIG", "SET", "maxmemory", 1)
        try:
            results = await boxes.publish(records, 30)
        finally:
            await server.command("CONFIG", "SET", "maxmemory", 0)
        assert isinstance(results[0], BufferFull)
        assert all(isinstance(result, NotAttempted) for result in results[1:])


async def test_what_may_wait_to_be_published_is_bounded(server: RedisServer) -> None:
    async with published(server) as (boxes, _):
        server.freeze()
        try:
            bodies = [record(QUEUE, f"m{n}", body=bytes(MAX_BODY)) for n in range(100)]
            waiting = [asyncio.ensure_future(boxes.publish([body], 0.5)) for body in bodies]
            results = [(await task)[0] for task in waiting]
        finally:
            server.thaw()
        refused = [result for result in results if isinstance(result, BufferFull)]
        assert len(refused) in range(30, 40)
        while not isinstance((await boxes.publish([record(QUEUE, "after")], 10))[0], Receipt):
            await asyncio.sleep(0.01)
