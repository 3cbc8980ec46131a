"""Executes plans on this machine: each node once, skipped if done, resumed if half done, alone or several at a time."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmark import backfilling, catalog, training
from benchmark.classwise import refuse_empty
from benchmark.embeddings import Embeddings, Stored, View, read_tensors
from benchmark.errors import UserError
from benchmark.files import sha256_file
from benchmark.heads import class_means
from benchmark.images import Batch
from benchmark.plan import Node, Plan
from benchmark.protocol import LEADERBOARDS, Protocol
from benchmark.store import Store
from benchmark.task import Task

Progress = Callable[[str, Node, int, int], None]  # event ("start" | "step" | "done" | "cached"), node, done, total


def open_task(protocol: Protocol, data: Path | None, device: str) -> Task:
    """The protocol's task with its data read and checked.

    Raises:
        UserError: unknown task, an argument it does not take, data missing, short, corrupt or different from the frozen ones.
    """
    cls = catalog.load("task", protocol.task)
    try:
        task = cls(protocol, data, device, **protocol.task_args)
    except TypeError as error:
        raise UserError(
            f"task {protocol.task}: {str(error).split('()')[-1].strip()} (in the protocol's task_args)"
        ) from None
    task.check()
    return task


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def execute(
    wanted: Sequence[Plan | Node],
    task: Task,
    store: Store,
    *,
    jobs: int = 1,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Compute every node of the plans, or given nodes with their inputs.

    With several jobs, nodes that do not wait for one another run side by side.

    Args:
        threads: of torch, per job; None = the cores shared out equally.
        progress: called in this process at the start, during and at the end of each node.
    """
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    progress = progress or (lambda event, node, done, total: None)
    nodes = {node.id: node for item in wanted for node in (item.nodes if isinstance(item, Plan) else item.walk())}
    waiting = []
    for node in nodes.values():
        if store.done(node):
            store.check(node)
            progress("cached", node, 1, 1)
        else:
            waiting.append(node)
    if jobs == 1:
        torch.set_num_threads(threads)
        for node in waiting:
            progress("start", node, 0, 1)
            compute(node, task, store, lambda done, total, node=node: progress("step", node, done, total))  # type: ignore[misc]
            progress("done", node, 1, 1)
        return
    _side_by_side(waiting, task, store, jobs, threads, progress)


