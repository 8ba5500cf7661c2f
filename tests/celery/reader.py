"""A kombu connection without a server, and a consumer that keeps what it gets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection, Consumer, Exchange, Producer, Queue

WAIT = 20
"""Seconds that no wait here needs."""

numbers = itertools.count()


@pytest.fixture
def url() -> str:
    return f"brokerkit+memory://transport{next(numbers)}"


@pytest.fixture
def connection(url: str) -> Iterator[Any]:
    with Connection(url) as connection:
        yield connection


@pytest.fixture
def queue() -> Queue:
    return Queue("work", Exchange("work"), routing_key="work")


def publish(connection: Any, queue: Queue, *bodies: object) -> None:
    with connection.channel() as channel:
        producer = Producer(channel)
        for body in bodies:
            producer.publish(body, exchange=queue.exchange, routing_key=queue.routing_key, declare=[queue])


class Reader:
    """A consumer on a channel of its own."""

    def __init__(self, connection: Any, *queues: Queue, prefetch: int = 0, no_ack: bool = False) -> None:
        self.connection = connection
        self.channel = connection.channel()
        self.messages: list[Any] = []
        self.consumer = Consumer(
            self.channel, list(queues), on_message=self.messages.append, no_ack=no_ack, prefetch_count=prefetch or None
        )
        self.consumer.consume()

    def read(self, count: int) -> list[Any]:
        """Drain events until *count* messages are here."""
        while len(self.messages) < count:
            self.connection.drain_events(timeout=WAIT)
        return self.messages

    def nothing(self, seconds: float = 0.3) -> bool:
        """Tell whether nothing comes for a while."""
        before = len(self.messages)
        with pytest.raises(TimeoutError):
            self.connection.drain_events(timeout=seconds)
        return len(self.messages) == before
