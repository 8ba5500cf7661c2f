"""Which suites there are, how many tests each has, and what of it fails, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias

from .trees import Project

Broker: TypeAlias = Literal["redis", "kafka", "memory"]
HERE: Final = Path(__file__).parent


@dataclass(frozen=True)
class Suite:
    """Files of a project's tests that one process runs on one broker."""

    name: str
    project: Project
    broker: Broker
    files: tuple[str, ...]
    tests: int
    """How many there are, without those that are left out: a run of fewer is an error."""
    only: str = ""
    """What pytest chooses of the files, by ``-k``."""
    known: Mapping[str, str] = field(default_factory=dict)
    """What fails, and why.  A test of these that passes is an error."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """What is not run, and why: tests that say nothing of a broker, or whose outcome is a matter of chance."""
    skipped: int = 0
    """How many skip themselves; none else may."""
    plugins: tuple[str, ...] = ()
    takeover: str = "kafka"
    """Whose URLs become brokerkit's."""


COMMON: Final = str(HERE / "kombu_common.py")
SUITES: Final[tuple[Suite, ...]] = ()
SHORT: Final[tuple[Suite, ...]] = ()
