"""Fresh processes: each measurement has one to itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Final

PACKAGE: Final = __package__ or "tests.benchmarks"
"""What this package is called here: pytest calls it by its last name only."""
ROOT: Final = Path(__file__).resolve().parents[len(PACKAGE.split("."))]
PROJECT: Final = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """Return the environment of a fresh process, which finds this package and brokerkit as this one does."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    paths = [str(ROOT), str(PROJECT), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def start(*arguments: str, python: str | None = None, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """Start this package's command line in a fresh process, its output piped; *python* is another interpreter for it."""
    return subprocess.Popen(
        [python or sys.executable, "-m", PACKAGE, *arguments],
        stdin=stdin,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=PROJECT,
    )


def output(process: subprocess.Popen[str]) -> IO[str]:
    """Return the piped output of *process*."""
    assert process.stdout is not None
    return process.stdout
