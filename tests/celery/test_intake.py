"""One channel: several queues, one credit, and every way in which a message can end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from brokerkit.celery import _intake
from brokerkit.celery._item import Item
from brokerkit.errors import NotFound
from brokerkit.message import Stored

from .channels import SYSTEMS, Place, Process, body_of, eventually, placed, plain, redelivered

pytestmark = pytest.mark.asyncio


@pytest.fixture(params=SYSTEMS)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with placed(request.param) as made:
        yield made


@pytest.fixture
def here() -> Iterator[Place]:
    """Return a place for what is the same on all systems."""
    with placed("memory") as made:
        yield made


def bodies(items: list[Item]) -> list[Any]:
    return sorted(body_of(item) for item in items)


def at(seconds: float) -> str:
    return datetime.fromtimestamp(time.time() + seconds, UTC).isoformat()


async def left(process: Process, queue: str) -> list[Any]:
    """Return what a channel of another process still finds in *queue*."""
    other = await process.channel(queue)
    await asyncio.sleep(4 * process.place.quiet)
    got = bodies(await other.take(other.count))
    await other.intake.close()
    return got


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
        await eventually(lambda: fast.intake._ahead > 0 or len(seen) >= 300)
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
        assert await channel.intake.flush()
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
            assert (body_of(item), item.payload["headers"]) == ("a", first.payload["headers"])
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
        await channel.intake.flush()
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


# ---------------------------------------------------------------------- consuming


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
    monkeypatch.setattr(_intake, "_begun", lambda: {"a"})
    async with here.process() as process, here.process() as other:
        channel = await process.channel("q")
        await process.put("q", "a", "b")
        await channel.take(2)
        await channel.intake.close()
        got = await (await other.channel("q")).take(2)
        assert {body_of(item): redelivered(item) for item in got} == {"a": True, "b": False}


async def test_consuming_without_acknowledgements_has_a_bound_too(place: Place) -> None:
    async with place.process() as process:
        channel = await process.channel()
        channel.intake.prefetch(2)
        await channel.intake.consume("q", no_ack=True)
        await process.put("q", "a", "b", "c")
        items = await channel.take(2)
        await channel.nothing()
        assert all(item.no_ack for item in items)
        channel.intake.ack(items)
        assert bodies(items + await channel.take(1)) == ["a", "b", "c"]


async def test_one_message_at_a_time(place: Place) -> None:
    async with place.process() as process:
        channel = await process.channel()
        assert await channel.intake.get("q") is None
        await process.put("q", "a", "b", "c")
        one = await channel.intake.get("q")
        two = await channel.intake.get("q", no_ack=True)
        assert one is not None
        assert two is not None
        channel.intake.ack([one, two])
        other = await process.channel("q")
        (three,) = await other.take(1)
        assert bodies([one, two, three]) == ["a", "b", "c"]
        other.intake.ack([three])
        assert await channel.intake.get("q") is None


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


async def test_a_queue_that_is_deleted_by_others_is_told(here: Place) -> None:
    async with here.process() as process, here.process() as other:
        channel = await process.channel("q")
        await other.exchanges.delete("q")
        await eventually(lambda: channel.failures)
        assert isinstance(channel.failures[0], NotFound)
        await channel.intake.consume("q")
        await process.put("q", "a")
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
