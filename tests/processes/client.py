"""The driver for ``socket://``: every call goes to the server of this folder."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any, Self

from brokerkit.address import Address, AnyDeadLetters, AnyQueue
from brokerkit.driver import (
    Backlog,
    Capabilities,
    Delivery,
    Health,
    Receipt,
    Record,
    Revoked,
    Settlement,
    Source,
    StoredRecord,
)
from brokerkit.errors import BrokerError, BrokerUnavailable
from brokerkit.events import Listener
from brokerkit.policy import Start

from . import wire


class SocketConsumer:
    """A consumer that lives in the server."""

    owned_until = math.inf

    def __init__(self, driver: SocketDriver, number: int, prefetch: int) -> None:
        self._driver = driver
        self._number = number
        self._prefetch = prefetch
        self._pending: asyncio.Task[Any] | None = None
        self._stash: list[Delivery] = []
        self.ended = False

    @property
    def prefetch(self) -> int:
        return self._prefetch

    @prefetch.setter
    def prefetch(self, value: int) -> None:
        self._prefetch = value
        self._driver.background(self._driver.call("prefetch", self._number, value))

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery]:
        if not self._stash:
            if self._pending is None:
                self._pending = asyncio.ensure_future(self._driver.call("receive", self._number, limit, timeout))
            # Cancelling this call must lose nothing: what was asked for comes out of the next one.
            came, ended = await asyncio.shield(self._pending)
            self._pending = None
            self._stash += came
            self.ended = ended and not self._stash
        taken, self._stash = self._stash[:limit], self._stash[limit:]
        return taken

    async def forget(self) -> None:
        """Ask for nothing more: what comes is released when the server leaves the consumer."""
        if self._pending is not None:
            self._pending.cancel()
            await asyncio.wait([self._pending])

    async def settle(self, items: Sequence[Settlement], *, confirm: bool = False) -> Sequence[BrokerError | None]:
        results: Sequence[BrokerError | None] = await self._driver.call("settle", self._number, list(items), confirm)
        return results

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        await self._driver.call("release", self._number, list(deliveries))

    async def hold(self, delivery: Delivery, attempts: int) -> None:
        await self._driver.call("hold", self._number, delivery, attempts)


class SocketDriver:
    """A connection to the server."""

    def __init__(self, url: Any, options: Any, emit: Listener) -> None:
        self._host, self._port = url.hosts[0]
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Future[Any]] = set()

    async def __aenter__(self) -> Self:
        try:
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        except OSError as error:
            raise BrokerUnavailable(f"no server at {self._host}:{self._port}") from error
        self._listening = asyncio.ensure_future(self._listen())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None, /
    ) -> None:
        await self.call("farewell")
        self._listening.cancel()
        await asyncio.wait([self._listening])
        self._writer.close()
        await self._writer.wait_closed()

    async def _listen(self) -> None:
        try:
            while True:
                number, right, answer = await wire.read(self._reader)
                if not (waiting := self._answers.pop(number)).done():
                    waiting.set_result(answer) if right else waiting.set_exception(answer)
        finally:
            for waiting in self._answers.values():
                if not waiting.done():
                    waiting.set_exception(BrokerUnavailable("the server is gone"))

    def background(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def call(self, method: str, *args: Any) -> Any:
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        wire.write(self._writer, (number, method, args))
        return await answer

    async def capabilities(self, address: Address) -> Capabilities:
        answer: Capabilities = await self._ask("capabilities", address)
        return answer

    async def publish(self, records: Sequence[Record], *, timeout: float) -> Sequence[Receipt | BrokerError]:
        answer: Sequence[Receipt | BrokerError] = await self._ask("publish", records, timeout=timeout)
        return answer

    def consume(
        self, source: Source, *, prefetch: int, revoked: Revoked
    ) -> AbstractAsyncContextManager[SocketConsumer]:
        return self._consume(source, prefetch)

    @asynccontextmanager
    async def _consume(self, source: Source, prefetch: int) -> AsyncIterator[SocketConsumer]:
        number = await self.call("consume", source, prefetch)
        consumer = SocketConsumer(self, number, prefetch)
        try:
            yield consumer
        finally:
            await consumer.forget()
            await self.call("leave", number)

    async def browse(
        self, address: Address, *, limit: int, start: Start | None = None, after: str | None = None
    ) -> Sequence[StoredRecord]:
        answer: Sequence[StoredRecord] = await self._ask("browse", address, limit=limit, start=start, after=after)
        return answer

    async def redrive(
        self, letters: AnyDeadLetters, positions: Sequence[str], to: AnyQueue
    ) -> Sequence[BrokerError | None]:
        answer: Sequence[BrokerError | None] = await self._ask("redrive", letters, positions, to)
        return answer

    async def describe(self, address: Address) -> Mapping[str, object] | None:
        answer: Mapping[str, object] | None = await self._ask("describe", address)
        return answer

    async def health(self) -> Health:
        answer: Health = await self._ask("health")
        return answer

    async def declare(self, address: Address) -> None:
        await self._ask("declare", address)

    async def delete(self, address: Address, group: str | None = None) -> None:
        await self._ask("delete", address, group)

    async def purge(self, address: AnyQueue | AnyDeadLetters) -> int:
        answer: int = await self._ask("purge", address)
        return answer

    async def seek(self, source: Source) -> None:
        await self._ask("seek", source)

    async def backlog(self, source: Source) -> Backlog:
        answer: Backlog = await self._ask("backlog", source)
        return answer

    async def migrate(self, queue: AnyQueue) -> None:
        await self._ask("migrate", queue)

    async def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        return await self.call("driver", method, args, options)
