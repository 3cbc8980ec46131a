"""Choosing a protocol's recipe, by its rule: from Independent runs alone, on the validation split, every trial logged.

The candidates stand in `trials.yaml` beside the protocol, each a list of overrides; results go to `trials.jsonl`. Then the
old releases are frozen, so that every method, here and elsewhere, starts from the very same ones. For maintainers:

    python -m benchmark.trials cifar100-lite@1 --data DIR             measure the candidates
    python -m benchmark.trials cifar100-lite@1 --data DIR --freeze    train release 0 for every seed and keep it
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from benchmark import protocol as protocols
from benchmark.embeddings import read_tensors, write_tensors
from benchmark.errors import UserError
from benchmark.files import sha256_file, write_json
from benchmark.plan import MethodRun, Node, build
from benchmark.runner import Progress, default_device, execute, open_task
from benchmark.store import Store


def run(
    name: str, data: Path | None, store: Store, jobs: int, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Measure the diagonal of every candidate; returns and writes one row per candidate and seed."""
    folder = protocols.find(name).parent
    path = folder / "trials.yaml"
    if not path.is_file():
        raise UserError(f"{folder} has no trials.yaml with candidates for its recipe")
    wanted, rows = yaml.safe_load(path.read_text()), []
    for candidate, overrides in wanted["candidates"].items():
        protocol = protocols.load(folder, overrides)
        task = open_task(protocol, data, default_device())
        plans = [
            build(protocol, MethodRun.of("Independent"), seed, task.fingerprint, split="validation")
            for seed in wanted["seeds"]
        ]
        execute(plans, task, store, jobs=jobs, progress=progress)
        for plan in plans:
            diagonal = [plan.cells[t, t] for t in range(len(protocol.releases))]
            scores = [store.read_json(node, "scores.json") for node in diagonal if node is not None]
            rows.append(
                {
                    "candidate": candidate,
                    "overrides": overrides,
                    "seed": plan.seed,
                    "split": "validation",
                    "diagonal": {s: [cell[s][protocol.primary_metric] for cell in scores] for s in scores[0]},
                    "map": [cell["all"]["map"] for cell in scores],
                }
            )
    (folder / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def freeze(name: str, data: Path | None, store: Store, jobs: int, progress: Progress | None = None) -> dict[int, str]:
    """Train release 0 for every seed of the protocol into `old/`; returns seed -> sha256, for the protocol's `frozen`."""
    protocol = protocols.load(name, ["frozen={}"])
    task = open_task(protocol, data, default_device())
    plans = [build(protocol, MethodRun.of("Independent"), seed, task.fingerprint) for seed in protocol.seeds]
    old = [plan.releases[0] for plan in plans]
    execute(old, task, store, jobs=jobs, progress=progress)
    folder, hashes = protocols.find(name).parent / "old", {}
    for seed, node in zip(protocol.seeds, old):
        path = folder / f"seed{seed}.safetensors"
        write_tensors(path, read_tensors(store.folder(node) / "encoder.safetensors"))
        write_json(path.with_suffix(".json"), store.read_json(node, "train.json"))
        hashes[seed] = sha256_file(path)
    return hashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--freeze", action="store_true")
    args = parser.parse_args()

    def say(event: str, node: Node, done: int, total: int) -> None:
        if event == "done" and node.kind == "train":
            print(f"{node.label}, seed {node.spec['seed']}", flush=True)

    task = freeze if args.freeze else run
    result = task(args.protocol, args.data, Store(args.runs), args.jobs, say)
    print(yaml.safe_dump({"frozen": result} if args.freeze else result, sort_keys=False))


if __name__ == "__main__":
    main()
