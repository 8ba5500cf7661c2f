"""Members of a group at a real coordinator, and what they were told, for the tests of membership."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager

import confluent_kafka
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions

from brokerkit.drivers.kafka._cluster import Cluster
from brokerkit.drivers.kafka._coordinator import ask
from brokerkit.drivers.kafka._group import Group
from brokerkit.errors import BrokerError
from tests.servers.kafka import Endpoints

SOON = 20.0


class Member:
    """Takes what it is given, and lets go at once what others wait for, unless it is told to `keep` it."""

    def __init__(
        self, cluster: Cluster, topic: str, *, group: str = "billing", session: float = 6.0, instance: str = ""
    ) -> None:
        self.group = Group(cluster, f"{topic}..{group}", topic, self, session=session, instance=instance)
        self.places: dict[int, tuple[int, str] | None] = {}
        """What is in its hands, with the positions that were stored."""
        self.wanted: list[int] = []
        """What others wait for, and it keeps."""
        self.keep = False
        self.told: list[tuple[str, tuple[int, ...]]] = []
        self.errors: list[BrokerError] = []
        self.go_on = True
        self.task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    @property
    def mine(self) -> set[int]:
        """What is in its hands."""
        return set(self.places)

    @property
    def left(self) -> float:
        """How long it may still believe in that."""
        return self.group.owned_until - asyncio.get_running_loop().time()

    # ------------------------------------------------------------------ what it is told

    def assigned(self, partitions: Mapping[int, tuple[int, str] | None]) -> None:
        assert not self.places.keys() & partitions.keys()
        self.places.update(partitions)
        self._note("assigned", partitions)

    def taken(self, partitions: Collection[int]) -> None:
        assert set(partitions) <= self.places.keys()
        self._note("taken", partitions)
        if self.keep:
            self.wanted += partitions
        else:
            self.let_go(partitions)

    def lost(self, partitions: Collection[int]) -> None:
        assert set(partitions) <= self.places.keys()
        for partition in partitions:
            del self.places[partition]
        self.wanted.clear()
        self._note("lost", partitions)

    def late(self) -> None:
        self._note("late", ())
        if self.go_on:
            self.group.go_on()

    def fail(self, error: BrokerError) -> None:
        self.errors.append(error)
        self._note("fail", ())

    def _note(self, what: str, partitions: Collection[int]) -> None:
        self.told.append((what, tuple(sorted(partitions))))
        self._news.set()

    # ------------------------------------------------------------------ what it does

    def let_go(self, partitions: Collection[int]) -> None:
        """Give up what others wait for."""
        for partition in partitions:
            del self.places[partition]
        self.group.let_go(partitions)

    async def until(self, condition: Callable[[], object], *, within: float = SOON) -> None:
        """Return when *condition* holds, which is looked at whenever this member is told something."""
        async with asyncio.timeout(within):
            while not condition():
                self._news.clear()
                await self._news.wait()

    def start(self) -> None:
        """Begin to run, without joining."""
        self.task = asyncio.create_task(self.group.run())

    async def stop(self) -> None:
        """Leave, and see that nothing of it lives on."""
        await self.group.leave(timeout=5)
        assert self.task is not None
        await asyncio.wait_for(self.task, 5)
        assert self.group.owned_until < asyncio.get_running_loop().time()

    async def die(self) -> None:
        """End as a process does that is killed: nobody is told."""
        assert self.task is not None
        self.task.cancel()
        await asyncio.wait([self.task])


@asynccontextmanager
async def member(cluster: Cluster, topic: str, **options: object) -> AsyncIterator[Member]:
    """Join a group, and leave it."""
    one = Member(cluster, topic, **options)  # type: ignore[arg-type]
    one.start()
    try:
        await asyncio.wait_for(one.group.join(), SOON)
        yield one
    finally:
        await one.stop()


async def settled(members: Sequence[Member], count: int, *, within: float = SOON) -> None:
    """Return when the members have *count* partitions among them, evenly, and none of them twice."""
    least, more = divmod(count, len(members))
    sizes = sorted([least + 1] * more + [least] * (len(members) - more))

    def shared_out() -> bool:
        held = [partition for one in members for partition in one.places]
        return sorted(held) == list(range(count)) and sorted(len(one.places) for one in members) == sizes

    async with asyncio.timeout(within):
        while not shared_out():
            waits = [asyncio.create_task(one._news.wait()) for one in members]
            for one in members:
                one._news.clear()
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()


# ---------------------------------------------------------------------- what others do


async def remove(cluster: Cluster, group: Group) -> None:
    """Remove a member from its group, as an administrator may."""
    answer = await ask(cluster, group._group, group._member.leave(), timeout=SOON, line=None)
    assert not answer.error_code


def grow(endpoints: Endpoints, topic: str, count: int) -> None:
    """Give a topic more partitions."""
    admin = AdminClient({"bootstrap.servers": endpoints.bootstrap()})
    admin.create_partitions([NewPartitions(topic, count)])[topic].result(SOON)


@contextmanager
def another_kind(endpoints: Endpoints, topic: str, group: str) -> Iterator[None]:
    """Have a member of another client in the group."""
    consumer = confluent_kafka.Consumer({"bootstrap.servers": endpoints.bootstrap(), "group.id": group})
    try:
        joined: list[object] = []
        consumer.subscribe([topic], on_assign=lambda _, partitions: joined.append(partitions))
        for _ in range(200):
            consumer.poll(0.1)
            if joined:
                break
        assert joined
        yield
    finally:
        consumer.close()
