"""Where the brokers of the tests are: each `System` gives URLs, and removes what a test has made there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from ..servers import ADMIN, RedisServer
from ..servers.kafka import PREFIX, Endpoints, shared_kafka
from .workers import Crew

Name: TypeAlias = Literal["redis", "kafka"]
STOCK: Final = bool(os.environ.get("BROKERKIT_STOCK"))
"""Celery's own transport for Redis is used, which shows what the tests find where brokerkit is not."""
SYSTEMS: Final[tuple[Name, ...]] = ("redis",) if STOCK else ("redis", "kafka")
LEASE: Final = 3.0
"""Seconds of the queues' lease, where a test waits for what a dead worker had."""


class System:
    """A broker, beside a Redis for the results."""

    def __init__(self, name: Name, results: RedisServer) -> None:
        self.name: Name = name
        self.results = results

    @property
    def backend(self) -> str:
        """The URL of the result backend."""
        return self.results.url(user=ADMIN, database=1)

    def crew(self, folder: Path, *, url: str = "", **config: Any) -> Crew:
        """Return an application, with names in the broker that nobody else has."""
        prefix = f"{PREFIX}c{secrets.token_hex(3)}."
        options: dict[str, Any] = {} if STOCK else {"prefix": prefix, **config.pop("options", {})}
        cleanup: Callable[[], None] = lambda: None
        if self.name == "kafka" and not url:
            cleanup = lambda: forget(shared_kafka(), prefix)
        config = {"broker_transport_options": options, **config}
        return Crew(url or self.url(), folder, backend=config.pop("backend", self.backend), cleanup=cleanup, **config)

    def url(self) -> str:
        """Return the broker's URL for stock Celery."""
        if self.name == "kafka":
            return shared_kafka().url()
        return self.results.url(user=ADMIN) if STOCK else f"brokerkit+{self.results.url()}"


def forget(endpoints: Endpoints, prefix: str) -> None:
    """Remove all topics whose names begin with *prefix*."""
    with endpoints.wire() as admin:
        made = [name for name in admin.cluster(None).topics if name.startswith(prefix)]
        if made:
            admin.delete(made)


@contextmanager
def served(name: Name) -> Generator[System]:
    """Give a system whose Redis is this caller's own; Kafka is the run's."""
    with RedisServer(appendonly=True) as results:
        yield System(name, results)
