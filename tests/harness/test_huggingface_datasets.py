"""Text out of files, through Hugging Face's datasets, and one line where there is none."""

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest

from harness import documents
from harness.corpus import Corpus
from harness.errors import UserError, run_cli
from harness.huggingface_datasets import Texts, load, texts


@pytest.fixture
def stream(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    lines = [json.dumps({"body": text, "number": i}) for i, text in enumerate(["one", "", None, "漢"])]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    return load(str(tmp_path / "texts.jsonl"), "train", streaming=True)


def test_missing_and_empty_texts_are_left_out(stream):
    assert list(texts(stream, "body")) == ["one", "漢"]


def test_a_compressed_file_is_what_its_name_says_beneath(stream, tmp_path):
    plain = (tmp_path / "texts.jsonl").read_bytes()
    (tmp_path / "v1.0.jsonl.gz").write_bytes(gzip.compress(plain))
    assert list(texts(load(str(tmp_path / "v1.0.jsonl.gz"), "train", streaming=True), "body")) == ["one", "漢"]


def test_what_is_not_utf8_is_one_line(tmp_path):
    (tmp_path / "texts.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match="the dataset holds text that is not UTF-8"):
        list(texts(load(str(tmp_path / "texts.jsonl"), "train", streaming=True), "text"))


@pytest.mark.parametrize(
    ("column", "message"), [("text", "no column 'text' but body, number"), ("number", "column 'number' holds int")]
)
def test_another_column_is_refused_by_name(stream, column, message):
    with pytest.raises(UserError, match=message):
        list(texts(stream, column))


def test_a_split_that_is_not_there_is_one_line(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot load the split 'train' of .*broken\.json") as error:
        list(texts(load(str(tmp_path / "broken.json"), "train", streaming=False), "text"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["lines", "parquet"])
def test_a_stream_goes_on_where_it_stood(tmp_path, monkeypatch, kind):
    """After any number of texts, over batches and files; its state is JSON."""
    import datasets

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    rows = [{"text": f"text {i}" if i % 7 else None} for i in range(2500)]
    for number, start in enumerate((0, 300, 1600)):
        part = rows[start : (300, 1600, None)[number]]
        if kind == "lines":
            (tmp_path / f"{number}.jsonl").write_text("\n".join(map(json.dumps, part)))
        else:
            datasets.Dataset.from_list(part).to_parquet(tmp_path / f"{number}.parquet", batch_size=170)

    def stream():
        return Texts(load(str(tmp_path), "train", streaming=True), "text")

    whole = stream()
    states, every = [whole.state()], []
    for text in whole:
        every.append(text)
        states.append(json.loads(json.dumps(whole.state())))
    assert every == [row["text"] for row in rows if row["text"]]
    for taken in (0, 1, 850, 857, 858, 1371, 1372, 2100, len(every)):
        rest = stream()
        rest.go_on(states[taken])
        assert list(rest) == every[taken:]


def test_an_interrupted_prepare_of_a_stream_is_continued_by_the_same_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    Path("texts").mkdir()
    for split, count in (("train", 3000), ("valid", 40)):
        lines = [json.dumps({"text": f"{split} {i} " * 9}) for i in range(count)]
        Path("texts", f"{split}.jsonl").write_text("\n".join(lines))
    prepare = importlib.import_module("data.hf.prepare")
    monkeypatch.setattr(documents, "PIECE", 4096)
    arguments = ["texts", "--streaming", "--val-split", "validation", "--max-documents", "2500"]
    common = [*arguments, "--tokenizer", "bytes", "--threads", "2"]

    def run(out, *more):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *common, "--out", out, *more])
        return run_cli(prepare.main)

    assert run("whole") == 0
    seen, texts = [], Texts.__iter__

    def interrupted(self):
        for text in texts(self):
            seen.append(text)
            if len(seen) in (1300, 2510 + 30):
                raise KeyboardInterrupt
            yield text

    monkeypatch.setattr(Texts, "__iter__", interrupted)
    capsys.readouterr()
    assert run("parts") == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert run("parts", "--max-documents", "2400") == 130  # of other arguments: nothing is taken from it
    assert "cannot be continued (it had other arguments): it starts afresh" in capsys.readouterr().out
    assert run("parts", "--max-documents", "2400") == 0
    assert "continued, after " in capsys.readouterr().out
    assert run("parts") == 0
    assert (Corpus("parts").sha256, Corpus("parts").meta) == (Corpus("whole").sha256, Corpus("whole").meta)
