"""The Kafka brokers of the tests: they start, break, come back, and leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiokafka
import aiokafka.errors
import pytest

from . import USER, Missing
from .kafka import ADMIN, VARIABLE, VERSIONS, Endpoints, KafkaCluster, Refused, Right, Version, programs, running
from .kafka.settings import MECHANISMS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def one() -> Iterator[KafkaCluster]:
    """A broker with rights for all tests of this module that do not break it."""
    with KafkaCluster(rights=True, users={"another": "old"}) as cluster:
        yield cluster


@pytest.mark.parametrize("version", VERSIONS)
def test_a_broker_is_what_it_says_and_leaves_nothing_behind(version: Version) -> None:
    with KafkaCluster(version) as cluster:
        with cluster.endpoints.wire() as admin:
            known = admin.cluster()
            assert known.brokers == {1: ("127.0.0.1", cluster.endpoints.ports[1]["PLAIN"])}
            features = admin.ask(
                18, 3, b"\6tests\2" + b"1\0", flexible=True
            )  # ApiVersions: share groups are newer than 3.9
            assert (b"share.version" in features.data) == (version != "3.9.2")
        folder, number = cluster.folder, cluster.pid()
    assert not folder.exists()
    assert not running(number)


def test_killed_it_comes_back_on_its_ports_with_its_topics() -> None:
    with KafkaCluster() as cluster:
        ports = cluster.endpoints.ports[1]
        with cluster.endpoints.wire() as admin:
            admin.create("topic", 3)
        for end in (cluster.kill, cluster.shutdown):
            number = cluster.pid()
            end()
            assert not cluster.running()
            assert not running(number)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", ports["PLAIN"]), timeout=10)
            cluster.revive()
            assert cluster.endpoints.ports[1] == ports
            with cluster.endpoints.wire() as admin:
                assert sorted(admin.cluster(None).topics["topic"]) == [0, 1, 2]


def test_of_three_brokers_two_go_on() -> None:
    with KafkaCluster(brokers=3) as cluster:
        with cluster.endpoints.wire() as admin:
            assert sorted(admin.cluster().brokers) == cluster.nodes == [1, 2, 3]
            admin.create("topic", 1)
        first = cluster.leader("topic")
        cluster.kill(first)
        second = eventually(lambda: cluster.leader("topic") not in {first, -1} and cluster.leader("topic"))
        cluster.freeze(second)
        cluster.revive(first)
        eventually(lambda: cluster.leader("topic") not in {second, -1})
        cluster.thaw(second)
        cluster.restart(second)
        with cluster.endpoints.wire() as admin:
            eventually(lambda: sorted(admin.cluster().brokers) == [1, 2, 3])


def eventually(predicate: Any) -> Any:
    until = time.monotonic() + 30
    while not (held := predicate()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return held


def test_topics_are_created_by_use_only_where_a_test_asks_for_it(one: KafkaCluster) -> None:
    for cluster, expected in ((one, False), (KafkaCluster(autocreate=True), True)):
        try:
            if cluster is not one:
                cluster.start()

            async def use(at: str = cluster.endpoints.bootstrap(), expected: bool = expected) -> None:
                async with aiokafka.AIOKafkaProducer(bootstrap_servers=at, request_timeout_ms=2000) as producer:
                    try:
                        await producer.send_and_wait("used", b"value")
                    except aiokafka.errors.KafkaError:
                        assert not expected

            asyncio.run(use())
            with cluster.endpoints.wire() as admin:
                assert ("used" in admin.cluster(None).topics) == expected
        finally:
            if cluster is not one:
                cluster.stop()


# ---------------------------------------------------------------------- security
async def connect(endpoints: Endpoints, listener: Any, **options: Any) -> list[str]:
    """Connect as a user would, and return the topics that it may see."""
    login = (
        {"sasl_plain_username": USER, "sasl_plain_password": endpoints.passwords[USER]} if "SASL" in listener else {}
    )
    protocol = {"PLAIN": "PLAINTEXT", "SASL": "SASL_PLAINTEXT", "SASLSSL": "SASL_SSL"}.get(listener, "SSL")
    if "SSL" in protocol:
        context = ssl.create_default_context(cafile=options.pop("authority", endpoints.authority))
        if listener == "MTLS" and not options.pop("nameless", False):
            context.load_cert_chain(*endpoints.client)
        options["ssl_context"] = context
    at = endpoints.bootstrap(listener)
    consumer = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=at, security_protocol=protocol, request_timeout_ms=20_000, **{**login, **options}
    )
    try:
        await consumer.start()
        return sorted(await consumer.topics())
    finally:
        await consumer.stop()


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("listener", ["SASL", "SASLSSL"])
def test_passwords(one: KafkaCluster, listener: str, mechanism: str) -> None:
    asyncio.run(connect(one.endpoints, listener, sasl_mechanism=mechanism))
    with pytest.raises(aiokafka.errors.KafkaError):
        asyncio.run(connect(one.endpoints, listener, sasl_mechanism=mechanism, sasl_plain_password="wrong"))


def test_a_password_can_be_changed(one: KafkaCluster) -> None:
    with one.endpoints.wire() as admin:
        admin.passwd("another", "new")
    login = {"sasl_plain_username": "another", "sasl_plain_password": one.users["another"]}
    for mechanism in MECHANISMS[1:]:
        with pytest.raises(aiokafka.errors.KafkaError):
            asyncio.run(connect(one.endpoints, "SASL", sasl_mechanism=mechanism, **login))
        asyncio.run(
            connect(one.endpoints, "SASL", sasl_mechanism=mechanism, **(login | {"sasl_plain_password": "new"}))
        )


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # aiokafka leaves a connection open that is refused half-way
def test_certificates(one: KafkaCluster) -> None:
    for listener in ("SSL", "MTLS"):
        asyncio.run(connect(one.endpoints, listener))
        with pytest.raises(aiokafka.errors.KafkaError):
            asyncio.run(connect(one.endpoints, listener, authority=one.endpoints.stranger))
    with pytest.raises(aiokafka.errors.KafkaError):
        asyncio.run(connect(one.endpoints, "MTLS", nameless=True))
    gc.collect()


def test_rights_are_given_and_taken(one: KafkaCluster) -> None:
    rights = [Right(USER, "topic", "mine.", "describe", prefixed=True), Right(USER, "topic", "other", "describe")]
    with one.endpoints.wire() as admin:
        for name in ("mine.a", "mine.b", "other", "others"):
            admin.create(name)
        try:
            assert visible(one) == []
            admin.allow(rights)
            eventually(lambda: visible(one) == ["mine.a", "mine.b", "other"])
            assert admin.forbid(rights[:1]) == 1
            assert admin.forbid(rights[:1]) == 0
            eventually(lambda: visible(one) == ["other"])
            password = one.endpoints.passwords[ADMIN]
            admins = {"sasl_plain_username": ADMIN, "sasl_plain_password": password, "sasl_mechanism": "PLAIN"}
            assert {"mine.a", "others"} <= set(asyncio.run(connect(one.endpoints, "SASL", **admins)))
        finally:
            admin.forbid(rights)
            admin.delete(["mine.a", "mine.b", "other", "others"])


def visible(cluster: KafkaCluster) -> list[str]:
    return asyncio.run(connect(cluster.endpoints, "SASL", sasl_mechanism="PLAIN"))


def test_what_a_broker_refuses_is_told(one: KafkaCluster) -> None:
    with one.endpoints.wire() as admin:
        with pytest.raises(Refused, match="create no/name: error 17"):
            admin.create("no/name")
        admin.create("topic", 2, {"retention.ms": "60000"})
        assert admin.offsets("topic", end=True) == {0: 0, 1: 0}
        admin.delete(["topic", "never there"])


# ---------------------------------------------------------------------- ends
PROGRAM = """
import os, signal
from tests.servers.kafka import KafkaCluster, shared_kafka
cluster = KafkaCluster(brokers={brokers})
cluster.start()
print(cluster.folder, *(cluster.pid(node) for node in cluster.nodes), flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("brokers", "end"),
    [(3, "os.kill(os.getpid(), signal.SIGKILL)"), (1, "os._exit(1)"), (1, "raise KeyboardInterrupt")],
)
def test_brokers_end_with_the_process_that_has_started_them(brokers: int, end: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(brokers=brokers, end=end)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode
    folder, *numbers = done.stdout.split()
    assert len(numbers) == brokers
    gone([int(number) for number in numbers], Path(folder))


def gone(numbers: list[int], folder: Path) -> None:
    until = time.monotonic() + 10
    while any(map(running, numbers)) or folder.exists():
        assert time.monotonic() < until, "a broker has outlived its starter"
        time.sleep(0.005)


RUN = """
import pathlib, time
from tests.servers.kafka import shared_kafka

def test_1() -> None:
    with shared_kafka().wire() as admin:
        admin.create("one")
    wait("two")

def test_2() -> None:
    with shared_kafka().wire() as admin:
        admin.create("two")
    wait("one")

def wait(name: str) -> None:
    until = time.monotonic() + 60
    with shared_kafka().wire() as admin:
        while name not in admin.cluster(None).topics:
            assert time.monotonic() < until
            time.sleep(0.05)
    {end}
"""


@pytest.mark.parametrize("killed", [False, True])
def test_processes_of_a_run_share_a_broker_that_ends_with_it(tmp_path: Path, killed: bool) -> None:
    """Also when pytest is killed, and its workers live on for a while."""
    (tmp_path / "test_run.py").write_text(RUN.format(end="time.sleep(60)" if killed else ""), encoding="utf-8")
    options = [
        "-n",
        "2",
        "-p",
        "tests.conftest",
        "--rootdir",
        str(tmp_path),
        "-c",
        "/dev/null",
        "-p",
        "no:cacheprovider",
    ]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE and "PYTEST" not in name}
    environment |= {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ways: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **ways) as process:
        try:
            (told,) = eventually(lambda: list(tmp_path.glob("brokerkit-run-*/*.json")))
            number = eventually(lambda: told.read_text() and json.loads(told.read_text())["pid"])
            if killed:
                with Endpoints.load(json.loads(told.read_text())["endpoints"]).wire() as admin:
                    eventually(lambda: {"one", "two"} <= set(admin.cluster(None).topics))
                process.send_signal(signal.SIGKILL)
            else:
                assert process.stdout is not None
                assert "2 passed" in process.stdout.read()
                assert process.wait(10) == 0
            gone([number], told.parent)
        finally:
            process.kill()


