"""`compatbench audit`: every figure against a naive computation of its own, the verdict against cases whose answer is known."""

from __future__ import annotations

import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmark import adapters, bounds
from benchmark.__main__ import main
from benchmark.adapt import fit
from benchmark.audit import Requirements, audit
from benchmark.audit.acceptance import Labels, Side, pairs_at, threshold_by_far, threshold_by_share
from benchmark.audit.report import number, render, significant
from benchmark.errors import UserError
from benchmark.evaluate import evaluate
from benchmark.neighbours import fuse, overlap, search
from tests.auditing import (
    G_LABELS,
    G_NEW,
    G_OLD,
    NG,
    NQ,
    OLD,
    P_NEW,
    P_OLD,
    Q_LABELS,
    Q_NEW,
    Q_OLD,
    four,
    index_of,
    mapped,
    nearest,
    npy,
    parquet,
    shared,
    unit,
)

# -------------------------------------------------------------------------------------------------------- the pieces


def test_neighbours_equal_a_plain_sort() -> None:
    own = np.where(np.arange(NQ) % 3 == 0, np.arange(NQ), -1)
    q, g = unit(Q_OLD).astype(np.float32), unit(G_OLD).astype(np.float32)
    assert search(q, g, 20, "cosine", own).rows.tolist() == nearest(Q_OLD, G_OLD, 20, own)
    found = search(Q_OLD, G_OLD, 5, "l2")
    distance = ((Q_OLD[:, None].astype(np.float64) - G_OLD) ** 2).sum(2)
    assert found.rows.tolist() == distance.argsort(1)[:, :5].tolist()
    np.testing.assert_allclose(found.scores, -np.sort(distance, 1)[:, :5] / 2, rtol=1e-4, atol=1e-4)
    few = search(q[:1], g[:2], 5, "cosine", np.array([0]))
    assert few.rows.tolist() == [[1, -1]]  # its own item is no candidate


def test_overlap_equals_counting_sets() -> None:
    rng = np.random.default_rng(1)
    found, wanted = (np.stack([rng.permutation(30)[:10] for _ in range(50)]) for _ in range(2))
    for k in (1, 4, 10):
        np.testing.assert_array_equal(overlap(found, wanted, k), shared(found.tolist(), wanted.tolist(), k))
    found[:, 5:] = -1  # an index that found fewer
    assert overlap(found, wanted, 10).max() <= 0.5
    assert overlap(np.array([[2, 1]]), np.array([[1, 2]]), 2).tolist() == [1.0]  # order does not count


def test_rank_fusion_equals_its_formula() -> None:
    rng = np.random.default_rng(2)
    rankings = [np.stack([rng.permutation(25)[:12] for _ in range(40)]) for _ in range(3)]
    rankings[0][:, 8:] = -1
    got = fuse(rankings, 10)
    for query in range(40):
        score: dict[int, float] = {}
        for ranking in rankings:
            for rank, row in enumerate(ranking[query], 1):
                if row >= 0:
                    score[int(row)] = score.get(int(row), 0) + 1 / (60 + rank)
        expected = sorted(score.values(), reverse=True)[:10]
        np.testing.assert_allclose([score[int(row)] for row in got[query]], expected, rtol=1e-12)
        assert len(set(got[query])) == 10
    assert fuse([np.array([[1, 2]]), np.array([[3, 4]])], 4).tolist() == [[1, 3, 2, 4]]  # of equals the first list's


def test_thresholds_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    best = np.array([0.1, 0.5, 0.5, 0.9, 0.7], np.float32)
    for share, expected in ((0.2, 0.9), (0.4, 0.7), (0.5, 0.5), (0.8, 0.5), (0.9, 0.1), (1.0, 0.1)):
        assert threshold_by_share(best, share) == pytest.approx(expected)
    side = Side(unit(Q_OLD).astype(np.float32), unit(G_OLD).astype(np.float32))
    own = np.where(np.arange(NQ) < 20, np.arange(NQ), -1)
    labels = Labels(Q_LABELS, G_LABELS, own)
    scores = side.queries @ side.gallery.T
    same = Q_LABELS[:, None] == G_LABELS
    pair = np.arange(NG) != own[:, None]
    impostor = np.sort(scores[~same & pair])[::-1]
    for step in (10**6, 7):
        monkeypatch.setattr("benchmark.audit.acceptance.batch", lambda gallery, step=step: step)
        for far in (1e-4, 1e-3, 0.05):
            threshold = threshold_by_far(side, labels, "cosine", far)
            allowed = int(far * len(impostor))
            assert (impostor >= threshold).sum() <= allowed and (impostor >= impostor[allowed]).sum() > allowed
            assert (impostor >= threshold).sum() == (impostor > impostor[allowed]).sum()  # and no stricter than needed
            found = pairs_at(side, labels, "cosine", threshold)
            accepted = scores >= threshold
            for got, mask in zip(found, (same & pair, same & pair & accepted, ~same & pair, ~same & pair & accepted)):
                assert got.tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize("hits,n", [(0, 10), (3, 10), (10, 10), (97, 100)])
