"""Online backfilling: what users get while the gallery is being re-embedded, item by item.

A gallery stored by older releases passes to release t. Queries of release t meet items not yet re-embedded through the
method's links, and new ones directly; all are merged by the protocol's similarity. beta is the re-embedded share; the first
floor(beta N) items of an order are done. At beta = 0 the curve is the matrix cell (t, k), at beta = 1 the cell (t, t).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark import catalog, curves, training
from benchmark.embeddings import Link, Stored, View
from benchmark.errors import UserError
from benchmark.mixtures import rank_mixtures
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

    A gallery that the method cannot serve, as a cell of it is undefined, has none.

    Raises:
        UserError: the task's queries search two kinds of items.
    """
    if catalog.load("task", plan.protocol.task).sides:
        raise UserError(
            f"{plan.protocol.task} has no backfill curves yet: they are defined for images searched by images"
        )
    last = len(plan.releases) - 1
    stores = [(t, [k]) for t in range(1, last + 1) for k in range(t)]
    made = [_node(plan, t, stored) for t, stored in (*stores, *([(last, list(range(last)))] if last > 1 else []))]
    return [node for node in made if node is not None]


def _node(plan: Plan, t: int, stored: list[int]) -> Node | None:
    """Before the update the same items are searched by queries of the newest release that stored some of them."""
    newest = max(stored)
    cells = {f"cell/{k}": plan.cells[t, k] for k in [*stored, t]} | {
        f"before/{k}": plan.cells[newest, k] for k in stored
    }
    inputs = {name: cell for name, cell in cells.items() if cell is not None}
    if len(inputs) < len(cells):
        return None
    spec = {
        "t": t,
        "stored": stored,
        "seed": plan.seed,
        "draws": DRAWS,
        "split": plan.split,
        "shares": len(curves.grid()),
    }
    label = f"backfill from {' and '.join(map(str, stored))} to {t}, {plan.method.name}"
    return Node("backfill", label, spec, inputs)


class Layer(NamedTuple):
    """Items of one release as queries of another meet them."""

    link: Link
    views: dict[View, Tensor]  # of the items
    at: Stored
    queries: Tensor  # (Nq, D) what the link makes of the queries
    gallery: Tensor  # (Ng, D) and of the items

    @property
    def moved(self) -> bool:
        return not torch.equal(self.gallery, self.views[self.at.release, "main"])


def _layer(cell: Node, task: Task, store: Store) -> Layer:
    link, sides = training.served(cell, task, store)
    at = Stored(cell.spec["k"], cell.spec["stored"])
    return Layer(link, sides["gallery"], at, link.query(sides["query"], at), link.gallery(sides["gallery"], at))


def compute(node: Node, task: Task, store: Store, report: training.Report) -> None:
    """All orders of one gallery; writes backfill.json."""
    t, stored, split = node.spec["t"], node.spec["stored"], node.spec["split"]
    with torch.inference_mode():
        layers = [_layer(node.inputs[f"cell/{k}"], task, store) for k in [*stored, t]]
        older = [_layer(node.inputs[f"before/{k}"], task, store) for k in stored]
    ready, before = ([task.cell(x.queries, x.gallery, split) for x in some] for some in (layers, older))
    count, shares, primary = len(layers[0].gallery), curves.grid(), task.protocol.primary_metric
    start = _start(count, len(stored), derive_seed(node.spec["seed"], t, "start"))
    never = torch.ones(1, count, dtype=torch.int64)
    old = rank_mixtures([*before, before[-1]], start, never, 1)[0][0]
    labels = task.items(split, "query")[1]
    masks = task.strata(labels)
    made = orders(layers, task.items(split, "gallery")[1], start, task.protocol.similarity, node.spec)
    turns = torch.stack([_turns(order, shares) for permutations in made.values() for order in permutations])
    ranked = iter(rank_mixtures(ready, start, turns, len(shares), report))
    ends = {"old_old": _metrics(old), "new_new": _cell_metrics(node.inputs[f"cell/{t}"], store)}
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
        flips = np.array([[_negative(old, r) for r in draw] for draw in rankings])
        found.append(curves.summarise(name, primary, table, flips, ends))
    encoders = {
        int(name.split("/")[1]) for k in stored for name in node.inputs[f"cell/{k}"].inputs if name.startswith("query/")
    }
    backfill = curves.Backfill(
        release=t,
        stored=stored,
        start=[float((start == i).float().mean()) for i in range(len(stored))],
        shares=[float(share) for share in shares],
        query_encoders=len(encoders | {t}),
        moved=any(x.moved for x in layers[:-1]),
        curves=found,
        **ends,
    )
    store.write_json(node, "backfill.json", backfill.model_dump(mode="json"))


def orders(
    layers: Sequence[Layer], labels: Tensor, start: Tensor, similarity: str, spec: Any
) -> dict[str, list[Tensor]]:
    """Name of an order -> permutations of the gallery (N,), first re-embedded first.

    "random" always. "own": the method's. Where stored items are moved, to z: "oracle distance", descending distance of z to the
    item's new embedding where queries meet it, which needs the new embeddings and is a reference only; "class means",
    descending distance of z to the mean of its class among items of the same release (lambda-orthogonality's; needs labels).
    """
    count, *older, new = len(labels), *layers
    seeds = [derive_seed(spec["seed"], spec["t"], "order", draw) for draw in range(spec["draws"])]
    made = {"random": [torch.randperm(count, generator=torch.Generator().manual_seed(s)) for s in seeds]}
    with torch.inference_mode():
        own = [x.link.priority(x.views, x.at) for x in older]
        if all(p is not None for p in own):
            made["own"] = [_descending(own, start)]  # type: ignore[arg-type]
        if all(x.moved for x in older):
            z = [_seen(x.gallery, similarity) for x in older]
            there = [_seen(x.link.query({(spec["t"], "main"): new.gallery}, x.at), similarity) for x in older]
            made["oracle distance"] = [_descending([(a - b).norm(dim=1) for a, b in zip(there, z)], start)]
            means = [_to_class_mean(x, labels.to(x.device), (start == i).to(x.device)) for i, x in enumerate(z)]
            made["class means"] = [_descending(means, start)]
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
        primary_metric=plan.protocol.primary_metric,
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


def _to_class_mean(z: Tensor, labels: Tensor, held: Tensor) -> Tensor:
    """(N,) distance of each item to the mean of those of its class that are `held` (N,) bool."""
    sums = z.new_zeros(int(labels.max()) + 1, z.shape[1]).index_add_(0, labels[held], z[held])
    counts = labels[held].bincount(minlength=len(sums))[:, None].clamp(min=1)
    return (z - (sums / counts)[labels]).norm(dim=1)


def _seen(z: Tensor, similarity: str) -> Tensor:
    return F.normalize(z) if similarity == "cosine" else z


def _negative(old: Ranking, new: Ranking) -> float:
    """Share of the queries whose first answer was right and is wrong now."""
    return float(((old.first == 1) & (new.first != 1))[new.first > 0].double().mean())


def _metrics(ranking: Ranking) -> dict[str, float]:
    found = ranking.metrics()
    return {metric: float(found[metric] or 0) for metric in METRICS}


def _cell_metrics(cell: Node, store: Store) -> dict[str, float]:
    scores = store.read_json(cell, "scores.json")["all"]
    return {metric: scores[metric] for metric in METRICS}
