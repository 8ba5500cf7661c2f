"""brokerkit's rows on Kafka."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import brokerkit
from brokerkit import Topic

from ..job import Order
from ..on_servers.client import GROUP, Client, Publisher
from ..on_servers.ours import OurTopic
from .log import Log


class Ours(Log, OurTopic):
    """A topic of dataclasses; what it has stored and done is looked at as that of all others is."""

    name = "brokerkit"
    note = (
        "acks=all, idempotent; Topic of a dataclass, many: publish_many; consuming: a service with a group, prefetch 100 (one "
        "handler) or 200 (100), order per key checked"
    )
    audit = Client.audit

    @property
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
            await broker.declare(self.topic)  # what a first publish would do besides is no part of what is measured
            yield self.address(broker)


class OursDefault(Ours):
    """With the prefetch that brokerkit chooses."""

    name = "brokerkit-default"
    note = "with the default prefetch: 16 with one handler"
    prefetch = None
