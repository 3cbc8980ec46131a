"""Post-hoc maps of the new model's embeddings into the old space, fitted to cached embeddings of the training set.

One orthogonal map is said to serve both towers of independently trained contrastive models and to be learnable from texts
alone (see Ricci, Biondi, Pernici, "Spherical Interpolation for Backward-Compatible Multimodal Representations", whose
Procrustes is the default here). Fitted on unit rows, output normalised. Captions that occur in the test split are
left out of the text support.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from benchmark import adapters
from benchmark.method import ORACLE, Context, Encoder, Method, Need
from benchmark.methods.crossmodal._mapped import Mapped, unit
from benchmark.protocol import Recipe, Release
from benchmark.towers import SIDES

Kind = Literal[
    "Identity", "ConstantShift", "Diagonal", "Procrustes", "Ridge", "LowRank", "ResidualMLP", "LambdaOrthogonal",
    "LocalProcrustes",
]  # fmt: skip


class Adapted(Method):
    """Adapter from new to old embeddings, fitted post hoc: Procrustes on texts, or another map or support.

    Args:
        kind: of adapter; see `benchmark.adapters`. Identity cuts to the old dims: the floor.
        support: embeddings it is fitted to: of "text"s, "image"s or "both" together.
        per_side: one map for each side, fitted to that side's embeddings, in place of one for both.
    """

    two_sided: ClassVar = True
    variants: ClassVar = {
        "Adapted-cut": {"kind": "Identity"},
        "Adapted-images": {"support": "image"},
        "Adapted-both": {"support": "both"},
        "Adapted-sides": {"per_side": True},
        "Adapted-ridge": {"kind": "Ridge"},
        "Adapted-ridge-both": {"kind": "Ridge", "support": "both"},
        "Adapted-ridge-sides": {"kind": "Ridge", "per_side": True},
        "Adapted-lowrank": {"kind": "LowRank", "support": "both"},
        "Adapted-mlp": {"kind": "ResidualMLP"},
        "Adapted-mlp-both": {"kind": "ResidualMLP", "support": "both"},
        "Adapted-lambda": {"kind": "LambdaOrthogonal", "support": "both"},
        "Adapted-local": {"kind": "LocalProcrustes", "support": "both"},
    }

    def __init__(
        self,
        context: Context,
        kind: Kind = "Procrustes",
        support: Literal["text", "image", "both"] = "text",
        per_side: bool = False,
    ):
        super().__init__(context)
        self.kind, self.support, self.per_side = kind, support, per_side
        old_dim = context.old_dim or self.width
        self.backbone.requires_grad_(False)
        maps = [adapters.KINDS[kind].build(self.width, old_dim) for _ in range(2 if per_side else 1)]
        self.network = Mapped(self.backbone, *maps)
        if context.encoders:
            self.backbone.load_state_dict(context.encoders["new"].network.state_dict())
            self.network.log_scale.copy_(context.encoders["old"].network.logit_scale)

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        if not t:
            return {}
        needs = {f"new_{side}": Need("embeddings", ORACLE, side=side) for side in SIDES}
        needs |= {f"old_{side}": Need("embeddings", side=side) for side in SIDES}
        return {"new": Need("encoder", ORACLE), "old": Need("encoder"), **needs}

    @classmethod
    def stored_dim(cls, release: Release, old_dim: int | None, **hyperparameters: Any) -> int:
        return old_dim or release.dim

    def recipe(self, default: Recipe) -> Recipe:
        return dataclasses.replace(default, epochs=0)

    def pairs(self, side: str) -> tuple[Tensor, Tensor]:
        """Unit rows of the training items of one side by the new and the old model, without captions of evaluation splits."""
        t = self.context.t
        new, old = (unit(self.context, f"{name}_{side}", r, side) for name, r in (("new", t), ("old", t - 1)))
        if side == "image":
            return new, old
        clean = self.context.embeddings["new_text"].labels == 0
        return new[clean], old[clean]

    def solve(self) -> None:
        found = {side: self.pairs(side) for side in SIDES}
        if self.support == "both":
            found["both"] = tuple(torch.cat(x) for x in zip(*(found[side] for side in SIDES)))  # type: ignore[assignment]
        for place, name in enumerate(SIDES if self.per_side else (self.support,)):
            self.network.maps[place] = adapters.fit(self.kind, *found[name], seed=self.context.seed)

    def released(self) -> Encoder:
        return Encoder(self.network, self.context.old_dim or self.width)
