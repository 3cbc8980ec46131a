"""Heads and class means against loops written from the formulas."""

from __future__ import annotations

import math

import pytest
import torch

from benchmark.heads import Head, class_means
from benchmark.protocol import HeadSpec

KINDS = [HeadSpec("cosine", 16.0), HeadSpec("linear"), HeadSpec("unit")]
KINDS += [HeadSpec("arcface", 8.0, 0.5), HeadSpec("cosface", 8.0, 0.4)]


def naive(z: torch.Tensor, W: torch.Tensor, y: int, spec: HeadSpec, smoothing: float) -> float:
    logits = []
    for k, w in enumerate(W.tolist()):
        dot = sum(a * b for a, b in zip(z.tolist(), w))
        cosine = dot / math.sqrt(sum(a * a for a in z.tolist())) / math.sqrt(sum(b * b for b in w))
        if spec.kind == "linear":
            logits.append(dot)
            continue
        if spec.kind == "unit":
            logits.append(dot / math.sqrt(sum(a * a for a in z.tolist())))
            continue
        if k == y and spec.kind == "cosface":
            cosine -= spec.margin
        if k == y and spec.kind == "arcface":
            angle = math.acos(cosine) + spec.margin
            cosine = math.cos(angle) if angle < math.pi else cosine - spec.margin * math.sin(math.pi - spec.margin)
        logits.append(spec.scale * cosine)
    total = math.log(sum(math.exp(x) for x in logits))
    logs = [x - total for x in logits]
    return -(1 - smoothing) * logs[y] - smoothing * sum(logs) / len(logs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec.kind)
def test_head_loss(spec: HeadSpec, smoothing: float) -> None:
    torch.manual_seed(0)
    z, W, y = torch.randn(40, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64), torch.arange(40) % 5
    z[0] = -W[0]  # an angle of pi: past the arc's end
    expected = [naive(a, W, int(b), spec, smoothing) for a, b in zip(z, y)]
    losses = Head(W, spec, smoothing)(z, y, reduction="none")
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)
    assert Head(W, spec, smoothing)(z, y).item() == pytest.approx(sum(expected) / 40, abs=1e-6)


def test_arcface_has_a_finite_gradient_where_the_cosine_is_one() -> None:
    W = torch.eye(3)
    z = W[:1].clone().requires_grad_()
    Head(W, HeadSpec("arcface", 64.0, 0.5))(z, torch.tensor([0])).backward()
    assert torch.isfinite(z.grad).all()


def test_class_means_are_means_of_unit_vectors() -> None:
    torch.manual_seed(0)
    z, y = torch.randn(30, 4), torch.arange(30) % 3
    means, counts = class_means(z, y, 4)
    for k in range(3):
        rows = [
            [x / math.sqrt(sum(v * v for v in row)) for x in row] for row, c in zip(z.tolist(), y.tolist()) if c == k
        ]
        assert means[k].tolist() == pytest.approx([sum(column) / len(rows) for column in zip(*rows)], abs=1e-6)
    assert counts.tolist() == [10, 10, 10, 0] and not means[3].any()
