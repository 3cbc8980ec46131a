"""XBT-style stage 1: a projection of the new model's space into the old one's, learned from texts alone.

After Jang and Lim, "Cross-modal backward-compatible representation learning for vision-language models" (XBT, ICCV 2025).
Its text was not available to us: that phi is trained on texts alone, with Gaussian noise, is reported; the loss, the noise's
place and size, phi's depth and every constant below are our reconstruction.

    z~ = norm(z + sigma eps / sqrt(d)),  L = mean(1 - cos(phi(z~), y)) + beta NCE_tau(phi(z~), y)

z, y: embeddings of one caption by the new and the old text tower; eps ~ N(0, I), so that sigma is the noise's expected norm
beside |z| = 1; tau: the old model's temperature. Images lie off the texts' manifold (modality gap), and without noise phi
would have to extrapolate to them. Captions that occur in the test split are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.adapters.maps import Procrustes
from benchmark.heads import contrastive
from benchmark.images import Batch
from benchmark.method import ORACLE, Context, Encoder, Method, Need
from benchmark.methods.crossmodal._mapped import Mapped, Phi, Projection, unit
from benchmark.protocol import Recipe, Release


class XBTText(Method):
    """XBT-style stage 1 (reconstruction): text-only projection with noise.

    The protocol's epochs and rate are of towers; the defaults here come from a few looks at the validation split of
    crossmodal-ucm@1 with seeds 0 and 1000, of which the rows report seed 0.

    Args:
        sigma: norm of the noise beside |z| = 1; 0 = none.
        beta: weight of the contrastive term.
        phi: "linear" map, Procrustes at the start; "residual" = that plus an MLP; "mlp" = the MLP alone.
        epochs, lr: of this stage, in place of the protocol's.
    """

    two_sided: ClassVar = True
    view: ClassVar = "texts"
    variants: ClassVar = {
        "XBTText-s0": {"sigma": 0.0},
        "XBTText-s100": {"sigma": 1.0},
        "XBTText-residual": {"phi": "residual"},
        "XBTText-residual-s0": {"phi": "residual", "sigma": 0.0},
        "XBTText-residual-s100": {"phi": "residual", "sigma": 1.0},
    }
    space: ClassVar = {"sigma": (0.0, 0.1, 0.3, 1.0, 2.0), "phi": ("linear", "residual"), "lr": (1e-4, 3e-4, 1e-3)}

    def __init__(
        self,
        context: Context,
        sigma: float = 0.1,
        beta: float = 1.0,
        phi: Phi = "linear",
        epochs: int = 20,
        lr: float = 3e-4,
    ):
        super().__init__(context)
        self.sigma, self.beta, self.epochs, self.lr = sigma, beta, epochs, lr
        self.backbone.requires_grad_(False)
        self.phi = Projection(self.width, context.old_dim or self.width, phi)
        self.network = Mapped(self.backbone, self.phi)
        if context.encoders:
            self.backbone.load_state_dict(context.encoders["new"].network.state_dict())
            self.network.log_scale.copy_(context.encoders["old"].network.logit_scale)
            self.new = unit(context, "new_texts", context.t, "text")
            self.old = unit(context, "old_texts", context.t - 1, "text")
            clean = context.embeddings["new_texts"].labels == 0
            start = Procrustes.fit(self.new[clean], self.old[clean])
            self.phi.start(start.weight)

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        texts = {"new_texts": Need("embeddings", ORACLE, side="text"), "old_texts": Need("embeddings", side="text")}
        return {"new": Need("encoder", ORACLE), "old": Need("encoder"), **texts} if t else {}

    @classmethod
    def stored_dim(cls, release: Release, old_dim: int | None, **hyperparameters: Any) -> int:
        return old_dim or release.dim

    def recipe(self, default: Recipe) -> Recipe:
        return dataclasses.replace(
            default, epochs=self.epochs, lr=self.lr, weight_decay=0.01, schedule="cosine", warmup=0.05, augment=()
        )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        rows = batch.index.cpu()
        z, y = self.new[rows].to(self.device), self.old[rows].to(self.device)
        noise = torch.randn_like(z) / z.shape[1] ** 0.5
        mapped = self.phi(F.normalize(z + self.sigma * noise))  # (B, d_n) -> (B, d_o)
        return {
            "match": 1 - F.cosine_similarity(mapped, y).mean(),
            "contrast": self.beta * contrastive(mapped, y, self.network.logit_scale.exp()),
        }

    def released(self) -> Encoder:
        return Encoder(self.network, self.context.old_dim or self.width)
