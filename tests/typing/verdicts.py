"""What mypy and pyright say about the files beside this one, line by line, and about the package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MARK = re.compile(r"# fails(?: only in (?P<only>mypy|pyright))?: \S")
CHECKERS = ("mypy", "pyright")
# Hints that something is unused or unknown: a line that must fail needs an error that says why.
WEAK = ("reportUnused", "reportUnknown", "reportMissing", "unused-")


@dataclass(frozen=True)
class Error:
    """One error of a checker."""

    file: str
    line: int
    rule: str
    text: str


@dataclass(frozen=True)
class Symbol:
    """One name that brokerkit exports, and whether its type is declared as a whole."""

    name: str
    known: bool


def expected(file: str, checker: str) -> dict[int, str]:
    """Return the lines of *file* that must fail for *checker*."""
    lines = (HERE / file).read_text(encoding="utf-8").splitlines()
    marked = ((number, line, MARK.search(line)) for number, line in enumerate(lines, start=1))
    return {number: line.strip() for number, line, mark in marked if mark and mark["only"] in (None, checker)}


def run(checker: str, files: list[str]) -> list[Error]:
    """Return the errors of *checker* in *files* of this directory."""
    return {"mypy": _mypy, "pyright": _pyright}[checker](files)


def strong(errors: list[Error], file: str) -> dict[int, list[Error]]:
    """Return the errors in *file* that say what is wrong, by line."""
    found: dict[int, list[Error]] = {}
    for error in errors:
        if error.file == file and not error.rule.startswith(WEAK):
            found.setdefault(error.line, []).append(error)
    return found


def symbols() -> list[Symbol]:
    """Return every public name of brokerkit, as pyright's check of packages sees it."""
    done = _call("pyright", "--verifytypes", "brokerkit", "--ignoreexternal", "--outputjson")
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pyright did not run: {done.stdout}{done.stderr}")
    return [
        Symbol(item["name"], item["isTypeKnown"] and not item["isTypeAmbiguous"])
        for item in json.loads(done.stdout)["typeCompleteness"]["symbols"]
        if item["isExported"]
    ]


def _call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module of this Python in this directory; both checkers find brokerkit in the repository."""
    bin_ = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "MYPYPATH": f"{HERE}{os.pathsep}{ROOT}",
        # pyright --verifytypes takes no --pythonpath: it asks the first Python that it finds for its search path.
        "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, check=False, timeout=300)


def _mypy(files: list[str]) -> list[Error]:
    cache = str(ROOT / ".mypy_cache" / "typing")
    done = _call(
        "mypy", "--strict", "--config-file=", "--explicit-package-bases", "--cache-dir", cache, "--output=json", *files
    )
    if done.returncode not in (0, 1) or done.stderr:
        raise RuntimeError(f"mypy did not run: {done.stdout}{done.stderr}")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [
        Error(Path(item["file"]).name, item["line"], item["code"] or "", item["message"])
        for item in found
        if item["severity"] == "error"
    ]


def _pyright(files: list[str]) -> list[Error]:
    done = _call("pyright", "--project", str(HERE), "--pythonpath", sys.executable, "--outputjson")
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pyright did not run: {done.stdout}{done.stderr}")
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = [
        Error(Path(item["file"]).name, item["range"]["start"]["line"] + 1, item.get("rule", ""), item["message"])
        for item in found
        if item["severity"] == "error"
    ]
    return [error for error in errors if error.file in files]
