"""Bring your own embeddings: the exact metrics of arrays or files in one call.

    from benchmark.evaluate import evaluate
    evaluate("new/queries.npy", "new/gallery.npy", "query_labels.npy", "gallery_labels.npy")
    {'cmc@1': 0.61, 'cmc@5': 0.83, 'map': 0.42, 'queries': 5000, 'dropped': 0, 'gallery': 5000, ...}

`evaluate_matrix` judges a sequence of releases: the queries of each against the galleries of it and all before.

Sources are arrays (numpy, torch, lists), .npy files, or .safetensors files with the keys `embeddings` (N, D), `labels`
(N,) and `ids` (N,), of which the last two may be missing. Labels and ids are integers or text. With ids, the gallery item
that has the query's own id is no candidate for it, whichever release embedded it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmark import compatibility, statistics
from benchmark.errors import UserError
from benchmark.retrieval import Ranking, Similarity, rank
from benchmark.sources import Embedded, Pair, Release, Source, Truth, find_truth, read, read_pairs


def evaluate(
    queries: Source,
    gallery: Source | None = None,
    query_labels: Source | None = None,
    gallery_labels: Source | None = None,
    *,
    query_ids: Source | None = None,
    gallery_ids: Source | None = None,
    same_items: bool = False,
    old_queries: Source | None = None,
    old_gallery: Source | None = None,
    similarity: Similarity = "cosine",
    ks: Sequence[int] = (1, 5),
    truncate: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Metrics of queries (N, D) against a gallery (M, D); the positives of a query are the gallery items of its label.

    Args:
        gallery: None = the queries themselves, each against all others.
        query_labels, gallery_labels: (N,) and (M,); None = those in the safetensors file.
        query_ids, gallery_ids: (N,) and (M,); None = those in the safetensors files, where both have them.
        same_items: row i is the same item on both sides, though perhaps embedded by two releases: shorthand for ids.
        old_queries, old_gallery: the same items embedded by the release before; adds "upgrade", see `evaluate_matrix`.
        truncate: compare unequal dims by their common prefix, where the spaces nest (BT2, OCA); else they are refused.
        device: where scores are computed; None = where the queries are.

    Returns:
        "cmc@<k>" and "map" in [0, 1] over the "queries" that have a positive; "dropped" (those that have none),
        "gallery" (M), "self_excluded" (queries whose own item is in the gallery), "dim" (compared dims).

    Raises:
        UserError: one line that names the file or argument: unreadable, wrong shape or type, NaN or infinity, zero
            vectors under cosine, lengths or dims that do not fit, no query with a positive.
    """
    if (old_queries is None) != (old_gallery is None):
        raise UserError("an upgrade needs both old_queries and old_gallery: give the two or neither")
    new = read("queries", queries)
    pairs = [(new, new if gallery is None else read("gallery", gallery))]
    if old_queries is not None and old_gallery is not None:
        pairs.insert(0, (read("old_queries", old_queries), read("old_gallery", old_gallery)))
    truth = find_truth(pairs, query_labels, gallery_labels, query_ids, gallery_ids, same_items or gallery is None)
    settings = _Settings(similarity, tuple(ks), truncate, device)
    ranking = _rank(*pairs[-1], truth, settings)
    if isinstance(ranking, str):
        raise UserError(ranking)
    dim = min(vectors.shape[1] for vectors in (pairs[-1][0].vectors, pairs[-1][1].vectors))
    result = {**ranking.metrics(ks), **truth.counts(), "dim": dim}
    return {**result, "upgrade": _matrix(pairs, truth, settings)} if len(pairs) > 1 else result


