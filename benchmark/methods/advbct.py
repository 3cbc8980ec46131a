"""AdvBCT (Pan et al., "Boundary-aware backward-compatible representation via adversarial learning in image retrieval", CVPR 2023).

A discriminator behind a reversed gradient makes new and old embeddings indistinguishable, and each new embedding stays in a
ball around its old class centre, whose radius is elastic:

    L = L(W f, y) + w_p L_p2s + w_a (1 - p) L_adv,   p = share of training done
    L_p2s = mean over violating i of max(||f^_i - c_{y_i}|| - r~_{y_i}, 0),  r~_k = r_k + e_k if r_k < tau else r_k - e_k,
            e_k = |r_k - tau| sigmoid(v_k), v_k learned
    L_adv = NLL(D(GRL_a(f)), 0) + NLL(D(o), 1),  a = 2 / (1 + exp(-10 p)) - 1

c_k: mean of the unit old embeddings of class k, r_k: the largest distance to it, outliers beyond 1.5 interquartile ranges left out.
Defaults as the authors' code on landmarks; MixBCT's port to faces is a variant. Adapted: epochs became shares of training, so the
code's factor (E - e + 1) / E, which starts above 1, is 1 - p. The code's loop over samples is vectorised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark.classwise import within_fences
from benchmark.heads import class_means
from benchmark.images import Batch
from benchmark.method import Context, Need, Widened


class AdvBCT(Widened):
    """Adversarial alignment of new and old embeddings, inside elastic balls around old class centres.

    Args:
        boundary: w_p, weight of leaving the ball. Code: 1 (port to faces: 4).
        adversarial: w_a, weight of the discriminator's loss, falling to 0 over training. Code: 1 (faces: 4).
        threshold: tau, the radius towards which every ball may stretch or shrink. Code: 1 (faces: 0.4).
        normalise: what the discriminator reads: unit embeddings (faces) instead of raw ones (landmarks).
    """

    centres: Tensor
    radius: Tensor
    bounded: Tensor
    variants: ClassVar = {"AdvBCT-faces": {"boundary": 4.0, "adversarial": 4.0, "threshold": 0.4, "normalise": True}}
    space: ClassVar = {
        "boundary": (1.0, 4.0, 10.0, 30.0),
        "adversarial": (0.1, 1.0, 4.0),
        "threshold": (0.2, 0.4, 1.0),
        "normalise": (False, True),
    }

    def __init__(
        self,
        context: Context,
        boundary: float = 1.0,
        adversarial: float = 1.0,
        threshold: float = 1.0,
        normalise: bool = False,
    ):
        super().__init__(context)
        self.boundary, self.adversarial, self.threshold, self.normalise = boundary, adversarial, threshold, normalise
        if context.embeddings:
            stored = context.embeddings["old_train"]
            old = F.normalize(stored.main(context.t - 1)[:, : self.shared])
            assert stored.labels is not None
            centres, _ = class_means(old, stored.labels, context.classes)  # (K, d_o), not normalised again
            spread = within_fences((old - centres[stored.labels]).norm(dim=1), stored.labels, context.classes)
            self.register_buffer("centres", centres)
            self.register_buffer("radius", spread.widest)  # (K,)
            self.register_buffer("bounded", spread.kept > 1)  # (K,) a class with one sample has no radius
            self.elastic = nn.Parameter(torch.rand(context.classes) * 2 - 1)  # v: (K,)
            self.discriminator = nn.Sequential(
                nn.Linear(self.shared, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Linear(100, 2)
            )

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        if t == 0:
            return {}
        return {"old": Need("encoder"), "old_train": Need("embeddings")}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        z = self.backbone(batch.x["image"])  # (B, D)
        with torch.no_grad():
            old = self.context.encoders["old"](batch.x)["main"][:, : self.shared]
        new = z[:, : self.shared]
        return {
            "classification": self.head(z, batch.y),
            "boundary": self.boundary * self.outside(F.normalize(new), batch.y),
            "adversarial": self.adversarial * (1 - self.done) * self.confusion(new, old),
        }

    def outside(self, unit: Tensor, y: Tensor) -> Tensor:
        """Mean way back into the ball, over the samples outside."""
        stretch = (self.radius - self.threshold).abs() * torch.sigmoid(self.elastic)  # e: (K,)
        radius = torch.where(self.radius < self.threshold, self.radius + stretch, self.radius - stretch)
        excess = ((unit - self.centres[y]).norm(dim=1) - radius[y]).clamp(min=0) * self.bounded[y]
        return excess.sum() / (excess > 0).sum().clamp(min=1)

    def confusion(self, new: Tensor, old: Tensor) -> Tensor:
        """The discriminator learns to tell new from old, the backbone receives its gradient reversed."""
        if self.normalise:
            new, old = F.normalize(new), F.normalize(old)
        strength = 2 / (1 + math.exp(-10 * self.done)) - 1
        # two forwards, since new and old have batch statistics of their own
        told_new, told_old = self.discriminator(Reversed.apply(new, strength)), self.discriminator(old)
        zeros = torch.zeros(len(new), dtype=torch.int64, device=new.device)
        return F.cross_entropy(told_new, zeros) + F.cross_entropy(told_old, zeros + 1)


class Reversed(torch.autograd.Function):
    """Identity whose gradient is -strength times the incoming one (Ganin & Lempitsky 2015)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None
