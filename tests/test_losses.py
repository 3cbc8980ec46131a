"""Every loss term of the methods since BCT equals a naive loop in float64 written from its formula, gradients included."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmark import catalog
from benchmark.bridge import Bridge
from benchmark.embeddings import Embeddings
from benchmark.heads import Head
from benchmark.images import Batch
from benchmark.method import Context, Encoder
from benchmark.protocol import HeadSpec, Recipe, Release

N, K, OLD_K, DIM, B = 80, 5, 3, 6, 20
SCALE, SMOOTHING = 8.0, 0.1
NAMES = [  # variants included; maps between releases have their tests in test_bridges.py, SimCLR too
    name
    for name in catalog.names("method")
    if not issubclass(catalog.load("method", name), Bridge) and name != "SimCLR"
]
DIMS = [(6, 6), (6, 8), (6, 4)]  # old, new
Matrix = np.ndarray


# ------------------------------------------------------------------------------------------------------- fixtures


class Net(nn.Module):
    """A linear map that remembers its output, so that a test reads the gradient which reaches the backbone."""

    def __init__(self, dim: int, seed: int):
        super().__init__()
        self.linear = nn.Linear(64, dim, bias=False)
        with torch.no_grad():
            start = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))  # all nets resemble each other ...
            start = torch.cat([start, torch.zeros(max(dim - 16, 0), 64)])[:dim]
            change = torch.randn(dim, 64, generator=torch.Generator().manual_seed(seed))
            self.linear.weight.copy_(start + 0.7 * change)  # ... so some new embeddings lie within old boundaries

    def forward(self, x: Tensor) -> Tensor:
        self.out = self.linear(x.flatten(1))
        if self.out.requires_grad:
            self.out.retain_grad()
        return self.out


def images(labels: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(K, 1, 8, 8, generator=generator)[labels] + 1.3 * torch.randn(
        len(labels), 1, 8, 8, generator=generator
    )


LABELS = torch.arange(N) % K
LABELS[torch.arange(N) % 7 == 3] = 1  # classes of unequal size


def context(
    old_dim: int = DIM,
    dim: int = DIM,
    spec: HeadSpec | None = None,
    labels: Tensor = LABELS,
    noise: float = 0.15,
    **changes: Any,
) -> Context:
    spec = spec or HeadSpec("cosine", SCALE)
    old = Encoder(Net(old_dim, 11), old_dim, Head(torch.randn(OLD_K, old_dim), spec))
    oracle = Encoder(Net(dim, 12), dim, Head(torch.randn(K, dim), spec))
    x = images(labels)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        stored = old({"image": x})["main"]
        tail = torch.where(torch.arange(len(x)) % 6 == 0, 30.0, 3.0)[:, None]  # some outliers for the fences
        stored = stored + noise * tail * torch.randn(stored.shape, generator=generator)
    means = class_means(array(stored), labels.tolist())
    given: dict[str, Any] = {
        "t": 1,
        "seed": 0,
        "release": Release("new", "convnet", dim, recipe=Recipe(label_smoothing=SMOOTHING)),
        "classes": K,
        "similarity": "cosine",
        "backbone": partial(Net, seed=13),
        "head": lambda width: Head(torch.randn(K, width), spec, SMOOTHING),
        "prototype_head": lambda rows: Head(rows.clone(), spec, SMOOTHING).requires_grad_(False),
        "old_dim": old_dim,
        "encoders": {"old": old, "oracle": oracle},
        "means": {"old_means": torch.tensor(means, dtype=torch.float32)},
        "embeddings": {"old_train": Embeddings(torch.arange(len(x)), {(0, "main"): stored}, labels)},
        "loader": lambda view: [
            Batch(rows, {"image": x[rows]}, labels[rows]) for rows in torch.arange(len(x)).split(32)
        ],
    }
    return Context(**{**given, **changes})


def make(name: str, given: Mapping[str, Any] | None = None, refreshed: bool = True, **changes: Any) -> Any:
    """A method in the middle of its training."""
    cls, hyperparameters = catalog.method(name, given)
    torch.manual_seed(3)
    method = cls(context(**changes), **hyperparameters)
    method.done = 0.5
    if refreshed and hasattr(method, "refresh"):
        method.refresh()
    return method


def items(rows: Sequence[int] | range, labels: Tensor = LABELS) -> Batch:
    index = torch.tensor(list(rows))
    return Batch(index, {"image": images(labels)[index]}, labels[index])


def some(seed: int = 0, count: int = B) -> Batch:
    return items(torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:count].tolist())


def array(z: Tensor) -> Matrix:
    return z.detach().double().numpy()


def precise(method: Any, *batches: Batch) -> list[Batch]:
    """Everything in float64, for losses whose value float32 loses in the rounding of large logits."""
    method.double()
    for encoder in method.context.encoders.values():
        encoder.double()
    return [batch._replace(x={"image": batch.x["image"].double()}) for batch in batches]


def seen(method: Any, batch: Batch) -> tuple[dict[str, float], Matrix, Matrix, list[int]]:
    """Terms, new embeddings, old embeddings, labels."""
    terms = {name: value.item() for name, value in method.loss(batch).items()}
    old = array(method.context.encoders["old"](batch.x)["main"])
    return terms, array(method.backbone.out), old, batch.y.tolist()


def gradient(method: Any, batch: Batch, term: str) -> Matrix:
    """Of one term, at the output of the backbone; zeros where none arrives."""
    method.zero_grad()
    value = method.loss(batch)[term]
    out = method.backbone.out
    if value.requires_grad:
        value.backward()
    return np.zeros(out.shape) if out.grad is None else array(out.grad)


def stored(method: Any) -> tuple[Matrix, list[int]]:
    old = method.context.embeddings["old_train"]
    return array(old.views[0, "main"]), old.labels.tolist()


# ----------------------------------------------------------------------------------------------- naive references


def dot(a: Matrix, b: Matrix) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def unit(v: Matrix) -> Matrix:
    return v / math.sqrt(dot(v, v))


def units(rows: Matrix, dims: int | None = None) -> Matrix:
    return np.array([unit(row[:dims]) for row in rows])


def length(v: Matrix) -> float:
    return math.sqrt(dot(v, v))


def log_sum(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def cross_entropy(logits: Sequence[float], y: int, smoothing: float = SMOOTHING) -> float:
    logs = [x - log_sum(logits) for x in logits]
    return -(1 - smoothing) * logs[y] - smoothing * sum(logs) / len(logs)


def cosine_logits(z: Matrix, W: Matrix) -> list[float]:
    return [SCALE * dot(unit(z), unit(w)) for w in W]


def cosine_loss(z: Matrix, W: Matrix, y: list[int]) -> float:
    return float(np.mean([cross_entropy(cosine_logits(a, W), c) for a, c in zip(z, y)]))


def head_loss(method: Any, z: Matrix, y: list[int]) -> float:
    return cosine_loss(z, array(method.head.weight), y)


def class_means(rows: Matrix, labels: list[int], dims: int | None = None) -> Matrix:
    means = []
    for k in range(K):
        mine = [unit(row[:dims]) for row, c in zip(rows, labels) if c == k]
        means.append(sum(mine) / len(mine))
    return np.array(means)


def fenced(values: list[float]) -> list[float]:
    if len(values) < 4:
        return values
    low, high = np.percentile(values, 25), np.percentile(values, 75)
    return [v for v in values if low - 1.5 * (high - low) <= v <= high + 1.5 * (high - low)]


def slope(f: Callable[[Matrix], float], z: Matrix, step: float = 1e-5) -> Matrix:
    """Central differences."""
    result = np.zeros_like(z)
    for at in np.ndindex(*z.shape):
        up, down = z.copy(), z.copy()
        up[at] += step
        down[at] -= step
        result[at] = (f(up) - f(down)) / (2 * step)
    return result


def same(value: float, expected: float) -> None:
    assert expected != 0
    assert value == pytest.approx(expected, rel=1e-5)


def same_gradient(value: Matrix, expected: Matrix) -> None:
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=3e-4 * np.abs(expected).max())


# -------------------------------------------------------------------------------------------------------------- L2


@pytest.mark.parametrize("old_dim, dim", DIMS)
@pytest.mark.parametrize("name", ["L2", "L2-weakened", "L2-mse"])
def test_l2(name: str, old_dim: int, dim: int) -> None:
    method, d = make(name, {"weight": 3.0}, old_dim=old_dim, dim=dim), min(old_dim, dim)
    terms, z, o, y = seen(method, some())
    gaps = [unit(a[:d]) - unit(b[:d]) for a, b in zip(z, o)]
    expected = {
        "L2": np.mean([length(g) for g in gaps]),
        "L2-weakened": np.mean([max(length(g) - 0.2, 0) for g in gaps]),
        "L2-mse": np.mean([dot(g, g) / d for g in gaps]),
    }[name]
    same(terms["regression"], 3.0 * expected)
    same(terms["classification"], head_loss(method, z, y))


def test_l2_costs_nothing_within_its_slack() -> None:
    method = make("L2", {"slack": 0.5})
    terms, z, o, _ = seen(method, some())
    lengths = [length(unit(a) - unit(b)) for a, b in zip(z, o)]
    assert 0 < sum(v < 0.5 for v in lengths) < B
    same(terms["regression"], 10.0 * np.mean([max(v - 0.5, 0) for v in lengths]))
    g = gradient(method, some(), "regression")
    assert [bool(np.any(row)) for row in g] == [v > 0.5 for v in lengths]


# ---------------------------------------------------------------------------------------------------------- MixBCT


def credible(rows: Matrix, labels: list[int], share: str, columns: bool = False) -> list[bool]:
    rows = units(rows)
    if columns:
        rows = np.array([unit(column) for column in rows.T]).T
    mask = [False] * len(rows)
    for k in range(K):
        mine = [i for i, c in enumerate(labels) if c == k]
        if not mine:
            continue
        mean = sum(rows[i] for i in mine) / len(mine)
        nearest = sorted(mine, key=lambda i: length(rows[i] - mean))
        for i in nearest[: math.ceil(Fraction(share) * len(mine))]:
            mask[i] = True
    return mask


@pytest.mark.parametrize("share", ["0.1", "0.5", "0.7", "0.9", "1.0"])
def test_mixbct_credible_samples(share: str) -> None:
    masks = {}
    for name, columns in (("MixBCT", False), ("MixBCT-reference", True)):
        method = make(name, {"credible_share": float(share)})
        masks[name] = method.credible.tolist()
        assert masks[name] == credible(*stored(method), share, columns)
    if share not in ("0.1", "1.0"):
        assert masks["MixBCT"] != masks["MixBCT-reference"]


def test_mixbct_credible_share_of_seventy_is_no_more_than_its_ceiling() -> None:
    labels = torch.tensor(
        [0] * 70 + [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    )  # 70 of class 0, and 0.9 * 70 > 63 in floating point
    method = make("MixBCT", labels=labels)
    assert int(method.credible[labels == 0].sum()) == 63
    assert method.credible.tolist() == credible(*stored(method), "0.9")


def test_mixbct_replaces_by_unit_vectors() -> None:
    method, batch = make("MixBCT", spec=HeadSpec("linear")), some(1)
    value = method.loss(batch)["classification"]
    value.backward()
    z, rows = array(method.backbone.out), stored(method)[0]
    for i, row in enumerate(array(method.backbone.out.grad)):
        if not np.any(row):
            z[i] = unit(rows[batch.index[i]])
    same(value.item(), raw_loss(array(method.head.weight), z, batch.y.tolist()))


@pytest.mark.parametrize("old_dim, dim", DIMS)
@pytest.mark.parametrize("name", ["MixBCT", "MixBCT-reference"])
def test_mixbct_replaced_rows_reach_the_head_alone(name: str, old_dim: int, dim: int) -> None:
    method, d, batch = make(name, old_dim=old_dim, dim=dim), min(old_dim, dim), some(1)
    value = method.loss(batch)["classification"]
    value.backward()
    replaced = [not np.any(row) for row in array(method.backbone.out.grad)]
    assert sum(replaced) == 6  # floor(0.3 * 20)
    rows, labels = stored(method)
    allowed = credible(rows[:, :d], labels, "0.9", name != "MixBCT")
    assert all(allowed[i] for i, out in zip(batch.index.tolist(), replaced) if out)
    z = array(method.backbone.out)
    for i, out in enumerate(replaced):
        if out:
            z[i] = np.concatenate([unit(rows[batch.index[i]][:d]), np.zeros(dim - d)])
    same(value.item(), head_loss(method, z, batch.y.tolist()))
    weight, got = array(method.head.weight), array(method.head.weight.grad)
    same_gradient(got, slope(lambda w: cosine_loss(z, w, batch.y.tolist()), weight))  # both populations move it


@pytest.mark.parametrize("count, expected", [(0, 0), (3, 3), (6, 6), (20, 6)])
def test_mixbct_replaces_no_more_than_are_credible(count: int, expected: int) -> None:
    method, batch = make("MixBCT"), some(2)
    method.credible.fill_(False)
    method.credible[batch.index[:count]] = True
    drawn = torch.zeros(B)
    for _ in range(200):
        mask = method.draw(batch.index)
        assert int(mask.sum()) == expected and not mask[count:].any()
        drawn += mask
    if count:  # without replacement and evenly
        assert (drawn[:count] - 200 * expected / count).abs().max() < 35


@pytest.mark.parametrize("share", ["0.1", "0.2", "0.3", "0.5", "0.7", "0.29", "0.58"])
def test_mixbct_mask_has_floor_of_share_times_batch(share: str) -> None:
    method = make("MixBCT", {"share": float(share)})
    method.credible.fill_(True)
    sizes = {size: int(method.draw(torch.zeros(size, dtype=torch.int64)).sum()) for size in range(10, 401, 10)}
    assert sizes == {size: math.floor(Fraction(share) * size) for size in sizes}


def test_mixbct_share_zero_is_independent_training() -> None:
    method = make("MixBCT", {"share": 0.0})
    terms, z, _, y = seen(method, some())
    same(terms["classification"], head_loss(method, z, y))


# ---------------------------------------------------------------------------------------------------------- AdvBCT


def balls(rows: Matrix, labels: list[int], dims: int) -> tuple[Matrix, list[float], list[int]]:
    """Centres, r_k, number of radii kept."""
    centres = class_means(rows, labels, dims)
    kept = [
        fenced([length(unit(r[:dims]) - centres[k]) for r, c in zip(rows, labels) if c == k])
        for k in range(len(centres))
    ]
    return centres, [max(values) for values in kept], [len(values) for values in kept]


def outside(z: Matrix, y: list[int], method: Any, threshold: float) -> tuple[float, int]:
    """L_p2s, and how many samples violate."""
    d = method.shared
    centres, radius, kept = balls(*stored(method), d)
    violations = []
    for row, c in zip(z, y):
        gap = abs(radius[c] - threshold) / (1 + math.exp(-method.elastic[c].item()))
        elastic = radius[c] + gap if radius[c] < threshold else radius[c] - gap
        excess = length(unit(row[:d]) - centres[c]) - elastic
        if excess > 0 and kept[c] > 1:
            violations.append(excess)
    return (sum(violations) / len(violations) if violations else 0.0), len(violations)


def discriminator(method: Any, rows: Matrix, target: int) -> float:
    first, norm, _, last = method.discriminator
    hidden = rows @ array(first.weight).T + array(first.bias)
    hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)  # of this population alone
    hidden = np.maximum(hidden * array(norm.weight) + array(norm.bias), 0)
    logits = hidden @ array(last.weight).T + array(last.bias)
    return float(np.mean([cross_entropy(row.tolist(), target, 0.0) for row in logits]))


def confusion(method: Any, z: Matrix, o: Matrix) -> float:
    d = method.shared
    new, old = z[:, :d], o[:, :d]
    if method.normalise:
        new, old = units(new), units(old)
    return discriminator(method, new, 0) + discriminator(method, old, 1)


@pytest.mark.parametrize("old_dim, dim", [(6, 6), (6, 8)])
@pytest.mark.parametrize("name", ["AdvBCT", "AdvBCT-faces"])
@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_advbct(name: str, threshold: float, old_dim: int, dim: int) -> None:
    method = make(name, {"threshold": threshold}, old_dim=old_dim, dim=dim)
    weight, batch = (4.0 if name == "AdvBCT-faces" else 1.0), some()
    terms, z, o, y = seen(method, batch)
    _, radius, kept = balls(*stored(method), old_dim)
    assert sum(kept) < N  # the fences leave some out
    np.testing.assert_allclose(array(method.radius), radius, rtol=1e-5)
    expected, violating = outside(z, y, method, threshold)
    assert violating
    same(terms["boundary"], weight * expected)
    same(terms["adversarial"], weight * 0.5 * confusion(method, z, o))
    same(terms["classification"], head_loss(method, z, y))


def test_advbct_radius_stretches_below_the_threshold_and_shrinks_above() -> None:
    radii = array(make("AdvBCT").radius)
    threshold = float(np.sort(radii)[2]) + 1e-3  # three balls stretch, two shrink
    method = make("AdvBCT", {"threshold": threshold})
    expected, violating = outside(
        array(method.backbone(some(3, 60).x["image"])), some(3, 60).y.tolist(), method, threshold
    )
    assert 0 < violating < 60
    same(method.loss(some(3, 60))["boundary"].item(), expected)


def test_advbct_ball_moves_its_learned_radius() -> None:
    method, batch = make("AdvBCT", {"threshold": 0.1}), some()
    method.loss(batch)["boundary"].backward()
    z, y, start = array(method.backbone.out), batch.y.tolist(), method.elastic.detach().clone()

    def value(elastic: Matrix) -> float:
        method.elastic.data = torch.tensor(elastic)
        return outside(z, y, method, 0.1)[0]

    expected = slope(value, array(start), 1e-6)
    same_gradient(array(method.elastic.grad), expected)
    method.elastic.data = start
    same_gradient(gradient(method, batch, "boundary"), slope(lambda z: outside(z, y, method, 0.1)[0], z.copy(), 1e-6))


def test_advbct_skips_a_class_with_one_sample() -> None:
    labels = torch.arange(N) % (K - 1)
    labels[7] = K - 1
    method = make("AdvBCT", {"threshold": 0.1}, labels=labels)
    assert method.bounded.tolist() == [True] * (K - 1) + [False]
    alone = items([7, 7], labels)
    assert method.loss(alone)["boundary"].item() == 0
    assert not gradient(method, alone, "boundary").any()
    batch = items([7, *range(30, 49)], labels)
    terms, z, _, y = seen(method, batch)
    same(terms["boundary"], outside(z, y, method, 0.1)[0])


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("done", [0.0, 0.1, 0.5, 0.9])
def test_advbct_reverses_the_backbones_gradient_alone(done: float, normalise: bool) -> None:
    method, batch = make("AdvBCT", {"normalise": normalise, "adversarial": 2.0}), some(0, 10)
    method.done = done
    reference = copy.deepcopy(method.discriminator)
    got = gradient(method, batch, "adversarial")
    z, o = method.backbone.out.detach(), method.context.encoders["old"](batch.x)["main"]
    same(method.loss(batch)["adversarial"].item(), 2.0 * (1 - done) * confusion(method, array(z), array(o)))
    plain = 2.0 * (1 - done) * slope(lambda v: confusion(method, v, array(o)), array(z), 1e-6)
    strength = 2 / (1 + math.exp(-10 * done)) - 1
    if done == 0:
        assert not got.any() and plain.any()
    else:
        same_gradient(got, -strength * plain)
    # the discriminator's own: of the plain loss, whatever the reversal's strength
    if normalise:
        z, o = nn.functional.normalize(z), nn.functional.normalize(o)
    logs = reference(z).log_softmax(1)[:, 0].mean() + reference(o).log_softmax(1)[:, 1].mean()
    (-2.0 * (1 - done) * logs).backward()
    for mine, theirs in zip(method.discriminator.parameters(), reference.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- UniBCT


def refined(method: Any, propagation: float, temperature: float, columns: bool) -> Matrix:
    """Prototypes by iteration of V <- l A V + (1 - l) V_o, on all training images."""
    old, labels = stored(method)
    x = images(torch.tensor(labels))
    new = units(array(method.backbone.linear(x.flatten(1))))
    old = units(old, method.shared)
    rows = []
    for k in range(K):
        mine = [i for i, c in enumerate(labels) if c == k]
        n = len(mine)
        A = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                if i != j:
                    A[i, j] = math.exp((dot(new[mine[i]], new[mine[j]]) - 1) / temperature)
        A = A / A.sum(axis=0 if columns else 1, keepdims=True)
        start = old[mine]
        V = start.copy()
        for _ in range(math.ceil(math.log(1e-12) / math.log(propagation))):
            V = propagation * A @ V + (1 - propagation) * start
        rows.append(V.mean(0))
    return np.array(rows)


@pytest.mark.parametrize("old_dim, dim", DIMS)
@pytest.mark.parametrize("propagation, temperature", [(0.9, 0.05), (0.5, 0.2), (0.99, 0.02)])
def test_unibct_refinement_is_the_limit_of_the_propagation(
    propagation: float, temperature: float, old_dim: int, dim: int
) -> None:
    given = {"propagation": propagation, "temperature": temperature, "weight": 3.0}
    method = make("UniBCT", given, old_dim=old_dim, dim=dim)
    expected = refined(method, propagation, temperature, columns=False)
    np.testing.assert_allclose(array(method.old_head.weight), expected, rtol=1e-5, atol=1e-6)
    terms, z, _, y = seen(method, some())
    same(terms["influence"], 3.0 * cosine_loss(z[:, : min(old_dim, dim)], expected, y))
    same(terms["classification"], head_loss(method, z, y))


def test_unibct_reference_refines_nothing() -> None:
    for name, columns in (("UniBCT", False), ("UniBCT-reference", True)):
        method = make(name)
        plain = class_means(*stored(method))
        got, naive = array(method.old_head.weight), refined(method, 0.9, 0.05, columns)
        np.testing.assert_allclose(got, naive, rtol=1e-5, atol=1e-6)
        apart = np.abs(got - plain).max()
        assert apart < 1e-6 if columns else apart > 1e-3
        assert (np.abs(naive - plain).max() < 1e-9) == columns


def test_unibct_waits_for_its_first_refresh() -> None:
    method = make("UniBCT", refreshed=False)
    assert method.loss(some())["influence"].item() == 0
    before = [parameter.clone() for parameter in method.backbone.parameters()]
    method.refresh()
    assert method.loss(some())["influence"].item() > 0
    assert all(torch.equal(a, b) for a, b in zip(before, method.backbone.parameters()))
    assert method.backbone.training and not method.old_head.weight.requires_grad
    assert {"active", "old_head.weight"} <= set(method.state_dict())  # a resumed run knows both


@pytest.mark.parametrize("epochs, expected", [(35, [10, 20]), (7, [2, 4]), (70, [20, 40]), (3, [1, 2])])
def test_unibct_refreshes_at_ten_and_twenty_of_35(epochs: int, expected: list[int]) -> None:
    method, calls = make("UniBCT", refreshed=False), []
    method.refresh = lambda: calls.append(method.trainer.current_epoch)
    method._trainer = SimpleNamespace(max_epochs=epochs, current_epoch=0)
    for method.trainer.current_epoch in range(epochs):
        method.on_train_epoch_start()
    assert calls == expected


def test_unibct_class_with_one_sample_keeps_it() -> None:
    labels = LABELS.clone()
    labels[labels == 4] = 0
    labels[9] = 4
    method = make("UniBCT", labels=labels)
    np.testing.assert_allclose(array(method.old_head.weight)[4], unit(stored(method)[0][9]), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ CoReS, HOC


@pytest.mark.parametrize("vertices", [2, 5, 9, 100])
def test_cores_simplex(vertices: int) -> None:
    method = make("CoReS", {"preallocated": max(vertices, K)})
    S = array(method.head.weight) if vertices >= K else array(type(method).__init__.__globals__["simplex"](vertices))
    assert S.shape == (vertices, vertices - 1)
    for i in range(vertices):
        for j in range(vertices):
            assert dot(S[i], S[j]) == pytest.approx(1 if i == j else -1 / (vertices - 1), abs=1e-6)
    np.testing.assert_allclose(S.sum(0), 0, atol=1e-5)
    assert not method.head.weight.requires_grad


def raw_loss(S: Matrix, z: Matrix, y: list[int]) -> float:
    return float(np.mean([cross_entropy([dot(a, w) for w in S], c) for a, c in zip(z, y)]))


@pytest.mark.parametrize("t", [0, 1])
@pytest.mark.parametrize("name", ["CoReS", "HOC"])
def test_cores_and_the_first_hoc_have_raw_logits_of_the_simplex(name: str, t: int) -> None:
    method = make(name, {"preallocated": 9}, t=t)
    terms, z, _, y = seen(method, some())
    share = 0.1 if name == "HOC" and t else 1.0
    same(terms["classification"], share * raw_loss(array(method.head.weight), z, y))
    assert set(terms) == ({"classification", "contrast"} if name == "HOC" and t else {"classification"})


@pytest.mark.parametrize("old_dim, preallocated", [(6, 9), (6, 7), (8, 6)])
@pytest.mark.parametrize("name", ["HOC", "HOC-reference"])
def test_hoc_contrast(name: str, old_dim: int, preallocated: int) -> None:
    given = {"preallocated": preallocated, "classification": 0.3, "scale": 5.0}
    method, d = make(name, given, old_dim=old_dim), min(old_dim, preallocated - 1)
    batch = some()
    terms, z, o, y = seen(method, batch)

    def contrast(z: Matrix) -> float:
        total = 0.0
        for i in range(B):
            exponents = []
            for j in range(B):
                s = 5.0 * dot(unit(o[i][:d]), unit(z[j][:d]))
                if name == "HOC-reference":
                    exponents.append(s if y[i] != y[j] else 0.0)
                elif i == j or y[i] != y[j]:
                    exponents.append(s)
            total += log_sum(exponents) - 5.0 * dot(unit(o[i][:d]), unit(z[i][:d]))
        return 0.7 * total / B

    same(terms["contrast"], contrast(z))
    same(terms["classification"], 0.3 * raw_loss(array(method.head.weight), z, y))
    if preallocated == 6:
        same_gradient(gradient(method, batch, "contrast"), slope(contrast, z))  # through every z_j


# ------------------------------------------------------------------------------------- Contrastive, RACT, triplets


def negatives(row: int, query: Matrix, pool: Matrix, y: list[int], count: int) -> list[float]:
    """The largest similarities to samples of other classes."""
    return sorted((dot(query, pool[k]) for k in range(len(y)) if y[k] != y[row]), reverse=True)[:count]


def info_nce(z: Matrix, fixed: Matrix, o: Matrix, y: list[int], tau: float, count: int, new_pool: bool) -> float:
    """`fixed`: the new embeddings as constants."""
    total = 0.0
    for i in range(len(y)):
        pools = negatives(i, z[i], o, y, count) + (negatives(i, z[i], fixed, y, count) if new_pool else [])
        own = dot(z[i], o[i]) / tau
        total += log_sum([own, *[s / tau for s in pools]]) - own
    return total / len(y)


LOPSIDED = [*[i for i, c in enumerate(LABELS.tolist()) if c == 1][:7], 0, 2]  # seven of class 1, two others


@pytest.mark.parametrize("old_dim, dim", DIMS)
@pytest.mark.parametrize("hardest, tau", [(10, 0.01), (3, 0.2), (30, 0.05)])
@pytest.mark.parametrize("name", ["Contrastive", "RACT"])
def test_contrastive_and_ract(name: str, hardest: int, tau: float, old_dim: int, dim: int) -> None:
    given = {"hardest": hardest, "temperature": tau, "weight": 2.0}
    method, d = make(name, given, old_dim=old_dim, dim=dim), min(old_dim, dim)
    for batch in precise(method, some(), items(LOPSIDED)):  # the latter has fewer than ten of other classes
        terms, z, o, y = seen(method, batch)
        z_, o_ = units(z, d), units(o, d)
        same(terms["contrast"], 2.0 * info_nce(z_, z_, o_, y, tau, hardest, name == "RACT"))
        same(terms["classification"], head_loss(method, z, y))


@pytest.mark.parametrize("name", ["Contrastive", "RACT", "Triplet", "RACT-triplet"])
def test_new_negatives_are_constants(name: str) -> None:
    method, batch = make(name, {"hardest": 3} | ({"temperature": 0.2} if "riplet" not in name else {})), some(0, 10)
    _, z, o, y = seen(method, batch)
    fixed, o_ = units(z), units(o)

    def value(v: Matrix, constant: Matrix | None = fixed) -> float:
        v = units(v)
        constant = v if constant is None else constant
        if "riplet" in name:
            return triplet(v, constant, o_, y, 0.8, 3, name == "RACT-triplet")
        return info_nce(v, constant, o_, y, 0.2, 3, name == "RACT")

    got = gradient(method, batch, "triplet" if "riplet" in name else "contrast")
    same_gradient(got, slope(value, z, 1e-6))
    if "RACT" in name:
        assert np.abs(slope(partial(value, constant=None), z, 1e-6) - got).max() > 1e-2 * np.abs(got).max()


def triplet(z: Matrix, fixed: Matrix, o: Matrix, y: list[int], margin: float, count: int, new_pool: bool) -> float:
    violations = []
    for i in range(len(y)):
        pools = negatives(i, z[i], o, y, count) + (negatives(i, z[i], fixed, y, count) if new_pool else [])
        for s in pools:
            violations.append(max(length(z[i] - o[i]) - math.sqrt(max(2 - 2 * s, 0)) + margin, 0))
    return sum(violations) / len(violations)


@pytest.mark.parametrize("old_dim, dim", DIMS)
@pytest.mark.parametrize("hardest, margin", [(10, 0.8), (3, 0.2), (30, 0.4)])
@pytest.mark.parametrize("name", ["Triplet", "RACT-triplet"])
def test_triplet(name: str, hardest: int, margin: float, old_dim: int, dim: int) -> None:
    given = {"hardest": hardest, "margin": margin, "weight": 2.0}
    method, d = make(name, given, old_dim=old_dim, dim=dim), min(old_dim, dim)
    for batch in precise(method, some(), items(LOPSIDED)):
        terms, z, o, y = seen(method, batch)
        z_, o_ = units(z, d), units(o, d)
        same(terms["triplet"], 2.0 * triplet(z_, z_, o_, y, margin, hardest, name == "RACT-triplet"))
        same(terms["classification"], head_loss(method, z, y))


@pytest.mark.parametrize("name", ["Contrastive", "RACT", "Triplet", "RACT-triplet", "HOC"])
def test_a_batch_of_one_class_has_no_negatives(name: str) -> None:
    method, batch = make(name), items([i for i, c in enumerate(LABELS.tolist()) if c == 1][:6])
    term = "triplet" if "riplet" in name else "contrast"
    assert method.loss(batch)[term].item() == pytest.approx(0, abs=1e-6)
    assert np.abs(gradient(method, batch, term)).max() < 1e-6


# ------------------------------------------------------------------------------------------------------------ NCCL


def consensus(rows: Matrix, means: Matrix, sigma2: float) -> list[bool]:
    mask = []
    for row in rows:
        logits = [-length(unit(row) - m) / sigma2 for m in means]
        logs = [x - log_sum(logits) for x in logits]
        mask.append(-sum(math.exp(v) * v for v in logs) <= 0.5 * math.log(len(means)))
    return mask


def soft_contrast(
    similarity: Callable[[int, Matrix], float],
    queue: list[tuple[Matrix, int]],
    o: Matrix,
    y: list[int],
    tau: float,
) -> float:
    total = 0.0
    for i in range(len(y)):
        logits = [similarity(i, q) / tau for q, _ in queue]
        denominator = log_sum(logits)
        positives = [j for j, (_, c) in enumerate(queue) if c == y[i]]
        if positives:
            total -= sum((1 + dot(o[i], queue[j][0])) / 2 * (logits[j] - denominator) for j in positives) / len(
                positives
            )
    return total / len(y)


def cosines(z: Matrix, W: Matrix) -> Matrix:
    return np.array([dot(unit(z), unit(w)) for w in W])


@pytest.mark.parametrize("sharpness", [0.03, 0.05, 0.1, 0.2])
def test_nccl_credibility(sharpness: float) -> None:
    method = make("NCCL", {"sharpness": sharpness})
    expected = consensus(stored(method)[0], array(method.context.means["old_means"]), sharpness)
    assert method.credible.tolist() == expected
    assert sharpness != 0.1 or 0 < sum(expected) < N
    assert make("NCCL-reference").credible.all() and make("NCCL", {"sharpness": 0.0}).credible.all()


@pytest.mark.parametrize("old_dim, dim, tau", [(6, 6, 1.0), (6, 8, 0.1), (6, 4, 0.2)])
@pytest.mark.parametrize("name", ["NCCL", "NCCL-reference"])
def test_nccl(name: str, old_dim: int, dim: int, tau: float) -> None:
    size = 45
    given = {"queue": size, "temperature": tau, "feature": 2.0, "logit": 0.5}
    given |= {"sharpness": 0.1} if name == "NCCL" else {}
    method, d = make(name, given, old_dim=old_dim, dim=dim), min(old_dim, dim)
    slots: list[tuple[Matrix, int] | None] = [None] * size
    pointer, credible_here = 0, method.credible.tolist()
    for step in range(5):
        batch = some(step)
        terms, z, o, y = seen(method, batch)
        o = units(o, d)
        for row, c, i in zip(o, y, batch.index.tolist()):
            if credible_here[i]:
                slots[pointer % size], pointer = (row, c), pointer + 1
        for slot, row, c in zip(slots, array(method.old), method.labels.tolist()):
            assert c == (-1 if slot is None else slot[1])
            np.testing.assert_allclose(row, 0 * row if slot is None else slot[0], atol=1e-6)
        queue = [slot for slot in slots if slot is not None]
        W = array(method.head.weight)
        z_, logits = units(z, d), [cosines(row, W) for row in z]
        keys = {id(q): cosines(np.concatenate([q, np.zeros(dim - d)]), W) for q, _ in queue}
        same(terms["feature"], 2.0 * soft_contrast(lambda i, q, z_=z_: dot(z_[i], q), queue, o, y, tau))
        same(
            terms["logit"],
            0.5 * soft_contrast(lambda i, q, ls=logits, keys=keys: dot(ls[i], keys[id(q)]), queue, o, y, tau),
        )
        same(terms["classification"], head_loss(method, z, y))
        assert len(queue) < size or step
    assert pointer > size + 10  # it wrapped around


def test_nccl_without_positives_contributes_nothing() -> None:
    method = make("NCCL", {"queue": 32})
    credible_before = method.credible.clone()
    method.credible.fill_(False)
    for term in ("feature", "logit"):  # an empty queue
        assert method.loss(some())[term].item() == 0
        assert not gradient(method, some(), term).any()
    method.credible.copy_(credible_before & (LABELS == 2))
    batch = some(0, 40)
    terms, z, o, y = seen(method, batch)
    o_ = units(o)
    queue = [(o_[i], 2) for i in range(40) if y[i] == 2 and credible_before[batch.index[i]]]
    assert len(queue) > 1
    z_ = units(z)
    same(terms["feature"], soft_contrast(lambda i, q: dot(z_[i], q), queue, o_, y, 1.0))
    g = gradient(method, batch, "feature")
    assert all(bool(np.any(row)) == (c == 2) for row, c in zip(g, y))


def test_nccl_pushes_credible_samples_alone_and_its_own_batch_first() -> None:
    method, batch = make("NCCL", {"sharpness": 0.1, "queue": 64}), some()
    method.loss(batch)
    kept = [c for c, i in zip(batch.y.tolist(), batch.index.tolist()) if method.credible[i]]
    assert 0 < len(kept) < B
    assert method.labels.tolist() == kept + [-1] * (64 - len(kept))
    assert {"old", "labels", "next"} <= set(method.state_dict())


def test_nccl_queue_shorter_than_the_batch_keeps_the_latest() -> None:
    """First in, first out: as if the samples had entered one by one."""
    method, batch = make("NCCL", {"queue": 12, "sharpness": 0.0}), some()
    method.loss(batch)
    assert sorted(method.labels.tolist()) == sorted(batch.y.tolist()[-12:])


@pytest.mark.parametrize("term", ["feature", "logit"])
def test_nccl_gradients(term: str) -> None:
    method, batch, tau = (
        make("NCCL", {"temperature": 0.2, "logit": 1.0, "queue": 64, "sharpness": 0.0}),
        some(0, 10),
        0.2,
    )
    method.loss(some(5))  # others are in the queue already
    got = gradient(method, batch, term)
    z, o, y, W = array(method.backbone.out), array(method.context.encoders["old"](batch.x)["main"]), batch.y, None
    o_, W = units(o), array(method.head.weight)
    queue = [(row, c) for row, c in zip(array(method.old), method.labels.tolist()) if c >= 0]
    keys = {id(q): cosines(q, W) for q, _ in queue}

    def value(v: Matrix, weight: Matrix = W) -> float:
        rows = units(v) if term == "feature" else [cosines(row, weight) for row in v]
        key = (lambda q: q) if term == "feature" else (lambda q: keys[id(q)])
        return soft_contrast(lambda i, q: dot(rows[i], key(q)), queue, o_, y.tolist(), tau)

    same_gradient(got, slope(value, z))
    if term == "logit":  # the queue's logits are constants: the head moves through the new ones alone
        same_gradient(array(method.head.weight.grad), slope(lambda w: value(z, w), W))


def test_nccl_reference_leaves_the_logit_term_inert() -> None:
    method, corrected = make("NCCL-reference"), make("NCCL", {"sharpness": 0.0})
    inert, alive = method.loss(some())["logit"], corrected.loss(some())["logit"]
    assert alive.requires_grad and not inert.requires_grad
    same(inert.item(), alive.item())
    assert gradient(method, some(), "feature").any()


# ------------------------------------------------------------------------------------------------------------- LCE


def angle(a: Matrix, b: Matrix) -> float:
    return math.acos(max(-1.0, min(1.0, dot(unit(a), unit(b)))))


def cones(rows: Matrix, labels: list[int], dims: int) -> tuple[Matrix, list[float]]:
    centres = class_means(rows, labels, dims)
    return centres, [
        max(fenced([angle(r[:dims], centres[k]) for r, c in zip(rows, labels) if c == k])) for k in range(K)
    ]


@pytest.mark.parametrize("old_dim, dim", [(6, 6), (6, 8)])
def test_lce(old_dim: int, dim: int) -> None:
    method = make("LCE", {"boundary": 3.0, "align": 2.0}, old_dim=old_dim, dim=dim, noise=0.05)
    batch = some(1, 60)
    terms, z, _, y = seen(method, batch)
    rows, labels = stored(method)
    centres, widest = cones(rows, labels, old_dim)
    unfenced = [max(angle(r, centres[k]) for r, c in zip(rows, labels) if c == k) for k in range(K)]
    assert widest != unfenced  # outliers are left out
    np.testing.assert_allclose(array(method.widest), widest, rtol=1e-5)

    def boundary(z: Matrix) -> float:
        return float(np.mean([max(angle(a[:old_dim], centres[c]) - widest[c], 0) for a, c in zip(z, y)]))

    def align(W: Matrix) -> float:
        return float(np.mean([1 - dot(unit(w[:old_dim]), unit(c)) for w, c in zip(W, centres)]))

    inside = sum(angle(a[:old_dim], centres[c]) < widest[c] for a, c in zip(z, y))
    assert 0 < inside < len(y)
    same(terms["boundary"], 3.0 * boundary(z))
    same(terms["align"], 2.0 * align(array(method.head.weight)))
    same(terms["classification"], head_loss(method, z, y))
    assert not gradient(method, batch, "align").any()  # moves the head alone
    same_gradient(array(method.head.weight.grad), 2.0 * slope(align, array(method.head.weight)))
    same_gradient(gradient(method, batch, "boundary"), 3.0 * slope(boundary, z))


# ---------------------------------------------------------------------------- class centres where the old dims are cut


def test_class_centres_are_means_of_cut_unit_embeddings_in_advbct() -> None:
    """c_k is the mean of the unit old embeddings: of the same vectors whose distances to it make r_k."""
    method = make("AdvBCT", {"threshold": 0.1}, old_dim=8, dim=4)
    centres, radius, _ = balls(*stored(method), 4)
    np.testing.assert_allclose(array(method.centres), centres, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(array(method.radius), radius, rtol=1e-5)


def test_class_centres_are_means_of_cut_unit_embeddings_in_lce() -> None:
    method = make("LCE", old_dim=8, dim=4)
    centres, widest = cones(*stored(method), 4)
    np.testing.assert_allclose(array(method.centres), units(centres), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(array(method.widest), widest, rtol=1e-5)


def test_class_centres_are_means_of_cut_unit_embeddings_in_nccl() -> None:
    method = make("NCCL", {"sharpness": 0.1}, old_dim=8, dim=4)
    rows, labels = stored(method)
    assert method.credible.tolist() == consensus(rows[:, :4], class_means(rows, labels, 4), 0.1)


# ----------------------------------------------------------------------------------------------------- BCT, distilled


@pytest.mark.parametrize("old_dim, dim", DIMS)
def test_bct_distill(old_dim: int, dim: int) -> None:
    method, d = make("BCT-distill", {"weight": 2.0}, old_dim=old_dim, dim=dim), min(old_dim, dim)
    batch = some()
    terms, z, o, y = seen(method, batch)
    W = array(method.context.encoders["old"].head.weight)[:, :d]
    assert len(W) == OLD_K and 0 < sum(c >= OLD_K for c in y) < B

    def influence(z: Matrix) -> float:
        total = 0.0
        for a, b, c in zip(z, o, y):
            logits = cosine_logits(a[:d], W)
            if c < OLD_K:
                total += cross_entropy(logits, c)
            else:
                target = cosine_logits(b[:d], W)
                for k in range(OLD_K):
                    total -= math.exp(target[k] - log_sum(target)) * (logits[k] - log_sum(logits))
        return 2.0 * total / B

    same(terms["influence"], influence(z))
    same(terms["classification"], head_loss(method, z, y))
    same_gradient(gradient(method, batch, "influence"), slope(influence, z))


def test_bct_distill_with_a_scale_has_one_classifier() -> None:
    """`scale` replaces the old head's logits by scale * <z^, row>: in the distillation as well as with labels."""
    method = make("BCT-distill", {"scale": 1.0})
    terms, z, o, y = seen(method, some())
    W, total = array(method.context.encoders["old"].head.weight), 0.0
    for a, b, c in zip(z, o, y):
        logits, target = ([dot(unit(v), w) for w in W] for v in (a, b))
        if c < OLD_K:
            total += cross_entropy(logits, c)
        else:
            total -= sum(math.exp(t - log_sum(target)) * (v - log_sum(logits)) for v, t in zip(logits, target))
    same(terms["influence"], total / B)


