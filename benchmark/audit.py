"""Is an adapter good enough to put a new model into service without re-embedding the gallery? No labels needed.

The reference is the full backfill: what the new queries find in the gallery embedded by the new model, on the sample of the
gallery that both models embedded. Every way to serve is judged by overlap@k with it, the share of its first k items that the
way has among its own first k. Ways: the adapter; the old model as before; two indexes (the old one, and one of those items
that were re-embedded) whose lists are merged by reciprocal rank fusion; the full backfill itself, at overlap 1.

Queries are resampled for the bounds, the gallery is held fixed. All requirements must hold, each at 95 % confidence, so a
wrong GO has a chance of at most 5 % (an intersection-union test needs no correction for their number).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmark import acceptance, bounds
from benchmark.adapt import Map, Side, fit
from benchmark.audit_data import Data, read
from benchmark.bounds import Estimate
from benchmark.errors import UserError
from benchmark.faiss_index import Index
from benchmark.neighbours import Rows, Similarity, fuse, overlap, search
from benchmark.vectors import Array, open_vectors

KS = (1, 10, 100)
K = 10  # what is decided by
ADAPTER, INDEXED, OLD, FULL = "adapter", "adapter and index", "old model only", "full re-embedding"
SLICE_LEAST = 20  # queries of a slice
TIMED = 500  # queries, one at a time
Values = NDArray[np.float64]  # (Nq,)


@dataclass(frozen=True)
class Requirements:
    """What a go needs; the operator's to set."""

    overlap: float = 0.8  # overlap@10 with the full backfill
    slice: float = 0.5  # the same in every slice
    margin: float = 0.05  # change of the share accepted (with labels: loss of TAR), and negative flips
    far: float = 2.0  # with labels: FAR at the frozen threshold, as a multiple of what it was frozen at


class Check(NamedTuple):
    what: str
    found: Estimate
    bound: float  # the bound that decides
    required: str
    met: bool


