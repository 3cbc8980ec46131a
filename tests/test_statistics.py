"""Bootstrap against a naive loop and simulated coverage; tests against enumeration and hand-worked examples."""

from itertools import permutations, product

import numpy as np
import pytest

from benchmark import statistics as st

NAN = float("nan")


def crossed(rng, seeds, classes, each, seed_sd=0.0, class_sd=0.0, query_sd=0.0, rest_sd=1.0):
    """(S, Q) values of true mean 0 with crossed effects, and their labels."""
    queries = classes * each
    values = rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, query_sd, (1, queries))
    values = values + np.repeat(rng.normal(0, class_sd, classes), each) + rng.normal(0, rest_sd, (seeds, queries))
    return values, np.repeat(np.arange(classes), each)


# ----------------------------------------------------------------------------------------------------------- bootstrap


def naive_bootstrap_means(values, labels, rng, resamples):
    members = [np.flatnonzero(labels == label) for label in sorted(set(labels.tolist()))]
    means = []
    for _ in range(resamples):
        seeds = [rng.integers(len(values)) for _ in values]
        queries = []
        for _ in members:
            own = members[rng.integers(len(members))]
            queries += [own[rng.integers(len(own))] for _ in own]
        means.append(sum(values[s, q] for s in seeds for q in queries) / (len(seeds) * len(queries)))
    return np.array(means)


@pytest.mark.parametrize(
    "spread",
    [{"seed_sd": 1.0}, {"class_sd": 2.0}, {"query_sd": 2.0}, {"seed_sd": 0.5, "class_sd": 1.0, "query_sd": 1.0}],
    ids=["seeds", "classes", "queries", "all"],
)
def test_distribution_equals_that_of_a_naive_loop(spread):
    rng = np.random.default_rng(4)
    values, labels = crossed(rng, 4, 6, 5, **spread)
    keep = rng.permutation(30)[:22]  # classes of unequal size, in no order
    values, labels = values[:, keep], labels[keep]
    naive = naive_bootstrap_means(values, labels, rng, 2000)
    fast = st.bootstrap_means(values, labels, seed=0, resamples=4000)
    assert fast.mean() == pytest.approx(naive.mean(), abs=0.15 * naive.std())
    assert fast.std() == pytest.approx(naive.std(), rel=0.07)
    for q in (0.025, 0.25, 0.75, 0.975):
        assert np.quantile(fast, q) == pytest.approx(np.quantile(naive, q), abs=0.2 * naive.std())


def test_variance_of_each_level_in_closed_form():
    rng = np.random.default_rng(0)
    seeds_only = np.repeat(rng.normal(size=(6, 1)), 40, axis=1)
    means = st.bootstrap_means(seeds_only, np.arange(40) % 8, seed=1, resamples=20_000)
    assert means.var() == pytest.approx(seeds_only[:, 0].var() / 6, rel=0.05)
    classes_only = np.tile(np.repeat(rng.normal(size=8), 5), (6, 1))  # the same in all seeds: 6 seeds do not help
    means = st.bootstrap_means(classes_only, np.repeat(np.arange(8), 5), seed=1, resamples=20_000)
    assert means.var() == pytest.approx(classes_only[0].var() / 8, rel=0.05)
    queries_only = np.tile(rng.normal(size=40), (6, 1))
    means = st.bootstrap_means(queries_only, seed=1, resamples=20_000)
    assert means.var() == pytest.approx(queries_only[0].var() / 40, rel=0.05)


@pytest.mark.parametrize(
    ("spread", "low", "high"),
    [
        ({"rest_sd": 1.0, "query_sd": 0.5}, 0.95, 1.0),  # queries dominate: wide
        ({"seed_sd": 0.1, "class_sd": 1.0, "query_sd": 1.0}, 0.90, 1.0),
        ({"seed_sd": 1.0, "rest_sd": 0.1}, 0.78, 0.93),  # six seeds dominate: narrow, as documented
    ],
)
def test_coverage(spread, low, high):
    rng = np.random.default_rng(7)
    covered = 0
    for trial in range(200):
        values, labels = crossed(rng, 6, 25, 6, **spread)
        interval = st.bootstrap(values, labels, seed=trial, resamples=300)
        covered += interval.lower <= 0 <= interval.upper
    assert low <= covered / 200 <= high