def test_binomial_bounds_are_where_the_tail_is_five_percent(hits: int, n: int) -> None:
    def at_least(p: float, h: int) -> float:
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(h, n + 1))

    found = bounds.share_of(hits, n)
    assert found.lower == 0 if hits == 0 else at_least(found.lower, hits) == pytest.approx(0.05, rel=1e-6)
    assert found.upper == 1 if hits == n else 1 - at_least(found.upper, hits + 1) == pytest.approx(0.05, rel=1e-6)


def test_bounds_of_means_hold_as_often_as_they_say() -> None:
    rng, missed = np.random.default_rng(4), 0
    for trial in range(300):
        values = rng.beta(2, 1, size=60)  # mean 2/3
        missed += bounds.estimate(values, seed=trial).lower > 2 / 3
    assert 4 <= missed <= 30  # 15 of 300 are meant to


def test_values_without_spread_do_not_give_certainty() -> None:
    found = bounds.estimate(np.ones(14))
    assert found.value == 1 and found.lower == pytest.approx(0.05 ** (1 / 14)) and found.upper == 1
    change = bounds.estimate(np.zeros(14), least=-1)
    assert change.lower == pytest.approx(-(1 - 0.05 ** (1 / 14))) and change.upper == -change.lower
    assert bounds.ratio([0, 0, 0], [10, 20, 0]).upper == pytest.approx(1 - 0.05**0.5)  # two queries have pairs at all
    assert bounds.ratio([1, 4], [10, 20]).value == pytest.approx(5 / 30)


# --------------------------------------------------------------------------------------------------------- the whole


def test_every_way_has_the_overlap_that_a_plain_sort_gives(files: dict[str, Path], adapter: Path) -> None:
    report = audit(*four(files), adapter=adapter, dual=(0.5, 1.0))
    full, old = nearest(Q_NEW, G_NEW, 100), nearest(Q_OLD, G_OLD, 100)
    ranked = {"adapter": nearest(mapped(adapter, Q_NEW), G_OLD, 100), "old model only": old, "full re-embedding": full}
    part = np.random.default_rng(0).permutation(NG)
    for share in (0.5, 1.0):
        kept = np.sort(part[: int(share * NG)])
        new = [[int(kept[j]) for j in row] for row in nearest(Q_NEW, G_NEW[kept], 100)]
        fused = []
        for lists in zip(new, old):
            score: dict[int, float] = {}
            for ranking in lists:
                for rank, row in enumerate(ranking, 1):
                    score[row] = score.get(row, 0) + 1 / (60 + rank)
            fused.append(sorted(score, key=lambda row: -score[row]))  # stable: of equals the new list's first
        ranked[f"two indexes, {share:.0%} re-embedded"] = fused
    found = report["overlap"]["ways"]
    assert found.keys() == ranked.keys()
    for name, rows in ranked.items():
        for k in (1, 10, 100):
            assert found[name][str(k)]["value"] == pytest.approx(shared(rows, full, k).mean(), abs=2e-3), (name, k)
            assert found[name][str(k)]["n"] == NQ
    loss = report["overlap"]["loss"]["adapter"]["10"]["value"]
    assert loss == pytest.approx(1 - found["adapter"]["10"]["value"]) and 0.2 < loss < 0.9
    assert found["old model only"]["10"]["value"] < found["adapter"]["10"]["value"] < 1
    top = (unit(Q_OLD) @ unit(G_OLD).T).max(1)
    threshold = report["threshold"]
    assert (
        threshold["accepted"]["old model only"]["value"] == pytest.approx(0.9)
        and (top >= threshold["score"]).mean() == 0.9
    )
    new_top = (unit(mapped(adapter, Q_NEW)) @ unit(G_OLD).T).max(1)
    assert threshold["accepted"]["adapter"]["value"] == pytest.approx((new_top >= threshold["score"]).mean(), abs=0.01)
    assert set(report["latency"]["ms"]) == {"adapter", "old model only", "two indexes"}
    assert report["writing again"]["to a file, seconds"] > 0 and report["index"] is None
    assert report["sizes"] == {"queries": NQ, "gallery": NG, "judged sample": NG, "gallery in service": NG}


