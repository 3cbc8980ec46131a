"""The bundled 8 x 8 digits of scikit-learn: the demo and the tests. No download, nothing to configure."""

from __future__ import annotations

import torch

from benchmark.task import ImageRetrieval, ImageSet


class Digits(ImageRetrieval):
    """1,797 handwritten digits, 8 x 8, bundled with scikit-learn (UCI, Alpaydin and Kaynak 1998)."""

    name = "digits"
    mean, std = (77.9,), (95.7,)  # of all pixels, on the 0..255 scale

    def read(self) -> tuple[list[str], ImageSet, ImageSet]:
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.from_numpy(data.images).mul(255 / 16).round().byte()[:, None]  # (1797, 1, 8, 8)
        labels = torch.from_numpy(data.target).long()
        test = torch.arange(len(labels)) % 5 < 2  # 2 of 5 images are for the test: 719
        return (
            [str(name) for name in data.target_names],
            ImageSet(images[~test], labels[~test]),
            ImageSet(images[test], labels[test]),
        )
