"""What becomes of messages that a channel gives back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from brokerkit.policy import MAX_BODY

from .channels import SYSTEMS, Place, body_of, placed, plain, redelivered

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
