"""The physical limit: librdkafka, in C with threads of its own, used by blocking code."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from ..job import RATE
from ..on_servers.client import PAGE, dumps
from .log import Log
from .raw import AT_ONCE
from .server import bootstrap

PATIENCE = 60.0


class Confluent(Log):
    """What a machine can do at all."""

    name = "confluent"
    note = (
        "physical limit: librdkafka, blocking, no asyncio, acks=1, json. produce and flush of each, of 100 (100 tasks), of all "
        "(many); consuming: consume(100), then one commit"
    )

    def producer(self, linger: int = 0) -> Any:
        """Return a producer that knows its topic."""
        import confluent_kafka

        producer = confluent_kafka.Producer(
            {
                "bootstrap.servers": bootstrap(self.job.url),
                "acks": 1,
                "linger.ms": linger,
                "queue.buffering.max.messages": 1_000_000,
            }
        )
        producer.list_topics(self.job.entity, timeout=PATIENCE)
        return producer

    def publish(self, producer: Any, items: Sequence[Any], together: int) -> None:
        """Publish *items*, so many before each flush."""
        name, keyed = self.job.entity, self.work.keyed
        failed: list[Any] = []

        def stored(error: Any, message: Any) -> None:
            if error is not None:
                failed.append(error)

        for number, item in enumerate(items, 1):
            producer.produce(name, dumps(item).encode(), key=item["user"] if keyed else None, on_delivery=stored)
            if not number % together:
                producer.flush(PATIENCE)
            elif not number % PAGE:
                producer.poll(0)
        if producer.flush(PATIENCE) or failed:
            raise OSError(f"not stored: {failed[:1]}")

    async def fill(self) -> None:
        await self.prepare()
        if not self.work.stores:
            values = self.job.stock()
            self.publish(self.producer(5), [vars(value) for value in values], len(values))

    async def run(self) -> None:
        job, work = self.job, self.work
        if work.stores:
            items = [vars(value) for value in job.values()]
            producer = self.producer(5 if work.batch > 1 else 0)
            job.begin()
            self.publish(producer, items, len(items) if work.batch > 1 else work.handlers)
            job.stop()
            return
        if work.metric == "latency":
            await self.prepare()
        self.consume()

    def consume(self) -> None:
        """Handle all of them."""
        import confluent_kafka

        job, got = self.job, self.got()
        job.drain()
        consumer = confluent_kafka.Consumer(
            {
                "bootstrap.servers": bootstrap(job.url),
                "group.id": self.group,
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
            }
        )
        consumer.subscribe([job.entity], on_assign=lambda *_: job.ready())
        most = 1 if self.work.metric == "latency" else AT_ONCE
        deadline = time.monotonic() + PATIENCE
        try:
            while len(job.seen) < job.n and time.monotonic() < deadline:
                page = consumer.consume(most, 0.1)
                for message in page:
                    if message.error():
                        raise OSError(str(message.error()))
                    got(json.loads(message.value() or b""))
                if page:
                    consumer.commit(asynchronous=False)
        finally:
            consumer.close()

    async def feed(self) -> None:
        producer = self.producer()
        time.sleep(0.2)
        due = time.monotonic()
        for value in self.job.values():
            time.sleep(max(0.0, due - time.monotonic()))
            due += 1 / RATE
            value.t = time.monotonic_ns()
            self.publish(producer, [vars(value)], 1)
