"""Every attention variant as one autograd function over fused kernels, against the readable form and float64."""

import argparse
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from harness.bench_attention import STOCK, peak_of
from kernels import fused, normalizers
from kernels.backends import materialized_attention, use_backend
from kernels.fused import DEFINITIONS, FusedAttention, straight_through_gradients
from model import (
    attention,
    attention_backend,
)
from tests.helpers import (
    BACKWARDS,
    ROUNDING,
    VARIANTS,
    B,
    D,
    H,
    both_dtypes,
    every_backward,
    every_variant,
    explicit_weights,
    qkv,
)

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


def references(q, k, v, g, null_logit) -> Iterator[tuple[str, dict]]:
    """Each backward, and by name out, dQ, dK, dV and db: (value, magnitude before cancellation) in float64."""
    q, k, v, g = (x.double() for x in (q, k, v, g))
    scale = 1 / math.sqrt(q.size(-1))
    offset = k.size(-2) - q.size(-2)
    scores = (scale * q @ k.mT).masked_fill(torch.ones(q.size(-2), k.size(-2)).triu(1 + offset).bool(), -math.inf)
    b = torch.full((q.size(1),), -math.inf).double() if null_logit is None else null_logit
    lse = torch.logaddexp(scores.logsumexp(-1, keepdim=True), b.view(-1, 1, 1))
    P, dP = (scores - lse).exp(), g @ v.mT
    out, null = P @ v, (b.view(-1, 1, 1) - lse).exp()
    mean, size_out = (P * dP).sum(-1, keepdim=True), P @ v.abs()
    dV = P.mT @ g, P.mT @ g.abs()
    db = -(null * mean).sum((0, 2, 3)), (null * g.abs() * size_out).sum((0, 2, 3))
    for backward in BACKWARDS:
        if backward == "full":
            dS, size = P * (dP - mean), P * (dP.abs() + mean.abs())
        elif backward == "diagonal":
            dS, size = P * -(scores - lse).expm1() * dP, P * dP.abs()
        elif backward == "detached":
            dS, size = P * dP, P * dP.abs()
        else:
            dS = dP.tril(offset)
            size = dS.abs()
        dQ, dK = (scale * dS @ k, scale * size @ k.abs()), (scale * dS.mT @ q, scale * size.mT @ q.abs())
        yield backward, {"out": (out, size_out), "dQ": dQ, "dK": dK, "dV": dV, "db": db}


TILES = {  # what may stand in softmax's place in our own kernels
    "clipped": {"normalizer": "clipped", "alpha": 3.7, "context": 300},
    "clipped by row": {"normalizer": "clipped", "alpha": 3.7, "context": 0},
    "softpick": {"normalizer": "softpick"},
    "sigmoid": {"normalizer": "sigmoid", "bias": -2.5},
    "relu": {"normalizer": "relu"},
}
every_tile = pytest.mark.parametrize("tile", TILES)


