"""`Endpoints`: how to reach a cluster, whoever has started it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Self
from urllib.parse import quote

from ..access import USER
from .programs import Version
from .settings import Listener
from .wire import Wire, wire


@dataclass(frozen=True)
class Endpoints:
    """The ports of a cluster, which stay the same as long as it exists, its users and its certificates."""

    version: Version
    ports: Mapping[int, Mapping[str, int]]
    """By node and listener."""
    passwords: Mapping[str, str]
    """By user, of SCRAM and PLAIN alike."""
    tls: str
    """The folder with the certificates."""

    @property
    def authority(self) -> str:
        """The file of the authority that has signed the brokers' certificates."""
        return f"{self.tls}/authority.pem"

    @property
    def client(self) -> tuple[str, str]:
        """The files of a client's certificate and its key."""
        return f"{self.tls}/client.pem", f"{self.tls}/client_key.pem"

    @property
    def stranger(self) -> str:
        """The file of an authority that has signed nothing here."""
        return f"{self.tls}/stranger.pem"

    def addresses(self, listener: Listener = "PLAIN") -> list[tuple[str, int]]:
        """Return host and port of each node."""
        return [("127.0.0.1", own[listener]) for own in self.ports.values()]

    def bootstrap(self, listener: Listener = "PLAIN") -> str:
        """Return hosts and ports as Kafka's clients take them."""
        return ",".join(f"{host}:{port}" for host, port in self.addresses(listener))

    def url(
        self,
        listener: Listener = "PLAIN",
        *,
        user: str = USER,
        password: str | None = None,
        ports: Sequence[int] = (),
        query: str = "",
    ) -> str:
        """Return a URL for brokerkit; *ports* may be those of proxies.  TLS needs `authority` as an option."""
        login = ""
        if listener in {"SASL", "SASLSSL"}:
            secret = self.passwords[user] if password is None else password
            login = f"{quote(user, safe='')}:{quote(secret, safe='')}@"
        scheme = "kafka+ssl" if "SSL" in listener or listener == "MTLS" else "kafka"
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports) or self.bootstrap(listener)
        return f"{scheme}://{login}{hosts}{'?' if query else ''}{query}"

    def wire(self) -> Wire:
        """Connect as the administrator to a broker that answers."""
        return wire([own["PLAIN"] for own in self.ports.values()])

    def dump(self) -> str:
        """Return all of it as a text for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Self:
        """Return what `dump` has written."""
        values = json.loads(text)
        return cls(**{**values, "ports": {int(node): own for node, own in values["ports"].items()}})
