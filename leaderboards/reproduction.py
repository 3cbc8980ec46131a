"""The reproduction table: published numbers with their sources, beside ours where we measured the same setting. No torch.

What was published stands in `reproduction.yaml`; what we measured, the gap and the status are computed from the committed
records of the setting's protocol, and are typed nowhere.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import Field, StringConstraints, ValidationError, model_validator

from benchmark import protocol
from benchmark.curves import BackfillRecord
from benchmark.errors import UserError
from benchmark.record import Strict
from leaderboards import backfills, tables
from leaderboards.pages import markdown

DATA = protocol.LEADERBOARDS / "reproduction.yaml"
PAGE = protocol.LEADERBOARDS / "REPRODUCTION.md"
CELLS = {"old/old": (0, 0), "new/old": (1, 0), "new/new": (1, 1)}  # (query release, gallery release) of two releases
AREA = "AUC"  # FastFill's: the plain mean of 22 points of a backfill from the first release to the second

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Percent = Annotated[Decimal, Field(ge=0, le=100)]  # Decimal: "71.60" stays as it was printed
Points = Annotated[float, Field(gt=0)]
Status = Literal["reproduced", "partly", "not reproduced", "not run"]
Evidence = Literal["README", "notebook", "abstract", "copy", "second hand"]
EVIDENCE: Mapping[Evidence, str] = {
    "README": "read in the README of the authors' code",
    "notebook": "printed in notebooks of the authors' code",
    "abstract": "read in the paper's abstract",
    "copy": "read in a copy of the paper's text that is not the publisher's",
    "second hand": "read in somebody else's report or translation of the paper",
}


class Source(Strict):
    """Where numbers were read."""

    text: Text
    evidence: Evidence


class Setting(Strict):
    """What published numbers were measured on, and our protocol of it, if there is one."""

    data: Text
    split: Text
    models: Text
    evaluation: Text
    protocol: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]+@\d+$")] | None = None
    tolerance: Points | None = None  # points of a metric within which a number counts as reproduced
    why: Text | None = None  # so large a tolerance

    @model_validator(mode="after")
    def _judged(self) -> Setting:
        if len({given is None for given in (self.protocol, self.tolerance, self.why)}) > 1:
            raise ValueError("protocol, tolerance and why come together")
        return self


class Result(Strict):
    """One line of a published table."""

    setting: Text
    source: Text
    case: Text  # queries/gallery, or what else the numbers are of
    values: Annotated[dict[Text, Percent], Field(min_length=1)]  # metric -> percent
    variant: str = ""
    note: str = ""
    record: Text | None = None  # the row of our leaderboard, where it is not named like the method
    order: Literal["random", "own", "class means"] | None = None  # of re-embedding, where the case is an area
    status: Status | None = None  # pins what the records say

    @property
    def place(self) -> tuple[str, ...]:
        """What tells the line from all others of its method."""
        return self.setting, self.source, self.case, self.variant, self.order or "", self.note


class Method(Strict):
    """A method, its published numbers, and what was sought in vain."""

    name: Text
    paper: Text
    sought: Text | None = None
    results: tuple[Result, ...] = ()

    @model_validator(mode="after")
    def _accounted(self) -> Method:
        if not self.results and not self.sought:
            raise ValueError("a method without numbers says what was sought")
        return self


class Table(Strict):
    sources: dict[Text, Source]
    settings: dict[Text, Setting]
    methods: list[Method]

    @model_validator(mode="after")
    def _linked(self) -> Table:
        lines: Counter[tuple[str, ...]] = Counter()
        for method in self.methods:
            for result in method.results:
                for kind, name, known in (
                    ("source", result.source, self.sources),
                    ("setting", result.setting, self.settings),
                ):
                    if name not in known:
                        raise ValueError(f"{method.name}: unknown {kind} '{name}'; known: {', '.join(sorted(known))}")
                lines[method.name, *result.place] += 1
        if twice := [line for line, count in lines.items() if count > 1]:
            raise ValueError(f"given twice: {' '.join(twice[0])}")
        if len({method.name for method in self.methods}) < len(self.methods):
            raise ValueError("a method is given twice")
        return self


def load(path: Path = DATA) -> Table:
    """Read and check the published numbers.

    Raises:
        UserError: not YAML, an unknown or missing field, a number outside [0, 100], an unknown source or setting.
    """
    try:
        data = yaml.load(path.read_text(), yaml.BaseLoader)  # every scalar as the text that was written
        return Table.model_validate(data)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {protocol.describe(error)}") from None


@dataclass(frozen=True)
class Measured:
    """Ours beside one published line."""

    values: Mapping[str, float]  # metric -> percent, mean over the seeds; only the metrics that our record has
    gaps: Mapping[str, float]  # ours - published, in points
    seeds: int
    status: Status


@dataclass(frozen=True)
class Board:
    """What we measured under one protocol, by method."""

    rows: Mapping[str, tables.Row]
    backfills: Mapping[str, Sequence[BackfillRecord]]


Boards = Callable[[str | None], Board]


def boards(root: Path) -> Boards:
    """The leaderboards under `root` by name, each read once; an empty one if it is not there."""

    @functools.cache
    def read(name: str | None) -> Board:
        if name is None or not (root / name).is_dir():
            return Board({}, {})
        curves: dict[str, list[BackfillRecord]] = {}
        for one in backfills.read(root / name):
            curves.setdefault(one.method.name, []).append(one)
        return Board({row.name: row for row in tables.rows(root / name)}, curves)

    return read


def measure(table: Table, method: Method, result: Result, found: Boards) -> Measured:
    """Ours of one published line: the mean over the seeds of the records of its protocol, all queries.

    A line is reproduced if every metric lies within the setting's tolerance, partly if some do, not reproduced if none.

    Raises:
        UserError: the line's typed status is not what the records give.
    """
    setting = table.settings[result.setting]
    board, name = found(setting.protocol), result.record or method.name
    if result.case == AREA:
        values, seeds = _areas(board.backfills.get(name, ()), result)
    else:
        values, seeds = _cells(board.rows.get(name), result, setting.protocol)
    gaps = {metric: value - float(result.values[metric]) for metric, value in values.items()}
    close = sum(abs(gap) <= (setting.tolerance or 0) + 1e-9 for gap in gaps.values())
    status: Status = "not run"
    if gaps:
        status = "reproduced" if close == len(result.values) else "partly" if close else "not reproduced"
    if result.status not in (None, status):
        raise UserError(
            f"{method.name}, {result.setting}, {result.case}: status '{result.status}' is typed, but the records of "
            f"{setting.protocol or 'no protocol'} give '{status}'"
        )
    return Measured(values, gaps, seeds if gaps else 0, status)


def _cells(row: tables.Row | None, result: Result, board: str | None) -> tuple[dict[str, float], int]:
    """Metric -> percent of the line's cell, and the number of seeds."""
    if row is None or result.case not in CELLS:
        return {}, 0
    strangers = {one.protocol.id for one in row.records} - {board}
    if strangers or len(row.records[0].releases) != 2:
        raise UserError(
            f"{board}/{row.name}: records of {', '.join(strangers) or 'other than two releases'}; "
            f"they do not measure the setting '{result.setting}'"
        )
    metrics = result.values.keys() & row.records[0].matrices.keys()
    cell = CELLS[result.case]
    return {metric: 100 * float(row.mean(metric, "all")[cell]) for metric in metrics}, len(row.records)


