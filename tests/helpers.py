"""What tests share: tiny models, corpora and checkpoints, tokenizers, what programs write, cases of attention."""

import contextlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import transformers
from matplotlib.figure import Figure
from matplotlib.text import Text
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.profiler import ProfilerActivity, profile

from harness import documents
from harness.checkpoint import save_checkpoint
from harness.corpus import Corpus
from harness.corpus_writing import write_corpus
from harness.diagnostics import Diagnostic, Subject, argument_parser, run
from harness.errors import UserError, run_cli
from harness.huggingface_tokenizer import _LLAMA3, _QWEN
from harness.optimizers import parameter_groups
from harness.tokenizer import Bytes, Chars
from kernels.backends import materialized_attention
from model import GPT, NORMALIZERS, Backward, GPTConfig

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"  # larger files that a checkout may have beside it
TINY = {"block_size": 12, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 8}
TODAY = {  # what a model of today has and GPT-2 has not, two query heads to each head of keys
    "n_head": 4,
    "n_kv_head": 2,
    "head_dim": 6,
    "n_inner": 10,
    "position": "rope",
    "rope_theta": 100.0,
    "norm": "rmsnorm",
    "qk_norm": True,
    "mlp": "swiglu",
    "bias": False,
    "tie_embeddings": False,
}
LETTERS = "abcdefghijklm"


# --- models, corpora, checkpoints -------------------------------------------------------------------------------------


def tiny_gpt(seed: int = 0, std: float | None = None, noise: float = 0.0, **config) -> GPT:
    """A GPT in eval mode; with `std` or `noise`, attention and logits are far from uniform, as in a trained model.

    `std`: every parameter is drawn from N(0, std²); `noise`: N(0, noise²) is added to its initial value.
    """
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**TINY | config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if std is not None:
                parameter.normal_(0, std)
            if noise:
                parameter += noise * torch.randn(parameter.shape)
    return model


