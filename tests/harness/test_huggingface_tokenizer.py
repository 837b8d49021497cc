"""A tokenizer.json gives the ids that the package tokenizers gives, by tiktoken or not, in pieces or not."""

import json
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from harness import documents
from harness.corpus import Corpus
from harness.corpus_writing import write_corpus
from harness.documents import pieces
from harness.errors import UserError
from harness.huggingface_tokenizer import HuggingFace
from harness.tokenizer import GPT2, different_tokenizers, from_meta, from_name
from tests.helpers import PRE_TOKENIZERS, ROOT, byte_level

# What the patterns treat differently: spaces of every kind, letters, digits, contractions, marks, emoji, newlines.
text = st.text() | st.text(alphabet="  \n\n\r\t\x1c\x85\xa0\u3000'stdmllverE ab90٣½.,!é漢👍\u0301<|endoftext|>")
words = ["a", "don't", "漢", "é", "e\u0301", "9", "٣0", "<|", "'", "!", "\x1c.", "\u3000x", "DON'T"]
spaces = [" ", "\n", "\n  ", " \u3000", " \t", "\n\n", "\r\n"]
words_and_spaces = st.lists(st.tuples(st.sampled_from(words), st.sampled_from(spaces)))


@pytest.fixture(scope="module", params=PRE_TOKENIZERS)
def pair(request) -> tuple[HuggingFace, tokenizers.Tokenizer]:
    """Ours, and theirs with special tokens taken for text."""
    theirs = byte_level(request.param)
    ours = HuggingFace(theirs.to_str(), 0)
    assert not ours.whole_documents
    assert ours._ranks is not None  # tiktoken encodes
    theirs.encode_special_tokens = True
    return ours, theirs


@given(string=text)
@settings(max_examples=150)
def test_ids_are_those_of_tokenizers(pair, string):
    ours, theirs = pair
    assert ours.encode(string).tolist() == theirs.encode(string, add_special_tokens=False).ids


def test_on_source_code_too_and_its_bytes_add_up(pair):
    ours, theirs = pair
    string = (ROOT / "harness" / "figures.py").read_text() + "x = 0.125   # 10,000 <think> <|endoftext|>\r\n   "
    ids = ours.encode(string)
    assert ids.tolist() == theirs.encode(string, add_special_tokens=False).ids
    assert ours.decode(ids) == string
    assert ours.token_bytes()[ids].sum() == len(string.encode())
    assert ours.token_bytes()[0] == 0  # <|endoftext|>
    assert 0 not in ids


@given(parts=words_and_spaces)
@settings(max_examples=150)
def test_pieces_encode_to_what_the_whole_does(pair, parts):
    document = "".join(word + space for word, space in parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", 64)
        cut = list(pieces(document))
    if any(after[:1] == b"\n" and not piece.decode()[-1].isalnum() for piece, after in pairwise(cut)):
        return  # there was no other place, and only GPT-2's pattern, which has a test of its own, has a word end there
    ours, _ = pair
    assert np.concatenate([ours.encode(piece) for piece in cut]).tolist() == ours.encode(document).tolist()


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2's and Mistral's: a space is ▁, one stands in front of every text, and unknown bytes are tokens."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ehlo", "▁h", "el", "▁hel"]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = [("▁", "h"), ("e", "l"), ("▁h", "el")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 1)])
    return tokenizer


def model_folder(folder, tokenizer, **named):
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return f"hf:{folder}"


def test_what_is_not_known_to_split_at_spaces_is_encoded_a_whole_document_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 16)
    document = "hello é " * 9
    theirs = sentencepiece()
    ours = from_name(model_folder(tmp_path / "model", theirs, eos_token="</s>"))
    write_corpus(tmp_path / "corpus", [("train", document), ("train", "x"), ("val", "hel")], ours, source="test")
    corpus = Corpus(tmp_path / "corpus")
    expected = [1, *theirs.encode(document, add_special_tokens=False).ids, 1, *theirs.encode("x").ids[1:]]
    assert corpus.tokens["train"].tolist() == expected
    assert corpus.tokenizer.begin == corpus.tokenizer.separator == 1
    assert corpus.tokenizer.decode(corpus.tokens["train"]) == f"<s> {document}<s> x"
    assert corpus.bytes_per_token["train"] == (len(document.encode()) + 1) / len(expected)


