"""The ways to serve that an audit compares, with what each costs to reach and to run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmark.adapt import Map
from benchmark.audit.acceptance import Side
from benchmark.audit.data import Data
from benchmark.audit.faiss_index import Index
from benchmark.neighbours import Found, Rows, fuse, search
from benchmark.vectors import Array

ADAPTER, INDEXED, OLD, FULL = "adapter", "adapter and index", "old model only", "full re-embedding"
KS = (1, 10, 100)  # depths of what is reported
DEEPEST = KS[-1]  # also of the lists that are fused
TIMED = 500  # queries, one at a time


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
    rows: Rows  # (Nq, k) of the judged sample, best first
    cost: dict[str, Any]
    best: Array | None = None  # (Nq,) score of the best match, where a threshold may meet it
    side: Side | None = None  # the vectors that are compared
    by_k: dict[int, Rows] = field(default_factory=dict)  # of an index, which searches less for fewer

    def top(self, k: int) -> Rows:
        """(Nq, k)"""
        return self.by_k.get(k, self.rows)[:, :k]


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
    """Every way by name, on the judged sample; those that need the new gallery only where it is given.

    Costs are those of `size` items: vectors to embed again, vectors to write, seconds of both where known.
    """

    def found(queries: Array, gallery: Array) -> tuple[Found, Side]:
        return search(queries, gallery, DEEPEST, served.mapping.similarity, data.own_judged), Side(queries, gallery)

    def cost(embedded: float, written: float, seconds: float | None, encoders: int) -> dict[str, Any]:
        return {
            "vectors embedded again": round(embedded), "vectors written": round(written), "seconds": seconds,
            "encoders a query": encoders,
        }  # fmt: skip

    def encoding(items: float) -> float | None:
        return items / encoder_rate if encoder_rate else None

    ways = {}
    mapped = 0 if served.mapping.side == "query" else size
    top, side = found(served.queries, data.judged(served.gallery))
    ways[ADAPTER] = Way(top.rows, cost(0, mapped, mapped * served.seconds_per_item, 1), top.scores[:, 0], side)
    if served.index and data.sample is None:
        by_k = {k: served.index.search(served.queries, k, data.own) for k in KS}
        ways[INDEXED] = Way(by_k[DEEPEST], ways[ADAPTER].cost, by_k=by_k)
    old, side = found(data.old_queries, data.judged(data.gallery))
    ways[OLD] = Way(old.rows, cost(0, 0, 0.0, 1), old.scores[:, 0], side)
    if data.new is None:
        return ways
    order = np.random.default_rng(seed).permutation(data.size)
    for share in dual:
        part = np.sort(order[: max(1, round(share * data.size))])
        new = _among(data.new_queries, data.new, part, served.mapping, data)
        again = cost(share * size, share * size, encoding(share * size), 2)
        ways[f"two indexes, {share:.0%} re-embedded"] = Way(fuse([new, old.rows], DEEPEST), again)
    top, side = found(data.new_queries, data.new)
    ways[FULL] = Way(top.rows, cost(size, size, encoding(size), 1), top.scores[:, 0], side)
    return ways


def _among(queries: Array, gallery: Array, part: np.ndarray, mapping: Map, data: Data) -> Rows:
    """The nearest of some rows of the gallery, as rows of all of it."""
    place = np.full(len(gallery) + 1, -1)
    place[part] = np.arange(len(part))
    rows = search(queries, gallery[part], DEEPEST, mapping.similarity, place[data.own_judged]).rows
    return np.where(rows >= 0, part[rows], -1)


def latency(data: Data, served: Served) -> dict[str, Any]:
    """Milliseconds from a query's embedding to its first 10, one query at a time: p50 and p99, with and without adapter."""
    mapping, index = served.mapping, served.index

    def one(query: Array) -> None:
        if index:
            index.one(query)
        else:
            search(query, served.gallery, 10, mapping.similarity)

    report: dict[str, Any] = {"search": f"{index.kind}, {index.settings}" if index else "exact"}
    report |= {"queries": min(TIMED, len(served.queries)), "vectors searched": len(served.gallery)}
    steps: dict[str, tuple[Array, Callable[[Array], None]]] = {"search": (served.queries, one)}
    if mapping.side == "query":
        steps["adapter and search"] = data.new_queries, lambda query: one(mapping(query))
    for name, (queries, step) in steps.items():
        times = []
        for at in [0] * 10 + list(range(report["queries"])):  # ten to warm up
            start = time.perf_counter()
            step(queries[at : at + 1])
            times.append(1000 * (time.perf_counter() - start))
        report[f"{name}, ms"] = dict(zip(("p50", "p99"), np.quantile(times[10:], [0.5, 0.99])))
    return report
