"""The pages of a leaderboard as text: Markdown and CSV, from the lines of `tables`. No torch."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmark import budgets, catalog, protocol, record
from benchmark.record import Cost
from benchmark.statistics import Interval
from leaderboards import backfills, tables
from leaderboards.tables import Line, Row

LEGEND = """\
Cells are {metric} in percent, mean of n seeds: `2→1` = queries of release 2 against the gallery of release 1, `2/2` = both by
release 2. Oracle: both by the independent release, what a full backfill would give{oracle}. ± is half the width of the 95 %
interval over seeds, classes and queries; a class that is hard is hard for all rows, so rows whose intervals overlap may well
differ: ranks compare them query by query. ✓ = better than the old system (the method's own release and the independent one) by
the lower ends of paired 95 % intervals. AC: share of cross cells above their own old/old, of the mean matrix; AC95: share with
✓; AM: mean of the lower triangle. Rank: by AM among rows that store the same bytes, run as many query encoders, and leave the
gallery untouched or move it alike, whether the new release is made compatible or its queries are mapped; `2=` is shared by rows
that a paired bootstrap test cannot tell from the best of them (Holm over the group's pairs, 5 %), so that a row may share a
better rank than one of higher AM whose distance to the best is surer. Maps lead from release to release (3→2→1) unless the
row's name says direct; LambdaOrthogonality and Merge are always direct. Settings are those of a row's paper or its authors'
code, and ours where neither says (each method's file says which), or tuned where the name says so.
Update gain: 100 % = as good as the oracle's full backfill; a dash where a step is not above 3 points. New/new drop: against the
oracle, mean of the new releases. Negative flips: queries right before the update and wrong after it, mean of the cross cells.
Rows of unequal bytes are not to be compared without their control (BCT-extra for BT2 and OCA). {more}"""
BILLED = "Images trained: all trainings that the row needs if it is run alone, and the trials of tuned rows."
ENDS = "What a row costs stands in the last table, both ends of every interval in [table.csv](table.csv)."
COST = """\
Billed as if the row were run alone, the same on every stratum. Images: seen in training (old releases and oracles that the row
needs included), in the trials of tuned rows, and by frozen teachers during training; embedding the training images once, for
maps fitted to stored embeddings and for class means, is billed as neither. Bytes: what is searched, the original embedding where
the next update's direct maps read it, and side information. Parameters: of the last release and of the maps that its update adds,
over Independent's; trained: set by a gradient or a closed form; released: stored to serve, an encoder of side information
included; running statistics of batch norm are not counted. Multiply-adds: of one query by the last release, maps included, for
the dearest gallery; of one item ingested by the last release, side information included (a dash: none is stored, the release's
encoder alone runs); of one stored item, moved by one update. Items re-embedded and vectors rewritten: of the gallery, before the
new release can answer. Training seconds stand in the records; they hang on the machine and its load, so they are not compared
here."""
PAIRS_TITLE = "## How many pairs a map needs"
PAIRS = """\
Post-hoc maps between independent releases, fitted directly (no chain) to so many training images embedded by both, drawn from the
seed; mean over seeds, all queries, in percent. Best of its column and side in bold, without a test. \"needs n\": the map has more
degrees of freedom than pairs. Run by `compatbench pairs`."""
COMPACT = 5  # rows of each kind and size in the project's README
MADE = "Made from the records in this folder by `make leaderboards`; nothing here is typed by hand."


def _millions(images: int) -> str:
    return f"{images / 1e6:.2f} M" if images else "0"


BILL: Mapping[str, Callable[[Cost, Cost], str]] = {  # column -> of a row's cost and of Independent's
    "bytes/item by release": lambda one, bound: " / ".join(map(str, one.bytes_per_item)),
    "images trained": lambda one, bound: _millions(one.training_images),
    "in trials": lambda one, bound: _millions(one.tuning_images),
    "teacher forwards": lambda one, bound: _millions(one.teacher_forwards),
    "extra parameters trained": lambda one, bound: f"{one.trained_parameters[-1] - bound.trained_parameters[-1]:+,}",
    "released": lambda one, bound: f"{one.released_parameters[-1] - bound.released_parameters[-1]:+,}",
    "multiply-adds/query": lambda one, bound: f"{one.query_multiply_adds[-1] / 1e6:.2f} M",
    "query encoders": lambda one, bound: str(one.query_encoders),
    "multiply-adds/item ingested": lambda one, bound: (
        f"{one.ingest_multiply_adds[-1] / 1e6:.2f} M" if one.ingest_multiply_adds else "–"
    ),
    "multiply-adds/item moved": lambda one, bound: (
        f"{max(one.gallery_multiply_adds, default=0):,}" if one.vectors_rewritten else "–"
    ),
    "items re-embedded": lambda one, bound: f"{one.items_reembedded:,}",
    "vectors rewritten": lambda one, bound: f"{one.vectors_rewritten:,}",
}


def compact(lines: Sequence[Line]) -> str:
    """One line a method, for the project's README."""
    cells = _triangle(lines)
    head = ["method", "bytes/item", "query encoders", *map(_cell, cells), "AC", "AC95", "AM", "rank", "update gain"]
    body = [
        [
            line.row.shown,
            str(line.row.bytes),
            str(line.row.query_encoders),
            *(_percent(line.cells.get(at), tick=at in line.passed, half=False) for at in cells),
            _share(line.ac),
            _share(line.ac95),
            _percent(line.am),
            line.rank,
            _percent(line.gain, digits=0, sign=True, half=False, unit=" %"),
            _percent(line.drop, sign=True, half=False),
            _percent(line.flips, half=False, unit=" %"),
            _millions(line.row.records[0].cost.training_images + line.row.records[0].cost.tuning_images),
            str(len(line.row.seeds)),
        ]
        for line in lines
    ]
    return by_kind([*head, "new/new drop", "neg. flips", "images trained", "n"], lines, body)


def by_kind(head: Sequence[str], lines: Sequence[Line], body: Sequence[Sequence[str]]) -> str:
    """One table a kind of row, headed where there are several."""
    kinds = list(dict.fromkeys(line.row.kind for line in lines))
    parts = {
        kind: markdown(head, [shown for line, shown in zip(lines, body) if line.row.kind == kind]) for kind in kinds
    }
    text = parts[kinds[0]] if len(parts) == 1 else "\n\n".join(f"**{kind}**\n\n{part}" for kind, part in parts.items())
    return text + _footnote([line.row for line in lines])


def _footnote(found: Sequence[Row]) -> str:
    """What the mark behind a name means, where a row has it."""
    return f"\n\n{catalog.RECONSTRUCTION}" if any(row.shown != row.name for row in found) else ""


def legend(metric: str, more: str, oracle: str = "") -> str:
    return textwrap.fill(LEGEND.format(metric=metric, oracle=oracle, more=more), 124, break_on_hyphens=False)


def accuracy(lines: Sequence[Line]) -> str:
    """One line a method, every number with half its interval, each diagonal cell beside its oracle."""
    cells = _triangle(lines)
    head = ["method", "bytes/item", "AM", "rank"]
    for t, k in cells:
        head += [_cell((t, k)), *([f"oracle {t + 1}/{t + 1}"] if t == k else [])]
    body = []
    for line in lines:
        shown = [line.row.shown, str(line.row.bytes), _percent(line.am), line.rank]
        for t, k in cells:
            shown += [_percent(line.cells.get((t, k)), tick=(t, k) in line.passed)]
            shown += [f"{100 * line.oracle[t]:.1f}"] if t == k else []
        shown += [_share(line.ac), _share(line.ac95), _percent(line.gain, digits=0, sign=True, unit=" %")]
        shown += [_percent(line.drop, sign=True), _percent(line.flips, unit=" %"), str(len(line.row.seeds))]
        body.append(shown)
    return by_kind([*head, "AC", "AC95", "update gain", "new/new drop", "neg. flips", "n"], lines, body)


def cost(found: Sequence[Row]) -> str:
    """One line a method; one table for all strata."""
    bound = tables.independent_row(found).records[0].cost
    body = [[row.shown, *(show(row.records[0].cost, bound) for show in BILL.values())] for row in found]
    return markdown(["method", *BILL], body) + _footnote(found)


def page(folder: Path, found: Sequence[Row]) -> tuple[dict[str, str], str]:
    """The files of one leaderboard by name (README.md, table.csv), and what the project's README shows of it."""
    definition, first = protocol.load(folder), found[0].records[0]
    metric = definition.primary_metric
    metrics = [metric, *(other for other in first.matrices if other != metric)]
    strata = record.ordered(first.matrices[metric])
    by_stratum = {s: tables.lines(found, metrics if s == "all" else [metric], s) for s in strata}
    main = by_stratum["all"][metric]
    text = [f"# {folder.name}", definition.description + "."]
    text += [definition.notes.strip()] if definition.notes else []
    text += ["![compatibility matrices](matrices.png)"]
    text += [legend(metric, ENDS)]
    steps = tables.upgrades(tables.independent_row(found), metric)
    said = [f"{step}: {100 * i.mean:+.1f} ({100 * i.lower:+.1f} to {100 * i.upper:+.1f})" for step, i in steps.items()]
    text += [f"Steps of independent training, own queries on own gallery, points of {metric}: " + "; ".join(said) + "."]
    for stratum in strata:
        title = f"## {metric}, queries: {stratum} ({first.queries[stratum]:,})"
        text += [title, accuracy(by_stratum[stratum][metric])]
    for other in metrics[1:]:
        text += [f"## {other}, all queries", accuracy(by_stratum["all"][other])]
    text += ["## Cost", COST, cost(found)]
    if filled := backfills.read(folder):
        text += ["## While the gallery is being re-embedded", "![backfill curves](backfill.png)"]
        text += [backfills.markdown(filled, metric)]
    if (file := folder / "pairs.json").is_file():
        text += [PAIRS_TITLE, PAIRS, budgets.markdown(budgets.load(file))]
    text += [MADE]
    bound = next(line for line in main if line.row.name == "Independent").oracle
    oracle = ", ".join(f"{t + 1}/{t + 1} {100 * value:.1f}" for t, value in enumerate(bound))
    every = ((name, s, one) for s, by_metric in by_stratum.items() for name, one in by_metric.items())
    files = {"README.md": "\n\n".join(text) + "\n", "table.csv": spreadsheet(every)}
    kept = {row.name for row in tables.best([line.row for line in main], COMPACT)}
    shown = [line for line in main if line.row.name in kept]
    few = f"The best {COMPACT} of each kind and size; all {len(main)} rows: [leaderboard](leaderboards/{folder.name}/README.md). "
    return files, compact(shown) + "\n\n" + legend(metric, few * (len(shown) < len(main)) + BILLED, f" (here {oracle})")


def spreadsheet(found: Iterable[tuple[str, str, Sequence[Line]]]) -> str:
    """CSV of (metric, stratum, lines): one line a quantity, shares in [0, 1] (ranks apart), ends of the 95 % interval."""
    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    out.writerow(["metric", "stratum", "method", "bytes_per_item", "seeds", "quantity", "value", "lower", "upper"])
    for metric, stratum, lines in found:
        for line in lines:
            quantities: dict[str, Interval | float | str | None] = {_cell(at): one for at, one in line.cells.items()}
            quantities |= {f"oracle {t + 1}/{t + 1}": value for t, value in enumerate(line.oracle)}
            quantities |= {"AM": line.am, "rank": line.rank, "AC": line.ac, "AC95": line.ac95, "update gain": line.gain}
            quantities |= {"new/new drop": line.drop, "negative flips": line.flips}
            start = [metric, stratum, line.row.name, line.row.bytes, len(line.row.seeds)]
            for name, one in quantities.items():
                if isinstance(one, Interval):
                    out.writerow([*start, name, *(f"{v:.5f}" for v in (one.mean, one.lower, one.upper))])
                elif one is not None:
                    out.writerow([*start, name, one if isinstance(one, str) else f"{one:.5f}", "", ""])
    return file.getvalue()


def markdown(columns: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table."""
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(head + ["| " + " | ".join(line) + " |" for line in body])


def _triangle(lines: Sequence[Line]) -> list[tuple[int, int]]:
    return [(t, k) for t in range(len(lines[0].oracle)) for k in range(t + 1)]


def _cell(at: tuple[int, int]) -> str:
    t, k = at
    return f"{t + 1}→{k + 1}" if k < t else f"{t + 1}/{t + 1}"


def _percent(
    one: Interval | None, *, digits: int = 1, sign: bool = False, half: bool = True, tick: bool = False, unit: str = ""
) -> str:
    if one is None:
        return "–"
    text = f"{100 * one.mean:{'+' if sign else ''}.{digits}f}"
    text += f" ± {50 * (one.upper - one.lower):.{digits}f}" if half else ""
    return text + unit + (" ✓" if tick else "")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}"
