"""Online backfilling: what users get while the gallery is being re-embedded, item by item.

A gallery stored by older releases passes to release t. Queries of release t meet items not yet re-embedded through the
method's links, and new ones directly; all are merged by the protocol's similarity. beta is the re-embedded share; the first
floor(beta N) items of an order are done. At beta = 0 the curve is the matrix cell (t, k), at beta = 1 the cell (t, t).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark import curves, training
from benchmark.embeddings import Link, Stored
from benchmark.errors import UserError
from benchmark.mixtures import rank_mixtures
from benchmark.outputs import values
from benchmark.plan import Node, Plan
from benchmark.protocol import derive_seed
from benchmark.results import method_info, protocol_info, suite_info
from benchmark.retrieval import Ranking
from benchmark.store import Store
from benchmark.task import Task

METRICS = ("cmc@1", "cmc@5", "map")
DRAWS = 3  # random orders, averaged


def nodes(plan: Plan) -> list[Node]:
    """One node for every pair of releases, and one for a gallery that holds items of all releases at once.

    Raises:
        UserError: a cell that the curves would begin with is undefined.
    """
    last = len(plan.releases) - 1
    stores = [(t, [k]) for t in range(1, last + 1) for k in range(t)]
    return [_node(plan, t, stored) for t, stored in (*stores, *([(last, list(range(last)))] if last > 1 else []))]


def _node(plan: Plan, t: int, stored: list[int]) -> Node:
    inputs = {}
    for k in [*stored, t]:
        cell = plan.cells[t, k]
        if cell is None:
            raise UserError(
                f"{plan.method.name}: no link from release {t} to items of release {k}, so no backfill curve"
            )
        inputs[f"cell/{k}"] = cell
    before = plan.cells[stored[0], stored[0]]
    assert before is not None
    inputs["before"] = before
    spec = {"t": t, "stored": stored, "seed": plan.seed, "draws": DRAWS, "split": plan.split}
    label = f"backfill from {' and '.join(map(str, stored))} to {t}, {plan.method.name}"
    return Node("backfill", label, spec, inputs)


def compute(node: Node, task: Task, store: Store, report: training.Report) -> None:
    """All orders of one gallery; writes backfill.json."""
    t, stored, split = node.spec["t"], node.spec["stored"], node.spec["split"]
    links, queries, galleries, views = [], [], [], []
    with torch.inference_mode():
        for k in [*stored, t]:
            cell = node.inputs[f"cell/{k}"]
            link, sides = training.served(cell, task, store)
            at = Stored(k, cell.spec["stored"])
            links.append(link)
            views.append((sides["gallery"], at))
            queries.append(link.query(sides["query"], at))
            galleries.append(link.gallery(sides["gallery"], at))
    layers = [task.cell(q, g, split) for q, g in zip(queries, galleries)]
    count, shares = len(galleries[0]), curves.grid()
    start = _start(count, len(stored), derive_seed(node.spec["seed"], t, "start"))
    before = {
        name: tensor.numpy()
        for name, tensor in store.read_tensors(node.inputs["before"], "per_query.safetensors").items()
    }
    was_right = values({f"{name}/0/0": v for name, v in before.items()}, "cmc@1", 0, 0) == 1
    ends = {
        "old_old": _cell_metrics(node.inputs["before"], store),
        "new_new": _cell_metrics(node.inputs[f"cell/{t}"], store),
    }
    labels = task.items(split, "query")[1]
    masks = task.strata(labels)
    made = orders(links, views, galleries, task.items(split, "gallery")[1], start, task.protocol.similarity, node.spec)
    turns = [_turns(order, shares) for permutations in made.values() for order in permutations]
    ranked = iter(rank_mixtures(layers, start, torch.stack(turns), len(shares)))
    found = []
    for name, permutations in made.items():
        rankings = [next(ranked) for _ in permutations]  # by draw, by share
        table = {
            metric: {
                stratum: np.array([[r.metrics(select=mask)[metric] for r in draw] for draw in rankings])
                for stratum, mask in masks.items()
            }
            for metric in METRICS
        }
        flips = np.array([[_negative(was_right, r) for r in draw] for draw in rankings])
        found.append(curves.summarise(name, task.protocol.primary_metric, table, flips, ends))
        report(len(found), len(made))
    encoders = {
        int(name.split("/")[1]) for k in stored for name in node.inputs[f"cell/{k}"].inputs if name.startswith("query/")
    }
    backfill = curves.Backfill(
        release=t,
        stored=stored,
        start=[float((start == i).float().mean()) for i in range(len(stored))],
        shares=[float(share) for share in shares],
        query_encoders=len(encoders | {t}),
        curves=found,
        **ends,
    )
    store.write_json(node, "backfill.json", backfill.model_dump(mode="json"))


def orders(
    links: Sequence[Link],
    views: Sequence[tuple[Any, Stored]],
    galleries: Sequence[Tensor],
    labels: Tensor,
    start: Tensor,
    similarity: str,
    spec: Any,
) -> dict[str, list[Tensor]]:
    """Name of an order -> permutations of the gallery (N,), first re-embedded first.

    "random" always. "own": the method's. Where stored items are moved, z: "oracle distance", descending |new - z|, which needs
    the new embeddings and is a reference only; "class means", descending distance of z to the mean of its class in the
    gallery (lambda-orthogonality's order; needs labels).
    """
    count = len(labels)
    seeds = [derive_seed(spec["seed"], spec["t"], "order", draw) for draw in range(spec["draws"])]
    made = {"random": [torch.randperm(count, generator=torch.Generator().manual_seed(s)) for s in seeds]}
    with torch.inference_mode():
        own = [link.priority(*view) for link, view in zip(links[:-1], views[:-1])]
        if all(p is not None for p in own):
            made["own"] = [_descending(own, start)]  # type: ignore[arg-type]
        moved = [not torch.equal(g, view[0][view[1].release, "main"]) for g, view in zip(galleries[:-1], views[:-1])]
        if all(moved):
            z = [_seen(g, similarity) for g in galleries]
            made["oracle distance"] = [_descending([(z[-1] - g).norm(dim=1) for g in z[:-1]], start)]
            made["class means"] = [_descending([_to_class_mean(g, labels.to(g.device)) for g in z[:-1]], start)]
    return made


def record(plan: Plan, task: Task, store: Store, overrides: Sequence[str] = ()) -> curves.BackfillRecord:
    """The backfill record of a plan whose `nodes` have been computed."""
    return curves.BackfillRecord(
        schema_version=curves.SCHEMA_VERSION,
        protocol=protocol_info(plan.protocol, overrides, plan.split),
        suite=suite_info(),
        method=method_info(plan),
        seed=plan.seed,
        data_fingerprint=task.fingerprint,
        gallery=len(task.items(plan.split, "gallery")[0]),
        backfills=[curves.Backfill.model_validate(store.read_json(node, "backfill.json")) for node in nodes(plan)],
    )


def _turns(permutation: Tensor, shares: np.ndarray) -> Tensor:
    """(N,) number of the first share at which each item has been re-embedded."""
    place = torch.empty_like(permutation)
    place[permutation] = torch.arange(len(permutation))  # item -> how many come before it
    done = torch.tensor([int(np.floor(share * len(place) + 1e-9)) for share in shares])
    return torch.searchsorted(done, place, right=True)


def _start(count: int, releases: int, seed: int) -> Tensor:
    """(N,) which of the older releases holds each item: all shares equal, drawn from the seed."""
    state = torch.arange(count) * releases // count
    return state[torch.randperm(count, generator=torch.Generator().manual_seed(seed))] if releases > 1 else state


def _descending(by_layer: Sequence[Tensor], start: Tensor) -> Tensor:
    """Items from the highest value of the layer that each is in."""
    value = torch.stack([v.float().cpu() for v in by_layer])[start, torch.arange(len(start))]
    return value.argsort(descending=True, stable=True)


def _to_class_mean(z: Tensor, labels: Tensor) -> Tensor:
    sums = z.new_zeros(int(labels.max()) + 1, z.shape[1]).index_add_(0, labels, z)
    return (z - (sums / labels.bincount()[:, None].clamp(min=1))[labels]).norm(dim=1)


def _seen(z: Tensor, similarity: str) -> Tensor:
    return F.normalize(z) if similarity == "cosine" else z


def _negative(was_right: np.ndarray, ranking: Ranking) -> float:
    first = ranking.first.numpy()
    return float((was_right & (first != 1))[first > 0].mean())


def _cell_metrics(cell: Node, store: Store) -> dict[str, float]:
    scores = store.read_json(cell, "scores.json")["all"]
    return {metric: scores[metric] for metric in METRICS}
