"""Runs suites on servers of their own, and judges the outcomes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from ...servers import ADMIN, RedisServer
from ...servers.kafka import shared_kafka
from . import kombu_kafka, report
from .table import HERE, Suite
from .trees import CONFIGURATION, copy

DEADLINE: Final = 3600.0
"""Seconds that a suite may take."""
EACH: Final = 180
"""Seconds that one of its tests may take."""
AGAIN: Final = 3
"""How often at most: Celery's own runs of its tests repeat up to five times what fails.

Many of the tests wait for a while that is too short for a machine that does other work as well.
"""
ROOT: Final = Path(__file__).parents[3]


_running: set[subprocess.Popen[bytes]] = set()
_stopping = threading.Event()


class Outcome(NamedTuple):
    """What became of a test; of the first thing in it that failed, what it said."""

    outcome: str
    why: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What a run of a suite has shown."""

    suite: Suite
    outcomes: Mapping[str, Outcome]
    errors: Sequence[str]
    """What is not as `table` says."""
    seconds: float
    log: str
    """The end of what pytest has written."""

    def __str__(self) -> str:
        counts = Counter(outcome.outcome for outcome in self.outcomes.values())
        told = [f"{counts[name]} {name}" for name in ("passed", "failed", "xfailed", "skipped") if counts[name]]
        return f"{self.suite.name} on {self.suite.broker}: {', '.join(told) or 'nothing ran'} in {self.seconds:.0f} s"


def judge(suite: Suite, outcomes: Mapping[str, Outcome]) -> list[str]:
    """Return what is not as the suite's row of the table says."""
    errors = []
    for test, outcome in outcomes.items():
        if outcome.outcome == "failed" and test not in suite.known:
            errors.append(f"{test} fails: {outcome.why}")
        elif outcome.outcome == "passed" and test in suite.known:
            errors.append(f"{test} passes by now: remove it from the table, where it stands with {suite.known[test]!r}")
    errors += [f"{test} of the table was not run" for test in suite.known if test not in outcomes]
    errors += [f"{test} was to be left out" for test in suite.left_out if test in outcomes]
    skipped = sum(outcome.outcome == "skipped" for outcome in outcomes.values())
    if skipped != suite.skipped:
        errors.append(f"{skipped} tests were skipped, and not {suite.skipped}")
    if len(outcomes) != suite.tests:
        errors.append(f"{len(outcomes)} tests were run, and not {suite.tests}")
    return errors


def run(suite: Suite) -> Verdict:
    """Run a suite on servers of its own; what fails, and should not, is run `AGAIN` by itself."""
    began = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    chosen: list[str] = []
    text = ""
    for _ in range(1 + AGAIN):
        # New servers each time: what a test that failed has left there is no concern of its next run.
        with tempfile.TemporaryDirectory(prefix="brokerkit-suite-") as name, places(suite) as environment:
            folder = Path(name)
            outcomes |= _pytest(suite, folder, environment, chosen)
            text += (folder / "log").read_text(encoding="utf-8", errors="replace")
        chosen = [test for test, outcome in outcomes.items() if outcome.outcome == "failed" and test not in suite.known]
        if not chosen or len(outcomes) != suite.tests or _stopping.is_set():
            break
    return Verdict(suite, outcomes, judge(suite, outcomes), time.monotonic() - began, text[-20_000:])


@contextmanager
def places(suite: Suite) -> Iterator[dict[str, str]]:
    """Give the environment that tells a suite where its broker is, with a Redis of its own, which has the results too."""
    with socket.socket() as silent, RedisServer(passwords={ADMIN: ""}) as server:
        silent.bind((server.host, 0))  # nobody listens, and nobody else gets the port
        nobody = silent.getsockname()[1]
        results = f"redis://{server.host}:{server.port}/0"
        prefix = f"suite{os.getpid()}-{server.port}."
        scheme, at = "memory", "memory://localhost:1"
        if suite.broker == "redis":
            scheme, at = "redis", server.url()
        elif suite.broker == "kafka":
            scheme, at = "kafka", shared_kafka().url(query=f"prefix={prefix}")
        dead = f"{scheme}://127.0.0.1:{nobody}"
        live = at.partition("?")[0]
        if suite.broker == "memory":
            # Somebody always answers at memory://.
            dead, live = f"redis://127.0.0.1:{nobody}", f"brokerkit+{live}"
        yield {
            "TEST_BROKER": f"brokerkit+{at}",
            "TEST_BACKEND": results,
            "REDIS_HOST": server.host,
            "REDIS_PORT": str(server.port),
            "REDIS_6379_TCP": str(server.port),
            "BROKERKIT_SUITE_URL": f"brokerkit+{at}",
            "BROKERKIT_SUITE_NOBODY": f"brokerkit+{dead}",
            "BROKERKIT_SUITE_FAILOVER": f"{dead};{live}",
            kombu_kafka.PORT: live.rpartition(":")[2],
            kombu_kafka.PREFIX: prefix,
        }


def _pytest(suite: Suite, folder: Path, environment: Mapping[str, str], chosen: Sequence[str]) -> dict[str, Outcome]:
    """Run the suite, or the *chosen* tests of it, in a process of its own; return the outcomes by the tests' names."""
    tree = copy(suite.project, folder)
    for added, source in suite.added.items():
        shutil.copy(HERE / source, tree / added)
    file = folder / "outcomes"
    file.touch()
    plugins = [report.__name__, "celery.contrib.pytest", *suite.plugins]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        CONFIGURATION[suite.project],
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    command += [part for plugin in plugins for part in ("-p", plugin)]
    if suite.only:
        command += ["-k", suite.only]
    settings = {
        **os.environ,
        **environment,
        "BROKERKIT_CELERY_TAKEOVER": suite.takeover,
        "WORKER_LOGLEVEL": "INFO",  # some of Celery's tests read the log of the worker
        # The command `celery` of this environment, and the tests as they are imported.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": f"{tree}{os.pathsep}{ROOT}",
        report.FILE: str(file),
        report.LIMIT: str(EACH),
        report.LEFT_OUT: json.dumps(list(suite.left_out)),
        report.CHOSEN: json.dumps(list(chosen)),
    }
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen(
            [*command, *suite.files], cwd=tree, env=settings, stdout=output, stderr=output, start_new_session=True
        )
        _running.add(process)
        try:
            if not _stopping.is_set():
                process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            output.write(b"\nthe suite takes too long\n")
        finally:
            _end(process)
            _running.discard(process)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {line["test"]: Outcome(line["outcome"], line["why"], line["seconds"]) for line in lines}


def stop() -> None:
    """End all suites that run, from any thread; none begins any more."""
    _stopping.set()
    for process in list(_running):
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what the process of a suite has left running: workers are in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()
