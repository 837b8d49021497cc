"""Pretrained models: GPT-2 weights from and to Hugging Face's GPT2LMHeadModel. transformers is an optional extra."""

import dataclasses
import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint import CONV1D, build_model, model_config, read_torch_file
from harness.errors import UserError
from harness.files import check_folder
from harness.huggingface_tokenizer import HuggingFace
from harness.tokenizer import GPT2
from model import GPT, Activation

# The sha256 of GPT-2's tokens as vocab.json has them, in the order of their ids, a line each.
_GPT2_VOCABULARY = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"
# The fields of a GPTConfig that GPT-2's class can express; `backward` matters in training alone.
_EXPRESSED = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "activation", "backward"}
_ACTIVATIONS: dict[str, Activation] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


# The keys of a GPT2Config that say a model's shape → our name and the value where config.json leaves the key out.
_SHAPE = {
    "n_positions": ("block_size", 1024),
    "vocab_size": ("vocab_size", 50257),
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
}
# The keys that change what a GPT-2 computes → the one value that this GPT has, also where config.json leaves it out.
_FIXED = {
    "model_type": "gpt2",
    "add_cross_attention": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}


def load_gpt2(name_or_folder: str) -> GPT:
    """A GPT with the weights of a Hugging Face GPT-2: a hub name or a local folder. UserError if that cannot be had or
    is not a GPT-2 that this model expresses.

    The files are read as they are: config.json, and the weights in one file or several, as safetensors or as PyTorch
    writes them. No code of theirs is run, and what this model has no place for is refused, not left out.
    """
    source = f"hf:{name_or_folder}"
    if name_or_folder.startswith(("/", ".", "~")) and not Path(name_or_folder).expanduser().is_dir():
        raise UserError(f"{source}: no such folder")
    if (found := _find(name_or_folder, "config.json")) is None:
        raise UserError(f"{source}: no config.json there, or the hub cannot be reached: it says the shape of the model")
    c = _read_json(found, source)
    if c.get("quantization_config"):
        raise UserError(f"{source}: its weights are quantized (quantization_config): save the model as float32 first")
    if _find(name_or_folder, "adapter_config.json"):
        raise UserError(
            f"{source}: an adapter lies beside its weights and would be left out: merge it into them first "
            "(merge_and_unload in PEFT), or remove adapter_config.json"
        )
    activation = str(c.get("activation_function", "gelu_new"))
    args = {ours: c.get(key, default) for key, (ours, default) in _SHAPE.items()}
    args |= {"bias": True, "activation": _ACTIVATIONS.get(activation, "gelu")}
    try:
        n_embd = model_config(args).n_embd
    except (TypeError, ValueError) as e:
        raise UserError(f"{source}: its config.json makes no GPT: {e}") from e
    unusual = [key for key, value in _FIXED.items() if c.get(key, value) != value]
    unusual += ["n_inner"] if c.get("n_inner") not in (None, 4 * n_embd) else []
    unusual += ["activation_function"] if activation not in _ACTIVATIONS else []
    unusual += ["pruned_heads"] if c.get("pruned_heads") else []
    if unusual:
        raise UserError(f"{source}: this GPT cannot express its {', '.join(unusual)}")
    return build_model({"model": _read_weights(name_or_folder), "model_args": args}, source)


def _read_weights(name_or_folder: str) -> dict[str, torch.Tensor]:
    source = f"hf:{name_or_folder}"
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (path := _find(name_or_folder, whole)) is not None:
            return _read_file(path, source)
        if (index := _find(name_or_folder, f"{whole}.index.json")) is not None:
            parts = _read_json(index, source).get("weight_map")
            state: dict[str, torch.Tensor] = {}
            for part in sorted(set(map(str, parts.values() if isinstance(parts, dict) else ()))):
                if (path := _find(name_or_folder, part)) is None:
                    raise UserError(f"{source}: its {index.name} names {part}, which is not there")
                state |= _read_file(path, source)
            return state
    raise UserError(f"{source}: cannot load a GPT-2 from there: no model.safetensors and no pytorch_model.bin")


def _read_file(path: Path, source: str) -> dict[str, torch.Tensor]:
    if path.suffix != ".safetensors":
        try:
            content = read_torch_file(path)
            return content if isinstance(content, dict) else {path.name: content}
        except UserError as e:
            raise UserError(f"{source}: {e}") from e
    safetensors = _import("safetensors.torch")
    try:
        return safetensors.torch.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as e:
        raise UserError(f"{source}: cannot read {path.name}: {e}") from e


