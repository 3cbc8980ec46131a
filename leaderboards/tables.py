"""What a leaderboard's records say, computed from them and nothing else: rows, and per stratum lines with intervals. No torch.

Every record is first checked against its own per-query outputs: a number that these do not give again is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmark import catalog, compatibility, outputs, protocol, record, statistics
from benchmark.errors import UserError
from benchmark.files import sha256_file
from benchmark.record import Record
from benchmark.statistics import Interval

TOLERANCE = 1e-6  # outputs keep AP in float32
RESAMPLES = 2000  # of intervals
# Of AM, for each pair of the largest group: Holm at 5 % asks for p-values below 0.05 / pairs, and R resamples give none below
# 2 / (R + 1).
RANK_RESAMPLES = 80
LEVEL = (0.025, 0.975)

COMPATIBLE = "The new release itself is made compatible; gallery untouched"
MAPPED = "Queries are mapped to the old space; gallery untouched"
FUSED = "Queries are embedded by both releases; gallery untouched"
MOVED = "Stored items are moved to the new space"
KINDS = (COMPATIBLE, MAPPED, FUSED, MOVED)  # in the order of the tables

Cell = tuple[int, int]  # (query release, gallery release)


@dataclass(frozen=True)
class Row:
    """All seeds of one method on one leaderboard."""

    name: str
    records: Sequence[Record]
    outputs: Sequence[outputs.Outputs]

    @property
    def bytes(self) -> int:
        """Stored per item by the last release."""
        return self.records[0].cost.bytes_per_item[-1]

    @property
    def moved(self) -> bool:
        """Whether stored items are moved to the new space before it can answer (the forward track)."""
        return self.records[0].cost.vectors_rewritten > 0

    @property
    def query_encoders(self) -> int:
        """Run for each query, at most."""
        return self.records[0].cost.query_encoders

    @property
    def kind(self) -> str:
        """Under which heading of `KINDS` the row stands."""
        if self.moved:
            return MOVED
        if self.query_encoders > 1:
            return FUSED
        return MAPPED if self.records[0].links else COMPATIBLE

    @property
    def rivals(self) -> tuple[bool, int, int]:
        """Ranked among each other are rows that have this in common."""
        return self.moved, self.query_encoders, self.bytes

    @property
    def shown(self) -> str:
        """The name in tables, with the mark of a reconstruction."""
        return self.name + catalog.mark(self.records[0].method.reference)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(one.seed for one in self.records)

    @property
    def pairwise(self) -> bool:
        """Whether the old release of every step is the independent one, not the method's own."""
        return self.records[0].method.mode == "pairwise"

    def cells(self) -> list[Cell]:
        """Those that are defined, the lower triangle row by row."""
        T = len(self.records[0].releases)
        return [(t, k) for t in range(T) for k in range(t + 1) if f"first/{t}/{k}" in self.outputs[0]]

    def only(self, seeds: Sequence[int]) -> Row:
        """The same row with these seeds, in this order."""
        at = {seed: i for i, seed in enumerate(self.seeds)}
        if missing := [seed for seed in seeds if seed not in at]:
            raise UserError(
                f"{self.name} has no seed {missing[0]}, which another row has; run it, rows are paired by seed"
            )
        kept = [at[seed] for seed in seeds]
        return replace(self, records=[self.records[i] for i in kept], outputs=[self.outputs[i] for i in kept])

    def values(self, metric: str, t: int, k: int) -> NDArray:
        """(seeds, queries)"""
        return np.stack([outputs.values(one, metric, t, k) for one in self.outputs])

    def mean(self, metric: str, stratum: str) -> NDArray:
        """T x T mean over seeds."""
        matrices = [np.array(one.matrices[metric][stratum], dtype=float) for one in self.records]
        return np.mean(matrices, 0)


def rows(folder: Path) -> list[Row]:
    """The leaderboard's rows, records checked, kind by kind, fewest bytes first, then best first by AM."""
    found = []
    for entry in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "old"):
        files = sorted(entry.glob("seed*.json"))
        if files:
            records = [record.load(file) for file in files]
            found.append(Row(entry.name, records, [checked(file, one) for file, one in zip(files, records)]))
    if found and len({one.protocol.sha256 for row in found for one in row.records}) > 1:
        raise UserError(f"{folder}: its records were measured under different definitions of the protocol")
    return in_order(found, protocol.load(folder).primary_metric, "all")


def in_order(found: Sequence[Row], metric: str, stratum: str) -> list[Row]:
    """Kind by kind, fewest bytes first, then best first by AM."""

    def key(row: Row) -> tuple[int, int, float]:
        accuracy = compatibility.average_multimodel_accuracy(row.mean(metric, stratum))
        return KINDS.index(row.kind), row.bytes, -(accuracy if accuracy is not None else -1.0)

    return sorted(found, key=key)


