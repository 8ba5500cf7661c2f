"""``python -m tests.benchmarks``: measure everything and print the tables."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version

import msgspec


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return 1 if a row has no figures."""
    options = _parser().parse_args(arguments)
    if options.part or options.probe:
        return _inside(options)
    # Only the parent knows all rows: a fresh process imports what its own row needs and nothing else.
    from .frame import run_plan
    from .parts import BENCHES, chosen
    from .probes import Finding
    from .table import digest, render, render_findings, summary

    unknown = set(options.on) - set(BENCHES)
    if unknown:
        sys.exit(f"nothing is measured on {', '.join(sorted(unknown))}: there are {', '.join(BENCHES)}")
    parts = chosen(options.on or BENCHES, options.only or (), options.rows or ())
    if options.list:
        for bench, plan, probes in parts:
            for work, rows in plan:
                print(f"{bench.name}: {work.name:24} {work.title}: {', '.join(row.name for row in rows)}")
            for probe in probes:
                print(f"{bench.name}: {probe.name:24} {probe.title}")
        return 0
    rounds = options.rounds or (1 if options.smoke else 5)

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True)

    began = time.monotonic()
    complete = True
    for bench, plan, probes in parts:
        print("; ".join([_machine(bench.libraries), *bench.others()]), flush=True)
        print(
            f"{bench.name}: {rounds} rounds, alternating; medians; ratios compare rows of the same round; each measurement in "
            "a fresh process, uvloop; 100 B of JSON"
        )
        if options.smoke:
            print("SMOKE: tiny and once; these figures mean nothing")
        fixed = 500 if options.smoke else None
        results = run_plan(plan, [bench.backend], rounds=rounds, seconds=options.seconds, say=say, fixed=fixed)
        if plan:
            print(render(results), digest(results), sep="\n", flush=True)
        findings: list[Finding] = []
        for probe in probes:
            say(probe.title)
            findings += probe.find(options.smoke)
        if findings:
            print(render_findings(findings))
        text, whole = summary(results, findings)
        print(text + "\n", flush=True)
        complete = complete and whole
    return 0 if complete else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("on", nargs="*", help="memory, redis, kafka, celery; all if none is named")
    parser.add_argument("--only", action="append", help="only works and probes whose name contains this; repeatable")
    parser.add_argument(
        "--rows", action="append", help="only rows whose name contains this, and their yardstick; repeatable"
    )
    parser.add_argument("--rounds", type=int, help="measurements of each row (default 5)")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long one measurement takes, about")
    parser.add_argument(
        "--smoke",
        "--quick",
        action="store_true",
        help="tiny and once: shows that each row works, its figures mean nothing",
    )
    parser.add_argument("--list", action="store_true", help="name what would be measured")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    return parser


def _inside(options: argparse.Namespace) -> int:
    if options.probe:
        from .probes import Ask

        question = msgspec.json.decode(options.probe, type=Ask)
        print(importlib.import_module(question.module, __package__).answer(question).decode())
    else:
        from .frame import Assignment, run_part

        run_part(msgspec.json.decode(options.part, type=Assignment), sys.stdout)
    return 0


def _machine(names: Iterable[str]) -> str:
    libraries = []
    for name in ("anyio", "orjson", "msgspec", "uvloop", *names):
        try:
            libraries.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            libraries.append(f"{name} missing")
    return f"Python {platform.python_version()} on {platform.system()}, {os.cpu_count()} cores; {', '.join(libraries)}"


if __name__ == "__main__":
    sys.exit(main())
