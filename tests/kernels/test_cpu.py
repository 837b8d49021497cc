"""The CPU's own kernel beyond what test_fused.py asks of every kernel: threads, kinks, NaN, memory."""

import contextlib
import itertools
import math
import shutil
import subprocess

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import cpu
from kernels.backends import materialized_attention, use_backend
from model import attention
from tests.helpers import BACKWARDS
from tests.processes import run_python

if cpu.load() is None:
    pytest.skip("no C++ compiler, or not on Linux: attention runs on PyTorch's kernels", allow_module_level=True)

TILES = (  # arguments of attention, one for each kind of weights that the kernel computes
    {"normalizer": "softmax1"},
    {"normalizer": "clipped", "alpha": 3.7, "context": 0},
    {"normalizer": "softpick"},
    {"normalizer": "sigmoid", "bias": -2.5},
    {"normalizer": "relu"},
)
every_tile = pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile["normalizer"])


def inputs(T: int, D: int, H: int = 3, dtype=torch.float32, H_kv: int | None = None) -> list[torch.Tensor]:
    """q (B, H, T, D), k and v (B, H_kv, T, D) as views of one projection, and dL/dO; as many heads each by default."""
    generator, H_kv = torch.Generator().manual_seed(T + D), H_kv or H
    packed = torch.randn(2, T, (H + 2 * H_kv) * D, generator=generator).to(dtype)
    views = (x.unflatten(-1, (-1, D)).transpose(1, 2) for x in packed.split([H * D, H_kv * D, H_kv * D], dim=-1))
    q, k, v = (x.requires_grad_() for x in views)
    return [q, k, v, torch.randn(2, H, T, D, generator=generator).to(dtype)]


def value_and_gradients(q, k, v, g, **arguments) -> list[torch.Tensor]:
    out = attention(q, k, v, **arguments)
    return [out, *torch.autograd.grad(out, (q, k, v), g)]


def check_against_the_readable_form(
    T: int, D: int, H: int = 3, dtype=torch.float32, H_kv: int | None = None, tiles=TILES[:1]
) -> None:
    for tile, backward in itertools.product(tiles, BACKWARDS):
        *qkv, g = inputs(T, D, H, dtype, H_kv)
        with use_backend("cpu_native"):
            own = value_and_gradients(*qkv, g, backward=backward, **tile)
        exact = [x.detach().double().requires_grad_() for x in qkv]
        with materialized_attention():
            expected = value_and_gradients(*exact, g.double(), backward=backward, **tile)
        for a, b in zip(own, expected, strict=True):
            # The digits of test_fused.py, of sums that cancel to no less than a tenth here; T = 1 to nothing
            digits = {torch.float32: 1e-5, torch.bfloat16: 8e-2}[dtype]
            assert (a.double() - b).norm() <= digits * (b.norm() + (T == 1)), (T, D, tile, backward)


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.parametrize("T", [1, 64, 65, 200, 300])
def test_threads_share_the_heads_and_their_parts(count, T, dtype):
    with threads(count):
        check_against_the_readable_form(T, 20, 3, dtype)  # 6 heads: whole, in 2 parts, in 5
        check_against_the_readable_form(T, 16, 1, dtype)  # 2 heads: whole, in 2 parts, in 5
        check_against_the_readable_form(T, 20, 4, dtype, H_kv=2)  # 4 heads of keys, in parts for the backward alone
        check_against_the_readable_form(T, 16, 3, dtype, H_kv=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [65, 300])
def test_threads_share_whatever_the_weights_are(T, dtype):
    with threads(5):
        check_against_the_readable_form(T, 16, 1, dtype, tiles=TILES)
        check_against_the_readable_form(T, 20, 4, dtype, H_kv=2, tiles=TILES)


def test_many_heads_are_not_divided():
    with threads(4):
        assert cpu._parts(torch.empty(2, 3, 300, 16)) == 2
        assert cpu._parts(torch.empty(2, 3, 64, 16)) == 1  # one block of rows
        assert cpu._parts(torch.empty(17, 1, 300, 16)) == 1


@pytest.mark.parametrize("backend", ["cpu_native", "cpu_flash", "materialized"])
@pytest.mark.parametrize("shape", [(2, 0, 5, 4), (0, 2, 5, 4), (1, 1, 0, 4), (1, 1, 5, 1)])
def test_nothing_and_the_least_are_fine(shape, backend):
    B, H, T, D = shape
    q = torch.randn(B, H, T, D, requires_grad=True)
    for tile, backward in itertools.product(TILES if backend == "cpu_native" else TILES[:1], BACKWARDS):
        with use_backend(backend):
            out = attention(q, q, q, backward=backward, **tile)
        assert out.shape == shape
        out.sum().backward()
        assert q.grad.isfinite().all()