def tile_references(q, k, v, g, tolerance: float, normalizer: str, **constants) -> Iterator[tuple[str, dict]]:
    """As `references`, by the definitions of kernels/normalizers.py: by autograd for full, else by their slopes. What
    the rounding of scores to float32 may change, a slope at a kink above all, is in the magnitudes, over `tolerance`.
    """
    q, k, v, g = (x.double() for x in (q, k, v, g))
    scale, definition = 1 / math.sqrt(q.size(-1)), DEFINITIONS[normalizer]
    offset = k.size(-2) - q.size(-2)
    visible = torch.ones(q.size(-2), k.size(-2)).tril(offset).bool()
    scores = (scale * q @ k.mT).masked_fill(~visible, -math.inf).requires_grad_()
    P, dP = definition["weights"](scores, **constants), g @ v.mT
    (full,) = torch.autograd.grad(P, scores, dP)
    scores, P = scores.detach(), P.detach()
    slopes = {name: definition[name](scores, P, **constants) for name in ("diagonal", "detached")}
    rounding = 4 * torch.finfo(torch.float32).eps * scale * (q.abs() @ k.abs().mT)
    uncut, shares, sizes = slopes["detached"], P, P  # the slope of what is cut off, too; Σ shares∘dP is full's row sum
    near = (scores.abs() <= rounding) & (normalizer != "sigmoid")
    if normalizer == "clipped":
        gamma = normalizers._gamma(scores, *constants.values())
        shares = scores.softmax(-1)
        uncut = sizes = shares * (1 - gamma)
        near = visible & ((uncut + gamma).abs() <= -gamma * rounding.amax(-1, keepdim=True))
    elif normalizer == "softpick":
        exp_x, _, total = normalizers._softpick_terms(scores)
        uncut = (exp_x / total).where(visible, 0)
        moved = (uncut * rounding).sum(-1, keepdim=True) / tolerance  # how far the scores' rounding moves the total
        sizes, uncut = P * (1 + moved) + uncut * rounding / tolerance, uncut * (1 + moved)
    elif normalizer == "relu":
        uncut = visible / normalizers.visible_keys(scores)
    sum_size = (shares * dP.abs()).sum(-1, keepdim=True) * (normalizer in ("clipped", "softpick"))
    for backward in BACKWARDS:
        dS = full if backward == "full" else dP * (visible if backward == "ste" else slopes[backward])
        size = dS.abs() if backward == "ste" else uncut * (dP.abs() + sum_size * (backward == "full"))
        if backward != "ste":
            size = size + near * uncut * dP.abs() / tolerance
        dQ, dK = (scale * dS @ k, scale * size @ k.abs()), (scale * dS.mT @ q, scale * size.mT @ q.abs())
        out, dV = (P @ v, sizes @ v.abs()), (P.mT @ g, sizes.mT @ g.abs())
        yield backward, {"out": out, "dQ": dQ, "dK": dK, "dV": dV}


def tolerance_of(kind, q, k, dtype) -> float:
    """The digits and, beyond ordinary logits, that a weight is the exponential of a sum of D rounded products."""
    if kind == "ordinary" and dtype != torch.float64:
        return DIGITS[dtype]
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    largest = (q.double().abs() @ k.double().abs().mT).max().item() / math.sqrt(q.size(-1))
    return DIGITS[dtype] + math.expm1(4 * eps * largest)


@every_variant
@pytest.mark.parametrize(("dtype", "own"), KERNELS, ids=str)
@pytest.mark.parametrize(
    "kind", [kind if kind == "ordinary" else pytest.param(kind, marks=pytest.mark.slow) for kind in LOGITS]
)
def test_values_and_gradients_have_the_digits_of_their_dtype(variant, dtype, own, kind, monkeypatch):
    arguments, null_logit = VARIANTS[variant]
    use_own_kernel(own, monkeypatch)
    lengths, widths = (1, 2, 63, 64, 65, 257, 1000), (16, 64, 80, 128)
    shapes = list(itertools.product(lengths, widths))
    if not own:
        shapes = [*shapes[:20:3], (257, 80)] + [(1000, 64)] * (dtype in (torch.float64, torch.float32))
    elif kind != "ordinary":  # how large the scores are is of no concern to the products that make them
        shapes = list(zip(lengths, itertools.cycle(widths), strict=False))
    for T, width in shapes:
        q, k, v, g = logits_of(kind, T, width, dtype)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        learned = {"null_logit": null_logit.clone().requires_grad_()} if variant == "sink" else {}
        tolerance = tolerance_of(kind, q.detach(), k.detach(), dtype)
        for backward, expected in references(*(x.detach() for x in inputs), g, null_logit):
            out = attention(*inputs, backward=backward, **arguments | learned)
            gradients = torch.autograd.grad(out, [*inputs, *learned.values()], g)
            for name, value in zip(expected, (out, *gradients), strict=False):
                exact, magnitude = expected[name]
                if magnitude.max() > torch.finfo(dtype).max / 2:  # float16 ends at 65,504, and diagonal halves a sum
                    continue
                error, size = (value.double() - exact).norm().item(), magnitude.norm().item()
                smallest = torch.finfo(dtype).smallest_normal * value.numel()  # below it the precision is absolute
                where = f"{backward}, T {T}, D {width}: {name}"
                assert error <= tolerance * size + smallest, f"{where} {error / max(size, 1e-300):.1e}"


