"""Statistics over seeds against their formulas, simulations and the closed testing procedure."""

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from measure.seeds import LEVEL, POWER, Difference, Estimate, difference, estimate, holm

T_975 = {2: 12.7062, 3: 4.30265, 5: 2.77645, 10: 2.26216}  # Student's t with n − 1 degrees of freedom, from a table


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("n", T_975)
def test_an_interval_is_the_mean_and_so_many_standard_errors(n):
    x = np.random.default_rng(n).normal(3.3, 0.01, n)
    found = estimate(list(x))
    error = math.sqrt(((x - x.mean()) ** 2).sum() / (n - 1) / n)
    assert found[:3] == pytest.approx((n, x.mean(), error), rel=1e-12)
    assert found[3:] == pytest.approx((x.mean() - T_975[n] * error, x.mean() + T_975[n] * error), rel=1e-6)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(2.0, 0.5, (1000, 3))
    covered = np.mean([found.low < 2.0 < found.high for found in map(estimate, samples)])
    assert covered == pytest.approx(1 - LEVEL, abs=4 * math.sqrt(LEVEL * (1 - LEVEL) / 1000))


def test_a_difference_is_the_paired_t_test():
    a, b = np.random.default_rng(1).normal(1.0, 0.1, (2, 5))
    found, peer = difference(a - b), stats.ttest_rel(a, b)
    assert found.p == pytest.approx(peer.pvalue, rel=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(peer.confidence_interval(1 - LEVEL)), rel=1e-12)
    assert found[:5] == estimate(a - b)


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_a_true_difference_that_is_detectable_is_seen_with_that_power(n):
    generator, draws = np.random.default_rng(n), 100_000
    sample = generator.normal(0.1, 2.0, n)
    true = difference(sample).detectable / sample.std(ddof=1)  # in units of the standard deviation
    x = generator.normal(true, 1.0, (draws, n))
    t = x.mean(1) / x.std(1, ddof=1) * math.sqrt(n)
    seen = np.mean(2 * stats.t.sf(abs(t), n - 1) < LEVEL)
    assert seen == pytest.approx(POWER, abs=4 * math.sqrt(POWER * (1 - POWER) / draws))


def test_detectable_is_by_the_noncentral_t_distribution():
    found = difference([0.1, 0.4, 0.2, 0.5, 0.35, 0.3])
    critical, noncentrality = stats.t.isf(LEVEL / 2, 5), found.detectable / found.standard_error
    tails = stats.nct.sf(critical, 5, noncentrality) + stats.nct.cdf(-critical, 5, noncentrality)
    assert tails == pytest.approx(POWER, rel=1e-9)


def test_one_seed_has_a_mean_alone():
    assert estimate([0.3]) == Estimate(1, 0.3, None, None, None)
    assert difference([0.3]) == Difference(1, 0.3, None, None, None, None, None)


@pytest.mark.parametrize(
    ("values", "mean", "p"),
    [
        ([0.1, 0.1, 0.1], 0.1, 0.0),  # whose mean in float64 is another number
        ([0.3, 0.1 + 0.2, 0.3], 0.3, 0.0),  # which differ by rounding alone
        ([-7.0, -7.0], -7.0, 0.0),
        ([0.0, 0.0, 0.0], 0.0, 1.0),
    ],
)
def test_values_without_spread_have_an_interval_of_no_width(values, mean, p):
    assert estimate(values) == Estimate(len(values), mean, 0.0, mean, mean)
    assert difference(values) == Difference(len(values), mean, 0.0, mean, mean, p, 0.0)


def test_a_spread_above_rounding_is_a_spread():
    assert 0 < difference([1.0, 1.0 + 1e-12, 1.0 - 1e-12]).p < 1e-12


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_no_values_and_no_numbers_are_refused(values):
    with pytest.raises(ValueError, match="one finite number at least"):
        difference(values)


@given(st.lists(st.none() | st.floats(0, 1), max_size=6))
def test_holm_is_the_closure_of_bonferroni(p_values):
    """The closed procedure rejects a hypothesis where Bonferroni rejects every intersection of it with others."""
    tested = [i for i, p in enumerate(p_values) if p is not None]
    wanted: list[float | None] = [None] * len(p_values)
    for i in tested:
        rest = [j for j in tested if j != i]
        subsets = [(i, *more) for size in range(len(tested)) for more in itertools.combinations(rest, size)]
        wanted[i] = max(min(1.0, len(subset) * min(p_values[j] for j in subset)) for subset in subsets)
    assert holm(p_values) == wanted
