"""`Crew`: an application, and real workers of it that tests start, stop, kill and freeze."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import msgspec
from celery.result import AsyncResult

from .apps.jobs import VARIABLE, Settings, build
from .journal import Entry, Reading, What, now

ROOT: Final = Path(__file__).parents[2]
PATIENCE: Final = float(os.environ.get("BROKERKIT_PATIENCE") or (1 if os.environ.get("BROKERKIT_FAULTS") else 3))
"""All waiting may take so many times as long: beside all other tests the machine has other things to do."""
READY: Final = 30.0
"""Seconds until a worker must be ready; it takes one."""
STOP: Final = 20.0
"""Seconds until a worker with nothing to do must have ended."""


# It unsubscribes, from a server that may have ended by then, and tries that for 20 s, in whatever test it is collected.
AsyncResult.__del__ = lambda self: None


class Worker:
    """A process of ``celery worker``, which leads a group of its own with its children."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        """Its node name."""
        self.process = process
        self.log = log
        self.started = now()

    def __repr__(self) -> str:
        return f"<Worker {self.name} {self.process.pid}{'' if self.running else ' gone'}>"

    @property
    def pid(self) -> int:
        """The number of its main process."""
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether its main process lives; a frozen one does."""
        return self.process.poll() is None

    def text(self) -> str:
        """Return all that it has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def children(self) -> list[int]:
        """Return the numbers of its pool's processes."""
        told = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="ascii")
        return [int(number) for number in told.split()]

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the main process alone."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """End all its processes as ``kill -9`` does."""
        self._all(signal.SIGKILL)
        self.process.wait()

    def freeze(self) -> None:
        """Stop all its processes as ``SIGSTOP`` does."""
        self._all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them run on after `freeze`."""
        self._all(signal.SIGCONT)

    def _all(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self, timeout: float = STOP) -> float:
        """Return after how many seconds it has ended by itself."""
        begin = now()
        try:
            self.process.wait(timeout * PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self!r} still runs after {timeout:g} s:\n{self.text()[-3000:]}") from None
        return now() - begin

    def stop(self, timeout: float = STOP) -> float:
        """Have it end when its tasks have, and return after how many seconds it has."""
        self.send(signal.SIGTERM)
        return self.wait(timeout)