@every_tile
def test_a_row_of_minus_infinity_has_no_weight_and_no_gradient(tile):
    q, k, v, g = (x.detach().clone() for x in inputs(70, 16, H=1))
    k = k.abs()
    q[:, :, 66] = -math.inf
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, _, _, grad_v = value_and_gradients(q, k, v, g, **tile)
    assert (out[:, :, 66] == 0).all()
    assert grad_v.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_at_the_kinks_and_far_from_them(dtype):
    """Weights by hand, where they are numbers that need no rounding."""

    def weights(score: float, tile) -> tuple[torch.Tensor, ...]:  # of equal scores, (T, T), and whether dQ and dK are 0
        x = torch.zeros(1, 1, 128, 128, dtype=dtype)
        x[..., 0] = 1
        q, k = (score * x).requires_grad_(), x.clone().requires_grad_()
        v = torch.eye(128, dtype=dtype).view(1, 1, 128, 128).requires_grad_()
        out = attention(q, k, v, scale=1.0, **tile)
        gradients = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
        assert all(x.isfinite().all() for x in gradients)
        return out[0, 0].float(), (gradients[0] == 0).all() and (gradients[1] == 0).all()

    _, clipped, softpick, sigmoid, relu = TILES
    keys = torch.arange(1.0, 129).view(-1, 1)
    visible = torch.ones(128, 128).tril()
    eps = torch.finfo(dtype).eps
    for score in (-1e4, 0.0, 1e4):
        share = visible / keys
        above = {-1e4: 0.0, 0.0: 0.0, 1e4: 1.0}[score]
        expected = (  # of n equal weights 1/n clipped softmax keeps none where n > 1 + n/3.7, and one alone keeps all
            (clipped, (share * (1 + 3.7 / keys) - 3.7 / keys).clamp(min=0)),
            (softpick, share * above),
            (sigmoid, visible * (above if score else 1 / (1 + math.exp(2.5)))),
            (relu, share * above * torch.tensor(score, dtype=dtype).float()),
        )
        for tile, exact in expected:
            out, no_gradient = weights(score, tile)
            # The logsumexp of scores of 1e4, rounded, is not exact to more than 1e-3; the kernel does not need it here
            torch.testing.assert_close(out, exact, rtol=4 * eps, atol=4 * eps)
            if score <= 0 and tile in (softpick, relu):
                assert no_gradient


def test_softpick_does_not_cancel_near_0():
    """Where exp(x) − 1, and beside it the definition's 1e-6, are far below the last digit of exp(x)."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 70, 1, generator=generator) for _ in range(2))
    q, k = (F.pad(x, (0, 69)) for x in (1e-8 * q, k))
    v = torch.eye(70).view(1, 1, 70, 70).requires_grad_()
    out = attention(q, k, v, scale=1.0, normalizer="softpick")
    (grad_v,) = torch.autograd.grad(out, v, torch.eye(70).view(1, 1, 70, 70))
    terms = (q.double() @ k.double().mT).expm1().tril()
    expected = terms.clamp(min=0) / (terms.abs().sum(-1, keepdim=True) + 1e-6)
    rounding = {"rtol": 16 * torch.finfo(torch.float32).eps, "atol": 0}
    torch.testing.assert_close(out.double(), expected, **rounding)
    torch.testing.assert_close(grad_v.mT.double(), expected, **rounding)


def test_the_operators_are_what_torch_expects_of_them():
    q, k, v, g = inputs(70, 20, H_kv=1)
    lse = torch.randn(2, 3, 70)
    for dtype, null_logit, backwards in (
        (torch.float32, None, ("full", "detached")),
        (torch.bfloat16, torch.zeros(3), ("diagonal", "ste")),
    ):
        q_, k_, v_, g_ = (x.detach().to(dtype) for x in (q, k, v, g))
        torch.library.opcheck(torch.ops.offbyone.cpu_forward, (q_, k_, v_, null_logit, 0.2))
        for backward in backwards:
            torch.library.opcheck(torch.ops.offbyone.cpu_backward, (g_, q_, k_, v_, g_, lse, 0.2, backward))
    torch.library.opcheck(torch.ops.offbyone.cpu_forward, (q_, k_, v_, None, 0.2, "clipped", 4.0, 0.0))


@every_tile
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H_kv", [1, 3])
def test_the_same_inputs_give_the_same_bits(tile, backward, dtype, H_kv):
    *qkv, g = inputs(300, 20, dtype=dtype, H_kv=H_kv)
    with threads(4):  # in whatever order they take the heads' two parts
        first, again = (value_and_gradients(*qkv, g, backward=backward, **tile) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("T", [65, 300])  # ste: tile by tile, and by running sums
def test_the_keys_of_a_group_are_read_where_they_lie(T, backward):
    """Nothing of the size of repeated keys, which is that of q, is made but the output and dQ."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
            result = operator(*arguments, **(keywords or {}))
            if torch.is_tensor(result) and result.numel() >= q.numel():
                made.add(result.untyped_storage().data_ptr())
            return result

    made = set()
    q, k, v, g = (x.detach() for x in inputs(T, 16, 8, H_kv=2))
    with Record(), threads(1):
        out, lse, _ = cpu.cpu_forward(q, k, v, None, 0.25)
        dq, dk, dv, _ = cpu.cpu_backward(g, q, k, v, out, lse, 0.25, backward)
    assert dk.shape == dv.shape == k.shape
    assert made == {out.data_ptr(), dq.data_ptr()}


