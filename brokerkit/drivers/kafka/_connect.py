"""Making a connection: TLS, which versions are spoken, and logging in; what fails is told apart."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import re
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from kio.schema.errors import ErrorCode as Code
from kio.schema.metadata.v12.request import MetadataRequest

from ...errors import AuthenticationError, BrokerError, BrokerUnavailable, ConfigError
from .._url import Secret
from ._api import OLDEST, Asking, Hello, Request, check, schema
from ._errors import Unanswered, of_code, one_line, translate
from ._options import MECHANISMS, Settings, address
from ._sasl import exchange
from ._wire import Wire, caused

_EARLY: Final = 0.8
"""How much of the time that a log-in is good for is used: what was asked just before needs an answer, too."""
_AGAIN: Final = 1.0
"""Seconds until a password is tried again that was refused; twice as many after each time.  Another one is tried at once."""
_LONGEST: Final = 30.0
_NO_TLS: Final = "; does this port speak TLS? kafka:// is without"
_authenticate = schema("SaslAuthenticate")
_handshake = schema("SaslHandshake")


async def connect(settings: Settings, host: str, port: int) -> Wire:
    """Return an open connection, logged in, within ``connect_timeout``.

    Raises:
        BrokerUnavailable: no broker answered in time, or its certificate was refused.
        AuthenticationError: it refused the credentials, or wants some.
        ConfigError: a file cannot be used, the port speaks something else, the broker is too old, it offers no way to log in.
        InsecureCredentials: a password would travel in plain text.
    """
    settings.admit(host)
    attempt = _Attempt(settings, host, port)
    failure: BrokerError
    try:
        async with asyncio.timeout(settings.connect_timeout):
            return await attempt.run()
    except TimeoutError as error:
        hint = _NO_TLS if settings.tls else ""
        text = f"no answer within {settings.connect_timeout:g} s" if not error.errno else one_line(str(error))
        failure = BrokerUnavailable(f"{attempt.what}: {text}{hint}")
        failure.__cause__ = error
    except asyncio.CancelledError:
        attempt.close()
        raise
    except Exception as error:
        failure = translate(error, attempt.what, certificate=bool(settings.cert_file))
    attempt.close()
    raise failure  # outside of the except clause: what was caught there is its cause, or no business of the program


class _Attempt:
    """One way from a host and a port to a connection that is logged in."""

    def __init__(self, settings: Settings, host: str, port: int) -> None:
        self.settings = settings
        self.host = host
        self.port = port
        self.place = address(host, port)
        self.what = f"connecting to {self.place}"
        self.wire: Wire | None = None

    def close(self) -> None:
        """Leave nothing open."""
        if self.wire is not None:
            self.wire.close()

    async def run(self) -> Wire:
        """Connect, ask what is spoken, and log in."""
        settings = self.settings
        password = settings.password()
        self._spare(password)
        wire = await self._open()
        check(wire.versions, self.place)
        if password is None:
            await self._check_open(wire)
            return wire
        mechanism = settings.sasl or settings.found.mechanism or MECHANISMS[0]
        offered = await self._offered(wire, mechanism)
        if mechanism not in offered:
            # A broker takes no second choice on the same connection.
            wire.close()
            mechanism = self._choice(offered)
            wire = await self._open()
            if mechanism not in await self._offered(wire, mechanism):
                raise ConfigError(f"{self.what}: the broker offers {mechanism} and does not take it")
        settings.found.mechanism = mechanism
        await self._log_in(wire, mechanism, password)
        settings.found.refused, settings.found.wait = None, 0.0
        return wire

    def _spare(self, password: Secret | None) -> None:
        """Refuse a password that was refused a moment ago: many wrong ones in a short time may lock the user out."""
        found = self.settings.found
        known = found.refused is not None and found.refused[0] == password
        if found.refused is not None and known and asyncio.get_running_loop().time() < found.until:
            raise AuthenticationError(found.refused[1])

    # ------------------------------------------------------------------ steps

    async def _open(self) -> Wire:
        settings = self.settings
        context = _context(settings) if settings.tls else None

        def made() -> Wire:
            self.wire = Wire(self.place, certificate=bool(settings.cert_file))
            return self.wire

        try:
            await self._reach(made, context)
        except (ConnectionResetError, ConnectionAbortedError, BrokenPipeError) as error:
            if context is None:
                raise
            raise BrokerUnavailable(f"{self.what}: the broker hung up at once{_NO_TLS}") from error
        wire = self.wire
        assert wire is not None
        try:
            code, wire.versions = await self._ask(wire, Hello(_version()))
        except Unanswered as error:
            if isinstance(error.__cause__, ssl.SSLError):
                raise
            hint = "does this port speak TLS? then use kafka+ssl://"
            if settings.tls:
                hint = "does it want another certificate?" if settings.cert_file else "does it want a cert_file=?"
            text = f"{self.what}: the broker hung up at once; {hint}"
            raise BrokerUnavailable(text) from error.__cause__
        if code:
            raise of_code(code, self.what)
        return wire

    async def _reach(self, made: Callable[[], Wire], context: ssl.SSLContext | None) -> None:
        """Connect to an address of the host: one that is silent does not take the time of the others."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.settings.connect_timeout
        known = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        places = list(dict.fromkeys(info[4][:2] for info in known))
        name = None if context is None else self.host
        failure: OSError | None = None
        for left in range(len(places), 0, -1):
            host, port = places[-left]
            try:
                async with asyncio.timeout((end - loop.time()) / left):
                    await loop.create_connection(made, str(host), int(port), ssl=context, server_hostname=name)
            except ssl.SSLError:
                raise
            except OSError as error:  # a TimeoutError is one
                if failure is None or isinstance(failure, TimeoutError):  # it says least
                    failure = error
            else:
                return
        raise failure or OSError(f"{self.host} has no address")

    async def _check_open(self, wire: Wire) -> None:
        """Refuse a port that wants a password: it answers nothing but questions about logging in."""
        request = Request(
            MetadataRequest(topics=(), allow_auto_topic_creation=False, include_topic_authorized_operations=False)
        )
        try:
            await self._ask(wire, request)
        except Unanswered:
            with contextlib.suppress(BrokerUnavailable, ConfigError):
                again = await self._open()
                offered = await self._offered(again, MECHANISMS[0])
                raise AuthenticationError(
                    f"{self.what}: the broker wants a user name and a password (it offers {', '.join(offered)}); "
                    "put them into the URL, or use password_file"
                ) from None
            raise

    async def _offered(self, wire: Wire, mechanism: str) -> tuple[str, ...]:
        """Propose *mechanism*, and return all that the broker takes."""
        low, high = wire.versions.get(17, (0, -1))
        if not low <= 1 <= high:
            raise ConfigError(f"{self.what}: the broker takes no passwords; leave user name and password out")
        answer = await self._ask(wire, Request(_handshake.SaslHandshakeRequest(mechanism=mechanism)))
        if answer.error_code is Code.illegal_sasl_state:
            raise ConfigError(
                f"{self.what}: this port takes no user name and password; leave them out, or take the port that does"
            )
        if answer.error_code not in {Code.none, Code.unsupported_sasl_mechanism}:
            raise of_code(int(answer.error_code), self.what)
        return tuple(one_line(str(name)) for name in answer.mechanisms)

    def _choice(self, offered: tuple[str, ...]) -> str:
        """Return the strongest of what is offered and allowed."""
        told = ", ".join(offered) or "nothing"
        if self.settings.sasl:
            raise ConfigError(f"{self.what}: the broker does not offer sasl={self.settings.sasl}, but {told}")
        for mechanism in MECHANISMS:
            if mechanism in offered:
                return mechanism
        raise ConfigError(f"{self.what}: to log in the broker offers {told}; brokerkit speaks {', '.join(MECHANISMS)}")

    async def _log_in(self, wire: Wire, mechanism: str, password: Secret) -> None:
        low, high = wire.versions.get(36, (0, -1))
        if not low <= 2 <= high:
            raise ConfigError(f"{self.what}: the broker logs in as before Kafka {OLDEST}")
        username = self.settings.username
        login = exchange(mechanism, username, password, self.settings.found.salted)
        said: bytes | None = login.begin()
        lifetime = 0.0
        while said is not None:
            try:
                answer = await self._ask(wire, Request(_authenticate.SaslAuthenticateRequest(auth_bytes=said)))
            except Unanswered as error:
                text = f"{self.what}: the broker hung up while user {username} logged in by {mechanism}"
                raise BrokerUnavailable(text) from error.__cause__
            if answer.error_code is not Code.none:
                raise self._refused(mechanism, password, answer)
            lifetime = answer.session_lifetime.total_seconds()
            try:
                said = await login.go_on(answer.auth_bytes)
            except AuthenticationError as error:
                raise AuthenticationError(f"{self.what} as user {username} by {mechanism}: {error}") from None
        if lifetime > 0:
            wire.expire(_EARLY * lifetime)

    def _refused(self, mechanism: str, password: Secret, answer: Any) -> BrokerError:
        """Return what a log-in that was refused is."""
        error = of_code(int(answer.error_code), f"{self.what} as user {self.settings.username} by {mechanism}")
        if answer.error_code is not Code.sasl_authentication_failed:
            return error
        hint = "" if self.settings.sasl else "; does the user exist for another way to log in? then name it in sasl="
        text, found = f"{error}{hint}", self.settings.found
        found.wait = min(_LONGEST, max(_AGAIN, 2 * found.wait))
        found.until = asyncio.get_running_loop().time() + found.wait
        found.refused = password, text
        return caused(AuthenticationError(text), error.__cause__)

    async def _ask(self, wire: Wire, request: Asking) -> Any:
        return await wire.send(request, self.settings.connect_timeout)


