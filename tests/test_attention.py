"""softmax1, and causal attention with a choice of normaliser and of backward pass."""

import argparse
import contextlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from harness.bench_attention import STOCK, peak_of
from kernels import fused
from kernels.fused import FusedAttention, straight_through_gradients
from model import (
    attention,
    attention_backend,
    materialized_attention,
    softmax1,
    use_backend,
)

B, H, D = 2, 2, 4
BACKWARDS = ("full", "diagonal", "ste")
VARIANTS = {  # arguments of attention, and the null slot's logit of each head
    "softmax": ({"normalizer": "softmax"}, None),
    "softmax1": ({"normalizer": "softmax1"}, torch.zeros(H, dtype=torch.float64)),
    "sink": (
        {"normalizer": "sink", "null_logit": torch.tensor([-1.0, 0.5]).double()},
        torch.tensor([-1.0, 0.5]).double(),
    ),
}
# Some 50 roundings (products over D, sums over T, one exp) of numbers below 20, each of half an ε: about 1e-13.
FLOAT64 = {"rtol": 0, "atol": 1e-13}
FLOAT32 = {"rtol": 0, "atol": 1e-13 * torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps}  # 5e-5
ROUNDING = {torch.float64: FLOAT64, torch.float32: FLOAT32}

both_dtypes = pytest.mark.parametrize("dtype", ROUNDING)  # on a CPU two kernels, PyTorch's and our own
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_backward = pytest.mark.parametrize("backward", BACKWARDS)
# What runs on fused kernels (equal T_q and T_k, no dropout) has to hold in the readable form as well.
both_forms = pytest.mark.parametrize("form", [contextlib.nullcontext, materialized_attention])
every_shape = pytest.mark.parametrize(("T_q", "T_k"), [(6, 6), (3, 7), (1, 5), (1, 1)])


def qkv(T_q: int, T_k: int, seed: int = 0, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, T_q, D), (B, H, T_k, D), (B, H, T_k, D))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def explicit_weights(q, k, null_logit=None, scale=None):
    """P (B, H, T_q, T_k): the softmax over an explicit null slot and the visible keys, row by row; the slot dropped."""
    T_q, T_k = q.size(-2), k.size(-2)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (1 / math.sqrt(q.size(-1)) if scale is None else scale)
    rows = []
    for i in range(T_q):
        seen = i + T_k - T_q + 1
        row = scores[:, :, i, :seen]
        if null_logit is not None:
            row = torch.cat((null_logit.view(1, H, 1).expand(q.size(0), H, 1), row), dim=-1)
        weights = torch.softmax(row, dim=-1)[..., -seen:]
        rows.append(torch.nn.functional.pad(weights, (0, T_k - seen)))
    return torch.stack(rows, dim=2)


# --- softmax1 -------------------------------------------------------------------------------------------------------

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


# --- attention: forward ---------------------------------------------------------------------------------------------


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


@both_dtypes
def test_a_null_logit_of_minus_infinity_is_plain_softmax(dtype):
    q, k, v = qkv(65, 65, dtype=dtype)
    out = attention(q, k, v, null_logit=torch.full((H,), -math.inf, dtype=q.dtype))
    torch.testing.assert_close(out, attention(q, k, v), **ROUNDING[dtype])


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


# --- attention: backward --------------------------------------------------------------------------------------------


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


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"'flash'.*cpu_flash"), use_backend("flash"):
        pass


def test_a_backend_refuses_what_it_cannot_do():
    q, k, v = qkv(3, 3)
    for backend, arguments, named in (
        ("stock", {"normalizer": "softmax1"}, "'stock' has neither a null_logit"),
        ("stock", {"backward": "ste"}, "'stock' has .*'ste'"),
        ("cpu_flash", {"dropout_p": 0.1, "backward": "ste"}, "'cpu_flash' has no dropout.*0.1"),
    ):
        with use_backend(backend), pytest.raises(ValueError, match=named):
            attention(q, k, v, **arguments)


# --- attention: fused kernels ---------------------------------------------------------------------------------------


