"""Intervals and tests for metrics that are means over queries, measured with several seeds; numpy only.

Values are (S, Q): one row a training seed, one column a query (hit@1, AP, or their differences between two methods of
the same seed). All seeds ask the same queries, so seeds and queries are crossed, and a resample draws one set of
classes and queries for all of its seeds (the pigeonhole bootstrap of Owen, Annals of Applied Statistics 2007, with
queries inside classes). Redrawing queries for each seed would treat a hard class as S independent accidents and make
the intervals too narrow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

MIN_SEEDS = 6  # below it no significance is claimed: the row is "indicative" and not ranked
EXACT_SEEDS = 12  # sign flips of up to so many seeds are enumerated: 4,096
CELLS = 2**20  # resamples x queries counted at a time; bounds the memory, at about 50 bytes each


def indicative(seeds: int) -> bool:
    """Whether a row with so many seeds is only indicative: too few for any claim of significance."""
    return seeds < MIN_SEEDS


@dataclass(frozen=True)
class Interval:
    """A mean with its interval, in the metric's own unit, and the seeds behind it."""

    mean: float
    lower: float
    upper: float
    seeds: int

    @property
    def indicative(self) -> bool:
        return indicative(self.seeds)


# ----------------------------------------------------------------------------------------------------------- bootstrap


def bootstrap(
    values: ArrayLike, labels: ArrayLike | None = None, *, seed: int, resamples: int = 1000, level: float = 0.95
) -> Interval:
    """Percentile interval of the mean of values (S, Q): seeds, then classes, then queries are resampled.

    For a paired difference pass values_a - values_b. Arguments as for `bootstrap_means`. With one seed the interval
    speaks of that one model. It is on the wide side where queries dominate (their noise enters at two levels), and on
    the narrow side where seeds disagree far more than queries do: with six seeds 86 % cover for a nominal 95 %
    (simulated). `paired_test` has no such weakness.
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1; 0.95 gives the 95 % interval")
    values = _two_dimensional(values)
    means = bootstrap_means(values, labels, seed=seed, resamples=resamples)
    lower, upper = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.nanmean(values)), float(lower), float(upper), len(values))


def bootstrap_means(values: ArrayLike, labels: ArrayLike | None = None, *, seed: int, resamples: int = 1000) -> Array:
    """Bootstrap distribution of the mean over seeds and queries.

    values: (..., S, Q), finite, NaN for the queries dropped; all that share one call share the resamples, so that any
    function of several cells (a mean over cells, a ratio) gets its distribution too. labels: (Q,) class of each query;
    None = one class, so that queries alone are resampled. seed: int >= 0; one seed, one answer.

    Each resample draws S seeds, K classes and from each drawn class as many queries as it holds, all with
    replacement, a class drawn twice drawing its queries twice; its value is the mean over all drawn (seed, query).
    Returns (resamples, ...). Raises if a query is dropped for some seeds only, or if none is left.
    """
    if resamples < 1:
        raise ValueError(f"{resamples} resamples give no distribution; take 1000")
    values, labels = _without_dropped(values, labels)
    seeds, queries = values.shape[-2:]
    seed_rng, query_rng = np.random.default_rng(seed).spawn(2)
    seed_weights = seed_rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds  # (B, S)
    by_class = np.argsort(labels, kind="stable")
    sizes = np.unique(labels, return_counts=True)[1]
    columns = values[..., by_class].reshape(-1, queries).T  # (Q, ... * S)
    per_seed = np.empty((resamples, columns.shape[1]))
    chunk = max(1, CELLS // queries)
    for start in range(0, resamples, chunk):
        counts = _draw_queries(sizes, min(chunk, resamples - start), query_rng)  # (b, Q)
        per_seed[start : start + chunk] = counts @ columns / counts.sum(1, keepdims=True)
    return np.einsum("b...s,bs->b...", per_seed.reshape(resamples, *values.shape[:-1]), seed_weights)


def _draw_queries(sizes: NDArray[np.int64], resamples: int, rng: np.random.Generator) -> Array:
    """How often each query is drawn: (resamples, Q), queries in the order of their classes, sizes[k] in class k."""
    queries, first = sizes.sum(), np.cumsum(sizes) - sizes
    classes = rng.integers(len(sizes), size=(resamples, len(sizes)))
    drawn = sizes[classes]
    class_of = np.repeat(classes.ravel(), drawn.ravel())  # one entry for each query to draw
    row_of = np.repeat(np.arange(resamples), drawn.sum(1))
    query = first[class_of] + rng.integers(sizes[class_of])
    return (
        np.bincount(row_of * queries + query, minlength=resamples * queries).reshape(resamples, queries).astype(float)
    )


def _two_dimensional(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=float)
    if array.ndim != 2:
        raise ValueError(f"the bootstrap needs per-query values of shape (seeds, queries); got {array.shape}")
    return array


def _without_dropped(values: ArrayLike, labels: ArrayLike | None) -> tuple[Array, NDArray]:
    values = np.asarray(values, dtype=float)
    if values.ndim < 2 or not values.size:
        raise ValueError(f"values need the shape (seeds, queries), at least 1 x 1; got {values.shape}")
    labels = np.zeros(values.shape[-1], dtype=int) if labels is None else np.asarray(labels)
    if labels.shape != values.shape[-1:]:
        raise ValueError(f"labels need one class a query, {values.shape[-1]} in all; got shape {labels.shape}")
    if np.isinf(values).any():
        raise ValueError("values hold an infinity; check the embeddings that they were computed from")
    flat = np.isnan(values).reshape(-1, values.shape[-1])
    dropped = flat.all(0)
    if (flat != dropped).any():
        query = np.flatnonzero((flat != dropped).any(0))[0]
        raise ValueError(f"query {query} is NaN for some seeds or cells only; drop it (NaN) for all or for none")
    if dropped.all():
        raise ValueError("every query is dropped (NaN), so there is no mean; check that queries have positives")
    return values[..., ~dropped], labels[~dropped]


def t_interval(values: ArrayLike) -> Interval:
    """Mean over seeds with its 95 % Student interval, from one value a seed (S,), S >= 2: the spread of training.

    It says nothing about other queries or classes; `bootstrap` does.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(
            "t_interval needs one finite value from each of at least two seeds; for one seed see bootstrap"
        )
    mean, error = values.mean(), values.std(ddof=1) / len(values) ** 0.5
    half = _t_975(len(values) - 1) * error
    return Interval(float(mean), float(mean - half), float(mean + half), len(values))


