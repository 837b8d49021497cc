"""Families of pretrained models in this GPT's terms: one table, read in both directions.

An entry of `FAMILIES` says how transformers' class of that family writes in config.json what a GPTConfig says, and how
it names and stores the weights. A key that changes what is computed, and has another value than this GPT can follow, is
refused by its name; other keys (dropout, token ids, a loader's settings) are not looked at.
"""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from model import GPT, GPTConfig


@dataclass(frozen=True)
class Family:
    """How one family says what a GPTConfig says, and where it keeps the weights."""

    architecture: str
    """transformers' class with the output layer"""
    keys: dict[str, str]
    """key of config.json → the GPTConfig's field that it says"""
    left_out: dict[str, Any]
    """key → its value in a config.json without it; one of `keys` that is not here has to be there"""
    fields: dict[str, Any]
    """field → the value that all models of the family have"""
    weights: dict[str, str | tuple[str, str, str]]
    """our module → theirs, or the three that hold the rows of q, k and v"""
    trunk: str
    """what the names of all weights but the output layer's begin with; files of the trunk alone leave it out"""
    fixed: dict[str, Any] = field(default_factory=dict)
    """key that changes what is computed → the one value, the same where it is left out, that this GPT can follow"""
    dropout: tuple[str, ...] = ()
    conv1d: bool = False
    """the matrices are stored as (in, out); a Linear's are (out, in)"""
    interleaved: bool = False
    """c_attn's rows are q, k, v of the first head, then of the next; ours are q of all heads, then k, then v"""
    whole_heads: bool = False
    """transformers refuses a width that is not a multiple of the number of heads, even where head_dim is given"""

    @property
    def head(self) -> str:
        return f"{self.weights['lm_head']}.weight"


