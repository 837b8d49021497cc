"""scripts/sample.py: what is printed is what the model drew, in the tokenizer that it was trained with, or ids."""

import json
import sys

import pytest
import torch

from harness.errors import run_cli
from harness.pretrained import save_gpt2
from model import GPT
from scripts import sample
from tests.helpers import save_model, tiny_corpus, tiny_gpt


@pytest.fixture
def run(tmp_path, monkeypatch, capfdbinary):
    """scripts/sample.py in `tmp_path`: the exit status, what it printed, and its errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments), "--device", "cpu"])
        capfdbinary.readouterr()
        status = run_cli(sample.main) or 0
        out, err = capfdbinary.readouterr()
        return status, out, err.decode()

    return run


def always(token: int, **config):
    """A model that continues whatever it sees with one token."""
    model = tiny_gpt(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.lm_head.weight[token] = 1
    return model


def test_bytes_of_a_prompt_that_are_no_utf8_reach_the_model_as_they_were_typed(run, tmp_path, monkeypatch):
    save_model(always(ord("x")), "ckpt.pt", tiny_corpus(tmp_path / "corpus", letters=None))
    seen = []
    monkeypatch.setattr(GPT, "generate", lambda _model, idx, *_, **__: seen.append(idx.tolist()) or iter(()))
    prompt = b"a\xff\xc3\xa9".decode(errors="surrogateescape")  # as Python hands over the bytes of a command line
    status, out, _ = run("ckpt.pt", "--prompt", prompt)
    assert status == 0
    assert seen == [[list(b"a\xff\xc3\xa9")]]
    assert out.decode() == "a\ufffdé\n"


def test_a_character_may_begin_in_the_prompt_and_end_in_the_sample(run, tmp_path):
    save_model(always(0xA9), "ckpt.pt", tiny_corpus(tmp_path / "corpus", letters=None))
    prompt = b"caf\xc3".decode(errors="surrogateescape")
    assert run("ckpt.pt", "--prompt", prompt, "--max_new_tokens", 1)[:2] == (0, "café\n".encode())


def test_ids_whose_text_is_not_known_are_printed_themselves(run, tmp_path):
    corpus = {"tokenizer": "ids", "vocabulary": None, "vocab_size": 300, "folder": "corpus"}
    save_model(always(271, vocab_size=300), "ckpt.pt", corpus=corpus)
    assert run("ckpt.pt", "--prompt", "17 4", "--max_new_tokens", 2)[:2] == (0, b"17 4 271 271\n")
    status, _, error = run("ckpt.pt", "--prompt", "Hello")
    assert status == 2
    assert "the text of these token ids is not known" in error


def test_a_corpus_of_another_tokenizer_is_refused(run, tmp_path):
    one, other = (tmp_path / name for name in ("one", "other"))
    tiny_corpus(one, letters="abc")
    tiny_corpus(other, letters="abd")
    save_model(tiny_gpt(vocab_size=3), "ckpt.pt", one)
    assert run("ckpt.pt", "--data", one)[0] == 0
    status, _, error = run("ckpt.pt", "--data", other)
    assert status == 2
    assert "was trained with tokenizer chars" in error
    assert "chars with other characters" in error


def test_a_hugging_face_model_with_a_tokenizer_of_its_own_gives_ids(run, tmp_path):
    save_gpt2(always(271, vocab_size=300), tmp_path / "hf")
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps({f"word{i}": i for i in range(300)}))
    status, out, error = run("hf:./hf", "--prompt", "17 4", "--max_new_tokens", 2)
    assert (status, out) == (0, b"17 4 271 271\n")
    assert "hf:./hf has a tokenizer of its own (vocab.json)" in error
    status, _, error = run("hf:./hf", "--data", tiny_corpus(tmp_path / "corpus"))
    assert status == 2
    assert "was trained with tokenizer of its own (vocab.json)" in error
