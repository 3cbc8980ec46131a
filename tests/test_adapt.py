"""`compatbench adapt`: fits from files equal fits from arrays, the choice is made on pairs not fitted to, apply streams."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file

from benchmark import adapters
from benchmark.__main__ import main
from benchmark.adapt import Judged, Map, apply, fit, judge
from benchmark.errors import UserError
from benchmark.vectors import CHUNK, open_vectors

ROOT = Path(__file__).parent.parent
N, OLD, NEW = 600, 8, 12
RNG = np.random.default_rng(0)
LATENT = RNG.normal(size=(N, 6))
X_OLD = (LATENT @ RNG.normal(size=(6, OLD)) + 0.3 * RNG.normal(size=(N, OLD))).astype(np.float32)
X_NEW = (LATENT @ RNG.normal(size=(6, NEW)) + 0.1 * RNG.normal(size=(N, NEW))).astype(np.float32)


def npy(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def parquet(path: Path, array: np.ndarray, ids: list | None = None, **columns: object) -> Path:
    identity = {} if ids is None else {"id": ids}
    pq.write_table(pa.table({**identity, "vector": list(array), **columns}), path, row_group_size=100)
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Path, Path]:
    """(old, new)"""
    return npy(tmp_path / "old.npy", X_OLD), npy(tmp_path / "new.npy", X_NEW)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmark.adapt.CHUNK", 64 * NEW)
    monkeypatch.setattr("benchmark.vectors.CHUNK", 64 * NEW)


def normed(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x.astype(np.float64) ** 2).sum(1, keepdims=True))


# --------------------------------------------------------------------------------------------------------------- fit


def naive_overlap(
    asked: np.ndarray, gallery: np.ndarray, true_asked: np.ndarray, true_gallery: np.ndarray, k: int
) -> float:
    """Each row asks all others: mean share of the true k nearest among the k nearest; sorted by cosine, in float64."""
    shares = []
    for i in range(len(asked)):
        found, wanted = (
            set(sorted((j for j in range(len(g)) if j != i), key=lambda j, q=q, g=g: -float(q[i] @ g[j]))[:k])
            for q, g in ((asked, gallery), (true_asked, true_gallery))
        )
        shares.append(len(found & wanted) / k)
    return float(np.mean(shares))


@pytest.mark.parametrize("side", ["query", "gallery"])
def test_a_fit_is_judged_on_pairs_that_it_has_not_seen(pairs: tuple[Path, Path], side: str) -> None:
    (found,) = fit(*pairs, ["Ridge"], side=side, seed=3).ranked
    rows = np.random.default_rng(3).permutation(N)
    held, fitted = rows[:120], rows[120:]
    source, target = (X_NEW, X_OLD) if side == "query" else (X_OLD, X_NEW)
    source, target = normed(source).astype(np.float32), normed(target).astype(np.float32)
    again = adapters.fit("Ridge", torch.from_numpy(source[np.sort(fitted)]), torch.from_numpy(target[np.sort(fitted)]))
    for name, value in again.state_dict().items():
        torch.testing.assert_close(found.adapter.state_dict()[name], value, rtol=0, atol=1e-5)
    mapped, true = normed(found.adapter(torch.from_numpy(source[held])).numpy()), target[held].astype(np.float64)
    assert found.fidelity == pytest.approx(float((mapped * true).sum(1).mean()), abs=1e-5)
    asked = (mapped, true) if side == "query" else (true, mapped)
    assert found.overlap == pytest.approx(naive_overlap(*asked, true, true, 10), abs=2e-3)
    assert 0.3 < found.overlap < 0.95
    said = {"side": side, "similarity": "cosine", "seed": "3", "pairs": "600", "held out": "120"}
    assert said.items() <= found.notes.items()


def test_of_several_methods_the_best_overlap_comes_first(pairs: tuple[Path, Path]) -> None:
    fits = fit(*pairs, ["Identity", "Diagonal", "Procrustes", "Ridge"])
    assert [f.overlap for f in fits.ranked] == sorted((f.overlap for f in fits.ranked), reverse=True)
    assert fits.ranked[0].adapter.kind == "Ridge" and fits.ranked[-1].adapter.kind == "Identity"
    assert list(fits.refused) == ["Diagonal"] and "needs equal dims, got 12 and 8" in fits.refused["Diagonal"]


def test_l2_leaves_lengths_as_they_are(pairs: tuple[Path, Path]) -> None:
    (found,) = fit(*pairs, ["Ridge"], similarity="l2").ranked
    rows = np.sort(np.random.default_rng(0).permutation(N)[120:])
    again = adapters.fit("Ridge", torch.from_numpy(X_NEW[rows]), torch.from_numpy(X_OLD[rows]))
    torch.testing.assert_close(found.adapter.state_dict()["weight"], again.state_dict()["weight"], rtol=0, atol=1e-5)


def test_maps_without_closed_form_are_fitted_to_the_same_pairs(pairs: tuple[Path, Path], small_chunks: None) -> None:
    (found,) = fit(*pairs, ["LocalProcrustes"], settings={"clusters": 2}).ranked
    rows = np.sort(np.random.default_rng(0).permutation(N)[120:])
    source, target = (torch.from_numpy(normed(x)[rows].astype(np.float32)) for x in (X_NEW, X_OLD))
    again = adapters.fit("LocalProcrustes", source, target, clusters=2)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(found.adapter.state_dict()[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_order_and_extra_rows_do_not_matter_where_ids_are_known(form: str, tmp_path: Path, small_chunks: None) -> None:
    ids = [f"item {i}" for i in range(N)]
    (plain,) = fit(
        parquet(tmp_path / "o.parquet", X_OLD, ids), parquet(tmp_path / "n.parquet", X_NEW, ids), ["Procrustes"]
    ).ranked
    order = np.random.default_rng(5).permutation(N)
    more_ids = ["other", *(ids[i] for i in order)]
    more = np.concatenate([np.full((1, OLD), 9.0, np.float32), X_OLD[order]])
    if form == "parquet":
        shuffled = fit(parquet(tmp_path / "s.parquet", more, more_ids), tmp_path / "n.parquet", ["Procrustes"])
    else:  # ids of .safetensors are integers
        save_file({"embeddings": more, "ids": np.array([-1, *order])}, tmp_path / "s.safetensors")
        save_file({"embeddings": X_NEW, "ids": np.arange(N)}, tmp_path / "n.safetensors")
        shuffled = fit(tmp_path / "s.safetensors", tmp_path / "n.safetensors", ["Procrustes"])
    assert "600 pairs, put into order by id; left out: 0 rows only in n" in shuffled.note
    torch.testing.assert_close(
        shuffled.ranked[0].adapter.state_dict()["weight"], plain.adapter.state_dict()["weight"], rtol=0, atol=1e-5
    )
    assert shuffled.ranked[0].overlap == pytest.approx(plain.overlap, abs=1e-3)


def test_a_random_part_of_the_pairs_suffices(pairs: tuple[Path, Path]) -> None:
    (found,) = fit(*pairs, ["Procrustes"], pairs=100).ranked
    assert found.notes["pairs"] == "100" and found.notes["held out"] == "20" and found.overlap > 0.3


def test_a_rotated_space_is_recovered_and_ranks_as_the_target(tmp_path: Path) -> None:
    turn = np.linalg.qr(RNG.normal(size=(OLD, OLD)))[0]
    old, new = npy(tmp_path / "old.npy", X_OLD), npy(tmp_path / "new.npy", (X_OLD @ turn).astype(np.float32))
    for side in ("query", "gallery"):
        (found,) = fit(old, new, ["Procrustes"], side=side).ranked
        assert found.fidelity > 1 - 1e-5 and found.overlap > 0.999


def test_the_depth_of_the_overlap_leaves_chance_no_room() -> None:
    same = adapters.fit("Identity", torch.eye(8), torch.eye(8))
    noise = np.random.default_rng(1).normal(size=X_OLD.shape).astype(np.float32)
    for held, k in ((600, 10), (101, 10), (100, 9), (12, 1)):
        judged = judge(same, X_OLD[:held], X_OLD[:held], "query", "cosine")
        assert (judged.k, judged.chance) == (k, k / (held - 1)) and judged.overlap > judged.luck
    for side in ("query", "gallery"):
        judged = judge(same, noise, X_OLD, side, "cosine")
        assert judged.overlap < judged.luck and judged.luck < 3 * judged.chance
    few = judge(same, X_OLD[:40], X_OLD[:40] + 0.5 * noise[:40], "query", "cosine")
    true = normed(X_OLD[:40] + 0.5 * noise[:40])
    assert few.overlap == pytest.approx(naive_overlap(normed(X_OLD[:40]), true, true, true, 3), abs=1e-6)


@pytest.mark.parametrize("side", ["query", "gallery"])
def test_files_of_other_orders_are_refused(side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = X_NEW + 3 * np.abs(RNG.normal(size=NEW)).astype(np.float32)  # away from the mean, so that there are hubs
    for seed, rows in ((1, N), (2, 300), (3, 100)):
        order = np.random.default_rng(seed).permutation(rows)
        old, new = npy(tmp_path / "o.npy", X_OLD[:rows]), npy(tmp_path / "n.npy", moved[:rows][order])
        with pytest.raises(
            UserError, match=r"do not seem to hold the same items in the same order: overlap@\d+ .* chance"
        ):
            fit(old, new, ["Ridge", "Procrustes"], side=side)
    old, new = npy(tmp_path / "o.npy", X_OLD[:30]), npy(tmp_path / "n.npy", moved[30:60])
    for overlap, chance in ((0.05, 0.09), (0.1, 0.09)):
        judged = Judged(0.0, overlap, 1, chance, 0.2)
        monkeypatch.setattr("benchmark.adapt.judge", lambda *_, judged=judged: judged)
        if overlap < chance:
            with pytest.raises(UserError, match="cannot be told from chance; check the order"):
                fit(old, new, ["Procrustes"], side=side)
    note = fit(old, new, ["Procrustes"], side=side).note
    assert "overlap@1 0.100 (by chance 0.090) on 12 held-out pairs cannot be told from chance: give more pairs" in note


def test_an_adapter_knows_what_it_was_fitted_to(pairs: tuple[Path, Path], adapter: Path, tmp_path: Path) -> None:
    mapping = Map.load(adapter)
    assert all(mapping.fitted_to(path) for path in pairs)
    elsewhere = npy(tmp_path / "elsewhere.npy", X_OLD)
    assert mapping.fitted_to(elsewhere) and not mapping.fitted_to(npy(elsewhere, changed(X_OLD, 5, 1.0)))
    (found,) = fit(*pairs, ["Ridge"]).ranked
    assert Map.of(found.adapter, found.notes).fitted_to(pairs[0])


def test_lengths_beyond_float32_are_no_matter(tmp_path: Path) -> None:
    old, new = npy(tmp_path / "o.npy", X_OLD * np.float32(1e25)), npy(tmp_path / "n.npy", X_NEW * np.float32(1e-25))
    (found,) = fit(old, new, ["Ridge"]).ranked
    (plain,) = fit(npy(tmp_path / "po.npy", X_OLD), npy(tmp_path / "pn.npy", X_NEW), ["Ridge"]).ranked
    assert found.overlap == pytest.approx(plain.overlap, abs=1e-3)


# ------------------------------------------------------------------------------------------------------------- apply


@pytest.fixture
def adapter(pairs: tuple[Path, Path], tmp_path: Path) -> Path:
    out = tmp_path / "adapter.safetensors"
    old, new = map(str, pairs)
    assert main(["adapt", "--old", old, "--new", new, "--method", "Ridge", "--out", str(out)]) == 0
    return out


def test_the_command_prints_what_each_method_does(pairs: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    old, new = map(str, pairs)
    out = tmp_path / "made" / "adapter.safetensors"
    command = ["adapt", "--old", old, "--new", new, "--method", "all", "--pairs", "200", "--out", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in set(adapters.KINDS) - {"ConstantShift", "Diagonal"})
    assert "left out: ConstantShift" in shown and "row i of new.npy and of old.npy" in shown
    mapping = Map.load(out)
    assert (mapping.side, mapping.similarity) == ("query", "cosine") and mapping.adapter.kind in shown


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_applied_in_chunks_equals_applied_at_once(
    similarity: str, pairs: tuple[Path, Path], tmp_path: Path, small_chunks: None
) -> None:
    (found,) = fit(*pairs, ["Ridge"], similarity=similarity).ranked
    adapters.save(tmp_path / "a.safetensors", found.adapter, found.notes)
    source = X_NEW if similarity == "l2" else normed(X_NEW).astype(np.float32)
    expected = found.adapter(torch.from_numpy(source)).numpy()
    expected = expected if similarity == "l2" else normed(expected)
    shops = ["a", "b"] * (N // 2)
    for path in (pairs[1], parquet(tmp_path / "new.parquet", X_NEW, list(range(N)), shop=shops)):
        out = tmp_path / f"out{path.suffix}"
        assert apply(path, tmp_path / "a.safetensors", out) == (N, 0)
        written = open_vectors(out)
        np.testing.assert_allclose(written.take(), expected, rtol=0, atol=1e-6)
    assert (
        written.column("shop").tolist() == shops and written.ids is not None and written.ids.tolist() == list(range(N))
    )


def test_what_the_gallery_side_writes_meets_plain_new_queries(tmp_path: Path) -> None:
    turn = np.linalg.qr(RNG.normal(size=(OLD, OLD)))[0]
    rotated = (X_OLD @ turn).astype(np.float32)
    old, new, out = npy(tmp_path / "o.npy", X_OLD), npy(tmp_path / "n.npy", rotated), tmp_path / "a.safetensors"
    fits = ["adapt", "--old", str(old), "--new", str(new), "--side", "gallery", "--out", str(out)]
    assert main(fits) == 0
    assert main(["adapt", "--apply", str(old), "--adapter", str(out), "--out", str(tmp_path / "moved.npy")]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "moved.npy"), normed(rotated), rtol=0, atol=1e-5)


CLI = """
import sys, time
from benchmark import adapt, writer
from benchmark.__main__ import main

