"""Was the adapter fitted to what it is judged on?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmark.audit.data import Data
from benchmark.serving import Map
from benchmark.vectors import Array, open_vectors


def leaks(old_pairs: Path, data: Data) -> list[str]:
    """Warnings of queries and judged gallery items that are among the pairs: the same id, or the same old vector."""
    pairs, notes = open_vectors(old_pairs), []
    known = _prints(pairs.chunks())
    judged = (
        ("queries", data.query_file, data.query_rows),
        ("judged gallery items", data.gallery_file, data.sample),
    )
    for what, file, rows in judged:
        among = np.isin(_prints(file.chunks()), known)
        if pairs.ids is not None and file.ids is not None and pairs.ids.dtype.kind == file.ids.dtype.kind:
            among |= np.isin(file.ids, pairs.ids)
        both = int((among if rows is None else among[rows]).sum())
        if both:
            notes.append(
                f"{both} {what} are among the pairs that the adapter was fitted on (same id or same vector): that flatters it"
            )
    return notes


def fitted_to(mapping: Map, adapter: Path, judged: Sequence[Path]) -> str:
    """Whether one of the judged files is one that the adapter was fitted to, as far as its own file says."""
    same = [str(file) for file in judged if mapping.fitted_to(file)]
    if same:
        return f"{adapter.name} was fitted to {' and '.join(same)}, which it is judged on: that flatters it"
    if mapping.pairs:
        return f"{adapter.name} was fitted to other files; if these held the same items, that flatters it"
    return f"{adapter.name} does not say which items it was fitted to; if they are among these, that flatters it"


def _prints(chunks: Iterable[Array]) -> NDArray[np.int64]:
    """(N,) a number for each vector, equal for equal vectors."""
    return np.array([hash(row.tobytes()) for chunk in chunks for row in chunk], np.int64)
