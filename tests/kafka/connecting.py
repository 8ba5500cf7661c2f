"""Connections as the tests make them."""

from __future__ import annotations

from kio.schema.metadata.v12.request import MetadataRequest

from brokerkit.drivers._url import Options, parse
from brokerkit.drivers.kafka._api import Request
from brokerkit.drivers.kafka._connect import connect
from brokerkit.drivers.kafka._options import Settings, settings
from brokerkit.drivers.kafka._wire import Wire
from tests.servers.kafka import Endpoints, Listener

from .liar import (
    Liar,
)


def read(url: str, **options: object) -> Settings:
    """Return the settings of a URL."""
    parsed = parse(url)
    return settings(parsed, Options({**parsed.query, **options}, "kafka://"))


def files(kafka: Endpoints, listener: Listener) -> dict[str, object]:
    """Return the options that a listener with TLS wants."""
    if "SSL" in listener:
        return {"ca_file": kafka.authority}
    if listener == "MTLS":
        return {"ca_file": kafka.authority, "cert_file": kafka.client[0], "key_file": kafka.client[1]}
    return {}


async def open_wire(made: Settings) -> Wire:
    """Connect to the first host."""
    return await connect(made, *made.hosts[0])


def metadata() -> Request:
    """Return a request that every broker answers."""
    return Request(
        MetadataRequest(topics=(), allow_auto_topic_creation=False, include_topic_authorized_operations=False)
    )


def to(liar: Liar, login: str = "", **options: object) -> Settings:
    """Return the settings for a broker that lies."""
    scheme = "kafka" if liar.tls is None else "kafka+ssl"
    return read(f"{scheme}://{login}127.0.0.1:{liar.port}", **{"connect_timeout": 0.2, **options})
