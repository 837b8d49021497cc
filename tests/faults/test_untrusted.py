"""Files that anyone may have made are data: whatever is in them, a loader gives what they mean or a line, runs nothing,
writes nowhere but into the run's folder, and takes no more memory than a file of that size may.

Each loader gets a file that it reads, of which a few values, names or bytes have been replaced.
"""

import copy
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.checkpoint import feedback_of, load_model
from harness.config_files import load_config
from harness.corpus import Corpus
from harness.curves import config_beside, read_run, variants
from harness.diagnostics import keep_results
from harness.errors import UserError
from harness.experiments.claims import judge, load_claims
from harness.experiments.grid import load_experiment
from harness.experiments.results import read_results
from harness.optimizers import make_optimizer
from harness.pretrained import load_hf, save_hf
from harness.resuming import best_so_far, check_resume, checkpoint_to_resume, initial_model, restore_optimizer
from harness.tokenizer import from_meta, from_name
from tests.faults.mutation import PLAIN, TENSORS, mutate, mutate_bytes
from tests.helpers import (
    ROOT,
    byte_level,
    optimizer_of,
    squares_corpus,
    tiny_corpus,
    tiny_gpt,
    train_by_hand,
    write_documents,
)

MEMORY = 64 * 2**20
"""bytes that a loader may take beside those of the file, which has some 20,000: what it imports, what is never freed"""

# --- what a loader does to the machine --------------------------------------------------------------------------------

_watched = SimpleNamespace(folder=None, seen=[])


def _audit(event: str, arguments: tuple) -> None:
    if _watched.folder is None:
        return
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect", "os.remove"):
        _watched.seen.append((event, arguments))
    if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        path = Path(os.path.abspath(os.fsdecode(arguments[0])))
        if not path.is_relative_to(_watched.folder) and path != Path(os.devnull):
            _watched.seen.append((event, arguments))


sys.addaudithook(_audit)  # for good: there is no way to take one back


def _status(key: str) -> int:
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))


