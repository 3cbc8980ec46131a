"""XBT-style, both stages: the text-only projection, then LoRA on both towers of the new model, trained on pairs.

After Jang and Lim (XBT, ICCV 2025); two stages, LoRA and that the old model is absent from the second are reported, the
loss and every constant are our reconstruction (see `xbttext`). With u, v the adapted model's embeddings of an image and its
caption, and s = phi_0(f_n(caption)), the frozen stage 1, standing in for the old text embedding:

    L = NCE(u, s) + lambda_t mean(1 - cos(v, s)) + lambda_c NCE(u, v)

The new model's own weights stay as they are: without LoRA and phi it is the new model, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from benchmark.errors import UserError
from benchmark.heads import contrastive
from benchmark.images import Batch
from benchmark.method import ORACLE, Context, Encoder, Method, Need
from benchmark.methods.crossmodal._mapped import Mapped, Phi, Projection, add_lora, unit
from benchmark.protocol import Recipe, Release


class XBT(Method):
    """XBT-style (reconstruction): text-only projection, then LoRA on image-text pairs without the old model.

    Args:
        target: what stands for the old text embedding: "stage1" = s, the old model absent; "old" = the old model's own
            caption embeddings, phi from a random start, without stage 1; "oracle" = the old model's own captions and
            images (adds mean(1 - cos(u, old image))), after stage 1.
        pairs: images of the pairs that are seen, one caption each at a time; 0 = all.
        rank, alpha: of LoRA; rank 0 = none, phi alone is trained.
        text_weight, pair_weight: lambda_t, lambda_c.
        phi_rate: learning rate of phi, as a multiple of lr; 0 freezes it.
        sigma, phi: of stage 1.
        epochs, lr: of this stage, in place of the protocol's.
    """

    two_sided: ClassVar = True
    variants: ClassVar = {
        "XBT-scratch": {"target": "old", "phi_rate": 1.0},
        "XBT-oracle": {"target": "oracle"},
        "XBT-nolora": {"rank": 0, "phi_rate": 1.0},
        "XBT-1k": {"pairs": 1000},
        "XBT-100": {"pairs": 100},
    }
    space: ClassVar = {"rank": (4, 8, 16), "lr": (3e-4, 1e-3, 3e-3), "text_weight": (0.3, 1.0, 3.0)}

    def __init__(
        self,
        context: Context,
        target: Literal["stage1", "old", "oracle"] = "stage1",
        pairs: int = 0,
        rank: int = 8,
        alpha: int = 16,
        text_weight: float = 1.0,
        pair_weight: float = 1.0,
        phi_rate: float = 0.1,
        sigma: float = 0.1,
        phi: Phi = "linear",
        epochs: int = 8,
        lr: float = 1e-3,
    ):
        super().__init__(context)
        if pairs and target == "oracle":
            raise UserError("XBT: the oracle variant reads all pairs; leave out pairs")
        self.text_weight, self.pair_weight, self.phi_rate = text_weight, pair_weight, phi_rate
        self.epochs, self.lr, self.target = epochs, lr, target
        self.view = f"train:{pairs}" if pairs else "train"  # type: ignore[misc]
        self.phi = Projection(self.width, context.old_dim or self.width, phi)
        self.backbone.requires_grad_(False)
        if context.encoders:
            self.backbone.load_state_dict(context.encoders["new"].network.state_dict())
        if rank:
            add_lora(self.backbone, rank, alpha)
        self.network = Mapped(self.backbone, self.phi)
        self.phi.requires_grad_(phi_rate > 0)
        if context.encoders:
            source = context.encoders["old" if target == "old" else "stage1"].network
            self.network.log_scale.copy_(source.logit_scale)
            if target != "old":
                self.phi.load_state_dict(source.maps[0].state_dict())
            names = {"stage1": "stage1_texts"}
            release = context.t if target == "stage1" else context.t - 1
            self.texts = unit(context, names.get(target, "old_texts"), release, "text")
            self.images = unit(context, "old_images", context.t - 1, "image") if target == "oracle" else None

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        if not t:
            return {}
        needs, target = {"new": Need("encoder", ORACLE)}, hyperparameters["target"]
        settings = {key: hyperparameters[key] for key in ("sigma", "phi")}
        if target != "old":
            needs["stage1"] = Need("encoder", "XBTText", hyperparameters=settings)
        if target == "stage1":
            needs["stage1_texts"] = Need("embeddings", "XBTText", hyperparameters=settings, side="text")
        else:
            needs |= {"old": Need("encoder"), "old_texts": Need("embeddings", side="text")}
        if target == "oracle":
            needs["old_images"] = Need("embeddings", side="image")
        return needs

    @classmethod
    def stored_dim(cls, release: Release, old_dim: int | None, **hyperparameters: Any) -> int:
        return old_dim or release.dim

    def recipe(self, default: Recipe) -> Recipe:
        return dataclasses.replace(
            default, epochs=self.epochs, lr=self.lr, weight_decay=0.01, schedule="cosine", warmup=0.05
        )

    def train(self, mode: bool = True) -> XBT:
        super().train(mode)
        self.backbone.eval()  # a frozen model's statistics do not move
        return self

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        z, captions = self.network(batch.x), batch.x["caption"]
        u, v, s = z["image"], z["text"], self.texts[captions.cpu()].to(self.device)
        scale = self.network.logit_scale.exp().clamp(max=100)
        terms = {
            "image_to_old": contrastive(u, s, scale, captions),
            "text_stays": self.text_weight * (1 - F.cosine_similarity(v, s).mean()),
            "pair": self.pair_weight * contrastive(u, v, scale, captions),
        }
        if self.images is not None:
            old = self.images[batch.index.cpu()].to(self.device)
            terms["image_matches_old"] = 1 - F.cosine_similarity(u, old).mean()
        return terms

    def parameter_groups(self) -> list[dict]:
        lora = [p for p in self.backbone.parameters() if p.requires_grad]
        groups: list[dict] = [{"params": lora}, {"params": [*self.phi.parameters()], "lr_scale": self.phi_rate}]
        return [group for group in groups if group["params"] and group.get("lr_scale", 1)]

    def released(self) -> Encoder:
        return Encoder(self.network, self.context.old_dim or self.width)
