"""Tests that share what is heavy run in one process, however many there are."""

from __future__ import annotations

from pathlib import Path

from .conftest import TOGETHER, scope


def test_the_tests_of_some_files_run_in_one_process() -> None:
    for path in TOGETHER:
        assert (Path(__file__).parent.parent / path).is_file()
        assert scope(f"{path}::test_a[x::y]") == scope(f"{path}::test_b")
    assert scope("tests/test_package.py::test_a") != scope("tests/test_package.py::test_b")
