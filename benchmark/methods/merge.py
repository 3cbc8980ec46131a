"""Naive distance rank merge (Seo et al., "Metric Compatible Training for Online Backfilling in Large-Scale Retrieval", WACV
2025, their untrained baseline; the paper's body was not read).

Every query is embedded by both models; it meets old items by the old one, re-embedded items by the new one, and the two lists
are merged by distance. Nothing is trained. In the compatibility matrix its cross cells equal the old system; its point is the
curve while the gallery is being re-embedded. Under raw L2 the space of smaller norms wins every merge, as the paper warns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from benchmark.bridge import Bridge, Side
from benchmark.embeddings import Link, Stored, View
from benchmark.method import Need


class Merge(Bridge):
    """Two query encoders, each against its own part of the gallery, merged by distance. Nothing is trained."""

    closed_form = True

    @classmethod
    def steps(cls, t: int, stored: int, **hyperparameters: Any) -> list[tuple[int, int]]:
        return [(t, stored)]

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        return {}

    @classmethod
    def query_views(cls, t: int, stored: int, **hyperparameters: Any) -> tuple[View, ...]:
        return tuple((r, "main") for r in {t, stored})  # the new one serves what has been re-embedded

    def passed(self) -> Mapping[Side, nn.Module]:
        return {}

    def fit(self) -> dict[str, Any]:
        return {}

    def link(self) -> Link:
        return BothQueries(self.context.t, self.context.release.dim)


class BothQueries(Link):
    def query(self, q: Mapping[View, Tensor], stored: Stored) -> Tensor:
        return q[stored.release, "main"]
