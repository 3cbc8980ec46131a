"""The sequence metrics against naive loops, published tables and hand-worked edge cases."""

import json

import numpy as np
import pytest

from benchmark import compatibility as cp

NAN = float("nan")

# Seven releases of d-Simplex-HOC, printed in the notebook of Biondi et al., CVPR 2024: AC 0.95, AA 68.90.
HOC = [
    [0.58892],
    [0.59700, 0.61560],
    [0.63050, 0.65276, 0.69314],
    [0.63336, 0.65298, 0.70626, 0.72374],
    [0.65006, 0.67872, 0.70754, 0.72114, 0.73828],
    [0.64080, 0.67188, 0.71166, 0.72712, 0.74704, 0.76194],
    [0.63140, 0.66350, 0.72096, 0.73496, 0.75232, 0.76652, 0.77164],
]


def lower(rows):
    """(T, T) with NaN above the diagonal, from rows of growing length."""
    return np.array([[*row, *[NAN] * (len(rows) - len(row))] for row in rows])


C3 = lower([[0.20], [0.25, 0.40], [0.18, 0.40, 0.50]])
I3 = lower([[0.20], [0.01, 0.45], [0.01, 0.02, 0.60]])


def random_pair(seed, releases=5):
    rng = np.random.default_rng(seed)
    return rng.random((releases, releases)), rng.random((releases, releases))


# ------------------------------------------------------------------------------------------------------ check values


def test_hoc_matrix_gives_the_printed_ac_and_am():
    assert cp.average_compatibility(lower(HOC)) == pytest.approx(20 / 21)
    assert cp.average_multimodel_accuracy(lower(HOC)) == pytest.approx(0.6890, abs=5e-5)


# mAP on RParis, ROxford, GLDv2 from AdvBCT's repository; each row: self, cross, then P_up, P_comp, P_1 as printed.
OLD_DATA, OLD_CLASS = (75.45, 49.15, 10.03), (74.29, 54.34, 11.43)
R18, R50 = (81.15, 63.85, 16.48), (87.66, 76.56, 22.12)
ADVBCT = [
    (OLD_DATA, R18, (80.58, 56.34, 14.61), (77.37, 49.66, 11.30), 48.02, 54.71, 51.13),
    (OLD_DATA, R18, (81.57, 60.85, 16.48), (77.83, 51.35, 12.17), 49.65, 57.41, None),  # prints 53.34; we get 53.23
    (OLD_DATA, R18, (80.93, 57.24, 16.06), (78.30, 50.97, 13.25), 48.90, 59.19, 53.52),
    (OLD_DATA, R18, (79.57, 58.15, 13.88), (76.53, 50.05, 10.35), 47.78, 52.50, 50.03),
    (OLD_DATA, R18, (82.78, 62.13, 15.71), (78.55, 52.31, 11.49), 49.55, 58.09, 53.45),
    (OLD_DATA, R18, R18, (4.93, 1.20, 0.2), 50.0, 7.19, None),
    (OLD_CLASS, R18, (79.45, 58.94, 14.79), (76.13, 53.43, 12.26), 48.33, 52.79, 50.41),
    (OLD_CLASS, R18, (81.26, 60.49, 16.07), (76.78, 54.29, 12.04), 49.37, 53.95, 51.51),
    (OLD_CLASS, R18, (76.92, 59.07, 14.80), (74.55, 57.82, 12.31), 48.09, 54.78, 51.17),
    (OLD_CLASS, R18, (78.93, 60.31, 14.00), (75.33, 51.68, 10.41), 48.06, 47.26, 47.57),
    (OLD_CLASS, R18, (82.05, 64.51, 16.44), (77.16, 54.82, 12.05), 50.16, 54.87, 52.35),
    (OLD_CLASS, R18, R18, (4.93, 1.29, 0.2), 50.0, 3.38, None),
    (OLD_DATA, R50, (85.54, 68.66, 19.11), (78.95, 54.42, 12.78), 47.81, 55.86, 51.52),
    (OLD_DATA, R50, (87.49, 75.16, 21.85), (79.36, 57.18, 13.30), 49.73, 57.31, 53.25),
    (OLD_DATA, R50, (84.37, 67.42, 21.57), (78.91, 56.18, 13.42), 48.48, 56.80, 52.31),
    (OLD_DATA, R50, (86.78, 75.10, 20.61), (78.81, 57.84, 12.41), 49.19, 56.53, 52.60),
    (OLD_DATA, R50, (86.79, 75.71, 20.77), (79.08, 59.03, 12.75), 49.31, 57.30, 53.01),
]