@every_tile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LOGITS)
def test_what_stands_in_softmaxs_place_has_the_digits_of_its_dtype(tile, dtype, kind, monkeypatch):
    use_own_kernel(True, monkeypatch)
    for T, width in itertools.product((1, 2, 63, 64, 65, 300), (5, 16, 80) if kind == "ordinary" else (16,)):
        q, k, v, g = logits_of(kind, T, width, dtype)
        tolerance = tolerance_of(kind, q, k, dtype)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        for backward, expected in tile_references(*(x.detach() for x in inputs), g, tolerance, **TILES[tile]):
            with use_backend("cpu_native"):
                values = value_and_gradients(*inputs, g, backward=backward, **TILES[tile])
            for name, value in zip(expected, values, strict=True):
                exact, magnitude = expected[name]
                error, size = (value.double() - exact).norm().item(), magnitude.norm().item()
                smallest = torch.finfo(dtype).smallest_normal * value.numel()
                where = f"{backward}, T {T}, D {width}: {name}"
                assert error <= tolerance * size + smallest, f"{where} {error / max(size, 1e-300):.1e}"


# --- attention: groups of queries that read one head of keys ----------------------------------------------------------

HEADS = 4
GROUPED_NULL_LOGITS = {
    "softmax": None,
    "softmax1": torch.zeros(HEADS).double(),
    "sink": torch.tensor([-1, 0.5, 0, 2]).double(),
}


def grouped(T_q: int, T_k: int, H_kv: int, D: int, dtype, device="cpu") -> list[torch.Tensor]:
    """q (2, HEADS, T_q, D), k and v (2, H_kv, T_k, D) as a model has them, views of one projection; and dL/dO."""
    generator = torch.Generator().manual_seed(T_q + H_kv)
    widths = [HEADS * D, H_kv * D, H_kv * D]
    packed = torch.randn(2, T_k, sum(widths), generator=generator, dtype=torch.float64).to(device, dtype)
    q, k, v = (x.unflatten(-1, (-1, D)).transpose(1, 2) for x in packed.split(widths, dim=-1))
    g = torch.randn(2, T_q, HEADS, D, generator=generator, dtype=torch.float64).to(device, dtype).transpose(1, 2)
    return [q[:, :, T_k - T_q :], k, v, g]


def arguments_of(variant: str, device="cpu") -> dict:
    if variant in TILES:
        return TILES[variant]
    learned = {"null_logit": GROUPED_NULL_LOGITS["sink"].to(device)} if variant == "sink" else {}
    return {"normalizer": variant} | learned


def check_groups(backend: str, variant: str, dtype, T_q: int, T_k: int, H_kv: int, device="cpu") -> None:
    """Values and gradients of each backward that it has against those of keys that are repeated, in float64."""
    *inputs, g = grouped(T_q, T_k, H_kv, 16, dtype, device)
    q, k, v, grad_out = (x.detach().cpu() for x in (*inputs, g))
    repeated = (x.repeat_interleave(HEADS // H_kv, dim=1) for x in (k, v))
    if variant in TILES:
        expected = tile_references(q, *repeated, grad_out, DIGITS[dtype], **TILES[variant])
    else:
        expected = references(q, *repeated, grad_out, GROUPED_NULL_LOGITS[variant])
    for backward, named in expected:
        if backend == "stock" and backward != "full":
            continue
        with use_backend(backend):
            leaves = (x.requires_grad_() for x in inputs)
            found = value_and_gradients(*leaves, g, backward=backward, **arguments_of(variant, device))
        for name, value, x in zip(("out", "dQ", "dK", "dV"), found, (q, q, k, v), strict=True):
            exact, magnitude = (y.unflatten(1, (x.size(1), -1)).sum(2) for y in named[name])
            assert (value.shape, value.dtype) == (exact.shape, dtype)
            error = (value.cpu().double() - exact).norm() / magnitude.norm()
            assert error <= DIGITS[dtype], f"{backward}, {T_q} of {T_k}, {H_kv} heads of keys: {name} {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("backend", "variant"),
    [
        ("stock", "softmax"),
        *itertools.product(("materialized", "cpu_native", "cpu_flash"), VARIANTS),
        *itertools.product(("materialized", "cpu_native"), TILES),
    ],
)
def test_a_group_of_queries_reads_one_head_of_keys(backend, variant, dtype, monkeypatch):
    use_own_kernel(backend == "cpu_native", monkeypatch)
    shapes = [(65, 65), (70, 130), (1, 9)] + [(300, 300)] * (backend != "materialized")  # which has no blocks
    for H_kv, (T_q, T_k) in itertools.product((1, 2, HEADS), shapes):
        check_groups(backend, variant, dtype, T_q, T_k, H_kv)


@pytest.mark.parametrize(("backend", "variant"), [("stock", "softmax"), ("cpu_flash", "sink")])
def test_keys_are_repeated_for_a_kernel_that_cannot_read_groups(backend, variant, monkeypatch):
    """As the efficient one of CUDA; here the CPU's stand in for it."""
    monkeypatch.setattr(fused, "reads_groups", lambda backend, q: False)
    for H_kv in (1, 2, HEADS):
        check_groups(backend, variant, torch.float32, 70, 130, H_kv)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["stock", "cuda_flash", "cuda_efficient", "cuda_cudnn"])
