"""How many pairs does a map between two spaces need? Every post-hoc map of the suite at several numbers of pairs.

Each map is fitted directly from the last release to each older one (no chain), to pairs drawn from the seed among the last
release's training images. Everything runs through the plan, so nothing is embedded or fitted twice. No torch on import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from benchmark import catalog
from benchmark.errors import UserError
from benchmark.files import write_json
from benchmark.protocol import LEADERBOARDS, Protocol, describe
from benchmark.record import Number, ProtocolInfo, Strict, SuiteInfo

if TYPE_CHECKING:
    from benchmark.plan import Plan
    from benchmark.store import Store
    from benchmark.task import Task

BUDGETS = (100, 1_000, 10_000)


class Map(Strict):
    """One kind of map on one side."""

    name: str
    side: str
    parameters: int
    multiply_adds: int  # per vector that passes it
    cells: dict[str, dict[str, list[Number]]]  # pairs -> "t,k" -> primary metric of each seed
    refused: dict[str, str]  # pairs -> why the map cannot be fitted to so few


class PairsRecord(Strict):
    """All maps of one protocol."""

    schema_version: int = 1
    protocol: ProtocolInfo
    suite: SuiteInfo
    data_fingerprint: str
    metric: str
    seeds: list[int]
    old_old: dict[str, list[Number]]  # k -> of each seed: what a map must beat
    maps: list[Map]


def load(path: Path) -> PairsRecord:
    try:
        return PairsRecord.model_validate_json(path.read_text())
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        what = describe(error) if isinstance(error, ValidationError) else error
        raise UserError(f"{path}: not a record of pairs: {what}") from None


def names() -> list[str]:
    """Post-hoc maps of the suite that have a number of pairs and a side."""
    found = {name: catalog.method(name)[1] for name in catalog.entries("method")}
    return [name for name, settings in found.items() if {"pairs", "side", "direct"} <= settings.keys()]


def study(
    protocol: Protocol, task: Task, store: Store, seeds: Sequence[int], *, jobs: int, threads: int | None, progress: Any
) -> PairsRecord:
    """Fit and score every map at every number of pairs."""
    from benchmark import bill, results, runner, training
    from benchmark.plan import MethodRun, build

    last = len(protocol.releases) - 1
    wanted: dict[tuple[str, str, int, int], Plan] = {}
    for name in names():
        for side in ("query", "gallery"):
            for pairs in BUDGETS:
                run = MethodRun.of(name, {"side": side, "pairs": pairs, "direct": True})
                for seed in seeds:
                    wanted[name, side, pairs, seed] = build(protocol, run, seed, task.fingerprint)
    refused = {key: why for key, plan in wanted.items() if (why := too_few(plan, key[2]))}
    nodes = {key: [plan.cells[last, k] for k in range(last)] for key, plan in wanted.items() if key not in refused}
    ends = [wanted[key].cells[k, k] for key in list(nodes)[: len(seeds)] for k in range(last + 1)]
    runner.execute(
        [node for cells in nodes.values() for node in cells if node] + [node for node in ends if node],
        task,
        store,
        jobs=jobs,
        threads=threads,
        progress=progress,
    )

    def value(node: Any) -> float:
        return store.read_json(node, "scores.json")["all"][protocol.primary_metric]

    maps = []
    for name in names():
        for side in ("query", "gallery"):
            cells: dict[str, dict[str, list[float]]] = {}
            for pairs in BUDGETS:
                if (name, side, pairs, seeds[0]) in nodes:
                    per_seed = [nodes[name, side, pairs, seed] for seed in seeds]
                    cells[str(pairs)] = {f"{last},{k}": [value(cells[k]) for cells in per_seed] for k in range(last)}
            some = next(step for plan in [wanted[name, side, BUDGETS[-1], seeds[0]]] for step in bill.steps(plan))
            size = training.step_size(some, task)
            maps.append(
                Map(
                    name=name,
                    side=side,
                    parameters=size.parameters,
                    multiply_adds=sum(size.multiply_adds.values()),
                    cells=cells,
                    refused={
                        str(p): refused[name, side, p, seeds[0]]
                        for p in BUDGETS
                        if (name, side, p, seeds[0]) in refused
                    },
                )
            )
    bound = {seed: build(protocol, MethodRun.of("Independent"), seed, task.fingerprint) for seed in seeds}
    return PairsRecord(
        protocol=results.protocol_info(protocol),
        suite=results.suite_info(),
        data_fingerprint=task.fingerprint,
        metric=protocol.primary_metric,
        seeds=list(seeds),
        old_old={str(k): [value(bound[seed].cells[k, k]) for seed in seeds] for k in range(last + 1)},
        maps=maps,
    )


def too_few(plan: Plan, pairs: int) -> str | None:
    """Why a plan's map cannot be fitted to so few pairs, or None."""
    from benchmark import adapters

    cls: Any = plan.method.cls
    hyperparameters = plan.method.hyperparameters
    settings = {k: v for k, v in hyperparameters.items() if k not in ("side", "pairs", "direct")}
    dims = [node.spec["dim"] for node in plan.releases]
    needed = max(adapters.KINDS[cls.adapter].needed(dims[-1], dim, **settings) for dim in dims[:-1])
    return f"needs {needed}" if needed > pairs else None


def publish(record: PairsRecord) -> Path:
    """Write the record into its leaderboard."""
    path = LEADERBOARDS / record.protocol.id / "pairs.json"
    write_json(path, record.model_dump(mode="json"))
    return path


def best(record: PairsRecord) -> Mapping[tuple[str, str, str], Map]:
    """(side, pairs, cell) -> the map of the highest mean."""
    found: dict[tuple[str, str, str], Map] = {}
    for one in record.maps:
        for pairs, cells in one.cells.items():
            for cell, values in cells.items():
                rival = found.get((one.side, pairs, cell))
                if rival is None or sum(values) > sum(rival.cells[pairs][cell]):
                    found[one.side, pairs, cell] = one
    return found


def markdown(record: PairsRecord) -> str:
    """The table of a leaderboard's page."""
    cells = list(next(iter(next(m for m in record.maps if m.cells).cells.values())))
    shown = [f"{int(a) + 1}→{int(b) + 1}" for a, b in (cell.split(",") for cell in cells)]
    head = ["map", "side", "parameters", "multiply-adds", *(f"{s}, {p:,} pairs" for s in shown for p in BUDGETS)]
    top, lines = best(record), ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for one in record.maps:
        row = [one.name, one.side, f"{one.parameters:,}", f"{one.multiply_adds:,}"]
        for cell in cells:
            for pairs in map(str, BUDGETS):
                values = one.cells.get(pairs, {}).get(cell)
                text = one.refused.get(pairs, "–") if values is None else f"{100 * sum(values) / len(values):.1f}"
                row.append(f"**{text}**" if top.get((one.side, pairs, cell)) is one else text)
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)
