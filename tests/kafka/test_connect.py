"""Connecting to real brokers of every kind: what works, and what is told apart where it does not."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import trustme
import uvloop
from kio.schema.errors import ErrorCode

from brokerkit import Topic
from brokerkit import connect as connect_to
from brokerkit.drivers.kafka._api import SPOKEN
from brokerkit.drivers.kafka._connect import connect
from brokerkit.drivers.kafka._errors import Refused
from brokerkit.errors import (
    AuthenticationError,
    BrokerError,
    BrokerUnavailable,
    ConfigError,
    InsecureCredentials,
)
from tests.servers.kafka import Endpoints, KafkaCluster, Listener, shared_kafka

from .connecting import files, metadata, open_wire, read

CANARY = "s3cr3t-Canary"

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def kafka() -> Endpoints:
    """A broker that listens in every way."""
    return shared_kafka()


@pytest.fixture(scope="module")
def limited() -> Iterator[Endpoints]:
    """A broker without SCRAM-SHA-512, where a log-in is good for two seconds."""
    with KafkaCluster(
        listeners=("PLAIN", "SASL"),
        mechanisms=("PLAIN", "SCRAM-SHA-256"),
        config={"connections.max.reauth.ms": "2000"},
    ) as cluster:
        yield cluster.endpoints


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
    assert 1 < time.monotonic() - begun < 2
    await asyncio.wait_for(over.wait(), 10)


async def test_a_program_does_not_notice_that_log_ins_run_out(
    limited: Endpoints, caplog: pytest.LogCaptureFixture
) -> None:
    topic = Topic("wire-reauth", str, partitions=2)
    sent: list[str] = []
    got: list[str] = []
    async with connect_to(limited.url("SASL")) as broker:
        await broker.declare(topic)
        async with broker.subscribe(topic, group="billing") as messages:
            end = time.monotonic() + 5
            while time.monotonic() < end or len(got) < len(sent):
                if time.monotonic() < end:
                    sent.append(f"{len(sent)}")
                    await broker.publish(topic, sent[-1], key="key", timeout=5)
                for message in await messages.receive(limit=10, timeout=0.05):
                    got.append(message.value)
                    await message.ack(confirm=True)
                assert time.monotonic() < end + 30
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
    assert time.monotonic() - begun < 4.5
    assert not caught.value.retryable
    assert isinstance(caught.value.__cause__, Refused)
    assert caught.value.__cause__.code == ErrorCode.sasl_authentication_failed
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
    assert time.monotonic() - begun < 4.5


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


async def test_certificates_are_read_when_their_files_change(kafka: Endpoints, tmp_path: Path) -> None:
    ca, cert, key = (tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem"))
    other = trustme.CA()
    other.cert_pem.write_to_path(str(ca))
    cert.write_bytes(Path(kafka.client[0]).read_bytes())
    key.write_bytes(Path(kafka.client[1]).read_bytes())
    made = read(kafka.url("MTLS"), ca_file=str(ca), cert_file=str(cert), key_file=str(key))
    with pytest.raises(BrokerUnavailable, match="ca_file="):
        await open_wire(made)
    ca.write_bytes(Path(kafka.authority).read_bytes())
    (await open_wire(made)).close()
    context = made.found.tls
    (await open_wire(made)).close()
    assert made.found.tls is context, "they were read again for nothing"
    cert.write_text("half of a certif")  # while it is being replaced
    (await open_wire(made)).close()
    assert made.found.tls is context
    cert.write_bytes(Path(kafka.client[0]).read_bytes())
    (await open_wire(made)).close()
    assert made.found.tls is not context
