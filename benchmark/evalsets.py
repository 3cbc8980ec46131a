"""Evaluation sets of images and texts: one query list over several sets and both directions, each set with its own gallery."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from benchmark.captions import CaptionDataset
from benchmark.crossmodal import DIRECTIONS, SIDES, PairRanking, Relevance, rank_pairs
from benchmark.retrieval import Similarity


@dataclass(frozen=True)
class EvalSet:
    """One gallery of its own: the images of one evaluation set and their captions."""

    name: str
    data: CaptionDataset
    part: str  # of the task's data: where its images lie
    index: list[int]  # its images in that part
    labels: Tensor  # (N,) class of each image; the image itself where there are no classes
    relevance: Relevance


def texts(sets: Sequence[EvalSet]) -> list[str]:
    """The distinct captions of all sets, the order in which they are embedded."""
    return list(dict.fromkeys(chain.from_iterable(one.relevance.texts for one in sets)))


def query_labels(sets: Sequence[EvalSet]) -> tuple[Tensor, Tensor]:
    """Classes of the query list: of all sets' images (I2T), then of all sets' captions (T2I); and those of the gallery."""
    images = torch.cat([one.labels for one in sets])
    owners = torch.cat([one.labels[one.relevance.image] for one in sets])
    return torch.cat([images, owners]), torch.cat([owners, images])


def strata(sets: Sequence[EvalSet], known: Collection[str]) -> dict[str, Tensor]:
    """Masks over the query list: directions, with "seen" and "unseen" by the `known` captions, sets and domains.

    An image is seen if all its captions are known.
    """
    tags: list[set[str]] = []  # of each query
    for direction in DIRECTIONS:
        for one in sets:
            seen = [[text.strip() in known for text in own] for own in one.data.captions]
            of_query = [all(own) for own in seen] if direction == "I2T" else list(chain.from_iterable(seen))
            image = range(len(seen)) if direction == "I2T" else one.relevance.image.tolist()
            for is_seen, i in zip(of_query, image):
                mine = {direction, f"{direction}-{'seen' if is_seen else 'unseen'}"}
                mine |= {f"{one.name} {direction}"} if len(sets) > 1 else set()
                mine |= {f"{one.data.domains[i]} {direction}"} if one.data.domains else set()
                tags.append(mine)
    names = sorted(set(chain.from_iterable(tags)))
    masks = {name: torch.tensor([name in mine for mine in tags]) for name in names}
    return {"all": torch.ones(len(tags), dtype=torch.bool), **masks}


def rank(
    sets: Sequence[EvalSet],
    queries: Tensor,
    gallery: Tensor,
    direction: str,
    similarity: Similarity = "cosine",
    device: str | None = None,
) -> PairRanking:
    """Each set's queries against its own gallery.

    Embeddings come as all sets' images (N, D) and all sets' distinct `texts` (M, D), on the sides that the direction says.
    """
    row, at, found = {text: i for i, text in enumerate(texts(sets))}, 0, []
    for one in sets:
        place = torch.tensor([row[text] for text in one.relevance.texts])[one.relevance.text]
        of: dict[str, Any] = {"image": slice(at, at + len(one.data)), "text": place}
        query_side, gallery_side = SIDES[direction]
        query, stored = queries[of[query_side]], gallery[of[gallery_side]]
        positives = one.relevance.positives[direction]
        found.append(rank_pairs(query, stored, positives, similarity=similarity, device=device))
        at += len(one.data)
    names = ("ap", "first", "positives", "optimistic")
    joined: dict[str, Any] = {name: torch.cat([getattr(r, name) for r in found]) for name in names}
    return PairRanking(**joined, gallery=sum(r.gallery for r in found))


def facts(sets: Sequence[EvalSet], classes: bool) -> list[str]:
    """A line for each set and direction: sizes, chance and, with `classes`, what knowing the class alone would give."""
    lines = []
    for one in sets:
        for direction in DIRECTIONS:
            found = one.relevance.positives[direction]
            line = f"{one.name} {direction}: {len(found.counts):,} queries, gallery of {found.gallery:,}, chance R@1 "
            line += f"{100 * one.relevance.chance(direction):.2f} % by string"
            line += f" ({100 * one.relevance.chance_by_index():.2f} % by index)"
            if classes:
                line += f", class oracle {100 * one.relevance.class_oracle(direction, one.labels):.1f} %"
            lines.append(line)
    return lines