@pytest.mark.parametrize(("old", "oracle", "new", "cross", "up", "comp", "p1"), ADVBCT)
def test_p_scores_meet_the_advbct_table(old, oracle, new, cross, up, comp, p1):
    scores = cp.p_scores(new, cross, old, oracle)
    assert 100 * scores.up == pytest.approx(up, abs=0.01)
    assert 100 * scores.comp == pytest.approx(comp, abs=0.01)
    if p1 is not None:
        assert 100 * scores.p1 == pytest.approx(p1, abs=0.01)


# ---------------------------------------------------------------------------------------------------- naive references


@pytest.mark.parametrize("seed", range(5))
def test_matrices_equal_naive_loops(seed):
    C, independent = random_pair(seed)
    T = len(C)
    ecc, gain, absolute = cp.compatible(C), cp.update_gain(C, independent), cp.absolute_gain(C)
    met, total, cells = 0, 0.0, 0
    for t in range(T):
        for k in range(T):
            if k <= t:
                total, cells = total + C[t, k], cells + 1
            if k >= t:
                assert not ecc[t, k] and np.isnan(gain[t, k]) and np.isnan(absolute[t, k])
                continue
            met += C[t, k] > C[k, k]
            assert ecc[t, k] == (C[t, k] > C[k, k])
            assert absolute[t, k] == C[t, k] - C[k, k]
            span = independent[t, t] - C[k, k]
            if span > 0.03:
                assert gain[t, k] == pytest.approx((C[t, k] - C[k, k]) / span)
            else:
                assert np.isnan(gain[t, k])
    assert cp.average_compatibility(C) == pytest.approx(met / (T * (T - 1) / 2))
    assert cp.average_multimodel_accuracy(C) == pytest.approx(total / cells)
    assert cp.backward_compatibility(C) == pytest.approx(sum(C[T - 1, k] - C[k, k] for k in range(T - 1)) / (T - 1))
    assert cp.forward_compatibility(C) == pytest.approx(sum(C[t, t - 1] - C[t, t] for t in range(1, T)) / (T - 1))
    np.testing.assert_array_equal(cp.new_to_new_drop(C, independent), [C[t, t] - independent[t, t] for t in range(T)])


def test_what_lies_above_the_diagonal_changes_nothing():
    full = np.where(np.isnan(C3), 0.99, C3)
    assert json.dumps(cp.summary(full, I3)) == json.dumps(cp.summary(C3, I3))
    full[0, 2] = 1e9  # not even a value that would be refused below the diagonal
    assert cp.average_compatibility(full) == cp.average_compatibility(C3)


def test_inputs_are_not_changed():
    full = np.where(np.isnan(C3), 0.99, C3)
    before = full.copy()
    cp.summary(full, full)
    np.testing.assert_array_equal(full, before)


# --------------------------------------------------------------------------------------------------- edges and meaning


def test_equality_is_not_compatibility():
    assert cp.average_compatibility(lower([[0.3], [0.3, 0.5]])) == 0
    assert cp.compatible(C3).tolist() == [[False] * 3, [True, False, False], [False, False, False]]
    assert cp.average_compatibility(C3) == pytest.approx(1 / 3)


