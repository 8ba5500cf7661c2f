"""brokerkit's rows that only Redis has."""

from __future__ import annotations

from typing import Any

import orjson

from ..job import Order
from ..on_servers.ours import OurQueue, OurTopic


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
