"""Per-query outputs beside a record: what its numbers can be recomputed from. numpy, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as pack

from benchmark import statistics
from benchmark.errors import UserError
from benchmark.files import write_bytes

Outputs = Mapping[
    str, NDArray
]  # labels (Nq,); ap/t/k (Nq,) float32; first/t/k (Nq,) int32, 0 = no positive; mask/<stratum>


def save(path: Path, outputs: Outputs) -> None:
    write_bytes(path, pack({name: np.ascontiguousarray(value) for name, value in outputs.items()}))


def load(path: Path) -> dict[str, NDArray]:
    try:
        return parse(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or damaged ({str(error).splitlines()[0]})") from None


def values(outputs: Outputs, metric: str, t: int, k: int) -> NDArray:
    """(Nq,) float64 in [0, 1], NaN for dropped queries: AP ("map"), or whether a positive is within the top n ("cmc@n")."""
    first = outputs[f"first/{t}/{k}"]
    if metric == "map":
        return np.where(first > 0, outputs[f"ap/{t}/{k}"].astype(float), np.nan)
    return np.where(first > 0, (first <= int(metric.removeprefix("cmc@"))).astype(float), np.nan)


def strata(outputs: Outputs) -> dict[str, NDArray]:
    """Query masks (Nq,) by stratum."""
    return {name.removeprefix("mask/"): mask.astype(bool) for name, mask in outputs.items() if name.startswith("mask/")}


def matrix(outputs: Outputs, metric: str, mask: NDArray) -> NDArray:
    """The T x T compatibility matrix over the queries in `mask`; NaN above the diagonal and where undefined."""
    cells = [tuple(map(int, name.split("/")[1:])) for name in outputs if name.startswith("first/")]
    releases = 1 + max(t for t, _ in cells)
    C = np.full((releases, releases), np.nan)
    for t, k in cells:
        C[t, k] = np.nanmean(values(outputs, metric, t, k)[mask])
    return C


def lower_bounds(
    own: Sequence[Outputs], references: Sequence[Sequence[Outputs]], metric: str, mask: NDArray, seed: int
) -> list[NDArray]:
    """For each reference a (T, T) matrix: lower ends of the paired 95 % intervals of C[t, k] - reference[k, k].

    One element of `own` and of each reference per seed of the protocol. NaN where a cell is undefined.
    """
    labels, releases = own[0]["labels"][mask], len(matrix(own[0], metric, mask))
    bounds = [np.full((releases, releases), np.nan) for _ in references]
    gains, places = [], []
    for bound, reference in zip(bounds, references):
        for t in range(releases):
            for k in range(t):
                if f"first/{t}/{k}" in own[0] and f"first/{k}/{k}" in reference[0]:
                    pairs = zip(own, reference)
                    gains.append(
                        [values(new, metric, t, k)[mask] - values(old, metric, k, k)[mask] for new, old in pairs]
                    )
                    places.append((bound, t, k))
    if gains:  # in one call, as the resamples are most of the cost
        lower = np.quantile(statistics.bootstrap_means(np.array(gains), labels, seed=seed), 0.025, axis=0)
        for (bound, t, k), value in zip(places, lower):
            bound[t, k] = value
    return bounds
