"""What a connection of Kombu's says, as a URL and options of brokerkit: hosts, login, TLS, and its transport options."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Final, Literal, Protocol, cast
from urllib.parse import quote

from .. import broker
from ..broker import Broker
from ..drivers._url import Secret, Url, nearest, parse
from ..errors import ConfigError, InsecureCredentials
from ..events import Listener
from ._hide import hide
from ._options import KNOWN, OWN, Setting, own_setting, sift, tls

__all__ = ["Client", "System", "Target", "Whole", "defaults", "ours", "target"]

System = Literal["kafka", "memory", "redis"]

PREFIX: Final = "brokerkit+"
_TLS: Final = {"kafka": "kafka+ssl", "redis": "rediss"}
_SYSTEMS: Final[Mapping[str, System]] = {
    "kafka": "kafka",
    "kafka+ssl": "kafka",
    "redis": "redis",
    "rediss": "redis",
    "redis+unix": "redis",
    "memory": "memory",
}
_UNIX: Final = {"redis+socket": "redis+unix"}
"""Kombu's name, and ours."""
_PORTS: Final[Mapping[System, int | None]] = {"kafka": 9092, "redis": 6379, "memory": None}
_WHERE: Final = "celery"
"""The memory server of ``memory://``: one that lives as long as the process, as Kombu's does."""
_KAFKA: Final = re.compile(r"(brokerkit\+kafka(?:\+ssl)?)://(?:([^/?#]*)@)?([^/?#@]+)/*(\?[^#]*)?")


class Client(Protocol):
    """What is asked of a `kombu.Connection`."""

    hostname: str | None
    port: int | str | None
    userid: str | None
    password: object
    virtual_host: str | None
    ssl: object
    transport_cls: object
    transport_options: Mapping[str, object] | None
    connect_timeout: float | None
    login_method: str | None
    uri_prefix: str | None
    alt: Sequence[object]


@dataclass(frozen=True, slots=True)
class Target:
    """A broker, how to get there, and what the transport is told besides: what is equal shares a bridge."""

    url: str
    """Without user name and password."""
    options: tuple[tuple[str, Setting], ...]
    """Those of brokerkit, with the login."""
    own: tuple[tuple[str, Setting], ...]
    """Those of the transport itself."""
    system: System

    def __repr__(self) -> str:
        return f"<Target {self.url}>"

    def connect(self, on_event: Listener | None = None) -> Broker:
        """Return the broker, which is to be entered.  No I/O.

        Raises:
            ConfigError: the URL or an option makes no sense.
            InsecureCredentials: a password would travel in plaintext.
        """
        try:
            return broker.connect(self.url, options=dict(self.options), on_event=on_event)
        except InsecureCredentials:
            scheme, _, where = self.url.partition("://")
            raise InsecureCredentials(
                f"the password of the broker would travel in plain text to {where}: "
                f"use {_TLS.get(scheme, scheme)}:// in the broker's URL, or broker_use_ssl; "
                "if the network is safe, broker_transport_options = {'insecure': True}"
            ) from None


def target(client: Client) -> Target:
    """Return where *client* goes, and take the password from where Kombu and Celery would show it.

    No I/O, but the driver is imported: once for all that a worker forks later.

    Raises:
        ConfigError: its URL or an option makes no sense.
    """
    hide(client)
    given = _given(client)
    given = _with_tls(given, client)
    if _SYSTEMS[given.scheme] == "kafka":
        given = _with_all_hosts(given, client)
    system = _SYSTEMS[given.scheme]
    with suppress(ImportError):  # which says at connecting what is to be installed
        import_module(f"brokerkit.drivers.{system}")
    options, own = sift(system, client.transport_options or {})
    for name, value in given.query.items():
        if name in options or name in own:
            raise ConfigError(f"option {name} is given twice, in the broker's URL and in broker_transport_options")
        if name not in KNOWN[system] and name not in OWN:
            known = sorted({*KNOWN[system], *OWN})
            raise ConfigError(f"{given.scheme}:// has no option {name!r}{nearest(name, known)}")
        if name in OWN:
            own[name] = own_setting(name, value)
        else:
            options[name] = value
    login: dict[str, Setting | None] = {"username": given.username, "password": given.password}
    for name, text in login.items():
        if text is not None:
            if name in options:
                raise ConfigError(f"{name} is given twice, as an option and with the broker's host")
            options[name] = text
    if system != "memory":
        _wait(options, client.connect_timeout)
    if system == "kafka" and client.login_method and "sasl" not in options:
        options["sasl"] = client.login_method
    return Target(_text(given), tuple(sorted(options.items())), tuple(sorted(own.items())), system)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    scheme: str
    hosts: tuple[tuple[str, int | None], ...]
    path: str
    username: str | None
    password: Secret | None
    query: Mapping[str, str]