_GPT2 = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
_GPT2_WEIGHTS = {f"transformer.{name}": f"transformer.{name}" for name in ("wte", "wpe", "ln_f")}
_GPT2_WEIGHTS |= {f"transformer.h.#.{name}": f"transformer.h.#.{name}" for name in _GPT2}
# Of the dict rope_scaling, where its type is llama3; `read_config` reads them beside the other keys.
_SCALING = {"factor": "rope_scaling", "original_max_position_embeddings": "rope_original_context"}
_LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "block_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "n_embd",
    "head_dim": "head_dim",
    "intermediate_size": "n_inner",
    "hidden_act": "activation",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "tie_embeddings",
    **_SCALING,
}
_LLAMA_LEFT_OUT = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_LLAMA_FIELDS = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu"}
_LLAMA_WEIGHTS: dict[str, str | tuple[str, str, str]] = {
    "transformer.wte": "model.embed_tokens",
    "transformer.h.#.ln_1": "model.layers.#.input_layernorm",
    "transformer.h.#.attn.c_attn": (
        "model.layers.#.self_attn.q_proj",
        "model.layers.#.self_attn.k_proj",
        "model.layers.#.self_attn.v_proj",
    ),
    "transformer.h.#.attn.c_proj": "model.layers.#.self_attn.o_proj",
    "transformer.h.#.ln_2": "model.layers.#.post_attention_layernorm",
    "transformer.h.#.mlp.c_gate": "model.layers.#.mlp.gate_proj",
    "transformer.h.#.mlp.c_fc": "model.layers.#.mlp.up_proj",
    "transformer.h.#.mlp.c_proj": "model.layers.#.mlp.down_proj",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
}
_QK_NORM: dict[str, str | tuple[str, str, str]] = {
    "transformer.h.#.attn.q_norm": "model.layers.#.self_attn.q_norm",
    "transformer.h.#.attn.k_norm": "model.layers.#.self_attn.k_norm",
}
_BIASES = {"attention_bias": "qkv_bias", "mlp_bias": "bias"}  # of q, k, v and o; of the MLP: ours has both or neither
_NO_BIASES = dict.fromkeys(_BIASES, False)
_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {  # by model_type; of several that can express a model, the first is written
    "gpt2": Family(
        "GPT2LMHeadModel",
        keys={
            "vocab_size": "vocab_size",
            "n_positions": "block_size",
            "n_layer": "n_layer",
            "n_head": "n_head",
            "n_embd": "n_embd",
            "n_inner": "n_inner",
            "activation_function": "activation",
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_embeddings",
        },
        left_out={
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_layer": 12,
            "n_head": 12,
            "n_embd": 768,
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        fields={"bias": True},
        fixed={"scale_attn_weights": True},
        weights={**_GPT2_WEIGHTS, "lm_head": "lm_head"},
        trunk="transformer.",
        dropout=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        conv1d=True,
    ),
    "llama": Family(  # SmolLM and SmolLM2 as well
        "LlamaForCausalLM",
        keys=_LLAMA_KEYS | _BIASES,
        left_out=_LLAMA_LEFT_OUT | _NO_BIASES,
        fields=_LLAMA_FIELDS,
        weights=_LLAMA_WEIGHTS,
        trunk="model.",
        whole_heads=True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        keys=_LLAMA_KEYS,
        left_out=_LLAMA_LEFT_OUT | _QWEN_WINDOW | {"num_key_value_heads": 32},
        fields=_LLAMA_FIELDS | {"bias": False, "qkv_bias": True},
        weights=_LLAMA_WEIGHTS,
        trunk="model.",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        keys=_LLAMA_KEYS,
        left_out=_LLAMA_LEFT_OUT | _QWEN_WINDOW | {"num_key_value_heads": 32, "head_dim": 128},
        fields=_LLAMA_FIELDS | {"bias": False, "qk_norm": True},
        fixed={"attention_bias": False},  # q, k, v and o, but not the MLP
        weights=_LLAMA_WEIGHTS | _QK_NORM,
        trunk="model.",
    ),
    "gpt_neox": Family(  # Pythia as well
        "GPTNeoXForCausalLM",
        keys={
            "vocab_size": "vocab_size",
            "max_position_embeddings": "block_size",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "hidden_act": "activation",
            "layer_norm_eps": "norm_eps",
            "rotary_emb_base": "rope_theta",
            "rotary_pct": "rope_fraction",
            "use_parallel_residual": "parallel_residual",
            "tie_word_embeddings": "tie_embeddings",
            **_SCALING,
        },
        left_out={
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "rotary_emb_base": 10000.0,
            "rotary_pct": 0.25,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
        },
        fields={"position": "rope", "bias": True},
        fixed={"attention_bias": True},
        weights={
            "transformer.wte": "gpt_neox.embed_in",
            "transformer.h.#.ln_1": "gpt_neox.layers.#.input_layernorm",
            "transformer.h.#.attn.c_attn": "gpt_neox.layers.#.attention.query_key_value",
            "transformer.h.#.attn.c_proj": "gpt_neox.layers.#.attention.dense",
            "transformer.h.#.ln_2": "gpt_neox.layers.#.post_attention_layernorm",
            "transformer.h.#.mlp.c_fc": "gpt_neox.layers.#.mlp.dense_h_to_4h",
            "transformer.h.#.mlp.c_proj": "gpt_neox.layers.#.mlp.dense_4h_to_h",
            "transformer.ln_f": "gpt_neox.final_layer_norm",
            "lm_head": "embed_out",
        },
        trunk="gpt_neox.",
        dropout=("hidden_dropout", "attention_dropout"),
        interleaved=True,
        whole_heads=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        keys=_LLAMA_KEYS,
        left_out=_LLAMA_LEFT_OUT | {"num_key_value_heads": 8, "sliding_window": 4096},
        fields=_LLAMA_FIELDS | {"bias": False},
        weights=_LLAMA_WEIGHTS,
        trunk="model.",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        keys=_LLAMA_KEYS | _BIASES,
        left_out=_LLAMA_LEFT_OUT
        | _NO_BIASES
        | {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
        fields=_LLAMA_FIELDS,
        weights=_LLAMA_WEIGHTS,
        trunk="model.",
    ),
}
_ACTIVATIONS: dict[str, Any] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}
_FIXED = {"is_causal": True, "partial_rotary_factor": 1}  # of every family, as `fixed` of each
# Keys that no family here can have set → the reason.
_REFUSED = {
    "auto_map": "the model is code in its folder, and nothing from there is run",
    "quantization_config": "its weights are quantized: save the model as float32 first",
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "attn_logit_softcapping": "softcapping bends the attention's scores",
    "final_logit_softcapping": "softcapping bends the logits",
    "add_cross_attention": "this GPT reads nothing but its own text",
    "is_encoder_decoder": "this GPT reads nothing but its own text",
    "scale_attn_by_inverse_layer_idx": "this GPT's layers all scale their scores alike",
    "pruned_heads": "this GPT's layers all have the same heads",
}


# --- config.json ------------------------------------------------------------------------------------------------------


def read_config(c: dict[str, Any]) -> tuple[Family, GPTConfig]:
    """The family and the GPTConfig that a config.json means. ValueError, naming the key, where this GPT would compute
    something else or the value has no sense."""
    for key, reason in _REFUSED.items():
        if c.get(key):
            raise ValueError(f"this GPT cannot express its {key}, {c[key]!r:.50}: {reason}")
    name = c.get("model_type", "gpt2")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"its model_type is {name!r:.50}, and this GPT can only be one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    c = _with_rope(c, family)
    for key, value in {**_FIXED, **family.fixed}.items():
        if c.get(key, value) != value:
            raise ValueError(f"this GPT cannot express its {key}, {c[key]!r:.50}: of a {name} it can only be {value}")
    kinds = {f.name: f.type for f in fields(GPTConfig)}
    values = dict(family.fields)
    for key, ours in family.keys.items():
        if key not in c and key not in family.left_out:
            raise ValueError(f"its config.json does not say {key}")
        value = c[key] if key in c else family.left_out[key]
        values[ours] = _activation(value, family) if ours == "activation" else _typed(value, kinds[ours])
        if values[ours] is ...:
            raise ValueError(f"this GPT cannot express its {key}, {value!r:.50}")
    config = GPTConfig(**values)
    if family.whole_heads and config.n_embd % config.n_head:
        raise ValueError(f"its hidden_size, {config.n_embd}, is not a multiple of its {config.n_head} attention heads")
    if "mlp_bias" in family.keys and config.qkv_bias != config.bias:
        raise ValueError("this GPT cannot express an attention_bias that is not its mlp_bias: the two go together")
    try:
        _check_layers(c, family, config)
    except (TypeError, ArithmeticError) as e:
        about = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "no_rope_layers")
        said = ", ".join(f"{key} {c[key]!r:.30}" for key in about if key in c)
        raise ValueError(f"its config.json says of its layers what has no sense: {said}") from e
    return family, config


