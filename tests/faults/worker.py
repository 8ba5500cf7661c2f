"""What a process under test does: publish, or consume, through the public API only, and write it down."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import msgspec

from brokerkit import (
    Broker,
    BrokerError,
    DeliveryLost,
    Message,
    Queue,
    RetryPolicy,
    Service,
    Subscription,
    Topic,
    connect,
)
from brokerkit.errors import BrokerUnavailable, BufferFull, NotAttempted, NotFound, PublishUnknown

from .checker import DEADLY
from .history import Journal
from .start import Order


class Job(msgspec.Struct, frozen=True):
    """What is published."""

    id: str
    key: str
    number: int
    failures: int
    staged: bool


class Planned(Exception):
    """Raised by handlers that are to fail."""


ATTEMPTS = 3
RETRY = RetryPolicy(attempts=ATTEMPTS, wait_initial=0.05)
GROUP = "workers"
TOPIC = Topic("topic", Job, partitions=4)


def effects(of: Collection[str], url: str) -> dict[str, Queue[str] | Topic[str]]:
    """Return where handlers say that they have handled a message, with its acknowledgement."""
    if "queue" in of and not url.startswith("kafka"):
        return {name: Queue(f"{name}-done", str) for name in of}
    return {name: Topic(f"{name}-done", str, partitions=1) for name in of}


def queue(lease: float) -> Queue[Job]:
    return Queue("queue", Job, lease=lease)


class Worker:
    """One process."""

    def __init__(self, order: Order, journal: Journal) -> None:
        self.order = order
        self.journal = journal
        self.random = random.Random(f"{order.seed}/{order.name}")
        self.stop = asyncio.Event()
        self.queue = queue(order.lease)
        self.done = effects(order.of, order.url)

    async def main(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop.set)
        work = {"producer": self.produce, "service": self.serve, "hand": self.consume}[self.order.role]
        watch = loop.create_task(self.watch())
        async with connect(self.order.url) as broker:
            await work(broker)
        watch.cancel()
        self.journal.note("stopped")

    async def watch(self) -> None:
        """Write down when the loop stands: on a busy machine that is a fault like any other."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.05)
            took = time.monotonic() - before
            if took > 0.5:
                self.journal.note("stalled", took=took)

    # ------------------------------------------------------------------ producing

    async def produce(self, broker: Broker) -> None:
        await broker.declare(*(self.queue if of == "queue" else TOPIC for of in self.order.of), *self.done.values())
        self.journal.note("ready")
        async with asyncio.TaskGroup() as tasks:
            for number in range(self.order.keys):
                for of in self.order.of:
                    tasks.create_task(self.publish(broker, of, f"{self.order.name}-{number}"))

    async def publish(self, broker: Broker, of: str, key: str) -> None:
        """Publish messages of one key, one after the other, until told to stop."""
        draw, number = self.random, 0
        while not self.stop.is_set():
            number += 1
            luck = draw.random()
            failures = 1 if luck < 0.06 else ATTEMPTS if luck < 0.08 else 0
            if self.order.deadly == of and number == 1:
                failures = DEADLY
            job = Job(f"{of}-{key}-{number}", key, number, failures, draw.random() < 0.5)
            delay = draw.uniform(*self.order.delays) if of == "queue" and draw.random() < self.order.delayed else 0.0
            plan = {"key": key, "number": number, "failures": failures, "delay": delay, "staged": job.staged}
            self.journal.note("publish", of, job.id, **plan)  # type: ignore[arg-type]
            try:
                if of == "queue":
                    receipt = await broker.publish(self.queue, job, id=job.id, delay=delay, timeout=self.order.timeout)
                else:
                    receipt = await broker.publish(TOPIC, job, key=key, id=job.id, timeout=self.order.timeout)
            except PublishUnknown as error:
                self.journal.note("unknown", of, job.id, text=str(error))
            except (BrokerUnavailable, BufferFull, NotAttempted, NotFound) as error:
                self.journal.note("refused", of, job.id, text=f"{type(error).__name__}: {error}")
            else:
                self.journal.note("confirmed", of, job.id, position=receipt.position or "")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), draw.expovariate(1 / self.order.pause))

    # ------------------------------------------------------------------ consuming

    async def serve(self, broker: Broker) -> None:
        service = Service(GROUP)
        limit = self.order.limit
        for of in self.order.of:
            source: Queue[Job] | Topic[Job] = self.queue if of == "queue" else TOPIC
            service.subscribe(source, concurrency=4, retry=RETRY, max_deliveries=limit)(partial(self.handle, of))
        async with service.running(broker):
            self.journal.note("ready")
            await self.stop.wait()

    async def consume(self, broker: Broker) -> None:
        """Read by hand, with confirmed acknowledgements."""
        waiting = list(self.order.of)

        def entered(of: str) -> None:
            if of in waiting:
                waiting.remove(of)
                if not waiting:
                    self.journal.note("ready")

        async with asyncio.TaskGroup() as tasks:
            if "queue" in self.order.of:
                tasks.create_task(self.read("queue", lambda: broker.subscribe(self.queue, prefetch=16), entered))
            if "topic" in self.order.of:
                tasks.create_task(
                    self.read("topic", lambda: broker.subscribe(TOPIC, group=GROUP, prefetch=16), entered)
                )

    async def read(
        self,
        of: str,
        subscribe: Callable[[], AbstractAsyncContextManager[Subscription[Job]]],
        entered: Callable[[str], None],
    ) -> None:
        """Read until told to stop; a subscription that has ended, because what it reads was deleted, is made anew."""
        while not self.stop.is_set():
            with contextlib.suppress(NotFound):
                async with subscribe() as messages:
                    entered(of)
                    await asyncio.gather(self.work_on(of, messages), self.work_on(of, messages))
                continue
            await asyncio.sleep(0.2)

    async def work_on(self, of: str, messages: Subscription[Job]) -> None:
        while not self.stop.is_set():
            for message in await messages.receive(timeout=0.2):
                async with message.process(RETRY):
                    await self.handle(of, message)
                    await self.confirm(of, message)

    async def confirm(self, of: str, message: Message[Job]) -> None:
        """Acknowledge *message* for sure, if it is not lost meanwhile."""
        for _ in range(20):
            try:
                await message.ack(confirm=True)
            except DeliveryLost:
                return
            except BrokerError:
                await asyncio.sleep(0.2)
                continue
            self.journal.note("acked", of, message.id, position=message.position)
            return

    async def handle(self, of: str, message: Message[Job]) -> None:
        job = message.value
        self.journal.note(
            "started",
            of,
            message.id,
            attempt=message.attempt,
            deliveries=message.deliveries,
            position=message.position,
        )
        if message.id != job.id or (of == "topic" and message.key != job.key):
            self.journal.note("corrupt", of, message.id, text=f"{job} with key {message.key}")
        await asyncio.sleep(self.random.expovariate(1 / self.order.work))
        if job.failures == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        if message.attempt <= job.failures:
            self.journal.note("failed", of, message.id, attempt=message.attempt)
            raise Planned
        if job.staged:
            await message.publish(self.done[of], job.id, id=job.id)
        self.journal.note("handled", of, message.id, attempt=message.attempt)


def main(order: Order) -> None:
    """Work until told to stop."""
    with Journal(Path(order.folder) / f"{order.name}.journal", order.name) as journal:
        try:
            asyncio.run(Worker(order, journal).main())
        except BaseException as error:
            journal.note("problem", text=repr(error))
            raise