@pytest.mark.parametrize("classes", [[0, 1, 2], [3, 4]])
def test_bct_distill_on_classes_of_one_kind(classes: list[int]) -> None:
    batch = items([i for i, c in enumerate(LABELS.tolist()) if c in classes][:12])
    head, distilled = make("BCT-head"), make("BCT-distill")
    torch.testing.assert_close(head.old_head.weight, distilled.old_head.weight)
    values = [m.loss(batch)["influence"].item() for m in (head, distilled)]
    if classes == [0, 1, 2]:
        assert values[0] == values[1] > 0
    else:
        assert values[0] == 0 < values[1]


# ------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize(
    "kind, scale, margin", [("arcface", 30.0, 0.3), ("cosface", 64.0, 0.4), ("linear", 1.0, 0.0), ("unit", 1.0, 0.0)]
)
@pytest.mark.parametrize("name", NAMES)
def test_losses_stay_finite_with_other_heads(name: str, kind: Any, scale: float, margin: float) -> None:
    method = make(name, spec=HeadSpec(kind, scale, margin))
    for seed in range(2):
        terms = method.loss(some(seed))
        assert all(math.isfinite(value.item()) for value in terms.values()), terms
        sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("case", ["equal", "opposite", "repeated"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_stay_finite_at_the_edges(name: str, case: str) -> None:
    """New embeddings that equal the old ones or oppose them, or are all the same; a class centre that is its only item."""
    labels = LABELS.clone()
    labels[labels == 4] = 0
    labels[9] = 4
    method = make(name, labels=labels, noise=0.0, spec=HeadSpec("arcface", 30.0, 0.3))
    old = method.context.encoders["old"].network.linear.weight
    net = next(module for module in method.backbone.modules() if isinstance(module, Net))
    with torch.no_grad():
        net.linear.weight.zero_()
        net.linear.weight[: len(old)] = -old if case == "opposite" else old
        if len(net.linear.weight) == 2 * len(old):  # BT2's two halves
            net.linear.weight[len(old) :] = old
    batch = items([9] * 12 if case == "repeated" else [9, *range(40, 59)], labels)
    if case == "equal" and len(net.linear.weight) == len(old):
        method.loss(batch)
        assert torch.equal(net.out.detach(), method.context.encoders["old"](batch.x)["main"])
    terms = method.loss(batch)
    assert all(math.isfinite(value.item()) for value in terms.values()), terms
    for value in terms.values():
        if value.requires_grad:
            method.zero_grad()
            value.backward(retain_graph=True)
            assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
