"""A corpus on disk: `train.bin` and `val.bin`, flat arrays of token ids, and `meta.json`, which describes them.

`Corpus` reads one (nanoGPT's own folders too), `write_corpus` writes one, and the rest is what the
`data/<corpus>/prepare.py` scripts share. meta.json:

    format             1
    tokenizer          "bytes", "chars" or "gpt2"; "chars" has its characters under `vocabulary`
    vocab_size, dtype  "uint16", or "uint32" above 65,535 ids
    document_separator the id between documents, or null
    source             where the text came from
    splits             train, val: {tokens, bytes (of text), documents, bytes_per_token, sha256}
    …                  what else a prepare.py knows, e.g. python_version

It holds no date and no path, so that the same text gives the same file.
"""

import argparse
import hashlib
import io
import json
import os
import pickle
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.errors import UserError
from harness.files import put_in_place
from harness.tokenizer import GPT2, Chars, Tokenizer, from_meta

SPLITS = ("train", "val")
FORMAT = 1
PIECE = 1 << 18  # bytes of text that one thread encodes at a time (GPT-2's regex fails on a million spaces)
CHUNK = 1 << 23  # token ids looked at together when a whole file is checked


# ----------------------------------------------------------------------------------------------------------- reading


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
        """What meta.json would say of a folder that nanoGPT's prepare.py wrote, but for the hashes."""
        path = self.folder / "meta.pkl"
        vocabulary = read_nanogpt_vocabulary(path) if path.exists() else None
        splits = {split: {"tokens": (self.folder / f"{split}.bin").stat().st_size // 2} for split in SPLITS}
        tokenizer = Chars(vocabulary) if vocabulary else GPT2()
        return _describe(tokenizer, "nanoGPT", splits, "uint16")

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
    """Unpickles no object that has to be looked up by name: nothing in the file can run code."""

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
    except Exception as error:  # a file of unknown origin can fail in any way; none of them is worth a traceback
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"{path} is no character vocabulary of nanoGPT's ({reason}): remove or replace it") from error


# ----------------------------------------------------------------------------------------------------------- writing


class TextFile(NamedTuple):
    """A document that is the bytes [start, stop) of a file, read a piece at a time."""

    path: Path
    start: int = 0
    stop: int | None = None


Document = str | bytes | TextFile


def write_corpus(
    folder: str | Path,
    documents: Iterable[tuple[str, Document]],
    tokenizer: Tokenizer,
    *,
    source: str,
    threads: int | None = None,
    total_bytes: int | None = None,
    max_tokens: int | None = None,
    extra: dict | None = None,
) -> dict:
    """Tokenize `documents`, pairs of ("train" | "val", document), into `folder`; returns what meta.json holds.

    Documents keep their order within a split, with the tokenizer's separator between one and the next. They are
    encoded on `threads` threads (default: every CPU) in bounded memory, whatever their number and size; `total_bytes`
    is for the progress bar, `extra` for meta.json. Before both splits together exceed
    `max_tokens` the corpus ends. Until all is on disk only temporary files are written, so that
    any failure (a full disk, Ctrl-C) leaves a former corpus as it was. UserError if a split stays empty.
    """
    from tqdm import tqdm  # here, since reading a corpus does not need it

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    dtype = "uint32" if tokenizer.vocab_size > 65_535 else "uint16"
    token_bytes = tokenizer.token_bytes()
    # meta.json goes first into place: it names the hashes of the other two, so that being killed between two of the
    # renames is noticed by whoever reads the corpus. (Files without it would pass for nanoGPT's.)
    temporary = {name: folder / f"{name}.{os.getpid()}.tmp" for name in ("meta.json", "train.bin", "val.bin")}
    try:
        with (
            open(temporary["train.bin"], "wb") as train,
            open(temporary["val.bin"], "wb") as val,
            closing(_encode(documents, tokenizer, dtype, threads or cpu_count())) as blocks,
            # Where no one watches, no bar: the last line below says it all.
            tqdm(total=total_bytes, unit="B", unit_scale=True, desc=str(folder), leave=False, disable=None) as bar,
        ):
            files = {"train": train, "val": val}
            hashes = {split: hashlib.sha256() for split in SPLITS}
            counts = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in SPLITS}
            for split, ids, starts in blocks:
                count = counts[split]
                if tokenizer.separator is not None and not count["documents"]:
                    ids = ids[1:]  # nothing for the first document to be parted from
                if max_tokens is not None and len(ids) + sum(c["tokens"] for c in counts.values()) > max_tokens:
                    break
                size = int(token_bytes[ids].sum())
                files[split].write(ids)
                hashes[split].update(ids)
                count["tokens"] += len(ids)
                count["bytes"] += size
                count["documents"] += starts
                bar.update(size)
        for split in SPLITS:
            if not counts[split]["tokens"]:
                raise UserError(f"{folder}: no text for the {split} split: give more documents or another fraction")
            counts[split]["bytes_per_token"] = counts[split]["bytes"] / counts[split]["tokens"]
            counts[split]["sha256"] = hashes[split].hexdigest()
        meta = _describe(tokenizer, source, counts, dtype) | (extra or {})
        with open(temporary["meta.json"], "w", encoding="utf-8") as file:
            file.write(json.dumps(meta, indent=1) + "\n")
        put_in_place({path: folder / name for name, path in temporary.items()})
    except OSError as error:
        error.filename = error.filename or str(folder)  # a full disk does not say where
        raise
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    sizes = ", ".join(f"{split} {counts[split]['tokens']:,}" for split in SPLITS)
    print(f"{folder}: {sizes} tokens; {tokenizer.name}, {tokenizer.vocab_size:,} ids")
    return meta


