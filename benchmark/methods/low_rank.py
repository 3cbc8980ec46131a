"""Affine map of low rank, by reduced-rank regression (Izenman 1975), as Drift-Adapter's second form.

y = x W V V^T + b: the ridge map W, then the leading right singular vectors V of its predictions.
Fitted to stored embeddings of the same images by both releases, see `Posthoc`; normalised before and after where the
protocol's similarity is the cosine.
"""

from __future__ import annotations

from typing import ClassVar

from benchmark.bridge import Posthoc, Side
from benchmark.method import Context


class LowRank(Posthoc):
    """Affine map of low rank, by reduced-rank regression, fitted to stored embeddings.

    Args:
        rank: of the map. Ours: 32; Drift-Adapter's was not found.
        side: "query" = new queries are moved to the old space; "gallery" = stored items to the new one.
        pairs: images embedded by both releases that it is fitted to; none = all training images of the newer release.
        direct: one map for each pair of releases, instead of a chain of those between neighbours.
    """

    adapter = "LowRank"
    variants: ClassVar[dict] = {"LowRank-gallery": {"side": "gallery"}, "LowRank-direct": {"direct": True}}

    def __init__(
        self, context: Context, rank: int = 32, side: Side = "query", pairs: int | None = None, direct: bool = False
    ):
        super().__init__(context, side=side, pairs=pairs, rank=rank)
