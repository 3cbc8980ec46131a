"""d-Simplex-HOC (Biondi et al., "Stationary representations: optimally approximating compatibility and implications for improved
model replacements", CVPR 2024).

CoReS's fixed simplex, and a contrastive loss to the release before that also aligns higher-order dependencies:

    L = lambda CE(S z, y) + (1 - lambda) L_hoc
    L_hoc = mean_i [ -mu s_ii + log sum_j exp(mu s_ij [y_i != y_j]) ],  s_ij = cos(o_i, z_j)

Corrected: the authors' code lets same-class pairs into the sum as exp(0) = 1 and leaves the positive out of the denominator
("HOC-reference"); the clean sum runs over the positive and the other classes. Adapted: each release is trained from its own
start (theirs is fine-tuned from the one before, which another architecture cannot be); 100 vertices as CoReS (theirs: 1024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.images import Batch
from benchmark.method import Context, Need
from benchmark.methods.cores import CoReS


class HOC(CoReS):
    """Fixed simplex classifier, and contrast of new with old embeddings.

    Args:
        classification: lambda, share of the classification loss. Code: 0.1.
        scale: mu, inverse temperature of the contrast. Code: 10.
        preallocated: K, classes for which the simplex has a vertex; items store K - 1 dims. Code: 1024; CoReS: 100.
        clean: whether pairs of one class stay out of the sum; False = they enter as exp(0), the positive too, as in the code.
    """

    variants: ClassVar = {"HOC-reference": {"clean": False}}
    space: ClassVar = {"classification": (0.1, 0.3, 0.5, 0.8), "scale": (5.0, 10.0, 30.0)}

    def __init__(
        self,
        context: Context,
        classification: float = 0.1,
        scale: float = 10.0,
        preallocated: int = 100,
        clean: bool = True,
    ):
        super().__init__(context, preallocated)
        self.classification, self.scale, self.clean = classification, scale, clean

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        return {"old": Need("encoder")} if t else {}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        z = self.backbone(batch.x["image"])  # (B, K - 1)
        if self.context.t == 0:
            return {"classification": self.head(z, batch.y)}
        with torch.no_grad():
            old = self.context.encoders["old"](batch.x)["main"][:, : self.shared]
        similarity = self.scale * F.normalize(old) @ F.normalize(z[:, : self.shared]).T  # (B, B): old i, new j
        contrast = (self.log_sum(similarity, batch.y) - similarity.diagonal()).mean()
        return {
            "classification": self.classification * self.head(z, batch.y),
            "contrast": (1 - self.classification) * contrast,
        }

    def log_sum(self, similarity: Tensor, y: Tensor) -> Tensor:
        """Denominator (B,): the positive and all new embeddings of other classes."""
        same = y[:, None] == y[None, :]
        if not self.clean:
            return similarity.masked_fill(same, 0.0).logsumexp(1)
        others = same & ~torch.eye(len(y), dtype=torch.bool, device=y.device)
        return similarity.masked_fill(others, -torch.inf).logsumexp(1)
