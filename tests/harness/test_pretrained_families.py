"""Families of Hugging Face models: the logits of their peers, there and back; what has no place here is refused."""

import random

import pytest
import torch
import transformers
from safetensors.torch import load_file

from harness.checkpoint import load_model
from harness.errors import UserError
from harness.families import FAMILIES
from harness.pretrained import load_hf, save_hf
from model import GPT
from tests.harness.test_pretrained import (
    IDX,
    SAME_LOGITS,
    edit_config,
    edit_weights,
    offline,  # noqa: F401 (for every test)
    refusal,
    save_peer,
)


def random_config(family: str, seed: int) -> transformers.PreTrainedConfig:
    """A small config of the family, with whatever choices it has that this GPT can follow."""
    draw = random.Random(f"{family} {seed}")
    heads = draw.choice([2, 4])
    sizes = {"vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": heads, "max_position_embeddings": 16}
    sizes |= {"intermediate_size": draw.choice([12, 20]), "tie_word_embeddings": draw.random() < 0.5}
    rope = {"rope_theta": draw.choice([100.0, 10000.0]), "rope_type": "default"}
    if draw.random() < 0.5:  # wavelengths from 6 tokens on: some are stretched, some are not, some lie in between
        stretch = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": 40, **stretch}
    if family == "gpt_neox":
        rope["partial_rotary_factor"] = draw.choice([0.25, 0.5, 1.0])
        more = {"hidden_size": 8 * heads, "use_parallel_residual": draw.random() < 0.7, "layer_norm_eps": 1e-3}
        more["hidden_act"] = draw.choice(["gelu", "gelu_fast"])
    else:
        more = {"hidden_size": 24, "num_key_value_heads": draw.choice([1, heads]), "rms_norm_eps": 1e-3}
        more |= {"head_dim": draw.choice([4, 6])} if family != "smollm3" else {"no_rope_layers": [1, 1]}
    if family in ("llama", "smollm3"):
        more |= dict.fromkeys(("attention_bias", "mlp_bias"), draw.random() < 0.5)
    if family in ("mistral", "qwen2"):
        more["sliding_window"] = draw.choice([None, 16])
    if family == "qwen2":
        more["use_sliding_window"] = draw.random() < 0.5
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return transformers.AutoConfig.for_model(family, rope_parameters=rope, **sizes, **more, **tokens)


def random_peer(config) -> transformers.PreTrainedModel:
    """Weights far from those of a start, gains and biases too, so that none can be lost or taken for another's."""
    peer = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + ("norm" in name and name.endswith("weight")))
    return peer


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDX)
    return found[0] if isinstance(model, GPT) else found.logits


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
def test_every_family_gives_its_peers_logits_there_and_back(tmp_path, family, seed):
    peer = random_peer(random_config(family, seed))
    peer.save_pretrained(tmp_path / "theirs")
    model = load_hf(str(tmp_path / "theirs"))
    save_hf(model, tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    expected = logits_of(peer)
    assert expected.std() > 0.5
    for found in (model, back, load_hf(str(tmp_path / "back"))):
        torch.testing.assert_close(logits_of(found), expected, **SAME_LOGITS)
    # A doubled peer still takes angles, norms and softmaxes in float32.
    torch.testing.assert_close(logits_of(model.double()), logits_of(peer.double()), **SAME_LOGITS)


def stored_otherwise(weights):
    """As older versions and other trainers wrote them: bfloat16, prefixes, buffers of the rotation and the mask."""
    neox = "gpt_neox.embed_in.weight" in weights
    for name in list(weights):
        weights[f"_orig_mod.{name}"] = weights.pop(name).bfloat16()
    attention = "gpt_neox.layers.0.attention" if neox else "model.layers.0.self_attn"
    weights[f"{attention}.rotary_emb.inv_freq"] = torch.ones(2)
    if neox:
        weights[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        weights[f"{attention}.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool)


def head_renamed(weights):
    """GPT-NeoX's head is `embed_out` in a file; transformers 5 calls it lm_head, as the others', in its class."""
    if "embed_out.weight" in weights:
        weights["lm_head.weight"] = weights.pop("embed_out.weight")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("change", [stored_otherwise, head_renamed])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_family_as_other_versions_wrote_it(tmp_path, family, change, suffix):
    peer = random_peer(random_config(family, 0))
    for parameter in peer.parameters():
        parameter.data = parameter.data.bfloat16().float()
    peer.save_pretrained(tmp_path)
    edit_weights(tmp_path, change, suffix)
    edit_config(tmp_path, torch_dtype="bfloat16")
    model = load_hf(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits_of(model), logits_of(peer), **SAME_LOGITS)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_head_that_is_its_own_and_the_trunk_without_it(tmp_path, family):
    config = random_config(family, 0)
    config.tie_word_embeddings = False
    random_peer(config).base_model.save_pretrained(tmp_path / "trunk")
    head = "embed_out" if family == "gpt_neox" else "lm_head"
    assert f"the weights lack {head}.weight" in refusal(tmp_path / "trunk")
    random_peer(config).save_pretrained(tmp_path / "head")
    edit_config(tmp_path / "head", tie_word_embeddings=True)
    assert f"{head}.weight is not the embedding" in refusal(tmp_path / "head")
    config.tie_word_embeddings = True
    peer = random_peer(config)
    peer.base_model.save_pretrained(tmp_path / "tied")
    torch.testing.assert_close(logits_of(load_hf(str(tmp_path / "tied"))), logits_of(peer), **SAME_LOGITS)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_family_in_several_files(tmp_path, family, suffix):
    peer = random_peer(random_config(family, 1))
    peer.save_pretrained(tmp_path, max_shard_size="4KB")
    index = tmp_path / "model.safetensors.index.json"
    if suffix == ".bin":
        shards = sorted(tmp_path.glob("model-*.safetensors"))
        for shard in shards:
            torch.save(load_file(shard), shard.with_suffix(".bin"))
            shard.unlink()
        (tmp_path / "pytorch_model.bin.index.json").write_text(index.read_text().replace(".safetensors", ".bin"))
        index.unlink()
    assert len(list(tmp_path.glob(f"model-*{suffix}"))) > 2
    torch.testing.assert_close(logits_of(load_hf(str(tmp_path))), logits_of(peer), **SAME_LOGITS)


def wrong_shape(weights):
    weights["model.norm.weight"] = torch.ones(5)


def experts(weights):
    weights["model.layers.0.mlp.gate.weight"] = torch.ones(2, 24)


def lora(weights):
    weights["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 24)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (wrong_shape, r"model.norm.weight is (5,), where config.json makes it (24,)"),
        (experts, "also have model.layers.0.mlp.gate.weight"),
        (lora, "also have model.layers.0.self_attn.q_proj.lora_A.weight"),
        (lambda weights: weights.pop("model.layers.1.self_attn.k_proj.weight"), "lack model.layers.1.self_attn.k_proj"),
        (lambda weights: weights.update({"norm.weight": torch.ones(24)}), "are both model.norm.weight"),
    ],
)
def test_weights_that_a_llama_has_no_place_for_are_refused(tmp_path, change, reason):
    random_peer(random_config("llama", 0)).save_pretrained(tmp_path)
    edit_weights(tmp_path, change)
    assert reason in refusal(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_file_of_weights_is_refused_with_the_folder_to_name(tmp_path, family, suffix):
    save_peer(tmp_path) if family == "gpt2" else random_peer(random_config(family, 0)).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: None, suffix)
    file = next(path for path in tmp_path.iterdir() if path.suffix == suffix)
    with pytest.raises(UserError, match=f"hf:{tmp_path}$"):
        load_model(file)
