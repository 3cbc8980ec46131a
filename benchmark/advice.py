"""A forecast in words, as a table and as a chart. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from benchmark.simulator import TIE, Forecast, probe_queries

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def report(found: Forecast) -> list[RenderableType]:
    """What was asked, what comes at which hour, what to do, what is taken for granted; fits 100 columns."""
    paragraphs: list[Table | list[str]] = [
        header(found),
        table(found),
        cutover(found),
        rollback(found),
        assumptions(found),
    ]
    return [x if isinstance(x, Table) else Text("\n" * (i > 0) + "\n".join(x)) for i, x in enumerate(paragraphs)]


def header(found: Forecast) -> list[str]:
    plan, record, backfill = found.plan, found.records[0], found.backfills[0]
    stored = [f"{k + 1} ({100 * part:.0f} %)" if len(backfill.stored) > 1 else f"{k + 1}"
              for k, part in zip(backfill.stored, backfill.start)]  # fmt: skip
    seeds = ", ".join(str(one.seed) for one in found.records)
    arrivals = f"{plan.arrivals_per_hour:,.0f} arrivals an hour{', by both encoders' if plan.dual_write else ''}"
    lines = [
        f"{record.method.name} on {record.protocol.id}{' (off-protocol)' if record.protocol.overrides else ''}, "
        + (f"seeds {seeds}: mean (least–most)." if len(found.records) > 1 else f"seed {seeds} alone: the spread is unknown."),
        f"Record: {plan.record}",
        f"Gallery of {' and '.join(stored)}, queries of {backfill.release + 1}, {plan.order} order.",
        f"{plan.items:,} items, {plan.images_per_second:,g} images/s, {arrivals}: {hour(found.hours[-1])} hours.",
        "One query encoder." if backfill.query_encoders == 1 else
        f"{backfill.query_encoders} query encoders: every query is embedded by so many models until the end.",
    ]  # fmt: skip
    ends = [
        f"{metric} {spread(100 * found.old[metric][:, 0])} -> {spread(100 * found.accuracy[metric][:, -1])}"
        for metric in list(found.accuracy)[:2]
    ]
    lines.append(f"Old system at hour 0 -> finished backfill, %: {'; '.join(ends)}.")
    if any(one.moved for one in found.backfills):
        lines.append("All stored vectors pass the method's map before hour 0; that time is not counted.")
    return lines


def table(found: Forecast) -> Table:
    """Eleven hours and that of the cutover, which is bold."""
    first, second = list(found.accuracy)[:2]
    cut = found.cutover()
    rows = set(np.linspace(0, len(found.hours) - 1, 11).astype(int))
    rows |= {int(np.searchsorted(found.hours, cut))} if cut is not None else set()
    made = Table(box=box.SIMPLE_HEAD, padding=0, caption_justify="left")
    names = ["hours", "done", "in new\nspace", f"{first}, %", "lead", f"{second}, %", "lead", "broken, %"]
    for name in [*names, *["roll back\nbelow"] * (cut is not None)]:
        made.add_column(name, justify="right")
    for i in sorted(rows):
        cells = [hour(found.hours[i]), f"{100 * found.done[i]:.0f} %", f"{100 * found.share[i]:.0f} %"]
        for metric in (first, second):
            cells += [spread(100 * found.accuracy[metric][:, i]), f"{100 * found.lead(metric)[:, i].mean():+z.1f}"]
        cells.append(spread(100 * found.flips[:, i]))
        if cut is not None:
            cells.append(f"{100 * found.old[first][:, i].mean():.1f}" if found.hours[i] >= cut else "")
        made.add_row(*cells, style="bold" if found.hours[i] == cut else "")
    made.caption = (
        "done: of the old items. lead: points above the old system at that hour. broken: queries right by the old system and "
        "wrong here." + (f" roll back below: {first} of the old system at that hour." if cut is not None else "")
    )
    return made


def cutover(found: Forecast) -> list[str]:
    """When to switch, by the plan's metric and by the one beside it, and what a switch before that would do."""
    plan = found.plan
    first, second = list(found.accuracy)[:2]
    cut = found.cutover()
    asked = f" by {points(plan.margin)} or more" if plan.margin else " (a tie is no win)"
    if plan.max_negative_flips is not None:
        asked += f", with no more than {100 * plan.max_negative_flips:g} % of the queries broken"
    if cut is None:
        lines = [f"No cutover by {first}.", *missed(found, first)]
    else:
        lines = [f"Cut over {when(found, first, cut)}: from then on {first} is above the old system{asked}."]
    if (beside := found.cutover(second)) is None:
        lines += [
            f"No cutover by {second}{' either' if cut is None else ''}.",
            *(why for why in missed(found, second) if why not in lines),
        ]
    else:
        lines.append(f"By {second}, asked the same, the cutover is {when(found, second, beside)}.")
    seeds = " (in one seed at least)" if len(found.records) > 1 else ""
    for metric in (first, second):
        if spans := found.spans(found.lead(metric) < -TIE):
            lines.append(f"{metric} is below the old system{seeds} {listed(spans)}.")
    if spans := found.spans(found.broken()):
        lines.append(f"Broken queries are above the limit{seeds} {listed(spans)}.")
    return lines


