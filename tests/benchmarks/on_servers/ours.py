"""brokerkit's rows: what is measured goes through its public interface, and nothing else."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

import orjson

import brokerkit
from brokerkit import Broker, Message, Outgoing, Queue, Service, Topic

from ..job import Order
from .client import GROUP, PAGE, Client, Got, Publisher


class Ours(Client):
    """What all of them share."""

    chunk = PAGE
    ordered = True
    body_type: ClassVar[type[Any]] = Order
    prefetch: ClassVar[int | None] = 100
    """As many as the raw client reads at a time; None: what brokerkit chooses."""

    def got(self) -> Got:
        return self.job.timer() if self.work.metric == "latency" else self.job.counter()

    def subscribe(self, service: Service[Any]) -> Any:
        """Return the decorator of handlers."""
        raise NotImplementedError

    def address(self, broker: Broker) -> Publisher:
        """Return how *broker* publishes here."""
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        async with brokerkit.connect(self.job.url) as broker:
            yield self.address(broker)

    @contextlib.asynccontextmanager
    async def consumer(self, got: Got) -> AsyncIterator[None]:
        service = Service(GROUP)

        async def handle(message: Message[Order]) -> None:
            got(message.value)

        self.subscribe(service)(handle)
        async with brokerkit.connect(self.job.url) as broker, service.running(broker):
            yield

    def options(self) -> dict[str, Any]:
        """Return the options of the subscription."""
        handlers = self.work.handlers
        prefetch = None if self.prefetch is None else max(self.prefetch, 2 * handlers if handlers > 1 else 0)
        return {"concurrency": handlers, **({} if prefetch is None else {"prefetch": prefetch})}

    def numbered(self, value: Any) -> int:
        """Return the number of a stored value."""
        return int(value.n if isinstance(value, Order) else orjson.loads(value)["n"])


class OurTopic(Ours):
    """A topic of dataclasses, keyed, with a durable group that is held to the order of each key."""

    name = "brokerkit-topic"
    note = (
        "Topic of a dataclass, 8 partitions, keyed; consuming: a group, order per key checked; prefetch as with queues"
    )

    @functools.cached_property
    def topic(self) -> Topic[Any]:
        """The topic: one object, as in a program, which is known again without being compared."""
        return Topic(self.job.entity, self.body_type)

    def item(self, value: Order) -> Any:
        return value, value.user

    def subscribe(self, service: Service[Any]) -> Any:
        return service.subscribe(self.topic, **self.options())

    def address(self, broker: Broker) -> Publisher:
        topic = self.topic

        def many(items: Sequence[tuple[Any, str | None]]) -> Any:
            if items[0][1] is None:
                return broker.publish_many(topic, [value for value, _ in items])
            outgoing: list[Outgoing[Any]] = [topic.outgoing(value, key=key) for value, key in items]
            return broker.publish_many(topic, outgoing)

        return Publisher(lambda item: broker.publish(topic, item[0], key=item[1]), many)

    async def audit(self) -> None:
        job = self.job
        async with brokerkit.connect(job.url) as broker:
            if self.work.stores:
                start = brokerkit.Start.EARLIEST
                async with broker.subscribe(self.topic, start=start, until_end=True, prefetch=PAGE) as messages:
                    async for message in messages:
                        job.seen.append(self.numbered(message.value))
            else:
                backlog = await broker.backlog(self.topic, GROUP)
                job.unsettled = (backlog.in_flight or 0) + (backlog.delayed or 0) + (backlog.dead or 0)
                job.left = backlog.waiting or 0


class OurQueue(Ours):
    """A queue of dataclasses."""

    name = "brokerkit-queue"
    note = "Queue of a dataclass; consuming: a service, prefetch 100 (one handler) or 200 (100)"
    ordered = False

    @functools.cached_property
    def queue(self) -> Queue[Any]:
        """The queue."""
        return Queue(self.job.entity, self.body_type)

    def item(self, value: Order) -> Any:
        return value

    def subscribe(self, service: Service[Any]) -> Any:
        return service.subscribe(self.queue, **self.options())

    def address(self, broker: Broker) -> Publisher:
        queue = self.queue
        return Publisher(lambda item: broker.publish(queue, item), lambda items: broker.publish_many(queue, items))

    async def audit(self) -> None:
        job = self.job
        async with brokerkit.connect(job.url) as broker:
            if self.work.stores:
                # Taken out, as browsing a queue is made for looking at its front.
                async with broker.subscribe(self.queue, prefetch=PAGE) as messages:
                    # Twice nothing, if some are missing: a busy machine is no loss.
                    tries = 2
                    while tries and (tries == 2 or len(job.seen) < job.n + job.behind):
                        some = await messages.receive(limit=PAGE, timeout=0.5)
                        tries -= not some
                        for message in some:
                            job.seen.append(self.numbered(message.value))
                            await message.ack()
            else:
                backlog = await broker.backlog(self.queue)
                job.unsettled = (backlog.in_flight or 0) + (backlog.delayed or 0) + (backlog.dead or 0)
                job.left = backlog.waiting or 0