def test_zero_counts_in_am():
    assert cp.average_multimodel_accuracy(lower([[0.4], [0.0, 0.8]])) == pytest.approx(0.4)


def test_independent_yardstick_is_not_met_by_spoiling_the_own_release():
    spoiled = lower([[0.20], [0.25, 0.10], [0.25, 0.12, 0.50]])
    oracles = np.diag(I3)
    assert cp.average_compatibility(spoiled) == 1
    assert cp.average_compatibility(spoiled, oracles) == pytest.approx(2 / 3)
    assert cp.update_gain(spoiled, I3)[2, 1] == pytest.approx(0.02 / 0.50)
    assert cp.update_gain(spoiled, I3, oracles)[2, 1] == pytest.approx(-0.33 / 0.15)
    assert cp.absolute_gain(spoiled, oracles)[2, 1] == pytest.approx(-0.33)


def test_update_gain_is_0_at_old_and_1_at_the_oracle_and_null_on_a_short_span():
    C = lower([[0.25], [0.25, 0.5], [0.75, 0.6, 0.7]])
    independent = lower([[0.25], [0.0, 0.28], [0.0, 0.0, 0.75]])
    gain = cp.update_gain(C, independent)
    assert gain[2, 0] == 1 and gain[2, 1] == pytest.approx(0.4)
    assert np.isnan(gain[1, 0])  # a span of exactly 3 points is not above 3 points
    independent[1, 1] = 0.285
    assert cp.update_gain(C, independent)[1, 0] == 0
    independent[1, 1] = 0.1  # an oracle below the old model
    assert np.isnan(cp.update_gain(C, independent)[1, 0])


def test_relative_gain():
    assert cp.relative_gain(0.5, 0.4, 0.6) == pytest.approx(0.5)
    assert cp.relative_gain(0.3, 0.4, 0.6) == pytest.approx(-0.5)
    assert cp.relative_gain(0.5, 0.4, 0.42) is None
    assert cp.relative_gain(0.5, 0.6, 0.4) is None
    assert cp.relative_gain(NAN, 0.4, 0.6) is None and cp.relative_gain(0.5, NAN, 0.6) is None


def test_ac95_needs_both_bounds_above_zero():
    own = lower([[0.0], [0.01, 0.0], [0.01, 0.01, 0.0]])
    independent = lower([[0.0], [0.01, 0.0], [0.0, 0.01, -1.0]])
    assert cp.average_compatibility_95(own, independent) == pytest.approx(2 / 3)
    own[2, 1] = -0.02
    assert cp.average_compatibility_95(own, independent) == pytest.approx(1 / 3)
    independent[1, 0] = NAN
    assert cp.average_compatibility_95(own, independent) == 0
    assert cp.average_compatibility_95([[0.0]], [[0.0]]) is None


def test_undefined_cross_cell():
    C = C3.copy()
    C[1, 0] = NAN
    assert cp.average_compatibility(C) == 0  # of three cells, not of two
    assert not cp.compatible(C)[1, 0]
    assert cp.average_multimodel_accuracy(C) is None
    assert np.isnan(cp.update_gain(C, I3)[1, 0]) and np.isnan(cp.absolute_gain(C)[1, 0])
    assert not np.isnan(cp.update_gain(C, I3)[2, 0])
    assert cp.backward_compatibility(C) is not None  # does not need the cell
    assert cp.forward_compatibility(C) is None
    assert cp.summary(C, I3)["mean_update_gain"] is None


def test_undefined_diagonal_leaves_no_yardstick():
    C = C3.copy()
    C[1, 1] = NAN
    assert cp.average_compatibility(C) is None
    assert cp.average_compatibility(C, np.diag(I3)) == pytest.approx(1 / 3)
    assert np.isnan(cp.new_to_new_drop(C, I3)).tolist() == [False, True, False]
    assert cp.backward_compatibility(C) is None
    last = C3.copy()
    last[2, 2] = NAN  # is no cross cell's yardstick
    assert cp.average_compatibility(last) == pytest.approx(1 / 3)
    assert cp.average_multimodel_accuracy(last) is None


