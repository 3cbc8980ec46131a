"""Was the adapter fitted to what it is judged on?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmark import adapters
from benchmark.audit.data import Data
from benchmark.files import sha256_file
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


def fitted_to(adapter: Path, judged: Sequence[Path]) -> list[str]:
    """Whether one of the judged files is one that the adapter was fitted to, as far as its notes say.

    They may name the files of its pairs, under "old file" and "new file", by size in bytes and sha256.
    """
    notes = adapters.load(adapter)[1]
    known = {notes[name] for name in ("old file", "new file") if name in notes}
    sizes = {content.partition(" ")[0] for content in known}
    same = [
        file for file in judged if (size := str(file.stat().st_size)) in sizes and f"{size} {sha256_file(file)}" in known
    ]  # fmt: skip
    if same:
        return [f"{adapter.name} was fitted to {' and '.join(map(str, same))}, which it is judged on: that flatters it"]
    if known:
        return [f"{adapter.name} was fitted to other files; if these held the same items, that flatters it"]
    return [f"{adapter.name} does not say which items it was fitted to; if they are among these, that flatters it"]


def _prints(chunks: Iterable[Array]) -> NDArray[np.int64]:
    """(N,) a number for each vector, equal for equal vectors."""
    return np.array([hash(row.tobytes()) for chunk in chunks for row in chunk], np.int64)
