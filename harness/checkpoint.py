"""Checkpoints: written whole or not at all, read without running what is in them.

One of ours is a dict of plain tensors, dicts, numbers and strings: nanoGPT's keys `model` (state dict) and `model_args`
(the GPTConfig's fields), and beside them `step`, `optimizer`, `best_val_loss`, `config` and what a resume checks.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

from harness.errors import UserError
from harness.files import written_whole
from model import GPT, GPTConfig

FORMAT = 1
"""The version of the checkpoints that are written here. It rises when an older reader would misunderstand the keys."""


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
    which, for a file that is missing, truncated, foreign or holds code."""
    path = Path(path)
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name the checkpoint in it, {path / 'ckpt.pt'} say") from None
    except (NotADirectoryError, PermissionError) as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except pickle.UnpicklingError as e:
        raise UserError(
            f"{path} is not a checkpoint, or holds more than tensors and plain values; nothing in it was run"
        ) from e
    except Exception as e:  # the zip reader and the unpickler raise anything on other bytes, OSErrors too
        raise UserError(f"{path} is truncated or not a checkpoint: PyTorch cannot read it") from e
    missing = [k for k in ("model", "model_args") if not isinstance(checkpoint, dict) or k not in checkpoint]
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of this project or of nanoGPT: it has no {' and no '.join(missing)}"
        )
    if (version := checkpoint.get("format", FORMAT)) not in range(1, FORMAT + 1):
        raise UserError(
            f"{path} is a checkpoint of format {version!r}, and this version reads up to {FORMAT}: update it"
        )
    return checkpoint


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, dict[str, Any]]:
    """A checkpoint's model in eval mode on `device`, and everything else that the checkpoint holds.

    `path`: a checkpoint of this project, of nanoGPT or of quietGPT, or `hf:NAME_OR_FOLDER` of a Hugging Face GPT-2.
    """
    if str(path).startswith("hf:"):
        from harness.pretrained import load_gpt2, tokenizer_of

        name = str(path).removeprefix("hf:")
        model, tokenizer = load_gpt2(name), tokenizer_of(name)
        corpus = {"corpus": {"tokenizer": tokenizer}} if tokenizer else {}
        return model.to(device).eval(), {"source": str(path), **corpus}
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint, path)
    return model.to(device).eval(), {k: v for k, v in checkpoint.items() if k != "model"}


def build_model(checkpoint: dict[str, Any], path: str | Path) -> GPT:
    """The GPT of a checkpoint's `model_args` with its weights; `path` is for the error."""
    try:
        model = GPT(model_config(checkpoint["model_args"]))
        model.load_state_dict(clean_state_dict(checkpoint["model"]))
    except (TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise UserError(f"{path}: its weights and its model_args do not fit together: {_first_line(e)}") from e
    return model


def model_config(model_args: dict[str, Any]) -> GPTConfig:
    """The GPTConfig of a checkpoint's model_args: ours, or nanoGPT's (exact GELU), or quietGPT's (`use_softmax1`)."""
    args = dict(model_args)
    if "use_softmax1" in args:
        args["normalizer"] = "softmax1" if args.pop("use_softmax1") else "softmax"
    elif "activation" not in args:
        args["activation"] = "gelu"
    return GPTConfig(**args)


def clean_state_dict(state: dict[str, Any]) -> dict[str, Any]:
    """The state dict without torch.compile's prefix on every name, and without the causal masks (1, 1, T, T) that older
    models store as buffers `attn.bias`. Only the shape tells those: a normalizer may have a parameter called bias."""
    mask = {k for k, v in state.items() if k.endswith(".attn.bias") and v.dim() == 4}
    return {k.removeprefix("_orig_mod."): v for k, v in state.items() if k not in mask}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return lines[1] if len(lines) > 1 else lines[0]
