"""What serves a queue in the background while at least one of its consumers is entered."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, Protocol

import anyio

from ..._tasks import Hosted
from ...address import AnyQueue
from ...driver import Receipt, Record
from ...errors import BrokerError, ConfigError
from ._context import Context
from ._delay import Forwarder
from ._janitor import Janitor
from ._records import TICK, milliseconds, parse_position
from ._tell import Teller
from ._tiers import tiered, waiting_for

logger = logging.getLogger("brokerkit")

_UNSET: Final = 1000.0
"""The time that a tick bears until the broker sets it."""
_MAY_BE_UNSET: Final = 4
"""Ticks in a row without a time from which on it is the topic that is not as it has to be."""
WORTH: Final = 60.0
"""Seconds of work after which what is done is removed on leaving too."""
_LAST_LOOK: Final = 1.0
"""Most seconds that leaving waits for what is done to be removed."""
_AGAIN: Final = 0.5
_LONGEST: Final = 30.0


class _Part(Protocol):
    @property
    def problem(self) -> BrokerError | None: ...

    async def run(self) -> None: ...


class Ticker:
    """Writes a tick when somebody wants to know what time it is."""

    def __init__(self, context: Context, queue: AnyQueue) -> None:
        self._context = context
        self._address = waiting_for(queue)
        self._teller = Teller(context.emit, queue.name, "delay")
        self._unset = self._failures = 0

    def __repr__(self) -> str:
        return f"<Ticker {self._address.name}>"

    @property
    def problem(self) -> BrokerError | None:
        """Why the broker's time is not known, if that is so."""
        return self._teller.problem

    async def run(self) -> None:
        """Write ticks until cancelled."""
        time = self._context.time
        while True:
            # Nobody waits for one that will not work.
            works = self.problem is None or self.problem.retryable
            time.tickers += works
            try:
                await time.wanted.wait()
                time.wanted.clear()
                if not time.exact:
                    await self._try()
            finally:
                time.tickers -= works

    async def _try(self) -> None:
        """Write a tick, and pause if that fails."""
        problem = await self._tick()
        if problem is None:
            self._failures = 0
            self._teller.works()
        else:
            self._teller.failed(problem)
            await anyio.sleep(min(_LONGEST, _AGAIN * 2.0**self._failures))
            self._failures = min(self._failures + 1, 10)

    async def _tick(self) -> BrokerError | None:
        """Write a tick; return why the time is not known by that."""
        context, address = self._context, self._address
        tick = Record(address, uuid.uuid4().hex, None, headers=((TICK, b"1"),), timestamp=_UNSET)
        sent = asyncio.get_running_loop().time()
        try:
            (result,) = await context.outboxes.copy([tick], context.settings.timeout)
        except BrokerError as error:
            return error
        if not isinstance(result, Receipt):
            return result
        place = None if result.position is None else parse_position(result.position, address.name)
        if place is not None and place[1] != milliseconds(_UNSET):
            self._unset = 0
            context.time.answered(place[1], sent)
            return None
        # One that was stored before, or together with others, may keep its own time, or tell none: not so the next.
        self._unset += 1
        if self._unset < _MAY_BE_UNSET:
            return None
        return ConfigError(f"topic {address.name} needs message.timestamp.type=LogAppendTime")


class _Kept:
    """The upkeep of one queue."""

    def __init__(self, context: Context, queue: AnyQueue) -> None:
        self.count = 0
        self._janitor = Janitor(context, queue)
        parts: list[_Part] = [self._janitor]
        self._forwarder = Forwarder(context, queue) if tiered(queue) else None
        if self._forwarder is not None:
            parts += [self._forwarder, Ticker(context, queue)]
        self.parts = parts
        self.hosted = Hosted(f"brokerkit upkeep of {queue.name}", self._main)

    async def _main(self, started: asyncio.Future[None]) -> None:
        async with anyio.create_task_group() as tasks:
            for part in self.parts:
                tasks.start_soon(_keep, part)
            started.set_result(None)
            await self.hosted.stopping.wait()
            if self._forwarder is not None:
                self._forwarder.hurry()
            tasks.cancel_scope.cancel()
        # Kafka forgets a group that has no members for a week, and then all that is there comes again.
        if asyncio.get_running_loop().time() >= self._janitor.looked + WORTH:
            with anyio.move_on_after(_LAST_LOOK):
                await self._janitor.clear()


async def _keep(part: _Part) -> None:
    while True:
        try:
            await part.run()
        except Exception:
            logger.exception("%r has broken, and begins anew", part)
        await anyio.sleep(_LONGEST)


class Upkeep:
    """The upkeep of all queues that one driver consumes."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._kept: dict[str, _Kept] = {}

    @property
    def problems(self) -> Sequence[str]:
        """What does not work, a line each."""
        parts = [part for kept in self._kept.values() for part in kept.parts]
        return [f"{part!r}: {part.problem}" for part in parts if part.problem is not None]

    def of(self, queue: AnyQueue) -> AbstractAsyncContextManager[None]:
        """Serve *queue* while this is entered, by whomever.  Entering waits for nothing, and leaving only for the last one."""
        return self._of(queue)

    @asynccontextmanager
    async def _of(self, queue: AnyQueue) -> AsyncIterator[None]:
        kept = self._kept.get(queue.name)
        if kept is None:
            kept = self._kept[queue.name] = _Kept(self._context, queue)
            kept.count = 1
            try:
                await kept.hosted.__aenter__()
            except BaseException:
                self._forget(queue.name, kept)
                raise
        else:
            kept.count += 1
        try:
            yield
        finally:
            kept.count -= 1
            if not kept.count:
                self._forget(queue.name, kept)
                await kept.hosted.__aexit__()

    def _forget(self, name: str, kept: _Kept) -> None:
        if self._kept.get(name) is kept:
            del self._kept[name]
