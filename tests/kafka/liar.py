"""A broker that says what a test wants it to say, byte by byte, or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import io
import ssl
from collections.abc import Callable, Mapping
from typing import Any, Final, Self, TypeAlias

from kio.schema.api_versions.v3.response import ApiVersion, ApiVersionsResponse
from kio.schema.errors import ErrorCode
from kio.schema.sasl_authenticate.v2.response import SaslAuthenticateResponse
from kio.schema.sasl_handshake.v1.response import SaslHandshakeResponse
from kio.serial import entity_writer

from brokerkit.drivers.kafka._api import SPOKEN

VERSIONS, HANDSHAKE, LOGIN, METADATA = 18, 17, 36, 3
SILENT: Final = b""
"""An answer that never comes."""

Answer: TypeAlias = Callable[[int], bytes]
"""Returns what is answered to the request of a number, without its size; None is a hang-up."""


def frame(number: int, entity: Any) -> bytes:
    """Return an answer as it is sent, without its size."""
    buffer = io.BytesIO(number.to_bytes(4, "big"))
    buffer.seek(0, io.SEEK_END)
    if entity.__header_schema__.__flexible__:
        buffer.write(b"\0")
    kind: Any = entity.__class__
    entity_writer(kind)(buffer, entity)
    return buffer.getvalue()


def versions(without: int | None = None, **changed: tuple[int, int]) -> Answer:
    """Answer with what a broker speaks: all that is needed, logging in, and what is *changed* by ``key_<n>=(low, high)``."""
    spoken = {key: (0, version) for key, (_, version) in SPOKEN.items()} | {HANDSHAKE: (0, 1), LOGIN: (0, 2)}
    spoken |= {int(name.removeprefix("key_")): value for name, value in changed.items()}
    spoken.pop(-1 if without is None else without, None)
    entity: Any = ApiVersionsResponse
    version: Any = ApiVersion
    keys = tuple(version(api_key=key, min_version=low, max_version=high) for key, (low, high) in spoken.items())
    return lambda number: frame(number, entity(error_code=ErrorCode.none, api_keys=keys, throttle_time=dt.timedelta()))


def offering(*mechanisms: str, error: ErrorCode = ErrorCode.none) -> Answer:
    """Answer with ways to log in."""
    return lambda number: frame(number, SaslHandshakeResponse(error_code=error, mechanisms=mechanisms))


def saying(data: bytes, error: ErrorCode = ErrorCode.none, lifetime: int = 0) -> Answer:
    """Answer to a part of logging in."""
    entity: Any = SaslAuthenticateResponse
    return lambda number: frame(
        number,
        entity(
            error_code=error,
            error_message=None,
            auth_bytes=data,
            session_lifetime=dt.timedelta(milliseconds=lifetime),
        ),
    )


def raw(data: bytes, *, ahead: int = 0) -> Answer:
    """Answer with bytes that no schema has made, and with a number that is too large by *ahead*."""
    return lambda number: (number + ahead).to_bytes(4, "big") + data


def silence(number: int) -> bytes:
    """Answer nothing."""
    return SILENT


class HangUp(Exception):
    """Ends the connection instead of answering."""


def hang_up(number: int) -> bytes:
    """End the connection."""
    raise HangUp


class Liar:
    """Listens on a port of 127.0.0.1 and answers by *answers*, by API key; one that has no answer is hung up on.

    *greeting* is sent as it is on the first request.  *mute* accepts connections and never says anything.
    """

    def __init__(
        self,
        answers: Mapping[int, Answer] | None = None,
        *,
        greeting: bytes | None = None,
        mute: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.answers: dict[int, Answer] = {VERSIONS: versions(), **(answers or {})}
        self.greeting = greeting
        self.mute = mute
        self.tls = tls
        self.heard: list[tuple[int, bytes]] = []
        """The API key and the body of each request, with what is left of its header."""
        self.open = 0
        self.connections = 0
        self.idle = asyncio.Event()
        """Set while no connection is open."""
        self.idle.set()
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.open += 1
        self.connections += 1
        self.idle.clear()
        try:
            with contextlib.suppress(OSError, EOFError, HangUp):
                await self._talk(reader, writer)
        finally:
            self._tasks.discard(task)
            self.open -= 1
            if not self.open:
                self.idle.set()
            writer.transport.abort()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mute:
            while await reader.read(65536):
                pass
            return
        while True:
            request = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
            if self.greeting is not None:
                writer.write(self.greeting)
                continue
            key, number = int.from_bytes(request[:2], "big"), int.from_bytes(request[4:8], "big")
            self.heard.append((key, request[8:]))
            answer = self.answers.get(key, hang_up)(number)
            if answer:
                writer.write(len(answer).to_bytes(4, "big") + answer)
