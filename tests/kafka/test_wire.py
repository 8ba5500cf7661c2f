"""One connection to a broker: real ones of every kind, and some that lie."""

from __future__ import annotations

import asyncio
import gc
import logging
import ssl
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop
from kio.schema.errors import ErrorCode
from kio.schema.find_coordinator.v3.request import FindCoordinatorRequest
from kio.schema.metadata.v12.request import MetadataRequest

from brokerkit import Topic
from brokerkit import connect as connect_to
from brokerkit.drivers._url import Options, parse
from brokerkit.drivers.kafka._api import SPOKEN, Hello, Request
from brokerkit.drivers.kafka._errors import Unanswered, code_of
from brokerkit.drivers.kafka._options import Settings, settings
from brokerkit.drivers.kafka._wire import LARGEST, Wire, connect
from brokerkit.errors import (
    AuthenticationError,
    BrokerError,
    BrokerUnavailable,
    ConfigError,
    InsecureCredentials,
)
from tests.servers import certificates
from tests.servers.kafka import Endpoints, KafkaCluster, Listener, shared_kafka

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


@pytest.fixture(scope="module")
def kafka() -> Endpoints:
    """A broker that listens in every way."""
    return shared_kafka()


@pytest.fixture(scope="module")
def limited() -> Iterator[Endpoints]:
    """A broker without SCRAM-SHA-512, where a log-in is good for a second."""
    with KafkaCluster(
        listeners=("PLAIN", "SASL"),
        mechanisms=("PLAIN", "SCRAM-SHA-256"),
        config={"connections.max.reauth.ms": "1000"},
    ) as cluster:
        yield cluster.endpoints


def read(url: str, **options: object) -> Settings:
    """Return the settings of a URL."""
    parsed = parse(url)
    return settings(parsed, Options({**parsed.query, **options}, "kafka://"))


def files(kafka: Endpoints, listener: Listener) -> dict[str, object]:
    """Return the options that a listener with TLS wants."""
    if "SSL" in listener:
        return {"ca_file": kafka.authority}
    if listener == "MTLS":
        return {"ca_file": kafka.authority, "cert_file": kafka.client[0], "key_file": kafka.client[1]}
    return {}


async def open_wire(made: Settings) -> Wire:
    """Connect to the first host."""
    return await connect(made, *made.hosts[0])


def metadata() -> Request:
    """Return a request that every broker answers."""
    return Request(
        MetadataRequest(topics=(), allow_auto_topic_creation=False, include_topic_authorized_operations=False)
    )


def to(liar: Liar, login: str = "", **options: object) -> Settings:
    """Return the settings for a broker that lies."""
    scheme = "kafka" if liar.tls is None else "kafka+ssl"
    return read(f"{scheme}://{login}127.0.0.1:{liar.port}", **{"connect_timeout": 0.2, **options})


# ---------------------------------------------------------------------- real brokers


@pytest.mark.parametrize("listener", ["PLAIN", "SASL", "SSL", "MTLS", "SASLSSL"])
async def test_every_kind_of_connection_is_made_and_answers(kafka: Endpoints, listener: Listener) -> None:
    wire = await open_wire(read(kafka.url(listener), **files(kafka, listener)))
    try:
        answer = await wire.send(metadata(), 5)
        assert [broker.port for broker in answer.brokers] == [kafka.addresses(listener)[0][1]]
        assert set(SPOKEN) <= set(wire.versions)
    finally:
        wire.close()


async def test_uvloop_does_as_well(kafka: Endpoints) -> None:
    async def main() -> None:
        for listener in ("PLAIN", "SASL", "SSL", "MTLS", "SASLSSL"):
            await test_every_kind_of_connection_is_made_and_answers(kafka, listener)
        for url, options, kind in (
            (kafka.url("SASL", password="wrong"), {}, AuthenticationError),
            (kafka.url("SSL"), {}, BrokerUnavailable),
            (kafka.url("MTLS"), {"ca_file": kafka.authority}, AuthenticationError),
            (kafka.url("SSL").replace("+ssl", ""), {}, ConfigError),
        ):
            with pytest.raises(kind):
                await open_wire(read(url, **options))

    await asyncio.to_thread(uvloop.run, main())


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("listener", ["SASL", "SASLSSL"])
async def test_one_may_choose_how_to_log_in(kafka: Endpoints, listener: Listener, mechanism: str) -> None:
    made = read(kafka.url(listener), sasl=mechanism, **files(kafka, listener))
    wire = await open_wire(made)
    wire.close()
    assert made.found.mechanism == mechanism


