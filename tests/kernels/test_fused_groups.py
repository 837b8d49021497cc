"""Groups of queries that read one head of keys, on every kernel, against keys that are repeated."""

import itertools

import pytest
import torch

from kernels import fused
from kernels.backends import materialized_attention, use_backend
from model import attention
from tests.helpers import ROUNDING, VARIANTS, both_dtypes, every_backward, every_variant
from tests.kernels.test_fused import (
    DIGITS,
    TILES,
    every_tile,
    product_of_second_derivatives,
    use_own_kernel,
    value_and_gradients,
)
from tests.kernels.test_fused_digits import references, tile_references

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