def test_labels_add_recall_flips_far_and_tar(files: dict[str, Path], adapter: Path) -> None:
    report = audit(
        *four(files), adapter=adapter, query_labels=str(files["ql"]), gallery_labels=str(files["gl"]), far=0.01
    )
    recall, sides = (
        report["labelled"]["recall"],
        {"old model only": (Q_OLD, G_OLD), "full re-embedding": (Q_NEW, G_NEW)},
    )
    sides["adapter"] = (mapped(adapter, Q_NEW), G_OLD)
    hit = {}
    for name, (q, g) in sides.items():
        metrics = evaluate(q, g, Q_LABELS, G_LABELS, ks=(1, 10))
        for k in (1, 10):
            assert recall[name][str(k)]["value"] == pytest.approx(metrics[f"cmc@{k}"], abs=1e-9)
        hit[name] = np.array([G_LABELS[row[0]] == label for row, label in zip(nearest(q, g, 1), Q_LABELS)])
        scores, same = unit(q) @ unit(g).T, Q_LABELS[:, None] == G_LABELS
        accepted = scores >= report["threshold"]["score"]
        assert report["threshold"]["far"][name]["value"] == pytest.approx(accepted[~same].mean(), abs=1e-4)
        assert report["threshold"]["tar"][name]["value"] == pytest.approx(accepted[same].mean(), abs=1e-3)
    assert 0.008 < report["threshold"]["far"]["old model only"]["value"] <= 0.01
    flips = report["labelled"]["negative flips"]
    for name in ("adapter", "full re-embedding"):
        assert flips[name]["value"] == pytest.approx((hit["old model only"] & ~hit[name]).mean())
    assert flips["adapter"]["value"] > 0 and flips["adapter"]["bounds"] == "exact"
    named = {check["what"] for check in report["checks"]}
    assert {
        "negative flips, both exact", "FAR at the frozen threshold", "recall@1: adapter less old model, both exact"
    } <= named  # fmt: skip


@pytest.fixture
def sampled(files: dict[str, Path], tmp_path: Path) -> list[Path]:
    """As `four`, the new gallery a random 100 of the 400."""
    some = np.sort(np.random.default_rng(9).permutation(NG)[:100])
    gallery = parquet(tmp_path / "go.parquet", G_OLD, np.arange(NG))
    return [files["qo"], files["qn"], gallery, parquet(tmp_path / "gn.parquet", G_NEW[some], some)]


def test_the_threshold_is_frozen_and_met_on_the_whole_gallery(
    files: dict[str, Path], sampled: list[Path], adapter: Path
) -> None:
    part, whole = audit(*sampled, adapter=adapter), audit(*four(files), adapter=adapter)
    old, new = (unit(q) @ unit(G_OLD).T for q in (Q_OLD, mapped(adapter, Q_NEW)))
    score = np.sort(old.max(1))[NQ - math.ceil(0.9 * NQ)]
    for report in (part, whole):
        assert report["threshold"]["score"] == pytest.approx(score, abs=1e-6)
        accepted = report["threshold"]["accepted"]
        assert accepted["old model only"]["value"] == pytest.approx(0.9)
        assert accepted["adapter"]["value"] == pytest.approx((new.max(1) >= score).mean(), abs=0.01)
    assert set(part["threshold"]["accepted"]) == {"adapter", "old model only"}  # of the sample it would be too few
    assert "full re-embedding" in whole["threshold"]["accepted"]
    given = audit(*sampled, adapter=adapter, score=0.95)["threshold"]
    assert given["score"] == 0.95 and given["frozen at"] == "the score given"
    assert given["accepted"]["old model only"]["value"] == pytest.approx((old.max(1) >= 0.95).mean())