def test_redrawing_queries_for_each_seed_would_be_too_narrow():
    """Why seeds and queries are crossed: hard classes are hard for all seeds."""
    values, labels = crossed(np.random.default_rng(0), 6, 20, 5, class_sd=1.0, rest_sd=0.01)
    per_seed = [st.bootstrap_means(values[[s]], labels, seed=s, resamples=2000) for s in range(6)]
    assert st.bootstrap_means(values, labels, seed=0, resamples=2000).std() > 2 * np.mean(per_seed, axis=0).std()


def test_mean_and_determinism():
    values, labels = crossed(np.random.default_rng(0), 6, 5, 4)
    interval = st.bootstrap(values, labels, seed=3)
    assert interval.mean == pytest.approx(values.mean()) and interval.seeds == 6
    assert interval.lower < interval.mean < interval.upper
    assert st.bootstrap(values, labels, seed=3) == interval
    assert st.bootstrap(values, labels, seed=4) != interval
    assert st.bootstrap(values, labels, seed=2**63 + 5).seeds == 6  # any hash will do
    narrow = st.bootstrap(values, labels, seed=3, level=0.5)
    assert interval.lower < narrow.lower < narrow.upper < interval.upper


def test_chunks_keep_rows_apart(monkeypatch):
    values, labels = crossed(np.random.default_rng(0), 3, 5, 4)
    whole = st.bootstrap_means(values, labels, seed=0, resamples=3000)
    monkeypatch.setattr(st, "CELLS", 50)  # two resamples at a time
    chunked = st.bootstrap_means(values, labels, seed=0, resamples=3001)
    assert np.isfinite(chunked).all() and len(chunked) == 3001
    assert chunked.std() == pytest.approx(whole.std(), rel=0.1)
    assert abs(np.corrcoef(chunked[:-1], chunked[1:])[0, 1]) < 0.1


def test_cells_of_one_call_share_the_resamples():
    values, labels = crossed(np.random.default_rng(0), 6, 5, 4)
    cells = np.stack([[values, values + 1.0], [2 * values, -values]])  # (2, 2, S, Q)
    means = st.bootstrap_means(cells, labels, seed=0, resamples=50)
    assert means.shape == (50, 2, 2)
    alone = st.bootstrap_means(values, labels, seed=0, resamples=50)
    np.testing.assert_allclose(means[:, 0, 0], alone, atol=1e-12)
    np.testing.assert_allclose(means[:, 0, 1], alone + 1, atol=1e-12)
    np.testing.assert_allclose(means[:, 1, 0], 2 * alone, atol=1e-12)
    np.testing.assert_allclose(means[:, 1, 1], -alone, atol=1e-12)


def test_a_paired_difference_is_narrower_than_the_levels():
    rng = np.random.default_rng(0)
    a, labels = crossed(rng, 6, 20, 10, class_sd=1.0, query_sd=1.0, rest_sd=0.1)
    b = a - 0.05 + rng.normal(0, 0.1, a.shape)
    level, paired = st.bootstrap(a, labels, seed=0), st.bootstrap(a - b, labels, seed=0)
    assert paired.lower > 0 and level.upper - level.lower > 10 * (paired.upper - paired.lower)


def test_dropped_queries_are_as_if_absent():
    values, labels = crossed(np.random.default_rng(0), 4, 6, 5)
    gone = np.arange(30) % 7 == 0
    gone[labels == 2] = True  # a whole class
    with_nan = np.where(gone, NAN, values)
    assert st.bootstrap(with_nan, labels, seed=0) == st.bootstrap(values[:, ~gone], labels[~gone], seed=0)


def test_labels_may_be_strings_and_in_any_order():
    values, labels = crossed(np.random.default_rng(0), 3, 4, 5)
    names = np.array(["ant", "bee", "cow", "dog"])[labels]
    assert st.bootstrap(values, names, seed=0) == st.bootstrap(values, labels, seed=0)
    shuffle = np.random.default_rng(1).permutation(20)
    a = st.bootstrap_means(values, labels, seed=0, resamples=4000)
    b = st.bootstrap_means(values[:, shuffle], labels[shuffle], seed=0, resamples=4000)
    assert a.std() == pytest.approx(b.std(), rel=0.07)


def test_constant_values_single_seed_and_single_query():
    constant = st.bootstrap(np.full((6, 30), 0.25), np.arange(30) % 4, seed=0)
    assert (constant.mean, constant.lower, constant.upper) == pytest.approx((0.25, 0.25, 0.25))
    values, labels = crossed(np.random.default_rng(0), 1, 10, 10)
    one = st.bootstrap(values, labels, seed=0)
    assert one.seeds == 1 and one.indicative and one.lower < one.mean < one.upper
    assert st.bootstrap([[0.5]], seed=0) == st.Interval(0.5, 0.5, 0.5, 1)


