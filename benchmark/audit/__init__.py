"""Is an adapter good enough to put a new model into service without re-embedding the gallery? No labels needed.

The reference is the full backfill: what the new queries find in the gallery embedded by the new model, on the sample of the
gallery that both models embedded. Every way to serve is judged by overlap@k with it, the share of its first k items that the
way has among its own first k. Ways: the adapter; the old model as before; two indexes (the old one, and one of those items
that were re-embedded) whose lists are merged by reciprocal rank fusion; the full backfill itself, at overlap 1.

Queries are resampled for the bounds, the gallery is held fixed. All requirements must hold, each at 95 % confidence, so a
wrong GO has a chance of about 5 % at most (an intersection-union test needs no correction for their number).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.adapt import Map, Side, fit
from benchmark.audit.data import Data, read
from benchmark.audit.judging import Judge, Requirements
from benchmark.audit.ways import all_ways, latency, serve
from benchmark.errors import UserError
from benchmark.neighbours import Similarity
from benchmark.vectors import open_vectors

LEAST = 20  # gallery items in the judged sample


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
    """The whole report as JSON values; `benchmark.audit.report` shows it.

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
    data.notes += fitted + (_shared(pairs, data) if pairs else [])
    size = gallery_size or len(data.gallery)
    if size < len(data.gallery):
        raise UserError(f"--gallery-size {size} is less than the {len(data.gallery)} rows of {gallery_old}")
    if data.size < LEAST:
        raise UserError(f"{data.size} gallery items are too few to judge by; embed {LEAST} at least, better thousands")

    served = serve(data, mapping, index, settings)
    ways = all_ways(data, served, dual, size, encoder_rate, seed)
    judge = Judge(data, ways, served, require, size, seed)
    report: dict[str, Any] = {
        "notes": data.notes,
        "sizes": {
            "queries": len(served.queries), "gallery": len(served.gallery), "judged sample": data.size,
            "gallery in service": size,
        },
        "adapter": {
            "method": mapping.adapter.kind, "side": mapping.side, "similarity": mapping.similarity,
            "numbers stored": mapping.adapter.parameters_count, "multiply-adds": mapping.adapter.multiply_adds,
        },
        "overlap": judge.overlaps(),
        "index": judge.index(),
        "sample bias": judge.sample_bias(),
        "slices": judge.slices(),
        "threshold": judge.threshold(accept, far),
        "labelled": judge.labelled(),
        "latency": latency(data, served),
        "costs": {name: way.cost for name, way in ways.items()},
    }  # fmt: skip
    if served.index:
        seconds = served.index.rebuild_seconds(served.gallery) * size / len(served.gallery)
        report["index"]["seconds to add all vectors again"] = seconds
    report["checks"], report["missing"] = judge.checks, judge.missing
    report["verdict"] = "GO" if not judge.missing and all(check.met for check in judge.checks) else "NO-GO"
    return plain(report)


def plain(value: Any) -> Any:
    """As JSON values: named tuples as dicts, keys as text, numbers as Python's own."""
    if hasattr(value, "_asdict"):
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


def _shared(pairs: tuple[Path, Path], data: Data) -> list[str]:
    """A warning where the adapter was fitted to what it is judged on."""
    ids, notes = open_vectors(pairs[0]).ids, []
    gallery_ids = data.gallery_file.ids
    for what, others in (("queries", data.query_ids), ("judged gallery items", gallery_ids)):
        if ids is None or others is None or ids.dtype.kind != others.dtype.kind:
            continue
        both = int(np.isin(data.judged(others) if others is gallery_ids else others, ids).sum())
        if both:
            notes.append(f"{both} {what} are among the pairs that the adapter was fitted on: that flatters it")
    return notes