def _side_by_side(waiting: list[Node], task: Task, store: Store, jobs: int, threads: int, progress: Progress) -> None:
    arguments = (task.protocol, task.root, task.device, store.root, threads)
    running: dict[Future, Node] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=arguments) as pool:
        try:
            while waiting or running:
                ready = [n for n in waiting if len(running) < jobs and all(store.done(i) for i in n.inputs.values())]
                # training first: everything else waits for it
                for node in sorted(ready, key=lambda n: n.kind != "train")[: jobs - len(running)]:
                    waiting.remove(node)
                    progress("start", node, 0, 1)
                    running[pool.submit(_work, node)] = node
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    node = running.pop(future)
                    future.result()
                    progress("done", node, 1, 1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


_worker: dict[str, Any] = {}


def _start_worker(protocol: Protocol, data: Path | None, device: str, root: Path, threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _worker.update(task=open_task(protocol, data, device), store=Store(root))


def _end_with_parent() -> None:
    """A run that is killed, by a scheduler say, leaves no workers behind; what they were writing is whole or is not there."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(node: Node) -> None:
    compute(node, _worker["task"], _worker["store"], lambda done, total: None)


def compute(node: Node, task: Task, store: Store, report: training.Report) -> None:
    """One node, unless another process has just done it."""
    with store.lock(node):
        if store.done(node):
            return
        for source in node.inputs.values():
            store.check(source)
        started = time.perf_counter()
        spent_before = _KINDS[node.kind](node, task, store, report) or 0.0  # by a training that was interrupted
        seconds = spent_before + time.perf_counter() - started
        store.finish(node, {"seconds": seconds, "threads": torch.get_num_threads(), "device": task.device})


def _frozen(node: Node, task: Task, store: Store, report: training.Report) -> None:
    """Release 0 as the leaderboard froze it: every method starts from the very same old model."""
    path = LEADERBOARDS / node.spec["protocol"] / "old" / f"seed{node.spec['seed']}.safetensors"
    if not path.is_file():
        raise UserError(f"frozen old release {path} is missing; restore it from the repository")
    if sha256_file(path) != node.spec["sha256"]:
        raise UserError(
            f"frozen old release {path} does not match its hash in the protocol; restore it from the repository"
        )
    store.write_tensors(node, "encoder.safetensors", read_tensors(path))
    store.write_json(node, "train.json", json.loads(path.with_suffix(".json").read_bytes()))


def _embed(node: Node, task: Task, store: Store, report: training.Report) -> None:
    encoder, _ = training.load_released(node.inputs["encoder"], task, store)
    loader, ids, labels = _items(task, node.spec["items"], node.inputs["encoder"].spec["t"])
    embedded = embed(encoder, loader, report)
    t = node.inputs["encoder"].spec["t"]
    views: dict[View, Tensor] = {(t, name): matrix for name, matrix in embedded.items()}
    meta = task.origin(t, store.folder(node.inputs["encoder"]) / "encoder.safetensors")
    Embeddings(ids, views, labels, meta).check(node.label).save(store.folder(node) / "embeddings.safetensors")


def _items(task: Task, items: str, t: int) -> tuple[Iterable[Batch], Tensor, Tensor]:
    """Loader, ids and labels of "train:<release>", "<split>:<side>", of a two-sided task also "train:<release>:<side>".

    Two-sided tasks prepare images and texts as release `t`, which embeds them, wants them.
    """
    split, _, side = items.partition(":")
    if task.sides:
        ids, labels = task.items(items.rpartition(":")[0], items.rpartition(":")[2])
        return task.side_loader(items.rpartition(":")[0], items.rpartition(":")[2], t), ids, labels
    if split != "train":
        ids, labels = task.items(split, side)
        return task.item_loader(split, side), ids, labels
    loader = task.train_loader(int(side), "eval", 0)
    labels = torch.cat([batch.y.cpu() for batch in loader])
    return loader, torch.arange(len(labels)), labels


def embed(encoder: training.Encoder, loader: Iterable[Batch], report: training.Report) -> dict[str, Tensor]:
    """Embeddings (N, D) float32 on the CPU by view, in the loader's order; computed in the precision of the weights."""
    dtype, parts = next(encoder.network.parameters()).dtype, []
    total = len(loader) if isinstance(loader, Sized) else 0
    with torch.inference_mode(), _no_tf32():
        for i, batch in enumerate(loader):
            x = {name: v.to(dtype) if v.is_floating_point() else v for name, v in batch.x.items()}
            parts.append({name: z.float().cpu() for name, z in encoder(x).items()})
            report(i + 1, total)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _means(node: Node, task: Task, store: Store, report: training.Report) -> None:
    source = node.inputs["embeddings"]
    embedded, release = store.embeddings(source), source.inputs["encoder"].spec["t"]
    assert embedded.labels is not None
    means, counts = class_means(embedded.main(release), embedded.labels, task.classes(node.spec["t"]))
    refuse_empty(counts)
    store.write_tensors(node, "means.safetensors", {"means": means, "counts": counts})


def _score(node: Node, task: Task, store: Store, report: training.Report) -> None:
    link, sides = training.served(node, task, store)
    stored = Stored(node.spec["k"], node.spec["stored"])
    pairs = {}
    with torch.inference_mode():
        for direction in task.directions:
            query, gallery = (
                {view: z for view, z in sides[side].items() if fits(view, side, direction)} for side in sides
            )
            pairs[direction] = link.query(query, stored), link.gallery(gallery, stored)
    scores = task.score_all(pairs, node.spec["split"])
    store.write_json(node, "scores.json", scores.metrics)
    store.write_tensors(node, "per_query.safetensors", scores.per_query)


def fits(view: View, side: str, direction: str) -> bool:
    """Whether `view` is read on the "query" or "gallery" side of a direction: of "I2T" images, then texts."""
    modality = {"I": "image", "T": "text"}[direction[0 if side == "query" else 2]]
    return direction == "I2I" or view[1] == modality


_KINDS: dict[str, Callable[[Node, Task, Store, training.Report], float | None]] = {
    "train": training.train,
    "frozen": _frozen,
    "fit": training.fit,
    "embed": _embed,
    "means": _means,
    "score": _score,
    "backfill": backfilling.compute,
}
