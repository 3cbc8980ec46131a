"""Matrices and summaries for people: in the terminal and as pictures. No torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich import box, get_console
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmark import catalog, compatibility
from benchmark.errors import UserError
from benchmark.files import write_bytes
from benchmark.protocol import digest
from benchmark.record import Record, ordered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHECK, CROSS = "✓", "✗"  # cross cell above / not above the old system's own accuracy
WIDE = 110  # columns of a terminal that holds the whole summary


def label(record: Record) -> str:
    """The row a record belongs to: its method, and all that keeps it from being averaged with the method's plain rows."""
    method, protocol = record.method, record.protocol
    name = f"{method.name}+{digest(method.hyperparameters)[:6]}" if method.settings == "custom" else method.name
    marks = [method.mode] * (method.mode != "chain") + [protocol.split] * (protocol.split != "test")
    marks += [f"off-protocol {protocol.sha256[:6]}"] * bool(protocol.overrides)
    return f"{name} ({', '.join(marks)})" if marks else name


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by row, in the order in which the rows first appear.

    Raises:
        UserError: they are of several sequences, whose numbers do not belong in one table.
    """
    sequences = {f"{one.protocol.id}: {' -> '.join(r.name for r in one.releases)}" for one in records}
    if len(sequences) > 1:
        raise UserError(f"records of several sequences ({'; '.join(sorted(sequences))}); name the folder of one")
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(label(record), []).append(record)
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
        title = f"{label(record)}, seed {record.seed}: {metric} in %, queries: {stratum} ({record.queries[stratum]:,})"
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
    text = f"{100 * C[t, k]:5.1f}"
    if k == t:
        return Text(text, style="bold")
    met = C[t, k] > old[k]
    return Text(f"{text} {CHECK if met else CROSS}", style="green" if met else "red")


def summary_table(records: Sequence[Record], metric: str, stratum: str = "all") -> Table:
    """One row a method, mean over its records. In a terminal of less than `WIDE` columns the side figures stay out.

    AC95 is a record's own, so it is shown for single seeds; over several seeds it needs the per-query outputs.

    Raises:
        UserError: the records are of several sequences.
    """
    rows = by_method(records)
    wide = get_console().width >= WIDE
    columns = ["old/old", "new/old", "new/new", *["oracle"] * wide, "AC"]
    columns += ["AC95"] * (wide and all(len(group) == 1 for group in rows.values()))
    columns += ["AM", "gain", "drop", "flips", "bytes", *["train s"] * wide, "n"]
    title = f"{records[0].protocol.id}: {metric} in %, queries: {stratum}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, group in rows.items():
        figures = _figures(group, metric, stratum)
        mark = catalog.mark(group[0].method.reference)
        table.add_row(name + mark, *(figures[column] for column in columns))
    table.caption_justify = "left"
    table.caption = (
        f"new/old: queries of the last release, gallery of the first. AC: share of cross cells above the old system's own "
        f"accuracy ({CHECK}). AM: mean of the lower triangle. gain: 100 = the oracle's full backfill; – below a 3-point "
        "step. drop: last release against its oracle, points. flips: queries that the upgrade breaks. bytes: per item."
    )
    if "AC95" in columns:
        table.caption += " AC95: as AC, beyond the queries' 95 % intervals, also against independent training."
    if any(catalog.mark(group[0].method.reference) for group in rows.values()):
        table.caption += f" {catalog.RECONSTRUCTION}."
    return table


def _figures(group: Sequence[Record], metric: str, stratum: str) -> dict[str, str]:
    """What `summary_table` may show of one row."""
    C, bound = mean_matrix(group, metric, stratum), mean_matrix(group, metric, stratum, bounds=True)
    old = yardstick(group, metric, stratum)
    said = compatibility.summary(C, bound, old_old=old)
    last = len(C) - 1
    flips = [f["negative"] for one in group for f in one.summary[metric][stratum].get("flips", {}).values()]
    gain, drop = said["mean_update_gain"], said["new_to_new_drop"][last]
    return {
        "old/old": _percent(old[0]),
        "new/old": _percent(C[last, 0]),
        "new/new": _percent(C[last, last]),
        "oracle": _percent(bound[last, last]),
        "AC": _percent(said["average_compatibility"], 0),
        "AC95": _percent(group[0].summary[metric][stratum]["average_compatibility_95"], 0),
        "AM": _percent(said["average_multimodel_accuracy"]),
        "gain": "–" if gain is None else f"{100 * gain:+.0f}",
        "drop": "–" if drop is None else f"{100 * drop:+.1f}",
        "flips": f"{100 * np.mean(flips):.1f}" if flips else "–",
        "bytes": str(group[0].cost.bytes_per_item[-1]),
        "train s": f"{np.mean([one.timing.training_seconds for one in group]):,.0f}",
        "n": str(len(group)),
    }


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or np.isnan(value) else f"{100 * value:.{digits}f}"


# ------------------------------------------------------------------------------------------------------- pictures


Panel = tuple[str, NDArray, NDArray]  # title, T x T matrix, (T,) old/old


def heatmap(record: Record, metric: str, stratum: str = "all") -> Figure:
    """The record's matrix beside that of independent training, on one colour scale."""
    bound = mean_matrix([record], metric, stratum, bounds=True)
    panels: list[Panel] = [("independent training", bound, np.diag(bound))]
    if label(record) != "Independent":
        panels.append((label(record), mean_matrix([record], metric, stratum), yardstick([record], metric, stratum)))
    return _panels(panels, record, f"{record.protocol.id}, seed {record.seed}: {metric} in %, queries: {stratum}")