def value_and_gradients(q, k, v, grad_out, **arguments):
    out = attention(q, k, v, **arguments)
    return out, *torch.autograd.grad(out, (q, k, v), grad_out)


@both_dtypes
@every_backward
@every_variant
@pytest.mark.parametrize("T", [64, 65, 200])  # at and beyond the blocks and chunks of 32 and 64 that kernels work in
def test_long_rows_are_those_of_the_readable_form(variant, backward, T, dtype):
    arguments, _ = VARIANTS[variant]
    q, k, v = qkv(T, T, dtype=dtype)
    grad_out = torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    fused = value_and_gradients(q, k, v, grad_out, backward=backward, **arguments)
    with materialized_attention():
        readable = value_and_gradients(q, k, v, grad_out, backward=backward, **arguments)
    for a, b in zip(fused, readable, strict=True):
        # Sums of up to T terms in another order, each term of the size of the largest result
        torch.testing.assert_close(a, b, rtol=0, atol=T * torch.finfo(a.dtype).eps * b.abs().max().item())


@both_dtypes
@every_variant
def test_views_of_one_projection_go_in_without_a_copy(variant, dtype):
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
            if any(torch.is_tensor(x) and x.dim() == 4 for x in arguments):  # the null logit may be converted
                called.append(str(operator))
                inputs.update(x.data_ptr() for x in arguments[:3] if torch.is_tensor(x))
            return operator(*arguments, **(keywords or {}))

    called, inputs = [], set()
    packed = torch.randn(B, 9, 3 * H * D, dtype=dtype)
    views = [x.view(B, 9, H, D).transpose(1, 2) for x in packed.split(H * D, dim=-1)]
    with Record():
        attention(*views, **VARIANTS[variant][0])
    assert not [name for name in called if "copy" in name or "clone" in name or "pad" in name]
    assert {x.data_ptr() for x in views} <= inputs


@both_dtypes
@every_backward
@every_variant
@pytest.mark.parametrize("layout", ["slices of one projection", "last dimension not contiguous", "expanded"])
def test_the_layout_in_memory_does_not_matter(variant, backward, layout, dtype):
    arguments, _ = VARIANTS[variant]
    T = 9
    if layout == "slices of one projection":
        packed = torch.randn(B, T, 3 * H * D, generator=torch.Generator().manual_seed(0), dtype=dtype)
        inputs = [x.view(B, T, H, D).transpose(1, 2) for x in packed.split(H * D, dim=-1)]
    elif layout == "last dimension not contiguous":
        inputs = [x.detach().mT.contiguous().mT for x in qkv(T, T, dtype=dtype)]
    else:
        inputs = [x.detach()[:, :1].expand(B, H, T, D) for x in qkv(T, T, dtype=dtype)]
    grad_out = torch.randn(B, H, D, T, generator=torch.Generator().manual_seed(1), dtype=dtype).mT
    results = [
        value_and_gradients(*(x.requires_grad_() for x in xs), g, backward=backward, **arguments)
        for xs, g in ((inputs, grad_out), ([x.detach().contiguous() for x in inputs], grad_out.contiguous()))
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **ROUNDING[dtype])


