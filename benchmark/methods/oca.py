"""OCA, orthogonal compatible aligned training (Ricci, Biondi, Pernici, Del Bimbo, "Backward-compatible aligned representations
via an orthogonal transformation layer", ECCV workshops 2024).

The embedding h (unit norm) has extra dims; its first d_o are tied to the old class means V, while the new classifier W
reads a learned rotation of it, Q h + t. Deployed is h, un-rotated.

    L = 5 CE(W (Q h + t), y) + 10 CE(h_o^ V^T, y) + 5 (1 - cos(V_y, h_o)),  h_o = h[:d_o]

Weights and terms follow the authors' code; whether the paper's second group (L_ACE) is exactly this sum is unverified.
Corrected: V from test transforms. Adapted: W is the task's head (the code: linear), smoothing is the recipe's.
Since W(Qh + t) = (WQ)h + Wt with a linear W, Q adds no capacity: hence the two ablations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from benchmark.images import Batch
from benchmark.method import Context, Encoder, Need, Widened


class OCA(Widened):
    """Extra dims, old class means tie the first dims, the new classifier reads a learned rotation.

    Args:
        classification, influence, align: weights of the three terms. Code: 5, 10, 5.
        extra_dims: stored beyond the old release's dims. Code: 32 on 128.
        rotation: "learned" = the method; ablations: "frozen" = Q at its random start, "none" = the head reads h.
    """

    variants: ClassVar = {"OCA-noQ": {"rotation": "none"}, "OCA-frozenQ": {"rotation": "frozen"}}
    space: ClassVar = {"classification": (1.0, 5.0, 15.0), "influence": (3.0, 10.0, 30.0), "align": (1.0, 5.0, 15.0)}

    def __init__(
        self,
        context: Context,
        classification: float = 5.0,
        influence: float = 10.0,
        align: float = 5.0,
        extra_dims: int = 32,
        rotation: Literal["learned", "frozen", "none"] = "learned",
    ):
        super().__init__(context, extra_dims=extra_dims)
        self.classification, self.influence, self.align = classification, influence, align
        self.network = UnitNorm(self.backbone)
        self.rotate: nn.Module = nn.Identity()
        if rotation != "none":
            self.rotate = orthogonal(nn.Linear(self.stored, self.stored)).requires_grad_(rotation == "learned")
        if context.means:
            self.register_buffer("old_means", context.means["old_means"])  # V: (K, d_o), not normalised

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        return {"old_means": Need("means")} if t else {}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        y = batch.y
        h = self.network(batch.x["image"])  # (B, D), unit norm
        h_old = h[:, : self.shared]
        logits = F.normalize(h_old) @ self.old_means.T  # (B, K), within [-1, 1]: the code has no temperature
        return {
            "classification": self.classification * self.head(self.rotate(h), y),
            "influence": self.influence * F.cross_entropy(logits, y, label_smoothing=self.head.smoothing),
            "align": self.align * (1 - F.cosine_similarity(self.old_means[y], h_old).mean()),
        }

    def released(self) -> Encoder:
        return Encoder(self.network, self.stored)  # the head acts on the rotated h: released without


class UnitNorm(nn.Module):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor) -> Tensor:
        return F.normalize(self.backbone(image))
