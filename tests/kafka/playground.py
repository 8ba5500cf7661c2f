"""A topic and a group within the test's process, in virtual time: for consumers that are tried at random.

What a coordinator promises is kept here in its simplest form: a partition has one owner, who is asked before it moves, unless
it is taken away; only the owner can store a position.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from brokerkit.address import Address, AnyTopic, Topic
from brokerkit.driver import Receipt, Record
from brokerkit.drivers.kafka import _consumer
from brokerkit.drivers.kafka._records import Native
from brokerkit.errors import BrokerError, BrokerUnavailable, DeliveryLost
from brokerkit.events import Event

from .test_consumer_claim import Entry, Watch

OUT = Topic("out", bytes)


class World:
    """A topic, the group that reads it, and where copies go."""

    def __init__(self, seed: int, partitions: int = 3) -> None:
        self.random = random.Random(seed)
        self.topic: AnyTopic = Topic("orders", bytes, partitions=partitions)
        self.logs: list[list[Entry]] = [[] for _ in range(partitions)]
        self.notes: dict[int, tuple[int, str]] = {}
        self.owners: dict[int, FakeGroup] = {}
        self.members: list[FakeGroup] = []
        self.copies: list[str] = []
        self.taken_away: set[str] = set()
        """The ids of what nobody had stored as done when its partition was taken away from somebody."""
        self.trouble = 0.0
        """How often something fails."""
        self.readers: dict[Any, None] = {}
        self.events: list[Event] = []

    def context(self) -> Any:
        info = SimpleNamespace(name=self.topic.name, partitions=tuple(range(len(self.logs))))

        async def topic(name: str, *, timeout: float, fresh: bool = False) -> Any:
            return info

        settings = SimpleNamespace(session=10.0, timeout=5.0, instance="", shown="kafka://here")
        cluster = SimpleNamespace(
            settings=settings,
            topic=topic,
            known=lambda name: info,  # pyright: ignore[reportUnknownLambdaType]
            watchers=set(),
            problem=None,
            world=self,
        )
        return SimpleNamespace(
            cluster=cluster,
            outboxes=self,
            settings=settings,
            emit=self.events.append,
            time=Watch(),
            readers=self.readers,
        )

    def store(self, id: str, partition: int) -> None:
        log = self.logs[partition]
        log.append(Entry(len(log), (("bk-id", id.encode()),), 1000))
        for member in self.members:
            member.fetcher_news()

    async def pause(self, longest: float = 0.05) -> None:
        await asyncio.sleep(self.random.random() ** 3 * longest)

    def unlucky(self) -> bool:
        return self.random.random() < self.trouble

    async def copy(self, records: Sequence[Record], timeout: float) -> list[Receipt | BrokerError]:
        """Store copies."""
        await self.pause()
        if self.unlucky():
            return [BrokerUnavailable("no leader") for _ in records]
        self.copies += [record.id for record in records]
        await self.pause()
        return [Receipt(record.id) for record in records]

    # ------------------------------------------------------------------ the coordinator

    def share(self) -> None:
        """Give what nobody has to those who have least, and ask for some of those who have too much."""
        members = [member for member in self.members if member.joined]
        if not members:
            return
        for partition in range(len(self.logs)):
            if partition not in self.owners:
                self.give(partition, min(members, key=lambda member: len(member.held)))
        most = math.ceil(len(self.logs) / len(members))
        for member in members:
            surplus = sorted(member.held - member.asked)[most:]
            if surplus:
                member.asked |= set(surplus)
                member.told.taken(surplus)

    def give(self, partition: int, member: FakeGroup) -> None:
        self.owners[partition] = member
        member.held.add(partition)
        asyncio.get_running_loop().call_soon(member.tell_assigned, partition)

    def free(self, partition: int, member: FakeGroup) -> None:
        member.held.discard(partition)
        member.asked.discard(partition)
        if self.owners.get(partition) is member:
            del self.owners[partition]
        asyncio.get_running_loop().call_soon(self.share)

    def take_away(self, member: FakeGroup) -> None:
        """Have *member* lose all that it has."""
        lost = sorted(member.held)
        for partition in lost:
            base = self.notes.get(partition, (0, ""))[0]
            self.taken_away |= {(entry.headers[0][1] or b"").decode() for entry in self.logs[partition][base:]}
            self.free(partition, member)
        member.told.lost(lost)


class FakeGroup:
    """One member."""

    def __init__(self, cluster: Any, group: str, topic: str, told: Any, *, session: float, instance: str) -> None:
        self.world: World = cluster.world
        self.told = told
        self.held: set[int] = set()
        self.asked: set[int] = set()
        self.owned_until = math.inf
        self.problem: BrokerError | None = None
        self.joined = False

    async def join(self) -> None:
        await self.world.pause()
        self.joined = True
        self.world.members.append(self)
        self.world.share()

    async def run(self) -> None:
        await asyncio.get_running_loop().create_future()

    def tell_assigned(self, partition: int) -> None:
        if partition in self.held:
            self.told.assigned({partition: self.world.notes.get(partition)})

    def fetcher_news(self) -> None:
        self.told._fetcher.stored()

    def let_go(self, partitions: Sequence[int]) -> None:
        for partition in partitions:
            self.world.free(partition, self)

    def go_on(self) -> None:
        pass

    async def commit(self, offsets: Mapping[int, tuple[int, str]], *, timeout: float) -> dict[int, BrokerError]:
        world = self.world
        numbers = {partition: partition in self.held for partition in offsets}
        await world.pause()
        if world.unlucky():
            return dict.fromkeys(offsets, BrokerUnavailable("no coordinator"))
        failed: dict[int, BrokerError] = {}
        for partition, note in offsets.items():
            if world.owners.get(partition) is self and numbers[partition]:
                world.notes[partition] = note
            else:
                failed[partition] = DeliveryLost()
        if world.unlucky():
            return dict.fromkeys(offsets, BrokerUnavailable("the answer was lost"))
        await world.pause()
        return failed

    async def leave(self, *, timeout: float) -> None:
        if self in self.world.members:
            self.world.members.remove(self)
        self.joined = False
        for partition in sorted(self.held):
            self.world.free(partition, self)


class FakeFetcher:
    """What is in the logs, some time later."""

    def __init__(self, cluster: Any, topic: str, told: Any) -> None:
        self.world: World = cluster.world
        self.told = told
        self.at: dict[int, int] = {}
        """What is taken next."""
        self.seen: dict[int, int] = {}
        """What has arrived."""
        self.news = asyncio.Event()

    async def run(self) -> None:
        while True:
            await self.news.wait()
            self.news.clear()
            await self.world.pause()
            self.seen = {partition: len(self.world.logs[partition]) for partition in self.at}
            self.told.arrived()

    def stored(self) -> None:
        self.news.set()

    def begin(self, partition: int, offset: int) -> None:
        self.at[partition] = offset
        self.seen.pop(partition, None)
        self.news.set()

    def stop(self, partition: int) -> None:
        self.at.pop(partition, None)
        self.seen.pop(partition, None)

    def end(self, partition: int) -> int | None:
        return self.seen.get(partition)

    def ready(self) -> list[int]:
        return [partition for partition, at in self.at.items() if at < self.seen.get(partition, 0)]

    def take(self, partition: int, most: int) -> list[Native]:
        at = self.at[partition]
        found: list[Native] = list(self.world.logs[partition][at : min(at + most, self.seen.get(partition, 0))])
        self.at[partition] = at + len(found)
        return found

    def next_offset(self, partition: int) -> int:
        return self.at[partition]


def installed(patch: pytest.MonkeyPatch) -> None:
    """Have consumers live in a `World`."""

    async def committed(cluster: Any, group: str, topic: str, partitions: Any, timeout: float) -> Any:
        return {partition: cluster.world.notes.get(partition) for partition in partitions}

    async def store_start(cluster: Any, group: str, topic: str, offsets: Any, timeout: float) -> bool:
        if cluster.world.members:
            return False
        cluster.world.notes.update(offsets)
        return True

    async def resolve(cluster: Any, topic: Address, start: Any, *, timeout: float) -> list[int]:
        return [0] * len(cluster.world.logs)

    patch.setattr(_consumer, "Group", FakeGroup)
    patch.setattr(_consumer, "Fetcher", FakeFetcher)
    patch.setattr(_consumer, "committed", committed)
    patch.setattr(_consumer, "store_start", store_start)
    patch.setattr(_consumer, "resolve", resolve)
