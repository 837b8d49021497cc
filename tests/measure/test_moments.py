"""One pass over any batches gives the moments of everything at once."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from measure import moments as moments_module
from measure.moments import Moments, excess_kurtosis

STATISTICS = ("count", "mean", "variance", "std", "skewness", "excess_kurtosis", "max_abs", "max_abs_over_std")


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def rounding_bound(n: int) -> float:
    """The largest relative error that float64 may leave in the kurtosis of n values.

    A sum of n terms is off by at most n ε, so each distance from the mean by n ε × range; the fourth moment by four
    times that over σ, the squared variance by as much, and range/σ ≤ √(2n).
    """
    return 8 * max(n, 2) * math.sqrt(2 * max(n, 2)) * np.finfo(np.float64).eps


def exact_moments(values: list[float]) -> tuple[Fraction, Fraction, Fraction, Fraction]:
    """Mean and second to fourth central moments without any rounding."""
    x = [Fraction(value) for value in values]
    mean = sum(x) / len(x)
    return mean, *(sum((value - mean) ** k for value in x) / len(x) for k in (2, 3, 4))


def same(a: Moments, b: Moments, tolerance: float) -> None:
    assert (a.count, a.nonfinite, a.max_abs) == (b.count, b.nonfinite, b.max_abs)
    for name in STATISTICS:
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        if left is not None:
            scale = max(abs(left), abs(right), a.max_abs if name == "mean" else (a.excess_kurtosis or 0) + 3)
            assert abs(left - right) <= tolerance * scale, name


def heavy_tailed(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(df=5, size=n)


def test_matches_scipy():
    x = heavy_tailed(300_003)  # several chunks, the last one short
    moments = Moments().update(torch.from_numpy(x).reshape(3, -1))
    assert moments.count == x.size
    assert moments.mean == pytest.approx(x.mean(), abs=1e-12)
    assert moments.variance == pytest.approx(x.var(), rel=1e-12)
    assert moments.std == pytest.approx(x.std(), rel=1e-12)
    assert moments.skewness == pytest.approx(stats.skew(x), abs=1e-9)
    assert moments.excess_kurtosis == pytest.approx(stats.kurtosis(x), abs=1e-9)
    assert moments.max_abs == np.abs(x).max()
    assert moments.max_abs_over_std == pytest.approx(np.abs(x).max() / x.std(), rel=1e-12)
    assert excess_kurtosis(torch.from_numpy(x)) == moments.excess_kurtosis


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_accumulated_in_float64(dtype):
    x = torch.from_numpy(heavy_tailed(70_000)).to(dtype)
    assert excess_kurtosis(x) == pytest.approx(stats.kurtosis(x.double().numpy()), abs=1e-9)


def test_views_and_parameters_are_read_and_left_alone():
    x = torch.nn.Parameter(torch.from_numpy(heavy_tailed(600)).reshape(20, 30))
    before = x.detach().clone()
    assert excess_kurtosis(x.T) == pytest.approx(stats.kurtosis(before.numpy(), axis=None), abs=1e-9)
    assert excess_kurtosis(x[:, ::3]) == pytest.approx(stats.kurtosis(before[:, ::3].numpy(), axis=None), abs=1e-9)
    assert torch.equal(x, before)


def test_the_chunk_size_does_not_matter(monkeypatch):
    x = torch.from_numpy(heavy_tailed(1000))
    whole = Moments().update(x)
    monkeypatch.setattr(moments_module, "CHUNK_CPU", 7)
    same(Moments().update(x), whole, rounding_bound(1000))


# Small integers make ties, constants and outliers likely; the wide floats reach the ends of float32.
VALUES = st.one_of(st.integers(-3, 3).map(float), st.floats(width=32, allow_nan=False, allow_infinity=False))


@settings(max_examples=200)
@given(batches=st.lists(st.lists(VALUES, max_size=12), max_size=8))
def test_any_split_equals_the_exact_moments(batches):
    moments = Moments()
    for batch in batches:
        moments.update(torch.tensor(batch, dtype=torch.float32))
    values = [value for batch in batches for value in batch]
    assert moments.count == len(values)
    if not values:
        assert all(getattr(moments, name) is None for name in STATISTICS[1:])
        return
    mean, m2, m3, m4 = exact_moments(values)
    tolerance = rounding_bound(len(values))
    assert abs(moments.mean - mean) <= tolerance * moments.max_abs
    assert abs(moments.variance - m2) <= tolerance * m2
    if m2 == 0:
        assert (moments.variance, moments.skewness, moments.excess_kurtosis) == (0.0, None, None)
        return
    kurtosis = float(m4 / m2**2)
    assert abs(moments.excess_kurtosis + 3 - kurtosis) <= tolerance * kurtosis
    assert abs(moments.skewness - float(m3 / m2**2) * math.sqrt(m2)) <= tolerance * kurtosis


@settings(max_examples=100)
@given(parts=st.tuples(*[st.lists(VALUES, max_size=12)] * 3))
def test_merge_is_associative_and_commutative(parts):
    def moments(index: int) -> Moments:
        return Moments().update(torch.tensor(parts[index], dtype=torch.float32))

    tolerance = 2 * rounding_bound(sum(map(len, parts)))
    left = moments(0).merge(moments(1)).merge(moments(2))
    same(left, moments(0).merge(moments(1).merge(moments(2))), tolerance)
    same(left, moments(2).merge(moments(1)).merge(moments(0)), tolerance)


def test_merge_leaves_the_other_alone():
    other = Moments().update(torch.tensor([1.0, 2.0, 4.0]))
    before = vars(other).copy()
    first = Moments().merge(other)
    first.update(torch.tensor([5.0]))
    assert vars(other) == before
    assert first.count == 4


def test_a_huge_offset_costs_no_digits():
    noise = np.round(heavy_tailed(100_000), 6)
    x = 1e8 + noise
    moments = Moments()
    for batch in np.array_split(x, 13):
        moments.update(torch.from_numpy(batch))
    noise = x - 1e8  # exact (Sterbenz), while scipy on x itself would round the mean to 1e-8
    assert moments.variance == pytest.approx(noise.var(), rel=1e-12)
    assert moments.skewness == pytest.approx(stats.skew(noise), abs=1e-9)
    assert moments.excess_kurtosis == pytest.approx(stats.kurtosis(noise), abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e8 / 3, 3e38])
def test_constants_have_no_variance_and_no_shape(value):
    x = torch.full((100_003,), value, dtype=torch.float64)
    moments = Moments().update(x[:1]).update(x).update(x[:12])
    assert (moments.mean, moments.variance, moments.std, moments.max_abs) == (value, 0.0, 0.0, abs(value))
    assert (moments.skewness, moments.excess_kurtosis, moments.max_abs_over_std) == (None, None, None)


def test_nothing_at_all():
    for moments in (Moments(), Moments().update(torch.empty(0, 3)), Moments().merge(Moments())):
        assert (moments.count, moments.nonfinite) == (0, 0)
        assert all(getattr(moments, name) is None for name in STATISTICS[1:])
    assert excess_kurtosis(torch.empty(0)) is None


def test_one_number():
    moments = Moments().update(torch.tensor(-2.5))
    assert (moments.count, moments.mean, moments.variance, moments.max_abs) == (1, -2.5, 0.0, 2.5)
    assert moments.excess_kurtosis is None


def test_two_equal_spikes_have_the_least_kurtosis():
    assert excess_kurtosis(torch.tensor([-1.0, 1.0])) == -2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nonfinite_values_are_counted_and_left_out(dtype):
    clean = torch.from_numpy(heavy_tailed(1000)).to(dtype)
    bad = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    moments = Moments().update(torch.cat([bad, clean])).update(bad)
    assert (moments.count, moments.nonfinite) == (1000, 6)
    moments.nonfinite = 0
    same(moments, Moments().update(clean), rounding_bound(1000))


def test_only_nonfinite_values():
    moments = Moments().update(torch.full((5,), math.nan))
    assert (moments.count, moments.nonfinite, moments.mean, moments.excess_kurtosis) == (0, 5, None, None)


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_beyond_the_range_of_the_powers_there_is_no_shape(scale):
    moments = Moments().update(scale * torch.from_numpy(heavy_tailed(100)))
    assert (moments.skewness, moments.excess_kurtosis, moments.max_abs_over_std) == (None, None, None)


@pytest.mark.parametrize("sign", [1, -1])
def test_beyond_the_range_of_the_squares_there_is_no_deviation(sign):
    moments = Moments().update(torch.tensor([sign * 1e200, -sign * 1e200], dtype=torch.float64))
    assert (moments.variance, moments.std, moments.max_abs) == (None, None, 1e200)


def test_arrays_and_lists_count_as_tensors():
    x = np.random.default_rng(0).standard_t(5, (3, 40))
    expected = pytest.approx(stats.kurtosis(x, axis=None), rel=1e-12)
    for same in (x, x.tolist(), x[::-1, ::-1], torch.from_numpy(x)):
        assert excess_kurtosis(same) == expected
    assert excess_kurtosis(np.float32(3)) is None
    with pytest.raises(TypeError, match="complex128"):
        excess_kurtosis(1j * x)


@pytest.mark.gpu
def test_a_gpu_gives_the_same():
    x = torch.from_numpy(heavy_tailed(100_000))
    same(Moments().update(x.cuda()), Moments().update(x), rounding_bound(x.numel()))
