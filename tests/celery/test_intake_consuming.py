"""One channel: beginning, ending, and asking for single messages."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from brokerkit.celery import _intake, _revokes
from brokerkit.celery._envelope import unseal
from brokerkit.celery._feed import Feed
from brokerkit.celery._item import Item
from brokerkit.errors import BrokerUnavailable, NotFound

from .channels import Place, Process, at, bodies, body_of, eventually, left, message, plain, redelivered

pytestmark = pytest.mark.asyncio


async def test_a_cancelled_queue_delivers_nothing_and_can_be_settled(place: Place) -> None:
    async with place.process() as process, place.process() as other:
        channel = await process.channel("q", "other", prefetch=2)
        await process.put("q", *"abcd")
        held = await channel.take(2)
        await channel.intake.cancel("q")
        await process.put("other", "still")
        channel.intake.ack(held[:1])
        assert bodies(await channel.take(1)) == ["still"]
        await channel.nothing()
        channel.intake.ack(held[1:])
        await eventually(lambda: list(channel.intake._feeds) == ["other"])
        idle = await other.channel("q")
        assert bodies(held + await idle.take(2)) == list("abcd")
        await idle.nothing()


async def test_a_queue_that_was_cancelled_can_be_consumed_again(place: Place) -> None:
    async with place.process() as process:
        channel = await process.channel("q", prefetch=1)
        await process.put("q", "a", "b")
        held = await channel.take(1)
        await channel.intake.cancel("q")
        await channel.intake.consume("q")  # while something of it is in hand
        channel.intake.ack(held)
        held += await channel.take(1)
        channel.intake.ack(held[1:])
        await channel.intake.cancel("q")
        await channel.intake.consume("q")
        await process.put("q", "c")
        assert bodies(held + await channel.take(1)) == ["a", "b", "c"]


async def test_a_queue_may_be_cancelled_while_it_begins(place: Place) -> None:
    async with place.process() as process, place.process() as other:
        await process.put("q", "a")
        channel = await process.channel()
        for turns in range(12):
            beginning = asyncio.ensure_future(channel.intake.consume("q"))
            for _ in range(turns):
                await asyncio.sleep(0)
            await channel.intake.cancel("q")
            await beginning
            channel.intake.release(await channel.take(channel.count))  # as the synchronous side does
        assert bodies(await (await other.channel("q")).take(1)) == ["a"]
        assert channel.count == 0


async def test_a_closed_channel_gives_back_what_it_had_marked(place: Place) -> None:
    async with place.process() as process, place.process() as other:
        channel = await process.channel("q", prefetch=3)
        await process.put("q", *"abcde")
        held = await channel.take(3)
        channel.intake.release(held[2:])  # what the synchronous side has not handed over
        await channel.intake.close()
        got = await (await other.channel("q")).take(5)
        assert bodies(got) == list("abcde")
        assert {body_of(item) for item in got if redelivered(item)} == {body_of(item) for item in held[:2]}
        await channel.intake.close()


async def test_closing_marks_only_what_a_worker_has_begun(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_revokes.Revokes, "begun", lambda _: {"a"})
    async with here.process() as process, here.process() as other:
        channel = await process.channel("q")
        await process.put("q", "a", "b")
        await channel.take(2)
        await channel.intake.close()
        got = await (await other.channel("q")).take(2)
        assert {body_of(item): redelivered(item) for item in got} == {"a": True, "b": False}


async def test_who_does_not_acknowledge_gets_each_message_once(place: Place) -> None:
    async with place.process() as process, place.process() as other:
        channel = await process.channel()
        channel.intake.prefetch(2)
        await channel.intake.consume("q", no_ack=True)
        await process.put("q", "a", "b", "c")
        items = await channel.take(2)
        channel.intake.ack(items)  # as Kombu's side does when its consumer has them
        more = await channel.take(1)
        channel.intake.ack(more)
        assert all(item.no_ack for item in (*items, *more))
        assert bodies([*items, *more]) == ["a", "b", "c"]
        await channel.intake.close()
        assert await left(other, "q") == []


async def test_what_comes_for_who_does_not_acknowledge_is_kept_until_it_is_taken(place: Place) -> None:
    async with place.process() as process, place.process() as other:
        channel = await process.channel()
        await channel.intake.consume("q", no_ack=True)
        await process.put("q", "a", "b", "c")
        first, *rest = await channel.take(3)
        channel.intake.ack([first])
        channel.intake.release(rest)
        await channel.intake.close()
        assert len(await left(other, "q")) == 2


async def test_one_message_at_a_time(place: Place) -> None:
    async with place.process() as process:
        channel = await process.channel()
        assert await channel.intake.get("q") is None
        await process.put("q", "a", "b", "c")
        one = await channel.intake.get("q")
        two = await channel.intake.get("q", no_ack=True)
        assert one is not None
        assert two is not None
        channel.intake.ack([one])
        other = await process.channel("q")
        (three,) = await other.take(1)
        assert bodies([one, two, three]) == ["a", "b", "c"]
        other.intake.ack([three])
        assert await channel.intake.get("q") is None


async def test_a_message_that_comes_while_the_size_is_asked_for_is_fetched(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size knows nothing of what is in the hands of this process."""
    async with place.process() as process:
        channel = await process.channel()

        async def size(queue: str) -> int:
            await process.put(queue, "a")
            feed = channel.intake._getting._feeds[queue]
            subscription = feed._subscription
            assert subscription is not None
            await eventually(lambda: subscription.intake.ready)
            return 0

        monkeypatch.setattr(process.exchanges, "size", size)
        item = await channel.intake.get("q")
        assert item is not None
        assert body_of(item) == "a"


