"""Exact image-text retrieval: R@k in both directions, any number of captions an image, equal strings equal.

R@k is the hit rate of the CLIP literature: 1 if a positive is among the top k. With s+ the score of the best positive,

    rank = 1 + #{negatives that score >= s+},   hit@k = [rank <= k]

so ties count against us (collapsed embeddings score 0, where `topk` would score by luck), and the share of queries whose
rank would be another one if ties counted for us is reported beside it. Relevance is by string, not by index: a caption's
positives are all images that have an equal caption, an image's are all captions equal to one of its own. Data sets
repeat captions, and a hit on an equal string is no miss.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from benchmark.retrieval import Block, Cell, Ranking, Similarity, _count, _finish, _take

DIRECTIONS = ("I2T", "T2I")
SIDES = {"I2T": ("image", "text"), "T2I": ("text", "image")}  # (query side, gallery side)
KS = (1, 5, 10)


@dataclass(frozen=True)
class Positives:
    """The gallery items that fit each query: those of query q are items[start[q] : start[q + 1]]."""

    start: Tensor  # (Nq + 1,) int64
    items: Tensor  # (sum of counts,) int64, ascending within a query
    gallery: int  # items in the gallery

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]], gallery: int) -> Positives:
        start = torch.tensor([0, *(len(one) for one in lists)]).cumsum(0)
        return cls(start, torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64), gallery)

    @property
    def counts(self) -> Tensor:
        """(Nq,) positives of each query."""
        return self.start.diff()

    def within(self, query_groups: Tensor, gallery_groups: Tensor) -> Tensor:
        """(Nq,) positives of each query that are in the query's own group."""
        query = torch.repeat_interleave(torch.arange(len(self.counts)), self.counts)
        same = query_groups[query] == gallery_groups[self.items]
        return torch.zeros_like(self.counts).index_add_(0, query, same.long())


@dataclass(frozen=True)
class Relevance:
    """What fits what among N images and all M captions of theirs, in the images' order."""

    texts: list[str]  # the distinct strings, in order of their first appearance; by index: all
    text: Tensor  # (M,) the string of each caption
    image: Tensor  # (M,) the image that each caption was written for
    positives: Mapping[str, Positives]  # direction -> ...

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]], by_string: bool = True) -> Relevance:
        """From the captions of each image. Strings are equal if they are after surrounding white space is cut off.

        Without `by_string` every caption counts as a string of its own, which fits its own image alone.
        """
        number: dict[tuple[str, int], int] = {}
        mark = itertools.repeat(0) if by_string else itertools.count()
        text = [[number.setdefault((c.strip(), next(mark)), len(number)) for c in own] for own in captions]
        flat = list(chain.from_iterable(text))
        places: list[list[int]] = [[] for _ in number]  # captions by string
        for at, string in enumerate(flat):
            places[string].append(at)
        holders: list[list[int]] = [[] for _ in number]  # images by string
        for image, own in enumerate(text):
            for string in dict.fromkeys(own):
                holders[string].append(image)
        fitting = [sorted(chain.from_iterable(places[string] for string in set(own))) for own in text]
        owner = torch.repeat_interleave(torch.arange(len(text)), torch.tensor([len(own) for own in text]))
        positives = {
            "I2T": Positives.of(fitting, len(flat)),
            "T2I": Positives.of([holders[string] for string in flat], len(text)),
        }
        return cls([string for string, _ in number], torch.tensor(flat), owner, positives)

    def chance(self, direction: str, k: int = 1) -> float:
        """Expected R@k in [0, 1] of a random ranking."""
        found = self.positives[direction]
        return float(_hit(found.counts, torch.full_like(found.counts, found.gallery), k).mean())

    def chance_by_index(self) -> float:
        """Expected R@1 of a random ranking if only a caption and its own image fitted: what matching by index would say."""
        return (
            1 / self.positives["T2I"].gallery
        )  # both directions: an image has M / N of the M captions on average, a caption one of N images

    def class_oracle(self, direction: str, labels: Tensor, k: int = 1) -> float:
        """Expected R@k of a ranking that puts the query's class (N,) of images first and is random within classes.

        What a model could score that knows the class and nothing else.
        """
        groups = {"image": labels, "text": labels[self.image]}
        query, gallery = (groups[side] for side in SIDES[direction])
        found = self.positives[direction]
        own, size = found.within(query, gallery), torch.bincount(gallery, minlength=int(labels.max()) + 1)[query]
        rest = (k - size).clamp(min=0)
        miss_in_class = 1 - _hit(own, size, k)
        miss_outside = 1 - _hit(found.counts - own, found.gallery - size, rest)
        return float((1 - miss_in_class * miss_outside).mean())


