"""Lambda-orthogonality (Ricci, Biondi, Pernici, Patras, Del Bimbo, NeurIPS 2025, arXiv 2509.16664; read in translation).

Two independently trained models stay as they are. A backward map B (square, new -> old space) serves new queries on the
untouched gallery; a forward map F moves stored items to where B sends new embeddings:

    L_B = |B h_new - h_old|^2,  L_F = |F h_old - B h_new|^2,  L_C = SupCon(F h_old, B h_new) + SupCon(F h_old, h_old)
    L = L_F + L_B + L_C + L_lambda,  L_lambda = sigmoid(alpha (|W^T W - I| - lambda)) |W^T W - I| (Frobenius), W the matrix of B

B is strictly orthogonal (the paper's choice where the maps are trained on the models' own training distribution, as here;
L_lambda is 0 then), or affine and only lambda-close to orthogonal. Unequal dims are compared on the shorter length. Where the
protocol's similarity is the cosine, all vectors enter with unit norm. Not found, hence ours: alpha, the weights of the terms,
SupCon's temperature; epochs, warm-up, schedule and weight decay are those of FCT's code. |W^T W - I| of W = 0 is the root of the
dims, so lambda = 12 regularises nothing below 144 dims: the relaxed variant then is an affine map, kept straight by L_B alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from benchmark.bridge import Bridge, Side, transformation_recipe
from benchmark.embeddings import Link, Stored, View
from benchmark.images import Batch
from benchmark.method import Context
from benchmark.protocol import Recipe


class LambdaOrthogonality(Bridge):
    """A backward map that is orthogonal or nearly so, and a forward map into the space where it ends.

    Args:
        strict: whether B is orthogonal by construction; else affine with the regulariser.
        threshold: lambda. Paper: 12, for embeddings of 128 and more dims.
        sharpness: alpha. Ours: 1, so that the term has a gradient from the start.
        backward, forward, contrastive: weights of L_B, L_F and L_C. Ours: 1, 1, 1.
        temperature: of SupCon. Ours: 0.1.
        gallery: "moved" = stored items pass F; "untouched" = B alone serves.
        lr: of Adam. Paper: 1e-3.
    """

    reads_unit = True
    variants: ClassVar[dict] = {
        "LambdaOrthogonality-backward": {"gallery": "untouched"},
        "LambdaOrthogonality-relaxed": {"strict": False},
    }
    space: ClassVar = {"threshold": (0.0, 4.0, 12.0), "contrastive": (0.3, 1.0, 3.0), "lr": (3e-4, 1e-3, 3e-3)}

    def __init__(
        self,
        context: Context,
        strict: bool = True,
        threshold: float = 12.0,
        sharpness: float = 1.0,
        backward: float = 1.0,
        forward: float = 1.0,
        contrastive: float = 1.0,
        temperature: float = 0.1,
        gallery: Literal["moved", "untouched"] = "moved",
        lr: float = 1e-3,
    ):
        super().__init__(context)
        self.strict, self.threshold, self.sharpness, self.lr = strict, threshold, sharpness, lr
        self.weights = {"backward": backward, "forward": forward, "contrastive": contrastive}
        self.temperature, self.gallery = temperature, gallery
        d_new, d_old = self.ends()
        b = nn.Linear(d_new, d_new, bias=not strict)
        self.step = nn.ModuleDict({"b": orthogonal(b) if strict else b, "f": nn.Linear(d_old, d_new)})

    @classmethod
    def steps(cls, t: int, stored: int, **hyperparameters: Any) -> list[tuple[int, int]]:
        return [(t, stored)]  # F ends where B does, in no release's own space: nothing to chain

    def recipe(self, default: Recipe) -> Recipe:
        return transformation_recipe(default, self.lr)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            old, new = (self.seen(self.context.encoders[name](batch.x)["main"]) for name in ("old", "new"))
        moved, back = self.step["f"](old), self.step["b"](new)  # (B, d_n) both
        short = min(old.shape[1], new.shape[1])
        terms = {
            "backward": (back[:, :short] - old[:, :short]).square().sum(1).mean(),
            "forward": (moved - back).square().sum(1).mean(),
            "contrastive": self.supcon(moved, back, batch.y) + self.supcon(moved[:, :short], old[:, :short], batch.y),
        }
        terms = {name: self.weights[name] * value for name, value in terms.items()}
        if not self.strict:
            weight = self.step["b"].weight
            distance = (weight.T @ weight - torch.eye(len(weight), device=weight.device, dtype=weight.dtype)).norm()
            terms["orthogonality"] = torch.sigmoid(self.sharpness * (distance - self.threshold)) * distance
        return terms

    def supcon(self, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        """Anchors a (B, D) against b (B, D): all b of the anchor's label are its positives (Khosla et al. 2020, L_out)."""
        logs = (F.normalize(a) @ F.normalize(b).T / self.temperature).log_softmax(1)  # (B, B)
        same = (y[:, None] == y).to(logs.dtype)
        return -((logs * same).sum(1) / same.sum(1)).mean()

    def seen(self, z: Tensor) -> Tensor:
        return F.normalize(z) if self.context.similarity == "cosine" else z

    def passed(self) -> Mapping[Side, nn.Module]:
        maps: dict[Side, nn.Module] = {"query": self.step["b"], "gallery": self.step["f"]}
        return maps if self.gallery == "moved" else {"query": maps["query"]}

    def link(self) -> Link:
        return BothMapped(self)


class BothMapped(Link):
    def __init__(self, method: LambdaOrthogonality):
        super().__init__(method.context.t, method.context.release.dim)
        self.step, self.moves, self.seen = method.step, method.gallery == "moved", method.seen

    def query(self, q: Mapping[View, Tensor], stored: Stored) -> Tensor:
        z = self.step["b"](self.seen(q[self.release, "main"]))
        return z if self.moves else z[:, : stored.dim]

    def gallery(self, g: Mapping[View, Tensor], stored: Stored) -> Tensor:
        z = self.seen(g[stored.release, "main"])
        return self.step["f"](z) if self.moves else z[:, : self.dim]
