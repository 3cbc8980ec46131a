"""NCCL, neighbourhood consensus contrastive learning (Wu et al., "Neighborhood consensus contrastive learning for
backward-compatible representation", AAAI 2022).

New embeddings are contrasted with a queue of old ones, in the space of embeddings and in that of logits; positives are all old
embeddings of the class, each weighted by how much the old model itself agrees; old samples between classes are left out.

    L = L(W f, y) + a L1 + b L2,  w_ij = (1 + <o_i, q_j>) / 2,  P(i) = {j in queue: y_j = y_i}
    L1 = -mean_i 1/|P(i)| sum_{j in P(i)} w_ij log [ e^{<f^_i, q_j> / tau} / sum_k e^{<f^_i, q_k> / tau} ]
    L2 = the same with <l(f_i), l(q_j)> in place of <f^_i, q_j>, l = the new head's class cosines
    credible: H(p_i) <= 1/2 ln C,  p_ik = softmax_k(-||o_i - mu_k|| / sigma2)

Corrected, from MixBCT's port: there L2's logits come through a gather without gradient, so L2 is a constant and does nothing
("NCCL-reference"); they are taken after margin and scale and then clamped to [-1, 1], here they are the cosines; the entropy is
that of a single number, so every sample is credible; and the queue starts with zero vectors in the denominator, here it counts
what is filled, the batch's own old embeddings included. mu_k: mean of the class's unit old embeddings. Old logits are made anew
from the queue in each step, not stored: 3 GB less on 93,431 identities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.heads import class_means
from benchmark.images import Batch
from benchmark.method import Context, Need, Widened


class NCCL(Widened):
    """Soft supervised contrast of new embeddings and logits with a queue of credible old ones.

    Args:
        feature: a, weight of the contrast of embeddings. Code: 1.
        logit: b, weight of the contrast of logits. Code: 0.01.
        temperature: tau of both. Code: 1.
        queue: old embeddings kept, Q. Code: 8192.
        sharpness: sigma2 of the entropy test. No readable source gives it; 0.03 keeps nine in ten, as MixBCT's T does.
        logit_gradient: whether the contrast of logits moves anything; False = as in the port's code.
    """

    old: Tensor
    labels: Tensor
    next: Tensor
    credible: Tensor
    variants: ClassVar = {"NCCL-reference": {"logit_gradient": False, "sharpness": 0.0}}
    space: ClassVar = {
        "feature": (1.0, 3.0, 10.0),
        "logit": (0.01, 0.1, 1.0),
        "temperature": (0.05, 0.2, 1.0),
        "sharpness": (0.0, 0.03, 0.05),
    }

    def __init__(
        self,
        context: Context,
        feature: float = 1.0,
        logit: float = 0.01,
        temperature: float = 1.0,
        queue: int = 8192,
        sharpness: float = 0.03,
        logit_gradient: bool = True,
    ):
        super().__init__(context)
        self.feature, self.logit, self.temperature, self.logit_gradient = feature, logit, temperature, logit_gradient
        # the queue is part of a checkpoint, so that a resumed run goes on as it would have
        self.register_buffer("old", torch.zeros(queue, self.shared))  # (Q, d_o), unit rows
        self.register_buffer("labels", torch.full((queue,), -1))  # (Q,), -1 = not filled yet
        self.register_buffer("next", torch.tensor(0))
        if context.embeddings:
            stored = context.embeddings["old_train"]
            unit = F.normalize(stored.main(context.t - 1)[:, : self.shared])
            assert stored.labels is not None
            mask = consensus(unit, class_means(unit, stored.labels, context.classes)[0], sharpness)
            self.register_buffer("credible", mask, persistent=False)  # (N,) by Batch.index

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        if t == 0:
            return {}
        return {"old": Need("encoder"), "old_train": Need("embeddings")}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        z = self.backbone(batch.x["image"])  # (B, D)
        with torch.no_grad():
            old = F.normalize(self.context.encoders["old"](batch.x)["main"][:, : self.shared])
            self.enqueue(old[self.credible[batch.index]], batch.y[self.credible[batch.index]])
            weights = (1 + old @ self.old.T) / 2  # (B, Q)
            queued = self.head.cosines(F.pad(self.old, (0, self.width - self.shared)))  # (Q, K)
        logits = self.head.cosines(z)  # (B, K)
        if not self.logit_gradient:
            logits = logits.detach()
        by_feature = F.normalize(z[:, : self.shared]) @ self.old.T  # (B, Q)
        return {
            "classification": self.head(z, batch.y),
            "feature": self.feature * self.contrast(by_feature, weights, batch.y),
            "logit": self.logit * self.contrast(logits @ queued.T, weights, batch.y),
        }

    def enqueue(self, old: Tensor, y: Tensor) -> None:
        size = len(self.labels)
        old, y = old[-size:], y[-size:]
        at = (int(self.next) + torch.arange(len(y), device=y.device)) % size
        self.old[at], self.labels[at] = old.to(self.old.dtype), y
        self.next.fill_((int(self.next) + len(y)) % size)

    def contrast(self, similarity: Tensor, weights: Tensor, y: Tensor) -> Tensor:
        """Mean over the batch; a sample without an old embedding of its class in the queue contributes 0."""
        filled = self.labels >= 0
        logs = (similarity / self.temperature).masked_fill(~filled, -torch.inf).log_softmax(1)  # (B, Q)
        positive = self.labels == y[:, None]  # (B, Q)
        weighted = (weights * logs.where(positive, 0.0)).sum(1)
        return -(weighted / positive.sum(1).clamp(min=1)).mean()


def consensus(unit: Tensor, means: Tensor, sharpness: float) -> Tensor:
    """Mask (N,) of samples whose old embedding speaks for few classes; all of them if `sharpness` is 0."""
    if sharpness == 0:
        return torch.ones(len(unit), dtype=torch.bool)
    parts = []
    for rows in unit.split(4096):
        logs = (-torch.cdist(rows, means) / sharpness).log_softmax(1)  # (n, C)
        parts.append(-(logs.exp() * logs).sum(1) <= 0.5 * math.log(len(means)))
    return torch.cat(parts)
