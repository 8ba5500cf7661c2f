"""`QueueConsumer`: a consumer of a queue, by whichever kind of group serves it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import TracebackType

from ...address import AnyQueue
from ...driver import Capabilities, Consumer, Revoked, Source
from ...errors import AuthorizationError, CapabilityError, NotFound
from ._consumer import TopicConsumer
from ._context import Context
from ._engine import Terms, engine_of, reserve
from ._share_consumer import ShareConsumer
from ._tiers import tiered
from ._upkeep import Upkeep


async def can(context: Context, queue: AnyQueue) -> Capabilities:
    """Return what is honoured for *queue*: that depends on the group which serves it, or will once there is one."""
    timeout = context.settings.timeout
    try:
        engine = await engine_of(context.cluster, queue.name, timeout=timeout)
        shares = await context.cluster.shares(timeout=timeout)
    except AuthorizationError:
        # Who only publishes needs no right to the group, and to publishers all groups are alike.
        return Capabilities(backend="kafka", durable=True, delay=True, ttl=True)
    shared = engine == "share" or (engine is None and shares)
    # Also of one that is moved already: who was cut off at the end of that calls it again.
    return Capabilities(backend="kafka", durable=True, delay=True, ttl=True, shared=shared, migrate=shares)


class QueueConsumer:
    """The context manager of a consumer of one queue."""

    def __init__(
        self, context: Context, upkeep: Upkeep, queue: AnyQueue, source: Source, prefetch: int, revoked: Revoked
    ) -> None:
        self._context = context
        self._upkeep = upkeep
        self._queue = queue
        self._source = source
        self._prefetch = prefetch
        self._revoked = revoked
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Consumer:
        """Find out, or decide, by which kind of group the queue is served, and join it."""
        terms = await self._terms()
        context, queue, prefetch, revoked = self._context, self._queue, self._prefetch, self._revoked
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._upkeep.of(self._queue))
            consumer: Consumer
            if terms is None:
                consumer = await stack.enter_async_context(
                    TopicConsumer(context, queue, self._source, prefetch, revoked)
                )
            else:
                consumer = await stack.enter_async_context(ShareConsumer(context, queue, prefetch, revoked, terms))
            self._stack = stack.pop_all()
        return consumer

    async def _terms(self) -> Terms | None:
        """Return how the share group serves the queue; None if a classic group does."""
        context, queue = self._context, self._queue
        if not tiered(queue):
            return None
        if self._source.until_end:
            raise CapabilityError(f"until_end is for topics; {queue!r} on kafka has no end")
        timeout = context.settings.timeout
        try:
            info = await context.cluster.topic(queue.name, timeout=timeout)
        except NotFound as error:
            text = f"{queue!r} does not exist on {context.settings.shown}; declare it"
            raise NotFound(text) from error.__cause__
        terms = await reserve(context.cluster, queue, info, timeout=timeout)
        return terms if terms.engine == "share" else None

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        """Hand back what is unsettled and leave the group."""
        return await self._stack.__aexit__(exc_type, exc, tb)
