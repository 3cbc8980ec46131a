"""`evaluate` and `evaluate_matrix` against naive loops, from arrays and from real files, and what they refuse."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from benchmark.embeddings import Embeddings
from benchmark.errors import UserError
from benchmark.evaluate import evaluate, evaluate_matrix


def naive(
    queries: Any, gallery: Any, query_labels: Any, gallery_labels: Any, own: Any = None, l2: bool = False
) -> dict:
    """One query after the other, ties against us. `own`: (N,) the gallery row that is the query's own item, or -1."""
    hits: dict[str, list[float]] = {"cmc@1": [], "cmc@5": [], "map": []}
    for i, q in enumerate(np.asarray(queries, float)):
        scored = []
        for j, g in enumerate(np.asarray(gallery, float)):
            if own is None or own[i] != j:
                score = -((q - g) ** 2).sum() if l2 else q @ g / math.sqrt((q @ q) * (g @ g))
                scored.append((score, gallery_labels[j] == query_labels[i]))
        positives = [s for s, hit in scored if hit]
        if not positives:
            continue
        first = 1 + sum(s >= max(positives) for s, hit in scored if not hit)
        hits["cmc@1"].append(first <= 1)
        hits["cmc@5"].append(first <= 5)
        precisions = [sum(s >= p for s in positives) / sum(s >= p for s, _ in scored) for p in positives]
        hits["map"].append(float(np.mean(precisions)))
    return {name: float(np.mean(values)) for name, values in hits.items()}


