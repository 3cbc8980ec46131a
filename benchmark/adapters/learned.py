"""Adapters that are searched for: by descent, or by clusters. Deterministic from their seed; no Trainer needed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark.adapters.base import Adapter
from benchmark.adapters.maps import Affine, nearest_orthogonal, solve_ridge
from benchmark.adapters.pairs import CHUNK, Moments

HELD_OUT = 0.1  # share of the pairs that decides when training stops
PATIENCE = 5  # epochs without a better held-out cosine
SAMPLE = 50_000  # pairs that place the centres of clusters


class LambdaOrthogonal(Affine):
    """y = x W + b, W pulled to orthogonality only as far as lambda (Ricci et al., NeurIPS 2025, arXiv 2509.16664).

        mean |x W + b - y|^2 + weight * sigmoid(alpha (n - lambda)) n,   n = |W^T W - I|_F

    lambda = 0 is soft orthogonality and, for unit vectors, next to centred Procrustes; a large lambda is least squares.
    Adapted: the paper descends by Adam on batches and cuts the longer vector; here the loss is computed from the moments
    and descended in full by L-BFGS from both limits, the lower end is kept, and unequal dims take the smaller of
    W^T W, W W^T. Its alpha was not available to us; 10 is ours.

    Args:
        threshold: lambda >= 0. Paper: 12. Mind the dims: a map that halves all lengths has n = 0.75 sqrt(d).
        weight: of the regulariser, > 0. Paper: 1.
        alpha: steepness of its onset, > 0.
    """

    def __init__(
        self, source_dim: int, target_dim: int, threshold: float = 12.0, weight: float = 1.0, alpha: float = 10.0
    ):
        super().__init__(source_dim, target_dim)
        self.hyperparameters = {"threshold": threshold, "weight": weight, "alpha": alpha}
        valid = 0 <= threshold < math.inf and 0 < weight < math.inf and 0 < alpha < math.inf
        self._require(valid, "threshold must be at least 0, weight and alpha above 0, all finite")

    @classmethod
    def needed(cls, source_dim: int, target_dim: int, **hyperparameters: Any) -> int:
        return source_dim + 1

    def _solve(self, pairs: Moments) -> None:
        (x, y), (xx, xy) = pairs.means(), pairs.second()

        def objective(weight: Tensor) -> Tensor:
            return (weight * (xx @ weight - 2 * xy)).sum() + regulariser(weight, **self.hyperparameters)

        ends = [descend(objective, start) for start in (nearest_orthogonal(xy), solve_ridge(pairs, 0.0)[0])]
        weight = min(ends, key=lambda end: float(objective(end)))
        self._store(weight=weight, bias=y - x @ weight)  # the regulariser leaves b free


def regulariser(matrix: Tensor, threshold: float, weight: float, alpha: float, rounding: float = 1e-4) -> Tensor:
    """weight * sigmoid(alpha (n - threshold)) n; `rounding` takes the kink off n at 0, where descent would stall."""
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    n = (gram - torch.eye(len(gram), dtype=gram.dtype)).square().sum().add(rounding**2).sqrt()
    return weight * torch.sigmoid(alpha * (n - threshold)) * n


def descend(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """A local minimum of `objective`, downhill from `start`."""
    point = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [point],
        max_iter=500,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = objective(point)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return point.detach()


class ResidualMLP(Adapter):
    """y = x A + b + GELU(LN(x) W1 + b1) W2, trained from A = Procrustes, b = 0, W2 = 0, so that it starts as that map.

    AdamW on 90 % of the pairs; of all epochs and the start, the one with the best mean cosine on the other 10 % is kept,
    and training stops after `PATIENCE` epochs without a better one. The family is Drift-Adapter's (arXiv 2509.23471), whose
    width and rate were not available to us.

    Args:
        hidden: width; None = 4 d_t.
        epochs: at most; 0 = Procrustes of 90 % of the pairs.
        batch: pairs a step.
        lr: of AdamW.
        loss: "mse", or "cosine" where norms do not matter.
    """

    streams = False

    def __init__(
        self,
        source_dim: int,
        target_dim: int,
        hidden: int | None = None,
        epochs: int = 50,
        batch: int = 256,
        lr: float = 1e-3,
        loss: Literal["mse", "cosine"] = "mse",
    ):
        super().__init__(source_dim, target_dim)
        self.hidden = 4 * target_dim if hidden is None else hidden
        self.hyperparameters = {"hidden": self.hidden, "epochs": epochs, "batch": batch, "lr": lr, "loss": loss}
        valid = self.hidden >= 1 and epochs >= 0 and batch >= 1 and lr > 0
        self._require(valid, "hidden and batch must be at least 1, epochs at least 0, lr above 0")
        self._require(loss in ("mse", "cosine"), "loss must be mse or cosine")
        self.linear = nn.Parameter(torch.zeros(source_dim, target_dim))
        self.bias = nn.Parameter(torch.zeros(target_dim))
        self.inner = nn.Parameter(torch.zeros(source_dim, self.hidden))
        self.inner_bias = nn.Parameter(torch.zeros(self.hidden))
        self.outer = nn.Parameter(torch.zeros(self.hidden, target_dim))

    @classmethod
    def needed(cls, source_dim: int, target_dim: int, **hyperparameters: Any) -> int:
        least = min(source_dim, target_dim)
        return next(n for n in itertools.count(least + 1) if n - held_out(n) >= least)

    def _learn(self, source: Tensor, target: Tensor, seed: int) -> None:
        settings, generator = self.hyperparameters, torch.Generator().manual_seed(seed)
        fitted, judged = (rows.to(source.device) for rows in split(len(source), seed))
        self.to(source.device)
        self.linear.copy_(nearest_orthogonal(cross_product(source[fitted], target[fitted])))
        bound = 1 / math.sqrt(self.source_dim)  # PyTorch's own start of a linear layer
        for layer in (self.inner, self.inner_bias):
            layer.copy_((2 * torch.rand(layer.shape, generator=generator) - 1) * bound)
        optimiser = torch.optim.AdamW(self.parameters(), lr=settings["lr"])
        best, best_epoch, kept = self._cosine(source, target, judged), 0, self._copy()
        for epoch in range(1, settings["epochs"] + 1):
            order = fitted[torch.randperm(len(fitted), generator=generator).to(fitted.device)]
            for rows in order.split(settings["batch"]):
                with torch.enable_grad():
                    loss = self._loss(self(source[rows]), target[rows].float())
                    optimiser.zero_grad()
                    loss.backward()
                optimiser.step()
            cosine = self._cosine(source, target, judged)
            if cosine > best:
                best, best_epoch, kept = cosine, epoch, self._copy()
            if epoch - best_epoch >= PATIENCE:
                break
        self.load_state_dict(kept)

    def _loss(self, mapped: Tensor, y: Tensor) -> Tensor:
        if self.hyperparameters["loss"] == "mse":
            return F.mse_loss(mapped, y)
        return 1 - F.cosine_similarity(mapped, y).mean()

    def _cosine(self, source: Tensor, target: Tensor, rows: Tensor) -> float:
        parts = [F.cosine_similarity(self(source[r]), target[r].float()).double().sum() for r in rows.split(CHUNK)]
        return float(torch.stack(parts).sum()) / len(rows)

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.state_dict().items()}

    def _map(self, x: Tensor) -> Tensor:
        hidden = F.gelu(F.layer_norm(x, x.shape[-1:]) @ self.inner + self.inner_bias)  # (B, hidden)
        return x @ self.linear + self.bias + hidden @ self.outer

    @property
    def multiply_adds(self) -> int:
        return self.source_dim * self.target_dim + self.hidden * (self.source_dim + self.target_dim)


class LocalProcrustes(Adapter):
    """y = sum_k p_k(x) x R_k: one orthogonal map per k-means cluster of the sources, mixed by a soft assignment.

        p(x) = softmax_k(-|x - c_k|^2 / (temperature * spread)),   spread = mean squared distance to the own centre

    R_k is the Procrustes map of all pairs weighted by p_k, and of `min(d_s, d_t)` pairs more of average kind, so that a
    cluster with few pairs falls back on the global map. One cluster, or a high temperature, is `Procrustes`.
    Idea: mixed-adapter (github.com/jonathan-politzki/mixed-adapter); the soft fit and its fall-back are ours.

    Args:
        clusters: at least 1.
        temperature: > 0, without unit.
    """

    streams = False
    centres: Tensor
    spread: Tensor
    weight: Tensor

    def __init__(self, source_dim: int, target_dim: int, clusters: int = 8, temperature: float = 0.1):
        super().__init__(source_dim, target_dim)
        self.hyperparameters = {"clusters": clusters, "temperature": temperature}
        self._require(clusters >= 1 and temperature > 0, "clusters must be at least 1 and temperature above 0")
        self._zeros(centres=(clusters, source_dim), spread=(), weight=(clusters, source_dim, target_dim))

    @classmethod
    def needed(cls, source_dim: int, target_dim: int, **hyperparameters: Any) -> int:
        return hyperparameters.get("clusters", 8) * min(source_dim, target_dim)

    def _learn(self, source: Tensor, target: Tensor, seed: int) -> None:
        from sklearn.cluster import KMeans

        clusters = self.hyperparameters["clusters"]
        rows = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:SAMPLE].to(source.device)
        found = KMeans(clusters, n_init=4, random_state=seed).fit(source[rows].double().cpu().numpy())
        spread = max(found.inertia_ / len(rows), 1e-12)  # 0 where all sources sit on the centres
        self._store(centres=torch.from_numpy(found.cluster_centers_), spread=torch.tensor(spread))
        cross = torch.zeros(self.weight.shape, dtype=torch.float64)
        for x, y in zip(source.split(CHUNK), target.split(CHUNK)):
            x, y = x.cpu().double(), y.cpu().double()
            for k, share in enumerate(self.routing(x.float()).double().T):
                cross[k].addmm_((x * share[:, None]).T, y)
        cross += min(self.source_dim, self.target_dim) / len(source) * cross.sum(0)  # shares sum to 1 over k
        for k in range(clusters):
            self.weight[k] = nearest_orthogonal(cross[k])

    def routing(self, x: Tensor) -> Tensor:
        """p(x), (B, K), for x (B, d_s)."""
        apart = torch.cdist(x, self.centres, compute_mode="donot_use_mm_for_euclid_dist").square()
        return torch.softmax(-apart / (self.hyperparameters["temperature"] * self.spread), 1)

    def _map(self, x: Tensor) -> Tensor:
        y = x.new_zeros(len(x), self.target_dim)
        for share, weight in zip(self.routing(x).T, self.weight):
            y = y + share[:, None] * (x @ weight)
        return y

    @property
    def multiply_adds(self) -> int:
        return self.hyperparameters["clusters"] * (
            self.source_dim + self.target_dim + self.source_dim * self.target_dim
        )


def split(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers to fit on and row numbers held out."""
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    cut = held_out(count)
    return rows[cut:], rows[:cut]


def held_out(count: int) -> int:
    return max(1, round(HELD_OUT * count))


def cross_product(source: Tensor, target: Tensor) -> Tensor:
    """X^T Y (d_s, d_t) in float64, chunk by chunk."""
    total = torch.zeros(source.shape[1], target.shape[1], dtype=torch.float64, device=source.device)
    for x, y in zip(source.split(CHUNK), target.split(CHUNK)):
        total.addmm_(x.double().T, y.double())
    return total
