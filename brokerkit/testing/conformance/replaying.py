"""REPLAY: reading a topic again, from wherever one likes, without disturbing anybody."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ... import clock
from ...address import AnyTopic
from ...broker import Broker
from ...errors import BrokerError, NotFound, PositionLost
from ...events import PositionsLost
from ...message import Message
from ...policy import Start
from ._harness import Harness
from ._runner import Suite, needs, restarts


def wall() -> datetime:
    """Return the wall clock's time."""
    return datetime.fromtimestamp(clock.current().time(), UTC)


async def replay(broker: Broker, topic: AnyTopic, start: Start) -> list[str]:
    """Return the ids of what *topic* holds from *start* on."""
    async with broker.subscribe(topic, start=start, until_end=True) as messages:
        return [message.id async for message in messages]


async def fill(system: Harness, broker: Broker, topic: AnyTopic, prefix: str, count: int = 4) -> list[str]:
    """Publish *count* messages of one key and return their ids."""
    ids = [f"{prefix}{number}" for number in range(count)]
    await system.publish(broker, topic, ids, key="k")
    return ids


class Replaying(Suite):
    @needs("topic.replay")
    async def test_a_topic_is_read_again_from_the_earliest(self, system: Harness) -> None:
        """Y1: everything that is retained, as often as one likes, also after every group has settled it."""
        topic = system.topic()
        async with system.connect() as broker:
            ids = await fill(system, broker, topic, "m", 10)
            async with broker.subscribe(topic, group="workers") as messages:
                await system.drain(messages)
            for _ in range(2):
                assert await replay(broker, topic, Start.EARLIEST) == ids

    @needs("topic.replay")
    async def test_a_topic_is_read_again_from_a_time(self, system: Harness) -> None:
        """Y1: the first message is the first one published at or after it."""
        topic = system.topic()
        async with system.connect() as broker:
            await fill(system, broker, topic, "before")
            await asyncio.sleep(system.quiet)
            when = wall()
            await asyncio.sleep(system.quiet)
            after = await fill(system, broker, topic, "after")
            assert await replay(broker, topic, Start.at(when)) == after
            assert await replay(broker, topic, Start.at(wall() + timedelta(days=1))) == []
            assert len(await replay(broker, topic, Start.at(when - timedelta(days=1)))) == 8

    @needs("topic.replay")
    async def test_a_topic_is_read_again_from_a_position(self, system: Harness) -> None:
        """Y1: the message of that position is the first one."""
        topic = system.topic()
        async with system.connect() as broker:
            ids = await fill(system, broker, topic, "m")
            async with broker.subscribe(topic, start=Start.EARLIEST, until_end=True) as messages:
                positions = [message.position async for message in messages]
            for number, position in enumerate(positions):
                assert await replay(broker, topic, Start.position(position)) == ids[number:]

    @needs("topic.replay")
    async def test_from_a_position_the_other_partitions_begin_at_its_time(self, system: Harness) -> None:
        """Y1: its partition from there on, the others from the time of that message."""
        topic = system.topic()
        async with system.connect() as broker:
            for number in range(20):
                await broker.publish(topic, "v", id=f"old{number}", key=f"key{number}")
            await asyncio.sleep(system.quiet)
            receipt = await broker.publish(topic, "v", id="here", key="k")
            await asyncio.sleep(system.quiet)
            for number in range(20):
                await broker.publish(topic, "v", id=f"new{number}", key=f"key{number}")
            assert receipt.position is not None
            found = await replay(broker, topic, Start.position(receipt.position))
            assert sorted(found) == sorted(["here", *(f"new{number}" for number in range(20))])

    @needs("topic.replay")
    async def test_a_replay_ends_where_the_topic_ended_when_it_began(self, system: Harness) -> None:
        """Y1: until_end is no race with whoever publishes meanwhile."""
        topic = system.topic()
        async with system.connect() as broker:
            ids = await fill(system, broker, topic, "m", 10)
            seen: list[str] = []
            async with broker.subscribe(topic, start=Start.EARLIEST, until_end=True) as messages:
                async for message in messages:
                    seen.append(message.id)
                    await broker.publish(topic, "v", id=f"later{len(seen)}", key="k")
            assert seen == ids

    @needs("topic.replay")
    async def test_a_replay_does_not_move_a_group(self, system: Harness) -> None:
        """Y2: the group goes on where it was; nothing is skipped and nothing comes twice."""
        topic = system.topic()
        handled: list[str] = []

        async def handler(message: Message[str]) -> None:
            handled.append(message.id)

        async with system.connect() as broker, system.connect() as other:
            await fill(system, broker, topic, "a")
            async with system.serve(broker, topic, handler):
                await system.eventually(lambda: len(handled) == 4)
                assert len(await replay(other, topic, Start.EARLIEST)) == 4
                await fill(system, broker, topic, "b")
                assert len(await replay(broker, topic, Start.EARLIEST)) == 8
                await system.eventually(lambda: len(handled) == 8)
                await system.settle_down()
            assert handled == [f"{prefix}{number}" for prefix in "ab" for number in range(4)]

    @needs("topic.replay")
    @restarts
    async def test_a_position_is_a_text_that_works_after_a_restart(self, system: Harness) -> None:
        """Y3: opaque; it may be stored anywhere and used by another process later."""
        topic = system.topic()
        async with system.connect() as broker:
            await fill(system, broker, topic, "m")
            async with broker.subscribe(topic, group="workers") as messages:
                (first,) = await system.take(messages, 1)
                await first.ack()
                (second,) = await system.take(messages, 1)
                position = second.position
        assert isinstance(position, str)
        await system.restart()
        async with system.connect() as broker:
            assert await replay(broker, topic, Start.position(position)) == ["m1", "m2", "m3"]

    @needs("topic.replay")
    async def test_a_text_that_is_no_position_is_refused(self, system: Harness) -> None:
        """Y3: with an error of ours, before anything is read from somewhere else."""
        topic = system.topic()
        async with system.connect() as broker:
            await fill(system, broker, topic, "m")
            for text in ("nonsense", "0", "-1", "99999999999999999999", "é", "0" * 10_000, "1-1-1-1"):
                with pytest.raises(BrokerError):
                    await replay(broker, topic, Start.position(text))
                    raise AssertionError(text)

    @needs("topic.replay")
    async def test_a_position_that_is_gone_is_reported(self, system: Harness) -> None:
        """Y4: PositionLost, never silently something else; the next call goes on behind what is gone."""
        topic = system.topic(partitions=1, retention=system.retention)
        async with system.connect() as broker:
            receipt = await broker.publish(topic, "v", id="old", key="k")
            await fill(system, broker, topic, "old")
            assert receipt.position is not None
            await system.expire(broker, topic)
            await fill(system, broker, topic, "new")
            with pytest.raises(PositionLost):
                await replay(broker, topic, Start.position(receipt.position))
            assert await replay(broker, topic, Start.EARLIEST) == ["new0", "new1", "new2", "new3"]

    @needs("topic.replay")
    async def test_a_group_that_was_overtaken_is_told_and_goes_on(self, system: Harness) -> None:
        """Y4: an event with the number lost, an error where it reads by hand, then what is there."""
        topic = system.topic(partitions=1, retention=system.retention)
        async with system.connect() as broker:
            first = await broker.publish(topic, "v", id="handled", key="k")
            async with broker.subscribe(topic, group="workers") as messages:
                await system.drain(messages)
            await fill(system, broker, topic, "lost", 3)
            await system.expire(broker, topic)
            await fill(system, broker, topic, "new", 2)
            async with broker.subscribe(topic, group="workers") as messages:
                with pytest.raises(PositionLost) as caught:
                    await system.take(messages, 1)
                assert [m.id for m in await system.drain(messages)] == ["new0", "new1"]
            assert caught.value.lost in {None, 3}
            assert [event.lost for event in system.seen(PositionsLost)] in ([3], [0])
            assert first.id == "handled"

    @needs("queue")
    async def test_what_a_queue_has_settled_is_gone(self, system: Harness) -> None:
        """Y5: a queue is no log: it has no start, and what is acknowledged is not there to be read again."""
        queue = system.queue()
        async with system.connect() as broker:
            await system.publish(broker, queue, ["a", "b"])
            subscribe: Any = broker.subscribe
            with pytest.raises((TypeError, BrokerError)):
                async with subscribe(queue, start=Start.EARLIEST):
                    pass
            async with broker.subscribe(queue) as messages:
                await system.drain(messages)
            assert [stored async for stored in broker.browse(queue)] == []

    @needs("topic.replay")
    async def test_seek_moves_a_group_that_is_at_rest(self, system: Harness) -> None:
        """Y1: the only way to move a group; it repeats, or leaves out, exactly what was asked for."""
        topic = system.topic()
        async with system.connect() as broker:
            ids = await fill(system, broker, topic, "m")

            async def rest() -> list[str]:
                async with broker.subscribe(topic, group="workers") as messages:
                    return [m.id for m in await system.drain(messages)]

            assert await rest() == ids
            assert await rest() == []
            await broker.seek(topic, "workers", Start.EARLIEST)
            assert await rest() == ids
            await fill(system, broker, topic, "skipped")
            await broker.seek(topic, "workers", Start.LATEST)
            assert await rest() == []

    @needs("topic.replay")
    async def test_seeking_a_missing_topic_is_not_found(self, system: Harness) -> None:
        """Y1: and creates nothing, where addresses are not created on first use."""
        for declare in ("check", "never"):
            async with system.connect(declare=declare) as broker:
                with pytest.raises(NotFound):
                    await broker.seek(system.topic("missing"), "workers", Start.EARLIEST)
