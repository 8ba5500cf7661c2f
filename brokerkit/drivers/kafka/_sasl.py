"""Logging in with a password: what is said by turns, without the connection that carries it (RFC 4616, 5802, 7677)."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import secrets
from typing import Final, Protocol, TypeAlias

from ...errors import AuthenticationError, ConfigError
from .._url import Secret

FEWEST: Final = 4096
"""Rounds of hashing that a broker may ask for: with fewer, who listens could guess the password."""
MOST: Final = 1_000_000
"""With more, a broker could keep this process busy for minutes."""
_INLINE: Final = 20_000
"""Up to so many the loop waits for the hash, some milliseconds; Kafka itself stores no more than 16384."""
_HASHES: Final = {"SCRAM-SHA-256": "sha256", "SCRAM-SHA-512": "sha512"}


class Exchange(Protocol):
    """One log-in."""

    def begin(self) -> bytes:
        """Return what is said first."""
        ...

    async def go_on(self, said: bytes) -> bytes | None:
        """Return the answer to what the broker has *said*, None if nothing is left to say.

        Raises:
            AuthenticationError: the broker does not know the password either, or speaks differently.
        """
        ...


Salted: TypeAlias = dict[tuple[str, Secret, bytes, int], bytes]
"""The last password that was hashed, by all that it was hashed with."""


def exchange(mechanism: str, username: str, password: Secret, salted: Salted) -> Exchange:
    """Return a log-in by *mechanism*; *salted* is kept for the next one.

    Raises:
        ConfigError: the user name or the password cannot be sent.
    """
    if "\0" in username or "\0" in password.reveal():
        raise ConfigError("a user name and a password cannot contain a NUL character")
    return Scram(mechanism, username, password, salted) if mechanism in _HASHES else Plain(username, password)


class Plain:
    """The password as it is."""

    def __init__(self, username: str, password: Secret) -> None:
        self._username = username
        self._password = password

    def begin(self) -> bytes:
        """Return user name and password."""
        return f"\0{self._username}\0{self._password.reveal()}".encode()

    async def go_on(self, said: bytes) -> bytes | None:
        """Return None: all is said."""
        return None


class Scram:
    """A proof of knowing the password, for one of the broker."""

    def __init__(
        self, mechanism: str, username: str, password: Secret, salted: Salted, nonce: str | None = None
    ) -> None:
        self._salted = salted
        self._hash = _HASHES[mechanism]
        self._password = password
        self._nonce = secrets.token_urlsafe(24) if nonce is None else nonce
        name = username.replace("=", "=3D").replace(",", "=2C")
        self._first = f"n={name},r={self._nonce}"
        self._signature: bytes | None = None
        """What the broker has to say at last."""
        self._done = False

    def begin(self) -> bytes:
        """Return the user name and a number that is used once."""
        return f"n,,{self._first}".encode()

    async def go_on(self, said: bytes) -> bytes | None:
        """Return the proof, and then None when the broker has given its own."""
        if self._done:
            return None
        fields = _fields(said)
        if self._signature is not None:
            if not hmac.compare_digest(self._signature, _binary(fields.get("v", ""))):
                raise AuthenticationError("the broker did not prove that it knows the password: it is another's")
            self._done = True
            return None
        nonce, salt = fields.get("r", ""), _binary(fields.get("s", ""))
        rounds = int(count) if (count := fields.get("i", "")).isdecimal() and len(count) < 10 else 0
        if not nonce.startswith(self._nonce) or len(nonce) == len(self._nonce) or not salt:
            raise _strange()
        if not FEWEST <= rounds <= MOST:
            raise AuthenticationError(
                f"the broker asks for {rounds} rounds of hashing; brokerkit does {FEWEST} to {MOST}"
            )
        salted = await self._hashed(salt, rounds)
        final = f"c=biws,r={nonce}"
        told = f"{self._first},{said.decode()},{final}".encode()
        key = self._mac(salted, b"Client Key")
        signature = self._mac(hashlib.new(self._hash, key).digest(), told)
        self._signature = self._mac(self._mac(salted, b"Server Key"), told)
        proof = bytes(one ^ other for one, other in zip(key, signature, strict=True))
        return f"{final},p={base64.b64encode(proof).decode()}".encode()

    async def _hashed(self, salt: bytes, rounds: int) -> bytes:
        """Return the password as it is stored at the broker."""
        key = (self._hash, self._password, salt, rounds)
        salted = self._salted.get(key)
        if salted is None:
            secret = self._password.reveal().encode()
            if rounds <= _INLINE:
                salted = hashlib.pbkdf2_hmac(self._hash, secret, salt, rounds)
            else:
                salted = await asyncio.to_thread(hashlib.pbkdf2_hmac, self._hash, secret, salt, rounds)
            self._salted.clear()
            self._salted[key] = salted
        return salted

    def _mac(self, key: bytes, text: bytes) -> bytes:
        return hmac.digest(key, text, self._hash)


def _fields(said: bytes) -> dict[str, str]:
    """Return what the broker has said, by letters."""
    try:
        return {part[:1]: part[2:] for part in said.decode().split(",") if part[1:2] == "="}
    except UnicodeDecodeError:
        raise _strange() from None


def _binary(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _strange() from None


def _strange() -> AuthenticationError:
    return AuthenticationError("the broker does not log in as SCRAM says")
