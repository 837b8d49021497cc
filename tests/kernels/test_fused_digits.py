"""Every attention variant against float64: in how many digits its dtype gives values and gradients."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from kernels import normalizers
from kernels.backends import use_backend
from kernels.fused import DEFINITIONS, straight_through_gradients
from model import attention
from tests.helpers import BACKWARDS, VARIANTS, H, every_variant
from tests.kernels.test_fused import DIGITS, TILES, every_tile, use_own_kernel, value_and_gradients

# Whether by the CPU's own kernel, through all shapes: models train in these. The others by PyTorch's kernels, and these
# too, as where there is no compiler, through some (a half type is emulated on most CPUs: seconds).
KERNELS = [(torch.float32, True), (torch.bfloat16, True), *((dtype, False) for dtype in DIGITS)]
LOGITS = {"ordinary": (3, 0), "extreme": (1e4, 0), "low": (3, -50), "far below zero": (3, -1e4)}  # spread, offset


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
    shapes = [*itertools.product(lengths[:-1], widths), (1000, 80), (1000, 128)]  # most of the time is the reference's
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
