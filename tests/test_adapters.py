"""Each map against its formula in plain numpy, its optimality, its limits, and every input that is refused."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn import linear_model
from sklearn.cross_decomposition import CCA
from torch import Tensor
from torch.nn import functional as F

from benchmark.adapters import KINDS, RHOS, Adapter, Moments, check_pairs, fit, load, rebuild, save
from benchmark.adapters.learned import regulariser
from benchmark.errors import UserError

SMALL = {"ResidualMLP": {"epochs": 3, "hidden": 16}, "LocalProcrustes": {"clusters": 2}, "LowRank": {"rank": 2}}
STREAMING = [name for name, kind in KINDS.items() if kind.streams]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n: int, m: int, seed: int = 0) -> Tensor:
    """(n, m) with orthonormal rows (n <= m) or columns."""
    q = torch.linalg.qr(noise(max(n, m), max(n, m), seed=seed))[0]
    return q[:n, :m]


def drifted(count: int = 400, n: int = 6, m: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sources of unequal spread off the origin, targets a noisy affine map of them; float32."""
    x = noise(count, n, seed=seed) * torch.linspace(0.3, 2, n) + 1
    y = x @ noise(n, m, seed=99) + noise(count, m, seed=seed + 1) * 0.5 + 3
    return x.float(), y.float()


def unit(count: int = 400, n: int = 6, m: int = 6, seed: int = 0, level: float = 0.1) -> tuple[Tensor, Tensor]:
    """Unit vectors and their noisy rotation."""
    x = F.normalize(noise(count, n, seed=seed) + 0.5)
    return x.float(), F.normalize(x @ rotation(n, m, seed=99) + level * noise(count, m, seed=seed + 1)).float()


def uneven() -> tuple[Tensor, Tensor]:
    """Few unit pairs of 20 dims with deviations from 1 to 0.001: least squares is far from any rotation, and hard to reach."""
    x = F.normalize(noise(100, 20) * torch.logspace(0, -3, 20))
    return x.float(), F.normalize(x @ rotation(20, 20) + 0.05 * noise(100, 20, seed=1)).float()


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.double().numpy() for tensor in tensors]


def squared_error(adapter: Adapter, x: Tensor, y: Tensor) -> float:
    return float((adapter(x).double() - y.double()).square().sum(1).mean())


