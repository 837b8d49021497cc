"""Checkpoints: written whole or not at all, read with their checksums, and without running what is in them.

One of ours is a dict of plain tensors, dicts, numbers and strings: nanoGPT's keys `model` (state dict) and `model_args`
(the GPTConfig's fields), and beside them `step`, `optimizer`, `best_val_loss`, `config`, what a resume checks, and
`feedback`, the fixed matrices by which errors travelled back (weight's name → B), none under backpropagation.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from harness.errors import UserError
from harness.files import written_whole
from harness.torch_files import OURS_ALONE, first_line, read_torch_file
from kernels.backends import FLOATS
from model import GPT, GPTConfig

FORMAT = 1
"""The version of the checkpoints that are written here. It rises when an older reader would misunderstand the keys."""

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""The matrices that Hugging Face's GPT-2 keeps as (in, out); a Linear's are (out, in)."""

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into the names of parameters."""


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write to a temporary file in the same folder, flush it to the disk, rename it over `path`: whatever happens on
    the way, `path` is the former checkpoint or the new one. UserError if the disk is full or cannot be written."""
    try:
        with written_whole(path) as temporary, open(temporary, "wb") as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as e:  # torch's zip writer wraps a full disk in a RuntimeError
        cause = e if isinstance(e, OSError) else e.__context__ or e
        former = "the former checkpoint is intact" if path.exists() else "there was none before"
        raise UserError(f"cannot write {path} at step {checkpoint['step']}: {cause}; {former}") from e


