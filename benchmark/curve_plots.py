"""Backfill curves for people: a table of areas in the terminal, and the chart. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.table import Table

from benchmark import catalog, curves
from benchmark.curves import BackfillRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def backfill_table(records: Sequence[BackfillRecord], metric: str) -> Table:
    """Area under each curve in points, mean over seeds, one line for each method and order."""
    table = Table(title=f"{records[0].protocol.id}: mean {metric} in % over the backfill", box=box.SIMPLE_HEAD)
    galleries = curves.galleries(records)
    table.add_column("method, order", overflow="fold")
    for gallery in galleries:
        table.add_column(curves.title(gallery), justify="right")
    for name, what in (("old/old", "old_old"), ("new/new", "new_new")):
        ends = [[getattr(b, what)[metric] for r in records if (b := r.find(t, list(s)))] for t, s in galleries]
        table.add_row(f"[dim]{name} of these methods[/]", *(f"{100 * np.mean(values):.1f}" for values in ends))
    for (name, order), found in curves.by_order(records).items():
        areas = [[curve.area[metric]["all"] for _, curve in found.get(gallery, ())] for gallery in galleries]
        table.add_row(f"{name}, {order}", *(f"{100 * np.mean(one):.1f}" if one else "–" for one in areas))
    table.caption = catalog.RECONSTRUCTION if any(one.mark for one in records) else None
    return table


def backfill_figure(records: Sequence[BackfillRecord], metric: str) -> Figure:
    """A column for each gallery, a row for `metric` and one for mAP; each method by its own order if it has one, else random.

    Mean over seeds.
    """
    from matplotlib.figure import Figure

    found, galleries = curves.by_order(records), curves.galleries(records)
    metrics = list(dict.fromkeys([metric, "map"]))
    names = list(dict.fromkeys(name for name, _ in found))
    height = 3.2 * len(metrics) + 0.8 + 0.05 * len(names)
    figure = Figure(figsize=(4.2 * len(galleries), height), layout="constrained")
    axes = figure.subplots(len(metrics), len(galleries), sharex=True, sharey="row", squeeze=False)
    lines = {}
    for column, (t, stored) in zip(axes.T, galleries):
        for i, name in enumerate(names):
            order = "own" if (name, "own") in found else "random"
            pairs = found[name, order].get((t, stored))
            style = {"color": f"C{i % 10}", "ls": ("-", "--", ":", "-.")[i // 10 % 4], "lw": 1.6}
            for axis, shown in zip(column, metrics):
                if pairs:
                    y = 100 * np.mean([curve.metrics[shown] for _, curve in pairs], axis=0)
                    (lines[f"{name} ({order})"],) = axis.plot(100 * np.array(pairs[0][0].shares), y, **style)
        column[0].set_title(f"gallery of {' and '.join(str(k + 1) for k in stored)}, queries of {t + 1}", fontsize=10)
        column[-1].set_xlabel("re-embedded items, %")
        for axis in column:
            axis.grid(alpha=0.3)
    for axis, shown in zip(axes[:, 0], metrics):
        axis.set_ylabel(f"{shown}, %")
    note = catalog.RECONSTRUCTION if any(one.mark for one in records) else None
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=6, fontsize=8, title=note, title_fontsize=8
    )
    return figure
