"""L2 regression to the old features, and its weakened form: the baselines of BCT (CVPR 2020) and MixBCT (arXiv 2308.06948).

    L = L(W z, y) + weight * mean_i max(||z^_i - o^_i|| - slack, 0),  o = old model of the same augmented view

The norm, not its square: form and weight as MixBCT's code. OpenCompatible and openBCT take the mean squared error over
dims instead, about d times smaller (form = "mse"). MixBCT reads o from a file made with random flips; here o sees z's view.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.images import Batch
from benchmark.method import Context, Need, Widened


class L2(Widened):
    """Regression of each new embedding to the old embedding of the same image.

    Args:
        weight: of the distance. MixBCT's code: 10.
        slack: distances up to it cost nothing. 0 = L2; weakened L2 in MixBCT's code: 0.2.
        form: "norm" = distance of the unit vectors; "mse" = its square over the number of dims (OpenCompatible).
    """

    variants: ClassVar = {"L2-weakened": {"slack": 0.2}, "L2-mse": {"form": "mse"}}
    space: ClassVar = {"weight": (1.0, 3.0, 10.0, 30.0), "slack": (0.0, 0.2, 0.5)}

    def __init__(
        self, context: Context, weight: float = 10.0, slack: float = 0.0, form: Literal["norm", "mse"] = "norm"
    ):
        super().__init__(context)
        self.weight, self.slack, self.form = weight, slack, form

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        return {"old": Need("encoder")} if t else {}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        z = self.backbone(batch.x["image"])  # (B, D)
        with torch.no_grad():
            old = self.context.encoders["old"](batch.x)["main"]  # (B, d_o)
        gap = F.normalize(z[:, : self.shared]) - F.normalize(old[:, : self.shared])
        if self.form == "norm":
            regression = (gap.norm(dim=1) - self.slack).clamp(min=0).mean()
        else:
            regression = gap.square().mean()
        return {"classification": self.head(z, batch.y), "regression": self.weight * regression}
