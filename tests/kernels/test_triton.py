"""The Triton backward against the materialised form in float64: on a GPU if there is one, else in the interpreter."""

import math

import pytest
import torch

from kernels import backends, fused
from kernels.backends import materialized_attention, use_backend
from model import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with pytest.MonkeyPatch.context() as _environment:
    if DEVICE == "cpu":
        _environment.setenv("TRITON_INTERPRET", "1")  # before the first import of triton
    pytest.importorskip("triton", reason="Triton is not installed (requirements-dev.txt)")
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from kernels.triton import row_products, score_backward, value_gradient

# T on either side of a block, head sizes that fill their power of two and one that does not; in pairs, to be quick.
SHAPES = [(1, 16), (2, 80), (63, 64), (64, 16), (65, 80), (130, 64)]
# Of the magnitude before cancellation. Half types round P or dS, then the result: by 2⁻¹¹ or 2⁻⁸ each, at most.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def diagonal_backward(*arguments):
    return score_backward(*arguments, "diagonal")


every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Triton's interpreter, mended: it multiplies the bits of bfloat16 numbers and truncates to them, and cannot call
    tl.sum and tl.max, compiled functions themselves, where it was switched on after triton was imported."""
    if DEVICE == "cuda":
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self, source, dtype):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
            return TensorHandle(rounded, tl.bfloat16)
        return cast(self, source, dtype)

    def float_dot(self, a, b, *arguments):
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *arguments)

    for name in ("cast_impl", "create_fp_trunc"):
        monkeypatch.setattr(InterpreterBuilder, name, rounding_cast)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", float_dot)
    monkeypatch.setattr(tl, "sum", lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine))
    monkeypatch.setattr(tl, "max", lambda x, axis: tl.reduce(x, axis, tl.standard._elementwise_max))


def inputs(H: int, T: int, D: int, dtype, B: int = 1, H_kv: int | None = None) -> list[torch.Tensor]:
    """q, k, v, g (B, H, T, D) as attention hands them over: views of one projection, (B, T, H, D) in memory. Of k and v
    there are H_kv heads."""
    widths = [heads * D for heads in (H, H_kv or H, H_kv or H, H)]
    projection = torch.randn(B, T, sum(widths), generator=torch.Generator().manual_seed(T + D)).to(DEVICE, dtype)
    return [x.unflatten(-1, (-1, D)).transpose(1, 2) for x in projection.split(widths, dim=-1)]


def materialized(q, k, v, g, null_logit, scale, slope="diagonal"):
    """lse (B, H, T), and by name the gradients and their magnitudes before cancellation; all float64."""
    H_kv = k.size(1)
    q, k, v, g = (x.double().repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (q, k, v, g))
    scores = scale * q @ k.mT
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    lse = torch.logaddexp(scores.logsumexp(-1), null_logit.double().view(-1, 1))
    x = scores - lse.unsqueeze(-1)
    p, dp = x.exp(), g @ v.mT
    ds, magnitude = (p * -torch.expm1(x) * dp, p * dp.abs()) if slope == "diagonal" else (dp.tril(), dp.abs().tril())
    gradients = {"dq": scale * ds @ k, "dk": scale * ds.mT @ q, "dv": p.mT @ g}
    magnitudes = {"dq": scale * magnitude @ k.abs(), "dk": scale * magnitude.mT @ q.abs(), "dv": p.mT @ g.abs()}
    for named in (gradients, magnitudes):
        named |= {name: named[name].unflatten(1, (H_kv, -1)).sum(2) for name in ("dk", "dv")}
    return lse, gradients, magnitudes


def check(gradients: dict, expected: dict, magnitudes: dict, tolerance: float, dtype) -> None:
    """Head by head: the norm of the error against that of the magnitude."""
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert gradient.shape == expected[name].shape
        error = (gradient - expected[name]).norm(dim=(-2, -1))
        allowed = tolerance * magnitudes[name].norm(dim=(-2, -1))
        assert (error <= allowed).all(), f"{name}: {error} of {allowed}"


@every_dtype
@pytest.mark.parametrize("slope", ["diagonal", "ste"])
@pytest.mark.parametrize(("T", "D"), SHAPES)
def test_gradients_are_those_of_the_materialized_form(T, D, slope, dtype):
    q, k, v, g = inputs(2, T, D, dtype)
    null_logit, scale = torch.tensor([-math.inf, 0.0], device=DEVICE), 1 / math.sqrt(D)  # softmax, softmax1
    lse, expected, magnitudes = materialized(q, k, v, g, null_logit, scale, slope)
    gradients = dict(zip(("dq", "dk", "dv"), score_backward(g, q, k, v, lse.float(), scale, slope), strict=True))
    check(gradients, expected, magnitudes, TOLERANCE[dtype], dtype)


@every_dtype
@pytest.mark.parametrize(("T", "D"), [(1, 16), (65, 80)])
def test_value_gradient_is_that_of_the_materialized_form(T, D, dtype):
    q, k, v, g = inputs(2, T, D, dtype)
    null_logit, scale = torch.tensor([-math.inf, 0.0], device=DEVICE), 1 / math.sqrt(D)
    lse, expected, magnitudes = materialized(q, k, v, g, null_logit, scale)
    check({"dv": value_gradient(g, q, k, lse.float(), scale)}, expected, magnitudes, TOLERANCE[dtype], dtype)


@every_dtype
@pytest.mark.parametrize("slope", ["diagonal", "ste"])
@pytest.mark.parametrize(("B", "T", "D", "H_kv"), [(1, 65, 80, 1), (2, 33, 16, 2), (1, 65, 16, 2)])
def test_a_group_of_queries_reads_one_head_of_keys(B, T, D, H_kv, slope, dtype):
    q, k, v, g = inputs(4, T, D, dtype, B, H_kv)
    null_logit, scale = torch.tensor([-math.inf, 0.0, -1.0, 2.0], device=DEVICE), 1 / math.sqrt(D)
    lse, expected, magnitudes = materialized(q, k, v, g, null_logit, scale, slope)
    gradients = dict(zip(("dq", "dk", "dv"), score_backward(g, q, k, v, lse.float(), scale, slope), strict=True))
    check(gradients, expected, magnitudes, TOLERANCE[dtype], dtype)
    check({"dv": value_gradient(g, q, k, lse.float(), scale)}, expected, magnitudes, TOLERANCE[dtype], dtype)


@every_dtype
@pytest.mark.parametrize(("T", "D"), [(1, 8), (65, 80), (130, 256)])
def test_row_products_are_summed_in_float32(T, D, dtype):
    a, _, b, _ = inputs(2, T, D, dtype, B=2)
    found, a, b = row_products(a, b.contiguous()), a.double(), b.double()
    assert found.dtype == torch.float32
    # the products of half types are exact; each of D float32 sums rounds by 2⁻²⁴ of what is summed
    assert ((found - (a * b).sum(-1)).abs() <= (D + 1) * 2**-24 * (a * b).abs().sum(-1)).all()


@every_dtype
def test_logits_of_ten_thousand_cost_the_rounding_of_the_scores(dtype):
    q, k, v, g = inputs(1, 65, 64, dtype)
    q, k, scale = 60 * q, 60 * k, 1 / 8
    # A product, sum or lse in float32 of up to S is off by S 2⁻²⁴, and exp(S − lse) by that much in relation.
    largest = (scale * q.abs().double() @ k.abs().double().mT).max().item()
    lse, expected, magnitudes = materialized(q, k, v, g, torch.zeros(1, device=DEVICE), scale)
    gradients = dict(zip(("dq", "dk", "dv"), diagonal_backward(g, q, k, v, lse.float(), scale), strict=True))
    check(gradients, expected, magnitudes, TOLERANCE[dtype] + 2 * largest * 2**-24, dtype)


@every_dtype
def test_rows_that_attend_to_nothing_have_no_gradient(dtype):
    q, k, v, g = inputs(1, 5, 16, dtype)
    q, k = torch.full_like(q, 50), torch.full_like(k, -50)  # every logit is −1e4
    lse, _, _ = materialized(q, k, v, g, torch.zeros(1, device=DEVICE), 0.25)
    for gradient in (*diagonal_backward(g, q, k, v, lse.float(), 0.25), value_gradient(g, q, k, lse.float(), 0.25)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_minus_p_keeps_its_digits_where_p_tends_to_1(dtype):
    """All scores are 0, so P = exp(−lse) in a whole row: from 1 − 10⁻⁷ to nothing. All numbers are positive."""
    T, D = 64, 16
    _, k, v, g = (x.abs() for x in inputs(1, T, D, dtype))
    lse = torch.logspace(-7, 1, T, device=DEVICE).view(1, 1, T)
    dq, _, _ = diagonal_backward(g, torch.zeros_like(k), k, v, lse, 1.0)
    weight = torch.exp(-lse.double()) * -torch.expm1(-lse.double())
    exact = weight.unsqueeze(-1) * (g.double() @ v.double().mT).tril() @ k.double()
    # 2⁻²⁰ for 1 − P, exp and sums of positive terms; bfloat16 rounds dS and dQ by 2⁻⁸ each, and 1 − P is off by 2⁻¹⁴.
    tolerance = 2**-20 if dtype == torch.float32 else 2 * 2**-8 + 2**-13
    assert ((dq - exact).abs() / exact).max() < tolerance


def test_any_layout_gives_the_same_gradients():
    q, k, v, g = inputs(2, 17, 16, torch.float32, B=2)
    lse = torch.full((2, 2, 32), 3.0, device=DEVICE)[:, :, :17]  # padded, as efficient attention's
    expected = diagonal_backward(*(x.contiguous() for x in (g, q, k, v, lse)), 0.25)
    turned = [x.mT.contiguous().mT for x in (g, q, k, v)]
    for layout in ((g, q, k, v), turned):
        assert all(map(torch.equal, diagonal_backward(*layout, lse, 0.25), expected))
    ones = torch.ones((), device=DEVICE).expand_as(g)  # what sum().backward() sends
    assert torch.equal(value_gradient(ones, q, k, lse, 0.25), value_gradient(ones.contiguous(), q, k, lse, 0.25))


def test_nan_is_not_hidden():
    q, k, v, g = (x.contiguous() for x in inputs(1, 2, 16, torch.float32))
    q[0, 0, 1, 0] = math.nan
    dq, dk, dv = diagonal_backward(g, q, k, v, torch.zeros(1, 1, 2, device=DEVICE), 0.25)
    assert dq[0, 0, 1].isnan().all()
    assert dk.isnan().any()
    assert dv.isnan().any()
    assert dq[0, 0, 0].isfinite().all()


def test_operators_keep_what_pytorch_asks_of_them():
    q, k, v, g = inputs(2, 2, 16, torch.float32, H_kv=1)
    lse = torch.full((1, 2, 2), 2.0, device=DEVICE)
    torch.library.opcheck(score_backward, (g, q, k, v, lse, 0.25, "ste"))
    torch.library.opcheck(value_gradient, (g, q, k, lse, 0.25))
    torch.library.opcheck(row_products, (g, q))


# --- in attention ---------------------------------------------------------------------------------------------------


@pytest.fixture
def flash(monkeypatch):
    """What `attention` does on a GPU in half types; without one, with the CPU's flash kernel in place of CUDA's."""
    calls = []
    for name in ("kernel_forward", "kernel_backward"):
        kernel = getattr(fused, name)

        def counted(backend, *arguments, name=name, kernel=kernel):
            calls.append(name)
            return kernel("cpu_flash" if DEVICE == "cpu" else backend, *arguments)

        monkeypatch.setattr(fused, name, counted)
    with use_backend("cuda_flash"):
        yield calls


def attention_gradients(q, k, v, g, sink, backward, function=attention):
    q, k, v, sink = (x.detach().requires_grad_() for x in (q, k, v, sink))
    out = function(q, k, v, normalizer="sink", null_logit=sink, backward=backward)
    return torch.autograd.grad(out, (q, k, v, sink), g)


@pytest.mark.parametrize("backward", ["diagonal", "ste"])
def test_attention_takes_one_pass_unless_it_is_switched_off(backward, flash, monkeypatch):
    q, k, v, g = inputs(2, 33, 16, torch.float16)
    sink = torch.tensor([-1.0, 0.5], device=DEVICE)
    gradients = {}
    for setting, calls in (("1", 0), ("0", 2 if backward == "diagonal" else 1)):
        flash.clear()
        monkeypatch.setenv("OFFBYONE_TRITON", setting)
        gradients[setting] = attention_gradients(q, k, v, g, sink, backward)
        assert flash.count("kernel_backward") == calls
    with materialized_attention():
        expected = attention_gradients(*(x.double() for x in (q, k, v, g, sink)), backward)
    for one_pass, two_calls, exact in zip(gradients["1"], gradients["0"], expected, strict=True):
        # Half rounds P or dS and the result, here and there; the two calls of diagonal each their own.
        assert (one_pass - exact).norm() < 4 * 2**-11 * exact.norm()
        assert (one_pass - two_calls).norm() < 8 * 2**-11 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backward", ["full", "diagonal", "ste"])
@pytest.mark.parametrize("H_kv", [1, 2, 4])
def test_attention_of_a_group_is_that_of_repeated_keys(H_kv, backward, dtype, flash):
    q, k, v, g = inputs(4, 33, 16, dtype, H_kv=H_kv)
    sink = torch.tensor([-1.0, 0.5, 0.0, 2.0], device=DEVICE)
    gradients = attention_gradients(q, k, v, g, sink, backward)
    with materialized_attention():
        expected = attention_gradients(*(x.double() for x in (q, k, v, g, sink)), backward)
    for found, exact in zip(gradients, expected, strict=True):
        assert found.shape == exact.shape
        assert (found - exact).norm() < 2 * TOLERANCE[dtype] * exact.norm()  # P or dS and the result are rounded


def test_a_sinks_full_gradient_is_summed_in_float32(flash, monkeypatch):
    q, k, v, g = inputs(2, 33, 16, torch.bfloat16)
    sink = torch.tensor([-1.0, 0.5], device=DEVICE)
    *_, found = attention_gradients(q, k, v, g, sink, "full")
    monkeypatch.setenv("OFFBYONE_TRITON", "0")
    *_, expected = attention_gradients(q, k, v, g, sink, "full")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # the same output of the kernel, in bfloat16


@pytest.mark.parametrize("backward", ["diagonal", "ste"])
def test_the_limits_of_the_null_logit_are_softmax_and_nothing(backward, flash):
    """As in tests/test_attention.py, in one pass."""
    q, k, v, g = inputs(2, 33, 16, torch.bfloat16)
    found = attention_gradients(q, k, v, g, torch.tensor([-math.inf, math.inf], device=DEVICE), backward)
    softmax = attention_gradients(q, k, v, g, torch.full((2,), -1e4, device=DEVICE), backward)
    for i, (x, least) in enumerate(zip(found[:3], softmax[:3], strict=True)):
        assert torch.equal(x[:, 0], least[:, 0])
        assert torch.equal(x[:, 1], least[:, 1] if backward == "ste" and i < 2 else torch.zeros_like(x[:, 1]))
    assert torch.equal(found[3], torch.zeros_like(found[3]))


@pytest.mark.parametrize("backward", ["diagonal", "ste"])
def test_one_graph_under_torch_compile(backward, flash):
    torch.compiler.reset()  # what was compiled before counts towards a limit of recompilations
    arguments = (*inputs(2, 17, 16, torch.float16), torch.zeros(2, device=DEVICE), backward)
    eager = attention_gradients(*arguments)
    compiled = attention_gradients(*arguments, torch.compile(attention, fullgraph=True, backend="aot_eager"))
    assert all(map(torch.equal, compiled, eager))


def test_what_one_pass_is_for(monkeypatch):
    monkeypatch.delenv("OFFBYONE_TRITON", raising=False)
    assert backends.TRITON
    assert backends.one_pass("cuda_flash", 128, 0.0)
    assert not backends.one_pass("cuda_flash", 136, 0.0)
    assert not backends.one_pass("cuda_flash", 64, 0.1)
    assert backends.one_pass("cuda_cudnn", 64, 0.0)
    assert not backends.one_pass("cuda_efficient", 64, 0.0)
    assert not backends.with_triton("cuda_efficient")  # also that of cards older than Triton's
    assert backends.with_triton("cuda_flash")
    monkeypatch.setattr(backends, "TRITON", False)
    assert not backends.one_pass("cuda_flash", 64, 0.0)


def test_straight_through_rows_beyond_float16_stay_finite(flash):
    """Its dS is dP itself, which a scaled loss takes beyond 65,504, where dQ and dK may still be within it."""
    q, k, v, g = inputs(1, 33, 16, torch.float16)
    q, k = q / 4096, k / 4096
    v, g = v.abs() * 100, g.abs() * 100  # dP is a sum of 16 products of some 6,400: beyond 65,504
    assert (g.double() @ v.double().mT).tril().max() > torch.finfo(torch.float16).max
    sink = torch.zeros(1, device=DEVICE)
    gradients = attention_gradients(q, k, v, g, sink, "ste")
    with materialized_attention():
        expected = attention_gradients(*(x.double() for x in (q, k, v, g, sink)), "ste")
    for found, right in zip(gradients[:2], expected[:2], strict=True):
        assert found.isfinite().all()
        assert (found - right).norm() < 4 * 2**-11 * right.norm()
