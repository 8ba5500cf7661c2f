"""Workers: they take messages from an intake, run the handler, and settle by how it ends.

A pool has as many workers as the subscription's concurrency.  They are long-lived, because a task for each message costs more
than all else brokerkit does for it.  One timer for the pool watches the timeouts of all of them.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskGroup

from . import events
from ._binding import Bound
from ._heartbeat import Heartbeat
from ._intake import Intake
from ._outcome import Unanswerable, reply, reply_to
from ._plan import Env
from ._session import Session
from .address import AnyTopic
from .driver import Record
from .errors import DecodeError, EncodeError
from .message import Message
from .middleware import CallNext
from .policy import Batch, RetryPolicy

logger = logging.getLogger("brokerkit")

TURN = 128
"""Messages a worker runs before it lets others have the loop, should its handler never wait."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a pool runs, and how."""

    name: str
    call: CallNext
    bound: Bound
    group: str | None
    concurrency: int
    policy: RetryPolicy
    timeout: float | None
    batch: Batch | None
    replies: AnyTopic | None


class Slot:
    """What one worker does at the moment."""

    __slots__ = ("began", "busy", "ended", "expired", "gathering", "messages", "task", "thread")

    def __init__(self) -> None:
        self.task: asyncio.Task[Any] | None = None
        self.busy = False
        self.gathering = False
        """It has messages in hand that wait for more of their batch."""
        self.began = 0.0
        self.ended = 0.0
        self.expired = False
        self.thread = False
        """A thread runs the handler: it cannot be cancelled."""
        self.messages: Sequence[Message[Any]] = ()


_slot: contextvars.ContextVar[Slot] = contextvars.ContextVar("brokerkit_slot")


