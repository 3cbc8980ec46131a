"""The evaluator against a naive double loop, on untied and on tied data; chance and the class oracle by counting."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from benchmark.crossmodal import DIRECTIONS, SIDES, Relevance, evaluate_pairs, rank_pairs

WORDS = ["a red plane", "two cars", "a road", "some trees", "a field", "a house"]


def captions(images: int, seed: int) -> list[list[str]]:
    """1 to 6 captions an image, strings repeated within and between images."""
    draw = random.Random(seed)
    return [
        [draw.choice(WORDS) if draw.random() < 0.4 else f"photo {i} {j}" for j in range(draw.randint(1, 6))]
        for i in range(images)
    ]


def naive(scores, query_texts, gallery_texts):
    """Ranks (pessimistic, optimistic) and AP of each query; texts are sets of strings, relevant if they share one."""
    found = []
    for q, row in enumerate(scores):
        relevant = [bool(query_texts[q] & texts) for texts in gallery_texts]
        best = max(s for s, r in zip(row, relevant) if r)
        wrong = [s for s, r in zip(row, relevant) if not r]
        right = [s for s, r in zip(row, relevant) if r]
        precisions = [
            sum(s >= p for s in right) / (sum(s >= p for s in right) + sum(s >= p for s in wrong)) for p in right
        ]
        ranks = 1 + sum(s >= best for s in wrong), 1 + sum(s > best for s in wrong)
        found.append((*ranks, math.fsum(precisions) / len(precisions)))
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_ranks_equal_a_naive_double_loop(tied: bool, seed: int) -> None:
    own = captions(25, seed)
    relevance = Relevance.of(own)
    torch.manual_seed(seed)
    shape = (len(relevance.texts), 4)
    # on the corners of a cube all cosines are exact, and most of them are tied
    images = torch.randint(0, 2, (25, 4)) * 2.0 - 1 if tied else torch.randn(25, 4)
    texts = torch.randint(0, 2, shape) * 2.0 - 1 if tied else torch.randn(shape)
    sides = {"image": images, "text": texts[relevance.text]}
    strings = {"image": [set(c) for c in own], "text": [{c} for c in itertools.chain(*own)]}
    for direction in DIRECTIONS:
        (query, gallery), (query_texts, gallery_texts) = ([x[s] for s in SIDES[direction]] for x in (sides, strings))
        unit = [x / x.norm(dim=1, keepdim=True) for x in (query, gallery)]
        expected = naive((unit[0] @ unit[1].T).tolist(), query_texts, gallery_texts)
        found = rank_pairs(query, gallery, relevance.positives[direction])
        assert found.first.tolist() == [e[0] for e in expected]
        assert found.optimistic.tolist() == [e[1] for e in expected]
        assert found.ap.tolist() == pytest.approx([e[2] for e in expected], abs=1e-12)
        said = found.recalls()
        assert said["r@5"] == sum(e[0] <= 5 for e in expected) / len(expected)
        assert said["tied"] == sum(e[0] != e[1] for e in expected) / len(expected)
        assert (said["tied"] > 0) == tied and said["gallery"] == len(gallery)
        if not tied:
            topk = (unit[0] @ unit[1].T).topk(5).indices.tolist()
            hits = [any(query_texts[q] & gallery_texts[j] for j in row) for q, row in enumerate(topk)]
            assert said["r@5"] == sum(hits) / len(hits)


def test_collapsed_embeddings_score_nothing_and_say_why() -> None:
    relevance = Relevance.of([[f"caption {i}"] for i in range(30)])
    said = evaluate_pairs(torch.ones(30, 4), torch.ones(30, 4), relevance)
    assert all(said[d]["r@10"] == 0 and said[d]["tied"] == 1 for d in DIRECTIONS)


def test_the_order_of_the_gallery_changes_nothing() -> None:
    own = captions(20, 7)
    torch.manual_seed(0)
    vectors = {c: torch.randn(3).round() + 0.5 for c in sorted(set(itertools.chain(*own)))}
    images, order = torch.randn(20, 3).round() + 0.5, torch.randperm(20)
    found = []
    for rows in (torch.arange(20), order):
        relevance = Relevance.of([own[i] for i in rows])
        found.append(evaluate_pairs(images[rows], torch.stack([vectors[t] for t in relevance.texts]), relevance))
    assert found[0]["I2T"] == pytest.approx(found[1]["I2T"]) and found[0]["T2I"] == pytest.approx(found[1]["T2I"])


def test_chance_and_class_oracle_equal_an_enumeration() -> None:
    own = [["a", "b"], ["a"], ["c", "d", "c"], ["b", "e"]]
    labels = torch.tensor([0, 0, 1, 1])
    relevance = Relevance.of(own)
    strings = {"image": [set(c) for c in own], "text": [{c} for c in itertools.chain(*own)]}
    classes = {"image": [0, 0, 1, 1], "text": [0, 0, 0, 1, 1, 1, 1, 1]}
    for direction, k in itertools.product(DIRECTIONS, (1, 2)):
        (queries, gallery), (qc, gc) = ([x[s] for s in SIDES[direction]] for x in (strings, classes))
        random_hits, oracle_hits = [], []
        for q, texts in enumerate(queries):
            draws = list(itertools.permutations(range(len(gallery)), k))
            random_hits.append(sum(any(texts & gallery[j] for j in d) for d in draws) / len(draws))
            same = [j for j in range(len(gallery)) if gc[j] == qc[q]]
            draws = list(itertools.permutations(same, k))
            oracle_hits.append(sum(any(texts & gallery[j] for j in d) for d in draws) / len(draws))
        assert relevance.chance(direction, k) == pytest.approx(sum(random_hits) / len(queries))
        assert relevance.class_oracle(direction, labels, k) == pytest.approx(sum(oracle_hits) / len(queries))
    assert relevance.chance_by_index() == 1 / 4  # of images; captions: mean of (2 + 1 + 3 + 2) / 4 of 8


def test_by_index_a_caption_fits_its_own_image_alone() -> None:
    relevance = Relevance.of([["a", "b"], ["a"]], by_string=False)
    assert relevance.texts == ["a", "b", "a"] and relevance.positives["T2I"].items.tolist() == [0, 0, 1]
    assert relevance.positives["I2T"].items.tolist() == [0, 1, 2]


def test_lists_that_do_not_fit_are_refused() -> None:
    relevance = Relevance.of([["a"], ["b"]])
    with pytest.raises(ValueError, match="2 queries and 2 gallery items, got 3 and 2"):
        rank_pairs(torch.ones(3, 2), torch.ones(2, 2), relevance.positives["I2T"])
