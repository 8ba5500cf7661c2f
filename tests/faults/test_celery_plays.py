"""Celery's workers are killed, stopped and frozen in the middle of much work: nothing is lost, and every repeat has its reason.

`make test` plays a short round on each system, `make test-faults` long ones.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from ..celery.checker import Harm, Verdict, check
from ..celery.journal import now
from ..celery.systems import LEASE, STOCK, SYSTEMS, Name, served
from ..celery.workers import PATIENCE, READY, Crew, Worker
from .test_plays import LONG

TASKS: Final = 10_000 if LONG else 900
WORKERS: Final = 3
PROCESSES: Final = 2
HARM: Final = (
    ("kill", "stop", "child", "kill", "freeze", "stop", "kill", "child", "kill") if LONG else ("kill", "stop", "child")
)
"""What is done, one after the other, at equal distances."""
DRAIN: Final = 60.0
UNSTORED: Final = 2.0
"""Seconds that an acknowledgement may be on its way, on a busy machine."""


class Play:
    """One round: a crew, what is done to it, and what the checker says."""

    def __init__(self, crew: Crew, seed: int, *, late: bool) -> None:
        self.crew = crew
        self.random = random.Random(seed)
        self.late = late
        self.harm: list[Harm] = []
        self.published: dict[str, bool] = {}
        self._names = (f"w{number}" for number in range(1, 1000))
        self._alive: list[Worker] = []

    def hire(self, count: int = 1, *, waiting: bool = False) -> None:
        """Start workers."""
        names = [next(self._names) for _ in range(count)]
        self._alive += self.crew.start(*names, concurrency=PROCESSES, level="WARNING", waiting=waiting)

    def publish(self) -> None:
        """Publish all tasks; those whose publisher was told of an error may be lost."""
        name = "late_nap" if self.late else "nap"
        for number in range(TASKS):
            id = f"{number}-{self.random.randrange(1 << 32):08x}"
            self.published[id] = False
            self.crew.send(name, 0.003, task_id=id, ignore_result=True)
            self.published[id] = True

    def done(self) -> int:
        """Return how many tasks have succeeded."""
        return len(
            {entry.id for entry in self.crew.journal.entries if entry.what == "ended" and entry.state == "SUCCESS"}
        )

    def perform(self) -> Verdict:
        """Play it."""
        self.hire(WORKERS)
        publisher = threading.Thread(target=self.publish)
        publisher.start()
        try:
            for index, what in enumerate(HARM):
                wanted = TASKS * (index + 1) // (len(HARM) + 2)
                self.crew.until(lambda wanted=wanted: self.done() >= wanted, DRAIN, lambda: f"{self.done()} done")  # type: ignore[misc]
                getattr(self, f"do_{what}")()
        finally:
            publisher.join()
        self._drain()
        self.crew.journal.more()
        return check(self.crew.journal.entries, self.published, self.harm, late=self.late, unstored=UNSTORED)

    def _drain(self) -> None:
        """Wait until nothing more is done, for longer while it is: the checker says what is missing."""
        last, count = now(), self.done()
        while count < len(self.published) and now() - last < (LEASE + 10) * PATIENCE:
            time.sleep(0.1)
            self.crew.journal.more()
            if self.done() > count:
                last, count = now(), self.done()

    def _one(self) -> Worker:
        """Return one that consumes; wait for it, if those that did are gone already."""
        self.crew.until(self._ready, READY, "nobody consumes")
        return self.random.choice(self._ready())

    def _ready(self) -> list[Worker]:
        ready = {entry.pid for entry in self.crew.journal.entries if entry.what == "ready"}
        return [worker for worker in self._alive if worker.running and worker.pid in ready]

    def do_kill(self) -> None:
        """End a worker and its processes as ``kill -9`` does, and start another."""
        worker = self._one()
        begin = now()
        worker.kill()
        self.harm.append(Harm(what="kill", begin=begin, end=now(), pid=worker.pid))
        self._alive.remove(worker)
        self.hire(waiting=True)

    def do_child(self) -> None:
        """Kill a process of a pool."""
        worker = self._one()
        child = self.random.choice(worker.children())
        begin = now()
        os.kill(child, signal.SIGKILL)
        self.harm.append(Harm(what="child", begin=begin, end=now(), pid=child))

    def do_stop(self) -> None:
        """Have a worker end by itself, which explains nothing, and start another."""
        worker = self._one()
        self._alive.remove(worker)
        self.hire(waiting=True)
        worker.stop(60)
        assert worker.process.returncode == 0, worker.text()[-3000:]

    def do_freeze(self) -> None:
        """Stop a worker for longer than what it has is its own."""
        worker = self._one()
        begin = now()
        worker.freeze()
        time.sleep(LEASE + 2)
        worker.thaw()
        self.harm.append(Harm(what="freeze", begin=begin, end=now(), pid=worker.pid))


def cases() -> Iterator[Any]:
    for name in SYSTEMS:
        yield pytest.param(name, True, id=f"late-{name}")
        if LONG:
            yield pytest.param(name, False, id=f"early-{name}")


@pytest.mark.parametrize("name, late", list(cases()))
def test_nothing_is_lost_when_workers_are_killed_and_stopped(
    name: Name, late: bool, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    seed = int(os.environ.get("BROKERKIT_SEED") or random.SystemRandom().randrange(1_000_000))
    began = time.monotonic()
    with served(name) as system:
        options: dict[str, Any] = {"task_reject_on_worker_lost": True}
        if STOCK:
            options["broker_transport_options"] = {"visibility_timeout": LEASE}
        else:
            options["options"] = {"lease": LEASE}
        with system.crew(tmp_path, **options) as crew:
            verdict = Play(crew, seed, late=late).perform()
            told = f"{verdict.summary()} (BROKERKIT_SEED={seed})"
            took = time.monotonic() - began
            title = f"celery, {'late' if late else 'early'}"
            record_property("play", f"{title:<34}{name:<8}{took:6.1f} s  seed {seed:>6}: {verdict.summary()}")
            lines = [told, *(f"  {each.kind}: {each.id}: {each.text}" for each in verdict.findings[:20])]
            assert not verdict.findings, crew.report("\n".join(lines))
            assert verdict.counts["done"] + verdict.counts["given up with their worker"] == TASKS, told
