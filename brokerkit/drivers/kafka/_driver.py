"""`KafkaDriver`: one process's way to one cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Final, Self

import anyio

from ..._tasks import Hosted
from ...address import Address, AnyDeadLetters, AnyQueue, AnyTopic, DeadLetters, Queue, Topic
from ...driver import Backlog, Capabilities, Consumer, Health, Receipt, Record, Revoked, Source, StoredRecord
from ...errors import BrokerError, CapabilityError, Closed, ConfigError
from ...events import Listener
from ...policy import Start
from .._url import Options, Url
from ._admin import Admin
from ._cluster import Cluster
from ._consumer import TopicConsumer
from ._context import Context
from ._options import settings
from ._publish import Outboxes
from ._queue import QueueConsumer, can
from ._tiers import tiered
from ._time import ServerTime
from ._upkeep import Upkeep

_LOOK: Final = 3.0
"""Seconds in which a cluster that is well answers."""
_FLUSH: Final = 5.0
"""Seconds that closing waits for what is under way."""


class KafkaDriver:
    """Connections to the brokers of one cluster, shared by all that this process publishes and reads."""

    def __init__(self, url: Url, options: Options, emit: Listener) -> None:
        self._settings = settings(url, options)
        self._emit = emit
        self._context: Context | None = None
        self._admin: Admin | None = None
        self._upkeep: Upkeep | None = None
        self._hosted: Hosted | None = None
        self._used = False
        self._closed = False

    def __repr__(self) -> str:
        return f"<KafkaDriver {self._settings.shown}>"

    # ------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        """Connect to the first broker of the URL that answers."""
        if self._used:
            raise ConfigError("this connection was opened before: make a new one")
        self._used = True
        self._hosted = Hosted(f"brokerkit {self._settings.shown}", self._run)
        await self._hosted.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None, /
    ) -> None:
        """Wait for what is under way, and disconnect."""
        if self._hosted is None or self._context is None:
            return
        try:
            with anyio.move_on_after(_FLUSH):
                await self._context.outboxes.idle()
        finally:  # also when that is cancelled: nothing of this may live on
            self._context.outboxes.close()
            self._closed = True
            await self._hosted.__aexit__(None, None, None)

    async def _run(self, started: asyncio.Future[None]) -> None:
        assert self._hosted is not None
        cluster = Cluster(self._settings)
        outboxes = Outboxes(cluster)
        connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cluster.run, connected, self._hosted.stopping)
                await connected
                outboxes.start()
                self._context = Context(cluster, outboxes, self._settings, self._emit, ServerTime(), {})
                self._admin = Admin(self._context)
                self._upkeep = Upkeep(self._context)
                started.set_result(None)
                await self._hosted.stopping.wait()
                tasks.cancel_scope.cancel()
        finally:
            outboxes.close()

    def _open(self) -> Context:
        if self._context is None or self._closed:
            raise Closed("the connection is closed" if self._closed else "the connection is not open yet")
        return self._context

    def _manager(self) -> Admin:
        self._open()
        assert self._admin is not None
        return self._admin

    # ------------------------------------------------------------------ publishing and reading

    async def publish(self, records: Sequence[Record], *, timeout: float) -> Sequence[Receipt | BrokerError]:
        """Store *records*; one result each."""
        outboxes = self._open().outboxes
        if len(records) == 1:
            stored = outboxes.quick(records[0], timeout)
            if stored is not None:
                return await stored
        return await outboxes.publish(records, timeout)

    def consume(self, source: Source, *, prefetch: int, revoked: Revoked) -> AbstractAsyncContextManager[Consumer]:
        """Read *source*."""
        address, context = source.address, self._open()
        if isinstance(address, DeadLetters):
            raise CapabilityError(f"{address!r} is browsed and redriven, not consumed")
        if isinstance(address, Queue):
            assert self._upkeep is not None
            return QueueConsumer(context, self._upkeep, address, source, prefetch, revoked)
        return TopicConsumer(context, address, source, prefetch, revoked)

    # ------------------------------------------------------------------ looking

    async def capabilities(self, address: Address) -> Capabilities:
        """Return what is honoured for *address*."""
        context = self._open()
        if isinstance(address, Topic):
            return Capabilities(backend="kafka", durable=True, replay=True, key_order=True)
        if isinstance(address, Queue) and tiered(address):
            return await can(context, address)
        return Capabilities(backend="kafka", durable=True, delay=True)

    async def health(self) -> Health:
        """Tell whether the cluster answers, and what does not work."""
        if self._context is None or self._closed:
            return Health(ok=False, problems=("the connection is closed",), connected=False)
        context = self._context
        problems = [f"{reader!r}: {reader.problem}" for reader in context.readers if reader.problem is not None]
        problems += self._upkeep.problems if self._upkeep is not None else ()
        connected = True
        try:
            await context.cluster.refreshed(_LOOK)
        except BrokerError as error:
            problems.insert(0, str(error))
            connected = False
        return Health(ok=not problems, problems=tuple(problems), connected=connected)

    async def browse(
        self, address: Address, *, limit: int, start: Start | None = None, after: str | None = None
    ) -> Sequence[StoredRecord]:
        """Return what is stored, the oldest first."""
        return await self._manager().browse(address, limit=limit, start=start, after=after)

    async def describe(self, address: Address) -> Mapping[str, object] | None:
        """Return the settings that exist."""
        return await self._manager().describe(address)

    async def backlog(self, source: Source) -> Backlog:
        """Return what is left to do."""
        return await self._manager().backlog(source)

    async def foreign_backlog(self, topic: AnyTopic, group: str, timeout: float) -> int:
        """Return how many records of *topic* are left to the Kafka group *group*, which may be another client's.

        Groups of brokerkit's own have other names than those in a `Source`.

        Raises:
            NotFound: there is no such topic.
            AuthorizationError: the group or the topic may not be described.
            BrokerUnavailable: no answer in *timeout* seconds.
        """
        return await self._manager().foreign_backlog(topic, group, timeout)

    # ------------------------------------------------------------------ changing

    async def redrive(
        self, letters: AnyDeadLetters, positions: Sequence[str], to: AnyQueue
    ) -> Sequence[BrokerError | None]:
        """Move letters to *to*: each is stored there, then gone here."""
        return await self._manager().redrive(letters, positions, to)

    async def declare(self, address: Address) -> None:
        """Create *address* if it is missing."""
        await self._manager().declare(address)

    async def delete(self, address: Address, group: str | None = None) -> None:
        """Remove *address* with all that is derived from it, or one group's position."""
        await self._manager().delete(address, group)

    async def purge(self, address: AnyQueue | AnyDeadLetters) -> int:
        """Remove all that waits and return how many."""
        return await self._manager().purge(address)

    async def seek(self, source: Source) -> None:
        """Move a group's position."""
        await self._manager().seek(source)

    async def migrate(self, queue: AnyQueue) -> None:
        """Move *queue* from a classic to a share group."""
        await self._manager().migrate(queue)