def matrices_figure(records: Sequence[Record], metric: str, stratum: str = "all") -> Figure:
    """One panel a method, mean over its seeds, independent training first, on one colour scale.

    Raises:
        UserError: the records are of several sequences.
    """
    rows = by_method(records)
    counts = {len(group) for group in rows.values()}
    panels: list[Panel] = []
    for name, group in sorted(rows.items(), key=lambda row: row[0] != "Independent"):
        title = name if len(counts) == 1 else f"{name} (n = {len(group)})"
        panels.append((title, mean_matrix(group, metric, stratum), yardstick(group, metric, stratum)))
    seeds = {one.seed for one in records}
    how = (
        f"seed {min(seeds)}"
        if len(seeds) == 1
        else f"mean of {min(counts)} seeds"
        if len(counts) == 1
        else "mean of n seeds"
    )
    return _panels(panels, records[0], f"{records[0].protocol.id}: {metric} in %, {how}, queries: {stratum}")


def _panels(panels: Sequence[Panel], record: Record, title: str) -> Figure:
    from matplotlib.figure import Figure

    names = [release.name for release in record.releases]
    values = np.concatenate([matrix[np.tril_indices(len(names))] for _, matrix, _ in panels])
    top = max(np.nanmax(values, initial=0.0), 1e-6)
    rows = -(-len(panels) // (3 if len(names) <= 4 else 2))  # few a row: a README shows them some 800 px wide
    columns = -(-len(panels) // rows)
    size = 0.95 * len(names)
    figure = Figure(figsize=(columns * (size + 0.2) + 1.2, rows * (size + 0.55) + 1.4), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, axis in enumerate(axes.flat):
        if i >= len(panels):
            axis.axis("off")
            continue
        _panel(axis, *panels[i], top)
        lowest, leftmost = i + columns >= len(panels), i % columns == 0
        axis.set_xticks(range(len(names)), names if lowest else [""] * len(names), rotation=25, ha="right", fontsize=11)
        axis.set_yticks(range(len(names)), names if leftmost else [""] * len(names), fontsize=11)
        axis.set_xlabel("gallery by" if lowest else "", fontsize=12)
        axis.set_ylabel("queries by" if leftmost else "", fontsize=12)
    figure.suptitle(title, fontsize=14)
    if len(names) > 1:
        note = f"{CHECK} / {CROSS}  the upgrade beats / does not beat the old system on the untouched gallery"
        figure.supxlabel(note, fontsize=10, color="0.25")
    return figure


def _panel(axis: Axes, title: str, C: NDArray, old: NDArray, top: float) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    # lightness falls steadily, so it reads in grey too; only its lighter 60 %, on which black stands out
    colors = colormaps["YlGnBu"](0.6 * C / top)
    axis.set(xlim=(-0.5, len(C) - 0.5), ylim=(len(C) - 0.5, -0.5), aspect="equal")
    for t, k in np.argwhere(np.tri(len(C))).tolist():
        style: dict[str, Any]
        corner = (k - 0.5, t - 0.5)
        if np.isnan(C[t, k]):
            axis.add_patch(Rectangle(corner, 1, 1, facecolor="0.97", edgecolor="0.75", hatch="///", linewidth=0))
            text, style = "n/a", {"color": "0.25", "bbox": {"facecolor": "0.97", "edgecolor": "none", "pad": 2}}
        else:
            axis.add_patch(Rectangle(corner, 1, 1, facecolor=colors[t, k], edgecolor="white", linewidth=1.5))
            met = C[t, k] > old[k]
            text = f"{100 * C[t, k]:.1f}" + ("" if k == t else f" {CHECK}" if met else f" {CROSS}")
            style = {"weight": "bold" if k == t else "normal"}
            if k < t and met:
                inset = (k - 0.45, t - 0.45)
                axis.add_patch(Rectangle(inset, 0.9, 0.9, fill=False, edgecolor="black", linewidth=1.8))
        axis.text(k, t, text, ha="center", va="center", fontsize=13, **style)
    axis.set_title(title, fontsize=13, weight="bold")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def save(figure: Figure, path: Path) -> None:
    """PNG at 160 dpi, whole file or none, the same bytes for the same figure."""
    write_bytes(path, png(figure))


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="png", dpi=160, bbox_inches="tight", metadata={"Software": None}
    )  # no version, no date
    return buffer.getvalue()
