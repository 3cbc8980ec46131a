"""What a user brings to be judged: embeddings, labels and ids as arrays or files, read and checked before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from benchmark.errors import UserError

Source = str | Path | np.ndarray | Tensor | list
Release = Source | tuple[Source, Source]  # one list of items that is both, or (queries, gallery)


@dataclass(frozen=True)
class Embedded:
    """What one source holds."""

    argument: str  # what it is called where no file has a name
    file: str | None
    vectors: Tensor  # (N, D)
    labels: NDArray | None = None
    ids: NDArray | None = None

    def __str__(self) -> str:
        return self.file or self.argument


Pair = tuple[Embedded, Embedded]  # queries, gallery


@dataclass(frozen=True)
class Truth:
    """What all releases share: labels and ids of the two item lists, as integers."""

    labels: tuple[Tensor, Tensor]  # (N,), (M,)
    ids: tuple[Tensor, Tensor] | tuple[None, None]
    files: Mapping[str, str]  # argument of `rank` -> file

    def counts(self) -> dict[str, int]:
        own = 0 if self.ids[0] is None else int(torch.isin(self.ids[0], self.ids[1]).sum())
        return {"gallery": len(self.labels[1]), "self_excluded": own}


def read_pairs(name: str, releases: Sequence[Release]) -> list[Pair]:
    pairs = []
    for t, release in enumerate(releases):
        if isinstance(release, tuple):
            if len(release) != 2:
                raise UserError(f"{name} {t} is a pair (queries, gallery) or one source, not {len(release)} of them")
            pairs.append((read(f"queries of {name} {t}", release[0]), read(f"gallery of {name} {t}", release[1])))
        else:
            one = read(f"{name} {t}", release)
            pairs.append((one, one))
    return pairs


def read(argument: str, source: Source) -> Embedded:
    arrays: Mapping[str, Any] = {"embeddings": source}
    file = str(source) if isinstance(source, (str, Path)) else None
    if file:
        arrays = _open(Path(file))
        views = [key for key in arrays if re.fullmatch(r"view/\d+/main", key)]  # as the engine keeps embeddings
        key = "embeddings" if "embeddings" in arrays or len(views) != 1 else views[0]
        if key not in arrays:
            raise UserError(f"{file}: has no tensor named 'embeddings', only {', '.join(arrays) or 'nothing'}")
        arrays = {**arrays, "embeddings": arrays[key]}
    vectors, labels, ids = (arrays.get(name) for name in ("embeddings", "labels", "ids"))
    name = file or argument
    return Embedded(argument, file, _vectors(name, vectors), _names(name, labels), _names(name, ids))


def _open(path: Path) -> dict[str, Any]:
    """Arrays of a file by key; the only one of an .npy file counts as "embeddings". Nothing is unpickled."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if isinstance(array, np.ndarray):
                return {"embeddings": array}
            raise ValueError("it is an .npz archive")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {(str(error) or 'it is empty').splitlines()[0]}") from None
    raise UserError(
        f"{path}: is neither .npy nor .safetensors; write it with numpy.save (pickles, .pt too, are not opened)"
    )


def _vectors(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        vectors = value.detach()
    else:
        try:
            array = np.asarray(value)
            native = array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)
            vectors = torch.from_numpy(np.ascontiguousarray(native))
        except (TypeError, ValueError):
            raise UserError(f"{name}: embeddings are an (N, D) array of floats, not {_kind(value)}") from None
    if not vectors.is_floating_point() or vectors.ndim != 2 or not vectors.numel():
        raise UserError(f"{name}: embeddings are a non-empty (N, D) array of floats, not {_kind(value)}")
    return vectors


def _kind(value: Any) -> str:
    try:
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    except AttributeError:
        return f"a {type(value).__name__}"


def _names(name: str, value: Any) -> NDArray | None:
    """Labels or ids as an array of integers or text."""
    if value is None:
        return None
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype.kind == "O" and all(isinstance(item, str) for item in array.ravel()):  # as pandas keeps text
        array = array.astype(str)
    if array.ndim != 1 or array.dtype.kind not in "iuUS":
        raise UserError(f"{name}: labels and ids are one integer or text a row, not {_kind(array)}")
    return array


