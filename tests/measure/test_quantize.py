"""Rounding by hand, and the sites by a forward pass written out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from measure.quantize import (
    HEAD,
    KINDS,
    PROBABILITIES,
    RESIDUAL,
    Scheme,
    calibrate,
    quantize_per_token,
    quantize_range,
    quantize_weight,
    quantized,
    schemes,
    signal_to_noise,
    sites,
    visiting,
)
from model import GPT, attention_rows, rotate, rotation
from tests.helpers import TODAY, tiny_gpt

T, V = 16, 256
IDX = torch.randint(V, (5, T), generator=torch.Generator().manual_seed(0))


def random_gpt(**changes) -> GPT:
    """Weights large enough for confident predictions."""
    return tiny_gpt(std=0.4, block_size=T, vocab_size=V, n_embd=16, **changes)


# --- rounding ---------------------------------------------------------------------------------------------------------


def test_weights_per_channel():
    weight = torch.tensor([[127, 0.5, 1.5, -2.5, 126.4], [-63.5, 0.25, 0.3, -0.75, 0]])  # scales 1 and ½, ties to even
    expected = torch.tensor([[127, 0, 2, -2, 126], [-63.5, 0, 0.5, -1, 0]])
    assert torch.equal(quantize_weight(weight, 8, per_channel=True), expected)
    weight = torch.tensor([[7, 3.4, -2.5], [-14, 1, 3.1]])  # scales 1 and 2
    assert torch.equal(quantize_weight(weight, 4, per_channel=True), torch.tensor([[7, 3, -2], [-14, 0, 4.0]]))


def test_weights_per_tensor():
    weight = torch.tensor([[7, 3.4, -2.5], [-14, 1, 3.1]])  # scale 2
    assert torch.equal(quantize_weight(weight, 4, per_channel=False), torch.tensor([[8, 4, -2], [-14, 0, 4.0]]))


def test_a_range_of_both_signs_and_what_lies_outside():
    x = torch.tensor([-9, -1.2, -0.4, 0, 0.6, 1.7, 9])
    rounded = quantize_range(x, torch.tensor(-1.0), torch.tensor(2.0), bits=2)  # the points −1, 0, 1, 2
    assert rounded.tolist() == [-1, -1, 0, 0, 1, 2, 2]


def test_a_range_on_one_side_is_widened_to_hold_zero():
    up, down = torch.tensor([2.0, 3, 0.4]), torch.tensor([-2.0, -3, -0.4])
    assert quantize_range(up, torch.tensor(2.0), torch.tensor(3.0), bits=2).tolist() == [2, 3, 0]  # 0, 1, 2, 3
    assert quantize_range(down, torch.tensor(-3.0), torch.tensor(-2.0), bits=2).tolist() == [-2, -3, 0]


def test_a_range_that_zero_does_not_divide_evenly_is_moved():
    # scale (1 + 2)/3 = 1, −low/scale = 1.25 → zero point 1: the points −1 … 2 for the range −1.25 … 1.75
    rounded = quantize_range(torch.tensor([-1.25, 0, 1.75]), torch.tensor(-1.25), torch.tensor(1.75), bits=2)
    assert rounded.tolist() == [-1, 0, 2]


def test_each_token_has_its_own_grid():
    x = torch.tensor([[0, 1, 2, 3], [0, 14, 26, 30], [-3, 0, 0, 0], [-1, 0.4, 1.6, 2], [0, 0, 0, 0]])
    expected = torch.tensor([[0, 1, 2, 3], [0, 10, 30, 30], [-3, 0, 0, 0], [-1, 0, 2, 2], [0, 0, 0, 0.0]])
    # 30 is 3 · 10.000001: the scale is a float32
    torch.testing.assert_close(quantize_per_token(x.view(1, 5, 4), bits=2), expected.view(1, 5, 4), rtol=2**-22, atol=0)


@pytest.mark.parametrize("value", [3.0, -0.7, 0.0, 1e-30, 1e-42, 3e38])
def test_constant_tensors_keep_their_value(value):
    x = torch.full((3, 4), value)
    expected = x if abs(value) > 1e-38 else torch.zeros(3, 4)  # below the smallest normal number nothing is left
    for rounded in (
        quantize_weight(x, 8, per_channel=True),
        quantize_weight(x, 8, per_channel=False),
        quantize_range(x, x.min(), x.max(), 8),
        quantize_per_token(x, 8),
    ):
        torch.testing.assert_close(rounded, expected, rtol=2**-21, atol=1e-38)


@given(
    low=st.floats(-1e6, 1e6, width=32),
    width=st.floats(0, 1e6, width=32),
    bits=st.sampled_from([4, 6, 8]),
    seed=st.integers(0, 99),
)
def test_errors_are_half_a_step_and_zero_has_none(low, width, bits, seed):
    low, high = torch.tensor(low), torch.tensor(low) + torch.tensor(width)
    x = low + torch.rand(50, generator=torch.Generator().manual_seed(seed)) * (high - low)
    x = torch.cat((x, torch.zeros(1))).clamp(low.clamp(max=0), high.clamp(min=0))
    step = (max(high.item(), 0) - min(low.item(), 0)) / (2**bits - 1)
    rounded = quantize_range(x, low, high, bits)
    assert rounded[-1] == 0
    # half a step, twice that at the ends where the grid was moved to hold 0, and float32's rounding of x / scale
    assert (rounded - x).abs().max() <= step * (1 + 2**-14) + 1e-30
    inside = (x >= low + step) & (x <= high - step)
    assert not inside.any() or (rounded - x)[inside].abs().max() <= step * (0.5 + 2**-14) + 1e-30


def test_noise_of_fine_grids_is_uniform():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    step = (x.max() - x.min()) / 255
    noise = (quantize_range(x, x.min(), x.max(), 8) - x).double().square().mean()
    # Bennett 1948: step²/12. Squares of uniform noise spread by 0.9 of their mean: a mean of 1e5 by 0.3 %.
    assert noise == pytest.approx(float(step) ** 2 / 12, rel=5 * 0.003)


# --- sites ------------------------------------------------------------------------------------------------------------


def written_out(model: GPT, idx: torch.Tensor, weight, activation) -> torch.Tensor:
    """The forward pass with `weight(linear)` in place of each linear layer's and `activation(kind, x)` at each site."""
    t = model.transformer

    def linear(layer, kind, x):
        return F.linear(activation(kind, x), weight(layer), layer.bias)

    x = t.wte(idx) + (t.wpe.weight[: idx.size(1)] if "wpe" in t else 0)
    x = activation(RESIDUAL, x)
    for block in t.h:
        q, k, v = (
            z.unflatten(-1, (-1, block.attn.head_dim)).transpose(1, 2)
            for z in linear(block.attn.c_attn, "attn.c_attn input", block.ln_1(x)).split(block.attn.sizes, dim=-1)
        )
        q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        if "wpe" not in t:
            turns = rotation(model.config, 0, idx.size(1), like=x)
            q, k = rotate(q, *turns), rotate(k, *turns)
        P = attention_rows(q, k, **block.attn.arguments())[0]
        v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
        y = (activation(PROBABILITIES, P) @ v).transpose(1, 2).flatten(2)
        attended = x + linear(block.attn.c_proj, "attn.c_proj input", y)
        normed = block.ln_2(x if block.parallel_residual else attended)
        y = linear(block.mlp.c_fc, "mlp.c_fc input", normed)
        if block.mlp.c_gate is None:
            y = block.mlp.gelu(y)
        else:
            y = F.silu(linear(block.mlp.c_gate, "mlp.c_fc input", normed)) * y
        x = activation(RESIDUAL, attended + linear(block.mlp.c_proj, "mlp.c_proj input", y))
    return linear(model.lm_head, HEAD, t.ln_f(x))


