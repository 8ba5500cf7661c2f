from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest

from ...servers import Missing
from . import run as running
from . import trees
from .run import run
from .table import Suite

TESTS = """
import os
import time
from pathlib import Path

import unittest

import pytest

RUNS = Path(__file__).with_suffix(".runs")


def test_passes():
    assert os.environ["TOLD"] == "yes"


def test_fails():
    with RUNS.open("a") as file:
        file.write("x")
    assert False, "it does not work"


def test_works_the_second_time():
    flag = Path(__file__).with_suffix(".flag")
    seen = flag.exists()
    flag.touch()
    assert seen


def test_hangs():
    time.sleep(60)


@pytest.mark.flaky(reruns=5)
def test_skips():
    raise unittest.SkipTest("for a reason")


@getattr(pytest.mark, "xfail")(reason="not yet")
def test_is_expected_to_fail():
    assert False


def test_is_left_out():
    Path(__file__).with_suffix(".left").touch()


@pytest.fixture
def broken():
    yield
    raise RuntimeError("at its end")


def test_of_a_broken_fixture(broken):
    pass
"""


def test_a_suite_is_run_in_a_process_of_its_own_and_what_becomes_of_each_test_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "setup.cfg").write_text("[tool:pytest]\n", encoding="utf-8")
    (tree / "test_a.py").write_text(TESTS, encoding="utf-8")
    monkeypatch.setattr(running, "copy", lambda project, folder: tree)
    monkeypatch.setattr(running, "places", lambda suite: contextlib.nullcontext({"TOLD": "yes"}))
    monkeypatch.setattr(running, "EACH", 2)
    monkeypatch.setattr(running, "AGAIN", 1)
    left_out = {"test_a.py::test_is_left_out": "why"}
    known = {"test_a.py::test_hangs": "why"}
    suite = Suite("a", "kombu", "memory", ("test_a.py",), 7, known=known, left_out=left_out, skipped=1)
    verdict = run(suite)
    assert {test.partition("::")[2]: outcome.outcome for test, outcome in verdict.outcomes.items()} == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_works_the_second_time": "passed",
        "test_hangs": "failed",
        "test_skips": "skipped",
        "test_is_expected_to_fail": "xfailed",
        "test_of_a_broken_fixture": "failed",
    }, verdict.log
    assert (tree / "test_a.runs").read_text() == "xx"
    assert not (tree / "test_a.left").exists()
    assert "hangs" in verdict.outcomes["test_a.py::test_hangs"].why
    fails, broken = sorted(verdict.errors)
    assert "test_fails fails: call: AssertionError: it does not work" in fails
    assert "test_of_a_broken_fixture fails: teardown: RuntimeError: at its end" in broken
    assert str(verdict).startswith("a on memory: 2 passed, 3 failed, 1 xfailed, 1 skipped in ")


def test_an_archive_that_cannot_be_fetched_is_told_in_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "ERROR: No matching distribution found\nERROR: more"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *args, **kw: subprocess.CompletedProcess([], 1, "", said))
    with pytest.raises(Missing, match=r"No matching distribution found$"):
        trees.tree("kombu")
    assert not [path for path in (tmp_path / "brokerkit").iterdir() if path.is_dir()]
