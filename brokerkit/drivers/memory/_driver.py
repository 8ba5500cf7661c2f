"""`MemoryDriver`: one connection to a memory server."""

from __future__ import annotations

import asyncio
import math
import os
from asyncio import _get_running_loop as running_loop  # None after a fork, instead of an error
from asyncio import get_running_loop
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Self

from ...address import Address, AnyDeadLetters, AnyQueue, DeadLetters, Topic, check_name
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
from ...errors import (
    BrokerError,
    BrokerUnavailable,
    CapabilityError,
    Closed,
    ConfigError,
    NotAttempted,
    PublishUnknown,
)
from ...events import Expired, Listener
from ...policy import MAX_BODY, Start
from .._url import Options, Url
from ._consumer import TURN, Consumer
from ._faults import Faults
from ._letters import Letters
from ._queue import QueueStore
from ._readers import QueueConsumer, TopicConsumer
from ._server import Server, Store
from ._stored import number_of, too_large
from ._topic import TopicStore

MAX_MESSAGES = 100_000
_CACHE = 1024

_servers: dict[str, Server] = {}
"""The named servers of this process, which outlive their connections."""


class MemoryDriver:
    """One connection.  Everything it promises is what any driver promises; see `brokerkit.driver`."""

    def __init__(self, url: Url, options: Options, emit: Listener) -> None:
        if url.username is not None or url.password is not None:
            raise ConfigError("memory:// has no user name and no password")
        if len(url.hosts) > 1 or url.path not in ("", "/") or any(port is not None for _, port in url.hosts):
            raise ConfigError("memory:// takes a name and nothing else, as in memory://orders")
        self._name = check_name(url.hosts[0][0], "name of a memory server") if url.hosts else ""
        given = options.given("max_messages")
        self._limit = options.whole("max_messages", MAX_MESSAGES, low=1, high=100_000_000)
        self._given_limit = self._limit if given else None
        self._survives = options.seconds("session", 10.0, low=0.1, high=86400.0)
        self._emit = emit
        self._server: Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0
        self._broken: list[Consumer] = []
        self._thawing: list[asyncio.Future[None]] = []
        self._stores: dict[int, Store] = {}
        self._known: dict[int, Address] = {}
        self.faults = Faults(self._changed)
        """What a test may break."""
        self.consumers: dict[Consumer, None] = {}
        """Those that are entered."""
        self.turns = TURN
        self.healthy: asyncio.AbstractEventLoop | None = None
        self._quick: asyncio.AbstractEventLoop | None = None
        """The same, and nothing is wrong with publishing."""

    def __repr__(self) -> str:
        return f"<MemoryDriver memory://{self._name} consumers={len(self.consumers)}>"

    # ------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        """Connect to the server of that name, or to a new one."""
        if self._loop is not None:
            raise ConfigError("this connection is open already")
        if self.faults.dead or self.faults.away:
            raise BrokerUnavailable("the connection is cut")
        server = _servers.get(self._name) if self._name else None
        if server is None:
            server = Server(self._name, self._limit)
            if self._name:
                _servers[self._name] = server
        server.attach(self, self._given_limit)
        self._server = server
        self._loop = get_running_loop()
        self._process = os.getpid()
        self._changed()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None, /
    ) -> None:
        """Disconnect."""
        for consumer in list(self.consumers):
            consumer.leave()
        self._loop = self.healthy = self._quick = None
        self._broken.clear()
        self._thaw()
        self.forget()
        if self._server is not None:
            self._server.detach(self)

    @property
    def server(self) -> Server:
        """What this is connected to."""
        if self._server is None:
            raise Closed("the connection is not open")
        return self._server

    def abandoned(self) -> None:
        """The event loop was closed with this connection open: what it held is lost after the lease."""
        self.faults.dead = True
        for consumer in self.consumers:
            consumer.suspend()
        self._loop = self.healthy = self._quick = None

    def forget(self) -> None:
        """Look everything up again."""
        self._stores.clear()
        self._known.clear()

    # ------------------------------------------------------------------ faults

    def _changed(self) -> None:
        """Do what the faults say."""
        faults = self.faults
        self.healthy = None if faults.dead or faults.away or faults.frozen else self._loop
        self._quick = None if faults.publishes or faults.replies else self.healthy
        if self._loop is None:
            return
        for consumer in self.consumers:
            consumer.check()
        if faults.dead or faults.away:
            what = "the connection was cut" if faults.dead else "the network is down"
            for consumer in self.consumers:
                consumer.suspend()
                consumer.fail(BrokerUnavailable(what))
        elif faults.frozen:
            for consumer in self.consumers:
                consumer.suspend()
        else:
            for consumer in self.consumers:
                if consumer.error is None:
                    consumer.resume()
            broken, self._broken = self._broken, []
            for consumer in broken:
                consumer.left()
        if faults.dead or not faults.frozen:
            self._thaw()

    def _thaw(self) -> None:
        thawing, self._thawing = self._thawing, []
        for future in thawing:
            if not future.done():
                future.set_result(None)

    def left_broken(self, consumer: Consumer) -> None:
        """Let *consumer*, which was left while the connection was broken, hand back when it is mended."""
        self._broken.append(consumer)

    async def thawed(self) -> None:
        """Return when the connection is not frozen."""
        while self.faults.frozen and not self.faults.dead and self._loop is not None:
            future = get_running_loop().create_future()
            self._thawing.append(future)
            await future

    async def ready(self) -> None:
        """Return when a call may go on.

        Raises:
            Closed: the connection is closed, or not open yet.
            ConfigError: it belongs to another event loop, or to another process.
            BrokerUnavailable: it is broken.
        """
        while running_loop() is not self.healthy:
            if self._process not in (0, os.getpid()):
                raise ConfigError(
                    "a connection to memory:// cannot be used after a fork; its messages are in the parent"
                )
            if self._loop is None and not self.faults.dead:
                raise Closed("the connection is closed" if self._process else "the connection is not open yet")
            if self._loop not in (None, running_loop()):
                raise ConfigError("a connection to memory:// cannot be used from another event loop")
            await self.thawed()
            if self.faults.dead:
                raise BrokerUnavailable("the connection was cut")
            if self.faults.away:
                raise BrokerUnavailable("the network is down")

    async def pause(self) -> None:
        """Let others run, who could not otherwise: storing and taking never wait."""
        self.turns = TURN
        await asyncio.sleep(0)

    # ------------------------------------------------------------------ publishing

    async def publish(self, records: Sequence[Record], *, timeout: float) -> Sequence[Receipt | BrokerError]:
        """Store *records*; one result each."""
        count = len(records)
        self.turns -= count
        if self.turns < 0 or running_loop() is not self._quick:
            refused = await self._publish_slowly(records, timeout)
            if refused is not None:
                return refused
        stores = self._stores
        if count == 1:
            (record,) = records
            store = stores.get(id(record.address))
            return [store.put(record) if store is not None else self._put(record)]
        at = self.server.timers.clock.time()
        results: list[Receipt | BrokerError] = []
        for record in records:
            store = stores.get(id(record.address))
            result = store.put(record, at) if store is not None else self._put(record, at)
            results.append(result)
            if result.__class__ is not Receipt:
                rest = records[len(results) :]
                return results + self._publish_carefully(rest, at, {_line(record)}) if rest else results
        return results

    async def _publish_slowly(self, records: Sequence[Record], timeout: float) -> list[Receipt | BrokerError] | None:
        """Wait until *records* may be stored; return results if they are settled by that."""
        if self.turns < 0:
            await self.pause()
        if running_loop() is not self.healthy:
            began = self._loop.time() if self._loop is not None else math.inf
            try:
                await self.ready()
            except BrokerUnavailable as error:
                return _refused(records, error)
            if get_running_loop().time() - began > timeout:
                return _refused(records, BrokerUnavailable(f"nothing was sent within {timeout:g} s"))
        return self._publish_badly(records) if self.faults.publishes or self.faults.replies else None

    def _put(self, record: Record, at: float = 0.0) -> Receipt | BrokerError:
        """Store *record*, whose address was not looked up yet."""
        address = record.address
        try:
            store = self.server.find(address, copy=isinstance(address, DeadLetters))
        except BrokerError as error:
            return error
        if len(self._known) >= _CACHE:
            self.forget()
        self._known[id(address)] = address  # as long as it is kept, its id is its own
        self._stores[id(address)] = store
        return store.put(record, at)

    def _publish_carefully(
        self, records: Sequence[Record], at: float, failed: set[tuple[str, bytes] | None]
    ) -> list[Receipt | BrokerError]:
        """Store *records* except those that would overtake a *failed* one of their topic and key."""
        results: list[Receipt | BrokerError] = []
        for record in records:
            line = _line(record)
            if line is not None and line in failed:
                results.append(_overtakes(record))
                continue
            result = self.faults.publishes.pop(0) if self.faults.publishes else self._put(record, at)
            results.append(result)
            if not isinstance(result, Receipt):
                failed.add(line)
        return results

    def _publish_badly(self, records: Sequence[Record]) -> list[Receipt | BrokerError]:
        """Store *records* as the faults have it."""
        results = self._publish_carefully(records, self.server.timers.clock.time(), set())
        if self.faults.replies:
            self.faults.replies -= 1
            results[:] = [PublishUnknown("the answer was lost") for _ in results]
        self._changed()
        return results

    def stores(self, records: Sequence[Record]) -> list[Store]:
        """Return where copies are stored, or raise what is wrong with one of them."""
        found: list[Store] = []
        for record in records:
            if record.body is not None and len(record.body) > MAX_BODY:
                raise too_large(record)
            found.append(self._stores.get(id(record.address)) or self.server.find(record.address, copy=True))
        return found

    # ------------------------------------------------------------------ reading

    def consume(
        self, source: Source, *, prefetch: int, revoked: Revoked
    ) -> AbstractAsyncContextManager[QueueConsumer | TopicConsumer]:
        """Read *source*."""
        address = source.address
        if isinstance(address, DeadLetters):
            raise CapabilityError(f"{address!r} is browsed and redriven, not consumed")
        if isinstance(address, Topic):
            return TopicConsumer(self, address, source, prefetch, revoked, self._emit, self._survives)
        return QueueConsumer(self, address, source, prefetch, revoked, self._emit)

    async def browse(
        self, address: Address, *, limit: int, start: Start | None = None, after: str | None = None
    ) -> Sequence[StoredRecord]:
        """Return what is stored, the oldest first."""
        await self.ready()
        store = self.server.find(address)
        if isinstance(store, TopicStore):
            return store.browse(limit, start, after)
        if start not in (None, Start.EARLIEST):
            raise CapabilityError(f"start is for topics; {address!r} on memory is browsed from its oldest message")
        return store.browse(limit, 0 if after is None else number_of(after, store.name))

    # ------------------------------------------------------------------ administration

    async def capabilities(self, address: Address) -> Capabilities:
        """Return what is honoured for *address*."""
        if isinstance(address, Topic):
            return Capabilities(backend="memory", replay=True, key_order=True, atomic=True)
        return Capabilities(backend="memory", delay=True, priority=True, ttl=True, dedup=True, shared=True, atomic=True)

    async def redrive(
        self, letters: AnyDeadLetters, positions: Sequence[str], to: AnyQueue
    ) -> Sequence[BrokerError | None]:
        """Move letters to *to*, each as a whole."""
        await self.ready()
        return self.server.redrive(letters, positions, to)

    async def describe(self, address: Address) -> Mapping[str, object] | None:
        """Return the settings that exist."""
        await self.ready()
        return self.server.describe(address)

    async def health(self) -> Health:
        """Tell what does not work."""
        problems = [f"{consumer!r}: {consumer.error}" for consumer in self.consumers if consumer.error is not None]
        connected = True
        try:
            await self.ready()
        except BrokerError as error:
            problems.insert(0, str(error))
            connected = False
        return Health(ok=not problems, problems=tuple(problems), connected=connected)

    async def declare(self, address: Address) -> None:
        """Create *address* if it is missing."""
        await self.ready()
        self.server.declare(address)

    async def delete(self, address: Address, group: str | None = None) -> None:
        """Remove *address*, or what belongs to *group*."""
        await self.ready()
        self.server.delete(address, group)

    async def purge(self, address: AnyQueue | AnyDeadLetters) -> int:
        """Remove all that waits and return how many."""
        await self.ready()
        store = self.server.find(address)
        if not isinstance(store, (QueueStore, Letters)):
            raise CapabilityError(f"{address!r} cannot be purged: other groups read it")
        return store.purge()

    async def seek(self, source: Source) -> None:
        """Move the position of a group without members."""
        await self.ready()
        self.server.seek(source)

    async def backlog(self, source: Source) -> Backlog:
        """Return what is left to do."""
        await self.ready()
        return self.server.backlog(source, lambda name, count: self._emit(Expired(address=name, count=count)))

    async def migrate(self, queue: AnyQueue) -> None:
        """There is one kind of queue here."""
        raise CapabilityError(f"{queue!r} on memory has nothing to migrate to")


def _line(record: Record) -> tuple[str, bytes] | None:
    """Return what must stay in order with *record*, None if nothing must."""
    return (record.address.name, record.key) if record.key is not None and isinstance(record.address, Topic) else None


def _overtakes(record: Record) -> NotAttempted:
    return NotAttempted(f"an earlier message with this key for {record.address.name} failed")


def _refused(records: Sequence[Record], error: BrokerError) -> list[Receipt | BrokerError]:
    """Return *error* for all *records*, except those that came behind one of their key."""
    results: list[Receipt | BrokerError] = []
    seen: set[tuple[str, bytes]] = set()
    for record in records:
        line = _line(record)
        results.append(_overtakes(record) if line in seen else error)
        if line is not None:
            seen.add(line)
    return results
