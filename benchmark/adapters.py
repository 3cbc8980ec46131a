"""Maps between two embedding spaces, learned from embeddings of the same inputs by both models; no images, no labels.

Query-side use: source = new, target = old; new queries then meet the untouched gallery (backward compatible).
Gallery-side use: source = old, target = new; stored items are moved without their raw data (forward compatible).
Row vectors throughout: y = x W + b. An adapter maps what it is given and normalises nothing, for that belongs to the
protocol: where the score is a cosine, fit on unit rows and normalise the output again. Fits run in float64, from the
pairs' `Moments` where the map has a closed form, so that pairs may be streamed; outputs are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark.errors import UserError, unknown

CHUNK = 8192  # rows turned into float64 at a time
RHOS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # grid of the ridge, in units of the mean variance of a coordinate
A = TypeVar("A", bound="Adapter")


# ---------------------------------------------------------------------------------------------------------- pairs


class Screen:
    """Refuses pairs that no map can be fitted to; sees them chunk by chunk."""

    def __init__(self, source_dim: int, target_dim: int):
        self.source_dim, self.target_dim, self.count = source_dim, target_dim, 0
        self.low = torch.full((source_dim,), math.inf, dtype=torch.float64)  # least value of each source column
        self.high = -self.low

    def add(self: S, source: Tensor, target: Tensor) -> S:
        """Takes in the pairs source (N, d_s), target (N, d_t)."""
        _check_shapes(source, target)
        for side, got, dim in (("source", source, self.source_dim), ("target", target, self.target_dim)):
            if got.shape[1] != dim:
                raise UserError(f"{side}: a chunk of {got.shape[1]} dims after one of {dim}; files of one model only")
        for x, y in zip(source.split(CHUNK), target.split(CHUNK)):
            self._add(x.detach().to("cpu", torch.float64), y.detach().to("cpu", torch.float64))
        return self

    def _add(self, x: Tensor, y: Tensor) -> None:
        for name, rows in (("source", x), ("target", y)):
            largest = rows.abs().amax(1)  # NaN and inf survive both
            for bad, what in ((~largest.isfinite(), "hold NaN or infinite values"), (largest == 0, "are all zeros")):
                if bad.any():
                    first = self.count + int(bad.nonzero()[0, 0])
                    raise UserError(f"{name}: embeddings {what}, first in row {first}; leave such pairs out")
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        self.count += len(x)

    def check(self: S, needed: int) -> S:
        """Refuse too few pairs, and source columns that never vary: their weights could be anything."""
        if self.count < needed:
            raise UserError(
                f"{self.count} pairs are too few: this map from {self.source_dim} to {self.target_dim} dims needs at "
                f"least {needed}; add pairs or take a map with fewer numbers (shift, diagonal)"
            )
        constant = (self.low == self.high).nonzero()[:, 0].tolist()
        if constant and self.count > 1:
            names = ", ".join(map(str, constant[:8])) + (", ..." if len(constant) > 8 else "")
            raise UserError(
                f"source: {len(constant)} of {self.source_dim} columns are constant over all {self.count} pairs "
                f"({names}); drop them from the source embeddings or add pairs in which they vary"
            )
        return self


S = TypeVar("S", bound=Screen)


class Moments(Screen):
    """Sums that every closed form here is made of, in float64: of z = [x, y] and of z z^T, over all pairs seen."""

    def __init__(self, source_dim: int, target_dim: int):
        super().__init__(source_dim, target_dim)
        self.sum = torch.zeros(source_dim + target_dim, dtype=torch.float64)
        self.gram = torch.zeros(len(self.sum), len(self.sum), dtype=torch.float64)

    @classmethod
    def of(cls, source: Tensor, target: Tensor) -> Moments:
        _check_shapes(source, target)
        return cls(source.shape[1], target.shape[1]).add(source, target)

    def _add(self, x: Tensor, y: Tensor) -> None:
        super()._add(x, y)
        z = torch.cat([x, y], 1)
        self.sum += z.sum(0)
        self.gram.addmm_(z.T, z)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of pairs together."""
        both = Moments(self.source_dim, self.target_dim)
        both.count, both.sum, both.gram = self.count + other.count, self.sum + other.sum, self.gram + other.gram
        both.low, both.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return both

    def means(self, centred: bool = True) -> tuple[Tensor, Tensor]:
        """Mean of x (d_s,) and of y (d_t,); zeros if not centred."""
        mean = self.sum / self.count * centred
        return mean[: self.source_dim], mean[self.source_dim :]

    def second(self, centred: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of x^T x (d_s, d_s), x^T y (d_s, d_t) and y^T y (d_t, d_t), of vectors less their means if centred."""
        mean = torch.cat(self.means(centred))
        gram, d = self.gram / self.count - torch.outer(mean, mean), self.source_dim
        return gram[:d, :d], gram[:d, d:], gram[d:, d:]

    def error(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Mean of |x W + b - y|^2 over the pairs; differentiable in W (d_s, d_t) and b (d_t,)."""
        (mx, my), (xx, xy, yy) = self.means(), self.second()
        spread = (weight * (xx @ weight - 2 * xy)).sum() + yy.trace()
        return spread + (mx @ weight + bias - my).square().sum()


def _check_shapes(source: Tensor, target: Tensor) -> None:
    for name, matrix in (("source", source), ("target", target)):
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise UserError(
                f"{name}: expected a matrix of floating-point numbers, one embedding a row, got {matrix.dtype} of "
                f"shape {tuple(matrix.shape)}"
            )
    if len(source) != len(target):
        raise UserError(
            f"source has {len(source)} embeddings, target {len(target)}: row i of both must be the same input; align them"
        )


def check_pairs(source: Tensor, target: Tensor, needed: int) -> None:
    """One `UserError` line if no map that needs `needed` pairs can be fitted to source (N, d_s), target (N, d_t)."""
    _check_shapes(source, target)
    Screen(source.shape[1], target.shape[1]).add(source, target).check(needed)


def _moments(source: Tensor | Moments, target: Tensor | None) -> Moments:
    """What a closed form is fitted to: pairs held in memory, or moments of pairs that were streamed (no target then)."""
    if isinstance(source, Moments):
        return source
    if target is None:
        raise UserError("target is missing: give source and target embeddings, or Moments of both")
    return Moments.of(source, target)


def _split(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers to fit on and row numbers held out, a random `share` of all."""
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    cut = max(1, round(share * count))
    return rows[cut:], rows[:cut]


# ------------------------------------------------------------------------------------------------------- adapters


class Adapter(nn.Module):
    """A row-wise map (B, d_s) -> (B, d_t), float32; `rebuild(adapter.config(), adapter.state_dict())` is its equal."""

    def __init__(self, source_dim: int, target_dim: int, **hyperparameters: Any):
        super().__init__()
        self.source_dim, self.target_dim, self.hyperparameters = source_dim, target_dim, hyperparameters

    def config(self) -> dict[str, Any]:
        """Kind, dims and hyperparameters; can be written as JSON."""
        dims = {"source_dim": self.source_dim, "target_dim": self.target_dim}
        return {"kind": type(self).__name__, **dims, **self.hyperparameters}

    @property
    def parameters_count(self) -> int:
        """Numbers stored."""
        return sum(value.numel() for value in self.state_dict().values())

    @property
    def multiply_adds(self) -> int:
        """Per vector mapped; additions of a bias are not counted."""
        raise NotImplementedError

    def _zeros(self, **shapes: tuple[int, ...]) -> None:
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))


class Identity(Adapter):
    """The floor. Unequal dims: a longer source is cut, a shorter one filled up with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x.float(), (0, self.target_dim - self.source_dim))  # a negative pad cuts

    @property
    def multiply_adds(self) -> int:
        return 0


class Diagonal(Adapter):
    """y = x * scale + bias, both (d,)."""

    scale: Tensor
    bias: Tensor

    def __init__(self, source_dim: int, target_dim: int, **hyperparameters: Any):
        super().__init__(source_dim, target_dim, **hyperparameters)
        if source_dim != target_dim:
            raise UserError(
                f"shift and diagonal need equal dims, got {source_dim} and {target_dim}; take procrustes or ridge"
            )
        self._zeros(scale=(source_dim,), bias=(source_dim,))

    def forward(self, x: Tensor) -> Tensor:
        return x.float() * self.scale + self.bias

    @property
    def multiply_adds(self) -> int:
        return self.source_dim


class ConstantShift(Adapter):
    """y = x + shift: the mean drift (Query Drift Compensation, arXiv 2506.00037, with one task)."""

    shift: Tensor

    def __init__(self, source_dim: int, target_dim: int, **hyperparameters: Any):
        super().__init__(source_dim, target_dim, **hyperparameters)
        if source_dim != target_dim:
            raise UserError(f"shift needs equal dims, got {source_dim} and {target_dim}; take procrustes or ridge")
        self._zeros(shift=(source_dim,))