@contextmanager
def harmless(folder: Path) -> Iterator[None]:
    """Nothing is run, nothing is written outside of the folder, and the memory is that of a small file."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = _status("VmRSS")
    _watched.folder, _watched.seen = folder, []
    try:
        yield
    finally:
        _watched.folder = None
    assert not _watched.seen
    assert _status("VmHWM") - before < MEMORY


# --- the loaders ------------------------------------------------------------------------------------------------------


class Loader(NamedTuple):
    file: str
    make: Callable[[], Any]
    """fills the current folder; what the file there holds, as a tree or as bytes"""
    write: Callable[[Any, str], None]
    load: Callable[[], Any]
    values: list = PLAIN


def write_json(tree, path: str) -> None:
    Path(path).write_text(json.dumps(tree))


def write_yaml(tree, path: str) -> None:
    Path(path).write_text(yaml.safe_dump(tree, sort_keys=False))


def write_bytes(content: bytes, path: str) -> None:
    Path(path).write_bytes(content)


SHAPE = {"block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 8}
RUN = ["--run.name", "run", "--data.corpus", "corpus", "--optimizer.warmup_steps", "1", "--training.max_steps", "9"]
RUN += [word for key, value in SHAPE.items() for word in (f"--model.{key}", str(value))]


def make_run() -> dict:
    tiny_corpus(Path("corpus"), letters=None)
    Path("config.yaml").write_text("{}")
    Path("out/run").mkdir(parents=True)
    model = tiny_gpt(**SHAPE)
    optimizer = make_optimizer(model, config().optimizer)
    train_by_hand(model, optimizer, 1)
    corpus = Corpus("corpus")
    content = {"format": 1, "model": dict(model.state_dict()), "feedback": {}, "model_args": asdict(model.config)}
    content |= {"step": 5, "best_val_loss": 1.5, "config": config().to_dict(), "machine": {"ranks": 1}}
    content["corpus"] = corpus.tokenizer.describe() | {"folder": "corpus", "sha256": corpus.sha256}
    return content | {"reference": None, "optimizer": optimizer.state_dict(), "scaler": {}}


def config():
    return load_config(["config.yaml", *RUN])


CONFIG: list = []


def resume() -> None:
    """All of what a resume reads, and a step, which must not crash."""
    CONFIG[:] = CONFIG or [config()]
    shutil.copy("out/run/ckpt.pt", "out/run/best.pt")
    info = load_model("out/run/ckpt.pt")[1]
    feedback_of(info, "out/run/ckpt.pt")
    corpus, wanted = Corpus("corpus"), copy.deepcopy(CONFIG[0])
    corpus.check_fits("out/run/ckpt.pt", info, 256)
    checkpoint = checkpoint_to_resume(wanted)
    model = initial_model(wanted, corpus, checkpoint, lambda *_: None)
    check_resume(wanted, checkpoint, corpus, None, {"ranks": 1, "threads": 1}, lambda *_: None)
    best_so_far(wanted, checkpoint, 10, lambda *_: None)
    optimizer = make_optimizer(model, wanted.optimizer)
    restore_optimizer(optimizer, checkpoint)
    train_by_hand(model, optimizer, 1)


def make_nanogpt() -> dict:
    model = tiny_gpt()
    args = {key: value for key, value in asdict(model.config).items() if key in (*SHAPE, "vocab_size", "bias")}
    state = {f"_orig_mod.{name}": weight for name, weight in model.state_dict().items()}
    rest = {"optimizer": optimizer_of(model).state_dict(), "iter_num": 5, "config": {"dataset": "x", "lr": 1e-3}}
    return {"model": state, "model_args": args | {"dropout": 0.0}, "best_val_loss": torch.tensor(1.5)} | rest


def make_quietgpt() -> dict:
    content = make_nanogpt()
    content["model_args"]["use_softmax1"] = True
    content["model"]["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12)
    return content


def make_hf() -> dict:
    save_hf(tiny_gpt(), ".")
    return json.loads(Path("config.json").read_text())


def make_index() -> dict:
    make_hf()
    os.rename("model.safetensors", "part.safetensors")
    return {"metadata": {"total_size": 1}, "weight_map": {"a": "part.safetensors", "b": "part.safetensors"}}


def make_safetensors() -> dict:
    make_hf()
    content = Path("model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    return {"header": json.loads(content[8 : 8 + size]), "data": content[8 + size :]}


def write_safetensors(tree: dict, path: str) -> None:
    header = json.dumps(tree.get("header")).encode()
    data = tree.get("data")
    write_bytes(len(header).to_bytes(8, "little") + header + (data if isinstance(data, bytes) else b""), path)


def make_tokenizer() -> dict:
    tree = json.loads(byte_level("qwen2").to_str())
    vocabulary = dict(list(tree["model"]["vocab"].items())[:270])  # fewer, so that other parts are met
    kept = [merge for merge in tree["model"]["merges"] if "".join(merge) in vocabulary]
    return tree | {"model": tree["model"] | {"vocab": vocabulary, "merges": kept}}


def tokenize() -> None:
    tokenizer = from_name(f"hf:{os.getcwd()}")
    tokenizer.decode(tokenizer.encode("We think of 10 things.")[:4])
    from_meta(tokenizer.describe()).token_bytes()


def make_meta() -> dict:
    write_documents(Path("corpus"))
    return json.loads(Path("corpus/meta.json").read_text())


def read_corpus() -> None:
    corpus = Corpus("corpus")
    corpus.tokenizer.decode(corpus.tokens["val"][:9])
    for split in ("train", "val"):
        corpus.bytes_per_token[split]
    if corpus.meta.get("document_separator") is not None:
        corpus.document_bounds("val")


def make_pickle() -> bytes:
    squares_corpus()
    os.remove("corpus/meta.json")
    letters = list(map(chr, range(128)))
    meta = {"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": {c: i for i, c in enumerate(letters)}}
    return pickle.dumps(meta)


def make_config() -> dict:
    Path("base.yaml").write_text("training: {batch_size: 4}")
    return {"extends": "base.yaml"} | make_config_sections()


def make_config_sections() -> dict:
    Path("config.yaml").write_text("{}")
    return load_config(["config.yaml"]).to_dict()


GRID = {
    "question": "?",
    "base": str(ROOT / "configs" / "backcopy_softmax.yaml"),
    "seeds": [1],
    "config": {"training": {"max_steps": 40, "batch_size": 4}, "model": {"block_size": 8}},
    "variants": {"a": None, "b": {"model": {"normalizer": "softmax1"}}},
    "diagnostics": {"every": 20, "activation_kurtosis": {"batches": 2, "along": False}},
    "prepare": ["data/backcopy/prepare.py", "--out", "data/x"],
}
CLAIM = {
    "sentence": "It falls.",
    "source": "Someone",
    "tested_at": "nothing",
    "experiment": "../grid.yaml",
    "seeds": 2,
    "given": {"val/loss": "a > 1"},
    "decides": {"val/loss": ["a < b + 0.5", "abs(a - b) < 3"]},
    "larger": {"experiment": "../grid.yaml"},
}


def make_claim() -> dict:
    write_yaml(GRID, "grid.yaml")
    Path("claims").mkdir()
    return copy.deepcopy(CLAIM)


EXPERIMENT: list = []


def claims() -> None:
    EXPERIMENT[:] = EXPERIMENT or [load_experiment(Path("grid.yaml"), Path("out"))]
    load_claims(EXPERIMENT[0])


def make_metrics() -> list:
    Path("config.yaml").write_text("run: {seed: 1}")
    return [{"step": step, "train/loss": 2.5, "val/loss": None, "weight_kurtosis/a": 1.0} for step in range(0, 30, 10)]


def write_lines(lines: list, path: str) -> None:
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_result() -> dict:
    """What a diagnostic wrote of the one cell that has been trained."""
    write_yaml(GRID, "grid.yaml")
    folder = Path("out/grid/a_s1")
    (folder / "diagnostics").mkdir(parents=True)
    write_lines([{"step": step, "val/loss": 2.5} for step in (0, 40)], str(folder / "metrics.jsonl"))
    row = {"layer": 0, "head": 1, "sink_rate": 0.5, "name": "x"}
    content = {"script": "activation_kurtosis", "checkpoint": "ckpt.pt", "step": 40, "config": {}, "rows": [row]}
    return {"checkpoints": [content | {"summary": {"sink_rate": 0.5}, "notes": [], "heads": [row]}]}


RESULT = "out/grid/a_s1/diagnostics/activation_kurtosis.json"


def results() -> None:
    found = read_results(load_experiment(Path("grid.yaml"), Path("out")))
    judge(found, [])
    keep_results(Path(RESULT), {"script": "activation_kurtosis", "checkpoint": "x"})


LOADERS = {
    "a run's checkpoint": Loader("out/run/ckpt.pt", make_run, torch.save, resume, PLAIN + TENSORS),
    "nanoGPT's checkpoint": Loader("ckpt.pt", make_nanogpt, torch.save, lambda: load_model("ckpt.pt"), PLAIN + TENSORS),
    "quietGPT's": Loader("ckpt.pt", make_quietgpt, torch.save, lambda: load_model("ckpt.pt"), PLAIN + TENSORS),
    "config.json": Loader("config.json", make_hf, write_json, lambda: load_hf(".")),
    "the index of weights": Loader("model.safetensors.index.json", make_index, write_json, lambda: load_hf(".")),
    "safetensors": Loader("model.safetensors", make_safetensors, write_safetensors, lambda: load_hf(".")),
    "tokenizer.json": Loader("tokenizer.json", make_tokenizer, write_json, tokenize),
    "meta.json": Loader("corpus/meta.json", make_meta, write_json, read_corpus),
    "meta.pkl": Loader("corpus/meta.pkl", make_pickle, write_bytes, read_corpus),
    "a config": Loader("x.yaml", make_config, write_yaml, lambda: load_config(["x.yaml"])),
    "an experiment": Loader(
        "grid.yaml", lambda: copy.deepcopy(GRID), write_yaml, lambda: load_experiment(Path("grid.yaml"), Path("out"))
    ),
    "a claim": Loader("claims/x.yaml", make_claim, write_yaml, claims),
    "metrics.jsonl": Loader("metrics.jsonl", make_metrics, write_lines, lambda: read_run(Path("metrics.jsonl"))),
    "a run's config.yaml": Loader(
        "config.yaml",
        make_config_sections,
        write_yaml,
        lambda: variants({"a": config_beside(Path("metrics.jsonl")), "b": {"run": {"seed": 1}}}),
    ),
    "a diagnostic's JSON": Loader(RESULT, make_result, write_json, results),
}


def fuzz(name: str, folder: Path, cases: int) -> None:
    loader = LOADERS[name]
    CONFIG.clear()
    EXPERIMENT.clear()
    original = loader.make()
    loader.write(copy.deepcopy(original), loader.file)
    content = Path(loader.file).read_bytes()
    loader.load()  # as it is, it can be read

    @settings(max_examples=cases, suppress_health_check=list(HealthCheck), database=None, derandomize=cases < 100)
    @given(data=st.data())
    def attempt(data) -> None:
        Path(loader.file).parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(original, bytes) and data.draw(st.integers(0, 3)):
            loader.write(mutate(data, copy.deepcopy(original), loader.values), loader.file)
        else:
            Path(loader.file).write_bytes(mutate_bytes(data, content))
        said = ""
        with harmless(folder):
            try:
                loader.load()
            except UserError as error:
                said = str(error)
        assert len(said) < 5000

    attempt()


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("cases", [12, pytest.param(1000, marks=[pytest.mark.faults, pytest.mark.slow])])
def test_a_file_that_anyone_may_have_made_is_read_as_data_or_refused_in_a_line(name, cases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fuzz(name, tmp_path, cases)
