"""``python -m tests.celery.suites``: run all suites, or those whose names begin with the arguments; ``--short`` is for every day."""

from __future__ import annotations

import argparse
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from ...servers import Missing
from ...servers.kafka import Run, prepare, shared_kafka
from .run import run, stop
from .table import SHORT, SUITES
from .trees import tree


@contextmanager
def ended_with(threads: ThreadPoolExecutor) -> Iterator[None]:
    """End the suites that run when this is left early: they are in sessions of their own."""
    try:
        yield
    except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        stop()
        raise


def main() -> int:
    """Run what the command line names; return 1 if anything is not as the table says."""
    parser = argparse.ArgumentParser(prog="python -m tests.celery.suites", description=__doc__)
    parser.add_argument("names", nargs="*", help="such as 'celery tasks on kafka'; the beginning is enough")
    parser.add_argument("--short", action="store_true", help="the selection that `make test` runs")
    parser.add_argument("--jobs", type=int, default=2, help="how many suites run at a time")
    parser.add_argument("--logs", type=Path, help="a folder for what pytest writes")
    given = parser.parse_args()
    rows = SHORT if given.short else SUITES
    chosen = [row for row in rows if not given.names or f"{row.name} on {row.broker}".startswith(tuple(given.names))]
    if not chosen:
        parser.error("no suite has such a name")
    for project in {row.project for row in chosen}:
        tree(project)
    wrong = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Run(), ThreadPoolExecutor(given.jobs) as threads, ended_with(threads):
        if any(row.broker == "kafka" for row in chosen):
            prepare()
            shared_kafka()  # before several ask for it
        for done in as_completed([threads.submit(run, row) for row in chosen]):
            verdict = done.result()
            print(verdict, flush=True)
            for why, number in Counter(verdict.suite.known.values()).items():
                print(f"    {number} known: {why}")
            for error in verdict.errors:
                print(f"    ERROR {error}")
            if given.logs:
                given.logs.mkdir(parents=True, exist_ok=True)
                name = f"{verdict.suite.name} on {verdict.suite.broker}.log".replace(" ", "-")
                (given.logs / name).write_text(verdict.log, encoding="utf-8")
            elif verdict.errors:
                print(verdict.log)
            wrong += bool(verdict.errors)
    print(
        f"{len(chosen)} suites of others: {f'{wrong} are not as the table says' if wrong else 'all as the table says'}"
    )
    return min(wrong, 1)


try:
    sys.exit(main())
except Missing as error:
    sys.exit(str(error))
