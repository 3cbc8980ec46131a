"""Is an adapter good enough to put a new model into service without re-embedding the gallery? No labels needed.

The reference is the full backfill: what the new queries find in the gallery embedded by the new model, on the sample of the
gallery that both models embedded. Every way to serve is judged by overlap@k with it, the share of its first k items that the
way has among its own first k. Ways: the adapter; the old model as before; two indexes (the old one, and one of those items
that were re-embedded) whose lists are merged by reciprocal rank fusion; the full backfill itself, at overlap 1.

Queries are resampled for the bounds, the gallery is held fixed. All requirements must hold, each at 95 % confidence, so a
wrong GO has a chance of about 5 % at most (an intersection-union test needs no correction for their number).

What needs the new model's gallery is judged on the sample; acceptance, recall and flips on all of the stored gallery
(`benchmark.audit.whole`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.adapt import fit
from benchmark.audit.data import read
from benchmark.audit.judging import Judge, Requirements
from benchmark.audit.leaks import fitted_to, leaks
from benchmark.audit.timing import latency, rewriting
from benchmark.audit.ways import INDEXED, OLD_INDEXED, all_ways, dual_name, serve
from benchmark.audit.whole import labelled, threshold
from benchmark.errors import UserError
from benchmark.neighbours import Similarity
from benchmark.serving import Map, Side

LEAST = 20  # gallery items in the judged sample
ACCEPT, FAR = 0.9, 1e-3  # where the threshold is frozen, without labels and with them


def audit(
    queries_old: Path,
    queries_new: Path,
    gallery_old: Path,
    gallery_new: Path | None = None,
    *,
    adapter: Path | None = None,
    pairs: tuple[Path, Path] | None = None,
    methods: Sequence[str] | None = None,
    side: Side | None = None,
    similarity: Similarity | None = None,
    index: Path | None = None,
    settings: str | None = None,
    query_labels: str | None = None,
    gallery_labels: str | None = None,
    slices: Sequence[str] | None = None,
    accept: float | None = None,
    far: float | None = None,
    score: float | None = None,
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
        pairs: (old, new) files to fit `methods` on (None = Procrustes), for `side` (None = query) and `similarity` (None =
            cosine); the best on held-out pairs is audited.
        index: faiss index of what is searched: the old gallery, or on the gallery side the adapted one; `settings` of its
            search as "nprobe=16", None = as it is set.
        query_labels, gallery_labels: .npy or .safetensors with "labels", one for each row of `queries_old` and `gallery_old`;
            or the name of a column, which belongs to the file that holds it.
        slices: columns of the query files; None = all with few values. What was asked for must be judged for a GO.
        accept: without labels, the threshold is frozen where this share of the old system's best matches pass; None = 0.9.
        far: with labels, it is frozen at this false acceptance rate of the old system; None = 0.001.
        score: or the threshold in use: a cosine, under "l2" a squared distance.
        gallery_size: of the gallery in service, if `gallery_old` is a random part of it.
        encoder_rate: items a second of the new encoder, for the time of a full re-embedding.
        dual: shares of the gallery that the second index holds.

    Raises:
        UserError: one line that names the file or argument.
    """
    _check_numbers(accept, far, dual, encoder_rate, seed)
    if score is not None and (accept is not None or far is not None):
        raise UserError("--threshold is the score in use; leave out --accept and --far, which look for one")
    if far is not None and query_labels is None:
        raise UserError("--far needs labels: --query-labels and --gallery-labels; without them give --accept")
    if accept is not None and query_labels is not None:
        raise UserError("--accept is for an audit without labels; with labels give --far")
    if settings and not index:
        raise UserError("--search is a setting of the index; give --index too")
    mapping, fitted = _mapping(adapter, pairs, methods, side, similarity, seed)
    least, most, what = (-1, 1, "cosine") if mapping.similarity == "cosine" else (0, 1e30, "squared distance")
    if score is not None and not least <= score <= most:
        raise UserError(f"--threshold {score:g} is no {what}")
    data = read(queries_old, queries_new, gallery_old, gallery_new, mapping, query_labels, gallery_labels, slices)
    files = (queries_old, queries_new, gallery_old, *([gallery_new] if gallery_new else []))
    data.notes += (
        fitted + (leaks(pairs[0], data) if pairs else []) + ([fitted_to(mapping, adapter, files)] if adapter else [])
    )
    size = len(data.gallery) if gallery_size is None else gallery_size
    if size < len(data.gallery):
        raise UserError(f"--gallery-size {size} is less than the {len(data.gallery)} rows of {gallery_old}")
    if data.size < LEAST:
        raise UserError(f"{data.size} gallery items are too few to judge by; embed {LEAST} at least, better thousands")
    for share in dual:
        if share * data.size < 1:
            raise UserError(f"--dual {share:g} is less than one of the {data.size} gallery items that are judged")

    served = serve(data, mapping, index, settings)
    ways = all_ways(data, served, dual, size, encoder_rate, seed)
    judge = Judge(data, ways, served, require, size, seed)
    report: dict[str, Any] = {
        "notes": data.notes,
        "sizes": {
            "queries": len(served.queries), "gallery": len(served.gallery), "gallery in service": size,
            "judged sample": 0 if data.new is None else data.size,
        },
        "adapter": {
            "method": mapping.adapter.kind, "side": mapping.side, "similarity": mapping.similarity,
            "numbers stored": mapping.adapter.parameters_count, "multiply-adds": mapping.adapter.multiply_adds,
        },
        "overlap": judge.overlaps(),
        "index": judge.index(),
        "sample bias": judge.sample_bias(),
        "slices": judge.slices(),
        "threshold": threshold(judge, accept or ACCEPT, far or FAR, score),
        "labelled": labelled(judge),
        "latency": latency(data, served),
        "writing again": rewriting(served, size),
        "costs": {name: way.cost for name, way in ways.items() if name not in (INDEXED, OLD_INDEXED)},
    }  # fmt: skip
    report["checks"], report["missing"] = judge.checks, judge.missing
    report["verdict"] = "GO" if not judge.missing and all(check.met for check in judge.checks) else "NO-GO"
    return plain(report)


