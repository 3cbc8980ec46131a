"""Fused queries against the formulas row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.errors import UserError
from benchmark.fusion import ALPHAS, B0, FUSIONS, GRIDS, S0, adaptive, fuse, nlerp, slerp


def unit(count: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)))


U, V, G = unit(50, 8, 0), unit(50, 8, 1), unit(200, 8, 2)


def rows() -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(U.double().numpy(), V.double().numpy()))


def same(got: Tensor, expected: list[np.ndarray]) -> None:
    np.testing.assert_allclose(got.double().numpy(), np.array(expected), atol=2e-6)


@pytest.mark.parametrize("a", ALPHAS)
def test_slerp_and_nlerp_by_row(a: float) -> None:
    arc, chord = [], []
    for u, v in rows():
        angle = math.acos(u @ v)
        arc.append((math.sin((1 - a) * angle) * u + math.sin(a * angle) * v) / math.sin(angle))
        mixed = (1 - a) * u + a * v
        chord.append(mixed / np.linalg.norm(mixed))
    same(slerp(U, V, a), arc)
    same(nlerp(U, V, a), chord)


@pytest.mark.parametrize(("b0", "s0"), [(-3.0, 6.0), (0.0, 3.0), (1.5, -3.0)])
def test_adaptive_by_row(b0: float, s0: float) -> None:
    expected = []
    for u, v in rows():
        b = 1 / (1 + math.exp(-(b0 + s0 * (u @ v))))
        mixed = (1 - b) * u + b * v
        expected.append(mixed / np.linalg.norm(mixed))
    same(adaptive(U, V, b0, s0), expected)


def test_weight_zero_is_the_old_query_bit_for_bit_and_one_the_mapped_one() -> None:
    assert torch.equal(slerp(U, V, 0.0), U) and torch.equal(nlerp(U, V, 0.0), U)
    weights = torch.tensor([0.0, 1.0] * 25)
    fused = nlerp(U, V, weights)
    assert torch.equal(fused[::2], U[::2])
    torch.testing.assert_close(fused[1::2], V[1::2])
    torch.testing.assert_close(slerp(U, V, 1.0), V)


def test_fused_scores_rank_as_nlerp_does() -> None:
    for b in (0.2, 0.5, 0.9):
        scores = (1 - b) * U.double() @ G.double().T + b * V.double() @ G.double().T
        assert torch.equal(scores.argsort(1), (nlerp(U.double(), V.double(), b) @ G.double().T).argsort(1))


def test_equal_nearly_equal_and_opposite_vectors_give_unit_vectors() -> None:
    near = F.normalize(U + 1e-5 * V)
    for v in (U, near, -U, F.normalize(-U + 1e-5 * V)):
        for kind, grid in GRIDS.items():
            for parameters in grid:
                fused = fuse(kind, U, v, **parameters)
                torch.testing.assert_close(fused.norm(dim=1), torch.ones(50), atol=1e-5, rtol=0)
    torch.testing.assert_close(slerp(U, near, 0.3), U, atol=1e-5, rtol=0)
    for a, end in ((0.3, U), (0.5, U), (0.8, -U)):
        torch.testing.assert_close(slerp(U, -U, a), end)


def test_grids_are_the_papers() -> None:
    assert ALPHAS == (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
    assert B0 == (-3, -1.5, 0, 1.5, 3) and S0 == (-3, 0, 3, 6)
    assert {kind: len(grid) for kind, grid in GRIDS.items()} == {"slerp": 11, "nlerp": 11, "adaptive": 20}
    assert GRIDS.keys() == FUSIONS.keys()


def test_what_is_refused() -> None:
    for part, call in (
        ("unknown fusion 'SLURP'; did you mean: nlerp, slerp", lambda: fuse("SLURP", U, V, a=0.5)),
        ("takes a, got b", lambda: fuse("slerp", U, V, b=0.5)),
        ("takes b0 and s0, got none", lambda: fuse("adaptive", U, V)),
        ("(50, 8), mapped ones of shape (49, 8)", lambda: slerp(U, V[:-1], 0.5)),
        ("mapped queries are not unit vectors (first off: row 3)", lambda: nlerp(U, scaled(V), 0.5)),
        ("old queries are not unit vectors", lambda: adaptive(scaled(U, math.nan), V, 0.0, 3.0)),
        ("must lie in [0, 1]", lambda: slerp(U, V, 1.1)),
        ("must lie in [0, 1]", lambda: nlerp(U, V, torch.linspace(-0.1, 1, 50))),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert part in str(caught.value) and "\n" not in str(caught.value)


def scaled(rows: Tensor, by: float = 2.0) -> Tensor:
    rows = rows.clone()
    rows[3] *= by
    return rows
