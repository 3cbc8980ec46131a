"""Matrices and summaries for people: in the terminal and as pictures. No torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmark import compatibility
from benchmark.files import write_bytes
from benchmark.record import Record, ordered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHECK, CROSS = "✓", "✗"  # cross cell above / not above the old system's own accuracy


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by row name, in the order in which the rows first appear."""
    rows: dict[str, list[Record]] = {}
    for record in records:
        name = record.method.name if record.method.mode == "chain" else f"{record.method.name} ({record.method.mode})"
        rows.setdefault(name, []).append(record)
    return rows


def mean_matrix(records: Sequence[Record], metric: str, stratum: str, bounds: bool = False) -> NDArray:
    """T x T mean over records, NaN where undefined."""
    kept = [(one.independent if bounds else one.matrices)[metric][stratum] for one in records]
    return np.mean([np.array(matrix, dtype=float) for matrix in kept], 0)


def yardstick(records: Sequence[Record], metric: str, stratum: str) -> NDArray:
    """(T,) old/old that cross cells are held against: the method's own, in pairwise mode the independent one."""
    return np.diag(mean_matrix(records, metric, stratum, bounds=records[0].method.mode == "pairwise"))


# ------------------------------------------------------------------------------------------------------- terminal


def terminal(record: Record, metric: str, strata: Sequence[str] | None = None) -> RenderableType:
    """The compatibility matrix of each stratum; a cross cell is marked where it meets the criterion."""
    names = [release.name for release in record.releases]
    tables: list[RenderableType] = []
    for stratum in strata or ordered(record.matrices[metric]):
        C, old = mean_matrix([record], metric, stratum), yardstick([record], metric, stratum)
        title = (
            f"{record.method.name}, seed {record.seed}: {metric} in %, queries: {stratum} ({record.queries[stratum]:,})"
        )
        table = Table("queries \\ gallery", *names, title=title, title_justify="left")
        for t, name in enumerate(names):
            table.add_row(name, *(_cell(C, old, t, k) for k in range(len(names))))
        tables.append(table)
    return Group(*tables)


def _cell(C: NDArray, old: NDArray, t: int, k: int) -> Text:
    if k > t:
        return Text("")
    if np.isnan(C[t, k]):
        return Text("n/a", style="dim")
    text = f"{100 * C[t, k]:.1f}"
    if k == t:
        return Text(text, style="bold")
    met = C[t, k] > old[k]
    return Text(f"{text} {CHECK if met else CROSS}", style="green" if met else "red")


def summary_table(records: Sequence[Record], metric: str, stratum: str = "all") -> Table:
    """One row a method, mean over its records. Gains and drops are in points unless a column says otherwise."""
    title = f"{records[0].protocol.id}: {metric} in %, queries: {stratum}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    heads = ["old/old", "new/old", "new/new", "AC", "AM", "gain", "drop", "flips", "bytes", "n"]
    table.add_column("method")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for name, rows in by_method(records).items():
        C, bound = mean_matrix(rows, metric, stratum), mean_matrix(rows, metric, stratum, bounds=True)
        old = yardstick(rows, metric, stratum)
        said = compatibility.summary(C, bound, old_old=old)
        last = len(C) - 1
        flips = [f["negative"] for one in rows for f in one.summary[metric][stratum].get("flips", {}).values()]
        gain, drop = said["mean_update_gain"], said["new_to_new_drop"][last]
        table.add_row(
            name,
            _percent(old[0]),
            _percent(C[last, 0]),
            _percent(C[last, last]),
            _percent(said["average_compatibility"], 0),
            _percent(said["average_multimodel_accuracy"]),
            "–" if gain is None else f"{100 * gain:+.0f} %",
            "–" if drop is None else f"{100 * drop:+.1f}",
            f"{100 * np.mean(flips):.1f}" if flips else "–",
            str(rows[0].cost.bytes_per_item[-1]),
            str(len(rows)),
        )
    table.caption = (
        f"new/old: queries of the last release, gallery of the first. AC: share of cross cells above the old system's own "
        f"accuracy ({CHECK}). AM: mean of the lower triangle. gain: 100 % = the oracle's full backfill; – below a 3-point "
        "step. drop: last release against its oracle, points. flips: queries that the upgrade breaks. bytes: per item."
    )
    return table


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or np.isnan(value) else f"{100 * value:.{digits}f}"


