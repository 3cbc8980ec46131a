"""Our evaluation and training step beside the alternatives, measured on this machine: `make bench`.

Each contender lives in a process of its own and they take turns (A B C A B C ...), so that a machine that drifts drifts
for all; ratios are medians of the ratios within each round. Extra memory is the peak of that process less what it held
with its libraries and the embeddings loaded. Inputs are synthetic, from a fixed seed: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from benchmark.retrieval import rank

OURS, HALF, MATMUL, FAISS = "ours", "ours, half the queries", "bare matmul (floor)", "faiss IndexFlatIP top-100"
ARGSORT, PML = "chunked torch argsort", "PML AccuracyCalculator"
METRICS = ("map", "cmc@1", "cmc@5")
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


class Shape(NamedTuple):
    name: str
    queries: int
    gallery: int
    dim: int
    classes: int
    sampled: bool = False  # SHARES apply


SHARES = {HALF: 0.5, ARGSORT: 0.2, PML: 0.1}  # of the queries; the seconds of the slow ones are scaled up
FULL = Shape("CIFAR-100 test", 10_000, 10_000, 128, 100), Shape("ImageNet val", 2_500, 50_000, 512, 1_000, True)
QUICK = Shape("tiny", 400, 400, 32, 10), Shape("tiny, sampled", 200, 1_000, 64, 20, True)


def synthetic(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of a new model, a gallery of a worse old one, its labels. Query i is gallery item i, its own item."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(shape.gallery) % shape.classes
    centres = torch.randn(shape.classes, shape.dim, generator=generator)
    old = torch.randn(shape.gallery, shape.dim, generator=generator).mul_(3).add_(centres[labels])
    new = torch.randn(shape.queries, shape.dim, generator=generator).mul_(2).add_(centres[labels[: shape.queries]])
    return new, old, labels


# ---- contenders: queries (Nq, D), gallery (Ng, D), labels (Ng,) -> metrics; normalising is part of the work


def ours(q: Tensor, g: Tensor, labels: Tensor, exclude: bool = True) -> dict[str, float]:
    ids = (torch.arange(len(q)), torch.arange(len(g))) if exclude else (None, None)
    metrics = rank(q, g, labels[: len(q)], labels, query_ids=ids[0], gallery_ids=ids[1]).metrics()
    return {name: float(metrics[name] or 0) for name in METRICS}


def matmul(q: Tensor, g: Tensor, labels: Tensor) -> dict[str, float]:
    width = 16 * (len(g) // 16 + 1)  # aligned rows and 64 MiB of scores, as ours
    scores = torch.empty(min(2**24 // width, len(q)), width, device=g.device)
    for part in q.split(len(scores)):
        torch.mm(part, g.T, out=scores[: len(part), : len(g)])
    return {}


def faiss_top(q: Tensor, g: Tensor, labels: Tensor) -> dict[str, float]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(g.shape[1])
    index.add(normalize(g).numpy())
    found = torch.from_numpy(index.search(normalize(q).numpy(), 101)[1])  # 100 and the own item
    own = found == torch.arange(len(q))[:, None]
    hits = (labels[found] == labels[: len(q), None]) & ~own
    first = (~own).cumsum(1).masked_fill(~hits, 1000).amin(1)
    return {f"cmc@{k}": float((first <= k).double().mean()) for k in (1, 5)}


def argsort(q: Tensor, g: Tensor, labels: Tensor) -> dict[str, float]:
    q, g, places, aps, firsts = normalize(q), normalize(g), torch.arange(1, len(g), device=g.device).double(), [], []
    for rows in torch.arange(len(q), device=g.device).split(2**24 // len(g)):
        scores = (q[rows] @ g.T).scatter_(1, rows[:, None], -torch.inf)  # the own item comes last and is cut off
        hits = labels[scores.argsort(1, descending=True)[:, :-1]] == labels[rows, None]
        aps.append((hits.cumsum(1) / places * hits).sum(1) / hits.sum(1))
        firsts.append(hits.byte().argmax(1) + 1)
    cmc = {f"cmc@{k}": float((torch.cat(firsts) <= k).double().mean()) for k in (1, 5)}
    return {"map": float(torch.cat(aps).mean())} | cmc


def pml(q: Tensor, g: Tensor, labels: Tensor) -> dict[str, float]:
    """Full ranking (k=None). It can exclude the own item only if query and reference vectors are the same."""
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(("mean_average_precision", "precision_at_1"), device=torch.device("cpu"))
    found = calculator.get_accuracy(normalize(q), labels[: len(q)], normalize(g), labels)
    return {"map": found["mean_average_precision"], "cmc@1": found["precision_at_1"]}


CONTENDERS = {OURS: ours, HALF: ours, MATMUL: matmul, FAISS: faiss_top, ARGSORT: argsort, PML: pml}
TASKS = {MATMUL: "scores only", FAISS: "self excluded, CMC", PML: "self included"}  # of the others: "self excluded"
SPAWN = multiprocessing.get_context("spawn")
CPU_ONLY = (FAISS, PML)  # PML's search on a GPU ends at k = 1024


# ---- measuring


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory(device: str, peak: bool = False) -> float:
    """GB held by this process, or the most it has held; nan where there is no /proc."""
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e9
    status, name = Path("/proc/self/status"), "VmHWM:" if peak else "VmRSS:"
    return 1024e-9 * int(status.read_text().split(name)[1].split()[0]) if status.exists() else math.nan


@functools.cache
def _loaded(name: str, shape: Shape, device: str) -> tuple[list[Tensor], float]:
    """The embeddings, and the GB held once they and, by a first small use, the contender's libraries are in memory."""
    q, g, labels = (x.to(device) for x in synthetic(shape))
    CONTENDERS[name](q[:16], g[: 2 * shape.classes], labels[: 2 * shape.classes])
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    return [q, g, labels], _memory(device)


