"""The tokenizer of a Hugging Face model, from its tokenizer.json, which is read as data: nothing in it is run."""

import hashlib
import json
import re
import threading
import unicodedata
from functools import cached_property
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.text_files import parse_json
from harness.tokenizer import GPT2, Tokenizer, _as_text

# How tokenizer.json has the text fall into words → the same as one pattern. Behind Digits a digit is a word of its own,
# and spaces before one are the end of their part. Llama 3 and Qwen differ in how many digits make a word.
_WORDS, _BYTES, _DIGITS = ("ByteLevel", False, True), ("ByteLevel", False, False), ("Digits", True)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_PATTERNS: dict[tuple[tuple, ...], str] = {
    (_WORDS,): GPT2.PATTERN,
    (_DIGITS, _WORDS): r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+)|\s+(?![^\s\p{N}])|\s",
    ((_LLAMA3, "Isolated", False), _BYTES): _LLAMA3,
    ((_QWEN, "Isolated", False), _BYTES): _QWEN,
}


class HuggingFace(Tokenizer):
    """`vocabulary` is the text of a tokenizer.json, whose special tokens never come out of a text.

    Byte-level BPE behind a pattern that is known here (GPT-2, SmolLM, Llama 3, Qwen, Pythia) is encoded in pieces and
    by tiktoken, several times as fast as by the package tokenizers; anything else by tokenizers itself, a document at a
    time. UserError where the file does not say what bytes of text its tokens stand for.
    """

    name = "hf"
    vocabulary: str

    def __init__(self, vocabulary: str, separator: int | None = None):
        self.vocabulary, self.separator = vocabulary, separator
        self._of_thread = threading.local()
        try:
            self._content = parse_json(vocabulary)
            model, added = self._content["model"], self._content.get("added_tokens") or []
            names = model["vocab"]  # token → id; Unigram has [token, score] in the order of their ids
            self._names = names if isinstance(names, dict) else {token: i for i, (token, _) in enumerate(names)}
            self._added = {token["id"]: token for token in added}
            ids = [*self._names.values(), *self._added]
            if not all(
                type(i) is int and 0 <= i < len(vocabulary) for i in ids
            ):  # each takes a character of the file, or more
                raise ValueError("an id that is none")
            self.vocab_size = 1 + max(ids)
            bytes_of = self._spelling()
            self._bytes = [b""] * self.vocab_size
            for token, i in self._names.items():
                self._bytes[i] = b"" if i in self._added else bytes_of(token)
            for i, token in self._added.items():
                self._bytes[i] = token["content"].encode()
            self._pattern = self._known_pattern()
            self.begin = self._begin_of_text()
            if self.begin is not None and not (type(self.begin) is int and 0 <= self.begin < self.vocab_size):
                raise ValueError("a begin of text that is no token")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"[:120]
            raise UserError(f"this tokenizer.json does not say which text its tokens stand for ({reason})") from error
        self.whole_documents = self._pattern is None

    def describe(self):
        """With the sha256 of what each id stands for: the file itself may be written in many ways."""
        spelt = json.dumps([token.decode("latin-1") for token in self._bytes])
        described = super().describe()
        return {"vocabulary_sha256": hashlib.sha256(spelt.encode()).hexdigest()} | described

    def encode(self, text):
        text = _as_text(text)
        if self._pattern is None or self._ranks is None:
            return np.array(self._tokenizers.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        ids = []
        parts = self._from_text.split(text) if self._from_text else [text]
        for number, part in enumerate(parts):  # at odd places, an added token
            if number % 2:
                ids.append([self._id_of_added[part]])
            elif part:
                if self._content.get("normalizer"):
                    part = unicodedata.normalize("NFC", part)
                ids.append(self._id_of_rank[self._encoding.encode_to_numpy(part, disallowed_special=())])
        known = np.concatenate(ids, dtype=np.uint32, casting="unsafe") if ids else np.empty(0, np.uint32)
        return known[known < self.vocab_size]

    def token_of(self, text):
        added = {token["content"]: i for i, token in self._added.items()}
        return added[text] if text in added else super().token_of(text)

    def decode_bytes(self, ids):
        return b"".join(self._bytes[i] for i in self._checked(ids))

    def token_bytes(self):
        sizes = np.array([len(token) for token in self._bytes], dtype=np.int64)
        sizes[[i for i, token in self._added.items() if token.get("special")]] = 0
        return sizes

    def _spelling(self):
        """The function from a token, as it is spelt, to its bytes."""
        steps = {step["type"]: step for step in _steps(self._content.get("decoder"), "decoders")}
        if "ByteLevel" in steps:
            return lambda token: bytes(map(_BYTE_OF.__getitem__, token))
        if "Metaspace" not in steps and not (steps.get("Replace", {}).get("pattern") == {"String": "▁"}):
            raise ValueError(f"decoder {', '.join(steps) or 'none'}")
        byte = re.compile(r"<0x([0-9A-F]{2})>")
        return lambda t: bytes.fromhex(m[1]) if (m := byte.fullmatch(t)) else t.replace("▁", " ").encode()

    def _known_pattern(self) -> str | None:
        """That of `_PATTERNS` where tokenizer.json splits the text so, and does nothing beside what `encode` does."""
        normalizers = [step["type"] for step in _steps(self._content.get("normalizer"), "normalizers")]
        text_tokens = [token for token in self._added.values() if not token.get("special")]
        self._id_of_added = {token["content"]: token["id"] for token in text_tokens}
        longest_first = sorted(self._id_of_added, key=len, reverse=True)
        self._from_text = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        if normalizers not in ([], ["NFC"]) or any(
            token.get("lstrip") or token.get("rstrip") or token.get("single_word")
            # One that holds the end of a word might be cut in two; one that is not ASCII, changed by the NFC.
            or not token["content"].isascii() or re.search(r"\S\s", token["content"])
            for token in text_tokens
        ):  # fmt: skip
            return None
        keys: list[tuple] = []
        for step in _steps(self._content.get("pre_tokenizer"), "pretokenizers"):
            match step["type"]:
                case "ByteLevel":
                    keys.append(("ByteLevel", step["add_prefix_space"], step.get("use_regex", True)))
                case "Digits":
                    keys.append(("Digits", step["individual_digits"]))
                case "Split":
                    keys.append((step["pattern"].get("Regex"), step["behavior"], step["invert"]))
                case other:
                    keys.append((other,))
        return _PATTERNS.get(tuple(keys))

    def _begin_of_text(self) -> int | None:
        """The token that the post-processor puts in front of every text."""
        for step in _steps(self._content.get("post_processor"), "processors"):
            if step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
                return step["special_tokens"][step["single"][0]["SpecialToken"]["id"]]["ids"][0]
        return None

    @cached_property
    def _tokenizers(self) -> Any:
        import tokenizers  # here, since only this class needs it

        try:
            tokenizer = tokenizers.Tokenizer.from_str(self.vocabulary)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # it raises nothing narrower, and Rust's panics are no Exception
            raise UserError(f"the package tokenizers cannot read this tokenizer.json ({error})") from error
        tokenizer.encode_special_tokens = True  # as any other text
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _ranks(self) -> dict[bytes, int] | None:
        """tiktoken's tokens: the bytes, then what each merge joins, in order. None where it would give other ids.

        tiktoken joins two neighbours whenever a token spells what they spell together, the model only by a merge of
        just these two. They agree if no token's own spelling ends in two parts when all merges are done: for those
        within a stretch of text come in the same order whatever stands around it.
        """
        model = self._content["model"]
        unusual = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if model.get("type", "BPE") != "BPE" or any(model.get(key) for key in unusual):
            return None
        words = {token: i for token, i in self._names.items() if i not in self._added}
        by_merges = self._tokenizers.model
        whole_words = bool(model.get("ignore_merges"))  # a word that is a token is taken as it is
        by_merges.ignore_merges = False
        for token in words:
            parts = len(by_merges.tokenize(token))
            if parts == 2 or (parts > 2 and not whole_words):
                return None
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        tokens = list(dict.fromkeys([*_BYTE_OF, *map("".join, merges), *(words if whole_words else ())]))
        unknown = set(tokens) - words.keys()  # bytes that the model has never seen: without a token for them, nothing
        if any(len(token) > 1 for token in unknown) or (unknown and model.get("unk_token") is not None):
            return None
        self._id_of_rank = np.array([words.get(token, self.vocab_size) for token in tokens], dtype=np.uint32)
        return {bytes(map(_BYTE_OF.__getitem__, token)): rank for rank, token in enumerate(tokens)}

    @property
    def _encoding(self):
        """One for each thread, see `GPT2`."""
        if not hasattr(self._of_thread, "encoding"):
            import tiktoken

            assert self._pattern is not None  # as `encode` has seen
            assert self._ranks is not None
            self._of_thread.encoding = tiktoken.Encoding(
                self.name, pat_str=self._pattern, mergeable_ranks=self._ranks, special_tokens={}
            )
        return self._of_thread.encoding


def _steps(part: dict | None, plural: str) -> list[dict]:
    """The steps of a part of tokenizer.json: none, one, or a sequence of several."""
    return [] if not part else part[plural] if part["type"] == "Sequence" else [part]


def _byte_of() -> dict[str, int]:
    """How byte-level BPE spells the 256 bytes: those that print as themselves, the others by characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of()
