"""The mean difference between two spaces (Query Drift Compensation, arXiv 2506.00037, with one task).

y = x + mean(y_i - x_i) over the pairs. Needs equal dims and models that are near each other.
Fitted to stored embeddings of the same images by both releases, see `Posthoc`; normalised before and after where the
protocol's similarity is the cosine.
"""

from __future__ import annotations

from typing import ClassVar

from benchmark.bridge import Posthoc, Side
from benchmark.method import Context


class ConstantShift(Posthoc):
    """The mean difference between two spaces, fitted to stored embeddings.

    Args:
        side: "query" = new queries are moved to the old space; "gallery" = stored items to the new one.
        pairs: images embedded by both releases that it is fitted to; none = all training images of the newer release.
        direct: one map for each pair of releases, instead of a chain of those between neighbours.
    """

    adapter = "ConstantShift"
    variants: ClassVar[dict] = {"ConstantShift-gallery": {"side": "gallery"}, "ConstantShift-direct": {"direct": True}}

    def __init__(self, context: Context, side: Side = "query", pairs: int | None = None, direct: bool = False):
        super().__init__(context, side=side, pairs=pairs)
