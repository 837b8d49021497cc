"""Documents as text to encode: whole files or parts of them, cut into pieces, and checked for being text at all."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import UserError

FEW = 1e-3  # of the bytes of a text may be wrong
PIECE = 1 << 18  # bytes of text that one thread encodes at a time (GPT-2's regex fails on a million spaces)
_NEAR = 1 << 12  # bytes in front of a place in which text is nearly always cut


class TextFile(NamedTuple):
    """A document that is the bytes [start, stop) of a file."""

    path: Path
    start: int = 0
    stop: int | None = None

    def size(self) -> int:
        try:
            return (os.stat(self.path).st_size if self.stop is None else self.stop) - self.start
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error

    def read(self) -> bytes:
        """Its bytes, of which there may be fewer by now."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                if self.start:
                    file.seek(self.start)
                return file.read(-1 if self.stop is None else self.stop - self.start)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error


Document = str | bytes | TextFile
Job = list[tuple[str | float, bool, Document]]  # of texts: split, whether a document starts with it, text


def content(document: Document) -> bytes:
    if isinstance(document, TextFile):
        return document.read()
    return document.encode(errors="replace") if isinstance(document, str) else document  # half a character has no UTF-8


def position(key: bytes) -> float:
    """A place in [0, 1) that the sha256 of `key` fixes. What lies below the validation fraction is for validation."""
    return int.from_bytes(hashlib.sha256(key).digest()[16:20]) / 2**32


def split_of(document: Document, split: str | float) -> str:
    """The split that is named, or whose share of validation is given."""
    if isinstance(split, str):
        return split
    return "val" if position(content(document)) < split else "train"


def jobs(documents, whole: bool) -> Iterator[tuple[Job, Any]]:
    """Lists of texts of about four PIECEs together, or where documents must stay `whole`, of at least one document; and
    the state of the documents behind each that ends with one. Files are left to be read by whoever encodes them."""
    job: Job = []
    size, state_of = 0, getattr(documents, "state", lambda: None)
    for split, document in documents:
        if isinstance(document, str) and len(document) > PIECE // 4:  # of up to four bytes a character
            document = content(document)
        length = document.size() if isinstance(document, TextFile) else len(document)
        if whole or length <= PIECE:
            job.append((split, True, document))
            size += length
        else:
            split = split_of(document, split)
            for number, part in enumerate(parts(document)):
                if number and size >= 4 * PIECE:
                    yield job, None
                    job, size = [], 0
                job.append((split, number == 0, part))
                size += PIECE
        if size >= 4 * PIECE:
            yield job, state_of()
            job, size = [], 0
    if job:
        yield job, state_of()


def pieces(document: Document) -> Iterator[bytes]:
    """The document as UTF-8 pieces of about PIECE bytes, at least one, that encode to the same ids as the whole would.

    They are cut before a newline that follows a letter or digit, or before a space that follows a visible character:
    there the patterns of GPT-2 and of the models in harness/huggingface_tokenizer.py always start a new word. Without
    such a place in a whole PIECE they are cut before a newline that follows another character, where GPT-2's does; and
    without that between any two characters.
    """
    return map(content, parts(document))


def parts(document: Document) -> Iterator[bytes | TextFile]:
    """What `pieces` gives, of a file without having read it."""
    if isinstance(document, TextFile):
        path, start, stop = document.path, document.start, document.start + document.size()
        yield from (TextFile(path, *span) for span in _spans(lambda a, b: TextFile(path, a, b).read(), start, stop))
    else:
        text = content(document)
        yield from (text[a:b] for a, b in _spans(lambda a, b: text[a:b], 0, len(text)))


def _spans(read: Callable[[int, int], bytes], start: int, stop: int) -> Iterator[tuple[int, int]]:
    end = start
    while stop - end > PIECE:
        end += PIECE
        near = max(start, end - _NEAR)
        cut = near + (_last(read(near, end), b"\n", str.isalnum) or _cut(read(start, end)) + start - near)
        yield start, cut
        start = cut
    yield start, stop


def _cut(text: bytes) -> int:
    """The last place at which `text` may be cut, see `pieces`."""
    for space, may_end in ((b"\n", str.isalnum), (b" ", _visible), (b"\n", _visible)):
        if end := _last(text, space, may_end):
            return end
    last = range(len(text) - 1, max(0, len(text) - 4), -1)
    return next((i for i in last if text[i] & 0xC0 != 0x80), len(text))  # a byte 0b10… continues a UTF-8 character


def _last(text: bytes, space: bytes, may_end: Callable[[str], bool]) -> int:
    """The last place of `space` in `text` behind a character that `may_end` a word, or 0."""
    end = text.rfind(space)
    while end > 0 and not may_end(text[max(0, end - 4) : end].decode(errors="replace")[-1]):
        end = text.rfind(space, 0, end)
    return max(0, end)


def _visible(character: str) -> bool:
    return not character.isspace()


def places_replaced(text: bytes) -> int:
    """How many U+FFFD stand in `text`, decoded, for what is not UTF-8 in it."""
    if text.isascii():
        return 0
    with suppress(UnicodeDecodeError):
        text.decode()
        return 0
    return text.decode(errors="replace").count("\ufffd") - text.count("\ufffd".encode())


def places_wrong(text: bytes, path: Path) -> int:
    """How many places of a file's text are not UTF-8. UserError where it is no text (but UTF-16, compressed, an image,
    in Latin-1): where it holds a NUL, or more than a few such places."""
    if b"\0" in text:
        raise no_text(path, "holds NUL bytes, as UTF-16 and compressed files do")
    if (places := places_replaced(text)) > max(10, FEW * len(text)):
        raise no_text(path, f"is not UTF-8 in {places:,} places")
    return places


def is_text(path: Path) -> bool:
    try:
        places_wrong(path.read_bytes(), path)
    except UserError:
        return False
    return True


def no_text(path: Path, problem: str) -> UserError:
    return UserError(
        f"{path} {problem}: unpack it, or convert it to UTF-8 (iconv -f LATIN1 or UTF-16 -t UTF-8), leave it out, or "
        "keep its bytes as they are with --tokenizer bytes"
    )
