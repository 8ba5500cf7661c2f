"""README's programs run, its first screen fits, and its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
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
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_each_program_compiles(number: int) -> None:
    compile(BLOCKS[number], f"README, program {number}", "exec", flags=0x2000)  # ast.PyCF_ALLOW_TOP_LEVEL_AWAIT


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_to_files_that_exist(page: str) -> None:
    path = ROOT / page if (ROOT / page).exists() else ROOT / "docs" / page
    text = path.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    assert not [target for target in targets if not (path.parent / target).exists()]
