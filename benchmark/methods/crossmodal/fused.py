"""Fusion of the old query with the mapped new one on the sphere (SLERP, NLERP, query-adaptive), after Procrustes.

After Ricci, Biondi and Pernici, "Spherical Interpolation for Backward-Compatible Multimodal Representations": Procrustes on
texts, then a point on the arc from the old query to the mapped new one. The weight is chosen for each direction by R@1 on
the training pairs, then fixed. Both encoders run for every query, which is billed.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.crossmodal import DIRECTIONS, SIDES, Positives, rank_pairs
from benchmark.embeddings import Link, Stored, View, main
from benchmark.fusion import GRIDS, fuse
from benchmark.method import Context
from benchmark.methods.crossmodal._mapped import unit
from benchmark.methods.crossmodal.adapted import Adapted, Kind


class Fused(Adapted):
    """SLERP of the old query and the Procrustes-mapped new one; NLERP and query-adaptive fusion as variants.

    Args:
        fusion: "slerp", "nlerp" or "adaptive".
        kind, support, per_side: of the adapter, as for `Adapted`.
    """

    variants: ClassVar = {
        "Fused-nlerp": {"fusion": "nlerp"},
        "Fused-adaptive": {"fusion": "adaptive"},
        "Fused-ridge": {"kind": "Ridge"},
    }

    def __init__(
        self,
        context: Context,
        fusion: Literal["slerp", "nlerp", "adaptive"] = "slerp",
        kind: Kind = "Procrustes",
        support: Literal["text", "image", "both"] = "text",
        per_side: bool = False,
    ):
        super().__init__(context, kind, support, per_side)
        self.fusion = FusionLink(context.t, context.old_dim or self.width, fusion)

    @classmethod
    def query_views(cls, t: int, stored: int, **hyperparameters: Any) -> tuple[View, ...]:
        return ((t - 1, "main"), (t, "main")) if t else ((t, "main"),)

    @classmethod
    def gallery_views(cls, t: int, stored: int, **hyperparameters: Any) -> tuple[View, ...]:
        return cls.query_views(t, stored) if t == stored else ((stored, "main"),)

    def solve(self) -> None:
        super().solve()
        t, maps = self.context.t, {"image": self.network.maps[0], "text": self.network.maps[-1]}
        old = {side: unit(self.context, f"old_{side}", t - 1, side) for side in maps}
        new = {side: F.normalize(maps[side](unit(self.context, f"new_{side}", t, side))) for side in maps}
        positives = self.positives(len(old["image"]), len(old["text"]))
        for direction in DIRECTIONS:
            query, gallery = SIDES[direction]
            best = -1.0
            for values in GRIDS[self.fusion.kind]:
                fused = fuse(self.fusion.kind, old[query], new[query], **values)
                recall = rank_pairs(fused, old[gallery], positives[direction]).recalls((1,))["r@1"] or 0.0
                if recall > best:
                    best = recall
                    getattr(self.fusion, query).copy_(torch.tensor(list(values.values())))

    def positives(self, images: int, texts: int) -> dict[str, Positives]:
        """Of the training images among the distinct training captions, and the reverse."""
        pairs = {pair for batch in self._batches() for pair in batch}
        of_image: list[list[int]] = [[] for _ in range(images)]
        of_text: list[list[int]] = [[] for _ in range(texts)]
        for image, text in sorted(pairs):
            of_image[image].append(text)
            of_text[text].append(image)
        return {"I2T": Positives.of(of_image, texts), "T2I": Positives.of(of_text, images)}

    def _batches(self) -> Any:
        assert self.context.loader is not None
        loader: Any = self.context.loader("train")
        return [[(image, text) for text in own] for image, own in enumerate(loader.captions)]

    def link(self) -> Link:
        return self.fusion


class FusionLink(Link):
    """Fuses (t - 1) and t on the query side, and on the gallery side where release t itself has filled the gallery."""

    image: Tensor
    text: Tensor

    def __init__(self, release: int, dim: int, kind: str):
        super().__init__(release, dim)
        self.kind, self.names = kind, [*GRIDS[kind][0]]
        for side in ("image", "text"):
            self.register_buffer(side, torch.full((len(self.names),), math.nan))  # chosen by `solve`

    def _fused(self, views: Any) -> Tensor:
        (side,) = {name for _, name in views}
        old, new = (F.normalize(main(views, release)) for release in (self.release - 1, self.release))
        return fuse(self.kind, old, new, **dict(zip(self.names, getattr(self, side).tolist())))

    def query(self, q: Any, stored: Stored) -> Tensor:
        return self._fused(q)

    def gallery(self, g: Any, stored: Stored) -> Tensor:
        return self._fused(g) if stored.release == self.release else main(g, stored.release)
