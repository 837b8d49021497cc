"""Checkpoints: written whole or not at all, read without running what is in them."""

import errno
import io
import math
import os
import pickle
import random
import re
import resource
import tarfile
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from harness.checkpoint import load_model, model_config, read_checkpoint, save_checkpoint
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


def saved(path: Path) -> Path:
    save_checkpoint(path, checkpoint_of(random_gpt()))
    return path


@pytest.fixture
def path(tmp_path):
    """A checkpoint of step 7."""
    return saved(tmp_path / "ckpt.pt")


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


def test_weights_that_share_memory_in_the_file_or_are_no_floats_of_32_bits_are_copied(tmp_path):
    """Others become the model's own: a training would change two at once, or learn in half precision."""
    model = random_gpt(replace(CONFIG, tie_embeddings=False))
    state = dict(model.state_dict())
    rows = torch.randn(20, 8)
    state |= {"transformer.wte.weight": rows[2:13], "lm_head.weight": rows[4:15]}
    state["transformer.h.0.attn.c_attn.weight"] = torch.randn(8, 24).t()
    state["transformer.h.0.mlp.c_fc.weight"] = state["transformer.h.1.mlp.c_fc.weight"]
    state["transformer.ln_f.weight"] = state["transformer.ln_f.weight"].half()
    torch.save(checkpoint_of(model) | {"model": state}, tmp_path / "ckpt.pt")
    loaded, places = load_model(tmp_path / "ckpt.pt")[0], set()
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, state[name].float())
        assert weight.dtype == torch.float32
        assert weight.is_contiguous()
        assert weight.untyped_storage().nbytes() == weight.nbytes
        places.add(weight.data_ptr())
    assert len(places) == len(state)


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


# --- damaged files ---------------------------------------------------------------------------------------------------


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else type(a) is type(b) and a == b


def test_a_flipped_bit_is_refused_or_changes_nothing(path):
    """Anywhere: in the weights, in the pickle of numbers and strings, in what the zip format keeps beside them."""
    written, content = read_checkpoint(path), path.read_bytes()
    with zipfile.ZipFile(path) as file:
        directory = file.start_dir
    generator, bits = random.Random(0), 8 * len(content)
    anywhere = [generator.randrange(bits) for _ in range(200)]
    # The directory at the end is small, and one bit of an entry in it, "this is a folder", hides its content.
    entries = [generator.randrange(8 * directory, bits) for _ in range(100)]
    folders = [8 * at + 8 * 38 + 4 for at in range(directory, len(content)) if content[at : at + 4] == b"PK\1\2"]
    refused = 0
    for bit in anywhere + entries + folders:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert equal(read_checkpoint(path), written), f"bit {bit % 8} of byte {bit // 8}"
        except UserError as error:
            refused += bool(re.search("is damaged|is truncated", str(error)))
    assert refused > 200


def test_files_without_checksums_load(path, tmp_path):
    written = read_checkpoint(path)
    torch.save(written, tmp_path / "before_1.6.pt", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(written, tmp_path / "unchecked.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert equal(read_checkpoint(tmp_path / "before_1.6.pt"), written)
    assert equal(read_checkpoint(tmp_path / "unchecked.pt"), written)


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


@pytest.mark.parametrize(
    "change",
    [
        {"step": -5},
        {"step": "5"},
        {"step": True},
        {"config": [1]},
        {"config": {"data": 3}},
        {"corpus": 5},
        {"machine": 5},
        {"config": {"optimizer": {"lr": [1]}}},
        {"corpus": {"folder": [1]}},
        {"optimizer": [1]},
        {"reference": {}},
    ],
)
def test_what_stands_beside_the_weights_is_what_it_should_be(path, change):
    torch.save(checkpoint_of(random_gpt()) | change, path)
    assert f"its {next(iter(change))} is not what this project or nanoGPT writes" in refusal(path, load_model)


@pytest.mark.parametrize("write", [torch.save, save_pickle])
def test_code_in_a_file_is_never_run(tmp_path, write):
    victim, path = tmp_path / "victim", tmp_path / "ckpt.pt"
    write(checkpoint_of(random_gpt()) | {"optimizer": Malicious(str(victim))}, path)
    assert "nothing in it was run" in refusal(path)
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
    (path.parent / "config.json").touch()
    assert f"hf:{path.parent}" in refusal(path.parent)


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
        {"model_args": asdict(CONFIG) | {"n_embd": "8"}},
        {"model_args": asdict(CONFIG) | {"n_embd": 16}},
        {"model_args": asdict(CONFIG) | {"n_layer": 1}},
        {"model_args": asdict(CONFIG) | {"n_layer": 10**5}},
        {"model_args": asdict(CONFIG) | {"vocab_size": 10**9, "block_size": 2**61}},
        {"model_args": asdict(CONFIG) | {"bias": False}},
        {"model_args": asdict(CONFIG) | {"normalizer": "softmax2"}},
        {"model_args": asdict(CONFIG) | {"n_head": 2.5}},
        {"model_args": asdict(CONFIG) | {"n_head": True}},
    ],
)
def test_weights_and_model_args_that_do_not_fit(path, change):
    torch.save(checkpoint_of(random_gpt()) | change, path)
    assert "do not fit" in refusal(path, load_model)


def test_a_whole_number_written_as_a_float_is_that_integer(path):
    torch.save(checkpoint_of(random_gpt()) | {"model_args": asdict(CONFIG) | {"n_head": 2.0, "n_layer": 2.0}}, path)
    model, _ = load_model(path)
    assert model.config == CONFIG
    assert torch.equal(model(IDX)[0], random_gpt()(IDX)[0])
    younger = {"n_kv_head": 1.0, "head_dim": 4.0, "n_inner": None, "rope_original_context": 64.0, "rope_theta": 500000}
    config = model_config(asdict(CONFIG) | younger)
    assert (config.n_kv_head, config.head_dim, config.n_inner, config.rope_original_context) == (1, 4, None, 64)
    assert type(config.n_kv_head) is type(config.rope_original_context) is int
    assert repr(config.rope_theta) == "500000.0"
    for wrong in ({"n_kv_head": 1.5}, {"n_inner": "8"}, {"head_dim": True}, {"n_layer": None}):
        with pytest.raises(TypeError, match=rf"{next(iter(wrong))} is .*, but must be an integer"):
            model_config(asdict(CONFIG) | wrong)
