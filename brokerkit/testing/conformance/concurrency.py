"""CONCURRENCY: many at once, and nothing gets mixed up."""

from __future__ import annotations

import asyncio
from collections import Counter

from ...message import Message
from ._harness import Harness, Kind
from ._runner import Suite, seeds


class Concurrency(Suite):
    @seeds(1)
    async def test_many_publishers_and_many_consumers_lose_and_repeat_nothing(
        self, system: Harness, kind: Kind
    ) -> None:
        """W1: fifty publishers, fifty consumers in five processes: exactly what was published, each once."""
        address = system.address(kind)
        handled: Counter[str] = Counter()

        async def handler(message: Message[str]) -> None:
            await asyncio.sleep(0)
            handled[message.value] += 1

        brokers = [system.connect() for _ in range(system.crowd(kind, 5))]
        async with system.connect() as publisher:
            await publisher.declare(address)
            stop, ready = asyncio.Event(), asyncio.Semaphore(0)

            async def process(number: int) -> None:
                async with brokers[number] as broker, system.serve(broker, address, handler, concurrency=10):
                    ready.release()
                    await stop.wait()

            tasks = [asyncio.ensure_future(process(number)) for number in range(len(brokers))]
            for _ in brokers:
                await ready.acquire()
            await system.settle_down()

            async def publish(part: int) -> None:
                for number in range(40):
                    await publisher.publish(address, f"{part}-{number}")

            await asyncio.gather(*(publish(part) for part in range(50)))
            await system.eventually(lambda: len(handled) == 2000)
            await system.settle_down()
            stop.set()
            await asyncio.gather(*tasks)
        assert set(handled) == {f"{part}-{number}" for part in range(50) for number in range(40)}
        assert sum(handled.values()) == 2000, "without a fault nothing is handled twice"

    @seeds(1)
    async def test_ten_thousand_messages_are_there_after_closing(self, system: Harness, kind: Kind) -> None:
        """W2: published at once and closed; read by another process."""
        address = system.address(kind)
        async with system.connect() as publisher:
            results = await publisher.publish_many(address, [str(n) for n in range(10_000)], timeout=system.deadline)
            assert len({getattr(result, "id", None) for result in results}) == 10_000
        async with system.connect() as broker, system.subscribe(broker, address, prefetch=1000) as messages:
            found = [int(m.value) for m in await system.drain(messages)]
        assert sorted(found) == list(range(10_000))

    async def test_many_subscriptions_of_a_broker_do_not_disturb_each_other(self, system: Harness, kind: Kind) -> None:
        """W1: forty addresses in one process, opened and closed at the same time."""
        async with system.connect() as broker:

            async def use(number: int) -> list[str]:
                address = system.address(kind, f"{kind}{number}")
                await system.publish(broker, address, [f"{number}-{n}" for n in range(5)])
                async with system.subscribe(broker, address) as messages:
                    return sorted(m.value for m in await system.drain(messages))

            found = await asyncio.gather(*(use(number) for number in range(40)))
            assert found == [[f"{number}-{n}" for n in range(5)] for number in range(40)]

    async def test_several_tasks_may_read_one_subscription(self, system: Harness, kind: Kind) -> None:
        """W1: each message reaches one of them."""
        address = system.address(kind)
        seen: list[str] = []
        async with system.connect() as broker:
            await broker.publish_many(address, [f"v{n}" for n in range(100)])
            async with system.subscribe(broker, address, prefetch=20) as messages:

                async def read() -> None:
                    async for message in messages:
                        await asyncio.sleep(0)
                        seen.append(message.value)
                        await message.ack()

                tasks = [asyncio.ensure_future(read()) for _ in range(5)]
                await system.eventually(lambda: len(seen) == 100)
                await system.settle_down()
            await asyncio.gather(*tasks)
        assert sorted(seen) == sorted(f"v{n}" for n in range(100))

    async def test_first_uses_of_an_address_at_the_same_time_agree(self, system: Harness, kind: Kind) -> None:
        """W1: declared once, by whoever is first; nobody fails."""
        address = system.address(kind)
        async with system.connect() as one, system.connect() as two:
            receipts = await asyncio.gather(*((one, two)[n % 2].publish(address, f"v{n}") for n in range(20)))
            assert len({receipt.id for receipt in receipts}) == 20
            async with system.subscribe(one, address) as messages:
                assert len(await system.drain(messages)) == 20
