"""Files of embeddings, read and written in chunks, so that they may be larger than memory: .npy, .safetensors, Parquet.

- .npy: one (N, D) matrix of floats; no ids. Nothing is ever unpickled.
- .safetensors: tensor "embeddings" (N, D), or the only "view/<release>/main"; optional "ids" or "id" (N,) integers; other
  tensors of N rows are its columns.
- .parquet: a column "vector" (fixed-size or plain list of floats), optional "id" or "ids" (integers or text), any other
  columns (`benchmark.parquet`).

Chunks are float32 and finite. A `Writer` copies a file with other vectors in place of its own, everything else kept.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from benchmark.errors import UserError, unknown

Array = NDArray[np.float32]
CHUNK = 2**20  # numbers in a chunk: 4 MiB in float32
TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2", "I8": "i1", "U8": "u1", "BOOL": "?"} | {
    f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (2, 4, 8)
}  # of safetensors


class Vectors:
    """N embeddings of D dims in a file; opening reads its header only."""

    dtype: np.dtype = np.dtype(np.float32)  # of what is stored, as far as a copy keeps it: float16 or float32
    random_access = True  # `take` reads no more than the rows asked for
    id_name: str | None = None  # of the column with ids

    def __init__(self, path: Path):
        self.path = path
        self.rows = self.dim = 0

    def __len__(self) -> int:
        return self.rows

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def ids(self) -> NDArray | None:
        """(N,) unique integers or text, or None."""
        ids = self._ids()
        if ids is not None:
            values, counts = np.unique(ids, return_counts=True)
            if len(values) < len(ids):
                raise UserError(f"{self}: ids must be unique, but {values[counts > 1][0]} occurs more than once")
        return ids

    def _ids(self) -> NDArray | None:
        return None

    @property
    def columns(self) -> list[str]:
        """Names of what else the file holds, one value a row."""
        return []

    def column(self, name: str) -> NDArray:
        """(N,) integers or, of any other type, text."""
        if name not in self.columns:
            raise (
                unknown(f"column of {self}", name, self.columns)
                if self.columns
                else UserError(
                    f"{self}: has no column '{name}', for it holds nothing but embeddings; Parquet files hold columns"
                )
            )
        return self._column(name)

    def few(self, name: str, most: int) -> NDArray | None:
        """The column if it has at most so many values, all of them short; else None, without holding it in memory."""
        values = self._column(name)
        return values if len(np.unique(values)) <= most else None

    def _column(self, name: str) -> NDArray:
        raise NotImplementedError

    def chunks(self, rows: int | None = None, start: int = 0) -> Iterator[Array]:
        """(n, D) float32 from row `start` on, `rows` at a time (the last one fewer), all finite."""
        for chunk in self._chunks(rows or max(1, CHUNK // self.dim), start):
            yield self._finite(chunk, start)
            start += len(chunk)

    def _chunks(self, rows: int, start: int) -> Iterator[Array]:
        raise NotImplementedError

    def take(self, rows: NDArray[np.int64] | None = None) -> Array:
        """(n, D) float32 of the rows asked for (default: all), in that order; finite."""
        if rows is None:
            rows = np.arange(len(self))
        out = np.empty((len(rows), self.dim), np.float32)
        order = np.argsort(rows, kind="stable")
        ordered, at = rows[order], 0
        for chunk in self.chunks():
            first, last = np.searchsorted(ordered, [at, at + len(chunk)])
            out[order[first:last]] = chunk[ordered[first:last] - at]
            at += len(chunk)
        return out

    def _finite(self, chunk: Array, rows: int | NDArray[np.int64]) -> Array:
        """The chunk of rows from `rows` on, or of those very rows."""
        finite = np.isfinite(chunk).all(1)
        if not finite.all():
            at = int(finite.argmin())
            row = rows + at if isinstance(rows, int) else rows[at]
            raise UserError(f"{self}: row {row} holds NaN or infinity; remove such rows or embed them again")
        return chunk


class Raw(Vectors):
    """One block of numbers at an offset; mapped anew for every chunk, so that no page stays resident."""

    offset: int
    stored: np.dtype  # as in the file; bfloat16 is read as <u2

    def _set(self, shape: tuple[int, ...], stored: np.dtype, offset: int, floats: bool) -> None:
        if len(shape) != 2 or not floats or not math.prod(shape):
            raise UserError(
                f"{self}: embeddings are a non-empty (N, D) matrix of floats, not {stored} of shape {shape}"
            )
        (self.rows, self.dim), self.stored, self.offset = shape, stored, offset
        if stored == np.float16:
            self.dtype = np.dtype(np.float16)

    def _map(self) -> NDArray:
        return np.memmap(self.path, self.stored, "r", self.offset, (self.rows, self.dim))

    def _chunks(self, rows: int, start: int) -> Iterator[Array]:
        for at in range(start, len(self), rows):
            yield self._floats(self._map()[at : at + rows])

    def take(self, rows: NDArray[np.int64] | None = None) -> Array:
        return super().take() if rows is None else self._finite(self._floats(self._map()[rows]), rows)

    def _floats(self, part: NDArray) -> Array:
        if self.stored.kind == "u":  # bfloat16: the upper half of a float32
            return (part.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # refused as infinity, in a line of our own
            return part.astype(np.float32)


class Npy(Raw):
    def __init__(self, path: Path):
        super().__init__(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap):
            raise ValueError("it is an .npz archive")
        self.fortran = array.flags.f_contiguous and not array.flags.c_contiguous
        self._set(array.shape, array.dtype, array.offset, array.dtype.kind == "f")

    def _map(self) -> NDArray:
        order: Any = "F" if self.fortran else "C"
        return np.memmap(self.path, self.stored, "r", self.offset, (self.rows, self.dim), order)


class Safetensors(Raw):
    def __init__(self, path: Path):
        super().__init__(path)
        with safe_open(path, "np") as file:  # refuses damaged headers and lengths
            names = list(file.keys())
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            self.header: dict[str, Any] = json.loads(raw.read(length))
        self.metadata = self.header.pop("__metadata__", None)
        self.start = 8 + length
        views = [name for name in names if re.fullmatch(r"view/\d+/main", name)]  # as the engine keeps embeddings
        self.name = "embeddings" if "embeddings" in names or len(views) != 1 else views[0]
        if self.name not in names:
            raise UserError(f"{path}: has no tensor named 'embeddings', only {', '.join(names) or 'nothing'}")
        self.id_name = next((name for name in ("ids", "id") if name in names), None)
        entry = self.header[self.name]
        floats = entry["dtype"] in ("F16", "BF16", "F32", "F64")
        self._set(tuple(entry["shape"]), self._type(entry), self.start + entry["data_offsets"][0], floats)

    def _type(self, entry: dict[str, Any]) -> np.dtype:
        if entry["dtype"] not in TYPES:
            raise UserError(f"{self}: tensors of type {entry['dtype']} cannot be read; write floats, integers or bools")
        return np.dtype(TYPES[entry["dtype"]])

    @property
    def columns(self) -> list[str]:
        known = (self.name, self.id_name)
        return [name for name, entry in self.header.items() if name not in known and entry["shape"] == [len(self)]]

    def _column(self, name: str) -> NDArray:
        entry = self.header[name]
        values = np.fromfile(self.path, self._type(entry), len(self), offset=self.start + entry["data_offsets"][0])
        return values if entry["dtype"][0] in "IU" else values.astype(str)

    def _ids(self) -> NDArray | None:
        if self.id_name is None:
            return None
        entry = self.header[self.id_name]
        if entry["shape"] != [len(self)] or entry["dtype"][0] not in "IU":
            raise UserError(f"{self}: '{self.id_name}' must be {len(self)} integers, one a row")
        return self._column(self.id_name).astype(np.int64)


SUFFIXES = (".npy", ".safetensors", ".parquet")


def open_vectors(path: str | Path) -> Vectors:
    """The file at `path`, by its suffix.

    Raises UserError: one line that names the file: missing, unreadable, of another format, without embeddings.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: is none of {', '.join(SUFFIXES)}; pickles (.pt, .pkl) are not opened")
    try:
        if path.suffix == ".parquet":
            from benchmark.parquet import Parquet

            return Parquet(path)
        return (Npy if path.suffix == ".npy" else Safetensors)(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, ValueError, EOFError, SafetensorError) as error:  # pyarrow's are OSError or ValueError
        what = (str(error) or "it is empty").splitlines()[0]
        if "Python objects" in what or "allow_pickle" in what:
            what = "it holds pickled objects, which are not opened; save a matrix of floats"
        raise UserError(f"{path}: cannot be read: {what}") from None


