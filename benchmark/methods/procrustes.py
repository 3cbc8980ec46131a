"""Orthogonal Procrustes (Schoenemann 1966), the rigid map between two spaces.

y = x R with R = P Q^T from the SVD X^T Y = P S Q^T. Unequal dims: an isometry (d_s < d_t) or a partial one (d_s > d_t).
Fitted to stored embeddings of the same images by both releases, see `Posthoc`; normalised before and after where the
protocol's similarity is the cosine.
"""

from __future__ import annotations

from typing import ClassVar

from benchmark.bridge import Posthoc, Side
from benchmark.method import Context


class Procrustes(Posthoc):
    """Orthogonal Procrustes, fitted to stored embeddings.

    Args:
        centred: whether both means are taken off first and the target's is added again.
        side: "query" = new queries are moved to the old space; "gallery" = stored items to the new one.
        pairs: images embedded by both releases that it is fitted to; none = all training images of the newer release.
        direct: one map for each pair of releases, instead of a chain of those between neighbours.
    """

    adapter = "Procrustes"
    variants: ClassVar[dict] = {"Procrustes-gallery": {"side": "gallery"}, "Procrustes-direct": {"direct": True}}

    def __init__(
        self,
        context: Context,
        centred: bool = False,
        side: Side = "query",
        pairs: int | None = None,
        direct: bool = False,
    ):
        super().__init__(context, side=side, pairs=pairs, centred=centred)
