"""Looking at what is stored, and redriving dead letters."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from brokerkit.address import Queue, Topic
from brokerkit.driver import StoredRecord
from brokerkit.drivers.redis import _admin, _browse
from brokerkit.errors import (
    BrokerError,
    BrokerUnavailable,
    CapabilityError,
    ConfigError,
    NotFound,
    PositionLost,
)
from brokerkit.policy import Start
from tests.servers import FLAVORS, Flavor, shared

from .administrator import AGAIN, BURIED, LETTERS, QUEUE, TOPIC, opened

pytestmark = pytest.mark.asyncio


@pytest.fixture(params=FLAVORS)
def flavor(request: pytest.FixtureRequest) -> Flavor:
    found: Flavor = request.param
    return found


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


async def test_a_letter_keeps_its_priority(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        await r.admin.declare(QUEUE)
        await r.put(LETTERS, ["a"], priority=2)
        await r.admin.redrive(LETTERS, ["emails..dead@1"], QUEUE)
        assert [stored.record.priority for stored in await r.seen(QUEUE)] == [2]


async def test_a_redrive_needs_its_queue(flavor: Flavor) -> None:
    async with opened(shared(flavor)) as r:
        await r.admin.declare(QUEUE)
        await r.put(LETTERS, ["a"])
        with pytest.raises(NotFound, match="missing"):
            await r.admin.redrive(LETTERS, ["emails..dead@1"], Queue("missing", bytes))
        with pytest.raises(ConfigError, match="no position"):
            await r.admin.redrive(LETTERS, ["emails@1"], QUEUE)
        assert await r.ids(LETTERS) == ["a"]