@both_dtypes
@every_backward
@every_variant
def test_nothing_of_the_size_of_the_weights_is_kept_for_the_backward(variant, backward, dtype):
    arguments, _ = VARIANTS[variant]
    q, k, v = qkv(300, 300, dtype=dtype)
    sizes = []

    def pack(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention(q, k, v, backward=backward, **arguments)
    assert sizes
    assert max(sizes) <= q.numel()  # (B, H, T, D); the weights would be (B, H, T, T)


@both_dtypes
@every_backward
@every_variant
def test_compiling_takes_the_attention_whole(variant, backward, dtype):
    arguments, _ = VARIANTS[variant]
    torch.compiler.reset()  # the variants before this one count towards a limit of recompilations
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    q, k, v = qkv(6, 6, dtype=dtype)
    expected, out = (f(q, k, v, backward=backward, **arguments) for f in (attention, compiled))
    torch.testing.assert_close(out, expected, **ROUNDING[dtype])
    grad_out = torch.randn_like(out)
    gradients = (torch.autograd.grad(y, (q, k, v), grad_out) for y in (out, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **ROUNDING[dtype])


def test_the_readable_form_is_left_with_its_context_even_by_an_error():
    q, k, v = qkv(300, 300)

    def largest_saved() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            attention(q, k, v, normalizer="softmax1")
        return max(sizes)

    with materialized_attention():
        assert largest_saved() == B * H * 300 * 300
    with contextlib.suppress(KeyError), materialized_attention():
        raise KeyError
    assert largest_saved() == B * H * 300 * D


# --- attention: against float64, and in how many digits ---------------------------------------------------------------

# Relative to the magnitude before any cancellation: at ordinary logits a few roundings of each of the products and of
# the weights, which a half type stores with its own few digits.
DIGITS = {torch.float64: 2e-15, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Whether by the CPU's own kernel, through all shapes: models train in these. The others by PyTorch's kernels, and these
# too, as where there is no compiler, through some (a half type is emulated on most CPUs: seconds).
KERNELS = [(torch.float32, True), (torch.bfloat16, True), *((dtype, False) for dtype in DIGITS)]
LOGITS = {"ordinary": (3, 0), "extreme": (1e4, 0), "low": (3, -50), "far below zero": (3, -1e4)}  # spread, offset


def use_own_kernel(own: bool, monkeypatch) -> None:
    """The CPU's own kernel, or PyTorch's as where there is none."""
    monkeypatch.setenv("OFFBYONE_NATIVE", "1" if own else "0")
    q = torch.empty(1, 1, 9, 16)
    if own and attention_backend(q, q) != "cpu_native":
        pytest.skip("no C++ compiler: PyTorch's kernels have their own cases")


def logits_of(kind: str, T: int, D: int, dtype) -> list[torch.Tensor]:
    """q, k, v, dL/dO (1, H, T, D) whose scores have the spread and offset of `kind`."""
    generator = torch.Generator().manual_seed(T + D)
    q, k, v, g = (torch.randn(1, H, T, D, generator=generator, dtype=torch.float64) for _ in range(4))
    spread, offset = LOGITS[kind]
    q = q * spread / ((q @ k.mT).abs().max() / math.sqrt(D)).clamp(min=1)
    q[..., 0], k[..., 0] = math.copysign(abs(offset) ** 0.5, offset), abs(offset) ** 0.5 * math.sqrt(D)
    return [x.to(dtype) for x in (q, k, v, g)]


def reference(q, k, v, g, null_logit, backward):
    """(value, magnitude before cancellation) of out, dQ, dK, dV and db, in float64 from the formulas."""
    q, k, v, g = (x.double() for x in (q, k, v, g))
    scale = 1 / math.sqrt(q.size(-1))
    scores = (scale * q @ k.mT).masked_fill(torch.ones(q.size(-2), k.size(-2)).triu(1).bool(), -math.inf)
    b = torch.full((H,), -math.inf).double() if null_logit is None else null_logit
    lse = torch.logaddexp(scores.logsumexp(-1, keepdim=True), b.view(-1, 1, 1))
    P, dP = (scores - lse).exp(), g @ v.mT
    out, null = P @ v, (b.view(-1, 1, 1) - lse).exp()
    mean = (P * dP).sum(-1, keepdim=True)
    if backward == "full":
        dS, size = P * (dP - mean), P * (dP.abs() + mean.abs())
    elif backward == "diagonal":
        dS, size = P * -(scores - lse).expm1() * dP, P * dP.abs()
    else:
        dS = dP.tril()
        size = dS.abs()
    db = -(null * mean).sum((0, 2, 3))
    return {
        "out": (out, P @ v.abs()),
        "dQ": (scale * dS @ k, scale * size @ k.abs()),
        "dK": (scale * dS.mT @ q, scale * size.mT @ q.abs()),
        "dV": (P.mT @ g, P.mT @ g.abs()),
        "db": (db, (null * g.abs() * (P @ v.abs())).sum((0, 2, 3))),
    }


def tolerance_of(kind, q, k, dtype) -> float:
    """The digits and, beyond ordinary logits, that a weight is the exponential of a sum of D rounded products."""
    if kind == "ordinary" and dtype != torch.float64:
        return DIGITS[dtype]
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    largest = (q.double().abs() @ k.double().abs().mT).max().item() / math.sqrt(q.size(-1))
    return DIGITS[dtype] + math.expm1(4 * eps * largest)


@every_backward
@every_variant
@pytest.mark.parametrize(("dtype", "own"), KERNELS, ids=str)
@pytest.mark.parametrize("kind", LOGITS)
def test_values_and_gradients_have_the_digits_of_their_dtype(variant, backward, dtype, own, kind, monkeypatch):
    arguments, null_logit = VARIANTS[variant]
    use_own_kernel(own, monkeypatch)
    shapes = list(itertools.product((1, 2, 63, 64, 65, 257, 1000), (16, 64, 80, 128)))
    if not own:
        shapes = [*shapes[:20:3], (257, 80)] + [(1000, 64)] * (dtype in (torch.float64, torch.float32))
    for T, D in shapes:
        q, k, v, g = logits_of(kind, T, D, dtype)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        learned = {"null_logit": null_logit.clone().requires_grad_()} if variant == "sink" else {}
        out = attention(*inputs, backward=backward, **arguments | learned)
        gradients = torch.autograd.grad(out, [*inputs, *learned.values()], g)
        expected = reference(*(x.detach() for x in inputs), g, null_logit, backward)
        tolerance = tolerance_of(kind, q.detach(), k.detach(), dtype)
        for name, value in zip(expected, (out, *gradients), strict=False):
            exact, magnitude = expected[name]
            if magnitude.max() > torch.finfo(dtype).max / 2:  # float16 ends at 65,504, and diagonal halves a sum
                continue
            error, size = (value.double() - exact).norm().item(), magnitude.norm().item()
            smallest = torch.finfo(dtype).smallest_normal * value.numel()  # below it a number has absolute precision
            assert error <= tolerance * size + smallest, f"T {T}, D {D}: {name} {error / max(size, 1e-300):.1e}"


# --- attention: properties --------------------------------------------------------------------------------------------

lengths, seeds = st.integers(1, 40), st.integers(0, 2**16)


@both_dtypes
@every_backward
@every_variant
@settings(max_examples=15)
@given(T=lengths, seed=seeds, data=st.data())
def test_the_future_changes_nothing_in_the_past(variant, backward, dtype, T, seed, data):
    arguments, _ = VARIANTS[variant]
    now = data.draw(st.integers(0, T - 1))
    q, k, v = qkv(T, T, seed, dtype)
    grad_out = torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(seed), dtype=q.dtype)
    grad_out[:, :, now + 1 :] = 0
    other = [x.detach().clone() for x in (q, k, v)]
    for x in other:
        x[:, :, now + 1 :] = torch.randn_like(x[:, :, now + 1 :])
    before = value_and_gradients(q, k, v, grad_out, backward=backward, **arguments)
    after = value_and_gradients(*(x.requires_grad_() for x in other), grad_out, backward=backward, **arguments)
    torch.testing.assert_close(after[0][:, :, : now + 1], before[0][:, :, : now + 1], **ROUNDING[dtype])
    for a, b in zip(after[1:], before[1:], strict=True):
        torch.testing.assert_close(a[:, :, : now + 1], b[:, :, : now + 1], **ROUNDING[dtype])
        assert (a[:, :, now + 1 :] == 0).all()


@both_dtypes
@every_variant
@settings(max_examples=15)
@given(T=lengths, seed=seeds)
def test_full_is_diagonal_plus_lateral(variant, dtype, T, seed):
    arguments, null_logit = VARIANTS[variant]
    q, k, v = qkv(T, T, seed, dtype)
    grad_out = torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(seed), dtype=q.dtype)
    full, diagonal = (value_and_gradients(q, k, v, grad_out, backward=b, **arguments) for b in ("full", "diagonal"))
    with torch.no_grad():  # o_ij = −P_ij Σ_{k≠j} P_ik g_ik
        P, g = explicit_weights(q, k, null_logit).to(dtype), grad_out @ v.mT
        lateral = -P * ((P * g).sum(-1, keepdim=True) - P * g)
        scale = 1 / math.sqrt(D)
        expected = (0, scale * lateral @ k, scale * lateral.mT @ q, 0)
    for f, d, o in zip(full, diagonal, expected, strict=True):
        torch.testing.assert_close(f, d + o, **ROUNDING[dtype])


@settings(max_examples=15)
@given(T=lengths, seed=seeds)
def test_softmax1_becomes_softmax_as_logits_grow(T, seed):
    q, k, v = qkv(T, T, seed)
    q, k = (
        torch.cat((x, torch.full((B, H, T, 1), math.sqrt(40 * math.sqrt(D)))), -1) for x in (q, k)
    )  # scores + 40·√(4/5)
    v = torch.nn.functional.pad(v, (0, 1))

    # The null slot's share is at most e^−(largest score), and the least of these is above 30 − 10
    def difference(q):
        return (attention(q, k, v, normalizer="softmax1") - attention(q, k, v)).abs().max() / v.abs().max()

    assert difference(q) <= math.exp(-20)
    assert difference(q / 100) > 1e-3


# --- attention: where it is used --------------------------------------------------------------------------------------


@both_dtypes
@every_backward
@every_variant
@pytest.mark.parametrize(("T_q", "T_k"), [(1, 90), (64, 90), (65, 90), (89, 90)])
def test_the_last_queries_alone_give_the_last_rows(variant, backward, T_q, T_k, dtype):
    arguments, _ = VARIANTS[variant]
    q, k, v = qkv(T_k, T_k, dtype=dtype)
    grad_out = torch.randn(B, H, T_k, D, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    grad_out[:, :, : T_k - T_q] = 0
    whole = value_and_gradients(q, k, v, grad_out, backward=backward, **arguments)
    last = q.detach()[:, :, -T_q:].requires_grad_()
    rows = value_and_gradients(last, k, v, grad_out[:, :, -T_q:], backward=backward, **arguments)
    long = {"rtol": 0, "atol": T_k * ROUNDING[dtype]["atol"]}
    torch.testing.assert_close(rows[0], whole[0][:, :, -T_q:], **long)
    torch.testing.assert_close(rows[1], whole[1][:, :, -T_q:], **long)
    for a, b in zip(rows[2:], whole[2:], strict=True):
        torch.testing.assert_close(a, b, **long)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("T", [200, 2100])  # beyond the first chunk, and beyond two segments
def test_linear_attention_is_the_triangle_of_its_products(T, dtype, digits):
    q, k, v, g = (x.to(dtype) for x in logits_of("ordinary", T, 16, torch.float64))
    q_, k_, v_, g_ = (x.double() for x in (q, k, v, g))
    grad_q, grad_k = straight_through_gradients(q, k, v, g, 0.25)
    assert grad_q.dtype == dtype
    for value, exact in ((grad_q, 0.25 * (g_ @ v_.mT).tril() @ k_), (grad_k, 0.25 * (g_ @ v_.mT).tril().mT @ q_)):
        assert (value.double() - exact).norm() <= digits * exact.norm()  # one rounding: the sums are float32's


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_value_gradient_is_the_same_head_by_head(dtype, monkeypatch):
    q, k, v, g = logits_of("ordinary", 70, 16, dtype)
    assert q.size(1) > 1
    results = []
    for at_once in (0, q.numel()):
        monkeypatch.setattr("kernels.fused.AT_ONCE", at_once)
        with use_backend("cpu_flash"):
            results.append(value_and_gradients(*(x.requires_grad_() for x in (q, k, v)), g, backward="ste"))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("normalizer", ["sink"])  # which adds the null logit's own gradient
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("own", [True, False])  # False: on PyTorch's kernels, as where there is no compiler
def test_memory_stays_within_one_and_a_half_times_the_stock_kernels(
    normalizer, backward, own, stock_peak, bench_arguments, monkeypatch
):
    use_own_kernel(own, monkeypatch)  # in the process that is measured
    assert peak_of(f"{normalizer}/{backward}", 8192, bench_arguments) <= 1.5 * stock_peak


@pytest.fixture(scope="module")
def bench_arguments():
    return argparse.Namespace(B=1, H=4, D=64, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def stock_peak(bench_arguments) -> float:
    return peak_of(STOCK, 8192, bench_arguments)


@both_dtypes
@every_backward
@every_variant
def test_activation_checkpointing_changes_nothing(variant, backward, dtype):
    arguments, _ = VARIANTS[variant]
    q, k, v = qkv(9, 9, dtype=dtype)
    grad_out = torch.randn(B, H, 9, D, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    expected = value_and_gradients(q, k, v, grad_out, backward=backward, **arguments)
    out = checkpoint(attention, q, k, v, backward=backward, use_reentrant=False, **arguments)
    for a, b in zip((out, *torch.autograd.grad(out, (q, k, v), grad_out)), expected, strict=True):
        assert torch.equal(a, b)


@every_backward
@every_variant
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_theirs(variant, backward):
    arguments, _ = VARIANTS[variant]
    inputs = qkv(70, 70, dtype=torch.float32)
    low = [x.detach().bfloat16().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*inputs, backward=backward, **arguments)
    assert out.dtype == torch.bfloat16
    grad_out = torch.ones_like(out)
    gradients = torch.autograd.grad(out, inputs, grad_out)
    expected = value_and_gradients(*low, grad_out, backward=backward, **arguments)
    assert torch.equal(out, expected[0])
    for a, b in zip(gradients, expected[1:], strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


@pytest.mark.parametrize("backend", ["cuda_flash", "cuda_efficient", "cuda_cudnn"])
@pytest.mark.parametrize("backward", ["full", "diagonal"])
def test_the_kernels_of_cuda_take_and_give_what_is_expected_of_them(backend, backward, monkeypatch):
    """Shapes and signatures alone, on tensors without data; the numbers need a GPU."""
    monkeypatch.setenv("OFFBYONE_TRITON", "0")
    q, k, v = (torch.empty(B, H, 70, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    b = torch.empty(H, device="meta", requires_grad=True)
    out = FusedAttention.apply(q, k, v, b, backward, 0.0, 0.125, backend)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    for x, gradient in zip((q, k, v, b), torch.autograd.grad(out.sum(), (q, k, v, b)), strict=True):
        assert (x.shape, x.dtype) == (gradient.shape, gradient.dtype)


LAYOUTS = []


@torch.library.custom_op("offbyone_tests::backward", mutates_args=())
def stand_in(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For cuDNN's backward: the layouts that it is given when it runs."""
    LAYOUTS.append((q.stride(), out.stride(), grad.stride()))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@stand_in.register_fake
def _(grad, q, k, v, out, lse):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@pytest.mark.parametrize("variant", ["softmax", "softmax1"])
def test_cudnn_gets_the_gradient_in_one_layout_compiled_or_not(variant, monkeypatch):
    """PyTorch looks up cuDNN's plans by the strides of q, k and v alone, and a compiled graph hands dL/dO over in
    another layout: the second of two layouts would run on the plan of the first."""

    def forward(q, k, v, bias, with_lse, dropout_p, is_causal, scale):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, dropout_p, is_causal, scale=scale)
        return out, lse.unsqueeze(-1), None, None, None, None, torch.zeros(()), torch.zeros(()), None

    def backward(grad, q, k, v, out, lse, *rest, scale):
        return stand_in(grad, q, k, v, out, lse)

    monkeypatch.setattr(fused, "CUDNN", forward)
    monkeypatch.setattr(fused, "CUDNN_BACKWARD", backward)
    LAYOUTS.clear()
    torch.compiler.reset()
    size = 8  # others are padded to a multiple of it, into tensors that lie one after another
    packed = torch.randn(B, 6, 3 * H * size)
    q, k, v = (x.view(B, 6, H, size).transpose(1, 2).detach().requires_grad_() for x in packed.split(H * size, -1))
    grad = torch.randn(B, 6, H, size).transpose(1, 2)
    for function in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        for g in (grad, grad.contiguous()):
            with use_backend("cuda_cudnn"):
                out = function(q, k, v, normalizer=variant)
            torch.autograd.grad(out, (q, k, v), g)
    assert len(LAYOUTS) == 4
    assert len(set(LAYOUTS)) == 1
    assert LAYOUTS[0][1] == LAYOUTS[0][2]


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("cuda_flash", torch.bfloat16), ("cuda_flash", torch.float16), ("cuda_efficient", torch.float32),
     ("cuda_efficient", torch.bfloat16), ("cuda_cudnn", torch.bfloat16)],
)  # fmt: skip
def test_cuda_has_the_digits_of_its_dtype(backend, dtype):
    for variant, backward, kind in itertools.product(VARIANTS, BACKWARDS, LOGITS):
        arguments, null_logit = VARIANTS[variant]
        arguments = {k: v.cuda() if torch.is_tensor(v) else v for k, v in arguments.items()}
        for T, D in itertools.product((1, 63, 65, 257, 1000), (16, 64, 80, 128)):
            if backend == "cuda_cudnn" and T == 1:  # which it does not know
                continue
            q, k, v, g = logits_of(kind, T, D, dtype)
            with use_backend(backend):
                on_gpu = [x.cuda().requires_grad_() for x in (q, k, v)]
                values = value_and_gradients(*on_gpu, g.cuda(), backward=backward, **arguments)
            tolerance, expected = tolerance_of(kind, q, k, dtype), reference(q, k, v, g, null_logit, backward)
            for name, value in zip(("out", "dQ", "dK", "dV"), values, strict=True):
                exact, magnitude = expected[name]
                if magnitude.max() > torch.finfo(dtype).max / 2:
                    continue
                error, smallest = (value.cpu().double() - exact).norm(), torch.finfo(dtype).smallest_normal
                where = f"{variant}, {backward}, {kind}, T {T}, D {D}: {name}"
                assert error <= tolerance * magnitude.norm() + smallest * value.numel(), where


@gpu
def test_cuda_chooses_a_fused_kernel_or_says_that_there_is_none():
    def chosen(dtype, D=64, T_q=128, **arguments):
        q, k = (
            torch.empty(1, 1, T_q, D, device="cuda", dtype=dtype),
            torch.empty(1, 1, 128, D, device="cuda", dtype=dtype),
        )
        return attention_backend(q, k, **arguments)

    fused = "cuda_cudnn" if torch.cuda.get_device_capability()[0] == 9 else "cuda_flash"
    assert chosen(torch.float32) == chosen(torch.bfloat16, D=264) == "cuda_efficient"
    assert chosen(torch.bfloat16) == chosen(torch.bfloat16, T_q=100) == fused
    assert chosen(torch.float16, dropout_p=0.1) == chosen(torch.bfloat16, D=136) == "cuda_flash"
    assert chosen(torch.bfloat16, stock=True) == "stock"
    with pytest.warns(UserWarning, match="float64"):
        assert chosen(torch.float64) == "materialized"


# --- attention: bad input -------------------------------------------------------------------------------------------

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
        (SOME, SOME, SOME, {"null_logit": 0.0}, ("null_logit", "a float", "a tensor of torch.float32")),
        (SOME, SOME, SOME, {"null_logit": torch.zeros(2).long()}, ("null_logit", "torch.int64", "torch.float32")),
        (SOME[0], SOME[0], SOME[0], {}, ("(2, 3, 4)", "(B, H, T_q, D)")),
        (SOME, SOME, SOME[:, :, :2], {}, ("(1, 2, 3, 4)", "(1, 2, 2, 4)", "(B, H, T_k, D)")),
        (SOME, SOME[:, :1], SOME[:, :1], {}, ("(1, 1, 3, 4)", "(B, H, T_k, D)")),
        (SOME, SOME[..., :2], SOME[..., :2], {}, ("(1, 2, 3, 2)", "(B, H, T_k, D)")),
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
