"""Backfill curves against naive recomputation at each point, orders, areas, the record, the chart."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmark import __main__ as cli
from benchmark import backfilling, curve_plots, curves, plan, plots, protocol, runner
from benchmark.embeddings import Link, Stored
from benchmark.errors import UserError
from benchmark.mixtures import rank_mixtures
from benchmark.retrieval import Block, Cell, rank
from benchmark.store import Store

QUICK = [f"releases.{t}.recipe.epochs=1" for t in range(3)]


def layers(
    similarity: str, count: int = 3, seed: int = 0, ids: bool = False
) -> tuple[list[Cell], list[Any], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels, wanted = torch.randint(0, 7, (2, 60), generator=generator)
    parts = [
        (torch.randn(60, 4 + i, generator=generator), torch.randn(60, 4 + i, generator=generator)) for i in range(count)
    ]
    own = (torch.arange(60), torch.arange(60)) if ids else (None, None)
    cells = [Cell([Block(torch.arange(60), q, g)], wanted, labels, *own, similarity) for q, g in parts]
    return cells, parts, wanted, labels


def naive(
    parts: Any, wanted: Tensor, labels: Tensor, state: Tensor, similarity: str, ids: bool
) -> tuple[list[int], list[float]]:
    """First rank and AP of each query by a plain sort of one mixed list."""
    first, aps = [], []
    for q in range(len(wanted)):
        scored = []
        for g in range(len(labels)):
            if ids and g == q:
                continue
            a, b = parts[state[g]][0][q].double().numpy(), parts[state[g]][1][g].double().numpy()
            s = a @ b / np.linalg.norm(a) / np.linalg.norm(b) if similarity == "cosine" else -np.linalg.norm(a - b)
            scored.append((s, bool(labels[g] == wanted[q])))
        hits = [hit for _, hit in sorted(scored, key=lambda pair: -pair[0])]
        ranks = [i + 1 for i, hit in enumerate(hits) if hit]
        first.append(ranks[0] if ranks else 0)
        aps.append(float(np.mean([(n + 1) / r for n, r in enumerate(ranks)])) if ranks else float("nan"))
    return first, aps


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_every_point_equals_a_naive_recomputation(similarity: str, ids: bool) -> None:
    cells, parts, wanted, labels = layers(similarity, ids=ids)
    start = torch.randint(0, 2, (60,), generator=torch.Generator().manual_seed(3))
    turns = torch.stack([torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(k)) for k in (4, 5)])
    for order, rankings in zip(turns, rank_mixtures(cells, start, turns, 4)):
        for stage, ranking in enumerate(rankings):
            first, aps = naive(parts, wanted, labels, torch.where(order <= stage, 2, start), similarity, ids)
            assert ranking.first.tolist() == first
            np.testing.assert_allclose(ranking.ap.numpy(), aps, rtol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_all_stages_at_once_have_the_bits_of_each_by_itself(tied: bool) -> None:
    """Ties within a layer and across layers, a class without items, queries that are items, chunks and slices."""
    generator = torch.Generator().manual_seed(7)
    new, old, q_new, q_old = torch.randn(4, 300, 6, generator=generator)
    if tied:  # dyadic numbers: every product is exact, and many are equal
        new, old, q_new, q_old = ((x * 2).round() / 2 for x in (new, old, q_new, q_old))
    labels, wanted = torch.randint(0, 5, (300,), generator=generator), torch.randint(0, 6, (300,), generator=generator)
    ids = torch.randperm(300, generator=generator)
    turns = torch.randint(0, 8, (3, 300), generator=generator)
    items = torch.arange(300)
    cells = [
        Cell([Block(items, q, g)], wanted, labels, ids, items, "l2", buffer_mb=0)
        for q, g in ((q_old, old), (q_new, new))
    ]
    found = rank_mixtures(cells, torch.zeros(300).long(), turns, 7)
    for order, rankings in zip(turns, found):
        for stage, ranking in enumerate(rankings):
            moved = order <= stage
            blocks = [Block(items[m], q, g[m]) for m, q, g in ((~moved, q_old, old), (moved, q_new, new))]
            alone = Cell(blocks, wanted, labels, ids, items, "l2").rank()
            assert torch.equal(ranking.first, alone.first) and torch.equal(ranking.positives, alone.positives)
            assert torch.equal(ranking.ap.nan_to_num(-1), alone.ap.nan_to_num(-1))
    assert (found[0][0].positives == 0).any()
    whole = rank(q_new, new, wanted, labels, query_ids=ids, gallery_ids=items, similarity="l2")
    ended = rank_mixtures(cells, torch.zeros(300).long(), torch.zeros(1, 300).long(), 1)[0][0]
    assert torch.equal(ended.first, whole.first)


def test_layers_that_do_not_fit_together_are_refused() -> None:
    cells, *_ = layers("cosine")
    none, never = torch.zeros(60).long(), torch.ones(1, 60).long()
    with pytest.raises(ValueError, match="of the first 2 layers"):
        rank_mixtures(cells, none + 2, never, 1)
    with pytest.raises(ValueError, match="stages from 0 to 1"):
        rank_mixtures(cells, none, never + 1, 1)
    with pytest.raises(ValueError, match="same queries"):
        rank_mixtures([cells[0], layers("l2")[0][0]], none, never, 1)


def test_the_grid_holds_both_definitions_of_the_area() -> None:
    shares = curves.grid()
    assert len(shares) == 45  # 21 and 22 points, the two ends in common, and four beside the ends
    assert np.isin(np.arange(21) / 20, shares).all() and np.isin(np.arange(22) / 21, shares).all()
    values = {"cmc@1": {"all": np.stack([shares**2, shares])}}
    ends = {"old_old": {"cmc@1": 0.1}, "new_new": {"cmc@1": 0.9}}
    found = curves.summarise("random", "cmc@1", values, np.zeros((2, 41)), ends)
    middle = [(x * x + x) / 2 for x in np.arange(21) / 20]
    area = sum((a + b) / 2 / 20 for a, b in itertools.pairwise(middle))
    assert found.area["cmc@1"]["all"] == pytest.approx(area)
    assert found.fastfill_mean["cmc@1"] == pytest.approx(np.mean([((i / 21) ** 2 + i / 21) / 2 for i in range(22)]))
    assert found.relative_gain["cmc@1"] == pytest.approx((area - 0.1) / 0.8)
    assert found.monotone


def test_turns_follow_the_order_and_the_cutoffs() -> None:
    turns = backfilling._turns(torch.tensor([3, 1, 0, 2]), np.array([0, 0.25, 0.6, 1]))  # 0, 1, 2, 4 items done
    assert turns.tolist() == [3, 2, 3, 1]


def test_class_mean_order_against_a_loop() -> None:
    torch.manual_seed(1)
    z, labels, held = torch.randn(20, 3), torch.arange(20) % 4, torch.arange(20) % 3 > 0  # means of what is held alone
    expected = [float((z[i] - z[held & (labels == labels[i])].mean(0)).norm()) for i in range(20)]
    np.testing.assert_allclose(backfilling._to_class_mean(z, labels, held).numpy(), expected, rtol=1e-5)
    first = backfilling._descending(
        [torch.tensor([1.0, 5.0, 2.0]), torch.tensor([9.0, 0.0, 3.0])], torch.tensor([0, 0, 1])
    )
    assert first.tolist() == [1, 2, 0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    definition = protocol.load("digits@1", QUICK)
    task, store = runner.open_task(definition, None, "cpu"), Store(tmp_path_factory.mktemp("runs"))
    records: dict[str, Any] = {}
    for name, given in (("FastFill", {"hidden": 16}), ("Merge", {}), ("Ridge", {}), ("BCT", {})):
        built = plan.build(definition, plan.MethodRun.of(name, given), 0, task.fingerprint)
        runner.execute([built, *backfilling.nodes(built)], task, store, threads=1)
        records[name] = backfilling.record(built, task, store)
        cells = {at: store.read_json(node, "scores.json")["all"]["cmc@1"] for at, node in built.cells.items() if node}
        records[name + "/matrix"] = [[cells[t, k] for k in range(t + 1)] for t in range(3)]
    return records


def test_ends_are_the_cells_of_the_matrix(made: Any) -> None:
    for name in ("FastFill", "Merge", "Ridge", "BCT"):
        matrix = made[name + "/matrix"]
        for t, k in ((1, 0), (2, 0), (2, 1)):
            backfill = made[name].find(t, [k])
            assert backfill.old_old["cmc@1"] == matrix[k][k] and backfill.new_new["cmc@1"] == matrix[t][t]
            for curve in backfill.curves:
                assert curve.metrics["cmc@1"][0] == pytest.approx(matrix[t][k], abs=1e-6)
                assert curve.metrics["cmc@1"][-1] == pytest.approx(matrix[t][t], abs=1e-6)


def test_orders_depend_on_what_the_method_offers(made: Any) -> None:
    orders = {name: [c.order for c in made[name].find(2, [1]).curves] for name in ("FastFill", "Merge", "Ridge", "BCT")}
    assert orders["FastFill"] == ["random", "own", "oracle distance", "class means"]
    assert orders["Merge"] == orders["Ridge"] == orders["BCT"] == ["random"]
    assert made["Merge"].find(2, [1]).query_encoders == 2 and made["Ridge"].find(2, [1]).query_encoders == 1


def test_oracle_distance_is_measured_where_queries_meet_items() -> None:
    """New embeddings are turned before they search moved items; the order must not see the turn itself as distance."""

    class Turned(Link):
        def query(self, q: Any, stored: Stored) -> Tensor:
            return q[1, "main"].flip(1)

    torch.manual_seed(4)
    new, off = torch.randn(12, 3), torch.rand(12, 1)
    old, moved = torch.randn(12, 3), new.flip(1) + off
    at = Stored(0, 3)
    layers = [
        backfilling.Layer(Turned(1, 3), {(0, "main"): old}, at, new, moved),
        backfilling.Layer(Link(1, 3), {(1, "main"): new}, Stored(1, 3), new, new),
    ]
    spec = {"t": 1, "seed": 0, "draws": 1}
    made = backfilling.orders(layers, torch.arange(12) % 3, torch.zeros(12).long(), "l2", spec)
    assert made["oracle distance"][0].tolist() == off[:, 0].argsort(descending=True).tolist()


def test_the_system_before_serves_mixed_items_by_the_newest_of_them(made: Any) -> None:
    mixed, single = made["BCT"].find(2, [0, 1]), made["BCT"].find(2, [1])
    matrix = made["BCT/matrix"]
    assert single.old_old["cmc@1"] == pytest.approx(matrix[1][1], abs=1e-6)
    assert matrix[0][0] != pytest.approx(mixed.old_old["cmc@1"], abs=1e-3)
    at_half = made["BCT"].find(1, [0])  # the same kind of gallery: half by each, other items
    near = np.interp(0.5, at_half.shares, at_half.curves[0].metrics["cmc@1"])
    assert mixed.old_old["cmc@1"] == pytest.approx(near, abs=0.03)


def test_a_gallery_of_three_releases_at_once(made: Any) -> None:
    mixed = made["FastFill"].find(2, [0, 1])
    assert sum(mixed.start) == pytest.approx(1) and min(mixed.start) > 0.49
    assert mixed.curves[0].metrics["cmc@1"][-1] == pytest.approx(mixed.new_new["cmc@1"], abs=1e-6)


def test_the_record_comes_back_and_a_strangers_is_checked(made: Any, tmp_path: Path) -> None:
    path = made["Ridge"].save(tmp_path / "backfill-seed0.json")
    assert curves.load(path) == made["Ridge"]
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "extra": 1}))
    with pytest.raises(UserError, match="extra"):
        curves.load(path)
    path.write_text(json.dumps({**data, "schema_version": 99}))
    with pytest.raises(UserError, match="99"):
        curves.load(path)


def test_table_and_chart_show_every_method(made: Any, tmp_path: Path) -> None:
    records = [made[name] for name in ("FastFill", "Merge", "Ridge")]
    found = curves.by_order(records)
    assert ("FastFill", "own") in found and len(found["Merge", "random"]) == 4
    assert [curves.title(gallery) for gallery in curves.galleries(records)] == ["1→2", "1→3", "2→3", "1,2→3"]
    figure = curve_plots.backfill_figure(records, "cmc@1")
    assert len(figure.axes) == 2 * 4 and len(figure.axes[0].lines) == 3  # cmc@1 and map of each gallery
    ends = [made[name].find(1, [0]).curves[0].metrics["map"][-1] for name in ("FastFill", "Merge", "Ridge")]
    drawn = next(axis.lines for axis in figure.axes if axis.get_ylabel() == "map, %")
    np.testing.assert_allclose([line.get_ydata()[-1] for line in drawn], 100 * np.array(ends))
    plots.save(figure, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_the_command_writes_records_and_the_chart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["backfill", "digits@1", "--method", "Procrustes", "--runs", str(tmp_path), "--threads", "1"]
    arguments += [word for item in QUICK for word in ("--override", item)]
    assert cli.main(arguments) == 0
    assert (tmp_path / "digits@1" / "Procrustes-off-protocol" / "backfill-seed0.json").is_file()
    assert (tmp_path / "digits@1" / "backfill.png").is_file()
    assert "Procrustes, random" in capsys.readouterr().out
    assert cli.main(["backfill", "digits@1"]) == 2
