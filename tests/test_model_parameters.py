"""The GPT's parameters: nanoGPT's names and sizes, GPT-2's initial weights, which decay, and how many there are."""

import math
from dataclasses import replace

import pytest
import torch

from harness.optimizers import parameter_groups
from model import GPT, NORMALIZERS, GPTConfig
from tests.helpers import TELLING, tokens

WEIGHTS = {
    "transformer.wte.weight": (17, 8),
    "transformer.wpe.weight": (12, 8),
    "transformer.h.0.ln_1.weight": (8,),
    "transformer.h.0.attn.c_attn.weight": (24, 8),
    "transformer.h.0.attn.c_proj.weight": (8, 8),
    "transformer.h.0.ln_2.weight": (8,),
    "transformer.h.0.mlp.c_fc.weight": (32, 8),
    "transformer.h.0.mlp.c_proj.weight": (8, 32),
    "transformer.ln_f.weight": (8,),
    "lm_head.weight": (17, 8),
}
BIASES = {
    "transformer.h.0.ln_1.bias": (8,),
    "transformer.h.0.attn.c_attn.bias": (24,),
    "transformer.h.0.attn.c_proj.bias": (8,),
    "transformer.h.0.ln_2.bias": (8,),
    "transformer.h.0.mlp.c_fc.bias": (32,),
    "transformer.h.0.mlp.c_proj.bias": (8,),
    "transformer.ln_f.bias": (8,),
}


LEARNED = {
    "sink": {"transformer.h.0.attn.sink": (2,)},
    "kbias": {"transformer.h.0.attn.null_key": (2, 4)},
    "kvbias": {"transformer.h.0.attn.null_key": (2, 4), "transformer.h.0.attn.null_value": (2, 4)},
    "ssmax": {"transformer.h.0.attn.ssmax_scale": (2,)},
}


GATES = {"none": {}, "head": {"transformer.h.0.attn.c_gate.weight": (2, 8)}}
GATES["element"] = {"transformer.h.0.attn.c_gate.weight": (8, 8)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_state_dict_has_nanogpts_names_and_shapes(bias, normalizer, gate):
    model = GPT(replace(TELLING, n_layer=1, bias=bias, normalizer=normalizer, gate=gate))
    expected = WEIGHTS | (BIASES if bias else {}) | LEARNED.get(normalizer, {}) | GATES[gate]
    if bias and gate != "none":
        expected["transformer.h.0.attn.c_gate.bias"] = GATES[gate]["transformer.h.0.attn.c_gate.weight"][:1]
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("start", "normalizer", "sink_init"),
    [("softmax1", "sink", 0), ("softmax1", "kbias", 0), ("softmax1", "kvbias", 0), ("softmax", "sink", -200)],
)
def test_what_a_normalizer_learns_starts_as_another_and_does_not_decay(start, normalizer, sink_init):
    torch.manual_seed(0)
    known = GPT(replace(TELLING, normalizer=start))
    model = GPT(replace(TELLING, normalizer=normalizer, sink_init=float(sink_init)))
    model.load_state_dict(known.state_dict(), strict=False)
    idx = tokens(2, 12)
    torch.testing.assert_close(model(idx)[0], known(idx)[0], rtol=0, atol=1e-6)  # of numbers below 1
    model(idx, idx)[1].backward()
    learned = model.normalizer_parameters().values()
    assert len(learned) == 2 * len(LEARNED[normalizer])
    decayed, free = (group["params"] for group in parameter_groups(model, 0.1))
    for parameter in learned:
        assert start == "softmax" or parameter.grad.abs().max() > 0
        assert any(p is parameter for p in free)
        assert not any(p is parameter for p in decayed)


def test_embedding_and_head_are_one_tensor():
    model = GPT(TELLING)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len([p for p in model.parameters() if p.shape == (17, 8)]) == 1


def test_initial_weights_are_gpt2s():
    model = GPT(GPTConfig(block_size=64, vocab_size=100, n_layer=3, n_head=2, n_embd=64))
    for name, p in model.named_parameters():
        if "ln_" in name and name.endswith("weight"):
            assert (p == 1).all()
        elif p.dim() == 1:
            assert (p == 0).all()
        else:
            std = 0.02 / math.sqrt(2 * 3) if name.endswith("c_proj.weight") else 0.02
            # The standard error of σ from n Gaussians is σ/√(2n), of the mean σ/√n: six of them are never seen.
            assert p.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * p.numel())), name
            assert abs(p.mean().item()) < 6 * std / math.sqrt(p.numel()), name


def test_matrices_decay_and_vectors_do_not():
    model = GPT(TELLING)
    decayed, others = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in others["params"])
    grouped = [id(p) for p in (*decayed["params"], *others["params"])]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())  # each once


def test_flops_per_token_is_the_count_by_hand():
    model = GPT(GPTConfig(block_size=6, vocab_size=10, n_layer=2, n_head=2, n_embd=8, bias=False))
    block = 8 + 3 * 8 * 8 + 8 * 8 + 8 + 4 * 8 * 8 + 4 * 8 * 8  # ln_1, c_attn, c_proj, ln_2, c_fc, c_proj
    weights = 10 * 8 + 2 * block + 8  # the tied table once, as the head; ln_f
    assert model.num_parameters() == weights == 1656
    # 6 a weight; in each layer QKᵀ and PV are 2 · 2TC forward and twice that backward
    assert model.flops_per_token() == 6 * weights + 2 * 3 * (2 * 2 * 6 * 8) == 11088


def test_the_counts_follow_what_the_model_is_made_of():
    """A head of its own makes the token table one of look-ups, a model without a position table has none to leave out,
    and a layer more or less counts."""
    model = GPT(GPTConfig(block_size=6, vocab_size=10, n_layer=2, n_head=2, n_embd=8, bias=False))
    weights, flops = model.num_parameters(), model.flops_per_token()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(10, 8))
    assert (model.num_parameters(), model.flops_per_token()) == (weights, flops)
    del model.transformer.wpe
    assert (model.num_parameters(), model.flops_per_token()) == (weights, flops)
    block = sum(p.numel() for p in model.transformer.h[1].parameters())
    del model.transformer.h[1]
    assert model.num_parameters() == weights - block
    assert model.flops_per_token() == flops - 6 * block - 3 * (2 * 2 * 6 * 8)
