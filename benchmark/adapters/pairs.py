"""Pairs: embeddings of the same inputs by two models. What is refused, and the sums that closed forms are made of."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from benchmark.errors import UserError

CHUNK = 2048  # rows turned into float64 at a time: 8 MB a side at 512 dims, and matrix products as fast as of more


class Screen:
    """Refuses pairs that no map can be fitted to; sees them chunk by chunk."""

    def __init__(self, source_dim: int, target_dim: int):
        self.source_dim, self.target_dim, self.count = source_dim, target_dim, 0
        self.low = torch.full((source_dim,), math.inf, dtype=torch.float64)  # least value of each source column
        self.high = -self.low

    @classmethod
    def of(cls, source: Tensor, target: Tensor) -> Self:
        check_shapes(source, target)
        return cls(source.shape[1], target.shape[1]).add(source, target)

    def add(self, source: Tensor, target: Tensor) -> Self:
        """Takes in the pairs source (N, d_s), target (N, d_t), floating point, on any device.

        Raises:
            UserError: unequal lengths, other dims than before, NaN or infinite values, all-zero rows.
        """
        check_shapes(source, target)
        for side, got, dim in (("source", source, self.source_dim), ("target", target, self.target_dim)):
            if got.shape[1] != dim:
                raise UserError(
                    f"{side}: a chunk of {got.shape[1]} dims after one of {dim}; give files of one model only"
                )
        for x, y in zip(source.split(CHUNK), target.split(CHUNK)):
            if len(x):
                self._add(x.detach().to("cpu", torch.float64), y.detach().to("cpu", torch.float64))
        return self

    def _add(self, x: Tensor, y: Tensor) -> None:
        for side, rows in (("source", x), ("target", y)):
            least, largest = rows.aminmax(dim=1)  # NaN and inf survive
            bad = (~(least + largest).isfinite()).nonzero()
            if len(bad):
                row = int(bad[0, 0])
                column = int((~rows[row].isfinite()).nonzero()[0, 0])
                raise UserError(
                    f"{side}: NaN or infinite value in row {self.count + row}, column {column}; leave such rows out of "
                    f"both sides, or the column if all of it is so"
                )
            zero = ((least == 0) & (largest == 0)).nonzero()
            if len(zero):
                raise UserError(
                    f"{side}: row {self.count + int(zero[0, 0])} is all zeros; leave such rows out of both sides"
                )
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        self.count += len(x)

    def check(self, needed: int, kind: str = "this map") -> Self:
        """Refuses too few pairs, and source columns that never vary: their weights could be anything."""
        if self.count < needed:
            raise UserError(
                f"{self.count} pairs are too few: {kind} from {self.source_dim} to {self.target_dim} dims needs at least "
                f"{needed}; add pairs or take a map with fewer numbers"
            )
        constant = (self.low == self.high).nonzero()[:, 0].tolist()
        if constant and self.count > 1:
            names = ", ".join(map(str, constant[:8])) + (", ..." if len(constant) > 8 else "")
            raise UserError(
                f"source: {len(constant)} of {self.source_dim} columns are constant over all {self.count} pairs "
                f"({names}); drop them from the source embeddings or add pairs in which they vary"
            )
        return self


class Moments(Screen):
    """Sums over all pairs seen that every closed form here is made of, in float64: x, y, x^T x, x^T y, |y|^2.

    Centring afterwards costs digits only where a mean exceeds its deviation 1e8 times, which float32 cannot hold.
    """

    def __init__(self, source_dim: int, target_dim: int):
        super().__init__(source_dim, target_dim)
        zeros = [torch.zeros(shape, dtype=torch.float64) for shape in ((source_dim,), (target_dim,))]
        self.x, self.y = zeros
        self.xx = torch.zeros(source_dim, source_dim, dtype=torch.float64)
        self.xy = torch.zeros(source_dim, target_dim, dtype=torch.float64)
        self.yy = torch.zeros((), dtype=torch.float64)

    def _add(self, x: Tensor, y: Tensor) -> None:
        super()._add(x, y)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += y.square().sum()

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of pairs together, so that shards can be summed apart."""
        both = Moments(self.source_dim, self.target_dim)
        for name in ("count", "x", "y", "xx", "xy", "yy"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        both.low, both.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return both

    def means(self, centred: bool = True) -> tuple[Tensor, Tensor]:
        """Mean of x (d_s,) and of y (d_t,); zeros if not centred."""
        return self.x / self.count * centred, self.y / self.count * centred

    def second(self, centred: bool = True) -> tuple[Tensor, Tensor]:
        """Mean of x^T x (d_s, d_s) and of x^T y (d_s, d_t), of vectors less their means if centred."""
        x, y = self.means(centred)
        return self.xx / self.count - torch.outer(x, x), self.xy / self.count - torch.outer(x, y)

    def error(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Mean of |x W + b - y|^2 over the pairs; differentiable in W (d_s, d_t) and b (d_t,)."""
        (x, y), (xx, xy) = self.means(), self.second()
        spread = (weight * (xx @ weight - 2 * xy)).sum() + self.yy / self.count - y.square().sum()
        return spread + (x @ weight + bias - y).square().sum()


def check_shapes(source: Tensor, target: Tensor) -> None:
    """One `UserError` line if the two are no matrices of pairs."""
    for side, matrix in (("source", source), ("target", target)):
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise UserError(
                f"{side}: expected a matrix of floating-point numbers, one embedding a row, got {matrix.dtype} of "
                f"shape {tuple(matrix.shape)}"
            )
    if len(source) != len(target):
        raise UserError(
            f"source has {len(source)} embeddings, target {len(target)}: row i of both must be the same input; align them"
        )


def check_pairs(source: Tensor, target: Tensor, needed: int) -> None:
    """One `UserError` line if no map that needs `needed` pairs can be fitted to source (N, d_s), target (N, d_t)."""
    Screen.of(source, target).check(needed)
