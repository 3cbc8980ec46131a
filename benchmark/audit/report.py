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


def percent(found: Estimate | None, digits: int = 1) -> str:
    """Value with its bounds in percent: 93.1 [91.8, 94.2]."""
    if found is None:
        return "–"
    value, lower, upper = (f"{100 * found[key]:z.{digits}f}" for key in ("value", "lower", "upper"))
    return value if found["bounds"] == "by definition" else f"{value} [{lower}, {upper}]"


def significant(found: Estimate | None) -> str:
    """As `percent` with two digits that count, for shares that may be tiny: 0.0012 [0.00031, 0.0029]."""
    if found is None:
        return "–"
    value, lower, upper = (f"{100 * found[key]:.2g}" for key in ("value", "lower", "upper"))
    return f"{value} [{lower}, {upper}]"


def number(value: float) -> str:
    """Four places, or three digits that count where that is more."""
    return f"{value:z.4f}" if abs(value) >= 0.01 or value == 0 else f"{value:.3g}"


def render(report: Mapping[str, Any]) -> RenderableType:
    sizes, adapter = report["sizes"], report["adapter"]
    head = f"{adapter['method']}, {adapter['side']} side, {adapter['similarity']}; "
    parts: list[RenderableType] = [
        _lines(head + ", ".join(f"{name} {count:,}" for name, count in sizes.items()), *report["notes"]),
        *_ways(report),
    ]
    for part, shown in (("index", _index), ("labelled", _labelled), ("slices", _slices)):
        if report[part]:
            parts += shown(report)
    return Group(*parts, _lines("", _latency(report), _writing(report), *_bias(report)), *_checks(report))


def _lines(*lines: str) -> Text:
    return Text("\n".join(lines))


def _table(*columns: str) -> Table:
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def _row(table: Table, name: str, *found: Estimate | None) -> None:
    table.add_row(name, *(Text(percent(one)) for one in found))


def _ways(report: Mapping[str, Any]) -> list[RenderableType]:
    overlaps, threshold = report["overlap"].get("ways", {}), report["threshold"]
    reach = "reach" if threshold["of"] == "cosine" else "come as near as"
    ks = list(next(iter(overlaps.values()))) if overlaps else []
    judged = _table("way to serve, %", *(f"overlap@{k}" for k in ks), "accepted")
    costs = _table("to get there", "embed again", "write", "hours", "encoders a query")
    for name in overlaps or threshold["accepted"]:
        _row(judged, name, *(overlaps.get(name, {}).get(k) for k in ks), threshold["accepted"].get(name))
    for name, cost in report["costs"].items():
        hours = "?" if cost["seconds"] is None else f"{cost['seconds'] / 3600:.2g}"
        count = f"{cost['vectors embedded again']:,}", f"{cost['vectors written']:,}"
        costs.add_row(name, *count, hours, str(cost["encoders a query"]))
    said = (
        "In brackets: lower and upper 95 % bound. overlap@k: share of what the full backfill finds. accepted: best matches in "
        f"all of the gallery that {reach} the {threshold['of']} {threshold['score']:.4f}, the threshold frozen at: "
        f"{threshold['frozen at']}. –: no score after fusion, as without the index, or known on the sample only.",
        "hours: to embed again and write, without building an index; ? needs --encoder-rate.",
    )
    return [judged, _lines(said[0]), costs, _lines(said[1])]


def _index(report: Mapping[str, Any]) -> list[RenderableType]:
    index, loss = report["index"], report["overlap"].get("loss", {})
    ks = list(next(iter(index["recall"].values())))
    table = _table(f"{index['kind']}, {index['settings']}, %", *(f"@{k}" for k in ks))
    for who, found in index["recall"].items():
        _row(table, f"{who}: found of the exact first k", *(found[k] for k in ks))
    for part, found in loss.items():
        _row(table, f"overlap lost by the {part}", *(found[k] for k in ks))
    return [table]


def _labelled(report: Mapping[str, Any]) -> list[RenderableType]:
    found, threshold = report["labelled"], report["threshold"]
    ks = [k for k in next(iter(found["recall"].values())) if k != "100"]
    table = _table("with labels, %", *(f"recall@{k}" for k in ks), "negative flips", "TAR", "FAR")
    for name, recall in found["recall"].items():
        cells = [percent(one) for one in (*(recall[k] for k in ks), found["negative flips"].get(name))]
        tar, far = percent(threshold["tar"].get(name)), significant(threshold["far"].get(name))
        table.add_row(name, *map(Text, (*cells, tar, far)))
    for name in found["left out"]:
        if name in threshold["far"]:
            cells = [*["–"] * (len(ks) + 1), percent(threshold["tar"][name]), significant(threshold["far"][name])]
            table.add_row(f"{name}, sample", *map(Text, cells))
    dropped = f"; {found['dropped']:,} queries without a right item are left out" if found["dropped"] else ""
    return [
        table,
        _lines(
            f"In all {found['gallery']:,} items. recall@k: queries with a right item among the first k{dropped}. negative flips: "
            "right by the old model, through the same index where there is one, and now wrong. TAR, FAR: pairs accepted at the "
            "frozen threshold, of the right and of the wrong."
        ),
    ]


