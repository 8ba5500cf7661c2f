"""What becomes of tasks when the processes that have them are killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from .checker import Harm, check, ours
from .conftest import Hire
from .journal import now
from .systems import LEASE
from .workers import PATIENCE, Crew, Worker

feature = pytest.mark.feature
OPTIONS = {"lease": LEASE}
BACK = LEASE + 5.0
"""Seconds in which what a dead worker had must run elsewhere."""


def kill(worker: Worker) -> Harm:
    begin = now()
    worker.kill()
    return Harm(what="kill", begin=begin, end=now(), pid=worker.pid)


def harmless(crew: Crew, ids: list[str], *harm: Harm, late: bool = True) -> None:
    """Check that nothing is lost, and that only what was done explains repeats."""
    crew.journal.more()
    verdict = check(ours(crew.journal.entries, ids), dict.fromkeys(ids, True), harm, late=late)
    assert not verdict.findings, crew.report(f"{verdict.summary()}: {verdict.findings[:5]}")


@feature("acks_late_kill")
def test_late_tasks_of_a_killed_worker_run_again_within_seconds(hire: Hire) -> None:
    crew = hire(options=OPTIONS)
    crew.start("one", "two", "three")
    sent = [crew.send("late_nap", 0.1, ignore_result=True).id for _ in range(90)]
    crew.until(lambda: sum(bool(crew.of(id, "began")) for id in sent) >= 15, 20, "tasks do not begin")
    harm = kill(crew.workers[0])
    crew.ended(*sent, timeout=BACK + 5)
    last = max(crew.of(id, "ended")[-1].at for id in sent)
    assert last - harm.end < BACK * PATIENCE
    harmless(crew, sent, harm)


@feature("early_ack_kill")
def test_a_task_that_had_begun_200_ms_before_its_worker_was_killed_never_runs_again(hire: Hire, gate: Path) -> None:
    crew = hire(options=OPTIONS)
    (first,) = crew.start("one", concurrency=4)
    sent = [crew.send("until", str(gate)).id for _ in range(4)]
    begins = [crew.began(id, timeout=20)[0].at for id in sent]
    time.sleep(max(0.0, max(begins) + 0.2 - now()))
    kill(first)
    crew.start("two", concurrency=4)
    behind = [crew.send("add", 1, number).id for number in range(20)]
    crew.ended(*behind, timeout=BACK)
    time.sleep(LEASE + 1.5)  # by then the broker would have given them to the other
    assert crew.runs(sent) == dict.fromkeys(sent, 1)


@feature("acks_late_kill")
def test_what_a_killed_worker_had_only_fetched_runs_elsewhere_within_seconds(hire: Hire, gate: Path) -> None:
    crew = hire(options=OPTIONS)
    (first,) = crew.start("one", concurrency=1)
    sent = [crew.send("until", str(gate)).id for _ in range(5)]
    crew.until(lambda: all(crew.of(id, "received") for id in sent), 20, "not everything is fetched")
    begun = {id for id, count in crew.runs(sent).items() if count}
    assert len(begun) == 1
    time.sleep(0.3)
    harm = kill(first)
    gate.touch()
    crew.start("two", concurrency=1)
    crew.ended(*set(sent) - begun, timeout=BACK)
    harmless(crew, sent, harm, late=False)


def test_what_a_worker_had_not_begun_when_it_stood_still_and_others_have_done_is_not_begun(
    hire: Hire, gate: Path
) -> None:
    crew = hire(options=OPTIONS, worker_prefetch_multiplier=4)
    (first,) = crew.start("one", pool="solo")
    running = crew.send("late_until", str(gate)).id
    crew.began(running, timeout=20)
    waiting = [crew.send("late_nap").id for _ in range(3)]
    time.sleep(0.5)  # it has them by then, and looks at none
    first.freeze()
    crew.start("two", pool="threads", concurrency=8)
    crew.ended(*waiting, timeout=BACK)
    first.thaw()
    time.sleep(1.5)  # it has found out by then, and fetches anew
    gate.touch()
    crew.ended(running, count=2, timeout=10)
    time.sleep(0.5)
    assert crew.runs(waiting) == dict.fromkeys(waiting, 1)


@feature("countdown_kill", "countdown_long")
def test_countdowns_of_a_killed_worker_run_elsewhere_in_time_and_none_is_early(hire: Hire) -> None:
    crew = hire(options=OPTIONS)
    (first,) = crew.start("one")
    countdown = 2 * LEASE + 1
    begin = now()
    sent = [crew.send("add", 1, number, countdown=countdown).id for number in range(20)]
    published = now()
    crew.until(lambda: all(crew.of(id, "received") for id in sent), 20, "not everything is fetched")
    harm = kill(first)
    crew.start("two", "three")
    ends = crew.ended(*sent, timeout=countdown + BACK)
    assert min(end.at for end in ends) >= begin + countdown - 0.1
    assert max(end.at for end in ends) < published + max(countdown, BACK) + 5 * PATIENCE
    harmless(crew, sent, harm)
    assert set(crew.runs(sent).values()) == {1}


@feature("countdown_long")
def test_a_countdown_longer_than_the_lease_runs_once_and_in_time(hire: Hire) -> None:
    crew = hire(options=OPTIONS)
    crew.start("one", "two")
    countdown = 3 * LEASE
    begin = now()
    sent = [crew.send("add", 1, number, countdown=countdown).id for number in range(50)]
    published = now()
    starts = [crew.of(end.id, "began")[0].at for end in crew.ended(*sent, timeout=countdown + 10)]
    assert min(starts) >= begin + countdown - 0.1
    assert max(starts) < published + countdown + 3 * PATIENCE
    time.sleep(LEASE)
    assert set(crew.runs(sent).values()) == {1}


@feature("countdown_long")
def test_a_task_longer_than_the_lease_runs_once(hire: Hire) -> None:
    crew = hire(options=OPTIONS)
    crew.start("one", "two")
    sent = [crew.send("late_nap", 2.5 * LEASE).id for _ in range(2)]
    crew.ended(*sent, timeout=2.5 * LEASE + 15)
    time.sleep(1)
    assert set(crew.runs(sent).values()) == {1}


@feature("lost_child")
def test_a_late_task_whose_process_is_killed_runs_again_at_once(hire: Hire) -> None:
    crew = hire(options=OPTIONS)
    crew.start("one")
    result = crew.send("die")
    assert result.get(timeout=20 * PATIENCE) == "lived"
    first, second = crew.of(result.id, "began")
    assert (first.again, second.again) == (False, True)
    assert second.at - first.at < 5 * PATIENCE
    assert crew.send("add", 1, 1).get(timeout=20 * PATIENCE) == 2


@feature("lost_child")
def test_a_task_whose_process_is_killed_does_not_run_again_if_it_does_not_ask_for_it(hire: Hire, gate: Path) -> None:
    crew = hire(options=OPTIONS)
    crew.start("one")
    result = crew.send("until", str(gate))
    (began,) = crew.began(result.id, timeout=20)
    os.kill(began.pid, signal.SIGKILL)
    crew.until(lambda: result.state == "FAILURE", 20, lambda: f"state {result.state}")
    assert crew.send("add", 1, 1).get(timeout=20 * PATIENCE) == 2
    time.sleep(1)
    assert crew.runs([result.id]) == {result.id: 1}


@feature("revoke_restart")
def test_a_revoke_of_a_waiting_task_holds_when_all_workers_were_restarted(hire: Hire) -> None:
    crew = hire(options=OPTIONS)
    first = crew.start("one", "two")
    sent = [crew.send("add", 1, number, countdown=9).id for number in range(4)]
    crew.until(lambda: all(crew.of(id, "received") for id in sent), 20, "not everything is fetched")
    crew.app.control.revoke(sent[0])
    crew.app.control.revoke(sent[1:3])
    for worker in first:
        worker.send(signal.SIGTERM)
    for worker in first:
        worker.wait()
    crew.start("three")
    crew.ended(sent[3], timeout=25)
    crew.until(lambda: all(crew.of(id, "revoked") for id in sent[:3]), 15, "the revoked are not dropped")
    assert crew.runs(sent) == {sent[0]: 0, sent[1]: 0, sent[2]: 0, sent[3]: 1}
