"""What a Kafka URL and its options say, checked and in one place."""

from __future__ import annotations

import importlib.util
import re
import ssl
from pathlib import Path
from typing import Final

import msgspec

from ...errors import ConfigError, InsecureCredentials
from .._url import Options, Secret, Url

PORT: Final = 9092
MECHANISMS: Final = ("SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN")
"""Ways to log in with a password, the strongest first."""
COMPRESSIONS: Final = ("none", "gzip", "snappy", "lz4", "zstd")
_WITH_CRAMJAM: Final = ("snappy", "lz4", "zstd")
_INSTANCE: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


class Found:
    """What connecting has found out about a cluster, so that the next connection need not."""

    __slots__ = ("files", "mechanism", "refused", "salted", "tls", "until", "wait")

    def __init__(self) -> None:
        self.mechanism = ""
        """The strongest way to log in that was offered last."""
        self.salted: dict[tuple[str, Secret, bytes, int], bytes] = {}
        """The password as SCRAM hashes it with a broker's salt: the same for all connections, and slow to make."""
        self.refused: tuple[Secret, str] | None = None
        """The password that was refused last, and with what text."""
        self.wait = 0.0
        """Seconds for which that password is not tried again."""
        self.until = 0.0
        """Until when, by the loop's clock."""
        self.tls: ssl.SSLContext | None = None
        """How TLS is spoken, with the certificates of *files*: reading those of the system takes a while."""
        self.files: tuple[object, ...] = ()
        """What tells whether the files of `tls` have changed."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach a cluster, and what is asked of it."""

    shown: str
    """Where it is, for texts: never with a password."""
    hosts: tuple[tuple[str, int], ...]
    """Where to ask for the others first."""
    username: str = ""
    secret: Secret | None = None
    password_file: str = ""
    sasl: str = ""
    """The way to log in; empty for the strongest that is offered."""
    insecure: bool = False
    """Whether a password may go over plaintext to another machine."""
    tls: bool = False
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    session: float = 10.0
    """Seconds that a member of a group survives without a sign of life."""
    connect_timeout: float = 5.0
    timeout: float = 10.0
    """Seconds after which a broker that owes an answer counts as dead."""
    replication: int = -1
    """How often the topics that are created are stored; -1 for what the cluster does by default."""
    queue_partitions: int = 0
    """Partitions of a queue that is created; 0 for what is good for the kind of group that serves it."""
    compression: str = "none"
    instance: str = ""
    """Names this process among the members of its groups: it keeps its partitions over a restart within *session*."""
    found: Found = msgspec.field(default_factory=Found)

    def password(self) -> Secret | None:
        """Return the password, read anew if it is in a file.

        Raises:
            ConfigError: the file cannot be read, or is empty.
        """
        if not self.password_file:
            return self.secret
        try:
            text = Path(self.password_file).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, ValueError) as error:
            raise ConfigError(f"password_file {self.password_file} cannot be read: {_reason(error)}") from None
        if not text:
            raise ConfigError(f"password_file {self.password_file} is empty")
        return Secret(text)

    def admit(self, host: str) -> None:
        """Refuse to log in at a broker where everybody on the way could listen.

        A cluster names its brokers itself: they may be elsewhere than the host in the URL.

        Raises:
            InsecureCredentials: a password would travel in plain text to *host*.
        """
        if self.username and not self.tls and not self.insecure and not Url("kafka", ((host, None),)).loopback():
            raise InsecureCredentials(
                f"a password would travel in plain text to {host}; use kafka+ssl://, or insecure=true if the network is safe"
            )


def settings(url: Url, options: Options) -> Settings:
    """Return what *url* and *options* say together.  No I/O.

    Raises:
        ConfigError: they make no sense.
        InsecureCredentials: a password would travel in plain text.
    """
    tls = url.scheme == "kafka+ssl"
    if url.path not in {"", "/"}:
        raise ConfigError(f"a {url.scheme} URL ends with its hosts: it has no path, as topics have their own names")
    files = {name: options.text(name, "") for name in ("ca_file", "cert_file", "key_file")}
    for name, path in files.items():
        if path and not tls:
            raise ConfigError(f"option {name} is for TLS: use kafka+ssl://, not {url.scheme}://")
    if files["key_file"] and not files["cert_file"]:
        raise ConfigError("option key_file needs cert_file, the certificate of that key")
    password_file = options.text("password_file", "")
    sasl = options.choice("sasl", "", ("", *MECHANISMS))
    _check_login(url, password_file, sasl)
    hosts = _hosts(url)
    made = Settings(
        shown=_shown(url, hosts),
        hosts=hosts,
        username=url.username or "",
        secret=url.password,
        password_file=password_file,
        sasl=sasl,
        insecure=options.flag("insecure", default=False),
        tls=tls,
        ca_file=files["ca_file"],
        cert_file=files["cert_file"],
        key_file=files["key_file"],
        session=options.seconds("session", 10.0, low=1.0, high=86400.0),
        connect_timeout=options.seconds("connect_timeout", 5.0, low=0.1, high=3600.0),
        timeout=options.seconds("timeout", 10.0, low=0.1, high=3600.0),
        replication=options.whole("replication", -1, low=-1, high=1000),
        queue_partitions=options.whole("queue_partitions", 0, low=0, high=1000),
        compression=_compression(options),
        instance=_instance(options),
    )
    if not made.replication:
        raise ConfigError("option replication must be at least 1, or -1 for what the cluster does by default")
    for host, _ in hosts:
        made.admit(host)
    return made


def _hosts(url: Url) -> tuple[tuple[str, int], ...]:
    if not url.hosts:
        raise ConfigError(f"the {url.scheme} URL has no host, as in {url.scheme}://localhost:{PORT}")
    return tuple(dict.fromkeys((host, PORT if port is None else port) for host, port in url.hosts))


def _check_login(url: Url, password_file: str, sasl: str) -> None:
    if password_file and url.password is not None:
        raise ConfigError("password and password_file are given; one of them is enough")
    password = bool(password_file) or url.password is not None
    if password and not url.username:
        raise ConfigError("a password is given without the user name that Kafka wants with it")
    if url.username and not password:
        raise ConfigError("a user name is given without its password; give password or password_file")
    if sasl and not password:
        raise ConfigError("option sasl is a way to log in: give user name and password, too")


def _compression(options: Options) -> str:
    value = options.choice("compression", "none", COMPRESSIONS)
    if value in _WITH_CRAMJAM and importlib.util.find_spec("cramjam") is None:
        raise ConfigError(f"compression={value} needs cramjam: pip install 'brokerkit[kafka]', or use gzip")
    return value


def _instance(options: Options) -> str:
    value = options.text("instance", "")
    if value and not _INSTANCE.fullmatch(value):
        raise ConfigError("option instance takes letters, digits and ._- (at most 100, not beginning with a dot)")
    return value


def _shown(url: Url, hosts: tuple[tuple[str, int], ...]) -> str:
    user = f"{url.username}@" if url.username else ""
    return f"{url.scheme}://{user}{','.join(address(host, port) for host, port in hosts)}"


def address(host: str, port: int) -> str:
    """Return *host* and *port* as texts show them."""
    return f"{f'[{host}]' if ':' in host else host}:{port}"


def _reason(error: Exception) -> str:
    """Return why a file cannot be read, without what is in it."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "it is no UTF-8 text"
