"""A small world to audit: queries and a gallery of classes, by an old model and a better new one, and files of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmark import adapters
from benchmark.adapt import fit

RNG = np.random.default_rng(0)
NQ, NG, OLD, NEW, CLASSES = 150, 400, 8, 12, 12
CENTRES, TO_OLD, TO_NEW = RNG.normal(size=(CLASSES, 6)), RNG.normal(size=(6, OLD)), RNG.normal(size=(6, NEW))


def embed(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same items by the old and, with less noise, by the new model."""
    rng = np.random.default_rng(seed)
    latent = CENTRES[labels] + 0.6 * rng.normal(size=(len(labels), 6))
    old, new = latent @ TO_OLD + rng.normal(size=(len(labels), OLD)), latent @ TO_NEW
    return old.astype(np.float32), (new + 0.3 * rng.normal(size=new.shape)).astype(np.float32)


Q_LABELS, G_LABELS = RNG.integers(0, CLASSES, NQ), RNG.integers(0, CLASSES, NG)
Q_OLD, Q_NEW = embed(Q_LABELS, 1)
G_OLD, G_NEW = embed(G_LABELS, 2)
P_OLD, P_NEW = embed(RNG.integers(0, CLASSES, 500), 3)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x.astype(np.float64) ** 2).sum(1, keepdims=True))


def nearest(q: np.ndarray, g: np.ndarray, k: int, own: np.ndarray | None = None) -> list[list[int]]:
    """By cosine in float64, one query at a time, with a plain sort."""
    ranked = []
    for i, row in enumerate(unit(q)):
        scores = unit(g) @ row
        ranked.append([j for j in sorted(range(len(g)), key=lambda j: -scores[j]) if own is None or own[i] != j][:k])
    return ranked


def shared(found: list[list[int]], wanted: list[list[int]], k: int) -> np.ndarray:
    return np.array([len(set(f[:k]) & set(w[:k])) / k for f, w in zip(found, wanted)])


def npy(folder: Path, **arrays: np.ndarray) -> dict[str, Path]:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return {name: folder / f"{name}.npy" for name in arrays}


def parquet(path: Path, array: np.ndarray, ids: Any = None, **columns: Any) -> Path:
    identity = {} if ids is None else {"id": list(ids)}
    pq.write_table(pa.table({**identity, "vector": list(array), **columns}), path)
    return path


def write_files(folder: Path) -> dict[str, Path]:
    return npy(folder, qo=Q_OLD, qn=Q_NEW, go=G_OLD, gn=G_NEW, po=P_OLD, pn=P_NEW, ql=Q_LABELS, gl=G_LABELS)


def write_adapter(files: dict[str, Path], folder: Path, side: Any = "query") -> Path:
    (best,) = fit(files["po"], files["pn"], ["Ridge"], side=side).ranked
    adapters.save(folder / f"{side}.safetensors", best.adapter, best.notes)
    return folder / f"{side}.safetensors"


def mapped(adapter: Path, x: np.ndarray) -> np.ndarray:
    return adapters.load(adapter)[0](torch.from_numpy(unit(x).astype(np.float32))).numpy()


def four(files: dict[str, Path]) -> list[Path]:
    return [files[name] for name in ("qo", "qn", "go", "gn")]


def index_of(path: Path, factory: str, vectors: np.ndarray, ids: np.ndarray | None = None, **settings: int) -> Path:
    index = faiss.index_factory(vectors.shape[1], factory)
    x = unit(vectors).astype(np.float32)
    for part in (index, getattr(index, "index", index)):
        if hasattr(part, "cp"):
            part.cp.min_points_per_centroid = 1
    if hasattr(index, "pq"):
        index.pq.cp.min_points_per_centroid = 1
    index.train(x)
    index.add(x) if ids is None else index.add_with_ids(x, ids)
    for name, value in settings.items():
        faiss.ParameterSpace().set_index_parameter(index, name, value)
    faiss.write_index(index, str(path))
    return path