@dataclass
class Way:
    """One way to serve."""

    rows: Rows  # (Nq, k) of the judged sample, best first
    best: Array | None = None  # (Nq,) score of the best match, where a threshold may meet it
    side: acceptance.Side | None = None  # the vectors that are compared
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
    require: Requirements = Requirements(),  # noqa: B008, frozen
    seed: int = 0,
) -> dict[str, Any]:
    """The whole report as JSON values; `audit_report` shows it.

    Args:
        queries_old, queries_new: the same queries by both models.
        gallery_old: what is stored.
        gallery_new: all of it, or a random sample by id, by the new model. None: nothing can be a go.
        adapter: a file of `compatbench adapt`, which says its side and similarity; or
        pairs: (old, new) files to fit `methods` on; the best on held-out pairs is audited.
        index: faiss index of what is searched: the old gallery, or on the gallery side the adapted one; `settings` of its
            search as "nprobe=16", None = as it is set.
        query_labels, gallery_labels: .npy, .safetensors with "labels", or the name of a column.
        slices: columns of the query files; None = all with few values.
        accept: without labels, the threshold is frozen where so many of the old system's best matches pass.
        far: with labels, it is frozen at this false acceptance rate of the old system.
        gallery_size: of the gallery in service, if `gallery_old` is a random part of it.
        encoder_rate: items a second of the new encoder, for the time of a full re-embedding.
        dual: shares of the gallery that the second index holds.

    Raises:
        UserError: one line that names the file or argument.
    """
    if not all(0 < share <= 1 for share in (accept, *dual)) or not 0 < far < 1:
        raise UserError("--accept, --far and --dual are shares between 0 and 1")
    mapping, fitted = _mapping(adapter, pairs, methods, side, similarity, seed)
    data = read(queries_old, queries_new, gallery_old, gallery_new, mapping, query_labels, gallery_labels, slices)
    data.notes += fitted
    size = gallery_size or len(data.gallery)
    if size < len(data.gallery):
        raise UserError(f"--gallery-size {size} is less than the {len(data.gallery)} rows of {gallery_old}")
    ks = [k for k in KS if k < data.size]
    if ks[-1:] < [K]:
        raise UserError(f"{data.size} gallery items are too few to judge overlap@{K}; embed a larger sample")

    start = time.perf_counter()
    queries = mapping(data.new_queries) if mapping.side == "query" else data.new_queries
    stored = mapping(data.gallery) if mapping.side == "gallery" else data.gallery  # (N, D), what is searched
    mapped_in = (time.perf_counter() - start) / (len(data.gallery) if mapping.side == "gallery" else len(queries))
    opened = None
    if index is not None:
        raw = data.gallery_file.take if mapping.side == "query" else stored.__getitem__
        opened = Index(index, stored, raw, data.gallery_file.ids, mapping.similarity, settings)

    ways = _ways(data, queries, data.judged(stored), mapping, dual, size, encoder_rate, mapped_in, seed)
    reference = ways[FULL].rows if FULL in ways else None
    indexed, recall = _indexed(data, queries, stored, opened, mapping, ks) if opened else (None, {})
    if indexed is not None and data.sample is None:
        ways[INDEXED] = Way(indexed, cost=ways[ADAPTER].cost)
    report: dict[str, Any] = {
        "notes": data.notes,
        "sizes": {
            "queries": len(queries), "gallery": len(stored), "judged sample": data.size, "gallery in service": size,
        },
        "adapter": {
            "method": mapping.adapter.kind, "side": mapping.side, "similarity": mapping.similarity,
            "numbers stored": mapping.adapter.parameters_count, "multiply-adds": mapping.adapter.multiply_adds,
        },
        "ways": {name: dict(way.cost) for name, way in ways.items()},
    }  # fmt: skip
    checks: list[Check] = []
    if reference is not None:
        values = {name: {k: overlap(way.rows, reference, k) for k in ks} for name, way in ways.items()}
        _overlaps(report, checks, data, values, recall, size, ways[ADAPTER].side, mapping, require, seed)
    if opened:
        checks_of_index = {f"{who}, @{k}": value for who, by_k in recall.items() for k, value in by_k.items()}
        report["index"] = {"kind": opened.kind, "settings": opened.settings}
        report["index"]["recall"] = bounds.estimates(checks_of_index, seed=seed)
    _threshold(report, checks, data, ways, mapping, accept, far, require, seed)
    if data.labels is not None:
        _labelled(report, checks, data, ways, ks, require, seed)
    report["latency"] = _latency(data, mapping, stored, opened)
    if opened:
        seconds = opened.rebuild_seconds(stored) * size / len(stored)
        report["index"]["seconds to add all vectors again"] = seconds
    report["checks"] = [check._replace(found=check.found._asdict())._asdict() for check in checks]  # type: ignore[arg-type]
    report["missing"] = [] if reference is not None else ["overlap with the full backfill: give --gallery-new, a sample"]
    report["verdict"] = "GO" if not report["missing"] and all(check.met for check in checks) else "NO-GO"
    return plain(report)


def plain(value: Any) -> Any:
    """As JSON values: named tuples as dicts, keys as text, numbers as Python's own."""
    if isinstance(value, Estimate):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _mapping(
    adapter: Path | None,
    pairs: tuple[Path, Path] | None,
    methods: Sequence[str],
    side: Side,
    similarity: Similarity,
    seed: int,
) -> tuple[Map, list[str]]:
    """The adapter to audit, and what is to be said of its making."""
    if (adapter is None) == (pairs is None):
        raise UserError("give either a fitted --adapter, or --pairs-old and --pairs-new to fit one on")
    if adapter is not None:
        return Map.load(adapter), []
    assert pairs is not None
    fits = fit(*pairs, methods, side=side, similarity=similarity, seed=seed)
    best = fits.ranked[0]
    notes = f"pairs: {fits.note}; {best.adapter.kind} has overlap@10 {best.overlap:.3f} on held-out pairs"
    return Map(best.adapter, side, similarity, ""), [notes]
