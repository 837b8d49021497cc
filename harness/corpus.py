"""A prepared corpus on disk, read: `train.bin` and `val.bin`, flat arrays of token ids, and `meta.json` about them.

`Corpus` reads nanoGPT's own folders too. harness/corpus_writing.py writes what is read here. meta.json:

    format             1
    tokenizer          "bytes", "chars" or "gpt2"; "chars" has its characters under `vocabulary`
    vocab_size, dtype  "uint16", or "uint32" above 65,535 ids
    document_separator the id between documents, or null
    source             where the text came from
    splits             train, val: {tokens, bytes (of text), documents, bytes_per_token, sha256}
    …                  what else a prepare.py knows, e.g. python_version

It holds no date and no path, so that the same text gives the same file.
"""

import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.tokenizer import GPT2, Chars, Tokenizer, from_meta

SPLITS = ("train", "val")
FORMAT = 1
CHUNK = 1 << 23  # token ids looked at together when a whole file is checked


def describe_corpus(tokenizer: Tokenizer, source: str, splits: dict, dtype: str) -> dict[str, Any]:
    """The dict that is meta.json, with the keys that stand at the top of this file; `splits` is taken as it is."""
    vocabulary = {"vocabulary": tokenizer.vocabulary} if isinstance(tokenizer, Chars) else {}
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        **vocabulary,
        "dtype": dtype,
        "document_separator": tokenizer.separator,
        "source": source,
        "splits": splits,
    }


