"""Our evaluation beside others', and what Lightning adds to a training step: `python -m benchmark.bench`.

Each contender lives in a process of its own, is warmed up, and runs in turns with the others, so that all meet what
else the machine is doing; the median is shown. Memory is the peak of that process minus what it held before the run.
"""

import argparse
import functools
import json
import logging
import multiprocessing
import os
import platform
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader

from benchmark.retrieval import rank

SPAWN = multiprocessing.get_context("spawn")
METRICS = ("map", "cmc@1", "cmc@5")


class Shape(NamedTuple):
    name: str
    queries: int
    gallery: int
    dim: int
    classes: int
    halved: bool = False  # also time half of the queries, to see whether the time is linear in them


SHAPES = (
    Shape("CIFAR-100 test", 10_000, 10_000, 128, 100),
    Shape("ImageNet val, some of its queries", 2_000, 50_000, 512, 1_000, halved=True),
)
QUICK = (Shape("quick", 200, 400, 32, 10, halved=True),)


@functools.cache
def features(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of a new model, a gallery of an old one, labels; query i and gallery item i are one image."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(shape.gallery) % shape.classes
    centres = torch.randn(shape.classes, shape.dim, generator=generator)
    new = centres[labels[: shape.queries]] + 2 * torch.randn(shape.queries, shape.dim, generator=generator)
    old = torch.randn(shape.gallery, shape.dim, generator=generator).mul_(3).add_(centres[labels])
    return new, old, labels


# A contender takes queries (Nq, D), gallery (Ng, D), labels (Ng,), device and returns the metrics that it offers.


def ours(q: Tensor, g: Tensor, labels: Tensor, device: str, exclude: bool = True) -> dict:
    ids = (torch.arange(len(q)), torch.arange(len(g))) if exclude else (None, None)
    ranking = rank(q, g, labels[: len(q)], labels, query_ids=ids[0], gallery_ids=ids[1], device=device)
    return {k: v for k, v in ranking.metrics().items() if k in METRICS}


def matmul(q: Tensor, g: Tensor, labels: Tensor, device: str) -> dict:
    rows = max(16, 2**24 // len(g))  # 64 MiB of scores, as ours
    scores = torch.empty(rows, len(g), device=device)
    for part in q.split(rows):
        torch.mm(part, g.T, out=scores[: len(part)])
    return {}


def argsort(q: Tensor, g: Tensor, labels: Tensor, device: str) -> dict:
    q, g = normalize(q), normalize(g)
    ap, first = [], []
    for rows in torch.arange(len(q), device=device).split(max(16, 2**24 // len(g))):
        scores = q[rows] @ g.T
        scores[torch.arange(len(rows)), rows] = -torch.inf  # the own item goes last and is cut off
        order = scores.argsort(1, descending=True)[:, :-1]
        hits = labels[order] == labels[rows, None]
        precision = hits.cumsum(1) / torch.arange(1, len(g), device=device)
        ap.append((precision * hits).sum(1) / hits.sum(1))
        first.append(hits.int().argmax(1) + 1)
    return _metrics(torch.cat(first)) | {"map": float(torch.cat(ap).mean())}


def faiss_top_k(q: Tensor, g: Tensor, labels: Tensor, device: str) -> dict:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(g.shape[1])
    index.add(normalize(g).numpy())
    found = torch.from_numpy(index.search(normalize(q).numpy(), 6)[1])
    own = found == torch.arange(len(q))[:, None]  # takes no place in the ranking
    hits, place = (labels[found] == labels[: len(q), None]) & ~own, (~own).cumsum(1)
    return _metrics(place.masked_fill(~hits, 1000).amin(1))


def metric_learning(q: Tensor, g: Tensor, labels: Tensor, device: str) -> dict:
    """Full ranking (k=None). The own item stays in: the calculator refuses to exclude it across two models."""
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(("mean_average_precision", "precision_at_1"), k=None, device=torch.device(device))
    got = calculator.get_accuracy(normalize(q), labels[: len(q)], normalize(g), labels)
    return {"map": float(got["mean_average_precision"]), "cmc@1": float(got["precision_at_1"])}


def _metrics(first: Tensor) -> dict[str, float]:
    return {f"cmc@{k}": float((first <= k).double().mean()) for k in (1, 5)}


CONTENDERS = {
    "ours": ours,
    "matmul alone": matmul,
    "faiss, top 6 (CMC)": faiss_top_k,
    "chunked argsort": argsort,
    "pytorch-metric-learning": metric_learning,
}
ON_GPU = ("ours", "matmul alone", "chunked argsort")


def timed(name: str, shape: Shape, device: str, threads: int, count: int) -> dict:
    """One run on the first `count` queries, in the contender's own process; count 0 warms up."""
    torch.set_num_threads(threads)
    q, g, labels = (x.to(device) for x in features(shape))
    if not count:
        return CONTENDERS[name](q[:16], g[:1000], labels[:1000], device)
    before, start = _memory(device, reset=True), time.perf_counter()
    metrics = CONTENDERS[name](q[:count], g, labels, device)
    if device == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "peak_gb": (_memory(device) - before) / 1e9, "metrics": metrics}


def _memory(device: str, reset: bool = False) -> int:
    """Bytes: the peak so far or, with `reset`, what is held now, and from here on a new peak; always 0 but on Linux."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:" if reset else "VmHWM:")[1].split()[0])
    except OSError:
        return 0


def compare(shape: Shape, repeats: int, budget: float, progress: Progress) -> list[dict]:
    """All contenders on one shape in turns. Who has spent `budget` seconds is not repeated."""
    pairs = [(name, "cpu") for name in CONTENDERS] + [(name, "cuda") for name in ON_GPU if torch.cuda.is_available()]
    rows: list[dict] = [{"contender": name, "device": device, "runs": []} for name, device in pairs]
    threads = torch.get_num_threads()
    turns = ["warm-up", *(["half"] if shape.halved else []), *["runs"] * repeats]
    bar = progress.add_task(shape.name, total=len(pairs) * len(turns))
    with ExitStack() as stack:
        workers = [stack.enter_context(ProcessPoolExecutor(1, SPAWN)) for _ in rows]
        for turn in turns:
            for row, worker in zip(rows, workers):
                name = row["contender"]
                progress.update(bar, description=f"{shape.name}: {name} ({turn})", advance=1)
                if "error" in row or sum(row["runs"]) > budget:
                    continue
                count = {"warm-up": 0, "half": shape.queries // 2}.get(turn, shape.queries)
                try:
                    run = worker.submit(timed, name, shape, row["device"], threads, count).result()
                except Exception as error:  # a contender that is not installed, or that ran out of memory
                    row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                    continue
                if turn == "half":
                    row["half_seconds"] = run["seconds"]
                elif turn == "runs":
                    row["runs"].append(run.pop("seconds"))
                    row |= run | {"seconds": median(row["runs"])}
    own = {exclude: ours(*features(shape), "cpu", exclude) for exclude in (True, False)}
    for row in rows:
        if "seconds" in row:
            expected = own[row["contender"] != "pytorch-metric-learning"]
            row["difference"] = max((abs(v - expected[k]) for k, v in row["metrics"].items()), default=None)
            base = next(r for r in rows if r["contender"] == "ours" and r["device"] == row["device"])
            row["ratio"] = row["seconds"] / base["seconds"]
    return rows


def lightning_overhead(steps: int = 20, pairs: int = 7, size: int = 256) -> dict[str, float]:
    """Seconds per training step of a small ConvNet, by hand and by a bare Trainer in turns; median ratio of the pairs."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, 16, 16, generator=generator).contiguous(memory_format=torch.channels_last)
    data: Any = [(x, torch.randint(0, 100, (size,), generator=generator))] * steps
    batches = DataLoader(data, batch_size=None)

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            layers: list[nn.Module] = []
            for a, b, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 2)):
                layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 100))
            self.net.to(memory_format=torch.channels_last)

        def training_step(self, batch, batch_idx):
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True)

        def on_train_start(self):
            self.start = time.perf_counter()

        def on_train_end(self):
            self.seconds = time.perf_counter() - self.start

    def by_hand() -> float:
        model = Model().train()
        optimizer = model.configure_optimizers()
        start = time.perf_counter()
        for i, data in enumerate(batches):
            loss = model.training_step(data, i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (time.perf_counter() - start) / steps

    def by_trainer() -> float:
        off: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        model = Model()
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, enable_checkpointing=False, **off)
        trainer.fit(model, batches)
        return model.seconds / steps

    by_hand(), by_trainer()
    runs = [(by_hand(), by_trainer()) if i % 2 else (by_trainer(), by_hand())[::-1] for i in range(pairs)]
    hand, trainer = (median(r[i] for r in runs) for i in (0, 1))
    return {"by_hand": hand, "by_trainer": trainer, "ratio": median(b / a for a, b in runs), "pairs": pairs}


