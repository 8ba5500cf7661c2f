"""An administrator at a real cluster, for the tests of what one asks for."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio

from brokerkit.address import Address, AnyDeadLetters, AnyQueue, AnyTopic, Topic, internal, redrive_queue
from brokerkit.driver import DEAD, Receipt, Record, StoredRecord
from brokerkit.drivers._log import Tracker
from brokerkit.drivers._url import Options, parse
from brokerkit.drivers.kafka._admin import Admin
from brokerkit.drivers.kafka._cluster import Cluster
from brokerkit.drivers.kafka._context import Context
from brokerkit.drivers.kafka._coordinator import committed, store_start
from brokerkit.drivers.kafka._options import settings
from brokerkit.drivers.kafka._publish import Outboxes
from brokerkit.drivers.kafka._time import ServerTime
from tests.servers.kafka import PREFIX

GROUP = "billing"


def named(partitions: int = 4, *, name: str = "orders", **options: Any) -> AnyTopic:
    """Return a topic of this test alone."""
    options.setdefault("retention", None)  # the times of these tests are long past
    return Topic(f"{PREFIX}{uuid.uuid4().hex[:12]}.{name}", bytes, partitions=partitions, **options)


class Opened:
    """An administrator at a cluster."""

    def __init__(self, context: Context, topic: AnyTopic) -> None:
        self.context = context
        self.cluster = context.cluster
        self.admin = Admin(context)
        self.topic = topic

    @property
    def letters(self) -> AnyDeadLetters:
        """Where the letters of the group go."""
        return self.topic.dead_letters(GROUP)

    @property
    def again(self) -> AnyQueue:
        """Where they come back."""
        return redrive_queue(self.topic, GROUP)

    @property
    def group_id(self) -> str:
        """What Kafka calls the group."""
        return internal(self.topic.name, GROUP)

    async def put(self, address: Address, ids: Sequence[str], **options: Any) -> list[str]:
        """Store a record for each id; return the positions."""
        results = await self.context.outboxes.publish([record(address, id, **options) for id in ids], 10)
        assert all(isinstance(result, Receipt) for result in results), results
        return [result.position or "" for result in results if isinstance(result, Receipt)]

    async def seen(self, address: Address, limit: int = 1000, **options: Any) -> list[StoredRecord]:
        """Browse."""
        values: dict[str, Any] = {"start": None, "after": None, **options}
        return list(await self.admin.browse(address, limit=limit, **values))

    async def ids(self, address: Address, **options: Any) -> list[str]:
        """Browse, and return the ids."""
        return [stored.record.id for stored in await self.seen(address, **options)]

    async def bury(self, ids: Sequence[str], **options: Any) -> list[str]:
        """Store letters, and return the positions."""
        return await self.put(self.letters, ids, headers=((DEAD + "reason", b"no good"), ("a", b"1")), **options)

    async def commit(self, places: Mapping[int, Tracker | int], group_id: str | None = None) -> None:
        """Store how far the group is, as a consumer does."""
        notes = {
            number: (place, "") if isinstance(place, int) else (place.base, place.encode())
            for number, place in places.items()
        }
        assert await store_start(self.cluster, group_id or self.group_id, self.topic.name, notes, 10)

    async def stored(self, group_id: str | None = None) -> dict[int, tuple[int, str] | None]:
        """Return what is stored of how far the group is."""
        numbers = range(self.topic.partitions)
        return dict(await committed(self.cluster, group_id or self.group_id, self.topic.name, numbers, 10))


def record(address: Address, id: str, **options: Any) -> Record:
    return Record(address, id, options.pop("body", b"body"), timestamp=options.pop("timestamp", 1e9), **options)


@asynccontextmanager
async def opened(url: str, topic: AnyTopic | None = None, **options: Any) -> AsyncIterator[Opened]:
    """Connect, as a process of its own."""
    made = settings(parse(url), Options(options, "kafka://"))
    cluster = Cluster(made)
    outboxes = Outboxes(cluster)
    started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    stopping = asyncio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cluster.run, started, stopping)
        await started
        outboxes.start()
        try:
            yield Opened(Context(cluster, outboxes, made, lambda _: None, ServerTime(), {}), topic or named())
        finally:
            outboxes.close()
            stopping.set()
            tasks.cancel_scope.cancel()
