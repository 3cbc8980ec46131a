"""CIFAR-100 (Krizhevsky 2009), as torchvision stores and checks it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmark.errors import UserError
from benchmark.task import ImageRetrieval, ImageSet

FOLDER = "cifar-100-python"
FILES = {"train": 50_000, "test": 10_000}


class Cifar100(ImageRetrieval):
    """60,000 images of 100 classes at 32 x 32.

    `task_args`, beside those of `ImageRetrieval`:

    - `pixels`: 32; 16 averages 2 x 2 blocks; more than 32 (e.g. 224) resizes each batch on the device, images stay at 32.
    - `mean`, `std`: per channel, on the 0..255 scale (default: of the training images at 32 px).
    """

    name = "cifar100"
    mean: tuple[float, ...] = (129.3, 124.1, 112.4)
    std: tuple[float, ...] = (68.2, 65.4, 70.4)

    def read(
        self, pixels: int = 32, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> tuple[list[str], ImageSet, ImageSet]:
        if pixels != 16 and pixels < 32:
            raise UserError(f"cifar100: pixels is 16, 32 or more, not {pixels}")
        self.size = pixels if pixels > 32 else None
        self.mean, self.std = tuple(mean or self.mean), tuple(std or self.std)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"cifar100: mean and std hold 3 numbers each, std above 0, not {self.mean}, {self.std}")
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

    @classmethod
    def missing(cls, root: Path | None) -> str | None:
        """What is not there yet, without downloading it, for `compatbench doctor`; None if all files are."""
        here = Path(root or "data") / FOLDER
        absent = [name for name in ("train", "test", "meta") if not (here / name).is_file()]
        if not absent:
            return None
        return (
            f"cifar100: {here} lacks {', '.join(absent)}; a run downloads them (169 MB), or put train, test and meta of "
            "cifar-100-python.tar.gz there, or give another folder with --data"
        )

    def _open(self, split: str) -> Any:
        from torchvision.datasets import CIFAR100
        from torchvision.datasets.utils import check_integrity

        self.root = root = Path(self.root or "data")
        here = root / FOLDER
        try:
            return CIFAR100(root, train=split == "train", download=self.missing(root) is not None)  # checks the MD5s
        except RuntimeError:
            hashes = {**dict(CIFAR100.train_list), **dict(CIFAR100.test_list), "meta": CIFAR100.meta["md5"]}
            wrong = [str(here / name) for name, md5 in hashes.items() if not check_integrity(here / name, md5)]
            raise UserError(
                f"cifar100: {', '.join(wrong) or here}: not as published (MD5), so short, changed or missing; remove {here} and "
                "run again to download it whole, or put the original there"
            ) from None
        except OSError as error:
            raise UserError(
                f"cifar100: not found under {root}, and it could not be downloaded ({getattr(error, 'reason', error)}); put "
                f"train, test and meta of cifar-100-python.tar.gz into {here}, or give another folder with --data"
            ) from None
