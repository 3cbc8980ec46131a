"""Columns of the query files that part the queries into slices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmark.errors import UserError, unknown
from benchmark.vectors import Vectors

MOST = 50  # values of a column that slices the queries without being asked for
FEW = 4  # values of a column of fractions that are taken for names


def slices_of(
    files: Sequence[tuple[Vectors, NDArray[np.int64] | None]], asked: Sequence[str] | None, labels: str | None
) -> dict[str, NDArray]:
    """Columns of the files by name, in the rows given; of those not asked for, what has 2 to MOST values and is no label.

    Columns of numbers that were asked for are cut at their quartiles, if they hold fractions or more than MOST integers.
    """
    known = {name: (file, rows) for file, rows in reversed(files) for name in file.columns}
    found = {}
    for name in known if asked is None else asked:
        if name not in known:
            raise unknown("column of the query files", name, known or ["none: Parquet files hold columns"])
        file, rows = known[name]
        if asked is None and name == labels:
            continue
        try:
            values = file.few(name, MOST) if asked is None else file.column(name)
        except UserError:
            if asked is None:
                continue
            raise
        if values is None:
            continue
        values = values if rows is None else values[rows]
        if asked is not None:
            found[name] = quartiles(values)
        elif len(np.unique(values)) >= 2:
            found[name] = values
    return found


def quartiles(values: NDArray) -> NDArray:
    """(N,) the quarter that each number lies in, named by its least and its greatest; what is no number stays as it is."""
    present = values != "null" if values.dtype.kind == "U" else np.ones(len(values), bool)
    try:
        numbers = values[present].astype(float)
    except ValueError:
        return values
    fractions = values.dtype.kind == "U" and bool((numbers != np.round(numbers)).any())
    if len(np.unique(numbers)) <= (FEW if fractions else MOST) or not np.isfinite(numbers).all():
        return values
    quarter = np.searchsorted(np.quantile(numbers, [0.25, 0.5, 0.75]), numbers)
    names = np.full(len(values), "null", object)
    parts = {i: numbers[quarter == i] for i in np.unique(quarter)}
    ranges = {i: f"{part.min():.6g} to {part.max():.6g} (quarter {i + 1})" for i, part in parts.items()}
    names[present] = [ranges[i] for i in quarter]
    return names.astype(str)