class Pool:
    """The workers of one subscription."""

    def __init__(self, intake: Intake, job: Job, env: Env, heartbeat: Heartbeat) -> None:
        self.intake = intake
        self.job = job
        self.slots = [Slot() for _ in range(job.concurrency)]
        self.finished = 0
        self.cancelled = 0
        self._env = env
        self._heartbeat = heartbeat
        self._monotonic = env.clock.monotonic
        self._call = job.call
        self._replies = job.replies
        self._watching: asyncio.TimerHandle | None = None
        self._quiet: asyncio.Future[None] | None = None
        self._draining = False
        self._cancelling = False
        self._scope: anyio.CancelScope | None = None

    def start(self, group: TaskGroup) -> None:
        """Run all workers in *group*, until the intake is closed or the group cancelled."""
        self._scope = group.cancel_scope
        for number, slot in enumerate(self.slots):
            group.start_soon(self._work, slot, name=f"brokerkit {self.job.name} {number}")

    async def quiet(self) -> None:
        """Wait until no handler runs."""
        while any(slot.busy or slot.gathering for slot in self.slots):
            if self._quiet is None or self._quiet.done():
                self._quiet = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._quiet)

    def cancel(self) -> tuple[int, int]:
        """Cancel the handlers that still run; return how many, and how many threads run on."""
        self._cancelling = True
        busy = [slot for slot in self.slots if slot.busy]
        for slot in busy:
            if slot.task is not None:
                slot.task.cancel()
        threads = sum(slot.thread for slot in busy)
        return len(busy) - threads, threads

    # ------------------------------------------------------------------ working

    async def _work(self, slot: Slot) -> None:
        slot.task = asyncio.current_task()
        _slot.set(slot)
        try:
            while not self.intake.closed:
                try:
                    await self._turns(slot)
                except asyncio.CancelledError:
                    if self._ending:
                        raise
                    self._calm(slot)  # a handler has cancelled the task that it runs in; the worker lives on
        finally:
            if self._watching is not None and not any(other.busy for other in self.slots):
                self._watching.cancel()
                self._watching = None

    async def _turns(self, slot: Slot) -> None:
        intake, ready, batch = self.intake, self.intake.ready, self.job.batch
        turn = 0
        while not intake.closed:
            if not ready:
                slot.ended = self._monotonic()
                await intake.wait()
                continue
            message = ready.popleft()
            if ready and intake.takers and not intake.waking:
                intake.wake_next()
            session: Session = message._settler  # type: ignore[assignment]
            if not session.enter(message):
                continue
            if batch is None:
                await self._one(slot, session, message)
            else:
                slot.gathering = True
                await self._several(slot, session, await self._gather(slot, session, message, batch))
            turn += 1
            if turn == TURN:
                turn = 0
                await asyncio.sleep(0)

    async def _one(self, slot: Slot, session: Session, message: Message[Any]) -> None:
        try:
            message._value = message._reader.read(message._item.record)
        except DecodeError as error:
            session.undecodable(message, error)
            return
        slot.messages = (message,)
        slot.began = self._monotonic()
        slot.expired = False
        slot.busy = True
        if self._watching is None or not self._heartbeat.armed:
            self._arm()
        try:
            result = await self._call(message)
            extra = () if self._replies is None else self._reply(message, result)
        except BaseException as error:
            self._end(slot)
            self._failed(slot, session, slot.messages, error)
            return
        slot.busy = False
        if self._quiet is not None:
            self._end(slot)
        if slot.expired:
            self._overran(slot, session, slot.messages)
            return
        if message._outcome is None:
            session.succeed(message, extra)
        elif extra:
            logger.error(
                "%s settled message %s itself, so its reply is not sent: return without ack()",
                self.job.name,
                message.id,
            )
        self.finished += 1
        if self._env.emit is not None:
            slot.ended = self._monotonic()
            self._tell_handled(slot, message)

    async def _several(self, slot: Slot, session: Session, gathered: Sequence[Message[Any]]) -> None:
        slot.gathering = False
        messages: list[Message[Any]] = []
        for message in session.begin(gathered):
            try:
                message.value  # noqa: B018
            except DecodeError as error:
                session.undecodable(message, error)
            else:
                messages.append(message)
        if not messages:
            self._end(slot)
            return
        slot.messages = messages
        slot.began = self._monotonic()
        slot.expired = False
        slot.busy = True
        if self._watching is None or not self._heartbeat.armed:
            self._arm()
        try:
            await self._call(messages)
        except BaseException as error:
            self._end(slot)
            self._failed(slot, session, messages, error)
        else:
            self._end(slot)
            if slot.expired:
                self._overran(slot, session, messages)
                return
            for message in messages:
                if message._outcome is None:
                    session.succeed(message)
                self.finished += 1
                if self._env.emit is not None:
                    self._tell_handled(slot, message)

    async def _gather(self, slot: Slot, session: Session, first: Message[Any], batch: Batch) -> list[Message[Any]]:
        """Collect what goes into one call with *first*: of one session, each key in its order."""
        messages = [first]
        if first._single:
            return messages
        keys = {first._item.record.key}
        ready, loop = self.intake.ready, asyncio.get_running_loop()
        self._follow(session, first, messages, batch.max)
        until = loop.time() + batch.wait
        try:
            while len(messages) < batch.max and not self.intake.closed and not self._draining:
                if ready and not ready[0]._single and ready[0]._settler is session:
                    message = ready.popleft()
                    if session.enter(message):
                        messages.append(message)
                        keys.add(message._item.record.key)
                    elif message._item.record.key not in keys:
                        continue
                    self._follow(session, message, messages, batch.max)
                elif ready:
                    break
                else:
                    async with asyncio.timeout_at(until):
                        await self.intake.wait()
        except TimeoutError:
            pass
        except BaseException:
            slot.gathering = False
            session.alone(messages)
            raise
        self.intake.wake_next()  # woken for what it does not take, it passes the word on
        return messages

    @staticmethod
    def _follow(session: Session, message: Message[Any], messages: list[Message[Any]], most: int) -> None:
        """Add what waits behind the key of *message*, which this batch holds."""
        while len(messages) < most:
            following = session.follow(message)
            if following is None:
                return
            messages.append(following)

    # ------------------------------------------------------------------ ends

    def _failed(self, slot: Slot, session: Session, messages: Sequence[Message[Any]], error: BaseException) -> None:
        open_ = [message for message in messages if message._outcome is None]
        if isinstance(error, asyncio.CancelledError):
            if slot.expired and not self._ending:
                self._overran(slot, session, messages)
                return
            if self._ending:
                for message in open_:
                    session.release(message)
                self.cancelled += len(messages)
                if not self._cancelling:
                    raise error
                self._calm(slot)  # the worker ends by itself, as the intake is closed; raised, it would cancel them all
                return
            # Nobody here cancels a handler without a timeout: it did so itself, which is a failure like another.
            self._calm(slot)
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            for message in open_:
                session.release(message)
            raise error
        if len(open_) < len(messages):
            logger.warning("%s raised after it had settled its message: %r", self.job.name, type(error).__name__)
        if len(messages) > 1:
            logger.warning(
                "%s failed on a batch of %d messages, which run one by one now: %s",
                self.job.name,
                len(messages),
                type(error).__name__,
            )
            session.alone(open_)
            return
        for message in open_:
            session.fail(message, error, self.job.policy)

    def _overran(self, slot: Slot, session: Session, messages: Sequence[Message[Any]]) -> None:
        self._calm(slot)  # our own cancellation, also where the handler has swallowed it
        error = TimeoutError(f"{self.job.name} did not finish within {self.job.timeout:g} s")
        open_ = [message for message in messages if message._outcome is None]
        if len(messages) > 1:
            session.alone(open_)
            return
        for message in open_:
            session.fail(message, error, self.job.policy)

    @property
    def _ending(self) -> bool:
        """Whether handlers are cancelled because all of them have to end."""
        return self._cancelling or (self._scope is not None and self._scope.cancel_called)

    def _calm(self, slot: Slot) -> None:
        """Forget that the task of *slot* was cancelled, except with its group."""
        task = slot.task
        while task is not None and task.cancelling() and not (self._scope is not None and self._scope.cancel_called):
            task.uncancel()

    def _reply(self, message: Message[Any], result: object) -> tuple[Record, ...]:
        to = reply_to(message._item.record)
        codec, replies = self.job.bound.reply_codec, self.job.replies
        if to is None or codec is None or replies is None:
            return ()
        try:
            body = codec.encode(result)
        except EncodeError as error:
            raise Unanswerable from error
        return (reply(replies, to, self._env.new_id(), body, codec.content_type, self._env.clock.time()),)

    def _tell_handled(self, slot: Slot, message: Message[Any]) -> None:
        assert self._env.emit is not None
        if message._outcome is None or message._outcome.kind != "ack":
            return  # settled by hand in another way, which tells of itself
        self._env.emit(
            events.Handled(
                address=self.job.bound.name,
                group=self.job.group,
                id=message.id,
                attempt=message.attempt,
                took=slot.ended - slot.began,
            )
        )

    # ------------------------------------------------------------------ time

    def _arm(self) -> None:
        if not self._heartbeat.armed:
            self._heartbeat.arm()
        if self._watching is None and self.job.timeout is not None:
            self._watch(self.job.timeout)

    def _end(self, slot: Slot) -> None:
        slot.busy = False
        slot.thread = False
        slot.ended = self._monotonic()
        if (
            self._quiet is not None
            and not self._quiet.done()
            and not any(other.busy or other.gathering for other in self.slots)
        ):
            self._quiet.set_result(None)

    def _watch(self, after: float) -> None:
        self._watching = asyncio.get_running_loop().call_later(after, self._look)

    def _look(self) -> None:
        """Expire the slots that are over their timeout, and look again when the next one can be."""
        self._watching = None
        timeout, now = self.job.timeout, self._monotonic()
        if timeout is None:
            return
        following: float | None = None
        for slot in self.slots:
            if not slot.busy or slot.expired:
                continue
            left = slot.began + timeout - now
            if left <= 0:
                self._expire(slot, timeout)
            elif following is None or left < following:
                following = left
        if following is not None:
            self._watch(following)

    def _expire(self, slot: Slot, timeout: float) -> None:
        slot.expired = True
        if not slot.thread:
            if slot.task is not None:
                slot.task.cancel()
            return
        for message in slot.messages:
            logger.warning(
                "%s is over its timeout of %g s with message %s; a thread cannot be cancelled, so its message stays owned",
                self.job.name,
                timeout,
                message.id,
            )
            if self._env.emit is not None:
                self._env.emit(
                    events.Overrun(
                        address=self.job.bound.name,
                        group=self.job.group,
                        id=message.id,
                        handler=self.job.name,
                        timeout=timeout,
                    )
                )

    def drain(self) -> None:
        """Take no more into a batch that is being gathered."""
        self._draining = True
        self.intake.close()


