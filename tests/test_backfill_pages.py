"""The backfill section of a leaderboard's page, from made-up records whose numbers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmark import curves
from benchmark.errors import UserError
from benchmark.record import MethodInfo, ProtocolInfo, SuiteInfo
from leaderboards import backfills


def curve(order: str, level: float) -> curves.Curve:
    """A straight line from `level` to 0.5: its area is the mean of the two ends."""
    shares = curves.grid()
    values = {"cmc@1": {"all": (level + (0.5 - level) * shares)[None]}}
    ends = {"old_old": {"cmc@1": 0.3}, "new_new": {"cmc@1": 0.5}}
    return curves.summarise(order, "cmc@1", values, np.full((1, 41), 0.02), ends)


def record(seed: int, name: str = "FastFill", protocol: str = "board@1") -> curves.BackfillRecord:
    galleries = [
        curves.Backfill(
            release=t,
            stored=stored,
            start=[1 / len(stored)] * len(stored),
            old_old={"cmc@1": 0.3},
            new_new={"cmc@1": 0.5},
            shares=list(curves.grid()),
            query_encoders=1,
            curves=[curve("random", 0.2 + 0.01 * seed), curve("own", 0.3 + 0.01 * seed)],
        )
        for t, stored in ((1, [0]), (2, [0]), (2, [1]), (2, [0, 1]))
    ]
    return curves.BackfillRecord(
        schema_version=curves.SCHEMA_VERSION,
        protocol=ProtocolInfo(id=protocol, version="1.0", sha256="x", overrides=[], split="test"),
        suite=SuiteInfo(version="0", metrics_version=1, commit=None, dirty=None),
        method=MethodInfo(
            name=name, reference="", hyperparameters={}, settings="paper", source_sha256="", mode="chain"
        ),
        seed=seed,
        data_fingerprint="",
        gallery=10,
        backfills=galleries,
    )


def save(root: Path, *records: curves.BackfillRecord) -> Path:
    folder = root / "board@1"
    for one in records:
        (folder / one.method.name).mkdir(parents=True, exist_ok=True)
        one.save(folder / one.method.name / f"backfill-seed{one.seed}.json")
    return folder


def test_areas_intervals_and_differences(tmp_path: Path) -> None:
    found = backfills.read(save(tmp_path, *(record(seed) for seed in range(3))))
    lines = {
        tuple(cells[1:3]): cells
        for line in backfills.markdown(found, "cmc@1").splitlines()
        if (cells := [c.strip() for c in line.split("|")])[2:]
    }
    areas = [100 * (0.2 + 0.01 * seed + 0.5) / 2 for seed in range(3)]
    half = 4.30265 * np.std(areas, ddof=1) / np.sqrt(3)  # t of two degrees of freedom
    random, own = lines["FastFill", "random"], lines["FastFill", "own"]
    assert random[4] == f"{np.mean(areas):.1f} ± {half:.1f}"
    assert own[4].startswith(f"{np.mean(areas) + 5:.1f}")
    assert lines["FastFill", "own - random"][4] == "+5.0 ± 0.0"
    assert random[8] == f"{(np.mean(areas) - 30) / 20 * 100:.0f} %" and random[9] == "2.0 %"
    assert random[10] == f"{np.mean(areas):.1f}" and random[11] == "3/3"


def test_records_of_another_board_or_method_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, record(0), record(0, protocol="other@1", name="RQT"))
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