def test_a_group_of_queries_reads_one_head_of_keys_on_a_gpu(backend):
    for variant, H_kv in itertools.product(VARIANTS if backend != "stock" else ["softmax"], (1, 2, HEADS)):
        for T_q, T_k in ((65, 65), (70, 130), (300, 300)):
            check_groups(backend, variant, torch.bfloat16, T_q, T_k, H_kv, "cuda")


@every_backward
@every_variant
@pytest.mark.parametrize(("dtype", "own"), [(torch.float32, True), (torch.bfloat16, True), (torch.float64, False)])
def test_second_derivatives_of_a_group_are_those_of_repeated_keys(dtype, own, variant, backward, monkeypatch):
    use_own_kernel(own, monkeypatch)
    *inputs, g = grouped(33, 33, 2, 16, dtype)
    inputs, along = [x.requires_grad_() for x in inputs], [x.detach() for x in grouped(34, 34, 2, 16, dtype)[:3]]
    along = [x[:, :, 1:] for x in along]
    found = product_of_second_derivatives(inputs, g, along, backward=backward, **arguments_of(variant))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with materialized_attention():
        q, k, v = exact
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        out = attention(q, k, v, backward=backward, **arguments_of(variant))
        gradients = torch.autograd.grad(out, exact, g.double(), create_graph=True)
        expected = torch.autograd.grad(gradients, exact, [x.double() for x in along])
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, dtype)
        assert (a.double() - b).norm() <= 8 * DIGITS[dtype] * b.norm()  # of what has cancelled, to an eighth at most


@every_backward
@every_tile
def test_second_derivatives_of_what_stands_in_softmaxs_place(tile, backward, monkeypatch):
    use_own_kernel(True, monkeypatch)
    *inputs, g = grouped(33, 33, 2, 16, torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    along = [x.detach()[:, :, 1:] for x in grouped(34, 34, 2, 16, torch.float32)[:3]]
    found = product_of_second_derivatives(inputs, g, along, backward=backward, **TILES[tile])
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with materialized_attention():
        expected = product_of_second_derivatives(
            exact, g.double(), [x.double() for x in along], backward=backward, **TILES[tile]
        )
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, torch.float32)
        assert (a.double() - b).norm() <= 8 * DIGITS[torch.float32] * b.norm()


