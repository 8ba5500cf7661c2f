"""Real workers: the ``celery`` command in processes of its own, and what the kernel says of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from ..fresh import PACKAGE, PROJECT, environment
from .app import VARIABLE, Execution, Settings, count, executions, ready

START: Final = 60.0
"""Most seconds until a worker consumes."""
STOP: Final = 60.0
"""Most seconds that a warm shutdown may take."""
LOOK: Final = 0.005


class Worker:
    """A worker that runs, with all its processes."""

    def __init__(self, settings: Settings, options: Sequence[str]) -> None:
        self.journal = settings.journal
        self._log = Path(f"{settings.journal}.log")
        command = (
            sys.executable,
            "-m",
            "celery",
            "-A",
            f"{PACKAGE}.on_celery.app",
            "worker",
            "-l",
            "WARNING",
            *options,
        )
        with self._log.open("wb") as log:
            self.started = time.monotonic_ns()
            self._process = subprocess.Popen(
                command,
                env={**environment(), VARIABLE: msgspec.json.encode(settings).decode()},
                cwd=PROJECT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def executions(self) -> list[Execution]:
        """Return what it has executed, in order."""
        return list(executions(self.journal)) if count(self.journal) else []

    async def until(self, reached: Callable[[], bool], seconds: float = START) -> None:
        """Wait for *reached*.

        Raises:
            OSError: the worker has ended.
            TimeoutError: it takes longer than *seconds*.
        """
        async with asyncio.timeout(seconds):
            while not reached():
                if self._process.poll() is not None:
                    raise OSError(f"the worker has ended with {self._process.returncode}: {self._last_words()}")
                await asyncio.sleep(LOOK)

    async def ready(self) -> None:
        """Wait until it consumes."""
        await self.until(ready(self.journal).exists)

    async def executed(self, number: int) -> None:
        """Wait until so many tasks have been executed, each execution counted."""
        await self.until(lambda: count(self.journal) >= number, float("inf"))

    def cpu(self) -> float:
        """Return how many seconds of CPU all its processes have had."""
        return sum(_runtime(pid) for pid in self._all()) / 1e9

    def memory(self) -> float:
        """Return how many MiB all its processes have, each page that several share counted once."""
        return sum(_proportional(pid) for pid in self._all()) / 1024

    async def stop(self) -> float:
        """Have it finish what it does, as an operator would; return how many seconds that takes."""
        began = time.perf_counter()
        self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP):
            while self._process.poll() is None:
                await asyncio.sleep(LOOK)
        return time.perf_counter() - began

    def kill(self) -> None:
        """End all its processes at once, those of a pool that has lost its parent too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:200] if lines else "nothing said"

    def _all(self) -> Iterator[int]:
        waiting = [self._process.pid]
        while waiting:
            pid = waiting.pop()
            yield pid
            with contextlib.suppress(OSError):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    waiting += [int(child) for child in (thread / "children").read_text("ascii").split()]


@contextlib.asynccontextmanager
async def working(broker: str, queue: str, options: Sequence[str]) -> AsyncIterator[Worker]:
    """Run a worker of *queue*; it is killed in the end, if it was not stopped."""
    folder = tempfile.mkdtemp(prefix="brokerkit-bench-")
    worker = Worker(Settings(broker, queue, f"{folder}/journal"), (*options, "-n", f"{queue}@%h"))
    try:
        yield worker
    finally:
        worker.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _runtime(pid: int) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has just ended
                total += int((thread / "schedstat").read_text("ascii").split()[0])
    return total


def _proportional(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0