def _with_rope(c: dict[str, Any], family: Family) -> dict[str, Any]:
    """config.json with the numbers of the rotation beside the other keys, where they stood before transformers 5 put
    them all in rope_parameters."""
    where = "rope_scaling" if c.get("rope_scaling") else "rope_parameters"
    rope = c.get(where) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"this GPT cannot express its {where}, {rope!r:.50}: there is one rotation for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"this GPT cannot express its {where} of type {kind!r:.50}: it has 'default' and 'llama3'")
    key_of = {ours: key for key, ours in family.keys.items()}
    share = key_of.get("rope_fraction", "partial_rotary_factor")
    said = {key_of.get("rope_theta", "rope_theta"): rope.get("rope_theta"), share: rope.get("partial_rotary_factor")}
    if kind == "llama3":
        if (bounds := (rope.get("low_freq_factor"), rope.get("high_freq_factor"))) != (1, 4):
            raise ValueError(
                f"this GPT cannot express its {where} with low_ and high_freq_factor {bounds}: (1, 4) alone"
            )
        context = c.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        context = context or c.get("max_position_embeddings")
        said |= {"factor": rope.get("factor"), "original_max_position_embeddings": context}
    unscaled = {"factor": 1.0, "original_max_position_embeddings": GPTConfig.rope_original_context}
    said = {key: value for key, value in said.items() if value is not None}
    return c | said | (unscaled if kind == "default" else {})


def _typed(value: Any, kind: Any) -> Any:
    """A value of config.json as a field of that type takes it, or `...`. A float that is whole counts as an integer."""
    if isinstance(value, bool):
        return value if kind in (bool, bool | None) else ...
    if isinstance(value, int | float) and math.isfinite(value):
        if kind is float:
            return float(value)
        return int(value) if kind in (int, int | None) and value == int(value) else ...
    return None if value is None and kind not in (bool, int, float) else ...


