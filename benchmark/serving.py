"""An adapter in service: what it is given, what is normalised, what is refused, and what it was fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from benchmark import adapters
from benchmark.adapters import Adapter
from benchmark.errors import UserError
from benchmark.files import sha256_file
from benchmark.neighbours import Similarity
from benchmark.vectors import Array

Side = Literal["query", "gallery"]
PAIR_FILES = ("old file", "new file")  # notes with their `content`


def content(path: Path) -> str:
    """Size in bytes and sha256."""
    return f"{path.stat().st_size} {sha256_file(path)}"


@dataclass(frozen=True)
class Map:
    """An adapter as it serves: with the side it was fitted for and the similarity that says what is normalised."""

    adapter: Adapter
    side: Side
    similarity: Similarity
    key: str  # sha256 of its file
    pairs: tuple[str, ...] = ()  # `content` of the files that it was fitted to

    @classmethod
    def load(cls, path: Path) -> Map:
        return cls.of(*adapters.load(path), key=sha256_file(path), name=str(path))

    @classmethod
    def of(cls, adapter: Adapter, notes: Mapping[str, str], key: str = "", name: str = "the adapter") -> Map:
        """From the notes that `fit` makes."""
        side, similarity = notes.get("side"), notes.get("similarity")
        if side not in ("query", "gallery") or similarity not in ("cosine", "l2"):
            raise UserError(f"{name}: does not say side and similarity; fit it with `compatbench adapt`")
        pairs = tuple(notes[file] for file in PAIR_FILES if file in notes)
        return cls(adapter, side, similarity, key, pairs)  # type: ignore[arg-type]

    def fitted_to(self, path: Path) -> bool:
        """Whether it was fitted to this very file, by content; read whole only where the size agrees."""
        size = f"{path.stat().st_size} "
        return any(file.startswith(size) for file in self.pairs) and content(path) in self.pairs

    def check(self, dim: int, name: str) -> None:
        """Refuses vectors `name` of the wrong model."""
        if dim != self.adapter.source_dim:
            swapped = ", not those of the other" if dim == self.adapter.target_dim else ""
            raise UserError(
                f"{name} has {dim} dims, the adapter maps {self.adapter.source_dim} to {self.adapter.target_dim}: give "
                f"embeddings of the {'new' if self.side == 'query' else 'old'} model{swapped}"
            )

    def __call__(self, vectors: Array, name: str = "the input", first: int = 0) -> Array:
        """(n, d_s) -> (n, d_t); `name` and the row number `first` of vectors[0] are for error lines."""
        self.check(vectors.shape[1], name)
        return served(self.adapter, vectors, self.similarity, name, first)


def served(adapter: Adapter, vectors: Array, similarity: Similarity, name: str = "the input", first: int = 0) -> Array:
    """`Map` of an adapter that is not in a file."""
    if similarity == "cosine":
        vectors = unit(vectors, name, first)
    with torch.inference_mode():
        mapped = adapter(torch.from_numpy(vectors)).numpy()
    if not np.isfinite(mapped).all():
        row = first + int(np.isfinite(mapped).all(1).argmin())
        raise UserError(f"{name}, adapted: row {row} is beyond what float32 holds; scale such vectors down")
    return unit(mapped, f"{name}, adapted", first) if similarity == "cosine" else mapped


def unit(vectors: Array, name: str, rows: int | NDArray[np.int64] = 0) -> Array:
    """Vectors divided by their lengths; refuses zero vectors, by their number: from `rows` on, or those of `rows`."""
    largest = np.maximum(vectors.max(1, keepdims=True), -vectors.min(1, keepdims=True))
    scaled = np.ldexp(vectors, -np.frexp(largest)[1])  # by powers of 2: exact, and squares stay within float32
    lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
    if not lengths.all():
        at = int(lengths.argmin())
        row = rows + at if isinstance(rows, int) else rows[at]
        raise UserError(
            f"{name}: row {row} is a zero vector, which has no cosine; remove such rows or embed them again"
        )
    scaled /= lengths
    return scaled
