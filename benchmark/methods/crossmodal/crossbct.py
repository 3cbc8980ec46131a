"""BCT for images and texts: the old towers' embeddings of captions and images are the old classifiers.

Our transfer of Shen et al. (CVPR 2020) to two towers, no published method: an image's class is its caption, so the old text
tower takes the old head's place (as BT2's code does for its modality change, with labels for captions), and the reverse:

    L = CLIP(u, v) + weight / 2 [NCE_tau(u, o_text) + NCE_tau(v, o_image)]

u, v: new embeddings of an image and its caption, cut to the old dims in the second part; o: old embeddings of the same pair
(frozen, test transforms); tau: the old model's temperature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmark.errors import UserError
from benchmark.heads import contrastive
from benchmark.images import Batch
from benchmark.method import Context, Need, Widened
from benchmark.methods.crossmodal._mapped import unit
from benchmark.towers import SIDES


class CrossBCT(Widened):
    """BCT with the old text tower as head of the new images, and the old image tower of the new texts.

    Args:
        weight: of the influence loss.
        extra_dims: dims beyond the old release's, untouched by the influence loss: the control for CrossBT2.
    """

    two_sided: ClassVar = True
    variants: ClassVar = {"CrossBCT-extra": {"extra_dims": 32}}
    space: ClassVar = {"weight": (0.3, 1.0, 3.0, 10.0)}

    def __init__(self, context: Context, weight: float = 1.0, extra_dims: int = 0):
        super().__init__(context, extra_dims=extra_dims)
        self.weight = weight
        if context.encoders:
            self.old = {side: unit(context, f"old_{side}", context.t - 1, side) for side in SIDES}

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        needs = {f"old_{side}": Need("embeddings", side=side) for side in SIDES}
        return {"old": Need("encoder"), **needs} if t else {}

    def solve(self) -> None:
        raise UserError(f"{type(self).__name__} trains its towers, and this protocol's releases are not trained")

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        z, captions = self.backbone(batch.x), batch.x["caption"]
        u, v = z["image"], z["text"]
        scale = self.backbone.logit_scale.exp().clamp(max=100)
        old_text = self.old["text"][captions.cpu()].to(self.device)
        old_image = self.old["image"][batch.index.cpu()].to(self.device)
        old_scale = self.context.encoders["old"].network.logit_scale.exp().clamp(max=100)
        influence = torch.stack(
            [
                contrastive(new[:, : self.shared], old[:, : self.shared], old_scale, captions)
                for new, old in ((u, old_text), (v, old_image))
            ]
        ).mean()
        return {"contrastive": contrastive(u, v, scale, captions), "influence": self.weight * influence}