def test_means_of_hits_stay_within_0_and_1():
    hits = np.random.default_rng(0).integers(2, size=(6, 12))
    means = st.bootstrap_means(hits, np.arange(12) % 5, seed=0)
    assert means.min() >= 0 and means.max() <= 1


def test_min_seeds():
    assert [st.indicative(n) for n in (1, 5, 6, 12)] == [True, True, False, False]
    assert st.Interval(0, 0, 0, 5).indicative and not st.Interval(0, 0, 0, 6).indicative


# ---------------------------------------------------------------------------------------------------- Student interval


def test_t_interval():
    interval = st.t_interval([1.0, 2.0, 3.0])
    assert (interval.mean, interval.seeds) == (2.0, 3)
    assert interval.upper - 2 == pytest.approx(4.3027 * 1 / 3**0.5) and 2 - interval.lower == interval.upper - 2


def test_t_quantiles_equal_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (*range(1, 40), 60, 1000):
        assert st._t_975(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=2e-4)


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("seeds", [1, 2, 5, 8])
def test_paired_test_equals_enumeration(seeds):
    d = np.random.default_rng(seeds).normal(0.5, 1, seeds)
    seen = abs(sum(d))
    extreme = sum(abs(sum(s * x for s, x in zip(signs, d))) >= seen - 1e-9 for signs in product((1, -1), repeat=seeds))
    assert st.paired_test(d) == extreme / 2**seeds


def test_paired_test_by_hand():
    assert st.paired_test([0.1, 0.2, 0.3, 0.1, 0.2, 0.3]) == 2 / 64 == st.min_p_value(6)
    assert st.paired_test([-0.1, -0.2, -0.3, -0.1, -0.2, -0.3]) == 2 / 64
    assert st.paired_test([1, 1, 1, 1, 1, -1]) == 14 / 64
    assert st.paired_test([0, 0, 0, 0, 0, 0]) == 1
    assert st.paired_test([0.1, 0.2, -0.3]) == 1  # the sum is 0 but for rounding
    assert st.paired_test([0.3]) == 1 == st.min_p_value(1)


def test_paired_test_averages_queries_and_leaves_dropped_ones_out():
    d = np.random.default_rng(0).normal(0.3, 1, (6, 10))
    assert st.paired_test(d) == st.paired_test(d.mean(1))
    dropped = np.concatenate([d, np.full((6, 2), NAN)], axis=1)
    assert st.paired_test(dropped) == st.paired_test(d)


def test_paired_test_samples_above_twelve_seeds():
    d = np.random.default_rng(0).normal(0.4, 1, 14)
    exact = sum(abs(np.dot(s, d)) >= abs(d.sum()) - 1e-9 for s in product((1, -1), repeat=14)) / 2**14
    assert st.paired_test(d, seed=1) == pytest.approx(exact, abs=0.015)
    assert st.paired_test(d, seed=1) == st.paired_test(d, seed=1)
    assert st.paired_test(np.full(40, 0.1), seed=1, flips=99) == 0.01  # never 0


def test_paired_test_keeps_its_level():
    rng = np.random.default_rng(0)
    rejected = np.mean([st.paired_test(rng.normal(0, 1, 8)) <= 0.05 for _ in range(400)])
    assert rejected <= 0.075


def test_bootstrap_test_agrees_with_the_interval():
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.05, 0.1, 0.3, -0.3):
        values, labels = crossed(rng, 6, 10, 10, seed_sd=0.05, rest_sd=0.5)
        values = values + shift
        interval, p = st.bootstrap(values, labels, seed=5), st.bootstrap_test(values, labels, seed=5)
        if p < 0.045:
            assert interval.lower > 0 or interval.upper < 0
        if p > 0.055:
            assert interval.lower <= 0 <= interval.upper
    assert st.bootstrap_test(np.full((6, 5), 0.1), seed=0, resamples=999) == 0.002
    assert st.bootstrap_test(np.zeros((6, 5)), seed=0) == 1


