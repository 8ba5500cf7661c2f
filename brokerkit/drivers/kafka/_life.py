"""What all consumers have: they are entered and left, work in the background meanwhile, and say why if nothing comes any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self

import anyio
from anyio.abc import TaskGroup

from ..._tasks import Hosted
from ...address import AnyQueue, AnyTopic
from ...driver import Delivery, Revoked
from ...errors import BrokerError
from ._context import Context
from ._silence import watch

logger = logging.getLogger("brokerkit")


class Life:
    """A consumer as a context manager."""

    def __init__(self, context: Context, address: AnyTopic | AnyQueue, revoked: Revoked) -> None:
        self._context = context
        self._name = address.name
        self._revoked = revoked
        self._error: BrokerError | None = None
        self._entered = False
        self._hosted: Hosted | None = None
        self._entering: anyio.CancelScope | None = None
        self._io: TaskGroup | None = None
        """What talks to the cluster, until everything is stored."""
        self._telling: TaskGroup | None = None
        """What tells the program of what it loses, while it is entered."""

    @property
    def problem(self) -> BrokerError | None:
        """Why nothing comes, or goes, if that is so."""
        return self._error

    async def _enter(self) -> None:
        """Begin, and return when ready."""
        raise NotImplementedError

    async def _leave(self) -> None:
        """Store what is done, hand back what is not, and tell the cluster."""
        raise NotImplementedError

    def _close(self) -> None:
        """Have nothing in hand any more."""
        raise NotImplementedError

    def _wake(self) -> None:
        """Have who waits in `receive` look again."""
        raise NotImplementedError

    # ------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        """Return when ready."""
        self._hosted = Hosted(f"brokerkit {self!r}", self._host)
        ready = False
        try:
            await self._hosted.__aenter__()
            with anyio.CancelScope() as self._entering:
                await self._enter()
                ready = True
            self._entering = None
            if not ready and self._error is not None:
                raise self._error
        except BaseException:
            self._entered = False
            await self._hosted.__aexit__(None, None, None)
            raise
        self._context.readers[self] = None
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Hand back what is unsettled and leave the group."""
        self._entered = False
        self._wake()
        self._context.readers.pop(self, None)
        if self._hosted is not None:
            await self._hosted.__aexit__(None, None, None)

    async def _host(self, started: asyncio.Future[None]) -> None:
        """Run what belongs to it."""
        assert self._hosted is not None
        context = self._context
        try:
            async with anyio.create_task_group() as self._io:
                async with anyio.create_task_group() as self._telling:
                    self._telling.start_soon(watch, context.cluster, context.settings.session, self.fail)
                    started.set_result(None)
                    await self._hosted.stopping.wait()
                    self._telling.cancel_scope.cancel()
                self._telling = None
                await self._leave()
                self._io.cancel_scope.cancel()
        finally:
            self._io = self._telling = None
            self._close()

    # ------------------------------------------------------------------ the background

    def _spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run *work* until everything is stored."""
        if self._io is not None:
            self._io.start_soon(self._run, work)

    async def _run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run something in the background, and say so if it breaks."""
        try:
            await work()
        except BrokerError as error:
            self.fail(error)
        except Exception as error:
            self._fail_broken(error)

    def _fail_broken(self, error: Exception) -> None:
        """Say that a defect has shown."""
        logger.error("%s: reading has broken", self._name, exc_info=error)
        broken = BrokerError(f"the driver failed: {type(error).__name__}")
        broken.__cause__ = error
        self.fail(broken)

    def fail(self, error: BrokerError) -> None:
        """Let `receive`, or entering, raise *error* from now on."""
        if self._error is None:
            self._error = error
            self._wake()
        if self._entering is not None:
            self._entering.cancel()

    async def _tell(self, deliveries: Sequence[Delivery]) -> None:
        """Tell the program that it has lost *deliveries*."""
        try:
            await self._revoked(deliveries)
        except Exception:
            logger.exception("the callback for revoked deliveries failed")