class World:
    """60 queries and 80 gallery items of 8 classes, embedded by three releases of growing quality."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.centres = self.rng.normal(size=(8, 12))
        self.ql, self.gl = np.arange(60) % 8, np.arange(80) % 8
        self.releases = [(self.embed(self.ql, s), self.embed(self.gl, s)) for s in (3.0, 2.0, 1.0)]

    def embed(self, labels: np.ndarray, noise: float, dims: int = 12) -> np.ndarray:
        vectors = self.centres[labels] + noise * self.rng.normal(size=(len(labels), 12))
        return vectors[:, :dims].astype(np.float32)


@pytest.fixture
def world() -> World:
    return World()


def close(result: dict, expected: dict) -> None:
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=1e-9), name


# -------------------------------------------------------------------------------------------------------- one cell


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_it_agrees_with_a_naive_loop(world: World, similarity: Any) -> None:
    q, g = world.releases[1]
    result = evaluate(q, g, world.ql, world.gl, similarity=similarity)
    close(result, naive(q, g, world.ql, world.gl, l2=similarity == "l2"))
    counts = {"queries": 60, "dropped": 0, "gallery": 80, "self_excluded": 0, "dim": 12}
    assert {name: result[name] for name in counts} == counts and set(result) == {*counts, "cmc@1", "cmc@5", "map"}


def test_without_a_gallery_each_item_searches_all_others(world: World) -> None:
    g = world.releases[1][1]
    result = evaluate(g, query_labels=world.gl)
    close(result, naive(g, g, world.gl, world.gl, own=range(80)))
    assert result["self_excluded"] == 80
    assert evaluate(g, g, world.gl, world.gl, same_items=True) == result
    assert evaluate(g, g, world.gl, world.gl, query_ids=np.arange(80), gallery_ids=np.arange(80)) == result
    assert evaluate(g, g.copy(), world.gl, world.gl)["cmc@1"] == 1.0  # only ids tell that they are the same items


def test_ids_exclude_the_own_item_of_another_order(world: World) -> None:
    old = world.releases[0][1]
    new = world.embed(world.gl, 1.0)
    order = np.random.default_rng(1).permutation(80)
    ids = [f"item {i}" for i in range(80)]
    result = evaluate(
        new[:20], old[order], world.gl[:20], world.gl[order], query_ids=ids[:20], gallery_ids=[ids[i] for i in order]
    )
    close(
        result,
        naive(new[:20], old[order], world.gl[:20], world.gl[order], own=[list(order).index(i) for i in range(20)]),
    )
    assert result["self_excluded"] == 20


def test_every_kind_of_array_gives_the_same(world: World) -> None:
    q, g = world.releases[2]
    expected = evaluate(q, g, world.ql, world.gl)
    words = np.array(["ash", "birch", "cedar", "elm", "fir", "gum", "hazel", "ivy"])
    frozen = q.copy()
    frozen.flags.writeable = False
    kinds: list[tuple[Any, Any, Any, Any]] = [
        (torch.tensor(q), torch.tensor(g, requires_grad=True), torch.tensor(world.ql), world.gl.astype(np.uint8)),
        (q.astype(">f4"), np.asfortranarray(g), world.ql.astype(">i8"), list(world.gl)),
        (q.tolist(), g.tolist(), world.ql.tolist(), world.gl.tolist()),
        (frozen, g[::-1][::-1], words[world.ql], list(words[world.gl])),
        (q, g, words[world.ql].astype(object), words[world.gl].astype("S")),
    ]
    for a, b, c, d in kinds:
        close(evaluate(a, b, c, d), {name: expected[name] for name in ("cmc@1", "map", "queries")})


def test_other_ks_and_dropped_queries(world: World) -> None:
    q, g = world.releases[1]
    labels = np.where(np.arange(60) < 6, 77, world.ql)
    result = evaluate(q, g, labels, world.gl, ks=(3,))
    assert result["dropped"] == 6 and result["queries"] == 54 and "cmc@3" in result and "cmc@1" not in result
    assert result["map"] == pytest.approx(naive(q, g, labels, world.gl)["map"])


def test_files_of_every_kind(world: World, tmp_path: Path) -> None:
    q, g = world.releases[1]
    expected = evaluate(q, g, world.ql, world.gl)
    paths = {}
    for name, array in {"q": q, "g": g, "ql": world.ql, "gl": world.gl}.items():
        paths[name] = tmp_path / f"{name}.npy"
        np.save(paths[name], array)
    assert evaluate(paths["q"], str(paths["g"]), paths["ql"], str(paths["gl"])) == expected
    save_file({"embeddings": q, "labels": world.ql}, tmp_path / "q.safetensors")
    save_file({"embeddings": g, "labels": world.gl}, tmp_path / "g.safetensors")
    assert evaluate(tmp_path / "q.safetensors", tmp_path / "g.safetensors") == expected
    assert evaluate(paths["q"], tmp_path / "g.safetensors", paths["ql"]) == expected
    labels = tmp_path / "labels.safetensors"
    save_file({"labels": world.ql}, labels)
    assert evaluate(q, g, labels, tmp_path / "g.safetensors") == expected
    np.save(tmp_path / "text.npy", world.ql.astype(str))
    assert evaluate(q, g, tmp_path / "text.npy", world.gl.astype(str)) == expected


def test_ids_in_files_are_used(world: World, tmp_path: Path) -> None:
    g = world.releases[1][1]
    save_file({"embeddings": g, "labels": world.gl, "ids": np.arange(80)}, tmp_path / "g.safetensors")
    expected = evaluate(g, query_labels=world.gl)
    assert evaluate(tmp_path / "g.safetensors", tmp_path / "g.safetensors") == expected
    assert evaluate(tmp_path / "g.safetensors") == expected


def test_the_engines_own_embedding_files_are_read(world: World, tmp_path: Path) -> None:
    g = torch.tensor(world.releases[1][1])
    Embeddings(torch.arange(80), {(2, "main"): g}, torch.tensor(world.gl)).save(tmp_path / "embeddings.safetensors")
    assert evaluate(tmp_path / "embeddings.safetensors") == evaluate(g, query_labels=world.gl)


def test_an_upgrade_adds_its_matrix(world: World) -> None:
    (old_q, old_g), (q, g) = world.releases[0], world.releases[2]
    result = evaluate(q, g, world.ql, world.gl, old_queries=old_q, old_gallery=old_g)
    upgrade = result.pop("upgrade")
    assert result == evaluate(q, g, world.ql, world.gl)
    assert upgrade == evaluate_matrix([(old_q, old_g), (q, g)], world.ql, world.gl)
    assert upgrade["matrices"]["map"][1][0] == evaluate(q, old_g, world.ql, world.gl)["map"]


# ------------------------------------------------------------------------------------------------------- the matrix


def test_the_matrix_agrees_with_naive_loops(world: World) -> None:
    result = evaluate_matrix(world.releases, world.ql, world.gl)
    for t in range(3):
        for k in range(3):
            expected = naive(world.releases[t][0], world.releases[k][1], world.ql, world.gl) if k <= t else None
            for metric in ("cmc@1", "cmc@5", "map"):
                assert result["matrices"][metric][t][k] == (pytest.approx(expected[metric]) if expected else None)
    assert result["undefined"] == {} and result["independent"] is None and result["dims"] == [12, 12, 12]
    assert (result["queries"], result["dropped"], result["gallery"]) == (60, 0, 80)
    C, summary = result["matrices"]["map"], result["summary"]["map"]
    assert summary["average_compatibility"] == sum(C[t][k] > C[k][k] for t, k in [(1, 0), (2, 0), (2, 1)]) / 3
    assert summary["average_multimodel_accuracy"] == pytest.approx(
        np.mean([C[t][k] for t in range(3) for k in range(t + 1)])
    )
    assert summary["average_compatibility_95"] is None and summary["mean_update_gain"] is None  # these need oracles


def test_flips_add_up_to_the_gain(world: World) -> None:
    result = evaluate_matrix(world.releases, world.ql, world.gl)
    C, flips = result["matrices"]["cmc@1"], result["summary"]["cmc@1"]["flips"]
    for t, k in [(1, 0), (2, 0), (2, 1)]:
        found = flips[f"{t},{k}"]
        assert found["positive"] - found["negative"] == pytest.approx(C[t][k] - C[k][k])


def test_oracles_give_gains_and_ac95(world: World) -> None:
    """A sequence held against itself: full gain on the diagonal's terms, and clear upgrades pass AC95."""
    releases = [(world.embed(world.ql, s), world.embed(world.gl, s)) for s in (3.0, 0.5)]
    result = evaluate_matrix(releases, world.ql, world.gl, independent=releases)
    C = result["matrices"]["map"]
    assert result["independent"]["map"] == C
    gain = (C[1][0] - C[0][0]) / (C[1][1] - C[0][0])
    assert result["summary"]["map"]["mean_update_gain"] == pytest.approx(gain)
    assert result["summary"]["map"]["average_compatibility_95"] == 1.0
    worse = evaluate_matrix([releases[0], releases[0]], world.ql, world.gl, independent=releases)
    assert worse["summary"]["map"]["average_compatibility_95"] == 0.0


