"""Stored embeddings and the links by which queries of one release meet items stored by another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from benchmark.errors import UserError
from benchmark.files import write_bytes

View = tuple[int, str]  # (release, "main" | "side" | "image" | "text" | ...)


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of one item list by one release. Raw: similarity, and so normalisation, belongs to the protocol."""

    ids: Tensor  # (N,) int64, unique per item and shared by all releases
    views: Mapping[View, Tensor]  # (N, D) float32 each
    labels: Tensor | None = None  # (N,) int64
    meta: Mapping[str, Tensor] = field(default_factory=dict)  # what a task's score needs besides

    def main(self, release: int) -> Tensor:
        """The (N, D) matrix that release `release` stores."""
        return self.views[release, "main"]

    def check(self, name: str) -> Embeddings:
        """Refuse non-finite values before anything is computed from them."""
        for view, matrix in self.views.items():
            bad = ~torch.isfinite(matrix).all(1)
            if bad.any():
                first = int(self.ids[bad.nonzero()[0, 0]])
                raise UserError(
                    f"{name}: {int(bad.sum())} of {len(bad)} embeddings (view {view}) hold NaN or infinite values, first "
                    f"item {first}; training diverged: lower the learning rate or clip gradients"
                )
        return self

    def save(self, path: Path) -> None:
        tensors = {f"view/{r}/{name}": matrix.contiguous() for (r, name), matrix in self.views.items()}
        tensors |= {f"meta/{name}": value for name, value in self.meta.items()}
        tensors["ids"] = self.ids
        if self.labels is not None:
            tensors["labels"] = self.labels
        write_tensors(path, tensors)

    @classmethod
    def load(cls, path: Path) -> Embeddings:
        tensors = read_tensors(path)
        views = {}
        for key in [k for k in tensors if k.startswith("view/")]:
            _, release, name = key.split("/", 2)
            views[int(release), name] = tensors.pop(key)
        meta = {k.removeprefix("meta/"): v for k, v in tensors.items() if k.startswith("meta/")}
        return cls(tensors["ids"], views, tensors.get("labels"), meta)


class Stored(NamedTuple):
    """What a query must know of the gallery items that it meets."""

    release: int
    dim: int


class Link(nn.Module):
    """Serves the queries of one release against items stored by any release, untouched.

    A method that needs more overrides `query`, `gallery` or both. A link may read several encoders; its method then names
    them in `query_views` or `gallery_views` (they are billed). It never truncates or projects unless its method declares
    so by its class: with this plain one unequal dims are refused, and the cell of the matrix is undefined.
    """

    def __init__(self, release: int, dim: int):
        super().__init__()
        self.release = release  # of the queries
        self.dim = dim  # what that release stores

    def query(self, q: Mapping[View, Tensor], stored: Stored) -> Tensor:
        """Query vectors, (N, D), comparable with what `gallery` returns."""
        return main(q, self.release)

    def gallery(self, g: Mapping[View, Tensor], stored: Stored) -> Tensor:
        """Gallery vectors, (M, D)."""
        return main(g, stored.release)

    def priority(self, g: Mapping[View, Tensor], stored: Stored) -> Tensor | None:
        """(M,) in which order to re-embed stored items, highest first; None = in any order."""
        return None


class Prefix(Link):
    """Spaces that nest: the first coordinates of a new embedding are comparable with the whole of an older one.

    Both sides are cut to the common prefix (BT2, OCA, BCT with extra dims). A protocol's cosine normalises after the cut,
    which matters where the cut vector is in the gallery (OCA's evaluation does so too; BT2's leaves it out).
    """

    def query(self, q: Mapping[View, Tensor], stored: Stored) -> Tensor:
        return main(q, self.release)[:, : stored.dim]  # (N, D_new) -> (N, min(D_new, D_stored))

    def gallery(self, g: Mapping[View, Tensor], stored: Stored) -> Tensor:
        return main(g, stored.release)[:, : self.dim]


def main(views: Mapping[View, Tensor], release: int) -> Tensor:
    """What `release` stores of the items at hand; a two-sided release stores images or texts, never both in one list."""
    (name,) = {name for r, name in views if r == release} & {"main", "image", "text"}
    return views[release, name]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is missing or damaged ({str(error).splitlines()[0]}); remove it to have it made again"
        ) from None
