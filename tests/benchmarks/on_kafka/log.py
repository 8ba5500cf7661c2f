"""What all programs on Kafka share: a topic of their own, and what its log says in the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Final

from ..frame import Part, Work
from ..on_servers.client import GROUP, PAGE, Client
from .server import bootstrap, wire

PATIENCE: Final = 30.0


class Log(Client):
    """A program that publishes to a topic and consumes from it; another client looks at the log afterwards."""

    chunk = PAGE

    @classmethod
    def parts(cls, work: Work) -> frozenset[Part]:
        """A topic is made by another process than the one that is measured, but where that has to come first."""
        return super().parts(work) | ({"fill"} if work.stores else set())

    @property
    def group(self) -> str:
        """The group that consumes."""
        return f"{self.job.entity}.{GROUP}"

    async def prepare(self) -> None:
        with wire(self.job.url) as admin:
            admin.create(self.job.entity, self.work.partitions)

    async def fill(self) -> None:
        if self.work.stores:
            await self.prepare()
        else:
            await super().fill()

    def found(self) -> Iterator[bytes]:
        return messages(self.job.url, self.job.entity)

    def pending(self) -> int:
        with _looking(self.job.url, self.group) as consumer:
            ends = _ends(consumer, self.job.entity)
            places = consumer.committed([_place(self.job.entity, partition) for partition in ends], timeout=PATIENCE)
            # A partition of which nothing is committed has a negative offset.
            return sum(ends[place.partition] - max(0, place.offset) for place in places)


def messages(url: str, topic: str) -> Iterator[bytes]:
    """Yield all that *topic* has."""
    with _looking(url, "audit") as consumer:
        ends = _ends(consumer, topic)
        left = {partition: end for partition, end in ends.items() if end}
        consumer.assign([_place(topic, partition, 0) for partition in left])
        deadline = time.monotonic() + PATIENCE
        while left and time.monotonic() < deadline:  # what has not come by then is missed
            for message in consumer.consume(PAGE, 0.05):
                if message.error():
                    raise OSError(str(message.error()))
                yield message.value() or b""
                if message.offset() + 1 >= left.get(message.partition(), 0):
                    left.pop(message.partition(), None)


@contextlib.contextmanager
def _looking(url: str, group: str) -> Iterator[Any]:
    import confluent_kafka

    consumer = confluent_kafka.Consumer(
        {
            "bootstrap.servers": bootstrap(url),
            "group.id": group,
            "enable.auto.commit": False,
            "auto.offset.reset": "error",
        }
    )
    try:
        yield consumer
    finally:
        consumer.close()


def _place(topic: str, partition: int, offset: int = -1001) -> Any:
    import confluent_kafka

    return confluent_kafka.TopicPartition(topic, partition, offset)


def _ends(consumer: Any, topic: str) -> dict[int, int]:
    """Return the end of each partition."""
    partitions = consumer.list_topics(topic, timeout=PATIENCE).topics[topic].partitions
    return {one: consumer.get_watermark_offsets(_place(topic, one), timeout=PATIENCE)[1] for one in partitions}
