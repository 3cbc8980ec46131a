"""Adapters with a closed form, solved from the moments of the pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.adapters.base import Adapter
from benchmark.adapters.pairs import Moments
from benchmark.errors import UserError

RHOS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # grid of the ridge, in units of the mean variance of a coordinate


class Identity(Adapter):
    """The floor. Unequal dims: a longer source is cut, a shorter one filled up with zeros."""

    @classmethod
    def needed(cls, source_dim: int, target_dim: int, **hyperparameters: Any) -> int:
        return 0

    def _solve(self, pairs: Moments) -> None:
        pass

    def _map(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, self.target_dim - self.source_dim))  # a negative pad cuts

    @property
    def multiply_adds(self) -> int:
        return 0


class Coordinatewise(Adapter):
    def __init__(self, source_dim: int, target_dim: int):
        super().__init__(source_dim, target_dim)
        if source_dim != target_dim:
            raise UserError(
                f"{self.kind} needs equal dims, got {source_dim} and {target_dim}; take Procrustes or Ridge"
            )


class ConstantShift(Coordinatewise):
    """y = x + shift: the mean drift (Query Drift Compensation, arXiv 2506.00037, for one step)."""

    shift: Tensor

    def __init__(self, source_dim: int, target_dim: int):
        super().__init__(source_dim, target_dim)
        self._zeros(shift=(source_dim,))

    @classmethod
    def needed(cls, source_dim: int, target_dim: int, **hyperparameters: Any) -> int:
        return 1

    def _solve(self, pairs: Moments) -> None:
        x, y = pairs.means()
        self._store(shift=y - x)

    def _map(self, x: Tensor) -> Tensor:
        return x + self.shift

    @property
    def multiply_adds(self) -> int:
        return 0


class Diagonal(Coordinatewise):
    """y = x * scale + bias: least squares in each coordinate by itself."""

    scale: Tensor
    bias: Tensor

    def __init__(self, source_dim: int, target_dim: int):
        super().__init__(source_dim, target_dim)
        self._zeros(scale=(source_dim,), bias=(source_dim,))

    @classmethod
    def needed(cls, source_dim: int, target_dim: int, **hyperparameters: Any) -> int:
        return 2

    def _solve(self, pairs: Moments) -> None:
        (x, y), (xx, xy) = pairs.means(), pairs.second()
        scale = xy.diagonal() / xx.diagonal()
        self._store(scale=scale, bias=y - x * scale)

    def _map(self, x: Tensor) -> Tensor:
        return x * self.scale + self.bias

    @property
    def multiply_adds(self) -> int:
        return self.source_dim


class Affine(Adapter):
    """y = x W + b, W (d_s, d_t)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, source_dim: int, target_dim: int, bias: bool = True):
        super().__init__(source_dim, target_dim)
        self._zeros(weight=(source_dim, target_dim))
        self.register_buffer("bias", torch.zeros(target_dim) if bias else None)

    def _map(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)

    @property
    def multiply_adds(self) -> int:
        return self.source_dim * self.target_dim


class Procrustes(Affine):
    """y = x R, the orthonormal R of the largest mean <x R, y>: R = P Q^T with X^T Y = P S Q^T (Schoenemann 1966).

    d_s <= d_t: R R^T = I, norms and angles are kept, and the squared error is the least. d_s > d_t: R^T R = I, outputs
    are shorter: normalise them for cosines.

    Args:
        centred: y = (x - mean_x) R + mean_y.
        rescale: each output coordinate times its least-squares scale, see `output_scale`.
    """

    def __init__(self, source_dim: int, target_dim: int, centred: bool = False, rescale: bool = False):
        super().__init__(source_dim, target_dim, bias=centred)
        self.hyperparameters = {"centred": centred, "rescale": rescale}

    @classmethod
    def needed(cls, source_dim: int, target_dim: int, **hyperparameters: Any) -> int:
        return min(source_dim, target_dim) + bool(hyperparameters.get("centred"))

    def _solve(self, pairs: Moments) -> None:
        centred = self.hyperparameters["centred"]
        x, y = pairs.means(centred)
        weight = nearest_orthogonal(pairs.second(centred)[1])
        bias = y - x @ weight  # zeros if not centred
        scale = output_scale(pairs, weight, bias) if self.hyperparameters["rescale"] else 1.0
        self._store(weight=weight * scale, **({"bias": bias * scale} if centred else {}))


class Ridge(Affine):
    """Least squares of the centred pairs with penalty lam |W|^2, lam = rho tr(X^T X) / d_s, so that no unit matters.

    An absolute penalty would shrink unit vectors, whose coordinates vary by 1/d, to the mean.

    Args:
        rho: >= 0; 0 = plain least squares, of least norm where columns depend on each other. None = that of `RHOS` with
            the least generalised cross-validation error (see `solve_ridge`); `config` then holds the chosen one.
    """

    def __init__(self, source_dim: int, target_dim: int, rho: float | None = None):
        super().__init__(source_dim, target_dim)
        self.hyperparameters = {"rho": rho}
        self._require(rho is None or rho >= 0, "rho must be at least 0, or None to have it chosen")

    @classmethod
    def needed(cls, source_dim: int, target_dim: int, **hyperparameters: Any) -> int:
        return source_dim + 1

    def _solve(self, pairs: Moments) -> None:
        weight, rho, _ = solve_ridge(pairs, self.hyperparameters["rho"])
        x, y = pairs.means()
        self.hyperparameters["rho"] = rho
        self._store(weight=weight, bias=y - x @ weight)


