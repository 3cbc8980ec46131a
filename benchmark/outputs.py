"""Per-query outputs beside a record: what its numbers can be recomputed from. numpy, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as pack

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
