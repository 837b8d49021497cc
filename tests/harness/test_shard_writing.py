"""A corpus takes the place of a former one as one, whenever its writer is killed; and one that streams goes on."""

import errno
import os
import random
import time
from pathlib import Path

import pytest

from harness import documents, shard_writing
from harness.corpus import Corpus, is_prepared
from harness.errors import UserError
from tests.helpers import write_documents

FORMER = [("train", "former " * 30), ("val", "former")]
NEW = [("train", "new " * 90), ("val", "the new one")]
ONE_FILE, SHARDS = 1 << 30, 400  # bytes


class Killed(BaseException):
    pass


def killed_at(call: int, work) -> bool:
    """Whether `work()` was stopped at the call of that number that changes a folder or flushes; from there on no call
    changes anything, as if a signal had killed the process. It is one that no longer runs: no process has its number.
    """
    left = call

    def counted(function):
        def wrapper(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*arguments, **options)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 2**30)
        for name in ("replace", "unlink"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(os, "fsync", counted(lambda _: None))  # it takes its time, and no machine fails here
        try:
            work()
        except Killed:
            return True
    return False


def text_of(folder: Path) -> list[tuple[str, str]]:
    corpus = Corpus(folder)
    return [(split, corpus.tokenizer.decode(corpus.tokens[split])) for split in ("train", "val")]


@pytest.mark.parametrize(("former", "new"), [(ONE_FILE, ONE_FILE), (ONE_FILE, SHARDS), (SHARDS, SHARDS)])
def test_a_reader_finds_the_former_corpus_or_the_new_one_whenever_the_writer_is_killed(tmp_path, former, new):
    """At each of its steps; and the next writer removes what it left, whatever the reader found."""
    found = []
    for call in range(200):
        folder = tmp_path / f"{call}"
        write_documents(folder, FORMER, shard_bytes=former)
        killed = killed_at(call, lambda folder=folder: write_documents(folder, NEW, shard_bytes=new))
        found.append(text_of(folder))
        assert is_prepared(folder)
        write_documents(folder, FORMER)
        assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]
        assert text_of(folder) == FORMER
        if not killed:
            break
    switch = found.index(NEW)
    assert 5 < switch < len(found) - 3  # some steps come before it, and some behind
    assert found == [FORMER] * switch + [NEW] * (len(found) - switch)


def test_a_first_corpus_is_there_whole_or_not_at_all(tmp_path):
    for call in range(200):
        folder = tmp_path / f"{call}"
        killed = killed_at(call, lambda folder=folder: write_documents(folder, NEW))
        if is_prepared(folder):
            assert text_of(folder) == NEW
        else:
            with pytest.raises(UserError, match="is not prepared"):
                Corpus(folder)
        if not killed:
            break
    assert call > 8


def test_of_several_writers_at_once_the_last_one_wins_whole(tmp_path):
    """While they swap, a reader finds one of their corpora whenever it looks."""
    write_documents(tmp_path, FORMER)
    texts = [[("train", f"{i} " * (250 + 7 * i)), ("val", f"{i}" * (1 + i))] for i in range(6)]
    children = []
    for i, text in enumerate(texts):
        if (child := os.fork()) == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            try:
                for _ in range(4):
                    write_documents(tmp_path, text, shard_bytes=ONE_FILE if i % 2 else SHARDS)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    while children:
        children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
        corpus = Corpus(tmp_path, lazily=True)
        assert (corpus.meta["splits"]["train"]["tokens"], len(corpus.tokens["val"])) in [
            (len(train), len(val)) for (_, train), (_, val) in [FORMER, *texts]
        ]
    assert text_of(tmp_path) in texts
    listed = {file.path for tokens in Corpus(tmp_path).tokens.values() for file in tokens.files}
    assert {path for path in tmp_path.iterdir() if path.suffix != ".crc"} == {*listed, tmp_path / "meta.json"}


