"""The harness on a real Kafka: a program that loses or doubles a message shows no figure."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from ...servers.kafka import shared_kafka
from ..frame import Results, Row, Work, measure
from ..on_servers.inside import inside
from ..table import judge
from . import limit, ours, peers, probes, raw, toys
from .plan import plan
from .server import PREFIX, connections, wire

PUBLISH = Work(name="publish", title="", backend="kafka", stores=True, handlers=100, keys=20)
KEYED = Work(name="keyed", title="", backend="kafka", stores=True, handlers=100, keyed=True, keys=20, partitions=3)
MANY = Work(name="many", title="", backend="kafka", stores=True, batch=100, keys=20)
PARTED = Work(name="parted", title="", backend="kafka", stores=True, batch=100, keyed=True, keys=20, partitions=3)
ONE = Work(name="one", title="", backend="kafka")
CONSUME = Work(name="consume", title="", backend="kafka", handlers=100, keyed=True, keys=20, partitions=3)
LATENCY = Work(name="latency", title="", backend="kafka", metric="latency", handlers=100)
QUEUE = Work(name="queue", title="", backend="kafka", handlers=100, partitions=2)


# Other processes of this run measure on the same broker.
OWN = f"{PREFIX}-{os.getpid()}-"
counter = itertools.count(1)


@pytest.fixture
def url() -> Iterator[str]:
    url = shared_kafka().url()
    yield url
    with wire(url) as admin:
        admin.delete([name for name in admin.cluster(None).topics if name.startswith(OWN)])


def entity() -> str:
    return f"{OWN}test-{next(counter)}"


HONEST: list[tuple[type[Row], Work]] = [
    *((raw.Raw, work) for work in (PUBLISH, KEYED, MANY, PARTED, ONE, CONSUME)),
    *((raw.RawTyped, work) for work in (KEYED, MANY, CONSUME)),
    *((ours.Ours, work) for work in (PUBLISH, KEYED, MANY, PARTED, ONE, CONSUME)),
    *((limit.Confluent, work) for work in (KEYED, MANY, ONE)),
    (raw.RawSafe, PUBLISH),
    (raw.RawSend, MANY),
    (raw.RawEach, ONE),
    (raw.RawAutomatic, ONE),
    (ours.OursDefault, CONSUME),
    *((row, QUEUE) for row in (ours.OurQueue, ours.OurQueueShort, ours.OurQueueDefault)),
]


@pytest.mark.parametrize("row, work", HONEST, ids=lambda one: one.name)
def test_an_honest_row_has_figures(row: type[Row], work: Work, url: str) -> None:
    figures = inside(row, work, url, entity=entity())
    assert figures.flaw() is None
    assert figures.handled == 400
    assert figures.rate > 0


MISBEHAVING: list[tuple[type[Row], Work, str]] = [
    (toys.RawLoses, PUBLISH, "1 lost of 400"),
    (toys.RawDoubles, KEYED, "1 double of 400"),
    (toys.RawKeeps, PUBLISH, "1 lost, 1 double of 400"),
    (toys.RawKeeps, MANY, "1 lost, 1 double of 400"),
    (toys.RawForeign, PUBLISH, "1 never published of 400"),
    (toys.OursLoses, MANY, "1 lost of 400"),
    (toys.OursKeeps, KEYED, "1 lost, 1 double of 400"),
    (toys.Uncommitted, CONSUME, "400 unsettled of 400"),
    (toys.Behind, ONE, "1 unsettled of 400"),
    (toys.HandlesTwice, ONE, "1 double of 400"),
    (toys.Reorders, CONSUME, "380 out of order of 400"),
    (toys.QueueDoubles, QUEUE, "1 double of 400"),
    (toys.QueuePostpones, QUEUE, "1 unsettled of 400"),
    (toys.QueueForgets, QUEUE, "1 too many of 400"),
]


@pytest.mark.parametrize("row, work, flaw", MISBEHAVING)
def test_a_row_that_misbehaves_has_a_flaw(row: type[Row], work: Work, flaw: str, url: str) -> None:
    assert inside(row, work, url, entity=entity()).flaw() == flaw


@pytest.mark.parametrize("row, work", [(toys.Skips, CONSUME), (toys.QueueLoses, QUEUE)])
def test_a_row_that_handles_too_few_is_given_up(row: type[Row], work: Work, url: str) -> None:
    figures = inside(row, work, url, entity=entity(), limit=4.0)
    assert figures.flaw() == "not done after 4 s, 399 of 400 handled"


@pytest.mark.parametrize("row", [raw.Raw, ours.Ours, ours.OurQueue])
def test_latency_is_that_between_two_processes(row: type[Row], url: str) -> None:
    figures = measure(row, LATENCY, 60, url)
    assert figures.flaw() is None
    assert figures.p50 is not None
    assert figures.p99 is not None
    assert 0 < figures.p50 <= figures.p99


def test_connections_are_counted(url: str) -> None:
    with wire(url), wire(url), wire(url):
        assert connections(url) >= 3


def test_each_goal_is_between_rows_of_its_work() -> None:
    works = plan()
    results = Results(works)
    for work, rows in works:
        names = [row.name for row in rows]
        assert len(set(names)) == len(names)
        assert work.yardstick in names
        for goal in work.goals:
            assert {goal.row, goal.than} <= set(names)
            assert judge(results, work, goal)[0] is False  # what was not measured is not reached


def test_all_that_the_goals_ask_for_is_measured() -> None:
    goals = {
        (work.name, goal.factor, goal.quantile if work.metric == "latency" else None)
        for work, _ in plan()
        for goal in work.goals
    }
    assert goals == {
        ("publish-1", 0.9, None),
        ("publish-100", 1.5, None),
        ("publish-100-keyed", 1.5, None),
        ("publish-many", 0.8, None),
        ("consume-1", 0.5, None),
        ("consume-100", 0.6, None),
        ("consume-100-spread", 0.6, None),
        ("latency", 1.3, "p50"),
        ("latency", 2.0, "p99"),
        ("queue-100", 0.25, None),
        ("queue-100", 8.0, None),
        ("queue-latency", 3.5, "p50"),
        ("queue-latency", 6.0, "p99"),
    }
    shown = {row for _, rows in plan() for row in rows}
    assert {peers.FastStream, peers.Taskiq, limit.Confluent, ours.OurQueueShort} <= shown


def spread(counts: list[int]) -> list[list[int]]:
    """Return numbers as so many consumers have handled them."""
    numbers = itertools.count()
    return [list(itertools.islice(numbers, count)) for count in counts]


def test_sharing_is_judged_by_who_is_furthest_from_the_mean() -> None:
    even = probes.judged("even", spread([100] * 8), 800, 0, 2, 1.0)
    assert (even.flaw, even.value, even.reached) == (None, 0.0, True)
    starved = probes.judged("starved", spread([100] * 6 + [120, 80]), 800, 0, 2, 1.0)
    assert (starved.flaw, starved.value, starved.reached) == (None, 20.0, False)


@pytest.mark.parametrize(
    "each, left, partitions",
    [
        (spread([100] * 7 + [99]), 0, 2),
        ([*spread([100] * 7 + [99]), [7]], 0, 2),
        ([*spread([100] * 8)[:7], [*range(700, 799), 7]], 0, 2),
        (spread([100] * 8), 1, 2),
        (spread([100] * 8), 0, 4),
    ],
    ids=["lost", "more consumers", "swapped", "unsettled", "other partitions"],
)
def test_sharing_has_no_figure_where_a_message_is_lost_or_comes_twice(
    each: list[list[int]], left: int, partitions: int
) -> None:
    assert probes.judged("bad", each, 800, left, partitions, 1.0).flaw is not None
