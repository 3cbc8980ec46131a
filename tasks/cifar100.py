"""CIFAR-100 (Krizhevsky 2009), as torchvision stores and checks it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from benchmark.errors import UserError
from benchmark.task import ImageRetrieval, ImageSet

FILES = {"train": 50_000, "test": 10_000}


class Cifar100(ImageRetrieval):
    """60,000 images of 100 classes at 32 x 32; `pixels: 16` averages 2 x 2 blocks."""

    name = "cifar100"
    mean, std = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)  # training images, 0..255 scale, at 32 px

    def read(self, pixels: int = 32) -> tuple[list[str], ImageSet, ImageSet]:
        if pixels not in (16, 32):
            raise UserError(f"cifar100: pixels is 16 or 32, not {pixels}")
        parts = {split: self._open(split) for split in FILES}
        sets = []
        for split, count in FILES.items():
            images = torch.from_numpy(parts[split].data).permute(0, 3, 1, 2)  # (N, 3, 32, 32) uint8
            labels = torch.tensor(parts[split].targets)
            if len(images) != count or len(labels) != count:
                raise UserError(f"cifar100: {split} holds {len(images)} images and {len(labels)} labels, not {count}")
            if pixels == 16:
                images = F.avg_pool2d(images.float(), 2).round().byte()
            sets.append(ImageSet(images.contiguous(), labels))
        return list(parts["train"].classes), sets[0], sets[1]

    def _open(self, split: str):  # type: ignore[no-untyped-def]
        from torchvision.datasets import CIFAR100

        root = Path(self.root or "data")
        self.root = root
        here = root / CIFAR100.base_folder
        try:
            if all((here / name).is_file() for name in ("train", "test", "meta")):
                return CIFAR100(root, train=split == "train")  # checks the MD5 of every file
            return CIFAR100(root, train=split == "train", download=True)
        except RuntimeError:
            raise UserError(
                f"cifar100: a file under {here} differs from the published one (MD5); remove it and download it again"
            ) from None
        except OSError as error:
            raise UserError(
                f"cifar100: not found under {root}, and it could not be downloaded ({getattr(error, 'reason', error)}); put "
                f"train, test and meta of cifar-100-python.tar.gz into {here}, or give another folder with --data"
            ) from None
