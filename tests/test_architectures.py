"""What the GPT promises holds for every combination of its options: Llama's, Qwen's, GPT-NeoX's and any other."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from harness.checkpoint import build_model, load_model, read_checkpoint
from harness.generation import KVCache, generate
from harness.kl_training import fingerprint
from harness.resuming import restore_optimizer
from kernels.backends import materialized_attention
from model import GPT, NORMALIZERS, GPTConfig, RMSNorm, rotation
from tests.helpers import optimizer_of, random_ids, save_model, tiny_gpt
from tests.processes import assert_same_run, finished, killed

T, V = 10, 17
NAMES = {f.name for f in dataclasses.fields(GPTConfig)}


@st.composite
def architectures(draw) -> dict:
    """Every field of a GPTConfig but dropout, which has no say outside training."""
    choose = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    n_kv_head, head_dim = choose(1, 2, 3), choose(2, 4, 8)
    n_head = n_kv_head * choose(1, 2)
    own_width = choose(True, False)
    config = {
        "block_size": T,
        "vocab_size": V,
        "n_layer": 2,
        "n_head": n_head,
        "n_kv_head": None if n_kv_head == n_head and choose(True, False) else n_kv_head,
        "n_embd": choose(5, 24) if own_width else n_head * head_dim,
        "head_dim": head_dim if own_width else None,
        "n_inner": choose(None, 10),
        "bias": choose(True, False),
        "qkv_bias": choose(None, True, False),
        "tie_embeddings": choose(True, False),
        "position": choose("learned", "rope"),
        "rope_theta": choose(100.0, 10000.0),
        "rope_fraction": choose(1.0, 0.5) if head_dim > 2 else 1.0,
        "rope_scaling": choose(1.0, 4.0),
        "rope_original_context": choose(16, 64),
        "norm": choose("layernorm", "rmsnorm"),
        "norm_eps": choose(1e-5, 1e-2),
        "qk_norm": choose(True, False),
        "parallel_residual": choose(True, False),
        "mlp": choose("gelu", "swiglu"),
        "normalizer": choose(*NORMALIZERS),
        "softmax_n": choose(0.0, 3.0),
        "sink_init": choose(0.0, -3.0),
        "ssmax_init": choose(None, 0.5),
        "clipped_alpha": choose(0.0, 1.5),
        "clipped_by": choose("context", "row"),
        "sigmoid_bias": choose(None, -1.0),
        "backward": choose("full", "diagonal", "ste", "detached"),
        "gate": choose("none", "head", "element"),
        "gate_init": choose(None, 0.25),
        "activation": choose("gelu_tanh", "gelu"),
    }
    assert set(config) == NAMES - {"dropout"}, "an option of the model that this test does not try"
    return config


every_architecture = given(config=architectures())


def trained_gpt(**config) -> GPT:
    """With weights large enough for attention and logits that tell tokens and positions apart, in float64."""
    return tiny_gpt(**config, noise=0.4).double()


def gradients(model: GPT, idx: torch.Tensor, **how) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = model(idx, idx.roll(-1, 1), **how)[1]
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def ids(*shape: int) -> torch.Tensor:
    return random_ids(*shape, vocab_size=V)


# --- every combination ------------------------------------------------------------------------------------------------


@settings(max_examples=8)
@every_architecture
def test_logits_come_from_no_later_token_and_are_the_same_piece_by_piece_from_a_cache(config):
    model, idx = trained_gpt(**config), ids(2, T)
    changed = idx.clone()
    changed[0, 6:] = (changed[0, 6:] + 1) % V
    with torch.no_grad():
        whole, after = model.features(idx), model.features(changed)
        assert torch.equal(whole[1], after[1])  # nor from another sequence
        torch.testing.assert_close(whole[0, :6], after[0, :6], rtol=0, atol=1e-12)
        assert (whole[0, 6:] - after[0, 6:]).abs().amax(-1).min() > 1e-6
        cache = KVCache(model.config)
        pieces = [model.features(piece, cache) for piece in idx.split([4, 1, 2, 3], dim=1)]
    # Some hundred roundings of numbers of a few units
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-12)
    cached, without = (
        torch.cat(list(generate(model, idx[:, :6], 8, temperature=0, use_cache=use)), 1) for use in (True, False)
    )
    assert torch.equal(cached, without)  # beyond block_size too


@settings(max_examples=10)
@every_architecture
def test_loss_and_gradients_are_those_of_the_readable_form_in_float64(config):
    model, idx = trained_gpt(**config), ids(3, T)
    with materialized_attention():
        loss, expected = gradients(model, idx)
    scale = torch.stack([g.norm() for g in expected]).norm()
    for dtype, digits in ((torch.float64, 1e-12), (torch.float32, 2e-4)):
        model.to(dtype)
        for with_logits in (True, False):
            own_loss, own = gradients(model, idx, with_logits=with_logits)
            assert abs(own_loss - loss) <= digits * loss
            for (name, _), g, e in zip(model.named_parameters(), own, expected, strict=True):
                assert (g - e).norm() <= digits * (e.norm() + 1e-2 * scale), (name, dtype, with_logits)


@settings(max_examples=6)
@every_architecture
def test_a_checkpoint_holds_the_model_and_a_training_goes_on_from_it_exactly(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "ckpt.pt"

    def train(model, optimizer, steps) -> None:
        for step in steps:
            gradients_of = random_ids(4, T + 1, vocab_size=V, seed=step)
            model(gradients_of[:, :-1], gradients_of[:, 1:], with_logits=False)[1].backward()
            optimizer.step()
            optimizer.zero_grad()

    model = tiny_gpt(**config)
    train(model, optimizer := optimizer_of(model), range(2))
    save_model(model, path, optimizer=optimizer.state_dict())
    loaded, _ = load_model(path)
    assert loaded.config == model.config
    assert torch.equal(loaded(ids(2, T))[0], model(ids(2, T))[0])
    assert fingerprint(loaded) == fingerprint(model)
    same = GPT(GPTConfig(**model.config.resolved()))  # what a null stands for is what it comes to
    same.load_state_dict(model.state_dict())
    assert torch.equal(same(ids(2, T))[0], model(ids(2, T))[0])
    assert fingerprint(same) == fingerprint(model)

    resumed = build_model(checkpoint := read_checkpoint(path), path)
    restore_optimizer(another := optimizer_of(resumed), checkpoint)
    for one, its in ((model, optimizer), (resumed, another)):
        train(one, its, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


@settings(max_examples=8)
@every_architecture
def test_flops_are_counted_as_pytorch_counts_them(config):
    """But for the six that PaLM's formula has for each weight of a vector (biases, gains), which no product takes."""
    model, idx = tiny_gpt(**config), ids(1, T)
    with materialized_attention(), FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    expected = model.flops_per_token() - 6 * vectors
    if model.config.normalizer in ("kbias", "kvbias"):
        # One key more for each query, and the null keys and values are in no product with a layer's input.
        nulls = sum(p.numel() for p in model.normalizer_parameters().values())
        expected += 12 * sum(block.attn.c_proj.in_features for block in model.transformer.h) - 6 * nulls
    assert counter.get_total_flops() == T * expected


