"""What an audit reads: queries and gallery of both models, put together by id, with labels and slices; all checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmark.audit.acceptance import Labels
from benchmark.audit.slicing import slices_of
from benchmark.errors import UserError, unknown
from benchmark.serving import Map, unit
from benchmark.vectors import Array, Vectors, align, open_vectors

SAME = 1e-3  # apart, as a share of their length, two vectors are still the same one: what float16 rounds


@dataclass
class Data:
    """Everything that is judged; unit rows under "cosine"."""

    notes: list[str]  # how files were put together
    old_queries: Array  # (Nq, d_o)
    new_queries: Array  # (Nq, d_n)
    gallery: Array  # (N, d_o) all that is stored
    gallery_file: Vectors
    query_file: Vectors  # by the old model
    query_rows: NDArray[np.int64] | None  # (Nq,) its rows that are judged; None = all, in order
    sample: NDArray[np.int64] | None  # (n,) rows of the gallery that both models embedded; None = all
    new: Array | None  # (n, d_n) those rows by the new model; None = not given
    own: NDArray[np.int64]  # (Nq,) row of the gallery that is the query itself; -1 = none
    slices: dict[str, NDArray]  # column -> (Nq,)
    asked: bool  # whether the operator named these columns
    labels: tuple[NDArray[np.int64], NDArray[np.int64]] | None  # (Nq,), (N,)

    @property
    def size(self) -> int:
        """n, the gallery items that are judged."""
        return len(self.gallery) if self.sample is None else len(self.sample)

    @property
    def sampled(self) -> bool:
        return self.sample is not None

    def judged(self, whole: NDArray) -> NDArray:
        """The sample's rows of something that has N rows."""
        return whole if self.sample is None else whole[self.sample]

    @property
    def own_judged(self) -> NDArray[np.int64]:
        """(Nq,) as `own`, in rows of the sample."""
        if self.sample is None:
            return self.own
        place = np.full(len(self.gallery) + 1, -1)  # the last is for "none"
        place[self.sample] = np.arange(len(self.sample))
        return place[self.own]

    @property
    def all_labels(self) -> Labels | None:
        return self.labels and Labels(*self.labels, self.own)

    @property
    def judged_labels(self) -> Labels | None:
        return self.labels and Labels(self.labels[0], self.judged(self.labels[1]), self.own_judged)


def read(
    queries_old: Path,
    queries_new: Path,
    gallery_old: Path,
    gallery_new: Path | None,
    mapping: Map,
    query_labels: str | None = None,
    gallery_labels: str | None = None,
    slices: Sequence[str] | None = None,
) -> Data:
    """Arguments as for `audit.audit`; everything is held in memory, 4 bytes a number.

    Labels in a file of their own belong to the rows of the old queries and of the old gallery, columns to the file that
    holds them.

    Raises UserError: one line that names the file.
    """
    dims = (mapping.adapter.source_dim, mapping.adapter.target_dim)
    new_dim, old_dim = dims if mapping.side == "query" else dims[::-1]

    def opened(path: Path, dim: int, model: str) -> Vectors:
        vectors = open_vectors(path)
        if vectors.dim != dim:
            raise UserError(
                f"{path} has {vectors.dim} dims; the adapter ({mapping.side} side) knows {dim} for the {model} model"
            )
        return vectors

    def taken(vectors: Vectors, rows: NDArray[np.int64] | None) -> Array:
        array = vectors.take(rows)
        return unit(array, str(vectors), 0 if rows is None else rows) if mapping.similarity == "cosine" else array

    old, new = opened(queries_old, old_dim, "old"), opened(queries_new, new_dim, "new")
    stored = opened(gallery_old, old_dim, "old")
    old_rows, new_rows, note = align(old, new)
    notes, sample, gallery = [f"queries: {note}"], None, None
    if gallery_new is not None:
        again = opened(gallery_new, new_dim, "new")
        sample, rows, note = align(stored, again)
        notes.append(f"gallery: {note}")
        gallery = taken(again, rows)
        if sample is not None and len(sample) == len(stored):
            sample = None  # all, in the order of the old file
    old_queries, whole = taken(old, old_rows), taken(stored, None)
    own, said = _own(
        old.ids if old.ids is None or old_rows is None else old.ids[old_rows], stored.ids, old_queries, whole
    )
    if (query_labels is None) != (gallery_labels is None):
        raise UserError("give both --query-labels and --gallery-labels, or neither")
    labels = None
    if query_labels is not None and gallery_labels is not None:
        of_new = query_labels not in old.columns and (query_labels in new.columns or Path(query_labels) == new.path)
        queries, rows = _labels(query_labels, new if of_new else old), new_rows if of_new else old_rows
        labels = _codes(queries if rows is None else queries[rows], _labels(gallery_labels, stored))
        right = Labels(*labels, own).right
        if not right.any():
            raise UserError("no query has a gallery item of its label other than itself: recall and TAR need one")
        if (right == len(stored) - (own >= 0)).all():
            raise UserError(
                "all queries and gallery items have the same label: nothing can be found or accepted wrongly"
            )
    sliced = slices_of(((old, old_rows), (new, new_rows)), slices, query_labels)
    return Data(
        notes + said, old_queries, taken(new, new_rows), whole, stored, old, old_rows, sample, gallery, own, sliced,
        slices is not None, labels,
    )  # fmt: skip


