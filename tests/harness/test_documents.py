"""Documents are cut where no token is, and a file as its bytes would be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import documents
from harness.documents import TextFile, pieces, position


@given(
    words=st.lists(
        st.tuples(
            st.sampled_from(["a", "don't", "漢", "é", "9", "<|", "'", "\x1c.", "\u3000x"]),
            st.sampled_from([" ", "\n", "\n  ", " \u3000", " \t", "\n\n"]),
        ),
    )
)
@settings(max_examples=200)
def test_pieces_encode_to_what_the_whole_does(gpt2, words):
    document = "".join(word + space for word, space in words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", 32)
        cut = list(pieces(document))
    assert b"".join(cut) == document.encode()
    assert max(map(len, cut)) <= 64
    assert len(cut) > len(document.encode()) // 64
    assert np.concatenate([gpt2.encode(piece) for piece in cut]).tolist() == gpt2.encode(document).tolist()


def test_text_without_a_place_to_cut(gpt2):
    """Neither a huge word nor a million spaces before one (which tiktoken alone does not survive) is a problem."""
    for text in (b"x" * 600_000, b" " * 1_200_000 + b"x", "é".encode() * 300_000):
        cut = list(pieces(text))
        assert b"".join(cut) == text
        assert max(map(len, cut)) <= 2 * documents.PIECE
        assert all(gpt2.decode_bytes(gpt2.encode(piece)) == piece for piece in cut)


@pytest.mark.parametrize("text", [b"a line of words\n" * 40_000, b"ab. " * 200_000, "é".encode() * 300_000, b""])
def test_a_file_is_cut_as_its_bytes_are_whatever_is_read_of_it(tmp_path, text):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xc3\xa9" + text + b"end")
    assert list(pieces(TextFile(path, 2, 2 + len(text)))) == list(pieces(text))
    assert b"".join(pieces(TextFile(path, 2))) == text + b"end"


@given(st.binary())
def test_position_is_a_share(key):
    assert 0 <= position(key) < 1
