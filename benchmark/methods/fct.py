"""FCT, forward compatible training (Ramanujan et al., "Forward Compatible Training for Large-Scale Embedding Retrieval
Systems", CVPR 2022).

When an item is ingested, a cheap task-agnostic feature s = psi(x), its side information, is stored beside the old embedding.
A new model is trained freely; then a transformation h moves what is stored into its space, without the images:

    L = |phi_new(x) - h(phi_old(x), psi(x))|^2 / d_new, mean over the batch; all three encoders frozen, the same augmented view

Layers, optimiser and the batch norm that is frozen for the second half follow the authors' code (the paper's body was not
read). There h has no activation at its end though the targets are non-negative; so here. psi is trained once, on the data
of the first release, and stored with every item from then on; without side information h reads phi_old twice, as the code.
The authors' psi had seen 1000 classes of ImageNet; ours sees no more than the first release did, so that side information brings
less here. As in the code, the distance is one of raw vectors, also where the protocol then searches by cosine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark.bridge import Bridge, transformation_recipe
from benchmark.embeddings import View
from benchmark.images import Batch
from benchmark.method import Context, Need
from benchmark.protocol import Recipe


class FCT(Bridge):
    """Stored items pass a learned transformation into the new space, helped by side information stored with them.

    Args:
        hidden: width of the transformation's inner layers. Code: 2048.
        side_information: whether a SimCLR embedding of each item was stored when it was ingested.
        lr: of Adam. Code: 5e-4.
        direct: one transformation for each pair of releases, instead of a chain of those between neighbours.
    """

    side = "gallery"
    variants: ClassVar[dict] = {"FCT-noside": {"side_information": False}, "FCT-direct": {"direct": True}}
    space: ClassVar = {"hidden": (512, 1024, 2048), "lr": (2e-4, 5e-4, 1e-3, 2e-3)}

    def __init__(
        self,
        context: Context,
        hidden: int = 2048,
        side_information: bool = True,
        lr: float = 5e-4,
        direct: bool = False,
    ):
        super().__init__(context)
        self.lr = lr
        d_old, d_new = self.ends()
        self.step = Transformation(d_old, context.dims.get("side", d_old), d_new, hidden)

    @classmethod
    def requires(cls, t: int, side_information: bool = True, **hyperparameters: Any) -> Mapping[str, Need]:
        needs = dict(super().requires(t))
        return needs | {"side": Need("encoder", "SimCLR", release=0)} if t and side_information else needs

    @classmethod
    def gallery_views(
        cls, t: int, stored: int, side_information: bool = True, **hyperparameters: Any
    ) -> tuple[View, ...]:
        return ((stored, "main"), (stored, "side")) if side_information and t != stored else ((stored, "main"),)

    def recipe(self, default: Recipe) -> Recipe:
        return transformation_recipe(default, self.lr)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        frozen = self.trainer.current_epoch >= self.trainer.max_epochs / 2 > 0.5  # the code: from epoch 40 of 80 on
        for module in self.step.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.train(not frozen)

    def views(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """phi_old (B, d_o), psi (B, d_s), phi_new (B, d_n) of a batch."""
        encoders = self.context.encoders
        with torch.no_grad():
            old, new = encoders["old"](batch.x)["main"], encoders["new"](batch.x)["main"]
            return old, encoders["side"](batch.x)["main"] if "side" in encoders else old, new

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        old, side, new = self.views(batch)
        return {"match": F.mse_loss(self.step(old, side), new)}


class Transformation(nn.Module):
    """h: (B, d_o), (B, d_s) -> (B, d_n); 5,712,000 parameters at 128, 128, 128 and 2048."""

    def __init__(self, d_old: int, d_side: int, d_new: int, hidden: int):
        super().__init__()
        self.p1 = nn.Sequential(*block(d_old, 2 * d_old), *block(2 * d_old, 2 * d_new))
        self.p2 = nn.Sequential(*block(d_side, 2 * d_side), *block(2 * d_side, 2 * d_new))
        self.mixer = nn.Sequential(*block(4 * d_new, hidden), *block(hidden, hidden), nn.Linear(hidden, d_new))

    def forward(self, old: Tensor, side: Tensor | None = None) -> Tensor:
        return self.mixer(torch.cat([self.p1(old), self.p2(old if side is None else side)], 1))


def block(d_in: int, d_out: int) -> tuple[nn.Module, ...]:
    return nn.Linear(d_in, d_out, bias=False), nn.BatchNorm1d(d_out), nn.ReLU()
