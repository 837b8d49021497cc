"""Every attention variant as one autograd function over fused kernels, against the readable form."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from kernels.backends import materialized_attention, use_backend
from kernels.fused import FusedAttention
from model import attention, attention_backend
from tests.helpers import ROUNDING, VARIANTS, B, D, H, both_dtypes, every_backward, every_variant, explicit_weights, qkv

# Relative to the magnitude before any cancellation: at ordinary logits a few roundings of each of the products and of
# the weights, which a half type stores with its own few digits.
DIGITS = {torch.float64: 2e-15, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def use_own_kernel(own: bool, monkeypatch) -> None:
    """The CPU's own kernel, or PyTorch's as where there is none."""
    monkeypatch.setenv("OFFBYONE_NATIVE", "1" if own else "0")
    q = torch.empty(1, 1, 9, 16)
    if own and attention_backend(q, q) != "cpu_native":
        pytest.skip("no C++ compiler: PyTorch's kernels have their own cases")


TILES = {  # what may stand in softmax's place in our own kernels
    "clipped": {"normalizer": "clipped", "alpha": 3.7, "context": 300},
    "clipped by row": {"normalizer": "clipped", "alpha": 3.7, "context": 0},
    "softpick": {"normalizer": "softpick"},
    "sigmoid": {"normalizer": "sigmoid", "bias": -2.5},
    "relu": {"normalizer": "relu"},
}
every_tile = pytest.mark.parametrize("tile", TILES)


def value_and_gradients(q, k, v, grad_out, **arguments):
    out = attention(q, k, v, **arguments)
    return out, *torch.autograd.grad(out, (q, k, v), grad_out)


# --- attention: fused kernels ---------------------------------------------------------------------------------------


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


def product_of_second_derivatives(inputs, grad_out, along, **arguments):
    out = attention(*inputs, **arguments)
    gradients = torch.autograd.grad(out, inputs, grad_out, create_graph=True)
    return torch.autograd.grad(gradients, inputs, along)


@every_backward
@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_have_the_digits_of_their_dtype(variant, backward, dtype):
    arguments, _ = VARIANTS[variant]
    inputs = qkv(65, 65, dtype=dtype)
    grad_out, *along = (x.detach() for x in (*qkv(65, 65, 1, dtype)[:1], *qkv(65, 65, 2, dtype)))
    products = product_of_second_derivatives(inputs, grad_out, along, backward=backward, **arguments)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact_along = [x.double() for x in along]
    with materialized_attention():
        expected = product_of_second_derivatives(
            exact_inputs, grad_out.double(), exact_along, backward=backward, **arguments
        )
    for a, b in zip(products, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= DIGITS[dtype] * b.norm()


def test_no_second_derivative_is_wrong_in_silence():
    q, k, v = qkv(6, 6, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.sum(), q)

    q, k, v = (torch.empty(B, H, 70, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = FusedAttention.apply(q, k, v, None, "full", 0.1, 0.125, "cuda_flash")
    with pytest.raises(NotImplementedError, match=r"dropout \(0.1\).*'cuda_flash'"):  # its mask is the kernel's own
        torch.autograd.grad(out.sum(), q, create_graph=True)

    with use_backend("stock"):
        q, k, v = qkv(6, 6)
        (gradient,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):  # PyTorch's own kernels have none
        torch.autograd.grad(gradient.sum(), q)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("H_kv", [2, 4])
def test_the_value_gradient_is_the_same_head_by_head(dtype, H_kv, monkeypatch):
    q, k, v, g = (torch.randn(1, heads, 70, 16).to(dtype) for heads in (4, H_kv, H_kv, 4))
    results = []
    for at_once in (0, q.numel()):
        monkeypatch.setattr("kernels.fused.AT_ONCE", at_once)
        with use_backend("cpu_flash"):
            results.append(value_and_gradients(*(x.requires_grad_() for x in (q, k, v)), g, backward="ste"))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


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


# --- attention: bad input -------------------------------------------------------------------------------------------


@every_tile
@pytest.mark.parametrize("backend", ["stock", "cpu_flash", "cuda_flash", "cuda_efficient", "cuda_cudnn"])
def test_a_backend_that_knows_softmax_alone_says_so(backend, tile):
    q = torch.randn(1, 1, 70, 8)
    with use_backend(backend), pytest.raises(ValueError, match=f"{backend}.* has no {TILES[tile]['normalizer']}: use"):
        attention(q, q, q, **TILES[tile])


def test_what_stands_in_softmaxs_place_has_no_dropout_in_a_kernel(monkeypatch):
    use_own_kernel(True, monkeypatch)
    q = torch.randn(1, 1, 70, 8)
    with use_backend("cpu_native"), pytest.raises(ValueError, match=r"no dropout of relu, and dropout_p is 0\.5"):
        attention(q, q, q, normalizer="relu", dropout_p=0.5)
    assert attention(q, q, q, normalizer="relu", dropout_p=0.5).isfinite().all()  # where the choice is free