def _check_numbers(
    accept: float | None, far: float | None, dual: Sequence[float], encoder_rate: float | None, seed: int
) -> None:
    for name, share in (("accept", accept), ("far", far), *(("dual", share) for share in dual)):
        if share is not None and not (0 < share < 1 or (share == 1 and name != "far")):
            raise UserError(f"--{name} {share:g} is no share; give one between 0 and 1")
    if len({dual_name(share) for share in dual}) < len(dual):
        raise UserError(f"--dual {' '.join(f'{share:g}' for share in dual)}: two of these are the same share")
    if encoder_rate is not None and not 0 < encoder_rate < float("inf"):
        raise UserError(f"--encoder-rate {encoder_rate:g} must be above 0: items a second")
    if seed < 0:
        raise UserError(f"--seed {seed} must be at least 0")


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
    methods: Sequence[str] | None,
    side: Side | None,
    similarity: Similarity | None,
    seed: int,
) -> tuple[Map, list[str]]:
    """The adapter to audit, and what is to be said of its making."""
    if (adapter is None) == (pairs is None):
        raise UserError("give either a fitted --adapter, or --pairs-old and --pairs-new to fit one on")
    if adapter is not None:
        for name, value in (("method", methods), ("side", side), ("similarity", similarity)):
            if value is not None:
                raise UserError(f"--{name} is for fitting to pairs; {adapter} is fitted and says its own; leave it out")
        return Map.load(adapter), []
    assert pairs is not None
    side, similarity = side or "query", similarity or "cosine"
    fits = fit(*pairs, methods or ["Procrustes"], side=side, similarity=similarity, seed=seed)
    best = fits.ranked[0]
    notes = f"pairs: {fits.note}; {best.adapter.kind} has {best.judged} on held-out pairs"
    return Map(best.adapter, side, similarity, ""), [notes]