def same(got: Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------- closed forms


def test_identity_copies_cuts_or_fills_up() -> None:
    x = noise(3, 4).float()
    assert torch.equal(fit("Identity", x, x)(x), x)
    assert torch.equal(fit("Identity", x, x[:, :2])(x), x[:, :2])
    assert torch.equal(fit("Identity", x, noise(3, 6).float())(x), torch.cat([x, torch.zeros(3, 2)], 1))


def test_constant_shift_is_the_mean_drift() -> None:
    x, y = drifted(n=5)
    shift = [sum(float(b[j]) - float(a[j]) for a, b in zip(x, y)) / len(x) for j in range(5)]
    same(fit("ConstantShift", x, y)(x), x.double().numpy() + np.array(shift))


def test_diagonal_is_one_line_fitted_per_coordinate() -> None:
    x, y = drifted(n=5)
    adapter = fit("Diagonal", x, y)
    for j in range(5):
        slope, offset = np.polyfit(*arrays(x[:, j], y[:, j]), 1)
        same(adapter(x)[:, j], slope * x[:, j].double().numpy() + offset)


@pytest.mark.parametrize("dim", [2, 7, 32])
def test_procrustes_recovers_a_rotation(dim: int) -> None:
    y, R = noise(200, dim), rotation(dim, dim)
    x = y @ R.T  # so that x R = y
    adapter = fit("Procrustes", x, y)
    assert (adapter.weight.double() - R).abs().max() < 1e-6
    scores = y @ y.T
    torch.testing.assert_close(adapter(x).double() @ y.T, scores, atol=1e-4, rtol=0)  # new/old = new/new


def test_centred_procrustes_recovers_a_rotation_and_a_shift_where_the_plain_one_cannot() -> None:
    x, R, shift = noise(200, 5) + 2, rotation(5, 5), noise(5, seed=3)
    y = x @ R + shift
    assert (fit("Procrustes", x, y, centred=True)(x).double() - y).abs().max() < 1e-5
    assert (fit("Procrustes", x, y)(x).double() - y).abs().max() > 0.1


@pytest.mark.parametrize(("n", "m"), [(4, 7), (7, 4), (5, 5)])
@pytest.mark.parametrize("centred", [False, True])
def test_procrustes_is_orthogonal_and_beats_200_random_orthogonal_maps(n: int, m: int, centred: bool) -> None:
    x, y = unit(300, n, m, level=0.3)
    adapter = fit("Procrustes", x, y, centred=centred)
    W = adapter.weight.double()
    gram = W @ W.T if n <= m else W.T @ W
    assert (gram - torch.eye(min(n, m))).abs().max() < 1e-6
    assert (adapter.bias is not None) == centred
    X, Y = x.double(), y.double()
    if centred:
        X, Y = X - X.mean(0), Y - Y.mean(0)
    best = float(((X @ W) * Y).sum())
    nearby = [torch.linalg.qr(W + 1e-3 * noise(n, m, seed=s))[0] for s in range(100)] if n == m else []
    for R in [*(rotation(n, m, seed=s) for s in range(200)), *nearby]:
        R = R * torch.sign((R * W).sum(0)) if n >= m else R  # QR leaves the signs of the columns open
        assert float(((X @ R) * Y).sum()) <= best + 1e-4


def test_query_side_and_gallery_side_procrustes_rank_alike() -> None:
    new, old = unit(level=0.5)
    query_side, gallery_side = fit("Procrustes", new, old), fit("Procrustes", old, new)
    torch.testing.assert_close(query_side.weight, gallery_side.weight.T, atol=1e-6, rtol=0)
    torch.testing.assert_close(query_side(new) @ old.T, new @ gallery_side(old).T, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "given"), [("Procrustes", {"centred": True}), ("Procrustes", {}), ("LowRank", {"rank": 3})]
)
def test_rescaling_divides_the_products_by_the_squares(kind: str, given: dict) -> None:
    x, y = drifted(n=5)
    plain, scaled = fit(kind, x, y, **given)(x), fit(kind, x, y, rescale=True, **given)(x)
    for j in range(5):
        products = sum(float(a) * float(b) for a, b in zip(plain[:, j], y[:, j]))
        same(scaled[:, j], plain[:, j].double().numpy() * products / sum(float(a) ** 2 for a in plain[:, j]), 1e-4)


def centred_lstsq(x: Tensor, y: Tensor, penalty: float = 0.0) -> np.ndarray:
    """Predictions of least squares with rows sqrt(penalty) I appended: the textbook's ridge, on centred arrays."""
    X, Y = arrays(x, y)
    A, B = X - X.mean(0), Y - Y.mean(0)
    extra = math.sqrt(penalty) * np.eye(A.shape[1])
    W = np.linalg.lstsq(np.vstack([A, extra]), np.vstack([B, np.zeros((len(extra), B.shape[1]))]), rcond=None)[0]
    return A @ W + Y.mean(0)