def read_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The dict in a checkpoint of this project, nanoGPT or quietGPT. Nothing pickled is ever run. UserError, saying
    which, for a file that is missing, truncated, damaged, foreign or holds code."""
    path = Path(path)
    checkpoint = read_torch_file(path, device)
    missing = [k for k in ("model", "model_args") if not isinstance(checkpoint, dict) or k not in checkpoint]
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of this project or of nanoGPT: it has no {' and no '.join(missing)}"
            + _way_to_load(path, checkpoint)
        )
    version = checkpoint.get("format", FORMAT)
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise UserError(
            f"{path} is a checkpoint of format {version!r:.20}, and this version reads up to {FORMAT}: update it"
        )
    if wrong := [key for key, fits in _CHECKS.items() if key in checkpoint and not fits(checkpoint[key])]:
        raise UserError(f"{path}: its {wrong[0]} is not what this project or nanoGPT writes. {OURS_ALONE}")
    return checkpoint


def is_mapping(x: Any, kinds: Any = object) -> bool:
    """Whether `x` is a dict of strings to values of these types."""
    return isinstance(x, dict) and all(isinstance(k, str) and isinstance(v, kinds) for k, v in x.items())


def is_step(x: Any) -> bool:
    return type(x) is int and 0 <= x < 2**63


_PLAIN = str | int | float | None
_SECTIONS = ("run", "model", "data", "optimizer", "training", "kl", "evaluation", "tracking")
# Keys beside the weights, which any checkpoint may have → whether a value is of the right kind.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "step": is_step,
    "iter_num": is_step,
    "optimizer": lambda x: isinstance(x, dict),
    "config": lambda x: is_mapping(x) and all(is_mapping(x.get(section, {}), _PLAIN) for section in _SECTIONS),
    "corpus": lambda x: is_mapping(x, str | int | None),
    "reference": lambda x: x is None or (is_mapping(x, str) and {"path", "sha256"} <= x.keys()),
    "machine": lambda x: is_mapping(x, _PLAIN),
}


def _way_to_load(path: Path, content: Any) -> str:
    """How to go on with a file that holds weights and not their model_args; empty if that is not known."""
    nested = [k for k in ("state_dict", "model") if isinstance(content, dict) and isinstance(content.get(k), dict)]
    state = content[nested[0]] if nested else content
    if (path.parent / "config.json").exists() and isinstance(state, dict) and any(map(torch.is_tensor, state.values())):
        return f". It holds weights, and there is a config.json beside it: name the folder, hf:{path.parent}"
    try:
        args = _model_args_of(clean_state_dict(state))
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
        return ""
    loaded = f"torch.load({str(path)!r}, weights_only=True)" + "".join(f"[{k!r}]" for k in nested[:1])
    known = ", ".join(f"{k!r}: {v!r}" for k, v in args.items())
    opens = "n_head and activation ('gelu_tanh' as GPT-2, 'gelu' as nanoGPT)"
    holes = "'n_head': …, 'activation': …"
    if "block_size" not in args:  # nothing learned tells positions apart: rotary ones, say
        opens, holes = f"block_size, position, norm, {opens}", f"'block_size': …, 'position': …, 'norm': …, {holes}"
    return (
        f". It holds weights: put {opens} beside them by "
        f"torch.save({{'model': {loaded}, 'model_args': {{{known}, {holes}}}}}, 'ckpt.pt')"
    )


def _model_args_of(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The model_args that a clean state dict's names and shapes tell; of what younger options do, what differs from
    GPT-2. Grouped queries and heads of another width follow from n_head, which no shape tells."""
    vocab_size, n_embd = state["transformer.wte.weight"].shape
    first = {n.removeprefix("transformer.h.0."): x.shape for n, x in state.items() if n.startswith("transformer.h.0.")}
    sizes = {"n_layer": len({n.split(".")[2] for n in state if n.startswith("transformer.h.")}), "n_embd": n_embd}
    if "transformer.wpe.weight" in state:
        sizes["block_size"] = len(state["transformer.wpe.weight"])
    args: dict[str, Any] = sizes | {"vocab_size": vocab_size, "bias": "mlp.c_fc.bias" in first}
    younger: dict[str, Any] = {
        "n_inner": first["mlp.c_fc.weight"][0],
        "qkv_bias": "attn.c_attn.bias" in first,
        "tie_embeddings": _is_tied(state),
        "qk_norm": "attn.q_norm.weight" in first,
        "mlp": "swiglu" if "mlp.c_gate.weight" in first else "gelu",
        "gate": "none",
    }
    if gate := first.get("attn.c_gate.weight"):
        younger["gate"] = "element" if gate[0] == first["attn.c_proj.weight"][1] else "head"
        younger["gate_init"] = 0.5 if "attn.c_gate.bias" in first and not args["bias"] else None
    gpt2 = GPTConfig(**args, n_head=1).resolved()
    return args | {name: value for name, value in younger.items() if value != gpt2[name]}


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, dict[str, Any]]:
    """A checkpoint's model in eval mode on `device`, and everything else that the checkpoint holds.

    `path`: a checkpoint of this project, of nanoGPT or of quietGPT, or `hf:NAME_OR_FOLDER` of a Hugging Face
    model of the families that `harness/families.py` lists.
    """
    if str(path).startswith("hf:"):
        from harness.pretrained import load_hf, tokenizer_of

        name = str(path).removeprefix("hf:")
        model, tokenizer = load_hf(name), tokenizer_of(name)
        corpus = {"corpus": tokenizer} if tokenizer else {}
        return model.to(device).eval(), {"source": str(path), **corpus}
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint, path)
    return model.to(device).eval(), {k: v for k, v in checkpoint.items() if k != "model"}


