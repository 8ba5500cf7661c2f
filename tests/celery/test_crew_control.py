"""Remote control and events: every worker answers, and does what it is told."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from .journal import now
from .workers import PATIENCE, ROOT, Crew

feature = pytest.mark.feature
NODES = {"one@test", "two@test", "three@test"}


def inspect(crew: Crew, *nodes: str) -> Any:
    """Return what asks *nodes*, or all, and waits no longer than for all answers."""
    wanted = list(nodes) or None
    return crew.app.control.inspect(destination=wanted, timeout=10 * PATIENCE, limit=len(nodes or NODES))


def seen(crew: Crew, ask: Callable[[], dict[str, list[Any]]], *ids: str) -> dict[str, list[Any]]:
    """Return the answer to *ask* when all of *ids* are in it."""
    answer: dict[str, list[Any]] = {}

    def there() -> bool:
        nonlocal answer
        answer = ask() or {}
        return all(id in str(answer) for id in ids)

    crew.until(there, 15, lambda: f"{ids} are not in {answer}")
    return answer


@feature("inspect")
def test_every_worker_answers_a_ping(crew: Crew) -> None:
    assert inspect(crew).ping() == {node: {"ok": "pong"} for node in NODES}


@feature("inspect")
def test_twenty_pings_at_a_time_miss_no_answer(crew: Crew) -> None:
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: inspect(crew).ping(), range(20)))
    assert [set(answer or ()) for answer in answers] == [NODES] * 20


@feature("inspect")
def test_the_command_inspect_ping_finds_all_nodes(crew: Crew) -> None:
    done = crew.command("inspect", "ping", "--timeout", str(3 * PATIENCE))
    assert done.returncode == 0, done.stderr
    assert "3 nodes online" in done.stdout


@feature("inspect")
def test_one_worker_is_asked_by_its_name(crew: Crew) -> None:
    assert inspect(crew, "two@test").ping() == {"two@test": {"ok": "pong"}}


@feature("inspect")
def test_workers_tell_their_queues_tasks_and_statistics(crew: Crew) -> None:
    asked = inspect(crew)
    queues = asked.active_queues()
    assert {node: [queue["name"] for queue in queues[node]] for node in queues} == {node: ["jobs"] for node in NODES}
    assert all("add" in " ".join(names) for names in asked.registered().values())
    stats = asked.stats()
    assert set(stats) == NODES
    assert {each["pid"] for each in stats.values()} == {worker.pid for worker in crew.workers}


@feature("inspect")
def test_what_runs_is_seen_as_active(crew: Crew, gate: Path) -> None:
    result = crew.send("until", str(gate))
    (began,) = crew.began(result.id)
    answer = seen(crew, inspect(crew).active, result.id)
    assert [task["id"] for task in answer[began.by]] == [result.id]
    assert result.id in str(inspect(crew).query_task(result.id)[began.by])
    gate.touch()
    assert result.get(timeout=30) == began.by


@feature("inspect")
def test_what_waits_for_its_time_is_seen_as_scheduled(crew: Crew) -> None:
    result = crew.send("add", 1, 1, countdown=30)
    answer = seen(crew, inspect(crew).scheduled, result.id)
    (node,) = [node for node in answer if result.id in str(answer[node])]
    assert result.id in str(inspect(crew).query_task(result.id)[node])
    crew.app.control.revoke(result.id)
    assert crew.runs([result.id]) == {result.id: 0}


@feature("inspect")
def test_what_was_fetched_and_does_not_run_yet_is_seen_as_reserved(crew: Crew, gate: Path) -> None:
    sent = [crew.send("until", str(gate)).id for _ in range(30)]
    crew.until(lambda: sum(map(bool, crew.runs(sent).values())) == 6, 20, "six do not run at a time")

    def fetched() -> int:
        return sum(task["id"] in sent for tasks in (inspect(crew).reserved() or {}).values() for task in tasks)

    crew.until(lambda: fetched() == 24, 20, lambda: f"not the other 24 are reserved, but {fetched()}")
    gate.touch()
    crew.ended(*sent, timeout=30)
    assert set(crew.runs(sent).values()) == {1}


@feature("revoke")
def test_a_revoked_task_does_not_run(crew: Crew) -> None:
    result = crew.send("add", 1, 1, countdown=2)
    crew.app.control.revoke(result.id, reply=True, timeout=5 * PATIENCE, limit=3)
    crew.until(lambda: result.state == "REVOKED", 30, lambda: f"state {result.state}")
    assert crew.runs([result.id]) == {result.id: 0}


@feature("revoke_terminate", pool="prefork")
def test_a_running_task_is_terminated(crew: Crew, gate: Path) -> None:
    result = crew.send("until", str(gate))
    crew.began(result.id)
    crew.app.control.revoke(result.id, terminate=True)
    crew.until(lambda: result.state == "REVOKED", 30, lambda: f"state {result.state}")
    assert "SUCCESS" not in {entry.state for entry in crew.of(result.id, "ended")}
    assert crew.send("add", 1, 1).get(timeout=30) == 2


@feature("inspect")
def test_a_rate_limit_holds_until_it_is_lifted(crew: Crew) -> None:
    def limit(rate: str) -> None:
        told = crew.app.control.rate_limit("slow_rate", rate, reply=True, timeout=10 * PATIENCE, limit=3)
        assert len(told) == 3, told

    limit("2/s")
    sent = [crew.send("slow_rate", 1, number).id for number in range(24)]
    starts: dict[str, list[float]] = defaultdict(list)
    for entry in crew.ended(*sent[:12], timeout=30):
        starts[entry.by].append(entry.at)
    for times in starts.values():
        times.sort()
        assert all(later - earlier > 0.3 for earlier, later in itertools.pairwise(times[1:])), starts
    limit("0")
    crew.ended(*sent, timeout=30)
    assert set(crew.runs(sent).values()) == {1}


@feature("queues", "names")
def test_workers_begin_and_end_to_consume_a_queue(crew: Crew) -> None:
    name = "w1@host/ä b.c"
    waiting = crew.send("add", 2, 2, queue=name)
    told = crew.app.control.add_consumer(name, destination=["one@test"], reply=True, timeout=10 * PATIENCE, limit=1)
    assert "ok" in told[0]["one@test"]
    assert waiting.get(timeout=30) == 4
    assert crew.began(waiting.id)[0].by == "one@test"
    told = crew.app.control.cancel_consumer(name, destination=["one@test"], reply=True, timeout=10 * PATIENCE, limit=1)
    assert "ok" in told[0]["one@test"]
    later = crew.send("add", 3, 3, queue=name)
    assert crew.send("add", 1, 1).get(timeout=30) == 2
    assert crew.of(later.id, "received") == []
    assert crew.app.control.purge() >= 0
    with crew.app.connection_for_write() as connection:
        assert connection.default_channel.queue_purge(name) == 1


@feature("purge")
def test_a_purge_removes_what_waits_and_tells_how_much(crew: Crew) -> None:
    for number in range(5):
        crew.send("add", 1, number, queue="unread")
    with crew.app.connection_for_write() as connection:
        assert connection.default_channel.queue_declare("unread").message_count == 5
        done = crew.command("purge", "-f", "-Q", "unread")
        assert "Purged 5 messages from 1 known task queue" in done.stdout, done
        assert connection.default_channel.queue_declare("unread").message_count == 0


@contextmanager
def listening(crew: Crew) -> Iterator[list[dict[str, Any]]]:
    """Collect events while the block runs; when it begins, they are heard."""
    heard: list[dict[str, Any]] = []
    ready, done = threading.Event(), threading.Event()

    def listen() -> None:
        with crew.app.connection_for_read() as given:
            receiver = crew.app.events.Receiver(given, handlers={"*": heard.append})
            with receiver.consumer_context() as (connection, channel, _):
                receiver.wakeup_workers(channel=channel)
                ready.set()
                while not done.is_set():
                    with suppress(TimeoutError):
                        connection.drain_events(timeout=0.2)

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        assert ready.wait(20 * PATIENCE)
        yield heard
    finally:
        done.set()
        thread.join()


@feature("events")
def test_events_tell_what_becomes_of_a_task(crew: Crew) -> None:
    with listening(crew) as heard:
        result = crew.send("add", 1, 1)
        failed = crew.send("fail")

        def types(id: str) -> list[str]:
            return [event["type"] for event in heard if event.get("uuid") == id]

        crew.until(lambda: "task-succeeded" in types(result.id), 20, lambda: f"heard {heard}")
        crew.until(lambda: "task-failed" in types(failed.id), 20, lambda: f"heard {heard}")
        assert types(result.id) == ["task-received", "task-started", "task-succeeded"]


@feature("events")
def test_events_come_from_every_worker(crew: Crew) -> None:
    with listening(crew) as heard:
        crew.until(
            lambda: {event["hostname"] for event in heard if event["type"] == "worker-heartbeat"} >= NODES,
            20,
            lambda: f"heard {heard}",
        )


@feature("events")
def test_the_command_events_prints_them(crew: Crew) -> None:
    command = [sys.executable, "-m", "celery", "-A", "tests.celery.apps.main", "events", "--dump"]
    environment = crew._environment({}, {"PYTHONUNBUFFERED": "1"})
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        try:
            lines = iter(watching.stdout.readline, "")
            end = now() + 30 * PATIENCE
            result = None
            for line in lines:
                assert now() < end
                if result is None and "heartbeat" in line:
                    result = crew.send("add", 1, 1)
                if result is not None and result.id in line and "task succeeded" in line.replace("-", " "):
                    break
            else:
                raise AssertionError("celery events has ended")
        finally:
            watching.kill()


@feature("secrets")
def test_passwords_are_in_no_report(crew: Crew) -> None:
    secrets = re.findall(r":([^:@/]{16,})@", str(crew.settings))
    assert secrets
    asked = inspect(crew)
    told = {"conf": asked.conf(), "stats": asked.stats(), "report": asked.report(), "command": crew.command("report")}
    told |= {worker.name: worker.text() for worker in crew.workers}
    leaks = [where for where, what in told.items() for secret in secrets if secret in str(what)]
    assert not leaks
