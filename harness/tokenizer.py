"""From text to token ids and back: bytes, characters, or GPT-2's byte-pair encoding; or ids whose text is not known.
harness/huggingface_tokenizer.py has the tokenizers of other models.

A tokenizer also knows how many bytes of text each id stands for, so that a loss in nats a token becomes bits a byte,
the one number that compares models whatever their tokenizer. Text may be `str` or UTF-8 `bytes`; what is not valid
UTF-8 is kept by `Bytes` and becomes U+FFFD for the others.
"""

import os
import threading
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any

import numpy as np

from harness.errors import UserError


class Tokenizer(ABC):
    """What all have in common. `encode` returns a 1-D array of unsigned ids, possibly read-only."""

    name: str  # as in meta.json
    vocab_size: int
    vocabulary: str | None = None  # what `from_meta` needs beside the name
    separator: int | None = None  # the id between two documents
    begin: int | None = None  # the id that a model of this tokenizer has seen in front of every text
    whole_documents = False  # whether the pieces of a document encode to other ids than the whole

    @abstractmethod
    def encode(self, text: str | bytes) -> np.ndarray: ...

    def encode_documents(self, texts: list[bytes]) -> np.ndarray:
        """The ids of several texts, each behind the separator where there is one."""
        separator = np.array([] if self.separator is None else [self.separator], np.uint32)
        return np.concatenate([ids for text in texts for ids in (separator, self.encode(text))])

    @abstractmethod
    def decode_bytes(self, ids) -> bytes:
        """The bytes that `ids` (any integer sequence or array) stand for. An id outside the vocabulary: UserError."""

    def decode(self, ids) -> str:
        """`decode_bytes` as text; a character cut in half becomes U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: bytes of text that each id stands for."""

    def token_of(self, text: str) -> int:
        """The id of the one token that stands for this text, a special one's too. UserError where none does."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise UserError(f"{text!r} is no token of the {self.name} vocabulary: give one, or its id")
        return int(ids[0])

    def describe(self) -> dict[str, Any]:
        """What a meta.json and a checkpoint say of it, of which `from_meta` makes it again."""
        known = {"begin_of_text": self.begin, "vocabulary": self.vocabulary}
        return {
            "tokenizer": self.name,
            "vocab_size": self.vocab_size,
            "document_separator": self.separator,
        } | {key: value for key, value in known.items() if value is not None}

    def _checked(self, ids) -> np.ndarray:
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise UserError(f"token id {outside[0]} is outside the {self.name} vocabulary of {self.vocab_size} ids")
        return ids


class Bytes(Tokenizer):
    """An id is a byte; documents are parted by the zero byte, which counts as the one byte that it is."""

    name, vocab_size, separator = "bytes", 256, 0

    def encode(self, text):
        return np.frombuffer(_as_bytes(text), dtype=np.uint8)

    def encode_documents(self, texts):
        return self.encode(b"\0".join([b"", *texts]))

    def decode_bytes(self, ids):
        return self._checked(ids).astype(np.uint8).tobytes()

    def token_bytes(self):
        return np.ones(256, dtype=np.int64)


class Chars(Tokenizer):
    """An id is a character's place in `vocabulary` (a string, usually sorted). Documents follow each other unparted, or
    each begins with the id `begin`, whose character stands for no byte of text."""

    name = "chars"
    vocabulary: str

    def __init__(self, vocabulary: str, begin: int | None = None):
        if not vocabulary or len(set(vocabulary)) != len(vocabulary):
            raise UserError("a character vocabulary must hold at least one character, and each only once")
        if begin is not None and not 0 <= begin < len(vocabulary):
            raise UserError(f"begin_of_text {begin} is none of the {len(vocabulary)} characters' ids")
        self.vocabulary = vocabulary
        self.vocab_size = len(vocabulary)
        self.begin = self.separator = begin
        code_points = self._code_points(vocabulary)
        self._ids = np.full(int(code_points.max()) + 1, self.vocab_size, dtype=np.uint32)  # vocab_size marks "unknown"
        self._ids[code_points] = np.arange(self.vocab_size)

    @staticmethod
    def _code_points(text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")

    def encode(self, text):
        """Raises UserError, which names it, at the first character that is not in the vocabulary."""
        text = _as_text(text)
        code_points = self._code_points(text)
        ids = self._ids.take(code_points, mode="clip")
        unknown = (code_points >= len(self._ids)) | (ids == self.vocab_size)
        if unknown.any():
            character = text[int(unknown.argmax())]
            raise UserError(f"character {character!r} is not in the vocabulary of {self.vocab_size} characters")
        return ids

    def decode_bytes(self, ids):
        return "".join(self.vocabulary[i] for i in self._checked(ids)).encode(errors="replace")

    def token_bytes(self):
        sizes = [len(character.encode(errors="replace")) for character in self.vocabulary]
        return np.array([0 if i == self.begin else size for i, size in enumerate(sizes)], dtype=np.int64)


class GPT2(Tokenizer):
    """GPT-2's byte-pair encoding. Text never becomes a special token: only the corpus writer puts <|endoftext|>,
    which stands for no byte of text, between documents."""

    name, vocab_size, separator = "gpt2", 50257, 50256

    # tiktoken's own pattern with its first alternatives in one group. It matches the same text, at 1.5 times the speed:
    # the regex engine takes the group in one pass of its automaton instead of trying one alternative after the other.
    PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"

    _END = "<|endoftext|>"
    _of_thread = threading.local()

    @property
    def _encoding(self):
        """One for each thread: a compiled regex needs no locks in the first thread that uses it, and in no other."""
        if not hasattr(self._of_thread, "encoding"):
            import tiktoken  # here, since byte-level runs need neither the package nor its file

            try:
                stock = tiktoken.get_encoding("r50k_base")  # the merges and ids of "gpt2", in one file to fetch
            except Exception as error:  # no network, no permission, a broken download: tiktoken wraps none of them
                reason = getattr(error, "strerror", None) or type(error).__name__
                cache = os.environ.get("TIKTOKEN_CACHE_DIR", "the default")
                raise UserError(
                    f"cannot load GPT-2's tokenizer (cache folder: {cache}; {reason}): connect once to fetch it, "
                    "or set TIKTOKEN_CACHE_DIR to a folder that holds it"
                ) from error
            ranks, special = stock._mergeable_ranks, stock._special_tokens
            self._of_thread.encoding = tiktoken.Encoding(
                "gpt2", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens=special
            )
        return self._of_thread.encoding

    def encode(self, text):
        # Straight to an array: a Python list of ints costs as much again as the encoding, in garbage collection too.
        return self._encoding.encode_to_numpy(_as_text(text), disallowed_special=())

    def encode_documents(self, texts):
        # In one call, with what parts them as its special token: of short texts, calls would take longer than encoding.
        text = _as_text(self._END.encode().join([b"", *texts]))
        ids = self._encoding.encode_to_numpy(text, allowed_special={self._END}, disallowed_special=())
        # Where it stands in a text, it is text.
        return ids if np.count_nonzero(ids == self.separator) == len(texts) else super().encode_documents(texts)

    def token_of(self, text):
        return self.separator if text == self._END else super().token_of(text)

    def decode_bytes(self, ids):
        ids = self._checked(ids).tolist()  # before the encoding is asked for, which may have to be fetched
        return self._encoding.decode_bytes(ids)

    def token_bytes(self):
        sizes = [len(self._encoding.decode_single_token_bytes(i)) for i in range(self.vocab_size)]
        sizes[self.separator] = 0
        return np.array(sizes, dtype=np.int64)


class Ids(Tokenizer):
    """Ids of a vocabulary of which nothing is known but its size: their text is the numbers themselves."""

    name = "ids"

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text):
        """Numbers with spaces between them."""
        try:
            return self._checked([int(word) for word in _as_text(text).split()])
        except ValueError:
            raise UserError("the text of these token ids is not known: give the ids themselves, 17 4 250 say") from None

    def decode_bytes(self, ids):
        return "".join(f" {i}" for i in self._checked(ids)).encode()

    def token_bytes(self):
        raise UserError("how many bytes of text these token ids stand for is not known")


def from_name(name: str) -> Tokenizer:
    """ "bytes", "gpt2" or "hf:NAME_OR_FOLDER": the tokenizers that need no corpus to be known. UserError for others."""
    if name.startswith("hf:"):
        from harness.pretrained import tokenizer_of

        described = tokenizer_of(name.removeprefix("hf:"))
        if described is None or "vocab_size" not in described:
            found = f"a tokenizer {described['tokenizer']}" if described else "none that can be had"
            raise UserError(f"{name}: there has to be a tokenizer.json, and there is {found}")
        return from_meta(described)
    if name not in (known := {"bytes": Bytes, "gpt2": GPT2}):
        raise UserError(f"tokenizer {name!r} is none of {', '.join(known)} and hf:NAME_OR_FOLDER")
    return known[name]()


def id_or_text(argument: str) -> int | str | None:
    """A token as a command line names it: by its id, a whole number, or by its text; None for "none"."""
    try:
        return None if argument == "none" else int(argument)
    except ValueError:
        return argument


def from_meta(meta: dict) -> Tokenizer:
    """The tokenizer that a corpus's meta.json describes; UserError if it describes none."""
    name, vocabulary, vocab_size = (meta.get(key) for key in ("tokenizer", "vocabulary", "vocab_size"))
    for key in ("document_separator", "begin_of_text"):
        if not isinstance(meta.get(key), int | None):
            raise UserError(f"{key} is {meta[key]!r:.40}, but must be a token's id")
    if name == "chars" and isinstance(vocabulary, str):
        return Chars(vocabulary, meta.get("begin_of_text"))
    if name in ("bytes", "gpt2"):
        return from_name(name)
    if name == "ids" and isinstance(vocab_size, int) and vocab_size > 0:
        return Ids(vocab_size)
    if name == "ids":
        raise UserError(f"vocab_size is {vocab_size!r}, but must be the number of token ids, a whole number above 0")
    if name == "hf" and isinstance(vocabulary, str):
        return _hugging_face(vocabulary, meta.get("document_separator"))
    if isinstance(name, str) and name.startswith("hf:"):  # in a meta.json of one's own
        return from_name(name)
    raise UserError(f"tokenizer {name!r} is not known, or lacks its vocabulary (known: bytes, chars, gpt2, hf)")


@lru_cache(4)
def _hugging_face(vocabulary: str, separator: int | None) -> Tokenizer:
    from harness.huggingface_tokenizer import HuggingFace

    return HuggingFace(vocabulary, separator)


def _as_bytes(text: str | bytes) -> bytes:
    return text.encode(errors="replace") if isinstance(text, str) else text  # a lone surrogate has no UTF-8


def _as_text(text: str | bytes) -> str:
    return _as_bytes(text).decode(errors="replace")


def different_tokenizers(a: dict, b: dict) -> tuple[str, str] | None:
    """The names of the tokenizers of two corpora, each described as in meta.json or in a checkpoint, if the same id may
    stand for other text; None where the two agree, or where one does not say."""
    first, second = a.get("tokenizer"), b.get("tokenizer")
    if not (first and second) or Ids.name in (first, second):
        return None
    if first == second and a.get("vocabulary") == b.get("vocabulary"):
        return None
    if first == second == "hf":  # whose file may be written in many ways
        same = a.get("vocabulary_sha256") == b.get("vocabulary_sha256")
        return None if same else (first, f"{second} with other tokens")
    return first, second if first != second else f"{second} with other characters"
