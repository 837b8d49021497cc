"""Text from a checkpoint: what the command line takes and refuses."""

import math
import sys

import pytest
import torch

from harness.errors import run_cli
from scripts import sample
from tests.helpers import save_model, tiny_corpus, tiny_gpt


@pytest.fixture
def drawn(tmp_path, monkeypatch, capsys):
    """The exit status of a sample of 20 tokens from a model, and what is printed on stdout and stderr."""
    corpus = tiny_corpus(tmp_path / "corpus")
    capsys.readouterr()

    def run(model, *arguments) -> tuple[int, str, str]:
        path = save_model(model, tmp_path / "ckpt.pt", corpus)
        words = [str(path), "--max_new_tokens", "20", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["sample.py", *words])
        return (run_cli(sample.main), *capsys.readouterr())

    return run


def test_the_lowest_temperatures_draw_the_likeliest_token(drawn):
    model = tiny_gpt(std=0.3, vocab_size=13)
    likeliest = drawn(model, "--temperature", 0)
    assert likeliest[0] == 0
    assert len(likeliest[1]) == 21
    assert drawn(model, "--temperature", 1e-40) == likeliest
    assert drawn(model, "--temperature", 1e-300, "--top_p", 1e-60) == likeliest


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", "nan"), ("temperature", -1), ("top_p", "nan"), ("top_k", 0), ("seed", -1), ("seed", 2**64)],
)
def test_numbers_that_make_no_sense_are_refused_by_name(drawn, option, value):
    status, out, err = drawn(tiny_gpt(vocab_size=13), f"--{option}", value)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: --{option} {value}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("transformer.h.1.mlp.c_fc.weight", math.nan, "c_fc.weight holds 1 of 256 weights that are NaN"),
        ("transformer.ln_f.weight", 3e38, "the first output that is NaN or Inf is that of"),
    ],
)
def test_a_model_that_predicts_no_distribution_is_refused(drawn, name, value, said, temperature):
    model = tiny_gpt(std=0.3, vocab_size=13)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[: 1 if math.isnan(value) else None] = value
    status, out, err = drawn(model, "--temperature", temperature)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