class LowRank(Adapter):
    """y = (x D) U + b with D (d_s, r), U (r, d_t): the best map of rank r under the ridge's own loss.

    Reduced-rank ridge regression: W V V^T with W of `Ridge` and V the top r eigenvectors of W^T (X^T X + lam I) W
    (Mukherjee and Zhu, Statistical Analysis and Data Mining 2011); without lam, of Yhat^T Yhat. The family is
    Drift-Adapter's too (arXiv 2509.23471), whose rank was not available to us.

    Args:
        rank: cut to min(d_s, d_t).
        rho: as in `Ridge`; None = chosen for the map of full rank.
        rescale: each output coordinate times its least-squares scale, see `output_scale`.
    """

    down: Tensor
    up: Tensor
    bias: Tensor

    def __init__(
        self, source_dim: int, target_dim: int, rank: int = 64, rho: float | None = None, rescale: bool = False
    ):
        super().__init__(source_dim, target_dim)
        self.rank = min(rank, source_dim, target_dim)
        self.hyperparameters = {"rank": self.rank, "rho": rho, "rescale": rescale}
        self._require(rank >= 1, "rank must be at least 1")
        self._require(rho is None or rho >= 0, "rho must be at least 0, or None to have it chosen")
        self._zeros(down=(source_dim, self.rank), up=(self.rank, target_dim), bias=(target_dim,))

    @classmethod
    def needed(cls, source_dim: int, target_dim: int, **hyperparameters: Any) -> int:
        return source_dim + 1

    def _solve(self, pairs: Moments) -> None:
        full, rho, penalty = solve_ridge(pairs, self.hyperparameters["rho"])
        self.hyperparameters["rho"] = rho
        (x, y), (xx, _) = pairs.means(), pairs.second()
        top = torch.linalg.eigh(full.T @ (xx @ full + penalty * full))[1][:, -self.rank :]  # (d_t, r), values ascend
        down, up = full @ top, top.T
        bias = y - x @ down @ up
        scale = output_scale(pairs, down @ up, bias) if self.hyperparameters["rescale"] else 1.0
        self._store(down=down, up=up * scale, bias=bias * scale)

    def _map(self, x: Tensor) -> Tensor:
        return (x @ self.down) @ self.up + self.bias

    @property
    def multiply_adds(self) -> int:
        return self.rank * (self.source_dim + self.target_dim)


def nearest_orthogonal(cross: Tensor) -> Tensor:
    """The R of orthonormal rows or columns (whichever are fewer) with the largest tr(R^T cross); cross = X^T Y (d_s, d_t)."""
    left, _, right = torch.linalg.svd(cross, full_matrices=False)
    return left @ right


def solve_ridge(pairs: Moments, rho: float | None) -> tuple[Tensor, float, float]:
    """Ridge of the centred pairs: W (d_s, d_t), rho, and the penalty lam / N that stands for rho here.

    None takes the rho of `RHOS` with the least generalised cross-validation error (Golub, Heath and Wahba, Technometrics
    1979), RSS / N / (1 - df / N)^2 with df = 1 + trace of the hat matrix: leave-one-out error with all leverages equal.
    It follows from the moments, so streamed pairs need no second pass, and no pair is lost to the choice.
    """
    (_, y), (xx, xy) = pairs.means(), pairs.second()
    values, vectors = torch.linalg.eigh(xx)  # (d_s,), (d_s, d_s)
    values, rotated = values.clamp(min=0), vectors.T @ xy
    unit = float(values.mean())  # tr(X^T X) / (N d_s)
    if rho is None:
        energy = rotated.square().sum(1)
        shrunk = 1 / (values + unit * torch.tensor(RHOS, dtype=torch.float64)[:, None])  # (len(RHOS), d_s)
        rss = pairs.yy / pairs.count - y.square().sum() - (shrunk * (2 - values * shrunk)) @ energy
        df = 1 + (values * shrunk).sum(1)
        rho = RHOS[int((rss.clamp(min=0) / (1 - df / pairs.count).square()).argmin())]
    penalised = values + rho * unit
    floor = len(values) * torch.finfo(torch.float64).eps * values[-1]  # below it a direction is absent: least norm
    inverse = torch.where(penalised > floor, 1 / penalised, 0)
    return vectors @ (inverse[:, None] * rotated), rho, rho * unit


def output_scale(pairs: Moments, weight: Tensor, bias: Tensor) -> Tensor:
    """Drift-Adapter's diagonal scaling, (d_t,): s_j = sum_i yhat_ij y_ij / sum_i yhat_ij^2 of yhat = x W + b."""
    (x, y), (xx, xy) = pairs.means(), pairs.second()
    mean = x @ weight + bias
    power = (weight * (xx @ weight)).sum(0) + mean.square()
    return torch.where(power > 0, ((weight * xy).sum(0) + mean * y) / power, 1)
