"""Files of embeddings: every format, type and layout read alike; copies keep everything else and are whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from benchmark.errors import UserError
from benchmark.vectors import align, open_vectors
from benchmark.writer import Writer

ROOT = Path(__file__).parent.parent
N, D = 301, 5
X = np.random.default_rng(0).normal(size=(N, D)).astype(np.float16).astype(np.float32)  # exact in every type
TEXT = [f"item {i}" for i in range(N)]
SHOPS = [["a", "b", "c"][i % 3] for i in range(N)]


def parquet(path: Path, vector: pa.Array, **columns: object) -> Path:
    pq.write_table(pa.table({**columns, "vector": vector}), path, row_group_size=70)
    return path


def lists(kind: str, value: pa.DataType) -> pa.Array:
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()).cast(value), D)
    return pa.array(list(X), (pa.large_list if kind == "large" else pa.list_)(pa.float32())).cast(
        (pa.large_list if kind == "large" else pa.list_)(value)
    )


def numpy_file(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def tensors(path: Path, **arrays: np.ndarray) -> Path:
    save_file(arrays, path)
    return path


def bfloat(path: Path) -> Path:
    save_torch({"embeddings": torch.from_numpy(X).bfloat16(), "ids": torch.arange(N)}, path)
    return path


FILES = {
    "npy": lambda d: numpy_file(d / "x.npy", X),
    "npy float16": lambda d: numpy_file(d / "x.npy", X.astype(np.float16)),
    "npy float64": lambda d: numpy_file(d / "x.npy", X.astype(np.float64)),
    "npy of the other byte order": lambda d: numpy_file(d / "x.npy", X.astype(">f4")),
    "npy by columns": lambda d: numpy_file(d / "x.npy", np.asfortranarray(X)),
    "safetensors": lambda d: tensors(d / "x.safetensors", embeddings=X, ids=np.arange(N) * 3, flag=X[:, 0] > 0),
    "safetensors float16": lambda d: tensors(d / "x.safetensors", embeddings=X.astype(np.float16)),
    "safetensors of the engine": lambda d: tensors(d / "x.safetensors", **{"view/1/main": X, "labels": np.arange(N)}),
    "safetensors bfloat16": lambda d: bfloat(d / "x.safetensors"),
    "parquet, fixed lists": lambda d: parquet(d / "x.parquet", lists("fixed", pa.float32()), id=TEXT, shop=SHOPS),
    "parquet, lists": lambda d: parquet(d / "x.parquet", lists("plain", pa.float64()), shop=SHOPS, id=range(N)),
    "parquet, large lists": lambda d: parquet(d / "x.parquet", lists("large", pa.float32())),
    "parquet, float16": lambda d: parquet(d / "x.parquet", lists("fixed", pa.float16()), id=TEXT),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_format_is_read_in_chunks_from_any_row(kind: str, tmp_path: Path) -> None:
    vectors = open_vectors(FILES[kind](tmp_path))
    expected = torch.from_numpy(X).bfloat16().float().numpy() if "bfloat16" in kind else X
    assert (len(vectors), vectors.dim) == (N, D)
    for rows, start in ((N, 0), (100, 0), (64, 63), (7, 300)):
        chunks = list(vectors.chunks(rows, start))
        assert all(chunk.dtype == np.float32 and len(chunk) <= rows for chunk in chunks)
        np.testing.assert_array_equal(np.concatenate(chunks), expected[start:])
    rows = np.array([5, 300, 5, 0])
    np.testing.assert_array_equal(vectors.take(rows), expected[rows])
    np.testing.assert_array_equal(vectors.take(), expected)


@pytest.mark.parametrize("kind", FILES)
def test_a_copy_has_other_vectors_and_all_else_is_kept(kind: str, tmp_path: Path) -> None:
    vectors = open_vectors(FILES[kind](tmp_path))
    out = tmp_path / f"out{vectors.path.suffix}"
    with Writer(out, vectors, 3, "key") as writer:
        for chunk in vectors.chunks(64):
            writer.write(chunk[:, :3] * 2)
    copy = open_vectors(out)
    np.testing.assert_array_equal(copy.take(), vectors.take()[:, :3] * 2)
    assert copy.columns == vectors.columns and copy.dtype == vectors.dtype
    for name in vectors.columns:
        np.testing.assert_array_equal(copy.column(name), vectors.column(name))
    if vectors.ids is None:
        assert copy.ids is None
    else:
        np.testing.assert_array_equal(copy.ids, vectors.ids)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [vectors.path.name, out.name]
    )  # nothing left behind


def test_other_programs_can_read_the_copies(tmp_path: Path) -> None:
    for kind in ("npy", "safetensors", "parquet, fixed lists"):
        vectors = open_vectors(FILES[kind](tmp_path))
        with Writer(tmp_path / f"out{vectors.path.suffix}", vectors, D, "key") as writer:
            writer.write(X)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), X)
    loaded = load_file(tmp_path / "out.safetensors")
    np.testing.assert_array_equal(loaded["embeddings"], X)
    np.testing.assert_array_equal(loaded["flag"], X[:, 0] > 0)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.equals(pq.read_schema(tmp_path / "x.parquet"))
    assert table.column("id").to_pylist() == TEXT and table.column("shop").to_pylist() == SHOPS
    np.testing.assert_array_equal(np.stack(table.column("vector").to_numpy()), X)


def test_columns_are_integers_or_text(tmp_path: Path) -> None:
    values = {
        "whole": pa.array(np.arange(N, dtype=np.int16)),
        "nulls": pa.array([None, *range(1, N)]),
        "word": pa.array(SHOPS).dictionary_encode(),
        "yes": pa.array(X[:, 0] > 0),
    }
    vectors = open_vectors(parquet(tmp_path / "x.parquet", lists("fixed", pa.float32()), **values))
    assert vectors.column("whole").dtype.kind == "i" and vectors.column("nulls")[:2].tolist() == ["null", "1"]
    assert vectors.column("word").tolist() == SHOPS and set(vectors.column("yes")) == {"true", "false"}
    with pytest.raises(UserError, match=r"unknown column of .*x.parquet 'wrod'; did you mean: word"):
        vectors.column("wrod")


def test_a_column_of_long_texts_is_never_held(tmp_path: Path) -> None:
    columns = {
        "story": pa.array(["x" * 10**6, *SHOPS[1:]]),
        "shop": pa.array(SHOPS).dictionary_encode(),
        "lists": pa.array([[1]] * N),
        "whole": pa.array(range(N)),
        "gap": pa.array([None, *SHOPS[1:]]),
    }
    vectors = open_vectors(parquet(tmp_path / "x.parquet", lists("fixed", pa.float32()), **columns))
    tracemalloc.start()
    assert vectors.few("story", 50) is None and vectors.few("whole", 50) is None
    assert tracemalloc.get_traced_memory()[1] < 20e6  # as fixed-width text: 1.2 GB
    tracemalloc.stop()
    shops, gap = vectors.few("shop", 3), vectors.few("gap", 4)
    assert shops is not None and shops.tolist() == SHOPS and vectors.few("shop", 2) is None
    assert gap is not None and gap[0] == "null"
    with pytest.raises(UserError, match=r"'lists' of type .* holds no names"):
        vectors.few("lists", 50)
    with pytest.raises(UserError, match=r"the column 'story' holds a text of 1,000,000 characters, names have 1,000"):
        vectors.column("story")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
def test_other_tensors_are_copied_in_pieces(tmp_path: Path) -> None:
    path = tensors(tmp_path / "x.safetensors", embeddings=X, image=np.arange(40 * 10**6, dtype=np.int32))  # 160 MB
    vectors = open_vectors(path)

    def held(name: str) -> int:  # KiB
        return int(Path("/proc/self/status").read_text().split(name)[1].split()[0])

    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = held("VmRSS:")
    with Writer(tmp_path / "out.safetensors", vectors, D, "key") as writer:
        writer.write(X)
    assert held("VmHWM:") - before < 60_000
    np.testing.assert_array_equal(load_file(tmp_path / "out.safetensors")["image"][::999], np.arange(40 * 10**6)[::999])


# ------------------------------------------------------------------------------------------------------------- align


def identified(path: Path, ids: list) -> Path:
    return parquet(path, pa.array([[float(i), 1.0] for i in range(len(ids))]), id=ids)


def test_files_are_put_together_by_id_or_by_row(tmp_path: Path) -> None:
    a = open_vectors(identified(tmp_path / "a.parquet", ["d", "b", "a", "x"]))
    b = open_vectors(identified(tmp_path / "b.parquet", ["a", "y", "b", "d", "z"]))
    rows_a, rows_b, note = align(a, b)
    assert rows_a is not None and rows_b is not None
    assert a.ids[rows_a].tolist() == b.ids[rows_b].tolist() == ["d", "b", "a"]  # in a's order
    assert note == "3 pairs, put into order by id; left out: 1 rows only in a.parquet, 2 only in b.parquet"
    assert align(a, a) == (None, None, "4 pairs, ids equal")
    plain = open_vectors(numpy_file(tmp_path / "c.npy", X[:4]))
    assert align(a, plain)[:2] == (None, None)
    assert align(a, plain)[2] == "row i of a.parquet and of c.npy is taken for the same item (only a.parquet has ids)"
    assert align(plain, plain)[2].endswith("(no ids)")
    named = open_vectors(tensors(tmp_path / "f.safetensors", embeddings=X[:4], id=np.array([3, 1, 0, 9])))
    others = open_vectors(identified(tmp_path / "g.parquet", [0, 1, 3]))
    assert align(others, named)[0].tolist() == [0, 1, 2] and align(others, named)[1].tolist() == [2, 1, 0]
    assert named.columns == []


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    a = open_vectors(identified(tmp_path / "a.parquet", ["a", "b"]))
    other = open_vectors(identified(tmp_path / "b.parquet", ["c", "d"]))
    numbers = open_vectors(identified(tmp_path / "c.parquet", [1, 2]))
    longer = open_vectors(numpy_file(tmp_path / "d.npy", X[:3]))
    twice = open_vectors(identified(tmp_path / "e.parquet", ["a", "a"]))
    for pair, words in (
        ((a, other), "have no id in common"),
        ((a, numbers), "text on one side and integers on the other"),
        ((a, longer), "has 2 rows and .*d.npy has 3, and without ids"),
        ((twice, a), "ids must be unique, but a occurs more than once"),
    ):
        with pytest.raises(UserError, match=words):
            align(*pair)


# --------------------------------------------------------------------------------------------------------- bad input


def ragged(path: Path) -> Path:
    return parquet(path, pa.array([[1.0, 2.0], [3.0, 4.0], [5.0]]))


def pickled(path: Path) -> Path:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return path


def text(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-40])
    return path


def damaged(path: Path) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[:300] + b"\xff" * 2000 + data[2300:])
    return path


def archive(path: Path) -> Path:
    with path.open("wb") as file:
        np.savez(file, X)
    return path


BAD_FILES = {
    "missing": (lambda d: d / "no.npy", "no.npy: there is no such file"),
    "a pickle": (lambda d: text(d / "x.pt", b""), "x.pt: is none of .npy, .safetensors, .parquet; pickles"),
    "pickled objects": (lambda d: pickled(d / "x.npy"), "pickled objects, which are not opened"),
    "an archive": (lambda d: archive(d / "x.npy"), "x.npy: cannot be read: "),
    "empty npy": (lambda d: text(d / "x.npy", b""), "x.npy: cannot be read"),
    "empty safetensors": (lambda d: text(d / "x.safetensors", b""), "x.safetensors: cannot be read"),
    "empty parquet": (lambda d: text(d / "x.parquet", b""), "x.parquet: cannot be read"),
    "cut npy": (lambda d: cut(numpy_file(d / "x.npy", X)), "x.npy: cannot be read"),
    "cut safetensors": (lambda d: cut(FILES["safetensors"](d)), "x.safetensors: cannot be read"),
    "cut parquet": (lambda d: cut(FILES["parquet, lists"](d)), "x.parquet: cannot be read"),
    "integers": (lambda d: numpy_file(d / "x.npy", np.ones((3, 3), int)), "not int64 of shape (3, 3)"),
    "one dimension": (lambda d: numpy_file(d / "x.npy", X[0]), "not float32 of shape (5,)"),
    "no rows": (lambda d: numpy_file(d / "x.npy", X[:0]), "not float32 of shape (0, 5)"),
    "no embeddings": (lambda d: tensors(d / "x.safetensors", a=X), "has no tensor named 'embeddings', only a"),
    "ids too few": (
        lambda d: tensors(d / "x.safetensors", embeddings=X, ids=np.arange(3)), "'ids' must be 301 integers"),
    "no vector": (lambda d: parquet(d / "x.parquet", pa.array([1.0])), "must hold lists of floats, not double"),
    "another name": (
        lambda d: (pq.write_table(pa.table({"v": [[1.0]]}), d / "x.parquet"), d / "x.parquet")[1],
        "has no column 'vector', only v; rename yours"),
    "uneven rows": (lambda d: ragged(d / "x.parquet"), "row 2 has 1 dims, the first has 2"),
    "a row without vector": (
        lambda d: parquet(d / "x.parquet", pa.array([[1.0], None])), "row 1 has 0 dims, the first has 1"),
    "a null in a vector": (
        lambda d: parquet(d / "x.parquet", pa.array([[1.0, 2.0], [1.0, None]])), "the vector of row 1 has a null"),
    "a null id": (
        lambda d: parquet(d / "x.parquet", pa.array([[1.0], [2.0]]), id=pa.array(["a", None])), "row 1 has no id (null)"),
    "two columns of one name": (
        lambda d: (pq.write_table(pa.table([[1], [2], [[1.0]]], ["a", "a", "vector"]), d / "x.parquet"), d / "x.parquet")[1],
        "has more than one column 'a'; rename or drop all but one"),
    "damaged pages": (lambda d: damaged(FILES["parquet, lists"](d)), "x.parquet: cannot be read: "),
    "damaged ids": (lambda d: damaged(FILES["parquet, fixed lists"](d)), "x.parquet: cannot be read: "),
    "beyond float32": (lambda d: numpy_file(d / "x.npy", X.astype(np.float64) + 1e39), "row 0 holds NaN or infinity"),
    "NaN": (lambda d: numpy_file(d / "x.npy", np.where(np.arange(N)[:, None] == 7, np.nan, X)), "row 7 holds NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_cannot_be_used_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    make, words = BAD_FILES[case]
    with pytest.raises(UserError) as error:
        vectors = open_vectors(make(tmp_path))
        assert vectors.ids is None  # read here
        vectors.take()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_outputs_that_would_do_harm_are_refused(tmp_path: Path) -> None:
    vectors = open_vectors(FILES["npy"](tmp_path))
    with pytest.raises(UserError, match=r"the output has the input's format; name it out\.npy"):
        Writer(tmp_path / "out.parquet", vectors, D, "key")
    with pytest.raises(UserError, match="would replace its own input"):
        Writer(tmp_path / "x.npy", vectors, D, "key")
    with (
        pytest.raises(UserError, match=r"cannot write .*out\.npy"),
        Writer(tmp_path / "x.npy/out.npy", vectors, D, "key"),
    ):
        pass
    with Writer(tmp_path / "out.npy", vectors, D, "key") as writer:
        writer.write(X[:50])
        with (
            pytest.raises(UserError, match="another process is writing it"),
            Writer(tmp_path / "out.npy", vectors, D, "key"),
        ):
            pass
        writer.write(X[50:])
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), X)
    with pytest.raises(ValueError, match="0 of 301 rows"), Writer(tmp_path / "new.npy", vectors, D, "key"):
        pass
    assert not (tmp_path / "new.npy").exists()


# ------------------------------------------------------------------------------------------------------ interruption


SLOW = """
import sys, time
from pathlib import Path
from benchmark import writer
from benchmark.vectors import open_vectors

