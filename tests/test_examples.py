"""Each example runs, ends by itself and prints what its docstring says."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
DEMO = {"orders", "orders_topics", "orders_ledger", "orders_stage"}
PROGRAMS = [
    path for path in sorted(EXAMPLES.glob("*.py")) if path.stem not in DEMO and not path.stem.startswith("test_")
]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program as a user would, but for warnings, which fail it."""
    environment = {**os.environ, "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)


def promised(path: Path) -> str:
    """Return what the docstring of an example says that it prints."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    _, found, output = text.partition("Prints:\n\n")
    assert found, f"the docstring of {path.name} does not say what it prints"
    return textwrap.dedent(output).rstrip() + "\n"


def test_there_are_examples() -> None:
    assert {"hello", "retry", "delay", "resources", "replay", "request", "batch"} <= {path.stem for path in PROGRAMS}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_prints_what_it_says(path: Path) -> None:
    done = run(path)
    assert (done.stdout, done.stderr, done.returncode) == (promised(path), "", 0)


def test_the_example_of_a_test_passes() -> None:
    done = run("-m", "pytest", "-p", "no:cacheprovider", "--rootdir", EXAMPLES.parent, EXAMPLES / "test_billing.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize("program", ["orders.py", "orders_topics.py"])
def test_the_sums_of_the_demo_add_up(program: str) -> None:
    done = run(EXAMPLES / program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "The sums add up" in done.stdout
