"""``python -m tests.mutants [NAME ...]``: plant mutants, print which test caught each, fail if one survives."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests import servers
from tests.servers import kafka

from .farm import WHOLE, Farm, Project, Verdict
from .kafka import CONSUMED, FETCHED, GUARDED, PUBLISHED
from .kafka_queues import ACQUIRED, SORTED, WAITED
from .lua import check
from .mutant import Mutant
from .outcomes import OUTCOMES
from .queues import QUEUES, SETTLING
from .redis_driver import LINK, PUBLISHING
from .redis_queues import SERVED_QUEUES
from .redis_topics import SERVED_TOPICS
from .running import RUNNING
from .topics import ELSEWHERE, TOPICS, TRACKER

REDIS: tuple[Mutant, ...] = (*LINK, *PUBLISHING, *SERVED_QUEUES, *SERVED_TOPICS)
KAFKA: tuple[Mutant, ...] = (*PUBLISHED, *FETCHED, *CONSUMED, *GUARDED, *ACQUIRED, *SORTED, *WAITED)
ALL: tuple[Mutant, ...] = (*SETTLING, *QUEUES, *TOPICS, *TRACKER, *ELSEWHERE, *OUTCOMES, *RUNNING, *REDIS, *KAFKA)
ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mutants that the command line names; return 1 unless all were caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="part of a mutant's name or file; without any, all")
    parser.add_argument("--sample", type=int, help="only so many, drawn at random")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="repeats a sample")
    parser.add_argument("--named", action="store_true", help="run only the tests that a mutant names, not the rest")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="name the mutants and end")
    options = parser.parse_args(arguments)
    chosen = [
        one
        for one in ALL
        if not options.names or any(name in text for name in options.names for text in (one.name, one.file))
    ]
    if not chosen:
        print("no mutant has such a name", file=sys.stderr)
        return 1
    if options.sample is not None and options.sample < len(chosen):
        print(f"{options.sample} of {len(chosen)} mutants, --seed {options.seed}")
        drawn = random.Random(options.seed).sample(range(len(chosen)), options.sample)
        chosen = [chosen[number] for number in sorted(drawn)]
    if options.list:
        print("\n".join(f"{one.name}: {one.breaks}" for one in chosen))
        return 0
    began = time.monotonic()

    def say(verdict: Verdict) -> None:
        if verdict.kind != "caught":
            print(f"  {verdict.mutant.name}: {verdict.kind}: {verdict.detail}", file=sys.stderr, flush=True)

    whole = 0.0 if options.named else WHOLE
    try:
        with kafka.Run():  # one broker for all of them, if any of them needs one
            verdicts = Farm(Project(ROOT), check=check, workers=options.workers, whole=whole).run(chosen, say)
    finally:
        servers.stop_shared()
    print(table(verdicts))
    caught = sum(verdict.kind == "caught" for verdict in verdicts)
    print(f"{caught} of {len(verdicts)} mutants caught in {time.monotonic() - began:.0f} s")
    return 0 if caught == len(verdicts) else 1


def table(verdicts: Sequence[Verdict]) -> str:
    """Return one line for each mutant: what it is, what it breaks, and the test that caught it."""
    lines = []
    name = max(len(one.mutant.name) for one in verdicts)
    breaks = max(len(one.mutant.breaks) for one in verdicts)
    for one in verdicts:
        found = one.test.rpartition("/")[2] if one.kind == "caught" else f"{one.kind}: {one.detail}"
        if one.kind == "caught" and one.detail:
            found += f" ({one.detail})"
        if one.elsewhere and one.kind == "caught":
            found += " (not one of the tests it names)"
        lines.append(f"{one.mutant.name:{name}}  {one.mutant.breaks:{breaks}}  {found}")
    head = f"{'mutant':{name}}  {'what it breaks':{breaks}}  caught by"
    return "\n".join([head, *lines])


if __name__ == "__main__":
    sys.exit(main())
