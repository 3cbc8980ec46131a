"""Is an adapter good enough to put the new model into service without re-embedding the gallery? No labels needed.

The reference is the full backfill: the ranking of the new queries in the gallery embedded by the new model, on the sample of
the gallery that both models embedded. Each way to serve is judged by overlap@k with it: the share of its first k items that
the way also has among its first k. Ways: the adapter; the old model as before; two indexes, the old one and one of the share
of the gallery that was re-embedded, by reciprocal rank fusion; the full backfill itself, at overlap 1.

A sample flatters or wrongs: see `trend`. An index adds a loss of its own, measured at its own search parameters.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmark import acceptance, bounds
from benchmark.adapt import Map, Side, fit, unit
from benchmark.bounds import Estimate
from benchmark.errors import UserError
from benchmark.faiss_index import Index
from benchmark.neighbours import Found, Rows, Similarity, fuse, overlap, search
from benchmark.vectors import Array, Vectors, align, open_vectors

KS = (1, 10, 100)
K = 10  # what is decided by
ADAPTER, INDEXED, OLD, FULL = "adapter", "adapter and index", "old model only", "full re-embedding"
SLICE_LEAST = 20  # queries of a slice
SLICES_MOST = 50  # values of a column that slices
TIMED = 500  # queries, one at a time


@dataclass(frozen=True)
class Requirements:
    """What a go needs; the operator's to set."""

    overlap: float = 0.8  # overlap@10 with the full backfill
    slice: float = 0.5  # the same in every slice
    margin: float = 0.05  # change of the share accepted (with labels: of TAR), and negative flips
    far: float = 2.0  # with labels: FAR at the frozen threshold, as a multiple of the FAR it was frozen at


class Check(NamedTuple):
    what: str
    found: Estimate
    bound: float  # the end of the confidence interval that decides
    required: str
    met: bool


@dataclass
class Data:
    """Everything that is judged; rows of the sample unless said otherwise. Unit rows under "cosine"."""

    files: dict[str, str]
    notes: list[str]
    similarity: Similarity
    old_queries: Array  # (Nq, d_o)
    new_queries: Array  # (Nq, d_n)
    gallery: Array  # (N, d_o) the whole old gallery
    gallery_file: Vectors
    sample: NDArray[np.int64] | None  # rows of the gallery that are judged; None = all
    old: Array  # (n, d_o)
    new: Array | None  # (n, d_n); None = there is no reference
    own: NDArray[np.int64]  # (Nq,) the sample's row that is the query itself; -1 = none
    own_whole: NDArray[np.int64]  # (Nq,) the same among all rows of the gallery
    slices: dict[str, NDArray]  # column -> (Nq,)
    labels: acceptance.Labels | None = None

    @property
    def whole(self) -> bool:
        """Whether the judged sample is the whole gallery file."""
        return self.sample is None


@dataclass
class Way:
    """A way to serve the new or the old queries."""

    rows: Rows  # (Nq, k) of the sample
    best: Array | None = None  # (Nq,) score of the first
    side: acceptance.Side | None = None  # whose scores the frozen threshold meets
    cost: dict[str, Any] = field(default_factory=dict)


def audit(
    queries_old: Path,
    queries_new: Path,
    gallery_old: Path,
    gallery_new: Path | None = None,
    *,
    adapter: Path | None = None,
    pairs: tuple[Path, Path] | None = None,
    methods: Sequence[str] = ("Procrustes",),
    side: Side = "query",
    similarity: Similarity = "cosine",
    index: Path | None = None,
    settings: str | None = None,
    query_labels: str | None = None,
    gallery_labels: str | None = None,
    slices: Sequence[str] | None = None,
    accept: float = 0.9,
    far: float = 1e-3,
    gallery_size: int | None = None,
    encoder_rate: float | None = None,
    dual: Sequence[float] = (0.1, 0.5, 1.0),
    require: Requirements = Requirements(),
    seed: int = 0,
) -> dict[str, Any]:
    """The whole report, as JSON values; `audit_report` shows it.

    Args:
        queries_old, queries_new: the same queries by both models.
        gallery_old: what is stored.
        gallery_new: a random sample of the stored items, or all, by the new model. None: nothing can be called a go.
        adapter: a file of `compatbench adapt`, which says its side and similarity; or
        pairs: (old, new) files to fit `methods` on, the best of which is audited.
        index: faiss index of what is searched: the old gallery, or on the gallery side the adapted one; `settings` as
            "nprobe=16".
        query_labels, gallery_labels: .npy, .safetensors with "labels", or the name of a column.
        slices: columns of the query files; None = all with 2 to 50 values.
        accept: without labels the threshold is frozen where so many of the old system's best matches pass.
        far: with labels it is frozen at this false acceptance rate of the old system.
        gallery_size: of the gallery in service, if `gallery_old` is a part of it.
        encoder_rate: items a second of the new encoder, for the time of a full re-embedding.
        dual: shares of the gallery that the second index holds.

    Raises:
        UserError: one line that names the file or argument.
    """
    mapping, fitted = _mapping(adapter, pairs, methods, side, similarity, seed)
    data = _read(
        queries_old, queries_new, gallery_old, gallery_new, mapping, query_labels, gallery_labels, slices
    )
    if fitted:
        data.notes.append(fitted)
    size = gallery_size or len(data.gallery)
    if size < len(data.gallery):
        raise UserError(f"--gallery-size {size} is below the {len(data.gallery)} rows of {gallery_old}")
    ks = [k for k in KS if k < len(data.old)]
    ...
