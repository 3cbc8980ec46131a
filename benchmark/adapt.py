"""Adapters from embedding files alone: fitted to paired files, chosen on held-out pairs, applied to files of any size.

Query side: new -> old, for new queries against the untouched gallery. Gallery side: old -> new, for stored vectors, which
then meet plain new queries. Where the score is a cosine (the default), vectors are put to unit length before the map and
after it. Files are read in chunks (`benchmark.vectors`); what is held in memory is a chunk, the sums of closed forms, and
the held-out pairs, besides up to IN_MEMORY pairs for maps without a closed form.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmark import adapters
from benchmark.adapters import Adapter, Moments
from benchmark.errors import UserError, unknown
from benchmark.neighbours import Similarity, overlap, search
from benchmark.serving import PAIR_FILES, Map, Side, content, served, unit
from benchmark.vectors import CHUNK, Array, Vectors, align, open_vectors
from benchmark.writer import Writer

Progress = Callable[[int, int], None]  # rows done, of how many

HELD_OUT = 0.2  # share of the pairs that is held out, at most HELD_OUT_MOST pairs
HELD_OUT_MOST = 5_000
IN_MEMORY = 100_000  # pairs for maps that are not fitted to sums
K = 10
PIECE = 500  # held-out pairs that are judged at a time
ENOUGH = 20  # held-out pairs whose doubt refuses a fit; that of fewer is a warning, unless chance does better
SHUFFLES = 100  # of held-out pairs, to see what a map reaches that knows nothing of its input


def quiet(done: int, total: int) -> None:
    pass


class Judged(NamedTuple):
    """What an adapter does to pairs that it was not fitted to."""

    fidelity: float  # mean cosine of mapped and true vector
    overlap: float  # overlap@k with the target space's own ranking, in [0, 1]
    k: int  # min(10, a tenth of the candidates), so that chance is no more than a tenth where there are 10 candidates
    chance: float  # k / candidates, the overlap of a random ranking
    luck: float  # what pairs put together at random hardly exceed, by SHUFFLES shufflings

    def __str__(self) -> str:
        return f"overlap@{self.k} {self.overlap:.3f} (by chance {self.chance:.3f})"


@dataclass(frozen=True)
class Fit:
    """An adapter and what it does to held-out pairs."""

    adapter: Adapter
    notes: dict[str, str]
    judged: Judged
    seconds: float  # of the fit, without reading the files

    @property
    def fidelity(self) -> float:
        return self.judged.fidelity

    @property
    def overlap(self) -> float:
        return self.judged.overlap


class Fits(NamedTuple):
    ranked: list[Fit]  # best first: by overlap, then by fidelity
    refused: dict[str, str]  # method -> why it cannot be fitted to these pairs
    note: str  # how the two files were put together


# ---------------------------------------------------------------------------------------------------------------- fit


def fit(
    old: Path,
    new: Path,
    methods: Sequence[str],
    *,
    side: Side = "query",
    similarity: Similarity = "cosine",
    pairs: int | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> Fits:
    """Every method fitted to the same pairs and judged on held-out ones; in memory, to be written by `adapters.save`.

    Args:
        old, new: files of the same items embedded by both models; by id where both have ids, else row by row.
        methods: names of `benchmark.adapters.KINDS`.
        pairs: a random choice of so many; None = all.
        settings: hyperparameters; of one method only.

    Raises:
        UserError: one line: files that do not fit, an unknown method, NaN, zero vectors; too few pairs or constant columns,
            if that leaves no method; pairs that no map finds any better than chance.
    """
    for name in methods:
        if name not in adapters.KINDS:
            raise unknown("method", name, adapters.KINDS)
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: seeds are whole numbers from 0 to 2^63 - 1")
    if settings and len(methods) > 1:
        raise UserError("--set belongs to one method; name one")
    data = _Pairs(*((new, old) if side == "query" else (old, new)), similarity, pairs, seed)
    moments, memory, held = data.read(any(not adapters.KINDS[name].streams for name in methods), progress)
    contents = {note: content(file) for note, file in zip(PAIR_FILES, (old, new))}
    fits, refused = [], {}
    for name in methods:
        start = time.perf_counter()
        source = (moments,) if adapters.KINDS[name].streams else memory
        try:
            adapter = adapters.fit(name, *source, seed=seed, **(settings or {}))
        except UserError as error:
            refused[name] = data.explained(str(error))
            continue
        seconds = time.perf_counter() - start
        judged = judge(adapter, *held, side, similarity)
        notes: dict[str, object] = {"side": side, "similarity": similarity, "seed": seed, "pairs": data.count}
        notes |= {"held out": data.held, "fidelity": f"{judged.fidelity:.4f}"}
        notes |= {f"overlap@{judged.k}": f"{judged.overlap:.4f}", "chance": f"{judged.chance:.4f}"} | contents
        fits.append(Fit(adapter, {k: str(v) for k, v in notes.items()}, judged, seconds))
    if not fits:
        raise UserError("; ".join(reasons(refused)))
    fits.sort(key=lambda fit: (-fit.overlap, -fit.fidelity))
    best = fits[0].judged
    if best.overlap > best.luck:
        return Fits(fits, refused, data.note)
    doubt = f"{best} on {data.held} held-out pairs cannot be told from chance"
    if data.held < ENOUGH and best.overlap > best.chance:
        return Fits(fits, refused, f"{data.note}; but {doubt}: give more pairs")
    raise UserError(
        f"{old} and {new} do not seem to hold the same items in the same order: {doubt}; check the order, give both files "
        "ids, or more pairs"
    )


def reasons(refused: Mapping[str, str]) -> list[str]:
    """Each reason once, after the methods that it holds for."""
    methods: dict[str, list[str]] = {}
    for name, reason in refused.items():
        methods.setdefault(reason, []).append(name)
    return [
        reason if len(names) == 1 and names[0] in reason else f"{', '.join(names)}: {reason}"
        for reason, names in methods.items()
    ]


class _Pairs:
    """Two files of the same items as chunks of (source, target), a random part of them held out."""

    def __init__(self, source: Path, target: Path, similarity: Similarity, pairs: int | None, seed: int):
        self.source, self.target, self.similarity = open_vectors(source), open_vectors(target), similarity
        self.source_rows, self.target_rows, self.note = align(self.source, self.target)
        total = len(self.source) if self.source_rows is None else len(self.source_rows)
        if pairs is not None and not 10 <= pairs <= total:
            raise UserError(f"--pairs {pairs}: the files hold {total} pairs, and less than 10 fit nothing")
        if total < 10:
            raise UserError(f"{source} and {target} hold {total} pairs; even the plainest map and its test need 10")
        order = np.random.default_rng(seed).permutation(total)[:pairs]
        self.count, held = len(order), min(HELD_OUT_MOST, max(round(HELD_OUT * len(order)), min(12, len(order) // 2)))
        self.held = held
        self.kind = np.zeros(total, np.int8)  # 0 left out, 1 held out, 2 fitted to, 3 fitted to and fit for memory
        self.kind[order[:held]] = 1
        self.kind[order[held:]] = 2
        self.kind[order[held : held + IN_MEMORY]] = 3

    def explained(self, error: str) -> str:
        """A line of `benchmark.adapters` with the file's name in place of its side."""
        for side, file in (("source", self.source), ("target", self.target)):
            error = error.replace(f"{side}:", f"{file}:")
        return f"{error} ({self.held} of the {self.count} pairs are held out)" if "too few" in error else error

    def read(self, memory: bool, progress: Progress) -> tuple[Moments, tuple[Tensor, Tensor], tuple[Array, Array]]:
        """Sums over the pairs to fit to; if asked for, those pairs; the held-out ones. One pass through both files."""
        dims = self.source.dim, self.target.dim
        moments, at = Moments(*dims), 0
        kinds = (1, 3) if memory else (1,)
        # allocated at once: pieces kept between chunks would leave the heap in tatters
        kept = {kind: [np.empty((int((self.kind == kind).sum()), dim), np.float32) for dim in dims] for kind in kinds}
        filled = dict.fromkeys(kinds, 0)
        for pair in self._chunks():
            kind = self.kind[at : at + len(pair[0])]
            moments.add(*(torch.from_numpy(z[kind >= 2]) for z in pair))
            for which, arrays in kept.items():
                rows = kind == which
                end = filled[which] + int(rows.sum())
                for array, z in zip(arrays, pair):
                    array[filled[which] : end] = z[rows]
                filled[which] = end
            at += len(kind)
            progress(at, len(self.kind))
        in_memory = [torch.from_numpy(array) for array in kept.get(3, [np.empty((0, dim), np.float32) for dim in dims])]
        return moments, (in_memory[0], in_memory[1]), (kept[1][0], kept[1][1])

    def _chunks(self) -> Iterator[tuple[Array, Array]]:
        rows = max(1, CHUNK // max(self.source.dim, self.target.dim))
        if self.source_rows is None or self.target_rows is None:
            at = 0
            for x, y in zip(self.source.chunks(rows), self.target.chunks(rows)):
                yield self._ready(x, self.source, at), self._ready(y, self.target, at)
                at += len(x)
            return
        # in the source's order; a Parquet target has no quick way to a row and is held in memory for it
        held = None if self.target.random_access else self.target.take(self.target_rows)
        at = done = 0  # row of the source, pair
        for x in self.source.chunks(rows):
            end = int(np.searchsorted(self.source_rows, at + len(x)))
            mine, theirs = self.source_rows[done:end], self.target_rows[done:end]
            y = self.target.take(theirs) if held is None else held[done:end]
            yield self._ready(x[mine - at], self.source, mine), self._ready(y, self.target, theirs)
            at, done = at + len(x), end

    def _ready(self, vectors: Array, file: Vectors, rows: int | NDArray[np.int64]) -> Array:
        return unit(vectors, str(file), rows) if self.similarity == "cosine" else vectors


# -------------------------------------------------------------------------------------------------------------- judge


def judge(adapter: Adapter, source: Array, target: Array, side: Side, similarity: Similarity) -> Judged:
    """Fidelity and overlap of an adapter on pairs source (N, d_s), target (N, d_t) that it was not fitted to.

    Each pair asks all others: on the query side mapped source against target, on the gallery side target against mapped
    source; the reference is target against target.
    """
    target = unit(target, "target") if similarity == "cosine" else target
    own, mapped, cosines = np.arange(len(source)), np.empty_like(target), 0.0
    pieces = [slice(at, at + PIECE) for at in range(0, len(source), PIECE)]
    for piece in pieces:
        mapped[piece] = served(adapter, source[piece], similarity, "held-out pairs", piece.start)
        cosines += float((unit(mapped[piece], "mapped") * unit(target[piece], "target")).sum(dtype=np.float64))
    candidates = len(source) - 1
    k = max(1, min(K, candidates // 10))

    def nearest(asked: Array, gallery: Array) -> NDArray[np.int64]:
        return np.concatenate([search(asked[piece], gallery, k, similarity, own[piece]).rows for piece in pieces])

    found = nearest(mapped, target) if side == "query" else nearest(target, mapped)
    wanted = nearest(target, target)
    # a map that knows nothing still finds what is near to everything, hence more than k / candidates: what was mapped is
    # given to other items, and that is the queries or the gallery
    orders = (np.random.default_rng(seed).permutation(own) for seed in range(SHUFFLES))
    lucky = [overlap(found[order] if side == "query" else order[found], wanted, k).mean() for order in orders]
    luck = float(max(np.mean(lucky) + 3 * np.std(lucky), *lucky))
    return Judged(cosines / len(source), float(overlap(found, wanted, k).mean()), k, k / candidates, luck)


# -------------------------------------------------------------------------------------------------------------- apply


def apply(path: Path, adapter: Path, out: Path, progress: Progress = quiet) -> tuple[int, int]:
    """Writes the file `path` with every vector adapted to `out`; goes on where an interrupted run ended.

    Returns:
        Rows written, and how many of them an earlier run had written.

    Raises:
        UserError: one line: dims that disagree, NaN, zero vectors, what `Writer` refuses.
    """
    mapping, vectors = Map.load(adapter), open_vectors(path)
    mapping.check(vectors.dim, str(path))
    with Writer(out, vectors, mapping.adapter.target_dim, mapping.key) as writer:
        before = writer.done
        progress(before, len(vectors))
        for chunk in vectors.chunks(start=before):
            writer.write(mapping(chunk, str(path), writer.done))
            progress(writer.done, len(vectors))
    return len(vectors), before
