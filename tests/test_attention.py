"""Causal attention by its definition: its values, its gradients, and what it refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from kernels.backends import materialized_attention, native, use_backend
from model import attention, attention_rows
from tests.helpers import (
    FLOAT64,
    ROUNDING,
    VARIANTS,
    B,
    D,
    H,
    both_dtypes,
    both_forms,
    every_backward,
    every_shape,
    every_variant,
    explicit_weights,
    qkv,
)


@every_shape
@every_backward
@every_variant
@both_forms
@pytest.mark.parametrize("scale", [None, 0.3])
def test_forward_is_the_explicit_attention_whatever_the_backward(variant, backward, T_q, T_k, form, scale):
    arguments, null_logit = VARIANTS[variant]
    q, k, v = qkv(T_q, T_k)
    with form():
        out = attention(q, k, v, backward=backward, scale=scale, **arguments)
    torch.testing.assert_close(out, explicit_weights(q, k, null_logit, scale) @ v, **FLOAT64)


@every_backward
@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_costs_its_own_rounding(variant, backward, dtype):
    arguments, null_logit = VARIANTS[variant]
    q, k, v = qkv(6, 6, dtype=dtype)
    out = attention(q, k, v, backward=backward, **arguments)
    out.sum().backward()
    assert out.dtype == q.grad.dtype == dtype
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    exact_q, exact_k, exact_v = (x.detach().double() for x in (q, k, v))
    exact = explicit_weights(exact_q, exact_k, null_logit) @ exact_v
    largest_score = (exact_q @ exact_k.mT).abs().max() / 2  # over √D
    # A score is rounded at most D + 1 times, which shifts its weight by that much; then weight, product and sum.
    tolerance = torch.finfo(dtype).eps * ((D + 1) * largest_score + 3) * exact_v.abs().max()
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance.item())


@every_shape
@every_backward
def test_softmax1_is_softmax_with_one_more_key_and_value_of_zeros(backward, T_q, T_k):
    q, k, v = qkv(T_q, T_k)
    zero = torch.zeros(B, H, 1, D, dtype=q.dtype)
    padded = attention(q, torch.cat((zero, k), 2), torch.cat((zero, v), 2), backward=backward)
    out = attention(q, k, v, normalizer="softmax1", backward=backward)
    torch.testing.assert_close(out, padded, **FLOAT64)
    grad_out = torch.randn_like(out)
    gradients = (torch.autograd.grad(y, (q, k, v), grad_out) for y in (out, padded))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)


@both_dtypes
@pytest.mark.parametrize("n", [0.5, 1, 4])
def test_a_null_logit_of_log_n_is_softmax_n(n, dtype):
    q, k, v = qkv(65, 65, dtype=dtype)
    out = attention(q, k, v, null_logit=torch.full((H,), math.log(n), dtype=dtype))
    exp_scores = (q.double() @ k.double().mT / math.sqrt(D)).exp().tril()
    expected = exp_scores / (n + exp_scores.sum(-1, keepdim=True)) @ v.double()
    torch.testing.assert_close(out.double(), expected, **ROUNDING[dtype])


@every_variant
@settings(max_examples=40)
@given(size=st.floats(0, 1e3), seed=st.integers(0, 99))
def test_row_mass_lies_in_0_1_and_is_what_the_null_slot_leaves(variant, size, seed):
    arguments, null_logit = VARIANTS[variant]
    q, k, _ = qkv(3, 5, seed)
    q = q * size
    mass = attention(q, k, torch.ones_like(k), **arguments)[..., 0]
    # A score s is off by a few s ε, and exp turns that into a share of its weight; then a sum of at most five weights.
    largest_score = (q @ k.mT).abs().max() / 2  # over √D
    tolerance = torch.finfo(mass.dtype).eps * (5 + (D + 1) * largest_score)
    assert (mass >= 0).all()
    assert (mass <= 1 + tolerance).all()
    expected = explicit_weights(q, k, null_logit).sum(-1)
    torch.testing.assert_close(mass, expected, rtol=0, atol=2 * tolerance.item())  # both are rounded


@every_backward
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["materialized", "cpu_native", "cpu_flash"])
def test_the_limits_of_the_null_logit_are_softmax_and_nothing(backend, dtype, backward):
    """−∞: P is softmax's. +∞: P = 0, so that the output, dV = Pᵀg and dS = P∘(…) are 0, but for ste's dS = g Vᵀ, which
    no P enters. The null logit's gradient −Σ P_null (g·out) is 0 in both: at −∞ P_null is, at +∞ out."""
    if backend == "cpu_native" and (dtype == torch.float64 or not native()):
        pytest.skip("no such kernel")
    inputs = qkv(300, 300, dtype=dtype)  # beyond a tile, and where ste turns to running sums
    g = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def results(**null_logit):
        with use_backend(backend):
            out = attention(*inputs, backward=backward, **null_logit)
            return out, *torch.autograd.grad(out, (*inputs, *null_logit.values()), g)

    infinite = torch.tensor([-math.inf, math.inf], dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    *found, null_gradient = results(null_logit=infinite)
    softmax = results()
    nothing = [softmax[i] if backward == "ste" and i in (1, 2) else torch.zeros_like(g) for i in range(4)]
    for x, least, greatest in zip(found, softmax, nothing, strict=True):
        assert torch.equal(x[:, 0], least[:, 0])
        assert torch.equal(x[:, 1], greatest[:, 1])
    assert torch.equal(null_gradient, torch.zeros_like(null_gradient))
    _, share = attention_rows(*inputs[:2], normalizer="sink", null_logit=infinite)
    assert torch.equal(share, torch.tensor([0, 1]).view(1, H, 1, 1).expand_as(share))


@every_backward
@every_variant
def test_attention_sees_no_later_key(variant, backward):
    T_q, T_k = 3, 5
    arguments, _ = VARIANTS[variant]
    q, k, v = qkv(T_q, T_k)
    for i in range(T_q):
        out = attention(q, k, v, backward=backward, **arguments)
        grad_q, grad_k, grad_v = torch.autograd.grad(out[:, :, i].sum(), (q, k, v))
        visible = i + T_k - T_q + 1
        assert (grad_v[:, :, :visible] != 0).all()
        assert (grad_k[:, :, :visible] != 0).all()
        assert (grad_v[:, :, visible:] == 0).all()
        assert (grad_k[:, :, visible:] == 0).all()
        others = [j for j in range(T_q) if j != i]
        assert (grad_q[:, :, others] == 0).all()


@every_shape
@every_backward
@every_variant
@both_forms
def test_gradients_follow_the_formulas(variant, backward, T_q, T_k, form):
    arguments, null_logit = VARIANTS[variant]
    q, k, v = qkv(T_q, T_k)
    with form():
        out = attention(q, k, v, backward=backward, **arguments)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    actual = torch.autograd.grad(out, (q, k, v), grad_out)

    with torch.no_grad():
        P = explicit_weights(q, k, null_logit)
        g = grad_out @ v.mT
        if backward == "full":
            dS = P * (g - (P * g).sum(-1, keepdim=True))
        elif backward == "diagonal":
            dS = P * (1 - P) * g
        elif backward == "detached":
            dS = P * g
        else:
            dS = g.clone()
        for i in range(T_q):
            dS[:, :, i, i + T_k - T_q + 1 :] = 0  # j ≤ i + T_k − T_q
        scale = 1 / math.sqrt(D)
        expected = (scale * dS @ k, scale * dS.mT @ q, P.mT @ grad_out)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)


