"""Exact metrics of a gallery in mid-backfill: one product per release and query chunk for all stages of all orders.

At each stage an item counts by the score of the release that has embedded it so far. An item changes its score once. So each
score is looked up once among the scores that the query's positives ever have, and an order of re-embedding costs one more
addition per item, whatever the number of stages; `retrieval.rank` of every stage gives the same bits (tests).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from benchmark.retrieval import Cell, Ranking


def rank_mixtures(
    layers: Sequence[Cell],
    start: Tensor,
    turns: Tensor,
    stages: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Ranking]]:
    """Rankings of one gallery by order of re-embedding and stage, [K][S].

    layers: for each release that an item can be embedded by, a `Cell` of one block with all items in order, by that
        release's vectors and the query vectors that serve them; the last is the release to which the gallery passes.
    start: (Ng,) integers, the layer that each item is in at the beginning, but the last.
    turns: (K, Ng) integers in [0, S], the stage from which on an item is in the last layer; S = at none of them.
    report: called with (queries done, of how many).

    Raises ValueError if the layers are not of the same queries and items, or `start` or `turns` name none of them.
    """
    from benchmark import kernels

    first, last = layers[0], layers[-1]
    if any((x.nq, x.ng, x.similarity) != (first.nq, first.ng, first.similarity) or len(x.blocks) > 1 for x in layers):
        raise ValueError("layers must hold the same queries and items, in one block each, under one similarity")
    if start.shape != (first.ng,) or start.min() < 0 or start.max() >= len(layers) - 1:
        raise ValueError(f"start must be ({first.ng},) numbers of the first {len(layers) - 1} layers")
    if turns.shape[1:] != (first.ng,) or turns.min() < 0 or turns.max() > stages:
        raise ValueError(f"turns must be (orders, {first.ng}) stages from 0 to {stages}")
    size = max(16, first.buffer_mb * 2**20 // (4 * first.ng))
    few = max(1, -(-min(size, first.nq) // (4 * torch.get_num_threads())))
    made = turns.to(torch.int32).contiguous().numpy()
    ap = torch.empty(len(turns), stages, first.nq, dtype=torch.float64)
    best = torch.empty(len(turns), stages, first.nq, dtype=torch.int64)
    positives = torch.empty(first.nq, dtype=torch.int64)

    def work(rows: slice, before: Tensor, after: Tensor) -> int:
        columns, own = first.columns(torch.arange(rows.start, rows.stop)), first.own[rows]
        found = ap[:, :, rows], best[:, :, rows], positives[rows]
        arrays = (x.numpy() for x in (before, after, columns, own))
        kernels.mixtures(*arrays, made, stages, *(x.numpy() for x in found))
        return rows.stop

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for at in range(0, first.nq, size):
            rows = torch.arange(at, min(at + size, first.nq))
            before, after = (torch.empty(len(rows), first.ng, device=first.device) for _ in range(2))
            for i, layer in enumerate(layers[:-1]):
                layer.score(rows, after)
                before = torch.where(start.to(first.device) == i, after, before)
            last.score(rows, after)
            parts = before.cpu().split(few), after.cpu().split(few)
            slices = [slice(int(part[0]), int(part[-1]) + 1) for part in rows.split(few)]
            for done in pool.map(work, slices, *parts):
                report(done, first.nq)
    return [[Ranking(ap[k, s], best[k, s], positives) for s in range(stages)] for k in range(len(turns))]
