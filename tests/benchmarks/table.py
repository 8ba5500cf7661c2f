"""What a run found, as people read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from .frame import Goal, Results, Row, Work
from .probes import Finding


def render(results: Results) -> str:
    """Return the tables of all works; a row with a flaw shows what is wrong instead of figures."""
    lines: list[str] = []
    for work, rows in results.plan:
        width = max(len(row.name) for row in rows)
        lines += ["", f"{work.name}: {work.title}", _head(work, width)]
        lines += [_row(results, work, row, width) for row in rows]
    notes = {row.name: row.note for _, rows in results.plan for row in rows if row.note}
    lines.append("")
    lines += [f"{name}: {note}" for name, note in notes.items()]
    return "\n".join(lines)


def _head(work: Work, width: int) -> str:
    ratio = f"/ {work.yardstick}"
    if work.metric == "latency":
        return f"  {'':{width}} {'messages':>9} {'p50 ms':>9} {'p99 ms':>9} {'':>10} {'us CPU':>8} {ratio:>10}  goal"
    return f"  {'':{width}} {'messages':>9} {'msgs/s':>9} {'least':>9} {'most':>10} {'us CPU':>8} {ratio:>10}  goal"


def _row(results: Results, work: Work, row: type[Row], width: int) -> str:
    figures = results.good(work, row.name)
    if not figures:
        return f"  {row.name:{width}} no figure: {results.flaw(work, row.name) or 'not measured'}"
    ratio = results.ratio(work, row.name, work.yardstick)
    shown = "-" if ratio is None else f"{ratio:.2f}"
    cpu = median(one.cpu / one.n for one in figures) * 1e6
    goals = "; ".join(judge(results, work, goal)[1] for goal in work.goals if goal.row == row.name)
    if work.metric == "latency":
        p50, p99 = median(one.p50 or 0 for one in figures), median(one.p99 or 0 for one in figures)
        return (
            f"  {row.name:{width}} {figures[0].n:9,} {p50:9.3f} {p99:9.3f} {'':>10} {cpu:8.1f} {shown:>10}  {goals}"
        ).rstrip()
    rates = [one.rate for one in figures]
    return (
        f"  {row.name:{width}} {figures[0].n:9,} {median(rates):9,.0f} {min(rates):9,.0f} {max(rates):10,.0f} "
        f"{cpu:8.1f} {shown:>10}  {goals}"
    ).rstrip()


def judge(results: Results, work: Work, goal: Goal) -> tuple[bool, str]:
    """Return whether *goal* is reached, and one phrase that says so."""
    ratio = results.ratio(work, goal.row, goal.than, goal.quantile)
    sign = "<=" if work.metric == "latency" else ">="
    asked = f"{goal.quantile + ' ' if work.metric == 'latency' else ''}{sign} {goal.factor:g} x {goal.than}"
    if ratio is None:
        return False, f"{asked}: not measured"
    reached = ratio <= goal.factor if work.metric == "latency" else ratio >= goal.factor
    return reached, f"{asked}: {ratio:.2f}, {'reached' if reached else 'MISSED'}"


def digest(results: Results) -> str:
    """Return a line for each work with a goal: the best of the other libraries beside ours."""
    lines = ["", "in short"]
    for work, rows in results.plan:
        goals = [judge(results, work, goal)[1] for goal in work.goals]
        if not goals:
            continue
        ratios = {row.name: results.ratio(work, row.name, work.yardstick) for row in rows if row.peer}
        best = _best(work, {name: ratio for name, ratio in ratios.items() if ratio is not None})
        lines.append(f"  {work.name}: {best}")
        lines += [f"    {goal.row} {shown}" for goal, shown in zip(work.goals, goals, strict=True)]
    return "\n".join(lines)


def _best(work: Work, ratios: Mapping[str, float]) -> str:
    if not ratios:
        return "no other library"
    name = (min if work.metric == "latency" else max)(ratios, key=ratios.__getitem__)
    return f"best other library {name} {ratios[name]:.2f} x {work.yardstick}"


def render_findings(findings: Sequence[Finding]) -> str:
    """Return the table of what is not a rate."""
    lines = ["", "what is not a rate"]
    for one in findings:
        if one.flaw is not None:
            lines.append(f"  {one.name:58} no figure: {one.flaw}")
        elif one.limit is None:
            lines.append(f"  {one.name:58} {one.value:9.2f} {one.unit}")
        else:
            verdict = "reached" if one.reached else "MISSED"
            lines.append(f"  {one.name:58} {one.value:9.2f} {one.unit:8} goal <= {one.limit:g}: {verdict}")
        if one.detail:
            lines.append(f"    {one.detail}")
    return "\n".join(lines)


def summary(results: Results, findings: Sequence[Finding]) -> tuple[str, bool]:
    """Return the last lines, and whether every row has figures."""
    judged = [judge(results, work, goal)[0] for work, _ in results.plan for goal in work.goals]
    judged += [one.flaw is None and one.reached for one in findings if one.flaw is not None or one.limit is not None]
    flawed = [
        f"{work.name}, {row.name}: {flaw}"
        for work, rows in results.plan
        for row in rows
        if (flaw := results.flaw(work, row.name))
    ]
    flawed += [f"{one.name}: {one.flaw}" for one in findings if one.flaw is not None]
    lines = ["", f"goals reached: {sum(judged)} of {len(judged)}; rows without figures: {len(flawed)}"]
    lines += [f"  {line}" for line in flawed]
    return "\n".join(lines), not flawed
