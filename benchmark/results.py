"""From computed nodes to a record: matrices, summaries, cost, and the per-query outputs they can be recomputed from."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmark import __version__, catalog, compatibility, outputs
from benchmark.bill import cost, link_info, row_nodes, steps
from benchmark.curves import BackfillRecord
from benchmark.errors import UserError
from benchmark.files import sha256_file, write_bytes
from benchmark.plan import Node, Plan
from benchmark.protocol import LEADERBOARDS, Protocol, derive_seed, to_json
from benchmark.record import (
    METRICS_VERSION,
    SCHEMA_VERSION,
    Matrix,
    MethodInfo,
    ProtocolInfo,
    Record,
    ReleaseInfo,
    SuiteInfo,
    Timing,
)
from benchmark.store import Store
from benchmark.task import Task

ROOT = Path(__file__).resolve().parent.parent
Cells = Mapping[tuple[int, int], Node | None]


def assemble(plan: Plan, task: Task, store: Store, folder: Path, overrides: Sequence[str] = ()) -> tuple[Record, Path]:
    """Write `seed<seed>.json` and `seed<seed>.safetensors` (per-query outputs) into `folder`; returns the record and its path."""
    name = f"seed{plan.seed}"
    own, bound = (per_query(cells, store, task, plan.split) for cells in (plan.cells, plan.bound_cells))
    file = folder / f"{name}.safetensors"
    outputs.save(file, own)
    matrices, bounds = matrices_of(plan.cells, store), matrices_of(plan.bound_cells, store)
    first = next(node for node in plan.cells.values() if node is not None)
    counted = store.read_json(first, "scores.json")
    record = Record(
        schema_version=SCHEMA_VERSION,
        protocol=protocol_info(plan.protocol, overrides, plan.split),
        suite=suite_info(),
        method=method_info(plan),
        seed=plan.seed,
        data_fingerprint=task.fingerprint,
        releases=[release_info(node, task, store) for node in plan.releases],
        matrices=matrices,
        independent=bounds,
        undefined={
            f"{t},{k}": "unequal dims and no declared link" for (t, k), node in plan.cells.items() if node is None
        },
        queries={stratum: int(values["queries"]) for stratum, values in counted.items()},
        dropped=int(counted["all"]["dropped"]),
        summary=summarise(plan, own, bound, matrices, bounds),
        cost=cost(plan, task, store),
        environment=environment(task),
        outputs={file.name: sha256_file(file)},
        timing=timing(plan, store, task),
        links=[link_info(node, task, store) for node in steps(plan)],
    )
    return record, record.save(folder / f"{name}.json")


def matrices_of(cells: Cells, store: Store) -> dict[str, dict[str, Matrix]]:
    """metric -> stratum -> T x T, null above the diagonal and where undefined."""
    releases = 1 + max(t for t, _ in cells)
    scores = {at: store.read_json(node, "scores.json") for at, node in cells.items() if node is not None}
    strata = next(iter(scores.values()))
    return {
        metric: {
            stratum: [
                [scores[t, k][stratum][metric] if (t, k) in scores else None for k in range(releases)]
                for t in range(releases)
            ]
            for stratum in strata
        }
        for metric in sorted(
            (name for name in strata["all"] if name not in ("queries", "dropped")), key=lambda m: (m[:3], len(m), m)
        )
    }


def per_query(cells: Cells, store: Store, task: Task, split: str) -> dict[str, np.ndarray]:
    """What `outputs` keeps: per-query values of every cell, labels and strata of the queries."""
    labels = task.items(split, "query")[1]
    arrays = {"labels": labels.int().numpy()}
    arrays |= {f"mask/{name}": mask.numpy().astype(np.uint8) for name, mask in task.query_strata(split).items()}
    for (t, k), node in cells.items():
        if node is not None:
            for name, tensor in store.read_tensors(node, "per_query.safetensors").items():
                arrays[f"{name}/{t}/{k}"] = tensor.numpy()
    return arrays


def publish(record: Record, path: Path) -> Path:
    """Copy a record and its outputs into its leaderboard.

    Raises:
        UserError: the record is off-protocol, not on the test split, or of changed settings: it can be no row.
    """
    refuse(record, path)
    folder = entry(record)
    for file in (path, *(path.parent / output for output in record.outputs)):
        write_bytes(folder / file.name, file.read_bytes())
    return folder / path.name


def publish_backfill(record: BackfillRecord, path: Path) -> Path:
    """Copy a backfill record into its leaderboard; errors as for `publish`."""
    refuse(record, path)
    target = entry(record) / path.name
    write_bytes(target, path.read_bytes())
    return target


def entry(record: Record | BackfillRecord) -> Path:
    """The folder of a row."""
    name = record.method.name + ("" if record.method.mode == "chain" else f"-{record.method.mode}")
    return LEADERBOARDS / record.protocol.id / name


def refuse(record: Record | BackfillRecord, path: Path) -> None:
    """Raise a `UserError` if the record can be no row."""
    reasons = {
        "the protocol was overridden": bool(record.protocol.overrides),
        f"it is on the {record.protocol.split} split": record.protocol.split != "test",
        "its hyperparameters are neither the method's defaults, nor a named variant, nor tuned": record.method.settings
        == "custom",
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"{path} cannot be published: {reason}")


def summarise(plan: Plan, own: outputs.Outputs, bound: outputs.Outputs, matrices: Any, bounds: Any) -> dict[str, Any]:
    """metric -> stratum -> what `compatibility.summary` says, with flips of the primary metric's hits per cross cell."""
    before = bound if plan.mode == "pairwise" else own  # the releases that filled the galleries
    masks = outputs.strata(own)
    seed = derive_seed(plan.seed, "bootstrap")
    result: dict[str, Any] = {}
    for metric in matrices:
        result[metric] = {}
        for stratum, mask in masks.items():
            C, independent = (np.array(m[metric][stratum], dtype=float) for m in (matrices, bounds))
            old_old = np.diag(independent) if plan.mode == "pairwise" else None
            lower_own, lower_bound = outputs.lower_bounds([own], [[before], [bound]], metric, mask, seed)
            entry = compatibility.summary(
                C, independent, old_old=old_old, lower_own=lower_own, lower_independent=lower_bound
            )
            if metric.startswith("cmc"):
                entry["flips"] = {
                    f"{t},{k}": flips(own, before, metric, mask, t, k)
                    for (t, k), node in plan.cells.items()
                    if k < t and node is not None
                }
            result[metric][stratum] = entry
    return result