def test_undefined_independent_cross_cell_does_not_matter():
    independent = np.diag(np.diag(I3))
    independent[2, 0] = NAN
    assert cp.summary(C3, independent) == cp.summary(C3, I3)


def test_single_release():
    got = cp.summary([[0.4]], [[0.5]])
    assert got["average_multimodel_accuracy"] == 0.4 and got["mean_new_to_new_drop"] == pytest.approx(-0.1)
    nothing = ("average_compatibility", "average_compatibility_95", "mean_update_gain", "backward_compatibility")
    assert all(got[name] is None for name in (*nothing, "forward_compatibility"))


def test_summary_is_json_and_equals_its_parts():
    bounds = np.full((3, 3), 0.01)
    got = cp.summary(C3, I3, lower_own=bounds, lower_independent=bounds)
    assert got == json.loads(json.dumps(got, allow_nan=False))
    assert got["average_compatibility_95"] == 1
    assert got["compatible"] == [[None, None, None], [True, None, None], [False, False, None]]
    assert got["update_gain"][1] == [pytest.approx(0.05 / 0.25), None, None]
    assert got["mean_update_gain"] == pytest.approx((0.05 / 0.25 - 0.02 / 0.40 + 0) / 3)
    assert got["mean_update_gain_over_independent"] == pytest.approx((0.05 / 0.25 - 0.02 / 0.40 - 0.05 / 0.15) / 3)
    assert got["new_to_new_drop"] == pytest.approx([0, -0.05, -0.10])
    assert cp.summary(C3, I3)["average_compatibility_95"] is None
    pairwise = cp.summary(C3, I3, old_old=np.diag(I3))
    assert pairwise["update_gain"] == got["update_gain_over_independent"]


def test_flips():
    before = np.array([1, 1, 0, 0, 1], dtype=bool)
    after = np.array([1, 0, 1, 1, 0], dtype=bool)
    assert cp.flips(before, after) == (0.4, 0.4)
    assert cp.flips(before, before) == (0, 0)
    rng = np.random.default_rng(0)
    a, b = rng.integers(2, size=(2, 1000))
    naive = [sum(x == 0 and y == 1 for x, y in zip(a, b)) / 1000, sum(x == 1 and y == 0 for x, y in zip(a, b)) / 1000]
    got = cp.flips(a, b)
    assert list(got) == naive
    assert got.positive - got.negative == pytest.approx(b.mean() - a.mean(), abs=1e-15)


def test_p_scores_edges():
    assert cp.p_scores(0.5, 0.3, 0.3, 0.5) == pytest.approx((0.5, 0.5, 0.5))  # one test set, neutral
    assert cp.p_scores([0.5, 0.5], [0.3, 0.3], [0.3, 0.5], [0.5, 0.5]) == (0.5, None, None)
    assert cp.p_scores([0.5], [0.3], [0.3], [0.0]) == (None, pytest.approx(0.5), None)
    assert cp.p_scores([0.5, NAN], [0.3, 0.3], [0.3, 0.3], [0.5, 0.5]).up is None
    extreme = cp.p_scores([0.5], [1.0], [0.5], [0.5 - 1e-12])
    assert extreme.comp == pytest.approx(0)  # the logistic function neither overflows nor warns


# --------------------------------------------------------------------------------------------------------- backfilling


