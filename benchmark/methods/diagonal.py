"""One scale and one offset per coordinate, by least squares.

y = s * x + b. Needs equal dims; after another map it is Drift-Adapter's diagonal scaling (arXiv 2509.23471).
Fitted to stored embeddings of the same images by both releases, see `Posthoc`; normalised before and after where the
protocol's similarity is the cosine.
"""

from __future__ import annotations

from typing import ClassVar

from benchmark.bridge import Posthoc, Side
from benchmark.method import Context


class Diagonal(Posthoc):
    """One scale and one offset per coordinate, by least squares, fitted to stored embeddings.

    Args:
        side: "query" = new queries are moved to the old space; "gallery" = stored items to the new one.
        pairs: images embedded by both releases that it is fitted to; none = all training images of the newer release.
        direct: one map for each pair of releases, instead of a chain of those between neighbours.
    """

    adapter = "Diagonal"
    variants: ClassVar[dict] = {"Diagonal-gallery": {"side": "gallery"}, "Diagonal-direct": {"direct": True}}

    def __init__(self, context: Context, side: Side = "query", pairs: int | None = None, direct: bool = False):
        super().__init__(context, side=side, pairs=pairs)
