"""Bring your own embeddings: the exact metrics of arrays or files in one call.

    from benchmark.evaluate import evaluate
    evaluate("new/queries.npy", "new/gallery.npy", "query_labels.npy", "gallery_labels.npy")
    {'cmc@1': 0.61, 'cmc@5': 0.83, 'map': 0.42, 'queries': 5000, 'dropped': 0, 'gallery': 5000, ...}

`evaluate_matrix` judges a sequence of releases: the queries of each against the galleries of it and all before.

Sources are arrays (numpy, torch, lists), .npy files, or .safetensors files with the keys `embeddings` (N, D), `labels`
(N,) and `ids` (N,), of which the last two may be missing. Labels and ids are integers or text. With ids, the gallery item
that has the query's own id is no candidate for it, whichever release embedded it.
"""

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

from benchmark import compatibility, statistics
from benchmark.errors import UserError
from benchmark.retrieval import Ranking, Similarity, rank

Source = str | Path | np.ndarray | Tensor | list
Release = Source | tuple[Source, Source]  # one list of items that is both, or (queries, gallery)


def evaluate(
    queries: Source,
    gallery: Source | None = None,
    query_labels: Source | None = None,
    gallery_labels: Source | None = None,
    *,
    query_ids: Source | None = None,
    gallery_ids: Source | None = None,
    same_items: bool = False,
    old_queries: Source | None = None,
    old_gallery: Source | None = None,
    similarity: Similarity = "cosine",
    ks: Sequence[int] = (1, 5),
    truncate: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Metrics of queries (N, D) against a gallery (M, D); the positives of a query are the gallery items of its label.

    Args:
        gallery: None = the queries themselves, each against all others.
        query_labels, gallery_labels: (N,) and (M,); None = those in the safetensors file.
        query_ids, gallery_ids: (N,) and (M,); None = those in the safetensors files, where both have them.
        same_items: row i is the same item on both sides, though perhaps embedded by two releases: shorthand for ids.
        old_queries, old_gallery: the same items embedded by the release before; adds "upgrade", see `evaluate_matrix`.
        truncate: compare unequal dims by their common prefix, where the spaces nest (BT2, OCA); else they are refused.
        device: where scores are computed; None = where the queries are.

    Returns:
        "cmc@<k>" and "map" in [0, 1] over the "queries" that have a positive; "dropped" (those that have none),
        "gallery" (M), "self_excluded" (queries whose own item is in the gallery), "dim" (compared dims).

    Raises:
        UserError: one line that names the file or argument: unreadable, wrong shape or type, NaN or infinity, zero
            vectors under cosine, lengths or dims that do not fit, no query with a positive.
    """
    if (old_queries is None) != (old_gallery is None):
        raise UserError("an upgrade needs both old_queries and old_gallery: give the two or neither")
    new = _read("queries", queries)
    pairs = [(new, new if gallery is None else _read("gallery", gallery))]
    if old_queries is not None and old_gallery is not None:
        pairs.insert(0, (_read("old_queries", old_queries), _read("old_gallery", old_gallery)))
    truth = _truth(pairs, query_labels, gallery_labels, query_ids, gallery_ids, same_items or gallery is None)
    settings = _Settings(similarity, tuple(ks), truncate, device)
    ranking = _rank(*pairs[-1], truth, settings)
    if isinstance(ranking, str):
        raise UserError(ranking)
    dim = min(vectors.shape[1] for vectors in (pairs[-1][0].vectors, pairs[-1][1].vectors))
    result = {**ranking.metrics(ks), **truth.counts(), "dim": dim}
    return {**result, "upgrade": _matrix(pairs, truth, settings)} if len(pairs) > 1 else result


def evaluate_matrix(
    releases: Sequence[Release],
    query_labels: Source | None = None,
    gallery_labels: Source | None = None,
    *,
    query_ids: Source | None = None,
    gallery_ids: Source | None = None,
    same_items: bool = False,
    independent: Sequence[Release] | None = None,
    similarity: Similarity = "cosine",
    ks: Sequence[int] = (1, 5),
    truncate: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """The compatibility matrix of successive releases, oldest first, and what it says; arguments as for `evaluate`.

    Args:
        releases: T sources of one item list, searched by itself without the item itself, or T pairs (queries, gallery).
            Items and their order are the same in every release.
        independent: the same T releases trained without compatibility: the oracles that gains and drops refer to.

    Returns:
        "matrices": metric -> T x T, [t][k] = queries of release t, gallery of release k; None above the diagonal and
        where undefined; "undefined": "t,k" -> reason; "independent": as "matrices" or None; "summary": metric -> what
        `compatibility.summary` says, with "flips" for CMC, AC95 and all that needs oracles None without `independent`;
        "queries", "dropped", "gallery", "self_excluded" as in `evaluate`; "dims": of each release.
    """
    pairs = _pairs("release", releases)
    bounds = _pairs("independent release", independent or [])
    if bounds and len(bounds) != len(pairs):
        raise UserError(f"independent needs a source for each of the {len(pairs)} releases, got {len(bounds)}")
    same_items = same_items or all(queries is gallery for queries, gallery in pairs)
    truth = _truth([*pairs, *bounds], query_labels, gallery_labels, query_ids, gallery_ids, same_items)
    return _matrix(pairs, truth, _Settings(similarity, tuple(ks), truncate, device), bounds)


# ---------------------------------------------------------------------------------------------------------- computing


@dataclass(frozen=True)
class _Embedded:
    """What one source holds."""

    argument: str  # what it is called where no file has a name
    file: str | None
    vectors: Tensor  # (N, D)
    labels: NDArray | None = None
    ids: NDArray | None = None

    def __str__(self) -> str:
        return self.file or self.argument


_Pair = tuple[_Embedded, _Embedded]  # queries, gallery


@dataclass(frozen=True)
class _Truth:
    """What all releases share: labels and ids of the two item lists, as integers."""

    labels: tuple[Tensor, Tensor]  # (N,), (M,)
    ids: tuple[Tensor, Tensor] | tuple[None, None]
    files: Mapping[str, str]  # argument of `rank` -> file

    def counts(self) -> dict[str, int]:
        own = 0 if self.ids[0] is None else int(torch.isin(self.ids[0], self.ids[1]).sum())
        return {"gallery": len(self.labels[1]), "self_excluded": own}


@dataclass(frozen=True)
class _Settings:
    similarity: Similarity
    ks: tuple[int, ...]
    truncate: bool
    device: str | None

    def __post_init__(self) -> None:
        if not self.ks or not all(isinstance(k, int) and k > 0 for k in self.ks):
            raise UserError(f"ks are whole numbers from 1 on, e.g. (1, 5), not {self.ks}")


def _rank(queries: _Embedded, gallery: _Embedded, truth: _Truth, settings: _Settings) -> Ranking | str:
    """The ranking, or why dims that differ cannot be compared."""
    q, g = queries.vectors, gallery.vectors
    if q.ndim == g.ndim == 2 and q.shape[1] != g.shape[1]:
        if not settings.truncate:
            return (
                f"{queries} has {q.shape[1]} dims and {gallery} has {g.shape[1]}: no similarity without a link between the two "
                "spaces (truncate=True compares the common prefix, where they nest)"
            )
        q, g = (vectors[:, : min(q.shape[1], g.shape[1])] for vectors in (q, g))
    (query_labels, gallery_labels), (query_ids, gallery_ids) = truth.labels, truth.ids
    try:
        ranking = rank(
            q,
            g,
            query_labels,
            gallery_labels,
            query_ids=query_ids,
            gallery_ids=gallery_ids,
            similarity=settings.similarity,
            device=settings.device,
        )
    except ValueError as error:
        names = {**truth.files, "queries": queries.file, "gallery": gallery.file}
        name = names.get(re.match(r"\w*", str(error))[0])  # type: ignore[index]
        raise UserError(f"{name}: {error}" if name else str(error)) from None
    if not (ranking.first > 0).any():
        raise UserError("no query has a gallery item of its label: do both label lists use the same names or numbers?")
    return ranking


def _matrix(pairs: Sequence[_Pair], truth: _Truth, settings: _Settings, bounds: Sequence[_Pair] = ()) -> dict[str, Any]:
    own, bound = _cells(pairs, truth, settings), _cells(bounds, truth, settings)
    first = next(iter(own.values()))
    if isinstance(first, str):
        raise UserError(first)
    metrics = [*(f"cmc@{k}" for k in settings.ks), "map"]
    matrices = {metric: _means(own, metric, len(pairs)) for metric in metrics}
    oracles = {metric: _means(bound, metric, len(pairs)) for metric in metrics}
    lower = _lower_bounds(own, bound, metrics, truth.labels[0], len(pairs)) if bounds and len(pairs) > 1 else {}
    summary = {}
    for metric, C in matrices.items():
        summary[metric] = compatibility.summary(C, oracles[metric], **lower.get(metric, {}))
        if metric != "map":
            summary[metric]["flips"] = _flips(own, metric)
    counted = first.metrics()
    return {
        "matrices": {metric: compatibility.nulls(C) for metric, C in matrices.items()},
        "undefined": {f"{t},{k}": cell for (t, k), cell in own.items() if isinstance(cell, str)},
        "independent": {metric: compatibility.nulls(C) for metric, C in oracles.items()} if bounds else None,
        "summary": summary,
        "queries": counted["queries"],
        "dropped": counted["dropped"],
        **truth.counts(),
        "dims": [gallery.vectors.shape[1] for _, gallery in pairs],
    }


_Cells = Mapping[tuple[int, int], Ranking | str]  # (t, k) -> ranking, or why there is none


def _cells(pairs: Sequence[_Pair], truth: _Truth, settings: _Settings) -> _Cells:
    return {(t, k): _rank(pairs[t][0], pairs[k][1], truth, settings) for t in range(len(pairs)) for k in range(t + 1)}


def _values(ranking: Ranking, metric: str) -> NDArray[np.float64]:
    """(N,) in [0, 1], NaN for dropped queries: AP, or whether a positive is within the top k."""
    first = ranking.first.numpy()
    values = ranking.ap.numpy() if metric == "map" else (first <= int(metric.removeprefix("cmc@"))).astype(float)
    return np.where(first > 0, values, np.nan)


def _means(cells: _Cells, metric: str, releases: int) -> NDArray[np.float64]:
    C = np.full((releases, releases), np.nan)
    for at, cell in cells.items():
        if not isinstance(cell, str):
            C[at] = np.nanmean(_values(cell, metric))
    return C


def _flips(cells: _Cells, metric: str) -> dict[str, dict[str, float]]:
    """Shares of queries that the update of the query model turns from miss to hit, and back, on the old gallery."""
    flips = {}
    for (t, k), cell in cells.items():
        old = cells[k, k]
        if k < t and not isinstance(cell, str) and not isinstance(old, str):
            kept = old.first.numpy() > 0
            flips[f"{t},{k}"] = compatibility.flips(_values(old, metric)[kept], _values(cell, metric)[kept])._asdict()
    return flips


def _lower_bounds(
    own: _Cells, bound: _Cells, metrics: Sequence[str], labels: Tensor, releases: int
) -> dict[str, dict[str, NDArray]]:
    """metric -> (T, T) lower ends of the paired 95 % intervals that AC95 asks for; NaN where undefined."""
    names = {"lower_own": own, "lower_independent": bound}
    bounds = {metric: {name: np.full((releases, releases), np.nan) for name in names} for metric in metrics}
    where, gains = [], []
    for metric in metrics:
        for name, reference in names.items():
            for (t, k), cell in own.items():
                old = reference[k, k]
                if k < t and not isinstance(cell, str) and not isinstance(old, str):
                    where.append(bounds[metric][name][t : t + 1, k])
                    gains.append(_values(cell, metric) - _values(old, metric))
    if gains:
        means = statistics.bootstrap_means(np.stack(gains)[:, None], labels.numpy(), seed=0)  # (resamples, gains)
        for cell_bound, value in zip(where, np.quantile(means, 0.025, axis=0)):
            cell_bound[:] = value
    return bounds


# ------------------------------------------------------------------------------------------------------------ reading


def _pairs(name: str, releases: Sequence[Release]) -> list[_Pair]:
    pairs = []
    for t, release in enumerate(releases):
        if isinstance(release, tuple):
            if len(release) != 2:
                raise UserError(f"{name} {t} is a pair (queries, gallery) or one source, not {len(release)} of them")
            pairs.append((_read(f"queries of {name} {t}", release[0]), _read(f"gallery of {name} {t}", release[1])))
        else:
            one = _read(f"{name} {t}", release)
            pairs.append((one, one))
    return pairs


def _read(argument: str, source: Source) -> _Embedded:
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
    return _Embedded(argument, file, _vectors(name, vectors), _names(name, labels), _names(name, ids))


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


def _truth(
    pairs: Sequence[_Pair],
    query_labels: Source | None,
    gallery_labels: Source | None,
    query_ids: Source | None,
    gallery_ids: Source | None,
    same_items: bool,
) -> _Truth:
    if not pairs:
        raise UserError("no releases: give one source, or one pair (queries, gallery), for each")
    counts = [_rows([pair[side] for pair in pairs]) for side in (0, 1)]
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
    return _Truth(_codes("labels", *labels), _codes("ids", *ids) if both else (None, None), files)


def _rows(side: Sequence[_Embedded]) -> int:
    for other in side:
        if len(other.vectors) != len(side[0].vectors):
            raise UserError(
                f"{other} has {len(other.vectors)} rows and {side[0]} has {len(side[0].vectors)}: every release embeds the "
                "same items in the same order"
            )
    return len(side[0].vectors)


def _given(name: str, source: Source | None, pairs: Sequence[_Pair]) -> NDArray | None:
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