class Crew:
    """An application with the workers of a test, or of several, and what they have written down."""

    def __init__(
        self,
        broker: str,
        folder: Path,
        *,
        backend: str = "",
        ours: bool = False,
        broadcast: str = "",
        cleanup: Callable[[], None] = lambda: None,
        **config: Any,
    ) -> None:
        self.settings = Settings(
            broker=broker, backend=backend, folder=str(folder), ours=ours, broadcast=broadcast, config=config
        )
        self.folder = folder
        self.workers: list[Worker] = []
        self.journal = Reading(folder)
        self._cleanup = cleanup
        folder.mkdir(parents=True, exist_ok=True)
        self.app = build(self.settings)
        """The producer's."""
        self.app.set_current()  # what canvas makes of parts asks for it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all workers, let go of the connections of this process, and remove what was made in the broker."""
        try:
            for worker in self.workers:
                worker.kill()
            backend = self.app.backend
            if hasattr(backend, "result_consumer"):
                backend.result_consumer.stop()
            for pool in (self.app.amqp._producer_pool, self.app._pool):
                if pool is not None:
                    pool.force_close_all()
            self.app.close()
        finally:
            self._cleanup()

    # ------------------------------------------------------------------ workers
    def command(self, *args: str, **config: Any) -> subprocess.CompletedProcess[str]:
        """Run ``celery -A app`` with *args* to its end."""
        command = [sys.executable, "-m", "celery", "-A", "tests.celery.apps.main", *args]
        timeout = 60 * PATIENCE
        environment = self._environment(config, {})
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def start(
        self,
        *names: str,
        pool: str = "prefork",
        concurrency: int = 2,
        options: Sequence[str] = (),
        level: str = "INFO",
        waiting: bool = False,
        environment: Mapping[str, str] | None = None,
        **config: Any,
    ) -> list[Worker]:
        """Start a worker for each name and return them when all are ready, or at once if they are *waiting*."""
        started = []
        for name in names:
            node = f"{name}@test"
            command = [sys.executable, "-m", "celery", "-A", "tests.celery.apps.main", "worker", "-n", node]
            command += ["-P", pool, "-c", str(concurrency), "-l", level, *options]
            log = self.folder / f"{name}-{len(self.workers)}.log"
            with log.open("wb") as out:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=self._environment(config, environment or {}),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that it can be killed with its children
                )
            worker = Worker(node, process, log)
            self.workers.append(worker)
            started.append(worker)
        if not waiting:
            self.ready(*started)
        return started

    def _environment(self, config: Mapping[str, Any], more: Mapping[str, str]) -> dict[str, str]:
        settings = msgspec.structs.replace(self.settings, config={**self.settings.config, **config})
        # Nothing of this process's own may reach the workers: they are as somebody else's would be.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "CELERY"))}
        return {**kept, VARIABLE: msgspec.json.encode(settings).decode(), "PYTHONWARNINGS": "ignore", **more}

    def ready(self, *workers: Worker) -> None:
        """Wait until workers consume."""

        def seen() -> bool:
            pids = {entry.pid for entry in self.journal.entries if entry.what == "ready"}
            gone = [worker for worker in workers if not worker.running]
            assert not gone, self.report(f"{gone} have ended")
            return pids.issuperset(worker.pid for worker in workers)

        self.until(seen, READY, "workers are not ready")

    # ------------------------------------------------------------------ tasks
    def send(self, name: str, *args: Any, **options: Any) -> Any:
        """Publish a task, with the *options* of ``apply_async``, and return its result to come."""
        return self.app.tasks[name].apply_async(args, **options)

    def of(self, id: str, *what: What) -> list[Entry]:
        """Return what was written down about a task."""
        self.journal.more()
        return [entry for entry in self.journal.of.get(id, ()) if entry.what in what]

    def began(self, id: str, *, count: int = 1, timeout: float = 10.0) -> list[Entry]:
        """Return the begins of a task when there are so many."""
        return self._seen(id, "began", count, timeout)

    def ended(self, *ids: str, count: int = 1, timeout: float = 10.0) -> list[Entry]:
        """Return the ends of tasks when there are so many of each."""
        return [entry for id in ids for entry in self._seen(id, "ended", count, timeout)]

    def _seen(self, id: str, what: What, count: int, timeout: float) -> list[Entry]:
        self.until(
            lambda: len(self.of(id, what)) >= count,
            timeout,
            lambda: f"task {id} has not {what} {count} times: {self.journal.of[id]}",
        )
        return self.of(id, what)

    def runs(self, ids: Iterable[str]) -> dict[str, int]:
        """Return how often each of *ids* has begun."""
        self.journal.more()
        return {id: len(self.of(id, "began")) for id in ids}

    # ------------------------------------------------------------------ waiting
    def until(self, held: Callable[[], object], timeout: float, what: Callable[[], str] | str) -> None:
        """Wait until *held* is true, of what was written down or of anything else."""
        end = now() + timeout * PATIENCE
        self.journal.more()
        while not held():
            if now() > end:
                raise AssertionError(self.report(f"{what if isinstance(what, str) else what()}, after {timeout:g} s"))
            time.sleep(0.02)
            self.journal.more()

    def report(self, problem: str) -> str:
        """Return *problem* with the last lines of all logs."""
        lines = [f"{problem} (histories and logs in {self.folder})"]
        for worker in self.workers:
            lines += [f"  {worker.name}: {line}" for line in worker.text().splitlines()[-15:]]
        return "\n".join(lines)
