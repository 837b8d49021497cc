"""A prepared corpus on disk, read: `train.bin` and `val.bin`, flat arrays of token ids, and `meta.json` about them.

`Corpus` reads nanoGPT's own folders too. harness/corpus_writing.py writes what is read here, and harness/shards.py is
what both share, the files of ids. meta.json:

    format             1
    tokenizer          "bytes", "chars", "gpt2" or "hf"
    vocabulary         of "chars" its characters, of "hf" the text of its tokenizer.json
    vocab_size, dtype  "uint16", or "uint32" above 65,535 ids
    document_separator the id between documents, or null
    begin_of_text      the same id, where it is in front of the first document too; absent where it is not
    source             where the text came from
    splits             train, val: {tokens, bytes (of text), documents, bytes_per_token, sha256, crc32 or shards}
    …                  what else a prepare.py knows, e.g. python_version
    checksum           the sha256 of all this; a key after it is a user's own, and one before it is not to be changed

It holds no date and no path, so that the same text gives the same file. Older ones have no crc32, shards and checksum.

Ids that another program wrote, little-endian uint16 unless it says so, need no more than one of the lines below in a
meta.json of one's own; or no meta.json, where the config's model.vocab_size says how many there are. (nanoGPT's
meta.pkl is read as well.) Without either they are taken for GPT-2's.

    {"tokenizer": "gpt2"}
    {"vocab_size": 128256, "dtype": "uint32", "document_separator": 128001}
"""

import hashlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.foreign_ids import file_format, foreign_tokenizer, number_format, read_nanogpt_vocabulary
from harness.shards import META, IdFile, Tokens, digest, files_of
from harness.text_files import parse_json, read_json
from harness.tokenizer import GPT2, Chars, Ids, Tokenizer, different_tokenizers, from_meta

SPLITS = ("train", "val")
FORMAT = 1
DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")  # what ids of another program may be; we write two of them
CHUNK = 1 << 23  # token ids looked at together when a whole file is checked
PADDING = 512  # GPT-2's vocabulary is padded to a multiple of at most this
# English and source code have an id from 40,000 on at least once in 250 of GPT-2's tokens.
HIGH_ID, ENOUGH_TOKENS = 40_000, 10_000


def describe_corpus(tokenizer: Tokenizer, source: str, splits: dict, dtype: str) -> dict[str, Any]:
    """The dict that is meta.json, with the keys that stand at the top of this file; `splits` is taken as it is."""
    return {"format": FORMAT, "dtype": dtype, "source": source, "splits": splits} | tokenizer.describe()


