"""scripts/transplant_sink.py: a checkpoint as any other comes out, or one line."""

import sys

import pytest
import torch

from harness.checkpoint import load_model
from harness.diagnostics.activation_kurtosis import DIAGNOSTIC
from harness.errors import run_cli
from measure.transplant import first_tokens
from scripts import transplant_sink
from tests.helpers import diagnose, read_json, save_model, tiny_corpus, tiny_gpt


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The script in `tmp_path`, with a checkpoint and a corpus: the exit status, what it printed, and its errors."""
    monkeypatch.chdir(tmp_path)
    corpus = tiny_corpus(tmp_path / "corpus")
    save_model(tiny_gpt(std=0.7), "ckpt.pt", corpus)
    capsys.readouterr()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["transplant_sink.py", *map(str, arguments), "--device", "cpu"])
        return (run_cli(transplant_sink.main), *capsys.readouterr())

    return run


def test_what_it_writes_is_measured_and_sampled_as_any_checkpoint(run, tmp_path, capsys):
    status, printed, _ = run("ckpt.pt", "out/moved", "--tokens", 400)  # all of the training text
    assert status == 0
    assert printed.splitlines()[0].split() == ["layer", "key_agreement", "value_agreement"]
    model, info = load_model("out/moved/ckpt.pt")
    assert (model.config.normalizer, info["source"], info["step"]) == ("kvbias", "ckpt.pt", 7)
    text = torch.frombuffer(bytearray((tmp_path / "corpus" / "train.bin").read_bytes()), dtype=torch.uint16).long()
    for block, token in zip(model.transformer.h, first_tokens(load_model("ckpt.pt")[0], text), strict=True):
        torch.testing.assert_close(block.attn.null_key, token.key.float())
        torch.testing.assert_close(block.attn.null_value, token.value.float())
    assert diagnose(DIAGNOSTIC, "out/moved/ckpt.pt", "--batches", 2, "--out", "found") == 0
    summary = read_json("found/activation_kurtosis.json")["summary"]
    assert 0 < summary["null_mass"] < 1
    assert summary["row_mass"] == pytest.approx(1 - summary["null_mass"])
    status, _, _ = run("ckpt.pt", "out/zero", "--value", "zero")
    assert status == 0
    assert not load_model("out/zero/ckpt.pt")[0].transformer.h[0].attn.null_value.any()


def test_a_mistake_gets_one_line_and_nothing_is_lost(run, tmp_path):
    save_model(tiny_gpt(normalizer="softmax1"), "softmax1.pt", "corpus")
    broken = tiny_gpt()
    broken.transformer.h[1].attn.c_attn.weight.data[0, 0] = float("nan")
    save_model(broken, "nan.pt", "corpus")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "ckpt.pt").write_text("mine")
    for arguments, message in (
        (("ckpt.pt", "here"), "here/ckpt.pt is there already: give another folder"),
        (
            ("softmax1.pt", "out"),
            "softmax1.pt: its normalizer is softmax1, and a null slot",
        ),
        (("ckpt.pt", "out", "--tokens", 0), "--tokens 0: at least 1"),
        (("nan.pt", "out"), "nan.pt"),
        (("none.pt", "out"), "no checkpoint none.pt"),
        (("ckpt.pt", "out", "--data", "nowhere"), "nowhere"),
        (("none.pt", "softmax1.pt"), "softmax1.pt cannot be a folder, a file is in the way"),  # before it is read
    ):
        status, _, error = run(*arguments)
        assert status == 2, arguments
        assert len(error.splitlines()) == 1
        assert message in error
    assert (tmp_path / "here" / "ckpt.pt").read_text() == "mine"
    assert not (tmp_path / "out").exists()
