"""Connecting to brokers that say nothing, or lie."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import pytest
from kio.schema.errors import ErrorCode

from brokerkit.drivers.kafka._wire import LARGEST
from brokerkit.errors import (
    AuthenticationError,
    BrokerError,
    BrokerUnavailable,
    ConfigError,
)
from tests.servers import certificates

from .connecting import open_wire, read, to
from .liar import (
    HANDSHAKE,
    LOGIN,
    METADATA,
    VERSIONS,
    Answer,
    Liar,
    hang_up,
    offering,
    raw,
    saying,
    silence,
    versions,
)

CANARY = "s3cr3t-Canary"

pytestmark = pytest.mark.asyncio


def server_side() -> ssl.SSLContext:
    """Return how a broker that lies speaks TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates().server, certificates().server_key)
    return context


SILENCES: Mapping[str, tuple[str, Mapping[int, Answer] | None]] = {
    "from the beginning": ("", None),
    "from the beginning, with TLS": ("+ssl", None),
    "asked for versions": ("", {VERSIONS: silence}),
    "asked for versions, with TLS": ("+ssl server", {VERSIONS: silence}),
    "asked for brokers": ("", {METADATA: silence}),
    "asked how to log in": ("me:pw@", {HANDSHAKE: silence}),
    "logging in": ("me:pw@", {HANDSHAKE: offering("SCRAM-SHA-512"), LOGIN: silence}),
}


@pytest.mark.parametrize("case", SILENCES)
async def test_a_broker_that_falls_silent_is_given_up_in_time(case: str) -> None:
    how, answers = SILENCES[case]
    login = how if "@" in how else ""
    async with Liar(answers, mute=answers is None, tls=server_side() if "server" in how else None) as liar:
        url = f"kafka{'+ssl' if 'ssl' in how else ''}://{login}127.0.0.1:{liar.port}"
        options: dict[str, object] = {"ca_file": certificates().authority} if "ssl" in how else {}
        begun = time.monotonic()
        with pytest.raises(BrokerUnavailable, match=r"connecting to .*: no answer within 0\.2 s"):
            await open_wire(read(url, connect_timeout=0.2, **options))
        assert 0.15 < time.monotonic() - begun < 4.5
        await asyncio.wait_for(liar.idle.wait(), 5)


@pytest.mark.parametrize("case", SILENCES)
async def test_an_attempt_that_is_cancelled_leaves_nothing_open(case: str) -> None:
    how, answers = SILENCES[case]
    login = how if "@" in how else ""
    async with Liar(answers, mute=answers is None, tls=server_side() if "server" in how else None) as liar:
        url = f"kafka{'+ssl' if 'ssl' in how else ''}://{login}127.0.0.1:{liar.port}"
        options: dict[str, object] = {"ca_file": certificates().authority} if "ssl" in how else {}
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await open_wire(read(url, connect_timeout=60, **options))
        await asyncio.wait_for(liar.idle.wait(), 5)
        assert liar.connections == 1


@pytest.mark.parametrize(
    "answers, kind, text",
    [
        ({VERSIONS: hang_up}, BrokerUnavailable, "hung up at once; does this port speak TLS"),
        ({VERSIONS: versions(without=1)}, ConfigError, r"version 13 of Fetch \(it speaks none\).*3\.1 or newer"),
        ({VERSIONS: versions(key_0=(0, 8))}, ConfigError, r"version 9 of Produce \(it speaks 0 to 8\)"),
        ({VERSIONS: versions(key_3=(13, 14))}, ConfigError, r"version 12 of Metadata \(it speaks 13 to 14\)"),
        (
            {VERSIONS: raw(b"\0\x23\0\0\0\0")},
            ConfigError,
            "needs Kafka 3.1 or newer",
        ),
        ({VERSIONS: raw(b"\1")}, BrokerError, "cannot be read"),
        ({VERSIONS: raw(b"", ahead=1)}, BrokerError, "was not asked"),
    ],
)
async def test_a_broker_that_cannot_be_used_is_refused(
    answers: Mapping[int, Answer], kind: type[BrokerError], text: str
) -> None:
    async with Liar(answers) as liar:
        with pytest.raises(kind, match=text):
            await open_wire(to(liar))
        await asyncio.wait_for(liar.idle.wait(), 5)


@pytest.mark.parametrize(
    "greeting, kind, text",
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ConfigError, "speaks HTTP"),
        (b"\x15\x03\x03\x00\x02\x02\x50", ConfigError, r"speaks TLS; use kafka\+ssl"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", BrokerError, "not answer as Kafka does"),
        (b"\xff\xff\xff\xff----", BrokerError, "not answer as Kafka does"),
        (b"\0\0\0\3---", BrokerError, "not answer as Kafka does"),
        ((LARGEST + 1).to_bytes(4, "big"), BrokerError, "not answer as Kafka does"),
    ],
)
async def test_what_is_no_broker_is_refused_by_its_first_bytes(
    greeting: bytes, kind: type[BrokerError], text: str
) -> None:
    async with Liar(greeting=greeting) as liar:
        begun = time.monotonic()
        with pytest.raises(kind, match=text):
            await open_wire(to(liar, connect_timeout=5))
        assert time.monotonic() - begun < 4.5
        await asyncio.wait_for(liar.idle.wait(), 5)


