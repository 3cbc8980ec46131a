"""How long ways to serve take a query, and how long it takes to write all vectors again; on this machine, as it is now."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmark.audit.data import Data
from benchmark.audit.faiss_index import AGAIN
from benchmark.audit.ways import ADAPTER, OLD, Served
from benchmark.neighbours import Rows, fuse, search
from benchmark.vectors import Array

TIMED = 500  # queries, one at a time
LONGEST = 20.0  # seconds a way; then it is fewer queries
WANTED = 10  # neighbours a query
TWO = "two indexes"


def latency(data: Data, served: Served) -> dict[str, Any]:
    """Milliseconds from a query's embedding to its first 10, one query at a time: p50 and p99 of each way.

    With an index all searches are its own: the second index of "two indexes" is taken to be as fast as the one given. An
    index over adapted vectors does not tell how fast one over the old vectors is, so there the old model is left out.
    """
    mapping, index = served.mapping, served.index

    def one(query: Array, gallery: Array) -> Rows:
        return index.search(query, WANTED) if index else search(query, gallery, WANTED, mapping.similarity).rows

    def adapted(at: slice) -> None:
        query = data.new_queries[at]
        one(mapping(query) if mapping.side == "query" else query, served.gallery)

    def old(at: slice) -> Rows:
        return one(data.old_queries[at], data.gallery)

    def two(at: slice) -> None:
        new = one(served.queries[at], served.gallery)
        fuse([new, old(at)], WANTED)

    steps: dict[str, Callable[[slice], Any]] = {ADAPTER: adapted}
    if index is None or mapping.side == "query":
        steps |= {OLD: old, TWO: two}
    count, times = min(TIMED, len(served.queries)), {}
    for name, step in steps.items():
        taken: list[float] = []
        for at in [0] * 10 + list(range(count)):  # ten to warm up
            start = time.perf_counter()
            step(slice(at, at + 1))
            taken.append(time.perf_counter() - start)
            if len(taken) > 20 and sum(taken) > LONGEST:
                break
        p50, p99 = 1000 * np.quantile(taken[10:], [0.5, 0.99])
        times[name] = {"p50": p50, "p99": p99, "queries": len(taken) - 10}
    how = f"{index.kind}, {index.settings}" if index else "exact"
    queries = min(of["queries"] for of in times.values())
    return {"search": how, "queries": queries, "vectors searched": len(served.gallery), "ms": times}


def rewriting(served: Served, size: int) -> dict[str, Any]:
    """Seconds to write `size` vectors again: into a plain file, and into an index of the kind given; from a part of them."""
    gallery = served.gallery
    part = gallery[:AGAIN]
    with tempfile.TemporaryFile() as file:
        start = time.perf_counter()
        file.write(part.tobytes())
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - start
    report: dict[str, Any] = {"vectors": size, "to a file, seconds": seconds * size / len(part)}
    if served.index:
        built = served.index.rebuild(gallery)
        report["to the index, seconds"] = built.seconds * size / len(gallery)
        report["at least"] = built.superlinear and (built.extrapolated or size > len(gallery))
    return report
