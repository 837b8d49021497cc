"""Statistics over the seeds of an experiment: means with intervals, paired differences, Holm's correction, and what a
design could have seen. By scipy.stats, in float64; every figure is of few numbers that are taken to be Gaussian."""

from collections.abc import Sequence
from typing import NamedTuple

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
    high: float | None
    p: float | None
    """two-sided, of Student's t test; 0 where all differences are one and the same number, but 0"""
    detectable: float | None
    """the smallest true difference that this design, with the spread it found, sees with a probability of POWER"""


def estimate(values: Sequence[float]) -> Estimate: ...


def difference(differences: Sequence[float]) -> Difference: ...


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The p-values adjusted for their number (Holm 1979); None, of what could not be tested, does not count."""
    ...
