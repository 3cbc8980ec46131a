"""The backfill part of a leaderboard's page, from the backfill records in its folders. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmark import catalog, curves, record
from benchmark.curves import Backfill, BackfillRecord, Curve, Gallery
from benchmark.errors import UserError

Pairs = Sequence[tuple[Backfill, Curve]]
TEXT = """\
Accuracy while the gallery is being re-embedded: the mean over the backfill (trapezoid on twentieths), in percent, by the order in
which items are re-embedded. `1→2`: items stored by release 1, queries and new items by release 2; `1,2→3`: half of the items each
by releases 1 and 2. "own" is the order that the method proposes, "class means" needs the labels of the gallery, "oracle distance"
the new embeddings themselves: a reference only. Random: mean of {draws} draws a seed. ± is half the 95 % t interval over the seeds
(n). Query encoders: models that embed each query, at most. Moved: whether all stored vectors pass a map before new queries can
search them. Of `{last}` are the other columns: gain, (area - old/old) / (new/new - old/old); flips, queries right by the old system
and wrong here, mean over the backfill; 22-point mean, FastFill's own area; draws, standard deviation of the area over random
orders; fall, how far the curve is below its own earlier best, at most, mean over seeds; monotone, seeds where that is 0.1 points
at most. Every curve begins and ends in cells of the compatibility matrix, which is checked."""
TOLERANCE = 2e-6  # records keep six digits of a curve


def read(folder: Path) -> list[BackfillRecord]:
    """All backfill records of a leaderboard.

    Raises:
        UserError: one that belongs to another protocol or definition of it, lies in another method's folder, or does not
            begin and end in the cells of its row.
    """
    records = []
    for path in sorted(folder.glob("*/backfill-seed*.json")):
        one = curves.load(path)
        if one.protocol.id != folder.name or one.method.name != path.parent.name:
            raise UserError(f"{path}: is of {one.method.name} on {one.protocol.id}")
        row = path.parent / path.name.removeprefix("backfill-")
        if row.is_file():
            _check_ends(path, one, record.load(row))
        records.append(one)
    if len({one.protocol.sha256 for one in records}) > 1:
        raise UserError(f"{folder}: its backfill records were measured under different definitions of the protocol")
    return records


def _check_ends(path: Path, one: BackfillRecord, row: record.Record) -> None:
    for backfill in one.backfills:
        t, stored = backfill.release, backfill.stored
        for curve in backfill.curves:
            for metric, values in curve.metrics.items():
                matrix = row.matrices[metric]["all"]
                ends = [(values[-1], matrix[t][t])] + ([(values[0], matrix[t][stored[0]])] if len(stored) == 1 else [])
                if any(cell is None or abs(value - cell) > TOLERANCE for value, cell in ends):
                    raise UserError(
                        f"{path}: {metric}, order {curve.order}, does not begin and end in the cells of its row; run "
                        "`compatbench backfill` again"
                    )


def markdown(records: Sequence[BackfillRecord], metric: str) -> str:
    """Text, a table by `metric` and one by mAP."""
    galleries = curves.galleries(records)
    last = [gallery for gallery in galleries if len(gallery[1]) == 1][-1]  # the last update from the release before
    draws = max(curve.draws for curve in records[0].backfills[0].curves)
    parts = [TEXT.format(draws=draws, last=curves.title(last))]
    for shown in dict.fromkeys([metric, "map"]):
        parts += [f"**{shown}**", _table(records, galleries, last, shown)]
    if any(one.mark for one in records):
        parts += [catalog.RECONSTRUCTION]
    return "\n\n".join(parts)


def _table(records: Sequence[BackfillRecord], galleries: Sequence[Gallery], last: Gallery, metric: str) -> str:
    found, lines = curves.by_order(records), []
    for (name, order), by_gallery in found.items():
        pairs = by_gallery.get(last, [])
        gains = [gain for _, curve in pairs if (gain := curve.relative_gain[metric]) is not None]
        spreads = [curve.area_spread for _, curve in pairs if curve.area_spread is not None]
        every = [backfill for held in by_gallery.values() for backfill, _ in held]
        cells = [name, order, str(max(len(held) for held in by_gallery.values()))]
        cells += [str(max(b.query_encoders for b in every)), "yes" if any(b.moved for b in every) else "no"]
        cells += [_interval([curve.area[metric]["all"] for _, curve in by_gallery.get(g, ())]) for g in galleries]
        cells += [_mean(gains, 0, " %") if len(gains) == len(pairs) else "–"]
        cells += [_mean([np.trapezoid(c.negative_flips, b.shares) for b, c in pairs], 1, " %")]
        cells += [_mean([c.fastfill_mean[metric] for _, c in pairs], 1)]
        if metric == records[0].primary_metric:
            cells += [_mean(spreads, 2), _mean([c.greatest_fall for _, c in pairs], 2)]
            cells += [f"{sum(c.monotone for _, c in pairs)}/{len(pairs)}"]
        level = np.mean([curve.area[metric]["all"] for _, curve in pairs]) if pairs else 0.0
        lines.append((-level, cells))
        if order == "own":
            less = {g: _gained(held, found[name, "random"].get(g, []), metric) for g, held in by_gallery.items()}
            shown = [_interval(less.get(gallery, []), sign=True) for gallery in galleries]
            lines.append(
                (-level + 1e-9, [name, "own - random", cells[2], "", "", *shown, *[""] * (len(cells) - 5 - len(shown))])
            )
    head = [
        "method",
        "order",
        "n",
        "query encoders",
        "moved",
        *map(curves.title, galleries),
        "gain",
        "flips",
        "22-point mean",
    ]
    head += ["draws", "fall", "monotone"] if metric == records[0].primary_metric else []
    table = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(table + ["| " + " | ".join(cells) + " |" for _, cells in sorted(lines, key=lambda pair: pair[0])])


def _gained(own: Pairs, random: Pairs, metric: str) -> list[float]:
    """Own order less random order, seed by seed."""
    return [a.area[metric]["all"] - b.area[metric]["all"] for (_, a), (_, b) in zip(own, random)]


def _mean(values: Sequence[float], digits: int, unit: str = "") -> str:
    return f"{100 * np.mean(values):.{digits}f}{unit}" if len(values) else "–"


def _interval(values: Sequence[float], sign: bool = False) -> str:
    if not values:
        return "–"
    mean = f"{100 * np.mean(values):{'+' if sign else ''}.1f}"
    if len(values) < 3:
        return mean
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{mean} ± {100 * half:.1f}"
