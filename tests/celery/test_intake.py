"""One channel: several queues, one credit, and every way in which a message can end."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from brokerkit.celery import _intake
from brokerkit.errors import NotFound
from brokerkit.message import Message, Stored

from .channels import Place, Process, at, bodies, body_of, left, plain, redelivered

pytestmark = pytest.mark.asyncio


# ---------------------------------------------------------------------- credit


async def test_the_prefetch_count_is_one_credit_for_all_queues_of_a_channel(place: Place) -> None:
    async with place.process() as process:
        wanted = [f"{queue}{n}" for queue in "abc" for n in range(4)]
        for body in wanted:
            await process.put(f"queue-{body[0]}", body)
        channel = await process.channel("queue-a", "queue-b", "queue-c", prefetch=5)
        held, seen = await channel.take(5), []
        await channel.nothing()
        while held:
            seen.append(body_of(held[0]))
            channel.intake.ack(held[:1])
            held = held[1:]
            if len(seen) + len(held) < len(wanted):
                held += await channel.take(1)
            assert channel.count == 0
        assert sorted(seen) == wanted


async def test_what_was_fetched_without_credit_goes_to_others(place: Place) -> None:
    async with place.process() as process, place.process() as other:
        for queue in ("a", "b", "c"):
            await process.exchanges.declare(queue, process)
        busy = await process.channel("a", "b", "c", prefetch=1)
        # At once, so that each queue's reader takes one for the same credit.
        await asyncio.gather(*(other.put(queue, queue) for queue in ("a", "b", "c")))
        (held,) = await busy.take(1)
        idle = await other.channel("a", "b", "c")
        got = await idle.take(2)
        assert bodies([held, *got]) == ["a", "b", "c"]
        assert not any(redelivered(item) for item in got)
        idle.intake.ack(got)
        await busy.nothing()


async def test_what_was_fetched_ahead_goes_back_when_a_message_takes_long(place: Place) -> None:
    """A channel that is fast fetches more than its credit; all of it comes to others when it is fast no more."""
    async with place.process() as process, place.process() as other:
        await process.put("q", *map(str, range(400)))
        fast = await process.channel("q", prefetch=4)
        seen: list[Any] = []
        while len(seen) < 300:
            (item,) = await fast.take(1)
            seen.append(body_of(item))
            fast.intake.ack([item])
        held = await fast.take(4)
        await fast.nothing()
        slow = await other.channel("q")
        rest = await slow.take(400 - len(seen) - len(held))
        assert sorted(seen + bodies(held) + bodies(rest)) == sorted(map(str, range(400)))


async def test_nothing_comes_while_the_prefetch_count_is_zero(place: Place) -> None:
    async with place.process() as process:
        channel = await process.channel("q", prefetch=2)
        await process.put("q", "a", "b", "c")
        held = await channel.take(2)
        channel.intake.prefetch(0)
        channel.intake.ack(held)
        await channel.nothing()
        channel.intake.prefetch(None)
        assert bodies(await channel.take(1)) == ["c"]


async def test_a_raised_prefetch_count_holds_at_once_and_so_does_a_lowered_one(place: Place) -> None:
    async with place.process() as process:
        channel = await process.channel("q", prefetch=1)
        await process.put("q", *"abcdef")
        held = await channel.take(1)
        await channel.nothing()
        channel.intake.prefetch(3)
        held += await channel.take(2)
        await channel.nothing()
        channel.intake.prefetch(2)
        channel.intake.ack(held[:1])
        await channel.nothing()
        channel.intake.ack(held[1:])
        held += await channel.take(2)
        assert len(set(bodies(held))) == 5
        await channel.nothing()


async def test_messages_of_mailboxes_have_the_same_credit(here: Place) -> None:
    async with here.process() as process:
        channel = await process.channel("q", prefetch=2)
        await process.exchanges.declare("box", channel.intake, exclusive=True)
        await channel.intake.consume("box")
        await process.put("q", "a")
        held = await channel.take(1)
        for n in range(3):
            await process.exchanges.publish(plain(str(n), "", "box"))
        held += await channel.take(1)
        await channel.nothing()
        channel.intake.requeue(held[1:])
        (again,) = await channel.take(1)
        assert (body_of(again), redelivered(again)) == ("0", True)
        channel.intake.ack([again, held[0]])
        assert bodies(await channel.take(2)) == ["1", "2"]


# ---------------------------------------------------------------------- outcomes


async def test_what_is_acknowledged_is_gone(place: Place) -> None:
    async with place.process() as process, place.process() as other:
        channel = await process.channel("q")
        await process.put("q", "a", "b", "c")
        channel.intake.ack(await channel.take(3))
        await channel.intake.close()
        assert await left(other, "q") == []


async def test_an_acknowledgement_leaves_by_itself_and_at_once(place: Place) -> None:
    """A worker that is killed soon afterwards never runs the task again: what is not stored of it now, is not stored."""
    async with place.process() as process:
        channel = await process.channel("q", prefetch=1)
        await process.put("q", "a", "b")
        (item,) = await channel.take(1)
        channel.intake.ack([item])
        await channel.take(1)
        await asyncio.sleep(0.05)
        assert item.message is not None
        assert item.message.outcome is not None
        settling = item.message._settler.settling  # type: ignore[attr-defined]
        assert not settling._items
        assert not settling._later


async def test_what_is_requeued_comes_again_marked_and_never_dies(place: Place) -> None:
    async with place.process() as process:
        channel = await process.channel("q", prefetch=1)
        await process.put("q", "a", priority=3, correlation="x")
        (first,) = await channel.take(1)
        assert not redelivered(first)
        item = first
        for _ in range(15):  # more often than a message may fail, or be delivered without an outcome
            channel.intake.requeue([item])
            (item,) = await channel.take(1)
            assert redelivered(item)
            assert body_of(item) == "a"
            assert item.payload["headers"] == {**first.payload["headers"], "redelivered": True}
            assert item.payload["properties"]["priority"] == 3
            assert item.message is not None
            assert first.message is not None
            assert item.message.id == first.message.id
        channel.intake.ack([item])
        await channel.nothing()
        assert await process.letters("q") == []


async def test_what_a_consumer_has_changed_is_requeued_as_it_was(here: Place) -> None:
    async with here.process() as process:
        channel = await process.channel("q")
        await process.put("q", "a")
        (item,) = await channel.take(1)
        item.payload["headers"].clear()
        item.payload["body"] = "other"
        channel.intake.requeue([item])
        (item,) = await channel.take(1)
        assert (body_of(item), item.payload["headers"]["id"]) == ("a", "a")


async def test_what_is_rejected_is_a_dead_letter(place: Place) -> None:
    async with place.process() as process:
        channel = await process.channel("q")
        await process.put("q", "a")
        channel.intake.reject(await channel.take(1))
        await eventually_letters(process, 1)
        (letter,) = await process.letters("q")
        assert letter.dead.reason == "rejected by its consumer"


async def eventually_letters(process: Process, count: int) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                if len(await process.letters("q")) == count:
                    return
            except NotFound:
                pass
            await asyncio.sleep(0.05)


async def test_what_is_no_message_of_celery_is_a_dead_letter_and_stops_nothing(place: Place) -> None:
    async with place.process() as process:
        channel = await process.channel("q", prefetch=1)
        await process.broker.publish(process.exchanges.names.queue("q"), b"no JSON")
        await process.broker.publish(process.exchanges.names.queue("q"), b'{"body": 1}')
        await process.put("q", "a")
        (item,) = await channel.take(1)
        assert body_of(item) == "a"
        channel.intake.ack([item])
        await eventually_letters(process, 2)
        assert {letter.dead.reason.partition(":")[0] for letter in await process.letters("q")} == {
            "no message of Celery"
        }
        await process.put("q", "b")
        assert bodies(await channel.take(1)) == ["b"]


async def test_what_is_released_comes_again_unmarked(place: Place) -> None:
    async with place.process() as process, place.process() as other:
        channel = await process.channel("q")
        await process.put("q", "a", "b")
        items = await channel.take(2)
        await channel.intake.cancel("q")
        channel.intake.release(items)
        got = await (await other.channel("q")).take(2)
        assert bodies(got) == ["a", "b"]
        assert not any(redelivered(item) for item in got)


async def test_a_message_has_one_outcome(here: Place) -> None:
    async with here.process() as process:
        channel = await process.channel("q")
        await process.put("q", "a")
        items = await channel.take(1)
        channel.intake.ack(items)
        channel.intake.requeue(items)
        channel.intake.reject(items)
        await channel.nothing()
        assert await process.letters("q") == []


async def test_what_a_dead_process_had_comes_again_marked(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stored, "deliveries", property(lambda _: 2))
    async with here.process() as process:
        channel = await process.channel("q")
        await process.put("q", "a")
        (item,) = await channel.take(1)
        assert redelivered(item)


# ---------------------------------------------------------------------- due later


async def test_what_is_due_soon_is_handed_over_and_held(place: Place) -> None:
    async with place.process() as process, place.process() as other:
        channel = await process.channel("q")
        await process.put("q", "a", eta=at(30))
        (item,) = await channel.take(1)
        await asyncio.sleep(3)  # longer than a lease
        assert await left(other, "q") == []
        channel.intake.ack([item])
        assert channel.intake._early == 0


async def test_what_is_due_late_comes_a_window_before(place: Place) -> None:
    async with place.process(eta_window=1) as process:
        channel = await process.channel("q")
        began = time.monotonic()
        await process.put("q", "a", eta=at(2.5))
        assert await process.exchanges.size("q") == 0
        await channel.take(1)
        assert 1.4 <= time.monotonic() - began < 2.6


async def test_what_came_too_early_waits_in_the_broker(place: Place) -> None:
    """A service published it without a delay."""
    async with place.process() as process, place.process(eta_window=0.5) as other:
        channel = await other.channel("q", prefetch=1)
        began = time.monotonic()
        await process.put("q", "a", eta=at(3))
        await process.put("q", "b")
        (item,) = await channel.take(1)
        assert body_of(item) == "b"
        channel.intake.ack([item])
        (item,) = await channel.take(1)
        assert 2.4 <= time.monotonic() - began < 3.5
        assert not redelivered(item)


async def test_beyond_its_budget_a_channel_holds_nothing_that_is_not_due(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_intake, "EARLY", 2)
    async with place.process() as process:
        channel = await process.channel("q")
        began = time.monotonic()
        for body in "abcd":
            await process.put("q", body, eta=at(2))
        await process.put("q", "now")
        first = await channel.take(3)
        assert "now" in bodies(first)
        assert time.monotonic() - began < 1.5
        rest = await channel.take(2)
        assert time.monotonic() - began >= 1.9
        assert bodies(first + rest) == ["a", "b", "c", "d", "now"]
        channel.intake.ack(first + rest)
        assert channel.intake._early == 0
        await channel.nothing()


async def test_what_comes_again_before_it_is_due_waits_in_the_broker(
    here: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third delivery on a message comes alone: held until it is due, it would stop its queue."""
    real = Stored.deliveries
    monkeypatch.setattr(Stored, "deliveries", property(lambda self: real.__get__(self) + (b"again" in self.body)))
    async with here.process() as process:
        channel = await process.channel("q")
        began = time.monotonic()
        await process.put("q", "again", eta=at(1))
        (item,) = await channel.take(1)
        assert time.monotonic() - began >= 0.95
        assert redelivered(item)


async def test_what_comes_again_while_its_consumer_works_is_not_handed_over_twice(here: Place) -> None:
    """The connection was lost: the broker hands it out anew, to a process that has it still."""
    async with here.process() as process:
        channel = await process.channel("q")
        await process.put("q", "a")
        (item,) = await channel.take(1)
        feed, before = channel.intake._feeds["q"], item.message
        assert before is not None
        again: Message[bytes] = Message(before._item, before._reader, before._settler, 0)  # type: ignore[arg-type]
        settler, before._settler = before._settler, object()  # type: ignore[assignment]  # of a lost connection
        await channel.intake._arrived(feed, [again])
        assert (channel.count, feed.held, item.message) == (0, 1, again)
        assert before.outcome is None  # nothing is left that it could settle
        channel.intake.ack([item])
        await channel.nothing()
        assert again.outcome is not None
        late: Message[bytes] = Message(before._item, before._reader, settler, 0)  # type: ignore[arg-type]
        await channel.intake._arrived(feed, [late])
        assert (channel.count, feed.held) == (0, 0)
        assert late.outcome is not None
        assert late.outcome.kind == "ack"
