"""What a config.json means: published ones, and every key that this GPT cannot follow. The weights: test_pretrained."""

import pytest
import torch

from harness.families import FAMILIES, read_config
from model import GPT

LLAMA3_ROPE = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
LLAMA3_ROPE |= {"original_max_position_embeddings": 8192}
SIZES = (
    "vocab_size",
    "max_position_embeddings",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "intermediate_size",
)


def sized(*sizes: int, **more) -> dict:
    return dict(zip(SIZES, sizes, strict=True)) | more


# As they are published, without the keys that say nothing of the model's shape, and the number of their parameters.
PUBLISHED = {
    "gpt2": ({"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}, 124_439_808),
    "SmolLM2-135M": (
        sized(49152, 8192, 30, 9, 3, 576, 1536, model_type="llama", rms_norm_eps=1e-5, rope_theta=100000)
        | {"attention_bias": False, "mlp_bias": False, "rope_scaling": None, "tie_word_embeddings": True},
        134_515_008,
    ),
    "Llama-3.2-1B": (
        sized(128256, 131072, 16, 32, 8, 2048, 8192, model_type="llama", head_dim=64, rms_norm_eps=1e-5)
        | {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0, "tie_word_embeddings": True},
        1_235_814_400,
    ),
    "Mistral-7B-v0.3": (
        sized(32768, 32768, 32, 32, 8, 4096, 14336, model_type="mistral", rms_norm_eps=1e-5, rope_theta=1e6)
        | {"sliding_window": None, "tie_word_embeddings": False, "hidden_act": "silu"},
        7_248_023_552,
    ),
    "Qwen2.5-0.5B": (
        sized(151936, 32768, 24, 14, 2, 896, 4864, model_type="qwen2", rope_theta=1e6, tie_word_embeddings=True)
        | {"max_window_layers": 24, "sliding_window": 32768, "use_sliding_window": False},
        494_032_768,
    ),
    "Qwen3-0.6B": (
        sized(151936, 40960, 28, 16, 8, 1024, 3072, model_type="qwen3", head_dim=128, rope_theta=1000000)
        | {"attention_bias": False, "sliding_window": None, "max_window_layers": 28, "tie_word_embeddings": True},
        596_049_920,
    ),
    "pythia-160m": (
        sized(50304, 2048, 12, 12, 12, 768, 3072, model_type="gpt_neox", rotary_emb_base=10000, rotary_pct=0.25)
        | {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "tie_word_embeddings": False, "use_parallel_residual": True},
        162_322_944,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters_as_they_say(name):
    c, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = GPT(read_config(c)[1])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_rotation_of_published_models():
    def rope(name):
        c = read_config(PUBLISHED[name][0])[1]
        return c.rope_theta, c.rotated, c.rope_scaling, c.rope_original_context

    assert rope("Llama-3.2-1B") == (500000.0, 64, 32.0, 8192)
    assert rope("pythia-160m") == (10000.0, 16, 1.0, 8192)
    assert rope("SmolLM2-135M") == (100000.0, 64, 1.0, 8192)


def small(family: str, **changes) -> dict:
    """A config.json of the family with every key that has to be there."""
    needed = (key for key in FAMILIES[family].keys if key not in FAMILIES[family].left_out)
    c = dict.fromkeys(needed, 4) | {"model_type": family, "hidden_size": 32, "head_dim": 8, "num_key_value_heads": 2}
    return c | {"sliding_window": None, "no_rope_layers": [1] * 4} | changes


def meant(c: dict):
    return read_config(c)[1]


LONG = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}) for family in FAMILIES),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}),
        ("llama", {"num_local_experts": 8}),
        ("qwen3", {"num_experts": 128}),
        ("llama", {"n_routed_experts": 64}),
        ("llama", {"attn_logit_softcapping": 50.0}),
        ("mistral", {"final_logit_softcapping": 30.0}),
        ("llama", {"is_causal": False}),
        ("llama", {"hidden_act": "gelu"}),
        ("gpt_neox", {"hidden_act": "relu"}),
        ("llama", {"rope_scaling": LONG}),
        ("qwen3", {"rope_parameters": LONG | {"rope_theta": 1e6}}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("gpt_neox", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("llama", {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 8.0}}),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}),
        ("llama", {"rope_scaling": "linear"}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("gpt_neox", {"attention_bias": False}),
        ("mistral", {"sliding_window": 3}),
        ("qwen2", {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 2}),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": None}),
        ("llama", {"layer_types": ["full_attention", "chunked_attention"] * 2}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
        ("smollm3", {"no_rope_layers": None}),  # then every fourth layer has none
        ("llama", {"layer_types": 3}),
        ("qwen2", {"max_window_layers": "all", "use_sliding_window": True, "sliding_window": 3}),
        ("smollm3", {"no_rope_layers": 1}),
        ("llama", {"rms_norm_eps": "small"}),
        ("llama", {"tie_word_embeddings": 1}),
        ("qwen2", {"num_key_value_heads": 1.5}),
        ("llama", {"num_hidden_layers": None}),
        ("llama", {"hidden_size": 18}),
    ],
)
def test_what_this_gpt_cannot_follow_is_refused_by_its_key(family, changes):
    meant(small(family))
    with pytest.raises(ValueError, match=next(iter(changes))):
        meant(small(family, **changes))


def test_mistral_without_the_key_has_its_window():
    c = small("mistral", max_position_embeddings=8192)
    del c["sliding_window"]
    with pytest.raises(ValueError, match="sliding_window, 4096, in a context of 8192"):
        meant(c)
    assert meant(c | {"max_position_embeddings": 4096}).block_size == 4096


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 4}),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 4}),
        ("llama", {"num_attention_heads": 4.0, "hidden_act": "swish", "attention_bias": False, "num_experts": 0}),
        ("llama", {"partial_rotary_factor": 1.0, "rope_scaling": None, "auto_map": None, "is_causal": True}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 0], "rope_theta": 10000.0}),
    ],
)
def test_keys_that_change_nothing_here_are_no_obstacle(family, changes):
    assert meant(small(family, **changes)) == meant(
        small(family, **({"rope_theta": 1e4} if family == "smollm3" else {}))
    )


@pytest.mark.parametrize("model_type", ["mixtral", "gemma2", "qwen2_moe", "phi3", "t5", 3])
def test_other_families_are_refused_by_name(model_type):
    with pytest.raises(
        ValueError, match=f"model_type is .?{model_type}.?, and this GPT can only be one of gpt2, llama"
    ):
        meant(small("llama") | {"model_type": model_type})


def test_a_size_that_is_not_there_is_not_made_up():
    c = small("llama")
    del c["intermediate_size"]
    with pytest.raises(ValueError, match="does not say intermediate_size"):
        meant(c)
