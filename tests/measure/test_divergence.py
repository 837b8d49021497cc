"""Divergences and their aggregates against mpmath, scipy, PyTorch and cases worked by hand."""

import math
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from torch.nn import functional as F

from measure.divergence import (
    AGGREGATES,
    aggregate,
    hellinger,
    jensen_shannon,
    kl_divergence,
    renyi,
    total_variation,
)

EPS = torch.finfo(torch.float64).eps
SYMMETRIC = (jensen_shannon, total_variation, hellinger)
EVERY = (kl_divergence, *SYMMETRIC, lambda p, q: renyi(p, q, 0.5), lambda p, q: renyi(p, q, 3.0))


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def bernoulli(p: float) -> torch.Tensor:
    return logs(1 - p, p)


def random_logs(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(scale * torch.randn(*shape, dtype=torch.float64, generator=generator), -1)


def exact_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """KL of one pair to 40 digits, each normalised there: the rounding of the inputs' sums is no part of it."""
    with mpmath.workdps(40):
        p, q = ([mpmath.exp(mpmath.mpf(v)) for v in log.tolist()] for log in (log_p, log_q))
        sum_p, sum_q = mpmath.fsum(p), mpmath.fsum(q)
        return float(mpmath.fsum(a / sum_p * mpmath.log(a / sum_p / (b / sum_q)) for a, b in zip(p, q, strict=True)))


# --- between two distributions ----------------------------------------------------------------------------------------


def test_kl_is_that_of_pytorch_where_pytorch_has_it():
    log_p, log_q = random_logs(4, 5, 50), random_logs(4, 5, 50, seed=1)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_divergence(log_p, log_q), expected)
    P, Q = (torch.distributions.Categorical(logits=x) for x in (log_p, log_q))
    torch.testing.assert_close(kl_divergence(log_p, log_q), torch.distributions.kl_divergence(P, Q))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", EVERY)
