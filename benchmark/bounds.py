"""Means over queries with one-sided 95 % confidence bounds on either side; what a go or no-go is decided by.

Queries are resampled, the gallery (or its sample) is held fixed. Shares of yes and no have exact binomial bounds (Clopper
and Pearson, Biometrika 1934), all else the percentile bootstrap of `benchmark.statistics`. Values without any spread would
have a bootstrap interval of no width, however few they are; there the exact bound on "all n alike" is taken instead: with
95 % confidence a share of at least 0.05^(1/n) of all queries has that value, and the rest may have the worst possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from benchmark.statistics import bootstrap_means

ERROR = 0.05  # of each bound by itself


class Estimate(NamedTuple):
    """A mean over n queries; each bound holds by itself with 95 % confidence."""

    value: float
    lower: float
    upper: float
    n: int
    bounds: str  # "exact" or "bootstrap"


def estimate(values: ArrayLike, *, least: float = 0, most: float = 1, seed: int = 0, error: float = ERROR) -> Estimate:
    """Of values (Q,) in [least, most]."""
    return estimates({"": values}, least=least, most=most, seed=seed, error=error)[""]


def estimates(
    values: Mapping[Any, ArrayLike], *, least: float = 0, most: float = 1, seed: int = 0, error: float = ERROR
) -> dict[Any, Estimate]:
    """Of several values (Q,) of the same queries, which share their resamples."""
    arrays = {name: np.asarray(value, dtype=float) for name, value in values.items()}
    drawn = _resample(np.stack(list(arrays.values())), seed, error)  # (resamples, names)
    found = {}
    for (name, value), means in zip(arrays.items(), drawn.T):
        n = len(value)
        if value.min() == value.max():
            share = error ** (1 / n)
            lower, upper = (share * value[0] + (1 - share) * worst for worst in (least, most))
            found[name] = Estimate(float(value[0]), float(lower), float(upper), n, "exact")
        elif least == 0 and set(np.unique(value)) <= {0.0, 1.0}:
            found[name] = share_of(int(value.sum()), n, error)
        else:
            lower, upper = np.quantile(means, [error, 1 - error])
            found[name] = Estimate(float(value.mean()), float(lower), float(upper), n, "bootstrap")
    return found


def clipped(found: Estimate, least: float = 0, most: float = 1) -> Estimate:
    """Value and bounds put into the range that the quantity has; estimates by differences and by lines may leave it."""
    return found._replace(**{key: min(max(getattr(found, key), least), most) for key in ("value", "lower", "upper")})


def share_of(hits: int, n: int, error: float = ERROR) -> Estimate:
    """Of `hits` in n independent queries, by the quantiles of the beta distribution."""
    from scipy.stats import beta

    lower = float(beta.ppf(error, hits, n - hits + 1)) if hits else 0.0
    upper = float(beta.ppf(1 - error, hits + 1, n - hits)) if hits < n else 1.0
    return Estimate(hits / n, lower, upper, n, "exact")


def ratio(parts: ArrayLike, wholes: ArrayLike, *, least: float = 0, seed: int = 0, error: float = ERROR) -> Estimate:
    """Of sum(parts) / sum(wholes), both (Q,): a share of pairs, of which each query has many that stand or fall together."""
    parts, wholes = np.asarray(parts, dtype=float), np.asarray(wholes, dtype=float)
    kept = wholes > 0
    parts, wholes = parts[kept], wholes[kept]
    shares = parts / wholes
    if shares.min() == shares.max():
        return estimate(shares, least=least, error=error)
    means = _resample(np.stack([parts, wholes]), seed, error)
    lower, upper = np.quantile(means[:, 0] / means[:, 1], [error, 1 - error])
    return Estimate(float(parts.sum() / wholes.sum()), float(lower), float(upper), len(parts), "bootstrap")


def _resample(values: NDArray[np.float64], seed: int, error: float) -> NDArray[np.float64]:
    """(resamples, M) means of values (M, Q); so many resamples that 50 lie beyond each bound."""
    return bootstrap_means(values[:, None], seed=seed, resamples=int(min(20_000, max(1000, 50 / error))))
