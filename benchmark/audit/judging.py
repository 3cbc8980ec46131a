"""From rankings to estimates with bounds, and from these to checks: the judgement of an audit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmark import bounds
from benchmark.audit.data import Data
from benchmark.audit.ways import ADAPTER, FULL, INDEXED, KS, OLD, OLD_INDEXED, Served, Way
from benchmark.bounds import Estimate
from benchmark.errors import UserError
from benchmark.neighbours import overlap

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

    def __post_init__(self) -> None:
        """Raises UserError where a share is none."""
        for name, value in (("require-overlap", self.overlap), ("require-slice", self.slice), ("margin", self.margin)):
            if not 0 <= value <= 1:
                raise UserError(f"--{name} {value:g} is no share; give one from 0 to 1, as 0.8 for 80 %")


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
        self.who = "adapted queries" if served.mapping.side == "query" else "new queries"
        self.recall = self._recall()
        if self.full is None:
            self.missing.append(
                "overlap with the full backfill is unknown: give --gallery-new, a random sample of the gallery"
            )
            return
        self.exact = overlap(ways[ADAPTER].top(K), self.full.top(K), K)  # (Nq,) without the index
        self.what, self.chain = f"overlap@{K} with the full backfill", self.exact
        if INDEXED in ways and not data.sampled:
            self.what, self.chain = (
                self.what + ", through the index",
                overlap(ways[INDEXED].top(K), self.full.top(K), K),
            )
        elif self.recall:  # |index & full| >= |exact & full| - |exact without index|, query by query
            self.what += ", through the index (at least)"
            self.chain = self.exact + self.recall[self.who][K] - 1

    def least(self, what: str, found: Estimate, least: float, strictly: bool = False) -> None:
        met = found.lower > least if strictly else found.lower >= least
        self.checks.append(
            Check(what, found, found.lower, f"{'above' if strictly else 'at least'} {least:.3g}", bool(met))
        )

    def most(self, what: str, found: Estimate, most: float) -> None:
        self.checks.append(Check(what, found, found.upper, f"at most {most:.3g}", bool(found.upper <= most)))

    def overlaps(self) -> dict[str, Any]:
        """Way -> k -> overlap@k with the full backfill; and what of it the adapter and the index lose."""
        if self.full is None:
            return {}
        judged = {name: way for name, way in self.ways.items() if way.sample is not None and name != FULL}
        values = {
            (name, k): overlap(way.top(k), self.full.top(k), k) for name, way in judged.items() for k in self.ks
        }  # fmt: skip
        found = bounds.estimates(values, seed=self.seed)
        report: dict[str, Any] = {name: {k: found[name, k] for k in self.ks} for name in judged}
        n = len(self.chain)
        report[FULL] = {k: Estimate(1.0, 1.0, 1.0, n, "by definition") for k in self.ks}
        losses: dict[Any, Values] = {("adapter", k): 1 - values[ADAPTER, k] for k in self.ks}
        if INDEXED in judged:
            losses |= {("index", k): values[ADAPTER, k] - values[INDEXED, k] for k in self.ks}
        elif self.recall:
            losses |= {("index", k): 1 - self.recall[self.who][k] for k in self.ks}
        lost = bounds.estimates(losses, least=-1, seed=self.seed)
        parts = ("adapter", "index") if self.recall else ("adapter",)
        chain = bounds.clipped(bounds.estimate(self.chain, least=-1, seed=self.seed))
        self.least(self.what, chain, self.require.overlap)
        gain = bounds.estimate(self.exact - values[OLD, K], least=-1, seed=self.seed)
        self.least(f"overlap@{K}: adapter less old model, both exact", gain, 0, strictly=True)
        return {"ways": report, "loss": {part: {k: lost[part, k] for k in self.ks} for part in parts}}

    def _recall(self) -> dict[str, dict[int, Values]]:
        """Whose queries -> k -> (Nq,) share of the exact first k, in all that is searched, that the index finds."""
        pairs = {self.who: (INDEXED, ADAPTER), "old queries": (OLD_INDEXED, OLD)}
        ks = [k for k in KS if k < len(self.data.gallery)]
        return {
            who: {k: overlap(self.ways[index].top_of_all(k), self.ways[exact].top_of_all(k), k) for k in ks}
            for who, (index, exact) in pairs.items() if index in self.ways
        }  # fmt: skip

    def index(self) -> dict[str, Any] | None:
        """Kind and settings of the index; recall@k against exact search among the same vectors, for old and adapted (on the
        gallery side: new) queries.

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
        exact = float(self.exact.mean())
        least, most = float(there.min()) - 1, float(there.max())
        found = bounds.estimate(there + self.chain - self.exact, least=least, most=most, seed=self.seed)
        found = bounds.clipped(found)
        bias = bounds.estimate(self.exact - there, least=-most, most=1 - least, seed=self.seed)
        bias = bounds.clipped(bias, exact - 1, exact)  # overlap@10 of all is a share as well
        word = "optimistic" if bias.lower > 0 else "pessimistic" if bias.upper < 0 else "fair"
        self.least(f"{self.what}, of all {self.size:,} items", found, self.require.overlap)
        return {
            "stands for depth": K / n * self.size, "read off at depth": depth, "extrapolated": depth < 1,
            "in service": found, "too high by": bias, "the sample is": word,
        }  # fmt: skip

    def slices(self) -> dict[str, Any]:
        """Overlap@10 of every slice of at least SLICE_LEAST queries, worst first; their bounds hold for all at once.

        Smaller ones are named with their number of queries. A column that was asked for and has only such ones is missing.
        """
        if self.full is None:
            return {"judged": [], "too small": []}
        groups, small = [], []
        for column, values in self.data.slices.items():
            masks = [(column, value, values == value) for value in np.unique(values)]
            large = [group for group in masks if group[2].sum() >= SLICE_LEAST]
            small += [
                {"column": column, "value": value, "n": int(mask.sum())}
                for _, value, mask in masks if mask.sum() < SLICE_LEAST
            ]  # fmt: skip
            groups += large
            if self.data.asked and not large:
                self.missing.append(f"slice {column}: none of its {len(masks)} groups has {SLICE_LEAST} queries")
        found = []
        for column, value, mask in groups:
            estimate = bounds.estimate(self.chain[mask], least=-1, seed=self.seed, error=bounds.ERROR / len(groups))
            found.append({"column": column, "value": value, "overlap": bounds.clipped(estimate)})
        found.sort(key=lambda row: row["overlap"].value)
        if found:
            least = min(found, key=lambda row: row["overlap"].lower)
            name = f"overlap@{K} of every slice (least: {least['column']} = {least['value']})"
            self.least(name, least["overlap"], self.require.slice)
        return {"judged": found, "too small": sorted(small, key=lambda row: -row["n"])}
