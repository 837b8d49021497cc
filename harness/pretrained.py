"""Pretrained models: the weights of Hugging Face's GPT-2, Llama and their kin, read into this GPT and written from it.

`FAMILIES` says how; the files are read and written here as they are, without transformers and without its classes.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.checkpoint import CONV1D, WRAPPERS, listed, parameter_count, without_weights
from harness.errors import UserError
from harness.families import Family, describe, read_config
from harness.files import check_folder, make_folder, write_text, written_whole
from harness.huggingface_tokenizer import HuggingFace
from harness.text_files import read_json
from harness.tokenizer import GPT2
from harness.torch_files import read_torch_file
from kernels.backends import FLOATS
from model import GPT, GPTConfig

# The sha256 of GPT-2's tokens as vocab.json has them, in the order of their ids, a line each.
_GPT2_VOCABULARY = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"
# Buffers that older versions stored among the weights, and that follow from config.json: causal masks, frequencies.
_BUFFERS = re.compile(r"\.(masked_bias|rotary_emb\.inv_freq)$")


def load_hf(name_or_folder: str) -> GPT:
    """A GPT in float32 with the weights of a Hugging Face model: a hub name or a local folder. UserError if that cannot
    be had or is none that this model expresses.

    The files are read as they are: config.json, and the weights in one file or several, as safetensors or as PyTorch
    writes them. No code of theirs is run, and what this model has no place for is refused, not left out. Beside the
    model itself there is never more in memory than one of the files.
    """
    source = f"hf:{name_or_folder}"
    _check_place(name_or_folder)
    if (found := _find(name_or_folder, "config.json")) is None:
        raise UserError(f"{source}: no config.json there, or the hub cannot be reached: it says the shape of the model")
    c = _read_json(found, source)
    if _find(name_or_folder, "adapter_config.json"):
        raise UserError(
            f"{source}: an adapter lies beside its weights and would be left out: merge it into them first "
            "(merge_and_unload in PEFT), or remove adapter_config.json"
        )
    try:
        family, config = read_config(c)
    except ValueError as e:
        raise UserError(f"{source}: {e}") from e
    sizes = {path: path.stat().st_size for path in _weight_files(name_or_folder)}
    if empty := [path.name for path, size in sizes.items() if not size]:
        raise UserError(f"{source}: {empty[0]} is truncated: there is nothing in it")
    try:
        count, size = parameter_count(config), sum(sizes.values())
        # A parameter takes two bytes or more, and a layer's names a hundred; what a small file lacks is named below.
        if max(count, 100 * config.n_layer) > size + 100_000:
            what = f"a GPT of {config.n_layer} layers, {config.n_embd} wide, with {count:,} parameters"
            raise ValueError(f"the weights lack most of {what}: they are {size:,} bytes")
        model = without_weights(config).to_empty(device="cpu")
    except (ValueError, RuntimeError, TypeError) as e:
        raise UserError(f"{source}: its weights and its config.json do not fit together: {e}") from e
    if config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    try:
        # A generator's own variable would keep the last weight of a file while the next one is read.
        _fill(model, family, itertools.chain.from_iterable(_read_file(path, source) for path in sizes))
    except (ValueError, RuntimeError) as e:  # the latter for tensors that are no plain weights
        raise UserError(f"{source}: its weights and its config.json do not fit together: {e}") from e
    return model


def _fill(model: GPT, family: Family, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Copy every weight to its place in the model. ValueError, naming the weight, unless each place gets one, of the
    right shape and of floats, and each weight has one."""
    stored = stored_weights(dict(model.named_parameters()), model.config, family)
    known = {name.removeprefix(family.trunk): name for name in stored}
    known |= {"lm_head.weight": family.head, family.head: family.head}
    filled: set[str] = set()
    unknown: set[str] = set()
    head = None  # of a tied model, to be compared when the embedding is there

    def take(given: str, weight: Tensor) -> None:
        nonlocal head
        if _BUFFERS.search(given) or (given.endswith((".attn.bias", ".attention.bias")) and weight.dim() == 4):
            return
        if weight.dtype not in FLOATS:
            dtype = str(weight.dtype).removeprefix("torch.")
            raise ValueError(f"{given} is {dtype}: weights that were quantized cannot be loaded, save them as float32")
        parts = [part for part in given.split(".") if part not in WRAPPERS]
        inner = (".".join(parts[i:]) for i in range(len(parts)))  # the trunk and what may be around it leave the name
        name = next((known[rest] for rest in inner if rest in known), None)
        if name is None:
            unknown.add(given)
            return
        if name in filled:
            raise ValueError(f"{given} and another of the weights are both {name}")
        filled.add(name)
        if name not in stored:
            head = weight
            return
        shape, place = stored[name]
        if weight.shape != shape:
            raise ValueError(f"{given} is {tuple(weight.shape)}, where config.json makes it {tuple(shape)}")
        place.copy_(weight.reshape(place.shape))

    for item in weights:
        take(*item)
        del item  # the last of a file's tensors must not be there beside the next file's
    for problem, names in (("lack", stored.keys() - filled), ("also have", unknown)):
        if names:
            raise ValueError(f"the weights {problem} {listed(names)}")
    if head is not None:
        embedding = model.transformer.wte.weight
        if head.shape != embedding.shape or not ((head == embedding) | (head.isnan() & embedding.isnan())).all():
            raise ValueError(f"{family.head} is not the embedding, to which config.json ties it (tie_word_embeddings)")