def _given(client: Client) -> _Given:
    host = client.hostname or ""
    if "://" in host:
        url = parse(f"{_scheme(client, _inner(client))}://{host.partition('://')[2]}")
        return _given_url(url, (url.username or client.userid or None, _secret(client.password)))
    scheme = _scheme(client, "")
    vhost = "/" + (client.virtual_host or "").lstrip("/")
    hosts: tuple[tuple[str, int | None], ...]
    if scheme == "memory":
        hosts = ((host, None),) if host not in {"", "localhost"} else ()
    else:
        hosts = ((host or "localhost", int(client.port) if client.port else None),)
    return _Given(
        scheme=scheme,
        hosts=hosts,
        path="" if vhost == "/" else vhost,
        username=client.userid or None,
        password=_secret(client.password),
        query={},
    )


def _given_url(url: Url, login: tuple[str | None, Secret | None]) -> _Given:
    scheme, path, query = _UNIX.get(url.scheme, url.scheme), url.path, dict(url.query)
    if url.scheme in _UNIX and "virtual_host" in query:
        query["db"] = query.pop("virtual_host")
    if scheme != "redis+unix":
        path = "/" + path.lstrip("/") if path.strip("/") else ""
    hosts = url.hosts
    if scheme == "memory" and [host for host, _ in hosts] == ["localhost"]:
        hosts = ()
    return _Given(scheme=scheme, hosts=hosts, path=path, username=login[0], password=login[1], query=query)


def _inner(client: Client) -> str:
    """Return the scheme in the host, where Kombu has left the URL whole."""
    inner, between, _ = (client.hostname or "").partition("://")
    return inner.lower() if between else ""


def _scheme(client: Client, inner: str) -> str:
    """Return the scheme as brokerkit has it, where *inner* is what stands before ``://`` in the host."""
    named = client.transport_cls if isinstance(client.transport_cls, str) else ""
    outer = named.removeprefix(PREFIX).removeprefix("brokerkit").removeprefix("confluent")
    if ":" in outer or "." in outer:  # the path of the class
        outer = ""
    scheme = f"{outer}+{inner}" if outer and inner else outer or inner
    if scheme not in _SYSTEMS and scheme not in _UNIX:
        raise ConfigError(
            f"the broker's URL must begin with {PREFIX}kafka://, {PREFIX}redis:// or {PREFIX}memory://, "
            f"not with {named or 'brokerkit'}{'+' if inner else ''}{inner}://"
        )
    return scheme


def _secret(password: object) -> Secret | None:
    if callable(password):
        password = cast(Callable[[], object], password)()
    if password is None or isinstance(password, Secret):
        return password
    if not isinstance(password, str):
        raise ConfigError(f"the password of the broker must be a text, not {type(password).__name__}")
    return Secret(password) if password else None


def _with_tls(given: _Given, client: Client) -> _Given:
    """Return *given* with what ``broker_use_ssl`` and the parameters ``ssl_...`` of its URL say."""
    inline = {name: value for name, value in given.query.items() if name.startswith("ssl_")}
    wanted: object = client.ssl
    if not wanted and not inline:
        return given
    settings: dict[str, object] = dict(inline)
    if isinstance(wanted, Mapping):
        settings.update(cast(Mapping[str, object], wanted))
    elif isinstance(wanted, ssl.SSLContext):
        raise ConfigError("broker_use_ssl cannot be an SSLContext: give a dict of ca_certs, certfile and keyfile")
    scheme = _TLS.get(given.scheme, given.scheme)
    if scheme not in _TLS.values():
        raise ConfigError(f"broker_use_ssl: there is no TLS on {given.scheme}://")
    query = {name: value for name, value in given.query.items() if name not in inline}
    for name, value in tls(settings).items():
        if query.setdefault(name, value) != value:
            raise ConfigError(f"option {name} is given twice, in the broker's URL and in broker_use_ssl")
    return replace(given, scheme=scheme, query=query)