def flips(own: Mapping, old: Mapping, metric: str, mask: np.ndarray, t: int, k: int) -> dict[str, float]:
    """Shares of queries that the update turns from miss to hit and from hit to miss, against the same old gallery."""
    before, after = outputs.values(old, metric, k, k)[mask], outputs.values(own, metric, t, k)[mask]
    kept = ~np.isnan(before)
    found = compatibility.flips(before[kept] == 1, after[kept] == 1)
    return {"positive": found.positive, "negative": found.negative}


def protocol_info(protocol: Protocol, overrides: Sequence[str] = (), split: str = "test") -> ProtocolInfo:
    return ProtocolInfo(
        id=protocol.id, version=protocol.version, sha256=protocol.sha256, overrides=list(overrides), split=split
    )


def method_info(plan: Plan) -> MethodInfo:
    cls, run = plan.method.cls, plan.method
    return MethodInfo(
        name=run.name,
        reference=f"{cls.__module__}.{cls.__qualname__}",
        hyperparameters=to_json(run.hyperparameters),
        settings=run.settings,
        source_sha256=catalog.source_digest(cls),
        mode=plan.mode,
    )


def release_info(node: Node, task: Task, store: Store) -> ReleaseInfo:
    facts = store.read_json(node, "train.json")
    terms = list(facts["history"][0]) if facts["history"] else []
    release = task.protocol.releases[node.spec["t"]]
    return ReleaseInfo(
        name=release.name,
        backbone=release.backbone,
        classes=task.classes(node.spec["t"]),
        dim=node.spec["dim"],
        recipe=facts["recipe"],
        recipe_deviates=facts["deviates"],
        losses={term: [epoch[term] for epoch in facts["history"]] for term in terms},
        weights_sha256=sha256_file(store.folder(node) / "encoder.safetensors"),
    )


def timing(plan: Plan, store: Store, task: Task) -> Timing:
    spent = {node.id: store.read_json(node, "timing.json") for node in row_nodes(plan)}
    bound = {node.id for end in (*plan.bounds, *(n for n in plan.bound_cells.values() if n)) for node in end.walk()}
    own = [spent[node.id] for node in plan.releases]
    return Timing(
        training_seconds=sum(spent[node.id]["seconds"] for node in row_nodes(plan) if node.kind == "train"),
        total_seconds=sum(entry["seconds"] for entry in spent.values()),
        shared_seconds=sum(entry["seconds"] for id, entry in spent.items() if id in bound),
        threads=own[-1]["threads"],
        device=own[-1]["device"],
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def environment(task: Task) -> dict[str, str]:
    import lightning

    lock = ROOT / "requirements.lock"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "device": torch.cuda.get_device_name() if task.device.startswith("cuda") else processor(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "lock_sha256": sha256_file(lock) if lock.is_file() else "none",
    }


def processor() -> str:
    """The CPU's model name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"


@functools.cache
def suite_info() -> SuiteInfo:
    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", "benchmark", "tasks")
    dirty = None if status is None else bool(status)
    return SuiteInfo(version=__version__, metrics_version=METRICS_VERSION, commit=commit, dirty=dirty)