def _slices(report: Mapping[str, Any]) -> list[RenderableType]:
    rows, small = report["slices"]["judged"], report["slices"]["too small"]
    said = []
    if small:
        named = ", ".join(f"{row['column']} = {str(row['value'])[:40]} ({row['n']})" for row in small[:SLICES])
        more = f" and {len(small) - SLICES} more" if len(small) > SLICES else ""
        said.append(f"Slices of too few queries to be judged: {named}{more}.")
    if not rows:
        return [_lines(*said)] if said else []
    table = _table("slice", "queries", "overlap@10, %")
    for row in rows[:SLICES]:
        table.add_row(
            Text(f"{row['column']} = {row['value']}"), f"{row['overlap']['n']:,}", Text(percent(row["overlap"]))
        )
    worst = f"The worst of {len(rows)} slices" if len(rows) > SLICES else "Slices, worst first"
    return [table, _lines(f"{worst}; the bounds hold for all of them at once.", *said)]


def _latency(report: Mapping[str, Any]) -> str:
    latency = report["latency"]
    times = [f"{name} {ms['p50']:.2f} / {ms['p99']:.2f} ms" for name, ms in latency["ms"].items()]
    return (
        f"Latency without embedding, p50 / p99 of {latency['queries']} single queries, {latency['search']} search of "
        f"{latency['vectors searched']:,} vectors: {'; '.join(times)}."
        + " Old model: an index of its own vectors is not given."
        * (len(times) == 1)
    )


def _writing(report: Mapping[str, Any]) -> str:
    again = report["writing again"]
    said = f"To write all {again['vectors']:,} vectors again: {again['to a file, seconds']:,.2g} s into a plain file"
    if "to the index, seconds" in again:
        least = "at least " * again["at least"]
        said += f", {least}{again['to the index, seconds']:,.2g} s into such an index"
    return f"{said}, on this machine; embedding, training of an index, network and database not counted."


def _bias(report: Mapping[str, Any]) -> list[str]:
    bias, sizes = report["sample bias"], report["sizes"]
    if not sizes["judged sample"]:
        return ["The full backfill is unknown: --gallery-new is not given."]
    said = []
    if bias is None:
        said.append("Bias of the sample: none, all of the gallery is judged (if more is in service: --gallery-size).")
    else:
        high, how = bias["too high by"], ", an extrapolation" if bias["extrapolated"] else ""
        low = {"value": -high["value"], "lower": -high["upper"], "upper": -high["lower"], "bounds": high["bounds"]}
        word = {
            "optimistic": f"optimistic by {percent(high)} points or less",
            "pessimistic": f"pessimistic by {percent(low)} points or more",
            "fair": f"fair (too high by {percent(high)} points)",
        }[bias["the sample is"]]
        said.append(
            f"Bias of the sample: overlap@10 among {sizes['judged sample']:,} of {sizes['gallery in service']:,} items stands for "
            f"overlap@{bias['stands for depth']:.0f} of all; as overlap@10 of all it is {word}, seen at depth "
            f"{bias['read off at depth']:.2g} of the sample{how}."
        )
    if sizes["gallery"] < sizes["gallery in service"]:
        said.append(
            f"accepted, recall and flips are those of {sizes['gallery']:,} items: among {sizes['gallery in service']:,} best "
            "matches score higher and fewer are right; FAR and TAR are fair. A threshold in use: --threshold."
        )
    return said


def _checks(report: Mapping[str, Any]) -> list[RenderableType]:
    table = _table("required for a GO", "measured", "95 % bound", "required", "n", "")
    for check in report["checks"]:
        found, mark = check["found"], "[green]met[/]" if check["met"] else "[red]not met[/]"
        values = number(found["value"]), number(check["bound"])
        table.add_row(Text(check["what"]), *values, check["required"], f"{found['n']:,}", mark)
    unmet, go = sum(not check["met"] for check in report["checks"]), report["verdict"] == "GO"
    missing = "".join(f"\nmissing: {line}" for line in report["missing"])
    said = f"{unmet} of {len(report['checks'])} requirements not met" if unmet else "every requirement is met"
    if missing and not unmet:
        said = "what could be judged is met, but not all could be"
    return [
        table,
        Text(f"{report['verdict']}: {said}, at 95 % confidence each{missing}", "bold green" if go else "bold red"),
    ]


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
