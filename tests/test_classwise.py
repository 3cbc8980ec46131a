"""A class without training images is named before a method averages over it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmark import runner
from benchmark.classwise import credible, members, within_fences
from benchmark.embeddings import Embeddings
from benchmark.errors import UserError
from benchmark.methods.unibct import refine

LABELS = torch.tensor([0, 3, 0, 1, 3, 1])  # of 4 classes: none of class 2
OLD = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def old_class_means(labels: Tensor) -> Tensor:
    """The node that BCT, BT2 and OCA take their prototypes from."""
    encoder = SimpleNamespace(spec={"t": 0})
    node = SimpleNamespace(spec={"t": 1}, inputs={"embeddings": SimpleNamespace(inputs={"encoder": encoder})})
    written: list[dict[str, Tensor]] = []
    store = SimpleNamespace(
        embeddings=lambda source: Embeddings(torch.arange(6), {(0, "main"): OLD}, labels),
        write_tensors=lambda node, name, tensors: written.append(tensors),
    )
    runner._means(node, SimpleNamespace(classes=lambda t: 4), store, lambda done, total: None)  # type: ignore[arg-type]
    return written[0]["means"]


AVERAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "class means": old_class_means,
    "UniBCT": lambda labels: refine(OLD + 1, OLD, labels, 4, 0.9, 0.05),
    "fences": lambda labels: within_fences(OLD[:, 0], labels, 4).widest,
    "MixBCT": lambda labels: credible(OLD, labels, 4, 0.9).float(),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_a_class_without_images_is_named_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"class 2 \(from 0.*no training image") as caught:
        AVERAGES[name](LABELS)
    assert "\n" not in str(caught.value) and "classes" in str(caught.value)
    whole = torch.where(torch.arange(6) == 4, 2, LABELS)
    assert AVERAGES[name](whole).isfinite().all()


def test_members_are_the_positions_of_each_class() -> None:
    assert [rows.tolist() for rows in members(torch.tensor([1, 0, 2, 1]), 3)] == [[1], [0, 3], [2]]
    with pytest.raises(UserError, match="class 3"):  # the last one, beyond every label
        list(members(torch.tensor([1, 0, 2, 1]), 4))
