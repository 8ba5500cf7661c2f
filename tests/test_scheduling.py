"""Tests that share what is heavy run in one process, however many there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .conftest import TOGETHER, scope, spread

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "one, another",
    [
        ("tests/typing/test_typing.py::test_a[x::y]", "tests/typing/test_typing.py::test_b"),
        ("tests/celery/test_crew_tasks.py::test_a[kafka]", "tests/celery/test_crew_canvas.py::test_b[kafka]"),
        ("tests/celery/test_async_tasks.py::test_a[solo-solo]", "tests/celery/test_async_tasks.py::test_b[solo-solo]"),
    ],
)
def test_tests_that_share_what_is_heavy_run_in_one_process(one: str, another: str) -> None:
    assert scope(one) == scope(another)


@pytest.mark.parametrize(
    "one, another",
    [
        ("tests/test_readme.py::test_a", "tests/test_readme.py::test_b"),
        ("tests/typing/test_typing.py::test_a", "tests/test_package.py::test_a"),
        ("tests/celery/test_crew_tasks.py::test_a[kafka]", "tests/celery/test_crew_tasks.py::test_a[redis]"),
        (
            "tests/celery/test_async_tasks.py::test_a[solo-solo]",
            "tests/celery/test_async_tasks.py::test_a[async-async]",
        ),
        ("tests/celery/test_async_tasks.py::test_a", "tests/celery/test_async_tasks.py::test_b"),
    ],
)
def test_all_others_are_free(one: str, another: str) -> None:
    assert scope(one) != scope(another)


def test_what_is_named_is_there() -> None:
    for tests in TOGETHER:
        path, _, test = tests.pattern.replace("\\.", ".").partition(".py")
        (*found,) = ROOT.glob(path.partition(".*")[0] + "*.py")
        assert found, tests.pattern
        if name := re.search(r"test_\w+", test):
            assert f"def {name[0]}(" in found[0].read_text(encoding="utf-8")


def test_long_tests_are_spread_over_the_run_and_none_is_at_its_end() -> None:
    long = [f"tests/celery/test_{name}.py::test_{number}" for name in ("a", "b") for number in range(9)]
    crew = [f"tests/celery/test_crew_a.py::test_{number}[{on}]" for on in ("redis", "kafka") for number in range(9)]
    short = [f"tests/unit/test_a.py::test_{number}" for number in range(100)]
    given = [*long, *crew, *short]
    order = spread(given)
    assert sorted(order) == list(range(len(given)))
    ordered = [given[number] for number in order]
    assert [nodeid for nodeid in ordered if nodeid in short] == short
    for on in ("redis", "kafka"):
        begin = ordered.index(f"tests/celery/test_crew_a.py::test_0[{on}]")
        assert ordered[begin : begin + 9] == [nodeid for nodeid in crew if on in nodeid], "one after the other"
        assert begin < 70
    alone = [nodeid for nodeid in ordered if nodeid not in crew]
    places = [place for place, nodeid in enumerate(alone) if nodeid in long]
    assert max(later - sooner for sooner, later in zip(places, places[2:], strict=False)) <= 15
    assert places[-1] < 110