def test_labels_are_counted_on_the_whole_gallery(files: dict[str, Path], sampled: list[Path], adapter: Path) -> None:
    options: dict[str, Any] = {"adapter": adapter, "query_labels": str(files["ql"]), "gallery_labels": str(files["gl"])}
    part, whole = audit(*sampled, far=0.01, **options), audit(*four(files), far=0.01, **options)
    for name in ("adapter", "old model only"):
        assert part["labelled"]["recall"][name] == whole["labelled"]["recall"][name]
        for rate in ("far", "tar"):
            assert part["threshold"][rate][name] == whole["threshold"][rate][name]
    assert set(part["labelled"]["recall"]) == {"adapter", "old model only"}
    full = [report["threshold"]["far"]["full re-embedding"]["value"] for report in (part, whole)]
    assert full[0] != full[1] and full[0] == pytest.approx(full[1], rel=0.5)  # of pairs a sample is fair
    given = audit(*four(files), score=0.9, **options)  # held against what the old system lets in at this score
    same, accepted = Q_LABELS[:, None] == G_LABELS, unit(Q_OLD) @ unit(G_OLD).T >= 0.9
    before = accepted[~same].mean()
    (check,) = (check for check in given["checks"] if check["what"].startswith("FAR"))
    assert check["required"] == f"at most {2 * before:.3g}" and 0.001 < before < 0.2


def test_a_threshold_of_squared_distances_is_taken_and_shown_as_such(files: dict[str, Path]) -> None:
    distance = ((Q_OLD[:, None].astype(np.float64) - G_OLD) ** 2).sum(2).min(1)
    at = float(np.median(distance)) + 1e-3
    options: dict[str, Any] = {"pairs": (files["po"], files["pn"]), "similarity": "l2"}
    given = audit(*four(files), score=at, **options)["threshold"]
    assert given["score"] == at and given["of"] == "squared distance"
    assert given["accepted"]["old model only"]["value"] == pytest.approx((distance <= at).mean())
    frozen = audit(*four(files), **options)["threshold"]["score"]
    assert frozen == pytest.approx(np.sort(distance)[math.ceil(0.9 * NQ) - 1], rel=1e-4)


def test_what_a_query_is_itself_it_does_not_find(tmp_path: Path, adapter: Path) -> None:
    ids = [f"item {i}" for i in range(NG)]
    chosen = np.random.default_rng(7).permutation(NG)[:80]
    paths = [
        parquet(tmp_path / "qo.parquet", G_OLD[chosen], [ids[i] for i in chosen]),
        parquet(tmp_path / "qn.parquet", G_NEW[chosen[::-1]], [ids[i] for i in chosen[::-1]]),
        parquet(tmp_path / "go.parquet", G_OLD, ids),
        parquet(tmp_path / "gn.parquet", G_NEW[::-1], ids[::-1]),
    ]
    report = audit(*paths, adapter=adapter)
    full, rows = nearest(G_NEW[chosen], G_NEW, 10, chosen), nearest(mapped(adapter, G_NEW[chosen]), G_OLD, 10, chosen)
    assert report["overlap"]["ways"]["adapter"]["10"]["value"] == pytest.approx(shared(rows, full, 10).mean(), abs=2e-3)
    assert any("80 queries are gallery items themselves" in note for note in report["notes"])
    labels = np.isin(np.arange(NG), chosen).astype(int)  # the labels follow the ids through every order
    npy(tmp_path, ql=np.ones(80, int), gl=labels)
    labelled = audit(
        *paths, adapter=adapter, query_labels=str(tmp_path / "ql.npy"), gallery_labels=str(tmp_path / "gl.npy")
    )
    hit = np.mean([labels[row[0]] == 1 for row in full])
    assert labelled["labelled"]["recall"]["full re-embedding"]["1"]["value"] == pytest.approx(hit)


def test_pairs_to_fit_on_that_are_judged_too_are_mentioned(tmp_path: Path) -> None:
    a, b = [f"{i}" for i in range(NG)], [f"q{i}" for i in range(NQ)]
    paths = [
        parquet(tmp_path / f"{name}.parquet", array, ids)
        for name, array, ids in (("qo", Q_OLD, b), ("qn", Q_NEW, b), ("go", G_OLD, a), ("gn", G_NEW, a))
    ]
    pairs = (
        parquet(tmp_path / "po.parquet", P_OLD, [*a[:30], *map(str, range(10**6, 10**6 + 470))]),
        parquet(tmp_path / "pn.parquet", P_NEW, [*a[:30], *map(str, range(10**6, 10**6 + 470))]),
    )
    notes = audit(*paths, pairs=pairs, methods=["Procrustes", "Ridge"])["notes"]
    assert any("30 judged gallery items are among the pairs" in note for note in notes)
    assert not any("queries are among the pairs" in note for note in notes)