# ---------------------------------------------------------------------- programs
def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(Missing, match="apt-get install default-jre-headless") as caught:
        programs.java.__wrapped__()
    assert "\n" not in str(caught.value)
    old = tmp_path / "java"
    old.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n", encoding="utf-8")
    old.chmod(0o755)
    with pytest.raises(Missing, match=r'17 or later.* is openjdk version "11.0.2"') as caught:
        programs.java.__wrapped__()
    monkeypatch.setattr(programs, "java", lambda: "java")
    with pytest.raises(Missing, match="apt-get install maven") as caught:
        programs.jars("4.3.1")
    assert "\n" not in str(caught.value)
    maven = tmp_path / "mvn"
    maven.write_text("#!/bin/sh\necho '[ERROR] no network'\necho '[ERROR] more'\nexit 1\n", encoding="utf-8")
    maven.chmod(0o755)
    with pytest.raises(Missing, match=r"cannot fetch it: .*no network$") as caught:
        programs.jars("4.3.1")
    assert not [path for path in (tmp_path / "brokerkit").iterdir() if path.suffix != ".lock"]


FAKE = """#!/bin/sh
for argument; do case $argument in -DoutputDirectory=*) folder=${argument#*=};; esac; done
sleep 0.2
: > "$folder/kafka_2.13-4.3.1.jar"
echo called >> "$0.log"
"""
FETCH = "from tests.servers.kafka import programs; programs.java = lambda: 'java'; print(programs.classpath('4.3.1'))"


def test_of_many_processes_one_fetches_the_jars(tmp_path: Path) -> None:
    maven = tmp_path / "mvn"
    maven.write_text(FAKE, encoding="utf-8")
    maven.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen([sys.executable, "-c", FETCH], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=60)[0].splitlines()[-1] for process in processes]
    assert said == 3 * [str(tmp_path / "cache" / "brokerkit" / "kafka-4.3.1" / "kafka_2.13-4.3.1.jar")]
    assert (tmp_path / "mvn.log").read_text(encoding="utf-8") == "called\n"
