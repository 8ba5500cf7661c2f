"""The farm itself: only a real test that fails, and that passes without the mutant, catches a mutant."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from .farm import Project, Verdict
from .mutant import Mutant, Stale

ADD = Mutant(
    name="add subtracts",
    breaks="sums",
    file="toy/__init__.py",
    old="return a + b",
    new="return a - b",
    tests=("tests/test_toy.py::test_sums",),
)
CODE = """
def add(a, b):
    return a + b

def double(a):
    return a * 2
"""
TESTS = """
import toy

def test_sums():
    assert toy.add(2, 3) == 5

def test_sums_of_zero():
    assert toy.add(2, 0) == 2

def test_ends():
    while toy.double(2) == 5:
        pass
"""
WRONG = """
import toy

def test_wrong():
    assert toy.add(1, 1) == 3
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    texts = {
        "toy/__init__.py": CODE,
        "tests/test_toy.py": TESTS,
        "tests/test_wrong.py": WRONG,
        "pyproject.toml": "[tool.pytest.ini_options]",
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return Project(
        tmp_path, package="toy", trees=("toy", "tests"), files=("pyproject.toml",), suites={"": ("tests/test_toy.py",)}
    )


RUN = """
import pickle, sys
from tests.mutants.farm import Farm
project, mutants, options = pickle.load(sys.stdin.buffer)
pickle.dump(Farm(project, **options).run(mutants), sys.stdout.buffer)
"""


def verdict(project: Project, mutant: Mutant, **options: float) -> Verdict:
    """Run one mutant in a process without threads, as the farm, which forks, needs it."""
    told = pickle.dumps((project, [mutant], options))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", RUN], input=told, stdout=subprocess.PIPE, env=environment, check=True)
    one: Verdict
    (one,) = pickle.loads(done.stdout)
    return one


def test_a_failing_test_catches_a_mutant_and_the_project_stays_as_it_is(project: Project) -> None:
    found = verdict(project, ADD)
    assert (found.kind, found.test, found.elsewhere) == ("caught", "tests/test_toy.py::test_sums", False)
    assert (project.root / "toy/__init__.py").read_text() == CODE


def test_where_the_named_tests_pass_all_others_get_their_chance(project: Project) -> None:
    found = verdict(project, replace(ADD, tests=("tests/test_toy.py::test_sums_of_zero",)))
    assert (found.kind, found.test, found.elsewhere) == ("caught", "tests/test_toy.py::test_sums", True)


def test_a_mutant_that_no_test_notices_survives(project: Project) -> None:
    blind = replace(project, suites={"": ("tests/test_toy.py::test_ends",)})
    found = verdict(blind, replace(ADD, tests=("tests/test_toy.py::test_sums_of_zero",)))
    assert (found.kind, found.detail) == ("SURVIVED", "1 tests passed")


def test_a_test_that_fails_anyway_catches_nothing(project: Project) -> None:
    found = verdict(project, replace(ADD, tests=("tests/test_wrong.py::test_wrong",)))
    assert (found.kind, found.detail) == ("BROKEN", "tests/test_wrong.py::test_wrong fails without the mutant too")


def test_a_test_that_does_not_end_has_caught_the_mutant(project: Project) -> None:
    endless = Mutant(
        name="double adds one",
        breaks="products",
        file="toy/__init__.py",
        old="a * 2",
        new="a * 2 + 1",
        tests=("tests/test_toy.py::test_ends",),
    )
    found = verdict(project, endless, limit=2.0)
    assert (found.kind, found.test, found.detail) == ("caught", "tests/test_toy.py::test_ends", "did not end")


def test_names_of_tests_that_do_not_exist_are_no_catch(project: Project) -> None:
    assert verdict(project, replace(ADD, tests=("tests/test_toy.py::test_gone",))).kind == "BROKEN"


def test_a_package_that_cannot_be_imported_is_no_catch(project: Project) -> None:
    found = verdict(project, replace(ADD, old="def add", new="raise ImportError\ndef add"))
    assert found.kind == "BROKEN"


@pytest.mark.parametrize(
    "change, detail",
    [
        ({"old": "return a / b"}, "the text to change is in toy/__init__.py 0 times, not once"),
        ({"old": "return"}, "the text to change is in toy/__init__.py 2 times, not once"),
        ({"old": "return a + b", "new": "return a + b"}, "it changes nothing"),
        ({"new": "return ("}, "'(' was never closed (__init__.py, line 3)"),
    ],
)
def test_a_patch_that_does_not_apply_is_stale(project: Project, change: dict[str, str], detail: str) -> None:
    found = verdict(project, replace(ADD, **change))  # type: ignore[arg-type]
    assert (found.kind, found.detail) == ("STALE", detail)


def test_a_mutant_changes_its_text_only_once() -> None:
    assert ADD.apply(CODE) == CODE.replace("a + b", "a - b")
    with pytest.raises(Stale):
        ADD.apply(CODE * 2)