def run(name: str, shape: Shape, device: str, queries: int, threads: int) -> dict[str, Any]:
    """Solve the first `queries` once, in the contender's own process."""
    torch.set_num_threads(threads)
    (q, g, labels), held = _loaded(name, shape, device)
    start = _now(device)
    metrics = CONTENDERS[name](q[:queries], g, labels)
    return {"seconds": _now(device) - start, "extra_gb": _memory(device, peak=True) - held, "metrics": metrics}


def compare(shape: Shape, repeats: int, budget: float, progress: Progress) -> list[dict[str, Any]]:
    """All contenders in turns on one shape; a row of figures each. Who has spent `budget` seconds is not repeated."""
    rows: list[dict[str, Any]] = []
    for device, name in ((device, name) for device in DEVICES for name in CONTENDERS):
        if (device == "cpu" or name not in CPU_ONLY) and (name != HALF or shape.sampled):
            share = SHARES.get(name, 1) if shape.sampled else 1
            row: dict[str, Any] = {"name": name, "device": device, "queries": round(share * shape.queries), "runs": []}
            rows.append(row | {"scale": 1 if name == HALF else 1 / share, "task": TASKS.get(name, "self excluded")})
    bar = progress.add_task(shape.name, total=len(rows) * (repeats + 1))
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, SPAWN)) for _ in rows]
        for turn in range(repeats + 1):  # the first, on few queries, warms up
            for row, pool in zip(rows, pools):
                progress.update(bar, advance=1, description=f"{shape.name}: {row['name']}, round {turn}")
                queries = row["queries"] if turn else min(64, row["queries"])
                if "error" in row or sum(row["runs"]) > budget:
                    continue
                try:
                    job = pool.submit(run, row["name"], shape, row["device"], queries, torch.get_num_threads())
                    row |= job.result()
                    row["runs"] += [row["seconds"]] if turn else []
                except Exception as error:  # not installed, or killed for memory: the others go on
                    row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    q, g, labels = synthetic(shape)
    for row in rows:
        mine = next(r for r in rows if (r["name"], r["device"]) == (OURS, row["device"]))
        if "error" not in row | mine:
            row["seconds"] = median(row["runs"]) * row["scale"]
            row["ratio"] = median(row["scale"] * theirs / own for theirs, own in zip(row["runs"], mine["runs"]))
            row["inverse"] = 1 / row["ratio"]
            expected = ours(q[: row["queries"]], g, labels, exclude=row["name"] != PML)
            row["difference"] = max((abs(value - expected[k]) for k, value in row["metrics"].items()), default=None)
    return rows


