"""The backfill part of a leaderboard's page, from the backfill records in its folders. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmark import curves
from benchmark.curves import Backfill, BackfillRecord, Curve
from benchmark.errors import UserError

TEXT = """\
Accuracy while the gallery is being re-embedded: the mean of {metric} over the backfill (trapezoid on twentieths), in percent, by
the order in which items are re-embedded. `1→2`: items stored by release 1, queries and new items by release 2; `1,2→3`: half of
the items each by releases 1 and 2. "own" is the order that the method proposes, "class means" needs the labels of the gallery,
"oracle distance" the new embeddings themselves: a reference only. Random: mean of {draws} draws a seed. ± is half the 95 % t
interval over the seeds. Gain: (area - old/old) / (new/new - old/old) of `{last}`. Flips: queries right by the old system and wrong
here, mean over the backfill of `{last}`. Monotone: seeds whose curve of `{last}` never falls by more than 0.1 points. 22-point
mean: FastFill's own area. RQT and its variants are a reconstruction (the paper's body was not available)."""


def read(folder: Path) -> list[BackfillRecord]:
    """All backfill records of a leaderboard.

    Raises:
        UserError: one that belongs to another protocol or definition of it, or lies in another method's folder.
    """
    records = []
    for path in sorted(folder.glob("*/backfill-seed*.json")):
        record = curves.load(path)
        if record.protocol.id != folder.name or record.method.name != path.parent.name:
            raise UserError(f"{path}: is of {record.method.name} on {record.protocol.id}")
        records.append(record)
    if len({record.protocol.sha256 for record in records}) > 1:
        raise UserError(f"{folder}: its backfill records were measured under different definitions of the protocol")
    return records


def markdown(records: Sequence[BackfillRecord], metric: str) -> str:
    """Text and table."""
    galleries = [(b.release, tuple(b.stored)) for b in records[0].backfills]
    names = [f"{','.join(str(k + 1) for k in stored)}→{t + 1}" for t, stored in galleries]
    last = max(
        i for i, (_, stored) in enumerate(galleries) if len(stored) == 1
    )  # the last update from the release before
    draws = max(c.draws for c in records[0].backfills[0].curves)
    lines = []
    for (name, order), by_gallery in _grouped(records, galleries).items():
        pairs = by_gallery[last]
        gains = [curve.relative_gain[metric] for _, curve in pairs]
        known = [g for g in gains if g is not None]
        cells = [name, order, str(pairs[0][0].query_encoders)]
        cells += [_interval([curve.area[metric]["all"] for _, curve in found]) for found in by_gallery]
        cells += [f"{100 * np.mean(known):.0f} %" if len(known) == len(gains) else "–"]
        cells += [f"{100 * np.mean([np.trapezoid(c.negative_flips, b.shares) for b, c in pairs]):.1f} %"]
        cells += [f"{100 * np.mean([c.fastfill_mean[metric] for _, c in pairs]):.1f}"]
        cells += [f"{sum(c.monotone for _, c in pairs)}/{len(pairs)}"]
        lines.append((-np.mean([c.area[metric]["all"] for _, c in pairs]), cells))
        if order == "own":
            lines.append((lines[-1][0] + 1e-9, _difference(records, galleries, name, metric)))
    head = ["method", "order", "query encoders", *names, "gain", "flips", "22-point mean", "monotone"]
    table = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    table += ["| " + " | ".join(cells) + " |" for _, cells in sorted(lines, key=lambda pair: pair[0])]
    return TEXT.format(metric=metric, draws=draws, last=names[last]) + "\n\n" + "\n".join(table)


Found = dict[tuple[str, str], list[list[tuple[Backfill, Curve]]]]


def _grouped(records: Sequence[BackfillRecord], galleries: Sequence[tuple[int, tuple[int, ...]]]) -> Found:
    """(method, order) -> for each gallery the curve of every seed."""
    found: Found = {}
    for record in records:
        for i, (t, stored) in enumerate(galleries):
            backfill = record.find(t, list(stored))
            for curve in backfill.curves:
                row = found.setdefault((record.method.name, curve.order), [[] for _ in galleries])
                row[i].append((backfill, curve))
    return found


def _difference(
    records: Sequence[BackfillRecord], galleries: Sequence[tuple[int, tuple[int, ...]]], name: str, metric: str
) -> list[str]:
    """Own order less random order, seed by seed."""
    cells = [name, "own - random", ""]
    for t, stored in galleries:
        values = []
        for record in records:
            if record.method.name == name:
                by_order: Mapping[str, Curve] = {c.order: c for c in record.find(t, list(stored)).curves}
                values.append(by_order["own"].area[metric]["all"] - by_order["random"].area[metric]["all"])
        cells.append(_interval(values, sign=True))
    return [*cells, "", "", "", ""]


def _interval(values: Sequence[float], sign: bool = False) -> str:
    mean = f"{100 * np.mean(values):{'+' if sign else ''}.1f}"
    if len(values) < 3:
        return mean
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{mean} ± {100 * half:.1f}"