SHAPES = {"softmax": {}, "softmax1": {}, "sink": {}, "today": TODAY, "parallel": TODAY | {"parallel_residual": True}}


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_quantized_model_is_the_forward_pass_written_out(shape):
    normalizer = {"normalizer": shape} if shape in ("softmax1", "sink") else {}
    model = random_gpt(**SHAPES[shape] | normalizer).double()  # sums in another order then round to the same points
    scheme = Scheme("", 6, False, 6, "per token", (*KINDS, HEAD))
    expected = written_out(
        model, IDX, lambda m: quantize_weight(m.weight, 6, False), lambda _, x: quantize_per_token(x, 6)
    )
    with quantized(model, scheme, {}, head=True):
        logits = model(IDX)[0]
    plain = written_out(model, IDX, lambda m: m.weight, lambda _, x: x)
    torch.testing.assert_close(logits, expected)
    assert (logits - plain).abs().max() > 0.1


@pytest.mark.parametrize("shape", [{}, TODAY], ids=["GPT-2", "today"])
@pytest.mark.parametrize("kind", [*KINDS, HEAD])
@torch.no_grad()
def test_each_kind_of_site_alone(kind, shape):
    model = random_gpt(**shape).double()
    expected = written_out(model, IDX, lambda m: m.weight, lambda k, x: quantize_per_token(x, 6) if k == kind else x)
    with quantized(model, Scheme("", activation_bits=6, activations="per token", kinds=(kind,)), {}, head=True):
        torch.testing.assert_close(model(IDX)[0], expected)


