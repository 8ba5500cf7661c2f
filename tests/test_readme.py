"""README's programs run, its first screen fits, and its links lead somewhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_program_runs_and_prints_what_it_says() -> None:
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert shown is not None, "README does not say what its first program prints"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKS[0]], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == (shown[1], "", 0)


def test_the_first_program_has_at_most_20_lines() -> None:
    assert len(BLOCKS[0].splitlines()) <= 20


def test_the_first_screen_has_program_and_commands() -> None:
    screen = "\n".join(README.splitlines()[:45])
    assert BLOCKS[0] in screen
    assert "make demo" in screen
    assert "make test" in screen


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 190


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_looks_like_python_is_python(page: Path) -> None:
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
        compile(block, f"{page.name}, program {number}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if "://" not in target and not (page.parent / target).exists()]