def build_model(checkpoint: dict[str, Any], path: str | Path) -> GPT:
    """The GPT of a checkpoint's `model_args` with its weights; `path` is for the error. Weights are not copied
    where that can be avoided, so that training the model changes the checkpoint's tensors."""
    try:
        state = clean_state_dict(checkpoint["model"])
        # Whether the head is the embedding, where older files and other projects leave it unsaid, the weights tell.
        config = model_config({"tie_embeddings": _is_tied(state)} | checkpoint["model_args"])
        if config.tie_embeddings:
            if not _is_tied(state):
                raise ValueError(
                    "lm_head.weight is not transformer.wte.weight, and tie_embeddings in its model_args says it is"
                )
            if "transformer.wte.weight" in state:
                state.setdefault("lm_head.weight", state["transformer.wte.weight"])
        layers = len({name.split(".")[2] for name in state if name.startswith("transformer.h.")})
        held, needed = sum(weight.numel() for weight in state.values()), parameter_count(config)
        if config.n_layer > layers + 1 or needed > 2 * held + 1000:  # too much to make; a small gap is named below
            raise ValueError(
                f"n_layer is {config.n_layer}, which makes {needed:,} parameters, and there are {layers} layers with "
                f"{held:,}"
            )
        model = without_weights(config)
        names = model.state_dict().keys()
        for problem, found in (("lack", names - state.keys()), ("also have", state.keys() - names)):
            if found:
                raise ValueError(f"the weights {problem} {listed(found)}")
        assign_weights(model, state)
    except (TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError, LookupError) as e:
        raise UserError(f"{path}: its weights and its model_args do not fit together: {first_line(e)}") from e
    return model


def feedback_of(checkpoint: dict[str, Any], path: str | Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The `training.feedback` of a checkpoint, or of what `load_model` gives beside the model, and its matrices by the
    names of the weights: as `apply_feedback` and `trained_by` take them. UserError, which names `path`, unless these
    are tensors of finite numbers."""
    config = checkpoint.get("config")
    training = config.get("training") if isinstance(config, dict) else None
    how = training.get("feedback", "backprop") if isinstance(training, dict) else "backprop"
    matrices = checkpoint.get("feedback", {})
    whole = isinstance(matrices, dict) and all(torch.is_tensor(x) for x in matrices.values())
    if not whole or not all(bool(x.isfinite().all()) for x in matrices.values()):
        raise UserError(f"{path}: its feedback matrices are not whole: they must be tensors of finite numbers by name")
    return how, matrices


class _Undrawn(TorchFunctionMode):
    """Draws no first values: for those of the meta device, which are none, PyTorch imports its compiler, a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **kwargs)


def without_weights(config: GPTConfig) -> GPT:
    """A GPT on the meta device, which takes neither memory nor time, for weights that are yet to be assigned."""
    try:
        with torch.device("meta"), _Undrawn():
            return GPT(config)
    except (RuntimeError, TypeError):  # a normalizer's first values may be computed from values, which meta has not
        return GPT(config)


def parameter_count(config: GPTConfig) -> int:
    """How many parameters a GPT has, without those of its normalizer. Neither memory nor time grows with its size.
    ValueError for sizes beyond a machine's integers."""
    try:
        with torch.device("meta"), _Undrawn():
            plain = replace(config, normalizer="softmax", backward="full")
            one, two = (sum(p.numel() for p in GPT(replace(plain, n_layer=n)).parameters()) for n in (1, 2))
    except (RuntimeError, TypeError, OverflowError) as e:
        sizes = ", ".join(f"{name} {getattr(config, name)}" for name in ("n_layer", "n_embd", "n_inner", "vocab_size"))
        raise ValueError(f"a GPT of {sizes} does not fit into any memory") from e
    return one + (config.n_layer - 1) * (two - one)


def assign_weights(model: GPT, weights: dict[str, torch.Tensor]) -> GPT:
    """The model with these weights, on the CPU and in the dtypes of its parameters. A tensor of that kind is not copied
    if it shares its memory with no other. RuntimeError, naming the weight, for another shape."""
    memory: set[int] = set()
    parameters = dict(model.named_parameters())
    own = {name: in_own_memory(weights[name].detach().to("cpu", p.dtype), memory) for name, p in parameters.items()}
    if model.config.tie_embeddings:
        own["lm_head.weight"] = own["transformer.wte.weight"]
    model.load_state_dict(own, assign=True)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def in_own_memory(tensor: torch.Tensor, taken: set[int]) -> torch.Tensor:
    """The tensor itself if it is contiguous, fills its storage, and its address is not among those `taken`, to which it
    is added; else a copy."""
    tensor = tensor.contiguous()
    if tensor.untyped_storage().nbytes() > tensor.nbytes or tensor.data_ptr() in taken:
        tensor = tensor.clone()
    taken.add(tensor.data_ptr())
    return tensor


