"""What a run of tasks may not show: tasks that are lost, and repeats that nothing explains.

It knows nothing of brokers.  It gets what workers have written down, what was published, and what was done to the workers; a
task may run again only if the process that had it in hand was killed.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import msgspec

from .journal import Entry

Kind: TypeAlias = Literal["kill", "child", "freeze", "broker"]


class Harm(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was done."""

    what: Kind
    """A worker was killed, one process of its pool was, the worker was stopped for a while, or the broker was not there."""
    begin: float
    end: float
    pid: int = 0
    """The main process of the worker, or the process of the pool."""


class Finding(msgspec.Struct, frozen=True):
    """A broken promise."""

    kind: str
    id: str
    text: str


class Verdict(msgspec.Struct):
    """What the checker found, and how much there was to look at."""

    findings: list[Finding] = []
    counts: Counter[str] = msgspec.field(default_factory=Counter)

    def summary(self) -> str:
        """Say it in one line."""
        broken = Counter(finding.kind for finding in self.findings)
        parts = [f"{count} {name}" for name, count in sorted(self.counts.items())]
        return ", ".join(parts + [f"{count} {kind.upper()}" for kind, count in sorted(broken.items())])


class _Hold(msgspec.Struct):
    """A time in which a worker had a task's message."""

    by: str
    main: int
    """The worker's main process."""
    since: float
    child: int = 0
    began: float = math.inf
    ended: float = math.inf
    state: str = ""
    used: bool = False
    """Whether it has explained a repeat."""


def check(
    entries: Iterable[Entry],
    published: Mapping[str, bool],
    harm: Sequence[Harm],
    *,
    late: bool = True,
    unstored: float = 1.0,
    drained: bool = True,
) -> Verdict:
    """Return what did not hold of tasks that each are to succeed once.

    *published* says of each task whether its publisher knows that it is stored.  Tasks are acknowledged when they have ended
    if they are *late*, else when they begin; *unstored* is how many seconds an acknowledgement may take.
    """
    verdict = Verdict()
    ordered = sorted(entries, key=lambda entry: entry.at)
    # A node's name may be given again after its first bearer is gone.
    mains: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for entry in ordered:
        if entry.what == "ready":
            mains[entry.by].append((entry.at, entry.pid))
    of: dict[str, list[Entry]] = defaultdict(list)
    for entry in ordered:
        if entry.id:
            of[entry.id].append(entry)
    for id in of.keys() - published.keys():
        verdict.findings.append(Finding("unexpected", id, "ran, and was never published"))
    for id, stored in published.items():
        _judge(id, stored, _holds(of.get(id, []), mains), harm, verdict, late=late, unstored=unstored, drained=drained)
    verdict.counts["published"] += len(published)
    verdict.counts["harm done"] += len(harm)
    return verdict


def _holds(entries: Iterable[Entry], mains: Mapping[str, Sequence[tuple[float, int]]]) -> list[_Hold]:
    """Return who has had a task, in the order of its begins, and last those who have not begun it."""
    holds: list[_Hold] = []
    for entry in entries:
        match entry.what:
            case "received":
                holds.append(_Hold(entry.by, entry.pid, entry.at))
            case "began":
                main = max((each for each in mains.get(entry.by, ()) if each[0] <= entry.at), default=(0.0, 0))[1]
                waiting = [hold for hold in holds if hold.main == main and hold.began == math.inf]
                if not waiting:
                    waiting = [_Hold(entry.by, main, entry.at)]
                    holds += waiting
                waiting[0].began, waiting[0].child = entry.at, entry.pid
            case "ended":
                for hold in holds:
                    if hold.child == entry.pid and hold.began <= entry.at and hold.ended == math.inf:
                        hold.ended, hold.state = entry.at, entry.state
                        break
            case _:
                pass
    return sorted(holds, key=lambda hold: (hold.began, hold.since))


def _judge(
    id: str,
    stored: bool,
    holds: list[_Hold],
    harm: Sequence[Harm],
    verdict: Verdict,
    *,
    late: bool,
    unstored: float,
    drained: bool,
) -> None:
    runs = [hold for hold in holds if hold.began < math.inf]
    verdict.counts["runs"] += len(runs)
    for index, run in enumerate(runs[1:], 1):
        cause = next(
            (
                (hold, each)
                for hold in holds
                if hold.since < run.began and not hold.used and hold not in runs[index + 1 :]
                for each in harm
                if (_thawed(each, run) if hold is run else _explains(each, hold, run, late=late, unstored=unstored))
            ),
            None,
        )
        if cause is None:
            before = runs[index - 1]
            took = "not ended" if before.ended == math.inf else f"ended after {before.ended - before.began:.3f} s"
            text = f"again by {run.by}, {run.began - before.began:.3f} s after {before.by} had begun it ({took})"
            verdict.findings.append(Finding("repeat", id, text))
        else:
            cause[0].used = True
            verdict.counts[f"repeated after {cause[1].what}"] += 1
    if any(hold.state == "SUCCESS" for hold in runs):
        verdict.counts["done"] += 1
    elif not late and any(_cut(each, hold) for hold in runs for each in harm):
        verdict.counts["given up with their worker"] += 1
    elif stored and drained:
        verdict.findings.append(Finding("lost", id, f"held by {[hold.by for hold in holds]}, and never done"))


def _cut(harm: Harm, hold: _Hold) -> bool:
    """Tell whether a run did not end because its process was killed."""
    hit = (harm.what == "kill" and harm.pid == hold.main) or (harm.what == "child" and harm.pid == hold.child)
    return hit and hold.began <= harm.end and hold.ended == math.inf


def _explains(harm: Harm, hold: _Hold, run: _Hold, *, late: bool, unstored: float) -> bool:
    """Tell whether *run* is there because of what was done to who had *hold* of the task."""
    if harm.begin > run.began or hold.since > harm.end:
        return False
    if harm.what == "broker":
        pass
    elif harm.what == "child":
        if harm.pid != hold.child:
            return False
    elif harm.pid != hold.main:
        return False
    # When its acknowledgement was on its way: what was stored by then cannot come again.
    settled = hold.ended if late else hold.began
    return settled + unstored >= harm.begin


def _thawed(harm: Harm, run: _Hold) -> bool:
    """Tell whether a worker stood still with *run* in hand, which others have done by the time that it began it."""
    return harm.what == "freeze" and harm.pid == run.main and run.since <= harm.begin <= run.began


def ours(entries: Iterable[Entry], ids: Iterable[str]) -> list[Entry]:
    """Return what concerns some tasks, and what concerns none."""
    wanted = set(ids)
    return [entry for entry in entries if not entry.id or entry.id in wanted]
