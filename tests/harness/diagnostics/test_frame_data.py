"""Which windows of which corpus the diagnostic scripts measure."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness import diagnostics
from harness.corpus import Corpus
from harness.corpus_writing import write_corpus
from harness.diagnostics import Subject, run
from harness.tokenizer import Chars
from model import GPT
from tests.harness.diagnostics.test_frame import CONFIG, COUNTING, checkpoint, refusal
from tests.helpers import LETTERS, read_json, save_model, tiny_corpus


@pytest.fixture
def path(tmp_path, corpus) -> Path:
    return checkpoint(tmp_path / "run" / "ckpt.pt", corpus)


def subject_of(path: Path, *arguments: str) -> Subject:
    parser = diagnostics.argument_parser("counting", "", 8, 4)
    return Subject(str(path), parser.parse_args([str(path), "--device", "cpu", *arguments]))


def test_every_window_of_the_split_once(path):
    subject = subject_of(path, "--batch-size", "3")
    batches = list(subject.batches(subject.offsets()))
    assert [len(x) for x, _ in batches] == [3, 3, 3, 3, 3, 3, 2]
    targets = torch.cat([y.flatten() for _, y in batches])
    assert torch.equal(targets[targets >= 0], torch.from_numpy(subject.corpus.tokens["val"][1:].astype(np.int64)))


@given(count=st.integers(1, 25))
def test_a_count_of_windows_is_spread_evenly_and_whole(count, tmp_path_factory):
    subject = shared_subject(tmp_path_factory)
    offsets = subject.offsets("val", count)
    assert len(offsets) == min(count, 20)
    assert len(set(offsets)) == len(offsets)
    assert all(offset % 10 == 0 and offset + 10 < 201 for offset in offsets)
    if count >= 2:
        assert (offsets[0], offsets[-1]) == (0, 190)


_shared = []


def shared_subject(tmp_path_factory) -> Subject:
    if not _shared:
        folder = tmp_path_factory.mktemp("shared")
        write_corpus(folder, [("train", "a" * 400), ("val", "b" * 201)], Chars(LETTERS), source="test")
        _shared.append(subject_of(checkpoint(folder / "run" / "ckpt.pt", folder)))
    return _shared[0]


def test_windows_may_be_shorter_and_begin_with_a_token(path):
    """Without gaps: 201 characters are 50 whole windows of 4."""
    tokens = Corpus(path.parents[1] / "corpus").tokens["val"].astype(np.int64)
    subject = subject_of(path, "--block-size", "4", "--bos", "12", "--batches", "13")
    assert subject.arguments | {"block_size": 4, "bos": 12} == subject.arguments
    x, y = (torch.cat(parts) for parts in zip(*subject.batches(), strict=True))
    text = torch.from_numpy(tokens[:200]).view(50, 4)
    assert torch.equal(y, text)
    assert torch.equal(x, torch.cat((torch.full((50, 1), 12), text[:, :3]), dim=1))
    named = subject_of(path, "--block-size", "4", "--bos", "m", "--batches", "13")
    assert named.arguments == subject.arguments  # the same question
    assert torch.equal(torch.cat([x for x, _ in named.batches()]), x)
    plain = next(iter(subject_of(path, "--bos", "none").batches()))[0]
    assert torch.equal(plain[0], torch.from_numpy(tokens[:10]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--block-size", "11"), "--block-size 11: the context of .*ckpt.pt is 10"),
        (("--block-size", "0"), "--block-size 0: at least 1"),
        (("--bos", "13"), "--bos 13: .*ckpt.pt has 13 token ids, from 0"),
        (("--bos", "-1"), "--bos -1: a token's id, from 0, its text, or none"),
        (("--bos", "ab"), "'ab' is no token of the chars vocabulary: give one, or its id"),
        (("--bos", "<|endoftext|>"), "character '<' is not in the vocabulary of 13 characters"),
    ],
)
def test_a_window_or_a_token_that_the_model_has_not_is_refused(path, monkeypatch, capsys, arguments, message):
    assert re.search(message, refusal(monkeypatch, capsys, path, "--device", "cpu", *arguments))


def test_the_split_is_the_one_asked_for(path):
    train = next(iter(subject_of(path, "--split", "train").batches()))[0]
    val = next(iter(subject_of(path).batches()))[0]
    tokens = subject_of(path).corpus.tokens
    assert train[0].tolist() == tokens["train"][:10].tolist() != val[0].tolist() == tokens["val"][:10].tolist()


def test_a_corpus_that_is_missing_is_named_and_data_replaces_it(tmp_path, corpus, monkeypatch, capsys):
    gone = checkpoint(tmp_path / "gone" / "ckpt.pt", tmp_path / "moved away")
    error = refusal(monkeypatch, capsys, gone, "--device", "cpu")
    assert "moved away" in error
    assert "--data" in error
    unknown = checkpoint(tmp_path / "unknown" / "ckpt.pt", None)
    error = refusal(monkeypatch, capsys, unknown, "--device", "cpu")
    assert str(unknown) in error
    assert "--data" in error
    for path in (gone, unknown):
        run(COUNTING, [str(path), "--device", "cpu", "--data", str(corpus)])
        assert (path.parent / "diagnostics" / "counting.json").exists()


def test_a_corpus_that_does_not_fit_is_refused(tmp_path, corpus, monkeypatch, capsys):
    small = checkpoint(tmp_path / "small" / "ckpt.pt", corpus, replace(CONFIG, vocab_size=12))
    assert "13 token ids" in refusal(monkeypatch, capsys, small, "--device", "cpu")
    long = checkpoint(tmp_path / "long" / "ckpt.pt", corpus, replace(CONFIG, block_size=201))
    assert "201 tokens, fewer than one window of 201 + 1" in refusal(monkeypatch, capsys, long, "--device", "cpu")
    foreign = tmp_path / "foreign"  # as many ids, but each stands for other text
    write_corpus(foreign, [("train", "nopq" * 99), ("val", "rstu" * 50)], Chars("nopqrstuvwxyz"), source="test")
    own = checkpoint(tmp_path / "own" / "ckpt.pt", corpus)
    error = refusal(monkeypatch, capsys, own, "--device", "cpu", "--data", foreign)
    assert f"was trained with tokenizer chars, {foreign} has chars with other characters" in error
    assert not (tmp_path / "own" / "diagnostics").exists()
    assert not (tmp_path / "small" / "diagnostics").exists()
    assert not (tmp_path / "long" / "diagnostics").exists()


def test_a_corpus_that_is_another_than_in_training_is_said(tmp_path, corpus, monkeypatch, capsys):
    own = {"tokenizer": "chars", "vocabulary": LETTERS, "folder": str(corpus), "sha256": Corpus(corpus).sha256}
    path = save_model(GPT(CONFIG), tmp_path / "own" / "ckpt.pt", None, corpus=own)
    arguments = [str(path), "--device", "cpu", "--batches", "1"]

    def notes(*more):
        run(COUNTING, [*arguments, *more])
        return read_json(tmp_path / "own" / "diagnostics" / "counting.json")["notes"]

    assert notes() == ["a note"]
    tiny_corpus(corpus, 500)
    assert notes() == ["a note", f"{corpus} holds other text now than {path} was trained on"]
    assert notes("--data", str(corpus)) == ["a note"]  # another corpus was asked for