async def test_who_asks_while_the_queue_is_left_asks_again(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async with here.process() as process:
        channel = await process.channel()
        await process.put("q", "a")
        answers = [True, True, True]
        monkeypatch.setattr(Feed, "left", property(lambda _: bool(answers) and answers.pop()))
        item = await channel.intake.get("q")
        assert item is not None
        assert body_of(item) == "a"


async def test_one_message_of_a_mailbox(here: Place) -> None:
    async with here.process() as process:
        channel = await process.channel()
        await process.exchanges.declare("box", channel.intake, exclusive=True)
        await process.exchanges.publish(plain("a", "", "box"))
        box = process.exchanges.boxes.get("box")
        assert box is not None
        await eventually(lambda: len(box))
        item = await channel.intake.get("box")
        assert item is not None
        assert body_of(item) == "a"
        assert await channel.intake.get("box") is None


async def test_a_queue_that_others_delete_is_made_anew_and_read_on(place: Place) -> None:
    async with place.process() as process, place.process() as other:
        channel = await process.channel("q", prefetch=2)
        await process.put("q", "a")
        (running,) = await channel.take(1)
        await other.exchanges.delete("q")
        await eventually_exists(process, "q")
        await process.put("q", "b")
        (item,) = await channel.take(1)
        assert body_of(item) == "b"
        channel.intake.ack([item, running])  # one of them was deleted with its queue
        await process.put("q", "c", "d")
        assert sorted(bodies(await channel.take(2))) == ["c", "d"]
        assert not channel.failures


async def eventually_exists(process: Process, queue: str) -> None:
    async with asyncio.timeout(30):
        while not await process.exchanges.exists(queue):
            await asyncio.sleep(0.02)


async def test_a_queue_that_is_deleted_here_is_not_made_anew(here: Place) -> None:
    async with here.process() as process:
        channel = await process.channel("q")
        await process.exchanges.delete("q")
        await eventually(lambda: channel.failures)
        assert isinstance(channel.failures[0], NotFound)
        await channel.intake.consume("q")
        await process.put("q", "a")
        assert bodies(await channel.take(1)) == ["a"]


async def test_what_fails_to_be_read_is_a_dead_letter_and_what_is_behind_it_comes(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(body: bytes) -> Any:
        if b"bad" in body:
            raise RuntimeError("of another kind than expected")
        return unseal(body)

    monkeypatch.setattr("brokerkit.celery._intake.unseal", fails)
    async with place.process() as process:
        channel = await process.channel("q", prefetch=1)
        await process.put("q", "bad", "good")
        (item,) = await channel.take(1)
        assert body_of(item) == "good"
        channel.intake.ack([item])
        await process.put("one", "bad", "good")
        got = await channel.intake.get("one")
        assert got is not None
        assert body_of(got) == "good"
        channel.intake.ack([got])
        await channel.intake.close()
        assert len(await process.letters("q")) == len(await process.letters("one")) == 1
    assert sum("cannot be read" in record.getMessage() for record in caplog.records) == 2


async def test_a_queue_that_is_not_read_any_more_is_told(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: object) -> None:
        raise RuntimeError("a mistake")

    async with here.process() as process:
        channel = await process.channel("q")
        monkeypatch.setattr(channel.intake, "_take", fails)
        await process.put("q", "a")
        await eventually(lambda: channel.failures)
        (failure,) = channel.failures
        assert isinstance(failure, BrokerUnavailable)  # so the worker connects again
        assert bodies(await (await process.channel("q")).take(1)) == ["a"]


@pytest.mark.parametrize("priority", [float("inf"), "x", None, 10**40])
async def test_a_priority_that_is_none_is_the_lowest(here: Place, priority: Any) -> None:
    async with here.process(eta_window=0.1) as process:
        channel = await process.channel("q")
        text = json.dumps({**message("a", task="add", id="1", eta=at(0.5)), "properties": {"priority": priority}})
        body = text.replace("Infinity", "1e999").encode()
        await process.broker.publish(process.exchanges.names.queue("q"), body)  # by somebody else, and without a delay
        assert bodies(await channel.take(1)) == ["a"]


async def test_messages_of_many_queues_all_come(place: Place) -> None:
    async with place.process() as process:
        queues = [f"queue-{n}" for n in range(6)]
        channel = await process.channel(*queues, prefetch=8)
        await asyncio.gather(*(process.put(queue, *(f"{queue} {n}" for n in range(50))) for queue in queues))
        seen: list[Any] = []
        while len(seen) < 300:
            items: list[Item] = await channel.take(max(1, channel.count))
            assert len(items) <= 8
            seen += bodies(items)
            channel.intake.ack(items)
        assert len(set(seen)) == len(seen) == 300
        await channel.nothing()


async def test_a_channel_says_what_it_reads(here: Place) -> None:
    async with here.process() as process:
        assert repr((await process.channel("q", prefetch=3)).intake) == "<Intake ['q'] out=0 of 3>"


async def test_tasks_that_are_not_due_use_up_no_credit_where_there_is_no_limit(
    here: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_intake, "UNLIMITED", 2)
    async with here.process() as process:
        channel = await process.channel("q")
        await process.put("q", "a", "b", "c", eta=at(30))
        await process.put("q", "now")
        got = await channel.take(4)
        assert sorted(bodies(got)) == ["a", "b", "c", "now"]
        channel.intake.ack(got)