def _describe(tokenizer: Tokenizer, source: str, splits: dict, dtype: str) -> dict:
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


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files of a writer that was killed; one that still runs keeps its own."""
    for path in folder.glob("*.*.*.tmp"):
        name, pid = path.stem.rsplit(".", 1)
        if name in ("meta.json", "train.bin", "val.bin") and pid.isdecimal():
            try:
                os.kill(int(pid), 0)  # signal 0 only asks whether the process exists
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except PermissionError:
                pass  # it exists, and is another user's


def _encode(documents, tokenizer, dtype, threads) -> Iterator[tuple[str, np.ndarray, int]]:
    """(split, ids, documents that start in it), in order; every document's first id is the separator, if there is one.

    A job is about PIECE bytes of text, many short documents or a part of a long one; a few jobs a thread are under
    way, which bounds the memory. (The encoders release the GIL.)
    """
    separator = np.array([] if tokenizer.separator is None else [tokenizer.separator], dtype)

    def encode_job(job):
        blocks = []
        for split in SPLITS:
            mine = [(starts, text) for of, starts, text in job if of == split]
            if mine:
                parts = [part for starts, text in mine for part in (separator[: int(starts)], tokenizer.encode(text))]
                ids = np.concatenate(parts, dtype=dtype, casting="unsafe")
                blocks.append((split, ids, sum(starts for starts, _ in mine)))
        return blocks

    executor, running = ThreadPoolExecutor(threads), deque()
    try:
        for job in _jobs(documents):
            running.append(executor.submit(encode_job, job))
            if len(running) > 2 * threads:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _jobs(documents) -> Iterator[list[tuple[str, bool, bytes]]]:
    """Lists of (split, whether a document starts here, text) that hold about PIECE bytes each."""
    job, size = [], 0
    for split, document in documents:
        for number, text in enumerate(pieces(document)):
            job.append((split, number == 0, text))
            size += len(text)
            if size >= PIECE // 2:
                yield job
                job, size = [], 0
    if job:
        yield job


def pieces(document: Document) -> Iterator[bytes]:
    """The document as UTF-8 pieces of about PIECE bytes, at least one, that encode to the same ids as the whole would.

    They are cut before a space or newline that follows a visible character, where GPT-2's pattern always starts a new
    word; only a stretch of a whole PIECE without such a place is cut between any two characters.
    """
    if isinstance(document, str):
        document = document.encode(errors="replace")  # a lone surrogate has no UTF-8
    if isinstance(document, bytes):
        yield from _read_pieces(io.BytesIO(document), len(document))
        return
    try:
        with open(document.path, "rb") as file:
            stop = os.fstat(file.fileno()).st_size if document.stop is None else document.stop
            file.seek(document.start)
            yield from _read_pieces(file, stop - document.start)
    except OSError as error:
        raise UserError(f"cannot read {document.path}: {error.strerror}") from error


def _read_pieces(file, size: int) -> Iterator[bytes]:
    text = b""
    while size > PIECE:
        block = file.read(PIECE)
        size = size - len(block) if block else 0  # 0: the file has become shorter
        text += block
        cut = _cut(text)
        yield text[:cut]
        text = text[cut:]
    yield text + file.read(size)


def _cut(text: bytes) -> int:
    """The last place to cut `text`."""
    for space in (b"\n", b" "):
        end = text.rfind(space)
        while end > 0:
            if not text[max(0, end - 4) : end].decode(errors="replace")[-1].isspace():
                return end
            end = text.rfind(space, 0, end)
    last = range(len(text) - 1, max(0, len(text) - 4), -1)
    return next((i for i in last if text[i] & 0xC0 != 0x80), len(text))  # 0b10…: inside a character of UTF-8


# ------------------------------------------------------------------------------------- what the prepare scripts share


def argument_parser(script: str, description: str) -> argparse.ArgumentParser:
    """The command line that every prepare.py has; `script` is its __file__."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", default=_own_folder(script), help="default: its own folder")
    parser.add_argument("--threads", "--num-proc", type=positive, default=cpu_count(), help="default: every CPU")
    return parser