# fmt: off
_T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604,
          2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555,
          2.0518, 2.0484, 2.0452, 2.0423)
# fmt: on


def _t_975(freedom: int) -> float:
    """97.5 % quantile of Student's t: a table to 30 degrees of freedom, then the expansion about the normal."""
    return _T_975[freedom - 1] if freedom <= len(_T_975) else 1.95996 + 2.37224 / freedom + 2.8224 / freedom**2


# --------------------------------------------------------------------------------------------------------------- tests


def bootstrap_test(
    differences: ArrayLike, labels: ArrayLike | None = None, *, seed: int, resamples: int = 1000
) -> float:
    """Two-sided p-value of a paired difference (S, Q), by inverting the percentile interval of `bootstrap`.

    p = 2 (1 + the resamples on the rarer side of 0) / (1 + resamples), at most 1, so never below 2 / (1 + resamples).
    Resamples of exactly 0 count on both sides. Its caveats are those of the interval.
    """
    means = bootstrap_means(_two_dimensional(differences), labels, seed=seed, resamples=resamples)
    rarer = min((means <= 0).sum(), (means >= 0).sum())
    return min(1.0, 2 * (1 + int(rarer)) / (1 + resamples))


def paired_test(differences: ArrayLike, *, seed: int = 0, flips: int = 9999) -> float:
    """Two-sided sign-flip permutation test over seeds: are the differences symmetric about 0?

    differences: (S,) one paired difference a seed, or (S, Q), which is averaged over queries. Fisher's randomisation
    test: the share of all 2^S sign patterns whose mean is at least as far from 0 as the one seen. Exact up to
    EXACT_SEEDS seeds; above, `flips` random patterns of Generator(seed), the one seen counted among them.
    p is never below 2 / 2^S: see `min_p_value`.
    """
    d = _per_seed(differences)
    if len(d) <= EXACT_SEEDS:
        signs = np.array(list(product((1, -1), repeat=len(d))))
    else:
        drawn = np.random.default_rng(seed).choice([1, -1], size=(flips, len(d)))
        signs = np.concatenate([np.ones((1, len(d)), dtype=int), drawn])
    slack = 1e-12 * np.abs(d).sum()  # patterns equal but for rounding are equal
    return float((np.abs(signs @ d) >= abs(d.sum()) - slack).mean())


