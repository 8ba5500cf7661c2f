from __future__ import annotations

from .run import Outcome, judge
from .table import SHORT, SUITES, Suite

PASSED = Outcome("passed")
FAILED = Outcome("failed", "call: no")


def suite(**given: object) -> Suite:
    return Suite("a suite", "kombu", "memory", ("test_a.py",), **{"tests": 2, **given})  # type: ignore[arg-type]


def test_a_run_that_is_as_the_table_says_has_no_errors() -> None:
    assert judge(suite(), {"a": PASSED, "b": PASSED}) == []
    assert judge(suite(known={"b": "why"}), {"a": PASSED, "b": FAILED}) == []
    assert judge(suite(skipped=1), {"a": PASSED, "b": Outcome("skipped")}) == []
    assert judge(suite(), {"a": PASSED, "b": Outcome("xfailed")}) == []


def test_what_fails_and_is_not_named_is_an_error() -> None:
    assert judge(suite(), {"a": PASSED, "b": FAILED}) == ["b fails: call: no"]


def test_what_is_named_and_passes_is_an_error() -> None:
    (error,) = judge(suite(known={"b": "why"}), {"a": PASSED, "b": PASSED})
    assert "b passes by now" in error


def test_what_is_named_and_was_not_run_is_an_error() -> None:
    assert judge(suite(tests=1, known={"b": "why"}), {"a": PASSED}) == ["b of the table was not run"]


def test_what_is_left_out_and_was_run_is_an_error() -> None:
    assert judge(suite(left_out={"b": "why"}), {"a": PASSED, "b": PASSED}) == ["b was to be left out"]


def test_a_run_of_fewer_tests_is_an_error() -> None:
    assert judge(suite(), {"a": PASSED}) == ["1 tests were run, and not 2"]


def test_a_test_that_skips_itself_without_being_expected_to_is_an_error() -> None:
    assert judge(suite(), {"a": PASSED, "b": Outcome("skipped")}) == ["1 tests were skipped, and not 0"]


def test_what_is_named_in_the_table_has_a_reason() -> None:
    for row in (*SUITES, *SHORT):
        assert row.tests > 0
        assert all((*row.known.values(), *row.left_out.values())), row.name
        assert not set(row.known) & set(row.left_out), row.name