class Corpus:
    """A prepared corpus, checked: what this raises is a UserError that names the file and what to do about it.

    With `verify` both files are read once, their sha256 compared with meta.json's and their ids with the vocabulary;
    without, only sizes are. A folder without meta.json is nanoGPT's: always read once, its tokenizer from meta.pkl
    if there is one, else GPT-2's.

    tokens["train" | "val"]           np.memmap (tokens,), read-only
    bytes_per_token["train" | "val"]  float: bytes of text a token
    vocab_size, tokenizer, meta, folder
    sha256                            one hex string for both files
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder = Path(folder)
        self._remedy = f"run python {self.folder / 'prepare.py'}"
        if not (self.folder / "prepare.py").exists():
            self._remedy = f"prepare it with a data/<corpus>/prepare.py --out {self.folder}"
        missing = [f"{split}.bin" for split in SPLITS if not (self.folder / f"{split}.bin").is_file()]
        if missing:
            raise UserError(f"{self.folder} is not prepared (no {' and no '.join(missing)}): {self._remedy}")

        foreign = not (self.folder / "meta.json").exists()
        self.meta = self._nanogpt_meta() if foreign else self._read_meta()
        self.tokenizer = from_meta(self.meta)
        self.vocab_size = self.tokenizer.vocab_size
        self.tokens = {split: self._map(split) for split in SPLITS}
        for split in SPLITS if verify or foreign else ():
            self._verify(split)
        self.sha256 = hashlib.sha256("".join(self.meta["splits"][s]["sha256"] for s in SPLITS).encode()).hexdigest()
        self.bytes_per_token = _BytesPerToken(self)

    def _broken(self, name: str, problem: str) -> UserError:
        return UserError(f"{self.folder / name} {problem}: {self._remedy}")

    def _read_meta(self) -> dict:
        try:
            meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            tokenizer = from_meta(meta)
            sizes = [(meta["splits"][split]["tokens"], meta["splits"][split]["sha256"]) for split in SPLITS]
            if meta["format"] != FORMAT or meta["dtype"] not in ("uint16", "uint32"):
                raise ValueError(f"format {meta['format']!r} or dtype {meta['dtype']!r} is not known here")
            if meta["vocab_size"] != tokenizer.vocab_size:
                raise ValueError(f"vocab_size {meta['vocab_size']} is not the tokenizer's {tokenizer.vocab_size}")
            if not all(isinstance(tokens, int) and isinstance(sha256, str) for tokens, sha256 in sizes):
                raise ValueError("splits: tokens must be a number and sha256 a string")
        except OSError as error:
            raise UserError(f"cannot read {self.folder / 'meta.json'}: {error.strerror}") from error
        except KeyError as error:
            raise self._broken("meta.json", f"lacks the key {error}") from error
        except (ValueError, TypeError, AttributeError, UserError) as error:
            raise self._broken("meta.json", f"does not describe a corpus ({error})") from error
        return meta

    def _nanogpt_meta(self) -> dict:
        """What meta.json would say, without the hashes, of a folder that nanoGPT's prepare.py wrote."""
        path = self.folder / "meta.pkl"
        vocabulary = read_nanogpt_vocabulary(path) if path.exists() else None
        splits = {split: {"tokens": (self.folder / f"{split}.bin").stat().st_size // 2} for split in SPLITS}
        tokenizer = Chars(vocabulary) if vocabulary else GPT2()
        return describe_corpus(tokenizer, "nanoGPT", splits, "uint16")

    def _map(self, split: str) -> np.memmap:
        path, count, dtype = self.folder / f"{split}.bin", self.meta["splits"][split]["tokens"], self.meta["dtype"]
        size, expected = path.stat().st_size, count * np.dtype(dtype).itemsize
        if size != expected:
            raise self._broken(path.name, f"has {size:,} bytes where {expected:,} belong (cut short or replaced)")
        if not count:
            raise self._broken(path.name, "is empty")
        try:
            return np.memmap(path, dtype=dtype, mode="r")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error

    def _verify(self, split: str) -> None:
        sha256, largest = hashlib.sha256(), 0
        for ids in self._chunks(split):
            sha256.update(ids)
            largest = max(largest, int(ids.max()))
        recorded = self.meta["splits"][split].setdefault("sha256", sha256.hexdigest())
        if recorded != sha256.hexdigest():
            raise self._broken(f"{split}.bin", "is not the file that meta.json describes (its sha256 differs)")
        if largest >= self.vocab_size:
            raise self._broken(f"{split}.bin", f"holds the token id {largest}, outside the {self.vocab_size} known ids")

    def _chunks(self, split: str) -> Iterator[np.ndarray]:
        tokens = self.tokens[split]
        return (tokens[start : start + CHUNK] for start in range(0, len(tokens), CHUNK))


class _BytesPerToken(dict):
    """Split → bytes of text a token: from meta.json, or for nanoGPT's files counted when first asked for."""

    def __init__(self, corpus: Corpus):
        counts = corpus.meta["splits"]
        super().__init__({s: counts[s]["bytes_per_token"] for s in SPLITS if "bytes_per_token" in counts[s]})
        self._corpus = corpus

    def __missing__(self, split: str) -> float:
        token_bytes = self._corpus.tokenizer.token_bytes()
        count = sum(int(token_bytes[ids].sum()) for ids in self._corpus._chunks(split))
        self[split] = count / len(self._corpus.tokens[split])
        return self[split]


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every object that has to be looked up by its name, so that nothing in the file can run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_nanogpt_vocabulary(path: Path) -> str:
    """The characters of nanoGPT's meta.pkl, {"vocab_size": V, "itos": {0: "a", …}, "stoi": {"a": 0, …}}.

    Admits dicts, strings and integers only; UserError for anything else, and nothing in it is executed.
    """
    try:
        with open(path, "rb") as file:
            meta = _PlainUnpickler(file).load()
        characters = [meta["itos"][i] for i in range(meta["vocab_size"])]
        if not all(isinstance(character, str) and len(character) == 1 for character in characters):
            raise ValueError("an id that is not one character")
        return "".join(characters)
    except Exception as error:  # bytes of unknown origin can fail in any way, and none is a mistake of ours
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"{path} is no character vocabulary of nanoGPT's ({reason}): remove or replace it") from error
