"""One round of each play, on one of the servers; `make test-faults` plays them all on each."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from .plays import PLAYS


@pytest.mark.parametrize("name", PLAYS)
def test_play(name: str, tmp_path: Path) -> None:
    play = PLAYS[name]
    seed = int(os.environ.get("BROKERKIT_SEED") or random.SystemRandom().randrange(1_000_000))
    flavor = random.Random(seed).choice(play.flavors)
    verdict = asyncio.run(play.perform(flavor, seed, tmp_path))
    print(f"{name} on {flavor}: {verdict.summary()}")