def test_batched_and_in_the_dtype_given(divergence, dtype):
    log_p, log_q = random_logs(3, 2, 7).to(dtype), random_logs(3, 2, 7, seed=1).to(dtype)
    result = divergence(log_p, log_q)
    assert (result.shape, result.dtype) == ((3, 2), dtype)
    assert result[2, 1].item() == pytest.approx(
        divergence(log_p[2, 1], log_q[2, 1]).item(), rel=8 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("step", [1e-1, 1e-3, 1e-6, 1e-9])
def test_neighbours_keep_their_digits(step):
    logits = random_logs(20)
    log_p = logits - logits.logsumexp(-1)
    log_q = torch.log_softmax(logits + step * random_logs(20, seed=1), -1)
    # The terms p (e^x − 1 − x) ≈ p x²/2 are differences of numbers of the size p x, so off by ε/x of themselves.
    assert kl_divergence(log_p, log_q).item() == pytest.approx(exact_kl(log_p, log_q), rel=20 * EPS / step, abs=0)


def test_float32_neighbours_where_kl_div_has_no_digit_left():
    log_p = random_logs(1000).float()
    log_q = torch.log_softmax(log_p + 1e-4 * random_logs(1000, seed=1).float(), -1)
    expected, eps = exact_kl(log_p.double(), log_q.double()), torch.finfo(torch.float32).eps
    # x ~ 1e-4 is known to ε|log p| ≤ 25 ε, of which KL, stationary at x = 0, takes twice the relative error
    assert kl_divergence(log_p, log_q).item() == pytest.approx(expected, rel=2 * 25 * eps / 1e-4)
    assert abs(F.kl_div(log_q, log_p, log_target=True, reduction="sum").item() - expected) > 0.1 * expected


@pytest.mark.parametrize("gap", [50.0, 95.0, 200.0, 5000.0])
def test_far_apart_and_peaked_does_not_overflow(gap):
    log_p, log_q = (torch.log_softmax(torch.tensor(x, requires_grad=True), -1) for x in ([0.0, gap], [gap, 0.0]))
    for kl in (kl_divergence(log_p, log_q), kl_divergence(log_q, log_p)):
        assert kl.item() == pytest.approx(gap, rel=1e-6)
        assert all(g.isfinite().all() for g in torch.autograd.grad(kl, (log_p, log_q), retain_graph=True))


def test_zero_probabilities():
    p, q = logs(0.5, 0.5, 0), logs(0.25, 0.5, 0.25)
    assert kl_divergence(p, q).item() == pytest.approx(0.5 * math.log(2), rel=4 * EPS)  # 0 log 0 = 0
    assert kl_divergence(q, p).item() == math.inf  # q is not absolutely continuous with respect to p
    assert kl_divergence(p, p).item() == 0
    apart = logs(1, 0), logs(0, 1)
    assert kl_divergence(*apart).item() == math.inf
    assert jensen_shannon(*apart).item() == pytest.approx(math.log(2), rel=4 * EPS)
    assert total_variation(*apart).item() == 1
    assert hellinger(*apart).item() == pytest.approx(1, rel=4 * EPS)
    assert [renyi(*apart, order).item() for order in (0, 0.5, 1, 2, math.inf)] == [math.inf] * 5
    assert renyi(q, p, 0.5).item() == pytest.approx(-2 * math.log(math.sqrt(1 / 8) + 0.5), rel=4 * EPS)
    assert [renyi(q, p, order).item() for order in (1, 1.5, math.inf)] == [math.inf] * 3


@pytest.mark.parametrize("divergence", EVERY)
def test_zero_probabilities_leave_the_gradient_finite(divergence):
    logits = torch.tensor([1.0, 2.0, -math.inf, 0.5], dtype=torch.float64)
    student = torch.tensor([0.5, 1.0, -math.inf, 0.1], dtype=torch.float64, requires_grad=True)
    divergence(torch.log_softmax(student, -1), torch.log_softmax(logits, -1)).backward()
    assert student.grad.isfinite().all()
    assert (student.grad != 0).any()


@pytest.mark.parametrize("divergence", EVERY)
def test_gradients(divergence):
    logits = random_logs(3, 6).requires_grad_(), random_logs(3, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: divergence(a.log_softmax(-1), b.log_softmax(-1)), logits)


def test_second_derivative_is_the_fisher_information():
    log_p = random_logs(5)
    p = log_p.exp()
    hessian = torch.func.hessian(lambda z: kl_divergence(log_p, torch.log_softmax(z, -1)))(log_p)
    torch.testing.assert_close(hessian, torch.diag(p) - torch.outer(p, p))


def test_jensen_shannon_is_scipys_squared():
    log_p, log_q = random_logs(30, 8), random_logs(30, 8, seed=1)
    expected = jensenshannon(log_p.exp().numpy(), log_q.exp().numpy(), axis=-1) ** 2
    np.testing.assert_allclose(jensen_shannon(log_p, log_q).numpy(), expected, rtol=1e-12)


def test_the_family_at_one_pair_of_coins():
    """Known figures: θ = .101 against .5, and Rényi's for .8 against .5."""
    theta, fair = bernoulli(0.101), bernoulli(0.5)
    assert kl_divergence(theta, fair).item() == pytest.approx(0.365873, abs=5e-7)
    assert kl_divergence(fair, theta).item() == pytest.approx(0.506406, abs=5e-7)
    assert jensen_shannon(theta, fair).item() == pytest.approx(0.101076, abs=5e-7)
    assert total_variation(theta, fair).item() == pytest.approx(0.399, abs=1e-15)
    assert 2 * hellinger(theta, fair).item() ** 2 == pytest.approx(0.209661, abs=5e-7)  # without the ½
    for order, expected in ((0.5, 0.105361), (1, 0.192745), (2, 0.307485), (5, 0.414462)):
        assert renyi(bernoulli(0.8), fair, order).item() == pytest.approx(expected, abs=5e-7)
    assert renyi(bernoulli(0.8), fair, math.inf).item() == pytest.approx(math.log(1.6), rel=4 * EPS)
    assert renyi(logs(0.5, 0.5, 0), logs(0.3, 0.4, 0.3), 0).item() == pytest.approx(-math.log(0.7), rel=8 * EPS)


@given(st.integers(0, 2**31), st.sampled_from([1e-8, 1e-3, 1.0, 30.0]))
def test_order_and_bounds_of_the_family(seed, scale):
    log_p = random_logs(9, seed=seed)
    log_q = torch.log_softmax(log_p + scale * random_logs(9, seed=seed + 1), -1)
    # off by ε·x of the small differences x, and by ε·30, the inputs' own rounding, in the first-order ones
    slack = 100 * EPS
    js, tv, h = (f(log_p, log_q).item() for f in SYMMETRIC)
    assert [f(log_q, log_p).item() for f in SYMMETRIC] == pytest.approx([js, tv, h], rel=1e-6, abs=slack)
    forward = kl_divergence(log_p, log_q).item()
    assert forward >= 0
    assert 0 <= js <= math.log(2) + slack
    assert 2 * tv**2 <= forward + slack  # Pinsker
    assert h**2 <= tv + slack <= math.sqrt(2) * h + 2 * slack  # Le Cam
    orders = [renyi(log_p, log_q, order).item() for order in (0, 0.3, 0.999, 1, 1.001, 2, 10, math.inf)]
    assert all(a <= b * (1 + 1e-6) + slack for a, b in pairwise(orders))


@pytest.mark.parametrize("order", [0.5, 1 - 1e-9, 1 + 1e-9, 2.0])
def test_renyi_of_neighbours_against_many_digits(order):
    log_p = random_logs(12)
    log_q = torch.log_softmax(log_p + 1e-5 * random_logs(12, seed=1), -1)
    with mpmath.workdps(50):
        p, q = ([mpmath.exp(mpmath.mpf(v)) for v in log.tolist()] for log in (log_p, log_q))
        p, q = ([v / mpmath.fsum(r) for v in r] for r in (p, q))
        alpha = mpmath.mpf(order)
        total = mpmath.fsum(a**alpha * b ** (1 - alpha) for a, b in zip(p, q, strict=True))
        expected = float(mpmath.log(total) / (alpha - 1))
    assert renyi(log_p, log_q, order).item() == pytest.approx(expected, rel=100 * EPS / 1e-5, abs=0)


def test_renyi_far_apart_does_not_overflow():
    log_p, log_q = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1) for x in ([0.0, 900], [900, 0.0]))
    assert renyi(log_p, log_q, 2).item() == pytest.approx(900, rel=1e-12)
    assert renyi(log_p, log_q, 0.5).item() == pytest.approx(900 - 2 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("divergence", EVERY)
def test_bad_input_is_named(divergence):
    p = random_logs(2, 4)
    with pytest.raises(ValueError, match=r"log_p \(2, 4\) and log_q \(2, 3\).*one shape"):
        divergence(p, random_logs(2, 3))
    with pytest.raises(ValueError, match=r"one shape"):
        divergence(p, p[0])
    with pytest.raises(ValueError, match="floating"):
        divergence(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    for bad in (p + 1e-5, torch.zeros(2, 4, dtype=torch.float64), p.clone().fill_(math.nan)):
        with pytest.raises(ValueError, match=r"exp\(log_q\) must sum to 1"):
            divergence(p, bad)
        with pytest.raises(ValueError, match=r"exp\(log_p\) must sum to 1"):
            divergence(bad, p)


def test_renyi_of_a_negative_order():
    for order in (-0.5, math.nan):
        with pytest.raises(ValueError, match=f"order {order}: at least 0"):
            renyi(bernoulli(0.3), bernoulli(0.4), order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_softmax_of_a_large_vocabulary_is_normalised(dtype):
    logits = 4 * torch.randn(3, 50304, generator=torch.Generator().manual_seed(0))
    kl_divergence(*(torch.log_softmax(x.to(dtype), -1) for x in (logits, logits.flip(-1))))
    with pytest.raises(ValueError, match="sum to 1"):
        kl_divergence(*(logits.to(dtype) for _ in range(2)))


# --- aggregates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 21, 60, 1000])
def test_aggregates_are_numpys(n):
    kl = torch.from_numpy(np.random.default_rng(0).exponential(size=(3, n, 2)))
    expected = {
        "mean": kl.numpy().mean(1),
        "rmse": np.sqrt((kl.numpy() ** 2).mean(1)),
        "p95": np.quantile(kl.numpy(), 0.95, axis=1),
        "max": kl.numpy().max(1),
    }
    for how in AGGREGATES:
        np.testing.assert_allclose(aggregate(kl, how, dim=1).numpy(), expected[how], rtol=1e-14)


@pytest.mark.parametrize("how", AGGREGATES)
def test_aggregates_are_differentiable(how):
    kl = torch.rand(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: aggregate(x, how), kl)


@pytest.mark.parametrize("how", AGGREGATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_zero_where_all_divergences_are(how, dtype):
    kl = torch.zeros(2, 30, dtype=dtype)
    kl[1, 3:] = 0.5
    kl.requires_grad_()
    aggregate(kl, how).sum().backward()
    assert (kl.grad[0] == 0).all()
    assert kl.grad[1].isfinite().all()
    assert (kl.grad[1] != 0).any()

    reference = torch.randn(2, 30, 50, dtype=dtype, generator=torch.Generator().manual_seed(0))
    student = reference.clone().requires_grad_()
    log_p, log_q = student.log_softmax(-1), reference.log_softmax(-1)
    for kl in (kl_divergence(log_p, log_q), kl_divergence(log_q, log_p)):
        assert (kl == 0).all()
        (gradient,) = torch.autograd.grad(aggregate(kl, how).sum(), student, retain_graph=True)
        assert (gradient == 0).all()


@pytest.mark.parametrize("how", AGGREGATES)
def test_in_training_nothing_waits_for_the_device(how):
    """Whole under torch.compile: no check looks at a value."""

    def penalty(student, reference):
        return aggregate(kl_divergence(student.log_softmax(-1), reference.log_softmax(-1)), how).sum()

    student, reference = random_logs(2, 5, 7).requires_grad_(), random_logs(2, 5, 7, seed=1)
    compiled = torch.compile(penalty, fullgraph=True, backend="eager")
    assert compiled(student, reference).item() == penalty(student, reference).item()


def test_p95_of_infinite_and_half_precision_divergences():
    kl = torch.ones(100)
    kl[:10] = math.inf
    assert aggregate(kl, "p95").item() == math.inf
    kl[4:10] = 2
    assert aggregate(kl, "p95").item() == 2
    assert aggregate(kl.bfloat16(), "p95").dtype == torch.bfloat16


def test_bad_aggregates():
    with pytest.raises(ValueError, match="unknown aggregate 'median': choose from mean, rmse, p95, max"):
        aggregate(torch.ones(3), "median")
    for empty in (torch.ones(3, 0), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="nothing to aggregate"):
            aggregate(empty, "mean")
