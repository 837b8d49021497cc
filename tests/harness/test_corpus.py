"""What can be read is what was written, and damage is told in one line."""

import hashlib
import json
import os

import numpy as np
import pytest

from harness import corpus as corpus_module
from harness.corpus import SPLITS, Corpus
from harness.errors import UserError
from tests.helpers import corpus_error, write_documents

# ------------------------------------------------------------------------------------------------- damage, when reading


def test_not_prepared(tmp_path):
    error = corpus_error(tmp_path / "nowhere")
    assert "is not prepared (no train.bin and no val.bin)" in error
    (tmp_path / "prepare.py").touch()
    assert f"run python {tmp_path / 'prepare.py'}" in corpus_error(tmp_path)


@pytest.mark.parametrize("verify", [True, False])
def test_truncated(tmp_path, verify):
    write_documents(tmp_path)
    os.truncate(tmp_path / "train.bin", 13)
    assert "train.bin has 13 bytes where 14 belong" in corpus_error(tmp_path, verify=SPLITS if verify else ())
    (tmp_path / "val.bin").unlink()
    assert "no val.bin" in corpus_error(tmp_path, verify=SPLITS if verify else ())


def test_changed(tmp_path):
    write_documents(tmp_path)
    np.array([1, 2, 3], np.uint16).tofile(tmp_path / "val.bin")
    assert "val.bin is not the file that meta.json describes" in corpus_error(tmp_path)
    Corpus(tmp_path, verify=())


def test_ids_outside_the_vocabulary(tmp_path):
    write_documents(tmp_path)
    ids = np.array([1, 256, 3], np.uint16)
    ids.tofile(tmp_path / "val.bin")
    meta = json.loads((tmp_path / "meta.json").read_text())
    meta["splits"]["val"]["sha256"] = hashlib.sha256(ids).hexdigest()
    del meta["checksum"]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert "val.bin holds the token id 256, outside the 256 known ids" in corpus_error(tmp_path)


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
    write_documents(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    change(meta)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    error = corpus_error(tmp_path)
    assert expected in error
    assert "meta.json" in error


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_meta_that_is_no_json_object(tmp_path, content):
    write_documents(tmp_path)
    (tmp_path / "meta.json").write_bytes(content)
    assert "meta.json does not describe a corpus" in corpus_error(tmp_path)


# ---------------------------------------------------------------------------------------------------- nanoGPT's folders


def test_damage_is_found_in_the_splits_that_are_asked_for(tmp_path):
    write_documents(tmp_path)
    content = bytearray((tmp_path / "train.bin").read_bytes())
    content[2] ^= 1
    (tmp_path / "train.bin").write_bytes(content)
    corpus = Corpus(tmp_path, verify=["val"])
    with pytest.raises(UserError, match=r"train\.bin is not the file that meta\.json describes"):
        corpus.verify("train")


def test_a_corpus_of_an_earlier_version_is_read_as_a_whole_at_the_start(tmp_path):
    """It has no checksums of blocks, so that it cannot be checked where it is touched."""
    write_documents(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    del meta["checksum"], meta["splits"]["train"]["crc32"], meta["splits"]["val"]["crc32"]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert bytes(Corpus(tmp_path, lazily=True).tokens["val"].tolist()) == b"two"
    content = bytearray((tmp_path / "train.bin").read_bytes())
    content[2] ^= 1
    (tmp_path / "train.bin").write_bytes(content)
    assert "train.bin is not the file that meta.json describes" in corpus_error(tmp_path, lazily=True)


def test_a_file_is_read_once_by_all_that_check_it(tmp_path, monkeypatch):
    read, chunks = [], corpus_module.chunks
    monkeypatch.setattr(corpus_module, "chunks", lambda tokens: read.append(len(tokens)) or chunks(tokens))
    write_documents(tmp_path)
    for _ in range(3):
        Corpus(tmp_path)
    assert read == [7, 3]