def _per_seed(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=float)
    if array.ndim == 2:
        array = _without_dropped(array, None)[0].mean(-1)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError("a test over seeds needs finite values, (seeds,) or (seeds, queries); leave the row out")
    return array


def min_p_value(seeds: int) -> float:
    """The smallest p-value that `paired_test` can give: 2 / 2^seeds. 6 seeds: 0.031; 10 seeds: 0.002."""
    return min(1.0, 2.0 ** (1 - seeds))


def holm(p_values: ArrayLike) -> Array:
    """Holm's step-down adjusted p-values (m,), in the order given: reject where <= alpha, at family-wise error alpha.

    Holm, Scandinavian Journal of Statistics 1979. The i-th smallest of m is multiplied by m - i (i from 0), made
    monotone and cut at 1.
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("holm needs a list of p-values in [0, 1]; leave untested rows (NaN) out")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def ties(
    rows: Mapping[str, ArrayLike], test: Callable[[Array], float] = paired_test, alpha: float = 0.05
) -> list[list[str]]:
    """Groups of rows that are not significantly different from the best of their group, best group first.

    rows: name -> (S,) or (S, Q) values, larger is better, the same seeds and queries in the same order in each. All
    pairs are tested by `test` on their difference, with Holm over all of them, since which row is best was read from
    the same data. The best row takes every row that does not differ from it (adjusted p > alpha); the best of the rest
    opens the next group. Within a group, best first.

    `paired_test` on six seeds can part two rows, but never three: Holm over m pairs needs min_p_value(S) <= alpha / m.
    For a table pass `lambda d: bootstrap_test(d, labels, seed=...)`, or more seeds.
    """
    values = {name: np.asarray(row, dtype=float) for name, row in rows.items()}
    shapes = {value.shape for value in values.values()}
    if len(shapes) > 1:
        raise ValueError(f"ties needs the same seeds and queries in every row; got shapes {sorted(shapes)}")
    means = {name: float(_per_seed(value).mean()) for name, value in values.items()}
    for seeds, *_ in shapes:
        if indicative(seeds):
            raise ValueError(f"ties needs {MIN_SEEDS} seeds, got {seeds}; show such rows as indicative, unranked")
    pairs = list(combinations(values, 2))
    return _grouped(means, dict(zip(pairs, holm([test(values[a] - values[b]) for a, b in pairs]))), alpha)


def bootstrap_ties(
    rows: Mapping[str, ArrayLike], labels: ArrayLike, *, seed: int, resamples: int = 10_000, alpha: float = 0.05
) -> list[list[str]]:
    """`ties` of (S, Q) rows by `bootstrap_test`, all rows on the same resamples: one pass instead of one a pair.

    The resamples bound p from below by 2 / (1 + resamples): Holm over the pairs of R rows needs about 20 R^2 of them.
    """
    names, values = list(rows), np.stack([_two_dimensional(row) for row in rows.values()])  # (R, S, Q)
    if indicative(values.shape[1]):
        raise ValueError(f"ties needs {MIN_SEEDS} seeds, got {values.shape[1]}; show such rows as indicative, unranked")
    drawn = bootstrap_means(values, labels, seed=seed, resamples=resamples)  # (resamples, R)
    means = {name: float(_per_seed(row).mean()) for name, row in zip(names, values)}
    return ties_of_resamples(means, dict(zip(names, drawn.T)), alpha)


def ties_of_resamples(means: Mapping[str, float], drawn: Mapping[str, Array], alpha: float = 0.05) -> list[list[str]]:
    """`bootstrap_ties` of rows whose resamples are at hand: name -> mean, name -> (resamples,) on the same resamples."""
    pairs = list(combinations(means, 2))
    resamples = len(next(iter(drawn.values())))
    rarer = [min(int((drawn[a] <= drawn[b]).sum()), int((drawn[a] >= drawn[b]).sum())) for a, b in pairs]
    adjusted = holm([min(1.0, 2 * (1 + r) / (1 + resamples)) for r in rarer])
    return _grouped(means, dict(zip(pairs, adjusted)), alpha)


def _grouped(means: Mapping[str, float], adjusted: Mapping[tuple[str, str], float], alpha: float) -> list[list[str]]:
    """The best row takes every row that does not differ from it; the best of the rest opens the next group."""
    differ = {frozenset(pair) for pair, p in adjusted.items() if p <= alpha}
    left, groups = sorted(means, key=lambda name: -means[name]), []
    while left:
        groups.append([name for name in left if {left[0], name} not in differ])
        left = [name for name in left if {left[0], name} in differ]
    return groups
