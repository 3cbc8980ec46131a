"""LCE, learning compatible embeddings (Meng et al., ICCV 2021), in the form with K = 0 of AdvBCT's code.

Each new embedding stays inside the cone of its old class, and the new class vector points along the old class's mean:

    L = L(W z, y) + w_b mean_i max(angle(z_i, c_{y_i}) - theta_{y_i}, 0) + w_a mean_k (1 - cos(w_k, c_k))

c_k: mean of the unit old embeddings of class k's training images; theta_k: the widest angle to c_k among them, outliers beyond
1.5 interquartile ranges left out. The paper was not available to us; weights 1, 1 as in that code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from benchmark.classwise import within_fences
from benchmark.heads import class_means
from benchmark.images import Batch
from benchmark.method import Context, Need, Widened


class LCE(Widened):
    """Old class cones bound the new embeddings; new class vectors align with old class means.

    Args:
        boundary: w_b, weight of leaving the cone, in radians. Code: 1.
        align: w_a, weight of the class vectors' alignment. Code: 1.
    """

    centres: Tensor
    widest: Tensor
    space: ClassVar = {"boundary": (1.0, 3.0, 10.0, 30.0), "align": (0.3, 1.0, 3.0)}

    def __init__(self, context: Context, boundary: float = 1.0, align: float = 1.0):
        super().__init__(context)
        self.boundary, self.align = boundary, align
        if context.embeddings:
            old = context.embeddings["old_train"]
            unit = F.normalize(old.main(context.t - 1)[:, : self.shared])
            assert old.labels is not None
            centres = F.normalize(class_means(unit, old.labels, context.classes)[0])  # (K, d_o)
            angles = angle((unit * centres[old.labels]).sum(1))  # (N,)
            self.register_buffer("centres", centres)
            self.register_buffer("widest", within_fences(angles, old.labels, context.classes).widest)  # (K,)

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        return {"old_train": Need("embeddings")} if t else {}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        z = self.backbone(batch.x["image"])  # (B, D)
        turned = angle((F.normalize(z[:, : self.shared]) * self.centres[batch.y]).sum(1))  # (B,)
        outside = (turned - self.widest[batch.y]).clamp(min=0)
        class_vectors = self.head.weight[:, : self.shared]  # (K, d_o)
        return {
            "classification": self.head(z, batch.y),
            "boundary": self.boundary * outside.mean(),
            "align": self.align * (1 - F.cosine_similarity(class_vectors, self.centres).mean()),
        }


def angle(cosine: Tensor) -> Tensor:
    """Radians; clamped, since the arc's gradient is infinite at +-1."""
    return cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos()