def check_finite(model: GPT, path: str | Path) -> None:
    """UserError, naming the first, if the model that was read from `path` has weights that are NaN or infinite."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{path} holds NaN or infinite weights, in {name} first: there is nothing to go on from")


def model_config(model_args: dict[str, Any]) -> GPTConfig:
    """The GPTConfig of a checkpoint's model_args: ours, or nanoGPT's (exact GELU), or quietGPT's (`use_softmax1`). A
    float that is a whole number, as JSON and YAML may make of one, counts as an integer where one is meant, and an
    integer as a float; TypeError for other types."""
    args = dict(model_args)
    if "use_softmax1" in args:
        args["normalizer"] = "softmax1" if args.pop("use_softmax1") else "softmax"
    elif "activation" not in args:
        args["activation"] = "gelu"
    for field in fields(GPTConfig):
        kinds, value = (field.type, *get_args(field.type)), args.get(field.name, field.default)
        if int in kinds and type(value) is not int and (value is not None or type(None) not in kinds):
            if not (isinstance(value, float) and value.is_integer()):
                raise TypeError(f"{field.name} is {value!r}, but must be an integer")
            args[field.name] = int(value)
        if field.type is float and type(value) is int:
            args[field.name] = float(value)
    return GPTConfig(**args)


def _is_tied(state: dict[str, torch.Tensor]) -> bool:
    """Whether the head in a clean state dict is the embedding; one that is not there is."""
    head, embedding = state.get("lm_head.weight"), state.get("transformer.wte.weight")
    if head is None or embedding is None:
        return True
    return head.shape == embedding.shape and bool(((head == embedding) | (head.isnan() & embedding.isnan())).all())


def clean_state_dict(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A GPT-2's weights as this model names and shapes them, whoever wrote them.

    Wrappers (torch.compile, DistributedDataParallel, …) and outer modules leave the names, and the model's trunk alone
    gets its own. Hugging Face's matrices are transposed. The causal masks (1, 1, T, T), which older models store as
    buffers `attn.bias`, are left out; only the shape tells those, for a normalizer may have a parameter called bias.
    ValueError or TypeError, naming the weight, for integers (a quantized model), where two weights come to one name,
    and for what is no weight.
    """
    if not (isinstance(state, dict) and all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items())):
        raise TypeError("the weights are not tensors by their names")
    unwrapped = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in state}
    trunk = next((n.removesuffix("wte.weight") for n in unwrapped.values() if f".{n}".endswith(".wte.weight")), "")
    clean: dict[str, torch.Tensor] = {}
    for name, weight in state.items():
        inner = unwrapped[name].removeprefix(trunk)
        if (inner.endswith("attn.bias") and weight.dim() == 4) or inner.endswith("attn.masked_bias"):
            continue
        if weight.dtype not in FLOATS:
            dtype = str(weight.dtype).removeprefix("torch.")
            raise TypeError(f"{name} is {dtype}: weights that were quantized cannot be loaded, save them as float32")
        ours = f"transformer.{inner}" if unwrapped[name].startswith(trunk) else unwrapped[name]
        if f".{ours}".endswith(".lm_head.weight"):
            ours = "lm_head.weight"
        if ours in clean:
            raise ValueError(f"{name} and another of the weights are both {ours}")
        clean[ours] = weight
    c_attn, embedding = (clean.get(f"transformer.{name}.weight") for name in ("h.0.attn.c_attn", "wte"))
    if c_attn is not None and embedding is not None and c_attn.shape == (embedding.size(1), 3 * embedding.size(1)):
        clean = {name: weight.t() if name.endswith(CONV1D) else weight for name, weight in clean.items()}
    return clean


def listed(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