async def test_the_strongest_that_is_offered_is_taken_and_remembered(kafka: Endpoints, limited: Endpoints) -> None:
    for endpoints, strongest in ((kafka, "SCRAM-SHA-512"), (limited, "SCRAM-SHA-256")):
        made = read(endpoints.url("SASL"))
        for _ in range(2):
            wire = await open_wire(made)
            wire.close()
            assert made.found.mechanism == strongest


async def test_a_way_to_log_in_that_is_not_offered_is_named_with_those_that_are(limited: Endpoints) -> None:
    with pytest.raises(
        ConfigError, match=r"not offer sasl=SCRAM-SHA-512, but (PLAIN, SCRAM-SHA-256|SCRAM-SHA-256, PLAIN)"
    ):
        await open_wire(read(limited.url("SASL"), sasl="SCRAM-SHA-512"))


async def test_a_log_in_that_runs_out_is_left_before(limited: Endpoints) -> None:
    over = asyncio.Event()
    wire = await open_wire(read(limited.url("SASL")))
    wire.on_close = over.set
    begun = time.monotonic()
    while not wire.closed:
        assert (await wire.send(metadata(), 5)).brokers
        await asyncio.sleep(0.05)
    assert 0.5 < time.monotonic() - begun < 1
    await asyncio.wait_for(over.wait(), 1)


async def test_a_program_does_not_notice_that_log_ins_run_out(
    limited: Endpoints, caplog: pytest.LogCaptureFixture
) -> None:
    topic = Topic("wire-reauth", str, partitions=2)
    sent: list[str] = []
    got: list[str] = []
    async with connect_to(limited.url("SASL")) as broker:
        await broker.declare(topic)
        async with broker.subscribe(topic, group="billing") as messages:
            end = time.monotonic() + 3
            while time.monotonic() < end or len(got) < len(sent):
                if time.monotonic() < end:
                    sent.append(f"{len(sent)}")
                    await broker.publish(topic, sent[-1], key="key", timeout=5)
                for message in await messages.receive(limit=10, timeout=0.05):
                    got.append(message.value)
                    await message.ack(confirm=True)
                assert time.monotonic() < end + 10
    assert got == sent
    assert not [line for line in caplog.records if line.levelno >= logging.WARNING]


