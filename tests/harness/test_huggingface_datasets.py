"""Text out of files, through Hugging Face's datasets, and one line where there is none."""

import gzip
import json

import pytest

from harness.errors import UserError
from harness.huggingface_datasets import load, texts


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
