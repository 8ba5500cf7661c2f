"""RECONNECT: after an outage work resumes by itself, and health says truly whether it has."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial

import pytest

from ...address import AnyQueue, AnyTopic
from ...errors import BrokerError, BrokerUnavailable
from ...events import Disconnected, Resumed
from ...message import Message
from ...policy import RetryPolicy
from ._harness import Harness, Kind
from ._runner import Suite, needs, seeds


def _reached(things: list[str], count: int) -> bool:
    return len(things) >= count


class Reconnecting(Suite):
    async def test_a_service_consumes_again_after_an_outage(self, system: Harness, kind: Kind) -> None:
        """N1: resumed consumption, not just a connection; three outages one after the other."""
        address = system.address(kind)
        handled: list[str] = []

        async def handler(message: Message[str]) -> None:
            handled.append(message.value)

        async with (
            system.connect() as publisher,
            system.connect() as broker,
            system.serve(broker, address, handler),
        ):
            for number in range(3):
                await system.publish(publisher, address, [f"before{number}"])
                await system.eventually(partial(handled.count, f"before{number}"))
                await system.disconnect(broker)
                await system.publish(publisher, address, [f"during{number}"])
                await asyncio.sleep(2 * system.quiet)
                await system.reconnect(broker)
                await system.publish(publisher, address, [f"after{number}"])
                for value in (f"during{number}", f"after{number}"):
                    await system.eventually(partial(handled.count, value), "consumption resumes")

    async def test_a_subscription_by_hand_reads_again_after_an_outage(self, system: Harness, kind: Kind) -> None:
        """N1: the same loop goes on; no error comes out of it."""
        address = system.address(kind)
        seen: list[str] = []

        async with system.connect() as publisher, system.connect() as broker:
            async with system.subscribe(broker, address) as messages:

                async def read() -> None:
                    async for message in messages:
                        seen.append(message.value)
                        await message.ack()

                task = asyncio.ensure_future(read())
                await system.publish(publisher, address, ["before"])
                await system.eventually(lambda: "before" in seen)
                await system.disconnect(broker)
                await system.publish(publisher, address, ["during"])
                await asyncio.sleep(2 * system.quiet)
                await system.reconnect(broker)
                await system.eventually(lambda: "during" in seen)
            await asyncio.wait([task])
            task.result()

    @needs("topic")
    async def test_an_ephemeral_reader_reads_again_after_an_outage(self, system: Harness) -> None:
        """N1, peers E6: a cut connection does not silence it."""
        topic = system.topic()
        async with (
            system.connect() as publisher,
            system.connect() as broker,
            broker.subscribe(topic) as messages,
        ):
            await publisher.publish(topic, "before")
            assert (await system.take(messages, 1))[0].value == "before"
            await system.disconnect(broker)
            await asyncio.sleep(2 * system.quiet)
            await system.reconnect(broker)

            async def works() -> bool:
                return (await broker.health()).ok

            await system.eventually(works)
            await publisher.publish(topic, "after")
            got = await system.take(messages, 1)
            assert got[-1].value == "after"

    @needs("topic")
    async def test_an_ephemeral_reader_goes_on_where_it_was_cut_off(self, system: Harness) -> None:
        """N1: what is published during the outage comes once, in its order, and nothing comes again."""
        topic = system.topic()
        async with (
            system.connect() as publisher,
            system.connect() as broker,
            broker.subscribe(topic) as messages,
        ):
            await publisher.publish(topic, "before", key="k")
            assert [m.value for m in await system.take(messages, 1)] == ["before"]
            await system.disconnect(broker)
            for value in ("during", "meanwhile"):
                await publisher.publish(topic, value, key="k")
            await asyncio.sleep(2 * system.quiet)
            await system.reconnect(broker)
            await publisher.publish(topic, "after", key="k")
            assert [m.value for m in await system.take(messages, 3)] == ["during", "meanwhile", "after"]
            await system.nothing(messages)

    @seeds(2)
    async def test_nothing_is_lost_when_everybody_is_cut_off_while_messages_flow(
        self, system: Harness, kind: Kind
    ) -> None:
        """N1: twenty publishers, outages at a third and at half; all that was confirmed is handled."""
        address = system.address(kind)
        handled: Counter[str] = Counter()
        confirmed: list[str] = []
        total = 400

        async def handler(message: Message[str]) -> None:
            handled[message.id] += 1

        async with system.connect() as publisher, system.connect() as broker:

            async def publish(first: int) -> None:
                for number in range(first, total, 20):
                    while True:
                        try:
                            receipt = await publisher.publish(address, "v", id=f"m{number}", timeout=system.deadline)
                        except BrokerError as error:
                            assert error.retryable, error
                        else:
                            confirmed.append(receipt.id)
                            break
                    await asyncio.sleep(system.quiet / 20)

            async with system.serve(broker, address, handler, concurrency=10, retry=RetryPolicy(attempts=100)):
                tasks = [asyncio.ensure_future(publish(first)) for first in range(20)]
                for part in (total // 3, total // 2):
                    await system.eventually(partial(_reached, confirmed, part))
                    for process in (publisher, broker):
                        await system.disconnect(process)
                    await asyncio.sleep(system.quiet)
                    for process in (publisher, broker):
                        await system.reconnect(process)
                await asyncio.gather(*tasks)
                await system.eventually(lambda: set(confirmed) <= set(handled), "everything confirmed is handled")
        assert set(handled) == {f"m{n}" for n in range(total)}

    async def test_what_was_in_hand_during_an_outage_is_not_lost(self, system: Harness, kind: Kind) -> None:
        """N1: a handler that runs through it is acknowledged, or its message comes again."""
        address = system.address(kind)
        runs: list[str] = []
        through = asyncio.Event()

        async def handler(message: Message[str]) -> None:
            runs.append(message.value)
            if len(runs) == 1:
                await through.wait()

        async with system.connect() as publisher, system.connect() as broker:
            async with system.serve(broker, address, handler):
                await system.publish(publisher, address, ["a"])
                await system.eventually(lambda: runs)
                await system.disconnect(broker)
                through.set()
                await system.publish(publisher, address, ["b"])
                await asyncio.sleep(2 * system.quiet)
                await system.reconnect(broker)
                await system.eventually(lambda: "b" in runs)
                await asyncio.sleep(2 * system.gone(kind))
            async with system.subscribe(publisher, address) as messages:
                await system.nothing(messages)
        assert runs.count("b") == 1
        assert 1 <= runs.count("a") <= 2

    async def test_events_tell_of_the_outage_and_of_its_end(self, system: Harness, kind: Kind) -> None:
        """N1: Disconnected with the wait before the next attempt, Resumed when it consumes."""
        address = system.address(kind)

        async def handler(message: Message[str]) -> None:
            pass

        async with system.connect() as broker, system.serve(broker, address, handler):
            await system.settle_down()
            assert not system.seen(Disconnected)
            await system.disconnect(broker)
            await system.eventually(lambda: system.seen(Disconnected))
            assert not system.seen(Resumed)
            await system.reconnect(broker)
            await system.eventually(lambda: system.seen(Resumed))
            assert {event.address for event in system.seen(Disconnected)} >= {system.prefix + address.name}

    async def test_reconnecting_waits_longer_each_time_with_full_jitter(self, system: Harness, kind: Kind) -> None:
        """N5: never all at once, never for ever: at most ten seconds, and two that were cut off together part ways."""
        one, two = system.address(kind, "one"), system.address(kind, "two")
        count = 8 if system.virtual else 6  # the last waits are seconds long

        async def handler(message: Message[str]) -> None:
            pass

        def waits(address: AnyTopic | AnyQueue) -> list[float]:
            return [event.wait for event in system.seen(Disconnected) if event.address == system.prefix + address.name][
                :count
            ]

        async with (
            system.connect() as broker,
            system.serve(broker, one, handler),
            system.serve(broker, two, handler),
        ):
            await system.disconnect(broker)
            await system.eventually(
                lambda: len(waits(one)) == len(waits(two)) == count,
                f"{count} attempts each",
                within=10 * system.deadline,
            )
            await system.reconnect(broker)
            await system.eventually(
                lambda: (
                    {event.address for event in system.seen(Resumed)}
                    >= {system.prefix + one.name, system.prefix + two.name}
                )
            )
        assert all(0 <= wait <= 10 for wait in (*waits(one), *waits(two)))
        assert not set(waits(one)) & set(waits(two))
        assert sum(waits(one)[:2] + waits(two)[:2]) < sum(waits(one)[-2:] + waits(two)[-2:])

    async def test_health_is_good_before_and_after_and_bad_during_an_outage(self, system: Harness, kind: Kind) -> None:
        """N1: truthful: the broker's health is that of all its subscriptions, by name."""
        address = system.address(kind)

        async def handler(message: Message[str]) -> None:
            pass

        async with system.connect() as broker, system.serve(broker, address, handler):
            health = await broker.health()
            assert (health.ok, health.problems) == (True, ())
            await system.disconnect(broker)
            await system.eventually(lambda: system.seen(Disconnected))
            health = await broker.health()
            assert not health.ok
            assert any(address.name in problem for problem in health.problems), health.problems
            await system.reconnect(broker)

            async def good() -> bool:
                return (await broker.health()).ok

            await system.eventually(good)
            assert system.seen(Resumed)

    async def test_an_absent_system_is_unavailable_on_entering(self, system: Harness) -> None:
        """N2: in time, with an error of ours; nothing is left behind."""
        broker = system.connect()
        await system.disconnect(broker)
        with pytest.raises(BrokerUnavailable) as caught:
            async with broker:
                pass
        assert caught.value.retryable

    async def test_a_service_does_not_start_without_the_system(self, system: Harness, kind: Kind) -> None:
        """N2: an error at the start, not a service that pretends to run."""
        address = system.address(kind)

        async def handler(message: Message[str]) -> None:
            pass

        async with system.connect() as broker:
            await broker.declare(address)
            await system.disconnect(broker)
            with pytest.raises(BrokerUnavailable):
                async with system.serve(broker, address, handler):
                    pass
            await system.reconnect(broker)

    async def test_a_vanished_address_is_reported_and_not_met_with_silence(self, system: Harness, kind: Kind) -> None:
        """N7: an event, bad health naming it; and work goes on once it is there again."""
        address = system.address(kind)
        handled: list[str] = []

        async def handler(message: Message[str]) -> None:
            handled.append(message.value)

        async with (
            system.connect() as broker,
            system.connect() as admin,
            system.serve(broker, address, handler),
        ):
            await system.publish(admin, address, ["before"])
            await system.eventually(lambda: handled == ["before"])
            await admin.delete(address)
            await system.eventually(lambda: system.seen(Disconnected))
            health = await broker.health()
            assert not health.ok
            assert any(address.name in problem for problem in health.problems)
            await admin.declare(address)
            await system.publish(admin, address, ["after"])
            await system.eventually(lambda: handled == ["before", "after"])

    async def test_a_service_creates_anew_what_has_vanished(self, system: Harness, kind: Kind) -> None:
        """N7: with declare="auto" nobody has to help: publishing and consuming go on."""
        address = system.address(kind)
        handled: list[str] = []

        async def handler(message: Message[str]) -> None:
            handled.append(message.value)

        async with (
            system.connect() as broker,
            system.connect() as admin,
            system.serve(broker, address, handler),
        ):
            await system.publish(broker, address, ["before"])
            await system.eventually(lambda: handled == ["before"])
            await admin.delete(address)
            await system.eventually(lambda: system.seen(Disconnected))
            await system.publish(broker, address, ["after"])
            await system.eventually(lambda: handled == ["before", "after"])

    async def test_reading_by_hand_from_a_vanished_address_raises(self, system: Harness, kind: Kind) -> None:
        """N7: the reader is told; it does not wait for ever."""
        address = system.address(kind)
        async with (
            system.connect() as broker,
            system.connect() as admin,
            system.subscribe(broker, address) as messages,
        ):
            await admin.delete(address)
            with pytest.raises(BrokerError):
                await messages.receive(timeout=system.deadline)

    async def test_many_clients_come_back_after_an_outage(self, system: Harness, kind: Kind) -> None:
        """N5: thirty processes, one outage; all of them work again."""
        address = system.address(kind)
        handled: Counter[str] = Counter()

        async def handler(message: Message[str]) -> None:
            handled[message.value] += 1

        async with system.connect() as publisher:
            await publisher.declare(address)
            stop, ready = asyncio.Event(), asyncio.Semaphore(0)
            brokers = [system.connect() for _ in range(system.crowd(kind, 30))]

            async def process(number: int) -> None:
                async with brokers[number] as broker, system.serve(broker, address, handler):
                    ready.release()
                    await stop.wait()

            tasks = [asyncio.ensure_future(process(number)) for number in range(len(brokers))]
            for _ in brokers:
                await ready.acquire()
            for broker in brokers:
                await system.disconnect(broker)
            await asyncio.sleep(2 * system.quiet)
            for broker in brokers:
                await system.reconnect(broker)
            await system.publish(publisher, address, [f"v{n}" for n in range(100)])
            await system.eventually(lambda: len(handled) == 100)

            async def all_good() -> bool:
                return all([(await broker.health()).ok for broker in brokers])

            await system.eventually(all_good)
            stop.set()
            await asyncio.gather(*tasks)
