"""A task: data, supervision and score. It knows no method."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmark import backbones
from benchmark.errors import UserError
from benchmark.heads import Head, Objective
from benchmark.images import Batch, ImageLoader
from benchmark.protocol import Protocol, digest
from benchmark.retrieval import Block, Cell


@dataclass(frozen=True)
class Scores:
    """What one cell of the compatibility matrix is judged by."""

    metrics: Mapping[str, Mapping[str, float | None]]  # stratum -> metric -> value in [0, 1]
    per_query: Mapping[str, Tensor]  # "ap" (Nq,) float32, "first" (Nq,) int32; the same query list in every cell


class Task(ABC):
    """Data of one protocol. Construction reads and checks everything, before any training."""

    name: str
    directions: tuple[str, ...] = ("I2I",)  # of images and texts: ("I2T", "T2I")
    sides: tuple[str, ...] = ()  # of images and texts: ("image", "text"), each an item list of its own

    def __init__(self, protocol: Protocol, root: Path | None = None, device: str = "cpu"):
        self.protocol, self.root, self.device = protocol, root, device

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of item lists and labels, as the protocol splits them."""

    @classmethod
    def missing(cls, root: Path | None) -> str | None:
        """What of the data is not under `root`, and how to get it, without downloading anything; None if all is there."""
        return None

    @abstractmethod
    def train_loader(self, t: int, view: str, seed: int, batch_size: int = 1000) -> Iterable[Batch]:
        """Training images of release `t`. Views: "train" (shuffled, augmented, the recipe's batch size), "two_views"
        (the same with "image" and "image2"), "eval" (in order, not augmented, `batch_size`)."""

    @abstractmethod
    def train_size(self, t: int) -> int:
        """Number of training images of release `t`."""

    @abstractmethod
    def items(self, split: str, side: str) -> tuple[Tensor, Tensor]:
        """(ids, labels), each (N,), of the "query" or "gallery" side of "test" or "validation"."""

    @abstractmethod
    def item_loader(self, split: str, side: str) -> Iterable[Batch]:
        """The same items in the same order, in evaluation view."""

    def cell(self, queries: Tensor, gallery: Tensor, split: str) -> Cell:
        """All queries of a split against all of its gallery, ready to be ranked, for backfill curves."""
        raise UserError(f"task {self.name} has no backfill curves")

    @abstractmethod
    def class_total(self) -> int:
        """Number of training classes in the protocol's class order."""

    @abstractmethod
    def strata(self, labels: Tensor) -> dict[str, Tensor]:
        """Named masks (N,) over items with these labels; "all" is one of them. Fixed over the whole matrix."""

    @abstractmethod
    def score(self, queries: Tensor, gallery: Tensor, split: str, direction: str = "I2I") -> Scores:
        """Judge (N, D) query vectors against (M, D) gallery vectors of `split`."""

    def score_all(self, pairs: Mapping[str, tuple[Tensor, Tensor]], split: str) -> Scores:
        """Judge the (queries, gallery) of every direction."""
        return self.score(*pairs["I2I"], split)

    def query_strata(self, split: str) -> dict[str, Tensor]:
        """Masks over the queries of `split`, all directions' one after the other."""
        return self.strata(self.items(split, "query")[1])

    def sample(self, t: int) -> Mapping[str, Tensor]:
        """One item as release `t` reads it, (1, ...) each."""
        return {name: value[:1] for name, value in next(iter(self.item_loader("test", "query"))).x.items()}

    def side_loader(self, items: str, side: str, t: int) -> Iterable[Batch]:
        """Two-sided tasks: the "image"s or distinct "text"s of "test", "validation" or "train:<release>", for release `t`."""
        raise NotImplementedError

    def facts(self, split: str = "test") -> list[str]:
        """Lines to print before a run: what a number on this data must be held against."""
        return []

    def origin(self, t: int, weights: Path) -> dict[str, Tensor]:
        """What is stored with embeddings of release `t` besides ids."""
        return {}

    def classes(self, t: int) -> int:
        """How many classes release `t` is trained on: labels 0 .. classes - 1."""
        return self.protocol.class_count(t, self.class_total())

    def backbone(self, t: int, dim: int) -> nn.Module:
        release = self.protocol.releases[t]
        return backbones.build(release.backbone, dim, **release.backbone_args)

    def head(self, t: int, dim: int) -> Objective:
        weight = torch.randn(self.classes(t), dim) / dim**0.5
        return Head(weight, self.protocol.head, self.protocol.releases[t].recipe.label_smoothing)

    def check(self) -> None:
        """Refuse data that is not what the protocol was frozen on."""
        if self.protocol.fingerprint and self.protocol.fingerprint != self.fingerprint:
            raise UserError(
                f"{self.name}: the data differ from those {self.protocol.id} was frozen on (fingerprint {self.fingerprint[:12]}, "
                f"expected {self.protocol.fingerprint[:12]}); check the files under {self.root} with `compatbench doctor`"
            )


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one split as the source has them."""

    images: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) index into the source's class names


class ImageRetrieval(Task):
    """Image retrieval with class labels as relevance, from small images that fit in memory.

    The protocol's `task_args` split the classes and the images:

    - `classes`: names in the protocol's order; release t trains on the first `Release.classes` of them.
    - `validation_classes`, `unseen_classes`: names that no release trains on; recipes are chosen and methods are tuned on the
      former, the latter are part of the test.
    - `heldout`: images per class of the training part that no release trains on; the validation split is the held-out images of
      training and validation classes, first half queries, second half gallery.
    - `query_gallery`: "halves" (each class's test images alternate between queries and gallery) or "same" (all test images on
      both sides, the item itself excluded).

    The order of images within a class is the source's own, or a fixed permutation derived from `order_seed`.
    """

    mean: tuple[float, ...] = (127.5,)
    std: tuple[float, ...] = (127.5,)
    size: int | None = None  # side to which batches are resized; the images are kept as they are

    def __init__(
        self,
        protocol: Protocol,
        root: Path | None = None,
        device: str = "cpu",
        *,
        classes: Sequence[str] | None = None,
        validation_classes: Sequence[str] = (),
        unseen_classes: Sequence[str] = (),
        heldout: int = 0,
        query_gallery: str = "halves",
        order_seed: int = 0,
        **source_args: Any,
    ):
        super().__init__(protocol, root, device)
        if query_gallery not in ("halves", "same"):
            raise UserError(f"{self.name}: query_gallery is 'halves' or 'same', not '{query_gallery}'")
        names, train, test = self.read(**source_args)
        if classes is None:
            classes = [c for c in names if c not in (*validation_classes, *unseen_classes)]
        order = [*classes, *validation_classes, *unseen_classes]
        for name in order:
            if name not in names:
                raise UserError(
                    f"{self.name}: the protocol names class '{name}', which the data under {self.root} lack"
                )
        if len(set(order)) != len(order):
            raise UserError(f"{self.name}: a class stands twice in the protocol's class lists")
        self.train_classes, self.validation_classes, self.unseen_classes = (
            list(classes),
            list(validation_classes),
            list(unseen_classes),
        )
        self.query_gallery, self.heldout, self.order_seed = query_gallery, heldout, order_seed
        position = torch.full((len(names),), -1, dtype=torch.int64)
        position[[names.index(name) for name in order]] = torch.arange(len(order))
        self.sets = {"train": train, "test": test}
        self.labels = {
            split: position[part.labels] for split, part in self.sets.items()
        }  # -1: class not in the protocol
        self.by_class = {split: self._by_class(split, len(order)) for split in self.sets}
        for t in range(len(protocol.releases)):  # too few classes or images die here, not after hours
            self.train_index(t)
        for side in ("query", "gallery"):
            if not len(self.items("test", side)[0]):
                raise UserError(f"{self.name}: the test split has no {side} images")

    @abstractmethod
    def read(self, *args: Any, **source_args: Any) -> tuple[list[str], ImageSet, ImageSet]:
        """Class names and the (train, test) images of the source; refuses missing, short or corrupt data."""

    def class_total(self) -> int:
        return len(self.train_classes)

    def _by_class(self, split: str, count: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.order_seed)
        members = []
        for label in range(count):
            index = (self.labels[split] == label).nonzero()[:, 0]
            if not len(index):
                name = [*self.train_classes, *self.validation_classes, *self.unseen_classes][label]
                raise UserError(f"{self.name}: class '{name}' has no {split} images under {self.root}")
            members.append(index[torch.randperm(len(index), generator=generator)] if self.order_seed else index)
        return members

    def train_index(self, t: int) -> Tensor:
        """Positions, in the source's training part, of the images that release `t` is trained on."""
        share, parts = self.protocol.releases[t].samples, []
        for name, members in zip(self.train_classes[: self.classes(t)], self.by_class["train"]):
            usable = len(members) - self.heldout
            count = round(share * usable)
            if count < 1:
                raise UserError(
                    f"{self.name}: release {t} would train on no image of class '{name}' (samples = {share})"
                )
            parts.append(members[:count])
        return torch.cat(parts)

    def train_size(self, t: int) -> int:
        return len(self.train_index(t))

    def train_loader(self, t: int, view: str, seed: int, batch_size: int = 1000) -> ImageLoader:
        recipe, index = self.protocol.releases[t].recipe, self.train_index(t)
        if view == "eval":
            return self._loader("train", index, batch_size=min(batch_size, self._at_once()))
        views = {"train": 1, "two_views": 2}[view]
        size = min(recipe.batch_size, len(index))
        return self._loader(
            "train", index, batch_size=size, shuffle=True, augment=recipe.augment, views=views, seed=seed
        )

    def _loader(self, split: str, index: Tensor, **options: Any) -> ImageLoader:
        images, labels = self.sets[split].images[index].to(self.device), self.labels[split][index].to(self.device)
        return ImageLoader(images, labels, self.mean, self.std, size=self.size, **options)

    def _at_once(self) -> int:
        """Images embedded at once: 1000 small ones, or 200 resized ones (120 MB of pixels at 224 px)."""
        return 200 if self.size else 1000

    def _side(self, split: str, side: str) -> tuple[str, Tensor]:
        """Source part ("train" or "test") and positions in it of one side of an evaluation split."""
        seen = len(self.train_classes)
        if split == "validation":
            if not self.heldout:
                raise UserError(f"{self.protocol.id} holds out no images, so it has no validation split")
            parts = [m[-self.heldout :] for m in self.by_class["train"][: seen + len(self.validation_classes)]]
            return "train", torch.cat([p[0::2] if side == "query" else p[1::2] for p in parts])
        judged = self.by_class["test"][:seen] + self.by_class["test"][seen + len(self.validation_classes) :]
        if self.query_gallery == "same":
            return "test", torch.cat(judged)
        return "test", torch.cat([m[0::2] if side == "query" else m[1::2] for m in judged])

    def items(self, split: str, side: str) -> tuple[Tensor, Tensor]:
        part, index = self._side(split, side)
        return index, self.labels[part][index]

    def item_loader(self, split: str, side: str) -> ImageLoader:
        part, index = self._side(split, side)
        return self._loader(part, index, batch_size=self._at_once())

    @cached_property
    def fingerprint(self) -> str:
        lists = {f"train{t}": self.train_index(t).tolist() for t in range(len(self.protocol.releases))}
        for split in ("test", "validation") if self.heldout else ("test",):
            for side in ("query", "gallery"):
                ids, labels = self.items(split, side)
                lists[f"{split}-{side}"] = [ids.tolist(), labels.tolist()]
        names = [*self.train_classes, *self.validation_classes, *self.unseen_classes]
        return digest([names, lists, {split: self._pixels(split) for split in self.sets}])

    def _pixels(self, split: str) -> str:
        return hashlib.sha256(self.sets[split].images.contiguous().numpy().data).hexdigest()

    def strata(self, labels: Tensor) -> dict[str, Tensor]:
        """Masks over items with `labels`: fixed over the whole matrix, so that its cells compare the same queries."""
        first, last = self.classes(0), self.classes(len(self.protocol.releases) - 1)
        masks = {"all": labels >= 0, "old-seen": labels < first, "new-only": (labels >= first) & (labels < last)}
        masks["never-seen"] = labels >= last
        return {name: mask for name, mask in masks.items() if mask.any()}

    def cell(self, queries: Tensor, gallery: Tensor, split: str) -> Cell:
        """All queries of a split against all of its gallery, ready to be ranked."""
        (query_ids, query_labels), (gallery_ids, gallery_labels) = (
            self.items(split, "query"),
            self.items(split, "gallery"),
        )
        same = self.query_gallery == "same"
        return Cell(
            [Block(torch.arange(len(gallery)), queries, gallery)],
            query_labels,
            gallery_labels,
            query_ids if same else None,
            gallery_ids if same else None,
            self.protocol.similarity,
            self.device,
        )

    def score(self, queries: Tensor, gallery: Tensor, split: str, direction: str = "I2I") -> Scores:
        ranking = self.cell(queries, gallery, split).rank()
        query_labels = self.items(split, "query")[1]
        metrics = {name: dict(ranking.metrics(select=mask)) for name, mask in self.strata(query_labels).items()}
        return Scores(metrics, {"ap": ranking.ap.float(), "first": ranking.first.int()})
