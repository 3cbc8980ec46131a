"""An audit through a faiss index: what the index loses is told apart from the adapter's loss, and the index is left as it is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import faiss
import numpy as np
import pytest
from faiss.contrib.ondisk import merge_ondisk

from benchmark import adapters
from benchmark.adapt import fit
from benchmark.audit import audit
from benchmark.audit.faiss_index import Index
from benchmark.errors import UserError
from tests.auditing import (
    G_LABELS,
    G_NEW,
    G_OLD,
    NG,
    OLD,
    Q_LABELS,
    Q_NEW,
    Q_OLD,
    four,
    index_of,
    mapped,
    nearest,
    parquet,
    shared,
    unit,
)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF8,PQ4x4", "HNSW8"])
def test_the_loss_is_split_into_adapter_and_index(
    factory: str, files: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    path = index_of(tmp_path / "i.faiss", factory, G_OLD)
    report = audit(*four(files), adapter=adapter, index=path)
    index, full = faiss.read_index(str(path)), nearest(Q_NEW, G_NEW, 10)
    q_adapted, q_old = (unit(x).astype(np.float32) for x in (mapped(adapter, Q_NEW), Q_OLD))
    exact = nearest(q_adapted, G_OLD, 10)
    got = index.search(q_adapted, 10)[1].tolist()
    ways, loss = report["overlap"]["ways"], report["overlap"]["loss"]
    assert ways["adapter and index"]["10"]["value"] == pytest.approx(shared(got, full, 10).mean(), abs=2e-3)
    assert loss["index"]["10"]["value"] == pytest.approx(
        shared(exact, full, 10).mean() - shared(got, full, 10).mean(), abs=3e-3
    )
    recall = report["index"]["recall"]
    assert recall["adapted queries"]["10"]["value"] == pytest.approx(shared(got, exact, 10).mean(), abs=2e-3)
    old = shared(index.search(q_old, 10)[1].tolist(), nearest(Q_OLD, G_OLD, 10), 10).mean()
    assert recall["old queries"]["10"]["value"] == pytest.approx(old, abs=2e-3)
    if factory == "Flat":
        assert loss["index"]["10"]["value"] == 0 and recall["old queries"]["100"]["value"] == 1
    if "IVF" in factory:
        assert loss["index"]["10"]["value"] > 0.02  # one of eight lists is searched
        wide = audit(*four(files), adapter=adapter, index=path, settings="nprobe=8")["index"]
        assert wide["settings"] == "nprobe=8 of 8" and report["index"]["settings"] == "nprobe=1 of 8"
        assert wide["recall"]["old queries"]["10"]["value"] > recall["old queries"]["10"]["value"]
    again, times = report["writing again"], report["latency"]["ms"]
    assert again["to the index, seconds"] > 0 and again["to a file, seconds"] > 0 and again["vectors"] == NG
    assert set(times) == {"adapter", "old model only", "two indexes"}
    assert all(time["p99"] >= time["p50"] > 0 for time in times.values())


def test_an_index_may_know_the_gallery_by_its_ids(files: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(8).permutation(10**6)[:NG]
    gallery, again = (parquet(tmp_path / f"{n}.parquet", x, ids) for n, x in (("go", G_OLD), ("gn", G_NEW)))
    for factory in ("IDMap,Flat", "IDMap2,HNSW32", "IVF8,Flat"):
        path = index_of(tmp_path / "i.faiss", factory, G_OLD, ids, **({"nprobe": 8} if "IVF" in factory else {}))
        report = audit(files["qo"], files["qn"], gallery, again, adapter=adapter, index=path)
        assert report["index"]["recall"]["adapted queries"]["10"]["value"] > 0.97, factory


def test_on_the_gallery_side_the_index_is_over_what_was_adapted(files: dict[str, Path], tmp_path: Path) -> None:
    (best,) = fit(files["po"], files["pn"], ["Ridge"], side="gallery").ranked
    adapters.save(tmp_path / "g.safetensors", best.adapter, best.notes)
    moved = mapped(tmp_path / "g.safetensors", G_OLD)
    index = index_of(tmp_path / "i.faiss", "IVF8,Flat", moved, nprobe=2)
    report = audit(*four(files), adapter=tmp_path / "g.safetensors", index=index)
    full, exact = nearest(Q_NEW, G_NEW, 10), nearest(Q_NEW, moved, 10)
    got = faiss.read_index(str(index)).search(unit(Q_NEW).astype(np.float32), 10)[1].tolist()
    ways = report["overlap"]["ways"]
    assert ways["adapter"]["10"]["value"] == pytest.approx(shared(exact, full, 10).mean(), abs=2e-3)
    assert ways["adapter and index"]["10"]["value"] == pytest.approx(shared(got, full, 10).mean(), abs=2e-3)
    assert set(report["index"]["recall"]) == {"new queries"} and set(report["latency"]["ms"]) == {"adapter"}
    assert report["costs"]["adapter"]["vectors written"] == NG and report["costs"]["adapter"]["seconds"] > 0
    with pytest.raises(
        UserError, match=r"8 dims, the vectors to be searched have 12; .* on the gallery side over the adapted"
    ):
        audit(*four(files), adapter=tmp_path / "g.safetensors", index=index_of(tmp_path / "o.faiss", "Flat", G_OLD))


def test_an_index_over_more_than_the_sample_bounds_the_loss_of_both(
    files: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    ids, some = np.arange(NG), np.random.default_rng(9).permutation(NG)[:200]
    gallery = parquet(tmp_path / "go.parquet", G_OLD, ids)
    sample = parquet(tmp_path / "gn.parquet", G_NEW[some], ids[some])
    path = index_of(tmp_path / "i.faiss", "IVF8,Flat", G_OLD, nprobe=2)
    report = audit(files["qo"], files["qn"], gallery, sample, adapter=adapter, index=path)
    recall = report["index"]["recall"]["adapted queries"]["10"]["value"]
    seen = report["overlap"]["ways"]["adapter"]["10"]["value"]
    rows = np.sort(some)
    expected = shared(nearest(mapped(adapter, Q_NEW), G_OLD[rows], 10), nearest(Q_NEW, G_NEW[rows], 10), 10).mean()
    assert seen == pytest.approx(expected, abs=2e-3) and "adapter and index" not in report["costs"]
    chain = next(c for c in report["checks"] if c["what"].endswith("through the index (at least)"))
    assert chain["found"]["value"] == pytest.approx(seen + recall - 1)
    assert report["sizes"]["judged sample"] == 200


def test_the_index_and_its_lists_on_disk_stay_as_they_are(
    files: dict[str, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """faiss opens lists on disk for writing, if it is not told otherwise, and empties them with the index."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.chdir(folder)
    x = unit(G_OLD).astype(np.float32)
    index = faiss.index_factory(OLD, "IVF8,Flat")
    index.cp.min_points_per_centroid = 1
    index.train(x)
    faiss.write_index(index, "trained.faiss")
    index.add(x)
    faiss.write_index(index, "block.faiss")
    merged = faiss.read_index("trained.faiss")
    merge_ondisk(merged, ["block.faiss"], "lists.ivfdata")
    merged.nprobe = 8
    faiss.write_index(merged, "ondisk.faiss")
    del merged

    def content() -> dict[str, tuple[str, int]]:
        return {p.name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in folder.iterdir()}

    before = content()
    for path in (Path("lists.ivfdata"), Path("ondisk.faiss")):
        path.chmod(0o444)
    opened = Index(Path("ondisk.faiss"), x, lambda rows: G_OLD[rows], None, "cosine", None)
    assert faiss.downcast_InvertedLists(opened.layers[-1].invlists).read_only
    report = audit(*four(files), adapter=adapter, index=Path("ondisk.faiss"))
    assert report["index"]["recall"]["old queries"]["10"]["value"] == 1
    assert report["writing again"]["to the index, seconds"] > 0 and content() == before
    monkeypatch.chdir(tmp_path)  # the lists lie beside the index, not where the command is called
    assert audit(*four(files), adapter=adapter, index=folder / "ondisk.faiss")["index"]["kind"] == "IVFFlat"
    assert content() == before


