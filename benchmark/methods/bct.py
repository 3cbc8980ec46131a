"""BCT, backward-compatible training (Shen et al., "Towards backward-compatible representation learning", CVPR 2020).

L = L(W z, y) + weight * L(W_o z[:d_o], y). The second term is the influence loss: the new embedding z, cut to the old
dims, must be classified rightly by the frozen old classifier W_o. For classes that the old release never saw, W_o is
synthesised: class means of old embeddings of the new training images (old model in eval mode, test transforms; the
code of BT2 and OCA takes them from augmented images, OCA's BCT script with a teacher in training mode).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.errors import UserError
from benchmark.images import Batch
from benchmark.method import Context, Need, Widened


class BCT(Widened):
    """Influence loss: new embeddings must be classified rightly by the old classifier.

    Args:
        weight: lambda of the influence loss. Paper, openBCT: 1. The baseline in BT2's and OCA's code: 10, with scale 1.
        scale: None = the influence loss is the task's own head (its scale, its margin) on the old prototypes, as in the
            paper; a number = plain logits scale * <z^, mean_k>, the means not normalised. 1 is BT2's and OCA's baseline:
            logits within [-1, 1] make it a weak pull to the class mean, hence their weight of 10.
        prototypes: "means" = class means for every class (openBCT's pseudo classifier, BT2, OCA, MixBCT); "head" = the
            old release's head, on the samples of classes that it knows (openBCT's default); "both" = its rows where
            it has them, class means for the rest; "distill" = "head", and on samples of other classes the old head's own
            soft answer to the old embedding is the target (openBCT's and OpenCompatible's "lwf").
        extra_dims: dims beyond the old release's, untouched by the influence loss: the control for BT2 and OCA.
    """

    variants: ClassVar = {
        "BCT-extra": {"extra_dims": 32},
        "BCT-reference": {"weight": 10.0, "scale": 1.0},
        "BCT-head": {"prototypes": "head"},
        "BCT-distill": {"prototypes": "distill"},
    }
    space: ClassVar = {"weight": (0.3, 1.0, 3.0, 10.0), "scale": (None, 1.0, 8.0, 30.0)}

    def __init__(
        self,
        context: Context,
        weight: float = 1.0,
        scale: float | None = None,
        prototypes: Literal["means", "head", "both", "distill"] = "means",
        extra_dims: int = 0,
    ):
        super().__init__(context, extra_dims=extra_dims)
        self.weight, self.scale, self.distill = weight, scale, prototypes == "distill"
        if context.means or context.encoders:
            rows = old_prototypes(context, prototypes)[:, : self.shared]  # (K or K_old, d_o)
            self.old_head = context.prototype_head(rows)

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        needs = {"old": Need("encoder"), "old_means": Need("means")}
        unused = {"means": "old", "both": None}.get(hyperparameters["prototypes"], "old_means")
        return {name: need for name, need in needs.items() if t and name != unused}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        z = self.backbone(batch.x["image"])  # (B, D)
        influence = self.influence(z, batch.y)
        if self.distill:
            influence = influence + self.distillation(z, batch)
        return {"classification": self.head(z, batch.y), "influence": self.weight * influence}

    def distillation(self, z: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of the old head's answers to old and to new embeddings, on classes that it lacks."""
        with torch.no_grad():
            target = self.logits(self.context.encoders["old"](batch.x)["main"][:, : self.shared]).softmax(1)
        losses = F.cross_entropy(self.logits(z[:, : self.shared]), target, reduction="none")  # (B,)
        return (losses * (batch.y >= self.old_head.classes)).mean()

    def logits(self, z: Tensor) -> Tensor:
        """Of the old classifier, (B, d_o) -> (B, K), without margin."""
        if self.scale is None:
            return self.old_head.logits(z)
        return self.scale * F.normalize(z) @ self.old_head.weight.T

    def influence(self, z: Tensor, y: Tensor) -> Tensor:
        z = z[:, : self.shared]  # (B, d_o)
        known = y < self.old_head.classes
        if self.scale is None:
            losses = self.old_head(z, y.where(known, 0), reduction="none")
        else:
            losses = F.cross_entropy(
                self.logits(z), y.where(known, 0), reduction="none", label_smoothing=self.old_head.smoothing
            )
        return (losses * known).mean()  # a class that the old head lacks contributes 0, as in openBCT


def old_prototypes(context: Context, kind: str) -> Tensor:
    """Rows of W_o: class means, the old head's rows, or the latter completed by the former."""
    if kind == "means":
        return context.means["old_means"]
    head = context.encoders["old"].head
    if head is None:
        raise UserError("BCT: the old release has no head of its own (its method drops it); set prototypes=means")
    return head.weight if kind != "both" else torch.cat([head.weight, context.means["old_means"][head.classes :]])
