"""SUBSCRIBE and FAN-OUT: who gets what, from when on, and how a subscription ends."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from ...address import AnyQueue, AnyTopic
from ...broker import Broker
from ...errors import BrokerError, Closed, ConfigError
from ...message import Message
from ...policy import Start
from ._harness import Harness, Kind
from ._runner import Suite, needs


class Subscribing(Suite):
    @needs("topic")
    async def test_independent_readers_each_get_everything(self, system: Harness) -> None:
        """S1: readers without a group do not share."""
        topic = system.topic()
        async with (
            system.connect() as broker,
            system.connect() as other,
            broker.subscribe(topic) as one,
            broker.subscribe(topic) as two,
            other.subscribe(topic) as three,
        ):
            sent = [f"v{number}" for number in range(30)]
            await system.publish(broker, topic, sent)
            for messages in (one, two, three):
                assert sorted(m.value for m in await system.take(messages, 30)) == sorted(sent)
                await system.nothing(messages)

    @needs("topic")
    async def test_earliest_sees_history_and_latest_does_not(self, system: Harness) -> None:
        """S2: by its start a new group begins with everything, or with what comes."""
        topic = system.topic()
        async with system.connect() as broker:
            await system.publish(broker, topic, ["old"])
            async with (
                broker.subscribe(topic, group="all", start=Start.EARLIEST) as everything,
                broker.subscribe(topic, group="new", start=Start.LATEST) as latest,
                broker.subscribe(topic, start=Start.EARLIEST) as reader,
            ):
                await system.publish(broker, topic, ["new"])
                assert sorted(m.value for m in await system.drain(everything)) == ["new", "old"]
                assert [m.value for m in await system.drain(latest)] == ["new"]
                assert sorted(m.value for m in await system.take(reader, 2)) == ["new", "old"]

    @needs("topic")
    async def test_subscribing_to_the_latest_is_a_barrier(self, system: Harness) -> None:
        """S2: what is published after entering comes, whoever publishes; what was stored before does not."""
        topic = system.topic()
        stored: list[int] = []
        begun: list[int] = []
        async with system.connect() as broker, system.connect() as publisher, asyncio.TaskGroup() as tasks:
            stop = asyncio.Event()

            async def publish() -> None:
                number = 0
                while not stop.is_set():
                    begun.append(number)
                    await publisher.publish(topic, str(number), id=str(number))
                    stored.append(number)
                    number += 1
                    await asyncio.sleep(0.001)

            tasks.create_task(publish())
            for group in (None, "g1", "g2", None):
                await system.eventually(lambda: stored)
                old = max(stored)
                async with broker.subscribe(topic, group=group, start=Start.LATEST) as messages:
                    first = max(begun) + 1
                    await system.reach(lambda: max(stored), first + 10)
                    wanted = set(range(first, first + 10))
                    seen: list[int] = []
                    while not wanted <= set(seen):
                        for message in await messages.receive(limit=100, timeout=system.deadline):
                            seen.append(int(message.value))
                            if group:
                                await message.ack()
                    assert min(seen) > old, "a message from before subscribing came"
                    assert len(seen) == len(set(seen))
            stop.set()

    async def test_twenty_addresses_do_not_mix(self, system: Harness, kind: Kind) -> None:
        """S3: what is published at the same time to many addresses stays apart."""
        addresses = [system.address(kind, f"{kind}-{number}") for number in range(20)]
        async with system.connect() as broker:
            async with asyncio.TaskGroup() as tasks:
                for address in addresses:
                    tasks.create_task(system.publish(broker, address, [f"{address.name}/{n}" for n in range(10)]))

            async def consume(address: AnyTopic | AnyQueue) -> None:
                async with system.subscribe(broker, address) as messages:
                    got = await system.drain(messages)
                assert sorted(m.value for m in got) == sorted(f"{address.name}/{n}" for n in range(10))

            async with asyncio.TaskGroup() as tasks:
                for address in addresses:
                    tasks.create_task(consume(address))

    @needs("topic")
    async def test_a_durable_group_starts_at_the_earliest_and_a_reader_at_the_latest(self, system: Harness) -> None:
        """S4: what start=None means for a topic."""
        topic = system.topic()
        async with system.connect() as broker:
            await system.publish(broker, topic, ["before"])
            async with broker.subscribe(topic, group="late") as durable, broker.subscribe(topic) as reader:
                await system.publish(broker, topic, ["after"])
                assert sorted(m.value for m in await system.drain(durable)) == ["after", "before"]
                assert [m.value for m in await system.take(reader, 1)] == ["after"]
                await system.nothing(reader)

    async def test_publishing_needs_no_subscriber(self, system: Harness, kind: Kind) -> None:
        """S5: messages wait for the first one who wants them."""
        address = system.address(kind)
        async with system.connect() as broker:
            await system.publish(broker, address, ["a", "b", "c"])
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            assert sorted(m.value for m in await system.drain(messages)) == ["a", "b", "c"]

    @needs("queue")
    async def test_a_queue_keeps_what_nobody_takes(self, system: Harness) -> None:
        """S5: it is counted as waiting."""
        queue = system.queue()
        async with system.connect() as broker:
            await system.publish(broker, queue, ["a", "b", "c"])
            assert (await broker.backlog(queue)).waiting in (3, None)
            assert sorted([stored.value async for stored in broker.browse(queue)]) == ["a", "b", "c"]

    async def test_iterating_ends_when_the_broker_is_closed(self, system: Harness, kind: Kind) -> None:
        """S6: the loop is over; no error escapes from it."""
        address = system.address(kind)
        seen: list[str] = []
        ready = asyncio.Event()
        broker = system.connect()

        async def iterate() -> None:
            async with system.subscribe(broker, address) as messages:
                ready.set()
                async for message in messages:
                    seen.append(message.value)
                    await message.ack()

        async with broker:
            await broker.publish(address, "one")
            task = asyncio.ensure_future(iterate())
            await ready.wait()
            await system.eventually(lambda: seen)
        await task
        assert seen == ["one"]

    async def test_a_cancelled_reader_leaves_nothing_behind(self, system: Harness, kind: Kind) -> None:
        """S6: cancelling it raises CancelledError and nothing else; what it held comes again, uncounted."""
        address = system.address(kind)
        held = asyncio.Event()
        async with system.connect() as broker:
            await broker.publish(address, "one")

            async def iterate() -> None:
                async with system.subscribe(broker, address) as messages:
                    async for _ in messages:
                        held.set()
                        await asyncio.Event().wait()

            task = asyncio.ensure_future(iterate())
            await held.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with system.subscribe(broker, address) as messages:
                (message,) = await system.take(messages, 1)
                assert (message.value, message.attempt, message.deliveries) == ("one", 1, 1)

    async def test_receiving_after_leaving_is_refused(self, system: Harness, kind: Kind) -> None:
        """S6: Closed, at once."""
        address = system.address(kind)
        async with system.connect() as broker:
            async with system.subscribe(broker, address) as messages:
                pass
            with pytest.raises(Closed):
                await messages.receive(timeout=system.deadline)

    async def test_receive_returns_nothing_when_its_time_is_over(self, system: Harness, kind: Kind) -> None:
        """S6: an empty address is no error; the call takes its timeout and no less."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            began = system.now()
            assert list(await messages.receive(limit=10, timeout=system.quiet)) == []
            assert system.now() - began >= system.quiet * 0.99
            await broker.publish(address, "one")
            assert [m.value for m in await messages.receive(limit=10, timeout=system.deadline)] == ["one"]

    @needs("topic")
    async def test_reading_until_the_end_ends(self, system: Harness) -> None:
        """S6: with until_end the loop is over after what was there on entering."""
        topic = system.topic()
        async with system.connect() as broker:
            await system.publish(broker, topic, [f"v{n}" for n in range(25)])
            for _ in range(2):
                async with broker.subscribe(topic, start=Start.EARLIEST, until_end=True) as messages:
                    assert len([message.value async for message in messages]) == 25
            async with broker.subscribe(topic, start=Start.LATEST, until_end=True) as messages:
                assert [message.value async for message in messages] == []

    @needs("topic", "queue")
    async def test_the_second_kind_of_a_name_is_refused(self, system: Harness) -> None:
        """S7: a name is a topic or a queue, in one process and in the system."""
        topic, queue = system.topic("name"), system.queue("name")
        async with system.connect() as broker:
            await broker.publish(topic, "one")
            with pytest.raises(ConfigError, match="name"):
                await broker.publish(queue, "two")
            with pytest.raises(ConfigError, match="name"):
                async with broker.subscribe(queue):
                    pass
        async with system.connect() as broker:
            with pytest.raises(BrokerError, match="name"):
                await broker.publish(queue, "three")
        async with system.connect() as broker, broker.subscribe(topic, group="g") as messages:
            assert [m.value for m in await system.drain(messages)] == ["one"]

    @needs("topic")
    async def test_the_end_ends_all_readers_of_a_subscription(self, system: Harness) -> None:
        """until_end with a group: some wait while others hold the last messages of a key; all of them come out."""
        topic = system.topic()
        handled: list[str] = []
        async with system.connect() as broker:
            await broker.publish_many(topic, [topic.outgoing(f"v{n}", key="k") for n in range(3)])
            async with broker.subscribe(topic, group="workers", until_end=True) as messages:

                async def read() -> None:
                    async for message in messages:
                        await asyncio.sleep(system.quiet)
                        handled.append(message.value)
                        await message.ack()

                async with asyncio.timeout(10 * system.quiet + system.deadline):
                    await asyncio.gather(*(read() for _ in range(4)))
            assert handled == ["v0", "v1", "v2"]

    @needs("topic")
    async def test_what_is_handed_back_comes_before_the_end(self, system: Harness) -> None:
        """until_end with a group: by a block that was cancelled, and by a member that another one joins."""
        topic = system.topic(partitions=2)
        values = [f"v{n}" for n in range(12)]
        handled: list[str] = []
        async with system.connect() as broker, system.connect() as other:
            await broker.publish_many(topic, [topic.outgoing(value, key=value) for value in values])

            async def handle(message: Message[str]) -> None:
                async with message.process():
                    handled.append(message.value)
                    await asyncio.sleep(system.quiet / 5)
                    if len(handled) == 3:
                        raise asyncio.CancelledError

            async def read(member: Broker) -> None:
                async with member.subscribe(topic, group="workers", until_end=True) as messages:
                    async for message in messages:
                        with suppress(asyncio.CancelledError):
                            await handle(message)

            limit = 20 * system.quiet + system.session + system.deadline
            async with asyncio.timeout(limit), asyncio.TaskGroup() as group:
                group.create_task(read(broker))
                await system.eventually(lambda: len(handled) > 4)
                group.create_task(read(other))
            assert sorted(set(handled)) == sorted(values)
            async with broker.subscribe(topic, group="workers") as rest:
                await system.nothing(rest)
