"""Ridge-regularised affine map.

y = x W + b, W = (A^T A + lambda I)^-1 A^T B on centred pairs, lambda = rho tr(A^T A) / d: scale-aware, since unit rows have a
variance of about 1 / d per coordinate and an absolute lambda would mean nothing.
Fitted to stored embeddings of the same images by both releases, see `Posthoc`; normalised before and after where the
protocol's similarity is the cosine.
"""

from __future__ import annotations

from typing import ClassVar

from benchmark.bridge import Posthoc, Side
from benchmark.method import Context


class Ridge(Posthoc):
    """Ridge-regularised affine map, fitted to stored embeddings.

    Args:
        rho: strength of the ridge in units of the mean variance of a coordinate; none = chosen by generalised
            cross-validation over all pairs.
        side: "query" = new queries are moved to the old space; "gallery" = stored items to the new one.
        pairs: images embedded by both releases that it is fitted to; none = all training images of the newer release.
        direct: one map for each pair of releases, instead of a chain of those between neighbours.
    """

    adapter = "Ridge"
    variants: ClassVar[dict] = {"Ridge-gallery": {"side": "gallery"}, "Ridge-direct": {"direct": True}}

    def __init__(
        self,
        context: Context,
        rho: float | None = None,
        side: Side = "query",
        pairs: int | None = None,
        direct: bool = False,
    ):
        super().__init__(context, side=side, pairs=pairs, rho=rho)