def test_releases_of_one_list_never_find_the_item_itself(world: World) -> None:
    lists = [gallery for _, gallery in world.releases]
    result = evaluate_matrix(lists, world.gl)
    expected = naive(lists[2], lists[0], world.gl, world.gl, own=range(80))
    assert result["matrices"]["map"][2][0] == pytest.approx(expected["map"]) and result["self_excluded"] == 80


def test_unequal_dims_are_refused_cell_by_cell_unless_truncated(world: World) -> None:
    small = (world.embed(world.ql, 2.0, 8), world.embed(world.gl, 2.0, 8))
    releases = [small, world.releases[2]]
    result = evaluate_matrix(releases, world.ql, world.gl)
    assert result["matrices"]["map"][1][0] is None and result["matrices"]["map"][1][1] is not None
    assert (
        list(result["undefined"]) == ["1,0"] and "12 dims" in result["undefined"]["1,0"] and result["dims"] == [8, 12]
    )
    assert result["summary"]["map"]["average_compatibility"] == 0.0  # not shown, so not compatible
    nested = evaluate_matrix(releases, world.ql, world.gl, truncate=True)
    expected = naive(world.releases[2][0][:, :8], small[1], world.ql, world.gl)
    assert nested["matrices"]["map"][1][0] == pytest.approx(expected["map"]) and nested["undefined"] == {}
    assert evaluate(world.releases[2][0], small[1], world.ql, world.gl, truncate=True)["dim"] == 8


def test_a_single_release_is_a_matrix_too(world: World) -> None:
    result = evaluate_matrix(world.releases[:1], world.ql, world.gl, independent=world.releases[:1])
    assert result["summary"]["map"]["average_compatibility"] is None and len(result["matrices"]["map"]) == 1


# -------------------------------------------------------------------------------------------------------- bad input


def saved(path: Path, array: Any, pickled: bool = False) -> Path:
    np.save(path, array, allow_pickle=pickled)
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def cut(path: Path) -> Path:
    return written(path, path.read_bytes()[:-8])


def tensors(path: Path, **arrays: np.ndarray) -> Path:
    save_file(arrays, path)
    return path


ones = np.ones((4, 3), np.float32)
nan, zero = ones.copy(), ones.copy()
nan[2, 1], zero[1] = np.nan, 0
y = np.array([0, 0, 1, 1])

