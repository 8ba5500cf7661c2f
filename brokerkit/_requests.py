"""Request and reply: one inbox per broker.

All replies travel through one topic.  A request carries the random token of its broker's inbox and a correlation id; the
replier publishes to that topic with the token as key.  Nothing in a request chooses an address.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from typing import Any

import anyio

from ._binding import Bound
from ._intake import Intake
from ._outcome import CORRELATION, ERROR, ERROR_TEXT, INBOX
from ._plan import Env, Plan
from ._session import Session
from ._tasks import Hosted
from .driver import Headers, Record, Source
from .errors import Closed, RemoteError, RequestTimeout
from .message import Message
from .policy import Start


class Inbox:
    """Reads the replies to one broker's requests.  Opened with its first request."""

    def __init__(self, bound: Bound, env: Env) -> None:
        self.token = os.urandom(16).hex().encode()
        self._waiting: dict[bytes, asyncio.Future[Record]] = {}
        self._numbers = itertools.count(1)
        source = Source(bound.address, None, Start.LATEST)
        plan = Plan(source=source, reader=bound, prefetch=1000, letters=None, in_place=True, by_key=False)
        self._intake = Intake([plan], env)
        self._hosted = Hosted("brokerkit replies", self._main)

    async def open(self) -> None:
        """Read from now on; return when no reply can be missed any more."""
        await self._hosted.__aenter__()

    async def close(self) -> None:
        """Fail whoever still waits."""
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(Closed("the broker was closed while waiting for a reply"))
        await self._hosted.__aexit__()

    async def _main(self, started: asyncio.Future[None]) -> None:
        async with anyio.create_task_group() as group:
            await self._intake.start(group)
            group.start_soon(self._read)
            started.set_result(None)
            await self._hosted.stopping.wait()
            # Replies settle themselves; leaving in the middle of that would report them as lost.
            self._intake.stop_fetching()
            with anyio.move_on_after(1):
                await self._intake.finish()
            group.cancel_scope.cancel()

    async def _read(self) -> None:
        ready = self._intake.ready
        while True:
            if not ready:
                await self._intake.wait()
                continue
            message: Message[Any] = ready.popleft()
            session: Session = message._settler  # type: ignore[assignment]
            session.pass_on(message)
            record = message._item.record
            if record.key != self.token:
                continue
            for name, value in record.headers:
                if name == CORRELATION:
                    waiter = self._waiting.get(value)
                    if waiter is not None and not waiter.done():
                        waiter.set_result(record)

    def headers(self) -> tuple[bytes, Headers]:
        """Return a new correlation id, and the headers of a request that carries it."""
        correlation = b"%x" % next(self._numbers)
        self._waiting[correlation] = asyncio.get_running_loop().create_future()
        return correlation, ((INBOX, self.token), (CORRELATION, correlation))

    async def reply(self, correlation: bytes, left: float, asked: str, timeout: float) -> Record:
        """Wait *left* seconds, the rest of *timeout*, for the answer to *correlation*.

        Raises:
            RequestTimeout: nobody answered in time.
            RemoteError: the replier failed for good.
        """
        waiter = self._waiting[correlation]
        try:
            async with asyncio.timeout(left):
                record = await waiter
        except TimeoutError:
            raise RequestTimeout(f"nobody answered a request on {asked} within {timeout:g} s") from None
        notes = dict(record.headers)
        if ERROR in notes:
            error = notes[ERROR].decode("utf-8", "replace")
            text = notes.get(ERROR_TEXT, b"").decode("utf-8", "replace")
            raise RemoteError(f"{asked} failed: {error}: {text}", error=error)
        return record

    def forget(self, correlation: bytes) -> None:
        """Wait no more for *correlation*."""
        self._waiting.pop(correlation, None)
