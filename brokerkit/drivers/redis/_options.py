"""What a Redis URL and its options say, checked and in one place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import msgspec

from ...errors import ConfigError, InsecureCredentials
from .._url import Options, Secret, Url

PORT: Final = 6379
DATABASES: Final = 1_000_000
"""More than any server is set up with; it refuses what it has not."""
DURABILITY: Final = ("memory", "aof")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach a server, and what is asked of it."""

    shown: str
    """Where it is, for texts: never with a password."""
    host: str = ""
    port: int = PORT
    socket: str = ""
    """The path of a unix socket, instead of host and port."""
    database: int = 0
    username: str = ""
    secret: Secret | None = None
    password_file: str = ""
    tls: bool = False
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    durability: str = "memory"
    session: float = 10.0
    """Seconds that a member of a topic's group survives without a sign of life."""
    connect_timeout: float = 5.0
    timeout: float = 10.0
    """Seconds after which a connection that owes an answer counts as dead."""

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


def settings(url: Url, options: Options) -> Settings:
    """Return what *url* and *options* say together.  No I/O.

    Raises:
        ConfigError: they make no sense.
        InsecureCredentials: a password would travel in plain text.
    """
    unix, tls = url.scheme == "redis+unix", url.scheme == "rediss"
    host, port = ("", PORT) if unix else _host(url)
    password_file = options.text("password_file", "")
    if password_file:
        if url.password is not None:
            raise ConfigError("password and password_file are given; one of them is enough")
        if url.scheme == "redis" and not options.flag("insecure", default=False) and not url.loopback():
            raise InsecureCredentials(
                "a password would travel in plain text over redis://; use rediss://, or insecure=true if the network is safe"
            )
    files = {name: options.text(name, "") for name in ("ca_file", "cert_file", "key_file")}
    for name, path in files.items():
        if path and not tls:
            raise ConfigError(f"option {name} is for TLS: use rediss://, not {url.scheme}://")
    if files["key_file"] and not files["cert_file"]:
        raise ConfigError("option key_file needs cert_file, the certificate of that key")
    database = _database(url, options, unix=unix)
    return Settings(
        shown=_shown(url, host, port, database),
        host=host,
        port=port,
        socket=_socket(url) if unix else "",
        database=database,
        username=url.username or "",
        secret=url.password,
        password_file=password_file,
        tls=tls,
        **files,
        durability=options.choice("durability", "memory", DURABILITY),
        session=options.seconds("session", 10.0, low=0.5, high=86400.0),
        connect_timeout=options.seconds("connect_timeout", 5.0, low=0.1, high=3600.0),
        timeout=options.seconds("timeout", 10.0, low=0.1, high=3600.0),
    )


def _host(url: Url) -> tuple[str, int]:
    if len(url.hosts) > 1:
        raise ConfigError(
            f"{url.scheme}:// takes one host; this release has no Sentinel and no Cluster, later ones will"
        )
    if not url.hosts:
        raise ConfigError(f"the {url.scheme} URL has no host, as in {url.scheme}://localhost:{PORT}/0")
    host, port = url.hosts[0]
    return host, PORT if port is None else port


def _socket(url: Url) -> str:
    if url.hosts or len(url.path) < 2:
        raise ConfigError(
            "redis+unix:// takes the path of a socket, with three slashes, as in redis+unix:///run/redis.sock"
        )
    return url.path


def _database(url: Url, options: Options, *, unix: bool) -> int:
    if unix:
        return options.whole("db", 0, low=0, high=DATABASES)
    if options.given("db"):
        raise ConfigError(f"the database of a {url.scheme} URL is its path, as in {url.scheme}://localhost:{PORT}/1")
    if url.path in {"", "/"}:
        return 0
    if not re.fullmatch(r"/[0-9]{1,6}", url.path):
        raise ConfigError(f"the path of a {url.scheme} URL is the number of a database, as in /0")
    return int(url.path[1:])


def _shown(url: Url, host: str, port: int, database: int) -> str:
    user = f"{url.username}@" if url.username else ""
    if not host:
        return f"{url.scheme}://{user}{url.path}" + (f"?db={database}" if database else "")
    return f"{url.scheme}://{user}{f'[{host}]' if ':' in host else host}:{port}/{database}"


def _reason(error: Exception) -> str:
    """Return why a file cannot be read, without what is in it."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "it is no UTF-8 text"
