"""A service while it runs: its resources, its pools, its drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any

import anyio
from anyio.abc import TaskGroup

from . import events
from ._heartbeat import Heartbeat
from ._intake import Intake
from ._plans import queue_plans, topic_plans
from ._registration import Member, Registration
from ._tasks import Hosted
from ._workers import Job, Pool, in_thread
from .address import AnyTopic, Queue, Topic
from .broker import Broker
from .errors import Closed, ConfigError
from .middleware import CallNext, compose

logger = logging.getLogger("brokerkit")

THREADS = 32
"""Threads for ``def`` handlers, for each running service."""
GRACE = 5.0
"""Seconds for storing outcomes after the drain's own deadline."""


class Running:
    """The async context manager of `Service.running`."""

    def __init__(
        self, members: Sequence[Member], broker: Broker, drain: float, registers: Sequence[list[Running]]
    ) -> None:
        self._members = members
        self._broker = broker
        self._drain = drain
        self._registers = registers
        """Who wants to know of this while it runs: each member, as each may stop it."""
        self._name = members[0].name
        self._hosted = Hosted(f"brokerkit service {self._name}", self._main)
        self._pools: list[Pool] = []
        self._intakes: list[Intake] = []
        self._executor: ThreadPoolExecutor | None = None
        self._heartbeat: Heartbeat | None = None

    async def __aenter__(self) -> None:
        if not any(member.registrations for member in self._members):
            raise ConfigError(f"service {self._name!r} has no handlers: add some with @service.subscribe(...)")
        if self._hosted.task is not None:
            raise Closed(f"this run of service {self._name!r} was entered before: call service.running(broker) again")
        await self._hosted.__aenter__()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Drain and return when that is done."""
        await self._hosted.__aexit__()

    def stop(self) -> None:
        """Begin to drain."""
        self._hosted.stopping.set()

    def when_ended(self, call: Callable[[], None]) -> None:
        """Call *call* when the service has stopped, by `stop` or by a failure."""
        if self._hosted.task is not None:
            self._hosted.task.add_done_callback(lambda _: call())

    # ------------------------------------------------------------------ life

    async def _main(self, started: asyncio.Future[None]) -> None:
        try:
            async with AsyncExitStack() as stack:
                for member in self._members:
                    resources: tuple[object, ...] = ()
                    if member.lifespan is not None:
                        resources = (await stack.enter_async_context(member.lifespan()),)
                    for registration in member.registrations:
                        self._pools.append(await self._pool(member, registration, resources))
                await self._run(started)
        finally:
            self._broker.detach(self, self._intakes)
            for register in self._registers:
                if self in register:
                    register.remove(self)
            if self._heartbeat is not None:
                self._heartbeat.close()
            if self._executor is not None:
                # Threads that run on are reported by the drain; waiting for them here could take for ever.
                self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self, started: asyncio.Future[None]) -> None:
        async with anyio.create_task_group() as group:
            for intake in self._intakes:
                await intake.start(group)
            for pool in self._pools:
                pool.start(group)
            self._broker.attach(self, self._intakes, self.close)
            for register in self._registers:
                register.append(self)
            logger.info("service %s started: %d subscriptions", self._name, len(self._pools))
            self._warn_of_shared()
            started.set_result(None)
            await self._hosted.stopping.wait()
            await self._end(group)

    def _warn_of_shared(self) -> None:
        """Two handlers of one queue, or of one topic and group, each get a part of the messages: seldom what is meant."""
        seen: dict[object, str] = {}
        for pool in self._pools:
            plan = pool.intake.feeds[0].plan
            if plan.letters is None:
                continue
            other = seen.setdefault((plan.source.address, plan.source.group), pool.job.name)
            if other != pool.job.name:
                logger.warning(
                    "%s and %s share the messages of %s: each goes to one of them; give a handler a group of its own to "
                    "see all of a topic",
                    other,
                    pool.job.name,
                    plan.name,
                )

    async def _pool(self, member: Member, registration: Registration, resources: tuple[object, ...]) -> Pool:
        broker, env = self._broker, self._broker.env()
        bound = await broker.bind(registration.address)
        replies: AnyTopic | None = None
        group: str | None = None
        if isinstance(bound.address, Queue):
            if bound.reply_codec is not None:
                topic = (await broker.replies()).address
                replies = topic if isinstance(topic, Topic) else None
            plans = queue_plans(
                bound,
                prefetch=registration.prefetch,
                by_hand=False,
                max_deliveries=registration.max_deliveries,
                replies=replies,
            )
        else:
            plans = topic_plans(
                bound,
                group=registration.group,
                prefix=broker.prefix,
                start=registration.start,
                prefetch=registration.prefetch,
                by_hand=False,
                max_deliveries=registration.max_deliveries,
            )
            group = plans[0].source.group
        intake = Intake(plans, env)
        self._intakes.append(intake)
        if self._heartbeat is None:
            self._heartbeat = Heartbeat(self._name, env.clock, env.emit, self._suspects)
        job = Job(
            name=f"{member.name}.{registration.name}",
            call=compose(broker.middleware, self._call(registration, resources)),
            bound=bound,
            group=group,
            concurrency=registration.concurrency,
            policy=registration.retry,
            timeout=registration.timeout,
            batch=registration.batch,
            replies=replies,
        )
        return Pool(intake, job, env, self._heartbeat)

    def _call(self, registration: Registration, resources: tuple[object, ...]) -> CallNext:
        handler: Any = registration.handler
        passed = resources if registration.wants_resources else ()
        if registration.plain:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix=f"brokerkit-{self._name}")
            return in_thread(handler, passed, self._executor)
        if not passed:
            call: CallNext = handler
            return call
        resource = passed[0]

        async def with_resources(message: Any) -> object:
            result: object = await handler(message, resource)
            return result

        return with_resources

    def _suspects(self, since: float) -> Iterable[str]:
        """Name the handlers that have run since a point of the monotonic clock."""
        for pool in self._pools:
            if any(slot.busy or slot.ended >= since for slot in pool.slots):
                yield pool.job.name

    # ------------------------------------------------------------------ drain

    async def _end(self, group: TaskGroup) -> None:
        """Stop fetching, finish what runs, hand back what has not started, store outcomes, leave."""
        logger.info("service %s stops", self._name)
        released = sum(intake.stop_fetching() for intake in self._intakes)
        for pool in self._pools:
            pool.drain()
        cancelled = threads = 0
        with anyio.move_on_after(self._drain) as patience:
            for pool in self._pools:
                await pool.quiet()
        if patience.cancelled_caught:
            for pool in self._pools:
                tasks, running = pool.cancel()
                cancelled += tasks
                threads += running
        with anyio.move_on_after(GRACE):
            if cancelled:
                for pool in self._pools:
                    await pool.quiet()
            async with anyio.create_task_group() as leaving:
                for intake in self._intakes:
                    leaving.start_soon(intake.finish)
        group.cancel_scope.cancel()
        report = events.Drained(
            address=self._name,
            finished=sum(pool.finished for pool in self._pools),
            cancelled=cancelled,
            released=released,
            threads=threads,
        )
        logger.info(
            "service %s stopped: %d messages handled, %d handed back unstarted, %d cancelled, %d threads still running",
            self._name,
            report.finished,
            report.released,
            report.cancelled,
            report.threads,
        )
        emit = self._broker.env().emit
        if emit is not None:
            emit(report)
