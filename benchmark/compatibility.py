"""What a compatibility matrix says: pure functions of plain arrays, no torch.

The **compatibility matrix** C (T x T) holds C[t, k] = M(queries of release t, gallery of release k) for a metric M in
[0, 1], k <= t. What lies above the diagonal is ignored; NaN below it is an undefined cell (unequal dims without a
link). I, the argument `independent`, is that of independent training; I[t, t] is the **oracle** of release t.

An undefined cell never vanishes from a figure:
- per-cell arrays hold NaN there, booleans False, since compatibility was not shown;
- a mean over cells of which one is undefined is None;
- AC counts an undefined cross cell as not compatible; an undefined diagonal cell, the yardstick itself, makes it None.

**Own and independent yardstick.** The criterion compares with M(old, old). By default old is the method's own release
k, C[k, k]: what users had the day before. Pass `old_old=np.diag(independent)` where old is the frozen independent
release (pairwise protocols), or to hold all methods against one and the same yardstick.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

MIN_SPAN = 0.03  # a gain relative to a step of 3 points or less says more about noise than about the method
FASTFILL_SHARES = np.arange(22) / 21


# ---------------------------------------------------------------------------------------------- the criterion, AC, AM


def compatible(C: ArrayLike, old_old: ArrayLike | None = None) -> NDArray[np.bool_]:
    """Empirical compatibility criterion of each cross cell: M(new, old) > M(old, old), strictly.

    Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020. C: (T, T) in [0, 1]; old_old: (T,),
    see the module. Returns (T, T); False on and above the diagonal, and where either side is undefined.
    """
    C = _matrix(C)
    old = _old_old(C, old_old)
    return np.tril(old < C, -1)


def average_compatibility(C: ArrayLike, old_old: ArrayLike | None = None) -> float | None:
    """AC: the share of the T(T-1)/2 cross cells that meet the empirical compatibility criterion, in [0, 1].

    Biondi et al., "CoReS: Compatible Representations via Stationarity", TPAMI 2023, with the strict > of the criterion
    (their code has >=). None for a single release, and where an M(old, old) is undefined.
    """
    C = _matrix(C)
    undefined = np.isnan(_old_old(C, old_old)[:-1]).any()
    return None if undefined else _share_of_cross_cells(compatible(C, old_old))


def average_compatibility_95(lower_own: ArrayLike, lower_independent: ArrayLike) -> float | None:
    """AC95: as AC, but a cell counts only if it beats both yardsticks beyond doubt.

    CompatBench's own. lower_own and lower_independent: (T, T) lower ends of the paired 95 % intervals of
    C[t, k] - C[k, k] and of C[t, k] - I[k, k], each in [-1, 1]; both must exceed 0, so that a method which spoils its
    own release k does not pass more easily. A NaN bound counts as not compatible. None for a single release.
    """
    own, independent = _matrix(lower_own, low=-1.0), _matrix(lower_independent, low=-1.0)
    _same_shape(own, independent)
    return _share_of_cross_cells(np.tril((own > 0) & (independent > 0), -1))


def average_multimodel_accuracy(C: ArrayLike) -> float | None:
    """AM: mean of the lower triangle with the diagonal, in [0, 1]; None if any of its cells is undefined.

    Also called AA. Biondi et al., TPAMI 2023, and "Stationary Representations", CVPR 2024. Their code takes the mean
    of the nonzero entries; here an exact 0 counts as 0.
    """
    C = _matrix(C)
    return _number(C[np.tril_indices(len(C))].mean())


def backward_compatibility(C: ArrayLike) -> float | None:
    """BC of CL2R: mean over k < T-1 of C[T-1, k] - C[k, k], in [-1, 1]; the last release on every older gallery.

    Biondi et al., "CL2R: Compatible Lifelong Learning Representations", TOMM 2023, as in its code. None for a single
    release or if a cell it needs is undefined.
    """
    C = _matrix(C)
    return _number((C[-1, :-1] - np.diag(C)[:-1]).mean()) if len(C) > 1 else None


def forward_compatibility(C: ArrayLike) -> float | None:
    """FC of CL2R: mean over t >= 1 of C[t, t-1] - C[t, t], in [-1, 1]; what the previous gallery costs release t.

    Source and None as for `backward_compatibility`.
    """
    C = _matrix(C)
    return _number((np.diag(C, -1) - np.diag(C)[1:]).mean()) if len(C) > 1 else None


# ----------------------------------------------------------------------------------------------------- gains and drops


def relative_gain(value: float, old: float, new: float) -> float | None:
    """(value - old) / (new - old): 0 = no better than old, 1 = as good as new. All three in [0, 1].

    None where the span new - old is not above MIN_SPAN (3 points), or where a value is undefined.
    """
    value, old, new = (float(_shares(v)) for v in (value, old, new))
    return _number((value - old) / (new - old)) if _wide(new - old) else None


def update_gain(C: ArrayLike, independent: ArrayLike, old_old: ArrayLike | None = None) -> Array:
    """Update gain of each cross cell: (M(new, old) - M(old, old)) / (M(oracle, oracle) - M(old, old)).

    Shen et al., CVPR 2020. 1 = as good as a full backfill with the oracle, <= 0 = not compatible. Returns (T, T), NaN
    on and above the diagonal, where undefined, and where the span is not above MIN_SPAN. With its own C[k, k] as
    M(old, old) a method that spoiled release k gains more easily: read it beside `old_old=np.diag(independent)`.
    """
    C, independent = _pair(C, independent)
    old = _old_old(C, old_old)
    span = np.diag(independent)[:, None] - old
    gain = np.full_like(C, np.nan)
    return np.divide(C - old, span, out=gain, where=_wide(span) & _below_diagonal(C))


def absolute_gain(C: ArrayLike, old_old: ArrayLike | None = None) -> Array:
    """M(new, old) - M(old, old) of each cross cell, in [-1, 1]. Returns (T, T), NaN elsewhere and where undefined."""
    C = _matrix(C)
    return np.where(_below_diagonal(C), C - _old_old(C, old_old), np.nan)


def new_to_new_drop(C: ArrayLike, independent: ArrayLike) -> Array:
    """M(new, new) - M(oracle, oracle) per release, C[t, t] - I[t, t]: below 0 is the price of compatibility.

    Returns (T,) in [-1, 1], NaN where undefined.
    """
    C, independent = _pair(C, independent)
    return np.diag(C) - np.diag(independent)


class Flips(NamedTuple):
    positive: float  # share of all queries, in [0, 1]: missed before, hit after
    negative: float  # share of all queries, in [0, 1]: hit before, missed after


def flips(before: ArrayLike, after: ArrayLike) -> Flips:
    """Positive and negative flip rate of an upgrade, from two (Q,) vectors of hits (bool or 0/1) of the same queries.

    Yan et al., "Positive-Congruent Training", CVPR 2021; for retrieval Zhang et al., ICLR 2022 (Hot-refresh). The mean
    gain is exactly positive - negative. Raises on other values, NaN included: leave dropped queries out.
    """
    before, after = np.asarray(before), np.asarray(after)
    if before.ndim != 1 or before.shape != after.shape or not before.size:
        raise ValueError(f"flips need two vectors of the hits of the same queries; got {before.shape}, {after.shape}")
    if not all(np.isin(hits, (0, 1)).all() for hits in (before, after)):
        raise ValueError("flips need hits that are 0 or 1; leave dropped queries (NaN) out of both vectors")
    before, after = before.astype(bool), after.astype(bool)
    return Flips(positive=float((~before & after).mean()), negative=float((before & ~after).mean()))


class PScores(NamedTuple):
    up: float | None  # P_up, in (0, 1), 0.5 = as good as the oracle
    comp: float | None  # P_comp, in (0, 1), 0.5 = update gain 0
    p1: float | None  # P_1, mean over the test sets of the harmonic mean of their two terms


def p_scores(new_new: ArrayLike, new_old: ArrayLike, old_old: ArrayLike, oracle: ArrayLike) -> PScores:
    """P_up, P_comp and P_1 of one upgrade over D test sets. A RECONSTRUCTION: label it so, never a headline.

    Pan et al. (AdvBCT), CVPR 2023. We inferred the formulas from the table in their repository: they meet 47 of the 48
    figures of its first three blocks within 0.01 points (not P_1 of LCE), the last block (ResNet-50, extended class)
    within 0.3 only. All arguments (D,), in one unit of any size. None where an oracle is 0 or equals old_old, or a
    value is undefined.
    """
    values = [np.atleast_1d(np.asarray(v, dtype=float)) for v in (new_new, new_old, old_old, oracle)]
    if len({v.shape for v in values}) > 1 or values[0].ndim != 1 or not values[0].size:
        raise ValueError(f"p_scores needs four lists, one value a test set each; got {[v.shape for v in values]}")
    new, cross, old, star = values
    with np.errstate(divide="ignore", invalid="ignore"):
        up = _logistic(np.where(star == 0, np.nan, (new - star) / star))
        comp = _logistic(np.where(star == old, np.nan, (cross - old) / (star - old)))
        harmonic = 2 * up * comp / (up + comp)
    return PScores(_number(up.mean()), _number(comp.mean()), _number(harmonic.mean()))


# --------------------------------------------------------------------------------------------------------- backfilling


def backfill_area(shares: ArrayLike, values: ArrayLike) -> float | None:
    """Area under the backfill curve by the trapezoid rule, in [0, 1]: the mean metric over a backfill at steady pace.

    shares: (P,) re-embedded shares of the gallery, rising from 0 to 1; values: (P,) metric at each, in [0, 1]. It
    estimates the expectation over a uniform share of Jaeckle et al., "FastFill", ICLR 2023. It may exceed the last
    value. None if any point is undefined.
    """
    shares, values = _curve(shares, values)
    return _number(float(np.trapezoid(values, shares)))


def fastfill_mean(shares: ArrayLike, values: ArrayLike) -> float | None:
    """The area as FastFill's released code takes it: the plain mean of 22 values at shares i/21, i = 0..21.

    Both ends have full weight, unlike in `backfill_area`. A curve measured at other shares is read off by linear
    interpolation. Arguments, range and None as for `backfill_area`.
    """
    shares, values = _curve(shares, values)
    if np.isnan(values).any():
        return None
    return float(np.interp(FASTFILL_SHARES, shares, values).mean())


def relative_backfill_gain(area: float | None, old_old: float, new_new: float) -> float | None:
    """The share of the old-to-new span that a backfill wins on average: (area - old_old) / (new_new - old_old).

    After the percentages of Seo et al. (online backfilling, WACV 2025), whose exact formula we have not seen. 0 = the
    old system throughout, 1 = the finished backfill from the first moment. None as for `relative_gain`.
    """
    return None if area is None else relative_gain(area, old_old, new_new)


# ------------------------------------------------------------------------------------------------------------- summary


def summary(
    C: ArrayLike,
    independent: ArrayLike,
    *,
    old_old: ArrayLike | None = None,
    lower_own: ArrayLike | None = None,
    lower_independent: ArrayLike | None = None,
) -> dict[str, Any]:
    """All metrics of one sequence, ready for JSON: floats, lists, None for what is undefined or out of place.

    C, independent: (T, T). The two lower bounds (see `average_compatibility_95`) come together or not at all; without
    them AC95 is None. Matrices are T lists of T; the means over them are None if any cross cell is.
    """
    if (lower_own is None) != (lower_independent is None):
        raise ValueError("AC95 needs both lower bounds, lower_own and lower_independent; pass the two or neither")
    C, independent = _pair(C, independent)
    cross = np.tril_indices(len(C), -1)
    ecc, gain = compatible(C, old_old), update_gain(C, independent, old_old)
    gain_independent = update_gain(C, independent, np.diag(independent))
    drop = new_to_new_drop(C, independent)
    ac95 = None
    if lower_own is not None and lower_independent is not None:
        _same_shape(C, np.asarray(lower_own))
        ac95 = average_compatibility_95(lower_own, lower_independent)
    return {
        "average_compatibility": average_compatibility(C, old_old),
        "average_compatibility_95": ac95,
        "average_multimodel_accuracy": average_multimodel_accuracy(C),
        "mean_update_gain": _number(gain[cross].mean()) if len(C) > 1 else None,
        "mean_update_gain_over_independent": _number(gain_independent[cross].mean()) if len(C) > 1 else None,
        "mean_new_to_new_drop": _number(drop.mean()),
        "backward_compatibility": backward_compatibility(C),
        "forward_compatibility": forward_compatibility(C),
        "compatible": [[bool(ecc[t, k]) if k < t else None for k in range(len(C))] for t in range(len(C))],
        "update_gain": nulls(gain),
        "update_gain_over_independent": nulls(gain_independent),
        "absolute_gain": nulls(absolute_gain(C, old_old)),
        "new_to_new_drop": nulls(drop),
    }


def nulls(array: ArrayLike) -> Any:
    """The array as nested lists with None for NaN, as JSON wants it."""
    array = np.asarray(array, dtype=float)
    objects = array.astype(object)
    objects[np.isnan(array)] = None
    return objects.tolist()


# ------------------------------------------------------------------------------------------------------------- helpers


def _matrix(values: ArrayLike, low: float = 0.0) -> Array:
    """A checked copy with NaN above the diagonal."""
    matrix = np.array(values, dtype=float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"a compatibility matrix is square, release by release; got shape {matrix.shape}")
    matrix[np.triu_indices(len(matrix), 1)] = np.nan
    return _shares(matrix, low)


def _shares(values: ArrayLike, low: float = 0.0) -> Array:
    array = np.asarray(values, dtype=float)
    outside = (array < low) | (array > 1)
    if outside.any():
        raise ValueError(f"metric value {array[outside][0]:g} lies outside [{low:g}, 1]; divide percentages by 100")
    return array


def _pair(C: ArrayLike, independent: ArrayLike) -> tuple[Array, Array]:
    C, independent = _matrix(C), _matrix(independent)
    _same_shape(C, independent)
    return C, independent


def _same_shape(a: Array, b: Array) -> None:
    if a.shape != b.shape:
        raise ValueError(f"matrices of one sequence have one shape; got {a.shape} and {b.shape}: are releases missing?")


def _old_old(C: Array, old_old: ArrayLike | None) -> Array:
    """(T,) M(old, old) of each gallery release."""
    reference = np.diag(C) if old_old is None else _shares(old_old)
    if reference.shape != (len(C),):
        raise ValueError(f"old_old needs one value a release, {len(C)} in all; got shape {reference.shape}")
    return reference


def _below_diagonal(C: Array) -> NDArray[np.bool_]:
    return np.tri(len(C), k=-1, dtype=bool)


def _wide(span: Any) -> Any:
    return span > MIN_SPAN + 1e-9  # 0.28 - 0.25 is 0.03 but for rounding


def _share_of_cross_cells(cells: NDArray[np.bool_]) -> float | None:
    releases = len(cells)
    return float(cells.sum() / (releases * (releases - 1) / 2)) if releases > 1 else None


def _curve(shares: ArrayLike, values: ArrayLike) -> tuple[Array, Array]:
    shares, values = np.asarray(shares, dtype=float), _shares(values)
    if shares.ndim != 1 or shares.shape != values.shape:
        raise ValueError(f"a backfill curve needs one value a share; got {shares.shape} shares, {values.shape} values")
    if len(shares) < 2 or shares[0] != 0 or shares[-1] != 1 or not (np.diff(shares) > 0).all():
        raise ValueError(f"a backfill curve's shares rise strictly from 0 to 1; got {_short(shares)}")
    return shares, values


def _short(values: Sequence[float] | Array) -> str:
    return np.array2string(np.asarray(values), threshold=6, edgeitems=2, max_line_width=1000)


def _logistic(x: Array) -> Array:
    return (1 + np.tanh(x / 2)) / 2  # no overflow


def _number(value: float | np.floating) -> float | None:
    return None if np.isnan(value) else float(value)
