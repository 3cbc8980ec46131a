"""Image-text retrieval in both directions, on any captioned photos: images search captions, captions search images."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmark import captions, evalsets
from benchmark.captions import CaptionDataset
from benchmark.crossmodal import DIRECTIONS, KS, PairRanking, Relevance
from benchmark.errors import UserError, unknown
from benchmark.evalsets import EvalSet
from benchmark.files import sha256_file
from benchmark.heads import Objective, PairHead
from benchmark.images import Batch, ImageLoader
from benchmark.pairs import PairLoader, Photos, TextLoader
from benchmark.protocol import Protocol, digest
from benchmark.retrieval import Ranking
from benchmark.task import Scores, Task
from benchmark.towers import Spec, Tokenizer

HASHED = 256 * 2**20  # bytes of images up to which their content is part of the fingerprint


class Crossmodal(Task):
    """Captioned photos in any layout of `benchmark.captions`; relevance by equal strings.

    The protocol's `task_args`; files are sought under the data folder:

    - `train`: {source, images, split, layout} of the training pairs.
    - `test`: name -> the same, for one or more evaluation sets, each with a gallery of its own.
    - `heldout`: images of each class of the training pairs (of the whole, where images have no label) that no release
      trains on: the validation split.
    - `order_seed`: permutation of the training images, of which a release with `samples` below 1 sees the first ones.
    - `limit_gb`: GiB of decoded images kept in memory; larger sets are decoded as they are read.

    The query list of a split holds both directions: all sets' images (I2T), then all sets' captions (T2I). The strata are
    the directions, each also by whether training captions hold the query's string: "seen" and "unseen" (an image is
    seen if all its captions are); with several sets, or domains, each of them too.
    """

    name = "crossmodal"
    directions = DIRECTIONS
    sides = ("image", "text")

    def __init__(
        self,
        protocol: Protocol,
        root: Path | None = None,
        device: str = "cpu",
        *,
        heldout: int = 0,
        order_seed: int = 0,
        limit_gb: float = 4.0,
        **source_args: Any,
    ):
        super().__init__(protocol, root, device)
        self.heldout, self.order_seed, self.limit_gb = heldout, order_seed, limit_gb
        train, tests = self.read(**source_args)
        self.parts = {"train": train, **tests}
        names = sorted({label for part in self.parts.values() for label in part.labels or ()})
        self.class_names = names if all(part.labels for part in self.parts.values()) else []
        self.order = self._order()
        self.tests = {"test": [self._set(name, name, range(len(part))) for name, part in tests.items()]}
        if heldout:
            self.tests["validation"] = [self._set("validation", "train", self._heldout())]
        self.specs = [Spec.of(r.backbone, r.backbone_args, r.dim) for r in protocol.releases]
        self._pixels: dict[tuple[str, str], Tensor | Photos] = {}
        self._tokenizers: dict[int, Tokenizer] = {}
        for t in range(len(protocol.releases)):
            if not self.train_index(t):
                raise UserError(f"{self.name}: release {t} would train on no image (samples, heldout)")

    def read(
        self, train: Mapping[str, Any] | None = None, test: Mapping[str, Mapping[str, Any]] | None = None
    ) -> tuple[CaptionDataset, dict[str, CaptionDataset]]:
        """The training pairs and the evaluation sets by name."""
        if not train or not test:
            raise UserError(
                f"{self.name}: task_args name `train` and `test`, e.g. train: {{source: dataset.json, split: train}}"
            )
        return self._read("train", train), {name: self._read(f"test.{name}", given) for name, given in test.items()}

    def _read(self, where: str, given: Mapping[str, Any]) -> CaptionDataset:
        known = ("source", "images", "split", "layout")
        for key in given:
            if key not in known:
                raise unknown(f"field of task_args.{where}", key, known)
        root = Path(self.root or "data")
        if not root.is_dir():
            raise UserError(
                f"{self.name}: there is no folder {root}; give the one that holds {given['source']} with --data"
            )
        images = given.get("images")
        return captions.read(
            root / given["source"], root / images if images else None, given.get("split", "all"), given.get("layout")
        )

    def open(self, source: Any) -> Any:
        """The RGB image (PIL) behind an entry of `CaptionDataset.image_paths`."""
        return captions.open_image(source)

    # ---- item lists

    def _order(self) -> list[list[int]]:
        """Training images by class (all in one list where there are no labels), permuted."""
        data, generator = self.parts["train"], torch.Generator().manual_seed(self.order_seed)
        groups: dict[str, list[int]] = {}
        for i in torch.randperm(len(data), generator=generator).tolist() if self.order_seed else range(len(data)):
            groups.setdefault(data.labels[i] if self.class_names and data.labels else "", []).append(i)
        return [groups[name] for name in sorted(groups)]

    def _heldout(self) -> list[int]:
        return sorted(chain.from_iterable(group[len(group) - self.heldout :] for group in self.order))

    def train_index(self, t: int) -> list[int]:
        """Positions in the training pairs of the images that release `t` sees."""
        share = self.protocol.releases[t].samples
        usable = [group[: len(group) - self.heldout] for group in self.order]
        return sorted(chain.from_iterable(group[: round(share * len(group))] for group in usable))

    def train_size(self, t: int) -> int:
        return len(self.train_index(t))

    def train_texts(self, t: int) -> list[str]:
        """The distinct captions that release `t` sees, in order of their first appearance."""
        return Relevance.of([self.parts["train"].captions[i] for i in self.train_index(t)]).texts

    def _set(self, name: str, part: str, index: Iterable[int]) -> EvalSet:
        kept = list(index)
        if not kept:
            raise UserError(f"{self.name}: the evaluation set {name} has no images")
        data = self.parts[part].select(kept)
        return EvalSet(name, data, part, kept, self._labels(part)[kept], Relevance.of(data.captions))

    def _sets(self, split: str) -> list[EvalSet]:
        if split not in self.tests:
            raise UserError(f"{self.protocol.id} holds out no images, so it has no validation split")
        return self.tests[split]

    def texts(self, split: str) -> list[str]:
        """The distinct captions of an evaluation split."""
        return evalsets.texts(self._sets(split))

    def items(self, split: str, side: str) -> tuple[Tensor, Tensor]:
        """As of `Task`, and the sides "image" and "text" (distinct strings), also of "train:<release>".

        Labels are classes; where images have none, the image is its own class. Of distinct training texts: 1 if the test
        split holds the string too, else 0.
        """
        if split.startswith("train:"):
            t = int(split.partition(":")[2])
            if side == "image":
                index = torch.tensor(self.train_index(t))
                return index, self._labels("train")[index]
            known = {*self.texts("test")}
            texts = self.train_texts(t)
            return torch.arange(len(texts)), torch.tensor([int(text in known) for text in texts])
        if side == "text":
            count = len(self.texts(split))
            return torch.arange(count), torch.zeros(count, dtype=torch.int64)
        sets = self._sets(split)
        queries, gallery = evalsets.query_labels(sets)
        sides = {"query": queries, "gallery": gallery, "image": torch.cat([one.labels for one in sets])}
        return torch.arange(len(sides[side])), sides[side]

    def _labels(self, part: str) -> Tensor:
        data = self.parts[part]
        if not self.class_names:
            return torch.arange(len(data))
        return torch.tensor([self.class_names.index(label) for label in data.labels or ()])

    # ---- what releases read

    def images(self, part: str, t: int) -> Tensor | Photos:
        """All images of a part as release `t` wants them, (N, 3, S, S) uint8."""
        preprocess = self.specs[t].preprocess
        key = (part, preprocess.id)
        if key not in self._pixels:
            photos = Photos(self.parts[part].image_paths, self.open, preprocess, self.device)
            small = len(photos) * 3 * preprocess.size**2 <= self.limit_gb * 2**30
            self._pixels[key] = photos[torch.arange(len(photos))] if small else photos
        return self._pixels[key]

    def tokens(self, t: int, texts: Sequence[str], name: str) -> Tensor:
        """(N, L) token numbers as release `t` reads the texts; says how many are longer than its context."""
        if t not in self._tokenizers:
            self._tokenizers[t] = self.specs[t].tokenizer(self.train_texts(t))
        tokenizer = self._tokenizers[t]
        if cut := tokenizer.cut(texts):
            release = self.protocol.releases[t].name
            warnings.warn(
                f"{release}: {cut} of {len(texts)} captions of {name} are longer than its context "
                f"({tokenizer.room} tokens) and are cut",
                stacklevel=2,
            )
        return tokenizer(texts)

    def _loader(self, part: str, index: Sequence[int], t: int, kind: type[ImageLoader], **options: Any) -> Any:
        preprocess, place = self.specs[t].preprocess, torch.tensor(index)
        images = self.images(part, t)
        if isinstance(images, Photos):
            chosen: Any = Photos([images.sources[i] for i in index], self.open, preprocess, self.device)
        else:
            chosen = images[place]
        mean, std = (tuple(255 * value for value in values) for values in (preprocess.mean, preprocess.std))
        return kind(chosen, self._labels(part)[place].to(self.device), mean, std, **options)

    def side_loader(self, items: str, side: str, t: int) -> Iterable[Batch]:
        if side == "text":
            texts = self.train_texts(int(items.partition(":")[2])) if items[:6] == "train:" else self.texts(items)
            return TextLoader(torch.arange(len(texts)), self.tokens(t, texts, items), batch_size=512)
        if items.startswith("train:"):
            index = self.train_index(int(items.partition(":")[2]))
            return self._loader("train", index, t, ImageLoader, batch_size=256)
        loaders = [self._loader(one.part, one.index, t, ImageLoader, batch_size=256) for one in self._sets(items)]
        return loaders[0] if len(loaders) == 1 else list(chain.from_iterable(loaders))

    def item_loader(self, split: str, side: str) -> Iterable[Batch]:
        raise UserError(f"{self.protocol.id}: releases read their own items (side_loader); nothing reads all at once")

    def train_loader(self, t: int, view: str, seed: int, batch_size: int = 1000) -> Any:
        """Views: "train" (pairs, augmented), "train:<n>" (of n training images), "texts" (training captions that the
        test split does not hold). `Batch.index` is the image's position in the list of release `t`, "caption" that of the
        caption in `train_texts`."""
        recipe, texts = self.protocol.releases[t].recipe, self.train_texts(t)
        tokens = self.tokens(t, texts, "the training set")
        if view == "texts":
            rows = (self.items(f"train:{t}", "text")[1] == 0).nonzero()[:, 0]
            if not len(rows):
                raise UserError(
                    f"{self.name}: every training caption occurs in the test split; none is left for text alone"
                )
            return TextLoader(rows, tokens, batch_size=recipe.batch_size, shuffle=True, seed=seed)
        kind, _, count = view.partition(":")
        if kind != "train":
            raise UserError(f"{self.name}: has no view '{view}' of its training pairs")
        index = self.train_index(t)
        if count:  # spread over the list, which is in the order of the file
            step = max(1, len(index) / int(count))
            index = [index[int(i * step)] for i in range(min(int(count), len(index)))]
        row = {text: i for i, text in enumerate(texts)}
        own = [[row[text.strip()] for text in self.parts["train"].captions[i]] for i in index]
        options = {"batch_size": min(recipe.batch_size, len(index)), "shuffle": True, "augment": recipe.augment}
        return self._loader("train", index, t, PairLoader, captions=own, tokens=tokens, seed=seed, **options)

    def sample(self, t: int) -> Mapping[str, Tensor]:
        one = self.tests["test"][0]
        image = next(iter(self._loader(one.part, one.index[:1], t, ImageLoader, batch_size=1))).x["image"]
        return {"image": image, "text": self.tokens(t, one.relevance.texts[:1], "the test set")}

    def backbone(self, t: int, dim: int) -> nn.Module:
        release = self.protocol.releases[t]
        spec = self.specs[t] if dim == release.dim else Spec.of(release.backbone, release.backbone_args, dim)
        return spec.build(self.train_texts(t))

    def head(self, t: int, dim: int) -> Objective:
        return PairHead()

    def class_total(self) -> int:
        return len(self.class_names)

    def classes(self, t: int) -> int:
        return len(self.class_names)

    def origin(self, t: int, weights: Path) -> dict[str, Tensor]:
        """Ids of the model (its weights) and of its preprocessing and tokenizer, as bytes."""
        self.tokens(t, [], "")
        prepared = digest([self.specs[t].preprocess.id, self._tokenizers[t].id])
        ids = {"model": sha256_file(weights), "preprocess": prepared}
        return {name: torch.frombuffer(bytearray.fromhex(id), dtype=torch.uint8) for name, id in ids.items()}

    # ---- what is judged

    def strata(self, labels: Tensor) -> dict[str, Tensor]:
        return {"all": torch.ones_like(labels, dtype=torch.bool)}

    def query_strata(self, split: str) -> dict[str, Tensor]:
        return evalsets.strata(self._sets(split), {*self.train_texts(len(self.protocol.releases) - 1)})

    def rank(self, queries: Tensor, gallery: Tensor, split: str, direction: str) -> PairRanking:
        """Rank each set's gallery for its own queries, given both sides' embeddings (distinct texts) of all sets."""
        return evalsets.rank(self._sets(split), queries, gallery, direction, self.protocol.similarity, self.device)

    def score(self, queries: Tensor, gallery: Tensor, split: str, direction: str = "I2T") -> Scores:
        found = self.rank(queries, gallery, split, direction)
        return Scores({"all": found.metrics(KS)}, {"ap": found.ap.float(), "first": found.first.int()})

    def score_all(self, pairs: Mapping[str, tuple[Tensor, Tensor]], split: str) -> Scores:
        """cmc@1, cmc@5 and cmc@10 are R@1, R@5 and R@10; "optimistic" is the rank if ties counted for us."""
        found = [self.rank(*pairs[direction], split, direction) for direction in DIRECTIONS]
        ap, first, positives, optimistic = (
            torch.cat([getattr(r, name) for r in found]) for name in ("ap", "first", "positives", "optimistic")
        )
        ranking = Ranking(ap, first, positives)
        metrics = {name: dict(ranking.metrics(KS, mask)) for name, mask in self.query_strata(split).items()}
        return Scores(metrics, {"ap": ap.float(), "first": first.int(), "optimistic": optimistic.int()})

    def facts(self, split: str = "test") -> list[str]:
        """A line for each set and direction: sizes, chance and what knowing the class alone would give."""
        return evalsets.facts(self._sets(split), bool(self.class_names))

    @cached_property
    def fingerprint(self) -> str:
        lists = {f"train{t}": self.train_index(t) for t in range(len(self.protocol.releases))}
        sets = {split: [[one.name, one.part, one.index] for one in sets] for split, sets in self.tests.items()}
        parts = {name: [part.image_ids, part.captions, part.labels] for name, part in self.parts.items()}
        return digest([lists, sets, parts, {name: self._content(part) for name, part in self.parts.items()}])

    def _content(self, part: CaptionDataset) -> str:
        """Of the image files: their bytes where they are few, else their sizes."""
        files = [path if isinstance(path, Path) else path.tar for path in part.image_paths]
        sizes = [file.stat().st_size for file in files]
        if sum(sizes) > HASHED:
            return digest(sizes)
        return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()
