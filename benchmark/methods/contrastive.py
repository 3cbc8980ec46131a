"""Contrastive loss to old features: an image's old embedding is the positive, the hardest of other classes the negatives.

    L = L(W z, y) - weight * mean_i log [ e^{<z_i,o_i>/tau} / (e^{<z_i,o_i>/tau} + sum_{k in top(i)} e^{<z_i,o_k>/tau}) ]

z, o unit vectors of the new and the old model; top(i): the `hardest` samples of the batch of other classes than y_i whose
o_k are nearest to z_i. Form and constants as the baseline of OpenCompatible's code (RACT without its new-to-new pool).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.images import Batch
from benchmark.method import Context, Need, Widened


class Contrastive(Widened):
    """New-to-old InfoNCE with the hardest old negatives.

    Args:
        weight: of the contrastive loss. Code: 1.
        temperature: tau. Code: 0.01.
        hardest: negatives of each pool. Code: 10.
    """

    space: ClassVar = {"weight": (0.3, 1.0, 3.0, 10.0), "temperature": (0.01, 0.05, 0.2), "hardest": (10, 30)}

    def __init__(self, context: Context, weight: float = 1.0, temperature: float = 0.01, hardest: int = 10):
        super().__init__(context)
        self.weight, self.temperature, self.hardest = weight, temperature, hardest

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        return {"old": Need("encoder")} if t else {}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        z = self.backbone(batch.x["image"])  # (B, D)
        with torch.no_grad():
            old = self.context.encoders["old"](batch.x)["main"]
        new, old = F.normalize(z[:, : self.shared]), F.normalize(old[:, : self.shared])
        positive = (new * old).sum(1, keepdim=True)  # (B, 1)
        logits = torch.cat([positive, *self.negatives(new, old, batch.y)], 1) / self.temperature
        target = torch.zeros_like(batch.y)  # the positive stands first
        return {"classification": self.head(z, batch.y), "contrast": self.weight * F.cross_entropy(logits, target)}

    def negatives(self, new: Tensor, old: Tensor, y: Tensor) -> list[Tensor]:
        """Pools of similarities, (B, hardest) each."""
        return [hardest(new @ old.T, y, self.hardest)]


def hardest(similarities: Tensor, y: Tensor, count: int) -> Tensor:
    """The `count` largest of each row (B, B) among samples of other classes; -inf where there are fewer."""
    same = y[:, None] == y[None, :]
    return similarities.masked_fill(same, -torch.inf).topk(min(count, len(y)), dim=1).values
