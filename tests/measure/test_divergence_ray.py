"""The KL along a ray against many digits and known figures, and its remainders within their bounds."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from measure.divergence import kl_along_ray
from tests.measure.test_divergence import EPS

P = (3 + math.sqrt(3)) / 6


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


THREE = float64(1, 2, 0.5).softmax(-1), float64(0.3, -0.5, 0.8)
EXTREMUM = float64(P, 1 - P), float64(0, 1)


def exact_ray(alpha0: torch.Tensor, slopes: torch.Tensor, tau: float) -> dict[str, float]:
    """One row by the definitions, to more digits than any cancellation takes."""
    with mpmath.workdps(80):
        alpha, a, t = ([mpmath.mpf(v) for v in x.tolist()] for x in (alpha0, slopes, float64(tau)))
        alpha, t = [p / mpmath.fsum(alpha) for p in alpha], t[0]
        weights = [p * mpmath.exp(t * s) for p, s in zip(alpha, a, strict=True)]
        moved = [w / mpmath.fsum(weights) for w in weights]

        def kl(p, q):
            return mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(p, q, strict=True) if x)

        mean = mpmath.fsum(p * s for p, s in zip(alpha, a, strict=True))
        variance = mpmath.fsum(p * (s - mean) ** 2 for p, s in zip(alpha, a, strict=True))
        quadratic = t**2 * variance / 2
        cubic = t**3 * (max(a) - min(a)) ** 3 / (36 * mpmath.sqrt(3))
        found = {"variance": variance, "quadratic": quadratic, "spread": max(a) - min(a)}
        for direction, value, bound in (("forward", kl(alpha, moved), cubic), ("reverse", kl(moved, alpha), 2 * cubic)):
            found |= {
                direction: value,
                f"remainder_{direction}": value - quadratic,
                f"bound_{direction}": bound,
                f"tightness_{direction}": abs(value - quadratic) / bound,
            }
        return {name: float(value) for name, value in found.items()}


def test_the_three_way_example():
    """Known figures: KL reverse and forward, quadratic, the reverse bound, tightness reverse and forward."""
    table = {
        0.1: (0.001283414, 0.001267073, 0.001250447, 0.000070469, 0.467834, 0.471864),
        0.5: (0.034843166, 0.033172060, 0.031261169, 0.008808601, 0.406648, 0.433869),
        1.0: (0.146441804, 0.138151304, 0.125044675, 0.070468808, 0.303640, 0.371984),
        1.5: (0.325806833, 0.316976795, 0.281350520, 0.237832227, 0.186923, 0.299592),
    }
    ray = kl_along_ray(*THREE, float64(*table))
    columns = ("reverse", "forward", "quadratic", "bound_reverse", "tightness_reverse", "tightness_forward")
    for i, figures in enumerate(table.values()):
        for column, figure in zip(columns, figures, strict=True):
            assert getattr(ray, column)[i].item() == pytest.approx(figure, abs=1e-6 if "tight" in column else 1e-9)
    assert ray.variance[0].item() == pytest.approx(0.250089351, abs=1e-9)
    assert (ray.spread[0].item(), ray.radius[0].item()) == pytest.approx((1.3, 2.416610), abs=5e-7)


def test_the_hundred_random_cases():
    rng, reverse, forward = np.random.default_rng(42), [], []
    for _ in range(100):
        n = rng.integers(2, 8)
        z, a, tau = rng.standard_normal((1, n)), rng.standard_normal((1, n)), rng.uniform(0.01, 0.5)
        ray = kl_along_ray(torch.softmax(torch.from_numpy(z), -1), torch.from_numpy(a), tau)
        reverse.append(ray.tightness_reverse.item())
        forward.append(ray.tightness_forward.item())
    for found, figures in (
        (reverse, (0.002745752, 0.996357156, 0.326989004)),
        (forward, (0.002815923, 0.995373899, 0.328192238)),
    ):
        assert (min(found), max(found), np.mean(found)) == pytest.approx(figures, abs=1e-9)


def test_the_bernoulli_extremum_down_to_steps_where_subtraction_loses_all_digits():
    for tau, reverse, forward in (
        (0.3, 0.990386945, 0.995251982),
        (0.1, 0.998976331, 0.999490505),
        (0.01, 0.999989976, 0.999994990),
        (1e-3, 0.999999900, 0.999999950),
    ):
        ray = kl_along_ray(*EXTREMUM, tau)
        assert (ray.tightness_reverse.item(), ray.tightness_forward.item()) == pytest.approx(
            (reverse, forward), abs=1e-9
        )
    for tau in (1e-5, 1e-6, 1e-8):
        ray = kl_along_ray(*EXTREMUM, tau)
        # the next order is τ³: nothing beside the rounding of some 20 operations
        assert ray.tightness_reverse.item() == pytest.approx(1 - 0.1 * tau**2, abs=20 * EPS)
        assert ray.tightness_forward.item() == pytest.approx(1 - 0.05 * tau**2, abs=20 * EPS)


@pytest.mark.parametrize("tau", [1e-8, 1e-4, 0.003, 0.1, 0.7, 0.9999, 1.0, 1.3, 4.0, 10.0, 300.0, 3000.0])
def test_every_field_against_many_digits(tau):
    """Around the switch (τΔ = 1) and the overflow (τΔ ≈ 700) as well as far from them."""
    generator = torch.Generator().manual_seed(0)
    rows = [(a, s / (s.max() - s.min())) for a, s in (THREE, EXTREMUM)]  # Δ = 1
    for scale in (0.0, 1.0, 8.0):  # uniform, random, nearly one-hot
        z, a = torch.randn(2, 6, dtype=torch.float64, generator=generator)
        rows.append((torch.softmax(scale * z, -1), (a - a.min()) / (a.max() - a.min())))
    for alpha0, slopes in rows:
        ray, exact = kl_along_ray(alpha0, slopes, tau), exact_ray(alpha0, slopes, tau)
        for name, value in exact.items():
            found = getattr(ray, name).item()
            if name.startswith(("remainder", "tightness")):  # to a few ε of the bound
                size = 1 if name.startswith("t") else exact[name.replace("remainder", "bound")]
                assert abs(found - value) <= 100 * EPS * size, name
            elif tau < 100:
                assert found == pytest.approx(value, rel=100 * EPS, abs=0), name
            else:  # a difference of numbers of the size τΔ
                assert found == pytest.approx(value, rel=100 * EPS, abs=10 * EPS * tau), name


def property_cases(n: int, seed: int):
    """n rows of 8: α⁰ uniform, one-hot, or softmax of logits from flat to saturated; slopes with Δ from 1e-9 to 1e6 or
    two-valued, as the extremum has them; τ from 1e-8 to 10."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((n, 8)) * 10 ** rng.uniform(-2, 2, (n, 1))
    alpha0 = torch.softmax(torch.from_numpy(logits), -1)
    alpha0[: n // 10] = 1 / 8
    alpha0[n // 10 : n // 5] = torch.eye(8, dtype=torch.float64)[torch.from_numpy(rng.integers(0, 8, n // 5 - n // 10))]
    slopes = rng.standard_normal((n, 8))
    two_valued = rng.random(n) < 0.3
    slopes[two_valued] = np.sign(slopes[two_valued])
    slopes = slopes * 10 ** rng.uniform(-9, 6, (n, 1)) + 10 ** rng.uniform(-3, 3, (n, 1))  # a common shift as well
    return alpha0, torch.from_numpy(slopes), torch.from_numpy(10 ** rng.uniform(-8, 1, n))


def test_no_remainder_exceeds_its_bound():
    alpha0, slopes, tau = property_cases(100_000, seed=0)
    ray = kl_along_ray(alpha0, slopes, tau)
    moving = ray.spread > 0  # a shift may swallow the least slopes
    assert moving.float().mean() > 0.95
    for tightness in (ray.tightness_forward[moving], ray.tightness_reverse[moving]):
        assert tightness.max() <= 1 + 1e-9
        assert tightness.max() > 0.99  # and the cases come close
    assert (ray.forward >= 0).all()
    assert (ray.reverse >= -10 * EPS * tau * ray.spread).all()
    assert not any(x[moving].isnan().any() for x in ray)


@given(
    st.floats(0, 1),
    st.floats(-1e3, 1e3),
    st.floats(-1e3, 1e3),
    st.floats(1e-8, 10),
)
def test_no_remainder_of_a_coin_exceeds_its_bound(p, a, b, tau):
    ray = kl_along_ray(float64(1 - p, p), float64(a, b), tau)
    for tightness in (ray.tightness_forward.item(), ray.tightness_reverse.item()):
        assert math.isnan(tightness) if ray.bound_forward == 0 else tightness <= 1 + 1e-9


def test_a_common_slope_changes_nothing():
    ray, shifted = (kl_along_ray(THREE[0], THREE[1] + shift, 0.5) for shift in (0.0, 1024.0))
    for name in ("forward", "reverse", "variance", "remainder_forward", "remainder_reverse", "tightness_reverse"):
        # the shift costs the slopes their last ten binary digits, no more
        assert getattr(shifted, name).item() == pytest.approx(getattr(ray, name).item(), rel=1024 * 10 * EPS)


def test_rows_that_do_not_move():
    ray = kl_along_ray(torch.full((2, 3), 1 / 3), torch.tensor([[0.7, 0.7, 0.7], [0.0, 0.0, 1.0]]), 0.5)
    assert (ray.forward[0], ray.reverse[0], ray.spread[0], ray.radius[0]) == (0, 0, 0, math.inf)
    assert ray.tightness_forward[0].isnan()
    assert ray.tightness_reverse[0].isnan()
    assert ray.tightness_forward[1] > 0
    one = kl_along_ray(torch.ones(1), torch.tensor([3.0]), 1.0)
    assert (one.forward, one.spread) == (0, 0)
    still = kl_along_ray(*THREE, 0.0)
    assert (still.forward, still.reverse, still.remainder_reverse) == (0, 0, 0)
    assert still.tightness_forward.isnan()


def test_rows_and_steps_broadcast():
    alpha0 = torch.softmax(torch.randn(4, 3, 5), -1)  # float32 becomes float64, normalised there
    slopes = torch.randn(4, 3, 5)
    ray = kl_along_ray(alpha0, slopes, torch.tensor([0.1, 0.2, 0.3]))
    assert all(x.shape == (4, 3) and x.dtype == torch.float64 for x in ray)
    one = kl_along_ray(alpha0[2, 1], slopes[2, 1], torch.tensor(0.2))
    assert [x[2, 1].item() for x in ray] == pytest.approx([x.item() for x in one], rel=1e-12)


def test_bad_rays_are_named():
    alpha0, slopes = THREE
    with pytest.raises(ValueError, match=r"alpha0 \(3,\) and slopes \(2,\)"):
        kl_along_ray(alpha0, slopes[:2], 1.0)
    with pytest.raises(ValueError, match=r"alpha0 holds -0\.5: probabilities are at least 0"):
        kl_along_ray(torch.tensor([1.0, 0.5, -0.5]), slopes, 1.0)
    with pytest.raises(ValueError, match=r"alpha0 must sum to 1 over the last dimension, not to 1\.1"):
        kl_along_ray(torch.tensor([0.5, 0.3, 0.3]), slopes, 1.0)
    for bad in (math.inf, math.nan):
        with pytest.raises(ValueError, match="1 of the slopes are not finite"):
            kl_along_ray(alpha0, torch.tensor([0.0, bad, 1.0]), 1.0)
    for tau in (-0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"tau {tau}: finite and at least 0"):
            kl_along_ray(alpha0, slopes, tau)
