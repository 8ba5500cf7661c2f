"""mypy --strict and pyright agree, line by line, on what is right use of the API and what is not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import verdicts

FILES = ["addresses.py", "must_pass.py", "must_fail.py"]
# Drivers are reached through a URL; the suite is written for authors of drivers.
NOT_FOR_USERS = ("brokerkit.drivers.", "brokerkit.testing.")
UNTYPED = "brokerkit.celery."
"""What comes from Celery and kombu there has no types."""


@dataclass
class Started:
    """What runs at once, each thing one time."""

    checkers: dict[str, Future[list[verdicts.Error]]]
    symbols: Future[list[verdicts.Symbol]]


@pytest.fixture(scope="module")
def started() -> Iterator[Started]:
    with ThreadPoolExecutor() as pool:
        checkers = {checker: pool.submit(verdicts.run, checker, FILES) for checker in verdicts.CHECKERS}
        yield Started(checkers, pool.submit(verdicts.symbols))


@pytest.fixture(params=verdicts.CHECKERS)
def checked(request: pytest.FixtureRequest, started: Started) -> tuple[str, list[verdicts.Error]]:
    return request.param, started.checkers[request.param].result()


@pytest.mark.parametrize("file", ["addresses.py", "must_pass.py"])
def test_right_use_passes(checked: tuple[str, list[verdicts.Error]], file: str) -> None:
    _, errors = checked
    assert [error for error in errors if error.file == file] == []


def test_every_misuse_fails(checked: tuple[str, list[verdicts.Error]]) -> None:
    checker, errors = checked
    found = verdicts.strong(errors, "must_fail.py")
    missed = {line: text for line, text in verdicts.expected("must_fail.py", checker).items() if line not in found}
    assert missed == {}


def test_nothing_else_fails(checked: tuple[str, list[verdicts.Error]]) -> None:
    checker, errors = checked
    expected = verdicts.expected("must_fail.py", checker)
    assert [error for error in errors if error.file == "must_fail.py" and error.line not in expected] == []


def test_no_line_of_misuse_was_lost() -> None:
    for checker in verdicts.CHECKERS:
        assert len(verdicts.expected("must_fail.py", checker)) >= 149


def test_the_whole_public_api_has_known_types(started: Started) -> None:
    public = [symbol for symbol in started.symbols.result() if not symbol.name.startswith((*NOT_FOR_USERS, UNTYPED))]
    assert len(public) > 300
    assert [symbol for symbol in public if not symbol.known] == []