def _own_folder(script: str) -> Path:
    """The script's own folder, as seen from here where that is shorter."""
    folder = Path(script).resolve().parent
    with suppress(ValueError):
        return folder.relative_to(Path.cwd())
    return folder


def positive(text: str) -> int:
    """A command line's number of things: at least one."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def fraction(text: str) -> float:
    """A command line's share of the text: above 0, below 1."""
    if not 0 < (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def cpu_count() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def position(key: bytes) -> float:
    """A place in [0, 1) fixed by the sha256 of `key`: below the validation fraction is validation."""
    return int.from_bytes(hashlib.sha256(key).digest()[16:20]) / 2**32


def find_files(root: Path, pattern: str, without: Iterable[str] = ()) -> dict[str, Path]:
    """The files below `root` whose name matches `pattern`, by their path relative to it; folders named in `without`
    are left out, and symbolic links to folders are not followed."""
    without, found = frozenset(without), {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in without]
        for name in files:
            path = Path(folder, name)
            if path.match(pattern) and path.is_file():
                found[path.relative_to(root).as_posix()] = path
    return found


def split_files(files: dict[str, Path], val_fraction: float) -> list[tuple[str, TextFile]]:
    """Files by their relative path → documents, in an order and a split that are fixed by the hash of each path.

    So neither the machine nor a file more or less changes where the others are. The first of them always is for
    validation, that a handful of files has some.
    """
    places = sorted((position(key.encode(errors="surrogateescape")), key) for key in files)
    return [
        ("val" if number == 0 or place < val_fraction else "train", TextFile(files[key]))
        for number, (place, key) in enumerate(places)
    ]


def read_or_download(url: str, sha256: str, local: str | None) -> str:
    """The text of the file `local`, or where that is None of the download, which must have this sha256."""
    if local is not None:
        try:
            return Path(local).read_bytes().decode()
        except OSError as error:
            raise UserError(f"cannot read {local}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{local} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    instead = "fetch it by other means and give it with --input FILE"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            data = response.read()
    except OSError as error:  # URLError, timeouts and broken connections are all OSErrors
        raise UserError(f"cannot download {url} ({getattr(error, 'reason', error)}): {instead}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"what {url} gives is not the file expected (its sha256 differs): {instead}")
    return data.decode()
