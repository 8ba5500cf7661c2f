"""The conformance suite's own frame: what it must notice, what it leaves out, and the table that it writes."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from brokerkit.driver import Capabilities
from brokerkit.testing.conformance import Harness, Kind, Suite, _runner, needs, promises, restarts
from tests.conformance.harness import MemoryHarness

NOT_IN_THIS_RELEASE = {"D8", "T3", "U4"}


@pytest.fixture(autouse=True)
def _no_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what fails here on purpose out of the results of the run that this one is part of."""
    monkeypatch.delenv("BROKERKIT_RESULTS", raising=False)


class OnlyTopics(MemoryHarness):
    queues = None  # type: ignore[assignment]


class NoDelay(MemoryHarness):
    queues = Capabilities(backend="memory", shared=True)


kept: list[object] = []


class Sample(Suite):
    async def test_good(self, system: Harness, kind: Kind) -> None:
        async with system.connect() as broker:
            await system.publish(broker, system.address(kind), ["a"])

    async def test_task(self, system: Harness) -> None:
        kept.append(asyncio.ensure_future(asyncio.sleep(1)))

    async def test_thread(self, system: Harness) -> None:
        over = threading.Event()
        kept.append(over)
        threading.Thread(target=over.wait, daemon=True).start()

    async def test_socket(self, system: Harness) -> None:
        kept.append(socket.socket())

    async def test_unseen_error(self, system: Harness) -> None:
        async def fail() -> None:
            raise RuntimeError("nobody looks")

        task = asyncio.ensure_future(fail())
        del task
        await asyncio.sleep(1)

    async def test_hangs(self, system: Harness) -> None:
        await asyncio.get_running_loop().create_future()

    async def test_fails(self, system: Harness, kind: Kind) -> None:
        raise AssertionError("as it should")

    @needs("queue.delay")
    async def test_delay(self, system: Harness) -> None:
        return None

    @needs("queue", "not queue.delay")
    async def test_no_delay(self, system: Harness) -> None:
        return None

    @needs("shared")
    async def test_shared(self, system: Harness, kind: Kind) -> None:
        return None

    @needs("topic")
    async def test_topic(self, system: Harness) -> None:
        return None

    @needs("topic", "queue")
    async def test_both(self, system: Harness) -> None:
        return None

    async def test_neither(self, system: Harness) -> None:
        assert not system.alone

    @restarts
    async def test_restart(self, system: Harness) -> None:
        assert system.alone


def plain(name: str, harness: type[Harness] = MemoryHarness) -> Callable[..., None] | None:
    return _runner._plain(harness, Sample, name, getattr(Sample, name))


def run(name: str, kind: Kind | None = None, *, seed: int = 2) -> None:
    test = plain(name)
    assert test is not None
    test(None, kind, seed)


@pytest.mark.parametrize("kind", ["topic", "queue"])
def test_a_good_test_passes(kind: Kind) -> None:
    run("test_good", kind)


@pytest.mark.parametrize("name", ["test_neither", "test_restart"])
def test_a_harness_is_told_of_a_restart_before_it_opens(name: str) -> None:
    run(name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("test_task", "tasks left running"),
        ("test_thread", "threads left running"),
        ("test_socket", "sockets left open"),
        ("test_unseen_error", "nobody looks"),
    ],
)
def test_what_is_left_behind_fails_the_test(name: str, text: str) -> None:
    try:
        with pytest.raises(AssertionError, match=text):
            run(name)
    finally:
        for item in kept:
            if isinstance(item, threading.Event):
                item.set()
            elif isinstance(item, socket.socket):
                item.close()
        kept.clear()


def test_a_test_that_hangs_fails() -> None:
    with pytest.raises(Exception) as caught:
        run("test_hangs")
    assert type(caught.value).__name__ in {"TimeoutError", "Deadlock"}


def test_a_failure_tells_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "PYTEST_CURRENT_TEST", "tests/conformance/test_memory.py::TestSample::test_fails[queue-2] (call)"
    )
    with pytest.raises(AssertionError, match="as it should") as caught:
        run("test_fails", "queue")
    (note,) = caught.value.__notes__
    assert note.endswith("BROKERKIT_SEED=2 python -m pytest 'tests/conformance/test_memory.py::TestSample::test_fails'")


