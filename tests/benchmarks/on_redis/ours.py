"""brokerkit's rows of queues, and those that only Redis has."""

from __future__ import annotations

from typing import Any

import orjson

import brokerkit
from brokerkit import Broker, Queue, Service

from ..job import Order
from ..on_servers.client import PAGE, Publisher
from ..on_servers.ours import Ours, OurTopic


class OurQueue(Ours):
    """A queue of dataclasses."""

    name = "brokerkit-queue"
    note = "Queue of a dataclass; consuming: a service, prefetch 100 (one handler) or 200 (100)"
    ordered = False

    @property
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


class OurQueueBytes(OurQueue):
    """A queue of bytes."""

    name = "brokerkit-queue-bytes"
    note = "Queue of bytes, made before"
    body_type = bytes

    def item(self, value: Order) -> Any:
        return orjson.dumps(value)


class OurQueueDefault(OurQueue):
    """With the prefetch that brokerkit chooses."""

    name = "brokerkit-queue-default"
    note = "with the default prefetch: 16 with one handler"
    prefetch = None


class OurTopicBytes(OurTopic):
    """A topic of bytes."""

    name = "brokerkit-topic-bytes"
    note = "Topic of bytes, made before, keyed"
    body_type = bytes

    def item(self, value: Order) -> Any:
        return orjson.dumps(value), value.user


class ShallowQueue(OurQueue):
    """A queue with 10,000 more behind."""

    name = "brokerkit-queue-10k"
    note = "a queue with 10,000 more messages behind"
    behind = 10_000
    exactly = 30_000


class DeepQueue(ShallowQueue):
    """A queue with 1,000,000 more behind."""

    name = "brokerkit-queue-1M"
    note = "a queue with 1,000,000 more messages behind"
    behind = 1_000_000


class ShallowTopic(OurTopic):
    """A topic with 10,000 more behind."""

    name = "brokerkit-topic-10k"
    note = "a topic with 10,000 more messages behind"
    behind = 10_000
    exactly = 30_000


class DeepTopic(ShallowTopic):
    """A topic with 1,000,000 more behind."""

    name = "brokerkit-topic-1M"
    note = "a topic with 1,000,000 more messages behind"
    behind = 1_000_000
