"""The frame of the benchmarks: a row that loses or doubles a message shows no figure."""

from __future__ import annotations

import contextlib
import io

import pytest

from . import toys
from .frame import RESULT, Assignment, Backend, Goal, Plan, Results, Row, Work, measure, run_part, run_plan
from .job import Figures
from .probes import Finding, Growth
from .table import digest, judge, render, render_findings, summary

KEYED = Work(name="keyed", title="a topic", backend="toy", keyed=True)
TOY = Backend(name="toy", serve=lambda: contextlib.nullcontext("toy://"))


def inside(row: type[Row], n: int = 2500, work: Work = KEYED, limit: float = 10.0) -> Figures:
    """Measure *row* in this process."""
    import msgspec

    out = io.StringIO()
    run_part(Assignment(row.__module__, row.__qualname__, work, "run", n, "toy://", "toy", limit), out)
    return msgspec.json.decode(out.getvalue().removeprefix(RESULT), type=Figures)


def test_an_honest_row_has_figures() -> None:
    figures = inside(toys.Honest)
    assert figures.flaw() is None
    assert figures.handled == 2500
    assert figures.rate > 0


@pytest.mark.parametrize(
    "row, flaw",
    [
        (toys.Loses, "1 lost of 2500"),
        (toys.Doubles, "1 double, 1 out of order of 2500"),
        (toys.Swaps, "1 lost, 1 double of 2500"),
        (toys.Invents, "1 never published of 2500"),
        (toys.Reorders, "1500 out of order of 2500"),
        (toys.Careless, None),
        (toys.Forgets, "1 unsettled of 2500"),
        (toys.Fails, "ValueError: no room"),
        (toys.Timeless, "no time was taken of 2500"),
    ],
)
def test_a_row_that_misbehaves_has_a_flaw(row: type[Row], flaw: str | None) -> None:
    assert inside(row).flaw() == flaw


def test_a_row_that_hangs_is_given_up() -> None:
    assert inside(toys.Hangs, limit=0.01).flaw() == "not done after 0.01 s, 0 of 2500 handled"


def test_latency_leaves_out_the_first_tenth() -> None:
    figures = inside(toys.Waits, n=100)
    assert figures.p50 is not None
    assert figures.p99 is not None
    assert 10 <= figures.p50 <= figures.p99 < 1000


def test_a_dead_process_is_a_flaw_and_not_an_end() -> None:
    assert measure(toys.Dies, KEYED, 10, "toy://").flaw() == "the process ended without a result (exit code 3)"


def test_a_row_without_its_environment_says_so() -> None:
    assert measure(toys.Homeless, KEYED, 10, "toy://").flaw() == "NOT COMPARED: no environment"


def test_a_row_may_fill_before_and_feed_beside() -> None:
    figures = measure(toys.Relays, KEYED, 1000, "toy://")
    assert figures.flaw() is None
    assert figures.handled == 1000


def test_a_plan_runs_all_rows_in_alternating_order_on_a_clean_backend() -> None:
    cleaned: list[str] = []
    backend = Backend(name="toy", serve=lambda: contextlib.nullcontext("toy://"), clean=cleaned.append)
    said: list[str] = []
    plan: Plan = [(KEYED, (toys.Honest, toys.Loses))]
    results = run_plan(plan, [backend], rounds=2, seconds=0.1, say=said.append, fixed=50)
    # What has a flaw is not measured again.
    assert cleaned == ["toy://"] * 3
    assert [len(figures) for figures in results.rounds.values()] == [2, 1]
    assert said == ["round 1 of 2", "  keyed, loses: 1 lost of 50", "round 2 of 2"]
    table = render(results)
    assert "no figure: 1 lost of 50" in table
    text, complete = summary(results, [])
    assert not complete
    assert "keyed, loses: 1 lost of 50" in text


def results(work: Work, **walls: list[float]) -> Results:
    """Return the results of rows that took so long for 100 messages, in each round."""
    rows = tuple(type(name, (Row,), {"name": name}) for name in walls)
    made = Results([(work, rows)])
    for name, taken in walls.items():
        made.rounds[work.name, name] = [Figures(n=100, handled=100, wall=wall, cpu=wall) for wall in taken]
    return made


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    work = Work(name="w", title="w", backend="toy", goals=(Goal(row="ours", than="bare", factor=0.3),))
    # Within the rounds 0.5, 0.2 and 0.5; the medians of the rows alone would give 0.25.
    made = results(work, ours=[2.0, 10.0, 4.0], bare=[1.0, 2.0, 2.0])
    assert made.ratio(work, "ours", "bare") == pytest.approx(0.5)
    assert judge(made, work, work.goals[0]) == (True, ">= 0.3 x bare: 0.50, reached")
    slow = results(work, ours=[10.0, 10.0, 10.0], bare=[1.0, 1.0, 1.0])
    assert judge(slow, work, work.goals[0]) == (False, ">= 0.3 x bare: 0.10, MISSED")


def test_one_flawed_round_takes_the_figures_of_its_row() -> None:
    work = Work(name="w", title="w", backend="toy", goals=(Goal(row="ours", than="bare", factor=0.3),))
    made = results(work, ours=[1.0, 1.0], bare=[1.0, 1.0])
    made.rounds["w", "ours"][1].doubles = 1
    assert made.ratio(work, "ours", "bare") is None
    assert judge(made, work, work.goals[0]) == (False, ">= 0.3 x bare: not measured")
    assert "no figure: 1 double of 100" in render(made)


def test_a_latency_goal_is_an_upper_limit() -> None:
    goal = Goal(row="ours", than="bare", factor=1.2)
    work = Work(name="w", title="w", backend="toy", metric="latency", goals=(goal,))
    made = results(work, ours=[1.0], bare=[1.0])
    made.rounds["w", "ours"][0].p50 = made.rounds["w", "ours"][0].p99 = 3.0
    made.rounds["w", "bare"][0].p50 = made.rounds["w", "bare"][0].p99 = 2.0
    assert judge(made, work, goal) == (False, "p50 <= 1.2 x bare: 1.50, MISSED")
    assert "1.50" in render(made)


def test_in_short_ours_stands_beside_the_best_other_library() -> None:
    work = Work(name="w", title="w", backend="toy", goals=(Goal(row="ours", than="bare", factor=0.3),))
    made = results(work, ours=[2.0], bare=[1.0], slow=[10.0], slower=[20.0], flawed=[1.0])
    for row in made.plan[0][1]:
        row.peer = row.name in {"slow", "slower", "flawed"}
    made.rounds["w", "flawed"][0].doubles = 1
    assert digest(made).splitlines()[2:] == [
        "  w: best other library slow 0.10 x bare",
        "    ours >= 0.3 x bare: 0.50, reached",
    ]


def test_growth_counts_from_the_end_of_the_first_fifth() -> None:
    samples = [10.0, 20.0, 30.0, 31.0, 33.0, 32.0, 32.0, 31.0, 31.0, 31.0]
    assert Growth(handled=1, doubles=0, samples=samples, seconds=1.0).grown == 3.0


def test_findings_show_reached_missed_and_flawed() -> None:
    findings = [
        Finding(name="small", value=1.0, unit="MiB", limit=2.0),
        Finding(name="large", value=3.0, unit="MiB", limit=2.0),
        Finding(name="broken", flaw="5 of 6 handled"),
    ]
    shown = render_findings(findings)
    assert [word in shown for word in ("reached", "MISSED", "no figure: 5 of 6 handled")] == [True] * 3
    text, complete = summary(Results([]), findings)
    assert not complete
    assert "goals reached: 1 of 3" in text
