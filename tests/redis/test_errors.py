"""What the client library and real servers say when something goes wrong, and what the program is told."""

from __future__ import annotations

import logging
import socket
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import exceptions as native

from brokerkit.drivers._url import Options, parse
from brokerkit.drivers.redis._errors import translate
from brokerkit.drivers.redis._options import Settings, settings
from brokerkit.drivers.redis._wire import Wire, close, connect
from brokerkit.errors import (
    AuthenticationError,
    AuthorizationError,
    BrokerError,
    BrokerUnavailable,
    BufferFull,
    ConfigError,
    DeliveryLost,
    NotFound,
    SettingsMismatch,
)
from tests.servers import ADMIN, RedisServer, certificates, shared

CANARY = "s3cr3t-Canary"

pytestmark = pytest.mark.asyncio


def read(url: str, **options: object) -> Settings:
    """Return the settings of a URL."""
    parsed = parse(url)
    return settings(parsed, Options({**parsed.query, **options}, "redis://"))


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A server that listens in every way."""
    with RedisServer("redis", tls=True, unixsocket=True, users={"poor": "+hello +client|setname"}) as started:
        yield started


async def refusal(wire: Wire, *command: str | int) -> BrokerError:
    """Return what comes of a command that the server refuses."""
    await wire.send_packed_command(wire.pack_command(*command))
    with pytest.raises(native.RedisError) as caught:
        await wire.read_response()
    translated = translate(caught.value, "doing this")
    assert translated.__cause__ is not None
    return translated


# ---------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    "error, kind, text",
    [
        (native.ResponseError("BK NOTFOUND no queue emails"), NotFound, "^no queue emails$"),
        (native.ResponseError("BK MISMATCH emails is a topic"), SettingsMismatch, "^emails is a topic$"),
        (native.ResponseError("BK LOST the session is over"), DeliveryLost, "session"),
        (native.ResponseError("BK LIVE group g has members"), ConfigError, "members"),
        (native.ResponseError("BK BROKEN bk:{a}:l is no stream"), BrokerError, "bk:{a}:l"),
        (native.ResponseError("BK NEW text of a later script"), BrokerError, "later"),
        (native.ResponseError("NOREPLICAS Not enough good replicas to write."), BrokerUnavailable, "min-replicas"),
        (native.ResponseError("MISCONF Redis is configured to save"), BrokerUnavailable, "disk"),
        (native.ResponseError("BUSY Redis is busy running a script."), BrokerUnavailable, "busy"),
        (native.ClusterDownError("Hash slot not served"), BrokerUnavailable, "cluster is down"),
        (native.TryAgainError("Multiple keys"), BrokerUnavailable, "moving"),
        (native.MovedError("3999 127.0.0.1:6381"), ConfigError, "without cluster mode"),
        (native.ClusterCrossSlotError("Keys in request don't hash"), ConfigError, "cluster"),
        (native.BusyLoadingError("Redis is loading the dataset"), BrokerUnavailable, "loading"),
        (native.MasterDownError("Link with MASTER is down"), BrokerUnavailable, "without its primary"),
        (native.ConnectionError("max number of clients reached"), BrokerUnavailable, "max number of clients"),
        (native.ConnectionError("Connection closed by server."), BrokerUnavailable, "closed by server"),
        (native.TimeoutError("Timeout reading"), BrokerUnavailable, "Timeout"),
        (ConnectionResetError(104, "Connection reset by peer"), BrokerUnavailable, "reset"),
        (TimeoutError(), BrokerUnavailable, "TimeoutError"),
        (socket.gaierror(-2, "Name or service not known"), BrokerUnavailable, "Name or service"),
        (native.InvalidResponse("Protocol error"), BrokerError, "Protocol error"),
        (native.ResponseError("ERR something else"), BrokerError, "the server answered: ERR something else"),
        (native.ResponseError("NOPROTO unsupported protocol version"), ConfigError, "7.0 or newer"),
    ],
)
async def test_an_error_says_what_to_do(error: Exception, kind: type[BrokerError], text: str) -> None:
    translated = translate(error, "doing this")
    assert type(translated) is kind
    assert translated.__cause__ is error
    with pytest.raises(BrokerError, match=text):
        raise translated


async def test_an_error_of_ours_stays_as_it_is() -> None:
    error = NotFound("no queue")
    assert translate(error, "doing this") is error


async def test_the_code_may_have_been_taken_off_the_text() -> None:
    """As redis-py does before version 6, which keeps it in no attribute either."""
    error = native.OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
    if hasattr(error, "status_code"):
        error.status_code = None
    assert isinstance(translate(error, "doing this"), BufferFull)


# ---------------------------------------------------------------------- of a real server


@pytest.mark.parametrize("flavor", ["redis", "valkey"])
async def test_what_a_server_refuses(flavor: Any) -> None:
    with RedisServer(flavor, users={"poor": "+hello +client|setname +get +set ~bk:mine"}) as broken:
        wire = await connect(read(broken.url(user=ADMIN)))
        poor = await connect(read(broken.url(user="poor")))
        try:
            await broken.command("LPUSH", "bk:list", "v")
            wrong = await refusal(wire, "HGET", "bk:list", "v")
            assert type(wrong) is BrokerError
            assert "doing this" in str(wrong)
            assert "bk:" in str(wrong)
            script = await refusal(wire, "EVAL", "return redis.error_reply('BK NOTFOUND no queue emails')", 0)
            assert (type(script), str(script)) == (NotFound, "no queue emails")
            inside = await refusal(wire, "EVAL", "return redis.call('HGET', KEYS[1], 'v')", 1, "bk:list")
            assert "script:" not in str(inside)
            assert isinstance(await refusal(poor, "GET", "bk:other"), AuthorizationError)
            command = await refusal(poor, "DEL", "bk:mine")
            assert isinstance(command, AuthorizationError)
            assert "'del'" in str(command)
            assert "README" in str(command)
            await broken.command("CONFIG", "SET", "maxmemory", "1mb")
            for full in (("SET", "k", "v"), ("EVAL", "return redis.call('SET', KEYS[1], 'v')", 1, "k")):
                error = await refusal(wire, *full)
                assert isinstance(error, BufferFull)
                assert "maxmemory" in str(error)
            await broken.command("CONFIG", "SET", "maxmemory", "0")
            await broken.command("CONFIG", "SET", "min-replicas-to-write", "1")
            assert isinstance(await refusal(wire, "SET", "k", "v"), BrokerUnavailable)
            await broken.command("CONFIG", "SET", "min-replicas-to-write", "0")
            await broken.command("REPLICAOF", "127.0.0.1", "1")
            assert isinstance(await refusal(wire, "SET", "k", "v"), BrokerUnavailable)
            await broken.command("CONFIG", "SET", "replica-serve-stale-data", "no")
            assert isinstance(await refusal(wire, "GET", "k"), BrokerUnavailable)
        finally:
            await close(wire)
            await close(poor)


async def test_a_command_that_is_not_known_shows_no_arguments(server: RedisServer) -> None:
    wire = await connect(read(server.url(user=ADMIN)))
    try:
        error = await refusal(wire, "LOGIN", CANARY)
        assert isinstance(error, ConfigError)
        assert "'LOGIN'" in str(error)
        assert CANARY not in "".join(traceback.format_exception(error))
    finally:
        await close(wire)


# ---------------------------------------------------------------------- connecting


@pytest.mark.parametrize("way", ["tcp", "tls", "unix"])
async def test_a_wrong_password_is_told_from_a_server_that_is_away(
    server: RedisServer, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    options: dict[str, object] = {"ca_file": certificates().authority} if way == "tls" else {}
    good = server.url(tls=way == "tls", unix=way == "unix")
    wire = await connect(read(good, **options))
    assert wire.is_connected
    await close(wire)
    bad = server.url(tls=way == "tls", unix=way == "unix", password=CANARY)
    with pytest.raises(AuthenticationError, match="user name or password") as caught:
        await connect(read(bad, **options))
    assert isinstance(caught.value.__cause__, native.AuthenticationError)
    assert CANARY not in "".join(traceback.format_exception(caught.value)) + caplog.text


async def test_a_missing_password_is_an_authentication_error(server: RedisServer) -> None:
    with pytest.raises(AuthenticationError, match="password"):
        await connect(read(f"redis://localhost:{server.port}"))


async def test_a_database_that_is_not_there_is_the_programs_mistake(server: RedisServer) -> None:
    with pytest.raises(ConfigError, match="no such database"):
        await connect(read(server.url(user=ADMIN, database=99)))


async def test_a_server_that_is_away_is_unavailable(server: RedisServer, tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailable, match=r"connecting to redis://127.0.0.1:1/0") as caught:
        await connect(read("redis://127.0.0.1:1"))
    assert caught.value.__cause__ is not None
    with pytest.raises(BrokerUnavailable, match=r"no.sock"):
        await connect(read(f"redis+unix://{tmp_path}/no.sock"))


async def test_a_server_that_does_not_answer_is_unavailable_in_time() -> None:
    with RedisServer("redis") as frozen:
        frozen.freeze()
        with pytest.raises(BrokerUnavailable, match=r"within 0.2 s"):
            await connect(read(frozen.url(), connect_timeout=0.2))


async def test_a_certificate_that_nobody_vouches_for_is_refused(server: RedisServer) -> None:
    for options in ({}, {"ca_file": certificates().stranger}):
        with pytest.raises(BrokerUnavailable, match=r"certificate was refused: .*ca_file") as caught:
            await connect(read(server.url(tls=True), **options))
        assert caught.value.__cause__ is not None


async def test_a_certificate_of_another_host_is_refused(server: RedisServer) -> None:
    url = server.url(tls=True).replace("127.0.0.1", "127.1")
    with pytest.raises(BrokerUnavailable, match=r"certificate was refused: .*127\.1"):
        await connect(read(url, ca_file=certificates().authority))


async def test_tls_to_a_port_without_it_says_so(server: RedisServer) -> None:
    with pytest.raises(BrokerUnavailable, match="speak TLS"):
        await connect(read(server.url(tls=True, port=server.port), connect_timeout=0.3))


async def test_a_client_certificate_is_shown(server: RedisServer) -> None:
    made = certificates()
    await server.command("CONFIG", "SET", "tls-auth-clients", "yes")
    try:
        with pytest.raises(BrokerUnavailable):
            await connect(read(server.url(tls=True), ca_file=made.authority))
        files = {"ca_file": made.authority, "cert_file": made.client, "key_file": made.client_key}
        wire = await connect(read(server.url(tls=True), **files))
        await close(wire)
    finally:
        await server.command("CONFIG", "SET", "tls-auth-clients", "optional")


@pytest.mark.parametrize("flavor", ["redis", "valkey"])
async def test_a_connection_tells_its_name_and_nothing_else(flavor: Any) -> None:
    server = shared(flavor)
    wire = await connect(read(server.url(database=1)))
    try:
        clients = (await server.command("CLIENT", "LIST")).decode()
        (mine,) = (line for line in clients.splitlines() if "name=brokerkit" in line)
        assert " db=1 " in mine
        assert " resp=3" in mine
        assert "lib-name=redis" not in mine
    finally:
        await close(wire)
