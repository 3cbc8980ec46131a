"""Triplet loss to old features: the old embedding of the same image must be nearer than that of any other class.

    L = L(W z, y) + weight * mean_{i,k} max(||z_i - o_i|| - ||z_i - o_k|| + margin, 0),  k in top(i)

z, o unit vectors of the new and the old model, top(i) the `hardest` samples of the batch of other classes whose o_k are nearest
to z_i. Margin and distance as the triplet form of OpenCompatible's code, which adds new-to-new negatives (`new_negatives`);
its reduction over negatives was not read: the mean is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.images import Batch
from benchmark.method import Context, Need, Widened
from benchmark.methods.contrastive import hardest


class Triplet(Widened):
    """New-to-old triplets: margin between the own old embedding and the hardest of other classes.

    Args:
        weight: of the triplet loss. Code: 1.
        margin: on Euclidean distances of unit vectors. Code: 0.8.
        hardest: negatives of each pool. Code: 10.
        new_negatives: new embeddings are negatives too, as in RACT's triplet form.
    """

    variants: ClassVar = {"RACT-triplet": {"new_negatives": True}}
    space: ClassVar = {"weight": (0.3, 1.0, 3.0, 10.0), "margin": (0.2, 0.4, 0.8)}

    def __init__(
        self,
        context: Context,
        weight: float = 1.0,
        margin: float = 0.8,
        hardest: int = 10,
        new_negatives: bool = False,
    ):
        super().__init__(context)
        self.weight, self.margin, self.hardest, self.new_negatives = weight, margin, hardest, new_negatives

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        return {"old": Need("encoder")} if t else {}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        z = self.backbone(batch.x["image"])  # (B, D)
        with torch.no_grad():
            old = self.context.encoders["old"](batch.x)["main"]
        new, old = F.normalize(z[:, : self.shared]), F.normalize(old[:, : self.shared])
        pools = [old, new.detach()] if self.new_negatives else [old]
        similar = torch.cat([hardest(new @ pool.T, batch.y, self.hardest) for pool in pools], 1)  # (B, hardest * pools)
        found = similar.isfinite()  # a batch may hold fewer of other classes
        negative = distance(similar.where(found, 0.0))
        positive = distance((new * old).sum(1, keepdim=True))
        violation = (positive - negative + self.margin).clamp(min=0) * found
        return {
            "classification": self.head(z, batch.y),
            "triplet": self.weight * violation.sum() / found.sum().clamp(min=1),
        }


def distance(cosine: Tensor) -> Tensor:
    """Euclidean distance of unit vectors; the floor keeps the root's gradient finite where they coincide."""
    return (2 - 2 * cosine).clamp(min=1e-6).sqrt()
