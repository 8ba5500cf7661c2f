"""PUBLISH: what a receipt proves, what an error proves, and in which order messages are stored."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from ...address import Topic
from ...broker import Broker
from ...errors import BrokerError, BrokerUnavailable, Closed, NotFound, PublishUnknown
from ...policy import Start
from ._harness import Harness, Kind
from ._raw import raw_address
from ._runner import Suite, needs, seeds


class Publishing(Suite):
    async def test_a_receipt_means_that_the_message_is_stored(self, system: Harness, kind: Kind) -> None:
        """P1: a message whose receipt is there outlives its publisher's death."""
        address = system.address(kind)
        publisher = system.connect()
        async with publisher:
            receipt = await publisher.publish(address, "one", id="first")
            await system.crash(publisher)
        assert (receipt.id, receipt.duplicate) == ("first", False)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            (message,) = await system.take(messages, 1)
            assert (message.id, message.value) == ("first", "one")

    @needs("topic.replay")
    async def test_a_receipt_of_a_topic_tells_where_the_message_is(self, system: Harness) -> None:
        """P1: the position of a receipt is the position of the message."""
        topic = system.topic()
        async with system.connect() as broker:
            receipts = [await broker.publish(topic, value, key="k") for value in ("a", "b", "c")]
            async with broker.subscribe(topic, group="workers") as messages:
                for receipt in receipts:
                    (message,) = await system.take(messages, 1)
                    assert (message.id, message.position) == (receipt.id, receipt.position)
                    await message.ack()
        assert len({receipt.position for receipt in receipts}) == 3

    async def test_messages_published_without_an_id_get_different_ones(self, system: Harness, kind: Kind) -> None:
        """P1: every receipt has an id, and no two share one by accident."""
        address = system.address(kind)
        async with system.connect() as one, system.connect() as two:
            receipts = [await broker.publish(address, "same") for broker in (one, two) for _ in range(50)]
        assert all(receipt.id for receipt in receipts)
        assert len({receipt.id for receipt in receipts}) == 100

    async def test_publishing_to_a_missing_address_is_not_found(self, system: Harness, kind: Kind) -> None:
        """P2: with declare="check" and "never" nothing is created on the way."""
        address = system.address(kind)
        for declare in ("check", "never"):
            async with system.connect(declare=declare) as broker:
                with pytest.raises(NotFound, match=address.name):
                    await broker.publish(address, "one")
                assert await system.driver(broker).describe(raw_address(system, kind)) is None

    async def test_subscribing_to_a_missing_address_is_not_found(self, system: Harness, kind: Kind) -> None:
        """P2: the reader of a missing address is told, instead of waiting for ever."""
        address = system.address(kind)
        for declare in ("check", "never"):
            async with system.connect(declare=declare) as broker:
                with pytest.raises(NotFound, match=address.name):
                    async with system.subscribe(broker, address):
                        pass
                assert await system.driver(broker).describe(raw_address(system, kind)) is None

    async def test_a_message_that_certainly_failed_is_never_delivered(self, system: Harness, kind: Kind) -> None:
        """P3: BrokerUnavailable means not stored, also after the connection is back."""
        address = system.address(kind)
        async with system.connect() as publisher, system.connect() as broker:
            await publisher.publish(address, "before")
            await system.disconnect(publisher)
            with pytest.raises(BrokerUnavailable) as caught:
                await publisher.publish(address, "failed", timeout=system.quiet)
            assert caught.value.retryable
            await system.reconnect(publisher)
            await publisher.publish(address, "after")
            async with system.subscribe(broker, address) as messages:
                values = [message.value for message in await system.drain(messages)]
        assert sorted(values) == ["after", "before"]

    async def test_a_publish_while_disconnected_waits_for_the_connection(self, system: Harness, kind: Kind) -> None:
        """P3: what certainly failed is tried again within the timeout, and stored once."""
        address = system.address(kind)
        async with system.connect() as publisher, system.connect() as broker:
            await publisher.publish(address, "before")
            await system.disconnect(publisher)
            waiting = asyncio.ensure_future(publisher.publish(address, "late", timeout=system.deadline))
            await system.settle_down()
            assert not waiting.done()
            await system.reconnect(publisher)
            assert (await waiting).id
            async with system.subscribe(broker, address) as messages:
                assert sorted(message.value for message in await system.drain(messages)) == ["before", "late"]

    async def test_a_lost_reply_is_reported_and_never_stored_twice(self, system: Harness, kind: Kind) -> None:
        """P4: PublishUnknown, or a receipt where the system recognises what is sent again; one copy either way."""
        address = system.address(kind)
        async with system.connect() as publisher, system.connect() as broker:
            await publisher.publish(address, "before")
            await system.lose_replies(publisher)
            try:
                await publisher.publish(address, "in doubt", timeout=system.quiet)
            except PublishUnknown as error:
                assert error.retryable
            await publisher.publish(address, "after", timeout=system.deadline)
            async with system.subscribe(broker, address) as messages:
                values = [message.value for message in await system.drain(messages)]
        assert sorted(values) == ["after", "before", "in doubt"]

    async def test_a_hundred_publishers_at_once_mix_nothing_up(self, system: Harness, kind: Kind) -> None:
        """P5: each message arrives once, with its own id, body and headers."""
        address = system.address(kind)
        async with system.connect() as broker:

            async def publish(number: int) -> None:
                for index in range(10):
                    mark = f"{number}.{index}"
                    receipt = await broker.publish(address, mark * number, id=mark, headers={"mark": mark})
                    assert receipt.id == mark

            async with asyncio.TaskGroup() as tasks:
                for number in range(100):
                    tasks.create_task(publish(number))
            async with system.subscribe(broker, address) as messages:
                got = await system.drain(messages)
        assert sorted(m.id for m in got) == sorted(f"{number}.{index}" for number in range(100) for index in range(10))
        for message in got:
            assert message.headers == {"mark": message.id}
            assert message.value == message.id * int(message.id.partition(".")[0])

    @needs("topic.key_order")
    async def test_messages_of_a_key_are_stored_in_the_order_of_publishing(self, system: Harness) -> None:
        """P6: one by one and many at once, while other tasks publish under other keys."""
        topic = system.topic()
        async with system.connect() as broker, asyncio.TaskGroup() as tasks:
            for other in range(5):
                tasks.create_task(
                    system.publish(broker, topic, [f"other {other} {n}" for n in range(30)], key=f"o{other}")
                )
            for number in range(0, 60, 6):
                await broker.publish(topic, str(number), key="one key")
                many = [topic.outgoing(str(n), key="one key") for n in range(number + 1, number + 6)]
                assert not [
                    result for result in await broker.publish_many(topic, many) if isinstance(result, BrokerError)
                ]
        async with system.connect() as broker:
            values = [value for value in await self.values(broker, topic) if value.isdigit()]
            assert values == [str(number) for number in range(60)]

    @needs("topic.key_order")
    async def test_the_order_of_a_key_holds_across_a_disconnect(self, system: Harness) -> None:
        """P6: what is tried again is not overtaken by what was published later."""
        topic = system.topic()
        stored: list[str] = []
        async with system.connect() as publisher, system.connect() as broker:
            await publisher.publish(topic, "0", key="k")

            async def publish() -> None:
                for number in range(1, 30):
                    try:
                        await publisher.publish(topic, str(number), key="k", timeout=system.deadline)
                    except PublishUnknown:
                        continue
                    stored.append(str(number))

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(publish())
                await system.eventually(lambda: len(stored) >= 5)
                await system.disconnect(publisher)
                await system.settle_down()
                await system.reconnect(publisher)
            values = [int(value) for value in await self.values(broker, topic)]
        assert values == sorted(set(values))
        assert {int(value) for value in stored} <= set(values)
        assert len(stored) >= 28, "at most one answer was under way when the connection was cut"

    async def values(self, broker: Broker, topic: Topic[str]) -> list[str]:
        """Return all values of *topic* as they are stored."""
        async with broker.subscribe(topic, start=Start.EARLIEST, until_end=True) as messages:
            return [message.value async for message in messages]

    async def test_publishing_outside_of_async_with_is_refused(self, system: Harness, kind: Kind) -> None:
        """P7: Closed before entering and after leaving; nothing is stored."""
        address = system.address(kind)
        closed = system.connect()
        with pytest.raises(Closed):
            await closed.publish(address, "early")
        async with closed:
            await closed.publish(address, "one")
        with pytest.raises(Closed):
            await closed.publish(address, "late")
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            assert [message.value for message in await system.drain(messages)] == ["one"]

    async def test_a_publish_cancelled_before_it_started_is_not_sent(self, system: Harness, kind: Kind) -> None:
        """P8: cancelling a task that has not run yet leaves no trace."""
        address = system.address(kind)
        async with system.connect() as broker:
            task = asyncio.ensure_future(broker.publish(address, "never"))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await broker.publish(address, "one")
            async with system.subscribe(broker, address) as messages:
                assert [message.value for message in await system.drain(messages)] == ["one"]

    @seeds(2)
    async def test_a_publish_cancelled_under_way_leaves_the_connection_usable(
        self, system: Harness, kind: Kind
    ) -> None:
        """P8: whatever the moment, the answers of other publishes stay their own."""
        address = system.address(kind)
        done: set[str] = set()
        async with system.connect() as broker:
            await broker.publish(address, "declared", id="declared")
            for steps in range(20):
                task = asyncio.ensure_future(broker.publish(address, f"c{steps}", id=f"c{steps}"))
                beside = asyncio.ensure_future(broker.publish(address, f"b{steps}", id=f"b{steps}"))
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    done.add((await task).id)
                assert (await beside).id == f"b{steps}"
                assert (await broker.publish(address, "after", id=f"a{steps}")).id == f"a{steps}"
            async with system.subscribe(broker, address) as messages:
                ids = [message.id for message in await system.drain(messages)]
        assert len(ids) == len(set(ids))
        sure = {"declared"} | {f"{letter}{steps}" for letter in "ab" for steps in range(20)} | done
        assert sure <= set(ids) <= sure | {f"c{steps}" for steps in range(20)}
