"""Tables and pictures of a leaderboard, computed from its records and nothing else. No torch.

Every record is first checked against its own per-query outputs: a number that these do not give again is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmark import compatibility, outputs, protocol, record, statistics
from benchmark.errors import UserError
from benchmark.files import sha256_file
from benchmark.record import Record

TOLERANCE = 1e-6  # outputs keep AP in float32


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

    def values(self, metric: str, t: int, k: int) -> NDArray:
        """(seeds, queries)"""
        return np.stack([outputs.values(one, metric, t, k) for one in self.outputs])

    def mean(self, metric: str, stratum: str) -> NDArray:
        """T x T mean over seeds."""
        matrices = [np.array(one.matrices[metric][stratum], dtype=float) for one in self.records]
        return np.mean(matrices, 0)


def rows(folder: Path) -> list[Row]:
    """The leaderboard's rows, records checked, fewest bytes first, then best first by AM of the primary metric."""
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
    """Fewest bytes first, then best first by AM."""

    def key(row: Row) -> tuple[int, float]:
        accuracy = compatibility.average_multimodel_accuracy(row.mean(metric, stratum))
        return row.bytes, -(accuracy if accuracy is not None else -1.0)

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


def independent_row(folder: Path, found: Sequence[Row]) -> Row:
    """The bounds of every table."""
    for row in found:
        if row.name == "Independent":
            return row
    raise UserError(f"{folder} has no Independent row, the bounds of every table")


def upgrades(row: Row, metric: str) -> dict[str, statistics.Interval]:
    """Is every step a real upgrade? Intervals of I[t, t] - I[k, k] of independent training, by "k to t" (counted from 1)."""
    labels, releases = row.outputs[0]["labels"], range(len(row.records[0].releases))
    return {
        f"{k + 1} to {t + 1}": statistics.bootstrap(row.values(metric, t, t) - row.values(metric, k, k), labels, seed=0)
        for t in releases
        for k in range(t)
    }


def ranks(found: Sequence[Row], metric: str, mask: NDArray) -> dict[str, str]:
    """Rank of each row among those that store the same bytes: by AM, one rank for rows that cannot be told apart.

    The per-query value behind AM is the mean over the cells of the lower triangle. Below six seeds a row has no rank.
    """
    labels = found[0].outputs[0]["labels"][mask]
    said: dict[str, str] = {}
    for size in {row.bytes for row in found}:
        group = {row.name: _am_values(row, metric)[:, mask] for row in found if row.bytes == size}
        full = {name: values for name, values in group.items() if not statistics.indicative(len(values))}
        said |= dict.fromkeys(group.keys() - full.keys(), "indicative")
        rank = 1
        for tied in statistics.bootstrap_ties(full, labels, seed=0) if full else []:
            said |= {name: f"{rank}=" if len(tied) > 1 else str(rank) for name in tied}
            rank += len(tied)
    return said


def _am_values(row: Row, metric: str) -> NDArray:
    """(seeds, queries)"""
    releases = range(len(row.records[0].releases))
    return np.mean([row.values(metric, t, k) for t in releases for k in range(t + 1)], 0)


def table(folder: Path, found: Sequence[Row], metric: str, stratum: str = "all") -> str:
    """Markdown: one line a method, cells in percent as mean of the seeds, ✓ where a cross cell counts for AC95."""
    independent = independent_row(folder, found)
    mask = outputs.strata(found[0].outputs[0])[stratum]
    releases = len(found[0].records[0].releases)
    pairs = [(t, k) for t in range(releases) for k in range(t + 1)]
    head = ["method", "bytes/item", *(f"{t + 1}→{k + 1}" if k < t else f"{t + 1}/{t + 1}" for t, k in pairs)]
    head += ["AC", "AC95", "AM", "rank", "update gain", "new/new drop", "neg. flips", "images trained", "n"]
    bound = independent.mean(metric, stratum)
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    rank = ranks(found, metric, mask)
    for row in in_order(found, metric, stratum):
        C = row.mean(metric, stratum)
        own, over = outputs.lower_bounds(row.outputs, [row.outputs, independent.outputs], metric, mask, seed=0)
        said = compatibility.summary(C, bound, lower_own=own, lower_independent=over)
        gain, drop = said["mean_update_gain"], [x for x in said["new_to_new_drop"][1:] if x is not None]
        flips = [f["negative"] for one in row.records for f in one.summary[metric][stratum].get("flips", {}).values()]
        cells = [f"{100 * C[t, k]:.1f}{' ✓' if k < t and own[t, k] > 0 and over[t, k] > 0 else ''}" for t, k in pairs]
        lines.append(
            "| "
            + " | ".join(
                [
                    row.name,
                    str(row.bytes),
                    *cells,
                    _percent(said["average_compatibility"]),
                    _percent(said["average_compatibility_95"]),
                    _percent(said["average_multimodel_accuracy"], 1),
                    rank[row.name],
                    "–" if gain is None else f"{100 * gain:+.0f} %",
                    f"{100 * np.mean(drop):+.1f}",
                    f"{100 * np.mean(flips):.1f} %" if flips else "–",
                    f"{(row.records[0].cost.training_images + row.records[0].cost.tuning_images) / 1e6:.2f} M",
                    str(len(row.records)),
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def _percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


LEGEND = """\
Cells are {metric} in percent, mean of n seeds: `2→1` = queries of release 2 against the gallery of release 1, `2/2` = both
by release 2. ✓ = better than the old system (the method's own release and the independent one) by the lower ends of paired
95 % intervals over seeds, classes and queries. AC: share of cross cells above their own old/old, of the mean matrix; AC95:
share with ✓; AM: mean of the lower triangle. Rank: by AM among rows that store the same bytes; `2=` is shared by rows that
a paired bootstrap test cannot tell from the best of them (Holm over the group's pairs, 5 %). Update gain: 100 % = as good
as the oracle's full backfill; a dash where a step is not above 3 points. New/new drop: against the oracle, mean of the new
releases. Negative flips: queries right before the update and wrong after it, mean of the cross cells. Rows of unequal bytes
are not to be compared without their control (BCT-extra for BT2 and OCA). Images trained: all trainings that the row needs
if it is run alone, and the trials of tuned rows."""
