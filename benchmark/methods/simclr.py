"""SimCLR (Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020).

No compatibility method: it trains the encoder of FCT's side information, on images without labels. Two views of each of B
images, f = g(phi(x)) of unit norm, 2B embeddings; with the other view of the same image as positive of each

    L = mean over all 2B of -log( exp(f_i.f_p / tau) / sum over j != i of exp(f_i.f_j / tau) )

g is the paper's projection head of one hidden layer, left away in the released encoder. The views draw crop, flip, brightness,
contrast and saturation per image here, on top of the protocol's own augmentation, which is too weak for this loss; blur,
hue and greyscale are left away (images of 16 and 32 px). Temperature 0.5 is the paper's for CIFAR-10.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark.images import Batch
from benchmark.method import Context, Encoder, Method


class SimCLR(Method):
    """Contrastive training without labels; the encoder of FCT's side information rather than a rival.

    Args:
        temperature: tau. Paper: 0.5 for CIFAR-10.
        crop: least share of an image's area that a view keeps. Paper: 0.08, for larger images.
        strength: of the changes of brightness, contrast and saturation. Paper: 0.5 for CIFAR-10 (0.8 x 0.5 each).
    """

    view = "two_views"
    trains_first_release = True

    def __init__(self, context: Context, temperature: float = 0.5, crop: float = 0.3, strength: float = 0.5):
        super().__init__(context)
        self.temperature, self.crop, self.strength = temperature, crop, strength
        self.project = nn.Sequential(
            nn.Linear(self.width, self.width), nn.ReLU(), nn.Linear(self.width, self.width, bias=False)
        )
        self.head.requires_grad_(False)  # no labels

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        x = torch.cat([self.distorted(batch.x["image"]), self.distorted(batch.x["image2"])])  # (2B, C, H, W)
        f = F.normalize(self.project(self.backbone(x)))  # (2B, D)
        logits = (f @ f.T / self.temperature).fill_diagonal_(-torch.inf)  # (2B, 2B)
        positive = torch.arange(len(f), device=f.device).roll(len(f) // 2)
        return {"contrastive": F.cross_entropy(logits, positive)}

    def distorted(self, x: Tensor) -> Tensor:
        """Another crop, flip, brightness, contrast and saturation for each image."""
        count = (len(x), 1, 1, 1)
        uniform = lambda low, high: torch.empty(count, device=x.device, dtype=x.dtype).uniform_(low, high)  # noqa: E731
        side = uniform(self.crop, 1).sqrt()  # of the crop, in units of the image's
        flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
        rows = torch.cat([side * flip, torch.zeros_like(side), uniform(-1, 1) * (1 - side)], 3)
        cols = torch.cat([torch.zeros_like(side), side, uniform(-1, 1) * (1 - side)], 3)
        theta = torch.cat([rows, cols], 2)[:, 0]  # (B, 2, 3) affine maps
        x = F.grid_sample(
            x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False, padding_mode="reflection"
        )
        low, high = 1 - 0.8 * self.strength, 1 + 0.8 * self.strength
        grey, mean = x.mean(1, keepdim=True), x.mean((1, 2, 3), keepdim=True)
        x = grey + (x - grey) * uniform(low, high)  # saturation
        return mean * uniform(low, high) + (x - mean) * uniform(low, high)  # brightness, contrast

    def released(self) -> Encoder:
        encoder = super().released()
        encoder.head = None
        return encoder