@every_shape
@every_variant
def test_full_backward_is_the_derivative(variant, T_q, T_k):
    arguments, _ = VARIANTS[variant]
    arguments = dict(arguments)
    null_logit = arguments.pop("null_logit", None)
    inputs = [*qkv(T_q, T_k), *([null_logit.clone().requires_grad_()] if null_logit is not None else [])]

    def f(q, k, v, b=None):
        return attention(q, k, v, null_logit=b, **arguments)

    torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize(("T_q", "T_k"), [(6, 6), (3, 7), (1, 5), (70, 70)])  # the last on a fused kernel
@every_backward
@both_forms
@pytest.mark.parametrize("normalizer", ["kbias", "kvbias"])
def test_kvbias_is_one_more_key_and_value_that_every_query_sees(normalizer, backward, T_q, T_k, form):
    """Of grouped keys: two query heads read each of the two heads. Output, weights and gradients by the formulas."""
    q, k, v, null_key, null_value = (
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).requires_grad_()
        for i, shape in enumerate([(B, 2 * H, T_q, D), (B, H, T_k, D), (B, H, T_k, D), (H, D), (H, D)])
    )
    learned = {"normalizer": normalizer, "null_key": null_key, "null_value": null_value}
    if normalizer == "kbias":  # the same with the value zero
        learned.pop("null_value").detach().zero_()
    with form():
        out = attention(q, k, v, backward=backward, **learned)
    whole_k, whole_v = (
        torch.cat((first.view(1, H, 1, D).expand(B, H, 1, D), x), 2).repeat_interleave(2, 1)
        for first, x in ((null_key, k), (null_value, v))
    )
    P = explicit_weights(q, whole_k)
    torch.testing.assert_close(out, P @ whole_v, **FLOAT64)
    weights, null = attention_rows(q, k, **learned)
    torch.testing.assert_close(torch.cat((null, weights), -1), P, **FLOAT64)

    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    actual = torch.autograd.grad(out, (q, k, v, *list(learned.values())[1:]), grad_out)
    with torch.no_grad():
        g = grad_out @ whole_v.mT
        visible = torch.ones(T_q, T_k + 1, dtype=torch.bool).tril(T_k + 1 - T_q)
        full = P * (g - (P * g).sum(-1, keepdim=True))
        dS = {"full": full, "diagonal": P * (1 - P) * g, "ste": g * visible, "detached": P * g}[backward] / math.sqrt(D)
        dK, dV = ((x.mT @ y).unflatten(1, (H, 2)).sum(2) for x, y in ((dS, q), (P, grad_out)))
        expected = (dS @ whole_k, dK[:, :, 1:], dV[:, :, 1:], dK[:, :, 0].sum(0), dV[:, :, 0].sum(0))
    for a, b in zip(actual, expected[: len(actual)], strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)