@both_dtypes
@every_backward
@pytest.mark.parametrize("normalizer", ["softmax1", "clipped"])
def test_compiling_takes_the_attention_of_a_group_whole(normalizer, backward, dtype):
    arguments = TILES.get(normalizer, {"normalizer": normalizer})
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    *inputs, g = grouped(150, 150, 2, 16, dtype)  # two chunks of linear attention
    inputs = [x.requires_grad_() for x in inputs]
    eager, graph = (
        (out := f(*inputs, backward=backward, **arguments), *torch.autograd.grad(out, inputs, g))
        for f in (attention, compiled)
    )
    for a, b in zip(graph, eager, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=150 * ROUNDING[dtype]["atol"])


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
@pytest.mark.parametrize("H_kv", [1, H])  # a head of keys for two heads of queries, and one for each
def test_linear_attention_is_the_triangle_of_its_products(T, dtype, digits, H_kv):
    q, k, v, g = (x.to(dtype) for x in logits_of("ordinary", T, 16, torch.float64))
    k, v = k[:, :H_kv], v[:, :H_kv]
    q_, k_, v_, g_ = (x.double() for x in (q, k, v, g))
    grad_q, grad_k = straight_through_gradients(q, k, v, g, 0.25)
    assert grad_q.dtype == dtype
    assert grad_k.shape == k.shape
    exact_k = (0.25 * (g_ @ v_.mT).tril().mT @ q_).unflatten(1, (H_kv, -1)).sum(2)
    for value, exact in ((grad_q, 0.25 * (g_ @ v_.mT).tril() @ k_), (grad_k, exact_k)):
        assert (value.double() - exact).norm() <= digits * exact.norm()  # one rounding: the sums are float32's


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("normalizer", "backward", "own"),  # own False: on PyTorch's kernels, as where there is no compiler
    [
        *itertools.product(["sink"], ["full", "diagonal", "ste"], [True, False]),  # the null logit's own gradient
        ("sink", "detached", False),
        ("clipped", "full", True),  # all scores of some rows
    ],
)
def test_memory_stays_within_one_and_a_half_times_the_stock_kernels(
    normalizer, backward, own, stock_peak, bench_arguments, monkeypatch
):
    use_own_kernel(own, monkeypatch)  # in the process that is measured
    assert peak_of(f"{normalizer}/{backward}", 8192, bench_arguments) <= 1.5 * stock_peak


@pytest.fixture(scope="module")
def bench_arguments():
    return argparse.Namespace(B=1, H=4, H_kv=4, D=64, dtype="float32", device="cpu")


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
@pytest.mark.parametrize("H_kv", [1, H])
def test_the_kernels_of_cuda_take_and_give_what_is_expected_of_them(backend, backward, H_kv, monkeypatch):
    """Shapes and signatures alone, on tensors without data; the numbers need a GPU."""
    monkeypatch.setenv("OFFBYONE_TRITON", "0")
    options = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}
    q, k, v = (torch.empty(B, heads, 70, 64, **options) for heads in (H, H_kv, H_kv))
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


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("cuda_flash", torch.bfloat16), ("cuda_flash", torch.float16), ("cuda_efficient", torch.float32),
     ("cuda_efficient", torch.bfloat16), ("cuda_cudnn", torch.bfloat16)],
)  # fmt: skip
def test_cuda_has_the_digits_of_its_dtype(backend, dtype):
    for variant, backward, kind in itertools.product(VARIANTS, BACKWARDS, LOGITS):
        arguments, null_logit = VARIANTS[variant]
        arguments = {k: v.cuda() if torch.is_tensor(v) else v for k, v in arguments.items()}
        for T, width in itertools.product((1, 63, 65, 257, 1000), (16, 64, 80, 128)):
            if backend == "cuda_cudnn" and T == 1:  # which it does not know
                continue
            q, k, v, g = logits_of(kind, T, width, dtype)
            with use_backend(backend):
                on_gpu = [x.cuda().requires_grad_() for x in (q, k, v)]
                values = value_and_gradients(*on_gpu, g.cuda(), backward=backward, **arguments)
            tolerance, expected = tolerance_of(kind, q, k, dtype), dict(references(q, k, v, g, null_logit))[backward]
            for name, value in zip(("out", "dQ", "dK", "dV"), values, strict=True):
                exact, magnitude = expected[name]
                if magnitude.max() > torch.finfo(dtype).max / 2:
                    continue
                error, smallest = (value.cpu().double() - exact).norm(), torch.finfo(dtype).smallest_normal
                where = f"{variant}, {backward}, {kind}, T {T}, D {width}: {name}"
                assert error <= tolerance * magnitude.norm() + smallest * value.numel(), where


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
