"""The harness on a real Redis: a program that loses or doubles a message shows no figure."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..frame import Row, Work, measure
from ..on_servers.inside import inside
from ..on_servers.ours import OurQueue, OurTopic
from ..table import judge
from . import arq, ours, peers, raw, toys, wire
from .plan import plan
from .server import clean, serve

PUBLISH = Work(name="publish", title="", backend="redis", stores=True, handlers=100, keys=200)
MANY = Work(name="many", title="", backend="redis", stores=True, batch=100, keys=200)
CONSUME = Work(name="consume", title="", backend="redis", handlers=100, keys=200)
KEYED = Work(name="keyed", title="", backend="redis", handlers=100, keys=200, keyed=True)
LATENCY = Work(name="latency", title="", backend="redis", metric="latency", handlers=100, keys=200)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serve() as url:
        yield url


@pytest.fixture
def url(server: str) -> str:
    clean(server)
    return server


HONEST: list[tuple[type[Row], Work]] = [
    *(
        (row, work)
        for row in (raw.Raw, raw.RawTyped, raw.RawList, wire.HiredisSocket)
        for work in (PUBLISH, MANY, CONSUME)
    ),
    *((row, work) for row in (raw.RawBytes, raw.RawListTyped, raw.RawListBytes) for work in (PUBLISH, MANY)),
    (raw.RawBatchAck, CONSUME),
    *((row, work) for row in (OurQueue, OurTopic) for work in (PUBLISH, MANY, CONSUME)),
    *((row, work) for row in (ours.OurQueueBytes, ours.OurTopicBytes) for work in (PUBLISH, MANY)),
    (ours.OurQueueDefault, CONSUME),
    (OurTopic, KEYED),
]


@pytest.mark.parametrize("row, work", HONEST, ids=lambda one: one.name)
def test_an_honest_row_has_figures(row: type[Row], work: Work, url: str) -> None:
    figures = inside(row, work, url)
    assert figures.flaw() is None
    assert figures.handled == 400
    assert figures.rate > 0


MISBEHAVING: list[tuple[type[Row], Work, str]] = [
    (toys.RawLoses, PUBLISH, "1 lost of 400"),
    (toys.RawDoubles, PUBLISH, "1 double of 400"),
    (toys.RawKeeps, PUBLISH, "1 lost, 1 double of 400"),
    (toys.RawKeeps, MANY, "1 lost, 1 double of 400"),
    (toys.RawForeign, PUBLISH, "1 never published of 400"),
    (toys.ListLoses, MANY, "1 lost of 400"),
    (toys.QueueLoses, PUBLISH, "1 lost of 400"),
    (toys.QueueDoubles, MANY, "1 double of 400"),
    (toys.TopicKeeps, PUBLISH, "1 lost, 1 double of 400"),
    (toys.Unacknowledged, CONSUME, "400 unsettled of 400"),
    (toys.HandlesTwice, CONSUME, "1 double of 400"),
    (toys.HandlesLate, CONSUME, "1 double of 400"),
    (toys.QueueSwallows, CONSUME, "1 lost of 400"),
]


@pytest.mark.parametrize("row, work, flaw", MISBEHAVING)
def test_a_row_that_misbehaves_has_a_flaw(row: type[Row], work: Work, flaw: str, url: str) -> None:
    assert inside(row, work, url).flaw() == flaw


def test_a_row_that_handles_too_few_is_given_up(url: str) -> None:
    assert inside(toys.Skips, CONSUME, url, limit=5.0).flaw() == "not done after 5 s, 399 of 400 handled"


@pytest.mark.parametrize("row", [ours.ShallowQueue, ours.ShallowTopic])
@pytest.mark.parametrize("work", [CONSUME, PUBLISH], ids=lambda one: one.name)
def test_what_stays_behind_is_counted_too(row: type[Row], work: Work, url: str) -> None:
    figures = inside(row, work, url)
    assert figures.flaw() is None
    assert figures.behind == 10_000
    if work.stores:
        assert figures.handled == 10_400
    else:
        assert figures.handled >= 400
        assert figures.handled + figures.left == 10_400


@pytest.mark.parametrize("row", [raw.Raw, OurQueue])
def test_latency_is_that_between_two_processes(row: type[Row], url: str) -> None:
    figures = measure(row, LATENCY, 60, url)
    assert figures.flaw() is None
    assert figures.p50 is not None
    assert figures.p99 is not None
    assert 0 < figures.p50 <= figures.p99


def test_each_goal_is_between_rows_of_its_work() -> None:
    from ..frame import Results

    works = plan()
    results = Results(works)
    for work, rows in works:
        names = [row.name for row in rows]
        assert len(set(names)) == len(names)
        assert work.yardstick in names
        for goal in work.goals:
            assert {goal.row, goal.than} <= set(names)
            assert judge(results, work, goal)[0] is False  # what was not measured is not reached


def test_all_peers_are_in_the_table() -> None:
    shown = {row.name for _, rows in plan() for row in rows}
    assert {peer.name for peer in (peers.FastStreamStream, peers.TaskiqStream, peers.Streaq)} <= shown
    assert {"arq", "arq-default", "raw", "hiredis-socket"} <= shown


def test_an_environment_that_cannot_be_made_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="NOT COMPARED: an environment with arq cannot be made"):
        arq.interpreter.__wrapped__()
