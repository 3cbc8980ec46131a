"""A faiss index of the user's own: opened, checked against the vectors that it should hold, searched as it is set."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmark.errors import UserError
from benchmark.neighbours import Rows, Similarity
from benchmark.vectors import Array

Read = Callable[[NDArray[np.int64]], Array]  # rows -> (n, D)
KINDS = "Flat, IVF-Flat, IVF-PQ or HNSW"
PLAIN = {
    "Flat", "FlatIP", "FlatL2", "ScalarQuantizer", "PQ", "IVFFlat", "IVFPQ", "IVFScalarQuantizer", "HNSWFlat", "HNSWPQ",
    "HNSWSQ", "NSGFlat",
}  # fmt: skip
AROUND = {
    "RefineFlat": "base_index",
    "Refine": "base_index",
    "PreTransform": "index",
}  # around an index, at an attribute
PROBES = 64  # vectors read back in the check
AGAIN = 20_000  # vectors added again to time a rebuild


def _faiss() -> Any:
    """The package, imported at its first use; its own types say little of what its classes have."""
    import faiss

    return faiss


def _kind(index: Any) -> str:
    return type(index).__name__.removeprefix("Index")


class Rebuild(NamedTuple):
    seconds: float
    extrapolated: bool  # from AGAIN vectors
    superlinear: bool  # a graph: each vector costs more than the one before it, so that an extrapolation is too low


class Index:
    """Search in terms of the rows of `vectors`, whatever labels the index gives. The index and its files stay as they are.

    Args:
        path: what faiss.write_index wrote.
        vectors: (N, D) what the index should hold, unit rows under "cosine".
        raw: gives rows of the gallery as its file holds them, not put to unit length.
        ids: (N,) of the gallery file, or None; an index may have been filled with ids in place of row numbers.
        settings: search parameters as faiss names them, "nprobe=16" or "efSearch=64"; None = those in the file.

    Raises:
        UserError: one line: no index, wrong dims or count, unknown labels, another metric, a kind whose vectors cannot be
            read back, or vectors that are not those of the gallery.
    """

    def __init__(
        self, path: Path, vectors: Array, raw: Read, ids: NDArray | None, similarity: Similarity, settings: str | None
    ):
        faiss = _faiss()
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        self.index = self._read()
        if self.index.d != vectors.shape[1]:
            raise UserError(
                f"{path}: the index has {self.index.d} dims, the vectors to be searched have {vectors.shape[1]}; on the query side "
                "it is built over the old gallery, on the gallery side over the adapted one (compatbench adapt --apply)"
            )
        if self.index.ntotal != len(vectors):
            raise UserError(
                f"{path}: the index holds {self.index.ntotal} vectors, the gallery {len(vectors)}; rebuild it"
            )
        if self.index.metric_type not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
            raise UserError(
                f"{path}: the index searches neither by inner product nor by L2; rebuild it with one of these"
            )
        if similarity == "l2" and self.index.metric_type != faiss.METRIC_L2:
            raise UserError(
                f"{path}: the index searches by inner product, not by L2; rebuild it or take --similarity cosine"
            )
        outer = faiss.downcast_index(self.index)
        wrapped = isinstance(outer, faiss.IndexIDMap)  # ids around an index that counts from 0
        self.id_map = faiss.vector_to_array(outer.id_map) if wrapped else None
        self.inner = faiss.downcast_index(outer.index) if wrapped else outer
        self.layers = self._layers(self.inner)
        self.kind = " around ".join(map(_kind, self.layers))
        self.rows = self._rows(ids)
        self._check(vectors, raw, similarity)
        if settings:
            self._set(settings)

    def _read(self, flags: int = 0) -> Any:
        """For reading only: lists of vectors that lie on disk would else be written to by whatever changes the index."""
        faiss = _faiss()
        for where in (0, faiss.IO_FLAG_ONDISK_SAME_DIR):  # such lists are named as seen from where they were written
            try:
                return faiss.read_index(str(self.path), faiss.IO_FLAG_READ_ONLY | flags | where)
            except RuntimeError as error:
                if "could not open" not in str(error):
                    break
        raise UserError(
            f"{self.path}: is no faiss index of float vectors, or its lists on disk are gone; write one with faiss.write_index"
        )

    def _layers(self, index: Any) -> list[Any]:
        """The index and those inside it; only kinds that are known to give their vectors back, for others may crash."""
        faiss, layers = _faiss(), [index]
        while (kind := _kind(layers[-1])) in AROUND:
            layers.append(faiss.downcast_index(getattr(layers[-1], AROUND[kind])))
        if kind not in PLAIN:
            raise UserError(
                f"{self.path}: {kind} cannot give back its vectors, so nobody can check that they are the gallery's; take {KINDS}"
            )
        return layers

    def _set(self, settings: str) -> None:
        faiss = _faiss()
        for part in settings.split(","):
            name, _, value = (word.strip() for word in part.partition("="))
            try:
                number = float(value)
            except ValueError:
                raise UserError(f"--search takes NAME=VALUE, as nprobe=16, not '{part}'") from None
            if not 1 <= number < 2**31 or (not name.startswith("k_factor") and number != int(number)):
                raise UserError(f"--search {name}={value}: must be a whole number of at least 1")
            try:
                faiss.ParameterSpace().set_index_parameter(self.index, name, number)
            except RuntimeError:
                raise UserError(
                    f"--search '{part}' is no setting of {self.kind}; e.g. nprobe=16 or efSearch=64"
                ) from None

    @property
    def settings(self) -> str:
        """The search parameters in force, of every layer."""
        said = []
        for layer in self.layers:
            if hasattr(layer, "k_factor"):
                said.append(f"k_factor={layer.k_factor:g}")
            if hasattr(layer, "nprobe"):
                said.append(f"nprobe={layer.nprobe} of {layer.nlist}")
            if hasattr(layer, "hnsw"):
                said.append(f"efSearch={layer.hnsw.efSearch}")
            if hasattr(layer, "nsg"):
                said.append(f"search_L={layer.nsg.search_L}")
        return ", ".join(said) or "exhaustive"

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

    def rebuild(self, vectors: Array) -> Rebuild:
        """Time to add all vectors to an empty index of this kind, training not counted; measured with AGAIN of them.

        The empty index is read from the file anew, and lists that lie on disk are replaced before anything is emptied.
        """
        faiss = _faiss()
        again = self._read(faiss.IO_FLAG_MMAP)  # owns what the next lines look into
        outer = faiss.downcast_index(again)
        empty = self._layers(faiss.downcast_index(outer.index) if self.id_map is not None else outer)
        for layer in empty:
            if hasattr(layer, "invlists"):
                lists = faiss.ArrayInvertedLists(layer.nlist, layer.code_size)
                layer.replace_invlists(lists, True)
                lists.this.disown()
        empty[0].reset()
        part = np.ascontiguousarray(vectors[:AGAIN])
        start = time.perf_counter()
        empty[0].add(part)
        seconds = (time.perf_counter() - start) * len(vectors) / len(part)
        graph = any(hasattr(layer, "hnsw") or hasattr(layer, "nsg") for layer in empty)
        return Rebuild(seconds, len(part) < len(vectors), graph)

    def _rows(self, ids: NDArray | None) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """(labels, ascending; their rows), or None where the label is the row."""
        faiss = _faiss()
        if self.id_map is not None:
            labels = self.id_map
        elif hasattr(self.layers[-1], "invlists"):
            lists = self.layers[-1].invlists
            sizes = [lists.list_size(i) for i in range(self.layers[-1].nlist)]
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
        last = self.layers[-1]
        lists = hasattr(last, "set_direct_map_type")
        try:
            if lists:
                last.set_direct_map_type(faiss.DirectMap.Hashtable)
            back = np.stack([self.inner.reconstruct(int(label)) for label in labels])
        except RuntimeError:
            raise UserError(
                f"{self.path}: {self.kind} cannot give back its vectors, so nobody can check that they are the gallery's; "
                f"take {KINDS}"
            ) from None
        finally:
            if lists:
                last.set_direct_map_type(faiss.DirectMap.NoMap)

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