writer.NOTE, pause, calls = 0, float(sys.argv[1]), adapt.Map.__call__

def slower(self, *arguments):
    time.sleep(pause)
    return calls(self, *arguments)

adapt.Map.__call__ = slower
sys.exit(main(sys.argv[2:]))
"""


def test_apply_killed_midway_goes_on_and_ends_with_the_same_bytes(adapter: Path, tmp_path: Path) -> None:
    rows = 40 * CHUNK // NEW  # 40 chunks
    big = np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.float32, (rows, NEW))
    big[:] = np.resize(X_NEW, (rows, NEW))
    big.flush()
    out, whole = tmp_path / "out.npy", tmp_path / "whole.npy"
    out.write_bytes(b"older")

    def command(target: Path) -> list[str]:
        return ["adapt", "--apply", str(tmp_path / "big.npy"), "--adapter", str(adapter), "--out", str(target)]

    process = subprocess.Popen([sys.executable, "-c", CLI, "0.2", *command(out)], cwd=ROOT)
    notes = tmp_path / ".out.npy.progress.json"
    while process.poll() is None and not (notes.exists() and json.loads(notes.read_text())["rows"] >= 2 * CHUNK // NEW):
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed: the test proves nothing"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert out.read_bytes() == b"older"
    _, before = apply(tmp_path / "big.npy", adapter, out)
    assert 0 < before < rows
    assert apply(tmp_path / "big.npy", adapter, whole) == (rows, 0)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
def test_memory_does_not_grow_with_the_file(adapter: Path, tmp_path: Path) -> None:
    rows = 3 * 10**6  # 144 MB in, 96 MB out
    np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.float32, (rows, NEW))[:] = 1
    apply(npy(tmp_path / "new.npy", X_NEW), adapter, tmp_path / "warm.npy")

    def held(name: str) -> int:  # KiB
        return int(Path("/proc/self/status").read_text().split(name)[1].split()[0])

    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = held("VmRSS:")
    apply(tmp_path / "big.npy", adapter, tmp_path / "out.npy")
    assert held("VmHWM:") - before < 60_000


# --------------------------------------------------------------------------------------------------------- bad input


def changed(array: np.ndarray, rows: object, value: float) -> np.ndarray:
    array = array.copy()
    array[rows] = value
    return array


def fits(new: object = None, old: object = None, *more: str):
    """The command with one of the files changed."""

    def command(d: Path) -> list[str]:
        paths = [npy(d / f"{name}.npy", x) if isinstance(x, np.ndarray) else x(d) for name, x in
                 (("old", X_OLD if old is None else old), ("new", X_NEW if new is None else new))]  # fmt: skip
        return ["adapt", "--old", str(paths[0]), "--new", str(paths[1]), "--out", str(d / "a.safetensors"), *more]

    return command


def applies(array: np.ndarray, *, adapter: str = "adapter.safetensors", out: str = "out.npy"):
    def command(d: Path) -> list[str]:
        source = npy(d / "big.npy", array)
        return ["adapt", "--apply", str(source), "--adapter", str(d / adapter), "--out", str(d / out)]

    return command


def onto(option: str, out: str, link: str | None = None):
    """The output is a file that the command reads, or a link to it."""

    def command(d: Path) -> list[str]:
        paths = {"old": d / "o.safetensors", "new": d / "n.safetensors", "out": d / "out.safetensors"}
        for name, x in (("old", X_OLD), ("new", X_NEW)):
            save_file({"embeddings": x}, paths[name])
        words = ["--old", paths["old"], "--new", paths["new"]]
        if option == "adapter":
            words = ["--apply", paths["new"], "--adapter", d / "adapter.safetensors"]
        if link == "hard":
            (d / out).hardlink_to(d / words[1].name if option == "old" else d / "adapter.safetensors")
        elif link == "soft":
            (d / out).symlink_to(paths["old"])
        return ["adapt", *map(str, words), "--out", str(d / "." / out)]

    return command


def damaged(path: Path, array: np.ndarray) -> Path:
    data = bytearray(parquet(path, array).read_bytes())
    data[len(data) // 4 : len(data) // 2] = np.random.default_rng(0).bytes(len(data) // 2 - len(data) // 4)
    path.write_bytes(data)
    return path


def applies_damaged(d: Path) -> list[str]:
    path = damaged(d / "n.parquet", X_NEW)
    return ["adapt", "--apply", str(path), "--adapter", str(d / "adapter.safetensors"), "--out", str(d / "o.parquet")]


def twice(d: Path) -> list[str]:
    columns = [pa.array(range(N)), pa.array(range(N)), pa.array(list(X_NEW))]
    pq.write_table(pa.table(columns, names=["a", "a", "vector"]), d / "n.parquet")
    return [
        "adapt",
        "--apply",
        str(d / "n.parquet"),
        "--adapter",
        str(d / "adapter.safetensors"),
        "--out",
        str(d / "o.parquet"),
    ]


IDS = list(range(N))
BAD = {
    "the output is an input": (onto("old", "o.safetensors"), "o.safetensors would replace --old; choose another name"),
    "the output is the adapter": (onto("adapter", "adapter.safetensors"), "would replace --adapter; choose another name"),
    "the output is a hard link to an input": (onto("old", "h.safetensors", "hard"), "would replace --old"),
    "the output is a link to an input": (onto("old", "s.safetensors", "soft"), "would replace --old"),
    "the output holds something else": (
        lambda d: [*fits()(d)[:-1], str(d / "plain.safetensors")], "plain.safetensors: holds something else than an adapter"),
    "damaged pages": (fits(lambda d: damaged(d / "n.parquet", X_NEW)), "n.parquet: cannot be read: "),
    "damaged pages to apply to": (applies_damaged, "n.parquet: cannot be read: "),
    "two columns of one name": (twice, "n.parquet: has more than one column 'a'; rename or drop all but one"),
    "a number that is none": (
        fits(None, None, "--method", "Ridge", "--set", "rho=abc"), "Ridge: rho must be a number or null, got 'abc'"),
    "a word for a whole number": (
        fits(None, None, "--method", "LowRank", "--set", "rank=abc"), "LowRank: rank must be a whole number, got 'abc'"),
    "a fraction for a whole number": (
        fits(None, None, "--method", "LowRank", "--set", "rank=3.5"), "LowRank: rank must be a whole number, got 3.5"),
    "no choice": (fits(None, None, "--set", "centred=1"), "Procrustes: centred must be true or false, got 1"),
    "a seed below zero": (fits(None, None, "--seed", "-1"), "--seed -1: seeds are whole numbers from 0"),
    "no YAML": (fits(None, None, "--method", "Ridge", "--set", "rho=a: b: c"), "--set rho takes a number, true, false"),
    "options that the adapter fixes": (
        lambda d: [*applies(X_NEW)(d), "--side", "gallery"], "--side is of the fit, and the adapter says it"),
    "similarity that the adapter fixes": (
        lambda d: [*applies(X_NEW)(d), "--similarity", "cosine"], "--similarity is of the fit, and the adapter says it"),
    "a method to apply": (lambda d: [*applies(X_NEW)(d), "--method", "Ridge"], "--method is of the fit"),
    "a null id": (
        fits(lambda d: parquet(d / "n.parquet", X_NEW, [None, *IDS[1:]]), lambda d: parquet(d / "o.parquet", X_OLD, IDS)),
        "n.parquet: row 0 has no id (null); give every row its own"),
    "a constant column, of all methods once": (
        fits(changed(X_NEW, (slice(None), 3), 2.0), None, "--similarity", "l2", "--method", "Ridge", "Procrustes", "LowRank"),
        "compatbench: Ridge, Procrustes, LowRank: "),
    "unpaired": (fits(new=X_NEW[:500]), "without ids in both nobody knows"),
    "ids of other items": (
        fits(lambda d: parquet(d / "n.parquet", X_NEW, IDS), lambda d: parquet(d / "o.parquet", X_OLD, [i + N for i in IDS])),
        "have no id in common"),
    "too few pairs": (
        fits(X_NEW[:14], X_OLD[:14], "--method", "Procrustes"),
        "compatbench: 7 pairs are too few: Procrustes from 12 to 8 dims needs at least 8"),
    "hardly any pairs": (fits(X_NEW[:5], X_OLD[:5]), "hold 5 pairs; even the plainest map and its test need 10"),
    "more pairs than there are": (fits(None, None, "--pairs", "601"), "--pairs 601: the files hold 600 pairs"),
    "a constant column": (
        fits(changed(X_NEW, (slice(None), 3), 2.0), None, "--similarity", "l2"),
        "new.npy: 1 of 12 columns are constant over all 480 pairs (3)"),
    "a NaN column": (fits(changed(X_NEW, (slice(None), 3), np.nan)), "new.npy: row 0 holds NaN or infinity"),
    "an infinite value": (fits(None, changed(X_OLD, (17, 2), np.inf)), "old.npy: row 17 holds NaN or infinity"),
    "a zero vector": (fits(changed(X_NEW, 44, 0.0)), "new.npy: row 44 is a zero vector, which has no cosine"),
    "a zero vector out of order": (
        fits(
            lambda d: parquet(d / "n.parquet", changed(X_NEW, 44, 0.0), IDS[::-1]),
            lambda d: parquet(d / "o.parquet", X_OLD, IDS)),
        "n.parquet: row 44 is a zero vector"),
    "unknown method": (
        fits(None, None, "--method", "Procrustean"),
        "unknown method 'Procrustean'; did you mean: LocalProcrustes, Procrustes"),
    "unknown setting": (fits(None, None, "--set", "lambda=3"), "unknown hyperparameter of Procrustes 'lambda'; known: "),
    "settings of two": (fits(None, None, "--method", "Ridge", "Procrustes", "--set", "rho=1"), "--set belongs to one method"),
    "no such map between these dims": (
        fits(None, None, "--method", "Diagonal"), "compatbench: Diagonal needs equal dims, got 12 and 8"),
    "only one file": (lambda d: ["adapt", "--old", "x.npy", "--out", "a.safetensors"], "give --old and --new to fit"),
    "no adapter's name": (
        lambda d: [*fits()(d)[:-1], str(d / "a.npy")], "a.npy: an adapter is written as .safetensors"),
    "both at once": (lambda d: [*fits()(d), "--apply", "x.npy"], "--apply takes a fitted --adapter, and neither"),
    "dims of the other model": (
        applies(X_OLD), "big.npy has 8 dims, the adapter maps 12 to 8: give embeddings of the new model, not those of the other"),
    "dims of no model": (applies(X_NEW[:, :5]), "big.npy has 5 dims, the adapter maps 12 to 8: give embeddings of the new model"),
    "NaN in the file": (applies(changed(X_NEW, (300, 0), np.nan)), "big.npy: row 300 holds NaN"),
    "zero in the file": (applies(changed(X_NEW, 300, 0)), "big.npy: row 300 is a zero vector"),
    "another format": (applies(X_NEW, out="out.parquet"), "the output has the input's format; name it out.npy"),
    "onto itself": (applies(X_NEW, out="big.npy"), "big.npy would replace --apply; choose another name"),
    "no adapter": (applies(X_NEW, adapter="none.safetensors"), "none.safetensors is missing or damaged"),
    "not an adapter": (applies(X_NEW, adapter="plain.safetensors"), "plain.safetensors holds no adapter"),
    "an adapter of unknown use": (applies(X_NEW, adapter="bare.safetensors"), "does not say side and similarity"),
}  # fmt: skip


@pytest.mark.parametrize("output", ["json", "png"])
def test_an_audit_writes_over_none_of_its_inputs(output: str, pairs: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    (tmp_path / "link.npy").hardlink_to(pairs[0])
    before = pairs[0].read_bytes()
    given = {"queries-old": pairs[0], "queries-new": pairs[1], "gallery-old": pairs[0], "adapter": "a.safetensors"}
    command = ["audit", *(str(word) for name, file in given.items() for word in (f"--{name}", file))]
    for out in (pairs[0], tmp_path / ".." / tmp_path.name / "old.npy", tmp_path / "link.npy"):
        assert main([*command, f"--{output}", str(out)]) == 2
        assert f"--{output} {out} would replace --queries-old; choose another name" in capsys.readouterr().err
    assert pairs[0].read_bytes() == before


def test_a_small_penalty_may_be_written_as_people_write_it(pairs: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = map(str, pairs)
    for written in ("1e-3", "1E-3", "0.001", ".1e-2"):
        out = tmp_path / "a.safetensors"
        command = [
            "adapt",
            "--old",
            old,
            "--new",
            new,
            "--method",
            "Ridge",
            "--set",
            f"rho={written}",
            "--out",
            str(out),
        ]
        assert main(command) == 0 and Map.load(out).adapter.config()["rho"] == 0.001


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_ends_with_one_line(case: str, adapter: Path, tmp_path: Path, capsys) -> None:
    save_file({"x": X_NEW}, tmp_path / "plain.safetensors")
    save_file({"embeddings": X_NEW}, tmp_path / "bystander.safetensors")
    adapters.save(tmp_path / "bare.safetensors", Map.load(adapter).adapter)
    capsys.readouterr()
    make, words = BAD[case]
    assert main(make(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.startswith("compatbench: ") and error.count("\n") == 1 and words in error, error
    assert error.count("columns are constant") <= 1
    assert not list(tmp_path.glob(".*")), "a hidden file was left"
    assert Map.load(adapter) and open_vectors(tmp_path / "bystander.safetensors").take().tolist() == X_NEW.tolist()
    assert not (tmp_path / "a.safetensors").exists() and not (tmp_path / "out.npy").exists()


def test_how_many_pairs_are_needed_is_said(pairs: tuple[Path, Path]) -> None:
    assert adapters.KINDS["Ridge"].needed(NEW, OLD) == 13
    with pytest.raises(
        UserError, match=r"^12 pairs are too few: Ridge .* needs at least 13; .* \(12 of the 24 pairs are held out"
    ):
        fit(*pairs, ["Ridge"], pairs=24)
    assert fit(*pairs, ["Ridge"], pairs=25).ranked


def test_the_identity_between_equal_spaces_changes_nothing() -> None:
    same = adapters.fit("Identity", torch.eye(8), torch.eye(8))
    for side in ("query", "gallery"):
        judged = judge(same, X_OLD[:60], X_OLD[:60], side, "cosine")
        assert judged.fidelity == pytest.approx(1) and judged.overlap == 1
