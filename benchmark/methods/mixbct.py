"""MixBCT (Liang et al., "MixBCT: Towards self-adapting backward-compatible training", arXiv 2308.06948).

One head, one loss, no weight: in every batch a share of the new embeddings is replaced by the stored old embeddings of the same
images, so the class vectors must fit both populations and new embeddings are drawn to wherever the old ones lie.

    z_i = o^_i (constant) for i in M, else f_i;   L = mean_i L(W z_i, y_i)

M: floor(share * B) of the batch's credible samples, drawn without replacement. Credible are the T n_c samples of each class
nearest to its mean of old embeddings. Rows in M reach the head only; their forward stays, as in the code, for batch norm's
statistics. Corrected: old embeddings from test transforms (the code's are randomly flipped), distances between unit rows
(the code also normalises columns: `denoise`). Weights of the margin head are the task's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.classwise import credible
from benchmark.images import Batch
from benchmark.method import Context, Need, Widened


class MixBCT(Widened):
    """A share of each batch's embeddings is replaced by credible old ones, under one head and one loss.

    Args:
        share: alpha, share of old embeddings in a batch, in [0, 1). Paper and code: 0.3.
        credible_share: T, share of each class's old embeddings that may be used, in (0, 1]. Paper and code: 0.9.
        denoise: distances for T: "rows" = between unit embeddings; "columns" = the code's, which also normalises each
            dimension over the data set.
    """

    old: Tensor
    credible: Tensor
    variants: ClassVar = {"MixBCT-reference": {"denoise": "columns"}}
    space: ClassVar = {"share": (0.1, 0.2, 0.3, 0.5, 0.7), "credible_share": (0.5, 0.7, 0.9, 1.0)}

    def __init__(
        self,
        context: Context,
        share: float = 0.3,
        credible_share: float = 0.9,
        denoise: Literal["rows", "columns"] = "rows",
    ):
        super().__init__(context)
        self.share = share
        if context.embeddings:
            stored = context.embeddings["old_train"]
            old = stored.main(context.t - 1)[:, : self.shared]  # (N, d_o)
            assert stored.labels is not None
            mask = credible(old, stored.labels, context.classes, credible_share, denoise == "columns")
            # by Batch.index; no part of a checkpoint: the plan keeps them
            self.register_buffer(
                "old", F.pad(F.normalize(old), (0, self.width - self.shared)), persistent=False
            )  # (N, D)
            self.register_buffer("credible", mask, persistent=False)  # (N,)

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        return {"old_train": Need("embeddings")} if t else {}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        z = self.backbone(batch.x["image"])  # (B, D)
        replaced = self.draw(batch.index)
        z = torch.where(replaced[:, None], self.old[batch.index].to(z.dtype), z)
        return {"classification": self.head(z, batch.y)}

    def draw(self, index: Tensor) -> Tensor:
        """Mask (B,): floor(share * B) credible samples, or all of them where there are fewer."""
        credible_here = self.credible[index]
        count = min(
            math.floor(self.share * len(index) + 1e-9), int(credible_here.sum())
        )  # 0.29 * 100 is 28.999999999999996
        order = torch.rand(len(index), device=index.device).masked_fill(~credible_here, 2.0).argsort()  # credible first
        mask = torch.zeros_like(credible_here)
        mask[order[:count]] = True
        return mask
