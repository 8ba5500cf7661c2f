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
ADDED: Final = {COMMON: "kombu_common.py"}


def files(*names: str) -> tuple[str, ...]:
    """Return where files of a project's tests are in its tree."""
    return tuple(f"t/integration/test_{name}.py" for name in names)


def both(test: str) -> tuple[str, str]:
    """Return the names of a test of Kombu's test_redis.py, which runs most of them with a prefix for keys too."""
    return f"test_redis.py::{test}[None]", f"test_redis.py::{test}[connection1]"


NO_PRIORITIES: Final = "Kafka has no priorities, of which a warning tells"
HIGHER_FIRST: Final = (
    "messages of higher priority come first, as with RabbitMQ: on stock Redis those of lower priority do"
)
REDIS_ERRORS: Final = "expects an error of redis-py's: here it is brokerkit's, which is in connection_errors"
BOOTSTRAP: Final = (
    "the hosts are one list of bootstrap servers: nothing fails over, since the first one need not answer"
)

_KOMBU: Final = (
    Suite("kombu common", "kombu", "memory", (COMMON,), 47, added=ADDED, takeover="kafka,redis"),
    Suite("kombu common", "kombu", "redis", (COMMON,), 47, added=ADDED, takeover="kafka,redis"),
    Suite(
        "kombu common",
        "kombu",
        "kafka",
        (COMMON,),
        47,
        added=ADDED,
        takeover="kafka,redis",
        known={
            "test_common.py::test_priority::test_publish_consume": NO_PRIORITIES,
            "test_common.py::test_priority::test_publish_requeue_consume": NO_PRIORITIES,
            "test_common.py::test_priority::test_simple_queue_publish_consume": NO_PRIORITIES,
            "test_common.py::test_failover::test_failover_switches_to_alternate_url": BOOTSTRAP,
        },
    ),
    Suite(
        "kombu redis",
        "kombu",
        "redis",
        files("redis"),
        64,
        # The others look at the keys and the internals of Kombu's own transport.
        only="RedisBasicFunctionality or RedisBaseExchangeTypes or RedisPriority or RedisMessage or RedisEventLoop"
        " or RedisPublishBatch or test_requeue_requeues_message or failed_credentials",
        takeover="redis",
        known={
            **dict.fromkeys(both("test_RedisPriority::test_publish_consume"), HIGHER_FIRST),
            **dict.fromkeys(both("test_RedisPriority::test_publish_requeue_consume"), HIGHER_FIRST),
            **dict.fromkeys(both("test_RedisPriority::test_simple_queue_publish_consume"), HIGHER_FIRST),
            **dict.fromkeys(both("test_RedisPriority::test_simple_buffer_publish_consume"), HIGHER_FIRST),
            **dict.fromkeys(both("test_RedisPublishBatch::test_direct_priority_and_fifo"), HIGHER_FIRST),
            **dict.fromkeys(
                both("test_RedisPublishBatch::test_fanout_is_deferred_until_flush"),
                "waits for the message on the Redis channel of Kombu's own transport",
            ),
            "test_redis.py::test_RedisBasicFunctionality::test_failed_connection__ConnectionError": REDIS_ERRORS,
            "test_redis.py::test_failed_credentials": REDIS_ERRORS,
        },
    ),
    Suite(
        "kombu kafka",
        "kombu",
        "kafka",
        files("kafka"),
        39,
        takeover="confluentkafka",
        skipped=1,
        plugins=(kombu_kafka.__name__,),
        known={"test_kafka.py::test_KafkaFailover::test_failover_switches_to_alternate_url": BOOTSTRAP},
    ),
)
# test_worker.py comes last: it starts a worker of the pool solo in this process, which does not let the tests behind it
# wait for results.
_TASKS: Final = (
    *("backend_leak_in_fixture_teardown", "beat", "cache_backend", "connection_recovery", "events_state_memory_leak"),
    *(
        "group_chains",
        "inspect",
        "loader",
        "logfile_format",
        "mem_leak_in_exception_handling",
        "request_backend_down",
        "security",
        "serialization",
    ),
    *("tasks", "upgrade", "worker"),
)
_CANVAS: Final = {
    "test_canvas.py::test_chain::test_chord_header_id_duplicated_on_rabbitmq_msg_duplication[redis-group-ids]": (
        "waits for a task that RabbitMQ delivers twice; where the URL begins with redis it expects to fail"
    )
}
_CHANCE: Final = {
    "test_tasks.py::test_task_replacement::test_replaced_task_nesting_level_0": (
        "resets after delay() what the worker sets when it receives the task: it fails where the worker is quick"
    ),
    **dict.fromkeys(
        (
            "test_tasks.py::test_trace_log_arguments::test_task_success",
            "test_tasks.py::test_trace_log_arguments::test_task_failed",
        ),
        "gives what a child of the pool has logged 10 ms to come: it fails on a machine that does other work",
    ),
    "test_mem_leak_in_exception_handling.py::test_mem_leak_unhandled_exceptions": (
        "allows a tenth of the memory that psutil tells; without psutil, which is not installed, that is too little. "
        "There is no broker in it"
    ),
}
_CLASSES: Final = ("test_class_based_tasks", "test_task_redis_result_backend", "test_link_error")
_CELERY: Final = tuple(
    suite
    for broker in REAL
    for suite in (
        Suite("celery canvas", "celery", broker, files("canvas"), 240, known=_CANVAS),
        Suite("celery tasks", "celery", broker, files(*_TASKS), 152, left_out=_CHANCE, skipped=6),
        Suite("celery results", "celery", broker, files("redis_backend"), 8),
    )
)
_SOME: Final = (
    *files("inspect"),
    *(f"{file}::{name}" for file, name in zip(files("tasks", "tasks", "canvas"), _CLASSES, strict=True)),
)
SUITES: Final[tuple[Suite, ...]] = (*_KOMBU, *_CELERY)
SHORT: Final[tuple[Suite, ...]] = (*_KOMBU, *(Suite("celery some", "celery", broker, _SOME, 28) for broker in REAL))
"""What is run every day: all of Kombu's, and Celery's remote control, results, and callbacks of what fails."""