def test_pairs_without_ids_are_known_by_their_vectors(files: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    mixed = npy(tmp_path, mo=np.concatenate([P_OLD, Q_OLD[:7]]), mn=np.concatenate([P_NEW, Q_NEW[:7]]))
    notes = audit(*four(files), pairs=(mixed["mo"], mixed["mn"]))["notes"]
    assert [note for note in notes if "among the pairs" in note] == [
        "7 queries are among the pairs that the adapter was fitted on (same id or same vector): that flatters it"
    ]
    clean = audit(*four(files), pairs=(files["po"], files["pn"]))["notes"]
    assert not any("among the pairs" in note for note in clean)


def test_of_a_fitted_adapter_it_is_said_whether_its_pairs_are_known(
    files: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    kind, notes = adapters.load(adapter)

    def said(**more: str) -> str:
        known = {k: v for k, v in notes.items() if k not in ("old file", "new file")}
        adapters.save(tmp_path / "a.safetensors", kind, known | {k.replace("_", " "): v for k, v in more.items()})
        (note,) = (n for n in audit(*four(files), adapter=tmp_path / "a.safetensors")["notes"] if "flatters" in n)
        return note

    def content(path: Path) -> str:
        return f"{path.stat().st_size} {hashlib.sha256(path.read_bytes()).hexdigest()}"

    assert "a.safetensors does not say which items it was fitted to" in said()
    assert "was fitted to other files" in said(old_file=content(files["po"]))
    leak = said(old_file=content(files["go"]), new_file=content(files["gn"]))
    assert leak.startswith(f"a.safetensors was fitted to {files['go']} and {files['gn']}, which it is judged on")


# -------------------------------------------------------------------------------------------------------- the sample


def clouds(n: int, dim: int, noise: float, twins: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A gallery and its adapted image; with twins every item has ten near copies, nearer than the noise is long."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n // 10 if twins else n, dim))
    x = np.repeat(x, 10, 0) + 0.05 * rng.normal(size=(n, dim)) if twins else x
    return x.astype(np.float32), (x + noise * rng.normal(size=(n, dim))).astype(np.float32)


@pytest.mark.parametrize("twins,dim,noise,parts", [(False, 8, 0.4, 5), (False, 8, 0.4, 20), (True, 16, 0.8, 2)])
def test_the_bias_of_the_sample_is_seen_from_the_sample(
    twins: bool, dim: int, noise: float, parts: int, tmp_path: Path
) -> None:
    """Judged on a part of the gallery, the figure for all of it comes near the truth; twins turn its direction."""
    n = 4000
    new, old = clouds(n, dim, noise, twins, 0)
    rng = np.random.default_rng(1)
    picked = rng.permutation(n)[:300]
    q = (new[picked] + 0.05 * rng.normal(size=(300, dim))).astype(np.float32)
    ids, some = np.arange(n), rng.permutation(n)[: n // parts]
    same = adapters.fit("Identity", torch.eye(dim), torch.eye(dim))
    adapters.save(tmp_path / "a.safetensors", same, {"side": "query", "similarity": "cosine"})
    queries = npy(tmp_path, q=q)["q"]
    gallery = parquet(tmp_path / "go.parquet", old, ids)
    sample = parquet(tmp_path / "gn.parquet", new[some], ids[some])
    report = audit(queries, queries, gallery, sample, adapter=tmp_path / "a.safetensors")
    bias = report["sample bias"]
    g_old, g_new, u = (unit(x).astype(np.float32) for x in (old, new, q))
    found, wanted = search(u, g_old, 10 * parts, "cosine").rows, search(u, g_new, 10 * parts, "cosine").rows
    truth, seen = overlap(found, wanted, 10).mean(), bias["in service"]["value"] + bias["too high by"]["value"]
    assert bias["stands for depth"] == 10 * parts and bias["read off at depth"] == 10 / parts
    assert seen == pytest.approx(overlap(found, wanted, 10 * parts).mean(), abs=0.03)  # what it stands for
    assert truth - 0.1 < bias["in service"]["value"] < truth + 0.01 and abs(seen - truth) > abs(
        bias["in service"]["value"] - truth
    )
    shown = Console(width=500, record=True, file=io.StringIO())
    shown.print(render(report))
    assert ("points or more" if twins else "points or less") in shown.export_text()
    assert bias["the sample is"] == ("pessimistic" if twins else "optimistic")


@pytest.mark.parametrize("parts", [10, 10**4, 10**9])
def test_no_estimate_of_a_share_leaves_its_range(parts: int, files: dict[str, Path], adapter: Path) -> None:
    bias = audit(*four(files), adapter=adapter, gallery_size=NG * parts)["sample bias"]
    found, high = bias["in service"], bias["too high by"]
    assert 0 <= found["lower"] <= found["value"] <= found["upper"] <= 1
    assert -1 <= high["lower"] <= high["value"] <= high["upper"] <= 1
    if parts == 10**9:
        assert found["value"] == 0  # the line through depths 1 and 4 has long passed zero


def test_a_tiny_sample_is_extrapolated_downwards_only(files: dict[str, Path], adapter: Path) -> None:
    report = audit(*four(files), adapter=adapter, gallery_size=NG * 100)
    bias = report["sample bias"]
    assert bias["extrapolated"] and bias["stands for depth"] == 1000
    assert bias["in service"]["value"] <= report["overlap"]["ways"]["adapter"]["1"]["value"] + 1e-9
    assert (
        report["sizes"]["gallery in service"] == 100 * NG
        and report["costs"]["full re-embedding"]["vectors written"] == 100 * NG
    )


# ------------------------------------------------------------------------------------------------------- the verdict


def rotated(folder: Path, side: str) -> dict[str, Any]:
    """Files of a new model that is the old one turned, and the adapter that undoes it."""
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(OLD, OLD)))[0]
    new = {f"{name}n": (x @ turn).astype(np.float32) for name, x in (("q", Q_OLD), ("g", G_OLD), ("p", P_OLD))}
    paths = npy(folder, qo=Q_OLD, go=G_OLD, po=P_OLD, **new)
    (best,) = fit(paths["po"], paths["pn"], ["Procrustes"], side=side).ranked  # type: ignore[arg-type]
    adapters.save(folder / "turn.safetensors", best.adapter, best.notes)
    return paths | {"adapter": folder / "turn.safetensors"}


@pytest.mark.parametrize("side", ["query", "gallery"])
def test_a_turned_space_is_a_go_in_all_but_the_gain(side: str, tmp_path: Path) -> None:
    """The new model is no better than the old: every overlap is 1, so there is nothing to gain and the verdict says so."""
    paths = rotated(tmp_path, side)
    report = audit(*four(paths), adapter=paths["adapter"])
    assert report["overlap"]["ways"]["adapter"]["10"]["value"] > 0.999
    unmet = [check["what"] for check in report["checks"] if not check["met"]]
    assert unmet == ["overlap@10: adapter less old model, both exact"] and report["verdict"] == "NO-GO"
    cost = report["costs"]["adapter"]
    assert cost["vectors embedded again"] == 0 and cost["vectors written"] == (0 if side == "query" else NG)


def test_a_go_needs_every_requirement_at_its_bound(tmp_path: Path) -> None:
    """The gallery side restores the new model's own vectors: the old ones hold the same, stretched and turned."""
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(OLD, OLD)))[0] * np.geomspace(1, 12, OLD)
    make = {f"{name}n": (x @ turn).astype(np.float32) for name, x in (("q", Q_OLD), ("g", G_OLD), ("p", P_OLD))}
    files = npy(tmp_path, qo=Q_OLD, go=G_OLD, po=P_OLD, **make)
    pairs = (files["po"], files["pn"])
    options: dict[str, Any] = {
        "pairs": pairs,
        "methods": ["Ridge"],
        "side": "gallery",
        "similarity": "l2",
        "accept": 0.9,
    }
    report = audit(*four(files), require=Requirements(margin=1.0), **options)
    assert report["verdict"] == "GO" and all(check["met"] for check in report["checks"]) and not report["missing"]
    assert (
        report["overlap"]["ways"]["old model only"]["10"]["upper"] < report["overlap"]["ways"]["adapter"]["10"]["lower"]
    )
    stricter = audit(*four(files), require=Requirements(overlap=1.0, margin=1.0), **options)
    assert stricter["verdict"] == "NO-GO"  # 150 queries cannot prove that all is equal


