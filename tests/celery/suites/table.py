"""Which suites there are, how many tests each has, and what of it fails, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias

from . import kombu_kafka
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
    added: Mapping[str, str] = field(default_factory=dict)
    """Files of this folder, by what they are called among the project's."""
    takeover: str = "kafka"
    """Whose URLs become brokerkit's."""


BROKERS: Final[tuple[Broker, ...]] = ("redis", "kafka", "memory")
REAL: Final[tuple[Broker, ...]] = ("redis", "kafka")
COMMON: Final = "t/integration/test_common.py"


def files(*names: str) -> tuple[str, ...]:
    """Return where files of a project's tests are in its tree."""
    return tuple(f"t/integration/test_{name}.py" for name in names)


NO_PRIORITIES: Final = "Kafka has no priorities"

_KOMBU: Final = (
    *(
        Suite("kombu common", "kombu", broker, (COMMON,), 47, added={COMMON: "kombu_common.py"}, takeover="kafka,redis")
        for broker in BROKERS
    ),
    Suite(
        "kombu redis",
        "kombu",
        "redis",
        files("redis"),
        62,
        takeover="redis",
        only="RedisBasicFunctionality or RedisBaseExchangeTypes or RedisPriority or RedisMessage or RedisEventLoop",
    ),
    Suite(
        "kombu kafka", "kombu", "kafka", files("kafka"), 39, takeover="confluentkafka", plugins=(kombu_kafka.__name__,)
    ),
)
_TASKS: Final = (
    "tasks",
    "inspect",
    "worker",
    "beat",
    "group_chains",
    "serialization",
    "security",
    "connection_recovery",
    "loader",
    "logfile_format",
    "upgrade",
    "request_backend_down",
    "events_state_memory_leak",
    "mem_leak_in_exception_handling",
    "backend_leak_in_fixture_teardown",
    "cache_backend",
)

_CELERY: Final = tuple(
    suite
    for broker in REAL
    for suite in (
        Suite("celery canvas", "celery", broker, files("canvas"), 240),
        Suite("celery tasks", "celery", broker, files(*_TASKS), 156),
        Suite("celery results", "celery", broker, files("redis_backend"), 8),
    )
)
SUITES: Final[tuple[Suite, ...]] = (*_KOMBU, *_CELERY)
SHORT: Final[tuple[Suite, ...]] = _KOMBU
