"""Fusion of the old query with the mapped new one (Ricci, Biondi, Pernici, "Spherical Interpolation for Backward-Compatible
Multimodal Representations"; read as text, venue not found).

u = old query, v = new query through an orthogonal Procrustes map, both of unit norm; the gallery stays untouched.

    SLERP     (sin((1 - a) theta) u + sin(a theta) v) / sin theta, theta = arccos u.v
    NLERP     (1 - a) u + a v, normalised; fusing the two scores ranks the same
    adaptive  NLERP with a = sigmoid(b0 + s0 u.v) for each query

Both models embed every query: billed. a, or b0 and s0, are chosen on pairs that the map is not fitted to, from the paper's
grids. The paper chooses by the recall of each image's caption; within one modality an image would find its own old embedding at
a = 0, and labels are for training only here. So each pair asks all others, old items by their old embeddings, and the choice is
what shares most of its first ten with the new release's own ranking (ours).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark import fusion
from benchmark.bridge import Mapped, Posthoc
from benchmark.embeddings import Link, Stored, View
from benchmark.errors import UserError
from benchmark.method import Context

HELD_OUT = 2000  # pairs that choose the weight, at most a fifth of all


class SLERP(Posthoc):
    """The old query and the new one through Procrustes, interpolated on the sphere.

    Args:
        kind: how the two are combined: one of `benchmark.fusion`.
        weight: a of SLERP and NLERP, in [0, 1]; 0 = the old query, 1 = Procrustes; none = chosen on held-out pairs.
        pairs: images embedded by both releases that it is fitted to; none = all training images of the newer release.
        direct: one map for each pair of releases, instead of a chain of those between neighbours.
    """

    adapter = "Procrustes"
    chosen: Tensor  # (1,) or (2,), in the order of `fusion.GRIDS`
    variants: ClassVar[dict] = {
        "NLERP": {"kind": "nlerp"},
        "AdaptiveNLERP": {"kind": "adaptive"},
        "SLERP-midpoint": {"weight": 0.5},
        "SLERP-direct": {"direct": True},
    }

    def __init__(
        self,
        context: Context,
        kind: Literal["slerp", "nlerp", "adaptive"] = "slerp",
        weight: float | None = None,
        pairs: int | None = None,
        direct: bool = False,
    ):
        if context.similarity != "cosine":
            raise UserError("SLERP and its kin fuse directions: they need a protocol whose similarity is the cosine")
        if weight is not None and kind == "adaptive":
            raise UserError("the adaptive fusion has no one weight; leave out weight")
        super().__init__(context, pairs=pairs)
        self.kind, self.given = kind, weight is not None
        start = [*fusion.GRIDS[kind][0].values()] if weight is None else [weight]
        self.register_buffer("chosen", torch.tensor(start), persistent=False)

    def fit(self) -> dict[str, Any]:
        old, new = self.unit_pairs()  # (N, d_o), (N, d_n)
        held, order = 0 if self.given else min(HELD_OUT, len(old) // 5), self.shuffled(len(old))
        old, new = old[order], new[order]
        self.fit_to(old[held:], new[held:])
        if held:
            u, v, target = old[:held], F.normalize(self.step(new[:held])), new[:held]
            wanted = nearest(target, target)
            shared = []
            for one in fusion.GRIDS[self.kind]:
                found = nearest(fusion.fuse(self.kind, u, v, **one), u)
                shared.append((found[:, :, None] == wanted[:, None]).sum())
            best = fusion.GRIDS[self.kind][int(torch.stack(shared).argmax())]
            self.chosen.copy_(torch.tensor([*best.values()]))
        return {"pairs": len(old), "fusion": [round(float(x), 3) for x in self.chosen]}

    @classmethod
    def query_views(cls, t: int, stored: int, **hyperparameters: Any) -> tuple[View, ...]:
        return tuple((r, "main") for r in sorted({t, stored}))

    def link(self) -> Link:
        plain = super().link()
        assert isinstance(plain, Mapped)
        fused = Fused(plain.release, plain.dim, plain.leads_to, plain.step, side=plain.side, unit=plain.unit)
        fused.kind = self.kind
        fused.register_buffer("chosen", self.chosen)
        return fused


class Fused(Mapped):
    kind: str
    chosen: Tensor

    def query(self, q: Mapping[View, Tensor], stored: Stored) -> Tensor:
        mapped = super().query(q, stored)
        if stored.release == self.release:
            return mapped
        old, new = F.normalize(q[stored.release, "main"]), F.normalize(mapped)
        names = fusion.GRIDS[self.kind][0]
        return fusion.fuse(self.kind, old, new, **dict(zip(names, self.chosen.tolist())))


def nearest(queries: Tensor, items: Tensor) -> Tensor:
    """(N, 10) the items nearest to each query by cosine, its own left out."""
    scores = queries @ items.T
    return scores.fill_diagonal_(-torch.inf).topk(min(10, len(items) - 1)).indices