class Stored(NamedTuple):
    """A weight as a family stores it: its shape there, and the part of our parameter that holds it, in their order of
    rows. Both have as many elements; the part may have the first dimension divided in several."""

    shape: torch.Size
    part: Tensor


def stored_weights(parameters: dict[str, Tensor], config: GPTConfig, family: Family) -> dict[str, Stored]:
    """The weights that the family's class has, by its names. ValueError for a parameter of ours that it has not."""
    sizes = [heads * config.head_size for heads in (config.n_head, config.kv_heads, config.kv_heads)]  # rows of q, k, v
    stored = {}
    for name, parameter in parameters.items():
        module, _, kind = name.rpartition(".")
        layer = "".join(re.findall(r"\.(\d+)\.", module))
        theirs = family.weights.get(module.replace(f".{layer}.", ".#.") if layer else module)
        if theirs is None:
            raise ValueError(f"{family.architecture} has no {name}")
        parts: tuple[Tensor, ...] = (parameter.detach(),)
        if isinstance(theirs, tuple):
            parts = parts[0].split(sizes)
        elif family.conv1d and name.endswith(CONV1D):
            parts = (parts[0].t(),)
        shapes = [part.shape for part in parts]
        if family.interleaved and module.endswith("c_attn"):
            parts = (parts[0].unflatten(0, (3, config.n_head, config.head_size)).transpose(0, 1),)
        names = theirs if isinstance(theirs, tuple) else (theirs,)
        for their, shape, part in zip(names, shapes, parts, strict=True):
            stored[f"{their.replace('#', layer)}.{kind}"] = Stored(shape, part)
    return stored


def _weight_files(name_or_folder: str) -> list[Path]:
    """The files that hold the weights. UserError where there are none, or one is missing, empty or elsewhere."""
    source = f"hf:{name_or_folder}"
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (path := _find(name_or_folder, whole)) is not None:
            return [path]
        if (index := _find(name_or_folder, f"{whole}.index.json")) is not None:
            parts, found = _read_json(index, source).get("weight_map"), []
            for part in sorted(set(map(str, parts.values() if isinstance(parts, dict) else ()))):
                if Path(part).is_absolute() or ".." in Path(part).parts or "\0" in part:
                    raise UserError(f"{source}: its {index.name} names {part!r:.200}, which is not in its folder")
                if (path := _find(name_or_folder, part)) is None:
                    raise UserError(f"{source}: its {index.name} names {part:.80}, which is not there")
                found.append(path)
            return found
    raise UserError(f"{source}: cannot load a model from there: no model.safetensors and no pytorch_model.bin")


