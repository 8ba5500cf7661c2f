"""The tables of what works are made of a run of the tests, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import features
from .features import FEATURES, POOLS, Feature, Stale, main, table, update

FEW = {
    "one": Feature("it works", ("redis", "kafka"), ("prefork",)),
    "two": Feature("it half works", ("memory", "redis"), says={"memory": "no: one warning"}),
}
PAGE = "# Page\n<!-- systems: begin -->\n<!-- systems: end -->\ntext\n<!-- pools: begin -->\n<!-- pools: end -->\nend\n"
CELLS = [
    ("one", "system", "redis"),
    ("one", "system", "kafka"),
    ("one", "pool", "prefork"),
    ("two", "system", "memory"),
    ("two", "system", "redis"),
]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "FEATURES", FEW)


def written(path: Path, cells: list[tuple[str, str, str]], **failed: bool) -> Path:
    lines = [{"test": f"t_{name}_{column}", "feature": name, kind: column, "ok": True} for name, kind, column in cells]
    lines += [{"test": "t_one_redis", "feature": "one", "system": "redis", "ok": ok} for ok in failed.values()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_the_tables_are_written_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    results = written(tmp_path / "results", CELLS)
    assert update(results, page)
    text = page.read_text(encoding="utf-8")
    assert "| it works | \N{EN DASH} | yes | yes |" in text
    assert "| it half works | no: one warning | yes | \N{EN DASH} |" in text
    assert text.count("it half works") == 1, "it says nothing of pools"
    assert text.startswith("# Page\n")
    assert text.endswith("\nend\n")
    assert not update(results, page, check=True)


@pytest.mark.parametrize("missing", CELLS, ids="-".join)
def test_a_cell_without_a_test_that_ran_is_an_error(tmp_path: Path, missing: tuple[str, str, str]) -> None:
    results = written(tmp_path / "results", [cell for cell in CELLS if cell != missing])
    with pytest.raises(Stale, match="no test"):
        table(missing[1], features.read(results))


def test_the_last_run_of_a_test_counts(tmp_path: Path) -> None:
    assert table("system", features.read(written(tmp_path / "results", CELLS, first=False, again=True)))
    with pytest.raises(Stale, match="t_one_redis failed"):
        table("system", features.read(written(tmp_path / "results", CELLS, first=True, again=False)))


def test_a_stale_page_fails_the_check_and_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    results = written(tmp_path / "results", CELLS)
    assert main([str(results), str(page), "--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == PAGE
    assert main([str(results), str(page)]) == 0
    assert main([str(results), str(page), "--check"]) == 0


def test_a_mark_says_what_a_test_proves(request: pytest.FixtureRequest) -> None:
    item = request.node
    item.add_marker(pytest.mark.feature("one", system="redis", pool="prefork"))
    item.add_marker(pytest.mark.feature("two", system="memory", pool="solo"))
    assert sorted(features.marks(item)) == [
        ("one", "pool", "prefork"),
        ("one", "system", "redis"),
        ("two", "system", "memory"),  # of which no pool is asked
    ]
    item.own_markers.clear()


@pytest.mark.parametrize("mark", [("three", "redis"), ("one", "memory"), ("one", "rabbit")], ids="-".join)
def test_a_mark_that_no_table_has_is_refused(request: pytest.FixtureRequest, mark: tuple[str, str]) -> None:
    item = request.node
    item.add_marker(pytest.mark.feature(mark[0], system=mark[1]))
    with pytest.raises(pytest.UsageError):
        list(features.marks(item))
    item.own_markers = [mark for mark in item.own_markers if mark.name != "feature"]


def test_the_rows_have_columns_and_titles_of_their_own() -> None:
    assert len({feature.title for feature in FEATURES.values()}) == len(FEATURES)
    for feature in FEATURES.values():
        assert set(feature.systems) <= set(features.SYSTEMS)
        assert set(feature.pools) <= set(POOLS)
        assert set(feature.says) <= {*feature.systems, *feature.pools}