def _areas(records: Sequence[BackfillRecord], result: Result) -> tuple[dict[str, float], int]:
    """The same of a backfill's area, by the line's order."""
    found = [backfill for one in records if (backfill := one.find(1, [0]))]
    curves = [curve for backfill in found for curve in backfill.curves if curve.order == result.order]
    if not curves:
        return {}, 0
    metrics = result.values.keys() & curves[0].fastfill_mean.keys()
    return {m: 100 * sum(c.fastfill_mean[m] for c in curves) / len(curves) for m in metrics}, len(curves)


# ----------------------------------------------------------------------------------------------------------- rendering

HEAD = """\
# Reproduction

Published numbers of every method of the suite, each with the place where it was read, beside ours where we measured that very
setting. All numbers are percent. *Ours* is the mean over the seeds (n) of the committed records of the setting's protocol, all
queries; the gap is ours - published, in points. Status: **reproduced** if every metric of the line is within the setting's
tolerance, **partly** if some are, **not reproduced** if none is, **not run** where there is no record. A cell x/y means queries of
x against the gallery of y."""


def render(table: Table, root: Path = protocol.LEADERBOARDS) -> str:
    """The page in Markdown."""
    found, text = boards(root), [HEAD]
    measured = {id(r): measure(table, m, r, found) for m in table.methods for r in m.results}
    counted = Counter(one.status for one in measured.values())
    said = ", ".join(f"{counted[status]} {status}" for status in get_args(Status) if counted[status])
    numbers = sum(len(result.values) for method in table.methods for result in method.results)
    text += [f"{numbers} numbers in {len(measured)} lines of {len(table.methods)} methods: {said}."]
    for method in table.methods:
        text += [f"## {method.name}", method.paper + "."]
        if method.results:
            lines = [_line(table, result, measured[id(result)]) for result in method.results]
            text += [
                markdown(["setting", "case", "metric", "published", "source", "ours", "gap", "status", "note"], lines)
            ]
        else:
            text += ["No number of this method could be read."]
    sought = [[m.name, "those above" if m.results else "none", m.sought] for m in table.methods if m.sought]
    text += ["## Sought and not readable", markdown(["method", "numbers at hand", "sought"], sought)]
    columns = ["setting", "data", "split", "models", "evaluation", "our protocol", "tolerance"]
    text += ["## Settings", markdown(columns, [_setting(name, one, root) for name, one in table.settings.items()])]
    sources = [[name, source.text, source.evidence] for name, source in table.sources.items()]
    text += ["## Sources", markdown(["source", "what", "evidence"], sources)]
    text += ["Evidence: " + "; ".join(f"*{name}* = {meaning}" for name, meaning in EVIDENCE.items()) + "."]
    text += [
        "Made from `reproduction.yaml` and the records by `make leaderboards`; no number of ours is typed by hand."
    ]
    return "\n\n".join(text) + "\n"


def _line(table: Table, result: Result, ours: Measured) -> list[str]:
    order = f"order: {result.order}" if result.order else ""
    case = ", ".join(part for part in (result.case, result.variant, order) if part)
    mine = [f"{ours.values[metric]:.1f}" if metric in ours.values else "–" for metric in result.values]
    gaps = [f"{ours.gaps[metric]:+.1f}" if metric in ours.gaps else "–" for metric in result.values]
    published = " / ".join(str(value) for value in result.values.values())
    source = f"{result.source} ({table.sources[result.source].evidence})"
    measured = f"{' / '.join(mine)} (n = {ours.seeds})" if ours.gaps else ""
    gap = " / ".join(gaps) if ours.gaps else ""
    return [result.setting, case, " / ".join(result.values), published, source, measured, gap, ours.status, result.note]


def _setting(name: str, one: Setting, root: Path) -> list[str]:
    board = one.protocol or "none"
    if one.protocol and not (root / one.protocol / "protocol.yaml").is_file():
        board += " (to be defined)"
    tolerance = f"{one.tolerance:g} points: {one.why}" if one.tolerance else ""
    return [name, one.data, one.split, one.models, one.evaluation, board, tolerance]