def _hit(positives: Tensor, total: Tensor, k: int | Tensor) -> Tensor:
    """(Nq,) float64, chance of a positive among min(k, total) draws without replacement."""
    k = torch.as_tensor(k).expand_as(total).minimum(total)
    miss = torch.ones(len(total), dtype=torch.float64)
    for draw in range(int(k.max())):
        left = (total - draw).clamp(min=1).double()
        miss *= torch.where(draw < k, ((total - positives - draw) / left).clamp(min=0), 1.0)
    return 1 - miss


@dataclass(frozen=True)
class PairRanking(Ranking):
    """As `Ranking`, and the rank if ties counted for us."""

    optimistic: Tensor  # (Nq,) int64, from 1 on
    gallery: int

    def recalls(self, ks: Sequence[int] = KS, select: Tensor | None = None) -> dict[str, float | int | None]:
        """ "r@<k>", "mrr" in [0, 1], "median_rank", "tied" (share of queries that ties decide), "queries", "gallery".

        `select` (Nq,) bool restricts the queries, as to a domain of nocaps. None where no query is left.
        """
        first, best = (x if select is None else x[select] for x in (self.first, self.optimistic))
        counts: dict[str, float | int | None] = {"queries": len(first), "gallery": self.gallery}
        if not len(first):
            return dict.fromkeys([*(f"r@{k}" for k in ks), "mrr", "median_rank", "tied"]) | counts
        values = {f"r@{k}": float((first <= k).double().mean()) for k in ks}
        values |= {"mrr": float((1 / first.double()).mean()), "median_rank": float(first.double().quantile(0.5))}
        return values | {"tied": float((first != best).double().mean())} | counts


class _PairCell(Cell):
    """A cell whose positives are listed, not shared labels."""

    def __init__(self, queries: Tensor, gallery: Tensor, positives: Positives, **options: object):
        none = torch.zeros(max(len(queries), len(gallery)), dtype=torch.int64)
        blocks = [Block(torch.arange(len(gallery)), queries, gallery)]
        super().__init__(blocks, none[: len(queries)], none[: len(gallery)], **options)  # type: ignore[arg-type]
        self.by_label, self.start, self.positives = positives.items, positives.start[:-1], positives.counts

    def rank(self) -> PairRanking:
        def judge(rows: Tensor, scores: Tensor, columns: Tensor):
            top = _take(scores, columns)
            more = torch.nextafter(top[:, :1], torch.full_like(top[:, :1], torch.inf))  # ">= more" is "> best positive"
            above = _count(scores, torch.cat([more, top], 1), self.backend)
            return rows, *_finish(top, above[:, 1:]), above[:, 0].cpu() + 1

        rows, *values = (torch.cat(x) for x in zip(*self._map(judge)))
        ap, first, positives, optimistic = (x[rows.argsort()] for x in values)
        return PairRanking(ap, first, positives, optimistic, self.ng)


def rank_pairs(
    queries: Tensor,  # (Nq, D) floats
    gallery: Tensor,  # (Ng, D) floats
    positives: Positives,
    *,
    similarity: Similarity = "cosine",
    device: torch.device | str | None = None,
    buffer_mb: int = 64,
) -> PairRanking:
    """Rank the whole gallery for every query, in fp32 and in chunks; the positives are listed. Options as for `rank`.

    Raises ValueError as `rank`, and where the lists do not fit the queries or the gallery.
    """
    if len(positives.counts) != len(queries) or positives.gallery != len(gallery):
        raise ValueError(
            f"positives are listed for {len(positives.counts)} queries and {positives.gallery} gallery items, got "
            f"{len(queries)} and {len(gallery)}"
        )
    if not (positives.counts > 0).all():
        raise ValueError(f"query {int((positives.counts == 0).nonzero()[0, 0])} has no positive")
    return _PairCell(queries, gallery, positives, similarity=similarity, device=device, buffer_mb=buffer_mb).rank()


def evaluate_pairs(
    images: Tensor,  # (N, D) floats
    texts: Tensor,  # (distinct strings, D) floats, in the order of `Relevance.texts`
    relevance: Relevance,
    ks: Sequence[int] = KS,
    similarity: Similarity = "cosine",
    device: torch.device | str | None = None,
) -> dict[str, dict[str, float | int | None]]:
    """direction -> `PairRanking.recalls`, with "chance@1" beside it; every caption is a query and a gallery item."""
    sides = {"image": images, "text": texts[relevance.text]}
    found: dict[str, dict[str, float | int | None]] = {}
    for direction in DIRECTIONS:
        query, gallery = (sides[side] for side in SIDES[direction])
        ranking = rank_pairs(query, gallery, relevance.positives[direction], similarity=similarity, device=device)
        found[direction] = {**ranking.recalls(ks), "chance@1": relevance.chance(direction)}
    return found
