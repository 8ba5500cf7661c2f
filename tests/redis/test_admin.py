"""What an administrator asks for: what exists, what is in it, and moving or removing it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest

from brokerkit.address import Address, AnyQueue, Queue, Topic, redrive_queue
from brokerkit.driver import Receipt, Record, Source, StoredRecord
from brokerkit.drivers._url import Options, parse
from brokerkit.drivers.redis import _admin, _browse
from brokerkit.drivers.redis._admin import Admin
from brokerkit.drivers.redis._context import Context
from brokerkit.drivers.redis._keys import entity
from brokerkit.drivers.redis._link import Link
from brokerkit.drivers.redis._options import settings
from brokerkit.drivers.redis._publish import Outboxes
from brokerkit.drivers.redis._wake import Wakes
from brokerkit.errors import (
    BrokerError,
    BrokerUnavailable,
    BufferFull,
    CapabilityError,
    ConfigError,
    NotFound,
    PositionLost,
    SettingsMismatch,
)
from brokerkit.policy import Start
from tests.servers import FLAVORS, Flavor, Proxy, RedisServer, shared

pytestmark = pytest.mark.asyncio

QUEUE = Queue("emails", bytes, priorities=3, dedup=1.5, lease=7)
TOPIC = Topic("orders", bytes, partitions=4, retention=3600)
GROUP = "billing"
LETTERS = QUEUE.dead_letters
BURIED = TOPIC.dead_letters(GROUP)
AGAIN = redrive_queue(TOPIC, GROUP)


class Opened:
    """An administrator at a server."""

    def __init__(self, server: RedisServer, proxy: Proxy, context: Context) -> None:
        self.server = server
        self.proxy = proxy
        self.admin = Admin(context)
        self.boxes = Outboxes(context.sealed, context.process)

    async def put(self, address: Address, ids: Sequence[str], **options: Any) -> list[str]:
        """Store a record for each id; return the positions."""
        results = await self.boxes.publish([record(address, id, **options) for id in ids], 10)
        assert all(isinstance(result, Receipt) for result in results), results
        return [result.position or "" for result in results if isinstance(result, Receipt)]

    async def seen(self, address: Address, limit: int = 1000, **options: Any) -> list[StoredRecord]:
        """Browse."""
        values: dict[str, Any] = {"start": None, "after": None, **options}
        return list(await self.admin.browse(address, limit=limit, **values))

    async def ids(self, address: Address, **options: Any) -> list[str]:
        """Browse, and return the ids."""
        return [stored.record.id for stored in await self.seen(address, **options)]

    async def keys(self) -> list[str]:
        """Return all keys but those that end by themselves."""
        keys = [key.decode() for key in await self.server.command("KEYS", "*")]
        return sorted(key for key in keys if ":p:" not in key)

    async def take(self, session: str, seqs: Sequence[int], queue: AnyQueue = QUEUE, *, dead: bool = False) -> None:
        """Put messages in flight, as a consumer does."""
        key = entity(queue.name).decode()
        for seq in seqs:
            element = await self.server.command("LPOP", f"{key}:r0")
            assert int.from_bytes(element[:6], "big") == seq
            await self.server.command("HSET", f"{key}:h:{session}", element[:6], element)
        until = (time.time() + (-1 if dead else 60)) * 1000
        await self.server.command("ZADD", f"{key}:n", int(until), session)


def record(address: Address, id: str, **options: Any) -> Record:
    return Record(address, id, options.pop("body", b"body"), timestamp=options.pop("timestamp", 1e9), **options)


@asynccontextmanager
async def opened(server: RedisServer) -> AsyncIterator[Opened]:
    server.clear()
    async with Proxy(server.host, server.port) as proxy:
        made = settings(parse(server.url(port=proxy.port)), Options({}, "redis://"))
        link = Link(made)
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        running = asyncio.ensure_future(link.run(started))
        await started
        found = Opened(server, proxy, Context(link, link, Wakes(made), b"process", made, lambda _: None, {}))
        try:
            yield found
        finally:
            found.boxes.close()
            running.cancel()
            await asyncio.wait([running])


@pytest.fixture(params=FLAVORS)
def flavor(request: pytest.FixtureRequest) -> Flavor:
    found: Flavor = request.param
    return found


# ---------------------------------------------------------------------- declare, describe, delete


@pytest.mark.parametrize("address", [QUEUE, TOPIC, LETTERS, AGAIN], ids=repr)
async def test_what_is_declared_is_described(flavor: Flavor, address: Address) -> None:
    async with opened(shared(flavor)) as r:
        assert await r.admin.describe(address) is None
        await r.admin.declare(address)
        described = await r.admin.describe(address)
        assert described == {name: getattr(address, name) for name in described or ()}
        await r.admin.declare(address)
        assert await r.admin.describe(address) == described


async def test_a_name_is_one_kind_of_address(flavor: Flavor) -> None:
    other = Topic(QUEUE.name, bytes)
    async with opened(shared(flavor)) as r:
        await r.admin.declare(QUEUE)
        await r.put(QUEUE, ["m"])
        for refused in (
            r.admin.declare(other),
            r.admin.describe(other),
            r.admin.delete(other, None),
            r.admin.browse(other, limit=1, start=None, after=None),
            r.admin.backlog(Source(other, GROUP)),
        ):
            with pytest.raises(SettingsMismatch, match="emails"):
                await refused
        assert await r.ids(QUEUE) == ["m"]


async def test_what_does_not_exist_is_not_found_by_its_name(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        for missing in (
            r.admin.browse(QUEUE, limit=1, start=None, after=None),
            r.admin.browse(TOPIC, limit=1, start=None, after=None),
            r.admin.browse(LETTERS, limit=1, start=None, after=None),
            r.admin.backlog(Source(QUEUE)),
            r.admin.backlog(Source(TOPIC)),
            r.admin.backlog(Source(TOPIC, GROUP)),
            r.admin.backlog(Source(LETTERS)),
            r.admin.backlog(Source(AGAIN)),
            r.admin.purge(QUEUE),
            r.admin.purge(LETTERS),
            r.admin.seek(Source(TOPIC, GROUP, Start.EARLIEST)),
        ):
            with pytest.raises(NotFound, match=r"emails|orders"):
                await missing
        assert await r.keys() == []


async def test_no_letters_yet_is_an_empty_address(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        await r.admin.declare(TOPIC)
        assert await r.seen(BURIED) == []
        found = await r.admin.backlog(Source(BURIED))
        assert (found.waiting, found.dead, found.oldest_age) == (0, None, None)
        assert await r.admin.purge(BURIED) == 0


async def test_deleting_leaves_nothing_behind(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        for address in (QUEUE, TOPIC, Queue("emails-too", bytes)):
            await r.admin.declare(address)
        await r.put(QUEUE, ["a", "b"])
        await r.put(QUEUE, ["c"], delay=60)
        await r.put(QUEUE, ["d"], deliveries=2)
        await r.put(LETTERS, ["e"])
        await r.take("one", [1])
        await r.server.command("ZADD", "bk:{emails}:w", 1, "process/one")
        await r.put(TOPIC, ["a"])
        await r.admin.seek(Source(TOPIC, GROUP, Start.EARLIEST))
        await r.put(BURIED, ["b"])
        await r.put(AGAIN, ["c"])
        await r.admin.delete(QUEUE, None)
        assert {key.partition("}")[0] for key in await r.keys()} == {"bk:{emails-too", "bk:{orders"}
        await r.admin.delete(TOPIC, None)
        assert {key.partition("}")[0] for key in await r.keys()} == {"bk:{emails-too"}
        await r.admin.delete(TOPIC, None)
        await r.admin.declare(QUEUE)
        assert await r.ids(QUEUE) == await r.ids(LETTERS) == []


@pytest.mark.parametrize("what", ["delete", "purge"])
async def test_a_late_copy_of_a_call_spares_what_has_come_since(
    flavor: Flavor, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bytes of a connection that was given up may arrive after they were sent again on the next one."""
    monkeypatch.setattr(_admin, "_once", lambda key: key + b":p:this-call")
    async with opened(shared(flavor)) as r:

        async def call() -> object:
            return await (r.admin.purge(QUEUE) if what == "purge" else r.admin.delete(QUEUE, None))

        await r.admin.declare(QUEUE)
        await r.put(QUEUE, ["old"])
        first = await call()
        await r.admin.declare(QUEUE)
        await r.put(QUEUE, ["new"])
        assert await call() == first
        assert await r.ids(QUEUE) == ["new"]


