"""Pretrained models: GPT-2 weights from and to Hugging Face's GPT2LMHeadModel. transformers is an optional extra."""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch

from harness.errors import UserError
from harness.tokenizer import GPT2
from model import GPT, Activation, GPTConfig

# Hugging Face keeps GPT-2's Conv1D layers, whose weights are (in, out); a Linear's are (out, in).
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# The sha256 of GPT-2's tokens as vocab.json has them, in the order of their ids, a line each.
_GPT2_VOCABULARY = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"
# The fields of a GPTConfig that GPT-2's class can express; `backward` matters in training alone.
_EXPRESSED = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "activation", "backward"}
_ACTIVATIONS: dict[str, Activation] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def load_gpt2(name_or_folder: str) -> GPT:
    """A GPT with the weights of a Hugging Face GPT-2: a hub name or a local folder. UserError if that cannot be had or
    is not a GPT-2 that this model expresses."""
    transformers = _import_transformers()
    from safetensors import SafetensorError

    if name_or_folder.startswith(("/", ".", "~")) and not Path(name_or_folder).is_dir():
        raise UserError(f"hf:{name_or_folder}: no such folder")

    try:
        gpt2, loading = transformers.GPT2LMHeadModel.from_pretrained(name_or_folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"hf:{name_or_folder}: cannot load a GPT-2 from there: {reason}") from e
    c = gpt2.config
    unusual = [
        name
        for name, value, expected in (
            ("model_type", c.model_type, "gpt2"),
            ("add_cross_attention", c.add_cross_attention, False),
            ("n_inner", c.n_inner or 4 * c.n_embd, 4 * c.n_embd),
            ("scale_attn_weights", c.scale_attn_weights, True),
            ("scale_attn_by_inverse_layer_idx", c.scale_attn_by_inverse_layer_idx, False),
            ("layer_norm_epsilon", c.layer_norm_epsilon, 1e-5),
            ("tie_word_embeddings", c.tie_word_embeddings, True),
            ("activation_function", c.activation_function in _ACTIVATIONS, True),
        )
        if value != expected
    ]
    if unusual:
        raise UserError(f"hf:{name_or_folder}: this GPT cannot express its {', '.join(unusual)}")
    if missing := sorted(loading["missing_keys"]):  # transformers fills them with random numbers
        raise UserError(f"hf:{name_or_folder}: its weights lack {', '.join(missing)}")
    model = GPT(
        GPTConfig(
            block_size=c.n_positions,
            vocab_size=c.vocab_size,
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_embd=c.n_embd,
            bias=True,
            activation=_ACTIVATIONS[c.activation_function],
        )
    )
    state = {k: v.t() if k.endswith(_TRANSPOSED) else v for k, v in gpt2.state_dict().items()}
    model.load_state_dict({k: v for k, v in state.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))})
    return model


def tokenizer_of(name_or_folder: str) -> str | None:
    """ "gpt2" if the tokenizer beside a Hugging Face model has GPT-2's ids, else "of its own" and the file that says
    so; None if no tokenizer can be had."""
    _import_transformers()
    from transformers.utils import cached_file

    for file in ("vocab.json", "tokenizer.json", "vocab.txt", "tokenizer.model", "spiece.model"):
        try:
            path = cached_file(name_or_folder, file, _raise_exceptions_for_missing_entries=False)
        except OSError:  # no network: there may be another file in the cache
            path = None
        if path is None:
            continue
        vocabulary = {}
        if file.endswith(".json"):
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            vocabulary = content if file == "vocab.json" else content.get("model", {}).get("vocab")
        tokens = {i: token for token, i in vocabulary.items()} if isinstance(vocabulary, dict) else {}
        in_order = "\n".join(tokens.get(i, "") for i in range(GPT2.vocab_size))
        same = hashlib.sha256(in_order.encode()).hexdigest() == _GPT2_VOCABULARY
        return GPT2.name if same else f"of its own ({file})"
    return None


def save_gpt2(model: GPT, folder: str | Path) -> None:
    """Write a GPT as a Hugging Face GPT-2 into `folder`. UserError, with the reason, if GPT-2 cannot express it."""
    c = model.config
    if c.normalizer != "softmax":
        raise UserError(f"GPT-2's class has no normalizer '{c.normalizer}': only a softmax model can be exported")
    for field in dataclasses.fields(c):
        if field.name not in _EXPRESSED and (value := getattr(c, field.name)) != field.default:
            raise UserError(f"GPT-2's class has no {field.name}, here {value!r}: this model cannot be exported")
    transformers = _import_transformers()
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        activation_function={v: k for k, v in reversed(_ACTIVATIONS.items())}[c.activation],
        resid_pdrop=c.dropout,
        embd_pdrop=c.dropout,
        attn_pdrop=c.dropout,
    )
    gpt2 = transformers.GPT2LMHeadModel(config)
    state = {k: v.t() if k.endswith(_TRANSPOSED) else v for k, v in model.state_dict().items()}
    if unknown := sorted(state.keys() - gpt2.state_dict().keys()):
        raise UserError(f"GPT-2's class has no {', '.join(unknown)}: this model cannot be exported")
    for name, tensor in gpt2.state_dict().items():
        if name not in state:  # GPT-2's class always has biases: those of a model without are zero
            state[name] = torch.zeros_like(tensor)
    gpt2.load_state_dict(state)
    gpt2.save_pretrained(folder)


def _import_transformers():
    try:
        import transformers
    except ImportError:
        raise UserError("GPT-2 checkpoints of Hugging Face need transformers: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