def with_repeated_keys(model: GPT) -> GPT:
    """The same function as a model in which each query head has a head of keys and values of its own."""
    config, state = model.config, dict(model.state_dict())
    for name in [name for name in state if ".c_attn." in name]:
        heads = state[name].unflatten(0, (-1, config.head_size))
        q, k, v = heads.split([config.n_head, config.kv_heads, config.kv_heads])
        k, v = (x.repeat_interleave(config.n_head // config.kv_heads, 0) for x in (k, v))
        state[name] = torch.cat((q, k, v)).flatten(0, 1)
    whole = GPT(replace(config, n_kv_head=config.n_head)).to(model.lm_head.weight.dtype).eval()
    whole.load_state_dict(state)
    return whole


def random_ids(*shape: int, vocab_size: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def tiny_corpus(folder: Path, train: int = 400, val: int = 201, letters: str | None = LETTERS) -> Path:
    """A prepared corpus of as many random characters out of `letters`; of printable bytes where that is None."""
    generator = np.random.default_rng(0)
    if letters is None:
        text, tokenizer = bytes(generator.integers(32, 127, train + val).tolist()), Bytes()
    else:
        text, tokenizer = "".join(generator.choice(list(letters), train + val)), Chars(letters)
    write_corpus(folder, [("train", text[:train]), ("val", text[train:])], tokenizer, source="test")
    return Path(folder)


DOCUMENTS = [("train", "one\n"), ("val", "two"), ("train", b"\xff"), ("train", "")]


def write_documents(folder: Path, documents=DOCUMENTS, tokenizer=None, **options) -> None:
    """A corpus of (split, text) in the folder, by default of a few bytes."""
    write_corpus(folder, documents, tokenizer or Bytes(), source="test", threads=2, **options)


def corpus_error(folder: Path, **options) -> str:
    """The one line that reading the corpus ends with."""
    with pytest.raises(UserError) as caught:
        Corpus(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def text_in_pieces(words: list[tuple[str, str]], size: int) -> tuple[str, list[bytes]]:
    """A text of these words, each with its space behind it, and the pieces of about `size` bytes it is cut into."""
    text = "".join(word + space for word, space in words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", size)
        return text, list(documents.pieces(text))


def squares_corpus(folder: str | Path = "corpus") -> None:
    """Text in bytes of which a tiny model learns something within a few steps."""
    text = b" ".join(b"%d squared is %d." % (i, i * i) for i in range(3000))
    write_corpus(folder, [("train", text[:40000]), ("val", text[40000:44001])], Bytes(), source="test")


def save_model(model: GPT, path: str | Path, corpus: str | Path | None = None, /, **more) -> Path:
    """Writes a checkpoint of the model at step 7, trained on `corpus`; `more` replaces or adds what it holds."""
    content = {"model": model.state_dict(), "model_args": asdict(model.config), "step": 7}
    if corpus is not None:
        meta = Path(corpus) / "meta.json"
        known = json.loads(meta.read_text()) if meta.exists() else {}
        content["corpus"] = {key: known.get(key) for key in ("tokenizer", "vocabulary")} | {"folder": str(corpus)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, content | more)
    return path


def nanogpt_peer(folder: Path) -> tuple[Path, transformers.GPT2LMHeadModel, Path]:
    """A checkpoint as nanoGPT writes it, of a compiled model of an older PyTorch: prefixed names, the causal masks.

    With it the same weights in Hugging Face's GPT-2, in float64, and a corpus of its 65 characters.
    """
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 65}
    torch.manual_seed(0)
    options = {"activation_function": "gelu", "initializer_range": 0.4, "attn_implementation": "eager"}
    config = transformers.GPT2Config(**shape, n_positions=16, bos_token_id=0, eos_token_id=0, **options)
    peer = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)  # biases and gains too, which are all 0 and 1 at first
    state = {}
    for name, value in peer.state_dict().items():
        transposed = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))  # theirs are (in, out)
        state[f"_orig_mod.{name}"] = value.T.contiguous() if transposed else value
    for layer in range(2):
        state[f"_orig_mod.transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    args = shape | {"block_size": 16, "bias": True, "dropout": 0.0}
    rest = {"optimizer": {}, "iter_num": 5000, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "made up"}}
    torch.save({"model": state, "model_args": args} | rest, folder / "ckpt.pt")
    corpus = tiny_corpus(folder / "corpus", 2000, 321, "".join(map(chr, range(60, 125))))
    return folder / "ckpt.pt", peer.double(), corpus


def shakespeares_nanogpt() -> tuple[Path, np.ndarray]:
    """A checkpoint that nanoGPT itself trained on tiny shakespeare, and the ids of its validation text.

    Larger than a repository should hold: the tests of its known figures are skipped where it does not lie beside it.
    """
    checkpoint, text = SHARED / "nanogpt_checkpoint" / "ckpt.pt", SHARED / "tinyshakespeare" / "input.txt"
    if not (checkpoint.exists() and text.exists()):
        pytest.skip(f"an extra beside the made checkpoint: no {checkpoint} and {text}")
    characters = text.read_text()
    ids = {character: i for i, character in enumerate(sorted(set(characters)))}
    return checkpoint, np.array([ids[c] for c in characters[int(0.9 * len(characters)) :]], dtype=np.int64)


def smollm2_with_known_figures(model: Path, folder: Path, diagnostic: Diagnostic, *options) -> tuple[Subject, dict]:
    """SmolLM2 about to be measured on the text of which an independent implementation has figures, and these figures.

    They are in float64, to ten digits. The corpus, made in `folder`, is 16 windows of 64 tokens for validation, and the
    first 2 of 128 for training.
    """
    figures = SHARED.parent / "reference_smollm2.json"
    if not figures.exists():
        pytest.skip(f"an extra: no {figures}")
    known = json.loads(figures.read_text())
    ids = np.array([*known["tokens"], 0], dtype=np.uint16)  # the last is a target alone
    ids.tofile(folder / "val.bin")
    ids[: 2 * 128 + 1].tofile(folder / "train.bin")
    (folder / "meta.json").write_text('{"vocab_size": 49152}')
    parser = argument_parser(diagnostic.name, "", diagnostic.batches, diagnostic.batch_size)
    diagnostic.add_arguments(parser)
    arguments = (f"hf:{model}", "--data", folder, "--device", "cpu", *options)
    return Subject(f"hf:{model}", parser.parse_args(list(map(str, arguments)))), known


# --- tokenizers of Hugging Face models --------------------------------------------------------------------------------

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE_TOKENIZERS = {
    "gpt2": WORDS,
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]),
    "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), BYTES]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN), "isolated"), BYTES]),
}


