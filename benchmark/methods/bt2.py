"""BT2, basis transformation (Zhou et al., "BT^2: Backward-compatible training with basis transformation", ICCV 2023).

The new model's embedding f follows its oracle phi', a few extra dims u follow the old model, and orthogonal basis changes
P1, P2 re-pack both into v = [b; e] whose first d_o dims b live in the old space, so that no new information is lost:

    z = [u; P1 C f],  b = P2 z[:d_o],  e = z[d_o:]
    L = CE(W f, y) + l1 (1 - cos(phi'(x), f)) + l2 CE(b^ V^T, y) + l3 (1 - cos(phi_o(x), b)),  V = old class means

Structure and weights follow the authors' code; the paper's own tables of hyperparameters were not available to us.
Corrected: the code caches both teachers' embeddings once, from another augmented view; here they see the student's view,
in eval mode, and V comes from test transforms. Adapted: W is the task's head (the code: linear on f).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from benchmark.images import Batch
from benchmark.method import ORACLE, Context, Encoder, Need, Widened


class BT2(Widened):
    """Orthogonal basis changes with extra dims; follows the oracle and the old model.

    Args:
        match_new: l1, pull of f to the oracle's embedding. Code: 1.
        influence: l2, old class means as classifier of b, no temperature. Code: 10.
        match_old: l3, pull of b to the old embedding. Code: 5.
        energy: C, norm of the new part of v beside the old-specific part of norm 1. Code: 2 (3 for one CNN -> ViT step).
        extra_dims: stored beyond the old release's dims. Code: 32 on 128.
        structure: what the old-specific branch reads: "resnet" = relu(g), "vit" = g; "auto" by the backbone's name.
    """

    space: ClassVar = {"influence": (1.0, 3.0, 10.0, 30.0), "match_old": (1.0, 5.0, 15.0), "energy": (1.0, 2.0, 3.0)}

    def __init__(
        self,
        context: Context,
        match_new: float = 1.0,
        influence: float = 10.0,
        match_old: float = 5.0,
        energy: float = 2.0,
        extra_dims: int = 32,
        structure: Literal["auto", "resnet", "vit"] = "auto",
    ):
        new, old = context.release.dim, context.old_dim or 0
        super().__init__(context, extra_dims=extra_dims, backbone_width=new + old, head_width=new)
        self.match_new, self.influence, self.match_old = match_new, influence, match_old
        relu = structure == "resnet" or (structure == "auto" and "vit" not in context.release.backbone)
        self.network = BasisChange(self.backbone, new, old, self.stored - new, energy, relu)
        if context.means:
            self.register_buffer("old_means", context.means["old_means"])  # (K, d_o), not normalised

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        return {"old": Need("encoder"), "old_means": Need("means"), "oracle": Need("encoder", ORACLE)} if t else {}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        f, v = self.network.parts(batch.x["image"])
        b = v[:, : self.shared]
        with torch.no_grad():
            old, oracle = (self.context.encoders[name](batch.x)["main"] for name in ("old", "oracle"))
        return {
            "classification": self.head(f, batch.y),
            "match_new": self.match_new * (1 - F.cosine_similarity(oracle, f).mean()),
            "influence": self.influence * F.cross_entropy(F.normalize(b) @ self.old_means.T, batch.y),
            "match_old": self.match_old * (1 - F.cosine_similarity(old, b).mean()),
        }

    def released(self) -> Encoder:
        return Encoder(self.network, self.stored)  # the head acts on f, not on v: released without


class BasisChange(nn.Module):
    """Backbone with output g (B, new + old) -> v (B, extra + new); ||v||^2 = 1 + energy^2 for every image."""

    def __init__(self, backbone: nn.Module, new: int, old: int, extra: int, energy: float, relu: bool):
        super().__init__()
        if extra + new < old:
            raise ValueError(f"BT2 stores {extra + new} dims, fewer than the old release's {old}")
        self.backbone, self.new, self.old, self.energy, self.relu = backbone, new, old, energy, relu
        self.old_branch = nn.Linear(new + old, extra)  # the code computes d_o outputs and throws away all but `extra`
        self.p1 = orthogonal(nn.Linear(new, new, bias=False))
        self.p2 = orthogonal(nn.Linear(old, old, bias=False))

    def parts(self, image: Tensor) -> tuple[Tensor, Tensor]:
        g = self.backbone(image)
        f = F.normalize(g[:, : self.new])
        u = F.normalize(self.old_branch(F.relu(g) if self.relu else g))  # (B, extra)
        z = torch.cat([u, self.p1(self.energy * f)], 1)  # (B, extra + new)
        return f, torch.cat([self.p2(z[:, : self.old]), z[:, self.old :]], 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.parts(image)[1]
