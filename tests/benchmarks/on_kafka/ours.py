"""brokerkit's rows on Kafka."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import brokerkit
from brokerkit import Topic

from ..job import Order
from ..on_servers import ours
from ..on_servers.client import GROUP, Client, Publisher
from .log import Log
from .share import divided, lag


class Ours(Log, ours.OurTopic):
    """A topic of dataclasses; what it has stored and done is looked at as that of all others is."""

    name = "brokerkit"
    note = (
        "acks=all, idempotent; Topic of a dataclass, many: publish_many; consuming: a service with a group, prefetch 100 (one "
        "handler) or 200 (100), order per key checked"
    )
    audit = Client.audit

    @functools.cached_property
    def topic(self) -> Topic[Any]:
        return Topic(self.job.entity, self.body_type, partitions=self.work.partitions)

    @property
    def group(self) -> str:
        return f"{self.job.entity}..{GROUP}"

    def item(self, value: Order) -> Any:
        return value, value.user if self.work.keyed else None

    @contextlib.asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        async with brokerkit.connect(self.job.url) as broker:
            # What a first publish would do besides is no part of what is measured, as with the others: connecting, and
            # getting a number as a producer.
            await broker.publish(Topic(f"{self.job.entity}-first", str, partitions=1), "")
            await broker.declare(self.topic)
            yield self.address(broker)


class OursDefault(Ours):
    """With the prefetch that brokerkit chooses."""

    name = "brokerkit-default"
    note = "with the default prefetch: 16 with one handler"
    prefetch = None


class OurQueue(ours.OurQueue, Log):
    """A queue on a share group: each message is acknowledged by itself."""

    note = "Queue of a dataclass on a share group, acks=all; consuming: a service, prefetch 2000"
    prefetch: ClassVar[int | None] = 2000

    async def prepare(self) -> None:
        async with brokerkit.connect(divided(self.job.url, self.work.partitions)) as broker:
            await broker.declare(self.queue)

    async def audit(self) -> None:
        await super().audit()
        job = self.job
        # The cluster is asked as well, past all that brokerkit thinks: what it keeps beyond that was forgotten.
        kept = lag(job.url, job.entity)
        job.unsettled = (job.unsettled or 0) + max(0, kept - job.left)


class OurQueueShort(OurQueue):
    """With less in hand."""

    name = "brokerkit-queue-500"
    note = "with prefetch 500"
    prefetch = 500


class OurQueueDefault(OurQueue):
    """With the prefetch that brokerkit chooses."""

    name = "brokerkit-queue-default"
    note = "with the default prefetch: 200 with 100 handlers"
    prefetch = None