def _read_file(path: Path, source: str) -> Iterator[tuple[str, Tensor]]:
    if path.suffix != ".safetensors":
        try:
            content = read_torch_file(path)
        except UserError as e:
            raise UserError(f"{source}: {e}") from e
        weights = content if isinstance(content, dict) else {path.name: content}
        if not all(isinstance(name, str) and torch.is_tensor(weight) for name, weight in weights.items()):
            raise UserError(f"{source}: {path.name} holds no weights: they are not tensors by their names")
        yield from weights.items()
        return
    safetensors = _import("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                yield name, file.get_tensor(name)
    except (OSError, ValueError, safetensors.SafetensorError) as e:
        raise UserError(f"{source}: cannot read {path.name}: {e}") from e


def _read_json(path: Path, source: str) -> dict:
    try:
        content = read_json(path)
    except (OSError, ValueError) as e:
        raise UserError(f"{source}: cannot read {path.name}: {e}") from e
    if not isinstance(content, dict):
        raise UserError(f"{source}: {path.name} holds {content!r:.50}, not keys and their values")
    return content


def _check_place(name_or_folder: str) -> None:
    """UserError for what can only be a folder and is none. On the hub a name is MODEL or OWNER/MODEL; out/… is ours."""
    path = Path(name_or_folder).expanduser()
    is_path = name_or_folder.startswith(("/", ".", "~")) or len(path.parts) > 2 or path.parts[:1] == ("out",)
    if (is_path or (len(path.parts) == 2 and path.parent.is_dir())) and not path.is_dir():
        raise UserError(f"hf:{name_or_folder}: no such folder")


def _find(name_or_folder: str, filename: str) -> Path | None:
    """A file in the folder, or of the model of that name on the hub, from its cache or fetched; None if it has none."""
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        # os.path.exists is False, too, for a name that no file can have; Path.exists would raise.
        return folder / filename if os.path.exists(folder / filename) else None
    hub = _import("huggingface_hub.errors")
    try:
        return Path(hub.hf_hub_download(name_or_folder, filename))
    except hub.errors.EntryNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f"hf:{name_or_folder}: cannot load a model from there: {str(e).strip().splitlines()[0]}") from e


def tokenizer_of(name_or_folder: str) -> dict[str, Any] | None:
    """What `harness.tokenizer.from_meta` makes the tokenizer of a Hugging Face model of: GPT-2's, where it has the ids
    of that, or what its tokenizer.json describes. One that cannot be used is "of its own (FILE)", with the problem;
    None if there is none, or none can be reached; UserError if what is named can only be a folder, and is none."""
    _check_place(name_or_folder)
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
            except (TypeError, ValueError, AttributeError, KeyError):  # a file of that name that is something else
                pass
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


def save_hf(model: GPT, folder: str | Path) -> str:
    """Write a GPT as a Hugging Face model into `folder`; the name of transformers' class that loads it. UserError, with
    the reason, if no family can express it or the folder cannot be written to."""
    folder = Path(folder)
    check_folder(folder)
    try:
        family, c = describe(model)
        config = read_config(c)[1]
        names = {name: p.shape for name, p in without_weights(config).named_parameters()}
        own = dict(model.named_parameters())
        zeros = {name: torch.zeros(shape) for name, shape in names.items() if name not in own}
        stored = stored_weights(own | zeros, config, family)
    except ValueError as e:
        raise UserError(f"this model cannot be exported: {e}") from e
    weights = {name: part.reshape(shape).contiguous() for name, (shape, part) in stored.items()}
    make_folder(folder)
    with written_whole(folder / "model.safetensors") as temporary:
        _import("safetensors.torch").torch.save_file(weights, temporary, metadata={"format": "pt"})
    write_text(folder / "config.json", json.dumps(c, indent=2) + "\n")
    return family.architecture


def _import(module: str) -> Any:
    """The package that `module` is in, with that module imported."""
    try:
        return __import__(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"models of Hugging Face need {package}: pip install {package}") from None
