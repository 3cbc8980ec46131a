"""Rankings against scikit-learn and naive loops, on inputs made to break them: ties, negative cosines, shuffled ids."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from benchmark.retrieval import Block, Cell, Ranking, rank, rank_sharded

BACKENDS = ("lookup", "compare", "sort")


def reference(scores: np.ndarray, query_labels, gallery_labels, own: np.ndarray | None = None) -> Ranking:
    """One query after the other from a full score matrix; `own` marks the entries that are no candidates."""
    ap, first, positives = [], [], []
    for i, row in enumerate(scores):
        kept = np.ones(len(row), bool) if own is None else ~own[i]
        s, relevant = row[kept], (np.asarray(gallery_labels) == int(query_labels[i]))[kept]
        positives.append(int(relevant.sum()))
        ap.append(average_precision_score(relevant, s) if relevant.any() else math.nan)
        position = 0
        if relevant.any():
            best, position = max(s[relevant]), 1
            for value, hit in zip(s, relevant):
                position += int(not hit and value >= best)
        first.append(position)
    return Ranking(torch.tensor(ap, dtype=torch.float64), torch.tensor(first), torch.tensor(positives))


def assert_equal(got: Ranking, expected: Ranking, tolerance: float = 0.0) -> None:
    assert torch.equal(got.positives, expected.positives)
    assert torch.equal(got.first, expected.first)
    torch.testing.assert_close(got.ap, expected.ap, rtol=0, atol=tolerance, equal_nan=True)


def signs(n: int, dim: int = 16, seed: int = 0) -> Tensor:
    """Vectors of +-1: with 16 or 64 dims cosines are exact in any order of summation, and most scores are tied."""
    return torch.randint(0, 2, (n, dim), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def labels(n: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))


def noise(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def cosine64(q: Tensor, g: Tensor) -> np.ndarray:
    q, g = q.double(), g.double()
    return ((q / q.norm(dim=1, keepdim=True)) @ (g / g.norm(dim=1, keepdim=True)).T).numpy()


@pytest.fixture(scope="module")
def tied():
    """150 queries against 400 items, ids shuffled, 60 items in both lists; label 9 has no item in the gallery."""
    q, g, ql, gl = signs(150), signs(400, seed=1), labels(150, 10), labels(400, 9, seed=1)
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(2)) * 7919 - 10**6
    return q, g, ql, gl, ids[:150], ids[90:490]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_tied_scores_equal_sklearn_and_the_naive_loop(tied, backend, similarity):
    q, g, ql, gl, qi, gi = tied
    own = qi[:, None].numpy() == gi.numpy()
    assert own.sum() == 60
    scores = cosine64(q, g) if similarity == "cosine" else -(torch.cdist(q.double(), g.double()) ** 2).round().numpy()
    expected = reference(scores, ql, gl, own)
    got = rank(q, g, ql, gl, query_ids=qi, gallery_ids=gi, similarity=similarity, backend=backend)
    assert_equal(got, expected, 1e-12)
    assert 0 < expected.ap.isnan().sum() < 150


@pytest.mark.parametrize("classes", [2, 7, 150])
def test_continuous_scores_equal_sklearn(classes):
    q, g, ql, gl = noise(80, 24), noise(300, 24, 1), labels(80, classes), labels(300, classes, 1)
    assert_equal(rank(q, g, ql, gl), reference(cosine64(q, g), ql, gl), 1e-12)


@pytest.mark.parametrize("scale,offset", [(1, 0), (1, 100), (1e-3, 0), (1e4, 3e4)])
def test_l2_equals_naive_float64_distances(scale, offset):
    q, g, ql, gl = (
        (noise(60, 32) * scale + offset),
        (noise(300, 32, 1) * scale + offset),
        labels(60, 8),
        labels(300, 8, 1),
    )
    expected = reference(
        -torch.cdist(q.double(), g.double(), compute_mode="donot_use_mm_for_euclid_dist").numpy(), ql, gl
    )
    got = rank(q, g, ql, gl, similarity="l2")
    torch.testing.assert_close(got.ap, expected.ap, rtol=0, atol=1e-3)  # near-ties may swap in fp32
    assert (got.first == expected.first).float().mean() > 0.95
    assert abs(got.metrics()["map"] - expected.metrics()["map"]) < 1e-5


def test_negative_cosines_are_ranked_like_others():
    q = torch.tensor([[1.0, 0.0]])
    g = torch.tensor([[-0.1, 1.0], [-0.5, 1.0], [-1.0, 0.1]])  # all cosines below 0; the positive comes first
    got = rank(q, g, torch.tensor([0]), torch.tensor([0, 1, 1]))
    assert got.metrics() == {"cmc@1": 1.0, "cmc@5": 1.0, "map": 1.0, "queries": 1, "dropped": 0}


def test_ties_count_against_us_and_single_query():
    one = torch.ones(1, 4)
    got = rank(one, one.expand(5, 4), torch.tensor([3]), torch.tensor([3, 3, 0, 0, 0]))
    assert (got.first.item(), got.positives.item(), got.ap.item()) == (4, 2, 0.4)
    assert got.metrics(ks=(3, 4)) == {"cmc@3": 0.0, "cmc@4": 1.0, "map": 0.4, "queries": 1, "dropped": 0}


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_a_collapsed_model_finds_nothing(similarity):
    """Equal vectors tie with everything: the first positive stands behind all negatives."""
    labels = torch.arange(40) % 4
    found = rank(torch.ones(40, 3), torch.ones(40, 3), labels, labels, similarity=similarity)
    assert found.metrics()["cmc@1"] == found.metrics()["cmc@5"] == 0
    assert found.first.tolist() == [31] * 40 and found.ap.tolist() == pytest.approx([0.25] * 40)


def test_own_item_is_excluded_across_models_by_id_alone():
    """Two models embed one list; the gallery is stored in another order and one label differs."""
    n = 90
    new, old, y = noise(n, 16), noise(n, 16, 1), labels(n, 5)
    ids = torch.randperm(10**6, generator=torch.Generator().manual_seed(3))[:n] - 500_000
    move = torch.randperm(n, generator=torch.Generator().manual_seed(4))
    gallery_labels = y.clone()
    gallery_labels[7] = (y[7] + 1) % 5  # excluded as a negative, too
    expected = reference(cosine64(new, old), y, gallery_labels, np.eye(n, dtype=bool))
    got = rank(new, old[move], y, gallery_labels[move], query_ids=ids, gallery_ids=ids[move])
    assert_equal(got, expected, 1e-12)
    with_own = rank(new, old[move], y, gallery_labels[move])
    assert with_own.positives.sum() == got.positives.sum() + n - 1


def test_a_class_of_one_has_no_positive_once_excluded():
    ids = torch.arange(3)
    got = rank(signs(3), signs(3), ids, ids, query_ids=ids, gallery_ids=ids)
    assert got.first.tolist() == [0, 0, 0] and got.positives.tolist() == [0, 0, 0] and got.ap.isnan().all()
    assert got.metrics() == {"cmc@1": None, "cmc@5": None, "map": None, "queries": 0, "dropped": 3}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_bits_do_not_depend_on_order_chunks_shards_or_blocks(tied, similarity, backend):
    q, g, ql, gl, qi, gi = tied
    options = {"similarity": similarity, "backend": backend}
    expected = rank(q, g, ql, gl, query_ids=qi, gallery_ids=gi, **options)
    move = torch.randperm(400, generator=torch.Generator().manual_seed(5))
    assert_equal(rank(q, g[move], ql, gl[move], query_ids=qi, gallery_ids=gi[move], **options), expected)
    assert_equal(rank(q, g, ql, gl, query_ids=qi, gallery_ids=gi, buffer_mb=0, **options), expected)  # chunks of 16
    for parts in (1, 3, 40):
        shards = [
            Cell([Block(torch.arange(len(r)), q, g[r])], ql, gl[r], qi, gi[r], **options)
            for r in move.tensor_split(parts)
        ]
        assert_equal(rank_sharded(shards), expected)
    blocks = [Block(r, q, g[r]) for r in (move[:0], move[:150], move[150:])]  # the first one has no item
    assert_equal(Cell(blocks, ql, gl, qi, gi, **options).rank(), expected)


def test_l2_is_exact_on_dyadic_inputs_far_from_the_origin(tied):
    q, g, ql, gl, _, _ = tied
    expected = rank(q, g, ql, gl, similarity="l2")
    assert_equal(rank(q / 8 + 1000, g / 8 + 1000, ql, gl, similarity="l2"), expected)


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_blocks_are_served_by_their_own_queries(similarity):
    """A gallery in mid-backfill: old items (8 dims) meet one query vector, new items (24 dims) another."""
    old_q, new_q, old_g, new_g = noise(50, 8), noise(50, 24, 1), noise(120, 8, 2), noise(80, 24, 3)
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(6))
    ql, gl, qi, gi = labels(50, 4), labels(200, 4, 1), torch.arange(50), torch.arange(200) * 3
    scores = np.empty((50, 200))
    for part, q, g in ((rows[:120], old_q, old_g), (rows[120:], new_q, new_g)):
        scores[:, part] = cosine64(q, g) if similarity == "cosine" else -torch.cdist(q.double(), g.double()).numpy()
    blocks = [Block(rows[:120], old_q, old_g), Block(rows[120:], new_q, new_g)]
    got = Cell(blocks, ql, gl, qi, gi, similarity=similarity).rank()
    assert_equal(got, reference(scores, ql, gl, qi[:, None].numpy() == gi.numpy()), 1e-12)


@pytest.mark.parametrize("case", ["outlier", "collapsed", "many positives", "skewed classes"])
def test_look_up_equals_comparison_where_bins_are_of_no_help(case):
    q, g, y = noise(64, 16), noise(3000, 16, 1), labels(3000, 3, 1)
    if case == "outlier":  # all positives but one fall into one bin
        y = (torch.arange(3000) < 200).long()
        g[:199] = q[0] + 1e-4 * noise(199, 16, 2)
        g[199] = -q[0]
        q = q[:1].repeat(64, 1) + 1e-3 * q
    elif case == "collapsed":
        g, q = torch.ones(3000, 16), torch.ones(64, 16)
    elif case == "skewed classes":
        y = (noise(3000, 1, 2).squeeze().exp() * 3).long()
    ql = y[:64]
    assert_equal(rank(q, g, ql, y, backend="lookup"), rank(q, g, ql, y, backend="compare"))
    assert_equal(rank(q, g, ql, y, backend="lookup"), rank(q, g, ql, y, backend="sort"))


def test_inputs_of_any_float_and_integer_kind_give_the_same_ranking(tied):
    q, g, ql, gl, qi, gi = tied
    expected = rank(q, g, ql, gl, query_ids=qi, gallery_ids=gi)
    got = rank(
        q.half().requires_grad_(),
        g.double(),
        ql.to(torch.uint8),
        gl.to(torch.uint16),
        query_ids=qi.int(),
        gallery_ids=gi,
    )
    assert_equal(got, expected)


def test_scores_stay_fp32_and_the_callers_settings_survive():
    inputs = noise(60, 24), noise(300, 24, 1), labels(60, 5), labels(300, 5, 1)
    expected, before = rank(*inputs), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        settings = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(rank(*inputs), expected)
        assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision) == settings
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_strata_of_a_ranking():
    ranking = Ranking(torch.tensor([1.0, 0.5, math.nan]), torch.tensor([1, 3, 0]), torch.tensor([1, 2, 0]))
    assert ranking.metrics() == {"cmc@1": 0.5, "cmc@5": 1.0, "map": 0.75, "queries": 2, "dropped": 1}
    seen = torch.tensor([False, True, True])
    assert ranking.metrics(ks=(1,), select=seen) == {"cmc@1": 0.0, "map": 0.5, "queries": 1, "dropped": 1}
    none = torch.zeros(3, dtype=torch.bool)
    assert ranking.metrics(ks=(), select=none) == {"map": None, "queries": 0, "dropped": 0}
    with pytest.raises(ValueError, match="select must be a bool mask of 3 queries, got int64"):
        ranking.metrics(select=torch.arange(3))


def spoiled(x: Tensor, value: float, *rows: int) -> Tensor:
    x = x.clone()
    x[list(rows)] = value
    return x


Q, G, QL, GL = signs(4), signs(6, seed=1), torch.arange(4), torch.arange(6)
BAD_CALLS = {
    "queries have 16 dims, the gallery has 8: declare a link": (Q, G[:, :8], QL, GL, {}),
    "query_labels must be a tensor of 4 integers, one for each row, got int64 of shape (3,)": (Q, G, QL[:3], GL, {}),
    "gallery_labels must be a tensor of 6 integers, one for each row, got int64 of shape (6, 1)": (
        Q, G, QL, GL[:, None], {}),
    "query_labels must be a tensor of 4 integers, one for each row, got float32": (Q, G, QL.float(), GL, {}),
    "gallery_labels must be a tensor of 6 integers, one for each row, got bool": (Q, G, QL, GL > 2, {}),
    "gallery_labels must be a tensor of 6 integers, one for each row, got list": (Q, G, QL, GL.tolist(), {}),
    "queries: 2 rows with NaN or infinity": (spoiled(Q, math.nan, 1, 3), G, QL, GL, {}),
    "overflow in half precision (first: row 5)": (Q, spoiled(G, math.inf, 5), QL, GL, {}),
    "gallery: 1 zero vectors, which have no cosine": (Q, spoiled(G, 0.0, 2), QL, GL, {}),
    "look for a dead layer (first: row 0)": (spoiled(Q, 0.0, 0), G, QL, GL, {}),
    "gallery: 1 rows longer than 1e18": (Q, spoiled(G, 1e19, 2), QL, GL, {"similarity": "l2"}),
    "queries must be a non-empty (N, D) tensor of floats, got float32 of shape (0, 16)": (Q[:0], G, QL[:0], GL, {}),
    "gallery must be a non-empty (N, D) tensor of floats, got float32 of shape (0, 16)": (Q, G[:0], QL, GL[:0], {}),
    "queries must be a non-empty (N, D) tensor of floats, got int64": (Q.long(), G, QL, GL, {}),
    "gallery must be a non-empty (N, D) tensor of floats, got ndarray": (Q, G.numpy(), QL, GL, {}),
    "give both query_ids and gallery_ids": (Q, G, QL, GL, {"query_ids": QL}),
    "query_ids must be a tensor of 4 integers": (Q, G, QL, GL, {"query_ids": GL, "gallery_ids": GL}),
    "gallery_ids must be unique, but id 5 occurs more than once": (
        Q, G, QL, GL, {"query_ids": QL, "gallery_ids": torch.tensor([9, 5, 1, 2, 5, 0])},
    ),
    "similarity must be 'cosine' or 'l2', got 'dot'": (Q, G, QL, GL, {"similarity": "dot"}),
    "backend must be None, 'lookup', 'compare' or 'sort', got 'argsort'": (Q, G, QL, GL, {"backend": "argsort"}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
def test_what_cannot_be_ranked_is_refused_in_one_line(message):
    *inputs, options = BAD_CALLS[message]
    with pytest.raises(ValueError) as error:
        rank(*inputs, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_zero_vectors_have_distances():
    assert rank(spoiled(Q, 0.0, 0), G, QL, GL, similarity="l2").positives.tolist() == [1, 1, 1, 1]


def test_blocks_and_shards_that_do_not_fit_are_refused():
    half = torch.arange(3)
    with pytest.raises(ValueError, match="the blocks' rows must name each of the 6 gallery items once"):
        Cell([Block(half, Q, G[:3]), Block(half, Q, G[3:])], QL, GL)
    with pytest.raises(ValueError, match="a block needs 4 queries and 3 gallery items, got 2 and 3"):
        Cell([Block(half, Q, G[:3]), Block(half + 3, Q[:2], G[3:])], QL, GL)
    cell = Cell([Block(GL, Q, G)], QL, GL)
    with pytest.raises(ValueError, match="can be gone through only once"):
        rank_sharded(iter([cell]))
    with pytest.raises(ValueError, match="no shards: the gallery is empty"):
        rank_sharded([])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["compare", "sort", None])
@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_gpu_equals_cpu(tied, similarity, backend):
    q, g, ql, gl, qi, gi = tied
    expected = rank(q, g, ql, gl, query_ids=qi, gallery_ids=gi, similarity=similarity)
    options = {"query_ids": qi, "gallery_ids": gi, "similarity": similarity, "backend": backend}
    assert_equal(rank(q, g, ql, gl, device="cuda", **options), expected)
    torch.set_float32_matmul_precision("high")
    try:
        moved = rank(q.cuda(), g.cuda(), ql.cuda(), gl.cuda(), **options)
        big = noise(500, 128), noise(4000, 128, 1), labels(500, 20), labels(4000, 20, 1)
        torch.testing.assert_close(rank(*big, device="cuda").ap, rank(*big).ap, rtol=0, atol=1e-4)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_equal(moved, expected)
