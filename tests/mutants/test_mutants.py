"""Every mutant still applies to the code as it is, and names tests that exist."""

from __future__ import annotations

import re

import pytest

from brokerkit.testing.conformance import _runner

from .__main__ import ALL, ROOT
from .lua import check
from .mutant import Mutant, Stale


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_mutant_applies(mutant: Mutant) -> None:
    check(mutant, mutant.apply((ROOT / mutant.file).read_text(encoding="utf-8")))


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_mutant_names_tests_that_exist(mutant: Mutant) -> None:
    known = {f"Test{group.__name__}": set(_runner.tests(group)) for group in _runner.discover()}
    for name in mutant.tests:
        file, *parts = name.split("::")
        assert (ROOT / file).exists(), name
        if file.startswith("tests/conformance/"):
            assert parts[0] in known, name
            assert {part.partition("[")[0] for part in parts[1:]} <= known[parts[0]], name
        elif parts:
            test = parts[-1].partition("[")[0]
            assert re.search(rf"^(async )?def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), name


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in ALL}) == len(ALL)


def test_a_changed_script_that_is_no_lua_is_stale() -> None:
    (plain,) = [mutant for mutant in ALL if mutant.name == "a release counts"]
    text = (ROOT / plain.file).read_text(encoding="utf-8")
    check(plain, text)
    with pytest.raises(Stale, match="script"):
        check(plain, text + "\nend")