def test_a_file_system_without_fsync_is_no_failure(tmp_path, monkeypatch):
    def fsync(_descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    write_documents(tmp_path, NEW, shard_bytes=SHARDS)
    assert text_of(tmp_path) == NEW


def test_a_killed_writer_s_temporary_files_go_and_a_user_s_own_stay(tmp_path):
    dead = [f"{name}.{2**30}.tmp" for name in ("train.bin", "val_00003.bin", "val_00003.crc", "meta.json")]
    own = ["notes.tmp", f"notes.{2**30}.tmp", f"train.bin.{os.getppid()}.tmp"]  # the last is of one that still runs
    for name in dead + own:
        (tmp_path / name).touch()
    write_documents(tmp_path, NEW)
    assert sorted(os.listdir(tmp_path)) == sorted([*own, "meta.json", "train.bin", "val.bin"])


@pytest.mark.faults
def test_writers_killed_at_random_moments(tmp_path):
    write_documents(tmp_path, FORMER)
    for number in range(100):
        text = [("train", f"{number} " * 40_000), ("val", f"{number}")]
        if (child := os.fork()) == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            write_documents(tmp_path, text, shard_bytes=random.choice([ONE_FILE, 1 << 16]))
            os._exit(0)
        time.sleep(random.expovariate(50))
        os.kill(child, 9)
        os.waitpid(child, 0)
        ((_, train), (_, val)) = found = text_of(tmp_path)
        assert found == FORMER or train == f"{val} " * 40_000
    write_documents(tmp_path, FORMER)
    assert len([*tmp_path.iterdir()]) == 3


# --- continuing -------------------------------------------------------------------------------------------------------


class Lines:
    """Documents that can be continued; `fail(number)` is called before each is given."""

    def __init__(self, count: int, fail=lambda number: None):
        self._number, self._count, self._fail = 0, count, fail

    def state(self):
        return {"number": self._number}

    def go_on(self, state):
        self._number = state["number"]

    def __iter__(self):
        while self._number < self._count:
            self._fail(self._number)
            self._number += 1
            # Of very different lengths: some in many pieces, many to a job.
            text = f"{self._number} is the number of this line. " * (1 if self._number % 40 else 500)
            yield ("train" if self._number % 50 else "val"), text


@pytest.fixture
def pieces_of_2k(monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 2048)


def write_lines(folder, fail=lambda number: None, **options):
    write_documents(folder, Lines(2000, fail), shard_bytes=500_000, arguments={"lines": 2000} | options)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("journal", ["from time to time", "at the end"])
def test_an_interrupted_writer_is_continued_to_the_same_bytes(tmp_path, pieces_of_2k, monkeypatch, capsys, journal):
    """After kill -9 and Ctrl-C at any moments, one after the other; a former corpus stays until the end."""
    monkeypatch.setattr(shard_writing, "_JOURNAL_SECONDS", 0 if journal == "from time to time" else 1e9)
    write_lines(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert {"train_00002.bin", "val.bin"} < whole.keys()
    folder = tmp_path / "parts"
    write_documents(folder, FORMER)
    given = []
    for stop in (300, 301, 950, 1400, 1900):

        def fail(number, stop=stop):
            given.append(number)
            if number == stop:
                raise KeyboardInterrupt

        if stop == 950:
            killed_at(40 if journal == "from time to time" else 2, lambda: write_lines(folder))
        else:
            with pytest.raises(KeyboardInterrupt):
                write_lines(folder, fail)
        assert text_of(folder) == FORMER
    write_lines(folder, given.append)
    assert contents(folder) == whole
    assert len(given) < 2000 + 5 * 200  # what was under way is done again, and no more
    assert capsys.readouterr().out.count("continued, after") >= 4


@pytest.mark.parametrize("change", ["arguments", "the journal", "a shard", "the last file", "a table of checksums"])
def test_what_does_not_fit_together_starts_afresh_and_says_so(tmp_path, pieces_of_2k, capsys, change):
    def fail(number):
        if number == 1500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lines(tmp_path, fail)
    names = {
        "a shard": "train.bin.part",
        "the last file": "val.bin.part",
        "a table of checksums": "train_00000.crc.part",
    }
    path = tmp_path / names.get(change, "unfinished.json")
    whole = path.read_bytes()
    options = {"column": "body"} if change == "arguments" else {}
    if change == "a shard":
        path.write_bytes(whole[:-1])
    elif not options:
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    write_lines(tmp_path, **options)
    reason = {"arguments": "it had other arguments"}.get(change, "")
    assert f"what was begun there cannot be continued ({reason}" in capsys.readouterr().out
    write_lines(tmp_path / "whole")
    assert contents(tmp_path) == contents(tmp_path / "whole")


def test_what_another_process_is_writing_is_left_alone(tmp_path, pieces_of_2k):
    """A second one beside it is not continued, and does not harm it."""

    def beside(number):
        if number == 1000:
            write_lines(tmp_path)
            write_documents(tmp_path, FORMER)
            assert (tmp_path / "train.bin.part").exists()

    write_lines(tmp_path, beside)
    write_lines(tmp_path / "alone")
    assert contents(tmp_path) == contents(tmp_path / "alone")
