"""The report of an audit for people: tables in the terminal, bars in a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SLICES = 5  # shown of the worst
Estimate = Mapping[str, Any]


def percent(found: Estimate, signed: bool = False) -> str:
    """Value with its bounds in percent: 93.1 [91.8, 94.2]."""
    sign = "+" if signed else ""
    value, lower, upper = (f"{100 * found[key]:{sign}.1f}" for key in ("value", "lower", "upper"))
    return f"{value} \\[{lower}, {upper}]"


def render(report: Mapping[str, Any]) -> RenderableType:
    sizes, adapter = report["sizes"], report["adapter"]
    lines = [
        f"{adapter['method']}, {adapter['side']} side, {adapter['similarity']}; "
        + ", ".join(f"{name} {count:,}" for name, count in sizes.items()),
        *report["notes"],
    ]
    parts: list[RenderableType] = [Text("\n".join(lines)), _ways(report)]
    if report["index"]:
        parts.append(_index(report))
    parts += [Text("\n".join(_lines(report)))]
    if report["slices"]:
        parts.append(_slices(report))
    return Group(*parts, _checks(report))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def _ways(report: Mapping[str, Any]) -> Table:
    overlaps = report["overlap"].get("ways", {})
    ks = list(next(iter(overlaps.values()))) if overlaps else []
    labelled, threshold = report["labelled"], report["threshold"]
    columns = [f"overlap@{k}" for k in ks] + ["accepted"]
    columns += ["recall@1", "negative flips", "FAR", "TAR"] if labelled else []
    table = _table(
        "ways to serve, %, with 95 % bounds to either side",
        "way",
        *columns,
        "embed again",
        "write",
        "hours",
        "encoders",
    )
    none: dict[str, Any] = {}
    for name, cost in report["costs"].items():
        cells = [overlaps.get(name, none).get(k) for k in ks] + [threshold["accepted"].get(name)]
        if labelled:
            cells += [labelled["recall"][name]["1"], labelled["negative flips"].get(name)]
            cells += [threshold[rate].get(name) for rate in ("far", "tar")]
        hours = "?" if cost["seconds"] is None else f"{cost['seconds'] / 3600:.2g}"
        row = ["–" if cell is None else percent(cell) for cell in cells]
        table.add_row(
            name, *row, f"{cost['vectors embedded again']:,}", f"{cost['vectors written']:,}", hours,
            str(cost["encoders a query"]),
        )  # fmt: skip
    table.caption = (
        f"overlap@k: with what the full backfill finds. accepted: best matches at {threshold['score']:.4f}, the threshold frozen "
        f"at {threshold['frozen at']}. hours: to embed again and write, without the index; ? needs --encoder-rate."
    )
    return table


def _index(report: Mapping[str, Any]) -> Table:
    index, loss = report["index"], report["overlap"].get("loss")
    ks = list(next(iter(index["recall"].values())))
    table = _table(f"index: {index['kind']}, {index['settings']}, %", "", *(f"@{k}" for k in ks))
    for who, found in index["recall"].items():
        table.add_row(f"found of the exact first k, {who}", *(percent(found[k]) for k in ks))
    for part in loss or {}:
        table.add_row(f"overlap lost by the {part}", *(percent(loss[part][k]) for k in ks))
    seconds = index["seconds to add all vectors again"]
    table.caption = f"to add all vectors again, without training: about {seconds:,.1f} s of this machine"
    return table


def _lines(report: Mapping[str, Any]) -> list[str]:
    latency, trend = report["latency"], report["trend"]
    times = [
        f"{name.removesuffix(', ms')} {ms['p50']:.2f} / {ms['p99']:.2f} ms"
        for name, ms in latency.items() if name.endswith(", ms")
    ]  # fmt: skip
    lines = [
        f"latency p50 / p99 of {latency['queries']} single queries, {latency['search']}, {latency['vectors searched']:,} vectors: "
        + "; ".join(times)
    ]
    sizes = report["sizes"]
    if trend:
        by_size = ", ".join(f"{100 * value:.1f} % in {int(n):,}" for n, value in trend["overlap by size"].items())
        slope = percent(trend["points per doubling"], signed=True).replace("\\", "")
        lines.append(
            f"bias of the sample: judged on {sizes['judged sample']:,} of {sizes['gallery in service']:,} items, the overlap is "
            f"{trend['the sample is']}: {by_size}; {slope} points a doubling; extrapolated "
            f"{percent(trend['in service'])} %".replace("\\", "")
        )
    elif sizes["judged sample"] == sizes["gallery in service"]:
        lines.append(
            "bias of the sample: none, the whole gallery is judged (if there is more in service: --gallery-size)"
        )
    return lines


def _slices(report: Mapping[str, Any]) -> Table:
    rows = report["slices"]
    table = _table(
        f"worst of {len(rows)} slices, in %; the bounds hold for all of them at once",
        "slice",
        "queries",
        "overlap@10",
    )
    for row in rows[:SLICES]:
        table.add_row(f"{row['column']} = {row['value']}", f"{row['overlap']['n']:,}", percent(row["overlap"]))
    return table


def _checks(report: Mapping[str, Any]) -> RenderableType:
    table = _table("requirements", "what", "measured", "95 % bound", "required", "n", "")
    for check in report["checks"]:
        found, mark = check["found"], "[green]met[/]" if check["met"] else "[red]not met[/]"
        table.add_row(
            check["what"], f"{found['value']:.3f}", f"{check['bound']:.3f}", check["required"], f"{found['n']:,}", mark
        )
    unmet = sum(not check["met"] for check in report["checks"])
    why = (
        f"{unmet} of {len(report['checks'])} requirements not met"
        if unmet
        else "every requirement is met at 95 % confidence"
    )
    go = report["verdict"] == "GO"
    missing = "".join(f"\nnot shown: {line}" for line in report["missing"])
    return Group(table, Text(f"{report['verdict']}: {why}{missing}", style="bold green" if go else "bold red"))


def picture(report: Mapping[str, Any]) -> Figure:
    """Bars of overlap@k with the full backfill, way by way, with their bounds; the requirement as a line."""
    from matplotlib.figure import Figure

    ways = report["overlap"]["ways"]
    ks, names = list(next(iter(ways.values()))), list(ways)
    figure = Figure(figsize=(8, 0.9 + 0.55 * len(names)), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(ks)
    for i, (k, color) in enumerate(zip(ks, ("#1d4e79", "#3f88c5", "#a9cbe8"))):
        values = [100 * ways[name][k]["value"] for name in names]
        spread = [
            [100 * abs(ways[name][k][end] - ways[name][k]["value"]) for name in names] for end in ("lower", "upper")
        ]
        places = [row + (i - (len(ks) - 1) / 2) * height for row in range(len(names))]
        axis.barh(places, values, height, xerr=spread, color=color, ecolor="#333333", capsize=2, label=f"overlap@{k}")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlim=(0, 103), xlabel="overlap with the full backfill, %; 95 % bounds to either side")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    sizes = report["sizes"]
    figure.suptitle(
        f"{report['adapter']['method']}, {report['adapter']['side']} side: {sizes['queries']:,} queries, "
        f"{sizes['judged sample']:,} gallery items; {report['verdict']}", fontsize=10,
    )  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    return figure
