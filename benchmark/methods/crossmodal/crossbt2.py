"""BT2 for images and texts: basis changes with extra dims on both towers, the old towers as old heads.

Our transfer of Zhou et al. (BT^2, ICCV 2023; its modality-change experiment was seen as code only, with labels for
captions) to pairs. On each side f, v, b as in `benchmark.methods.bt2`, and

    L = CLIP(f_image, f_text) + sum over sides / 2 of
        l1 (1 - cos(oracle, f)) + l2 NCE_tau(b, old embedding of the other side) + l3 (1 - cos(old, b))

The teachers' embeddings are cached, from test transforms; tau: the old model's temperature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark.errors import UserError
from benchmark.heads import contrastive
from benchmark.images import Batch
from benchmark.method import ORACLE, Context, Encoder, Need, Widened
from benchmark.methods.bt2 import BasisChange
from benchmark.methods.crossmodal._mapped import unit
from benchmark.towers import SIDES, TwoSided


class CrossBT2(Widened):
    """BT2's basis changes behind both towers, with extra dims; follows the oracle and the old model.

    Args:
        match_new: l1, pull of f to the oracle's embedding.
        influence: l2, old embeddings of the other side as classifier of b.
        match_old: l3, pull of b to the old embedding.
        energy: norm of the new part of v beside the old-specific part of norm 1.
        extra_dims: stored beyond the wider of the two releases' dims.
    """

    two_sided: ClassVar = True
    space: ClassVar = {"influence": (0.3, 1.0, 3.0), "match_old": (1.0, 5.0, 15.0), "energy": (1.0, 2.0, 3.0)}

    def __init__(
        self,
        context: Context,
        match_new: float = 1.0,
        influence: float = 1.0,
        match_old: float = 5.0,
        energy: float = 2.0,
        extra_dims: int = 32,
    ):
        new, old = context.release.dim, context.old_dim or 0
        super().__init__(context, extra_dims=extra_dims, backbone_width=new + old, head_width=new)
        self.match_new, self.influence, self.match_old = match_new, influence, match_old
        self.network = ChangedTowers(self.backbone, new, old, self.stored - new, energy)
        if context.encoders:
            self.old = {side: unit(context, f"old_{side}", context.t - 1, side) for side in SIDES}
            self.oracle = {side: unit(context, f"oracle_{side}", context.t, side) for side in SIDES}

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        needs = {f"old_{side}": Need("embeddings", side=side) for side in SIDES}
        needs |= {f"oracle_{side}": Need("embeddings", ORACLE, side=side) for side in SIDES}
        return {"old": Need("encoder"), **needs} if t else {}

    def solve(self) -> None:
        raise UserError(f"{type(self).__name__} trains its towers, and this protocol's releases are not trained")

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        parts, captions = self.network.parts(batch.x), batch.x["caption"]
        rows = {"image": batch.index.cpu(), "text": captions.cpu()}
        old, oracle = ({s: x[s][rows[s]].to(self.device) for s in SIDES} for x in (self.old, self.oracle))
        f, b = ({s: parts[s][i] for s in SIDES} for i in (0, 1))
        b = {side: value[:, : self.shared] for side, value in b.items()}
        scale, old_scale = (
            network.logit_scale.exp().clamp(max=100) for network in (self.network, self.context.encoders["old"].network)
        )
        other = {"image": "text", "text": "image"}
        influence = [contrastive(b[s], old[other[s]][:, : self.shared], old_scale, captions) for s in SIDES]
        far_new, far_old = (
            torch.stack([1 - F.cosine_similarity(teacher[s], student[s]).mean() for s in SIDES]).mean()
            for teacher, student in ((oracle, f), (old, b))
        )
        return {
            "contrastive": contrastive(f["image"], f["text"], scale, captions),
            "match_new": self.match_new * far_new,
            "influence": self.influence * torch.stack(influence).mean(),
            "match_old": self.match_old * far_old,
        }

    def released(self) -> Encoder:
        return Encoder(self.network, self.stored)


class ChangedTowers(TwoSided):
    """One basis change behind both towers, which embed into new + old dims; see `BasisChange`.

    With one for each, P1 f of an image and P1 f of its caption would lie in two bases, and new/new would be lost.
    """

    def __init__(self, towers: TwoSided, new: int, old: int, extra: int, energy: float):
        super().__init__()
        self.towers = towers
        self.change = BasisChange(nn.Identity(), new, old, extra, energy, relu=False)

    @property
    def logit_scale(self) -> Tensor:  # type: ignore[override]
        return self.towers.logit_scale

    def parts(self, x: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """By side f (B, new) and v (B, extra + new)."""
        return {side: self.change.parts(g) for side, g in self.towers(x).items()}

    def image(self, x: Tensor) -> Tensor:
        return self.change(self.towers.image(x))

    def text(self, tokens: Tensor) -> Tensor:
        return self.change(self.towers.text(tokens))