# --- models of today --------------------------------------------------------------------------------------------------

LLAMA = {
    "block_size": T,
    "vocab_size": V,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 16,
    "bias": False,
    "position": "rope",
    "norm": "rmsnorm",
    "mlp": "swiglu",
}
MODELS = {
    "llama": LLAMA | {"rope_scaling": 8.0, "rope_original_context": 64, "normalizer": "softmax1"},
    "qwen3": LLAMA | {"head_dim": 8, "qk_norm": True, "tie_embeddings": False, "normalizer": "sink"},
    "neox": LLAMA | {"n_kv_head": 4, "norm": "layernorm", "mlp": "gelu", "bias": True, "activation": "gelu"}
    | {"rope_fraction": 0.5, "parallel_residual": True, "tie_embeddings": False, "backward": "diagonal"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "neox"])
def test_compiling_takes_the_model_whole(name):
    torch.compiler.reset()
    model, idx = tiny_gpt(**MODELS[name] | {"n_layer": 1}, noise=0.2), ids(2, T)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for with_logits in (True, False):
        loss, expected = gradients(model, idx, with_logits=with_logits)
        own = compiled(idx, idx.roll(-1, 1), with_logits=with_logits)[1]
        torch.testing.assert_close(own.detach(), loss)
        for a, b in zip(torch.autograd.grad(own, list(model.parameters())), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.usefixtures("training_folder")
def test_a_killed_run_goes_on_exactly():
    """Under a config, too, that says what the checkpoint leaves to a null."""
    fields = {k: v for k, v in MODELS["qwen3"].items() if k not in ("block_size", "vocab_size")}
    how = [word for key, value in fields.items() for word in (f"--model.{key}", str(value).lower())]
    whole = finished("whole", *how, "--training.max_steps", "8")
    assert "2 layers, 4 heads on 2 of keys, 16 wide" in whole.output()
    killed("killed", *how, "--training.max_steps", "8", at=6)
    assert_same_run(whole, finished("killed", *how, "--training.max_steps", "8", "--model.qkv_bias", "false"))


def test_new_matrices_start_as_gpt2s():
    model = tiny_gpt(**MODELS["qwen3"] | {"n_embd": 64, "vocab_size": 500, "n_layer": 3})
    for name in ("lm_head.weight", "transformer.h.1.mlp.c_gate.weight", "transformer.h.1.mlp.c_proj.weight"):
        weight = model.get_parameter(name)
        std = 0.02 / 6**0.5 if "c_proj" in name else 0.02
        assert weight.std().item() == pytest.approx(std, rel=6 / (2 * weight.numel()) ** 0.5), name


# --- the parts --------------------------------------------------------------------------------------------------------

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rope_theta": 5e5}, (LlamaRotaryEmbedding, LlamaConfig, {"rope_type": "default"})),
        (
            {"rope_theta": 5e5, "rope_scaling": 8.0, "rope_original_context": 8192},
            (LlamaRotaryEmbedding, LlamaConfig, LLAMA3 | {"original_max_position_embeddings": 8192}),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": 8.0, "rope_original_context": 100},
            (LlamaRotaryEmbedding, LlamaConfig, LLAMA3 | {"original_max_position_embeddings": 100}),
        ),
        (
            {"rope_theta": 5e5, "rope_fraction": 0.25},
            (GPTNeoXRotaryEmbedding, GPTNeoXConfig, {"rope_type": "default", "partial_rotary_factor": 0.25}),
        ),
    ],
    ids=["plain", "llama3", "llama3 with a short context", "partial"],
)
def test_the_angles_are_transformers(ours, theirs):
    module, config, rope = theirs
    heads = {"hidden_size": 4 * 64, "num_attention_heads": 4, "max_position_embeddings": 8192}
    peer = module(config(**heads, rope_parameters=rope | {"rope_theta": 5e5}))
    positions = torch.tensor([[0, 1, 2, 63, 1000, 8191]])
    cos, sin = peer(torch.zeros(1), positions)  # (1, 6, R): each angle twice
    config = GPTConfig(n_head=4, n_embd=4 * 64, position="rope", **ours)
    own_cos, own_sin = rotation(config, 0, 8192, like=torch.zeros(1))
    assert own_cos.shape == (8192, config.rotated // 2)
    # Llama 3's blend is rounded in another order, by one ε or two of a frequency: an angle of up to 8,191 of them.
    digits = {"rtol": 0, "atol": 2 * 8191 * torch.finfo(torch.float32).eps if "rope_scaling" in ours else 0}
    torch.testing.assert_close(torch.cat((own_cos, own_cos), -1)[positions], cos, **digits)
    torch.testing.assert_close(torch.cat((own_sin, own_sin), -1)[positions], sin, **digits)


def test_angles_are_float32_under_autocast_and_in_half_models():
    config = GPTConfig(n_head=1, n_embd=8, position="rope")
    expected = rotation(config, 300, 310, like=torch.zeros(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = rotation(config, 300, 310, like=torch.zeros(1, dtype=torch.bfloat16))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float64])
def test_rmsnorm_is_the_formula_in_the_wider_type(weight):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = RMSNorm(8, eps=0.1).to(weight)
    torch.nn.init.uniform_(norm.weight, -1, 1)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight.double()
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x).double() - exact).abs().max() <= exact.abs().max() * torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("name", ["llama", "qwen3"])  # the second only where q and k are normed before the rotation
def test_scores_under_rope_depend_on_the_distance_alone(name):
    model = tiny_gpt(**MODELS[name], noise=0.5).double()
    repeated = torch.tensor([[3, 5] * (T // 2)])
    seen = []
    model.transformer.h[0].attn.core.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:2]))
    with torch.no_grad():
        model(repeated)
    q, k = seen[0], seen[1].repeat_interleave(2, 1)
    scores = q @ k.mT
    torch.testing.assert_close(scores[..., 2:, 2:], scores[..., :-2, :-2], rtol=0, atol=1e-12)
    assert (scores[..., 4, 4] - scores[..., 4, 2]).abs().min() > 1e-3  # and on it they do depend


