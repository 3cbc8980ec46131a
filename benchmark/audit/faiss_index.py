"""A faiss index of the user's own: opened, checked against the vectors that it should hold, searched as it is set."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmark.errors import UserError
from benchmark.neighbours import Rows, Similarity
from benchmark.vectors import Array

Read = Callable[[NDArray[np.int64]], Array]  # rows -> (n, D)
KINDS = "Flat, IVF-Flat, IVF-PQ or HNSW"
PROBES = 64  # vectors read back in the check
AGAIN = 20_000  # vectors added again to time a rebuild


def _faiss() -> Any:
    """The package, imported at its first use; its own types say little of what its classes have."""
    import faiss

    return faiss


class Index:
    """Search in terms of the rows of `vectors`, whatever labels the index gives.

    Args:
        path: what faiss.write_index wrote.
        vectors: (N, D) what the index should hold, unit rows under "cosine".
        raw: gives rows of the gallery as its file holds them, not put to unit length.
        ids: (N,) of the gallery file, or None; an index may have been filled with ids in place of row numbers.
        settings: search parameters as faiss names them, "nprobe=16" or "efSearch=64"; None = those in the file.

    Raises:
        UserError: one line: no index, wrong dims or count, unknown labels, another metric, vectors that cannot be read back
            or are not those of the gallery.
    """

    def __init__(
        self, path: Path, vectors: Array, raw: Read, ids: NDArray | None, similarity: Similarity, settings: str | None
    ):
        faiss = _faiss()
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        try:
            self.index = faiss.read_index(str(path))
        except RuntimeError:
            raise UserError(f"{path}: is no faiss index of float vectors; write one with faiss.write_index") from None
        if self.index.d != vectors.shape[1]:
            raise UserError(
                f"{path}: the index has {self.index.d} dims, the vectors to be searched have {vectors.shape[1]}; on the query side "
                "it is built over the old gallery, on the gallery side over the adapted one (compatbench adapt --apply)"
            )
        if self.index.ntotal != len(vectors):
            raise UserError(
                f"{path}: the index holds {self.index.ntotal} vectors, the gallery {len(vectors)}; rebuild it"
            )
        if similarity == "l2" and self.index.metric_type != faiss.METRIC_L2:
            raise UserError(
                f"{path}: the index searches by inner product, not by L2; rebuild it or take --similarity cosine"
            )
        outer = faiss.downcast_index(self.index)
        wrapped = isinstance(outer, faiss.IndexIDMap)  # ids around an index that counts from 0
        self.id_map = faiss.vector_to_array(outer.id_map) if wrapped else None
        self.inner = faiss.downcast_index(outer.index) if wrapped else outer
        self.kind = type(self.inner).__name__.removeprefix("Index")
        self.rows = self._rows(ids)
        self._check(vectors, raw, similarity)
        if settings:
            try:
                faiss.ParameterSpace().set_index_parameters(self.index, settings)
            except RuntimeError:
                raise UserError(
                    f"--search '{settings}' is no setting of {self.kind}; e.g. nprobe=16 or efSearch=64"
                ) from None

    @property
    def settings(self) -> str:
        """The search parameters in force."""
        if hasattr(self.inner, "nprobe"):
            return f"nprobe={self.inner.nprobe} of {self.inner.nlist}"
        return f"efSearch={self.inner.hnsw.efSearch}" if hasattr(self.inner, "hnsw") else "exhaustive"

    def search(self, queries: Array, k: int, own: NDArray[np.int64] | None = None) -> Rows:
        """(Nq, k) rows of the gallery, best first; -1 where the index found fewer. `own` as for `neighbours.search`.

        Ask for as many as will be asked for in service: a graph is searched the more widely the more are wanted.
        """
        more = int(own is not None and bool((own >= 0).any()))
        labels = self.index.search(np.ascontiguousarray(queries), min(k + more, self.index.ntotal))[1]
        found = np.where(labels >= 0, self._row_of(labels), -1)
        if own is not None:
            found[found == own[:, None]] = -1
            found = np.take_along_axis(found, (found < 0).argsort(1, kind="stable"), 1)
        return found[:, :k]

    def one(self, query: Array) -> None:
        """A single query (1, D), as it is served."""
        self.index.search(query, 10)

    def rebuild_seconds(self, vectors: Array) -> float:
        """To add all vectors again, training of the coarse quantiser not counted; from AGAIN of them. Empties the index."""
        self.inner.reset()
        part = vectors[:AGAIN]
        start = time.perf_counter()
        self.inner.add(np.ascontiguousarray(part))
        return (time.perf_counter() - start) * len(vectors) / len(part)

    def _rows(self, ids: NDArray | None) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """(labels, ascending; their rows), or None where the label is the row."""
        faiss = _faiss()
        if self.id_map is not None:
            labels = self.id_map
        elif hasattr(self.inner, "invlists"):
            lists = self.inner.invlists
            sizes = [lists.list_size(i) for i in range(self.inner.nlist)]
            labels = np.concatenate(
                [faiss.rev_swig_ptr(lists.get_ids(i), size) for i, size in enumerate(sizes) if size]
            )
        else:
            return None
        labels = np.sort(labels)
        if np.array_equal(labels, np.arange(len(labels))):
            return None
        if ids is not None and ids.dtype.kind == "i":
            order = np.argsort(ids)
            if np.array_equal(labels, ids[order]):
                return labels, order
        raise UserError(f"{self.path}: its labels are neither row numbers nor the integer ids of the gallery file")

    def _row_of(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.rows is None:
            return labels
        known, rows = self.rows
        return rows[np.searchsorted(known, labels).clip(max=len(known) - 1)]

    def _check(self, vectors: Array, raw: Read, similarity: Similarity) -> None:
        """Some vectors, read back, must be those of their rows (compressed: nearer to them than to others)."""
        faiss = _faiss()
        n = len(vectors)
        rows = np.unique(np.linspace(0, n - 1, min(PROBES, n)).astype(np.int64))
        labels = rows
        if self.rows is not None:
            known, of = self.rows
            labels = known[np.argsort(of)][rows]
        if self.id_map is not None:
            order = np.argsort(self.id_map)
            labels = order[np.searchsorted(self.id_map[order], labels)]
        try:
            if isinstance(self.inner, faiss.IndexLSH):
                raise RuntimeError("bits, from which faiss makes vectors up")
            if hasattr(self.inner, "set_direct_map_type"):
                self.inner.set_direct_map_type(faiss.DirectMap.Hashtable)
            back = np.stack([self.inner.reconstruct(int(label)) for label in labels])
        except RuntimeError:
            raise UserError(
                f"{self.path}: {self.kind} cannot give back its vectors, so nobody can check that they are the gallery's; "
                f"take {KINDS}"
            ) from None

        def apart(a: Array) -> NDArray[np.float32]:
            return np.linalg.norm(back - a, axis=1)

        mine, other = apart(vectors[rows]), apart(vectors[(rows + max(1, n // 2)) % n])
        lengths, plain = (np.log(np.linalg.norm(x, axis=1).clip(1e-30)) for x in (back, raw(rows)))
        if (
            similarity == "cosine"
            and np.median(abs(plain)) > 0.1
            and np.median(abs(lengths - plain) - abs(lengths)) < 0
        ):
            raise UserError(
                f"{self.path}: holds vectors that were not put to unit length, so it does not search by cosine; rebuild it from "
                "unit vectors"
            )
        if n > 1 and (mine < other).mean() < 0.9:
            raise UserError(
                f"{self.path}: holds other vectors than the gallery (row {rows[int((mine - other).argmax())]} differs); rebuild it "
                "from this very file"
            )