def test_holm_by_hand():
    # 0.01 x 4, 0.02 x 3, max(0.03 x 2, before), max(0.04 x 1, before)
    np.testing.assert_allclose(st.holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(st.holm([0.6, 0.5]), [1, 1])
    np.testing.assert_allclose(st.holm([0.03]), [0.03])
    assert st.holm([]).shape == (0,)


def test_holm_equals_its_step_down_definition():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p, alpha = rng.random(6) ** 3, 0.05
        rejected = set()
        for i, index in enumerate(np.argsort(p)):
            if p[index] > alpha / (6 - i):
                break
            rejected.add(int(index))
        assert set(np.flatnonzero(st.holm(p) <= alpha).tolist()) == rejected


# ---------------------------------------------------------------------------------------------------------------- ties


def rows_of(seeds, **means):
    rng = np.random.default_rng(0)
    return {name: mean + rng.normal(0, 0.01, seeds) for name, mean in means.items()}


def test_ties_group_what_does_not_differ_from_the_best():
    rows = rows_of(12, oca=0.50, bt2=0.50, bct=0.40, l2=0.40, independent=0.01)
    groups = st.ties(rows)
    assert [set(group) for group in groups] == [{"oca", "bt2"}, {"bct", "l2"}, {"independent"}]
    for group in groups:
        assert group == sorted(group, key=lambda name: -rows[name].mean())
    for names in list(permutations(rows))[::17]:  # the order of the rows does not matter
        assert st.ties({name: rows[name] for name in names}) == groups


def test_six_seeds_part_two_rows_but_not_three():
    rows = rows_of(6, oca=0.9, bct=0.5)
    assert st.ties(rows) == [["oca"], ["bct"]]
    assert st.ties(rows | rows_of(6, independent=0.01)) == [["oca", "bct", "independent"]]


def test_ties_by_the_bootstrap_parts_three_rows_with_six_seeds():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 20
    rows = {name: (rng.random((6, 200)) < p).astype(float) for name, p in (("a", 0.8), ("b", 0.5), ("c", 0.5))}
    groups = st.ties(rows, test=lambda d: st.bootstrap_test(d, labels, seed=0))
    assert [set(group) for group in groups] == [{"a"}, {"b", "c"}]


def test_ties_of_one_row_and_of_none():
    assert st.ties(rows_of(6, bct=0.5)) == [["bct"]]
    assert st.ties({}) == []


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: st.bootstrap([0.1, 0.2], seed=0), "shape"),
        (lambda: st.bootstrap(np.zeros((2, 3, 4)), seed=0), "shape"),
        (lambda: st.bootstrap(np.zeros((0, 4)), seed=0), "at least 1 x 1"),
        (lambda: st.bootstrap(np.zeros((2, 0)), seed=0), "at least 1 x 1"),
        (lambda: st.bootstrap(np.zeros((2, 4)), [0, 1, 2], seed=0), "one class a query"),
        (lambda: st.bootstrap([[0.1, np.inf]], seed=0), "infinity"),
        (lambda: st.bootstrap([[0.1, NAN], [0.1, 0.2]], seed=0), "query 1 is NaN for some"),
        (lambda: st.bootstrap([[NAN, NAN]], seed=0), "every query is dropped"),
        (lambda: st.bootstrap([[0.1, 0.2]], seed=0, level=95), "level"),
        (lambda: st.bootstrap([[0.1, 0.2]], seed=0, resamples=0), "resamples"),
        (lambda: st.bootstrap_test([0.1, 0.2], seed=0), "shape"),
        (lambda: st.t_interval([0.5]), "two seeds"),
        (lambda: st.t_interval([0.5, NAN]), "finite"),
        (lambda: st.paired_test([0.1, NAN]), "finite"),
        (lambda: st.paired_test([]), "finite"),
        (lambda: st.paired_test(np.zeros((2, 2, 2))), "finite"),
        (lambda: st.holm([0.1, NAN]), "p-values"),
        (lambda: st.holm([1.1]), "p-values"),
        (lambda: st.ties(rows_of(5, a=0.1, b=0.2)), "indicative, unranked"),
        (lambda: st.ties({"a": np.zeros(6), "b": np.zeros(7)}), "same seeds"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_ties_on_shared_resamples_are_ties_by_the_pairwise_test() -> None:
    rng = np.random.default_rng(5)
    labels, base = np.arange(120) % 8, rng.random((6, 120))
    rows = {name: base + shift + 0.05 * rng.random((6, 120)) for name, shift in zip("abcde", (0, 0, 0.2, 0.2, -0.3))}
    shared = st.bootstrap_ties(rows, labels, seed=0, resamples=4000)
    assert shared == st.ties(rows, test=lambda d: st.bootstrap_test(d, labels, seed=0, resamples=4000))
    assert [set(group) for group in shared] == [{"c", "d"}, {"a", "b"}, {"e"}]
    with pytest.raises(ValueError, match="indicative"):
        st.bootstrap_ties({name: row[:5] for name, row in rows.items()}, labels, seed=0)
