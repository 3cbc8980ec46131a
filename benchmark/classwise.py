"""What methods ask of the old embeddings of a class: how far its members spread, which of them are credible."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.errors import UserError


class Spread(NamedTuple):
    widest: Tensor  # (K,) largest value kept
    kept: Tensor  # (K,) how many samples that leaves


def members(labels: Tensor, classes: int) -> Iterator[Tensor]:
    """Positions of each class's samples, class 0 first.

    Raises:
        UserError: a class has none, so there is nothing to average over.
    """
    counts = torch.bincount(labels, minlength=classes)
    refuse_empty(counts)
    yield from labels.argsort(stable=True).split(counts.tolist())


def refuse_empty(counts: Tensor) -> None:
    """Name the first class without images; its mean would be NaN, or zero, which no method expects."""
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        raise UserError(
            f"class {int(empty[0])} (from 0, in the protocol's class order) has no training image, so no mean: give it images, "
            "or take it out of the protocol's classes"
        )


def within_fences(values: Tensor, labels: Tensor, classes: int) -> Spread:
    """Largest value (N,) of each class, without the outliers beyond 1.5 interquartile ranges (classes of four or more)."""
    widest, kept = values.new_zeros(classes), labels.new_zeros(classes)
    for k, rows in enumerate(members(labels, classes)):
        inside = values[rows]
        if len(rows) >= 4:
            low, high = inside.quantile(0.25), inside.quantile(0.75)
            reach = 1.5 * (high - low)
            inside = inside[(inside >= low - reach) & (inside <= high + reach)]
        kept[k], widest[k] = len(inside), inside.max()
    return Spread(widest, kept)


def credible(embeddings: Tensor, labels: Tensor, classes: int, share: float, columns: bool = False) -> Tensor:
    """Mask (N,) of the ceil(share * n_c) samples of each class c nearest to the mean of its unit embeddings (MixBCT).

    Args:
        columns: also normalise each dimension over the whole data set before, as MixBCT's code does: it distorts the cosine
            geometry, and is there to reproduce that code only.
    """
    unit = F.normalize(embeddings)
    if columns:
        unit = F.normalize(unit, dim=0)
    mask = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for rows in members(labels, classes):
        distance = (unit[rows] - unit[rows].mean(0)).norm(dim=1)
        count = math.ceil(share * len(rows) - 1e-9)  # 0.9 * 70 is 63.00000000000001 in floating point
        mask[rows[distance.argsort(stable=True)[:count]]] = True
    return mask
