"""From rankings to estimates with bounds, and from these to checks: the judgement of an audit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmark import bounds
from benchmark.audit import acceptance
from benchmark.audit.data import Data
from benchmark.audit.ways import ADAPTER, FULL, INDEXED, KS, OLD, Served, Way
from benchmark.bounds import Estimate
from benchmark.neighbours import overlap, search

K = 10  # what is decided by
SLICE_LEAST = 20  # queries of a slice
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


class Judge:
    """Each method gives one part of the report and adds its checks."""

    def __init__(
        self, data: Data, ways: Mapping[str, Way], served: Served, require: Requirements, size: int, seed: int
    ):
        self.data, self.ways, self.served, self.require, self.size, self.seed = data, ways, served, require, size, seed
        self.ks = [k for k in KS if k < data.size]
        self.checks: list[Check] = []
        self.missing: list[str] = []
        self.full = ways.get(FULL)
        self.recall = self._recall()
        if self.full is None:
            self.missing.append(
                "overlap with the full backfill is unknown: give --gallery-new, a random sample of the gallery"
            )
            return
        self.exact = overlap(ways[ADAPTER].top(K), self.full.top(K), K)  # (Nq,) without the index
        self.what, self.chain = f"overlap@{K} with the full backfill", self.exact
        if INDEXED in ways:
            self.what, self.chain = (
                self.what + ", through the index",
                overlap(ways[INDEXED].top(K), self.full.top(K), K),
            )
        elif self.recall:  # |index & full| >= |exact & full| - |exact without index|, query by query
            self.what += ", through the index (at least)"
            self.chain = self.exact + self.recall["adapted queries"][K] - 1

    def _least(self, what: str, found: Estimate, least: float, strictly: bool = False) -> None:
        met = found.lower > least if strictly else found.lower >= least
        self.checks.append(
            Check(what, found, found.lower, f"{'above' if strictly else 'at least'} {least:g}", bool(met))
        )

    def _most(self, what: str, found: Estimate, most: float) -> None:
        self.checks.append(Check(what, found, found.upper, f"at most {most:g}", bool(found.upper <= most)))

    def overlaps(self) -> dict[str, Any]:
        """Way -> k -> overlap@k with the full backfill; and what of it the adapter and the index lose."""
        if self.full is None:
            return {}
        values = {
            (name, k): overlap(way.top(k), self.full.top(k), k)
            for name, way in self.ways.items() for k in self.ks if name != FULL
        }  # fmt: skip
        found = bounds.estimates(values, seed=self.seed)
        report: dict[str, Any] = {name: {k: found[name, k] for k in self.ks} for name in self.ways if name != FULL}
        n = len(self.chain)
        report[FULL] = {k: Estimate(1.0, 1.0, 1.0, n, "by definition") for k in self.ks}
        losses: dict[Any, Values] = {("adapter", k): 1 - values[ADAPTER, k] for k in self.ks}
        if INDEXED in self.ways:
            losses |= {("index", k): values[ADAPTER, k] - values[INDEXED, k] for k in self.ks}
        elif self.recall:
            losses |= {("index", k): 1 - self.recall["adapted queries"][k] for k in self.ks}
        lost = bounds.estimates(losses, least=-1, seed=self.seed)
        parts = ("adapter", "index") if self.recall else ("adapter",)
        self._least(self.what, bounds.estimate(self.chain, least=-1, seed=self.seed), self.require.overlap)
        gain = bounds.estimate(self.exact - values[OLD, K], least=-1, seed=self.seed)
        self._least(f"overlap@{K}: adapter less old model, both exact", gain, 0, strictly=True)
        return {"ways": report, "loss": {part: {k: lost[part, k] for k in self.ks} for part in parts}}

    def _recall(self) -> dict[str, dict[int, Values]]:
        """Whose queries -> k -> (Nq,) share of the exact first k, in all that is searched, that the index finds."""
        index, data, similarity = self.served.index, self.data, self.served.mapping.similarity
        if index is None:
            return {}
        who = {"adapted queries": (self.served.queries, ADAPTER)}
        if self.served.mapping.side == "query":  # on the gallery side the index knows no old vectors
            who["old queries"] = (data.old_queries, OLD)
        recall = {}
        for name, (queries, way) in who.items():
            exact = self.ways[way].rows
            if data.sample is not None:
                exact = search(queries, self.served.gallery, KS[-1], similarity, data.own).rows
            recall[name] = {k: overlap(index.search(queries, k, data.own), exact[:, :k], k) for k in self.ks}
        return recall

    def index(self) -> dict[str, Any] | None:
        """Kind and settings of the index; recall@k against exact search among the same vectors, for old and adapted queries.

        Adapted queries may lie where a graph or a codebook has seen no vectors: then their recall is the lower one.
        """
        index = self.served.index
        if index is None:
            return None
        found = bounds.estimates(
            {(who, k): values for who, by_k in self.recall.items() for k, values in by_k.items()}, seed=self.seed
        )
        recall = {who: {k: found[who, k] for k in by_k} for who, by_k in self.recall.items()}
        return {"kind": index.kind, "settings": index.settings, "recall": recall}

    def sample_bias(self) -> dict[str, Any] | None:
        """What overlap@10 on a sample of n of N items says of all N; None if all are judged.

        A random sample holds each of the first K of all items with probability s = n / N, in either ranking and in what the
        two have in common. So overlap@k of the sample stands for overlap@(k / s) of the whole, up to the luck of the draw,
        which parts the two rankings and so lowers overlap@k where k is small. Whether that is too high depends on how
        overlap changes with depth. An adapter moves scores by some error; the items exchanged across place K are to K as
        the error times the density of scores there is to the share above it: as the hazard rate of the scores. Cosines end
        at 1, their upper tail is lighter than an exponential one, so the hazard rises towards the top and overlap@10 of all
        is lower: the sample is optimistic. Near duplicates, far above all else, make the top places safe: then it is
        pessimistic. So it is measured: overlap@10 of all is read off the sample at depth 10 s, where it errs, if at all, to
        the low side. Where that is less than one item, the line through depths 1 and 4 (in log2) is followed, but never
        upwards: an extrapolation, which only a larger sample proves.
        """
        n, full = self.data.size, self.full
        if full is None or self.size == n:
            return None
        depth = K * n / self.size
        values = {k: overlap(self.ways[ADAPTER].top(k), full.top(k), k) for k in range(1, K + 1)}
        if depth >= 1:
            low = int(depth)
            share = np.log(depth / low) / np.log((low + 1) / low)
            there = (1 - share) * values[low] + share * values[low + 1]
        else:
            there = values[1] - np.log2(1 / depth) * (values[4] - values[1]) / 2
            if there.mean() > values[1].mean():
                there = values[1]
        least = float(there.min()) - 1
        found = bounds.estimate(there + self.chain - self.exact, least=least, seed=self.seed)
        bias = bounds.estimate(self.exact - there, least=-1, seed=self.seed)
        word = (
            "optimistic, at most" if bias.lower > 0 else "pessimistic, at least" if bias.upper < 0 else "fair, within"
        )
        self._least(f"{self.what}, of all {self.size:,} items", found, self.require.overlap)
        return {
            "stands for depth": K / n * self.size, "read off at depth": depth, "extrapolated": depth < 1,
            "in service": found, "too high by": bias,
            "the sample is": word,
        }  # fmt: skip

    def slices(self) -> list[dict[str, Any]]:
        """Overlap@10 of every slice of at least SLICE_LEAST queries, worst first; their bounds hold for all at once."""
        if self.full is None:
            return []
        groups = [
            (column, value, mask)
            for column, values in self.data.slices.items() for value in np.unique(values)
            if (mask := values == value).sum() >= SLICE_LEAST
        ]  # fmt: skip
        found = []
        for column, value, mask in groups:
            estimate = bounds.estimate(self.chain[mask], least=-1, seed=self.seed, error=bounds.ERROR / len(groups))
            found.append({"column": column, "value": value, "overlap": estimate})
        found.sort(key=lambda row: row["overlap"].value)
        if found:
            least = min(found, key=lambda row: row["overlap"].lower)
            name = f"overlap@{K} of every slice (least: {least['column']} = {least['value']})"
            self._least(name, least["overlap"], self.require.slice)
        return found

    def threshold(self, accept: float, far: float) -> dict[str, Any]:
        """The threshold frozen on the old system, and the share of best matches that reach it, way by way."""
        old, labels, similarity = self.ways[OLD], self.data.judged_labels, self.served.mapping.similarity
        assert old.best is not None and old.side is not None
        if labels is None:
            score, frozen = (
                acceptance.threshold_by_share(old.best, accept),
                f"{accept:.0%} of the old best matches pass",
            )
        else:
            score, frozen = (
                acceptance.threshold_by_far(old.side, labels, similarity, far),
                f"FAR {far:g} of the old system",
            )
        passed = {name: (way.best >= score).astype(float) for name, way in self.ways.items() if way.best is not None}
        report: dict[str, Any] = {
            "score": score,
            "frozen at": frozen,
            "accepted": bounds.estimates(passed, seed=self.seed),
        }
        if labels is None:
            change = bounds.estimate(passed[ADAPTER] - passed[OLD], least=-1, seed=self.seed)
            bound = max(change.lower, change.upper, key=abs)
            required = f"within ±{self.require.margin:g}"
            met = bool(abs(bound) <= self.require.margin)
            self.checks.append(Check("share accepted at the frozen threshold: change", change, bound, required, met))
            return report
        pairs = {
            name: acceptance.pairs_at(way.side, labels, similarity, score)
            for name, way in self.ways.items()
            if way.side
        }
        for name, of in (("far", ("impostor_accepted", "impostor")), ("tar", ("genuine_accepted", "genuine"))):
            report[name] = {way: bounds.ratio(*(getattr(p, x) for x in of), seed=self.seed) for way, p in pairs.items()}
        new, before = pairs[ADAPTER], pairs[OLD]
        self._most("FAR at the frozen threshold", report["far"][ADAPTER], self.require.far * far)
        change = bounds.ratio(new.genuine_accepted - before.genuine_accepted, new.genuine, least=-1, seed=self.seed)
        self._least("TAR at the frozen threshold: change", change, -self.require.margin)
        return report

    def labelled(self) -> dict[str, Any] | None:
        """Recall@k, the share of queries with a right item among the first k, of queries that have one; negative flips."""
        labels = self.data.judged_labels
        if labels is None:
            return None
        counts = np.bincount(labels.gallery, minlength=max(labels.queries.max(), labels.gallery.max()) + 1)
        own = (labels.own >= 0) & (labels.gallery[labels.own] == labels.queries)
        kept = counts[labels.queries] - own > 0
        hits = {}
        for name, way in self.ways.items():
            for k in self.ks:
                rows = way.top(k)[kept]
                right = (labels.gallery[rows] == labels.queries[kept, None]) & (rows >= 0)
                hits[name, k] = right.any(1).astype(float)
        found = bounds.estimates(hits, seed=self.seed)
        served = INDEXED if INDEXED in self.ways else ADAPTER
        lost = {name: hits[OLD, 1] * (1 - hits[name, 1]) for name in self.ways if name != OLD}
        flips = bounds.estimates(lost, seed=self.seed)
        change = bounds.estimate(hits[served, 1] - hits[OLD, 1], least=-1, seed=self.seed)
        self._least("recall@1: adapter less old model", change, 0, strictly=True)
        self._most("negative flips", flips[served], self.require.margin)
        return {
            "queries": int(kept.sum()), "dropped": int((~kept).sum()), "negative flips": flips,
            "recall": {name: {k: found[name, k] for k in self.ks} for name in self.ways},
        }  # fmt: skip
