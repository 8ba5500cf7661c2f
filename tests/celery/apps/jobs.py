"""The tasks of the tests, and the application that has them: for the workers, and for the tests themselves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import msgspec

VARIABLE: Final = "BROKERKIT_TEST_APP"
"""Names the settings of a worker's application, in JSON."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What an application of the tests differs in from others."""

    broker: str
    backend: str
    folder: str
    """Where the workers' journals go."""
    ours: bool = False
    """Whether its class is brokerkit's instead of Celery's own."""
    broadcast: str = ""
    """A queue of which each worker gets all messages."""
    config: dict[str, Any] = {}


def add(self: Any, x: int, y: int) -> int:
    return x + y


def nap(self: Any, seconds: float = 0.0) -> str:
    """Take a while."""
    time.sleep(seconds)
    return str(self.request.hostname)


def until(self: Any, path: str) -> str:
    """Take until somebody makes a file, or a minute."""
    end = time.monotonic() + 60
    while not Path(path).exists():
        if time.monotonic() > end:
            raise TimeoutError(path)
        time.sleep(0.01)
    return str(self.request.hostname)


def again(self: Any, times: int, countdown: float = 0.0) -> int:
    """Fail so many times, and then succeed."""
    if self.request.retries < times:
        raise self.retry(countdown=countdown, max_retries=times)
    return int(self.request.retries)


def flaky(self: Any) -> int:
    """Fail twice, with an error that is retried by itself."""
    if self.request.retries < 2:
        raise ConnectionError("not yet")
    return int(self.request.retries)


def fail(self: Any) -> None:
    raise ValueError("as it should")


def die(self: Any) -> str:
    """Kill the process that runs this, unless one was killed before."""
    if not self.request.delivery_info.get("redelivered"):
        os.kill(os.getpid(), signal.SIGKILL)
    return "lived"


def put_back(self: Any) -> str:
    """Reject the first delivery, so that there is a second."""
    if not self.request.delivery_info.get("redelivered"):
        reject = import_module("celery.exceptions").Reject
        raise reject("once more", requeue=True)
    return "second"


def drop(self: Any) -> None:
    raise import_module("celery.exceptions").Reject("never again", requeue=False)


def size(self: Any, text: str) -> int:
    return len(text)


def total(self: Any, numbers: list[int]) -> int:
    return sum(numbers)


def process(self: Any) -> int:
    return os.getpid()


def where(self: Any) -> Mapping[str, Any]:
    """Tell how this came."""
    delivered = self.request.delivery_info
    return {name: delivered.get(name) for name in ("exchange", "routing_key", "priority", "redelivered")}


def split(self: Any, count: int) -> Any:
    """Become as many additions, whose sum is the result."""
    signature = self.app.signature
    parts = [signature("add", (number, 1)) for number in range(count)]
    raise self.replace(import_module("celery").chord(parts, signature("total")))


LATE: Final = {"acks_late": True}
TASKS: Final[Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]]] = {
    "add": (add, {}),
    "nap": (nap, {}),
    "late_nap": (nap, LATE),
    "until": (until, {}),
    "late_until": (until, LATE),
    "again": (again, {}),
    "flaky": (flaky, {"autoretry_for": (ConnectionError,), "retry_backoff": False, "default_retry_delay": 0}),
    "fail": (fail, {}),
    "die": (die, LATE | {"reject_on_worker_lost": True}),
    "put_back": (put_back, LATE),
    "drop": (drop, LATE),
    "size": (size, {}),
    "total": (total, {}),
    "process": (process, {}),
    "where": (where, {}),
    "split": (split, {}),
    "slow_rate": (add, {"rate_limit": "2/s"}),
}
CONFIG: Final[Mapping[str, Any]] = {
    "broker_connection_retry_on_startup": True,
    "task_default_queue": "jobs",
    "result_expires": 600,
    "worker_proc_alive_timeout": 60.0,  # on a busy machine children take their time
}


def build(settings: Settings) -> Any:
    """Return an application with all tasks."""
    kind = import_module("brokerkit.celery" if settings.ours else "celery").Celery
    app = kind("jobs", broker=settings.broker, backend=settings.backend or None, set_as_current=False)
    app.conf.update({**CONFIG, **settings.config})
    for name, (function, options) in TASKS.items():
        app.task(name=name, bind=True, **options)(function)
    if settings.broadcast:
        kombu = import_module("kombu")
        app.conf.task_queues = (kombu.Queue("jobs"), import_module("kombu.common").Broadcast(settings.broadcast))
    app.finalize()
    return app
