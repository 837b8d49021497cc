"""What can be read is what was written, and damage is told in one line."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from harness.corpus import Corpus
from harness.corpus_writing import write_corpus
from harness.errors import UserError
from harness.tokenizer import Bytes

DOCUMENTS = [("train", "one\n"), ("val", "two"), ("train", b"\xff"), ("train", "")]


def write(folder, documents=DOCUMENTS, tokenizer=None, **options):
    return write_corpus(folder, documents, tokenizer or Bytes(), source="test", threads=2, **options)


def error_of(folder, **options) -> str:
    with pytest.raises(UserError) as caught:
        Corpus(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- what is written


# ------------------------------------------------------------------------------------------------- pieces of documents


# ---------------------------------------------------------------------------------------------- interrupted or refused


# ------------------------------------------------------------------------------------------------- damage, when reading


def test_not_prepared(tmp_path):
    error = error_of(tmp_path / "nowhere")
    assert "is not prepared (no train.bin and no val.bin)" in error
    (tmp_path / "prepare.py").touch()
    assert f"run python {tmp_path / 'prepare.py'}" in error_of(tmp_path)


@pytest.mark.parametrize("verify", [True, False])
def test_truncated(tmp_path, verify):
    write(tmp_path)
    os.truncate(tmp_path / "train.bin", 13)
    assert "train.bin has 13 bytes where 14 belong" in error_of(tmp_path, verify=verify)
    (tmp_path / "val.bin").unlink()
    assert "no val.bin" in error_of(tmp_path, verify=verify)


def test_changed(tmp_path):
    write(tmp_path)
    np.array([1, 2, 3], np.uint16).tofile(tmp_path / "val.bin")
    assert "val.bin is not the file that meta.json describes" in error_of(tmp_path)
    Corpus(tmp_path, verify=False)


def test_ids_outside_the_vocabulary(tmp_path):
    write(tmp_path)
    ids = np.array([1, 256, 3], np.uint16)
    ids.tofile(tmp_path / "val.bin")
    meta = json.loads((tmp_path / "meta.json").read_text())
    meta["splits"]["val"]["sha256"] = hashlib.sha256(ids).hexdigest()
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert "val.bin holds the token id 256, outside the 256 known ids" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda meta: meta.pop("splits"), "lacks the key 'splits'"),
        (lambda meta: meta.update(format=2), "format 2"),
        (lambda meta: meta.update(dtype="object"), "dtype 'object'"),
        (lambda meta: meta.update(tokenizer="words"), "tokenizer 'words' is not known"),
        (lambda meta: meta.update(vocab_size=300), "vocab_size 300 is not the tokenizer's 256"),
        (lambda meta: meta["splits"]["val"].update(tokens="3"), "tokens must be a number"),
        (lambda meta: meta.update(splits=[]), "does not describe a corpus"),
    ],
)
def test_broken_meta(tmp_path, change, expected):
    write(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    change(meta)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    error = error_of(tmp_path)
    assert expected in error
    assert "meta.json" in error


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_meta_that_is_no_json_object(tmp_path, content):
    write(tmp_path)
    (tmp_path / "meta.json").write_bytes(content)
    assert "meta.json does not describe a corpus" in error_of(tmp_path)


# ---------------------------------------------------------------------------------------------------- nanoGPT's folders


def nanogpt(folder, train=(0, 1, 2, 1), val=(2, 2), meta=None):
    np.array(train, np.uint16).tofile(folder / "train.bin")
    np.array(val, np.uint16).tofile(folder / "val.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(meta if isinstance(meta, bytes) else pickle.dumps(meta))


def characters(string):
    return {
        "vocab_size": len(string),
        "itos": dict(enumerate(string)),
        "stoi": {character: i for i, character in enumerate(string)},
    }


def test_nanogpt_characters(tmp_path):
    nanogpt(tmp_path, meta=characters("\naé"))
    corpus = Corpus(tmp_path)
    assert corpus.tokenizer.decode(corpus.tokens["train"]) == "\naéa"
    assert corpus.vocab_size == 3
    assert corpus.bytes_per_token["train"] == 5 / 4
    assert corpus.bytes_per_token["val"] == 2
    assert len(corpus.sha256) == 64


def test_nanogpt_without_meta_is_gpt2(tmp_path, gpt2):
    nanogpt(tmp_path, gpt2.encode("Hello there"), [*gpt2.encode("you"), 50256])
    corpus = Corpus(tmp_path)
    assert corpus.tokenizer.decode(corpus.tokens["train"]) == "Hello there"
    assert corpus.vocab_size == 50257
    assert corpus.bytes_per_token["val"] == 3 / 2


def test_nanogpt_damage(tmp_path):
    nanogpt(tmp_path, meta=characters("ab"))
    assert "train.bin holds the token id 2, outside the 2 known ids" in error_of(tmp_path)
    (tmp_path / "train.bin").write_bytes(b"123")
    assert "train.bin has 3 bytes where 2 belong" in error_of(tmp_path)
    (tmp_path / "train.bin").write_bytes(b"")
    assert "train.bin is empty" in error_of(tmp_path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class Quiet:
    """Hides behind a name that looks harmless."""

    def __reduce__(self):
        return (eval, ("{'vocab_size': 3, 'itos': {0: 'a', 1: 'b', 2: 'c'}}",))


def test_code_in_a_meta_pkl_does_not_run(tmp_path):
    evidence = tmp_path / "evidence"
    for meta in ({**characters("abc"), "extra": Malicious(evidence)}, Malicious(evidence), Quiet()):
        nanogpt(tmp_path, meta=meta)
        assert "meta.pkl is no character vocabulary" in error_of(tmp_path)
        assert not evidence.exists()


@pytest.mark.parametrize(
    "meta",
    [
        b"",
        b"not a pickle",
        pickle.dumps([]),
        pickle.dumps({"vocab_size": 1}),
        pickle.dumps({"vocab_size": 3, "itos": {0: "a"}}),
        pickle.dumps({"vocab_size": 1, "itos": {0: "ab"}}),
        pickle.dumps({"vocab_size": 1, "itos": {0: 7}}),
        pickle.dumps(characters("abc"))[:-9],
    ],
)
def test_meta_pkl_that_is_something_else(tmp_path, meta):
    nanogpt(tmp_path, meta=meta)
    assert "meta.pkl is no character vocabulary" in error_of(tmp_path)


# ------------------------------------------------------------------------------------------------------- hashed splits
