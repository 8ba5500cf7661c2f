"""The servers that are measured on: a Redis and a Kafka, side by side, as their own parts have them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from ..frame import Backend
from ..on_kafka import server as on_kafka
from ..on_redis import server as on_redis

NAME: Final = "bench-"
"""Is in the name of each topic that measuring makes."""


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """Start both and yield their URLs, with a space between them."""
    with on_redis.serve() as redis, on_kafka.serve() as kafka:
        yield f"{redis} {kafka}"


def redis(urls: str) -> str:
    """Return the URL of the Redis."""
    return urls.split()[0]


def kafka(urls: str) -> str:
    """Return the URL of the Kafka."""
    return urls.split()[1]


def clean(urls: str) -> None:
    """Delete what was measured before."""
    on_redis.clean(redis(urls))
    with on_kafka.wire(kafka(urls)) as admin:
        if topics := [name for name in admin.cluster(None).topics if NAME in name]:
            admin.delete(topics)


BOTH: Final = Backend(name="celery", serve=serve, clean=clean)