def machine() -> dict:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    cpu, load = (names or [platform.processor()])[0], round(os.getloadavg()[0], 2)
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": load, "gpu": gpu,
            "torch": torch.__version__, "python": platform.python_version()}  # fmt: skip


def table(shape: Shape, rows: list[dict]) -> Table:
    title = f"{shape.name}: {shape.queries:,} x {shape.gallery:,} x {shape.dim}, {shape.classes:,} classes"
    out = Table(title=title, title_justify="left", box=SIMPLE)
    heads = ("", "seconds", "x ours", "runs", "peak GB", "mAP", "CMC@1", "CMC@5", "|diff.|")
    for i, head in enumerate((*heads, "x half") if shape.halved else heads):
        out.add_column(head, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        name = row["contender"] + (", GPU" if row["device"] == "cuda" else "")
        if "error" in row:
            out.add_row(name, row["error"])
            continue
        metrics, half = row["metrics"], row.get("half_seconds")
        shown = [f"{metrics[k]:.5f}" if k in metrics else "" for k in METRICS]
        difference = "" if row["difference"] is None else f"{row['difference']:.0e}"
        cells = [f"{row['seconds']:.3g}", f"{row.get('ratio', 0):.2f}", str(len(row["runs"])), f"{row['peak_gb']:.2f}"]
        out.add_row(name, *cells, *shown, difference, f"{row['seconds'] / half:.2f}" if half else "")
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each contender (default 5)")
    parser.add_argument("--budget", type=float, default=20, help="seconds after which a contender is not repeated")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    options = parser.parse_args(arguments)
    # For the processes below. By default an OpenMP thread waits by spinning; where another program keeps a core busy,
    # that costs a time slice (8 ms) in every operation.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    console = Console()
    if not console.is_terminal:
        console.width = 120
    result: dict[str, Any] = {"machine": machine(), "shapes": []}
    console.print(" | ".join(f"{k} {v}" for k, v in result["machine"].items()))
    for shape in QUICK if options.quick else SHAPES:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            rows = compare(shape, options.repeats, options.budget, progress)
        console.print(table(shape, rows))
        result["shapes"].append({**shape._asdict(), "rows": rows})
    console.print(
        "x half: time over that of half the queries. |diff.|: largest difference to our metrics; to ours with each"
    )
    console.print("query's own item kept in for pytorch-metric-learning, which refuses to exclude it across models.")
    with console.status("Lightning against a loop by hand"), ProcessPoolExecutor(1, SPAWN) as worker:
        step = worker.submit(lightning_overhead, *((3, 2, 8) if options.quick else ())).result()
    result["lightning"] = step
    console.print(
        f"training step, ConvNet-4, 16 px, batch 256: by hand {1e3 * step['by_hand']:.1f} ms, by Lightning's Trainer "
        f"{1e3 * step['by_trainer']:.1f} ms, median ratio {step['ratio']:.3f}"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"figures: {options.out}")


if __name__ == "__main__":
    main()
