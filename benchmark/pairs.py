"""Batches of photos and captions, prepared as one release wants them: its own preprocessing, its own tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from benchmark.images import Batch, ImageLoader
from benchmark.protocol import derive_seed
from benchmark.towers import Preprocess


class Photos:
    """(N, 3, S, S) uint8 images decoded when they are asked for, so that a data set may be larger than memory."""

    def __init__(self, sources: Sequence[Any], open_image: Callable[[Any], Any], preprocess: Preprocess, device: str):
        self.sources, self.open_image, self.preprocess = sources, open_image, preprocess
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: Tensor) -> Tensor:
        def work(i: int) -> Tensor:
            return self.preprocess.pixels(self.open_image(self.sources[i]))

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside Python's lock
            return torch.stack(list(pool.map(work, index.tolist()))).to(self.device)


class PairLoader(ImageLoader):
    """Images, each with one of its captions drawn anew every epoch: "image", "text" (B, L), "caption" (B,).

    Args:
        captions: rows of `tokens` that are the captions of each image.
        tokens: (distinct captions, L) int64.
    """

    def __init__(self, *args: Any, captions: Sequence[Sequence[int]], tokens: Tensor, **options: Any):
        super().__init__(*args, **options)
        self.captions, self.tokens = captions, tokens

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "captions", self.epoch))
        for batch in super().__iter__():
            draws = torch.rand(len(batch.index), generator=generator).tolist()
            own = [self.captions[i] for i in batch.index.tolist()]
            rows = torch.tensor([rows[int(draw * len(rows))] for rows, draw in zip(own, draws)])
            text = {"text": self.tokens[rows].to(batch.index.device), "caption": rows.to(batch.index.device)}
            yield batch._replace(x={**batch.x, **text})


class TextLoader:
    """Batches of captions alone: "text" (B, L), "caption" (B,); options as for `ImageLoader`."""

    def __init__(self, rows: Tensor, tokens: Tensor, *, batch_size: int, shuffle: bool = False, seed: int = 0):
        self.rows, self.tokens, self.shuffle, self.seed, self.epoch = rows, tokens, shuffle, seed, 0
        self.batch_size = min(batch_size, len(rows))

    @property
    def sampler(self) -> TextLoader:
        return self  # as of `ImageLoader`

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size if self.shuffle else -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", self.epoch))
        count = len(self.rows)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for i in range(len(self)):
            rows = self.rows[order[i * self.batch_size : (i + 1) * self.batch_size]]
            yield Batch(rows, {"text": self.tokens[rows], "caption": rows}, torch.zeros_like(rows))