def checked(file: Path, one: Record) -> outputs.Outputs:
    """The record's outputs, after recomputing its matrices from them."""
    (name, sha), *_ = one.outputs.items()
    if sha256_file(file.parent / name) != sha:
        raise UserError(f"{file.parent / name} is not the file that {file.name} was made from")
    arrays = outputs.load(file.parent / name)
    for metric, by_stratum in one.matrices.items():
        for stratum, mask in outputs.strata(arrays).items():
            recorded = np.array(by_stratum[stratum], dtype=float)
            if not np.allclose(outputs.matrix(arrays, metric, mask), recorded, rtol=0, atol=TOLERANCE, equal_nan=True):
                raise UserError(f"{file}: {metric} on {stratum} is not what its per-query outputs give")
    return arrays


def best(found: Sequence[Row], count: int) -> list[Row]:
    """Independent, and the `count` best rows of each kind and size, in the order given, which is best first."""
    groups: dict[tuple[str, int], list[str]] = {}
    for row in found:
        groups.setdefault((row.kind, row.bytes), []).append(row.name)
    kept = {name for names in groups.values() for name in names[:count]} | {"Independent"}
    return [row for row in found if row.name in kept]


def independent_row(found: Sequence[Row]) -> Row:
    """The bounds of every table."""
    for row in found:
        if row.name == "Independent":
            return row
    raise UserError("the leaderboard has no Independent row, the bounds of every table")


def upgrades(row: Row, metric: str) -> dict[str, Interval]:
    """Is every step a real upgrade? Intervals of I[t, t] - I[k, k] of independent training, by "k to t" (counted from 1)."""
    labels, releases = row.outputs[0]["labels"], range(len(row.records[0].releases))
    return {
        f"{k + 1} to {t + 1}": statistics.bootstrap(row.values(metric, t, t) - row.values(metric, k, k), labels, seed=0)
        for t in releases
        for k in range(t)
    }


# --------------------------------------------------------------------------------------------------------------- lines


@dataclass(frozen=True)
class Line:
    """One method on one stratum by one metric, shares in [0, 1]; None and absent where undefined.

    Intervals are 95 % percentile intervals over seeds, classes and queries (`statistics.bootstrap_means`).
    """

    row: Row
    cells: Mapping[Cell, Interval]
    passed: frozenset[Cell]  # cross cells that count for AC95
    oracle: Sequence[float]  # I[t, t]: queries and gallery by the independent release t
    ac: float | None
    ac95: float | None
    am: Interval | None
    rank: str
    gain: Interval | None  # update gain, mean of the cross cells
    drop: Interval | None  # C[t, t] - I[t, t], mean of the new releases
    flips: Interval | None  # negative flips, mean of the cross cells


def lines(found: Sequence[Row], metrics: Sequence[str], stratum: str) -> dict[str, list[Line]]:
    """By metric a line for each row, in the order of the table. All rows share the resamples, as they share the queries."""
    independent = independent_row(found)
    mask = outputs.strata(found[0].outputs[0])[stratum]
    rank = ranks(found, metrics, mask)
    made: dict[str, dict[str, Line]] = {metric: {} for metric in metrics}
    for seeds in dict.fromkeys(row.seeds for row in found):
        bound, group = independent.only(seeds), [row for row in found if row.seeds == seeds]
        drawn = _resampled(group, bound, metrics, mask)
        for metric in metrics:
            for row in group:
                made[metric][row.name] = _line(row, bound, metric, stratum, rank[metric][row.name], drawn)
    return {metric: [made[metric][row.name] for row in in_order(found, metric, stratum)] for metric in metrics}


