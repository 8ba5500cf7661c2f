"""Every mutant still applies to the code as it is, and names tests that exist."""

from __future__ import annotations

import pytest

from brokerkit.testing.conformance import _runner

from .__main__ import ALL, ROOT
from .mutant import Mutant


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_mutant_applies(mutant: Mutant) -> None:
    changed = mutant.apply((ROOT / mutant.file).read_text(encoding="utf-8"))
    compile(changed, mutant.file, "exec")


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_mutant_names_tests_that_exist(mutant: Mutant) -> None:
    known = {f"Test{group.__name__}": set(_runner.tests(group)) for group in _runner.discover()}
    for name in mutant.tests:
        file, *parts = name.split("::")
        assert (ROOT / file).exists(), name
        if file == "tests/conformance/test_memory.py":
            assert parts[0] in known, name
            assert set(parts[1:]) <= known[parts[0]], name


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in ALL}) == len(ALL)