@pytest.mark.parametrize(
    ("name", "memory", "topics", "no_delay"),
    [
        ("test_good", ["topic", "queue"], ["topic"], ["topic", "queue"]),
        ("test_shared", ["queue"], [], ["queue"]),
        ("test_delay", [None], [], []),
        ("test_no_delay", [], [], [None]),
        ("test_topic", [None], [None], [None]),
        ("test_both", [None], [], [None]),
        ("test_neither", [None], [None], [None]),
    ],
)
def test_a_test_is_made_where_its_needs_are_claimed(
    name: str, memory: list[object], topics: list[object], no_delay: list[object]
) -> None:
    for harness, wanted in ((MemoryHarness, memory), (OnlyTopics, topics), (NoDelay, no_delay)):
        assert _runner._kinds(harness, Sample, getattr(Sample, name)) == wanted
        assert (plain(name, harness) is None) == (not wanted)


def test_the_number_of_seeds_can_be_raised_and_one_be_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BROKERKIT_SEEDS", raising=False)
    monkeypatch.delenv("BROKERKIT_SEED", raising=False)
    assert _runner._seeds(Sample.test_good) == [0, 1, 2]
    monkeypatch.setenv("BROKERKIT_SEEDS", "5")
    assert _runner._seeds(Sample.test_good) == [0, 1, 2, 3, 4]
    monkeypatch.setenv("BROKERKIT_SEED", "17")
    assert _runner._seeds(Sample.test_good) == [17]


def suite() -> dict[str, Any]:
    return {
        f"{group.__name__}.{name}": test for group in _runner.discover() for name, test in _runner.tests(group).items()
    }


def test_every_property_of_the_list_has_a_test() -> None:
    """Letters and numbers are those of the list of properties: P publish, S subscribe, G groups, O order, A ack, ..."""
    counts = {"P": 8, "S": 7, "G": 8, "O": 7, "A": 11, "L": 10, "T": 9, "D": 9, "Q": 8, "U": 6, "X": 4, "Y": 5}
    counts |= {"B": 5, "K": 6, "C": 5, "Z": 7, "N": 8, "F": 12, "W": 5, "V": 4, "E": 6}
    wanted = {f"{letter}{n}" for letter, count in counts.items() for n in range(1, count + 1)} - NOT_IN_THIS_RELEASE
    labels = {
        label
        for test in suite().values()
        for label in re.findall(r"\b[A-Z]\d+\b", (test.__doc__ or "").partition(": ")[0])
    }
    here = {letter + str(n) for letter, count in counts.items() for n in range(1, count + 1) if letter in "PSGOALTDQ"}
    assert wanted & here <= labels, sorted(wanted & here - labels)


def test_every_test_says_in_one_line_what_must_hold() -> None:
    for name, test in suite().items():
        doc = test.__doc__ or ""
        assert doc.endswith("."), name
        assert "\n" not in doc, name


def test_the_promise_table_names_tests_that_exist() -> None:
    named = {test for promise in promises.PROMISES for test in promise.tests}
    assert named <= set(suite()), sorted(named - set(suite()))
    for promise in promises.PROMISES:
        assert promise.tests or promise.title == "exactly once"
        assert set(promise.words) == {column.title for column in promises.COLUMNS}


EVERY = ["topic.key_order", "topic.replay", "queue.delay", "queue.priority", "queue.ttl", "queue.dedup"]


