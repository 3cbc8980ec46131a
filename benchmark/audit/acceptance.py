"""What a score threshold that was frozen on the old system does once the queries or the gallery have changed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmark.neighbours import Similarity, batch, score
from benchmark.vectors import Array


class Side(NamedTuple):
    """One system's vectors: unit rows under "cosine"."""

    queries: Array  # (Nq, D)
    gallery: Array  # (Ng, D)


class Labels(NamedTuple):
    queries: NDArray[np.int64]  # (Nq,)
    gallery: NDArray[np.int64]  # (Ng,)
    own: NDArray[np.int64]  # (Nq,) gallery row that is no candidate, -1 = none

    @property
    def right(self) -> NDArray[np.int64]:
        """(Nq,) gallery items of the query's label, besides itself."""
        counts = np.bincount(self.gallery, minlength=max(self.queries.max(), self.gallery.max()) + 1)
        return counts[self.queries] - ((self.own >= 0) & (self.gallery[self.own] == self.queries))


class Pairs(NamedTuple):
    """Per query: its pairs with gallery items of its own label and of others, and how many score at least the threshold."""

    genuine: NDArray[np.int64]
    genuine_accepted: NDArray[np.int64]
    impostor: NDArray[np.int64]
    impostor_accepted: NDArray[np.int64]


def threshold_by_share(best: Array, share: float) -> float:
    """The largest score that at least `share` of the best matches `best` (Nq,) reach: the threshold without labels."""
    return float(np.sort(best)[len(best) - max(1, int(np.ceil(share * len(best) - 1e-9)))])


def threshold_by_far(side: Side, labels: Labels, similarity: Similarity, far: float) -> float:
    """The least threshold at which no more than `far` of the impostor pairs score at least as much: the one with labels."""
    total = sum(int(impostor.sum()) for _, _, impostor in _blocks(side, labels, similarity))
    allowed = int(far * total)
    if allowed >= total:
        return -np.inf
    top = np.empty(0, np.float32)  # the highest allowed + 1 impostor scores so far
    for scores, _, impostor in _blocks(side, labels, similarity):
        top = np.concatenate([top, scores[impostor]])
        if len(top) > allowed + 1:
            top = np.partition(top, len(top) - allowed - 1)[-allowed - 1 :]
    return float(np.nextafter(top.min(), np.float32(np.inf)))


def pairs_at(side: Side, labels: Labels, similarity: Similarity, threshold: float) -> Pairs:
    """Counts of all query-gallery pairs at a threshold; each query's own item is no pair."""
    counts = []
    for scores, genuine, impostor in _blocks(side, labels, similarity):
        accepted = scores >= threshold
        counts.append([x.sum(1) for x in (genuine, genuine & accepted, impostor, impostor & accepted)])
    return Pairs(*(np.concatenate(column) for column in zip(*counts)))


def _blocks(side: Side, labels: Labels, similarity: Similarity):
    """Scores (n, Ng) with masks of genuine and of impostor pairs, some queries at a time."""
    gallery, step = torch.from_numpy(side.gallery), batch(len(side.gallery))
    for start in range(0, len(side.queries), step):
        rows = slice(start, start + step)
        scores = score(torch.from_numpy(side.queries[rows]), gallery, similarity).numpy()
        genuine = labels.queries[rows, None] == labels.gallery
        impostor = ~genuine
        has = np.flatnonzero(labels.own[rows] >= 0)
        genuine[has, labels.own[rows][has]] = impostor[has, labels.own[rows][has]] = False
        yield scores, genuine, impostor
