"""The programs that users see, with the real `celery` command: README's, and the folders of examples."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import pytest

from ..servers import ADMIN, RedisServer, shared
from ..servers.kafka import shared_kafka
from ..test_examples import EXAMPLES, TIMEOUT, promised
from .journal import now
from .systems import forget
from .workers import PATIENCE, READY, Worker

README = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
CELERY = Path(sys.executable).with_name("celery")
ABSENT = ("confluent_kafka", "hypothesis")
"""What users of the examples have not installed, and these tests have."""
SUCCEEDED = re.compile(r"Task (\S+)\[(\S+)\] succeeded in [^:]+: (.*)")


class Folder:
    """A folder with programs, the workers that are started there, and the URLs that they are told."""

    def __init__(self, path: Path, logs: Path, environment: Mapping[str, str]) -> None:
        self.path = path
        self.logs = logs
        self.workers: list[Worker] = []
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "CELERY"))}
        for name in ABSENT:
            (logs / f"{name}.py").write_text("raise ImportError('not installed')\n", encoding="utf-8")
        self.environment = {**kept, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(logs), **environment}

    def start(self, app: str, *names: str) -> None:
        """Start workers as the pages say, and return when they are ready."""
        started = []
        for name in names:
            log = self.logs / f"{name}.log"
            command = [str(CELERY), "-A", app, "worker", "--loglevel=info", "-c", "2", "-n", f"{name}@test"]
            with log.open("wb") as out:
                process = subprocess.Popen(
                    command,
                    cwd=self.path,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            started.append(Worker(f"{name}@test", process, log))
        self.workers += started
        self.until(lambda: all(f"{worker.name} ready." in worker.text() for worker in started), READY)

    def until(self, held: Callable[[], bool], timeout: float) -> None:
        """Return when *held*, which looks at the logs."""
        end = now() + timeout * PATIENCE
        while not held():
            gone = [worker for worker in self.workers if not worker.running]
            assert not gone and now() < end, self.text()
            time.sleep(0.05)

    def run(self, program: str) -> str:
        """Run a program to its end and return what it has printed."""
        command = [sys.executable, program]
        done = subprocess.run(
            command, cwd=self.path, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr + self.text()
        assert done.stderr == ""
        return done.stdout

    def text(self) -> str:
        return "\n".join(f"{worker.name}:\n{worker.text()[-5000:]}" for worker in self.workers)

    def done(self) -> list[tuple[str, str, str]]:
        """Return name, id and result of what has succeeded."""
        return [found for worker in self.workers for found in SUCCEEDED.findall(worker.text())]

    def end(self) -> None:
        """Stop all workers, as an operator does."""
        for worker in self.workers:
            worker.send(signal.SIGTERM)
        for worker in self.workers:
            worker.wait()
        assert [worker.process.returncode for worker in self.workers] == [0] * len(self.workers), self.text()
        assert "Traceback" not in self.text()


@pytest.fixture
def redis() -> RedisServer:
    server = shared("redis")
    server.clear()
    return server


@pytest.fixture
def folder(tmp_path: Path) -> Generator[Callable[..., Folder]]:
    """Give a function that makes a folder, whose workers end with the test."""
    made: list[Folder] = []

    def make(path: Path, **environment: str) -> Folder:
        made.append(Folder(path, tmp_path, environment))
        return made[-1]

    yield make
    for one in made:
        for worker in one.workers:
            worker.kill()


def programs(says: str) -> list[str]:
    """Return README's programs in which *says* is written."""
    return [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if says in block]


@pytest.mark.feature("takeover", "share", system="kafka")
def test_the_program_of_readme_works_on_kafka_without_any_import_of_ours(
    tmp_path: Path, folder: Callable[..., Folder]
) -> None:
    """Three workers; each of them publishes the task too, since it imports the program.  Nobody has confluent-kafka."""
    [program] = programs("from celery import Celery")
    assert "localhost:9092" in program
    kafka = shared_kafka()
    (tmp_path / "myapp.py").write_text(program.replace("kafka://localhost:9092", kafka.url()), encoding="utf-8")
    here = folder(tmp_path)
    here.start("myapp", "w1", "w2", "w3")
    here.run("myapp.py")
    here.until(lambda: len(here.done()) >= 4, 20)
    here.end()
    assert [(name, result) for name, _, result in here.done()] == [("myapp.add", "15")] * 4
    assert len({id for _, id, _ in here.done()}) == 4
    forget(kafka, "celery.celery")


@pytest.mark.feature("share", system="redis")
def test_the_program_of_readme_works_on_redis_with_one_import_changed(
    tmp_path: Path, folder: Callable[..., Folder], redis: RedisServer
) -> None:
    [program] = programs("from celery import Celery")
    program = program.replace("from celery", "from brokerkit.celery")
    (tmp_path / "myapp.py").write_text(program.replace("kafka://localhost:9092", redis.url()), encoding="utf-8")
    here = folder(tmp_path)
    here.start("myapp", "w1", "w2", "w3")
    here.run("myapp.py")
    here.until(lambda: len(here.done()) >= 4, 20)
    here.end()
    assert [(name, result) for name, _, result in here.done()] == [("myapp.add", "15")] * 4
    assert len({id for _, id, _ in here.done()}) == 4


def test_the_example_of_kafka(folder: Callable[..., Folder]) -> None:
    """What the program waits for is done, each task once, and by both workers."""
    kafka = shared_kafka()
    here = folder(EXAMPLES / "celery_kafka", CELERY_BROKER_URL=kafka.url())
    here.start("myapp", "w1", "w2")
    assert here.run("enqueue.py") == promised(EXAMPLES / "celery_kafka" / "enqueue.py")
    here.end()
    assert Counter(name for name, _, _ in here.done()) == {"myapp.add": 201, "myapp.fetch": 1, "myapp.remind": 1}
    assert all("succeeded" in worker.text() for worker in here.workers)
    forget(kafka, "myapp.")


def test_the_example_of_redis(folder: Callable[..., Folder], redis: RedisServer) -> None:
    """One worker is killed in the middle: the other one does what it had."""
    results = redis.url(user=ADMIN, database=1)
    here = folder(EXAMPLES / "celery_redis", CELERY_BROKER_URL=redis.url(), CELERY_RESULT_BACKEND=results)
    here.start("album", "w1", "w2")
    command = [sys.executable, "publish.py"]
    with subprocess.Popen(
        command, cwd=here.path, env=here.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        here.until(lambda: len(here.done()) >= 20, 20)
        here.workers.pop().kill()
        out, err = program.communicate(timeout=TIMEOUT)
    assert (out, err, program.returncode) == (promised(EXAMPLES / "celery_redis" / "publish.py"), "", 0), here.text()
    here.end()


@pytest.mark.feature("tasks", "async_worker", "adelay", "service", system="redis", pool="async")
def test_the_example_of_asyncio(folder: Callable[..., Folder], redis: RedisServer) -> None:
    results = redis.url(user=ADMIN, database=1)
    here = folder(EXAMPLES / "celery_asyncio", CELERY_BROKER_URL=redis.url(), CELERY_RESULT_BACKEND=results)
    assert here.run("service.py") == promised(EXAMPLES / "celery_asyncio" / "service.py")
