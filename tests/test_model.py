"""The GPT: its logits, its loss, a shorter context, and nanoGPT's own checkpoints."""

import itertools
import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from harness.checkpoint import load_model
from harness.optimizers import parameter_groups
from harness.resuming import crop_block_size
from kernels.backends import materialized_attention
from measure.jacobian import jacobian_energy
from model import GPT, NORMALIZERS, Backward, GPTConfig, attention
from tests.helpers import TELLING, every_attention, random_ids, shakespeares_nanogpt, telling_gpt, tokens

# --- logits and loss ------------------------------------------------------------------------------------------------


def test_logits_are_for_every_position_with_and_without_targets():
    model, idx = telling_gpt(), tokens(3, 7)
    logits, loss = model(idx)
    assert logits.shape == (3, 7, 17)
    assert loss is None
    with_targets, loss = model(idx, tokens(3, 7))
    assert torch.equal(with_targets, logits)
    assert loss.shape == ()


def test_loss_is_the_mean_over_targets_leaving_out_minus_1():
    model, idx = telling_gpt(), tokens(3, 7)
    targets = tokens(3, 7).flip(1).clone()
    targets[0, 2:], targets[2] = -1, -1
    logits, loss = model(idx, targets)
    terms = [
        torch.logsumexp(logits[b, t], 0) - logits[b, t, targets[b, t]]
        for b in range(3)
        for t in range(7)
        if targets[b, t] != -1
    ]
    assert len(terms) == 2 + 7
    # A few roundings of float32, of logits up to 20
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=0, atol=20 * 10 * torch.finfo(torch.float32).eps)


def test_the_loss_of_a_float64_model_is_float64():
    model = telling_gpt().double()
    logits, loss = model(tokens(3, 7), tokens(3, 7).flip(1))
    expected = F.cross_entropy(logits.flatten(0, 1), tokens(3, 7).flip(1).flatten())
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected)