def missed(found: Forecast, metric: str) -> list[str]:
    """Why not even the finished backfill is a reason to switch."""
    plan, lines, lead = found.plan, [], found.lead(metric)[:, -1]
    short = (lead <= TIE) | (lead < plan.margin - TIE)
    if short.any():
        what = f"The margin of {points(plan.margin)}" if plan.margin else f"A lead in {metric}"
        tie = " A tie is no win." if (abs(lead) <= TIE).any() else ""
        lines.append(
            f"{what} cannot be met{of_seeds(short)}: the finished backfill is {spread(100 * lead, '+z.2f')} points above the old "
            f"system.{tie}"
        )
    broken = found.broken()[:, -1]
    if broken.any() and plan.max_negative_flips is not None:
        lines.append(
            f"The limit of {100 * plan.max_negative_flips:g} % broken queries cannot be met{of_seeds(broken)}: the finished "
            f"backfill breaks {spread(100 * found.flips[:, -1], '.2f')} %."
        )
    return lines


def rollback(found: Forecast) -> list[str]:
    """What to watch after the cutover, and what going back costs."""
    plan, cut = found.plan, found.cutover()
    if cut is None:
        return ["Without a cutover there is nothing to roll back: the old system goes on serving."]
    limit = plan.max_negative_flips
    at = int(np.searchsorted(found.hours, cut))
    lines = [
        "After the cutover let both systems answer a labelled probe set of queries. Roll back as soon as the new system answers "
        "fewer right than the old one, beyond chance (paired test, one-sided, 95 %)"
        + (f", or more than {100 * limit:g} % of the queries break." if limit is not None else "."),
        f"To see the forecast lead in cmc@1 (80 % power) takes, at the cutover, {probes(found, at)}; at the end, "
        f"{probes(found, -1)}.",
    ]
    if not plan.arrivals_per_hour:
        lines.append("Going back needs the old vectors and no embedding: nothing arrives.")
    elif plan.dual_write:
        lines.append("Going back needs the old vectors and no embedding: the old system has all arrivals.")
    else:
        lines.append(
            f"Going back needs the old vectors and the arrivals embedded by the old encoder: {found.arrived[at]:,.0f} at the "
            f"cutover, {found.arrived[-1]:,.0f} at the end."
        )
    return lines


def probes(found: Forecast, at: int) -> str:
    """Size of the probe set at one hour: for the mean over the seeds, and for the seed that needs most."""
    lead, flips = found.lead("cmc@1")[:, at], found.flips[:, at]
    sizes = [probe_queries(*pair) for pair in [(lead.mean(), flips.mean()), *zip(lead, flips)]]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return "no number would do: cmc@1 does not lead there"
    return f"{known[0]:,} probe queries" + (f" (up to {max(known[1:]):,} by seed)" if len(found.records) > 1 else "")


def assumptions(found: Forecast) -> list[str]:
    plan = found.plan
    lines = [
        f"The record's gallery holds {found.records[0].gallery:,} items, the plan's {plan.items:,}; the curve is the record's, "
        "not your data's.",
        "cmc@k needs only one good answer, so it hides that items not yet re-embedded cannot be found; map does not.",
    ]
    if plan.arrivals_per_hour:
        lines.append("Arrivals are taken as a random addition in the new space; all items as equally likely answers.")
        lines.append(
            "The old system has the arrivals too: the old encoder is taken to cost as much as the new one."
            if plan.dual_write
            else "The old system does not know the arrivals: its accuracy, and what can break, falls as N / (N + arrivals)."
        )
    return lines


# ------------------------------------------------------------------------------------------------------------- words


def hour(value: float) -> str:
    return f"{value:,.{0 if value >= 1000 else 1 if value >= 10 else 2}f}"


def points(share: float) -> str:
    return f"{100 * share:g} point{'s' * (share != 0.01)}"


def spread(values: NDArray, form: str = ".1f") -> str:
    """Mean, and least to most where there are several."""
    between = " to " if "+" in form else "–"
    span = f" ({min(values):{form}}{between}{max(values):{form}})" if len(values) > 1 else ""
    return f"{values.mean():{form}}{span}"


def of_seeds(where: NDArray) -> str:
    return f" in {where.sum()} of {len(where)} seeds" if len(where) > 1 else ""


def when(found: Forecast, metric: str, cut: float) -> str:
    known = [value for value in found.cutovers(metric) if value is not None]
    text = f"after {hour(cut)} hours" if cut else "at once"
    if len(known) == 1:
        return text
    return text + (
        f" (the latest of the seeds: {hour(min(known))} to {hour(cut)})" if min(known) < cut else " in every seed"
    )


def listed(spans: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"from {hour(a)} to {hour(b)}" for a, b in spans) + " hours"


# ------------------------------------------------------------------------------------------------------------- chart


def figure(found: Forecast) -> Figure:
    """A panel for the plan's metric and one for that beside it: the forecast with its band over the seeds, the old system, the
    finished backfill, the cutover."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(10.0, 4.2), layout="constrained")
    handles: dict[str, Any] = {}
    for axis, metric in zip(made.subplots(1, 2), found.accuracy):
        values, old = 100 * found.accuracy[metric], 100 * found.old[metric].mean(0)
        axis.plot(found.hours, values.mean(0), lw=2, label="while re-embedding")
        if len(values) > 1:
            axis.fill_between(found.hours, values.min(0), values.max(0), alpha=0.2, lw=0, label="least to most, seeds")
        axis.plot(found.hours, old, color="0.4", ls="--", label="old system")
        axis.axhline(values[:, -1].mean(), color="0.4", ls=":", label="finished backfill")
        cut = found.cutover(metric)
        if cut is not None:
            axis.axvline(cut, color="C3", lw=1, label="cutover")
        axis.set(xlabel="hours", ylabel=f"{metric}, %")
        axis.set_title("no cutover" if cut is None else f"cutover after {hour(cut)} hours", fontsize=10)
        axis.grid(alpha=0.3)
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    made.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles), fontsize=8)
    made.suptitle(f"{found.records[0].method.name}, {found.plan.order} order", fontsize=10)
    return made
