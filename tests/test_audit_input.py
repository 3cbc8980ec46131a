"""What an audit makes of its input: labels, ids, slices, options; what it refuses, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from benchmark.__main__ import main
from benchmark.audit import Requirements, audit
from benchmark.errors import UserError
from tests.auditing import (
    G_LABELS,
    G_NEW,
    G_OLD,
    NG,
    NQ,
    OLD,
    Q_LABELS,
    Q_NEW,
    Q_OLD,
    four,
    index_of,
    npy,
    parquet,
)


def changed(array: np.ndarray, row: int, value: float) -> np.ndarray:
    array = array.copy()
    array[row] = value
    return array


def case(**change: Any):
    """Arguments of `audit` with some files or options changed."""

    def arguments(files: dict[str, Path], adapter: Path, folder: Path) -> tuple[list[Path], dict[str, Any]]:
        paths, options = dict(files), {"adapter": adapter}
        for name, value in change.items():
            made = value(folder) if callable(value) else value
            if name in paths and not name.endswith("l"):
                paths[name] = (
                    npy(folder, **{f"changed_{name}": made})[f"changed_{name}"]
                    if isinstance(made, np.ndarray)
                    else made
                )
            else:
                options[name] = made
        return four(paths), {k: v for k, v in options.items() if v is not None}

    return arguments


def faiss_file(factory: str, vectors: np.ndarray, normalised: bool = True):
    def make(folder: Path) -> Path:
        if normalised:
            return index_of(folder / "i.faiss", factory, vectors)
        index = faiss.index_factory(vectors.shape[1], factory)
        index.train(vectors)
        index.add(vectors)
        faiss.write_index(index, str(folder / "i.faiss"))
        return folder / "i.faiss"

    return make


def binary(folder: Path) -> Path:
    index = faiss.IndexBinaryFlat(64)
    index.add(np.zeros((NG, 8), np.uint8))
    faiss.write_index_binary(index, str(folder / "b.faiss"))
    return folder / "b.faiss"


def inner_products(folder: Path) -> Path:
    index = faiss.IndexFlatIP(OLD)
    index.add(G_OLD)
    faiss.write_index(index, str(folder / "p.faiss"))
    return folder / "p.faiss"


def manhattan(folder: Path) -> Path:
    index = faiss.IndexFlat(OLD, faiss.METRIC_L1)
    index.add(G_OLD)
    faiss.write_index(index, str(folder / "l1.faiss"))
    return folder / "l1.faiss"


def labels(folder: Path, array: np.ndarray) -> str:
    return str(npy(folder, labels=array)["labels"])


BAD = {
    "queries of the wrong model": (case(qn=Q_OLD), "has 8 dims; the adapter (query side) knows 12 for the new model"),
    "gallery of the wrong model": (case(go=G_NEW), "has 12 dims; the adapter (query side) knows 8 for the old model"),
    "unpaired queries": (case(qn=Q_NEW[:50]), "has 150 rows and"),
    "a sample without ids": (case(gn=G_NEW[:50]), "without ids in both nobody knows"),
    "a tiny gallery": (case(go=G_OLD[:10], gn=G_NEW[:10]), "10 gallery items are too few to judge by"),
    "a zero vector": (case(go=changed(G_OLD, 5, 0)), "changed_go.npy: row 5 is a zero vector"),
    "a NaN": (case(qo=changed(Q_OLD, 5, np.nan)), "changed_qo.npy: row 5 holds NaN"),
    "neither adapter nor pairs": (case(adapter=None), "give either a fitted --adapter, or --pairs-old and --pairs-new"),
    "labels of one side": (case(query_labels="ql.npy"), "give both --query-labels and --gallery-labels"),
    "labels too few": (
        case(query_labels=lambda d: labels(d, Q_LABELS[:5]), gallery_labels=lambda d: labels(d, G_LABELS)),
        "150 integers or texts are needed"),
    "labels that never meet": (
        case(query_labels=lambda d: str(npy(d, a=Q_LABELS + 99)["a"]), gallery_labels=lambda d: labels(d, G_LABELS)),
        "no query has a gallery item of its label"),
    "text and integers": (
        case(query_labels=lambda d: str(npy(d, a=Q_LABELS.astype(str))["a"]), gallery_labels=lambda d: labels(d, G_LABELS)),
        "text on one side and integers on the other"),
    "no such labels": (case(query_labels="label", gallery_labels="label"), "unknown file (.npy, .safetensors) or column"),
    "a smaller service": (case(gallery_size=10), "--gallery-size 10 is less than the 400 rows"),
    "no share": (case(accept=1.5), "--accept 1.5 is no share"),
    "a share of nothing": (case(dual=(1e-12,)), "--dual 1e-12 is less than one of the 400 gallery items"),
    "one share twice": (case(dual=(0.5, 0.50001)), "two of these are the same share"),
    "no rate": (case(encoder_rate=0.0), "--encoder-rate 0 must be above 0"),
    "a rate of NaN": (case(encoder_rate=np.nan), "--encoder-rate nan must be above 0"),
    "no gallery in service": (case(gallery_size=0), "--gallery-size 0 is less than the 400 rows"),
    "a negative seed": (case(seed=-1), "--seed -1 must be at least 0"),
    "no cosine": (case(score=3.0), "--threshold 3 is no cosine"),
    "two thresholds": (case(score=0.8, accept=0.9), "leave out --accept and --far"),
    "a FAR without labels": (case(far=0.01), "--far needs labels"),
    "a share of labelled": (
        case(accept=0.9, query_labels=lambda d: labels(d, Q_LABELS), gallery_labels=lambda d: labels(d, G_LABELS)),
        "--accept is for an audit without labels"),
    "a side of a fitted adapter": (case(side="query"), "query.safetensors is fitted and says its own; leave it out"),
    "a method of a fitted adapter": (case(methods=["Ridge"]), "--method is for fitting to pairs"),
    "a setting of no index": (case(settings="nprobe=4"), "--search is a setting of the index; give --index too"),
    "labels all alike": (
        case(query_labels=lambda d: labels(d, 0 * Q_LABELS), gallery_labels=lambda d: str(npy(d, g=0 * G_LABELS)["g"])),
        "all queries and gallery items have the same label"),
    "an index of another metric": (case(index=manhattan), "searches neither by inner product nor by L2"),
    "no list searched": (
        case(index=faiss_file("IVF8,Flat", G_OLD), settings="nprobe=0"), "--search nprobe=0: must be a whole number of at"),
    "lists of NaN": (case(index=faiss_file("IVF8,Flat", G_OLD), settings="nprobe=nan"), "must be a whole number"),
    "a negative setting": (case(index=faiss_file("HNSW8", G_OLD), settings="efSearch=-5"), "must be a whole number"),
    "a setting without value": (case(index=faiss_file("HNSW8", G_OLD), settings="efSearch"), "--search takes NAME=VALUE"),
    "no index": (case(index=Path("none.faiss")), "none.faiss: there is no such file"),
    "no index inside": (case(index=lambda d: Path(labels(d, Q_LABELS))), "is no faiss index of float vectors"),
    "a binary index": (case(index=binary), "b.faiss: is no faiss index of float vectors"),
    "an index of other dims": (case(index=faiss_file("Flat", G_NEW)), "the index has 12 dims, the vectors to be searched have 8"),
    "an index of fewer": (case(index=faiss_file("Flat", G_OLD[:99])), "the index holds 99 vectors, the gallery 400; rebuild it"),
    "an index in another order": (case(index=faiss_file("Flat", G_OLD[::-1])), "holds other vectors than the gallery (row"),
    "an index of raw vectors": (
        case(index=faiss_file("Flat", G_OLD, False)),
        "not put to unit length, so it does not search by cosine"),
    "an index that gives nothing back": (case(index=faiss_file("LSH", G_OLD)), "LSH cannot give back its vectors"),
    "an index of inner products": (
        case(adapter=None, pairs=lambda d: (d / "po.npy", d / "pn.npy"), similarity="l2", index=inner_products),
        "searches by inner product, not by L2"),
    "a setting of another index": (
        case(index=faiss_file("Flat", G_OLD), settings="nprobe=3"),
        "--search 'nprobe=3' is no setting of Flat"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_judged_ends_with_one_line(
    name: str, files: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    make, words = BAD[name]
    paths, options = make(files, adapter, tmp_path)
    with pytest.raises(UserError) as error:
        audit(*paths, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"overlap": 80}, {"slice": -1}, {"margin": np.nan}])
def test_a_requirement_is_a_share(change: dict[str, float]) -> None:
    with pytest.raises(UserError, match="is no share; give one from 0 to 1"):
        Requirements(**change)


@pytest.mark.parametrize(
    "words,said",
    [
        (["--gallery-size", "1e9"], "--gallery-size takes an integer"),
        (["--margin", "nan"], "--margin takes a number, not 'nan'"),
        (["--far", "abc"], "--far takes a number, not 'abc'"),
        (["--dual", "0.1", "x"], "--dual takes a number, not 'x'"),
        (["--side", "up"], "argument --side: invalid choice: 'up'"),
        ([], "missing: --queries-old, --queries-new, --gallery-old; see --help"),
    ],
)
def test_a_slip_in_the_options_is_one_line_that_names_the_option(words: list[str], said: str, capsys) -> None:
    needed = [word for name in ("queries-old", "queries-new", "gallery-old") for word in (f"--{name}", "x.npy")]
    assert main(["audit", *(needed if words else []), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------- ids


def numbered(folder: Path, name: str, old: np.ndarray, new: np.ndarray, ids: Any, **columns: Any) -> list[Path]:
    return [parquet(folder / f"{name}{model}.parquet", x, ids, **columns) for model, x in (("o", old), ("n", new))]


def test_ids_that_coincide_by_chance_remove_nothing(files: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    """Queries and gallery are numbered from 0 each; the first 10 queries are gallery items indeed."""
    queries_old, queries_new = Q_OLD.copy(), Q_NEW.copy()
    queries_old[:10], queries_new[:10] = G_OLD[:10], G_NEW[:10]
    gallery = numbered(tmp_path, "g", G_OLD, G_NEW, np.arange(NG))
    counted = audit(*numbered(tmp_path, "q", queries_old, queries_new, np.arange(NQ)), *gallery, adapter=adapter)
    assert any(note.startswith("10 queries are gallery items themselves") for note in counted["notes"])
    assert any(note.startswith("140 queries have the id of a gallery item with another") for note in counted["notes"])
    known = np.where(np.arange(NQ) < 10, np.arange(NQ), np.arange(NQ) + 10**6)
    apart = audit(*numbered(tmp_path, "q", queries_old, queries_new, known), *gallery, adapter=adapter)
    assert counted["overlap"] == apart["overlap"] and counted["threshold"] == apart["threshold"]
    none = audit(*numbered(tmp_path, "q", queries_old, queries_new, known + 10**7), *gallery, adapter=adapter)
    assert none["threshold"]["accepted"] != apart["threshold"]["accepted"]  # there ten find themselves
    half = numbered(tmp_path, "h", queries_old.astype(np.float16), queries_new, np.arange(NQ))
    rounded = audit(*half, *gallery, adapter=adapter)
    assert any(note.startswith("10 queries are gallery items themselves") for note in rounded["notes"])


def test_a_label_file_belongs_to_the_old_queries_and_a_column_to_its_file(
    files: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    order, ids = np.random.default_rng(3).permutation(NQ), np.arange(NQ) + 10**6
    old = parquet(tmp_path / "qo.parquet", Q_OLD, ids)
    gallery = {"adapter": adapter, "gallery_labels": str(files["gl"])}
    expected = audit(*four(files), query_labels=str(files["ql"]), **gallery)["labelled"]["recall"]
    for kept in (order, order[:100]):  # another order, and fewer
        new = parquet(tmp_path / "qn.parquet", Q_NEW[kept], ids[kept], kind=Q_LABELS[kept])
        by_file = audit(old, new, files["go"], files["gn"], query_labels=str(files["ql"]), **gallery)["labelled"]
        by_column = audit(old, new, files["go"], files["gn"], query_labels="kind", **gallery)["labelled"]
        assert by_file["recall"] == by_column["recall"] and by_file["queries"] == len(kept)
        if len(kept) == NQ:
            assert by_file["recall"]["adapter"]["1"]["value"] == expected["adapter"]["1"]["value"]
    with pytest.raises(UserError, match=r"150 integers or texts are needed, one for each row of .*qo\.parquet"):
        wrong = str(npy(tmp_path, few=Q_LABELS[order[:100]])["few"])
        audit(old, new, files["go"], files["gn"], query_labels=wrong, **gallery)


def test_labels_are_judged_in_the_whole_gallery_even_if_the_sample_has_no_right_item(
    files: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    own_kind = np.arange(NG)  # every query has one right item, and none of these is in the sample
    right = np.random.default_rng(5).permutation(NG)[:NQ]
    rest = np.setdiff1d(np.arange(NG), right)
    gallery = parquet(tmp_path / "go.parquet", G_OLD, np.arange(NG))
    sample = parquet(tmp_path / "gn.parquet", G_NEW[rest], rest)
    report = audit(
        files["qo"], files["qn"], gallery, sample, adapter=adapter,
        query_labels=str(npy(tmp_path, r=right)["r"]), gallery_labels=str(npy(tmp_path, k=own_kind)["k"]),
    )  # fmt: skip
    assert report["labelled"]["queries"] == NQ and report["labelled"]["gallery"] == NG
    assert report["threshold"]["tar"]["full re-embedding"] is None  # no pair of it is in the sample
    assert "full re-embedding" in report["labelled"]["left out"]
    nobody = str(npy(tmp_path, n=np.where(np.arange(NG) == 0, NG, own_kind))["n"])
    itself = parquet(tmp_path / "qo.parquet", G_OLD[:60], np.arange(60), kind=[0] * 60)
    again = parquet(tmp_path / "qn.parquet", G_NEW[:60], np.arange(60))
    alone = str(npy(tmp_path, one=np.where(np.arange(NG) == 0, 0, 7))["one"])
    kinds = str(npy(tmp_path, z=np.where(np.arange(60) == 0, 0, 5))["z"])
    with pytest.raises(UserError, match="no query has a gallery item of its label other than itself"):
        audit(itself, again, gallery, files["gn"], adapter=adapter, query_labels=kinds, gallery_labels=alone)
    with pytest.raises(UserError, match="no query has a gallery item of its label: do both"):
        audit(itself, again, gallery, files["gn"], adapter=adapter, query_labels="kind", gallery_labels=nobody)


# ------------------------------------------------------------------------------------------------------------ slices


def sliced(files: dict[str, Path], adapter: Path, folder: Path, *names: str, **columns: Any) -> dict[str, Any]:
    queries = parquet(folder / "sliced.parquet", Q_OLD, **columns)
    return audit(
        queries, files["qn"], files["go"], files["gn"], adapter=adapter, slices=names or None,
        require=Requirements(0, 0, 1),
    )  # fmt: skip


def test_a_slice_that_was_asked_for_and_cannot_be_judged_is_no_go(
    files: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    few = [f"shop {i % 15}" for i in range(NQ)]
    report = sliced(files, adapter, tmp_path, "few", few=few)
    assert report["verdict"] == "NO-GO" and report["missing"] == ["slice few: none of its 15 groups has 20 queries"]
    assert len(report["slices"]["too small"]) == 15 and report["slices"]["too small"][0]["n"] == 10
    unasked = sliced(files, adapter, tmp_path, few=few)
    assert unasked["missing"] == [] and len(unasked["slices"]["too small"]) == 15


def test_numbers_that_were_asked_for_are_cut_into_quarters(
    files: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    price = np.random.default_rng(6).permutation(NQ) + 0.5
    count = np.arange(NQ)
    report = sliced(files, adapter, tmp_path, "price", "count", price=price, count=count)
    rows = {(row["column"], row["value"]): row["overlap"]["n"] for row in report["slices"]["judged"]}
    ranges = {"(quarter 1)": (0, 37), "(quarter 2)": (38, 74), "(quarter 3)": (75, 111), "(quarter 4)": (112, 149)}
    expected = {
        (column, f"{low + more:g} to {high + more:g} {name}"): high - low + 1
        for column, more in (("price", 0.5), ("count", 0))
        for name, (low, high) in ranges.items()
    }
    assert rows == expected and report["missing"] == []
    assert (
        sliced(files, adapter, tmp_path, price=price)["slices"]["judged"] == []
    )  # of what was not asked for: names only
