"""What becomes of tasks when workers are told to end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from .conftest import Hire
from .journal import now
from .systems import LEASE
from .workers import PATIENCE, Crew, Worker

feature = pytest.mark.feature
OPTIONS = {"lease": LEASE}


@feature("shutdown")
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_warm_shutdown_finishes_what_runs_and_gives_the_rest_to_others(hire: Hire, gate: Path, pool: str) -> None:
    crew = hire(options=OPTIONS, worker_prefetch_multiplier=8)
    (first,) = crew.start("one", pool=pool, concurrency=1)
    running = crew.send("until", str(gate)).id
    crew.began(running, timeout=20)
    waiting = [crew.send("nap").id for _ in range(6)]
    if pool != "solo":  # which looks at nothing else while it has a task
        crew.until(lambda: all(crew.of(id, "received") for id in waiting), 20, "not everything is fetched")
    first.send(signal.SIGTERM)
    crew.until(lambda: any(entry.what == "stopping" for entry in crew.journal.entries), 10, "it does not stop")
    second = crew.start("two", concurrency=1, waiting=True)
    gate.touch()
    released = now()
    first.wait()
    assert first.process.returncode == 0, first.text()[-2000:]
    crew.ready(*second)
    ends = crew.ended(running, *waiting, timeout=20)
    assert {end.state for end in ends} == {"SUCCESS"}
    assert ends[0].by == "one@test"
    assert max(end.at for end in ends) - max(released, second[0].started) < (LEASE + 5) * PATIENCE
    time.sleep(0.5)
    assert crew.runs([running, *waiting]) == dict.fromkeys([running, *waiting], 1)


@feature("shutdown_idle")
def test_an_idle_worker_has_ended_within_two_seconds(hire: Hire) -> None:
    crew = hire(options=OPTIONS)
    (worker,) = crew.start("one")
    assert crew.send("add", 1, 1).get(timeout=20 * PATIENCE) == 2
    assert worker.stop() < 2.0 * PATIENCE
    assert worker.process.returncode == 0


@feature("shutdown")
def test_a_warm_shutdown_in_the_middle_of_much_work_repeats_and_loses_nothing(hire: Hire) -> None:
    crew = hire(options=OPTIONS)
    first, second = crew.start("one", "two")
    sent = [crew.send("late_nap", 0.01, ignore_result=True).id for _ in range(300)]
    crew.until(lambda: sum(bool(crew.of(id, "ended")) for id in sent) >= 60, 20, "tasks do not run")
    took = first.stop()
    crew.ended(*sent, timeout=30)
    time.sleep(LEASE / 2)
    repeated = [id for id, runs in crew.runs(sent).items() if runs != 1]
    assert not repeated, f"{repeated}, stopped in {took:.1f} s"
    assert second.running


@feature("shutdown")
@pytest.mark.parametrize(("name", "size"), [("nap", 0), ("late_nap", 0), ("size", 500_000)])
def test_what_a_process_was_given_and_has_not_begun_runs_there_and_nowhere_else(
    hire: Hire, name: str, size: int
) -> None:
    crew = hire(options=OPTIONS)
    (first,) = crew.start("one", concurrency=1)
    assert crew.send("add", 1, 1).get(timeout=20 * PATIENCE) == 2
    nodes = crew.app.control.inspect([first.name], timeout=5 * PATIENCE, limit=1)
    crew.until(lambda: nodes.active() == {first.name: []}, 10, "its process has not said that it is done")
    (child,) = first.children()
    os.kill(child, signal.SIGSTOP)
    task = crew.send(name, *(["x" * size] if size else ())).id  # what is large goes through the pipe in parts
    crew.until(lambda: crew.of(task, "received"), 10, "it is not received")
    time.sleep(0.3)  # the worker writes it to its process in the next turn of its loop
    first.send(signal.SIGTERM)
    crew.until(lambda: any(entry.what == "stopping" for entry in crew.journal.entries), 10, "it does not stop")
    crew.start("two", concurrency=1)
    os.kill(child, signal.SIGCONT)
    assert first.wait() < 25, "its process waited for somebody to hear what it had done"
    assert [entry.by for entry in crew.ended(task)] == ["one@test"]
    assert crew.send("add", 1, 1).get(timeout=20 * PATIENCE) == 2  # what was given back came before this
    time.sleep(LEASE / 2)
    assert crew.runs([task]) == {task: 1}


def knows(crew: Crew, worker: Worker) -> None:
    """Wait until *worker* has heard that its task began: a cold shutdown of Celery forgets, and waits for, one that it has not."""
    nodes = crew.app.control.inspect([worker.name], timeout=5 * PATIENCE, limit=1)
    crew.until(lambda: any((nodes.active() or {}).values()), 10, "it has not heard that its task began")


@feature("shutdown_cold")
def test_a_cold_shutdown_gives_late_tasks_that_run_to_others(hire: Hire, gate: Path) -> None:
    crew = hire(options=OPTIONS)
    (first,) = crew.start("one", concurrency=1)
    result = crew.send("late_until", str(gate))
    waiting = [crew.send("late_nap").id for _ in range(3)]
    crew.began(result.id, timeout=20)
    knows(crew, first)
    first.send(signal.SIGQUIT)
    first.wait()
    crew.start("two", concurrency=1)
    assert crew.began(result.id, count=2, timeout=LEASE + 10)[1].by == "two@test"
    gate.touch()
    assert result.get(timeout=20 * PATIENCE) == "two@test"
    crew.ended(*waiting, timeout=20)
    assert crew.runs([result.id, *waiting]) == {result.id: 2} | dict.fromkeys(waiting, 1)


@feature("shutdown_cold")
def test_a_soft_shutdown_waits_for_what_runs(hire: Hire) -> None:
    crew = hire(options=OPTIONS, worker_soft_shutdown_timeout=8)
    (first,) = crew.start("one", concurrency=1)
    result = crew.send("late_nap", 3)
    crew.began(result.id, timeout=20)
    knows(crew, first)
    first.send(signal.SIGQUIT)
    first.wait(30)
    assert [entry.state for entry in crew.of(result.id, "ended")] == ["SUCCESS"]
    crew.start("two")
    assert crew.send("add", 1, 1).get(timeout=20 * PATIENCE) == 2
    time.sleep(LEASE + 1)
    assert crew.runs([result.id]) == {result.id: 1}


@feature("shutdown_cold")
def test_a_soft_shutdown_gives_to_others_what_takes_too_long(hire: Hire, gate: Path) -> None:
    crew = hire(options=OPTIONS, worker_soft_shutdown_timeout=1)
    (first,) = crew.start("one", concurrency=1)
    result = crew.send("late_until", str(gate))
    crew.began(result.id, timeout=20)
    knows(crew, first)
    first.send(signal.SIGQUIT)
    first.wait()
    crew.start("two")
    assert crew.began(result.id, count=2, timeout=LEASE + 10)[1].by == "two@test"
    gate.touch()
    crew.until(lambda: result.state == "SUCCESS", 20, lambda: f"state {result.state}")


@feature("shutdown", "inspect")
def test_a_worker_that_is_told_to_from_far_away_ends(hire: Hire) -> None:
    crew = hire(options=OPTIONS)
    first, second = crew.start("one", "two")
    crew.app.control.shutdown(destination=["one@test"])
    first.wait()
    assert second.running
    assert crew.send("add", 1, 1).get(timeout=20 * PATIENCE) == 2


def test_a_worker_leaves_no_process_behind(hire: Hire) -> None:
    crew: Crew = hire(options=OPTIONS)
    (worker,) = crew.start("one")
    children = worker.children()
    assert len(children) >= 2
    worker.stop()
    crew.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), 5, f"{children} are left")
