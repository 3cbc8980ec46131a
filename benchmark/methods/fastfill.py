"""FastFill (Jaeckle et al., "FastFill: Efficient Compatible Model Update", ICLR 2023).

FCT's transformation z = h(phi_old, psi) with an uncertainty head s = w.z + b on its output. Beside the distance to the new
embedding, z is judged by the new model's own frozen classifier; s learns how badly both went, and items of high s are
re-embedded first. Per item, with smoothing and classifier as the new model was trained:

    a = |phi_new(x) - z|^2 / d_new,   c = CE(W_new z, y),   l = a + c,   L = mean over the batch of exp(-s) l / 2 + s / 2

whose optimum is s = log l. The balance of a and c hangs on the length of the release's raw vectors. Follows the authors' code
(the paper's body was not read). L may be negative. A new model without classifier (self-supervised) cannot be served.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmark.bridge import Mapped
from benchmark.embeddings import Link, Stored, View
from benchmark.images import Batch
from benchmark.method import Context
from benchmark.methods.fct import FCT, Transformation


class FastFill(FCT):
    """FCT that knows where it is wrong: the new classifier judges moved items, and uncertain ones are re-embedded first.

    Args:
        hidden: width of the transformation's inner layers. Code: 2048.
        side_information: whether a SimCLR embedding of each item was stored when it was ingested.
        lr: of Adam. Code: 5e-4.
        direct: one transformation for each pair of releases, instead of a chain of those between neighbours.
        alignment, discriminative: weights of a and c in l. Code: 1, 1.
    """

    variants: ClassVar[dict] = {"FastFill-noside": {"side_information": False}, "FastFill-direct": {"direct": True}}
    space: ClassVar = {**FCT.space, "discriminative": (0.3, 1.0, 3.0)}

    def __init__(
        self,
        context: Context,
        hidden: int = 2048,
        side_information: bool = True,
        lr: float = 5e-4,
        direct: bool = False,
        alignment: float = 1.0,
        discriminative: float = 1.0,
    ):
        super().__init__(context, hidden, side_information, lr, direct)
        self.alignment, self.discriminative = alignment, discriminative
        d_old, d_new = self.ends()
        self.step = Uncertain(d_old, context.dims.get("side", d_old), d_new, hidden)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        old, side, new = self.views(batch)
        z, head = self.step(old, side), self.context.encoders["new"].head  # (B, d_n)
        assert head is not None and isinstance(self.step, Uncertain)
        s = self.step.uncertainty(z)  # (B,) log of the expected l; its gradient moves z too
        weight = 0.5 * torch.exp(-s)
        return {
            "alignment": (weight * self.alignment * (new - z).square().mean(1)).mean(),
            "discriminative": (weight * self.discriminative * head(z, batch.y, reduction="none")).mean(),
            "uncertainty": 0.5 * s.mean(),
        }

    def link(self) -> Link:
        plain = super().link()
        assert isinstance(plain, Mapped)
        return Ordered(plain.release, plain.dim, plain.leads_to, plain.step, side=plain.side, unit=plain.unit)


class Uncertain(Transformation):
    """h with its uncertainty head; 5,712,129 parameters at 128, 128, 128 and 2048."""

    def __init__(self, d_old: int, d_side: int, d_new: int, hidden: int):
        super().__init__(d_old, d_side, d_new, hidden)
        self.sigma = nn.Linear(d_new, 1)

    def uncertainty(self, z: Tensor) -> Tensor:
        return self.sigma(z)[:, 0]  # (B, d_n) -> (B,)


class Ordered(Mapped):
    def priority(self, g: Mapping[View, Tensor], stored: Stored) -> Tensor:
        """The uncertainty of each moved item, by the step into the newest space."""
        assert isinstance(self.step, Uncertain)
        return self.step.uncertainty(self.gallery(g, stored))
