"""CoReS, compatible representations via stationarity (Biondi et al., TPAMI 2023), with the d-Simplex fixed classifier.

The classifier is fixed to the vertices of a regular simplex, allocated beforehand for more classes than there are, so that every
release is trained towards the same prototypes; no release ever reads the one before.

    L = CE(S z, y),  S (K, K - 1): unit rows, pairwise cosine -1/(K - 1)

Raw logits of un-normalised embeddings, as the authors' code; the protocol's similarity normalises at test. All releases, the first
one too, are trained so and store K - 1 dims: its old/old cell is its own, not the frozen release's. Since each release is trained
from its own start, chain and pairwise mode differ in the gallery alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmark.embeddings import Prefix
from benchmark.errors import UserError
from benchmark.heads import Head
from benchmark.images import Batch
from benchmark.method import Context, Method
from benchmark.protocol import HeadSpec, Release


class CoReS(Method):
    """Fixed simplex classifier, the same for all releases.

    Args:
        preallocated: K, classes for which the simplex has a vertex; items store K - 1 dims. Code: 100 on CIFAR-100.
    """

    trains_first_release: ClassVar = True
    space: ClassVar = {"preallocated": (100, 129, 257)}

    def __init__(self, context: Context, preallocated: int = 100):
        if context.classes > preallocated:
            raise UserError(
                f"{type(self).__name__}: release {context.t} has {context.classes} classes, the simplex {preallocated} "
                f"vertices; set preallocated to the largest number of classes that any release will have"
            )
        super().__init__(context, backbone_width=preallocated - 1)
        self.shared = min(self.width, context.old_dim or self.width)  # unequal in pairwise mode only
        smoothing = context.release.recipe.label_smoothing
        self.head = Head(simplex(preallocated), HeadSpec("linear"), smoothing).requires_grad_(False)

    @classmethod
    def stored_dim(cls, release: Release, old_dim: int | None, **hyperparameters: Any) -> int:
        return hyperparameters["preallocated"] - 1

    def link(self) -> Prefix:
        return Prefix(self.context.t, self.width)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return {"classification": self.head(self.backbone(batch.x["image"]), batch.y)}


def simplex(vertices: int) -> Tensor:
    """Vertices (K, K - 1) of a regular simplex around 0: unit rows, pairwise cosine -1/(K - 1)."""
    n = vertices - 1
    corner = torch.full((1, n), (1 - (1 + n) ** 0.5) / n, dtype=torch.float64)
    rows = torch.cat([torch.eye(n, dtype=torch.float64), corner])
    rows = rows - rows.mean(0)
    return (rows / rows.norm(dim=1, keepdim=True)).to(torch.get_default_dtype())