def _with_all_hosts(given: _Given, client: Client) -> _Given:
    """Return *given* with the hosts of all its alternatives: they are one cluster, and any of them says where it is."""
    hosts: dict[tuple[str, int | None], None] = {}
    username = given.username
    for text in client.alt:
        if not isinstance(text, str):
            continue
        other = _alternative(given, text)
        if other is None:
            continue
        if len(client.alt) > 1 and (other.query.keys() or len(other.hosts) > 1):
            raise ConfigError(
                "of several broker URLs each has one host and no options: "
                f"write one {PREFIX}{given.scheme}://h1:9092,h2:9092, or broker_transport_options"
            )
        hosts.update(dict.fromkeys(other.hosts))
        username = username or other.username
    hosts.update(dict.fromkeys(given.hosts))
    return replace(given, hosts=tuple(hosts), username=username)


def _alternative(given: _Given, text: str) -> Url | None:
    text = text.strip().removeprefix(PREFIX).removeprefix("confluent")
    url = parse(text if "://" in text else f"{given.scheme}://{text}")
    return url if _SYSTEMS.get(url.scheme) == "kafka" else None


def _wait(options: dict[str, Setting], seconds: float | None) -> None:
    """Take over Celery's ``broker_connection_timeout``, unless an option says more."""
    if isinstance(seconds, (int, float)) and seconds > 0:
        options.setdefault("connect_timeout", min(max(float(seconds), 0.1), 3600.0))


def _text(given: _Given) -> str:
    hosts = given.hosts or (((_WHERE, None),) if given.scheme == "memory" else ())
    return f"{given.scheme}://{_netloc(hosts)}{quote(given.path)}"


def _netloc(hosts: Iterable[tuple[str, int | None]]) -> str:
    return ",".join(
        (f"[{host}]" if ":" in host else host) + (f":{port}" if port is not None else "") for host, port in hosts
    )


# ------------------------------------------------------------------ as texts


class Whole:
    """Kombu's ``can_parse_url``: it takes URLs apart itself, but asks us to show one that it kept whole.

    What it shows by itself must have one port.
    """

    def __get__(self, transport: Any, owner: object = None) -> bool:
        return transport is not None and transport.client is not None and "://" in (transport.client.hostname or "")


def defaults(client: Client) -> dict[str, object]:
    """Return what Kombu shows where the URL does not say it."""
    try:
        scheme = _scheme(client, _inner(client))
    except ConfigError:
        return {"hostname": "localhost", "port": None}
    return {"hostname": "localhost", "port": _PORTS[_SYSTEMS[_UNIX.get(scheme, scheme)]]}


# ------------------------------------------------------------------ every URL ours


def ours(url: object) -> object:
    """Return *url*, a text or a list of them, for brokerkit's transport if brokerkit has its system."""
    if isinstance(url, str):
        return ";".join(_one_cluster([_own(part.strip()) for part in url.split(";")]))
    parts = texts(url)
    return _one_cluster([_own(part) for part in parts]) if parts else url


def texts(parts: object) -> list[str]:
    """Return *parts* if it is a list of texts."""
    found = cast(Sequence[object], parts) if isinstance(parts, (list, tuple)) else ()
    texts = [part for part in found if isinstance(part, str)]
    return texts if len(texts) == len(found) else []


def _own(text: str) -> str:
    scheme, between, _ = text.partition("://")
    known = scheme.lower() in _SYSTEMS or scheme.lower() in _UNIX
    return f"{PREFIX}{text}" if between and known else text


def _one_cluster(urls: list[str]) -> list[str]:
    """Return the URLs of one Kafka cluster as one: of a second Kombu would understand host and login only."""
    found = [match for url in urls if (match := _KAFKA.fullmatch(url))]
    schemes, logins, options = ({match[group] for match in found if match[group]} for group in (1, 2, 4))
    if len(found) < len(urls) or len(schemes) != 1 or len(logins) > 1 or len(options) > 1:
        return urls
    login = f"{logins.pop()}@" if logins else ""
    return [f"{schemes.pop()}://{login}{','.join(match[3] for match in found)}{options.pop() if options else ''}"]