def _activation(name: Any, family: Family) -> Any:
    """The field's value, or `...`; a SwiGLU has no choice, and the field's default stands for it."""
    if not isinstance(name, str):
        return ...
    if family.fields.get("mlp") == "swiglu":
        return GPTConfig.activation if name in ("silu", "swish") else ...
    return _ACTIVATIONS.get(name, ...)


def _check_layers(c: dict[str, Any], family: Family, config: GPTConfig) -> None:
    """ValueError unless all layers are alike, with attention to all of the context."""
    said = family.left_out | c
    if "no_rope_layer_interval" in family.left_out:
        every = said["no_rope_layer_interval"]
        rotated = said.get("no_rope_layers") or [(i + 1) % every for i in range(config.n_layer)]
        if not all(rotated[: config.n_layer]):
            raise ValueError("this GPT cannot express its no_rope_layers, which do not rotate queries and keys")
    types = set(said.get("layer_types") or ()) - {"full_attention"}
    window = said.get("sliding_window")
    if others := types - ({"sliding_attention"} if window is not None else set()):
        raise ValueError(f"this GPT cannot express its layer_types: {', '.join(map(str, others))}")
    slides = "sliding_window" in family.left_out and window is not None and said.get("use_sliding_window", True)
    slides = slides and said.get("max_window_layers", 0) < config.n_layer
    if (slides or types) and not (isinstance(window, int) and window >= config.block_size):
        raise ValueError(
            f"this GPT cannot express its sliding_window, {window!r:.50}, in a context of {config.block_size}: it "
            "changes nothing in shorter texts, so max_position_embeddings in config.json may be lowered to it"
        )


def describe(model: GPT) -> tuple[Family, dict[str, Any]]:
    """The first family that can express a model, and its config.json. Biases that only the family has count as zeros.
    ValueError, with what the nearest family lacks, if there is none."""
    config = _explicit(model.config)
    nearest: tuple[str, list[str]] = "", [f.name for f in fields(config)]
    for wanted in (config, replace(config, qkv_bias=True), replace(config, bias=True, qkv_bias=True)):
        for name, family in FAMILIES.items():
            c = _write_config(wanted, name)
            try:
                found = _explicit(read_config(c)[1])
            except ValueError:  # biases of the attention alone, or heads that do not share the width
                continue
            differ = [f.name for f in fields(wanted) if getattr(wanted, f.name) != getattr(found, f.name, f.default)]
            if not differ:
                return family, c | dict.fromkeys(family.dropout, model.config.dropout)
            nearest = min(nearest, (name, differ), key=lambda tried: len(tried[1]))
    listed = ", ".join(f"{name} {getattr(config, name)!r}" for name in nearest[1])
    raise ValueError(f"no family of Hugging Face's can express this model: {nearest[0]}, the nearest, has no {listed}")


def _write_config(config: GPTConfig, name: str) -> dict[str, Any]:
    """config.json of a GPT, an explicit one, as far as the family has keys for it."""
    family = FAMILIES[name]
    c = {key: getattr(config, ours) for key, ours in family.keys.items()}
    act = next(key for key, ours in family.keys.items() if ours == "activation")
    c[act] = "silu" if "mlp" in family.fields else next(key for key, ours in _ACTIVATIONS.items() if ours == c[act])
    if (scaling := {key: c.pop(key) for key in _SCALING if key in c}) and config.rope_scaling != 1:
        c["rope_scaling"] = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **scaling}
    c |= {"sliding_window": None} if "sliding_window" in family.left_out else {}
    c |= {"bos_token_id": None, "eos_token_id": None} if name != "gpt2" else {}
    return {"architectures": [family.architecture], "model_type": name} | c | family.fixed


def _explicit(config: GPTConfig) -> GPTConfig:
    """The same model, with a value for null where other fields give it, and defaults in fields that change nothing."""
    default: dict[str, Any] = {f.name: f.default for f in fields(config)}
    unused = {"dropout", "backward", "sink_init"}
    unused |= {"activation"} if config.mlp == "swiglu" else set()
    unused |= {"rope_original_context"} if config.rope_scaling == 1 else set()
    unused |= {f for f in default if f.startswith("rope_")} if config.position != "rope" else set()
    return replace(config, **config.resolved() | {name: default[name] for name in unused})