def write(path: Path, *, leave_out: str = "", fail: str = "", claims: str = "") -> Path:
    lines = [
        {
            "column": "memory",
            "test": test,
            "kinds": ["topic", "queue"],
            "claims": [claim for claim in EVERY if claim != claims],
            "seed": 0,
            "ok": test != fail,
            "error": "broken" if test == fail else "",
            "took": 0.0,
        }
        for promise in promises.PROMISES
        for test in promise.tests
        if test != leave_out
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_the_table_is_written_between_the_markers_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{promises.BEGIN}\nold\n{promises.END}\nafter\n", encoding="utf-8")
    results = write(tmp_path / "results.jsonl")
    arguments = [str(results), str(readme)]
    assert promises.main([*arguments, "--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert promises.main(arguments) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| stale settle | no effect |" in text
    assert "old" not in text
    assert promises.main([*arguments, "--check"]) == 0


TEST = "Acknowledging.test_a_stale_acknowledgement_has_no_effect"


def test_a_promise_without_its_proof_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(promises.Stale, match=rf"{TEST}.* did not run"):
        promises.table(write(tmp_path / "a", leave_out=TEST))
    with pytest.raises(promises.Stale, match=rf"{TEST}.*broken"):
        promises.table(write(tmp_path / "b", fail=TEST))
    with pytest.raises(promises.Stale, match="no run"):
        empty = tmp_path / "c"
        empty.write_text("", encoding="utf-8")
        promises.table(empty)


def test_what_is_not_claimed_is_a_dash(tmp_path: Path) -> None:
    text = promises.table(write(tmp_path / "a", claims="queue.ttl"))
    assert f"| ttl (queues) | {promises.NOT_APPLICABLE} |" in text
    assert "| priority (queues) | yes |" in text


def test_a_system_without_queues_is_not_asked_about_them(tmp_path: Path) -> None:
    """But what it is asked has to have run."""
    column = next(column for column in promises.COLUMNS if column.kinds == ("topic",))
    claims = [claim for claim in EVERY if claim.startswith("topic.")]
    asked = [test for promise in promises.PROMISES for test in promise.tests if promises.applies(test, column, claims)]
    assert "Groups.test_members_share_without_loss_and_without_repeats" in asked
    assert "Groups.test_every_consumer_gets_a_share" not in asked
    assert not any(test.startswith(("Expiring", "Delaying", "Deduplicating")) for test in asked)
    for left_out in ("", asked[0]):
        lines = [
            {"column": harness, "test": test, "kinds": ["topic"], "claims": claims, "seed": 0, "ok": True}
            for harness in column.harnesses
            for test in asked
            if test != left_out
        ]
        results = tmp_path / "results.jsonl"
        results.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
        if left_out:
            with pytest.raises(promises.Stale, match=rf"{left_out}.* did not run"):
                promises.table(results)
        else:
            text = promises.table(results)
            assert "| order per key (topics) | yes |" in text
            assert f"| ttl (queues) | {promises.NOT_APPLICABLE} |" in text


def test_a_column_of_several_systems_needs_a_run_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {column.title: column for column in promises.COLUMNS}
    column = promises.Column("Kafka queue (share)", ("kafka 4.3", "kafka 4.2"), ("queue",))
    monkeypatch.setattr(promises, "COLUMNS", tuple((columns | {column.title: column}).values()))
    claims = ["queue.delay", "queue.ttl", "queue.shared"]
    asked = [test for promise in promises.PROMISES for test in promise.tests if promises.applies(test, column, claims)]
    assert "Groups.test_every_consumer_gets_a_share" in asked
    assert "Capabilities.test_more_consumers_than_can_take_part_are_refused" not in asked
    lines = {
        harness: [
            {"column": harness, "test": test, "kinds": ["queue"], "claims": claims, "seed": 0, "ok": True}
            for test in asked
        ]
        for harness in column.harnesses
    }
    results = tmp_path / "results.jsonl"
    first, second = column.harnesses
    results.write_text("\n".join(json.dumps(line) for line in lines[first]), encoding="utf-8")
    with pytest.raises(promises.Stale, match="no run"):
        promises.table(results)
    results.write_text("\n".join(json.dumps(line) for line in lines[first] + lines[second][1:]), encoding="utf-8")
    with pytest.raises(promises.Stale, match="did not run"):
        promises.table(results)
    results.write_text("\n".join(json.dumps(line) for line in lines[first] + lines[second]), encoding="utf-8")
    assert f"|  | {column.title} |" in promises.table(results)


def test_a_run_appends_its_outcomes_to_those_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("of another process\n", encoding="utf-8")
    monkeypatch.setenv("BROKERKIT_RESULTS", str(path))
    run("test_good", "queue")
    with pytest.raises(AssertionError):
        run("test_fails", "topic")
    run("test_both")
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    assert first == "of another process"
    lines = [json.loads(line) for line in rest]
    assert [(line["test"], line["kinds"], line["ok"]) for line in lines] == [
        ("Sample.test_good", ["queue"], True),
        ("Sample.test_fails", ["topic"], False),
        ("Sample.test_both", ["topic", "queue"], True),
    ]
    assert "as it should" in lines[1]["error"]
    assert "queue.dedup" in lines[0]["claims"]


def test_of_a_test_that_ran_twice_the_last_run_counts(tmp_path: Path) -> None:
    line = {"column": "memory", "test": "A.test", "kinds": ["queue"], "claims": [], "seed": 0, "error": ""}
    results = tmp_path / "results.jsonl"
    results.write_text("\n".join(json.dumps(line | {"ok": ok}) for ok in (False, True)), encoding="utf-8")
    assert [one["ok"] for one in promises.read(results)["memory"]["A.test"]] == [True]
