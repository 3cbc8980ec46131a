"""Small images, resident: one tensor on the device, whole batches augmented there, no per-sample Python."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.errors import UserError
from benchmark.protocol import derive_seed


class Batch(NamedTuple):
    """What a method's `loss` sees."""

    index: Tensor  # type: ignore[assignment]  # (B,) position in the training list: caches of old embeddings are keyed by it
    # "image" (B, C, H, W); "image2" for a second view; "text"; ... "key" (B,) names the view in "image" where training has few
    # views: whoever changes that image must leave the key out
    x: Mapping[str, Tensor]
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

    @property
    def ways(self) -> int | None:
        return ways(self.augment)

    def __iter__(self) -> Iterator[Batch]:
        # drawn on the CPU, so that order and augmentation are the same on every device
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", self.epoch))
        count = len(self.labels)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for i in range(len(self)):
            index = order[i * self.batch_size : (i + 1) * self.batch_size].to(self.images.device)
            image, x = self._normalised(index), {}
            for name in ["image", *(f"image{v}" for v in range(2, self.views + 1))]:
                shift, flip = self._drawn(len(index), generator)
                x[name] = self._view(image, shift, flip)
                if self.shuffle and self.ways and name == "image":
                    x["key"] = self.ways * index + flip
            yield Batch(index, x, self.labels[index])

    def shown(self) -> Iterator[Batch]:
        """All views that training can show, in the order of their "key", in batches of exactly `batch_size`: kernels, which are
        chosen by shape, are then those of training. The last batch is filled up from the start."""
        assert self.ways, "with random crops there are too many views"
        total = self.ways * len(self.labels)
        keys = torch.arange(-(-total // self.batch_size) * self.batch_size, device=self.images.device) % total
        still = torch.zeros(2, self.batch_size, dtype=torch.int64, device=self.images.device)
        for key in keys.split(self.batch_size):
            index, flip = key // self.ways, key % self.ways
            image = self._view(self._normalised(index), still, flip)
            yield Batch(index, {"image": image, "key": key}, self.labels[index])

    def _normalised(self, index: Tensor) -> Tensor:
        return (self.images[index].float() - self.mean) / self.std  # (B, C, H, W)

    @property
    def _pad(self) -> int:
        return next((int(name[4:]) for name in self.augment if name.startswith("crop")), 0)

    def _drawn(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Shift of rows and columns (2, B) in 0 .. 2 pad, and flip (B,) in {0, 1}, int64."""
        shift, flip = torch.zeros(2, batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
        if self.augment:
            shift = torch.randint(0, 2 * self._pad + 1, (2, batch), generator=generator)
        if "flip" in self.augment:
            flip = (torch.rand(batch, generator=generator) < 0.5).long()
        return shift.to(self.images.device), flip.to(self.images.device)

    def _view(self, x: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
        """Shift by up to `pad` px after zero padding, then flip, for the whole batch in one gather; then resize."""
        if not self.augment:
            return self._resized(x)
        batch, _, height, width = x.shape
        rows = shift[0, :, None] + torch.arange(height, device=x.device)  # (B, H)
        cols = torch.arange(width, device=x.device).expand(batch, width)
        cols = shift[1, :, None] + torch.where(flip[:, None] > 0, cols.flip(1), cols)  # (B, W)
        x = F.pad(x, (self._pad,) * 4)
        item = torch.arange(batch, device=x.device)[:, None, None]
        x = x[item, :, rows[:, :, None], cols[:, None, :]]  # (B, H, W, C)
        return self._resized(x.permute(0, 3, 1, 2))  # NCHW view of channels-last memory

    def _resized(self, x: Tensor) -> Tensor:
        if self.size is None:
            return x
        return F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)  # (B, C, size, size)


def ways(augment: Collection[str]) -> int | None:
    """How many views of an image training can show: 1, or 2 with flips; None = too many to keep (crops)."""
    return None if set(augment) - {"flip"} else 1 + ("flip" in augment)


def check_images(images: Tensor, labels: Tensor, name: str) -> None:
    """Refuse a data set whose arrays do not fit together."""
    if len(images) != len(labels):
        raise UserError(f"{name}: {len(images)} images but {len(labels)} labels")
    if len(images) == 0:
        raise UserError(f"{name}: no images")