def test_groups_of_queries_share_the_keys_and_values_that_they_would_have_alike():
    model = tiny_gpt(**MODELS["qwen3"], noise=0.3).double()
    alone = tiny_gpt(**MODELS["qwen3"] | {"n_kv_head": 4}).double()
    state = model.state_dict()
    for name in [name for name in state if "c_attn" in name]:
        q, k, v = state[name].split([4 * 8, 2 * 8, 2 * 8])
        k, v = (torch.stack([x[:8], x[:8], x[8:], x[8:]]).flatten(0, 1) for x in (k, v))
        state[name] = torch.cat((q, k, v))
    alone.load_state_dict(state)
    torch.testing.assert_close(alone(ids(2, T))[0], model(ids(2, T))[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_block_adds_attention_and_a_gated_mlp_in_a_row_or_side_by_side(parallel):
    block = tiny_gpt(**MODELS["llama"], parallel_residual=parallel, noise=0.3).transformer.h[0]
    x = torch.randn(2, T, 16, generator=torch.Generator().manual_seed(0))
    attended = x + block.attn(block.ln_1(x))
    read = block.ln_2(x if parallel else attended)
    gate, up = read @ block.mlp.c_gate.weight.T, read @ block.mlp.c_fc.weight.T
    expected = attended + (gate * gate.sigmoid() * up) @ block.mlp.c_proj.weight.T
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-5)  # a hundred roundings of a few units


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"n_kv_head": 5}, "n_head (12) is not divisible by n_kv_head (5)"),
        ({"n_kv_head": 0}, "n_kv_head is 0"),
        ({"head_dim": 2.5}, "head_dim is 2.5"),
        ({"n_inner": -1}, "n_inner is -1"),
        ({"rope_original_context": 0}, "rope_original_context is 0"),
        ({"position": "alibi"}, "unknown position 'alibi': choose from learned, rope"),
        ({"norm": "batch"}, "unknown norm 'batch'"),
        ({"mlp": "relu"}, "unknown mlp 'relu'"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0, but must be positive"),
        ({"sink_init": -1e39}, "sink_init is -1e+39, but must lie in"),  # beyond float32
        ({"rope_scaling": float("nan")}, "rope_scaling is nan"),
        ({"norm_eps": float("inf")}, "norm_eps is inf"),
        ({"position": "rope", "head_dim": 7}, "rope_fraction 1.0 of 7 channels"),
        ({"position": "rope", "rope_fraction": 0.01}, "rope_fraction 0.01 of 64 channels"),
        ({"position": "rope", "rope_fraction": 1.5}, "rope_fraction 1.5 of 64 channels"),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else "",
)
def test_an_option_that_makes_no_sense_is_refused(values, named):
    with pytest.raises(ValueError) as error:
        GPTConfig(**values)
    assert named in str(error.value)