def test_without_the_new_gallery_nothing_is_a_go(files: dict[str, Path], adapter: Path) -> None:
    report = audit(*four(files)[:3], adapter=adapter, require=Requirements(overlap=0, slice=0, margin=1))
    assert report["verdict"] == "NO-GO" and "give --gallery-new" in report["missing"][0]
    assert report["threshold"]["accepted"]["adapter"]["n"] == NQ and report["overlap"] == {}
    assert report["sizes"]["judged sample"] == 0
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(report))
    shown = console.export_text()
    assert "NO-GO: what could be judged is met, but not all could be" in shown and "every requirement" not in shown
    assert "missing: overlap with the full backfill is unknown: give --gallery-new" in shown
    assert "The full backfill is unknown: --gallery-new is not given." in shown and "Bias" not in shown


def test_tiny_shares_are_shown_with_digits_that_count() -> None:
    tiny = {"value": 0.0000123, "lower": 0.0000031, "upper": 0.00002, "bounds": "bootstrap"}
    assert significant(tiny) == "0.0012 [0.00031, 0.002]" and significant(None) == "–"
    assert [number(x) for x in (0.5, -0.02, 0.00001234, 0)] == ["0.5000", "-0.0200", "1.23e-05", "0.0000"]


def test_the_worst_slice_is_found_and_its_bound_is_of_all_slices(
    files: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    shop = np.array(["good", "bad", "rare"])[np.where(np.arange(NQ) < 5, 2, np.arange(NQ) % 2)]
    spoiled = np.where((shop == "bad")[:, None], np.roll(Q_NEW, 1, axis=1), Q_NEW).astype(np.float32)
    old = parquet(tmp_path / "qo.parquet", Q_OLD, shop=shop, many=np.arange(NQ), one=["x"] * NQ, kind=Q_LABELS % 3)
    new = npy(tmp_path, qn=spoiled)["qn"]
    report = audit(old, new, files["go"], files["gn"], adapter=adapter)
    rows = report["slices"]["judged"]
    assert report["slices"]["too small"] == [{"column": "shop", "value": "rare", "n": 5}]
    assert (rows[0]["column"], rows[0]["value"]) == ("shop", "bad")
    assert {row["column"] for row in rows} <= {"shop", "kind"} and not any(row["value"] == "rare" for row in rows)
    (alone,) = (
        r for r in audit(old, new, files["go"], files["gn"], adapter=adapter, slices=["shop"])["slices"]["judged"][:1]
    )
    assert alone["overlap"]["lower"] > rows[0]["overlap"]["lower"]  # fewer slices, less to allow for
    assert any("least: shop = bad" in check["what"] and not check["met"] for check in report["checks"])
    with pytest.raises(UserError, match="unknown column of the query files 'shoop'; did you mean: shop"):
        audit(old, new, files["go"], files["gn"], adapter=adapter, slices=["shoop"])


def test_the_command_prints_writes_and_draws(files: dict[str, Path], adapter: Path, tmp_path: Path, capsys) -> None:
    paths = dict(zip(("--queries-old", "--queries-new", "--gallery-old", "--gallery-new"), map(str, four(files))))
    where = {"--json": str(tmp_path / "report.json"), "--png": str(tmp_path / "report.png")}
    index = str(index_of(tmp_path / "i.faiss", "HNSW8", G_OLD))
    more = {
        "--adapter": str(adapter),
        "--index": index,
        "--query-labels": str(files["ql"]),
        "--gallery-labels": str(files["gl"]),
    }
    words = [word for option in (paths, where, more) for pair in option.items() for word in pair]
    assert main(["audit", *words, "--encoder-rate", "100", "--search", "efSearch=32"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert shown.count("NO-GO: ") == 1 and report["verdict"] == "NO-GO"
    for said in (
        "efSearch=32",
        "negative flips",
        "Bias of the sample: none",
        "p50 / p99 of 150",
        "two indexes, 50%",
        "required for a GO",
    ):
        assert said in shown, said
    assert report["costs"]["full re-embedding"]["seconds"] == pytest.approx(4)