Rows = NDArray[np.int64] | None  # row numbers of a file; None = all, in order


def align(a: Vectors, b: Vectors) -> tuple[Rows, Rows, str]:
    """Rows of both files that are the same items, in a's order, and what was done, in a sentence.

    By id where both have ids; items that only one file holds are left out. Else row i of both is the same item.
    """
    if a.ids is None or b.ids is None:
        if len(a) != len(b):
            raise UserError(
                f"{a} has {len(a)} rows and {b} has {len(b)}, and without ids in both nobody knows which belong together: "
                "add ids, or write both in the same order"
            )
        known = [file.path.name for file in (a, b) if file.id_name]
        ids = f"only {known[0]} has ids" if known else "no ids"
        return None, None, f"row i of {a.path.name} and of {b.path.name} is taken for the same item ({ids})"
    if (a.ids.dtype.kind == "U") != (b.ids.dtype.kind == "U"):
        raise UserError(f"the ids of {a} and {b} are text on one side and integers on the other; write them alike")
    if np.array_equal(a.ids, b.ids):
        return None, None, f"{len(a)} pairs, ids equal"
    _, rows_a, rows_b = np.intersect1d(a.ids, b.ids, assume_unique=True, return_indices=True)
    if not len(rows_a):
        raise UserError(f"{a} and {b} have no id in common; are both of the same items?")
    order = np.argsort(rows_a)
    left = (
        f"; left out: {len(a) - len(rows_a)} rows only in {a.path.name}, {len(b) - len(rows_b)} only in {b.path.name}"
    )
    note = f"{len(rows_a)} pairs, put into order by id" + left * (len(rows_a) < max(len(a), len(b)))
    return rows_a[order], rows_b[order], note