def test_a_score_is_the_same_in_both_passes():
    """At scores of ±1e4 another rounding would be a factor: a row's weights have to be those of its own logsumexp."""
    q, k, v, g = (x.detach() for x in inputs(130, 80))
    v = torch.ones_like(v).requires_grad_()
    (mass,) = torch.autograd.grad(attention(1e4 * q, k, v), v, torch.ones_like(g))
    # dV = Pᵀ 1 are the weights that a key gets; those of all keys are one for each query. A logsumexp of 4e4 is rounded
    # by 2e-3 at most, where it is not the largest score itself: in few rows.
    assert (mass[..., 0].double().sum(-1) - 130).abs().max() < 0.01


@every_tile
@pytest.mark.parametrize("backward", BACKWARDS)
def test_nan_is_not_hidden(tile, backward):
    q, k, v, g = (x.detach().clone() for x in inputs(130, 16))
    q[:, :, 100, 3] = float("nan")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, grad_q, grad_k, grad_v = value_and_gradients(q, k, v, g, backward=backward, **tile)
    assert out[:, :, 100].isnan().all()
    assert out[:, :, :100].isfinite().all()
    assert out[:, :, 101:].isfinite().all()
    assert grad_v[:, :, :101].isnan().all()
    assert grad_v[:, :, 101:].isfinite().all()
    if backward != "ste" and tile["normalizer"] != "relu":  # whose scores' gradients do not see the scores, or a sign
        assert grad_q[:, :, 100].isnan().all()
        assert grad_q[:, :, :100].isfinite().all()
        assert grad_q[:, :, 101:].isfinite().all()
        assert grad_k[:, :, :101].isnan().all()


@pytest.mark.slow
def test_nothing_is_read_or_written_beyond_the_tensors(tmp_path):
    """Under the address sanitizer, in a process of its own."""
    program = f"""
import pathlib, torch
from kernels import cpu
cpu.SOURCE = pathlib.Path({str(tmp_path)!r}) / "cpu.cpp"
cpu.FLAGS = (*cpu.FLAGS[1:], "-O0", "-fsanitize=address")  # the same accesses as by -O3, built in a third of the time
assert cpu.load() is not None
from model import attention
for T, D in ((1, 5), (65, 20), (130, 80), (300, 20)):  # the last beyond where ste turns to running sums
    for dtype in (torch.float32, torch.bfloat16):
        for tile in {TILES!r}:
            for backward in ("full", "ste"):
                for H_kv in (1, 2):
                    x = torch.randn(1, T, (2 + 2 * H_kv) * D).to(dtype).requires_grad_()
                    views = x.split([2 * D, H_kv * D, H_kv * D], dim=-1)
                    q, k, v = (y.unflatten(-1, (-1, D)).transpose(1, 2) for y in views)
                    attention(q, k, v, backward=backward, **tile).sum().backward()
print("done")
"""
    shutil.copy(cpu.SOURCE, tmp_path)
    found = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not found.startswith("/"):
        pytest.skip("this compiler has no address sanitizer")
    environment = {"LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "3"}  # 2 heads in 3 parts
    environment["OMP_WAIT_POLICY"] = "passive"  # threads that spin while they wait take as long again
    done = run_python("-c", program, **environment)
    assert done.stdout.strip() == "done", done.stderr[-2000:]