@functools.cache
def _version() -> str:
    """Return our version as Kafka takes one: it refuses other characters."""
    try:
        found = importlib.metadata.version("brokerkit")
    except importlib.metadata.PackageNotFoundError:  # run from its source
        found = ""
    return re.sub(r"[^A-Za-z0-9.-]", "-", found).strip("-.") or "0"


def _context(settings: Settings) -> ssl.SSLContext:
    """Return how TLS is spoken, with the files as they are now: certificates are renewed under running programs.

    Raises:
        ConfigError: one of them cannot be used, and none could before.
    """
    found = settings.found
    files = tuple(_state(path) for path in (settings.ca_file, settings.cert_file, settings.key_file) if path)
    if found.tls is None or found.files != files:
        try:
            found.tls, found.files = _new_context(settings), files
        except ConfigError:
            if found.tls is None:
                raise
            # They are being replaced right now, or somebody has made a mistake; what was read before may do.
    return found.tls


def _state(path: str) -> object:
    """Return what is another thing when a file was written or replaced."""
    try:
        state = Path(path).stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino


def _new_context(settings: Settings) -> ssl.SSLContext:
    option, path = "ca_file", settings.ca_file
    try:
        context = ssl.create_default_context(cafile=settings.ca_file or None)
        if settings.cert_file:
            option, path = "cert_file", settings.cert_file
            if settings.key_file:
                option, path = "cert_file or key_file", f"{settings.cert_file}, {settings.key_file}"
            context.load_cert_chain(settings.cert_file, settings.key_file or None, password=_no_passphrase)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        raise ConfigError(f"{option} ({path}) cannot be used: {reason}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _no_passphrase() -> str:
    """Refuse keys with a passphrase, for which OpenSSL would ask on the terminal."""
    raise ValueError("a key with a passphrase")