@pytest.mark.parametrize("rho", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("unit_of", [1.0, 1e-3])
def test_ridge_equals_lstsq_and_sklearn_in_any_unit(rho: float, unit_of: float) -> None:
    x, y = drifted()
    x = x * unit_of
    X, Y = arrays(x, y)
    penalty = rho * ((X - X.mean(0)) ** 2).sum() / X.shape[1]
    got = fit("Ridge", x, y, rho=rho)(x)
    same(got, centred_lstsq(x, y, penalty), 1e-4)
    same(got, linear_model.Ridge(alpha=penalty).fit(X, Y).predict(X), 1e-4)


def test_ridge_without_penalty_is_least_squares_of_least_norm() -> None:
    x, y = drifted()
    same(fit("Ridge", x, y, rho=0.0)(x), centred_lstsq(x, y), 1e-4)
    x = torch.cat([x, x[:, :1]], 1)  # a column twice: infinitely many solutions
    weight = fit("Ridge", x, y, rho=0.0).weight
    torch.testing.assert_close(weight[0], weight[-1], atol=1e-5, rtol=0)


def test_the_chosen_rho_has_the_least_generalised_cross_validation_error() -> None:
    chosen = set()
    for seed, level in ((0, 0.01), (1, 1.0), (2, 30.0)):
        x = noise(40, 6, seed=seed) * torch.logspace(0, -2, 6)
        y = x @ noise(6, 3, seed=99) + level * noise(40, 3, seed=seed + 50)
        X, Y = arrays(x, y)
        A, errors = X - X.mean(0), []
        for rho in RHOS:
            hat = A @ np.linalg.inv(A.T @ A + rho * (A**2).sum() / 6 * np.eye(6)) @ A.T + np.ones((40, 40)) / 40
            errors.append(((Y - hat @ Y) ** 2).sum() / 40 / (1 - np.trace(hat) / 40) ** 2)
        adapter = fit("Ridge", x, y)
        assert adapter.config()["rho"] == RHOS[int(np.argmin(errors))]
        same(adapter(x), fit("Ridge", x, y, rho=adapter.config()["rho"])(x).numpy(), 1e-6)
        chosen.add(adapter.config()["rho"])
    assert len(chosen) == 3  # else the choice would not have been tested


def test_the_chosen_rho_does_on_new_pairs_what_the_best_of_the_grid_does() -> None:
    x, y = unit(50, 32, 32, level=0.1)
    fresh = unit(1000, 32, 32, seed=5, level=0.1)
    errors = [squared_error(fit("Ridge", x, y, rho=rho), *fresh) for rho in RHOS]
    assert squared_error(fit("Ridge", x, y), *fresh) < 1.05 * min(errors) < 0.9 * max(errors)


def downhill(loss: Callable[..., Tensor], *starts: Tensor) -> list[Tensor]:
    points = [start.requires_grad_() for start in starts]
    optimiser = torch.optim.LBFGS(points, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(*points)
        value.backward()
        return value

    optimiser.step(closure)
    return [point.detach() for point in points]


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_no_descent_from_anywhere_beats_the_low_rank_map(rank: int, rho: float) -> None:
    x, y = drifted()
    A, B = (v.double() - v.double().mean(0) for v in (x, y))
    penalty = rho * A.square().mean()

    def loss(D: Tensor, U: Tensor) -> Tensor:
        return (A @ D @ U - B).square().sum(1).mean() + penalty * (D @ U).square().sum()

    adapter = fit("LowRank", x, y, rank=rank, rho=rho)
    assert adapter.down.shape == (6, rank) and adapter.up.shape == (rank, 5)
    reached = float(loss(adapter.down.double(), adapter.up.double()))
    for seed in range(3):
        ends = downhill(loss, noise(6, rank, seed=seed), noise(rank, 5, seed=seed + 9))
        assert float(loss(*ends)) == pytest.approx(reached, rel=1e-5)


def test_low_rank_of_full_rank_is_ridge_and_of_rank_one_on_white_targets_is_cca() -> None:
    x, y = drifted()
    torch.testing.assert_close(
        fit("LowRank", x, y, rank=64, rho=0.1)(x), fit("Ridge", x, y, rho=0.1)(x), atol=1e-4, rtol=0
    )
    assert fit("LowRank", x, y, rank=64).config()["rank"] == 5
    y = x[:, :1] * noise(1, 5) + noise(400, 5, seed=7)  # one correlation stands out: CCA iterates
    B = y.double() - y.double().mean(0)
    white = B @ torch.linalg.inv(torch.linalg.cholesky(B.T @ B / len(B))).T
    direction = fit("LowRank", x, white, rank=1, rho=0.0).down[:, 0].double().numpy()
    X, Y = arrays(x, y)
    expected = CCA(1, scale=False, max_iter=5000, tol=1e-9).fit(X, Y).x_rotations_[:, 0]
    assert abs(direction @ expected) / np.linalg.norm(direction) / np.linalg.norm(expected) == pytest.approx(
        1, abs=1e-4
    )


# ---------------------------------------------------------------------------------------------------- learned maps


def test_the_regulariser_is_the_papers_formula() -> None:
    for W in (noise(5, 5), noise(5, 3), noise(3, 5)):
        M = W.numpy() if W.shape[0] >= W.shape[1] else W.numpy().T
        n = math.sqrt(
            sum((float(M[:, i] @ M[:, j]) - (i == j)) ** 2 for i in range(M.shape[1]) for j in range(M.shape[1]))
        )
        expected = 0.7 / (1 + math.exp(-3 * (n - 2))) * n
        assert float(regulariser(W, threshold=2.0, weight=0.7, alpha=3.0)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("pairs", [unit(300, level=0.3), unit(300, 5, 8, level=0.3), uneven()])
def test_lambda_orthogonality_at_zero_is_centred_procrustes(pairs: tuple[Tensor, Tensor]) -> None:
    x, y = pairs
    adapter, limit = fit("LambdaOrthogonal", x, y, threshold=0.0), fit("Procrustes", x, y, centred=True)
    torch.testing.assert_close(adapter.weight, limit.weight, atol=1e-3, rtol=0)
    torch.testing.assert_close(adapter(x), limit(x), atol=1e-3, rtol=0)
    assert squared_error(adapter, x, y) > 1.02 * squared_error(fit("Ridge", x, y, rho=0.0), x, y)  # the limits differ


def test_lambda_orthogonality_at_zero_to_fewer_dims_is_the_orthonormal_map_of_least_error() -> None:
    x, y = unit(300, 8, 5, level=0.3)
    adapter = fit("LambdaOrthogonal", x, y, threshold=0.0)
    W = adapter.weight.double()
    assert (W.T @ W - torch.eye(5)).norm() < 1e-3
    A, B = (v.double() - v.double().mean(0) for v in (x, y))

    def error(R: Tensor) -> float:
        return float((A @ R - B).square().sum(1).mean())

    assert (
        error(W) < error(fit("Procrustes", x, y, centred=True).weight.double()) - 1e-3
    )  # of the largest products only
    for seed in range(200):
        left, _, right = torch.linalg.svd(W + 10.0 ** -(seed % 4) * noise(8, 5, seed=seed), full_matrices=False)
        assert error(left @ right) > error(W) - 1e-4


def test_lambda_orthogonality_at_a_large_lambda_is_least_squares() -> None:
    for x, y in (unit(level=0.3), drifted(), uneven()):
        limit = fit("Ridge", x, y, rho=0.0)
        adapter = fit("LambdaOrthogonal", x, y, threshold=1e4)
        torch.testing.assert_close(adapter.weight, limit.weight, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(adapter.bias, limit.bias, atol=1e-4, rtol=1e-4)


def test_lambda_trades_orthogonality_for_error_without_a_step_back() -> None:
    x, y = unit(level=0.5)
    adapters = [fit("LambdaOrthogonal", x, y, threshold=t, weight=10.0, alpha=50.0) for t in (0.0, 0.3, 0.6, 10.0)]
    errors = [squared_error(adapter, x, y) for adapter in adapters]
    apart = [float((a.weight.T @ a.weight - torch.eye(6)).norm()) for a in adapters]
    assert errors == sorted(errors, reverse=True) and apart == sorted(apart)
    assert apart[0] < 1e-2 < apart[1] < 0.3 < apart[2] < 0.6 < apart[3]


def test_the_network_starts_as_procrustes_of_its_part_and_ends_with_a_held_out_cosine_no_lower() -> None:
    x = F.normalize(noise(600, 6)).float()
    y = F.normalize(x.double()[:, :5].abs() @ rotation(5, 5) + x.double() @ rotation(6, 5)).float()
    rows = torch.randperm(600, generator=torch.Generator().manual_seed(3))
    judged, fitted = rows[:60], rows[60:]
    start = fit("ResidualMLP", x, y, seed=3, epochs=0)
    torch.testing.assert_close(start(x), fit("Procrustes", x[fitted], y[fitted])(x), atol=1e-6, rtol=0)
    end = fit("ResidualMLP", x, y, seed=3, epochs=30, hidden=32)
    before, after = (F.cosine_similarity(a(x[judged]), y[judged]).mean() for a in (start, end))
    assert after > before + 0.01
    hopeless = fit(
        "ResidualMLP", x, y, seed=3, epochs=3, hidden=32, lr=100.0
    )  # every epoch is worse: the start is kept
    torch.testing.assert_close(hopeless(x), start(x), atol=1e-6, rtol=0)
    for loss, blind in (("cosine", True), ("mse", False)):  # to the length of the targets
        short, long = (fit("ResidualMLP", x, k * y, epochs=2, hidden=32, loss=loss)(x) for k in (1, 4))
        assert torch.allclose(short, long, atol=1e-4) == blind


def test_the_networks_formula() -> None:
    x, y = unit()
    adapter = fit("ResidualMLP", x, y, epochs=2, hidden=7)
    w = {name: value.double().numpy() for name, value in adapter.state_dict().items()}
    for row, got in zip(x[:20].double().numpy(), adapter(x[:20])):
        normal = (row - row.mean()) / math.sqrt(row.var() + 1e-5)
        inner = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in normal @ w["inner"] + w["inner_bias"]]
        same(got, row @ w["linear"] + w["bias"] + np.array(inner) @ w["outer"])


@pytest.mark.parametrize("kind", ["ResidualMLP", "LocalProcrustes"])
def test_learned_maps_follow_their_seed_and_leave_the_global_generators_alone(kind: str) -> None:
    x, y = unit()
    torch.manual_seed(1)
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (fit(kind, x, y, seed=seed, **SMALL[kind])(x) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], legacy)


def two_regions(count: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two far groups of sources, each rotated its own way."""
    side = torch.arange(count) % 2
    x = noise(count, 4, seed=seed) * 0.2 + torch.where(side[:, None] == 1, 1.0, -1.0)
    y = torch.where(side[:, None] == 1, x @ rotation(4, 4, seed=1), x @ rotation(4, 4, seed=2))
    return x.float(), y.float()


def test_local_maps_learn_what_one_map_cannot_and_become_it_in_both_limits() -> None:
    x, y = two_regions()
    whole = fit("Procrustes", x, y)
    assert squared_error(fit("LocalProcrustes", x, y, clusters=2), x, y) < 0.05 * squared_error(whole, x, y)
    for given in ({"clusters": 1}, {"clusters": 3, "temperature": 1e9}):
        torch.testing.assert_close(fit("LocalProcrustes", x, y, **given)(x), whole(x), atol=1e-5, rtol=0)


def test_the_local_formula() -> None:
    x, y = two_regions(120)
    adapter = fit("LocalProcrustes", x, y, clusters=3, temperature=0.5)
    X, Y = arrays(x, y)
    C = adapter.centres.double().numpy()
    apart = np.array([[((row - c) ** 2).sum() for c in C] for row in X])
    assert float(adapter.spread) == pytest.approx(apart.min(1).mean(), rel=1e-5)
    share = np.exp(-apart / (0.5 * apart.min(1).mean()))
    share /= share.sum(1, keepdims=True)
    expected = 0
    for k in range(3):
        cross = sum(p * np.outer(a, b) for p, a, b in zip(share[:, k], X, Y))
        cross = cross + 4 / 120 * sum(np.outer(a, b) for a, b in zip(X, Y))  # 4 pairs more, of average kind
        P, _, Q = np.linalg.svd(cross)
        expected = expected + share[:, [k]] * (X @ P @ Q)
    same(adapter(x), expected, 1e-4)
    hot = fit(
        "LocalProcrustes", torch.ones(8, 2) * torch.tensor([[1.0, 2.0]] * 4 + [[2.0, 1.0]] * 4), noise(8, 2), clusters=2
    )
    assert hot(noise(5, 2)).isfinite().all()  # all sources sit on the centres


# ------------------------------------------------------------------------------------------------- moments, modules


@pytest.mark.parametrize("kind", STREAMING)
def test_a_fit_to_streamed_moments_equals_the_fit_in_memory(kind: str) -> None:
    x, y = drifted(9000, n=5)  # more than one chunk of float64
    streamed = Moments(5, 5)
    for rows in torch.arange(9000).split(777):
        streamed.add(x[rows], y[rows])
    shards = Moments.of(x[:4000], y[:4000]).merge(Moments.of(x[4000:], y[4000:]))
    assert torch.equal(shards.low, streamed.low) and torch.equal(shards.high, streamed.high)
    expected = fit(kind, x, y, **SMALL.get(kind, {}))
    for moments in (streamed, shards):
        got = fit(kind, moments, **SMALL.get(kind, {}))
        assert got.config() == expected.config()
        torch.testing.assert_close(got(x), expected(x), atol=1e-4 if kind == "LambdaOrthogonal" else 1e-6, rtol=1e-6)


def test_moments_far_from_the_origin_keep_their_digits() -> None:
    x, y = drifted()
    far = fit("Ridge", x.double() + 1e4, y.double() - 1e4, rho=0.0)
    torch.testing.assert_close(far.weight, fit("Ridge", x, y, rho=0.0).weight, atol=1e-5, rtol=0)


def test_the_error_of_a_map_follows_from_the_moments() -> None:
    x, y = drifted()
    adapter = fit("Ridge", x, y)
    got = Moments.of(x, y).error(adapter.weight.double(), adapter.bias.double())
    assert float(got) == pytest.approx(squared_error(adapter, x, y), rel=1e-5)


def fitted(kind: str) -> tuple[Adapter, Tensor]:
    x, y = unit()
    return fit(kind, x, y, **SMALL.get(kind, {})), x


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same_bit_for_bit(kind: str, tmp_path: Path) -> None:
    adapter, x = fitted(kind)
    save(tmp_path / "a.safetensors", adapter, {"new": "vit-b", "count": "10"})
    loaded, notes = load(tmp_path / "a.safetensors")
    assert type(loaded) is KINDS[kind] and loaded.config() == adapter.config()
    assert notes == {"new": "vit-b", "count": "10"}
    assert torch.equal(loaded(x), adapter(x))
    save(tmp_path / "b.safetensors", loaded, notes)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = rebuild(json.loads(json.dumps(adapter.config())), adapter.state_dict())
    assert torch.equal(again(x), adapter(x)) and torch.equal(copy.deepcopy(adapter)(x), adapter(x))
    assert not again.training and not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_rebuilt_adapter_shares_no_memory_with_what_it_was_built_from(kind: str) -> None:
    adapter, x = fitted(kind)
    expected = adapter(x)
    again = rebuild(adapter.config(), adapter.state_dict())
    for value in adapter.state_dict().values():
        value.zero_()
    assert torch.equal(again(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_mapped_each_by_itself_to_float32(kind: str) -> None:
    adapter, x = fitted(kind)
    whole = adapter(x)
    assert whole.dtype == torch.float32 and whole.shape == (400, 6)
    torch.testing.assert_close(torch.cat([adapter(x[:1]), adapter(x[1:])]), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(adapter(x.double()), whole, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("kind", "given", "parameters", "multiply_adds"),
    [
        ("Identity", {}, 0, 0),
        ("ConstantShift", {}, 6, 0),
        ("Diagonal", {}, 12, 6),
        ("Procrustes", {}, 36, 36),
        ("Procrustes", {"centred": True}, 42, 36),
        ("Ridge", {}, 42, 36),
        ("LambdaOrthogonal", {}, 42, 36),
        ("LowRank", {"rank": 2}, 30, 24),
        ("ResidualMLP", {"epochs": 0, "hidden": 7}, 36 + 6 + 42 + 7 + 42, 36 + 42 + 42),
        ("ResidualMLP", {"epochs": 0}, 36 + 6 + 144 + 24 + 144, 36 + 144 + 144),
        ("LocalProcrustes", {"clusters": 2}, 72 + 12 + 1, 2 * (6 + 36 + 6)),
    ],
)
def test_cost(kind: str, given: dict, parameters: int, multiply_adds: int) -> None:
    adapter = fit(kind, *unit(), **given)
    assert (adapter.parameters_count, adapter.multiply_adds) == (parameters, multiply_adds)


# --------------------------------------------------------------------------------------------------------- refusals


def refused(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


NEEDED = {
    ("ConstantShift", 6): 1,
    ("Diagonal", 6): 2,
    ("Procrustes", 6): 6,
    ("Procrustes", 4): 4,
    ("Procrustes", 9): 6,
    ("Ridge", 9): 7,
    ("LowRank", 9): 7,
    ("LambdaOrthogonal", 4): 7,
    ("ResidualMLP", 6): 7,
    ("LocalProcrustes", 6): 48,
}


@pytest.mark.parametrize(("kind", "target_dim"), NEEDED)
def test_too_few_pairs_are_refused_with_the_number_needed_and_that_many_do(kind: str, target_dim: int) -> None:
    needed = NEEDED[kind, target_dim]
    assert KINDS[kind].needed(6, target_dim) == needed
    x, y = noise(needed, 6), noise(needed, target_dim, seed=1)
    assert fit(kind, x, y)(x).isfinite().all()
    if needed > 1:
        few = f"{needed - 1} pairs are too few: {kind} from 6 to {target_dim} dims needs at least {needed}"
        refused(lambda: fit(kind, x[:-1], y[:-1]), few)
        if KINDS[kind].streams:
            refused(lambda: fit(kind, Moments.of(x[:-1], y[:-1])), few)


def test_what_is_needed_depends_on_the_hyperparameters() -> None:
    assert KINDS["Identity"].needed(6, 4) == 0
    assert KINDS["Procrustes"].needed(6, 4, centred=True) == 5
    assert KINDS["LocalProcrustes"].needed(6, 4, clusters=3) == 12
    for dim in (1, 2, 10, 100, 333):
        n = KINDS["ResidualMLP"].needed(dim, dim)  # the part that is fitted must hold a Procrustes map
        assert n - max(1, round(0.1 * n)) >= dim > n - 1 - max(1, round(0.1 * (n - 1)))


def spoiled(value: float, side: int = 0) -> tuple[Tensor, Tensor]:
    pairs = unit(9000)
    pairs[side][8500, 2] = value
    return pairs


def test_pairs_that_are_refused() -> None:
    x, y = unit()
    for kind in KINDS:
        given = SMALL.get(kind, {})
        for value in (math.nan, math.inf, -math.inf):
            refused(lambda v=value, k=kind, g=given: fit(k, *spoiled(v), **g), "source", "NaN", "row 8500, column 2")
        refused(lambda k=kind, g=given: fit(k, *spoiled(math.nan, 1), **g), "target", "NaN", "row 8500, column 2")
        refused(lambda k=kind, g=given: fit(k, x[:-1], y, **g), "source has 399 embeddings, target 400")
        refused(lambda k=kind: fit(k, x), "target is missing")
    zero = x.clone()
    zero[7] = 0
    refused(lambda: fit("Ridge", zero, y), "source: row 7 is all zeros")
    refused(lambda: fit("ResidualMLP", y, zero), "target: row 7 is all zeros")
    constant = x.clone()
    constant[:, [1, 3]] = 0.5
    refused(lambda: fit("Procrustes", constant, y), "2 of 6 columns are constant over all 400 pairs (1, 3)")
    refused(lambda: fit("Diagonal", Moments.of(constant, y)), "columns are constant")
    refused(lambda: check_pairs(constant, y, 1), "columns are constant")
    first, second = Moments.of(constant[:9], y[:9]), Moments.of(1 - constant[9:], y[9:])  # 0.5 = 1 - 0.5
    refused(lambda: fit("Ridge", first.merge(second)), "2 of 6 columns are constant over all 400 pairs (1, 3)")
    refused(lambda: check_pairs(x, y, 401), "400 pairs are too few", "401")
    check_pairs(x, constant, 400)  # a dead target dim is learned like any other
    refused(lambda: fit("Ridge", x[0], y), "source", "(6,)")
    refused(lambda: fit("Ridge", x, y.int()), "target", "int32")
    refused(lambda: Moments(6, 6).add(x, y).add(x[:, :5], y), "source", "5 dims", "6")
    refused(lambda: Moments(6, 6).add(x, y[:, :5]), "target", "5 dims", "6")
    refused(lambda: fit("ResidualMLP", Moments.of(x, y)), "ResidualMLP", "Moments")
    refused(lambda: fit("LocalProcrustes", Moments.of(x, y)), "LocalProcrustes", "Moments")
    refused(lambda: fit("Diagonal", x, y[:, :5]), "Diagonal", "6 and 5", "Procrustes")
    refused(lambda: fit("ConstantShift", x, y[:, :5]), "ConstantShift", "6 and 5")


@pytest.mark.parametrize(
    ("kind", "given", "part"),
    [
        ("Ridge", {"rho": -1.0}, "rho must be at least 0"),
        ("Ridge", {"gamma": 1.0}, "unknown hyperparameter of Ridge 'gamma'; known: rho"),
        ("Identity", {"rho": 1.0}, "known: none"),
        ("LowRank", {"rank": 0}, "rank must be at least 1"),
        ("LowRank", {"rho": -0.1}, "rho must be at least 0"),
        ("ResidualMLP", {"hidden": 0}, "hidden"),
        ("ResidualMLP", {"loss": "l1"}, "mse or cosine"),
        ("LambdaOrthogonal", {"threshold": -1.0}, "threshold"),
        ("LambdaOrthogonal", {"threshold": math.inf}, "finite"),
        ("LocalProcrustes", {"clusters": 0}, "clusters"),
        ("LocalProcrustes", {"temperature": 0.0}, "temperature"),
    ],
)
def test_hyperparameters_that_are_refused(kind: str, given: dict, part: str) -> None:
    refused(lambda: fit(kind, *unit(), **given), kind, part)


def test_names_and_vectors_that_are_refused() -> None:
    x, y = unit()
    refused(lambda: fit("procrustes", x, y), "unknown adapter 'procrustes'; did you mean: ", "Procrustes")
    for kind in KINDS:
        adapter, _ = fitted(kind)
        refused(lambda a=adapter: a(noise(3, 5)), kind, "6 dims, got 5")


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    refused(lambda: load(path), str(path), "missing or damaged")
    adapter, _ = fitted("Ridge")
    save(path, adapter)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:-1], b"", b"PK\x03\x04 something else", b"\xff" * 100):
        path.write_bytes(data)
        refused(lambda: load(path), str(path), "missing or damaged")
    refused(lambda: load(tmp_path), str(tmp_path), "missing or damaged")
    tensors, config = dict(adapter.state_dict()), adapter.config()

    def write(tensors: dict, **header: str) -> None:
        path.write_bytes(safetensors.torch.save(tensors, header or None))

    def stored(**changed: object) -> str:
        return json.dumps({"config": {**config, **changed}, "notes": {}})

    key = "compatbench.adapter"
    write(tensors)
    refused(lambda: load(path), str(path), "holds no adapter")
    for foreign in ("{", "[]", "{}", '{"config": 3, "notes": {}}', json.dumps({"config": config, "notes": [1]})):
        write(tensors, **{key: foreign})
        refused(lambda: load(path), str(path), "holds no adapter")
    for part, changed in (
        ("unknown adapter 'Pickle'", {"kind": "Pickle"}),
        ("asks for numbers of shapes", {"source_dim": 10**12}),  # nothing of that size is allocated
        ("is not understood", {"source_dim": "6"}),
        ("dims must be positive", {"target_dim": -1}),
        ("rho", {"rho": -1}),
        ("unknown hyperparameter", {"other": 1}),
    ):
        write(tensors, **{key: stored(**changed)})
        refused(lambda: load(path), str(path), part)
    for wrong in ({**tensors, "weight": tensors["weight"] * math.nan}, {**tensors, "bias": tensors["bias"].double()}):
        write(wrong, **{key: stored()})
        refused(lambda: load(path), str(path), "NaN")
    for wrong in ({"weight": tensors["weight"]}, {**tensors, "more": torch.zeros(1)}):
        write(wrong, **{key: stored()})
        refused(lambda: load(path), str(path), "asks for numbers of shapes")


def test_fits_warn_of_nothing() -> None:
    x, y = unit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in KINDS:
            fit(kind, x, y, **SMALL.get(kind, {}))(x)