@pytest.mark.parametrize("how", ["min-max", "percentile"])
@torch.no_grad()
def test_static_ranges_are_those_of_the_site(how):
    model = random_gpt().double()
    scheme = Scheme("", None, False, 6, how, ("mlp.c_proj input", PROBABILITIES))
    hidden = []

    def activation(kind, x):
        if kind == PROBABILITIES:
            return quantize_range(x, torch.tensor(0.0), torch.tensor(1.0), 6)
        if kind != "mlp.c_proj input":
            return x
        found = ranges[f"h.{len(hidden)}.mlp.c_proj"]
        low, high = (found.low, found.high) if how == "min-max" else (found.percentile_low, found.percentile_high)
        assert low < found.percentile_high < found.high  # so that the other's would not do
        hidden.append(x)
        return quantize_range(x, low, high, 6)

    ranges = calibrate(model, IDX, 2, 99.0)
    expected = written_out(model, IDX, lambda m: m.weight, activation)
    with quantized(model, scheme, ranges):
        torch.testing.assert_close(model(IDX)[0], expected)


def test_without_head_the_head_stays():
    model = random_gpt()
    for scheme in schemes(head=False):
        assert HEAD not in scheme.kinds
        with quantized(model, scheme, calibrate(model, IDX, 5, 99.9)):
            assert model.lm_head.weight is model.transformer.wte.weight
    assert len(sites(model)) == 1 + 2 * 6
    assert [site.name for site in sites(model, head=True)][-1] == "lm_head"


@torch.no_grad()
def test_with_head_the_embedding_stays():
    model = random_gpt()
    with quantized(model, Scheme("", 4, True, kinds=()), {}, head=True):
        assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    assert model.lm_head.weight is model.transformer.wte.weight


@torch.no_grad()
def test_the_model_is_left_as_it_was():
    model = random_gpt(normalizer="softmax1")
    before, parameters = model(IDX)[0], dict(model.named_parameters())
    ranges = calibrate(model, IDX, 2, 99.9, head=True)
    for scheme in schemes(head=True):
        with quantized(model, scheme, ranges, head=True):
            assert not torch.equal(model(IDX)[0], before)
    signal_to_noise(model, [IDX], schemes(head=True), ranges, head=True)
    with pytest.raises(ZeroDivisionError), quantized(model, schemes()[2], ranges):
        1 / 0  # noqa: B018
    assert torch.equal(model(IDX)[0], before)
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter and parameter.requires_grad for name, parameter in parameters.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@torch.no_grad()
def test_calibrated_ranges_are_order_statistics(batch_size):
    model, seen = random_gpt(), {}
    handle = model.transformer.h[1].mlp.c_proj.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    model(IDX)
    handle.remove()
    x = np.sort(seen["x"].numpy().reshape(-1))
    found = calibrate(model, IDX, batch_size, 99.0)["h.1.mlp.c_proj"]
    cut = round(0.01 * x.size)
    assert cut == 51  # of 5 · 16 · 64 values
    # float32 products of other batch shapes
    np.testing.assert_allclose([float(z) for z in found], [x[0], x[-1], x[cut], x[-1 - cut]], rtol=1e-4)


@torch.no_grad()
def test_signal_to_noise_ratio_of_each_site():
    model = random_gpt()
    compared = [Scheme("weights", 4, True), Scheme("tokens", 8, False, 8, "per token")]
    rows = {row["name"]: row for row in signal_to_noise(model, IDX.split(2), compared, {})}
    assert list(rows) == [site.name for site in sites(model)]
    seen = {}

    def keep(site, x, then):
        seen[site.name] = x, then(x), then
        return x

    with visiting(sites(model), keep):
        model(IDX)
    fc, norm = model.transformer.h[1].mlp.c_fc, model.transformer.ln_f

    def decibels(y, y_q):
        return 10 * float(torch.log10(y.double().square().sum() / (y_q - y).double().square().sum()))

    x, y, _ = seen["h.1.mlp.c_fc"]
    assert torch.equal(y, F.linear(x, fc.weight, fc.bias))
    expected = decibels(y, F.linear(x, quantize_weight(fc.weight, 4, True), fc.bias))
    assert rows["h.1.mlp.c_fc"]["weights"] == pytest.approx(expected, abs=1e-3)
    y_q = F.linear(quantize_per_token(x, 8), quantize_weight(fc.weight, 8, False), fc.bias)
    assert rows["h.1.mlp.c_fc"]["tokens"] == pytest.approx(decibels(y, y_q), abs=1e-3)
    x, y, _ = seen["residual after h.1"]
    assert torch.equal(y, norm(x))
    assert rows["residual after h.1"]["tokens"] == pytest.approx(decibels(y, norm(quantize_per_token(x, 8))), abs=1e-3)
    assert rows["residual after h.1"]["weights"] is None
    P, y, times_v = seen["h.0.attn probabilities"]
    assert (P.shape, y.shape) == ((5, 2, T, T), (5, 2, T, 8))
    expected = decibels(y, times_v(quantize_per_token(P, 8)))
    assert rows["h.0.attn probabilities"]["tokens"] == pytest.approx(expected, abs=1e-3)


# --- the command ------------------------------------------------------------------------------------------------------
