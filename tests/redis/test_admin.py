"""What exists, how much is left to do, and moving or removing it."""

from __future__ import annotations

import asyncio
import time

import anyio
import pytest

from brokerkit.address import Address, Queue, Topic, redrive_queue
from brokerkit.driver import Source
from brokerkit.drivers._url import Options, parse
from brokerkit.drivers.redis import _admin
from brokerkit.drivers.redis._options import settings
from brokerkit.drivers.redis._wake import Wakes
from brokerkit.errors import CapabilityError, ConfigError, NotFound, SettingsMismatch
from brokerkit.policy import Start
from tests.servers import FLAVORS, Flavor, RedisServer, shared

from .administrator import AGAIN, BURIED, GROUP, LETTERS, QUEUE, TOPIC, opened

pytestmark = pytest.mark.asyncio


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


async def test_settings_are_told_to_the_last_digit(flavor: Flavor) -> None:
    queue = Queue("q", bytes, lease=0.1 + 0.2 + 5, dedup=1 / 3)
    topic = Topic("t", bytes, retention=None)
    async with opened(shared(flavor)) as r:
        await r.admin.declare(queue)
        await r.admin.declare(topic)
        assert await r.admin.describe(queue) == {"priorities": 1, "dedup": 1 / 3, "lease": 0.1 + 0.2 + 5}
        assert await r.admin.describe(topic) == {"partitions": 8, "retention": None}


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


async def test_nobody_is_told_to_declare_what_is_derived(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        with pytest.raises(NotFound, match=r"declare it$"):
            await r.admin.backlog(Source(QUEUE))
        with pytest.raises(NotFound, match=r"orders..billing..dead.* does not exist on \S+$"):
            await r.admin.backlog(Source(BURIED))


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
            for channel in (b"bk:{emails}:c:process", b"bk:{orders}:c", b"bk:{orders}:c:3"):
                await wakes.subscribe(channel, heard.append)
            await r.server.command("ZADD", "bk:{emails}:w", 1, "process/one")
            await r.admin.seek(Source(TOPIC, GROUP, Start.EARLIEST))
            await r.admin.delete(QUEUE, None)
            await r.admin.delete(TOPIC, None)
            while not set(heard) >= {b"one", b"g billing", b""}:
                await asyncio.sleep(0.01)
            tasks.cancel_scope.cancel()


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
            await r.admin.declare(Queue("new", bytes))
            assert await r.admin.describe(Queue("new", bytes)) is not None
            assert await r.admin.purge(LETTERS) == 1
            await r.admin.delete(QUEUE, None)
            assert await r.admin.describe(QUEUE) is None