class Corpus:
    """A prepared corpus, checked: what this raises is a UserError that names the file and what to do about it.

    The files of the splits in `verify` are read once, their sha256 compared with meta.json's and their ids with the
    vocabulary. Opened `lazily`, a corpus is only read so if it is an older one, without checksums of blocks: opening
    then costs the same for any number of tokens. A block that has a checksum is checked when it is first touched, in
    any case. Ids of another program (see above) are always read once; `vocab_size` is how many there are if their
    folder does not say.

    tokens["train" | "val"]           Tokens (tokens,), read-only: indexed as an array is, opened where it is touched
    bytes_per_token["train" | "val"]  float: bytes of text a token; None where the text is not known
    vocab_size, tokenizer, meta, folder
    note                              what was assumed about ids of another program, to be said to the user; or None
    sha256                            one hex string for both splits
    """

    def __init__(
        self,
        folder: str | Path,
        verify: Collection[str] = SPLITS,
        vocab_size: int | None = None,
        lazily: bool = False,
    ):
        self.folder, self._lazily = Path(folder), lazily
        before: Any = ...
        while True:  # until no other corpus took its place meanwhile; an error counts where meta.json stayed the same
            described = self._description()
            try:
                self._open(described, verify, vocab_size)
                if self._description() == described:
                    return
            except UserError:
                if described == before:
                    raise
            except OSError as error:
                if described == before:
                    raise UserError(f"cannot read {error.filename or self.folder}: {error.strerror}") from error
            before = described

    def _open(self, described: bytes | None, verify: Collection[str], vocab_size: int | None) -> None:
        self._described, self._remedy = described, f"run python {self.folder / 'prepare.py'}"
        if not (self.folder / "prepare.py").exists():
            self._remedy = f"prepare it with a data/<corpus>/prepare.py --out {self.folder}"
        self.note: str | None = None
        self.meta = {} if described is None else self._read_meta(described)
        files = {split: files_of(self.folder, split, self._about(split)) for split in SPLITS}
        missing = [file.path.name for split in SPLITS for file in files[split] if not file.find().is_file()]
        if missing:
            shown = [*missing[:2], f"{len(missing) - 2} more"] if len(missing) > 3 else missing
            raise UserError(f"{self.folder} is not prepared (no {' and no '.join(shown)}): {self._remedy}")

        self._foreign = "format" not in self.meta
        if self._foreign:
            self.meta = self._foreign_meta(self.meta, vocab_size)
            files = {split: files_of(self.folder, split, self._about(split)) for split in SPLITS}
        self.tokenizer = from_meta(self.meta)
        self.vocab_size = self.tokenizer.vocab_size
        for file in (file for split in SPLITS for file in files[split]):
            self._check_size(file)
        self.tokens = {s: Tokens(files[s], self.meta["dtype"], self.vocab_size, self._broken) for s in SPLITS}
        largest = [self.verify(split) for split in (SPLITS if self._foreign else verify)]
        assumed_gpt2, tokens = self.note and isinstance(self.tokenizer, GPT2), sum(map(len, self.tokens.values()))
        if assumed_gpt2 and tokens >= ENOUGH_TOKENS and max(largest) < HIGH_ID:
            raise self._broken("train.bin", f"holds no GPT-2 tokens: of {tokens:,} none is above {max(largest)}")
        self.sha256 = hashlib.sha256("".join(self.meta["splits"][s]["sha256"] for s in SPLITS).encode()).hexdigest()
        self.bytes_per_token = _BytesPerToken(self)

    def _description(self) -> bytes | None:
        """What stands in meta.json; None where there is none."""
        try:
            return (self.folder / META).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot read {self.folder / META}: {error.strerror}") from error

    def _about(self, split: str) -> dict:
        """What meta.json says of a split; where it says nothing, as nanoGPT's habit, there is one file."""
        return self.meta.get("splits", {}).get(split, {"tokens": 0})

    def _broken(self, name: str, problem: str) -> UserError:
        if self._description() != self._described:
            changed = f"{META} has changed since this program opened the corpus, which may have been prepared anew"
            return UserError(f"{self.folder / name} {problem}. {changed}: start the program again")
        return UserError(f"{self.folder / name} {problem}: {self._remedy}")

    def _read_meta(self, described: bytes) -> dict:
        try:
            meta = parse_json(described.decode())
            if "format" not in meta and not {"splits", "source"} & set(meta):  # a user's own
                if (dtype := meta.get("dtype", "uint16")) not in DTYPES:
                    raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
                if "tokenizer" in meta or "vocab_size" in meta:
                    foreign_tokenizer(meta)
                return meta
            tokenizer = from_meta(meta)
            sizes = [(meta["splits"][split]["tokens"], meta["splits"][split]["sha256"]) for split in SPLITS]
            if meta["format"] != FORMAT or meta["dtype"] not in ("uint16", "uint32"):
                raise ValueError(f"format {meta['format']!r} or dtype {meta['dtype']!r} is not known here")
            if meta["vocab_size"] != tokenizer.vocab_size:
                raise ValueError(f"vocab_size {meta['vocab_size']} is not the tokenizer's {tokenizer.vocab_size}")
            files = [files_of(self.folder, split, meta["splits"][split]) for split in SPLITS]
            sizes += [(file.tokens, file.sha256) for of_split in files for file in of_split]
            if not all(isinstance(tokens, int) and isinstance(sha256, str) for tokens, sha256 in sizes):
                raise ValueError("splits: tokens must be a number and sha256 a string")
            if [sum(file.tokens for file in of_split) for of_split in files] != [tokens for tokens, _ in sizes[:2]]:
                raise ValueError("splits: the tokens of the shards do not add up")
            if meta.get("checksum", digest(meta)) != digest(meta):
                raise ValueError("its checksum differs; if you changed it by hand, remove the line of its checksum")
        except KeyError as error:
            raise self._broken("meta.json", f"lacks the key {error}") from error
        except (ValueError, TypeError, AttributeError, UserError) as error:
            raise self._broken("meta.json", f"does not describe a corpus ({error})") from error
        return meta

    def _foreign_meta(self, stated: dict, vocab_size: int | None) -> dict:
        """What meta.json would say, without the hashes, of a folder that nanoGPT's prepare.py or another program wrote.
        What the folder states goes before the config's `vocab_size`."""
        self._remedy = (
            "rewrite it, or say in a meta.json beside it what it holds, as "
            '{"vocab_size": 32000, "dtype": "int32"} or {"tokenizer": "gpt2"}'
        )
        path, dtype = self.folder / "meta.pkl", stated.get("dtype", "uint16")
        self._dtype_stated = "dtype" in stated
        tokenizer: Tokenizer
        if "tokenizer" in stated or "vocab_size" in stated:
            tokenizer = foreign_tokenizer(stated)
        elif path.exists():
            vocabulary = read_nanogpt_vocabulary(path)
            tokenizer = Ids(vocabulary) if isinstance(vocabulary, int) else Chars(vocabulary)
        elif vocab_size is None or 0 <= vocab_size - GPT2.vocab_size < PADDING:
            tokenizer = GPT2()
            self.note = f"{self.folder} does not say what its token ids are: they are taken for GPT-2's"
        else:
            tokenizer = Ids(vocab_size)
        if isinstance(tokenizer, Ids):
            what = f"what text the {tokenizer.vocab_size} token ids in {self.folder} stand for is not known"
            self.note = f"{what}: no bits per byte"
        sizes = {split: (self.folder / f"{split}.bin").stat().st_size for split in SPLITS}
        splits = {split: {"tokens": size // np.dtype(dtype).itemsize} for split, size in sizes.items()}
        parts = {key: stated[key] for key in ("document_separator", "begin_of_text") if key in stated}
        return describe_corpus(tokenizer, "another program", splits, dtype) | parts

    def _check_size(self, file: IdFile) -> None:
        dtype, path = self.meta["dtype"], file.find()
        size, expected = path.stat().st_size, file.tokens * np.dtype(dtype).itemsize
        if size != expected:
            if like := self._looks_like(path, wrong=True):
                raise self._broken(file.path.name, f"looks like {like}, not like ids in {dtype}")
            raise self._broken(file.path.name, f"has {size:,} bytes where {expected:,} belong (cut short or replaced)")
        if not file.tokens:
            raise self._broken(file.path.name, "is empty")

    def verify(self, split: str) -> int:
        """Read a split's files, once in this process, and compare them with what is known of them; returns the largest
        id. UserError if a sha256 or an id is another than it should be, or the ids are of another dtype. Of a corpus
        opened `lazily` only files without checksums of their blocks are read."""
        about, tokens, largest = self.meta["splits"][split], self.tokens[split], 0
        for file in tokens.files:
            if self._lazily and file.crc32 is not None:
                continue
            path = file.find()
            status = path.stat()
            sha256, smallest, highest = read_once(
                path.resolve(), self.meta["dtype"], status.st_size, status.st_mtime_ns
            )
            if (file.sha256 or about.setdefault("sha256", sha256)) != sha256:
                raise self._broken(file.path.name, f"is not the file that {META} describes (its sha256 differs)")
            outside = smallest if smallest < 0 else highest if highest >= self.vocab_size else None
            if like := self._looks_like(path, outside is not None):
                raise self._broken(file.path.name, f"looks like {like}, not like ids in {self.meta['dtype']}")
            if outside is not None:
                problem = f"holds the token id {outside}, outside the {self.vocab_size} known ids"
                raise self._broken(file.path.name, problem)
            largest = max(largest, highest)
        return largest

    def document_bounds(self, split: str) -> np.ndarray:
        """Where each document of a split starts, and where the last one ends: (documents + 1,) int64. A document begins
        with its begin-of-text token, or ends with the separator behind it. One pass over the file, once in this
        process. UserError where no id is known that parts documents."""
        separator = self.meta.get("document_separator")
        if not isinstance(separator, int):
            raise UserError(
                f"windows of documents: which id parts the documents in {self.folder} is not known: take windows of "
                'the stream, or say it in the meta.json there, as "document_separator": 0'
            )
        places = find_id(self.tokens[split], separator)
        starts = places if separator == self.meta.get("begin_of_text") else places + 1
        return np.unique(np.concatenate(([0], starts, [len(self.tokens[split])])))

    def _looks_like(self, path: Path, wrong: bool) -> str | None:
        """What another program's file seems to hold instead of ids of the dtype that it should have. A dtype that
        meta.json states is only doubted where ids of it are `wrong`."""
        if not self._foreign:
            return None
        with open(path, "rb") as file:
            raw = file.read(1 << 16)
        like = file_format(raw)
        if not like and (wrong or not self._dtype_stated):
            like = number_format(raw, self.vocab_size)
        return None if like == self.meta["dtype"] else like

    def check_fits(self, path: str | Path, info: dict, vocab_size: int) -> None:
        """UserError if this corpus's ids are not those of the checkpoint in `path`, whose model has `vocab_size` of
        them and whose other content is `info`."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"{self.folder} has {self.vocab_size} token ids, {path} only {vocab_size}: "
                "give the corpus it was trained on with --data"
            )
        if differ := different_tokenizers(info.get("corpus", {}), self.meta):
            raise UserError(
                f"{path} was trained with tokenizer {differ[0]}, {self.folder} has {differ[1]}: "
                "give a corpus of the same tokens with --data"
            )


@lru_cache
def read_once(path: Path, dtype: str, size: int, mtime_ns: int) -> tuple[str, int, int]:
    """(sha256, smallest id, largest id) of a file, which is read again only when its size or its date has changed."""
    sha256, smallest, largest = hashlib.sha256(), 0, 0
    for ids in chunks(np.memmap(path, dtype=dtype, mode="r")):
        sha256.update(ids)
        smallest, largest = min(smallest, int(ids.min())), max(largest, int(ids.max()))
    return sha256.hexdigest(), smallest, largest


_found: dict[tuple, np.ndarray] = {}


def find_id(tokens: Tokens, token: int) -> np.ndarray:
    """The places of an id in a split, in order, int64; its files are read again only when the date of one changes."""
    stamps = [(path.resolve(), path.stat().st_mtime_ns) for path in (file.find() for file in tokens.files)]
    if (key := (*stamps, token)) not in _found:
        _found[key] = np.concatenate([CHUNK * n + np.flatnonzero(ids == token) for n, ids in enumerate(chunks(tokens))])
    return _found[key]


def chunks(tokens: np.ndarray | Tokens) -> Iterator[np.ndarray]:
    return (tokens[start : start + CHUNK] for start in range(0, len(tokens), CHUNK))


def is_prepared(folder: Path) -> bool:
    """Whether a prepare.py, or another program, has put a corpus into `folder`; `Corpus` checks it."""
    if (folder / "val.bin").exists():
        return True
    with suppress(OSError, ValueError):  # its files may have other names, or wait to be put in their places
        return "splits" in read_json(folder / META)
    return False


class _BytesPerToken(dict):
    """Split → bytes of text a token: from meta.json, or for another program's files counted when first asked for."""

    def __init__(self, corpus: Corpus):
        counts = corpus.meta["splits"]
        super().__init__({s: counts[s]["bytes_per_token"] for s in SPLITS if "bytes_per_token" in counts[s]})
        self._corpus = corpus

    def __missing__(self, split: str) -> float | None:
        tokens, tokenizer = self._corpus.tokens[split], self._corpus.tokenizer
        self[split] = None
        if not isinstance(tokenizer, Ids):
            token_bytes = tokenizer.token_bytes()
            self[split] = sum(int(token_bytes[ids].sum()) for ids in chunks(tokens)) / len(tokens)
        return self[split]
