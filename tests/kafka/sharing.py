"""Members of share groups, for the tests of them."""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

from brokerkit.drivers.kafka._cluster import Cluster
from brokerkit.drivers.kafka._share import Share
from brokerkit.drivers.kafka._share_locks import Lock
from brokerkit.errors import BrokerError

SOON = 20.0


def named() -> str:
    """Return the id of a member."""
    return base64.b64encode(uuid.uuid4().bytes).decode().rstrip("=")


class Member:
    """Takes what comes, and remembers what it was told."""

    def __init__(
        self, cluster: Cluster, topic: str, group: str | None = None, *, room: int = 100, **options: Any
    ) -> None:
        wanted: dict[str, Any] = {"timeout": 5.0, "lock": None, **options}
        self.share = Share(cluster, topic, group or topic, named(), self, **wanted)
        self.share.room = room
        self.taken: list[Lock] = []
        """All that ever came."""
        self.gone: list[Lock] = []
        self.back: list[Lock] = []
        self.errors: list[BrokerError] = []
        self.unreadable: list[BrokerError] = []
        self.stalls: list[tuple[int, int, int]] = []
        self.goes_on: list[int] = []
        self.told = asyncio.Event()
        self.eager = True
        """Whether all is taken as it comes."""
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.share.run())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.share.close()
        await self.die()

    async def die(self) -> None:
        """Break all connections, without a word."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def arrived(self) -> None:
        if self.eager:
            self.taken += self.share.take(10_000)
        self.told.set()

    def lost(self, locks: Sequence[Lock]) -> None:
        self.gone += locks
        self.told.set()

    def regained(self, locks: Sequence[Lock]) -> None:
        self.back += locks
        self.told.set()

    def fail(self, error: BrokerError) -> None:
        self.errors.append(error)
        self.told.set()

    def damaged(self, error: BrokerError) -> None:
        self.unreadable.append(error)
        self.told.set()

    def stalled(self, partition: int, ahead: int, window: int) -> None:
        self.stalls.append((partition, ahead, window))
        self.told.set()

    def resumed(self, partition: int) -> None:
        self.goes_on.append(partition)
        self.told.set()

    async def until(self, condition: Callable[[], object], *, within: float = SOON) -> None:
        """Return when *condition* holds."""
        async with asyncio.timeout(within):
            while not condition():
                self.told.clear()
                try:
                    async with asyncio.timeout(0.02):  # not everything is told
                        await self.told.wait()
                except TimeoutError:
                    pass

    async def have(self, count: int, *, within: float = SOON) -> list[Lock]:
        """Return all that ever came, when there are *count*."""
        await self.until(lambda: len(self.taken) >= count, within=within)
        return self.taken

    async def batches(self, count: int) -> AsyncIterator[list[Lock]]:
        """Yield what comes, until there are *count*."""
        done = 0
        while done < count:
            new = (await self.have(done + 1))[done:]
            done += len(new)
            yield new

    def finish(self, locks: Sequence[Lock]) -> None:
        """Be done with *locks*."""
        for lock in locks:
            self.share.accept(lock)
        self.share.room += len(locks)

    async def confirm(self, locks: Sequence[Lock], *, within: float = SOON) -> list[BrokerError | None]:
        """Be done with *locks*, and return what the broker says to each."""
        self.finish(locks)
        async with asyncio.timeout(within):
            return list(await asyncio.gather(*map(self.share.confirmed, locks)))

    @property
    def offsets(self) -> list[int]:
        """Where all is that ever came."""
        return [lock.offset for lock in self.taken]


@asynccontextmanager
async def member(cluster: Cluster, topic: str, group: str | None = None, **options: Any) -> AsyncIterator[Member]:
    """Take part in a group."""
    async with Member(cluster, topic, group, **options) as joined:
        yield joined
