"""Reading by hand: what `Broker.subscribe` gives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Generic, Literal, Self

import anyio
from typing_extensions import TypeVar

from ._intake import Intake
from ._plan import Env, Plan
from ._plans import AGAIN_PREFETCH
from ._session import Session
from ._tasks import Hosted
from .clock import Clock
from .errors import Closed, DecodeError
from .message import Message
from .policy import MAX_PREFETCH, seconds, whole

T_co = TypeVar("T_co", covariant=True)


class Subscription(Generic[T_co]):
    """Messages in hand, one by one with ``async for`` or several with `receive`; both may be used by several tasks.

    A message of a queue or group stays owned until it is settled, and at most *prefetch* are owned at once; of each key of a
    topic one is in hand at a time.  Leaving the ``async with`` hands back what is unsettled.
    """

    def __init__(self, plans: Sequence[Plan], env: Env, on_invalid: Literal["raise", "skip"]) -> None:
        self._plans = plans
        self._clock: Clock = env.clock
        self.intake: Intake = Intake(plans, env)
        self._ephemeral = plans[0].letters is None
        self._skip = on_invalid == "skip"
        self._hosted = Hosted(f"brokerkit subscription {plans[0].name}", self._main)

    def __repr__(self) -> str:
        held = sum(feed.session.held for feed in self.intake.feeds if feed.session is not None)
        return f"<Subscription {self._plans[0].name} in_flight={held}>"

    async def _main(self, started: asyncio.Future[None]) -> None:
        async with anyio.create_task_group() as group:
            await self.intake.start(group)
            started.set_result(None)
            await self._hosted.stopping.wait()
            self.intake.stop_fetching()
            self.intake.close()
            with anyio.move_on_after(10):
                await self.intake.finish()
            group.cancel_scope.cancel()

    async def open(self) -> Self:
        """Enter: return when the source is ready."""
        await self._hosted.__aenter__()
        return self

    async def close(self) -> None:
        """Store all outcomes and hand back what is unsettled."""
        await self._hosted.__aexit__()

    def owns(self, message: Message[Any]) -> bool:
        """Tell whether *message*, which came out of this and is not settled, is certainly still owned.

        It is not where others may have it by now, as after this process has stood still for longer than the lease.
        """
        session: Session = message._settler  # type: ignore[assignment]
        gone = session.settling.closed or id(message._item) in session._moving
        return not gone and self._clock.monotonic() < session.consumer.owned_until

    @property
    def prefetch(self) -> int:
        """How many messages are owned at once.  It may be changed; with 0 nothing more is fetched until it is raised."""
        return self.intake.feeds[0].prefetch

    @prefetch.setter
    def prefetch(self, value: int) -> None:
        main, *beside = self.intake.feeds
        main.prefetch = whole("prefetch", value, low=0, high=MAX_PREFETCH)
        for feed in beside:
            feed.prefetch = min(value, AGAIN_PREFETCH)

    def __aiter__(self) -> AsyncIterator[Message[T_co]]:
        return _Messages(self)

    async def receive(self, *, limit: int = 1, timeout: float | None = None) -> Sequence[Message[T_co]]:
        """Wait for 1 to *limit* messages; none after *timeout* seconds, or at the end with ``until_end``.

        Without *timeout* it waits for ever.  Cancelling it loses nothing.

        Raises:
            DecodeError: a message of an ephemeral reader cannot be read (``on_invalid="raise"``); the next call goes on.
            PositionLost: messages were removed before they could be read; the next call goes on behind them.
            Closed: the subscription has ended.
            BrokerError: reading has stopped for good: the address was deleted, or the rights to it are gone.
        """
        whole("limit", limit, low=1, high=1_000_000)
        first: Message[T_co] | None = None
        if self.intake.closed:
            raise Closed(f"the subscription of {self._plans[0].name} has ended")
        if timeout is None:
            first = await self._next()
        else:
            wait = seconds("timeout", timeout)
            try:
                # Not through a task of its own: a message taken by a task that is cancelled would be lost.
                async with asyncio.timeout(wait):
                    first = await self._next()
            except TimeoutError:
                return []
        if first is None:
            if self.intake.closed and not self.intake.ended:
                raise Closed(f"the subscription of {self._plans[0].name} has ended")
            return []
        messages = [first]
        while len(messages) < limit and self.intake.ready:
            try:
                message = self._take(more=True)
            except DecodeError:
                break  # it is still there, and raised by the next call
            if message is not None:
                messages.append(message)
        return messages

    async def _next(self) -> Message[T_co] | None:
        intake = self.intake
        while True:
            if intake.error is not None:
                error = intake.error
                if any(feed.session is not None for feed in intake.feeds[:1]):
                    intake.error = None
                raise error
            if intake.ready:
                message = self._take()
                if message is not None:
                    return message
                continue
            if intake.closed or intake.ended:
                intake.wake_ended()
                return None
            await intake.wait()

    def _take(self, *, more: bool = False) -> Message[T_co] | None:
        """Take the next message, or None if it turns out to be no message to show; with *more* leave what would raise."""
        intake = self.intake
        message: Message[Any] = intake.ready[0]
        session: Session = message._settler  # type: ignore[assignment]
        if not session.enter(message):
            intake.ready.popleft()
            return None
        try:
            message.value  # noqa: B018  # reads and keeps it
        except DecodeError as error:
            if more and self._ephemeral and not self._skip:
                session.out.discard(message)
                raise
            intake.ready.popleft()
            if not self._ephemeral:
                session.undecodable(message, error)
                return None
            session.pass_on(message)
            if self._skip:
                return None
            intake.wake_next()
            intake.wake_ended()
            raise
        intake.ready.popleft()
        intake.wake_next()
        intake.wake_ended()
        if self._ephemeral:
            session.pass_on(message)
        return message


class _Messages(Generic[T_co]):
    """The iterator of a subscription: ends when it is left, or with ``until_end``."""

    def __init__(self, subscription: Subscription[T_co]) -> None:
        self._subscription = subscription

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message[T_co]:
        message = await self._subscription._next()
        if message is None:
            raise StopAsyncIteration
        return message