def ranks(found: Sequence[Row], metrics: Sequence[str], mask: NDArray) -> dict[str, dict[str, str]]:
    """By metric the rank of each row among its `rivals`, which store the same bytes, run as many query encoders and treat the
    gallery alike (untouched, or moved): by AM, one rank for rows that cannot be told apart.

    The per-query value behind AM is the mean over the cells of the lower triangle. Ranked are rows of at least six seeds,
    the same as Independent's; others are "indicative". A row with an undefined cell has no AM and no rank.
    """
    seeds = independent_row(found).seeds
    labels = found[0].outputs[0]["labels"][mask]
    releases = len(found[0].records[0].releases)
    whole = {row.name: len(row.cells()) == releases * (releases + 1) // 2 for row in found}
    full = [row for row in found if whole[row.name] and row.seeds == seeds and not statistics.indicative(len(seeds))]
    said = {metric: {name: "indicative" if kept else "–" for name, kept in whole.items()} for metric in metrics}
    if not full:
        return said
    values = np.stack(
        [np.mean([row.values(m, *at)[:, mask] for at in row.cells()], 0) for m in metrics for row in full]
    )
    groups = [row.rivals for row in full]
    pairs = max(groups.count(alike) * (groups.count(alike) - 1) // 2 for alike in groups)
    drawn = statistics.bootstrap_means(values, labels, seed=0, resamples=max(10_000, RANK_RESAMPLES * pairs))
    for i, metric in enumerate(metrics):
        column = {row.name: i * len(full) + j for j, row in enumerate(full)}
        for alike in set(groups):
            group = [row.name for row in full if row.rivals == alike]
            rank, means = 1, {name: float(np.nanmean(values[column[name]])) for name in group}
            for tied in statistics.ties_of_resamples(means, {name: drawn[:, column[name]] for name in group}):
                said[metric] |= {name: f"{rank}=" if len(tied) > 1 else str(rank) for name in tied}
                rank += len(tied)
    return said


# (metric, row, cell or "flips") -> (resamples,); the row "" is Independent with the same seeds
Resampled = Mapping[tuple[str, str, Cell | str], NDArray]


def _resampled(group: Sequence[Row], bound: Row, metrics: Sequence[str], mask: NDArray) -> Resampled:
    """Bootstrap distributions of everything that a line is made of, in one call: the resamples are most of the cost."""
    values: dict[tuple[str, str, Cell | str], NDArray] = {}
    for metric in metrics:
        for name, row in (("", bound), *((row.name, row) for row in group)):
            per_cell = {at: row.values(metric, *at)[:, mask] for at in row.cells()}
            values |= {(metric, name, at): value for at, value in per_cell.items()}
            if metric.startswith("cmc") and name:
                before = {k: values[metric, "", (k, k)] if row.pairwise else per_cell[k, k] for _, k in per_cell}
                lost = [before[k] * (1 - per_cell[t, k]) for t, k in per_cell if k < t]  # hit before, missed after
                if lost:
                    values[metric, name, "flips"] = np.mean(lost, 0)
    labels = bound.outputs[0]["labels"][mask]
    drawn = statistics.bootstrap_means(np.stack(list(values.values())), labels, seed=0, resamples=RESAMPLES)
    return dict(zip(values, drawn.T))


def _line(row: Row, bound: Row, metric: str, stratum: str, rank: str, drawn: Resampled) -> Line:
    C, independent = row.mean(metric, stratum), bound.mean(metric, stratum)
    T, defined = len(C), row.cells()
    yardstick = "" if row.pairwise else row.name  # whose old/old users had the day before
    old = {k: drawn[metric, yardstick, (k, k)] for k in range(T)}
    own, over = np.full((T, T), np.nan), np.full((T, T), np.nan)
    gains = []
    cross = [(t, k) for t, k in defined if k < t]
    for t, k in cross:
        new, oracle = drawn[metric, row.name, (t, k)], drawn[metric, "", (t, t)]
        own[t, k] = np.quantile(new - old[k], LEVEL[0])
        over[t, k] = np.quantile(new - drawn[metric, "", (k, k)], LEVEL[0])
        with np.errstate(divide="ignore", invalid="ignore"):  # of a step too small to be shown
            gains.append((new - old[k]) / (oracle - old[k]))
    said = compatibility.summary(
        C,
        independent,
        old_old=np.diag(independent) if row.pairwise else None,
        lower_own=own,
        lower_independent=over,
    )

    def interval(mean: float | None, parts: Sequence[NDArray]) -> Interval | None:
        """Of the mean of several quantities on the same resamples."""
        if mean is None:
            return None
        lower, upper = np.quantile(np.mean(parts, 0), LEVEL)
        return Interval(mean, float(lower), float(upper), len(row.seeds))

    cells = {at: interval(float(C[at]), [drawn[metric, row.name, at]]) for at in defined}
    drops = [drawn[metric, row.name, (t, t)] - drawn[metric, "", (t, t)] for t in range(1, T)]
    flips = [f["negative"] for one in row.records for f in one.summary[metric][stratum].get("flips", {}).values()]
    return Line(
        row=row,
        cells={at: one for at, one in cells.items() if one},
        passed=frozenset((t, k) for t, k in cross if own[t, k] > 0 and over[t, k] > 0),
        oracle=[float(value) for value in np.diag(independent)],
        ac=said["average_compatibility"],
        ac95=said["average_compatibility_95"],
        am=interval(said["average_multimodel_accuracy"], [drawn[metric, row.name, at] for at in defined]),
        rank=rank,
        gain=interval(said["mean_update_gain"], gains),
        drop=interval(float(np.mean(said["new_to_new_drop"][1:])), drops) if drops else None,
        flips=interval(float(np.mean(flips)), [drawn[metric, row.name, "flips"]]) if flips else None,
    )