def test_a_null_key_and_its_value_have_to_fit():
    q, k, v = qkv(3, 3)
    key, value = torch.zeros(2, H, D, dtype=torch.float64)
    for arguments, problem in (
        ({"null_key": key}, "takes the parameters null_key, null_value"),
        ({"null_key": key[:1], "null_value": value}, rf"null_key \(1, {D}\): need .* \({H}, {D}\)"),
        ({"null_key": key, "null_value": value, "null_logit": key[:, 0]}, "a null_logit does not go with it"),
    ):
        with pytest.raises(ValueError, match=problem):
            attention(q, k, v, normalizer="kvbias", **arguments)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize(("T_q", "T_k"), [(4, 4), (2, 4), (65, 66)])  # the last on fused kernels, too
@every_backward
@every_variant
@both_forms
def test_second_derivatives_are_those_of_the_first_gradients(variant, backward, T_q, T_k, dropout_p, form):
    """Against finite differences of dL/dq, dL/dk, dL/dv and dL/db as functions of q, k, v, b and dL/dO."""
    arguments, _ = VARIANTS[variant]
    inputs = [x.mT.contiguous().mT.detach().requires_grad_() for x in qkv(T_q, T_k)]  # kernels would copy these
    if variant == "sink":
        inputs.append(arguments["null_logit"].clone().requires_grad_())

    def f(q, k, v, *b):
        torch.manual_seed(0)  # the same weights are dropped each time
        given = arguments | ({"null_logit": b[0]} if b else {})
        return attention(q, k, v, backward=backward, dropout_p=dropout_p, **given)

    with form():
        torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@every_backward