def test_a_corpus_and_a_checkpoint_hold_all_that_decoding_needs(tmp_path):
    name = model_folder(tmp_path / "model", byte_level("smollm2"), bos_token="<|endoftext|>")
    write_corpus(
        tmp_path / "corpus", [("train", "one"), ("train", "two"), ("val", "3")], from_name(name), source="test"
    )
    (tmp_path / "model" / "tokenizer.json").unlink()
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.tokenizer.decode(corpus.tokens["train"]) == "one<|endoftext|>two"
    assert corpus.meta["splits"]["train"]["bytes"] == 6
    again = from_meta(corpus.tokenizer.describe())
    assert (again.token_of("<|endoftext|>"), again.token_of("o")) == (0, again.encode("o")[0])
    assert (again.separator, again.decode(corpus.tokens["val"])) == (0, "3")
    with pytest.raises(UserError, match=r"there has to be a tokenizer\.json"):
        from_name(name)


def test_another_tokenizer_is_noticed_and_another_layout_of_the_same_file_is_not():
    file = byte_level("gpt2").to_str()
    one, same = HuggingFace(file, 0), HuggingFace(json.dumps(json.loads(file), indent=1), 0)
    other = HuggingFace(byte_level("smollm2").to_str(), 0)
    assert different_tokenizers(one.describe(), same.describe()) is None
    assert different_tokenizers(one.describe(), other.describe()) == ("hf", "hf with other tokens")
    assert different_tokenizers(one.describe(), GPT2().describe()) == ("hf", "gpt2")


@pytest.mark.parametrize(
    ("named", "separator"),
    [({"eos_token": "b", "bos_token": "a"}, 1), ({"bos_token": {"content": "a"}}, 0), ({}, None)],
)
def test_the_separator_is_the_end_of_text_or_else_the_begin_of_text(tmp_path, named, separator):
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["a", "b"])
    found = from_name(model_folder(tmp_path / "model", tokenizer, **named))
    assert (found.separator, found.begin) == (separator, None)


def test_merges_that_tiktoken_would_do_otherwise_are_left_to_tokenizers():
    letters = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary = letters | {"bc": 256, "ab": 257, "abc": 258}
    # "abc" becomes a, bc, which no merge joins; tiktoken would, since there is a token that spells it.
    theirs = tokenizers.Tokenizer(models.BPE(vocabulary, [("b", "c"), ("a", "b"), ("ab", "c")]))
    theirs.pre_tokenizer, theirs.decoder = PRE_TOKENIZERS["gpt2"], decoders.ByteLevel()
    ours = HuggingFace(theirs.to_str())
    assert ours._ranks is None
    assert (
        ours.encode("abc abc").tolist()
        == theirs.encode("abc abc").ids
        == [letters["a"], 256, letters["Ġ"], letters["a"], 256]
    )


@pytest.mark.parametrize(
    "content",
    [
        '{"model": {"vocab": {"a": 1000000000000}}, "decoder": {"type": "ByteLevel"}}',
        '{"model": {"vocab": {"a": -1}}, "decoder": {"type": "ByteLevel"}}',
        '{"model": {"vocab": {"a": true}}, "decoder": {"type": "ByteLevel"}}',
        "[" * 100_000,
        "{}",
        "[]",
        "no JSON",
        '{"model": {"vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}}',
    ],
)
def test_a_file_that_does_not_say_what_its_tokens_spell_is_refused_in_a_line(tmp_path, content):
    with pytest.raises(UserError, match="does not say which text"):
        HuggingFace(content)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"hf:.*tokenizer\.json"):
        from_name(f"hf:{tmp_path}")
