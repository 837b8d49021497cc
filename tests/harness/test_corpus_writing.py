"""What is written can be read, and nothing half-made is ever left."""

import errno
import gzip
import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from harness import documents
from harness.corpus import Corpus
from harness.corpus_writing import TextFile, characters_of, find_files, split_files
from harness.documents import position
from harness.errors import UserError, run_cli
from harness.tokenizer import Bytes, Chars
from tests.helpers import DOCUMENTS, ROOT, write_documents


def test_documents_are_joined_by_the_separator(tmp_path):
    write_documents(tmp_path, extra={"python_version": "3.x"})
    corpus = Corpus(tmp_path)
    assert bytes(corpus.tokens["train"].astype(np.uint8)) == b"\0".join([b"one\n", b"\xff", b""])
    assert corpus.tokenizer.decode(corpus.tokens["val"]) == "two"
    assert corpus.tokens["train"].dtype == np.uint16
    assert corpus.vocab_size == 256
    assert corpus.bytes_per_token == {"train": 1.0, "val": 1.0}
    assert corpus.meta["python_version"] == "3.x"
    assert corpus.meta["document_separator"] == 0
    train = corpus.meta["splits"]["train"]
    assert (train["tokens"], train["bytes"], train["documents"]) == (7, 7, 3)
    assert train["sha256"] == hashlib.sha256((tmp_path / "train.bin").read_bytes()).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_the_same_text_gives_the_same_corpus(tmp_path):
    write_documents(tmp_path / "a")
    write_documents(tmp_path / "b")
    for name in ("meta.json", "train.bin", "val.bin"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert Corpus(tmp_path / "a").sha256 == Corpus(tmp_path / "b").sha256
    write_documents(tmp_path / "b", [*DOCUMENTS, ("val", "more")])
    assert Corpus(tmp_path / "a").sha256 != Corpus(tmp_path / "b").sha256


def test_gpt2_bytes_add_up_and_separators_count_none(tmp_path, gpt2):
    texts = ["naïve 漢字", "<|endoftext|>", "x"]
    write_documents(tmp_path, [("train", text) for text in texts] + [("val", "val")], gpt2)
    corpus = Corpus(tmp_path)
    ids = corpus.tokens["train"].tolist()
    assert [i for i, token in enumerate(ids) if token == 50256] == [len(gpt2.encode(texts[0])), len(ids) - 2]
    assert corpus.meta["splits"]["train"]["bytes"] == sum(len(text.encode()) for text in texts)
    assert corpus.bytes_per_token["train"] * len(ids) == pytest.approx(sum(len(text.encode()) for text in texts))
    assert corpus.tokenizer.decode(ids) == "<|endoftext|>".join(texts)


def test_more_than_65535_ids_take_uint32(tmp_path):
    vocabulary = "".join(map(chr, [*range(32, 0xD800), *range(0xE000, 0x14000)]))
    assert len(vocabulary) > 65_536
    write_documents(tmp_path, [("train", vocabulary), ("val", vocabulary[-1])], Chars(vocabulary))
    corpus = Corpus(tmp_path)
    assert corpus.meta["dtype"] == "uint32"
    assert corpus.tokens["train"].dtype == np.uint32
    assert corpus.tokens["val"].tolist() == [len(vocabulary) - 1]
    assert corpus.tokenizer.decode(corpus.tokens["train"]) == vocabulary
    assert corpus.meta["splits"]["train"]["bytes"] == len(vocabulary.encode())


def test_unknown_character_stops_the_writing(tmp_path):
    with pytest.raises(UserError, match="'z' is not in the vocabulary"):
        write_documents(tmp_path, [("train", "abz")], Chars("ab"))
    assert list(tmp_path.iterdir()) == []


def test_a_split_without_text_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no text for the val split"):
        write_documents(tmp_path, [("train", "only")])
    assert list(tmp_path.iterdir()) == []


def test_long_documents_are_encoded_in_pieces_exactly(tmp_path, gpt2):
    import tiktoken

    text = (ROOT / "harness" / "corpus_writing.py").read_text().encode("ascii", "replace").decode() * 40
    assert len(text) > 2 * documents.PIECE
    path = tmp_path / "long.txt"
    path.write_text(text)
    parts = [("train", text), ("val", TextFile(path, 10, 600_000)), ("val", TextFile(path, len(text) - 5))]
    write_documents(tmp_path, parts, gpt2)
    corpus, stock = Corpus(tmp_path), tiktoken.get_encoding("r50k_base")
    assert corpus.tokens["train"].tolist() == stock.encode_ordinary(text)
    expected = [*stock.encode_ordinary(text[10:600_000]), 50256, *stock.encode_ordinary(text[-5:])]
    assert corpus.tokens["val"].tolist() == expected
    assert corpus.meta["splits"]["val"]["documents"] == 2


def test_memory_is_bounded(tmp_path):
    path = tmp_path / "big.txt"
    path.write_bytes(b"some words in a line\n" * 3_000_000)  # 63 MB
    tracemalloc.start()
    try:
        write_documents(tmp_path, [("train", TextFile(path)), ("val", "x")])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6  # five jobs under way, each two pieces of text, their ids and look-ups of 8 bytes
    assert Corpus(tmp_path).meta["splits"]["train"]["bytes"] == 63_000_000


def test_missing_input_file(tmp_path):
    write_documents(tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*missing.txt: No such file"):
        write_documents(tmp_path, [("train", TextFile(tmp_path / "missing.txt"))])
    Corpus(tmp_path)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_prepare_leaves_the_former_corpus(tmp_path, failure):
    write_documents(tmp_path)
    former = Corpus(tmp_path).sha256

    def documents():
        yield "train", "x" * 3_000_000
        raise failure

    with pytest.raises(failure):
        write_documents(tmp_path, documents())
    assert Corpus(tmp_path).sha256 == former
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_is_one_line_and_leaves_the_former_corpus(tmp_path, monkeypatch, capsys):
    write_documents(tmp_path)
    former = Corpus(tmp_path).sha256

    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    capsys.readouterr()
    assert run_cli(lambda: write_documents(tmp_path, [("train", "new"), ("val", "new")])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: No space left on device")
    assert str(tmp_path) in error
    assert error.count("\n") == 1
    assert Corpus(tmp_path).sha256 == former
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("shard_bytes", [1 << 30, 1 << 16])
def test_a_disk_that_is_full_while_ids_are_written_leaves_the_former_corpus(tmp_path, shard_bytes):
    write_documents(tmp_path)
    former = Corpus(tmp_path).sha256
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, hard))  # no file grows beyond: the same error of a write
    try:
        with pytest.raises(OSError, match="File too large"):
            write_documents(tmp_path, [("train", "x" * 3_000_000), ("val", "x")], shard_bytes=shard_bytes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Corpus(tmp_path).sha256 == former
    assert len(list(tmp_path.iterdir())) == 3


def test_a_killed_prepare_leaves_the_former_corpus(tmp_path):
    write_documents(tmp_path)
    former = Corpus(tmp_path).sha256
    code = (
        "import sys, itertools; from harness.corpus_writing import write_corpus; from harness.tokenizer import Bytes;"
        "write_corpus(sys.argv[1], (('train', 'x' * 100_000) for _ in itertools.count()), Bytes(), source='')"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    temporary = tmp_path / f"train.bin.{process.pid}.tmp"
    deadline = time.monotonic() + 300
    while not (temporary.exists() and temporary.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Corpus(tmp_path).sha256 == former
    assert temporary.exists()
    write_documents(tmp_path)  # what the dead left behind goes with the next prepare
    assert len(list(tmp_path.iterdir())) == 3


def test_split_depends_on_each_path_alone(tmp_path):
    paths = {tmp_path / f"{i}": f"folder/{i}.py" for i in range(200)}
    documents = split_files(paths, 0.2)
    assert 0 < sum(split == "val" for split, _ in documents) < 80
    backwards = split_files(dict(reversed(paths.items())), 0.2)
    assert documents == backwards
    fewer = split_files(dict(list(paths.items())[:150]), 0.2)
    kept = set(fewer)
    assert sum(document in kept for document in documents) >= 149  # all but, perhaps, the first
    assert [split for split, _ in split_files(dict(list(paths.items())[:2]), 0.001)] == ["val", "train"]
    same = split_files({tmp_path / folder / "t.txt": "t.txt" for folder in "ab"}, 0.5)
    assert [document.path.parent.name for _, document in same] == ["a", "b"]  # of one key, and neither is lost


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_the_split_may_be_left_to_a_hash_of_the_text(tmp_path, gpt2, name):
    texts = [f"number {i}, " * (60_000 if i == 7 else 1 + i % 9) for i in range(99)]
    tokenizer = gpt2 if name == "gpt2" else Bytes()
    chosen = [("val" if position(text.encode()) < 0.3 else "train", text) for text in texts]
    assert {split for split, _ in chosen} == {"train", "val"}
    write_documents(tmp_path / "share", [(0.3, text) for text in texts], tokenizer)
    write_documents(tmp_path / "named", chosen, tokenizer)
    for file in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "share" / file).read_bytes() == (tmp_path / "named" / file).read_bytes()


def test_find_files(tmp_path):
    for name in ("a.py", "b.txt", "c.md", "sub/c.py", "tests/d.py", "sub/tests/e.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    (tmp_path / "Link.py").symlink_to("a.py")  # before its target in any order of names
    (tmp_path / "broken.py").symlink_to("nowhere.py")
    found = find_files(tmp_path, ["*.py", "*.md"], ["tests"])
    assert found == {tmp_path / name: name for name in ("a.py", "c.md", "sub/c.py")}


# ------------------------------------------------------------------------------------------------ what is no text

LATIN = "Él dijo: «¿Qué más?» — así fue.\n".replace("—", "-").encode("latin-1") * 200


@pytest.mark.parametrize("name", ["gpt2", "chars"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (LATIN, r"is not UTF-8 in [\d,]+ places"),
        (LATIN[:30], "is no UTF-8 text, as 1 of the files are not"),  # too few places in one piece to tell
        ("text".encode("utf-16") * 9, "holds NUL bytes, as UTF-16 and compressed files do"),
        (gzip.compress(bytes(range(256)) * 99, mtime=0), "holds NUL bytes, as UTF-16 and compressed files do"),
    ],
)
def test_what_is_no_utf8_text_is_refused_and_bytes_keep_it(tmp_path, gpt2, name, content, expected):
    write_documents(tmp_path / "out")
    former = Corpus(tmp_path / "out").sha256
    (tmp_path / "x.txt").write_bytes(content)
    documents = [("train", TextFile(tmp_path / "x.txt")), ("val", "x")]
    tokenizer = gpt2 if name == "gpt2" else Chars(characters_of(documents))
    with pytest.raises(UserError, match=rf"x\.txt {expected}.*--tokenizer bytes"):
        write_documents(tmp_path / "out", documents, tokenizer)
    assert Corpus(tmp_path / "out").sha256 == former
    write_documents(tmp_path / "out", documents)
    assert bytes(Corpus(tmp_path / "out").tokens["train"].astype(np.uint8)) == content


def test_a_few_wrong_places_are_counted_said_and_count_as_the_bytes_that_they_are(tmp_path, gpt2, capsys):
    content = b"caf\xe9 and so on, in English\n" + b"words in UTF-8\n" * 500
    for name in ("x.txt", "y.txt"):
        (tmp_path / name).write_bytes(content)
    documents = [("train", TextFile(tmp_path / name)) for name in ("x.txt", "y.txt")]
    write_documents(tmp_path / "out", [*documents, ("val", "x")], gpt2)
    assert f"2 places that are not UTF-8 became U+FFFD, in {tmp_path / 'x.txt'} and 1 file" in capsys.readouterr().out
    corpus = Corpus(tmp_path / "out")
    assert corpus.meta["splits"]["train"]["bytes"] == 2 * len(content)
    assert corpus.tokenizer.decode(corpus.tokens["train"]).count("\ufffd") == 2


def test_the_characters_of_a_large_file_take_little_memory(tmp_path):
    (tmp_path / "big.txt").write_bytes(b"some words in a line, and a long one\n" * 400_000)  # 15 MB
    tracemalloc.start()
    try:
        characters = characters_of([("train", TextFile(tmp_path / "big.txt"))])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert characters == "".join(sorted(set("some words in a line, and a long one\n")))
    assert peak < 8 * documents.PIECE
