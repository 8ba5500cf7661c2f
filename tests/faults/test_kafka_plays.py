"""`make test` plays one short round of some plays on three brokers of Kafka, `make test-faults` long rounds of all."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..servers.kafka import KafkaCluster
from .kafka_plays import PLAYS
from .test_plays import LONG


@pytest.fixture(scope="module")
def cluster() -> Iterator[KafkaCluster]:
    """Return one cluster for all of them, which `TOGETHER` in tests/conftest.py sees to."""
    with KafkaCluster(brokers=3) as started:
        yield started


def cases() -> Iterator[object]:
    for name, play in PLAYS.items():
        if not LONG and not play.long:
            yield pytest.param(name, id=name)
        for round_ in range(LONG):
            yield pytest.param(name, id=f"{name}-{round_}")


@pytest.mark.parametrize("name", list(cases()))
def test_play(name: str, cluster: KafkaCluster, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    seed = int(os.environ.get("BROKERKIT_SEED") or random.SystemRandom().randrange(1_000_000))
    began = time.monotonic()
    verdict = asyncio.run(PLAYS[name].perform(cluster, seed, tmp_path, long=bool(LONG)))
    took = time.monotonic() - began
    record_property("play", f"{name:<34}{'kafka':<8}{took:6.1f} s  seed {seed:>6}: {verdict.summary()}")