def find_truth(
    pairs: Sequence[Pair],
    query_labels: Source | None,
    gallery_labels: Source | None,
    query_ids: Source | None,
    gallery_ids: Source | None,
    same_items: bool,
) -> Truth:
    if not pairs:
        raise UserError("no releases: give one source, or one pair (queries, gallery), for each")
    counts = [rows_of([pair[side] for pair in pairs]) for side in (0, 1)]
    arguments = {
        "query_labels": query_labels,
        "gallery_labels": gallery_labels,
        "query_ids": query_ids,
        "gallery_ids": gallery_ids,
    }
    found = {name: _given(name, source, pairs) for name, source in arguments.items()}
    if pairs[-1][0] is pairs[-1][1]:  # one list: what is known of one side holds for the other
        for a, b in (("query_labels", "gallery_labels"), ("query_ids", "gallery_ids")):
            found[a], found[b] = (found[x] if found[x] is not None else found[y] for x, y in ((a, b), (b, a)))
    labels, ids = ((found[f"query_{what}"], found[f"gallery_{what}"]) for what in ("labels", "ids"))
    for side, word in enumerate(("query", "gallery")):
        if labels[side] is None:
            raise UserError(f"no labels for {pairs[-1][side]}: give {word}_labels, or 'labels' in a .safetensors file")
    both = ids[0] is not None and ids[1] is not None
    if not both and (query_ids is not None or gallery_ids is not None):
        raise UserError("give both query_ids and gallery_ids, so that no item finds itself, or neither")
    if same_items and not both:
        if counts[0] != counts[1]:
            raise UserError(f"same_items: {counts[0]} queries and {counts[1]} gallery items are not one list")
        ids, both = (np.arange(counts[0]), np.arange(counts[0])), True
    files = {name: str(source) for name, source in arguments.items() if isinstance(source, (str, Path))}
    return Truth(_codes("labels", *labels), _codes("ids", *ids) if both else (None, None), files)


def rows_of(side: Sequence[Embedded]) -> int:
    for other in side:
        if len(other.vectors) != len(side[0].vectors):
            raise UserError(
                f"{other} has {len(other.vectors)} rows and {side[0]} has {len(side[0].vectors)}: every release embeds the "
                "same items in the same order"
            )
    return len(side[0].vectors)


def _given(name: str, source: Source | None, pairs: Sequence[Pair]) -> NDArray | None:
    """Labels or ids from their own source, else from the files of embeddings, which must agree."""
    word, what = name.split("_")
    if isinstance(source, (str, Path)):
        arrays = _open(Path(source))
        key = "embeddings" if str(source).endswith(".npy") else what
        if key not in arrays:
            raise UserError(f"{source}: has no tensor named '{what}', only {', '.join(arrays) or 'nothing'}")
        return _names(str(source), arrays[key])
    if source is not None:
        return _names(name, source)
    having = [e for e in (pair[word == "gallery"] for pair in pairs) if getattr(e, what) is not None]
    for other in having[1:]:
        if not np.array_equal(getattr(other, what), getattr(having[0], what)):
            raise UserError(
                f"{other} and {having[0]} hold different {what}: every release embeds the same items in order"
            )
    return getattr(having[0], what) if having else None


def _codes(what: str, a: NDArray | None, b: NDArray | None) -> tuple[Tensor, Tensor]:
    """Integers that are equal where the names are."""
    assert a is not None and b is not None
    if (a.dtype.kind in "US") != (b.dtype.kind in "US"):
        raise UserError(f"the {what} of queries and gallery are text on one side and integers on the other")
    if a.dtype.kind in "US":
        codes = np.unique(np.concatenate([a, b]), return_inverse=True)[1]
        a, b = codes[: len(a)], codes[len(a) :]
    return torch.from_numpy(a.astype(np.int64)), torch.from_numpy(b.astype(np.int64))
