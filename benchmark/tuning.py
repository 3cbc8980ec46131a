"""The tuning rule, the same for all methods: a few random trials on the validation split, every one of them recorded and billed.

Trial 0 is the method's own setting; the others are drawn without repetition from the `space` that its file declares. A trial trains
the whole sequence for a seed that no row reports, the new releases for half of their epochs, and is judged by the average
multi-model accuracy (AM) of the primary metric on the validation split. The best trial's setting, trained in full, is the
method's `tuned` row. Logs stand in `leaderboards/<protocol>/tuning/<method>.jsonl`.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmark import catalog, compatibility
from benchmark.bill import row_nodes
from benchmark.errors import UserError
from benchmark.files import write_bytes
from benchmark.plan import MethodRun, Plan, build
from benchmark.protocol import LEADERBOARDS, Protocol, derive_seed, to_json
from benchmark.results import matrices_of
from benchmark.runner import Progress, execute
from benchmark.store import Store
from benchmark.task import Task

TRIALS = 6
SEED = 1000  # no protocol reports it
EPOCHS = 0.5  # share of each new release's epochs


def settings(name: str) -> list[dict[str, Any]]:
    """Hyperparameters of the trials of a method: its own, then random ones, the same on every machine.

    Raises:
        UserError: the method declares no space.
    """
    cls, default = catalog.method(name)
    space = cls.searched(**default)
    if not space:
        raise UserError(f"{name} declares no tuning space (`space` in its file), so there is nothing to tune")
    drawn = [default | dict(zip(space, values)) for values in itertools.product(*space.values())]
    others = [one for one in drawn if one != default]
    random.Random(derive_seed(SEED, "tuning", name)).shuffle(others)
    return [default, *others[: TRIALS - 1]]


def plans(name: str, task: Task) -> list[Plan]:
    """One plan a trial, on the task of the shortened protocol."""
    runs = [MethodRun.of(name, one) for one in settings(name)]
    return [build(task.protocol, run, SEED, task.fingerprint, split="validation") for run in runs]


def tune(
    protocol: Protocol,
    name: str,
    task: Task,
    store: Store,
    *,
    jobs: int = 1,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Run the trials of one method and write their log; returns its lines. What is cached is not run again."""
    trials = plans(name, task)
    task.items("validation", "query")  # a protocol without such a split dies here
    wanted = [node for plan in trials for node in row_nodes(plan)]  # bounds decide nothing here
    execute(wanted, task, store, jobs=jobs, threads=threads, progress=progress)
    lines = []
    for number, plan in enumerate(trials):
        matrix = matrices_of(plan.cells, store)[protocol.primary_metric]["all"]
        trained = [node for node in row_nodes(plan) if node.kind in ("train", "frozen")]
        lines.append(
            {
                "trial": number,
                "hyperparameters": to_json(plan.method.hyperparameters),
                "am": compatibility.average_multimodel_accuracy(np.array(matrix, dtype=float)),
                "matrix": matrix,
                "split": plan.split,
                "seed": plan.seed,
                "epochs": [release.recipe.epochs for release in task.protocol.releases],
                "images": sum(store.read_json(node, "train.json")["images_seen"] for node in trained),
                "source_sha256": catalog.source_digest(plan.method.cls),
            }
        )
    write_bytes(log(protocol, name), "".join(json.dumps(line) + "\n" for line in lines).encode())
    return lines


def shortened(protocol: Protocol) -> Protocol:
    """The protocol with a share of the new releases' epochs."""
    first, *others = protocol.releases
    cut = [replace(r, recipe=replace(r.recipe, epochs=max(1, round(EPOCHS * r.recipe.epochs)))) for r in others]
    return replace(protocol, releases=(first, *cut))


def log(protocol: Protocol, name: str) -> Path:
    return LEADERBOARDS / protocol.id / "tuning" / f"{name}.jsonl"


def trials(protocol: Protocol, name: str) -> list[dict[str, Any]]:
    """The committed log of a method's trials.

    Raises:
        UserError: it was never tuned on this protocol.
    """
    path = log(protocol, name)
    if not path.is_file():
        raise UserError(
            f"{name} has not been tuned on {protocol.id}: `compatbench tune {protocol.id} --method {name}` does so"
        )
    return [json.loads(line) for line in path.read_text().splitlines()]


def best(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The trial with the highest AM, the earlier one of equals."""
    return max(lines, key=lambda line: (line["am"], -line["trial"]))


def tuned(protocol: Protocol, name: str) -> MethodRun:
    """The method at the setting that its trials chose; its row is `<name>-tuned`."""
    lines = trials(protocol, name)
    run = MethodRun.of(name, best(lines)["hyperparameters"])
    billed = sum(line["images"] for line in lines)
    return MethodRun(f"{run.name}-tuned", run.cls, run.hyperparameters, "tuned", billed)
