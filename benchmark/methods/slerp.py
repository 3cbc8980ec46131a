"""Fusion of the old query with the mapped new one (Ricci, Biondi, Pernici, "Spherical Interpolation for Backward-Compatible
Multimodal Representations"; read as text, venue not found).

u = old query, v = new query through an orthogonal Procrustes map, both of unit norm; the gallery stays untouched.

    SLERP     (sin((1 - a) theta) u + sin(a theta) v) / sin theta, theta = arccos u.v
    NLERP     (1 - a) u + a v, normalised; fusing the two scores ranks the same
    adaptive  NLERP with a = sigmoid(b0 + s0 u.v) for each query

Both models embed every query: billed. The paper chooses a on pairs that it sets aside, by the recall of each image's caption;
within one modality an image would find its own old embedding at a = 0, so here a is the paper's midpoint unless it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from benchmark import fusion
from benchmark.bridge import Mapped, Posthoc
from benchmark.embeddings import Link, Stored, View
from benchmark.method import Context


class SLERP(Posthoc):
    """The old query and the new one through Procrustes, interpolated on the sphere.

    Args:
        kind: how the two are combined.
        weight: a of SLERP and NLERP, in [0, 1]; 0 = the old query, 1 = Procrustes. Paper's midpoint: 0.5.
        b0, s0: of the adaptive weight. Paper's grids: -3 to 3 and -3 to 6.
        pairs: images embedded by both releases that it is fitted to; none = all training images of the newer release.
        direct: one map for each pair of releases, instead of a chain of those between neighbours.
    """

    adapter = "Procrustes"
    variants: ClassVar[dict] = {"NLERP": {"kind": "nlerp"}, "AdaptiveNLERP": {"kind": "adaptive"}}
    space: ClassVar = {"weight": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)}

    def __init__(
        self,
        context: Context,
        kind: Literal["slerp", "nlerp", "adaptive"] = "slerp",
        weight: float = 0.5,
        b0: float = 0.0,
        s0: float = 3.0,
        pairs: int | None = None,
        direct: bool = False,
    ):
        super().__init__(context, pairs=pairs)
        self.kind, self.weight, self.b0, self.s0 = kind, weight, b0, s0

    @classmethod
    def query_views(cls, t: int, stored: int, **hyperparameters: Any) -> tuple[View, ...]:
        return tuple((r, "main") for r in sorted({t, stored}))

    def link(self) -> Link:
        plain = super().link()
        assert isinstance(plain, Mapped)
        fused = Fused(plain.release, plain.dim, plain.leads_to, plain.step, side=plain.side, unit=plain.unit)
        fused.settings = {"kind": self.kind, "weight": self.weight, "b0": self.b0, "s0": self.s0}
        return fused


class Fused(Mapped):
    settings: Mapping[str, Any]

    def query(self, q: Mapping[View, Tensor], stored: Stored) -> Tensor:
        mapped = super().query(q, stored)
        if stored.release == self.release:
            return mapped
        old, new = F.normalize(q[stored.release, "main"]), F.normalize(mapped)
        s = self.settings
        if s["kind"] == "adaptive":
            return fusion.adaptive(old, new, s["b0"], s["s0"])
        return (fusion.slerp if s["kind"] == "slerp" else fusion.nlerp)(old, new, s["weight"])
