"""What an audit says of service itself: matches at the frozen threshold; with labels recall, negative flips, FAR and TAR.

All of it is counted in the whole gallery that is stored. The best match in a part of it scores lower, and fewer wrong items
stand before the right one, so what the new model has embedded only a sample for is left out here; but for FAR and TAR: these
are shares of pairs, of which a random sample of the gallery holds a fair part.
"""

from __future__ import annotations

from typing import Any

from benchmark import bounds
from benchmark.audit import acceptance
from benchmark.audit.judging import Check, Judge
from benchmark.audit.ways import ADAPTER, INDEXED, KS, OLD, OLD_INDEXED
from benchmark.bounds import Estimate


def threshold(judge: Judge, accept: float, far: float, given: float | None = None) -> dict[str, Any]:
    """The threshold frozen on the old system, and the share of best matches that reach it, way by way.

    Args:
        accept: without labels, frozen where this share of the old system's best matches pass;
        far: with labels, at this false acceptance rate of the old system;
        given: or the one in use: a cosine, or under "l2" a squared distance.
    """
    data, ways, seed, margin = judge.data, judge.ways, judge.seed, judge.require.margin
    old, labels, similarity = ways[OLD], data.all_labels, judge.served.mapping.similarity
    assert old.best is not None and old.side is not None
    if given is not None:
        score, frozen = given if similarity == "cosine" else -given / 2, "the score given"
    elif labels is None:
        score, frozen = acceptance.threshold_by_share(old.best, accept), f"{accept:.4g} of the old best matches pass"
    else:
        score = acceptance.threshold_by_far(old.side, labels, similarity, far)
        frozen = f"FAR {far:g} of the old system"
    passed = {name: (way.best >= score).astype(float) for name, way in ways.items() if way.best is not None}
    report: dict[str, Any] = {
        "score": score if similarity == "cosine" else -2 * score,
        "of": "cosine" if similarity == "cosine" else "squared distance",
        "frozen at": frozen,
        "accepted": bounds.estimates(passed, seed=seed),
    }
    if labels is None:
        change = bounds.estimate(passed[ADAPTER] - passed[OLD], least=-1, seed=seed)
        bound = max(change.lower, change.upper, key=abs)
        met = bool(abs(bound) <= margin)
        what = "share accepted at the frozen threshold: change"
        judge.checks.append(Check(what, change, bound, f"within ±{margin:g}", met))
        return report
    pairs = {}
    for name, way in ways.items():
        those = data.judged_labels if way.sampled else labels
        if way.side and those:
            pairs[name] = acceptance.pairs_at(way.side, those, similarity, score)
    for name, of in (("far", ("impostor_accepted", "impostor")), ("tar", ("genuine_accepted", "genuine"))):
        report[name] = {
            way: bounds.ratio(*(getattr(p, x) for x in of), seed=seed) if getattr(p, of[1]).any() else None
            for way, p in pairs.items()
        }
    before: Estimate = report["far"][OLD]
    base = far if given is None else before.value or before.upper  # of none accepted, as many as that may still be
    judge.most("FAR at the frozen threshold", report["far"][ADAPTER], judge.require.far * base)
    gained = pairs[ADAPTER].genuine_accepted - pairs[OLD].genuine_accepted
    change = bounds.ratio(gained, pairs[OLD].genuine, least=-1, seed=seed)
    judge.least("TAR at the frozen threshold: change", change, -margin)
    return report


def labelled(judge: Judge) -> dict[str, Any] | None:
    """Recall@k, the share of queries with a right item among the first k, of queries that have one; negative flips.

    A way through the index is held against the old model through the same index, where that knows the old vectors; all else
    against the old model's exact search. So no loss of the index is booked to the adapter.
    """
    labels, seed = judge.data.all_labels, judge.seed
    if labels is None:
        return None
    kept, ks = labels.right > 0, [k for k in KS if k < len(labels.gallery)]
    ways = {name: way for name, way in judge.ways.items() if way.whole is not None}
    hits = {}
    for name, way in ways.items():
        for k in ks:
            rows = way.top_of_all(k)[kept]
            right = (labels.gallery[rows] == labels.queries[kept, None]) & (rows >= 0)
            hits[name, k] = right.any(1).astype(float)
    found = bounds.estimates(hits, seed=seed)
    through = OLD_INDEXED in ways
    base = {
        name: OLD_INDEXED if through and name == INDEXED else OLD for name in ways if name not in (OLD, OLD_INDEXED)
    }
    lost = {name: hits[before, 1] * (1 - hits[name, 1]) for name, before in base.items()}
    flips = bounds.estimates(lost, seed=seed)
    new, how = (INDEXED, "both through the index") if through else (ADAPTER, "both exact")
    change = bounds.estimate(hits[new, 1] - hits[base[new], 1], least=-1, seed=seed)
    judge.least(f"recall@1: adapter less old model, {how}", change, 0, strictly=True)
    judge.most(f"negative flips, {how}", flips[new], judge.require.margin)
    return {
        "queries": int(kept.sum()), "dropped": int((~kept).sum()), "gallery": len(labels.gallery),
        "negative flips": flips, "recall": {name: {k: found[name, k] for k in ks} for name in ways},
        "left out": [name for name in judge.ways if name not in ways],
    }  # fmt: skip