CASES = {  # name -> (the call in an empty folder, words that the one line must hold)
    "no such file": (lambda d: evaluate(d / "q.npy", ones, y, y), ["q.npy", "no such file"]),
    "a folder": (lambda d: evaluate(written(d / "x", b"").parent, ones, y, y), ["neither .npy nor .safetensors"]),
    "a pickle": (lambda d: evaluate(written(d / "q.pt", pickle.dumps(1)), ones, y, y), ["q.pt", "not opened"]),
    "a pickle in disguise": (
        lambda d: evaluate(saved(d / "q.npy", np.array([{}, {}]), pickled=True), ones, y, y),
        ["q.npy", "cannot be read"],
    ),
    "empty .npy": (lambda d: evaluate(written(d / "q.npy", b""), ones, y, y), ["q.npy", "cannot be read"]),
    "cut .npy": (
        lambda d: evaluate(cut(saved(d / "c.npy", ones)), ones, y, y),
        ["c.npy", "cannot be read"],
    ),
    "cut safetensors": (
        lambda d: evaluate(cut(tensors(d / "c.safetensors", embeddings=ones)), ones, y, y),
        ["c.safetensors", "cannot be read"],
    ),
    "safetensors without embeddings": (
        lambda d: evaluate(tensors(d / "q.safetensors", vectors=ones), ones, y, y),
        ["'embeddings'", "vectors"],
    ),
    "safetensors without labels": (lambda d: evaluate(ones, ones, tensors(d / "q.safetensors", ids=y), y), ["'labels'", "ids"]),
    "no labels": (lambda d: evaluate(saved(d / "q.npy", ones), ones, None, y), ["no labels for", "q.npy", "query_labels"]),
    "labels of another length": (
        lambda d: evaluate(ones, ones, y, saved(d / "gl.npy", y[:3])),
        ["gl.npy", "gallery_labels", "4 integers", "(3,)"],
    ),
    "labels that are floats": (lambda d: evaluate(ones, ones, saved(d / "l.npy", y / 2), y), ["l.npy", "float64"]),
    "labels of two columns": (lambda d: evaluate(ones, ones, np.stack([y, y], 1), y), ["query_labels", "(4, 2)"]),
    "text against integers": (lambda d: evaluate(ones, ones, y, list("abcd")), ["labels", "text on one side"]),
    "labels that never meet": (lambda d: evaluate(ones, ones, y, y + 7), ["no query has a gallery item of its label"]),
    "ids on one side": (lambda d: evaluate(ones, ones, y, y, query_ids=y), ["query_ids and gallery_ids"]),
    "ids twice": (lambda d: evaluate(ones, ones, y, y, query_ids=y, gallery_ids=y), ["gallery_ids must be unique"]),
    "unlike lists called the same": (lambda d: evaluate(ones[:3], ones, y[:3], y, same_items=True), ["3 queries", "4 gallery"]),
    "NaN": (lambda d: evaluate(ones, saved(d / "g.npy", nan), y, y), ["g.npy", "NaN", "row 2"]),
    "infinite": (lambda d: evaluate(nan * np.inf, ones, y, y), ["queries", "infinity"]),
    "zero vectors": (lambda d: evaluate(saved(d / "q.npy", zero), ones, y, y), ["q.npy", "zero vectors", "row 1"]),
    "integers": (
        lambda d: evaluate(saved(d / "q.npy", ones.astype(int)), ones, y, y),
        ["q.npy", "floats", "int64 of shape (4, 3)"],
    ),
    "one dimension": (lambda d: evaluate(ones[0], ones, y, y), ["queries", "(N, D)", "(3,)"]),
    "text": (lambda d: evaluate(np.array(list("ab")), ones, y, y), ["queries", "(N, D)"]),
    "no rows": (lambda d: evaluate(ones, ones[:0], y, y[:0]), ["gallery", "non-empty", "(0, 3)"]),
    "unequal dims": (
        lambda d: evaluate(ones, saved(d / "g.npy", ones[:, :2]), y, y),
        ["queries has 3 dims", "g.npy has 2", "truncate"],
    ),
    "unknown similarity": (lambda d: evaluate(ones, ones, y, y, similarity="dot"), ["similarity", "'dot'"]),  # type: ignore[arg-type]
    "k of 0": (lambda d: evaluate(ones, ones, y, y, ks=(0,)), ["ks", "(0,)"]),
    "half an upgrade": (lambda d: evaluate(ones, ones, y, y, old_gallery=ones), ["old_queries and old_gallery"]),
    "no releases": (lambda d: evaluate_matrix([], y, y), ["no releases"]),
    "half a pair": (lambda d: evaluate_matrix([(ones,)], y, y), ["release 0", "pair"]),  # type: ignore[list-item]
    "another number of items": (
        lambda d: evaluate_matrix([ones, saved(d / "b.npy", ones[:3])], y),
        ["b.npy has 3 rows", "same items"],
    ),
    "labels that disagree": (
        lambda d: evaluate_matrix(
            [tensors(d / "a.safetensors", embeddings=ones, labels=y), tensors(d / "b.safetensors", embeddings=ones, labels=1 - y)]
        ),
        ["a.safetensors", "b.safetensors", "different labels"],
    ),
    "an oracle too few": (lambda d: evaluate_matrix([ones, ones], y, independent=[ones]), ["each of the 2 releases"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_line(case: str, tmp_path: Path) -> None:
    call, words = CASES[case]
    with pytest.raises(UserError) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)