def lightning_overhead(device: str, steps: int, pairs: int, progress: Progress) -> dict[str, Any]:
    """Seconds of a training step of `Method` (ConvNet w16, 16 px, batch 256), by hand and by the suite's Trainer.

    They take turns, who is first alternates, and from equal starts they must end with equal weights.
    """
    import lightning

    from benchmark import backbones, heads, images, method, protocol, training

    class Timed(images.ImageLoader):
        def __iter__(self):  # from the first batch to the last: the same steps for both, without set-up
            for i, batch in enumerate(super().__iter__()):
                if i == 0:
                    start = _now(device)
                if i == len(self) - 1:
                    self.seconds = (_now(device) - start) / i
                yield batch

    recipe = protocol.Recipe(epochs=2, batch_size=256, augment=("flip", "crop2"))  # the first epoch warms up
    release = protocol.Release("bench", "convnet", 64, recipe=recipe)
    network, spec = functools.partial(backbones.build, "convnet", width=16), protocol.HeadSpec()
    parts = (network, lambda dim: heads.Head(torch.randn(100, dim), spec), lambda rows: heads.Head(rows, spec))
    pixels = torch.randint(0, 256, (256 * steps, 3, 16, 16), dtype=torch.uint8, device=device)
    data = (pixels, torch.arange(256 * steps, device=device) % 100, (127.0,) * 3, (64.0,) * 3)
    off = ("logger", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler", "num_sanity_val_steps")
    settings: dict[str, Any] = {"max_epochs": recipe.epochs, "precision": recipe.precision, "devices": 1}
    settings |= {"accelerator": "gpu" if device == "cuda" else "cpu", "gradient_clip_val": recipe.clip_norm}
    settings |= dict.fromkeys(off, False)  # all as in training.py, with which tests/test_bench.py compares them

    def train(by_hand: bool, folder: str) -> tuple[float, Tensor]:
        loader = Timed(*data, batch_size=256, shuffle=True, augment=recipe.augment)
        model = method.Method(method.Context(0, 0, release, 100, "cosine", *parts)).to(device)
        if by_hand:
            optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
            shares = [method.rate_share(recipe, step, 2 * steps) for step in range(2 * steps + 1)]
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shares.__getitem__)
            for epoch in range(2):
                loader.set_epoch(epoch)
                for batch in loader:
                    optimizer.zero_grad()
                    model.head(model.backbone(batch.x["image"]), batch.y).backward()
                    optimizer.step()
                    schedule.step()
        else:
            end = training.EpochEnd(Path(folder, "last.ckpt"), "bench", lambda done, total: None, recipe.epochs)
            lightning.Trainer(callbacks=[end], default_root_dir=folder, **settings).fit(model, loader)
        return loader.seconds, model.head.weight.detach().cpu()

    training._quiet()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in progress.track(range(pairs), description=f"training steps, {device}"):
            runs = {by_hand: train(by_hand, folder) for by_hand in ((True, False) if turn % 2 else (False, True))}
            rounds.append((runs[True][0], runs[False][0], float((runs[True][1] - runs[False][1]).abs().max())))
    hand, trainer, apart = zip(*rounds)
    ratio = median(t / h for h, t in zip(hand, trainer))
    return {"device": device, "by_hand": hand, "by_trainer": trainer, "ratio": ratio, "weights_differ": max(apart)}


# ---- reporting