@pytest.mark.parametrize(
    "factory", ["Flat", "IVF8,Flat", "HNSW8", "IDMap,IVF8,Flat", "OPQ4,IVF8,PQ4x4", "IVF8,PQ4x4,RFlat"]
)
def test_timing_a_rebuild_leaves_the_open_index_as_it_is(factory: str, tmp_path: Path) -> None:
    x = unit(G_OLD).astype(np.float32)
    path = index_of(tmp_path / "i.faiss", factory, G_OLD, np.arange(NG) if "IDMap" in factory else None)
    index = Index(path, x, lambda rows: G_OLD[rows], None, "cosine", None)
    before = index.search(x, 10)
    built = index.rebuild(x)
    assert built.seconds > 0 and not built.extrapolated and built.superlinear == ("HNSW" in factory)
    assert index.index.ntotal == NG and np.array_equal(index.search(x, 10), before)


def test_a_rebuild_of_a_graph_is_extrapolated_to_a_least(
    files: dict[str, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmark.audit.faiss_index.AGAIN", 100)
    for factory, least in (("HNSW8", True), ("IVF8,Flat", False)):
        path = index_of(tmp_path / "i.faiss", factory, G_OLD)
        assert audit(*four(files), adapter=adapter, index=path)["writing again"]["at least"] == least


@pytest.mark.parametrize(
    "factory,kind,settings",
    [
        ("OPQ4,IVF8,PQ4x4", "PreTransform around IVFPQ", "nprobe=1 of 8"),
        ("IVF8,PQ4x4,RFlat", "RefineFlat around IVFPQ", "k_factor=1, nprobe=1 of 8"),
    ],
)
def test_what_stands_around_an_index_is_seen_through(
    factory: str, kind: str, settings: str, files: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    path = index_of(tmp_path / "i.faiss", factory, G_OLD)
    report = audit(*four(files), adapter=adapter, index=path)
    assert (report["index"]["kind"], report["index"]["settings"]) == (kind, settings)
    got = faiss.read_index(str(path)).search(unit(Q_OLD).astype(np.float32), 10)[1].tolist()
    expected = shared(got, nearest(Q_OLD, G_OLD, 10), 10).mean()
    assert report["index"]["recall"]["old queries"]["10"]["value"] == pytest.approx(expected, abs=2e-3)
    other = index_of(tmp_path / "o.faiss", factory, G_OLD[::-1])
    with pytest.raises(UserError, match="holds other vectors than the gallery"):
        audit(*four(files), adapter=adapter, index=other)
    wide = audit(*four(files), adapter=adapter, index=path, settings="nprobe=8")["index"]
    assert "nprobe=8 of 8" in wide["settings"]


@pytest.mark.parametrize("factory", ["IVF8,PQ4x4fs", "PQ4x4fs", "IVF8,PQ4x4fs,RFlat"])
def test_kinds_that_crash_when_asked_for_a_vector_are_not_asked(
    factory: str, files: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    path = index_of(tmp_path / "i.faiss", factory, G_OLD)
    with pytest.raises(UserError, match="FastScan cannot give back its vectors"):
        audit(*four(files), adapter=adapter, index=path)


def test_no_loss_of_the_index_is_booked_to_the_adapter(files: dict[str, Path], tmp_path: Path) -> None:
    """An adapter that changes nothing, through an index that finds little: no gain, no loss, no flip."""
    same = adapters.fit("Identity", *[np_tensor(np.eye(OLD))] * 2)
    adapters.save(tmp_path / "same.safetensors", same, {"side": "query", "similarity": "cosine"})
    path = index_of(tmp_path / "i.faiss", "IVF32,PQ2x4", G_OLD)
    labels = {"query_labels": str(files["ql"]), "gallery_labels": str(files["gl"])}
    both = [files["qo"], files["qo"], files["go"], files["go"]]
    report = audit(*both, adapter=tmp_path / "same.safetensors", index=path, **labels)
    checks = {check["what"]: check["found"]["value"] for check in report["checks"]}
    assert checks["recall@1: adapter less old model, both through the index"] == 0
    assert checks["negative flips, both through the index"] == 0
    recall = report["labelled"]["recall"]
    assert recall["old model and index"]["1"]["value"] < recall["old model only"]["1"]["value"]
    got = faiss.read_index(str(path)).search(unit(Q_OLD).astype(np.float32), 1)[1][:, 0]
    assert recall["old model and index"]["1"]["value"] == pytest.approx((G_LABELS[got] == Q_LABELS).mean())


def np_tensor(x: np.ndarray):
    import torch

    return torch.from_numpy(x.astype(np.float32))
