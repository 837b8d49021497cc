"""The prepare scripts, run as a user runs them."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from harness import huggingface_datasets
from harness.corpus import Corpus
from harness.errors import UserError
from tests.helpers import SHARED
from tests.processes import run_python

SHAKESPEARE = SHARED / "tinyshakespeare" / "input.txt"
NO_NETWORK = {"HTTPS_PROXY": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}  # port 9 refuses
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.is_file(), reason=f"{SHAKESPEARE} is absent")


def prepare(corpus, *arguments, cwd, status=0, **environment):
    """Runs data/<corpus>/prepare.py from another folder; returns stdout, or the one line of the error."""
    run = run_python(f"data/{corpus}/prepare.py", *arguments, cwd=cwd, **NO_NETWORK | environment)
    assert run.returncode == status, run.stderr
    if status:
        assert run.stderr.startswith("error: ")
        assert run.stderr.count("\n") == 1
        return run.stderr
    assert "\r" not in run.stderr  # no progress bar where no one watches
    return run.stdout


def test_stdlib(tmp_path):
    printed = prepare("stdlib", "--out", "a", cwd=tmp_path)
    assert printed.count("\n") == 1
    prepare("stdlib", "--out", "b", "--threads", "1", cwd=tmp_path)
    corpus = Corpus(tmp_path / "a")
    assert corpus.sha256 == Corpus(tmp_path / "b").sha256
    assert corpus.meta["python_version"] == ".".join(map(str, sys.version_info[:3]))

    documents = {split: bytes(ids.astype(np.uint8)).split(b"\0") for split, ids in corpus.tokens.items()}
    assert 0.01 < len(corpus.tokens["val"]) / len(corpus.tokens["train"]) < 0.15
    root = Path(sysconfig.get_path("stdlib"))
    unwanted = {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "__pycache__"}
    expected = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*.py")
        if not unwanted & set(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    }
    ordered = sorted(expected, key=lambda key: hashlib.sha256(key.encode()).digest()[16:20])
    assert documents["val"] + documents["train"] == [expected[key] for key in ordered]


def test_backcopy_is_the_task_by_its_definition(tmp_path):
    """Every sequence obeys the rule, and what it draws is drawn as often as the text says, within 5 standard errors."""
    text = "the cat sat on the mat, and then it ate the rest. " * 40
    (tmp_path / "play.txt").write_text(text + "@")  # the rarest character is left out
    arguments = ("--input", "play.txt", "--triggers", "te ", "--characters", str(len(set(text))))
    prepare("backcopy", *arguments, "--sequences", "3000", "--out", "a", cwd=tmp_path)
    corpus = Corpus(tmp_path / "a")
    meta, vocabulary = corpus.meta, corpus.tokenizer.vocabulary[:-1]
    assert (vocabulary, meta["begin_of_text"]) == ("".join(sorted(set(text))), len(vocabulary))
    assert (meta["triggers"], meta["sequence_length"]) == (sorted(map(vocabulary.index, "te ")), 64)
    sequences = corpus.tokens["train"].reshape(-1, 65).astype(np.int64)
    assert (sequences.shape[0], len(corpus.tokens["val"])) == (3000, 2048 * 65)
    assert (sequences[:, 0] == meta["begin_of_text"]).all()
    ids = sequences[:, 1:]
    assert ids.max() < len(vocabulary)
    copied = np.isin(ids[:, 1:-1], meta["triggers"])
    assert np.array_equal(ids[:, 2:][copied], ids[:, :-2][copied])

    known = np.array([vocabulary.index(c) for c in text])
    pairs = np.zeros((len(vocabulary), len(vocabulary)))
    np.add.at(pairs, (known[:-1], known[1:]), 1)
    drawn = np.zeros_like(pairs)
    np.add.at(drawn, (ids[:, 1:-1][~copied], ids[:, 2:][~copied]), 1)
    np.add.at(drawn, (ids[:, 0], ids[:, 1]), 1)  # a trigger that comes first is ordinary
    for counts, weights in [*zip(drawn, pairs, strict=True), (np.bincount(ids[:, 0]), pairs.sum(1))]:
        n, p = counts.sum(), weights / weights.sum()
        assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all()

    prepare("backcopy", *arguments, "--sequences", "1000", "--out", "b", cwd=tmp_path)
    assert np.array_equal(Corpus(tmp_path / "b").tokens["train"], sequences[:1000].ravel())  # fewer are the same
    prepare("backcopy", *arguments, "--sequences", "1000", "--seed", "2", "--out", "c", cwd=tmp_path)
    assert not np.array_equal(Corpus(tmp_path / "c").tokens["train"], sequences[:1000].ravel())
    assert corpus.tokenizer.decode(corpus.tokens["train"][:65]).startswith("␂")
    assert corpus.bytes_per_token["train"] == 64 / 65


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (("--triggers", "q"), "--triggers: 'q' is none of the 3 characters"),
        (("--triggers", ""), "--triggers '': at least one character"),
        (("--triggers", "abc"), "and not all 3 of the text"),
        (("--input", "no.txt"), "cannot read no.txt: No such file"),
        (("--seed", "-1"), "--seed -1: at least 0"),
    ],
)
def test_a_backcopy_that_cannot_be_made_is_refused(tmp_path, mistake, message):
    (tmp_path / "text.txt").write_text("abcab")
    assert message in prepare("backcopy", "--input", "text.txt", *mistake, "--out", "d", cwd=tmp_path, status=2)
    assert not (tmp_path / "d").exists()


def test_a_backcopy_of_no_utf8_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("ab é ab".encode("latin-1"))
    error = prepare("backcopy", "--input", "latin.txt", "--out", "e", cwd=tmp_path, status=2)
    assert "latin.txt is no UTF-8 text, from byte 3 on" in error


def test_backcopy_of_the_standard_library_takes_its_most_frequent_characters(tmp_path):
    prepare("backcopy", "--sequences", "100", "--out", "a", cwd=tmp_path)
    corpus = Corpus(tmp_path / "a")
    assert corpus.vocab_size == 97
    assert {" ", "e"} < {corpus.tokenizer.vocabulary[i] for i in corpus.meta["triggers"]}


PLAY = "".join(f"Person {i}:\nWhat is {i * i}, naïve friend? 漢!\n\n" for i in range(500))


@pytest.mark.parametrize("which", ["made up", pytest.param("tiny shakespeare", marks=needs_shakespeare)])
def test_shakespeare_char_is_nanogpts(which, tmp_path):
    """Nine tenths of the characters are for training, and an id is the place among the sorted characters."""
    source = tmp_path / "play.txt"
    source.write_text(PLAY if which == "made up" else SHAKESPEARE.read_text())
    prepare("shakespeare_char", "--input", source, "--out", tmp_path, cwd=tmp_path)
    corpus, text = Corpus(tmp_path), source.read_text()
    assert corpus.vocab_size == len(set(text))
    cut = int(0.9 * len(text))
    assert (len(corpus.tokens["train"]), len(corpus.tokens["val"])) == (cut, len(text) - cut)
    if which == "tiny shakespeare":
        assert (corpus.vocab_size, cut, len(text) - cut) == (65, 1_003_854, 111_540)
    ids = [corpus.tokens[split] for split in ("train", "val")]
    assert corpus.tokenizer.decode(np.concatenate(ids)) == text
    # The same two files beside nanoGPT's meta.pkl are the same corpus.
    (tmp_path / "meta.json").unlink()
    itos = dict(enumerate(sorted(set(text))))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(itos), "itos": itos, "stoi": {}}))
    assert Corpus(tmp_path).sha256 == corpus.sha256
    assert Corpus(tmp_path).bytes_per_token["val"] == corpus.bytes_per_token["val"]


def test_shakespeare_is_cut_by_its_characters_and_encoded_by_gpt2(tmp_path, gpt2):
    (tmp_path / "play.txt").write_text(PLAY)
    prepare("shakespeare", "--input", "play.txt", "--out", tmp_path, cwd=tmp_path)
    corpus, cut = Corpus(tmp_path), int(0.9 * len(PLAY))
    for split, part in (("train", PLAY[:cut]), ("val", PLAY[cut:])):
        assert corpus.tokens[split].tolist() == gpt2.encode(part).tolist()
        assert corpus.meta["splits"][split]["bytes"] == len(part.encode())


@needs_shakespeare
def test_shakespeare_is_nanogpts(tmp_path, gpt2):
    prepare("shakespeare", "--input", SHAKESPEARE, "--out", tmp_path, cwd=tmp_path)
    corpus = Corpus(tmp_path)
    assert (len(corpus.tokens["train"]), len(corpus.tokens["val"])) == (301_966, 36_059)
    sizes = [corpus.meta["splits"][split]["bytes"] for split in ("train", "val")]
    assert sum(sizes) == SHAKESPEARE.stat().st_size


def test_a_download_that_fails(tmp_path):
    error = prepare("shakespeare_char", "--out", tmp_path / "out", cwd=tmp_path, status=2)
    assert "raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt" in error
    assert "--input FILE" in error
    assert not (tmp_path / "out").exists()


def test_input_that_cannot_be_read(tmp_path):
    assert "no.txt: No such file" in prepare("shakespeare", "--input", "no.txt", cwd=tmp_path, status=2)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    assert "latin.txt is not UTF-8" in prepare("shakespeare", "--input", "latin.txt", cwd=tmp_path, status=2)


def test_text(tmp_path):
    (tmp_path / "one.txt").write_text("é" * 50)
    prepare("text", "one.txt", "--tokenizer", "chars", "--val-fraction", "0.15", "--out", "one", cwd=tmp_path)
    corpus = Corpus(tmp_path / "one")
    assert corpus.tokenizer.vocabulary == "é"
    assert (len(corpus.tokens["train"]), len(corpus.tokens["val"])) == (43, 7)  # by position, between characters

    for i in range(3):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{i}.md").write_text(f"document {i}")
    (tmp_path / "folder" / "4.tex").write_text("document 4")
    arguments = ("folder", "one.txt", "--glob", "*.md", "--glob", "*.tex", "--val-fraction", "0.5")
    prepare("text", *arguments, "--tokenizer", "bytes", "--out", "many", cwd=tmp_path)
    corpus = Corpus(tmp_path / "many")
    assert documents_of(corpus) == sorted([*(f"document {i}" for i in (0, 1, 2, 4)), "é" * 50])
    assert corpus.meta["source"] == "folder, one.txt"

    assert "no such file or folder: no.txt" in prepare("text", "no.txt", cwd=tmp_path, status=2)
    assert "no file matches '*.txt' in folder" in prepare("text", "folder", cwd=tmp_path, status=2)
    assert "--glob '' matches no file" in prepare("text", "folder", "--glob", "", cwd=tmp_path, status=2)


def documents_of(corpus) -> list[str]:
    """Of both splits of a corpus in bytes."""
    return sorted(text for ids in corpus.tokens.values() for text in bytes(ids.astype(np.uint8)).decode().split("\0"))


def test_text_takes_every_file_once_whatever_leads_to_it(tmp_path):
    for name in ("a/book.txt", "b/book.txt", "c/src/t.txt", "d/src/t.txt", "e/sub/x.txt", "e/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"the text of {name}")
    (tmp_path / "e" / "link.txt").symlink_to("y.txt")
    paths = ("a/book.txt", "b/book.txt", "c/src", "d/src", "e", "e/sub", "e/y.txt", "e/link.txt", "out")
    (tmp_path / "out").mkdir()
    arguments = (*paths, "--glob", "*.txt", "--glob", "*.bin", "--val-fraction", "0.4", "--tokenizer", "bytes")
    for _ in range(2):  # the second time, what the first has written lies among the texts
        prepare("text", *arguments, "--out", "out", cwd=tmp_path)
    expected = ["a/book.txt", "b/book.txt", "c/src/t.txt", "d/src/t.txt", "e/sub/x.txt", "e/y.txt"]
    assert documents_of(Corpus(tmp_path / "out")) == [f"the text of {name}" for name in expected]


@pytest.mark.parametrize(("files", "share"), [(1, 0.1), (3, 0.1), (40, 0.25)])
def test_text_gives_validation_the_share_that_was_asked_for(tmp_path, files, share):
    for i in range(files):
        (tmp_path / f"{i}.txt").write_text(f"{i:02} " + "words " * 200)
    arguments = (".", "--val-fraction", str(share), "--tokenizer", "bytes", "--out", "out")
    printed = prepare("text", *arguments, cwd=tmp_path)
    train, val = (len(ids) for ids in Corpus(tmp_path / "out").tokens.values())
    whole = files == 40  # of so many, the files that a hash chooses are about the share
    assert val / (train + val) == pytest.approx(share, rel=0.5 if whole else 0.02)
    assert ("validation: it gets the end of each, 10.0%" in printed) == (files == 3)


def test_text_reads_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    content = "".join(f"line {i}\n" for i in range(50_000))  # more than a pipe holds
    feeding = f"i=0; while [ $i -lt 50000 ]; do echo line $i; i=$((i+1)); done > {tmp_path / 'fifo'}"
    feeder = subprocess.Popen(["sh", "-c", feeding])
    prepare("text", "fifo", "--tokenizer", "chars", "--val-fraction", "0.1", "--out", "out", cwd=tmp_path)
    assert feeder.wait() == 0
    corpus = Corpus(tmp_path / "out")
    assert corpus.tokenizer.decode(np.concatenate([*corpus.tokens.values()])) == content
    assert len(corpus.tokens["val"]) == pytest.approx(len(content) / 10, abs=1)


def test_hf_local_json_lines(tmp_path):
    texts = [f"document {i} 漢" for i in range(300)]
    lines = [json.dumps({"body": text, "number": i}) for i, text in enumerate([*texts, "", None])]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    arguments = ("texts.jsonl", "--text-column", "body", "--tokenizer", "bytes", "--val-fraction", "0.1")
    prepare("hf", *arguments, "--out", "out", "--threads", "1", cwd=tmp_path, HF_HOME=str(tmp_path / "home"))
    corpus = Corpus(tmp_path / "out")
    documents = {split: bytes(ids.astype(np.uint8)).decode().split("\0") for split, ids in corpus.tokens.items()}
    assert sorted(documents["train"] + documents["val"]) == sorted(texts)
    assert 10 < len(documents["val"]) < 60

    streamed = huggingface_datasets.load(str(tmp_path / "texts.jsonl"), "train", streaming=True)
    assert list(huggingface_datasets.texts(streamed, "body")) == texts
    with pytest.raises(UserError, match="no column 'text' but body, number"):
        list(
            huggingface_datasets.texts(
                huggingface_datasets.load(str(tmp_path / "texts.jsonl"), "train", streaming=True), "text"
            )
        )
    with pytest.raises(UserError, match="column 'number' holds int"):
        list(huggingface_datasets.texts(streamed, "number"))


@pytest.mark.slow
def test_hf_saved_folder_with_its_own_validation_split(tmp_path, gpt2):
    code = (
        "import datasets; make = lambda *t: datasets.Dataset.from_dict({'text': list(t)});"
        "datasets.DatasetDict(train=make('one', 'two', 'three'), test=make('four')).save_to_disk('saved')"
    )
    assert run_python("-c", code, cwd=tmp_path).returncode == 0
    arguments = ("saved", "--val-split", "test", "--max-documents", "2")
    prepare("hf", *arguments, "--out", "out", cwd=tmp_path)
    corpus = Corpus(tmp_path / "out")
    assert corpus.tokenizer.decode(corpus.tokens["train"]) == "one<|endoftext|>two"
    assert corpus.tokenizer.decode(corpus.tokens["val"]) == "four"


def test_hf_without_network(tmp_path):
    arguments = ("someone/something", "--tokenizer", "bytes", "--out", "x")
    error = prepare("hf", *arguments, cwd=tmp_path, status=2, HF_HOME=str(tmp_path / "home"))
    assert "cannot load the split 'train' of someone/something" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_to_write(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "Permission denied" in prepare("stdlib", "--out", tmp_path / "locked" / "x", cwd=tmp_path, status=2)
