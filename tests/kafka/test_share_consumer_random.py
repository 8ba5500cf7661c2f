"""Consumers of a share group at random: they come and go, are cancelled, killed and cut off; each message is done."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest

from brokerkit.address import Queue
from brokerkit.driver import Delivery, Settlement
from brokerkit.drivers.kafka._engine import Terms
from brokerkit.drivers.kafka._share_consumer import ShareConsumer
from brokerkit.errors import DeliveryLost
from brokerkit.policy import LONE_DELIVERY
from brokerkit.testing import VirtualLoop

from .share_playground import FakeShare, World, copied, installed

RECORDS = 150
LEASE = 0.4
OUT = Queue("out", bytes)


class Program:
    """What reads with consumers, and remembers what it did."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.random = world.random
        self.done: Counter[str] = Counter()
        """How often each message was acknowledged without an error."""
        self.holders: dict[str, object] = {}
        """Who has what in hand."""
        self.proven = 0
        """How often something came beside what had come alone."""
        self.terms = Terms("share", limit=world.limit, lock=LEASE)

    async def read(self, rounds: int) -> None:
        """Enter, work for some rounds, and leave or die with whatever is in hand."""
        world, me, hand, lone = self.world, object(), dict[str, Delivery](), dict[object, float]()
        dies = self.random.random() < 0.1

        async def revoked(deliveries: Sequence[Delivery]) -> None:
            for delivery in deliveries:
                self.forget(me, delivery, hand)
            await world.pause()

        prefetch = self.random.randint(1, 20)
        async with ShareConsumer(world.context(), world.queue, prefetch, revoked, self.terms) as consumer:
            for _ in range(rounds):
                await self.receive(consumer, me, hand, lone)
                await self.act(consumer, me, hand)
                share = consumer._share
                if self.random.random() < 0.02 and isinstance(share, FakeShare):
                    share.cut()
            # What is in hand is handed back: from here on others may have it.
            for delivery in list(hand.values()):
                self.forget(me, delivery, hand)
            if dies:
                hosted = consumer._hosted
                assert hosted is not None
                assert hosted.task is not None
                hosted.task.cancel()
                await asyncio.wait([hosted.task])

    async def receive(
        self, consumer: ShareConsumer, me: object, hand: dict[str, Delivery], lone: dict[object, float]
    ) -> None:
        """Receive something; *lone* is since when what came alone is in hand."""
        if self.random.random() < 0.1:
            consumer.prefetch = self.random.randint(0, 20)
        limit, timeout = self.random.randint(1, 30), self.random.random() * 0.3

        async def timed() -> tuple[Sequence[Delivery], float]:
            return await consumer.receive(limit, timeout), asyncio.get_running_loop().time()

        receiving = asyncio.ensure_future(timed())
        if self.random.random() < 0.2:
            await self.world.pause()
            receiving.cancel()
        await asyncio.wait([receiving])
        if receiving.cancelled():
            return
        got, now = receiving.result()
        assert len(hand) + len(got) <= max(consumer.prefetch, len(hand))
        for delivery in got:
            id = delivery.record.id
            assert id not in hand or id in self.world.excused, f"{id} is in hand already"
            assert id not in self.holders or id in self.world.excused, f"{id} is in two hands"
            hand[id] = delivery
            self.holders[id] = me
        there = {delivery.token for delivery in hand.values()}
        for token in lone.keys() - there:
            del lone[token]
        if got:
            assert all(now >= since + LEASE for since in lone.values()), "something came beside what is not proven"
            self.proven += bool(lone)
        if any(delivery.deliveries >= LONE_DELIVERY for delivery in got):
            assert len(got) == 1, "it did not come alone"
            assert len(hand) == len(lone) + 1, "it came beside what is not proven"
            lone[got[0].token] = now

    async def act(self, consumer: ShareConsumer, me: object, hand: dict[str, Delivery]) -> None:
        """Settle or release some of what is in hand."""
        chosen = [delivery for delivery in hand.values() if self.random.random() < 0.6]
        if not chosen:
            return
        if self.random.random() < 0.15:
            for delivery in chosen:
                self.forget(me, delivery, hand)
            await consumer.release(chosen)
            return
        items: list[Settlement] = []
        for delivery in chosen:
            fate = self.random.random()
            if fate < 0.1:
                again = copied(delivery.record, attempts=delivery.record.attempts + 1, delay=self.random.random() * 0.9)
                items.append(Settlement(delivery, (again,)))
            elif fate < 0.3:
                items.append(Settlement(delivery, (copied(delivery.record, address=OUT),)))
            else:
                items.append(Settlement(delivery))
        for item in items:  # others may have it before we hear that it is stored
            if item.publish:
                self.holders.pop(item.delivery.record.id, None)
        results = await consumer.settle(items, confirm=self.random.random() < 0.5)
        for item, result in zip(items, results, strict=True):
            id = item.delivery.record.id
            if result is None:
                self.forget(me, item.delivery, hand)
                if not item.publish or item.publish[0].address is OUT:
                    self.done[id] += 1
                    assert self.done[id] == 1 or id in self.world.excused, f"{id} was done twice"
            elif isinstance(result, DeliveryLost):
                assert id in self.world.excused
                self.forget(me, item.delivery, hand)
            else:
                assert result.retryable, result

    def forget(self, me: object, delivery: Delivery, hand: dict[str, Delivery]) -> None:
        id = delivery.record.id
        if hand.get(id) is delivery:
            del hand[id]
            if self.holders.get(id) is me:
                del self.holders[id]


async def play(seed: int) -> int:
    world = World(seed, limit=10)
    program = Program(world)
    ids = [f"m{number}" for number in range(RECORDS)]

    async def publish() -> None:
        for id in ids:
            await world.pause()
            delay = world.random.random() * 0.9 if world.random.random() < 0.1 else 0.0
            world.store(id, delay=delay, deliveries=2 if world.random.random() < 0.02 else 0)

    async def readers() -> None:
        for _ in range(5):
            await program.read(15)

    world.trouble = world.random.choice([0.0, 0.1, 0.2])
    async with asyncio.timeout(2000):
        await asyncio.gather(publish(), *(readers() for _ in range(3)))
        world.trouble = 0.0
        while world.left:
            await program.read(20)
    assert not world.dropped
    assert all(program.done[id] or id in world.excused for id in ids)
    assert {record.id for record in world.copies} <= set(ids)
    return program.proven


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_whatever_happens_each_message_is_done(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    proven = 0
    for seed in range(first, first + 10):
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            try:
                proven += runner.run(play(seed))
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
    assert proven