def byte_level(kind: str) -> Tokenizer:
    """A tokenizer of 700 ids of the family's kind, with what the families have beside."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    tokenizer.pre_tokenizer, tokenizer.decoder = PRE_TOKENIZERS[kind], decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "smollm2":
        alphabet = sorted(set(alphabet) - {"ñ", "ď"})  # bytes that the model has never seen
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    names = ("model.py", "README.md", "docs/attention.md")
    tokenizer.train_from_iterator([(ROOT / name).read_text() for name in names], trainer)
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.add_tokens([AddedToken("<think>"), AddedToken("   "), AddedToken("  ")])
    if kind == "llama3":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $0", special_tokens=[("<|endoftext|>", 0)]
        )
    return tokenizer


# --- what programs write, show and allocate ---------------------------------------------------------------------------


def diagnose(diagnostic: Diagnostic, *arguments) -> int:
    """The exit status of a diagnostic's script, run in this process."""
    return run_cli(lambda: run(diagnostic, list(map(str, arguments)))) or 0


def read_json(path: str | Path) -> dict:
    """What a script wrote; strict, in that NaN and Infinity are no JSON."""
    return json.loads(Path(path).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def covered(figure: Figure) -> list[str]:
    """The titles, texts and curves of a figure that a legend in the same axes lies on."""
    figure.canvas.draw()
    found = []
    for axes in figure.axes:
        if legend := axes.get_legend():
            box = legend.get_window_extent()
            texts = [child for child in axes.get_children() if isinstance(child, Text) and child.get_text()]
            found += [text.get_text() for text in texts if box.overlaps(text.get_window_extent())]
            for line in axes.lines:
                points = line.get_transform().transform(line.get_xydata())
                found += [str(line.get_label())] * bool(box.count_contains(points))
    return found


def allocated(run) -> int:
    """The most bytes that `run()` had allocated at a time on the CPU, by PyTorch's profiler, which sees every block."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events, rest = [], profiler.profiler.kineto_results.experimental_event_tree()
    while rest:
        event = rest.pop()
        rest += event.children
        if event.typed[0] == torch._C._profiler._EventType.Allocation:
            events.append((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size))
    live: dict[int, int] = {}
    most = total = 0
    for _, address, size in sorted(events, key=lambda event: event[0]):
        total -= live.pop(address, 0)  # before a new block too: what another thread frees is not told
        if size > 0:
            live[address] = size
            total += size
            most = max(most, total)
    return most


# --- cases of attention -----------------------------------------------------------------------------------------------

B, H, D = 2, 2, 4
BACKWARDS = get_args(Backward)
VARIANTS = {  # arguments of attention, and the null slot's logit of each head
    "softmax": ({"normalizer": "softmax"}, None),
    "softmax1": ({"normalizer": "softmax1"}, torch.zeros(H, dtype=torch.float64)),
    "sink": (
        {"normalizer": "sink", "null_logit": torch.tensor([-1.0, 0.5]).double()},
        torch.tensor([-1.0, 0.5]).double(),
    ),
}
# Some 50 roundings (products over D, sums over T, one exp) of numbers below 20, each of half an ε: about 1e-13.
FLOAT64 = {"rtol": 0, "atol": 1e-13}
FLOAT32 = {"rtol": 0, "atol": 1e-13 * torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps}  # 5e-5
ROUNDING = {torch.float64: FLOAT64, torch.float32: FLOAT32}

every_normalizer = pytest.mark.parametrize("normalizer", VARIANTS)
both_dtypes = pytest.mark.parametrize("dtype", ROUNDING)  # on a CPU two kernels, PyTorch's and our own
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_backward = pytest.mark.parametrize("backward", BACKWARDS)
# What runs on fused kernels (equal T_q and T_k, no dropout) has to hold in the readable form as well.
both_forms = pytest.mark.parametrize("form", [contextlib.nullcontext, materialized_attention])
every_shape = pytest.mark.parametrize(("T_q", "T_k"), [(6, 6), (3, 7), (1, 5), (1, 1)])


def qkv(T_q: int, T_k: int, seed: int = 0, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, T_q, D), (B, H, T_k, D), (B, H, T_k, D))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def explicit_weights(q, k, null_logit=None, scale=None):
    """P (B, H, T_q, T_k): the softmax over an explicit null slot and the visible keys, row by row; the slot dropped."""
    T_q, T_k = q.size(-2), k.size(-2)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (1 / math.sqrt(q.size(-1)) if scale is None else scale)
    rows = []
    for i in range(T_q):
        seen = i + T_k - T_q + 1
        row = scores[:, :, i, :seen]
        if null_logit is not None:
            row = torch.cat((null_logit.view(1, H, 1).expand(q.size(0), H, 1), row), dim=-1)
        weights = torch.softmax(row, dim=-1)[..., -seen:]
        rows.append(torch.nn.functional.pad(weights, (0, T_k - seen)))
    return torch.stack(rows, dim=2)


def curve_record(step: int) -> dict:
    """A line of metrics.jsonl, as of a run that learns."""
    loss = 1 + 4 * math.exp(-step / 100)
    return {
        "step": step,
        "train/loss": loss,
        "train/lr": 1e-3,
        "train/grad_norm": 0.5 + 1 / (1 + step),
        "train/tokens_per_second": 51234.5,
        "val/loss": loss + 0.1,
        "val/perplexity": math.exp(loss + 0.1),
        "val/bits_per_byte": (loss + 0.1) / math.log(2),
        "weight_kurtosis/a": 0.1,
        "weight_kurtosis/b": step / 10,
        "weight_kurtosis/c": 0.3,
        "weight_kurtosis/constant": None,
        "activation_kurtosis/val/attention_probabilities_late": -0.5 + step,
    }


def write_curves(folder: Path, records: list[dict] | None = None, end: str = "") -> str:
    """A run's metrics.jsonl in the folder, whose path is returned; `end` is what stands after its last line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line) + "\n" for line in records or map(curve_record, range(0, 300, 10))]
    (folder / "metrics.jsonl").write_text("".join(lines) + end)
    return str(folder)


def optimizer_of(model: GPT) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=3e-3, betas=(0.9, 0.99))


def train_by_hand(model: GPT, optimizer, steps: int, clip: float = 0.5) -> None:
    """So many steps of a tiny GPT, on random ids that follow from the step."""
    for step in range(steps):
        x = random_ids(4, 13, seed=step)
        model(x[:, :-1], x[:, 1:])[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


# --- a model whose attention and logits tell tokens apart ------------------------------------------------------------

TELLING = GPTConfig(block_size=12, vocab_size=17, n_layer=2, n_head=2, n_embd=8, bias=True)

every_attention = pytest.mark.parametrize(
    ("normalizer", "backward"),
    [(normalizer, backward) for normalizer in NORMALIZERS for backward in BACKWARDS],
)


def telling_gpt(config: GPTConfig = TELLING, seed: int = 2) -> GPT:
    """With matrices large enough for attention and logits that tell tokens and positions apart."""
    model = tiny_gpt(seed, **asdict(config))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 or name.endswith("sink"):
            torch.nn.init.normal_(parameter, std=2 if parameter is model.transformer.wpe.weight else 1)
    return model


def tokens(*shape: int, vocab_size: int = TELLING.vocab_size) -> torch.Tensor:
    return random_ids(*shape, vocab_size=vocab_size, seed=1)