def hessian_vector_product(model: GPT, idx: torch.Tensor, vectors: list[torch.Tensor]) -> torch.Tensor:
    """∂(g·v)/∂parameters of the loss's gradient g, all in one row."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model(idx, idx.roll(-1, 1))[1], parameters, create_graph=True)
    product = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))
    return torch.cat([x.flatten() for x in torch.autograd.grad(product, parameters)])


@every_attention
def test_a_product_with_the_hessian_is_exact(normalizer, backward):
    model = telling_gpt(replace(TELLING, normalizer=normalizer, backward=backward)).double()
    idx = tokens(3, 12)
    vectors = [torch.randn_like(p) for p in model.parameters()]
    with materialized_attention():
        readable = hessian_vector_product(model, idx, vectors)
    for dtype, digits in ((torch.float64, 1e-13), (torch.float32, 1e-4)):
        fused = hessian_vector_product(model.to(dtype), idx, [v.to(dtype) for v in vectors])
        assert (fused - readable).norm() <= digits * readable.norm(), dtype
    if backward == "full":  # of the others, what flows back through the forward pass is not its derivative
        model.double()
        h, gradients = 1e-6, []
        for step in (h, -2 * h):
            with torch.no_grad():
                torch._foreach_add_(list(model.parameters()), vectors, alpha=step)
            model.zero_grad()
            model(idx, idx.roll(-1, 1))[1].backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        difference = (gradients[0] - gradients[1]) / (2 * h)
        assert (difference - readable).norm() <= 1e-6 * readable.norm()  # h² times fourth derivatives, and ε/h


@every_attention
def test_logits_depend_on_no_later_token_and_on_no_other_sequence(normalizer, backward):
    model = telling_gpt(replace(TELLING, normalizer=normalizer, backward=backward)).double()
    idx = tokens(2, 9)
    changed = idx.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 17
    with torch.no_grad():
        before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(after[0, :5], before[0, :5])
    torch.testing.assert_close(after[1], before[1])
    assert (after[0, 5:] - before[0, 5:]).abs().amin() > 0


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"normalizer": "softmax_n", "softmax_n": 0.0}, {}),
        ({"normalizer": "softmax_n", "softmax_n": 1.0}, {"normalizer": "softmax1"}),
        ({"normalizer": "clipped", "clipped_alpha": 0.0}, {}),
        ({"normalizer": "clipped", "clipped_alpha": 1e-9, "clipped_by": "row"}, {}),
        ({"gate": "head", "gate_init": 1 - 1e-9}, {}),
        ({"gate": "element", "gate_init": 1 - 1e-9, "normalizer": "relu"}, {"normalizer": "relu"}),
    ],
    ids=str,
)
def test_a_limit_of_one_mechanism_is_another(options, limit):
    torch.manual_seed(0)
    known = GPT(replace(TELLING, **limit)).double()
    model = GPT(replace(TELLING, **options)).double()
    model.load_state_dict(known.state_dict(), strict=False)
    idx = tokens(2, 12)
    torch.testing.assert_close(model(idx)[0], known(idx)[0], rtol=0, atol=1e-7)  # gates: 1e-9, and W x of some .1


def test_ssmax_is_softmax_where_its_scale_cancels_the_logarithm():
    known = telling_gpt().double()
    torch.manual_seed(0)
    model = GPT(replace(TELLING, normalizer="ssmax")).double()
    model.load_state_dict(known.state_dict(), strict=False)
    block = model.transformer.h[0]
    assert torch.equal(block.attn.ssmax_scale, torch.full((2,), 1 / math.log(12)).double())  # 1 / log T by default
    features = model.transformer.wte(tokens(2, 12)) + model.transformer.wpe.weight
    outs = [m.transformer.h[0].attn(m.transformer.h[0].ln_1(features)) for m in (model, known)]
    torch.testing.assert_close(outs[0][:, 11], outs[1][:, 11])  # the last query sees 12 keys
    torch.testing.assert_close(outs[0][:, 0], outs[1][:, 0])  # the first sees one, whatever its score
    assert (outs[0] - outs[1])[:, 1:11].abs().amax(-1).min() > 1e-6


def test_the_constants_of_a_normalizer_are_those_of_the_context():
    """Bondarenko et al.'s α = 4, γ = −α/T; Ramapuram et al.'s b = −log T; the call alone takes T from its keys."""
    q, k, v = torch.randn(3, 1, 2, 64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for normalizer, literal in {
        "clipped": {"alpha": 4.0, "context": 64},
        "sigmoid": {"bias": -math.log(64)},
        "softmax_n": {"null_logit": 0.0},
    }.items():
        attn = GPT(replace(TELLING, block_size=64, normalizer=normalizer)).transformer.h[0].attn
        assert attn.constants == pytest.approx(literal)
        bare = attention(q, k, v, normalizer=normalizer)
        torch.testing.assert_close(bare, attention(q, k, v, normalizer=normalizer, **literal))
        split = (jacobian_energy(q, k, v, v, normalizer, **more) for more in ({}, literal))
        for a, b in zip(*(x.values() for x in split), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
    by_row = GPT(replace(TELLING, normalizer="clipped", clipped_by="row", clipped_alpha=2.0)).transformer.h[0].attn
    assert by_row.constants == {"alpha": 2.0, "context": 0}


@pytest.mark.parametrize("gate", ["head", "element"])
@pytest.mark.parametrize("pi", [None, 0.25])
def test_a_gate_multiplies_what_each_head_reads(gate, pi):
    model = telling_gpt(replace(TELLING, gate=gate, gate_init=pi, bias=False, n_layer=1)).double()
    attn = model.transformer.h[0].attn
    if pi is not None:
        torch.testing.assert_close(attn.c_gate.bias.sigmoid(), torch.full_like(attn.c_gate.bias, pi))
    x = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = []
    attn.core.register_forward_hook(lambda _core, _qkv, out: seen.append(out))
    out = attn(x)
    opening = torch.sigmoid(x @ attn.c_gate.weight.T + (0 if pi is None else attn.c_gate.bias))  # (2, 12, 2 or 8)
    opening = opening.repeat_interleave(4, -1) if gate == "head" else opening
    expected = opening * seen[0].transpose(1, 2).flatten(2) @ attn.c_proj.weight.T
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_logits_do_not_depend_on_the_backward(normalizer):
    idx = tokens(2, 9)
    full, *others = (
        telling_gpt(replace(TELLING, normalizer=normalizer, backward=backward)).double()(idx)[0]
        for backward in get_args(Backward)
    )
    for other in others:
        torch.testing.assert_close(other, full)


def test_padding_the_vocabulary_leaves_the_other_logits_alone():
    model = telling_gpt()
    padded = GPT(replace(TELLING, vocab_size=32)).eval()
    state = model.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = F.pad(state[name], (0, 0, 0, 32 - 17))
    padded.load_state_dict(state)
    logits = padded(tokens(2, 5))[0]
    assert logits.shape == (2, 5, 32)
    torch.testing.assert_close(logits[..., :17], model(tokens(2, 5))[0])
    assert (logits[..., 17:] == 0).all()


def test_the_activation_is_the_one_chosen():
    idx = tokens(2, 9)
    tanh, exact = (telling_gpt(replace(TELLING, activation=a)) for a in ("gelu_tanh", "gelu"))
    assert not torch.equal(tanh(idx)[0], exact(idx)[0])
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    assert torch.equal(tanh.transformer.h[0].mlp.gelu(x), F.gelu(x, approximate="tanh"))
    assert torch.equal(exact.transformer.h[0].mlp.gelu(x), F.gelu(x))


def test_dropout_acts_in_training_only():
    model, idx = telling_gpt(replace(TELLING, dropout=0.5)), tokens(2, 9)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match=r"13 tokens .* block_size, 12"):
        telling_gpt()(tokens(1, 13))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"n_embd": 10, "n_head": 3}, ("n_embd", "10", "n_head", "3")),
        ({"n_layer": 0}, ("n_layer", "0", "1")),
        ({"n_head": 0}, ("n_head", "0", "1")),
        ({"n_embd": -8}, ("n_embd", "-8", "1")),
        ({"block_size": 0}, ("block_size", "0", "1")),
        ({"vocab_size": 0}, ("vocab_size", "0", "1")),
        ({"dropout": 1.0}, ("dropout", "1.0", "[0, 1)")),
        ({"dropout": -0.1}, ("dropout", "-0.1", "[0, 1)")),
        ({"normalizer": "softmax2"}, ("normalizer", "softmax2", "softmax1", "entmax15")),
        ({"backward": "lateral"}, ("backward", "lateral", "diagonal")),
        ({"gate": "layer"}, ("gate", "layer", "none, head, element")),
        ({"gate_init": 1.0}, ("gate_init", "1.0", "between 0 and 1")),
        ({"softmax_n": -1.0}, ("softmax_n", "-1.0", "at least 0")),
        ({"clipped_alpha": math.inf}, ("clipped_alpha", "inf", "finite")),
        ({"ssmax_init": math.nan}, ("ssmax_init", "nan", "1e30")),
        ({"activation": "relu"}, ("activation", "relu", "gelu_tanh")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_makes_no_sense_is_refused(values, named):
    with pytest.raises(ValueError) as error:
        GPTConfig(**values)
    for fragment in named:
        assert fragment in str(error.value)


# --- a shorter context ----------------------------------------------------------------------------------------------


def test_cropping_the_context_keeps_the_logits_of_what_still_fits():
    model, idx = telling_gpt(), tokens(2, 5)
    before = model(idx)[0]
    crop_block_size(model, 5)
    assert torch.equal(model(idx)[0], before)
    assert model.state_dict()["transformer.wpe.weight"].shape == (5, 8)
    assert any(p is model.transformer.wpe.weight for group in parameter_groups(model, 0.1) for p in group["params"])
    with pytest.raises(ValueError, match="block_size, 5"):
        model(tokens(1, 6))


def test_cropping_one_model_leaves_another_of_the_same_config_alone():
    config = replace(TELLING)
    model, other = GPT(config), GPT(config)
    crop_block_size(model, 5)
    assert other.config.block_size == 12
    assert other(tokens(1, 12))[0].shape == (1, 12, 17)


@pytest.mark.parametrize("block_size", [0, 13])
def test_cropping_cannot_lengthen_or_empty_the_context(block_size):
    with pytest.raises(ValueError, match=rf"12 to {block_size}"):
        crop_block_size(telling_gpt(), block_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("normalizer", "backward"),
    [*itertools.product(NORMALIZERS, ["full"]), *itertools.product(["sink", "softpick"], get_args(Backward)[1:])],
)
def test_compiling_takes_the_model_whole(normalizer, backward):
    torch.compiler.reset()  # the variants before this one count towards a limit of recompilations
    model, idx = telling_gpt(replace(TELLING, n_layer=1, normalizer=normalizer, backward=backward)), tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = [f(idx, idx)[1] for f in (model, compiled)]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# --- nanoGPT's own model --------------------------------------------------------------------------------------------


def test_a_nanogpt_checkpoint_has_hugging_faces_logits(nanogpt):
    checkpoint, peer, _ = nanogpt
    model, info = load_model(checkpoint)
    assert (model.config.block_size, model.config.activation, info["iter_num"]) == (16, "gelu", 5000)
    idx = random_ids(4, 16, vocab_size=65)
    with torch.no_grad():
        # float64: some hundred roundings of logits below 100
        torch.testing.assert_close(model.double()(idx, idx)[0], peer(idx).logits, rtol=0, atol=1e-11)


def test_shakespeares_nanogpt_has_its_loss():
    checkpoint, ids = shakespeares_nanogpt()
    model, info = load_model(checkpoint)
    assert (model.config.block_size, model.config.activation, info["iter_num"] > 0) == (64, "gelu", True)
    model.double()
    ids = torch.from_numpy(ids)
    targets = len(ids) - 1
    assert targets == 111_539
    whole = targets // 64 * 64
    batches = [*zip(ids[:whole].view(-1, 64).split(256), ids[1 : whole + 1].view(-1, 64).split(256), strict=True)]
    batches.append((ids[None, whole:-1], ids[None, whole + 1 :]))  # the remainder
    with torch.no_grad():
        loss = sum(model(x, y)[1].item() * y.numel() for x, y in batches) / targets
    assert loss == pytest.approx(2.44014843, abs=5e-9)  # the digits known
