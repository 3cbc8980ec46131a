"""Exact nearest neighbours and what two rankings have in common; rows of a ranking are gallery rows, best first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmark.vectors import Array

Similarity = Literal["cosine", "l2"]
Rows = NDArray[np.int64]  # (Nq, k); -1 where there is none
SCORES = 2**23  # scores held at a time: 32 MiB


class Found(NamedTuple):
    rows: Rows  # (Nq, k)
    scores: Array  # (Nq, k), descending: cosine, or minus half the squared distance


def search(
    queries: Array, gallery: Array, k: int, similarity: Similarity, own: NDArray[np.int64] | None = None
) -> Found:
    """The k nearest of gallery (Ng, D) for each of queries (Nq, D), exactly; unit rows are expected under "cosine".

    own: (Nq,) the gallery row that is the query's own item and no candidate; -1 = none.
    """
    g, parts, step = torch.from_numpy(gallery), [], batch(len(gallery))
    for start in range(0, len(queries), step):
        scores = score(torch.from_numpy(queries[start : start + step]), g, similarity)
        if own is not None:
            has = np.flatnonzero(own[start : start + step] >= 0)
            scores[has, own[start : start + step][has]] = -torch.inf
        parts.append(scores.topk(min(k, scores.shape[1])))
    rows = torch.cat([part.indices for part in parts])
    values = torch.cat([part.values for part in parts])
    return Found(rows.masked_fill_(values == -torch.inf, -1).numpy(), values.numpy())


def batch(gallery: int) -> int:
    """Queries to compare at a time; not too few, since each time the whole gallery is read."""
    return max(64, SCORES // gallery)


def score(q: torch.Tensor, g: torch.Tensor, similarity: Similarity) -> torch.Tensor:
    """(Nq, Ng) cosines of unit rows, or minus half the squared distances."""
    scores = q @ g.T
    if similarity == "l2":
        scores -= q.square().sum(1, keepdim=True) / 2 + g.square().sum(1) / 2
    return scores


def overlap(found: Rows, wanted: Rows, k: int) -> NDArray[np.float64]:
    """(Nq,) share of the first k rows of `wanted` that are among the first k of `found`. Order does not count."""
    found, wanted = found[:, :k], wanted[:, :k]
    stride = int(max(found.max(), wanted.max())) + 2
    key = np.arange(len(wanted))[:, None] * stride  # makes rows of different queries different numbers
    hits = np.isin(wanted + key, np.where(found < 0, -1, found + key)) & (wanted >= 0)
    return hits.sum(1) / np.maximum((wanted >= 0).sum(1), 1)


def fuse(rankings: Sequence[Rows], k: int, constant: int = 60) -> Rows:
    """The first k by reciprocal rank fusion: score(d) = sum over rankings of 1 / (constant + rank of d), rank from 1.

    Cormack, Clarke and Buettcher, SIGIR 2009, with their constant. Of equal scores the earlier ranking's row comes first.
    """
    out = np.full((len(rankings[0]), k), -1)
    for query, lists in enumerate(zip(*rankings)):
        rows = np.concatenate(lists)
        gains = np.concatenate([1 / (constant + np.arange(1, len(part) + 1)) for part in lists])
        known, first, which = np.unique(rows, return_index=True, return_inverse=True)
        score = np.bincount(which, gains)
        score[known < 0] = 0
        best = np.lexsort((first, -score))[:k]
        out[query, : len(best)] = np.where(score[best] > 0, known[best], -1)
    return out
