"""`RedisDriver`: one process's way to one server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Self

import anyio
from anyio.abc import TaskGroup

from ..._tasks import Hosted
from ...address import Address, AnyDeadLetters, AnyQueue, DeadLetters, Topic
from ...driver import (
    Backlog,
    Capabilities,
    Health,
    Receipt,
    Record,
    Revoked,
    Source,
    StoredRecord,
)
from ...errors import BrokerError, CapabilityError, Closed, ConfigError
from ...events import Listener
from ...policy import MAX_BODY, Start
from .._url import Options, Url
from ._admin import Admin
from ._context import Context
from ._link import Link
from ._options import settings
from ._publish import Outboxes
from ._queue import QueueConsumer
from ._topic import TopicConsumer
from ._wake import Wakes

_PING = 2.0
"""Seconds in which a server that is well answers."""
_FLUSH = 5.0
"""Seconds that closing waits for what is under way."""


class RedisDriver:
    """One connection for commands, one for being woken, and with ``durability="aof"`` one for what must be on disk."""

    def __init__(self, url: Url, options: Options, emit: Listener) -> None:
        self._settings = settings(url, options)
        self._emit = emit
        self._context: Context | None = None
        self._outboxes: Outboxes | None = None
        self._admin: Admin | None = None
        self._hosted: Hosted | None = None
        self._used = False
        self._closed = False

    def __repr__(self) -> str:
        return f"<RedisDriver {self._settings.shown}>"

    # ------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        """Connect, and refuse a server that would lose messages."""
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
        if self._hosted is None or self._context is None or self._outboxes is None:
            return
        try:
            with anyio.move_on_after(_FLUSH):
                await self._context.link.idle()
                await self._context.sealed.idle()
        finally:  # also when that is cancelled: nothing of this may live on
            self._outboxes.close()
            self._closed = True
            await self._hosted.__aexit__(None, None, None)

    async def _run(self, started: asyncio.Future[None]) -> None:
        process = os.urandom(8).hex().encode()
        link, wakes = Link(self._settings), Wakes(self._settings)
        async with anyio.create_task_group() as tasks:
            await _start(tasks, link)
            sealed = link
            if link.facts is not None and link.facts.waitaof:
                sealed = Link(self._settings, sealed=True)
                await _start(tasks, sealed)
            tasks.start_soon(wakes.run)
            context = Context(link, sealed, wakes, process, self._settings, self._emit, {})
            self._outboxes = Outboxes(sealed, process)
            self._admin = Admin(context)
            self._context = context
            started.set_result(None)
            assert self._hosted is not None
            await self._hosted.stopping.wait()
            tasks.cancel_scope.cancel()

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
        outboxes = self._outboxes
        if outboxes is None or self._closed:
            self._open()
            raise Closed("the connection is closed")
        if len(records) == 1:
            record = records[0]
            box = outboxes.quick.get(id(record.address))
            if box is not None and (record.body is None or len(record.body) <= MAX_BODY):
                return await box.add_one(records, timeout)
        return await outboxes.publish(records, timeout)

    def consume(
        self, source: Source, *, prefetch: int, revoked: Revoked
    ) -> AbstractAsyncContextManager[QueueConsumer | TopicConsumer]:
        """Read *source*."""
        address, context = source.address, self._open()
        if isinstance(address, DeadLetters):
            raise CapabilityError(f"{address!r} is browsed and redriven, not consumed")
        if isinstance(address, Topic):
            return TopicConsumer(context, address, source, prefetch, revoked)
        return QueueConsumer(context, address, source, prefetch, revoked)

    # ------------------------------------------------------------------ looking

    async def capabilities(self, address: Address) -> Capabilities:
        """Return what is honoured for *address*."""
        facts = self._open().link.facts
        durable = facts is not None and facts.aof
        if isinstance(address, Topic):
            return Capabilities(backend="redis", durable=durable, replay=True, key_order=True, atomic=True)
        return Capabilities(
            backend="redis",
            durable=durable,
            delay=True,
            priority=True,
            ttl=True,
            dedup=True,
            shared=True,
            atomic=True,
        )

    async def health(self) -> Health:
        """Tell whether the server answers, and what does not work."""
        if self._context is None or self._closed:
            return Health(ok=False, problems=("the connection is closed",), connected=False)
        context = self._context
        problems = [f"{reader!r}: {reader.problem}" for reader in context.readers if reader.problem is not None]
        problems += [f"{channel.decode()}: {why}" for channel, why in context.wakes.refused.items()]
        connected = True
        for link in {context.link, context.sealed}:
            try:
                await link.command(b"PING", timeout=_PING)
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

    # ------------------------------------------------------------------ changing

    async def redrive(
        self, letters: AnyDeadLetters, positions: Sequence[str], to: AnyQueue
    ) -> Sequence[BrokerError | None]:
        """Move letters to *to*, each as a whole."""
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
        """Refuse: there is one kind of queue."""
        raise CapabilityError(f"migrate: {queue!r} on redis has nothing to move to")


async def _start(tasks: TaskGroup, link: Link) -> None:
    """Return when *link* is connected, and keep it so in *tasks*."""
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    tasks.start_soon(link.run, ready)
    await ready
