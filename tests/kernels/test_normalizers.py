"""The definitions of kernels/normalizers.py, each against another way to compute it, in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from kernels import normalizers as n
from kernels.normalizers import Normalizer, running_sums, scaled_queries, softmax_weights, visible_keys

EPS = torch.finfo(torch.float64).eps
KINDS = {
    "clipped": (n.CLIPPED, {"alpha": 1.5, "context": 9}),
    "clipped by row": (n.CLIPPED, {"alpha": 0.7, "context": 0}),
    "softpick": (n.SOFTPICK, {}),
    "sigmoid": (n.SIGMOID, {"bias": -1.3}),
    "relu": (n.RELU, {}),
    "entmax15": (n.ENTMAX15, {}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def causal(T: int = 7, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    """Scores (1, 2, T, T), none of them at a kink of any of these functions."""
    x = torch.randn(1, 2, T, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (spread * x).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)


def entmax(x: np.ndarray, alpha: float) -> np.ndarray:
    """`[(α − 1) x − τ]₊^(1/(α − 1))` with the τ for which it sums to 1, by finding that root."""

    def weights(tau):
        return np.maximum((alpha - 1) * x - tau, 0) ** (1 / (alpha - 1))

    top = (alpha - 1) * x.max()
    return weights(optimize.brentq(lambda tau: weights(tau).sum() - 1, top - 1 - 1e-9, top, xtol=1e-15, rtol=1e-15))


def by_hand(kind: str, x: np.ndarray) -> np.ndarray:
    """One row, of the scores of the keys that it sees."""
    if kind.startswith("clipped"):
        alpha, context = KINDS[kind][1].values()
        gamma = -alpha / (context or len(x))
        return np.clip((1 - gamma) * special.softmax(x) + gamma, 0, 1)
    if kind == "softpick":
        return np.maximum(np.expm1(x), 0) / (np.abs(np.expm1(x)).sum() + 1e-6)
    if kind == "sigmoid":
        return special.expit(x - 1.3)
    return np.maximum(x, 0) / len(x) if kind == "relu" else entmax(x, 1.5)


@every_kind
def test_weights_are_those_of_the_formula_row_by_row(kind):
    definition, constants = KINDS[kind]
    scores = causal()
    P = definition["weights"](scores, **constants).masked_fill(scores.isneginf(), 0)
    for h, i in np.ndindex(2, 7):
        expected = by_hand(kind, scores[0, h, i, : i + 1].numpy())
        # A root is found to 1e-15, and a weight near 0 is the square of a difference.
        np.testing.assert_allclose(P[0, h, i, : i + 1], expected, rtol=1e-13, atol=4e-15)
    alone = definition["weights"](scores[:, :, 4:5, :5], **constants)  # a row needs no other, and only what it sees
    torch.testing.assert_close(alone, P[:, :, 4:5, :5], rtol=64 * EPS, atol=EPS)


@every_kind
def test_derivatives_are_exact(kind):
    definition, constants = KINDS[kind]
    scores = causal()
    keys = torch.arange(7)

    def weights(x):
        return definition["weights"](scores.where(scores.isneginf(), x), **constants)

    x = causal().masked_fill(scores.isneginf(), 0).requires_grad_()
    assert torch.autograd.gradcheck(weights, x)
    assert torch.autograd.gradgradcheck(weights, x)
    jacobian = torch.autograd.functional.jacobian(lambda s: definition["weights"](s, **constants), scores)
    own = torch.stack([jacobian[0, h, i, keys, 0, h, i, keys] for h, i in np.ndindex(2, 7)]).view(1, 2, 7, 7)
    slope = definition["diagonal"](scores, weights(x).detach(), **constants)
    torch.testing.assert_close(slope.masked_fill(scores.isneginf(), 0), own, rtol=64 * EPS, atol=16 * EPS)


@every_kind
def test_detached_is_the_derivative_with_the_rows_sum_held_constant(kind):
    definition, constants = KINDS[kind]
    scores = causal()
    P = definition["weights"](scores, **constants)
    x = scores.clone().requires_grad_()
    if kind.startswith("clipped"):
        gamma = -constants["alpha"] / (constants["context"] or visible_keys(scores))
        held = ((1 - gamma) * (x - scores.logsumexp(-1, keepdim=True)).exp() + gamma).clip(0, 1)
    elif kind == "softpick":
        total = scores.masked_fill(scores.isneginf(), 0).expm1().abs().sum(-1, keepdim=True) + 1e-6
        held = x.expm1().relu() / total
    elif kind == "entmax15":
        tau = (scores / 2 - P.sqrt()).where(P > 0, -math.inf).amax(-1, keepdim=True)
        held = (x / 2 - tau).relu().square()
    else:  # no key has a say in another's weight
        held = definition["weights"](x, **constants)
    visible = ~scores.isneginf()
    (expected,) = torch.autograd.grad(held[visible].sum(), x)
    slope = definition["detached"](scores, P, **constants)
    torch.testing.assert_close(slope[visible], expected[visible], rtol=64 * EPS, atol=64 * EPS)


ROWS = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(row=ROWS)
@settings(max_examples=20, deadline=None)
@example(row=[0.0, 0.0, 0.0])
@example(row=[-1e4, -1e4])
@example(row=[1e4, 1e4, -1e4])
@example(row=[1e-8])
def test_rows_are_finite_and_hold_no_more_than_they_promise(kind, dtype, row):
    definition, constants = KINDS[kind]
    scores = torch.tensor([[[[*row, -math.inf]]]], dtype=dtype, requires_grad=True)
    P = definition["weights"](scores, **constants)
    mass, eps = P[..., :-1].sum().item(), torch.finfo(dtype).eps
    assert P[..., :-1].isfinite().all()
    assert (P[..., :-1] >= 0).all()
    if kind == "entmax15":
        assert mass == pytest.approx(1, abs=16 * len(row) * math.sqrt(eps) if dtype == torch.float32 else 1e-7)
    elif kind == "sigmoid":
        assert mass <= len(row)
    elif kind == "relu":
        assert mass <= max(0, *row, 0) * (1 + len(row) * eps)
    else:
        assert mass <= 1 + 4 * len(row) * eps
    (gradient,) = torch.autograd.grad(P[..., :-1].sum(), scores)
    assert gradient[..., :-1].isfinite().all()


@every_kind
def test_a_row_of_no_keys_has_no_weights(kind):
    definition, constants = KINDS[kind]
    assert definition["weights"](torch.zeros(1, 2, 0, 0), **constants).shape == (1, 2, 0, 0)


def test_clipped_without_clipping_is_softmax_and_more_of_it_keeps_less():
    scores = causal()
    softmax = softmax_weights(scores)
    torch.testing.assert_close(n.clipped_weights(scores, 0.0, 7), softmax)
    torch.testing.assert_close(n.clipped_weights(scores, 1e-9, 7), softmax, rtol=0, atol=1e-9)
    kept = [(n.clipped_weights(scores, alpha, 7) > 0).sum() for alpha in (0.0, 0.5, 2.0, 6.0)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1] > 0
    equal = torch.zeros(1, 1, 1, 5)  # of equal scores all stay where there are at most context / alpha, and none beyond
    assert (n.clipped_weights(equal, 4.0, 20) > 0).all()
    assert (n.clipped_weights(equal, 4.0, 15) == 0).all()
    assert (n.clipped_weights(torch.zeros(1, 1, 1, 1), 4.0, 0) == 1).all()


@given(row=st.lists(st.floats(-30, 30), min_size=1, max_size=9), alpha=st.floats(0, 1e-9), scale=st.floats(0.1, 3))
@settings(max_examples=60, deadline=None)
def test_limits_hold_for_any_row(row, alpha, scale):
    scores = torch.tensor(row, dtype=torch.float64).view(1, 1, 1, -1)
    softmax = scores.softmax(-1)
    close = {"rtol": 1e-12, "atol": 1e-12}
    # γ → 0, by no more than γ itself where a weight is clipped
    torch.testing.assert_close(n.clipped_weights(scores, alpha, 0), softmax, rtol=0, atol=2 * alpha + 1e-14)
    nothing, one = torch.tensor([-math.inf]), torch.tensor([0.0])
    torch.testing.assert_close(n.softmax_rows(scores, nothing)[0], softmax, **close)
    torch.testing.assert_close(n.softmax_rows(scores, one)[0], n.softmax1(scores), **close)
    torch.testing.assert_close(
        n.entmax15_weights(scores).flatten().numpy(), entmax(np.array(row), 1.5), rtol=0, atol=1e-7
    )
    torch.testing.assert_close(n.softpick_weights(scores + 70), softmax, **close)  # where 1 is nothing beside eˣ
    torch.testing.assert_close(n.sigmoid_weights(scores, -60.0), (scores - 60).exp(), rtol=1e-12, atol=0)
    # s·log n is 1 at s = 1 / log n: the last of n queries is what it was
    q = torch.full((1, 1, 2, 1), scale, dtype=torch.float64)
    keys = len(row) + 1
    torch.testing.assert_close(
        scaled_queries(q, keys, torch.tensor([1 / math.log(keys)]).double())[..., -1, :], q[..., -1, :]
    )


def test_entmax_lies_between_softmax_and_sparsemax():
    x = np.array([0.3, -1.0, 0.9, 0.2, -4.0])
    scores = torch.tensor(x).view(1, 1, 1, -1)
    np.testing.assert_allclose(entmax(x, 1 + 1e-4), special.softmax(x), atol=1e-4)  # what `entmax` finds, at α → 1
    np.testing.assert_allclose(n.entmax15_weights(scores).flatten(), entmax(x, 1.5), atol=1e-14)
    largest = [entmax(x, alpha).max() for alpha in (1.1, 1.5, 2.0)]
    assert largest == sorted(largest)


def test_softpick_neither_cancels_near_0_nor_overflows():
    tiny = torch.tensor([[[[1e-12, 3e-12, -2e-12]]]], dtype=torch.float32)
    expected = tiny.double().expm1()
    expected = expected.relu() / (expected.abs().sum() + 1e-6)
    torch.testing.assert_close(
        n.softpick_weights(tiny).double(), expected, rtol=8 * torch.finfo(torch.float32).eps, atol=0
    )
    far = torch.tensor([[[[500.0, 499.0, -500.0]]]], dtype=torch.float32)
    torch.testing.assert_close(n.softpick_weights(far), torch.softmax(far, -1))


def test_scaled_queries_count_the_keys_that_each_sees():
    q = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = torch.tensor([0.5, 1.0, -2.0])
    out = scaled_queries(q, 6, scale)  # four queries of which the last sees all six keys
    for i, keys in enumerate((3, 4, 5, 6)):
        expected = q[:, :, i] * scale.double().view(1, 3, 1) * math.log(keys)
        torch.testing.assert_close(out[:, :, i], expected)
    assert scaled_queries(q.bfloat16(), 6, scale).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"weights": n.relu_weights, "null_logit": 0.0}, "null_logit or queries go with softmax_weights"),
        ({"weights": n.relu_weights, "queries": scaled_queries}, "null_logit or queries go with softmax_weights"),
        ({"weights": softmax_weights, "parameters": {"bias": lambda c: torch.zeros(1)}}, "takes no parameters"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        Normalizer(**arguments)


@pytest.mark.parametrize("dim", [1, -1])
def test_running_sums_by_a_product_are_those_of_cumsum(dim):
    x = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(running_sums(x, dim, by_product=True), running_sums(x, dim), rtol=0, atol=1e-14)