# ------------------------------------------------------------------------------------------------------- pictures


def heatmap(record: Record, metric: str, stratum: str = "all") -> Figure:
    """The record's matrix beside that of independent training, on one colour scale."""
    panels: list[tuple[str, NDArray, NDArray | None]] = [
        ("independent training", mean_matrix([record], metric, stratum, bounds=True), None)
    ]
    if record.method.name != "Independent":
        panels.append(
            (record.method.name, mean_matrix([record], metric, stratum), yardstick([record], metric, stratum))
        )
    return _panels(panels, record, f"{record.protocol.id}, seed {record.seed}: {metric} in %, queries: {stratum}")


def matrices_figure(records: Sequence[Record], metric: str, stratum: str = "all") -> Figure:
    """One panel a method, mean over its seeds, on one colour scale."""
    panels = []
    for name, rows in by_method(records).items():
        old = None if name == "Independent" else yardstick(rows, metric, stratum)
        panels.append((name, mean_matrix(rows, metric, stratum), old))
    panels.sort(key=lambda panel: panel[0] != "Independent")
    seeds = max(len(rows) for rows in by_method(records).values())
    how = f"mean of {seeds} seeds" if seeds > 1 else f"seed {records[0].seed}"
    return _panels(panels, records[0], f"{records[0].protocol.id}: {metric} in %, {how}, queries: {stratum}")


def _panels(panels: Sequence[tuple[str, NDArray, NDArray | None]], record: Record, title: str) -> Figure:
    from matplotlib.figure import Figure

    names = [release.name for release in record.releases]
    top = max(float(np.nanmax(matrix)) for _, matrix, _ in panels)
    size, columns = 0.85 * len(names), min(len(panels), 5)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(columns * (size + 0.35) + 1.1, rows * (size + 0.4) + 1.45), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for i, axis in enumerate(axes.flat):
        if i < len(panels):
            _panel(axis, *panels[i], names, top)
        else:
            axis.axis("off")
    figure.suptitle(title, fontsize=12)
    figure.supylabel("queries by", fontsize=10)
    figure.supxlabel("gallery by", fontsize=10)
    if any(old is not None for _, _, old in panels):
        note = f"{CHECK} / {CROSS}  the upgrade beats / does not beat the old system on the untouched gallery"
        figure.text(0.995, 0.005, note, ha="right", va="bottom", fontsize=8, color="0.25")
    return figure


def _panel(axis: Axes, title: str, C: NDArray, old: NDArray | None, names: Sequence[str], top: float) -> None:
    T = len(C)
    shown = np.where(np.tril(np.ones((T, T), bool)), C, np.nan)
    axis.imshow(shown, vmin=0, vmax=top * 1.15, cmap="YlGnBu")
    for t in range(T):
        for k in range(t + 1):
            if np.isnan(C[t, k]):
                axis.text(k, t, "n/a", ha="center", va="center", fontsize=9, color="0.4")
                continue
            mark = "" if k == t or old is None else (f" {CHECK}" if C[t, k] > old[k] else f" {CROSS}")
            color = "white" if C[t, k] > 0.68 * top else "black"
            weight = "bold" if k == t else "normal"
            axis.text(
                k, t, f"{100 * C[t, k]:.1f}{mark}", ha="center", va="center", fontsize=10, color=color, weight=weight
            )
    axis.set_title(title, fontsize=11)
    axis.set_xticks(range(T), names, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(T), names, fontsize=8)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def save(figure: Figure, path: Path) -> None:
    """PNG at 160 dpi, whole file or none, the same bytes for the same figure."""
    write_bytes(path, png(figure))


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()
