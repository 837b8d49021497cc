"""Checkpoints: written whole or not at all, read without running what is in them."""

import errno
import io
import math
import os
import pickle
import re
import resource
import tarfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from harness.checkpoint import load_model, read_checkpoint, save_checkpoint
from harness.errors import UserError
from model import GPT, GPTConfig
from tests.helpers import tiny_gpt

CONFIG = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, normalizer="softmax1", backward="ste")
IDX = torch.arange(8).view(1, 8)


def checkpoint_of(model: GPT, step: int = 7) -> dict:
    return {
        "model": model.state_dict(),
        "model_args": asdict(model.config),
        "step": step,
        "best_val_loss": 1.5,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "config": {"run": {"name": None, "seed": 1}, "evaluation": {"batches": "full"}},
    }


def random_gpt(config: GPTConfig = CONFIG) -> GPT:
    return tiny_gpt(**vars(config))


@pytest.fixture
def path(tmp_path):
    """A checkpoint of step 7."""
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of(random_gpt()))
    return tmp_path / "ckpt.pt"


def refusal(path, read=read_checkpoint) -> str:
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# --- reading and writing --------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written(path):
    written, read = checkpoint_of(random_gpt()), read_checkpoint(path)
    assert list(read["model"]) == list(written["model"])
    assert all(torch.equal(read["model"][name], value) for name, value in written["model"].items())
    assert torch.equal(read["optimizer"]["state"][0]["exp_avg"], torch.ones(3))
    for key in ("model_args", "step", "best_val_loss", "config"):
        assert read[key] == written[key]


def test_load_model_gives_the_same_logits_in_eval_mode_and_the_rest(path):
    model, info = load_model(path)
    assert not model.training
    assert model.config == CONFIG
    assert torch.equal(model(IDX)[0], random_gpt()(IDX)[0])
    assert info["step"] == 7
    assert "model" not in info


def test_a_new_checkpoint_replaces_the_former_one(path):
    save_checkpoint(path, checkpoint_of(random_gpt(), step=8))
    assert read_checkpoint(path)["step"] == 8
    assert os.listdir(path.parent) == ["ckpt.pt"]


def disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def file_size_limit(monkeypatch):
    """As on a full disk, the real write fails half way (EFBIG)."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, former[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, former)


def failing(name):
    def break_it(monkeypatch):
        monkeypatch.setattr(f"os.{name}", disk_full)
        return monkeypatch.undo

    return break_it


@pytest.mark.parametrize(
    ("break_it", "cause"),
    [
        (file_size_limit, os.strerror(errno.EFBIG)),
        (failing("fsync"), os.strerror(errno.ENOSPC)),
        (failing("replace"), os.strerror(errno.ENOSPC)),
    ],
    ids=["write", "fsync", "rename"],
)
@pytest.mark.parametrize("former", [True, False])
def test_a_write_that_fails_leaves_what_was_there(path, monkeypatch, break_it, cause, former):
    before = path.read_bytes()
    if not former:
        path.unlink()
    mend = break_it(monkeypatch)
    try:
        with pytest.raises(UserError) as error:
            save_checkpoint(path, checkpoint_of(random_gpt(), step=8))
    finally:
        mend()
    message = str(error.value)
    for fragment in (str(path), "step 8", cause, "is intact" if former else "there was none"):
        assert fragment in message
    assert "\n" not in message
    assert os.listdir(path.parent) == (["ckpt.pt"] if former else [])  # no .tmp
    if former:
        assert path.read_bytes() == before


def test_an_interrupted_write_leaves_the_former_checkpoint(path, monkeypatch):
    before = path.read_bytes()

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, checkpoint_of(random_gpt(), step=8))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["ckpt.pt"]


# --- files that are no checkpoint -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "truncated" in refusal(path)


def test_without_its_last_byte(path):
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated" in refusal(path)


def archive(data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO(data))
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"To be, or not to be\n",
        b'{"model": {}, "model_args": {}}',
        pickle.dumps({"model": {}, "model_args": {}}),
        pickle.dumps([math.pi, "text", object], protocol=0),
        npz(),
        archive(b"nothing"),
        bytes(1000),
    ],
    ids=["text", "json", "pickle", "pickle of protocol 0", "npz", "tar", "zeros"],
)
def test_foreign(tmp_path, content):
    path = tmp_path / "foreign.pt"
    path.write_bytes(content)
    assert "not a checkpoint" in refusal(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60))
@example(content=b"J")  # a number of which nothing follows
def test_any_bytes_at_all(tmp_path, content):
    path = tmp_path / "random.pt"
    path.write_bytes(content)
    assert "not a checkpoint" in refusal(path)


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return open, (self.victim, "w")


def save_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("version", [2, "2025-01", 0])
def test_a_newer_format_is_refused(tmp_path, version):
    path = tmp_path / "ckpt.pt"
    torch.save(checkpoint_of(random_gpt()) | {"format": version}, path)
    message = refusal(path, load_model)
    assert f"ckpt.pt is a checkpoint of format {version!r}, and this version reads up to 1: update it" in message


@pytest.mark.parametrize("write", [torch.save, save_pickle])
def test_code_in_a_file_is_never_run(tmp_path, write):
    victim, path = tmp_path / "victim", tmp_path / "ckpt.pt"
    write(checkpoint_of(random_gpt()) | {"optimizer": Malicious(str(victim))}, path)
    refusal(path)
    refusal(path, load_model)
    assert not victim.exists()


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {}, {"model": {}}, {"model_args": {}}])
def test_other_things_saved_with_torch(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    message = refusal(tmp_path / "other.pt")
    for key in ("model", "model_args"):
        missing = not isinstance(content, dict) or key not in content
        assert bool(re.search(rf"no {key}\b", message)) == missing


def test_missing(tmp_path):
    assert "no checkpoint" in refusal(tmp_path / "ckpt.pt")


def test_a_folder(path):
    message = refusal(path.parent)
    assert "folder" in message
    assert str(path) in message  # what to name instead


def test_a_path_through_a_file(path):
    refusal(path / "ckpt.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"model": {}},
        {"model": 3},
        {"model_args": 3},
        {"model_args": {"n_embed": 8}},
        {"model_args": asdict(CONFIG) | {"n_head": 3}},
        {"model_args": asdict(CONFIG) | {"n_head": float(CONFIG.n_head)}},  # else a traceback at the first forward
        {"model_args": asdict(CONFIG) | {"n_embd": "8"}},
        {"model_args": asdict(CONFIG) | {"n_embd": 16}},
        {"model_args": asdict(CONFIG) | {"n_layer": 1}},
        {"model_args": asdict(CONFIG) | {"bias": False}},
        {"model_args": asdict(CONFIG) | {"normalizer": "softmax2"}},
    ],
)
def test_weights_and_model_args_that_do_not_fit(path, change):
    torch.save(checkpoint_of(random_gpt()) | change, path)
    assert "do not fit" in refusal(path, load_model)


# --- other projects' checkpoints ------------------------------------------------------------------------------------


def test_nanogpts_checkpoint_of_a_compiled_model(tmp_path):
    """nanoGPT's: no normalizer or backward, the exact GELU, iter_num; and what torch.compile does to the names."""
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, bias=False, activation="gelu")
    model = random_gpt(config)
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    torch.save(
        {
            "model": {f"_orig_mod.{name}": value for name, value in model.state_dict().items()},
            "model_args": {name: getattr(config, name) for name in names},
            "iter_num": 5000,
        },
        tmp_path / "ckpt.pt",
    )
    loaded, info = load_model(tmp_path / "ckpt.pt")
    assert loaded.config == config
    assert torch.equal(loaded(IDX)[0], model(IDX)[0])
    assert info["iter_num"] == 5000


@pytest.mark.parametrize("use_softmax1", [True, False])
def test_quietgpts_checkpoint(tmp_path, use_softmax1):
    """quietGPT's: `use_softmax1`, GPT-2's tanh GELU, and the causal mask stored as a buffer of each attention."""
    normalizer = "softmax1" if use_softmax1 else "softmax"
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, normalizer=normalizer)
    model = random_gpt(config)
    mask = torch.ones(8, 8).tril().view(1, 1, 8, 8)
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    torch.save(
        {
            "model": model.state_dict() | {f"transformer.h.{i}.attn.bias": mask for i in range(2)},
            "model_args": {name: getattr(config, name) for name in names} | {"use_softmax1": use_softmax1},
        },
        tmp_path / "ckpt.pt",
    )
    loaded, _ = load_model(tmp_path / "ckpt.pt")
    assert loaded.config == config
    assert torch.equal(loaded(IDX)[0], model(IDX)[0])
