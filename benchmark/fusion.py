"""Serving with both query encoders: the old query u and the mapped new one v, fused on the sphere before the search.

SLERP, NLERP and query-adaptive NLERP of "Spherical Interpolation for Backward-Compatible Multimodal Representations" (Ricci,
Biondi, Pernici), with its grids. Fusing scores instead, (1 - b) <u, g> + b <v, g>, ranks as NLERP does with the same b.
Rows u, v (N, d) are unit vectors of the old space, and so are the results. Weight 0 returns u bit for bit: old/old.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from benchmark.errors import UserError, unknown

ALPHAS = tuple(step / 10 for step in range(11))
B0 = (-3.0, -1.5, 0.0, 1.5, 3.0)
S0 = (-3.0, 0.0, 3.0, 6.0)


def slerp(u: Tensor, v: Tensor, a: float) -> Tensor:
    """Point at share a in [0, 1] of the arc from u to v. Of opposite vectors, which have no one arc, the nearer end."""
    _check(u, v, a)
    angle = 2 * torch.atan2((u - v).norm(dim=1, keepdim=True), (u + v).norm(dim=1, keepdim=True))  # arccos loses digits
    sine = angle.sin()
    straight = sine < 1e-6
    one = torch.where(straight, 1 - a, ((1 - a) * angle).sin() / sine)
    two = torch.where(straight, a, (a * angle).sin() / sine)
    return _unit(one * u + two * v, u, two)


def nlerp(u: Tensor, v: Tensor, b: float | Tensor) -> Tensor:
    """norm((1 - b) u + b v), b in [0, 1]: a number or one per row, (N,). The old query where the sum vanishes."""
    _check(u, v, b)
    weight = torch.as_tensor(b, dtype=u.dtype, device=u.device).reshape(-1, 1)  # (N, 1) or (1, 1)
    return _unit((1 - weight) * u + weight * v, u, weight)


def adaptive(u: Tensor, v: Tensor, b0: float, s0: float) -> Tensor:
    """NLERP with the weight of each query by how well the two agree: b = sigmoid(b0 + s0 <u, v>)."""
    _check(u, v, 0.0)
    return nlerp(u, v, torch.sigmoid(b0 + s0 * (u * v).sum(1)))


FUSIONS: dict[str, Callable[..., Tensor]] = {"slerp": slerp, "nlerp": nlerp, "adaptive": adaptive}
GRIDS: dict[str, list[dict[str, float]]] = {
    "slerp": [{"a": a} for a in ALPHAS],
    "nlerp": [{"b": b} for b in ALPHAS],
    "adaptive": [{"b0": b0, "s0": s0} for b0 in B0 for s0 in S0],
}


def fuse(kind: str, old: Tensor, mapped: Tensor, **parameters: float) -> Tensor:
    """Fused unit queries (N, d) of old and mapped ones (N, d), by the name of the fusion and its parameters."""
    if kind not in FUSIONS:
        raise unknown("fusion", kind, FUSIONS)
    expected = [*inspect.signature(FUSIONS[kind]).parameters][2:]
    if sorted(parameters) != sorted(expected):
        raise UserError(
            f"fusion '{kind}' takes {' and '.join(expected)}, got {', '.join(sorted(parameters)) or 'none'}"
        )
    return FUSIONS[kind](old, mapped, **parameters)


def _unit(mixed: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    norm = mixed.norm(dim=1, keepdim=True)
    return torch.where((weight == 0) | (norm < 1e-6), u, mixed / norm)


def _check(u: Tensor, v: Tensor, weight: float | Tensor) -> None:
    if u.ndim != 2 or u.shape != v.shape:
        raise UserError(
            f"old queries of shape {tuple(u.shape)}, mapped ones of shape {tuple(v.shape)}: give the same queries, (N, d), "
            f"in the old space by both"
        )
    for name, rows in (("old", u), ("mapped", v)):
        off = (rows.norm(dim=1) - 1).abs()
        if len(off) and not off.max() < 1e-3:
            raise UserError(
                f"{name} queries are not unit vectors (first off: row {int((~(off < 1e-3)).nonzero()[0, 0])}); "
                f"normalise them before fusing"
            )
    weights = torch.as_tensor(weight)
    if not bool(((weights >= 0) & (weights <= 1)).all()):
        raise UserError("the weight of a fusion must lie in [0, 1]: 0 = the old query, 1 = the mapped one")
