"""What the servers say that they have of stock Celery's queues, asked in plain words."""

from __future__ import annotations

from collections.abc import Iterator

from ..on_kafka.log import messages
from ..on_redis.server import client


def of_list(url: str, queue: str) -> Iterator[bytes]:
    """Yield the messages of a queue on Redis: a list."""
    with client(url) as asking:
        yield from asking.lrange(queue, 0, -1)


def in_list(url: str, queue: str) -> int:
    """Return how many those are, and how many no worker has acknowledged of all queues."""
    with client(url) as asking:
        return int(asking.llen(queue)) + int(asking.hlen("unacked"))


def of_log(url: str, queue: str) -> Iterator[bytes]:
    """Yield the messages of a queue on Kafka: a topic."""
    return messages(url, queue)
