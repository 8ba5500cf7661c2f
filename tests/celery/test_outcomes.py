"""What becomes of messages that a channel gives back."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from brokerkit._session import Session
from brokerkit.celery import task_message
from brokerkit.driver import Receipt
from brokerkit.policy import MAX_BODY

from .channels import SYSTEMS, Channel, Place, body_of, eventually, placed, plain, redelivered

pytestmark = pytest.mark.asyncio


@pytest.fixture(params=SYSTEMS)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with placed(request.param) as made:
        yield made


async def test_what_is_requeued_is_dropped_when_its_time_is_over(place: Place) -> None:
    async with place.process() as process:
        await process.exchanges.declare("q", process)
        await process.exchanges.publish(plain("short", "", "q", expiration="4000"))
        await process.exchanges.publish(plain("long", "", "q", expiration="60000"))
        channel = await process.channel("q")
        for _ in range(2):
            items = await channel.take(2)
            channel.intake.requeue(items)
        last = await channel.take(2)
        assert {body_of(item) for item in last} == {"short", "long"}
        await asyncio.sleep(4.1)
        channel.intake.requeue(last)
        (item,) = await channel.take(1)
        assert (body_of(item), redelivered(item)) == ("long", True)
        channel.intake.ack([item])
        await channel.nothing()


async def test_what_is_as_large_as_a_message_may_be_is_requeued_without_a_mark(place: Place) -> None:
    """A service has published it: what Celery publishes has room for the mark."""
    async with place.process() as process:
        channel = await process.channel("q", prefetch=1)
        body = {"body": "", "headers": {"task": "add", "id": "1"}, "properties": {}}
        body["body"] = "x" * (MAX_BODY - len(json.dumps(body)))
        text = json.dumps(body).encode()
        assert len(text) == MAX_BODY
        await process.broker.publish(process.exchanges.names.queue("q"), text)
        (item,) = await channel.take(1)
        for _ in range(2):
            channel.intake.requeue([item])
            (item,) = await channel.take(1)
            assert body_of(item) == body["body"]
        channel.intake.ack([item])
        await channel.nothing()


def session_of(channel: Channel) -> Session:
    """Return what the one queue of *channel* has in hand."""
    subscription = channel.intake._feeds["q"]._subscription
    assert subscription is not None
    session = subscription.intake.feeds[0].session
    assert session is not None
    return session


async def test_what_comes_again_to_who_has_it_still_is_forgotten_once() -> None:
    """A process stands still for longer than the lease, another one takes what it had, and gives it back."""

    async def other(place: Place) -> int:
        async with place.process(lease=1) as process:
            queue = process.exchanges.names.queue("q")
            async with process.broker.subscribe(queue) as messages:
                got: list[Any] = []
                while len(got) < 2 and (more := await messages.receive(limit=2, timeout=20)):
                    got += more
                return len(got)

    with placed("redis") as place:
        async with place.process(lease=1) as process:
            channel = await process.channel("q")
            for n in range(2):
                await process.put("q", "a", "b")
                items = await channel.take(2)
                before = [item.message for item in items]
                taken: list[int] = []
                thread = threading.Thread(target=lambda taken=taken: taken.append(asyncio.run(other(place))))
                thread.start()
                thread.join()  # this loop stands still
                assert taken == [2]
                await eventually(
                    lambda items=items, before=before: all(
                        item.message is not message for item, message in zip(items, before, strict=True)
                    )
                )
                assert channel.count == 0, n
                channel.intake.ack(items)
                await eventually(lambda: session_of(channel).held == 0)
                assert not session_of(channel).out
            await channel.nothing()


@pytest.mark.parametrize("late", [False, True])
async def test_tasks_with_one_id_are_tasks_of_their_own(place: Place, late: bool) -> None:
    """A service chooses ids, which identify and never deduplicate; on Kafka the time of these is the same, too."""
    async with place.process() as process:
        channel = await process.channel("q", prefetch=4)
        queue = process.exchanges.names.queue("q")
        bodies = [task_body(n) for n in range(3)]
        receipts = await process.broker.publish_many(queue, [queue.outgoing(body, id="one") for body in bodies])
        assert len(receipts) == 3
        seen: list[Any] = []
        held: list[Any] = []
        while len(seen) < 3:
            (item,) = await channel.take(1)
            seen.append(json.loads(body_of(item))[0][0])
            if late:
                held.append(item)
            else:
                channel.intake.ack([item])
        assert sorted(seen) == [0, 1, 2]
        channel.intake.ack(held)
        await eventually(lambda: session_of(channel).held == 0)
        assert not session_of(channel).out


async def test_what_is_stored_twice_runs_once_and_ends_with_it(place: Place) -> None:
    """As a driver's copy of a message is, which keeps its id and its time."""
    async with place.process() as process:
        channel = await process.channel("q", prefetch=4)
        bound = await process.broker.bind(process.exchanges.names.queue("q"))
        record = process.broker._records.simple(bound, task_body(1), None)
        stored = await process.broker._driver.publish([record, record], timeout=20)
        assert [type(each) for each in stored] == [Receipt, Receipt]
        (item,) = await channel.take(1)
        await channel.nothing()
        assert session_of(channel).held == 2
        channel.intake.ack([item])
        await eventually(lambda: session_of(channel).held == 0)
        assert not session_of(channel).out
        await channel.intake.close()
        await (await process.channel("q")).nothing()


def task_body(n: int) -> bytes:
    return msgspec.json.encode(task_message("add", (n,), queue="q"))
