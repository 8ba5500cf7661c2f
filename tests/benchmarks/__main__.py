"""``python -m tests.benchmarks``: measure everything and print the tables."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import msgspec


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return 1 if a row has no figures."""
    options = _parser().parse_args(arguments)
    if options.part or options.probe:
        return _inside(options)
    # Only the parent knows all rows: a fresh process imports what its own row needs and nothing else.
    from . import probes
    from .frame import run_plan
    from .memory import MEMORY, plan
    from .table import render, render_findings, summary

    whole = plan()
    if options.only:
        whole = [(work, rows) for work, rows in whole if any(part in work.name for part in options.only)]
    wanted = [probe for probe in probes.ALL if not options.only or any(part in probe.name for part in options.only)]
    if options.list:
        for work, rows in whole:
            print(f"{work.name:24} {work.title}: {', '.join(row.name for row in rows)}")
        for probe in wanted:
            print(f"{probe.name:24} {probe.title}")
        return 0
    rounds = options.rounds or (1 if options.smoke else 5)

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True)

    began = time.monotonic()
    print(_machine(), flush=True)
    print(
        f"{rounds} rounds, alternating; medians; ratios compare rows of the same round; each measurement in a fresh process, "
        "uvloop; 100 B of JSON"
    )
    results = run_plan(
        whole, [MEMORY], rounds=rounds, seconds=options.seconds, say=say, fixed=500 if options.smoke else None
    )
    print(render(results), flush=True)
    findings: list[probes.Finding] = []
    for probe in wanted:
        say(probe.title)
        findings += probe.find(options.smoke)
    if findings:
        print(render_findings(findings))
    text, complete = summary(results, findings)
    print(text)
    return 0 if complete else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", help="only works and probes whose name contains this; repeatable")
    parser.add_argument("--rounds", type=int, help="measurements of each row (default 5)")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long one measurement takes, about")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny and once: shows that each row works, its figures mean nothing"
    )
    parser.add_argument("--list", action="store_true", help="name what would be measured")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    return parser


def _inside(options: argparse.Namespace) -> int:
    if options.probe:
        from .answers import answer
        from .probes import Ask

        print(answer(msgspec.json.decode(options.probe, type=Ask)).decode())
    else:
        from .frame import Assignment, run_part

        run_part(msgspec.json.decode(options.part, type=Assignment), sys.stdout)
    return 0


def _machine() -> str:
    libraries = []
    for name in ("anyio", "orjson", "msgspec", "uvloop", "faststream", "taskiq"):
        try:
            libraries.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            libraries.append(f"{name} missing")
    return f"Python {platform.python_version()} on {platform.system()}, {os.cpu_count()} cores; {', '.join(libraries)}"


if __name__ == "__main__":
    sys.exit(main())
