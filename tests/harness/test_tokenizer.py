"""Every tokenizer gives the text back, and counts its bytes exactly."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import UserError
from harness.tokenizer import GPT2, Bytes, Chars, Ids, different_tokenizers, from_meta
from tests.processes import run_python

# What GPT-2's pattern treats differently: spaces of every kind, letters, digits, contractions, marks, emoji.
text = st.text() | st.text(alphabet="  \n\t\r\x1c\x85\xa0\u3000'stdmllverE ab9٣½.,!é漢👍\u0301<|endoftext>")


@given(data=st.binary())
def test_bytes_are_their_own_ids(data):
    tokenizer = Bytes()
    ids = tokenizer.encode(data)
    assert ids.tolist() == list(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.token_bytes()[ids].sum() == len(data)


@given(string=st.text(min_size=1))
@settings(max_examples=50)
def test_chars_round_trip(string):
    tokenizer = Chars("".join(sorted(set(string))))
    ids = tokenizer.encode(string)
    assert ids.max() < tokenizer.vocab_size == len(set(string))
    assert tokenizer.decode(ids) == string
    assert tokenizer.token_bytes()[ids].sum() == len(string.encode())


@pytest.mark.parametrize("unknown", ["b", "~", "\U0001f44d"])
def test_unknown_character_is_named(unknown):
    with pytest.raises(UserError, match=f"character {unknown!r} is not in the vocabulary of 2"):
        Chars("ac").encode("ac" + unknown)


@given(string=text)
@settings(max_examples=300)
def test_gpt2_is_tiktokens_and_round_trips(gpt2, string):
    import tiktoken

    ids = gpt2.encode(string)
    assert ids.tolist() == tiktoken.get_encoding("r50k_base").encode_ordinary(string)
    assert gpt2.decode(ids) == string


def test_gpt2_known_ids(gpt2):
    assert gpt2.encode("hello world").tolist() == [31373, 995]
    assert gpt2.encode(b"hello\xffworld").tolist() == gpt2.encode("hello\ufffdworld").tolist()
    assert gpt2.encode("a\ud800").tolist() == gpt2.encode("a?").tolist()


def test_a_token_is_named_by_its_text(gpt2):
    assert [gpt2.token_of("<|endoftext|>"), gpt2.token_of(" the"), Bytes().token_of("\n")] == [50256, 262, 10]
    for text in ("", "hello world"):
        with pytest.raises(UserError, match=f"'{text}' is no token of the gpt2 vocabulary: give one, or its id"):
            gpt2.token_of(text)


def test_gpt2_text_never_becomes_the_separator(gpt2):
    ids = gpt2.encode("<|endoftext|>")
    assert gpt2.separator not in ids
    assert gpt2.decode(ids) == "<|endoftext|>" == gpt2.decode([gpt2.separator])


PARTS = [b"<|endoftext|>", b"<|endoftext|", b"|>", b"word ", b" \n", "漢 é".encode(), b"\xe2\x82", b"\xf0\x90"]


@given(texts=st.lists(st.lists(st.sampled_from(PARTS), max_size=4).map(b"".join) | st.binary(max_size=9), min_size=1))
def test_documents_together_have_the_ids_that_each_has(gpt2, texts):
    """Whatever stands in them: the separator's own text, half of it, half a character."""
    for tokenizer in (gpt2, Bytes()):
        each = [i for text in texts for i in (tokenizer.separator, *tokenizer.encode(text).tolist())]
        assert tokenizer.encode_documents(texts).tolist() == each


def test_gpt2_token_bytes(gpt2):
    token_bytes = gpt2.token_bytes()
    assert token_bytes.shape == (50257,)
    assert token_bytes[gpt2.separator] == 0
    assert token_bytes[:50256].min() == 1
    string = "naïve 漢字 👍\n\n  def f(x):\n\treturn x"
    assert token_bytes[gpt2.encode(string)].sum() == len(string.encode())


def test_gpt2_is_the_same_on_every_thread(gpt2):
    strings = [f"thread {i} isn't alone" for i in range(8)]
    with ThreadPoolExecutor(3) as threads:
        assert [i.tolist() for i in threads.map(gpt2.encode, strings)] == [gpt2.encode(s).tolist() for s in strings]


def test_half_a_character_decodes_to_the_replacement():
    assert Bytes().decode(list("é".encode())[:1]) == "\ufffd"


@pytest.mark.parametrize("tokenizer", [Bytes(), Chars("ab"), GPT2(), Ids(9)], ids=lambda t: t.name)
@pytest.mark.parametrize("outside", [-1, 60_000])
def test_id_outside_the_vocabulary(tokenizer, outside):
    with pytest.raises(UserError, match=f"token id {outside} is outside the {tokenizer.name} vocabulary"):
        tokenizer.decode(np.array([0, outside]))


def test_from_meta():
    assert from_meta({"tokenizer": "bytes"}).vocab_size == 256
    assert from_meta({"tokenizer": "gpt2"}).vocab_size == 50257
    assert from_meta({"tokenizer": "ids", "vocab_size": 7}).encode(" 6 0").tolist() == [6, 0]
    assert from_meta({"tokenizer": "chars", "vocabulary": "abc"}).decode([2, 0]) == "ca"
    for meta in ({}, {"tokenizer": "chars"}, {"tokenizer": "word"}, {"tokenizer": ["bytes"]}):
        with pytest.raises(UserError, match="is not known"):
            from_meta(meta)
    for vocab_size in (None, 0, "300", 300.0):
        with pytest.raises(UserError, match=f"vocab_size is {vocab_size!r}, but must be the number of token ids"):
            from_meta({"tokenizer": "ids", "vocab_size": vocab_size})


def test_gpt2_without_its_file_says_what_to_do(tmp_path):
    code = (
        "import sys; from harness.errors import run_cli; from harness.tokenizer import GPT2;"
        "sys.exit(run_cli(lambda: GPT2().encode('a') is None))"
    )
    # A proxy that refuses connections stands for "no network".
    run = run_python("-c", code, TIKTOKEN_CACHE_DIR=str(tmp_path), HTTPS_PROXY="http://127.0.0.1:9")
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert "TIKTOKEN_CACHE_DIR" in run.stderr


def test_which_corpora_have_different_tokenizers():
    letters, others = ({"tokenizer": "chars", "vocabulary": v} for v in ("abc", "abd"))
    in_bytes = {"tokenizer": "bytes", "vocabulary": None}  # as a checkpoint has it; meta.json leaves the None out
    assert different_tokenizers(letters, dict(letters)) is None
    assert different_tokenizers(in_bytes, {"tokenizer": "bytes"}) is None
    assert different_tokenizers({}, letters) is different_tokenizers(letters, {}) is None
    assert different_tokenizers(in_bytes, letters) == ("bytes", "chars")
    assert different_tokenizers({"tokenizer": "ids", "vocab_size": 3}, letters) is None  # not known to differ
    assert different_tokenizers(letters, others) == ("chars", "chars with other characters")