@pytest.mark.parametrize(
    "answers, kind, text",
    [
        ({HANDSHAKE: offering("GSSAPI", "OAUTHBEARER")}, ConfigError, "offers GSSAPI, OAUTHBEARER; brokerkit speaks"),
        ({HANDSHAKE: offering()}, ConfigError, "offers nothing"),
        ({HANDSHAKE: offering(error=ErrorCode.illegal_sasl_state)}, ConfigError, "takes no user name"),
        ({VERSIONS: versions(without=HANDSHAKE)}, ConfigError, "takes no passwords"),
        ({VERSIONS: versions(key_36=(0, 1)), HANDSHAKE: offering("PLAIN")}, ConfigError, "as before Kafka 3.1"),
        ({HANDSHAKE: offering("PLAIN"), LOGIN: hang_up}, BrokerUnavailable, "hung up while user me logged in by PLAIN"),
        ({HANDSHAKE: offering("SCRAM-SHA-256"), LOGIN: saying(b"")}, AuthenticationError, "as SCRAM says"),
        (
            {HANDSHAKE: offering("SCRAM-SHA-512"), LOGIN: saying(b"r=x,s=QQ==,i=1")},
            AuthenticationError,
            "user me by SCRAM-SHA-512",
        ),
    ],
)
async def test_a_log_in_that_goes_wrong(answers: Mapping[int, Answer], kind: type[BrokerError], text: str) -> None:
    async with Liar(answers) as liar:
        with pytest.raises(kind, match=text) as caught:
            await open_wire(to(liar, f"me:{CANARY}@", connect_timeout=5))
        assert CANARY not in "".join(traceback.format_exception(caught.value))
        await asyncio.wait_for(liar.idle.wait(), 5)


async def test_a_second_choice_costs_one_connection_once() -> None:
    async with Liar({HANDSHAKE: offering("GSSAPI", "PLAIN"), LOGIN: saying(b"")}) as liar:
        made = to(liar, f"me:{CANARY}@")
        for expected in (2, 3):
            (await open_wire(made)).close()
            assert liar.connections == expected
        assert liar.heard[-1] == (
            LOGIN,
            b"\0\x09brokerkit\0" + bytes([len(CANARY) + 5]) + f"\0me\0{CANARY}".encode() + b"\0",
        )


async def test_a_hang_up_that_is_not_about_a_password_stays_one() -> None:
    for answer in (hang_up, offering(error=ErrorCode.illegal_sasl_state)):
        async with Liar({METADATA: hang_up, HANDSHAKE: answer}) as liar:
            with pytest.raises(BrokerUnavailable, match="is lost"):
                await open_wire(to(liar))
            await asyncio.wait_for(liar.idle.wait(), 5)


async def test_a_password_that_was_refused_is_not_tried_again_at_once(tmp_path: Path) -> None:
    """Everything that a program does asks for a connection; a server may lock out who tries too often."""
    path = tmp_path / "password"
    path.write_text("first")
    refusing = saying(b"", ErrorCode.sasl_authentication_failed)
    async with Liar({HANDSHAKE: offering("PLAIN"), LOGIN: refusing}) as liar:
        made = to(liar, "me@", connect_timeout=5, password_file=str(path), sasl="PLAIN")
        texts: set[str] = set()
        for _ in range(20):
            with pytest.raises(AuthenticationError, match="user me by PLAIN") as caught:
                await open_wire(made)
            texts.add(str(caught.value))
        assert len(texts) == 1
        assert liar.connections == 1
        path.write_text("second")
        for _ in range(2):
            with pytest.raises(AuthenticationError):
                await open_wire(made)
        assert liar.connections == 2
        waits: list[float] = []
        for _ in range(6):
            waits.append(made.found.wait)
            made.found.until = 0.0
            with pytest.raises(AuthenticationError):
                await open_wire(made)
        assert waits == [2, 4, 8, 16, 30, 30]
        assert liar.connections == 8
        path.write_text("third")
        liar.answers[LOGIN] = saying(b"")
        for _ in range(2):
            (await open_wire(made)).close()
        assert made.found.refused is None
        assert made.found.wait == 0


async def test_an_address_that_is_silent_does_not_keep_from_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as sockets:
        silent = sockets.enter_context(socket.socket())
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for _ in range(4):  # behind these, nobody is let in or refused
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(silent.getsockname())
        nothing = raw(b"\0" + bytes(4) + b"\1\0" + bytes(4) + b"\1\0")  # no brokers and no topics
        async with Liar({METADATA: nothing}) as liar:
            places = [silent.getsockname(), ("127.0.0.1", liar.port)]

            async def look_up(*_: object, **__: object) -> list[tuple[object, ...]]:
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]

            loop = asyncio.get_running_loop()
            real = loop.getaddrinfo
            monkeypatch.setattr(
                loop,
                "getaddrinfo",
                lambda host, *a, **k: (look_up if host == "kafka.internal" else real)(host, *a, **k),
            )
            wire = await open_wire(read("kafka://kafka.internal:1", connect_timeout=2))
            wire.close()