def evaluate_matrix(
    releases: Sequence[Release],
    query_labels: Source | None = None,
    gallery_labels: Source | None = None,
    *,
    query_ids: Source | None = None,
    gallery_ids: Source | None = None,
    same_items: bool = False,
    independent: Sequence[Release] | None = None,
    similarity: Similarity = "cosine",
    ks: Sequence[int] = (1, 5),
    truncate: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """The compatibility matrix of successive releases, oldest first, and what it says; arguments as for `evaluate`.

    Args:
        releases: T sources of one item list, searched by itself without the item itself, or T pairs (queries, gallery).
            Items and their order are the same in every release.
        independent: the same T releases trained without compatibility: the oracles that gains and drops refer to.

    Returns:
        "matrices": metric -> T x T, [t][k] = queries of release t, gallery of release k; None above the diagonal and
        where undefined; "undefined": "t,k" -> reason; "independent": as "matrices" or None; "summary": metric -> what
        `compatibility.summary` says, with "flips" for CMC, AC95 and all that needs oracles None without `independent`;
        "queries", "dropped", "gallery", "self_excluded" as in `evaluate`; "dims": of each release.
    """
    pairs = read_pairs("release", releases)
    bounds = read_pairs("independent release", independent or [])
    if bounds and len(bounds) != len(pairs):
        raise UserError(f"independent needs a source for each of the {len(pairs)} releases, got {len(bounds)}")
    same_items = same_items or all(queries is gallery for queries, gallery in pairs)
    truth = find_truth([*pairs, *bounds], query_labels, gallery_labels, query_ids, gallery_ids, same_items)
    return _matrix(pairs, truth, _Settings(similarity, tuple(ks), truncate, device), bounds)


# ---------------------------------------------------------------------------------------------------------- computing


@dataclass(frozen=True)
class _Settings:
    similarity: Similarity
    ks: tuple[int, ...]
    truncate: bool
    device: str | None

    def __post_init__(self) -> None:
        if not self.ks or not all(isinstance(k, int) and k > 0 for k in self.ks):
            raise UserError(f"ks are whole numbers from 1 on, e.g. (1, 5), not {self.ks}")


def _rank(queries: Embedded, gallery: Embedded, truth: Truth, settings: _Settings) -> Ranking | str:
    """The ranking, or why dims that differ cannot be compared."""
    q, g = queries.vectors, gallery.vectors
    if q.ndim == g.ndim == 2 and q.shape[1] != g.shape[1]:
        if not settings.truncate:
            return (
                f"{queries} has {q.shape[1]} dims and {gallery} has {g.shape[1]}: no similarity without a link between the two "
                "spaces (truncate=True compares the common prefix, where they nest)"
            )
        q, g = (vectors[:, : min(q.shape[1], g.shape[1])] for vectors in (q, g))
    (query_labels, gallery_labels), (query_ids, gallery_ids) = truth.labels, truth.ids
    try:
        ranking = rank(
            q,
            g,
            query_labels,
            gallery_labels,
            query_ids=query_ids,
            gallery_ids=gallery_ids,
            similarity=settings.similarity,
            device=settings.device,
        )
    except ValueError as error:
        names = {**truth.files, "queries": queries.file, "gallery": gallery.file}
        name = names.get(re.match(r"\w*", str(error))[0])  # type: ignore[index]
        raise UserError(f"{name}: {error}" if name else str(error)) from None
    if not (ranking.first > 0).any():
        raise UserError("no query has a gallery item of its label: do both label lists use the same names or numbers?")
    return ranking


def _matrix(pairs: Sequence[Pair], truth: Truth, settings: _Settings, bounds: Sequence[Pair] = ()) -> dict[str, Any]:
    own, bound = _cells(pairs, truth, settings), _cells(bounds, truth, settings)
    first = next(iter(own.values()))
    if isinstance(first, str):
        raise UserError(first)
    metrics = [*(f"cmc@{k}" for k in settings.ks), "map"]
    matrices = {metric: _means(own, metric, len(pairs)) for metric in metrics}
    oracles = {metric: _means(bound, metric, len(pairs)) for metric in metrics}
    lower = _lower_bounds(own, bound, metrics, truth.labels[0], len(pairs)) if bounds and len(pairs) > 1 else {}
    summary = {}
    for metric, C in matrices.items():
        summary[metric] = compatibility.summary(C, oracles[metric], **lower.get(metric, {}))
        if metric != "map":
            summary[metric]["flips"] = _flips(own, metric)
    counted = first.metrics()
    return {
        "matrices": {metric: compatibility.nulls(C) for metric, C in matrices.items()},
        "undefined": {f"{t},{k}": cell for (t, k), cell in own.items() if isinstance(cell, str)},
        "independent": {metric: compatibility.nulls(C) for metric, C in oracles.items()} if bounds else None,
        "summary": summary,
        "queries": counted["queries"],
        "dropped": counted["dropped"],
        **truth.counts(),
        "dims": [gallery.vectors.shape[1] for _, gallery in pairs],
    }


_Cells = Mapping[tuple[int, int], Ranking | str]  # (t, k) -> ranking, or why there is none


def _cells(pairs: Sequence[Pair], truth: Truth, settings: _Settings) -> _Cells:
    return {(t, k): _rank(pairs[t][0], pairs[k][1], truth, settings) for t in range(len(pairs)) for k in range(t + 1)}


def _values(ranking: Ranking, metric: str) -> NDArray[np.float64]:
    """(N,) in [0, 1], NaN for dropped queries: AP, or whether a positive is within the top k."""
    first = ranking.first.numpy()
    values = ranking.ap.numpy() if metric == "map" else (first <= int(metric.removeprefix("cmc@"))).astype(float)
    return np.where(first > 0, values, np.nan)


def _means(cells: _Cells, metric: str, releases: int) -> NDArray[np.float64]:
    C = np.full((releases, releases), np.nan)
    for at, cell in cells.items():
        if not isinstance(cell, str):
            C[at] = np.nanmean(_values(cell, metric))
    return C


def _flips(cells: _Cells, metric: str) -> dict[str, dict[str, float]]:
    """Shares of queries that the update of the query model turns from miss to hit, and back, on the old gallery."""
    flips = {}
    for (t, k), cell in cells.items():
        old = cells[k, k]
        if k < t and not isinstance(cell, str) and not isinstance(old, str):
            kept = old.first.numpy() > 0
            flips[f"{t},{k}"] = compatibility.flips(_values(old, metric)[kept], _values(cell, metric)[kept])._asdict()
    return flips


def _lower_bounds(
    own: _Cells, bound: _Cells, metrics: Sequence[str], labels: Tensor, releases: int
) -> dict[str, dict[str, NDArray]]:
    """metric -> (T, T) lower ends of the paired 95 % intervals that AC95 asks for; NaN where undefined."""
    names = {"lower_own": own, "lower_independent": bound}
    bounds = {metric: {name: np.full((releases, releases), np.nan) for name in names} for metric in metrics}
    where, gains = [], []
    for metric in metrics:
        for name, reference in names.items():
            for (t, k), cell in own.items():
                old = reference[k, k]
                if k < t and not isinstance(cell, str) and not isinstance(old, str):
                    where.append(bounds[metric][name][t : t + 1, k])
                    gains.append(_values(cell, metric) - _values(old, metric))
    if gains:
        means = statistics.bootstrap_means(np.stack(gains)[:, None], labels.numpy(), seed=0)  # (resamples, gains)
        for cell_bound, value in zip(where, np.quantile(means, 0.025, axis=0)):
            cell_bound[:] = value
    return bounds
