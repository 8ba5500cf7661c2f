"""The history checker: what was promised, and did not hold.

It knows nothing of brokers.  It gets what processes have written down and which faults there were, and a repeat is in order
only if one of these explains it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from .history import Entry
from .trouble import Fault, caught_by, slow, stalled

MARGIN: Final = 1.0
"""Seconds after a fault in which its victims may still act on what they knew before."""

DEADLY: Final = 1000
"""Failures of a message that ends the process of its handler."""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What is promised of one queue or topic."""

    ordered: bool = False
    """First deliveries of a key come in publish order."""
    partitioned: bool = False
    """Members own partitions: where one moves, another member begins what is in hand once more."""
    copied: bool = False
    """What goes on, or back, is a copy, stored before its original is done: a fault in between leaves both."""
    resets: bool = False
    """Deliveries are counted from 1 again where a partition gets another leader."""
    attempts: int = 3
    """After so many failed runs a message is dead."""
    limit: int = 10
    """After so many deliveries without an outcome it is."""
    unstored: float = 1.0
    """Seconds in which an acknowledgement is on its way to the server, busy machines included."""
    uncounted: float = 0.0
    """Seconds from the begin of a first delivery in which a kill may leave no trace of it."""
    takeover: float = 4.0
    """Seconds until what a dead or frozen consumer had belongs to another one."""
    prompt: float = math.inf
    """Seconds after which a stored message must be with a handler, unless it was in the hands of a victim."""
    atomic: bool = True
    """What a handler publishes is stored with its acknowledgement, once; else once for each of its runs, and perhaps once
    more where the answer to that was lost."""


class Finding(msgspec.Struct, frozen=True):
    """A broken promise."""

    kind: str
    of: str
    id: str
    text: str


class _Run(msgspec.Struct):
    """One run of a handler."""

    by: str
    began: float
    attempt: int
    deliveries: int
    position: str
    ended: float = math.inf
    outcome: str = ""


class Outbound(msgspec.Struct):
    """What became of publishing one message."""

    entry: Entry
    result: str = ""
    at: float = math.inf


class Verdict(msgspec.Struct):
    """What the checker found, and how much there was to look at."""

    findings: list[Finding] = []
    counts: Counter[str] = msgspec.field(default_factory=Counter)
    repeats: Counter[str] = msgspec.field(default_factory=Counter)
    """By the fault that explains them."""

    def kinds(self) -> set[str]:
        """Return which promises were broken."""
        return {finding.kind for finding in self.findings}

    def summary(self) -> str:
        """Say it in one line."""
        parts = [f"{count} {name}" for name, count in sorted(self.counts.items())]
        parts += [f"{count} repeated after {name}" for name, count in sorted(self.repeats.items())]
        broken = Counter(finding.kind for finding in self.findings)
        parts += [f"{count} {kind.upper()}" for kind, count in sorted(broken.items())]
        return ", ".join(parts)


def check(
    entries: Iterable[Entry],
    faults: Sequence[Fault],
    terms: Mapping[str, Terms],
    *,
    letters: Mapping[str, Sequence[str]],
    effects: Mapping[str, Sequence[str]],
    drained: bool = True,
) -> Verdict:
    """Return what did not hold.

    *letters* are the ids in the dead letters of each queue or topic, *effects* those of what its handlers have published,
    *drained* whether consumers had the time to finish.
    """
    verdict = Verdict()
    entries = sorted(entries, key=lambda entry: entry.at)
    stalls = stalled(entries)
    for entry in entries:
        if entry.what in ("corrupt", "problem"):
            verdict.findings.append(Finding(entry.what, entry.of, entry.id, f"{entry.by}: {entry.text}"))
    seen = [*stalls, *slow(entries, [*faults, *stalls])]
    caught = caught_by(entries, [*faults, *seen])
    for name, promised in terms.items():
        mine = [entry for entry in entries if entry.of == name]
        part = _Part(name, mine, [*faults, *seen], promised, verdict, caught)
        part.check(list(letters.get(name, ())), list(effects.get(name, ())), drained=drained)
    verdict.counts["stalls"] = len(stalls)
    return verdict


