"""One connection to a server: a connection of redis-py, of which only what is public is used."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import ssl
from collections.abc import Iterable
from typing import Final, Protocol, cast

import redis.asyncio as client
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider

from ...errors import BrokerError, BrokerUnavailable, ConfigError
from .._url import Secret
from ._errors import translate
from ._options import Settings

CLIENT_NAME: Final = "brokerkit"


class Wire(Protocol):
    """What is used of redis-py's connections."""

    @property
    def is_connected(self) -> bool:
        """Whether it is open, as far as is known."""
        ...

    async def connect(self) -> None:
        """Connect, log in and select the database."""
        ...

    async def disconnect(self, nowait: bool = False) -> None:
        """Close it; with *nowait* without waiting for the other side."""
        ...

    def pack_command(self, *args: bytes | str | int | float) -> list[bytes]:
        """Return a command as it is sent."""
        ...

    async def send_packed_command(self, command: bytes | Iterable[bytes], check_health: bool = True) -> None:
        """Write commands, and wait while too much is unsent."""
        ...

    async def read_response(
        self,
        disable_decoding: bool = False,
        timeout: float | None = None,
        *,
        disconnect_on_error: bool = True,
        push_request: bool | None = False,
    ) -> object:
        """Return the next reply, and with *push_request* also what is pushed; raise what is an error."""
        ...


class _Credentials(CredentialProvider):
    """Hands the password to redis-py when it logs in: no attribute of a connection holds it as a text."""

    def __init__(self, username: str, password: Secret | None) -> None:
        self._username = username
        self._password = password

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        password = "" if self._password is None else self._password.reveal()
        return (self._username, password) if self._username else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


def connection(settings: Settings) -> Wire:
    """Return a connection that is not open yet.  Make a new one for each attempt: it may have another password by then.

    Raises:
        ConfigError: the file of a password, a certificate or a key cannot be used.
    """
    common: dict[str, object] = {
        "protocol": 3,
        "db": settings.database,
        "client_name": CLIENT_NAME,
        "socket_timeout": None,
        "socket_connect_timeout": settings.connect_timeout,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
        "decode_responses": False,
        **_without_library_info(),
    }
    password = settings.password()
    if password is not None or settings.username:
        common["credential_provider"] = _Credentials(settings.username, password)
    if settings.socket:
        return cast("Wire", client.UnixDomainSocketConnection(path=settings.socket, **common))
    common |= {"host": settings.host, "port": settings.port, "socket_keepalive": True}
    if not settings.tls:
        return cast("Wire", client.Connection(**common))  # type: ignore[arg-type]
    _check_files(settings)
    return cast(
        "Wire",
        client.SSLConnection(
            ssl_cert_reqs="required",
            ssl_check_hostname=True,
            ssl_ca_certs=settings.ca_file or None,
            ssl_certfile=settings.cert_file or None,
            ssl_keyfile=settings.key_file or None,
            ssl_min_version=ssl.TLSVersion.TLSv1_2,
            **common,  # type: ignore[arg-type]
        ),
    )


async def connect(settings: Settings) -> Wire:
    """Return an open connection, logged in, within ``connect_timeout``.

    Raises:
        BrokerUnavailable: no server answered in time, or its certificate was refused.
        AuthenticationError: it refused the credentials.
        ConfigError: see `connection`; or the server is too old.
    """
    wire = connection(settings)
    what = f"connecting to {settings.shown}"
    failure: BrokerError
    try:
        async with asyncio.timeout(settings.connect_timeout):
            await wire.connect()
    except TimeoutError:
        hint = "; does this port speak TLS?" if settings.tls else ""
        failure = BrokerUnavailable(f"{what}: no answer within {settings.connect_timeout:g} s{hint}")
    except asyncio.CancelledError:
        await close(wire)
        raise
    except Exception as error:
        failure = translate(error, what)
    else:
        return wire
    await close(wire)
    raise failure  # outside of the except clause: what was caught there may show a password, and is no context of this


async def close(wire: Wire) -> None:
    """Close *wire* at once, whatever state it is in."""
    with contextlib.suppress(OSError, client.RedisError):  # it is gone, which is what was wanted
        await wire.disconnect(nowait=True)


def _without_library_info() -> dict[str, object]:
    """Return the arguments that save the round trips in which the client library tells its own name."""
    known = inspect.signature(client.Connection.__base__.__init__).parameters  # type: ignore[misc]
    if "driver_info" in known:
        return {"driver_info": None}
    return {name: None for name in ("lib_name", "lib_version") if name in known}


def _check_files(settings: Settings) -> None:
    """Raise `ConfigError` for a certificate or key that cannot be used: redis-py would call it a failed connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    option, path = "ca_file", settings.ca_file
    try:
        if settings.ca_file:
            context.load_verify_locations(settings.ca_file)
        if settings.cert_file:
            option, path = "cert_file", settings.cert_file
            if settings.key_file:
                option, path = "cert_file or key_file", f"{settings.cert_file}, {settings.key_file}"
            context.load_cert_chain(settings.cert_file, settings.key_file or None, password=_no_passphrase)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        raise ConfigError(f"{option} ({path}) cannot be used: {reason}") from None


def _no_passphrase() -> str:
    """Refuse keys with a passphrase, for which OpenSSL would ask on the terminal."""
    raise ValueError("a key with a passphrase")
