"""`make test` plays one short round of each play on one of the servers, `make test-faults` long rounds on each of them.

``BROKERKIT_FAULTS`` is the number of long rounds, ``BROKERKIT_SEED`` makes every play draw what it drew before.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..servers import FLAVORS, Flavor
from .plays import PLAYS

LONG = int(os.environ.get("BROKERKIT_FAULTS") or 0)


def cases() -> Iterator[object]:
    for name, play in PLAYS.items():
        if not LONG and not play.long:
            yield pytest.param(name, play.flavors, id=name)
        for round_ in range(LONG):
            yield from (pytest.param(name, (flavor,), id=f"{name}-{flavor}-{round_}") for flavor in play.flavors)


@pytest.mark.parametrize("name, flavors", list(cases()))
def test_play(
    name: str, flavors: tuple[Flavor, ...], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    seed = int(os.environ.get("BROKERKIT_SEED") or random.SystemRandom().randrange(1_000_000))
    flavor = random.Random(seed).choice(flavors)
    began = time.monotonic()
    verdict = asyncio.run(PLAYS[name].perform(flavor, seed, tmp_path, long=bool(LONG)))
    took = time.monotonic() - began
    record_property("play", f"{name:<34}{flavor:<8}{took:6.1f} s  seed {seed:>6}: {verdict.summary()}")


def test_every_server_has_its_plays() -> None:
    assert {flavor for play in PLAYS.values() for flavor in play.flavors} == set(FLAVORS)
