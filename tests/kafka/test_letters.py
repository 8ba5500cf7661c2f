"""Dead letters: moving and removing them, alone and beside others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from brokerkit.address import AnyTopic, Queue
from brokerkit.driver import DEAD, Receipt, Record, Source
from brokerkit.drivers.kafka import _letters
from brokerkit.drivers.kafka._letters import Mark
from brokerkit.errors import BrokerError, BrokerUnavailable, CapabilityError, ConfigError, NotFound, PublishUnknown
from tests.servers.kafka import shared_kafka

from .administrator import Opened, named, opened

pytestmark = pytest.mark.asyncio


def url() -> str:
    return shared_kafka().url()


def outcome(results: Sequence[BrokerError | None]) -> str:
    """Return a letter for each result: moved, gone, or failed."""
    return "".join("m" if one is None else "g" if isinstance(one, NotFound) else "f" for one in results)


def log_of(r: Opened) -> AnyTopic:
    """Return the log of what is gone."""
    return r.admin._of(r.letters)._log


async def marks(r: Opened) -> list[Mark]:
    """Return what stands in the log of what is gone."""
    return [msgspec.json.decode(stored.record.body or b"", type=Mark) for stored in await r.seen(log_of(r))]


# ---------------------------------------------------------------------- moving


async def test_letters_are_moved_as_redriven_makes_them() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        positions = await r.bury(["a", "b", "c"], attempts=5, deliveries=3, key=b"k", timestamp=1.5e9)
        assert await r.admin.redrive(r.letters, positions[:2], r.again) == [None, None]
        assert await r.ids(r.letters) == ["c"]
        for stored, id in zip(await r.seen(r.again), ("a", "b"), strict=True):
            record = stored.record
            assert (record.id, record.attempts, record.deliveries, record.key) == (id, 0, 0, b"k")
            assert (record.headers, record.timestamp) == ((("a", b"1"),), 1.5e9)
            assert not [name for name, _ in record.headers if name.startswith(DEAD)]


async def test_what_is_gone_is_reported_at_its_index() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        positions = await r.bury([f"m{number}" for number in range(6)])
        assert outcome(await r.admin.redrive(r.letters, positions[2:3], r.again)) == "m"
        never = f"{r.letters.name}[0]@1-99"
        wanted = [positions[1], positions[2], never, positions[4], positions[1]]
        results = await r.admin.redrive(r.letters, wanted, r.again)
        assert outcome(results) == "mggmg"
        assert str(results[1]) == f"there is no letter {positions[2]}"
        assert str(results[4]) == f"there is no letter {positions[1]}"
        assert await r.ids(r.letters) == ["m0", "m3", "m5"]
        assert sorted(await r.ids(r.again)) == ["m1", "m2", "m4"]
        assert await r.admin.redrive(r.letters, [], r.again) == []


async def test_what_is_moved_stays_moved_for_everybody() -> None:
    topic = named()
    async with opened(url(), topic) as r:
        await r.admin.declare(topic)
        positions = await r.bury([f"m{number}" for number in range(5)])
        await r.admin.redrive(r.letters, positions[1:4:2], r.again)
        async with opened(url(), topic) as other:
            assert await other.ids(r.letters) == ["m0", "m2", "m4"]
            assert (await other.admin.backlog(Source(r.letters))).waiting == 3
            assert outcome(await other.admin.redrive(r.letters, positions, r.again)) == "mgmgm"
        assert await r.ids(r.letters) == []
        assert sorted(await r.ids(r.again)) == [f"m{number}" for number in range(5)]


async def test_many_scattered_letters_are_moved_however_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_letters, "_NEAR", 10)
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        positions = await r.bury([f"m{number:05}" for number in range(20_000)])
        wanted = [*positions[5:400:3], positions[17_000], positions[19_999], positions[12_345]]
        assert outcome(await r.admin.redrive(r.letters, wanted, r.again)) == "m" * len(wanted)
        assert (await r.admin.backlog(Source(r.letters))).waiting == 20_000 - len(wanted)
        assert outcome(await r.admin.redrive(r.letters, wanted[-3:], r.again)) == "ggg"
        left = await r.seen(r.letters, 300)
        assert not {stored.position for stored in left} & set(wanted)
        end = await r.seen(r.letters, 10, after=positions[19_990])
        assert [stored.position for stored in end] == positions[19_991:19_999]


async def test_two_processes_move_each_letter_once() -> None:
    topic = named()
    async with opened(url(), topic) as r, opened(url(), topic) as other:
        await r.admin.declare(topic)
        ids = [f"m{number:03}" for number in range(250)]
        positions = await r.bury(ids)
        both = await asyncio.gather(*(one.admin.redrive(r.letters, positions, r.again) for one in (r, other, r, other)))
        for results in zip(*(outcome(result) for result in both), strict=True):
            assert sorted(results) == ["g", "g", "g", "m"]
        assert sorted(await r.ids(r.again)) == ids
        assert await r.seen(r.letters) == await other.seen(r.letters) == []


async def test_who_claimed_first_moves_it_and_the_other_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    topic = named()
    async with opened(url(), topic) as r, opened(url(), topic) as other:
        await r.admin.declare(topic)
        positions = await r.bury(["a", "b", "c"])
        copy = r.admin._of(r.letters)._copy
        claimed, go_on = asyncio.Event(), asyncio.Event()

        async def slowly(*args: Any) -> dict[int, BrokerError | None]:
            claimed.set()
            await go_on.wait()
            return await copy(*args)

        monkeypatch.setattr(r.admin._of(r.letters), "_copy", slowly)
        first = asyncio.ensure_future(r.admin.redrive(r.letters, positions[:2], r.again))
        await claimed.wait()
        second = asyncio.ensure_future(other.admin.redrive(r.letters, positions[1:], r.again))
        while await other.ids(r.letters) != ["a", "b"]:  # the third is nobody else's
            await asyncio.sleep(0.01)
        assert not second.done()
        go_on.set()
        assert outcome(await first) == "mm"
        assert outcome(await second) == "gm"
        assert sorted(await r.ids(r.again)) == ["a", "b", "c"]


async def test_a_claim_of_a_process_that_died_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_letters, "_ALIVE", 0.5)
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        positions = await r.bury(["a"])
        letters = r.admin._of(r.letters)
        info = await r.cluster.topic(r.letters.name, timeout=5)
        loop = asyncio.get_running_loop()
        await letters._note(Mark(info.id.hex, "dead", claim=(0,)), loop.time() + 5)
        began = loop.time()
        assert outcome(await r.admin.redrive(r.letters, positions, r.again)) == "m"
        assert 0.4 < loop.time() - began < 5


async def test_a_claim_of_long_ago_is_not_waited_for() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        positions = await r.bury(["a"])
        info = await r.cluster.topic(r.letters.name, timeout=5)
        old = msgspec.json.encode(Mark(info.id.hex, "dead", claim=(0,)))
        await r.put(log_of(r), ["dead"], body=old, timestamp=1e9)
        began = asyncio.get_running_loop().time()
        assert outcome(await r.admin.redrive(r.letters, positions, r.again)) == "m"
        assert asyncio.get_running_loop().time() - began < 5


async def test_waiting_for_somebody_elses_claim_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_letters, "TIMEOUT", 3.0)
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        positions = await r.bury(["a", "b"])
        info = await r.cluster.topic(r.letters.name, timeout=5)
        await r.admin._of(r.letters)._note(
            Mark(info.id.hex, "alive", claim=(0,)), asyncio.get_running_loop().time() + 5
        )
        results = await r.admin.redrive(r.letters, positions, r.again)
        assert outcome(results) == "fm"
        assert isinstance(results[0], BrokerUnavailable)
        assert await r.ids(r.letters) == ["a"]


async def test_a_letter_that_goes_while_it_is_claimed_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    topic = named()
    async with opened(url(), topic) as r, opened(url(), topic) as other:
        await r.admin.declare(topic)
        positions = await r.bury(["a", "b"])
        letters = r.admin._of(r.letters)
        note = letters._note

        async def late(mark: Mark, until: float) -> int:
            if mark.claim is not None:
                assert outcome(await other.admin.redrive(r.letters, positions[:1], r.again)) == "m"
            return await note(mark, until)

        monkeypatch.setattr(letters, "_note", late)
        assert outcome(await r.admin.redrive(r.letters, positions, r.again)) == "gm"
        assert sorted(await r.ids(r.again)) == ["a", "b"]


@pytest.mark.parametrize("error", [PublishUnknown("no answer"), NotFound("the queue is missing")], ids=repr)
async def test_a_letter_that_cannot_be_stored_stays(error: BrokerError) -> None:
    topic = named()
    async with opened(url(), topic) as r, opened(url(), topic) as other:
        await r.admin.declare(r.topic)
        positions = await r.bury(["a", "b", "c"])
        publish = r.context.outboxes.publish

        async def failing(records: Sequence[Record], timeout: float) -> list[Receipt | BrokerError]:
            if records[0].address != r.again:
                return await publish(records, timeout)
            good = [record for record in records if record.id != "b"]
            stored = iter(await publish(good, timeout))
            return [error if record.id == "b" else next(stored) for record in records]

        letters = r.admin._of(r.letters)
        letters._outboxes = type("Failing", (), {"publish": staticmethod(failing), "copy": staticmethod(failing)})()
        results = await r.admin.redrive(r.letters, positions, r.again)
        assert outcome(results) == "mfm"
        assert str(error) in str(results[1])
        assert await r.ids(r.letters) == ["b"]
        began = asyncio.get_running_loop().time()
        assert outcome(await other.admin.redrive(r.letters, positions, r.again)) == "gmg"
        assert asyncio.get_running_loop().time() - began < 10  # the claim has ended


async def test_a_redrive_that_cannot_be_noted_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        positions = await r.bury(["a"])
        letters = r.admin._of(r.letters)
        note = letters._note

        async def lost(mark: Mark, until: float) -> int:
            if mark.gone is not None:
                raise BrokerUnavailable("cut off")
            return await note(mark, until)

        monkeypatch.setattr(letters, "_note", lost)
        (result,) = await r.admin.redrive(r.letters, positions, r.again)
        assert isinstance(result, BrokerUnavailable)
        assert await r.ids(r.letters) == ["a"]  # never the other way round: a copy more, and none lost
        assert await r.ids(r.again) == ["a"]


async def test_large_letters_are_moved_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_letters, "_ROOM", 1_000_000)
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        positions = await r.bury([f"m{number}" for number in range(8)], body=bytes(600_000))
        assert outcome(await r.admin.redrive(r.letters, positions, r.again)) == "m" * 8
        assert sorted(await r.ids(r.again)) == [f"m{number}" for number in range(8)]


async def test_letters_go_to_redrive_queues_only() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        positions = await r.bury(["a"])
        with pytest.raises(NotFound, match="missing"):
            await r.admin.redrive(r.letters, positions, Queue(f"{r.topic.name}.missing", bytes))
        with pytest.raises(CapabilityError, match="private queue"):
            await r.admin.redrive(r.letters, positions, Queue(r.topic.name, bytes))
        with pytest.raises(ConfigError, match="no position"):
            await r.admin.redrive(r.letters, [*positions, "x"], r.again)
        assert await r.ids(r.letters) == ["a"]


async def test_letters_of_a_topic_that_died_of_nothing_yet_are_not_found() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        with pytest.raises(NotFound):
            await r.admin.redrive(r.letters, [f"{r.letters.name}[0]@1-0"], r.again)


# ---------------------------------------------------------------------- removing


async def test_purging_removes_what_is_there_and_tells_how_many() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        assert await r.admin.purge(r.letters) == 0
        positions = await r.bury(["a", "b", "c"])
        await r.admin.redrive(r.letters, positions[1:2], r.again)
        assert await r.admin.purge(r.letters) == 2
        assert await r.admin.purge(r.letters) == 0
        assert await r.seen(r.letters) == []
        with shared_kafka().wire() as wire:
            assert wire.offset(r.letters.name, 0, end=False) == 3
        assert outcome(await r.admin.redrive(r.letters, positions, r.again)) == "ggg"
        assert await r.ids(r.again) == ["b"]
        await r.bury(["d"])
        assert await r.ids(r.letters) == ["d"]
        for address in (r.topic, r.again):
            with pytest.raises((CapabilityError, NotFound)):
                await r.admin.purge(address)  # type: ignore[arg-type]


async def test_what_is_gone_altogether_leaves_the_disk() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        positions = await r.bury(["a", "b"])
        await r.admin.redrive(r.letters, positions[1:], r.again)
        assert [bool(mark.claim) for mark in await marks(r)] == [True, False]
        await r.admin.redrive(r.letters, positions[:1], r.again)
        with shared_kafka().wire() as wire:
            assert wire.offset(r.letters.name, 0, end=False) == 2
        assert await marks(r) == []
        (position,) = await r.bury(["c"])
        assert await r.ids(r.letters) == ["c"]
        assert outcome(await r.admin.redrive(r.letters, [position], r.again)) == "m"


async def test_a_long_beginning_that_is_gone_leaves_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_letters, "_CUT", 10)
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        positions = await r.bury([f"m{number:02}" for number in range(40)])
        await r.admin.redrive(r.letters, [*positions[:12], positions[20]], r.again)
        with shared_kafka().wire() as wire:
            assert wire.offset(r.letters.name, 0, end=False) == 12
        assert len(await r.seen(r.letters)) == 27
        assert (await r.admin.backlog(Source(r.letters))).waiting == 27


async def test_what_is_noted_of_an_earlier_topic_does_not_count() -> None:
    topic = named()
    async with opened(url(), topic) as r, opened(url(), topic) as other:
        await r.admin.declare(topic)
        positions = await r.bury(["a", "b", "c"])
        await r.admin.redrive(r.letters, positions[:2], r.again)
        assert await other.ids(r.letters) == ["c"]
        with shared_kafka().wire() as wire:
            wire.delete([r.letters.name])  # as an operator would, without the log beside it
        while await r.admin.describe(r.letters) is not None:
            await asyncio.sleep(0.01)
        await r.bury(["x", "y"])
        assert await r.ids(r.letters) == await other.ids(r.letters) == ["x", "y"]
        assert (await other.admin.backlog(Source(r.letters))).waiting == 2


async def test_what_others_write_into_the_log_is_passed_over() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        positions = await r.bury(["a", "b"])
        for body in (b"", b"{}", b"\xff", b'{"of": 1}', None):
            await r.put(log_of(r), ["x"], body=body)
        assert outcome(await r.admin.redrive(r.letters, positions[:1], r.again)) == "m"
        assert await r.ids(r.letters) == ["b"]


async def test_only_so_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_letters, "_MOST", 3)
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        for number in range(6):
            assert (await r.admin.backlog(Source(r.topic, f"g{number}"))).dead == 0
        assert list(r.admin._letters) == [f"{r.topic.name}..g{number}..dead" for number in (3, 4, 5)]