def judge(cells: list[list[dict]], steps: list[dict]) -> list[dict[str, Any]]:
    """The targets, as far as they are measured here; those of a contender that failed are left out."""
    small, large = ({r["name"]: r for r in rows if r["device"] == "cpu" and "ratio" in r} for rows in cells)
    apart = [r["difference"] for rows in cells for r in rows if r.get("difference") is not None]
    wanted = [  # what, where, key, bound; ratios are of seconds over ours
        ("PML over ours, small cell: at least", small.get(PML), "ratio", 30),
        ("argsort over ours, small cell: at least", small.get(ARGSORT), "ratio", 10),
        ("ours over the matmul, small cell: at most", small.get(MATMUL), "inverse", 2.5),
        ("ours over the matmul, large cell: at most", large.get(MATMUL), "inverse", 1.5),
        ("ours over ours with half the queries, large cell: at most", large.get(HALF), "inverse", 2.1),
        ("extra GB of ours, small cell: at most", small.get(OURS), "extra_gb", 0.15),
        ("extra GB of ours, large cell (all its scores: 0.5): at most", large.get(OURS), "extra_gb", 0.5),
        ("largest difference to ours: at most", {"difference": max(apart)} if apart else None, "difference", 1e-6),
        *((f"Lightning over the loop by hand, {s['device']}: at most", s, "ratio", 1.05) for s in steps),
    ]
    found = []
    for what, row, key, bound in wanted:
        if row:
            met = row[key] >= bound if what.endswith("least") else row[key] <= bound
            found.append({"target": f"{what} {bound:g}", "measured": row[key], "met": met})
    return found


def table(shape: Shape, rows: list[dict]) -> Table:
    out = Table(title=f"{shape.name}: {shape.queries:,} x {shape.gallery:,} x {shape.dim}, {shape.classes:,} classes")
    for i, head in enumerate(("contender", "task", "seconds", "x ours", "rounds", "extra GB", *METRICS, "|diff.|")):
        out.add_column(head, justify="right" if i > 1 else "left")
    for row in rows:
        name = row["name"] + (", GPU" if row["device"] == "cuda" else "")
        if "ratio" not in row:
            out.add_row(name, row.get("error", "no figures of ours to compare with"))
            continue
        task = row["task"] + (f", extrapolated from {row['queries']} queries" if row["scale"] > 1 else "")
        figures = [f"{row['seconds']:.3g}", f"{row['ratio']:.2f}", str(len(row["runs"])), f"{row['extra_gb']:.2f}"]
        figures += [f"{row['metrics'][k]:.6f}" if k in row["metrics"] else "" for k in METRICS]
        out.add_row(name, task, *figures, "" if row["difference"] is None else f"{row['difference']:.0e}")
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--budget", type=float, default=45, help="seconds after which a contender is not repeated")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="all figures as JSON")
    options = parser.parse_args(arguments)
    console = Console(width=None if Console().is_terminal else 140)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    machine: dict[str, Any] = {"cpu": info.partition("model name\t: ")[2].split("\n")[0] or platform.processor()}
    machine |= {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2)}
    machine |= {"torch": torch.__version__, "gpu": torch.cuda.get_device_name() if len(DEVICES) > 1 else None}
    console.print(" | ".join(f"{key}: {value}" for key, value in machine.items()))
    cells = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for shape in QUICK if options.quick else FULL:
            cells.append({**shape._asdict(), "rows": compare(shape, options.repeats, options.budget, progress)})
            console.print(table(shape, cells[-1]["rows"]))
        size = (3, 2) if options.quick else (30, 9)
        steps = [lightning_overhead(device, *size, progress) for device in DEVICES]
    console.print("self: a query's own item. |diff.|: largest difference of a metric to ours, same task, same queries.")
    for step in steps:
        times = ", ".join(f"{how} {1e3 * median(step[how]):.2f} ms" for how in ("by_hand", "by_trainer"))
        console.print(f"Training step on {step['device']}: {times}, median ratio {step['ratio']:.3f}")
    console.print("Targets" + (" (tiny shapes: no verdict)" if options.quick else ""))
    targets = judge([cell["rows"] for cell in cells], steps)
    for target in targets:
        console.print(f"  {'met' if target['met'] else 'NOT met':7}  {target['target']}: {target['measured']:.3g}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figures = {"quick": options.quick, "machine": machine, "cells": cells, "training": steps, "targets": targets}
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    console.print(f"all figures: {options.out}")


if __name__ == "__main__":
    main()
