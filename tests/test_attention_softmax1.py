"""softmax1 by its definition, by known vectors, and at the ends of each dtype."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import softmax1

VECTORS = [
    ([1, 2, 3, 4, 5], [0.01160646, 0.03154963, 0.08576079, 0.23312201, 0.63369132], 0.99573022),
    ([1, 2, -3, -4, -10_000], [0.24323711, 0.66118700, 0.00445504, 0.00163892, 0], 0.91051807),
    ([1, 2, -32498321749821, -190487129857, -10_000], [0.24472847, 0.66524096, 0, 0, 0], 0.90996943),
    ([-1, -2, -32498321749821, -190487129857, -10_000], [0.24472847, 0.09003057, 0, 0, 0], 0.33475904),
]


@pytest.mark.parametrize(("x", "expected", "total"), VECTORS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_softmax1_of_known_vectors(x, expected, total, dtype):
    y = softmax1(torch.tensor(x, dtype=dtype))
    assert y.dtype == (torch.float32 if dtype == torch.int64 else dtype)
    tolerance = 5e-9 + 4 * torch.finfo(y.dtype).eps  # eight digits are known; a few roundings of numbers below 1
    torch.testing.assert_close(y.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)
    assert y.sum().item() == pytest.approx(total, abs=tolerance)


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20))
def test_softmax1_is_softmax_over_one_more_logit_0(x):
    x = torch.tensor(x, dtype=torch.float64)
    expected = torch.softmax(torch.cat((x, torch.zeros(1, dtype=x.dtype))), dim=0)[:-1]
    torch.testing.assert_close(softmax1(x), expected, rtol=30 * torch.finfo(x.dtype).eps, atol=0)  # a sum of ≤ 21 terms


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_softmax1_along_any_dimension(dim):
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = softmax1(x.movedim(dim, -1)).movedim(-1, dim)
    torch.testing.assert_close(softmax1(x, dim=dim), expected)
    mass = softmax1(x, dim=dim).sum(dim)
    torch.testing.assert_close(mass, torch.sigmoid(x.logsumexp(dim)))  # Σ e^x / (1 + Σ e^x)


def test_softmax1_of_a_scalar_is_the_sigmoid():
    assert softmax1(torch.tensor(0.0)) == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("x", [[-200.0, -300.0], [-20.0, 11.0], [60.0, 60.0], [-math.inf, -math.inf]])
def test_softmax1_never_overflows_in_value_or_gradient(x, dtype):
    x = torch.tensor(x, dtype=dtype, requires_grad=True)
    y = softmax1(x)
    y.sum().backward()
    assert y.dtype == dtype
    exact = x.detach().double().exp()
    exact = exact / (1 + exact.sum())
    info = torch.finfo(dtype)
    # Rounding of e^-shift, of the quotient and of the result; below the normal range a number has absolute precision.
    torch.testing.assert_close(y.double(), exact, rtol=4 * info.eps, atol=info.smallest_normal)
    assert x.grad.isfinite().all()


def test_softmax1_gradient_is_that_of_its_formula():
    x = torch.tensor([[0.3, -2.0, 1.5], [-50.0, -60.0, -55.0]], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(softmax1, x)
