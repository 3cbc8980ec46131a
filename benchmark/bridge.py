"""Base of methods that retrain no release: every one stays as trained independently, and only maps between them are learned.

A **step** leads from one release to an older one. Over a sequence the steps between neighbours are chained (3 -> 2 -> 1),
or one is fitted for each pair (`direct`). On the query side a step moves new queries into the old space, and the gallery
stays untouched; on the gallery side it moves stored items into the new space, without their raw data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark import adapters
from benchmark.adapters.maps import Coordinatewise
from benchmark.embeddings import Link, Stored, View
from benchmark.method import OLD, ORACLE, Context, Method, Need
from benchmark.protocol import Recipe, derive_seed

Side = Literal["query", "gallery"]


class Mapped(Link):
    """Serves stored items of older releases through a step, or through several, newest first.

    A step maps (B, d) -> (B, d'); on the gallery side it may read the side information stored with each item. `unit`: each
    step reads unit vectors, as the protocol's cosine sees them.
    """

    def __init__(self, release: int, dim: int, leads_to: int, step: nn.Module, *, side: Side, unit: bool):
        super().__init__(release, dim)
        self.leads_to, self.step, self.side, self.unit = leads_to, step, side, unit
        self.older: tuple[Mapped, ...] = ()  # the steps behind this one, as `join` found them

    def query(self, q: Mapping[View, Tensor], stored: Stored) -> Tensor:
        x = q[self.release, "main"]
        if self.side == "query" and stored.release != self.release:
            for link in (self, *self.older):
                x = link.move(x)
        return x

    def gallery(self, g: Mapping[View, Tensor], stored: Stored) -> Tensor:
        x = g[stored.release, "main"]
        if self.side == "gallery" and stored.release != self.release:
            for link in reversed((self, *self.older)):
                x = link.move(x, g.get((stored.release, "side")))
        return x

    def move(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        x = F.normalize(x) if self.unit else x
        return self.step(x) if side is None else self.step(x, side)


def join(links: Sequence[Link]) -> Link:
    """One link from the links of its steps, newest first."""
    first, *older = links
    if older:
        assert isinstance(first, Mapped)
        first.older = tuple(link for link in older if isinstance(link, Mapped))
    return first


class Bridge(Method):
    """Base: learns `self.step` with Lightning from `loss`, or in closed form from `fit`.

    A subclass sets `self.step` in `__init__` and, as hyperparameter, `direct`. `OLD` among its needs is the independent
    release that the step leads to.
    """

    side: Side = "query"
    reads_unit: ClassVar[bool] = False  # steps read unit vectors where the protocol's similarity is the cosine
    step: nn.Module

    def __init__(self, context: Context):
        lightning.LightningModule.__init__(self)  # no backbone and no head of its own
        self.context = context
        self.history, self.done = [], 0.0
        context.reseed("method", context.k)

    @classmethod
    def keeps_releases(cls, **hyperparameters: Any) -> bool:
        return True

    @classmethod
    def steps(cls, t: int, stored: int, **hyperparameters: Any) -> list[tuple[int, int]]:
        if hyperparameters.get("direct") or t == stored:
            return [(t, stored)]
        return [(s, s - 1) for s in range(t, stored, -1)]

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        return {"old": Need("encoder", OLD), "new": Need("encoder", ORACLE)} if t else {}

    def ends(self) -> tuple[int, int]:
        """Dims that the step reads and writes."""
        old, new = self.context.old_dim or self.context.release.dim, self.context.release.dim
        return (new, old) if self.side == "query" else (old, new)

    def link(self) -> Link:
        t, k, unit = self.context.t, self.context.k, self.reads_unit and self.context.similarity == "cosine"
        assert k is not None
        return Mapped(t, self.context.release.dim, k, self.step, side=self.side, unit=unit)

    def passed(self) -> Mapping[Side, nn.Module]:
        """What each vector of a side passes, for the bill."""
        return {self.side: self.step}

    def fit(self) -> dict[str, Any]:
        """Closed forms: make `self.step` from `Context.embeddings`; returns facts for the record."""
        raise NotImplementedError


def multiply_adds(step: nn.Module) -> int:
    """Per vector; additions of biases and batch norm, which folds into the layer before it, are not counted."""
    own = getattr(step, "multiply_adds", None)
    return own if own is not None else sum(m.weight.numel() for m in step.modules() if isinstance(m, nn.Linear))


def transformation_recipe(default: Recipe, lr: float) -> Recipe:
    """The recipe of FCT's code for a network between embeddings; its epochs are 80 where the encoders have 100."""
    return dataclasses.replace(
        default,
        optimizer="adam",
        lr=lr,
        weight_decay=2**-15,
        epochs=max(1, round(0.8 * default.epochs)),
        warmup=1 / 16,  # 5 of 80 epochs
        schedule="cosine",
    )


class Posthoc(Bridge):
    """Base of maps fitted to stored embeddings of the same images by both releases, in seconds, without images or labels.

    The pairs are the training images of the newer release in evaluation view; `pairs` of them, drawn from the seed, if given.
    """

    closed_form = True
    reads_unit = True
    adapter: ClassVar[str] = "Identity"  # one of `adapters.KINDS`

    def __init__(self, context: Context, *, side: Side = "query", pairs: int | None = None, **settings: Any):
        super().__init__(context)
        self.side, self.pairs, self.settings = side, pairs, settings
        self.step = adapters.KINDS[self.adapter](*self.ends(), **settings)

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        return {"old": Need("embeddings", OLD), "new": Need("embeddings", ORACLE)} if t else {}

    @classmethod
    def serves(cls, dim: int, stored: int) -> bool:
        return dim == stored or not issubclass(adapters.KINDS[cls.adapter], Coordinatewise)

    def unit_pairs(self) -> tuple[Tensor, Tensor]:
        """Embeddings of the same images by both releases, (N, d_o) and (N, d_n), as the protocol's search sees them."""
        c = self.context
        old, new = c.embeddings["old"].main(c.k or 0), c.embeddings["new"].main(c.t)
        if c.similarity == "cosine":
            old, new = F.normalize(old), F.normalize(new)
        if self.pairs is not None and self.pairs < len(old):
            kept = self.shuffled(len(old))[: self.pairs]
            old, new = old[kept], new[kept]
        return old, new

    def shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))

    @property
    def seed(self) -> int:
        return derive_seed(self.context.seed, self.context.t, self.context.k, "fit") % 2**32  # as scikit-learn wants it

    def fit_to(self, old: Tensor, new: Tensor) -> None:
        source, target = (new, old) if self.side == "query" else (old, new)
        self.step = adapters.fit(self.adapter, source, target, seed=self.seed, **self.settings)

    def fit(self) -> dict[str, Any]:
        pairs = self.unit_pairs()
        self.fit_to(*pairs)
        return {"pairs": len(pairs[0])}
