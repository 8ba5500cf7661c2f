"""The application that is measured: Celery's own class in every row, whatever carries its messages.

Workers import this; what they need to know is in their environment.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

import msgspec
from celery import Celery, signals

VARIABLE: Final = "BROKERKIT_BENCH_APP"
_ENTRY: Final = struct.Struct("<qqq")


class Settings(msgspec.Struct, frozen=True):
    """What differs between two rows."""

    broker: str
    queue: str
    journal: str = ""
    """The file that executions are written down in."""


class Execution(msgspec.Struct, frozen=True):
    """That a task was run once; all times by the clock that all processes of a machine share, in nanoseconds."""

    number: int
    sent: int
    """When `delay` was about to be called, where that is asked about."""
    at: int


def executions(path: str) -> Iterator[Execution]:
    """Yield what is written down in the file at *path*, in order."""
    data = Path(path).read_bytes()
    for entry in _ENTRY.iter_unpack(data[: len(data) // _ENTRY.size * _ENTRY.size]):
        yield Execution(*entry)


def count(path: str) -> int:
    """Return how many executions are written down at *path*."""
    try:
        return os.stat(path).st_size // _ENTRY.size
    except FileNotFoundError:
        return 0


def ready(path: str) -> Path:
    """Return the file that says that the worker with the journal at *path* consumes."""
    return Path(f"{path}.ready")


def build(settings: Settings) -> Any:
    """Return an application with its task, ``app.tick``."""
    app: Any = Celery("bench", broker=settings.broker, set_as_current=False)
    app.conf.update(
        task_default_queue=settings.queue,
        task_ignore_result=True,
        broker_connection_retry_on_startup=True,
        broker_connection_timeout=10,
    )
    pack, now = _ENTRY.pack, time.monotonic_ns
    file = os.open(settings.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if settings.journal else -1

    def tick(number: int, sent: int = 0) -> None:
        os.write(file, pack(number, sent, now()))  # with the kernel at once, whatever becomes of the process

    app.tick = app.task(name="bench.tick")(tick)
    return app


if VARIABLE in os.environ:
    # The tests' own, which kio loads where it is there: 12 MiB and 0.4 s of a worker that no user's worker has.
    cast("dict[str, object]", sys.modules)["hypothesis"] = None
    _settings = msgspec.json.decode(os.environ[VARIABLE], type=Settings)
    app = build(_settings)

    def _ready(**_: object) -> None:
        ready(_settings.journal).touch()

    signals.worker_ready.connect(_ready, weak=False)
