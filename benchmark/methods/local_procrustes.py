"""One orthogonal map per cluster of the source space, softly routed.

y = sum over c of p_c(x) x R_c, the clusters by k-means on x (as the mixed-adapter repository reports it).
Fitted to stored embeddings of the same images by both releases, see `Posthoc`; normalised before and after where the
protocol's similarity is the cosine.
"""

from __future__ import annotations

from typing import ClassVar

from benchmark.bridge import Posthoc, Side
from benchmark.method import Context


class LocalProcrustes(Posthoc):
    """One orthogonal map per cluster of the source space, softly routed, fitted to stored embeddings.

    Args:
        clusters: their number. Ours: 8.
        side: "query" = new queries are moved to the old space; "gallery" = stored items to the new one.
        pairs: images embedded by both releases that it is fitted to; none = all training images of the newer release.
        direct: one map for each pair of releases, instead of a chain of those between neighbours.
    """

    adapter = "LocalProcrustes"
    variants: ClassVar[dict] = {
        "LocalProcrustes-gallery": {"side": "gallery"},
        "LocalProcrustes-direct": {"direct": True},
    }

    def __init__(
        self, context: Context, clusters: int = 8, side: Side = "query", pairs: int | None = None, direct: bool = False
    ):
        super().__init__(context, side=side, pairs=pairs, clusters=clusters)
