"""The backfill section of a leaderboard's page, from made-up records whose numbers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmark import curves, protocol
from benchmark.errors import UserError
from leaderboards import backfills
from tests.records import backfill_record


def curve(order: str, level: float) -> curves.Curve:
    """A straight line from `level` to 0.5: its area is the mean of the two ends."""
    shares = curves.grid()
    values = {
        "cmc@1": {"all": (level + (0.5 - level) * shares)[None]},
        "map": {"all": 0.4 * shares[None]},
    }
    ends = {"old_old": {"cmc@1": 0.3, "map": 0.1}, "new_new": {"cmc@1": 0.5, "map": 0.4}}
    return curves.summarise(order, "cmc@1", values, np.full((1, len(shares)), 0.02), ends)


def record(seed: int, name: str = "FastFill", board: str = "board@1") -> curves.BackfillRecord:
    galleries = [
        curves.Backfill(
            release=t,
            stored=stored,
            start=[1 / len(stored)] * len(stored),
            old_old={"cmc@1": 0.3, "map": 0.1},
            new_new={"cmc@1": 0.5, "map": 0.4},
            shares=list(curves.grid()),
            query_encoders=1,
            moved=False,
            curves=[curve("random", 0.2 + 0.01 * seed), curve("own", 0.3 + 0.01 * seed)],
        )
        for t, stored in ((1, [0]), (2, [0]), (2, [1]), (2, [0, 1]))
    ]
    return backfill_record(name, board, seed, galleries, gallery=10)


def save(root: Path, *records: curves.BackfillRecord) -> Path:
    folder = root / "board@1"
    for one in records:
        (folder / one.method.name).mkdir(parents=True, exist_ok=True)
        one.save(folder / one.method.name / f"backfill-seed{one.seed}.json")
    return folder


def tables(text: str) -> list[dict[tuple[str, str], dict[str, str]]]:
    """Of each table (method, order) -> column -> cell."""
    found: list[dict[tuple[str, str], dict[str, str]]] = []
    head: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")][1:-1]
        if cells[:1] == ["method"]:
            head = cells
            found.append({})
        elif cells and set(cells) != {"---"}:
            found[-1][cells[0], cells[1]] = dict(zip(head, cells))
    return found


def test_areas_intervals_and_differences(tmp_path: Path) -> None:
    found = backfills.read(save(tmp_path, *(record(seed) for seed in range(3))))
    primary, other = tables(backfills.markdown(found, "cmc@1"))
    areas = [100 * (0.2 + 0.01 * seed + 0.5) / 2 for seed in range(3)]
    half = 4.30265 * np.std(areas, ddof=1) / np.sqrt(3)  # t of two degrees of freedom
    random, own = primary["FastFill", "random"], primary["FastFill", "own"]
    assert random["2→3"] == f"{np.mean(areas):.1f} ± {half:.1f}" and random["n"] == "3" and random["moved"] == "no"
    assert own["1,2→3"].startswith(f"{np.mean(areas) + 5:.1f}")
    assert primary["FastFill", "own - random"]["2→3"] == "+5.0 ± 0.0"
    assert random["gain"] == f"{(np.mean(areas) - 30) / 20 * 100:.0f} %" and random["flips"] == "2.0 %"
    assert (
        random["22-point mean"] == f"{np.mean(areas):.1f}" and random["monotone"] == "3/3" and random["fall"] == "0.00"
    )
    assert other["FastFill", "own"]["2→3"] == "20.0 ± 0.0" and "monotone" not in other["FastFill", "own"]


def test_a_gallery_that_a_method_cannot_serve_is_a_dash(tmp_path: Path) -> None:
    whole, part = record(0), record(0, "Merge")
    part.backfills.pop(1)
    found = backfills.read(save(tmp_path, whole, part))
    lines = tables(backfills.markdown(found, "cmc@1"))[0]
    assert lines["Merge", "random"]["1→3"] == "–" and lines["FastFill", "random"]["1→3"] == "35.0"


def test_a_curve_that_is_not_of_its_row_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, one := record(0))
    row = json.loads((protocol.LEADERBOARDS / "digits@1" / "BCT" / "seed0.json").read_text())
    cells = [[0.3, None, None], [0.2, 0.5, None], [0.2, 0.2, 0.5]]
    row["matrices"] = {"cmc@1": {"all": cells}, "map": {"all": [[0.1, None, None], [0.0, 0.4, None], [0.0, 0.0, 0.4]]}}
    path = folder / "FastFill" / "seed0.json"
    for backfill in one.backfills:  # the own order starts elsewhere
        backfill.curves.pop()
    save(tmp_path, one)
    path.write_text(json.dumps(row))
    assert backfills.read(folder)
    row["matrices"]["cmc@1"]["all"][2][1] = 0.2001
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match="does not begin and end in the cells"):
        backfills.read(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b["shares"].pop(), "rise from 0 to 1"),
        (lambda b: b["shares"].reverse(), "rise from 0 to 1"),
        (lambda b: b["curves"][0]["metrics"]["map"].pop(), "order 'random' must have a value"),
        (lambda b: b["curves"][1]["negative_flips"].append(0.0), "order 'own' must have a value"),
        (lambda b: b["curves"][0]["metrics"]["map"].__setitem__(0, 1.5), "less than or equal to 1"),
        (lambda b: b["start"].append(0.5), "its share"),
    ],
)
def test_a_damaged_record_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    path = save(tmp_path, record(0)) / "FastFill" / "backfill-seed0.json"
    data = json.loads(path.read_text())
    change(data["backfills"][0])
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=said):
        curves.load(path)


def test_records_of_another_board_or_method_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, record(0), record(0, board="other@1", name="RQT"))
    with pytest.raises(UserError, match="RQT on other@1"):
        backfills.read(folder)
    (folder / "RQT" / "backfill-seed0.json").unlink()
    (folder / "FastFill").rename(folder / "FCT")
    with pytest.raises(UserError, match="FastFill"):
        backfills.read(folder)


def test_the_committed_pages_read() -> None:
    from leaderboards.__main__ import boards

    for folder in boards():
        for one in backfills.read(folder):
            assert {c.order for b in one.backfills for c in b.curves} >= {"random"}
