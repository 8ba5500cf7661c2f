"""Consumers at random: they come and go, are cancelled and fail to store; each record is done, once, in order."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest

from brokerkit.driver import Delivery, Settlement, Source
from brokerkit.drivers.kafka._claim import lease_of
from brokerkit.drivers.kafka._consumer import TopicConsumer
from brokerkit.errors import BrokerError, DeliveryLost
from brokerkit.testing import VirtualLoop

from .playground import OUT, FakeGroup, World, installed

RECORDS = 150


class Program:
    """What reads with consumers, and remembers what it did."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.random = world.random
        self.done: Counter[str] = Counter()
        """How often each record was acknowledged without an error."""
        self.unsure: set[str] = set()
        """What was acknowledged with an error, and may be stored all the same."""
        self.holders: dict[str, object] = {}
        """Who has what in hand, by what was delivered and not settled, released, revoked or left."""
        self.first: dict[int, int] = {}
        """The highest offset of each partition that was delivered for the first time."""

    async def read(self, rounds: int) -> None:
        """Enter, work for some rounds, and leave with whatever is in hand."""
        me = object()
        source = Source(self.world.topic, "g")
        consumer: TopicConsumer

        async def revoked(deliveries: Sequence[Delivery]) -> None:
            for delivery in deliveries:
                self.forget(me, delivery, hand)
            await self.world.pause()

        hand: dict[int, Delivery] = {}
        async with TopicConsumer(
            self.world.context(), self.world.topic, source, self.random.randint(1, 20), revoked
        ) as consumer:
            for _ in range(rounds):
                await self.receive(consumer, me, hand)
                await self.act(consumer, me, hand)
                if self.random.random() < 0.01 and consumer._group is not None:
                    assert isinstance(consumer._group, FakeGroup)
                    self.world.take_away(consumer._group)
            # What is in hand is handed back by leaving: from here on others may have it.
            for delivery in list(hand.values()):
                self.forget(me, delivery, hand)

    def forget(self, me: object, delivery: Delivery, hand: dict[int, Delivery]) -> None:
        if hand.pop(id(delivery), None) is not None and self.holders.get(delivery.record.id) is me:
            del self.holders[delivery.record.id]

    async def receive(self, consumer: TopicConsumer, me: object, hand: dict[int, Delivery]) -> None:
        receiving = asyncio.ensure_future(consumer.receive(self.random.randint(1, 10), 0.2))
        if self.random.random() < 0.3:
            for _ in range(self.random.randint(0, 6)):
                await asyncio.sleep(0)
            receiving.cancel()
        await asyncio.wait([receiving])
        if receiving.cancelled():
            return
        for delivery in receiving.result():
            self.received(me, delivery)
            hand[id(delivery)] = delivery
        assert len(consumer._held) <= consumer.prefetch

    def received(self, me: object, delivery: Delivery) -> None:
        id = delivery.record.id
        lost = id in self.world.taken_away
        assert lost or not self.done[id], f"{id} comes again after it was acknowledged"
        assert lost or id not in self.holders, f"{id} is in two hands"
        assert lost or delivery.deliveries == 1, f"{id} counts {delivery.deliveries} deliveries"
        self.holders[id] = me
        lease = lease_of(delivery)
        number = lease.claim.number
        if lease.offset > self.first.get(number, -1):
            skipped = range(self.first.get(number, -1) + 1, lease.offset)
            assert not skipped, f"{number}: {skipped} came later than {lease.offset}"
            self.first[number] = lease.offset

    async def act(self, consumer: TopicConsumer, me: object, hand: dict[int, Delivery]) -> None:
        some = [delivery for delivery in hand.values() if self.random.random() < 0.6]
        self.random.shuffle(some)
        if not some:
            return
        match self.random.randint(0, 9):
            case 0:
                for delivery in some:
                    self.forget(me, delivery, hand)
                try:
                    await consumer.release(some)
                except BrokerError as error:
                    assert error.retryable, error
            case 1:
                for delivery in some:
                    try:
                        await consumer.hold(delivery, 1)
                    except BrokerError as error:
                        assert error.retryable or isinstance(error, DeliveryLost), error
            case kind:
                await self.settle(consumer, me, hand, some, copies=kind < 4, confirm=self.random.random() < 0.3)

    async def settle(
        self,
        consumer: TopicConsumer,
        me: object,
        hand: dict[int, Delivery],
        some: list[Delivery],
        *,
        copies: bool,
        confirm: bool,
    ) -> None:
        items = [
            Settlement(delivery, (msgspec.structs.replace(delivery.record, address=OUT),) if copies else ())
            for delivery in some
        ]
        settling = [asyncio.ensure_future(consumer.settle(items, confirm=confirm))]
        if self.random.random() < 0.2:
            settling.append(asyncio.ensure_future(consumer.settle(items)))
        if self.random.random() < 0.1:
            await asyncio.sleep(0)
            settling[0].cancel()
        await asyncio.wait(settling)
        results = list(await consumer.settle(items)) if settling[0].cancelled() else list(settling[0].result())
        for delivery, result in zip(some, results, strict=True):
            id = delivery.record.id
            if result is None:
                self.forget(me, delivery, hand)
                self.done[id] += 1
                assert self.done[id] == 1 or id in self.world.taken_away, f"{id} was acknowledged twice"
            elif isinstance(result, DeliveryLost):
                self.forget(me, delivery, hand)
            else:
                assert result.retryable, result
                self.unsure.add(id)


async def play(seed: int) -> None:
    world = World(seed)
    world.trouble = world.random.choice((0.0, 0.1, 0.3))
    program = Program(world)
    wanted: list[str] = []

    async def write() -> None:
        for number in range(RECORDS):
            wanted.append(f"m{number:03}")
            world.store(wanted[-1], world.random.randrange(len(world.logs)))
            await world.pause(0.03)

    async def work() -> None:
        for _ in range(4):
            await program.read(world.random.randint(1, 25))
            await world.pause(0.2)

    await asyncio.gather(write(), *(work() for _ in range(3)))
    world.trouble = 0.0
    async with asyncio.timeout(600):
        while not set(wanted) <= program.done.keys() | program.unsure:
            await program.read(20)
        while any(place != (len(log), "") for place, log in zip(_places(world), world.logs, strict=True)):
            await program.read(20)
    copies = Counter(world.copies)
    assert all(count == 1 or id in world.taken_away for id, count in copies.items()), copies


def _places(world: World) -> list[tuple[int, str] | None]:
    return [world.notes.get(number) for number in range(len(world.logs))]


@pytest.mark.parametrize("first", range(0, 60, 15))
def test_whatever_happens_each_record_is_done_once(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    for seed in range(first, first + 15):
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            try:
                runner.run(play(seed))
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