def _read_json(path: Path, source: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{source}: cannot read {path.name}: {e}") from e
    if not isinstance(content, dict):
        raise UserError(f"{source}: {path.name} holds {content!r:.50}, not keys and their values")
    return content


def _find(name_or_folder: str, filename: str) -> Path | None:
    """A file in the folder, or of the model of that name on the hub, from its cache or fetched; None if it has none."""
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder / filename if (folder / filename).exists() else None
    hub = _import("huggingface_hub.errors")
    try:
        return Path(hub.hf_hub_download(name_or_folder, filename))
    except hub.errors.EntryNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f"hf:{name_or_folder}: cannot load a GPT-2 from there: {str(e).strip().splitlines()[0]}") from e


def tokenizer_of(name_or_folder: str) -> dict[str, Any] | None:
    """What `harness.tokenizer.from_meta` makes the tokenizer of a Hugging Face model of: GPT-2's, where it has the ids
    of that, or what its tokenizer.json describes. One that cannot be used is "of its own (FILE)", with the problem;
    None if there is none, or none can be reached."""
    for file in ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model"):
        with suppress(UserError):  # no network: there may be another file in the cache
            if (path := _find(name_or_folder, file)) is None:
                continue
            problem = "it is not in the form of a tokenizer.json"
            try:
                content = _read_json(path, f"hf:{name_or_folder}") if path.suffix == ".json" else {}
                names = content if file == "vocab.json" else content.get("model", {}).get("vocab")
                tokens = {i: token for token, i in names.items()} if isinstance(names, dict) else {}
                in_order = "\n".join(tokens.get(i, "") for i in range(GPT2.vocab_size))
                if hashlib.sha256(in_order.encode()).hexdigest() == _GPT2_VOCABULARY:
                    return GPT2().describe()
                if file == "tokenizer.json":
                    return _hugging_face(name_or_folder, content).describe()
            except UserError as e:
                problem = str(e)
            return {"tokenizer": f"of its own ({file})", "problem": problem}
    return None


def _hugging_face(name_or_folder: str, content: dict) -> HuggingFace:
    """The separator of documents is the token that stands in front of every text, if the tokenizer says one; else
    <|endoftext|>, if it is a special token; else the end-of-text or begin-of-text token of tokenizer_config.json."""
    path = _find(name_or_folder, "tokenizer_config.json")
    named = _read_json(path, f"hf:{name_or_folder}") if path else {}
    tokenizer = HuggingFace(json.dumps(content, ensure_ascii=False, separators=(",", ":")))
    special = {token["content"]: token["id"] for token in content.get("added_tokens") or () if token.get("special")}
    wanted = ["<|endoftext|>", named.get("eos_token"), named.get("bos_token")]
    spelt = [token.get("content") if isinstance(token, dict) else token for token in wanted]
    known = [special[token] for token in spelt if token in special]
    tokenizer.separator = tokenizer.begin if tokenizer.begin is not None else next(iter(known), None)
    return tokenizer


def save_gpt2(model: GPT, folder: str | Path) -> None:
    """Write a GPT as a Hugging Face GPT-2 into `folder`. UserError, with the reason, if GPT-2 cannot express it
    or the folder cannot be written to."""
    check_folder(Path(folder))  # transformers says nothing, and writes nothing, where a file is in the way
    c = model.config
    if c.normalizer != "softmax":
        raise UserError(f"GPT-2's class has no normalizer '{c.normalizer}': only a softmax model can be exported")
    for field in dataclasses.fields(c):
        if field.name not in _EXPRESSED and (value := getattr(c, field.name)) != field.default:
            raise UserError(f"GPT-2's class has no {field.name}, here {value!r}: this model cannot be exported")
    transformers = _import("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
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
    state = {k: v.t() if k.endswith(CONV1D) else v for k, v in model.state_dict().items()}
    if unknown := sorted(state.keys() - gpt2.state_dict().keys()):
        raise UserError(f"GPT-2's class has no {', '.join(unknown)}: this model cannot be exported")
    for name, tensor in gpt2.state_dict().items():
        if name not in state:  # GPT-2's class always has biases: those of a model without are zero
            state[name] = torch.zeros_like(tensor)
    gpt2.load_state_dict(state)
    gpt2.save_pretrained(folder)


def _import(module: str) -> Any:
    """The package that `module` is in, with that module imported."""
    try:
        return __import__(module)
    except ImportError:
        raise UserError("GPT-2 checkpoints of Hugging Face need transformers: pip install transformers") from None
