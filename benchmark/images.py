"""Small images, resident: one tensor on the device, whole batches augmented there, no per-sample Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.errors import UserError
from benchmark.protocol import derive_seed


class Batch(NamedTuple):
    """What a method's `loss` sees."""

    index: Tensor  # type: ignore[assignment]  # (B,) position in the training list: caches of old embeddings are keyed by it
    x: Mapping[str, Tensor]  # "image" (B, C, H, W); "image2" for a second view; "text"; ...
    y: Tensor  # (B,) class index in the protocol's class order


class ImageLoader:
    """Batches of resident uint8 images, shuffled and augmented by a generator that is reseeded every epoch.

    Because the epoch alone decides order and augmentation, a run resumed at an epoch's start continues bit for bit.

    Args:
        images: (N, C, H, W) uint8, on the device of the run.
        labels: (N,) int64.
        mean, std: per channel, on the 0..255 scale.
        size: side to which each batch is resized, bilinearly, after augmentation; None = as stored.
        augment: names from `Recipe.augment`; empty = evaluation view.
        views: how many independent augmentations of each image ("image", "image2", ...).
        seed: of this loader; the epoch is mixed in.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        batch_size: int,
        size: int | None = None,
        shuffle: bool = False,
        augment: tuple[str, ...] = (),
        views: int = 1,
        seed: int = 0,
    ):
        self.images, self.labels, self.batch_size, self.shuffle = images, labels, batch_size, shuffle
        self.augment, self.views, self.seed, self.size, self.epoch = augment, views, seed, size, 0
        self.mean = torch.tensor(mean, device=images.device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=images.device).view(1, -1, 1, 1)
        for name in augment:
            if name != "flip" and not (name.startswith("crop") and name[4:].isdigit()):
                raise UserError(f"unknown augmentation '{name}' in the recipe; known: flip, crop<pixels>, e.g. crop2")

    @property
    def sampler(self) -> ImageLoader:
        return self  # Lightning calls `loader.sampler.set_epoch` before each epoch, resumed ones too

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        # training drops the last partial batch: batch norm on a handful of images is noise
        count = len(self.labels)
        return max(1, count // self.batch_size) if self.shuffle else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # drawn on the CPU, so that order and augmentation are the same on every device
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", self.epoch))
        count = len(self.labels)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for i in range(len(self)):
            index = order[i * self.batch_size : (i + 1) * self.batch_size].to(self.images.device)
            image = (self.images[index].float() - self.mean) / self.std
            names = ["image", *(f"image{v}" for v in range(2, self.views + 1))]
            yield Batch(
                index, {name: self._resized(self._augmented(image, generator)) for name in names}, self.labels[index]
            )

    def _augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Random shift by up to p px after zero padding, then a random flip, for the whole batch in one gather."""
        if not self.augment:
            return x
        pad = next((int(name[4:]) for name in self.augment if name.startswith("crop")), 0)
        batch, _, height, width = x.shape
        shift = torch.randint(0, 2 * pad + 1, (2, batch, 1), generator=generator).to(x.device)
        rows = shift[0] + torch.arange(height, device=x.device)  # (B, H)
        cols = torch.arange(width, device=x.device).expand(batch, width)
        if "flip" in self.augment:
            flip = torch.rand(batch, 1, generator=generator).to(x.device) < 0.5
            cols = torch.where(flip, cols.flip(1), cols)
        cols = shift[1] + cols  # (B, W)
        x = F.pad(x, (pad, pad, pad, pad))
        item = torch.arange(batch, device=x.device)[:, None, None]
        x = x[item, :, rows[:, :, None], cols[:, None, :]]  # (B, H, W, C)
        return x.permute(0, 3, 1, 2)  # NCHW view of channels-last memory

    def _resized(self, x: Tensor) -> Tensor:
        if self.size is None:
            return x
        return F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)  # (B, C, size, size)


def check_images(images: Tensor, labels: Tensor, name: str) -> None:
    """Refuse a data set whose arrays do not fit together."""
    if len(images) != len(labels):
        raise UserError(f"{name}: {len(images)} images but {len(labels)} labels")
    if len(images) == 0:
        raise UserError(f"{name}: no images")