def _own(
    query_ids: NDArray | None, gallery_ids: NDArray | None, queries: Array, gallery: Array
) -> tuple[NDArray[np.int64], list[str]]:
    """The row of the gallery that is the query itself, and what is to be said of it.

    Queries and gallery may be numbered each by itself, so that an id in common says nothing: the vectors must be equal too.
    """
    own = np.full(len(queries), -1)
    if query_ids is None or gallery_ids is None or query_ids.dtype.kind != gallery_ids.dtype.kind:
        return own, []
    order = np.argsort(gallery_ids)
    at = order[np.searchsorted(gallery_ids[order], query_ids).clip(max=len(order) - 1)]
    shared = gallery_ids[at] == query_ids
    apart = np.linalg.norm(queries - gallery[at], axis=1)
    itself = shared & (apart <= SAME * np.linalg.norm(gallery[at], axis=1))
    own[itself] = at[itself]
    notes, chance = [], int((shared & ~itself).sum())
    if itself.any():
        notes.append(
            f"{int(itself.sum())} queries are gallery items themselves (same id, same old vector); none finds itself"
        )
    if chance:
        notes.append(
            f"{chance} queries have the id of a gallery item with another old vector: taken for chance, nothing is left out"
        )
    return own, notes


def _labels(source: str, vectors: Vectors) -> NDArray:
    """One integer or text a row of `vectors`: from one of its columns, an .npy file, or "labels" of a .safetensors file."""
    path = Path(source)
    if source in vectors.columns:
        labels = vectors.column(source)
    elif path.suffix == ".safetensors":
        labels = open_vectors(path).column("labels")
    elif path.suffix == ".npy":
        try:
            labels = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    else:
        raise unknown(f"file (.npy, .safetensors) or column of {vectors}", source, vectors.columns or ["no columns"])
    if labels.shape != (len(vectors),) or labels.dtype.kind not in "iuU":
        raise UserError(
            f"{source}: {len(vectors)} integers or texts are needed, one for each row of {vectors}, not {labels.dtype} of "
            f"shape {labels.shape}"
        )
    return labels


def _codes(queries: NDArray, gallery: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if (queries.dtype.kind == "U") != (gallery.dtype.kind == "U"):
        raise UserError("the labels of queries and gallery are text on one side and integers on the other")
    codes = np.unique(np.concatenate([queries, gallery]), return_inverse=True)[1]
    if not np.isin(codes[: len(queries)], codes[len(queries) :]).any():
        raise UserError("no query has a gallery item of its label: do both label lists use the same names or numbers?")
    return codes[: len(queries)], codes[len(queries) :]
