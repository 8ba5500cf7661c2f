"""The table of what works: each row names a feature, and tests that are marked with it prove its cells.

A test says what it proves by ``@pytest.mark.feature("countdown", "retry")``.  Its column is what its parameters ``system``
and ``pool`` say, or the mark: ``feature("revoke", system="kafka", pool="prefork")``.  With ``BROKERKIT_CELERY_RESULTS`` a run
of the tests appends the outcomes to that file; then

``python -m tests.celery.features results.jsonl docs/celery.md`` writes the tables between the markers, and with ``--check``
fails if that would change the file.  A cell whose tests did not all pass, or which has none, is an error: nothing in the
tables is typed in.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

VARIABLE = "BROKERKIT_CELERY_RESULTS"
SYSTEMS = {"memory": "`memory://`", "redis": "Redis", "kafka": "Kafka"}
POOLS = {
    "prefork": "prefork",
    "threads": "threads",
    "solo": "solo",
    "gevent": "gevent",
    "async": "brokerkit's",
}
SERVERS = ("redis", "kafka")
"""Systems that several processes share."""
NOT_APPLICABLE = "\N{EN DASH}"
YES = "yes"


@dataclass(frozen=True)
class Feature:
    """A row: in which words, and for which columns it has tests.

    *says* is what a cell has instead of "yes", where its tests prove something else than what the row says.
    """

    title: str
    systems: tuple[str, ...] = SERVERS
    pools: tuple[str, ...] = ()
    says: Mapping[str, str] = field(default_factory=dict)

    def columns(self, kind: str) -> tuple[str, ...]:
        return self.systems if kind == "system" else self.pools


EVERYWHERE = tuple(SYSTEMS)
FEATURES = {
    "tasks": Feature("a task runs once, and its result comes", EVERYWHERE, tuple(POOLS)),
    "takeover": Feature("`from celery import Celery`, nothing else", ("kafka",)),
    "share": Feature("several workers share the work, each task once"),
    "canvas": Feature("chains, groups, chords, callbacks, errbacks", EVERYWHERE),
    "retry": Feature("`retry`, `autoretry_for`", EVERYWHERE),
    "countdown": Feature("`countdown`, `eta`: not early, once", EVERYWHERE),
    "countdown_long": Feature("`countdown` longer than any lease or timeout: waits in the broker, once"),
    "expires": Feature("`expires`: the task is revoked, not run"),
    "acks_late_kill": Feature("`acks_late`: the tasks of a killed worker run again within seconds"),
    "early_ack_kill": Feature("without it: what a killed worker had begun is not run again"),
    "countdown_kill": Feature("a killed worker's countdowns come to the others"),
    "lost_child": Feature("`task_reject_on_worker_lost`"),
    "reject": Feature("`Reject(requeue=True)`, `Reject(requeue=False)`"),
    "redelivered": Feature('`delivery_info["redelivered"]`'),
    "shutdown": Feature(
        "warm shutdown: what runs is finished, what waits goes to the others", pools=("prefork", "threads", "solo")
    ),
    "shutdown_idle": Feature("warm shutdown of an idle worker within 2 s"),
    "shutdown_cold": Feature("cold and soft shutdown lose nothing"),
    "broker_restart": Feature("the broker is restarted: worker and producer go on"),
    "broker_absent": Feature("the broker is not there yet: the worker waits, `delay` raises"),
    "inspect": Feature("`inspect`, `control`: every worker answers", EVERYWHERE),
    "revoke": Feature("`revoke`", EVERYWHERE),
    "revoke_terminate": Feature("`revoke(terminate=True)`", pools=("prefork", "async")),
    "revoke_restart": Feature("a revoke holds when all workers were restarted"),
    "events": Feature("events, `celery events`"),
    "neighbours": Feature("mingle and gossip"),
    "prefetch": Feature("`worker_prefetch_multiplier`, `pool_grow`, `--autoscale`"),
    "queues": Feature("`-Q a,b,c`: several queues on one worker, `add_consumer`, `cancel_consumer`"),
    "names": Feature("any queue name, such as `w1@host`"),
    "routing": Feature("direct, topic and fanout exchanges; bindings that producers elsewhere see"),
    "broadcast": Feature("`Broadcast` queues"),
    "priority": Feature("priorities", ("redis", "kafka"), says={"kafka": "no: one warning"}),
    "ttl": Feature("TTL of what is no task"),
    "purge": Feature("`celery purge`, message counts"),
    "recycle": Feature("`--max-tasks-per-child`", pools=("prefork",)),
    "time_limits": Feature("soft and hard time limits", pools=("prefork", "async")),
    "bad_input": Feature("unknown tasks and what is no task go to the dead letters, the worker lives"),
    "oversize": Feature("too large arguments: `delay` raises"),
    "secrets": Feature("passwords are masked in `report`, `inspect conf` and logs"),
    "async_tasks": Feature("`async def` tasks", EVERYWHERE, tuple(POOLS)),
    "adelay": Feature("`await adelay(...)`, awaitable results", EVERYWHERE),
    "async_worker": Feature("`AsyncWorker` inside of an asyncio service", EVERYWHERE),
    "service": Feature("a brokerkit `Service` reads and publishes tasks"),
}


class Stale(Exception):
    """The results do not prove the tables, or the file shows others."""


def marks(item: pytest.Item) -> Iterator[tuple[str, str, str]]:
    """Yield what *item* proves when it passes: a feature, the kind of a column, and the column."""
    parameters: Mapping[str, object] = getattr(getattr(item, "callspec", None), "params", {})
    for mark in item.iter_markers("feature"):
        for name in mark.args:
            columns = {kind: str(mark.kwargs.get(kind, parameters.get(kind, ""))) for kind in ("system", "pool")}
            if name not in FEATURES:
                raise pytest.UsageError(f"{item.nodeid}: {name!r} is no feature: see tests/celery/features.py")
            for kind, column in columns.items():
                wanted = FEATURES[name].columns(kind)
                if not column or (kind == "pool" and not wanted):
                    continue
                if column not in wanted:
                    raise pytest.UsageError(
                        f"{item.nodeid}: {name!r} has no column {column!r} in tests/celery/features.py"
                    )
                yield name, kind, column


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "feature(*names, system, pool): the cells of the table that the test proves")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Refuse a mark that no table has, before anything runs."""
    for _ in marks(item):
        pass


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Append the outcome of each test that proves something, when it is known."""
    report = yield
    path = os.environ.get(VARIABLE)
    if path and (report.when == "call" or report.failed):
        lines = [
            json.dumps({"test": item.nodeid, "feature": name, kind: column, "ok": report.passed}) + "\n"
            for name, kind, column in marks(item)
        ]
        if lines:  # one write, as several processes append
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(lines))
    return report


def read(results: Path) -> dict[tuple[str, str, str], dict[str, bool]]:
    """Return the tests of each cell and whether they passed; the last run of a test counts."""
    found: dict[tuple[str, str, str], dict[str, bool]] = defaultdict(dict)
    for text in results.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        kind = "system" if "system" in line else "pool"
        found[line["feature"], kind, line[kind]][line["test"]] = line["ok"]
    return found


def cell(name: str, kind: str, column: str, ran: Mapping[tuple[str, str, str], Mapping[str, bool]]) -> str:
    """Return what the table says of a feature in a column, or raise `Stale` if that is not proven."""
    feature = FEATURES[name]
    if column not in feature.columns(kind):
        return NOT_APPLICABLE
    tests = ran.get((name, kind, column), {})
    failed = [test for test, passed in tests.items() if not passed]
    if failed:
        raise Stale(f"{feature.title!r} does not hold for {column}: {failed[0]} failed")
    if not tests:
        raise Stale(f"{feature.title!r} has no test for {column} that ran (mark: {name})")
    return feature.says.get(column, YES)


def table(kind: str, ran: Mapping[tuple[str, str, str], Mapping[str, bool]]) -> str:
    """Return the table of one *kind* of columns in Markdown."""
    columns = SYSTEMS if kind == "system" else POOLS
    rows = [["", *columns.values()], ["---"] * (len(columns) + 1)]
    rows += [
        [feature.title, *(cell(name, kind, column, ran) for column in columns)]
        for name, feature in FEATURES.items()
        if feature.columns(kind)
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def update(results: Path, page: Path, *, check: bool = False) -> bool:
    """Write the tables into *page*, between the markers of each; return whether it changed.

    Raises:
        Stale: the results do not prove the tables, or with *check*: the file shows others.
    """
    old = text = page.read_text(encoding="utf-8")
    ran = read(results)
    for kind in ("system", "pool"):
        begin, end = f"<!-- {kind}s: begin -->", f"<!-- {kind}s: end -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise Stale(f"{page} has no markers {begin} and {end}")
        text = f"{head}{begin}\n{table(kind, ran)}\n{end}{tail}"
    if check and text != old:
        raise Stale(f"the tables of {page} are stale: run `make features`")
    if text != old:
        page.write_text(text, encoding="utf-8")
    return text != old


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.celery.features", description=__doc__)
    parser.add_argument("results", type=Path, help=f"what {VARIABLE} named during the run")
    parser.add_argument("page", type=Path, help="the file with the markers")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the tables are stale")
    given = parser.parse_args(arguments)
    try:
        changed = update(given.results, given.page, check=given.check)
    except Stale as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{given.page}: the tables {'are written' if changed else 'are up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