def test_backfill_area_against_a_loop_and_closed_forms():
    shares = np.linspace(0, 1, 21)
    assert cp.backfill_area(shares, 0.2 + 0.4 * shares) == pytest.approx(0.4)
    assert cp.backfill_area([0, 0.1, 1], [0, 0.5, 0.5]) == pytest.approx(0.025 + 0.45)
    rng = np.random.default_rng(0)
    shares, values = np.array([0, *np.sort(rng.random(9)), 1]), rng.random(11)
    loop = sum((values[i] + values[i + 1]) / 2 * (shares[i + 1] - shares[i]) for i in range(10))
    assert cp.backfill_area(shares, values) == pytest.approx(loop)
    assert cp.backfill_area([0, 0.5, 1], [0.4, 0.9, 0.5]) > 0.5  # may exceed new/new


def test_fastfill_mean():
    values = np.random.default_rng(0).random(22)
    assert cp.fastfill_mean(np.arange(22) / 21, values) == pytest.approx(values.mean())
    shares = np.linspace(0, 1, 21)
    assert cp.fastfill_mean(shares, 0.2 + 0.4 * shares) == pytest.approx(0.4)
    assert cp.fastfill_mean([0, 0.05, 1], [0, 0.5, 0.5]) != cp.backfill_area([0, 0.05, 1], [0, 0.5, 0.5])


def test_undefined_point_of_a_curve():
    assert cp.backfill_area([0, 0.5, 1], [0.1, NAN, 0.2]) is None
    assert cp.fastfill_mean([0, 0.5, 1], [0.1, NAN, 0.2]) is None
    assert cp.relative_backfill_gain(None, 0.2, 0.4) is None
    assert cp.relative_backfill_gain(0.35, 0.2, 0.4) == pytest.approx(0.75)


def test_nulls():
    assert cp.nulls([[1.0, NAN], [0.5, 0.25]]) == [[1.0, None], [0.5, 0.25]]
    assert cp.nulls(NAN) is None


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cp.average_compatibility([0.1, 0.2]), "square"),
        (lambda: cp.average_compatibility(np.zeros((2, 3))), "square"),
        (lambda: cp.average_compatibility(np.zeros((0, 0))), "square"),
        (lambda: cp.average_multimodel_accuracy([[58.9]]), "divide percentages by 100"),
        (lambda: cp.average_multimodel_accuracy([[-0.1]]), "outside"),
        (lambda: cp.average_multimodel_accuracy([[np.inf]]), "outside"),
        (lambda: cp.update_gain(C3, I3[:2, :2]), "one shape"),
        (lambda: cp.compatible(C3, [0.1, 0.2]), "old_old"),
        (lambda: cp.compatible(C3, [10, 20, 30]), "divide percentages"),
        (lambda: cp.average_compatibility_95(C3, I3[:2, :2]), "one shape"),
        (lambda: cp.summary(C3, I3, lower_own=C3), "both lower bounds"),
        (lambda: cp.summary(C3, I3, lower_own=[[0.1]], lower_independent=[[0.1]]), "one shape"),
        (lambda: cp.flips([True, False], [True]), "same queries"),
        (lambda: cp.flips([], []), "same queries"),
        (lambda: cp.flips([1.0, NAN], [1.0, 0.0]), "dropped queries"),
        (lambda: cp.flips([0.5, 1.0], [1.0, 0.0]), "0 or 1"),
        (lambda: cp.p_scores([0.1], [0.1, 0.2], [0.1], [0.1]), "one value a test set"),
        (lambda: cp.backfill_area([0, 1], [0.1, 0.2, 0.3]), "one value a share"),
        (lambda: cp.backfill_area([0.05, 1], [0.1, 0.2]), "from 0 to 1"),
        (lambda: cp.backfill_area([0, 0.9], [0.1, 0.2]), "from 0 to 1"),
        (lambda: cp.fastfill_mean([0, 0.5, 0.5, 1], [0.1, 0.2, 0.3, 0.4]), "strictly"),
        (lambda: cp.fastfill_mean([0], [0.1]), "from 0 to 1"),
        (lambda: cp.backfill_area([0, 1], [10, 20]), "divide percentages"),
        (lambda: cp.relative_gain(50, 40, 60), "divide percentages"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