@both_forms
def test_a_graph_of_the_gradients_changes_none_of_them(backward, form):
    """Not even where q is made of the null logit, too: its gradient as a null logit is then only one part."""
    q, k, v = qkv(4, 4)
    b = VARIANTS["sink"][1].clone().requires_grad_()
    with form():
        out = attention(q * b.view(1, H, 1, 1), k, v, normalizer="sink", null_logit=b, backward=backward).square().sum()
        without = torch.autograd.grad(out, (q, k, v, b), retain_graph=True)
        gradients = torch.autograd.grad(out, (q, k, v, b), create_graph=True)
    for a, b in zip(gradients, without, strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)


@every_backward
@both_forms
def test_forward_mode_is_the_derivative_or_refused(backward, form):
    """The forward pass does not depend on `backward`, so neither may its derivative in forward mode."""
    inputs = tuple(x.detach() for x in qkv(4, 4))
    tangents = tuple(torch.randn_like(x) for x in inputs)

    def f(*inputs):
        return attention(*inputs, normalizer="softmax1", backward=backward)

    with form(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        if form is materialized_attention and backward == "full":
            h = 1e-6
            up, down = (f(*(x + s * h * t for x, t in zip(inputs, tangents, strict=True))) for s in (1, -1))
            tangent = forward_ad.unpack_dual(f(*duals)).tangent
            torch.testing.assert_close(tangent, (up - down) / (2 * h), rtol=1e-8, atol=1e-8)  # h², ε/h
        else:
            with pytest.raises(NotImplementedError, match="jvp"):
                f(*duals)


@every_shape
@every_backward
@both_forms
def test_null_logit_gradient_is_exact_in_every_backward(backward, T_q, T_k, form):
    q, k, v = qkv(T_q, T_k)
    b, b_explicit = (VARIANTS["sink"][1].clone().requires_grad_() for _ in range(2))
    grad_out = torch.randn(B, H, T_q, D, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    with form():
        attention(q, k, v, normalizer="sink", null_logit=b, backward=backward).backward(grad_out)
    (explicit_weights(q, k, b_explicit) @ v).backward(grad_out)
    torch.testing.assert_close(b.grad, b_explicit.grad, **FLOAT64)


@every_backward
@every_variant
@both_forms
def test_saturated_rows_keep_finite_gradients(variant, backward, form):
    arguments, _ = VARIANTS[variant]
    q, k, v = qkv(6, 6, dtype=torch.float32)
    q, k = (q * 1e3).detach().requires_grad_(), (k * 1e3).detach().requires_grad_()  # scores of some ±1e6
    with form():
        attention(q, k, v, backward=backward, **arguments).sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@every_backward
@every_variant
def test_dropout_takes_a_weight_whole_and_scales_the_rest(variant, backward):
    arguments, _ = VARIANTS[variant]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(64, H, 1, D, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    kept = attention(q, k, v, backward=backward, **arguments)
    torch.manual_seed(0)
    out = attention(q, k, v, backward=backward, dropout_p=0.25, **arguments)
    dropped = (out == 0).all(-1)  # with one key a row is one weight
    assert 0 < dropped.float().mean() < 0.6  # 128 draws of 1/4: 9 standard deviations
    torch.testing.assert_close(out[~dropped], kept[~dropped] / 0.75)
    masked = (v,) if backward == "ste" else (q, k, v)  # ste passes straight through the mask, too
    for gradient in torch.autograd.grad(out.sum(), masked):
        assert (gradient[dropped] == 0).all()  # the backward sees the forward's mask


@every_backward
def test_the_null_logits_gradient_is_that_of_what_dropout_leaves(backward):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(64, H, 1, D, generator=generator, dtype=torch.float64) for _ in range(3))
    b = torch.tensor([-1.0, 0.5]).double().requires_grad_()
    torch.manual_seed(0)
    out = attention(q, k, v, normalizer="sink", null_logit=b, backward=backward, dropout_p=0.25)
    (grad,) = torch.autograd.grad(out.sum(), b)
    scores = (q * k).sum(-1) / 2  # over √D; (64, H, 1)
    null = torch.sigmoid(b.detach().view(1, H, 1) - scores)
    torch.testing.assert_close(grad, -(null * out.detach().sum(-1)).sum((0, 2)), **FLOAT64)


SOME = torch.zeros(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("q", "k", "v", "arguments", "named"),
    [
        (SOME, SOME, SOME, {"normalizer": "softmax2"}, ("normalizer", "softmax2", "softmax", "softmax1")),
        (SOME, SOME, SOME, {"backward": "lateral"}, ("backward", "lateral", "full", "diagonal", "ste")),
        (SOME, SOME.double(), SOME, {}, ("torch.float32", "torch.float64", "dtype")),
        (SOME.long(), SOME.long(), SOME.long(), {}, ("q", "torch.int64", "torch.float32", "torch.float64")),
        (SOME, SOME.to(torch.float8_e5m2), SOME, {}, ("k", "torch.float8_e5m2", "torch.bfloat16")),
        (SOME, SOME.numpy(), SOME, {}, ("k", "ndarray", "a tensor of torch.float32")),
        (SOME, SOME, SOME.to("meta"), {}, ("v is on meta", "q on cpu", "one device")),
        (SOME, SOME, SOME, {"null_logit": "0"}, ("null_logit", "a str", "a tensor of torch.float32")),
        (SOME, SOME, SOME, {"null_logit": torch.zeros(2).long()}, ("null_logit", "torch.int64", "torch.float32")),
        (SOME[0], SOME[0], SOME[0], {}, ("(2, 3, 4)", "(B, H, T_q, D)")),
        (SOME, SOME, SOME[:, :, :2], {}, ("(1, 2, 3, 4)", "(1, 2, 2, 4)", "(B, H_kv, T_k, D)")),
        (SOME, SOME[:, [0, 0, 1]], SOME[:, [0, 0, 1]], {}, ("(1, 3, 3, 4)", "query heads")),
        (SOME, SOME[..., :2], SOME[..., :2], {}, ("(1, 2, 3, 2)", "(B, H_kv, T_k, D)")),
        (SOME, SOME[:, :, :2], SOME[:, :, :2], {}, ("(1, 2, 3, 4)", "(1, 2, 2, 4)", "more queries than keys")),
        (SOME, SOME, SOME, {"null_logit": torch.zeros(3)}, ("null_logit", "(3,)", "(2,)")),
        (SOME, SOME, SOME, {"normalizer": "sink"}, ("sink", "null_logit")),
        (SOME, SOME, SOME, {"scale": 0.0}, ("scale", "0.0", "positive")),
        (SOME, SOME, SOME, {"scale": math.inf}, ("scale", "inf", "finite")),
        (SOME, None, SOME, {}, ("k is a NoneType", "a tensor of torch.float32")),
        (SOME[..., :0], SOME[..., :0], SOME[..., :0], {}, ("(1, 2, 3, 0)", "D ≥ 1")),
        (SOME, SOME, SOME, {"dropout_p": 1.0}, ("dropout_p", "1.0", "[0, 1)")),
        (SOME, SOME, SOME, {"null_logit": torch.zeros(2), "normalizer": "softmax1"}, ("null_logit", "softmax1")),
    ],
)
def test_bad_input_is_named_with_what_is_allowed(q, k, v, arguments, named):
    with pytest.raises(ValueError) as error:
        attention(q, k, v, **arguments)
    for fragment in named:
        assert fragment in str(error.value)
