"""Bindings of queues to exchanges, which all processes know, and which come and go."""

from __future__ import annotations

from typing import Any

import pytest

from brokerkit.celery import _bindings, _follower

from .channels import Place, eventually, eventually_table, plain, taken

pytestmark = pytest.mark.asyncio


async def test_a_queue_that_another_process_has_deleted_is_bound_again_when_it_is_declared_again(place: Place) -> None:
    async with place.process() as process, place.process() as other:
        for n in range(2):  # the second time it knows by what it follows
            await process.exchanges.declare("q", process)
            await process.exchanges.bind("q", "x", "direct", "k")
            await process.exchanges.publish(plain(f"{n} before", "x", "k"))
            assert await taken(await other.channel("q"), 1) == [f"{n} before"]
            await other.channels.pop().intake.close()
            await other.exchanges.delete("q")
            await eventually_table(process.exchanges, "x", {})
            await process.exchanges.restore("q")
            await process.exchanges.bind("q", "x", "direct", "k")
            await process.exchanges.publish(plain(f"{n} after", "x", "k"))
            assert await taken(await other.channel("q"), 1) == [f"{n} after"]
            await other.channels.pop().intake.close()


async def test_a_binding_that_another_process_takes_back_at_once_is_made_again(place: Place) -> None:
    """What was read a moment ago is not believed by who binds once more."""
    async with place.process() as process, place.process() as other:
        await process.exchanges.declare("q", process)
        await process.exchanges.bind("q", "x", "direct", "k")
        await other.exchanges.unbind("q", "x", "k")
        await process.exchanges.bind("q", "x", "direct", "k")
        async with place.process() as producer:
            assert [queue for _, _, queue in await producer.exchanges.table("x")] == ["q"]


async def test_what_was_unbound_on_purpose_is_not_bound_again_by_who_reads_all_anew(here: Place) -> None:
    async with here.process() as process, here.process() as other:
        await process.exchanges.declare("q", process)
        await process.exchanges.bind("q", "x", "direct", "k")
        await other.exchanges.unbind("q", "x", "k")
        bindings = process.exchanges._bindings
        await bindings.ready()  # which stores again what was lost
        assert bindings.of_exchange("x") == []
        async with here.process() as producer:
            assert await producer.exchanges.table("x") == []


async def test_no_queue_is_without_its_binding_while_all_are_read_anew(
    here: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was unbound and bound again, so that one of the records in between says that it is not bound."""
    monkeypatch.setattr(_follower, "AHEAD", 1)
    async with here.process() as process:
        bindings = process.exchanges._bindings
        await process.exchanges.declare("q", process)
        for _ in range(3):
            await process.exchanges.bind("q", "x", "direct", "k")
            await process.exchanges.unbind("q", "x", "k")
        await process.exchanges.bind("q", "x", "direct", "k")
        seen: list[object] = []
        real = _bindings._Reading.take

        def take(self: Any, messages: Any) -> None:
            real(self, messages)
            seen.append(bindings.route("x", "k"))

        monkeypatch.setattr(_bindings._Reading, "take", take)
        await bindings.close()
        await bindings.ready()
        assert len(seen) >= 7
        assert set(seen) == {("q",)}


async def test_bindings_that_are_lost_are_stored_again_by_who_made_them(here: Place) -> None:
    async with here.process() as process, here.process() as other:
        await process.exchanges.declare("q", process)
        await process.exchanges.bind("q", "x", "direct", "k")
        await process.broker.delete(process.exchanges.names.bindings)
        process.exchanges._bindings._read_at = 0
        await process.exchanges.bind("q", "x", "direct", "k")
        await eventually_table(other.exchanges, "x", {"k": "q"})


async def test_what_was_heard_while_all_was_read_is_not_forgotten(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read may be older than what came meanwhile to who follows."""
    async with here.process() as process, here.process() as other:
        bindings = process.exchanges._bindings
        await bindings.ready()
        await other.exchanges.declare("q", other)
        real = _follower.Follower.read_stored

        async def read_stored(follower: _follower.Follower) -> None:
            await real(follower)
            monkeypatch.setattr(_follower.Follower, "read_stored", real)
            await other.exchanges.unbind("q", "x", "k")
            await eventually(lambda: bindings._heard == 2)
            assert not bindings.of_exchange("x")

        await other.exchanges.bind("q", "x", "direct", "k")
        await eventually(lambda: bindings._heard == 1)
        monkeypatch.setattr(_follower.Follower, "read_stored", read_stored)
        await bindings.look()
        assert not bindings.of_exchange("x")
