"""Which driver serves which URL.  A driver and its client library are imported when a URL asks for them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ..address import check_prefix
from ..driver import Driver
from ..errors import ConfigError, InsecureCredentials
from ..events import Listener
from ._url import DriverFactory, Options, Secret, Url, nearest, parse


@dataclass(frozen=True, slots=True)
class _Scheme:
    module: str
    factory: str
    remote: bool = True
    """Reached over a network, where somebody may listen."""
    tls: str = ""
    """The scheme that does the same over TLS; empty if this one is as safe."""


_SCHEMES: Final = {
    "memory": _Scheme("memory", "MemoryDriver", remote=False),
    "redis": _Scheme("redis", "RedisDriver", tls="rediss"),
    "rediss": _Scheme("redis", "RedisDriver"),
    "redis+unix": _Scheme("redis", "RedisDriver"),
    "kafka": _Scheme("kafka", "KafkaDriver", tls="kafka+ssl"),
    "kafka+ssl": _Scheme("kafka", "KafkaDriver"),
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A driver that is not open yet, and what the layers above need of its URL."""

    driver: Driver
    prefix: str
    """Goes before every address and group of ours."""
    shown: str
    """The URL with its secrets masked."""


def load(url: str, options: Mapping[str, object], emit: Listener) -> Loaded:
    """Return the driver for *url* with the options of its query and of *options* together.  No I/O.

    Raises:
        ConfigError: the URL or an option makes no sense, or the scheme's client library is not installed.
        InsecureCredentials: a password on a plaintext connection to another machine.
        InvalidName: the prefix breaks the naming rules.
    """
    parsed = parse(url)
    scheme = _SCHEMES.get(parsed.scheme)
    if scheme is None:
        raise ConfigError(f"unknown scheme {parsed.scheme!r}{nearest(parsed.scheme, _SCHEMES)}")
    values = _merged(parsed, options)
    prefix = check_prefix(values.text("prefix", ""))
    insecure = values.flag("insecure", default=False)
    if scheme.remote:
        _credentials(parsed, values)
        if parsed.password is not None and scheme.tls and not insecure and not parsed.loopback():
            raise InsecureCredentials(
                f"a password would travel in plain text over {parsed.scheme}://; "
                f"use {scheme.tls}://, or insecure=true if the network is safe"
            )
    driver = _factory(parsed.scheme, scheme)(parsed, values, emit)
    values.finish()
    return Loaded(driver, prefix, str(parsed))


def _merged(url: Url, options: Mapping[str, object]) -> Options:
    for name in options:
        if not isinstance(name, str):
            raise ConfigError(f"the names of options are texts, not {type(name).__name__}")
        if name in url.query:
            raise ConfigError(f"option {name} is given twice, in the URL and in options=")
    return Options({**url.query, **options}, f"{url.scheme}://")


def _credentials(url: Url, values: Options) -> None:
    """Take user name and password from the options where the URL has none."""
    username: str | None = values.text("username")
    password: Secret | None = values.secret("password")
    for name, given, present in (("username", username, url.username), ("password", password, url.password)):
        if given is not None and present is not None:
            raise ConfigError(f"{name} is given twice, before the host and as an option")
    url.username = url.username if username is None else username
    url.password = url.password if password is None else password


def _factory(name: str, scheme: _Scheme) -> DriverFactory:
    module = f"{__name__}.{scheme.module}"
    try:
        factory: DriverFactory = getattr(importlib.import_module(module), scheme.factory)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("brokerkit"):
            raise
        raise ConfigError(f"{name}:// needs {error.name}: pip install 'brokerkit[{scheme.module}]'") from error
    return factory
