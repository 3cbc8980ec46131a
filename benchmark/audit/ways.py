"""The ways to serve that an audit compares, with what each costs to reach."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmark.audit.acceptance import Side
from benchmark.audit.data import Data
from benchmark.audit.faiss_index import Index
from benchmark.neighbours import Rows, fuse, search
from benchmark.serving import Map
from benchmark.vectors import Array

ADAPTER, INDEXED, OLD, FULL = "adapter", "adapter and index", "old model only", "full re-embedding"
OLD_INDEXED = "old model and index"
KS = (1, 10, 100)  # depths of what is reported
DEEPEST = KS[-1]  # also of the lists that are fused


@dataclass(frozen=True)
class Served:
    """What the adapter makes of the data: new queries that meet a gallery."""

    mapping: Map
    queries: Array  # (Nq, D)
    gallery: Array  # (N, D) all that is searched
    seconds_per_item: float  # to adapt a stored vector; 0 on the query side
    index: Index | None


@dataclass
class Way:
    """Rankings of the judged sample, for what is held against the full backfill, and of all that is stored, for the rest."""

    cost: dict[str, Any]
    sample: Rows | None = None  # (Nq, k) rows of the sample, best first; None for an index over more than the sample
    whole: Rows | None = None  # (Nq, k) rows of the gallery; None where the new model has embedded only a sample
    best: Array | None = None  # (Nq,) score of the best match in the whole gallery, where a threshold may meet it
    side: Side | None = None  # the vectors that are compared
    sampled: bool = False  # whether the gallery of `side` is the sample only
    # of an index, which searches less for fewer: k -> (Nq, k) rows of the gallery
    by_k: dict[int, Rows] = field(default_factory=dict)

    def top(self, k: int) -> Rows:
        """(Nq, k) of the judged sample."""
        rows = self.by_k.get(k, self.sample)
        assert rows is not None
        return rows[:, :k]

    def top_of_all(self, k: int) -> Rows:
        """(Nq, k) of the whole gallery."""
        rows = self.by_k.get(k, self.whole)
        assert rows is not None
        return rows[:, :k]


def serve(data: Data, mapping: Map, index: Path | None, settings: str | None) -> Served:
    """The adapter applied to its side; the index opened and checked against what it should hold."""
    start = time.perf_counter()
    if mapping.side == "query":
        queries, gallery, seconds = mapping(data.new_queries), data.gallery, 0.0
    else:
        queries, gallery = data.new_queries, mapping(data.gallery)
        seconds = (time.perf_counter() - start) / len(gallery)

    def raw(rows: NDArray[np.int64]) -> Array:
        return data.gallery_file.take(rows) if mapping.side == "query" else gallery[rows]

    opened = Index(index, gallery, raw, data.gallery_file.ids, mapping.similarity, settings) if index else None
    return Served(mapping, queries, gallery, seconds, opened)


def all_ways(
    data: Data, served: Served, dual: Sequence[float], size: int, encoder_rate: float | None, seed: int
) -> dict[str, Way]:
    """Every way by name; those that need the new gallery only where it is given.

    Costs are those of `size` items: vectors to embed again, vectors to write, seconds of both where known.
    """

    def found(queries: Array, gallery: Array, price: dict[str, Any]) -> Way:
        """By exact search, in the whole gallery and in the sample of it."""
        similarity, side = served.mapping.similarity, Side(queries, gallery)
        whole = search(queries, gallery, DEEPEST, similarity, data.own)
        part = whole.rows
        if data.sample is not None:
            part = search(queries, gallery[data.sample], DEEPEST, similarity, data.own_judged).rows
        return Way(price, part, whole.rows, whole.scores[:, 0], side)

    def through(index: Index, queries: Array, price: dict[str, Any]) -> Way:
        by_k = {k: index.search(queries, k, data.own) for k in KS}
        return Way(price, by_k[DEEPEST] if data.sample is None else None, by_k[DEEPEST], by_k=by_k)

    def cost(embedded: float, written: float, seconds: float | None, encoders: int) -> dict[str, Any]:
        return {
            "vectors embedded again": round(embedded), "vectors written": round(written), "seconds": seconds,
            "encoders a query": encoders,
        }  # fmt: skip

    def encoding(items: float) -> float | None:
        return items / encoder_rate if encoder_rate else None

    query_side = served.mapping.side == "query"
    mapped, index = 0 if query_side else size, served.index
    ways = {ADAPTER: found(served.queries, served.gallery, cost(0, mapped, mapped * served.seconds_per_item, 1))}
    if index:
        ways[INDEXED] = through(index, served.queries, ways[ADAPTER].cost)
    ways[OLD] = old = found(data.old_queries, data.gallery, cost(0, 0, 0.0, 1))
    if index and query_side:  # on the gallery side the index knows no old vectors
        ways[OLD_INDEXED] = through(index, data.old_queries, old.cost)
    if data.new is None:
        return ways
    order = np.random.default_rng(seed).permutation(data.size)
    for share in dual:
        part = np.sort(order[: round(share * data.size)])
        new = _among(data.new_queries, data.new, part, served.mapping, data)
        price = cost(share * size, share * size, encoding(share * size), 2)
        fused = fuse([new, old.top(DEEPEST)], DEEPEST)
        ways[dual_name(share)] = Way(price, fused, None if data.sampled else fused)
    again = search(data.new_queries, data.new, DEEPEST, served.mapping.similarity, data.own_judged)
    side, price = Side(data.new_queries, data.new), cost(size, size, encoding(size), 1)
    ways[FULL] = Way(price, again.rows, side=side, sampled=data.sampled)
    if not data.sampled:
        ways[FULL].whole, ways[FULL].best = again.rows, again.scores[:, 0]
    return ways


def dual_name(share: float) -> str:
    return f"two indexes, {100 * share:.3g}% re-embedded"


def _among(queries: Array, gallery: Array, part: np.ndarray, mapping: Map, data: Data) -> Rows:
    """The nearest of some rows of the gallery, as rows of all of it."""
    place = np.full(len(gallery) + 1, -1)
    place[part] = np.arange(len(part))
    rows = search(queries, gallery[part], DEEPEST, mapping.similarity, place[data.own_judged]).rows
    return np.where(rows >= 0, part[rows], -1)
