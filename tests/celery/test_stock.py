"""Tasks that Celery's own Kafka transport has left are named, once, and only those."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import celery
import pytest
from celery import signals
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from brokerkit import connect
from brokerkit.celery import _stock

from ..servers.kafka import PREFIX, shared_kafka


@dataclass(eq=False)
class Worker:
    """What is asked of the sender of the signal."""

    connection: Any
    app: Any


class Topic:
    """A topic as Celery's own transport has it."""

    def __init__(self) -> None:
        self.name = f"{PREFIX}stock{secrets.token_hex(3)}"
        self._config: dict[str, Any] = {"bootstrap.servers": shared_kafka().bootstrap()}
        self._admin = AdminClient(self._config)
        self._admin.create_topics([NewTopic(self.name, 1, 1)])[self.name].result(30)

    def publish(self, number: int) -> None:
        producer = Producer(self._config)
        for _ in range(number):
            producer.produce(self.name, b"{}")
        assert producer.flush(30) == 0

    def commit(self, offset: int) -> None:
        """Have done what is below *offset*, as a worker of the old fleet has."""
        consumer = Consumer({**self._config, "group.id": f"{self.name}-consumer-group"})
        consumer.commit(offsets=[TopicPartition(self.name, 0, offset)], asynchronous=False)
        consumer.close()

    def close(self) -> None:
        self._admin.delete_topics([self.name])[self.name].result(30)


@pytest.fixture
def topic() -> Iterator[Topic]:
    made = Topic()
    yield made
    made.close()


@pytest.mark.asyncio
async def test_what_no_worker_has_read_is_counted(topic: Topic) -> None:
    async with connect(shared_kafka().url(), options={"prefix": "other."}) as broker:

        async def unread() -> dict[str, int]:
            return await _stock.unread(broker, [f"{PREFIX}absent", "no name!", "w1@host", topic.name])

        assert await unread() == {}
        topic.publish(5)
        assert await unread() == {topic.name: 5}
        topic.commit(3)
        assert await unread() == {topic.name: 2}
        topic.commit(5)
        assert await unread() == {}


@pytest.mark.parametrize("left", [0, 3])
def test_a_worker_that_is_ready_names_the_topics(left: int, topic: Topic, caplog: pytest.LogCaptureFixture) -> None:
    topic.publish(left)
    app = celery.Celery("x", broker=shared_kafka().url(), set_as_current=False, task_default_queue=topic.name)
    with app.connection_for_read() as connection:
        connection.connect()
        with caplog.at_level(logging.WARNING, "brokerkit.celery"):
            signals.worker_ready.send(Worker(connection=connection, app=app))
    texts = [record.getMessage() for record in caplog.records if record.name == "brokerkit.celery"]
    assert [f"{topic.name} ({left})" in text for text in texts] == ([True] if left else [])


def test_on_other_systems_nobody_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    app = celery.Celery("x", broker="brokerkit+memory://", set_as_current=False)
    with app.connection_for_read() as connection:
        connection.connect()
        signals.worker_ready.send(Worker(connection=connection, app=app))
    signals.worker_ready.send(Worker(connection=None, app=app))
    assert not [text for text in caplog.messages if "unread" in text]
