"""Each example runs, ends by itself and prints what its docstring says; some of them on real servers, too."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import textwrap
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import IO, Self

import pytest

from tests.servers import RedisServer, shared
from tests.servers.kafka import shared_kafka

EXAMPLES = Path(__file__).parent.parent / "examples"
DEMO = {"orders", "orders_topics", "orders_ledger", "orders_stage"}
SEVERAL = {"queue_worker", "queue_producer", "broadcast_replica", "broadcast_sender"}
"""Those that are started several times, or beside each other."""
ON_KAFKA = {"kafka_client", "more_workers", "moving"}
"""Those that make sense there only."""
PROGRAMS = [
    path
    for path in sorted(EXAMPLES.glob("*.py"))
    if path.stem not in DEMO | SEVERAL | ON_KAFKA and not path.stem.startswith("test_")
]
ANYWHERE = [EXAMPLES / "batch_insert.py", EXAMPLES / "replay_since.py"]
"""Those that take the URL of a broker, and do the same on each."""
TIMEOUT = 240.0  # every wait ends with what it waits for: this is for what hangs, on the slowest machine


def surroundings() -> dict[str, str]:
    """Return the environment of a program: as a user's, but for warnings, which fail it."""
    known = {name: value for name, value in os.environ.items() if name != "BROKERKIT_URL"}
    return {**known, "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}


def run(*arguments: str | Path, url: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program as a user would, with BROKERKIT_URL if there is a *url*."""
    environment = surroundings() | ({"BROKERKIT_URL": url} if url else {})
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, check=False)


class Running:
    """A program that runs beside the test until it is ended by SIGTERM, as an operator does."""

    def __init__(self, *arguments: str | Path) -> None:
        command = [sys.executable, *map(str, arguments)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings()
        )
        self._changed = threading.Condition()
        self._open = 2
        """How many pipes are: none when it has ended."""
        self.out: list[str] = []
        self.err: list[str] = []
        pipes = ((self._process.stdout, self.out), (self._process.stderr, self.err))
        self._readers = [threading.Thread(target=self._read, args=pipe, daemon=True) for pipe in pipes]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self, pipe: IO[str], lines: list[str]) -> None:
        for line in pipe:
            with self._changed:
                lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._open -= 1
            self._changed.notify_all()

    def until(self, what: Callable[[], bool]) -> None:
        """Return when *what*, which looks at the lines so far, holds."""
        with self._changed:
            self._changed.wait_for(lambda: what() or not self._open, TIMEOUT)
            assert what(), (self.out, self.err)

    def started(self) -> None:
        """Return when the service takes messages."""
        self.until(lambda: any(" started: " in line for line in self.err))

    def printed(self, count: int) -> None:
        """Return when it has printed *count* lines."""
        self.until(lambda: len(self.out) >= count)

    def end(self) -> int:
        """Ask it to end and return its exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(TIMEOUT)


@pytest.fixture
def server() -> RedisServer:
    server = shared("redis")
    server.clear()
    return server


def fresh() -> str:
    """Return the URL of a Kafka, with a prefix that nothing on it has yet."""
    return shared_kafka().url(query=f"prefix=e{uuid.uuid4().hex[:12]}.")


def promised(path: Path) -> str:
    """Return what the docstring of an example says that it prints."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    _, found, output = text.partition("Prints:\n\n")
    assert found, f"the docstring of {path.name} does not say what it prints"
    return textwrap.dedent(output).rstrip() + "\n"


def test_there_are_examples() -> None:
    assert {"hello", "retry", "delay", "resources", "replay", "request", "batch"} <= {path.stem for path in PROGRAMS}
    assert {path.stem for path in EXAMPLES.glob("*.py")} >= SEVERAL | ON_KAFKA


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_prints_what_it_says(path: Path) -> None:
    done = run(path)
    assert (done.stdout, done.stderr, done.returncode) == (promised(path), "", 0)


@pytest.mark.parametrize("path", ANYWHERE, ids=lambda path: path.stem)
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_an_example_prints_the_same_on_redis(path: Path, way: str, server: RedisServer) -> None:
    done = run(path, server.url()) if way == "argument" else run(path, url=server.url())
    assert (done.stdout, done.stderr, done.returncode) == (promised(path), "", 0)


@pytest.mark.parametrize("path", ANYWHERE, ids=lambda path: path.stem)
def test_an_example_prints_the_same_on_kafka(path: Path) -> None:
    done = run(path, fresh())
    assert (done.stdout, done.stderr, done.returncode) == (promised(path), "", 0)


def test_brokerkit_and_another_client_share_topics_of_kafka() -> None:
    done = run(EXAMPLES / "kafka_client.py", shared_kafka().url())
    assert (done.stdout, done.stderr, done.returncode) == (promised(EXAMPLES / "kafka_client.py"), "", 0)


@pytest.mark.parametrize("system", ["redis", "kafka"])
def test_two_workers_share_a_queue(system: str, server: RedisServer) -> None:
    """What the producer waits for is done, each picture by one worker, and both have worked."""
    program, url = EXAMPLES / "queue_worker.py", server.url() if system == "redis" else fresh()
    with Running(program, url) as one, Running(program, url) as other:
        for worker in (one, other):
            worker.started()
        done = run(EXAMPLES / "queue_producer.py", url)
        assert (done.stdout, done.stderr, done.returncode) == (promised(EXAMPLES / "queue_producer.py"), "", 0)
        assert [one.end(), other.end()] == [0, 0]
        made = Counter(line.partition(": ")[2] for line in one.out + other.out)
        assert made == Counter(f"{number:02}.jpg is {width} wide" for number in range(20) for width in (320, 1280))
        for worker in (one, other):
            assert {line.partition(":")[0] for line in worker.out} == {f"worker {worker.pid}"}


def test_a_service_moves_from_redis_to_kafka(server: RedisServer) -> None:
    done = run(EXAMPLES / "moving.py", server.url(), fresh())
    assert (done.stdout, done.stderr, done.returncode) == (promised(EXAMPLES / "moving.py"), "", 0)


def test_more_workers_than_partitions() -> None:
    done = run(EXAMPLES / "more_workers.py", fresh())
    assert (done.stdout, done.stderr, done.returncode) == (promised(EXAMPLES / "more_workers.py"), "", 0)


def test_every_replica_hears_the_broadcast(server: RedisServer) -> None:
    program = EXAMPLES / "broadcast_replica.py"
    heard = ["on are dark-mode", "on are dark-mode, new-cart", "on are new-cart"]
    with Running(program, server.url()) as one, Running(program, server.url()) as other:
        for replica in (one, other):
            replica.started()
        done = run(EXAMPLES / "broadcast_sender.py", server.url())
        assert (done.stdout, done.stderr, done.returncode) == (promised(EXAMPLES / "broadcast_sender.py"), "", 0)
        for replica in (one, other):
            replica.printed(len(heard))
            assert replica.end() == 0
            assert replica.out == [f"replica {replica.pid}: {text}" for text in heard]


def test_the_example_of_a_test_passes() -> None:
    done = run("-m", "pytest", "-p", "no:cacheprovider", "--rootdir", EXAMPLES.parent, EXAMPLES / "test_billing.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_the_demos_ledger_holds_what_is_written_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader may come while a line is being written, and a kill may cut one off."""
    monkeypatch.syspath_prepend(EXAMPLES)
    path = tmp_path / "ledger"
    ledger = import_module("orders_ledger").Ledger(path, "")
    ledger.note("Handled", id="a")
    with path.open("ab") as file:
        file.write(b'\n{"what": "Handled", "at": 1')
    assert [entry["id"] for entry in ledger.read("Handled")] == ["a"]
    ledger.note("Handled", id="b")
    assert [entry["id"] for entry in ledger.read("Handled")] == ["a", "b"]


@pytest.mark.parametrize("program", ["orders.py", "orders_topics.py"])
def test_the_sums_of_the_demo_add_up(program: str) -> None:
    done = run(EXAMPLES / program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "The sums add up" in done.stdout


@pytest.mark.parametrize("program", ["orders.py", "orders_topics.py"])
def test_the_sums_add_up_on_kafka(program: str) -> None:
    """One process is killed in the middle, and another one does the rest."""
    done = run(EXAMPLES / program, shared_kafka().url())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The service was killed" in done.stdout
    assert "The sums add up" in done.stdout
