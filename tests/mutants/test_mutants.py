"""Every mutant still applies to the code as it is."""

from __future__ import annotations

import pytest

from .__main__ import ALL, ROOT
from .mutant import Mutant


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_mutant_applies(mutant: Mutant) -> None:
    changed = mutant.apply((ROOT / mutant.file).read_text(encoding="utf-8"))
    compile(changed, mutant.file, "exec")


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in ALL}) == len(ALL)
