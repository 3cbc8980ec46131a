"""The study of pairs: through the plan, refusals named, the best found, the page's table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmark import budgets, protocol, runner
from benchmark.errors import UserError
from benchmark.store import Store


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> budgets.PairsRecord:
    definition = protocol.load("digits@1", [f"releases.{t}.recipe.epochs=1" for t in range(3)])
    task, store = runner.open_task(definition, None, "cpu"), Store(tmp_path_factory.mktemp("runs"))
    return budgets.study(definition, task, store, [0], jobs=1, threads=1, progress=None)


def test_every_map_is_there_on_both_sides(record: budgets.PairsRecord) -> None:
    assert {(m.name, m.side) for m in record.maps} == {(n, s) for n in budgets.names() for s in ("query", "gallery")}
    assert {"Procrustes", "Ridge", "ResidualMLP", "Identity"} <= set(budgets.names())
    ridge = next(m for m in record.maps if m.name == "Ridge" and m.side == "query")
    assert set(ridge.cells) == {"100", "1000", "10000"} and set(ridge.cells["100"]) == {"2,0", "2,1"}
    assert ridge.parameters == 16 * 16 + 16 and ridge.multiply_adds == 16 * 16
    assert set(record.old_old) == {"0", "1", "2"}


def test_too_few_pairs_are_named_not_fitted(record: budgets.PairsRecord) -> None:
    local = next(m for m in record.maps if m.name == "LocalProcrustes" and m.side == "query")
    assert local.refused == {"100": "needs 128"} and "100" not in local.cells


def test_best_and_table(record: budgets.PairsRecord, tmp_path: Path) -> None:
    top = budgets.best(record)["query", "1000", "2,0"]
    values = {m.name: m.cells["1000"]["2,0"][0] for m in record.maps if m.side == "query" and "1000" in m.cells}
    assert values[top.name] == max(values.values())
    table = budgets.markdown(record).splitlines()
    assert len(table) == 2 + len(record.maps) and "needs 128" in "".join(table)
    row = next(line for line in table if line.startswith(f"| {top.name} | query"))
    assert f"**{100 * values[top.name]:.1f}**" in row
    path = tmp_path / "pairs.json"
    path.write_text(record.model_dump_json())
    assert budgets.load(path) == record
    path.write_text("{}")
    with pytest.raises(UserError, match=r"pairs\.json"):
        budgets.load(path)


def test_more_pairs_than_there_are_take_all(record: Any) -> None:
    """Digits' last release trains on fewer than 10,000 images."""
    procrustes = next(m for m in record.maps if m.name == "Procrustes" and m.side == "query")
    assert procrustes.cells["10000"]["2,0"]