@pytest.mark.parametrize("mechanism", ["", "PLAIN", "SCRAM-SHA-256"])
@pytest.mark.parametrize("user, password", [("brokerkit", CANARY), ("nobody", CANARY)])
async def test_a_wrong_password_is_said_at_once(
    kafka: Endpoints, mechanism: str, user: str, password: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    options: dict[str, object] = {"sasl": mechanism} if mechanism else {}
    begun = time.monotonic()
    with pytest.raises(AuthenticationError, match=rf"127\.0\.0\.1:\d+ as user {user} by .*refused") as caught:
        await open_wire(
            read(kafka.url("SASL", user="brokerkit", password=password).replace("brokerkit:", f"{user}:"), **options)
        )
    assert time.monotonic() - begun < 2
    assert not caught.value.retryable
    assert code_of(caught.value) == ErrorCode.sasl_authentication_failed
    assert ("name it in sasl=" in str(caught.value)) is (not mechanism)
    assert CANARY not in "".join(traceback.format_exception(caught.value)) + caplog.text


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
@pytest.mark.parametrize("listener", ["SASL", "SASLSSL"])
async def test_a_password_is_in_no_log_and_in_no_repr(
    kafka: Endpoints, listener: Listener, mechanism: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    asyncio.get_running_loop().set_debug(True)
    secret = kafka.passwords["brokerkit"]
    made = read(kafka.url(listener), sasl=mechanism, **files(kafka, listener))
    wire = await open_wire(made)
    held = [repr(wire), repr(vars(wire)), repr(made), str(made)]
    wire.close()
    for text in (*held, caplog.text):
        assert secret not in text


async def test_a_password_is_read_from_its_file_each_time(kafka: Endpoints, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("wrong\n")
    host, port = kafka.addresses("SASL")[0]
    made = read(f"kafka://brokerkit@{host}:{port}", password_file=str(path))
    with pytest.raises(AuthenticationError):
        await open_wire(made)
    path.write_text(kafka.passwords["brokerkit"] + "\n")
    wire = await open_wire(made)
    wire.close()
    path.unlink()
    with pytest.raises(ConfigError, match="password_file"):
        await open_wire(made)


REFUSED: Mapping[str, tuple[Listener, str, Mapping[str, str], type[BrokerError], str]] = {
    "no authority": ("SSL", "", {}, BrokerUnavailable, r"certificate was refused: .*issuer.*ca_file="),
    "another authority": (
        "SSL",
        "",
        {"ca_file": "stranger"},
        BrokerUnavailable,
        r"certificate was refused: .*ca_file=",
    ),
    "another host": ("SSL", "127.1", {"ca_file": "authority"}, BrokerUnavailable, r"mismatch.*'127\.1'.*advertised"),
    "no certificate": ("MTLS", "", {"ca_file": "authority"}, AuthenticationError, "give cert_file= and key_file="),
    "TLS to a port without": ("PLAIN", "+ssl", {"ca_file": "authority"}, BrokerUnavailable, "does this port speak TLS"),
    "TLS to SASL without": ("SASL", "+ssl", {"ca_file": "authority"}, BrokerUnavailable, "does this port speak TLS"),
    "plaintext to TLS": ("SSL", "-ssl", {}, ConfigError, r"speaks TLS; use kafka\+ssl://"),
    "plaintext to TLS with a password": ("SASLSSL", "-ssl", {}, ConfigError, r"speaks TLS; use kafka\+ssl://"),
    "no password": (
        "SASL",
        "anonymous",
        {},
        AuthenticationError,
        r"wants a user name and a password \(.*SCRAM-SHA-512",
    ),
    "no password over TLS": (
        "SASLSSL",
        "anonymous",
        {"ca_file": "authority"},
        AuthenticationError,
        "wants a user name",
    ),
    "a password not wanted": ("PLAIN", "me:pw@", {}, ConfigError, "takes no user name and password"),
    "the same over TLS": ("SSL", "me:pw@", {"ca_file": "authority"}, ConfigError, "takes no user name and password"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_is_wrong_is_told_apart(kafka: Endpoints, case: str) -> None:
    listener, change, options, kind, text = REFUSED[case]
    scheme, _, rest = kafka.url(listener).partition("://")
    if change == "anonymous":
        rest = rest.rpartition("@")[2]
    elif change == "127.1":
        rest = rest.replace("127.0.0.1", change)
    elif change.endswith("@"):
        rest = change + rest
    scheme = {"+ssl": "kafka+ssl", "-ssl": "kafka"}.get(change, scheme)
    made = read(f"{scheme}://{rest}", **{name: getattr(kafka, value) for name, value in options.items()})
    begun = time.monotonic()
    with pytest.raises(BrokerError, match=text) as caught:
        await open_wire(made)
    assert type(caught.value) is kind
    assert str(made.hosts[0][1]) in str(caught.value)
    assert time.monotonic() - begun < 2


async def test_a_certificate_that_the_broker_does_not_trust_is_ours(kafka: Endpoints, tmp_path: Path) -> None:
    made = trustme.CA().issue_cert("client.example")
    ours, key = tmp_path / "client.pem", tmp_path / "key.pem"
    made.cert_chain_pems[0].write_to_path(str(ours))
    made.private_key_pem.write_to_path(str(key))
    options = {"ca_file": kafka.authority, "cert_file": str(ours), "key_file": str(key)}
    # The alert may be lost when the broker closes the connection right behind it.
    with pytest.raises(
        (AuthenticationError, BrokerUnavailable), match=r"refused our certificate|want another certificate"
    ):
        await open_wire(read(kafka.url("MTLS"), **options))


async def test_nobody_is_there() -> None:
    with pytest.raises(BrokerUnavailable, match=r"connecting to 127\.0\.0\.1:1: ") as caught:
        await open_wire(read("kafka://127.0.0.1:1"))
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert caught.value.retryable
    with pytest.raises(BrokerUnavailable, match=r"no\.such\.host\.invalid:9092"):
        await open_wire(read("kafka://no.such.host.invalid"))


async def test_a_broker_elsewhere_gets_no_password() -> None:
    """A cluster names its brokers; before anything is sent to one, its host is looked at."""
    with pytest.raises(InsecureCredentials, match=r"broker\.invalid"):
        await connect(read("kafka://me:pw@127.0.0.1"), "broker.invalid", 9092)


async def test_files_of_certificates_are_looked_at_before_connecting(tmp_path: Path) -> None:
    missing, bad = tmp_path / "missing.pem", tmp_path / "bad.pem"
    bad.write_text("-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----\n")
    for options, text in (
        ({"ca_file": str(missing)}, r"ca_file \(.*missing.pem\) cannot be used: No such file"),
        ({"ca_file": str(bad)}, r"ca_file \(.*bad.pem\) cannot be used"),
        ({"cert_file": str(missing)}, "cert_file"),
        ({"cert_file": str(bad), "key_file": str(missing)}, "cert_file or key_file"),
    ):
        with pytest.raises(ConfigError, match=text):
            await open_wire(read("kafka+ssl://127.0.0.1:1", **options))


# ---------------------------------------------------------------------- brokers that say nothing, or lie


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
        assert 0.15 < time.monotonic() - begun < 2
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
        assert time.monotonic() - begun < 1
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


# ---------------------------------------------------------------------- sending


class Transport(asyncio.Transport):
    """Takes what is written, and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.aborted = 0

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def abort(self) -> None:
        self.aborted += 1

    def is_closing(self) -> bool:
        return self.aborted > 0


def wired() -> tuple[Wire, Transport]:
    """Return a connection whose other end is the test."""
    wire, transport = Wire("h:9092"), Transport()
    wire.connection_made(transport)
    return wire, transport


def number(transport: Transport) -> int:
    """Return the number of the last request that was written, and forget what was."""
    data, transport.written = transport.written, b""
    last = 0
    while data:
        size = int.from_bytes(data[:4], "big")
        last, data = int.from_bytes(data[8:12], "big"), data[4 + size :]
    return last


def answered(asked: int) -> bytes:
    """Return an answer that is a list of versions, as good as any."""
    data = versions()(asked)
    return len(data).to_bytes(4, "big") + data


def question() -> Hello:
    """Return a request whose answer `answered` makes."""
    return Hello("1")


async def test_a_request_is_written_before_anything_is_awaited() -> None:
    wire, transport = wired()
    wire.send(question(), 5)
    size = int.from_bytes(transport.written[:4], "big")
    assert len(transport.written) == 4 + size
    assert transport.written[4:8] == b"\0\x12\0\3"
    assert b"brokerkit" in transport.written
    wire.close()


@pytest.mark.parametrize("piece", [1, 2, 3, 4, 5, 7, 100, 10_000])
async def test_answers_are_put_together_however_they_arrive(piece: int) -> None:
    wire, transport = wired()
    answers: list[asyncio.Future[Any]] = []
    data = b""
    for _ in range(5):
        answers.append(wire.send(question(), 5))
        data += answered(number(transport))
    for at in range(0, len(data), piece):
        wire.data_received(data[at : at + piece])
    for answer in answers:
        assert len((await answer)[1]) == len(SPOKEN) + 2
    assert not wire.closed
    wire.close()


async def test_each_request_has_its_own_deadline() -> None:
    wire, transport = wired()
    patient = wire.send(question(), 60)
    data = answered(number(transport))
    hasty = wire.send(question(), 0.05)
    wire.data_received(data)
    assert (await patient)[1]
    with pytest.raises(Unanswered, match=r"h:9092 did not answer ApiVersions within 0\.05 s"):
        await hasty
    assert wire.closed
    assert transport.aborted == 1


async def test_a_request_that_is_late_takes_those_behind_it_along() -> None:
    wire, _ = wired()
    closed: list[bool] = []
    wire.on_close = lambda: closed.append(wire.closed)
    first, second = wire.send(question(), 0.05), wire.send(question(), 60)
    with pytest.raises(Unanswered):
        await first
    with pytest.raises(Unanswered, match=r"it did not answer ApiVersions within 0\.05 s"):
        await second
    assert closed == [True]
    with pytest.raises(BrokerUnavailable, match="closed") as caught:
        wire.send(question(), 5)
    assert not isinstance(caught.value, Unanswered)


async def test_who_is_cancelled_takes_nobody_along() -> None:
    wire, transport = wired()
    cancelled = asyncio.ensure_future(wire.send(question(), 60))
    data = answered(number(transport))
    other = wire.send(question(), 60)
    data += answered(number(transport))
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    wire.data_received(data)
    assert (await other)[1]
    assert not wire.closed
    wire.close()


async def test_a_broker_that_never_answers_who_was_cancelled_is_left_all_the_same() -> None:
    wire, _ = wired()
    over = asyncio.Event()
    wire.on_close = over.set
    wire.send(question(), 0.05).cancel()
    await asyncio.wait_for(over.wait(), 5)
    assert wire.closed


async def test_who_expires_answers_what_was_asked() -> None:
    wire, transport = wired()
    asked = [wire.send(question(), 60) for _ in range(2)]
    data = answered(number(transport))
    over = asyncio.Event()
    wire.on_close = over.set
    wire.expire(0.02)
    while not wire.closed:
        await asyncio.sleep(0.01)
    with pytest.raises(BrokerUnavailable, match="closed"):
        wire.send(question(), 5)
    assert not over.is_set()
    wire.data_received(answered(1))
    assert (await asked[0])[1]
    assert not over.is_set()
    wire.data_received(data)
    assert (await asked[1])[1]
    assert over.is_set()
    assert transport.aborted == 1


async def test_closing_twice_is_closing_once() -> None:
    wire, transport = wired()
    closed: list[bool] = []
    wire.on_close = lambda: closed.append(True)
    answer = wire.send(question(), 60)
    wire.close()
    wire.close()
    wire.connection_lost(None)
    assert closed == [True]
    assert transport.aborted == 1
    with pytest.raises(Unanswered, match="it was closed"):
        await answer
    assert repr(wire) == "<Wire h:9092 closed>"


@pytest.mark.parametrize(
    "lost, kind, text",
    [
        (None, Unanswered, "the broker closed it"),
        (ConnectionResetError(104, "Connection reset by peer"), Unanswered, "Connection reset"),
        (ssl.SSLError(1, "[SSL: SSLV3_ALERT_BAD_RECORD_MAC] bad mac"), BrokerUnavailable, "TLS failed"),
    ],
)
async def test_a_connection_that_breaks_leaves_answers_unknown(
    lost: Exception | None, kind: type[BrokerError], text: str
) -> None:
    wire, _ = wired()
    answers = [wire.send(question(), 60) for _ in range(2)]
    wire.connection_lost(lost)
    for answer in answers:
        with pytest.raises(kind, match=text) as caught:
            await answer
        assert caught.value.__cause__ is lost
    assert wire.closed


@pytest.mark.parametrize(
    "data", [b"\0\0\0\4\0\0\0\x63", b"\0\0\0\5\0\0\0\1\xff", b"\xff\xff\xff\xff", (LARGEST + 1).to_bytes(4, "big")]
)
async def test_an_answer_that_makes_no_sense_ends_the_connection(data: bytes) -> None:
    wire, _ = wired()
    answer = wire.send(question(), 60)
    wire.data_received(data)
    with pytest.raises(BrokerError, match=r"not asked|cannot be read|not answer as Kafka") as caught:
        await answer
    assert not caught.value.retryable
    assert wire.closed


async def test_what_nobody_asked_for_ends_the_connection() -> None:
    wire, _ = wired()
    wire.data_received(b"\0\0\0\4\0\0\0\1")
    assert wire.closed


async def test_an_answer_that_nobody_waits_for_is_no_unhandled_error() -> None:
    seen: list[Mapping[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(context))
    wire, _ = wired()
    wire.send(question(), 60)
    wire.close()
    gc.collect()
    await asyncio.sleep(0)
    assert not seen


@pytest.mark.parametrize("listener", ["PLAIN", "SASLSSL"])
async def test_a_connection_that_is_closed_leaves_nothing(kafka: Endpoints, listener: Listener) -> None:
    tasks = asyncio.all_tasks()
    wire = await open_wire(read(kafka.url(listener), **files(kafka, listener)))
    answer = wire.send(metadata(), 60)
    wire.close()
    with pytest.raises(Unanswered):
        await answer
    assert asyncio.all_tasks() == tasks
    del wire, answer
    await asyncio.sleep(0)
    gc.collect()  # a socket that is still open would be a ResourceWarning, which is an error here


async def test_many_requests_share_a_connection(kafka: Endpoints) -> None:
    wire = await open_wire(read(kafka.url()))
    try:
        asked = [
            wire.send(metadata() if each % 2 else Request(FindCoordinatorRequest(key=f"wire-{each}")), 10)
            for each in range(50)
        ]
        for each, answer in enumerate(asked):
            assert hasattr(await answer, "brokers" if each % 2 else "node_id")
    finally:
        wire.close()


async def test_a_large_answer_comes_whole(kafka: Endpoints) -> None:
    """Of more bytes than the loop reads at once."""
    wire, transport = wired()
    answer = wire.send(question(), 5)
    data = answered(number(transport))
    padding = 3_000_000
    # A tagged field that a later version may have.
    body = data[4:-1] + b"\1\x63" + _varint(padding) + bytes(padding)
    data = len(body).to_bytes(4, "big") + body
    for at in range(0, len(data), 262_144):
        wire.data_received(data[at : at + 262_144])
    assert (await answer)[1]
    wire.close()


def _varint(value: int) -> bytes:
    data = b""
    while value > 127:
        data += bytes([value & 127 | 128])
        value >>= 7
    return data + bytes([value])
