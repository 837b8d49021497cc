"""scripts/perplexity.py: the loss of every token of a split, as a user reads it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from harness.corpus import Corpus
from harness.corpus_writing import write_corpus
from harness.diagnostics.perplexity import DIAGNOSTIC
from harness.pretrained import save_hf
from harness.tokenizer import Bytes, Chars
from model import GPT
from tests.helpers import diagnose, read_json, save_model, shakespeares_nanogpt, tiny_gpt


def random_gpt(**changes) -> GPT:
    """Weights large enough for losses that differ from token to token."""
    return tiny_gpt(std=0.5, **{"block_size": 8, "vocab_size": 11} | changes)


def random_tokens(count: int, vocab_size: int = 11) -> np.ndarray:
    return np.random.default_rng(count).integers(vocab_size, size=count).astype(np.uint16)


CHARACTERS = "".join(chr(0x4E00 + i) for i in range(298))


TEXT = bytes(random_tokens(300, 256).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path / "corpus", [("train", TEXT), ("val", TEXT[:101])], Bytes(), source="test")
    save(random_gpt(vocab_size=256), tmp_path)
    return tmp_path


def save(model: GPT, folder: Path) -> None:
    save_model(model, folder / "ckpt.pt", folder / "corpus")


def report(folder: Path) -> dict:
    return read_json(folder / "diagnostics" / "perplexity.json")


@pytest.mark.parametrize(("length", "stride"), [(101, 8), (105, 8), (101, 3), (97, 8)])
def test_behind_a_begin_of_text_token_every_token_of_the_text_is_scored_once(folder, length, stride):
    """Also the first, which has that token alone before it."""
    write_corpus(folder / "corpus", [("train", TEXT), ("val", TEXT[:length])], Bytes(), source="test")
    model, text, losses = random_gpt(vocab_size=256), torch.tensor(list(TEXT[:length])), []
    with torch.no_grad():
        for target in range(length):
            start = max(0, -(-(target + 1 - 8) // stride)) * stride  # of the first window that has it as a target
            window = torch.cat((torch.tensor([7]), text[start:target]))
            losses.append(F.cross_entropy(model(window[None])[0][0, -1], text[target]).item())
    options = ("--bos", "7", "--stride", stride, "--data", folder / "corpus")
    assert diagnose(DIAGNOSTIC, folder / "ckpt.pt", *options) == 0
    summary = report(folder)["summary"]
    assert summary["tokens"] == length
    assert summary["loss"] == pytest.approx(np.mean(losses), rel=1e-6)


@pytest.mark.parametrize("options", [(), ("--stride", "3"), ("--bos", "7"), ("--bos", "7", "--stride", "3")], ids=str)
def test_of_documents_each_is_scored_by_itself(tmp_path, options):
    """As the checkpoint was trained, with no option. Its separator is a document's last target, and its first token is
    one behind a begin-of-text token alone."""
    documents = [TEXT[:20].replace(b"\0", b"x"), b"", b"y", b"ab", TEXT[20:41].replace(b"\0", b"x")]
    texts = [("train", TEXT), *(("val", text) for text in documents)]
    write_corpus(tmp_path / "corpus", texts, Bytes(), source="test")
    model, losses = random_gpt(vocab_size=256), []
    save_model(model, tmp_path / "ckpt.pt", tmp_path / "corpus", config={"data": {"windows": "documents"}})
    stride, bos = (3 if "--stride" in options else 8), [7] if "--bos" in options else []
    for number, document in enumerate(documents):
        own = torch.tensor([*bos, *document, *([0] if number < len(documents) - 1 else [])])
        for target in range(1, len(own)):
            start = max(0, -(-(target - 8) // stride)) * stride  # of the first window that has it as a target
            window = torch.cat((torch.tensor(bos, dtype=torch.long), own[start + len(bos) : target]))
            with torch.no_grad():
                losses.append(F.cross_entropy(model(window[None])[0][0, -1], own[target]).item())
    assert diagnose(DIAGNOSTIC, tmp_path / "ckpt.pt", *options) == 0
    summary = report(tmp_path)["summary"]
    assert summary["tokens"] == len(losses)
    assert summary["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert summary["bits_per_byte"] == pytest.approx(np.mean(losses) / math.log(2), rel=1e-6)
    assert report(tmp_path)["arguments"]["windows"] == "documents"
    assert diagnose(DIAGNOSTIC, tmp_path / "ckpt.pt", "--windows", "stream") == 0
    assert report(tmp_path)["summary"]["tokens"] == sum(map(len, documents)) + len(documents) - 2


def test_ids_whose_text_is_not_known_have_no_bits_per_byte(tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    for split in ("train", "val"):
        random_tokens(300).tofile(tmp_path / "corpus" / f"{split}.bin")
    save(random_gpt(), tmp_path)
    assert diagnose(DIAGNOSTIC, tmp_path / "ckpt.pt") == 0
    written = report(tmp_path)
    assert written["summary"]["bits_per_byte"] is None
    assert written["summary"]["loss"] > 0
    assert any("11 token ids" in note and "no bits per byte" in note for note in written["notes"])
    assert "no bits per byte" in capsys.readouterr().out


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(folder, capsys):
    model = random_gpt(vocab_size=256)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    save(model, folder)
    assert diagnose(DIAGNOSTIC, folder / "ckpt.pt") == 0
    written = report(folder)
    summary = written["summary"]
    # float32 has ln 256 to 2^-23 of its size
    assert summary["loss"] == pytest.approx(math.log(256), rel=2**-23)
    assert summary["perplexity"] == pytest.approx(256, rel=6 * 2**-23)
    assert summary["bits_per_byte"] == pytest.approx(8, rel=2**-22)
    assert summary["standard_error"] == pytest.approx(0, abs=2**-22)
    assert summary["tokens"] == 100
    assert (written["script"], written["step"], written["notes"]) == ("perplexity", 7, [])
    assert set(written["rows"][0]) == set(DIAGNOSTIC.columns)
    assert sum(row["tokens"] for row in written["rows"]) == 100
    assert (folder / "diagnostics" / "perplexity.png").stat().st_size > 0
    out = capsys.readouterr().out
    assert all(word in out for word in (*DIAGNOSTIC.columns, *summary, "How to read it"))


def test_same_numbers_every_time_and_for_every_batch_size(folder):
    texts = []
    for argv in ((), (), ("--batch-size", 1)):
        assert diagnose(DIAGNOSTIC, folder / "ckpt.pt", "--stride", 3, *argv) == 0
        texts.append((folder / "diagnostics" / "perplexity.json").read_text())
    assert texts[0] == texts[1]
    one, other = (json.loads(text)["summary"] for text in texts[1:])
    assert one == pytest.approx(other, rel=1e-5)  # float32 products of other batch shapes


def test_batches_limit_the_windows(folder):
    assert diagnose(DIAGNOSTIC, folder / "ckpt.pt", "--batches", 2, "--batch-size", 3, "--split", "train") == 0
    assert report(folder)["summary"]["tokens"] == 5 * 8 + 3  # the last window of 300 tokens has 299 − 37·8 targets


def test_dtypes(folder):
    losses = {}
    for dtype in ("float64", "float32", "bfloat16"):
        assert diagnose(DIAGNOSTIC, folder / "ckpt.pt", "--dtype", dtype) == 0
        losses[dtype] = report(folder)["summary"]["loss"]
    # logits up to 5, after some ten roundings: of 2^-24 and of 2^-9
    assert 0 < abs(losses["float32"] - losses["float64"]) < 50 * 2**-24
    assert 0 < abs(losses["bfloat16"] - losses["float64"]) < 50 * 2**-9


def test_a_checkpoint_of_hugging_faces(folder):
    model = random_gpt(vocab_size=256)
    save_hf(model, folder / "hf")
    assert (
        diagnose(DIAGNOSTIC, f"hf:{folder / 'hf'}", "--data", folder / "corpus", "--out", folder / "diagnostics") == 0
    )
    peer = transformers.GPT2LMHeadModel.from_pretrained(folder / "hf").eval()
    ids = torch.tensor(list(TEXT[:101]))
    with torch.no_grad():
        losses = [
            F.cross_entropy(peer(x[None]).logits[0], y, reduction="none")
            for x, y in zip(ids[:-1].split(8), ids[1:].split(8), strict=True)
        ]
    assert report(folder)["summary"]["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)


def test_a_nanogpt_checkpoint_has_the_loss_of_hugging_faces(nanogpt, tmp_path):
    checkpoint, peer, corpus = nanogpt
    assert diagnose(DIAGNOSTIC, checkpoint, "--data", corpus, "--dtype", "float64", "--out", tmp_path) == 0
    ids = torch.from_numpy(Corpus(corpus).tokens["val"].astype(np.int64))
    with torch.no_grad():
        losses = [
            F.cross_entropy(peer(x[None]).logits[0], y, reduction="none")
            for x, y in zip(ids[:-1].split(16), ids[1:].split(16), strict=True)
        ]
    summary = read_json(tmp_path / "perplexity.json")["summary"]
    assert summary["tokens"] == 320
    assert summary["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-12)


def test_shakespeares_nanogpt_has_its_loss(tmp_path):
    checkpoint, ids = shakespeares_nanogpt()
    text = "".join(map(chr, 60 + ids))  # other characters of the same ids
    alphabet = Chars("".join(map(chr, range(60, 125))))
    write_corpus(tmp_path / "corpus", [("train", text), ("val", text)], alphabet, source="test")
    argv = ("--data", tmp_path / "corpus", "--dtype", "float64", "--batch-size", 64, "--out", tmp_path / "diagnostics")
    assert diagnose(DIAGNOSTIC, checkpoint, *argv) == 0
    summary = report(tmp_path)["summary"]
    assert summary["tokens"] == 111_539
    assert summary["loss"] == pytest.approx(2.44014843, abs=5e-9)  # the digits known


def test_nan_weights_are_a_finding(folder, capsys):
    model = random_gpt(vocab_size=256)
    with torch.no_grad():
        model.transformer.wpe.weight[5, 3] = math.nan
    save(model, folder)
    assert diagnose(DIAGNOSTIC, folder / "ckpt.pt") == 0
    written = report(folder)
    assert written["summary"]["loss"] is None
    assert written["summary"]["tokens"] == 100
    notes = "; ".join(written["notes"])
    assert "100 of 100 losses are NaN or Inf, the first that of token 1;" in notes
    assert "transformer.wpe.weight holds 1 of 64 weights that are NaN or Inf" in notes
    assert "transformer.wpe.weight holds 1" in capsys.readouterr().out


def test_a_corpus_with_more_ids_than_the_model_is_refused_by_its_count(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    write_corpus("other", [("train", "ab" * 9), ("val", "ab" * 9)], Chars("ab" + CHARACTERS), source="test")
    assert diagnose(DIAGNOSTIC, "ckpt.pt", "--data", "other") == 2
    assert "has 300 token ids, ckpt.pt only 256" in capsys.readouterr().err
