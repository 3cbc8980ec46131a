"""Classification heads. They belong to the task; methods only ask for logits and losses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark.protocol import HeadSpec


class Objective(nn.Module):
    """What a task trains independent releases by; a method adds its own terms."""

    def terms(self, network: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Named losses of a `Batch`, for the network that is trained."""
        raise NotImplementedError


class Head(Objective):
    """Logits of K classes from embeddings, and the classification loss on them.

    Args:
        weight: (K, D) class prototypes; give fixed ones for a frozen head (BCT's synthesised prototypes).
        spec: kind and scale, see `HeadSpec`.
        smoothing: label smoothing, in [0, 1).
    """

    def __init__(self, weight: Tensor, spec: HeadSpec, smoothing: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.spec = spec
        self.smoothing = smoothing

    @property
    def classes(self) -> int:
        return self.weight.shape[0]

    def cosines(self, z: Tensor) -> Tensor:
        return F.normalize(z) @ F.normalize(self.weight).T  # (B, D) -> (B, K)

    def terms(self, network: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"classification": self(network(batch.x["image"]), batch.y)}

    def logits(self, z: Tensor) -> Tensor:
        """(B, D) -> (B, K), without margin."""
        if self.spec.kind == "linear":
            return z @ self.weight.T
        if self.spec.kind == "unit":
            return F.normalize(z) @ self.weight.T
        return self.spec.scale * self.cosines(z)

    def forward(self, z: Tensor, y: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross-entropy of labels `y` (B,), margins included. `reduction="none"` gives (B,)."""
        if self.spec.kind in ("cosine", "linear", "unit"):
            logits = self.logits(z)
        else:
            cosine = self.cosines(z)
            target = cosine.gather(1, y[:, None])
            logits = self.spec.scale * cosine.scatter(1, y[:, None], margin_cosine(target, self.spec))
        return F.cross_entropy(logits, y, label_smoothing=self.smoothing, reduction=reduction)


def margin_cosine(cosine: Tensor, spec: HeadSpec) -> Tensor:
    """The target's cosine after the margin: CosFace cos - m; ArcFace cos(theta + m), exact gradient.

    Where theta + m would pass pi, ArcFace continues linearly (cos - m sin(pi - m)), as Deng et al. 2019 without easy
    margin. The cosine is clamped to +-(1 - 1e-7): at exactly 1 the gradient of the arc is infinite.
    """
    if spec.kind == "cosface":
        return cosine - spec.margin
    c = cosine.clamp(-1 + 1e-7, 1 - 1e-7)
    rotated = c * math.cos(spec.margin) - (1 - c * c).sqrt() * math.sin(spec.margin)
    return torch.where(
        c > math.cos(math.pi - spec.margin), rotated, cosine - spec.margin * math.sin(math.pi - spec.margin)
    )


class PairHead(Objective):
    """CLIP's symmetric loss of images and their captions; the temperature is the network's own, at least 0.01."""

    def terms(self, network: Any, batch: Any) -> dict[str, Tensor]:
        z = network(batch.x)
        scale = network.logit_scale.exp().clamp(max=100)
        return {"contrastive": contrastive(z["image"], z["text"], scale, batch.x["caption"])}


def contrastive(a: Tensor, b: Tensor, scale: Tensor | float, ids: Tensor | None = None) -> Tensor:
    """Mean of both directions' cross-entropy of scale * cos(a_i, b_j) with target i (Radford et al. 2021, CLIP).

    `ids` (B,) mark what each pair is about: another pair of the same id, as a repeated caption, is no negative.
    Without repeats it is open_clip's ClipLoss on normalised rows.
    """
    logits = scale * F.normalize(a) @ F.normalize(b).T  # (B, D), (B, D) -> (B, B)
    if ids is not None:
        same = (ids[:, None] == ids[None, :]).fill_diagonal_(False)
        logits = logits.masked_fill(same, -torch.inf)
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def class_means(embeddings: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean of the L2-normalised embeddings of each class, summed in float64; not normalised again.

    The prototypes of BCT, BT2 and OCA for classes that the old head lacks (Shen et al. 2020, "synthesised classifier").

    Returns:
        means (K, D) in the embeddings' dtype, zero rows for classes without samples; counts (K,).
    """
    unit = F.normalize(embeddings.double())
    sums = torch.zeros(classes, embeddings.shape[1], dtype=torch.float64, device=embeddings.device)
    sums.index_add_(0, labels, unit)
    counts = torch.bincount(labels, minlength=classes)
    return (sums / counts.clamp(min=1)[:, None]).to(embeddings.dtype), counts
