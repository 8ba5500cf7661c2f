"""The first program of README, exactly as it is written, by stock Celery and by brokerkit's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest

from .journal import now
from .systems import System
from .workers import PATIENCE

feature = pytest.mark.feature
KAFKA = "kafka://localhost:9092"
REDIS = "redis://localhost:6379/0"
PROGRAM = """\
from celery import Celery

app = Celery('myapp', broker='kafka://localhost:9092')

@app.task
def add(x, y):
    return x + y
"""
DELAY = """\
from myapp import add
for number in range(40):
    print(add.delay(5, number).id)
"""
GUARD = "import ctypes; ctypes.CDLL(None).prctl(1, 9)\n" if sys.platform == "linux" else ""
"""Ends a worker with the test that has started it."""
Way = Literal["stock", "ours"]


@pytest.fixture
def folder(system: System, way: Way, tmp_path: Path) -> Path:
    """Return where the program is, with the port that the broker really has."""
    program = PROGRAM if system.name == "kafka" else PROGRAM.replace(KAFKA, REDIS)
    assert (KAFKA if system.name == "kafka" else REDIS) in program
    url = system.url().removeprefix("brokerkit+")
    program = program.replace(KAFKA, url).replace(REDIS, url)
    if way == "ours":
        program = program.replace("from celery import Celery", "from brokerkit.celery import Celery")
    # A queue of its own: others use this Kafka too.  And a fresh install has no confluent-kafka.
    program += f"\napp.conf.broker_transport_options = {{'prefix': 't.f{os.urandom(3).hex()}.'}}\n"
    (tmp_path / "myapp.py").write_text(program, encoding="utf-8")
    for name in ("confluent_kafka", "hypothesis"):  # the latter, where it is, is what starting takes longest for
        (tmp_path / f"{name}.py").write_text("raise ImportError('not installed')\n", encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
    return tmp_path


@feature("takeover")
@pytest.mark.parametrize("system, way", [("kafka", "stock")], indirect=["system"])
def test_the_first_program_runs_with_stock_celery_on_kafka(system: System, way: Way, folder: Path) -> None:
    perform(folder)


@feature("tasks")
@pytest.mark.parametrize("system, way", [("kafka", "ours"), ("redis", "ours")], indirect=["system"])
def test_the_first_program_runs_with_the_class_of_brokerkit(system: System, way: Way, folder: Path) -> None:
    perform(folder)


def perform(folder: Path) -> None:
    """Run two workers with the command that everybody uses, and give them tasks from another process."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    celery = str(Path(sys.executable).with_name("celery"))
    workers = []
    for name in ("w1", "w2"):
        command = [celery, "-A", "myapp", "worker", "--loglevel=info", "-n", f"{name}@%h", "-c", "1"]
        with (folder / f"{name}.log").open("wb") as log:
            workers.append(
                subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            )

    def said(pattern: str) -> list[list[str]]:
        logs = [(folder / f"{name}.log").read_text(encoding="utf-8") for name in ("w1", "w2")]
        return [re.findall(pattern, log) for log in logs]

    def wait(held: object, what: str) -> None:
        assert callable(held)
        end = now() + 30 * PATIENCE
        while not held():
            logs = "\n".join((folder / f"{name}.log").read_text(encoding="utf-8")[-1500:] for name in ("w1", "w2"))
            assert now() < end, f"{what}:\n{logs}"
            assert all(worker.poll() is None for worker in workers), logs
            time.sleep(0.05)

    try:
        wait(lambda: all(said(r"@\S+ ready\.")), "not ready")
        done = subprocess.run(
            [sys.executable, "-c", DELAY],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60 * PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        sent = done.stdout.split()
        pattern = r"Task myapp\.add\[(\S+)\] succeeded"
        wait(lambda: sum(map(len, said(pattern))) >= len(sent), "not all have run")
        first, second = said(pattern)
        assert sorted(first + second) == sorted(sent)
        assert first and second
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
        assert [worker.wait(20 * PATIENCE) for worker in workers] == [0, 0]
        assert not any(said("Traceback")), said("(?s)Traceback.*")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