def in_thread(handler: Callable[..., object], resources: tuple[object, ...], executor: Executor) -> CallNext:
    """Return an async form of a plain function: it runs in *executor*, and what it returns is awaited if it can be."""

    async def call(message: Any) -> object:
        loop = asyncio.get_running_loop()
        slot = _slot.get(None)
        if slot is not None:
            slot.thread = True
        context = contextvars.copy_context()
        future = loop.run_in_executor(executor, partial(context.run, _returned, handler, message, *resources))
        try:
            result = await asyncio.shield(future)
        except asyncio.CancelledError:
            # The thread runs on; nobody is left to hear what it raises.
            future.add_done_callback(_ignore)
            raise
        finally:
            if slot is not None:
                slot.thread = False
        if not inspect.isawaitable(result):
            return result
        if slot is not None and slot.expired:
            if inspect.iscoroutine(result):
                result.close()
            return None  # the run has failed already, and what is awaited from now on no timeout would end
        return await result

    return call


def _returned(handler: Callable[..., object], *args: object) -> object:
    try:
        return handler(*args)
    except StopIteration as error:
        # A future cannot hold this one: the call would never end.  A coroutine makes the same of it.
        raise RuntimeError("the handler raised StopIteration") from error


def _ignore(future: asyncio.Future[object]) -> None:
    if not future.cancelled():
        future.exception()
