"""What can be read is what was written, and damage is told in one line."""

import gzip
import hashlib
import io
import json
import os
import pickle
from pathlib import Path

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


# ------------------------------------------------------------------------------------------- ids of another program


def ids_of_a_small_vocabulary(count=12_000, below=1500):
    return np.random.default_rng(0).zipf(1.2, count) % below


def other_program(folder, content: bytes, **meta):
    for split in ("train", "val"):
        (folder / f"{split}.bin").write_bytes(content)
    if meta:
        (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("stated", ["meta.json", "meta.pkl", "config", "another tokenizer's name"])
def test_a_stated_vocabulary_is_enough(tmp_path, stated):
    ids = ids_of_a_small_vocabulary()
    meta = {"meta.json": {"vocab_size": 1500}, "another tokenizer's name": {"tokenizer": "bpe", "vocab_size": 1500}}
    other_program(tmp_path, ids.astype(np.uint16).tobytes(), **meta.get(stated, {}))
    if stated == "meta.pkl":
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 1500}))
    corpus = Corpus(tmp_path, vocab_size=1500 if stated == "config" else None)
    assert np.array_equal(corpus.tokens["train"], ids)
    assert corpus.vocab_size == 1500
    assert corpus.bytes_per_token["val"] is None
    assert "1500 token ids" in corpus.note
    assert "no bits per byte" in corpus.note
    assert corpus.tokenizer.decode([17, 4]) == " 17 4"


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "int32", "int64"])
def test_a_stated_dtype_is_read(tmp_path, dtype):
    below = 250 if dtype == "uint8" else 100_000
    ids = np.random.default_rng(0).integers(0, below, 5000)
    other_program(tmp_path, ids.astype(dtype).tobytes(), vocab_size=below, dtype=dtype)
    assert np.array_equal(Corpus(tmp_path).tokens["val"], ids)


def test_what_is_taken_for_gpt2s_is_said_and_refused_where_it_cannot_be(tmp_path):
    ids = ids_of_a_small_vocabulary()
    other_program(tmp_path, ids[:100].astype(np.uint16).tobytes())
    assert "taken for GPT-2's" in Corpus(tmp_path).note
    other_program(tmp_path, ids.astype(np.uint16).tobytes())
    for vocab_size in (None, 50304):  # 50304 is nanoGPT's, padded
        error = corpus_error(tmp_path, vocab_size=vocab_size)
        assert "train.bin holds no GPT-2 tokens: of 24,000 none is above 1499" in error
        assert '{"vocab_size": 32000' in error
    other_program(tmp_path, ids.astype(np.uint16).tobytes(), tokenizer="gpt2")
    assert Corpus(tmp_path).note is None


FORMATS = [
    ("int32", lambda ids: ids.astype("<i4")),
    ("int64", lambda ids: ids.astype("<i8")),
    ("int32 with negative ids", lambda ids: np.where(ids % 7, ids, -1).astype("<i4")),
    ("int32 with negative ids", lambda ids: np.where(ids % 7, ids * 70, -100).astype("<i4")),
    ("uint32 with ids above 65,535", lambda ids: (ids * 70).astype("<u4")),
    ("float32", lambda ids: ids.astype("<f4")),
    ("float64", lambda ids: ids.astype("<f8")),
    ("uint8", lambda ids: (ids % 90).astype("u1")),
    ("big-endian uint16", lambda ids: ids.astype(">u2")),
    ("big-endian uint16", lambda ids: (ids % 90).astype(">u2")),
    ("big-endian int32", lambda ids: ids.astype(">i4")),
    ("plain text", lambda ids: np.frombuffer(("naïve " * 2000).encode()[:9999], "u1")),
    ("gzip", lambda ids: np.frombuffer(gzip.compress(ids.tobytes()), "u1")),
    ("a .npy file", lambda ids: np.frombuffer(npy(ids.astype(np.uint16)), "u1")),
]


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("vocab_size", [None, 1500])
@pytest.mark.parametrize(("name", "written"), FORMATS)
def test_another_dtype_or_format_is_refused_by_name(tmp_path, name, written, vocab_size):
    other_program(tmp_path, written(ids_of_a_small_vocabulary()).tobytes())
    error = corpus_error(tmp_path, vocab_size=vocab_size)
    assert f"train.bin looks like {name}, not like ids in uint16: rewrite it, or say in a meta.json" in error


@pytest.mark.parametrize("below", [2, 5, 65, 256, 1500, 50257, 65536])
@pytest.mark.parametrize("draw", ["uniform", "zipf", "runs"])
def test_ids_of_any_vocabulary_are_not_taken_for_another_format(tmp_path, below, draw):
    random = np.random.default_rng(0)
    ids = {
        "uniform": lambda: random.integers(0, below, 40_000),
        "zipf": lambda: random.zipf(1.3, 40_000) % below,
        "runs": lambda: np.repeat(random.integers(0, below, 400), 100),
    }[draw]()
    other_program(tmp_path, ids.astype("<u2").tobytes())
    assert np.array_equal(Corpus(tmp_path, vocab_size=below).tokens["val"], ids)


def test_damage_is_found_in_the_splits_that_are_asked_for(tmp_path):
    write_documents(tmp_path)
    content = bytearray((tmp_path / "train.bin").read_bytes())
    content[2] ^= 1
    (tmp_path / "train.bin").write_bytes(content)
    corpus = Corpus(tmp_path, verify=["val"])
    with pytest.raises(UserError, match=r"train\.bin is not the file that meta\.json describes"):
        corpus.verify("train")


def test_a_file_is_read_once_by_all_that_check_it(tmp_path, monkeypatch):
    read, chunks = [], corpus_module.chunks
    monkeypatch.setattr(corpus_module, "chunks", lambda tokens: read.append(len(tokens)) or chunks(tokens))
    write_documents(tmp_path)
    for _ in range(3):
        Corpus(tmp_path)
    assert read == [7, 3]


def test_nanogpt_damage(tmp_path):
    nanogpt(tmp_path, meta=characters("ab"))
    assert "train.bin holds the token id 2, outside the 2 known ids" in corpus_error(tmp_path)
    (tmp_path / "train.bin").write_bytes(b"123")
    assert "train.bin has 3 bytes where 2 belong" in corpus_error(tmp_path)
    (tmp_path / "train.bin").write_bytes(b"")
    assert "train.bin is empty" in corpus_error(tmp_path)


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
        assert "meta.pkl is no character vocabulary" in corpus_error(tmp_path)
        assert not evidence.exists()


@pytest.mark.parametrize(
    "meta",
    [
        b"",
        b"not a pickle",
        pickle.dumps([]),
        pickle.dumps({"vocab_size": "1"}),
        pickle.dumps({"vocab_size": 3, "itos": {0: "a"}}),
        pickle.dumps({"vocab_size": 1, "itos": {0: "ab"}}),
        pickle.dumps({"vocab_size": 1, "itos": {0: 7}}),
        pickle.dumps(characters("abc"))[:-9],
    ],
)
def test_meta_pkl_that_is_something_else(tmp_path, meta):
    nanogpt(tmp_path, meta=meta)
    assert "meta.pkl is no character vocabulary" in corpus_error(tmp_path)