class _Part:
    """The history of one queue or topic."""

    def __init__(
        self,
        name: str,
        entries: Sequence[Entry],
        faults: Sequence[Fault],
        terms: Terms,
        verdict: Verdict,
        caught: Mapping[tuple[str, float], Fault],
    ) -> None:
        self.name = name
        self.caught = caught
        self.terms = terms
        self.verdict = verdict
        # Of several explanations the first one counts: what was done before what merely happened.
        self.faults = sorted(faults, key=lambda fault: (fault.clean, fault.seen, fault.begin))
        self.published: dict[str, Outbound] = {}
        self.runs: dict[str, list[_Run]] = defaultdict(list)
        self.acked: dict[str, Entry] = {}
        running: dict[tuple[str, str], _Run] = {}
        for entry in entries:
            match entry.what:
                case "publish":
                    if entry.id in self.published:
                        self.find("problem", entry.id, "published twice by the program itself")
                    self.published.setdefault(entry.id, Outbound(entry))
                case "confirmed" | "refused" | "unknown":
                    outbound = self.published[entry.id]
                    outbound.result, outbound.at = entry.what, entry.at
                case "started":
                    run = _Run(entry.by, entry.at, entry.attempt, entry.deliveries, entry.position)
                    running[entry.by, entry.id] = run
                    self.runs[entry.id].append(run)
                case "handled" | "failed":
                    run = running[entry.by, entry.id]
                    run.ended, run.outcome = entry.at, entry.what
                case "acked":
                    before = self.acked.setdefault(entry.id, entry)
                    took = entry.at - before.at
                    if took > 0 and self._same(before, entry) and not self._forgotten(before.at):
                        self.find("acked twice", entry.id, f"again by {entry.by}, {took:.3f} s later")
                case _:
                    pass

    def find(self, kind: str, id: str, text: str) -> None:
        self.verdict.findings.append(Finding(kind, self.name, id, text))

    def check(self, letters: list[str], effects: list[str], *, drained: bool) -> None:
        counts = self.verdict.counts
        for outbound in self.published.values():
            counts[outbound.result or "unanswered"] += 1
        counts["runs"] += sum(map(len, self.runs.values()))
        for id, runs in self.runs.items():
            self._source(id, runs)
            self._repeats(id, runs)
            self._attempts(id, runs)
            self._deliveries(id, runs)
            self._positions(id, runs)
        self._order()
        dead, done = Counter(letters), Counter(effects)
        for what, counter in (("dead letters", dead), ("effects", done)):
            for id in counter:
                if id not in self.published or self.published[id].result == "refused":
                    self.find("unexpected", id, f"in the {what}, and never published")
        for id, outbound in self.published.items():
            self._outcome(id, outbound, dead[id], done[id], drained=drained)

    # ------------------------------------------------------------------ of one message

    def _source(self, id: str, runs: list[_Run]) -> None:
        """It was published, and not reported as not stored; and not too early."""
        outbound = self.published.get(id)
        if outbound is None:
            self.find("unexpected", id, "delivered, and never published")
            return
        if outbound.result == "refused":
            self.find("refused", id, "delivered, and reported as certainly not stored")
        early = outbound.entry.at + outbound.entry.delay - runs[0].began
        if early > 0:
            self.find("early", id, f"delivered {early:.3f} s before its time")

    def _repeats(self, id: str, runs: list[_Run]) -> None:
        """Whatever runs again does so after a failure, or because of a fault."""
        acked = self.acked.get(id)
        used: set[tuple[int | Fault, int]] = set()
        for index, run in enumerate(runs):
            stopped = self._stopped(runs[:index], run)
            if stopped is not None:
                self.verdict.repeats[stopped.what] += 1
                continue
            if acked is not None and run.began > acked.at and self._same(acked, run) and not self._forgotten(acked.at):
                late = run.began - acked.at
                self.find("after ack", id, f"delivered {late:.3f} s after its acknowledgement was stored")
            before = [earlier for earlier in runs[:index] if earlier.attempt >= run.attempt]
            if not before or self._born(runs[:index], run):
                continue
            fault = (
                self._double(id, runs[:index], run, used) if self.terms.copied else self._explanation(before[-1], run)
            )
            if fault is None:
                self.find("repeat", id, f"run again by {run.by}, {run.began - before[-1].began:.3f} s later, no fault")
            else:
                self.verdict.repeats[fault.what] += 1

    def _same(self, acked: Entry, other: Entry | _Run) -> bool:
        """Tell whether what was *acked* is what the *other* is about, and not a copy of it."""
        return not self.terms.copied or acked.position == other.position

    def _born(self, before: Sequence[_Run], run: _Run) -> bool:
        """Tell whether *run* is of a copy, as each failure of the attempt before has made one."""
        if not self.terms.copied or run.attempt == 1:
            return False
        made = sum(
            earlier.attempt == run.attempt - 1 and earlier.outcome == "failed" and earlier.ended <= run.began
            for earlier in before
        )
        return sum(earlier.attempt == run.attempt for earlier in before) < made

    def _double(self, id: str, before: Sequence[_Run], run: _Run, used: set[tuple[int | Fault, int]]) -> Fault | None:
        """Return the fault because of which there is *run* where copies and originals may both be left.

        Each run that has suffered explains one other.  A fault that was between a copy and the end of its original may have
        met what no handler had: what runs then is stored elsewhere.
        """
        same = [index for index, earlier in enumerate(before) if earlier.attempt == run.attempt]
        for index in reversed(same):
            fault = self._explanation(before[index], run)
            if fault is not None and (index, run.attempt) not in used:
                used.add((index, run.attempt))
                return fault
        outbound = self.published.get(id)
        if outbound is None or run.position in {before[index].position for index in same}:
            return None
        for fault in self.faults:
            meets = not fault.clean and fault.excuses and outbound.entry.at <= fault.end and fault.begin <= run.began
            if meets and (fault, run.attempt) not in used:
                used.add((fault, run.attempt))
                return fault
        return None

    def _explanation(self, earlier: _Run, later: _Run) -> Fault | None:
        """Return the fault because of which *later* is the same attempt as *earlier* once more."""
        takeover, unstored = self.terms.takeover, self.terms.unstored
        for fault in self.faults:
            if fault.begin > later.began or not fault.excuses:
                continue
            if not fault.clean:
                if fault.hits(earlier.by):
                    reach = unstored + fault.loses
                    if earlier.began <= fault.end + MARGIN and earlier.ended >= fault.begin - reach:
                        return fault
                if fault.to is None and later.began <= fault.end + MARGIN:
                    return fault  # the server has given to another what it no longer knows to be out
            moved = self.terms.partitioned and (fault.moves or fault.clean)
            if moved and earlier.began <= fault.end + takeover and earlier.ended >= fault.begin:
                return fault  # another owner began where the one before was not through
        return None

    def _stopped(self, before: Iterable[_Run], run: _Run) -> Fault | None:
        """Return the fault that stopped a process when it was about to begin *run*, whose message others got meanwhile."""
        fault = self.caught.get((run.by, run.began))
        return fault if any(earlier.deliveries > run.deliveries for earlier in before) else None

    def _forgotten(self, at: float) -> bool:
        """Tell whether the server may have forgotten what it stored then."""
        return any(fault.loses and fault.begin - fault.loses <= at <= fault.end for fault in self.faults)

    def _attempts(self, id: str, runs: list[_Run]) -> None:
        """The number of an attempt is that of the failed runs, plus one."""
        for index, run in enumerate(runs):
            if not 1 <= run.attempt <= self.terms.attempts:
                self.find("attempts", id, f"attempt {run.attempt} of {self.terms.attempts}")
            elif run.attempt > 1 and not any(
                earlier.attempt == run.attempt - 1 and earlier.outcome == "failed" and earlier.ended <= run.began
                for earlier in runs[:index]
            ):
                self.find("attempts", id, f"attempt {run.attempt}, and attempt {run.attempt - 1} has not failed")

    def _deliveries(self, id: str, runs: list[_Run]) -> None:
        """A crash counts one delivery for what the process held, and nothing else counts."""
        for index, run in enumerate(runs):
            most = 1 + sum(fault.times for fault in self.faults if not fault.clean and fault.begin <= run.began)
            if not 1 <= run.deliveries <= most:
                self.find("deliveries", id, f"delivery {run.deliveries}, after {most - 1} faults")
            same = [
                earlier
                for earlier in runs[:index]
                if earlier.attempt == run.attempt and (not self.terms.copied or earlier.position == run.position)
            ]
            stale = bool(same) and run.deliveries < same[-1].deliveries and self._stopped(same, run) is None
            if stale and not self._forgotten(same[-1].began) and not self._reset(same[-1], run):
                text = f"delivery {run.deliveries} after delivery {same[-1].deliveries}: {run.by} had lost it"
                self.find("deliveries", id, text)
            if run.outcome or not self._killed(run):
                continue
            later = [later for later in runs[index + 1 :] if later.attempt == run.attempt]
            counts = [later.deliveries for later in later if not self._reset(run, later)]
            # Of an original and its copy one may be behind: the other has counted.
            least = max(counts, default=math.inf) if self.terms.copied else min(counts, default=math.inf)
            if least <= run.deliveries:
                self.find("deliveries", id, f"delivery {least} again, after its process was killed")

    def _killed(self, run: _Run) -> bool:
        """Tell whether its process was killed after *run* had begun, and that has to count."""
        counted = 0.0 if run.deliveries > 1 else self.terms.uncounted
        return any(
            fault.what == "kill" and fault.to == run.by and fault.begin - run.began > counted for fault in self.faults
        )

    def _reset(self, earlier: _Run, later: _Run) -> bool:
        """Tell whether deliveries may be counted from 1 again between two runs."""
        return self.terms.resets and any(
            fault.moves and fault.to is None and fault.begin <= later.began and earlier.began <= fault.end + MARGIN
            for fault in self.faults
        )

    def _positions(self, id: str, runs: list[_Run]) -> None:
        """It is stored once: a run of the same attempt is of the same stored message."""
        outbound = self.published.get(id)
        if outbound is None or self.terms.copied:
            return
        if any(fault.wipes and outbound.entry.at <= fault.end and outbound.at >= fault.begin for fault in self.faults):
            return  # sent again, because the server no longer knew that it had it
        places: dict[int, set[str]] = defaultdict(set)
        for run in runs:
            places[0 if self.terms.ordered else run.attempt].add(run.position)
        for found in places.values():
            if len(found) > 1:
                self.find("doubled", id, f"stored at {' and at '.join(sorted(found))}")

    def _outcome(self, id: str, outbound: Outbound, dead: int, done: int, *, drained: bool) -> None:
        """It was handled, or is dead, once."""
        entry = outbound.entry
        runs = self.runs.get(id, [])
        handled = any(run.outcome == "handled" for run in runs)
        doomed = entry.failures >= self.terms.attempts
        if dead > self._most(run for run in runs if run.attempt == self.terms.attempts):
            self.find("doubled", id, f"{dead} dead letters")
        spent = any(run.outcome == "failed" and run.attempt == self.terms.attempts for run in runs)
        if entry.failures == DEADLY:
            spent = bool(runs) and runs[-1].deliveries == self.terms.limit
        if dead and not (doomed and spent):
            self.find("dead", id, "in the dead letters without having failed that often")
        if done > self._most(run for run in runs if run.outcome == "handled"):
            self.find("doubled", id, f"what its handler published is stored {done} times")
        if done and not entry.staged:
            self.find("unexpected", id, "its handler has published nothing")
        if runs and outbound.result == "confirmed":
            self._late(id, outbound, runs)
        if not drained or self._gone(outbound):
            return
        if outbound.result != "confirmed" and not runs:
            return
        if doomed and not dead:
            self.find("lost" if not runs else "stuck", id, "failed as often as it could, and no dead letter")
        elif not doomed and not handled:
            self.find("lost" if not runs else "stuck", id, "published, and not handled")
        if entry.staged and handled and not done:
            self.find("lost", id, "what its handler has published")

    def _most(self, runs: Iterable[_Run]) -> int:
        """Return how often what *runs* have published may be stored."""
        if self.terms.atomic:
            return 1
        unanswered = [fault for fault in self.faults if fault.to is None and fault.excuses and not fault.clean]
        return max(1, sum(1 + any(self._meets(fault, run) for fault in unanswered) for run in runs))

    def _meets(self, fault: Fault, run: _Run) -> bool:
        return fault.begin - self.terms.unstored <= run.ended and run.began <= fault.end + MARGIN

    def _gone(self, outbound: Outbound) -> bool:
        """Tell whether a fault may have removed the message, and nobody promises otherwise."""
        for fault in self.faults:
            if fault.wipes and outbound.entry.at <= fault.end:
                return True
            if fault.loses and outbound.entry.at <= fault.end and outbound.at >= fault.begin - fault.loses:
                return True
        return False

    def _late(self, id: str, outbound: Outbound, runs: list[_Run]) -> None:
        """It was not left lying while somebody could have handled it."""
        waited = runs[0].began - outbound.at - outbound.entry.delay
        taken = any(fault.begin - MARGIN <= outbound.at <= fault.begin + MARGIN / 4 for fault in self.faults)
        if waited > self.terms.prompt and not taken:
            self.find("late", id, f"handled {waited:.3f} s after it could have been")

    # ------------------------------------------------------------------ of all

    def _order(self) -> None:
        """First deliveries of a key come in publish order."""
        if not self.terms.ordered:
            return
        last: dict[str, tuple[int, str]] = {}
        firsts = sorted((runs[0].began, id) for id, runs in self.runs.items() if id in self.published)
        for _, id in firsts:
            entry = self.published[id].entry
            number, other = last.get(entry.key, (-1, ""))
            if entry.number < number:
                self.find("order", id, f"delivered for the first time after {other}, which follows it")
            else:
                last[entry.key] = (entry.number, id)