async def test_deleting_a_group_leaves_the_others(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        await r.admin.declare(TOPIC)
        await r.put(TOPIC, ["a"])
        for group in (GROUP, "other"):
            await r.admin.seek(Source(TOPIC, group, Start.EARLIEST))
            await r.put(TOPIC.dead_letters(group), [group])
            await r.put(redrive_queue(TOPIC, group), [group])
        await r.admin.delete(TOPIC, GROUP)
        left = await r.keys()
        assert not [key for key in left if GROUP in key]
        assert set(await r.server.command("SMEMBERS", "bk:{orders}:gs")) == {b"other"}
        assert await r.ids(TOPIC.dead_letters("other")) == await r.ids(redrive_queue(TOPIC, "other")) == ["other"]
        assert await r.ids(TOPIC) == ["a"]
        with pytest.raises(ConfigError, match="no groups"):
            await r.admin.delete(QUEUE, GROUP)


async def test_who_reads_is_told_of_a_deletion(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        await r.admin.declare(QUEUE)
        await r.admin.declare(TOPIC)
        wakes = Wakes(settings(parse(r.server.url()), Options({}, "redis://")))
        heard: list[bytes] = []
        async with asyncio.timeout(10), anyio.create_task_group() as tasks:
            tasks.start_soon(wakes.run)
            while wakes.problem is not None:
                await asyncio.sleep(0.01)
            for channel in (b"bk:{emails}:c:process", b"bk:{orders}:c"):
                await wakes.subscribe(channel, heard.append)
            await r.server.command("ZADD", "bk:{emails}:w", 1, "process/one")
            await r.admin.seek(Source(TOPIC, GROUP, Start.EARLIEST))
            await r.admin.delete(QUEUE, None)
            await r.admin.delete(TOPIC, None)
            while not set(heard) >= {b"one", b"g billing", b"0 1 2 3"}:
                await asyncio.sleep(0.01)
            tasks.cancel_scope.cancel()


# ---------------------------------------------------------------------- browsing


async def test_a_queue_is_browsed_by_its_numbers_whatever_list_a_message_is_in(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        await r.admin.declare(QUEUE)
        await r.put(QUEUE, ["flying", "dead"])
        await r.put(QUEUE, ["high"], priority=2)
        await r.put(QUEUE, ["late"], delay=60)
        await r.put(QUEUE, ["suspect"], deliveries=4)
        await r.put(QUEUE, ["gone"], ttl=0.001)
        await r.put(QUEUE, ["low"], attempts=3, headers=(("a", b"1"),))
        await r.take("one", [1])
        await r.take("two", [2], dead=True)
        await asyncio.sleep(0.01)
        seen = await r.seen(QUEUE)
        assert [stored.record.id for stored in seen] == ["flying", "dead", "high", "late", "suspect", "low"]
        assert [stored.deliveries for stored in seen] == [1, 1, 0, 0, 4, 0]
        assert [stored.position for stored in seen] == [f"emails@{n}" for n in (1, 2, 3, 4, 5, 7)]
        assert (seen[2].record.priority, seen[5].record.attempts, seen[5].record.headers) == (2, 3, (("a", b"1"),))
        for first in range(len(seen)):
            after = seen[first].position
            assert await r.ids(QUEUE, after=after, limit=2) == [s.record.id for s in seen[first + 1 : first + 3]]


@pytest.mark.parametrize("ahead", [0, 30, 1000])
async def test_a_long_queue_is_browsed_in_steps(flavor: Flavor, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of order as it is where messages came back to the head of their list or out of the delayed ones."""
    for name, value in (("_LOOK", 7), ("_ROOM", 200), ("_AHEAD", ahead)):
        monkeypatch.setattr(_browse, name, value)
    names = [f"m{n:03}" for n in range(120)]
    async with opened(shared(flavor)) as r:
        await r.admin.declare(QUEUE)
        for n, name in enumerate(names):
            await r.put(QUEUE, [name], priority=n % 3, delay=60 if n % 11 == 5 else 0, body=b"x" * (n % 40))
        for _ in range(9):  # to the tail, as what was delayed
            await r.server.command("LMOVE", "bk:{emails}:r1", "bk:{emails}:r1", "LEFT", "RIGHT")
        assert await r.ids(QUEUE) == names
        assert await r.ids(QUEUE, limit=13) == names[:13]
        paged: list[str] = []
        after = None
        while page := await r.seen(QUEUE, limit=17, after=after):
            assert len(page) == min(17, 120 - len(paged))
            paged += [stored.record.id for stored in page]
            after = page[-1].position
        assert paged == names


async def test_what_was_read_ahead_is_shown_only_where_one_goes_on_at_once(
    flavor: Flavor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_LOOK", 3), ("_FRESH", 0.3)):
        monkeypatch.setattr(_browse, name, value)
    async with opened(shared(flavor)) as r:
        await r.admin.declare(QUEUE)
        await r.put(QUEUE, list("abcdef"))
        (_, last) = await r.seen(QUEUE, limit=2)
        await r.server.command("LTRIM", "bk:{emails}:r0", 0, 3)
        assert await r.ids(QUEUE) == list("abcd")
        await r.seen(QUEUE, limit=2)
        await r.server.command("LTRIM", "bk:{emails}:r0", 0, 2)
        assert await r.ids(QUEUE, limit=2, after=last.position) == list("cd")
        await r.seen(QUEUE, limit=2)
        await r.server.command("LTRIM", "bk:{emails}:r0", 0, 1)
        await asyncio.sleep(0.4)
        assert await r.ids(QUEUE, limit=2, after=last.position) == []


async def test_a_topic_is_browsed_in_the_order_of_time(flavor: Flavor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_browse, "_ROOM", 100)
    async with opened(shared(flavor)) as r:
        await r.admin.declare(TOPIC)
        names = [f"m{n:03}" for n in range(90)]
        positions: list[str] = []
        for n, name in enumerate(names):
            positions += await r.put(TOPIC, [name], key=b"%d" % (n % 7), body=b"x" * (n % 40))
        seen = await r.seen(TOPIC)
        assert sorted(stored.record.id for stored in seen) == names
        assert {stored.record.id: stored.position for stored in seen} == dict(zip(names, positions, strict=True))
        times = [int(stored.position.partition("@")[2].partition("-")[0]) for stored in seen]
        assert times == sorted(times)
        for key in range(7):
            mine = [stored.record.id for stored in seen if stored.record.key == b"%d" % key]
            assert mine == sorted(mine)
        paged: list[StoredRecord] = []
        after = None
        while page := await r.seen(TOPIC, limit=7, after=after):
            paged += page
            after = page[-1].position
        assert paged == seen


async def test_a_topic_is_browsed_from_a_place(flavor: Flavor) -> None:
    topic = Topic("t", bytes, partitions=1)
    async with opened(shared(flavor)) as r:
        await r.admin.declare(topic)
        await r.put(topic, ["a", "b"])
        await asyncio.sleep(0.01)
        server_time = await r.server.command("TIME")
        when = datetime.fromtimestamp(int(server_time[0]) + int(server_time[1]) / 1e6, UTC)
        await asyncio.sleep(0.01)
        (third, _) = await r.put(topic, ["c", "d"])
        assert await r.ids(topic, start=Start.at(when)) == ["c", "d"]
        assert await r.ids(topic, start=Start.position(third)) == ["c", "d"]
        assert await r.ids(topic, start=Start.position(third), after=third) == ["d"]
        assert await r.ids(topic, start=Start.LATEST) == []
        with pytest.raises(ConfigError, match="no position"):
            await r.ids(topic, start=Start.position("u[0]@1-1"))
        with pytest.raises(ConfigError, match="no position"):
            await r.ids(topic, after="t[*]@1-1")
        await r.server.command("XTRIM", "bk:{t}:0", "MAXLEN", 1)
        with pytest.raises(PositionLost):
            await r.ids(topic, start=Start.position(third))


async def test_letters_are_browsed_from_the_first_on(flavor: Flavor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_browse, "_ROOM", 300)
    names = [f"m{n:03}" for n in range(45)]
    async with opened(shared(flavor)) as r:
        await r.admin.declare(QUEUE)
        await r.put(LETTERS, names)
        seen = await r.seen(LETTERS)
        assert [stored.record.id for stored in seen] == names
        assert [stored.position for stored in seen] == [f"emails..dead@{n + 1}" for n in range(45)]
        assert await r.ids(LETTERS, limit=3, after=seen[9].position) == names[10:13]
        with pytest.raises(ConfigError, match="no position"):
            await r.ids(LETTERS, after="emails@3")
        with pytest.raises(CapabilityError, match="start"):
            await r.ids(LETTERS, start=Start.LATEST)


async def test_what_others_have_written_is_shown_and_named(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        await r.admin.declare(QUEUE)
        await r.admin.declare(TOPIC)
        await r.server.command(
            "RPUSH", "bk:{emails}:r0", "short", b"\0" * 5 + b"\x09" + b"\0" * 8 + b"no frame of ours"
        )
        await r.put(TOPIC, ["m"])
        await r.put(LETTERS, ["letter"])
        await r.server.command("XADD", "bk:{emails}..dead:l", "9-7", "some", "thing")
        (stored,) = await r.seen(QUEUE)
        assert (stored.position, (stored.record.body or b"")[14:]) == ("emails@9", b"no frame of ours")
        (mine, foreign) = await r.seen(LETTERS)
        assert (mine.record.id, foreign.record.body, foreign.position) == ("letter", b"some thing", "emails..dead@9-7")
        assert await r.ids(LETTERS, after=mine.position) == [foreign.record.id]
        assert await r.ids(LETTERS, after=foreign.position) == []
        results = await r.admin.redrive(LETTERS, [foreign.position], QUEUE)
        assert list(results) == [None]
        await r.server.command("DEL", "bk:{emails}")
        await r.server.command("SET", "bk:{emails}", "mine!")
        for refused in (r.admin.describe(QUEUE), r.admin.declare(QUEUE), r.ids(QUEUE), r.admin.purge(QUEUE)):
            with pytest.raises(BrokerError, match=r"bk:{emails}"):
                await refused


# ---------------------------------------------------------------------- backlog, purge


async def test_the_backlog_of_a_queue(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        await r.admin.declare(QUEUE)
        empty = await r.admin.backlog(Source(QUEUE))
        assert (empty.waiting, empty.in_flight, empty.delayed, empty.dead) == (0, 0, 0, 0)
        assert empty.oldest_age is None
        now = time.time()
        await r.put(QUEUE, ["a"], timestamp=now - 1000)
        await r.put(QUEUE, ["b", "c"], timestamp=now - 500)
        await r.put(QUEUE, ["d"], timestamp=now - 100, delay=60)
        await r.put(QUEUE, ["e"], timestamp=now - 200, deliveries=2)
        await r.put(QUEUE, ["f"], timestamp=now - 3000, priority=1, ttl=0.001)
        await r.put(QUEUE, ["g"], timestamp=now - 50, priority=1)
        await r.put(LETTERS, ["x", "y"], timestamp=now - 2000)
        await asyncio.sleep(0.01)
        found = await r.admin.backlog(Source(QUEUE))
        assert (found.waiting, found.in_flight, found.delayed, found.dead) == (6, 0, 1, 2)
        assert found.oldest_age == pytest.approx(1000, abs=5)
        await r.take("one", [1])
        found = await r.admin.backlog(Source(QUEUE))
        assert (found.waiting, found.in_flight) == (5, 1)
        assert found.oldest_age == pytest.approx(1000, abs=5)
        await r.take("two", [2], dead=True)
        found = await r.admin.backlog(Source(QUEUE))
        assert (found.waiting, found.in_flight) == (5, 1)
        letters = await r.admin.backlog(Source(LETTERS))
        assert (letters.waiting, letters.in_flight, letters.dead) == (2, 0, None)
        assert letters.oldest_age == pytest.approx(2000, abs=5)


async def test_the_backlog_of_a_group_counts_its_letters(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        await r.admin.declare(TOPIC)
        await r.put(TOPIC, ["a", "b", "c"], timestamp=time.time() - 100)
        await r.put(BURIED, ["x"])
        found = await r.admin.backlog(Source(TOPIC, GROUP))
        assert (found.waiting, found.in_flight, found.delayed, found.dead) == (3, 0, 0, 1)
        assert found.oldest_age == pytest.approx(100, abs=5)
        await r.admin.seek(Source(TOPIC, GROUP, Start.LATEST))
        assert (await r.admin.backlog(Source(TOPIC, GROUP))).waiting == 0
        assert (await r.admin.backlog(Source(TOPIC))).waiting is None


async def test_purging_removes_what_waits_and_nothing_else(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        await r.admin.declare(QUEUE)
        await r.put(QUEUE, ["flying", "b", "c"])
        await r.put(QUEUE, ["late"], delay=60)
        await r.put(QUEUE, ["suspect"], deliveries=2)
        await r.put(QUEUE, ["high"], priority=2)
        await r.put(LETTERS, ["x", "y"])
        await r.take("one", [1])
        assert await r.admin.purge(QUEUE) == 5
        assert await r.admin.purge(QUEUE) == 0
        assert await r.ids(QUEUE) == ["flying"]
        assert await r.admin.purge(LETTERS) == 2
        await r.put(LETTERS, ["z"])
        assert [stored.position for stored in await r.seen(LETTERS)] == ["emails..dead@3"]
        with pytest.raises(CapabilityError, match="other groups"):
            await r.admin.purge(TOPIC)  # type: ignore[arg-type]


async def test_a_purge_whose_answer_was_lost_tells_how_many_all_the_same(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        await r.admin.declare(QUEUE)
        await r.put(QUEUE, ["a", "b", "c"])
        r.proxy.lose_replies(1, [b"EVALSHA"])
        assert await r.admin.purge(QUEUE) == 3


# ---------------------------------------------------------------------- redriving


async def test_a_redrive_whose_answer_was_lost_moves_each_letter_once(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        await r.admin.declare(QUEUE)
        await r.put(LETTERS, ["a", "b", "c"], attempts=5, headers=(("bk-dead-reason", b"no"), ("mine", b"1")))
        positions = [stored.position for stored in await r.seen(LETTERS)]
        r.proxy.lose_replies(1, [_admin._REDRIVE.sha])
        assert list(await r.admin.redrive(LETTERS, positions, QUEUE)) == [None] * 3
        moved = await r.seen(QUEUE)
        assert [stored.record.id for stored in moved] == ["a", "b", "c"]
        assert {(stored.record.attempts, stored.record.headers) for stored in moved} == {(0, (("mine", b"1"),))}
        assert await r.seen(LETTERS) == []


async def test_many_and_large_letters_are_redriven_in_parts(flavor: Flavor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_browse, "_ROOM", 1000)
    async with opened(shared(flavor)) as r:
        await r.admin.declare(TOPIC)
        names = [f"m{n:03}" for n in range(250)]
        await r.put(BURIED, names, body=b"x" * 100)
        positions = [stored.position for stored in await r.seen(BURIED)]
        await r.server.command("XDEL", "bk:{orders}..billing..dead:l", "1-0", "60-0", "61-0", "250-0")
        asked = [*positions, positions[5], "orders..billing..dead@9999"]
        results = await r.admin.redrive(BURIED, asked, AGAIN)
        gone = [index for index, result in enumerate(results) if isinstance(result, NotFound)]
        assert gone == [0, 59, 60, 249, 250, 251]
        assert [result for result in results if result is not None and not isinstance(result, NotFound)] == []
        assert await r.ids(AGAIN) == [name for index, name in enumerate(names) if index not in gone]
        assert await r.seen(BURIED) == []


async def test_a_redrive_that_breaks_off_tells_what_it_has_moved(
    flavor: Flavor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_admin, "_MOVED_AT_ONCE", 2)
    async with opened(shared(flavor)) as r:
        await r.admin.declare(QUEUE)
        await r.put(LETTERS, ["a", "b", "c", "d", "e"])
        positions = [stored.position for stored in await r.seen(LETTERS)]
        calls = 0

        async def find(*args: Any) -> dict[str, StoredRecord]:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise BrokerUnavailable("gone")
            return await _browse.find_letters(*args)

        monkeypatch.setattr(_admin, "find_letters", find)
        results = await r.admin.redrive(LETTERS, positions, QUEUE)
        assert [type(result) for result in results] == [type(None)] * 2 + [BrokerUnavailable] * 3
        assert await r.ids(QUEUE) == ["a", "b"]
        assert await r.ids(LETTERS) == ["c", "d", "e"]


async def test_a_redrive_needs_its_queue(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        await r.admin.declare(QUEUE)
        await r.put(LETTERS, ["a"])
        with pytest.raises(NotFound, match="missing"):
            await r.admin.redrive(LETTERS, ["emails..dead@1"], Queue("missing", bytes))
        with pytest.raises(ConfigError, match="no position"):
            await r.admin.redrive(LETTERS, ["emails@1"], QUEUE)
        assert await r.ids(LETTERS) == ["a"]


async def test_a_full_server_is_still_administered(flavor: Flavor) -> None:
    with RedisServer(flavor) as full:
        async with opened(full) as r:
            await r.admin.declare(QUEUE)
            await r.put(LETTERS, ["a", "b"])
            await r.put(QUEUE, ["c"])
            await full.command("CONFIG", "SET", "maxmemory", 1)
            assert list(await r.admin.redrive(LETTERS, ["emails..dead@1"], QUEUE)) == [None]
            assert await r.ids(QUEUE) == ["c", "a"]
            assert (await r.admin.backlog(Source(QUEUE))).dead == 1
            with pytest.raises(BufferFull, match="maxmemory"):
                await r.admin.declare(Queue("new", bytes))
            assert await r.admin.purge(LETTERS) == 1
            await r.admin.delete(QUEUE, None)
            assert await r.admin.describe(QUEUE) is None


# ---------------------------------------------------------------------- moving groups


async def test_seek_stores_where_a_group_begins(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        await r.admin.declare(TOPIC)
        await r.put(TOPIC, [f"m{n}" for n in range(8)])
        await r.admin.seek(Source(TOPIC, GROUP, Start.LATEST))
        assert (await r.admin.backlog(Source(TOPIC, GROUP))).waiting == 0
        await r.admin.seek(Source(TOPIC, GROUP, Start.EARLIEST))
        assert (await r.admin.backlog(Source(TOPIC, GROUP))).waiting == 8
        await r.server.command("ZADD", "bk:{orders}:m:billing", int((time.time() + 60) * 1000), "member")
        with pytest.raises(ConfigError, match="live members"):
            await r.admin.seek(Source(TOPIC, GROUP, Start.LATEST))
        with pytest.raises(ConfigError, match="only a group"):
            await r.admin.seek(Source(TOPIC, None, Start.LATEST))