writer.NOTE = 0
vectors, out = open_vectors(sys.argv[1]), Path(sys.argv[2])
with writer.Writer(out, vectors, vectors.dim, sys.argv[3]) as target:
    print(target.done, flush=True)
    for chunk in vectors.chunks(10, target.done):
        target.write(chunk + 1)
        time.sleep(float(sys.argv[4]))
"""


def run_slowly(source: Path, out: Path, key: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, str(source), str(out), key, str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def kill_midway(source: Path, out: Path, key: str) -> None:
    process = run_slowly(source, out, key, 0.05)
    notes = out.with_name(f".{out.name}.progress.json")
    while process.poll() is None and not (notes.exists() and json.loads(notes.read_text())["rows"] >= 50):
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed: the test proves nothing"
    process.send_signal(signal.SIGKILL)
    process.wait()


def group_rows(path: Path) -> list[int]:
    metadata = pq.read_metadata(path)
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet, fixed lists", "parquet, lists"])
def test_killed_midway_the_old_output_stays_and_the_next_run_goes_on(kind: str, tmp_path: Path) -> None:
    source = FILES[kind](tmp_path)
    out = tmp_path / f"out{source.suffix}"
    with Writer(out, open_vectors(source), D, "older") as writer:
        writer.write(X)
    before = out.read_bytes()
    kill_midway(source, out, "key")
    assert out.read_bytes() == before
    finish = run_slowly(source, out, "key", 0)
    went_on_from = int(finish.communicate()[0])
    assert finish.returncode == 0 and 50 <= went_on_from < N
    np.testing.assert_array_equal(open_vectors(out).take(), X + 1)
    if "parquet" in kind:
        table, given = pq.read_table(out), pq.read_table(source)
        assert table.drop(["vector"]).equals(given.drop(["vector"])) and group_rows(out) == group_rows(source)
        last = given.column("id")[N - 1]
        assert ds.dataset(out).to_table(filter=ds.field("id") == last).num_rows == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, out.name])


@pytest.mark.parametrize("change", ["nothing", "partial cut", "partial damaged", "notes of no group", "another map"])
def test_parquet_goes_on_from_whole_parts_only(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmark.writer.NOTE", 0)
    source, out = FILES["parquet, lists"](tmp_path), tmp_path / "out.parquet"
    partial, notes = tmp_path / ".out.parquet.partial", tmp_path / ".out.parquet.progress.json"
    with pytest.raises(KeyboardInterrupt), Writer(out, open_vectors(source), D, "key") as writer:
        writer.write(X[:150])  # two groups of 70, and 10 rows that are lost
        raise KeyboardInterrupt
    with partial.open("ab") as file:
        file.write(b"half a group")
    if change == "partial cut":
        partial.write_bytes(partial.read_bytes()[:-60])
    elif change == "partial damaged":
        size = json.loads(notes.read_text())["parts"][-1]
        partial.write_bytes(partial.read_bytes()[: size - 200] + b"x" * 200)
    elif change == "notes of no group":
        notes.write_text(json.dumps({**json.loads(notes.read_text()), "rows": 139}))
    vectors = open_vectors(source)
    with Writer(out, vectors, D, "other" if change == "another map" else "key") as writer:
        assert writer.done == (140 if change == "nothing" else 0)
        for chunk in vectors.chunks(64, writer.done):
            writer.write(chunk)
    assert pq.read_table(out).drop(["vector"]).equals(pq.read_table(source).drop(["vector"]))
    np.testing.assert_array_equal(open_vectors(out).take(), X)
    assert group_rows(out) == [70, 70, 70, 70, 21] and len(list(tmp_path.iterdir())) == 2


def test_large_row_groups_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmark.parquet.GROUP", 4 * D * 50)
    source, out = parquet(tmp_path / "x.parquet", lists("plain", pa.float32())), tmp_path / "out.parquet"
    with Writer(out, open_vectors(source), D, "key") as writer:
        writer.write(X)
    assert group_rows(out)[:4] == [35, 35, 35, 35] and pq.read_table(out).equals(pq.read_table(source))


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet, lists"])
def test_what_is_refused_midway_leaves_nothing(kind: str, tmp_path: Path) -> None:
    vectors = open_vectors(FILES[kind](tmp_path))
    with (
        pytest.raises(UserError, match="bad row"),
        Writer(tmp_path / f"out{vectors.path.suffix}", vectors, D, "key") as writer,
    ):
        writer.write(X[:100])
        raise UserError("bad row")
    assert [path.name for path in tmp_path.iterdir()] == [vectors.path.name]


@pytest.mark.parametrize("change", ["another map", "another input", "input changed", "notes damaged", "partial cut"])
def test_what_was_begun_with_something_else_starts_again(change: str, tmp_path: Path) -> None:
    source, out = FILES["npy"](tmp_path), tmp_path / "out.npy"
    with pytest.raises(KeyboardInterrupt), Writer(out, open_vectors(source), D, "key") as writer:
        writer.write(X[:100])
        raise KeyboardInterrupt
    assert not out.exists()
    with Writer(out, open_vectors(source), D, "key") as writer:  # nothing changed: it would go on
        assert writer.done == 100
        writer.write(X[100:])
    with pytest.raises(KeyboardInterrupt), Writer(out, open_vectors(source), D, "key") as writer:
        writer.write(X[:100] * 0)
        raise KeyboardInterrupt
    key = "other" if change == "another map" else "key"
    if change == "another input":
        source = numpy_file(tmp_path / "y.npy", X)
    elif change == "input changed":
        os.utime(source, ns=(1, 1))
    elif change == "notes damaged":
        (tmp_path / ".out.npy.progress.json").write_text('{"rows": ')
    elif change == "partial cut":
        cut(tmp_path / ".out.npy.partial")
    with Writer(out, open_vectors(source), D, key) as writer:
        assert writer.done == 0
        writer.write(X + 2)
    np.testing.assert_array_equal(np.load(out), X + 2)
