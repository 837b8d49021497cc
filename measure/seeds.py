"""Statistics over the seeds of an experiment: means with intervals, paired differences, Holm's correction, and what a
design could have seen. By scipy.stats, in float64; every figure is of few numbers that are taken to be Gaussian.

Values that agree to 14 digits are one number, rounded differently: their spread is 0, and no t test is made of it.
ValueError for no value at all and for one that is not finite.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05  # of every test; intervals cover 1 − LEVEL
POWER = 0.8  # with which `detectable` would have been seen


class Estimate(NamedTuple):
    """A mean over seeds. Of one seed there is no standard error and no interval: None."""

    n: int
    mean: float
    standard_error: float | None
    low: float | None
    """the ends of the 95 % interval by Student's t"""
    high: float | None


class Difference(NamedTuple):
    """A mean of differences that are paired by seed, against 0. Of one seed all but the mean is None."""

    n: int
    mean: float
    standard_error: float | None
    low: float | None
    """the ends of the 95 % interval by Student's t, not corrected for other comparisons"""
    high: float | None
    p: float | None
    """two-sided, of Student's t test; without any spread it is 0, or 1 if the mean is 0 too"""
    detectable: float | None
    """the smallest true difference that this test, with the spread it found, sees with a probability of POWER"""


def estimate(values: Sequence[float]) -> Estimate:
    x = np.asarray(values, dtype=np.float64)
    if not x.size or not np.isfinite(x).all():
        raise ValueError(f"a mean over seeds is of one finite number at least, not of {list(values)}")
    if x.size == 1:
        return Estimate(1, float(x[0]), None, None, None)
    if np.ptp(x) <= 1e-14 * np.abs(x).max():
        value = float(x[0])
        return Estimate(x.size, value, 0.0, value, value)
    mean, error = float(x.mean()), float(stats.sem(x))
    low, high = stats.t.interval(1 - LEVEL, x.size - 1, mean, error)
    return Estimate(x.size, mean, error, float(low), float(high))


def difference(differences: Sequence[float]) -> Difference:
    found = estimate(differences)
    if found.standard_error is None:
        return Difference(*found, p=None, detectable=None)
    if found.standard_error == 0:
        return Difference(*found, p=float(found.mean == 0), detectable=0.0)
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Difference(*found, p, found.standard_error * _noncentrality(found.n))


@cache
def _noncentrality(n: int) -> float:
    """The true mean, in standard errors, that a two-sided t test of n values finds with a probability of POWER.

    The squared t is F with noncentrality² and 1, n − 1 degrees of freedom: one tail of it is both of t, of whose
    noncentral distribution scipy.stats.nct loses the far tail.
    """
    critical = stats.t.isf(LEVEL / 2, n - 1)

    def lacking(noncentrality: float) -> float:
        return stats.ncf.sf(critical**2, 1, n - 1, noncentrality**2) - POWER

    return float(optimize.brentq(lacking, 1, 2 * critical))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The p-values adjusted for their number (Holm 1979); None, of what could not be tested, does not count."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        adjusted[i] = largest = max(largest, min(1.0, (len(tested) - rank) * p))
    return adjusted
