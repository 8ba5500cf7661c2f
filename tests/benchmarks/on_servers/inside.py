"""Measuring in this process, for tests: one part after the other."""

from __future__ import annotations

import io
from typing import Final

import msgspec

from ..frame import RESULT, Assignment, Part, Row, Work, believe, run_part
from ..job import Figures

PATIENCE: Final = 30.0


def inside(
    row: type[Row], work: Work, url: str, n: int = 400, *, entity: str = "bench", limit: float = PATIENCE
) -> Figures:
    """Measure *row* with *n* messages; *limit* is how long it may run, besides what is done before and behind."""

    def part(name: Part) -> Figures:
        out = io.StringIO()
        seconds = limit if name == "run" else PATIENCE
        run_part(Assignment(row.__module__, row.__qualname__, work, name, n, url, entity, seconds, row.behind), out)
        return msgspec.json.decode(out.getvalue().rpartition(RESULT)[2], type=Figures)

    if "fill" in row.parts(work):
        filled = part("fill")
        assert filled.error is None, filled.error
    figures = part("run")
    if figures.error is None:
        believe(figures, part("audit"), work)
    return figures
