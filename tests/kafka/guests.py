"""Users of the shared broker with an authorizer: each test has one of its own, with a password and rights that it can change."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from brokerkit import Broker, connect
from tests.servers.kafka import Endpoints, Listener, Network, Right, rights, shared_kafka
from tests.servers.kafka.wire import Resource


class Guest:
    """A user, what is allowed to it, and topics whose names begin with its *prefix*."""

    def __init__(self, endpoints: Endpoints, password: str) -> None:
        self.endpoints = endpoints
        mark = uuid.uuid4().hex[:12]
        self.name = f"guest-{mark}"
        self.password = password
        self.prefix = f"guest.{mark}."

    def right(self, resource: Resource, operation: str) -> Right:
        """Return a right on everything of this guest."""
        return Right(self.name, resource, self.prefix, operation, prefixed=True)

    def all(self) -> list[Right]:
        """Return what README lists."""
        return rights(self.prefix, user=self.name)

    def allow(self, *given: Right) -> None:
        """Give rights, all of README's if none are named."""
        with self.endpoints.wire() as admin:
            admin.allow(list(given) or self.all())

    def forbid(self, *taken: Right) -> None:
        """Take rights away."""
        with self.endpoints.wire() as admin:
            assert admin.forbid(list(taken)) == len(taken)

    def passwd(self, password: str) -> None:
        """Have another password from now on; `password` stays as it was."""
        with self.endpoints.wire() as admin:
            admin.passwd(self.name, password)

    def create(self, topic: str, partitions: int = 1, settings: Mapping[str, str] | None = None) -> None:
        """Create a topic as somebody who may."""
        with self.endpoints.wire() as admin:
            admin.create(self.prefix + topic, partitions, settings)

    def url(self, listener: Listener = "SASL", *, network: Network | None = None, query: str = "session=1") -> str:
        """Return a URL of this guest."""
        login = f"{quote(self.name)}:{quote(self.password, safe='')}@"
        scheme, _, rest = self.endpoints.url(listener).partition("://")
        hosts = rest.rpartition("@")[2] if network is None else ",".join(f"127.0.0.1:{port}" for port in network.ports)
        return f"{scheme}://{login}{hosts}?prefix={self.prefix}&{query}"

    def connect(self, *, network: Network | None = None, **options: Any) -> Broker:
        """Return a broker that is not open yet."""
        return connect(self.url(network=network), **options)


@contextlib.contextmanager
def guest(password: str = "guest-secret") -> Iterator[Guest]:
    """Yield a user without any rights; remove what is left of it."""
    made = Guest(shared_kafka(rights=True), password)
    made.passwd(password)
    try:
        yield made
    finally:
        with made.endpoints.wire() as admin:
            admin.forbid(made.all())
            admin.delete([name for name in admin.cluster(None).topics if name.startswith(made.prefix)])
