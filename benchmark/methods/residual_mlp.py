"""Procrustes plus a small network on its residual (Drift-Adapter's third form, arXiv 2509.23471).

y = x A + b + W2 GELU(W1 LN(x)), A from Procrustes, W2 = 0 at the start; stopped early on held-out pairs. On the gallery side
it is Embedding-Converter's kind of map (ACL 2025). Widths and learning rate are ours: Drift-Adapter's were not found.
Fitted to stored embeddings of the same images by both releases, see `Posthoc`; normalised before and after where the
protocol's similarity is the cosine.
"""

from __future__ import annotations

from typing import ClassVar

from benchmark.bridge import Posthoc, Side
from benchmark.method import Context


class ResidualMLP(Posthoc):
    """Procrustes plus a small network on its residual, fitted to stored embeddings.

    Args:
        side: "query" = new queries are moved to the old space; "gallery" = stored items to the new one.
        pairs: images embedded by both releases that it is fitted to; none = all training images of the newer release.
        direct: one map for each pair of releases, instead of a chain of those between neighbours.
    """

    adapter = "ResidualMLP"
    variants: ClassVar[dict] = {"ResidualMLP-gallery": {"side": "gallery"}, "ResidualMLP-direct": {"direct": True}}

    def __init__(self, context: Context, side: Side = "query", pairs: int | None = None, direct: bool = False):
        super().__init__(context, side=side, pairs=pairs)
