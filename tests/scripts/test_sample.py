"""scripts/sample.py: what it takes and refuses; what is printed is what the model drew, in its tokenizer, or ids."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

from harness.errors import run_cli
from harness.pretrained import save_hf
from scripts import sample
from tests.helpers import ROOT, byte_level, save_model, tiny_corpus, tiny_gpt
from tests.processes import finished, run_python


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
    monkeypatch.setattr(sample, "generate", lambda _model, idx, *_, **__: seen.append(idx.tolist()) or iter(()))
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
    save_hf(always(271, vocab_size=300), tmp_path / "hf")
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps({f"word{i}": i for i in range(300)}))
    status, out, error = run("hf:./hf", "--prompt", "17 4", "--max_new_tokens", 2)
    assert (status, out) == (0, b"17 4 271 271\n")
    assert "hf:./hf has a tokenizer of its own (vocab.json)" in error
    status, _, error = run("hf:./hf", "--data", tiny_corpus(tmp_path / "corpus"))
    assert status == 2
    assert "was trained with tokenizer of its own (vocab.json)" in error


def test_a_hugging_face_model_brings_its_own_tokenizer(run, tmp_path):
    tokenizer = byte_level("llama3")
    word = tokenizer.token_to_id("Ġthe")
    save_hf(always(word, vocab_size=768), tmp_path / "hf")
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    status, out, error = run("hf:./hf", "--prompt", "Two é", "--max_new_tokens", 2)
    assert (status, out, error) == (0, "Two é the the\n".encode(), "")
    assert run("hf:./hf", "--max_new_tokens", 1)[1] == b" the\n"


def test_its_begin_of_text_stands_before_a_prompt_where_the_tokenizer_puts_one(run, tmp_path, monkeypatch):
    tokenizer = byte_level("llama3")
    save_hf(tiny_gpt(vocab_size=768), tmp_path / "hf")
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    seen = []
    monkeypatch.setattr(sample, "generate", lambda _model, idx, *_, **__: seen.append(idx.tolist()) or iter(()))
    assert run("hf:./hf", "--prompt", "Two words")[0] == 0
    assert seen == [[tokenizer.encode("Two words").ids]]
    assert seen[0][0][0] == 0


@pytest.mark.slow
def test_from_text_by_the_tokenizer_of_a_model_to_a_sample(run, training_folder):
    Path("model").mkdir()
    byte_level("smollm2").save("model/tokenizer.json")
    Path("book.txt").write_text((ROOT / "docs" / "training.md").read_text())
    prepared = run_python(
        "data/text/prepare.py", "book.txt", "--tokenizer", "hf:model", "--out", "book", cwd=Path.cwd()
    )
    assert prepared.returncode == 0, prepared.stderr
    shutil.rmtree("model")
    trained = finished("book", "--data.corpus", "book", "--training.max_steps", "20")
    assert trained.metrics()[-1]["step"] == 20
    assert trained.metrics()[-1]["val_full/bits_per_byte"] < 8  # below that of bytes taken for random
    status, out, _ = run("out/book/ckpt.pt", "--prompt", "In 2024, é", "--max_new_tokens", 9, "--temperature", 0)
    assert (status, out[:11]) == (0, "In 2024, é".encode())
    assert len(out) > 12
