"""Text into a corpus: `write_corpus` tokenizes documents into the folder that harness/corpus.py describes and reads.

Below it stands what the `data/<corpus>/prepare.py` scripts share: their command line, the search for files, the split
into train and validation, downloads.
"""

import argparse
import hashlib
import io
import os
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.corpus import SPLITS, describe_corpus
from harness.errors import UserError
from harness.files import make_folder, remove_leftovers
from harness.shard_writing import NAMES, SHARD_BYTES, Journal, SplitWriter, remove_unfinished, swap
from harness.shards import IdFile, digest
from harness.tokenizer import Bytes, Tokenizer

FEW = 1e-3  # of the bytes of a text may be wrong
PIECE = 1 << 18  # bytes of text that one thread encodes at a time (GPT-2's regex fails on a million spaces)


class TextFile(NamedTuple):
    """A document that is the bytes [start, stop) of a file, read a piece at a time."""

    path: Path
    start: int = 0
    stop: int | None = None

    def size(self) -> int:
        try:
            return (self.path.stat().st_size if self.stop is None else self.stop) - self.start
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error


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
    shard_bytes: int = SHARD_BYTES,
    extra: dict | None = None,
    arguments: dict | None = None,
) -> dict:
    """Tokenize `documents`, pairs of ("train" | "val", document), into `folder`; returns what meta.json holds.

    Documents keep their order within a split, with the tokenizer's separator between one and the next, or in front of
    each where it is the begin-of-text token. They are encoded on `threads` threads (default: every CPU) in bounded
    memory, whatever their number and size. The corpus ends before both splits together exceed `max_tokens`. A split of
    more than `shard_bytes` becomes several files. `total_bytes` is for the progress bar; `extra` is added to meta.json.
    Until all is on disk only temporary files are written, so that any failure (a full disk, Ctrl-C, kill -9) leaves a
    former corpus as it was. UserError if a split stays empty, or if a file is no text and the tokenizer is not `Bytes`,
    see `text_fault`; the few places that may be wrong are counted and said.

    With `arguments`, all that the text depends on as JSON, a call that was interrupted is continued by the next one of
    the same arguments. `documents` then has `state()`, what it has given so far as JSON, and `go_on(state)`.
    """
    from tqdm import tqdm  # here, since reading a corpus does not need it

    folder = Path(folder)
    make_folder(folder)
    remove_leftovers(folder, *NAMES)
    dtype = "uint32" if tokenizer.vocab_size > 65_535 else "uint16"
    begins = tokenizer.separator == tokenizer.begin
    counts: dict[str, dict[str, Any]] = {s: {"tokens": 0, "bytes": 0, "documents": 0} for s in SPLITS}
    decides = {"shard_bytes": shard_bytes} | tokenizer.describe()
    journal = None if arguments is None else Journal.open(folder, arguments | decides)
    files: dict[str, SplitWriter] = {}
    try:
        if journal:
            files = journal.go_on(folder, counts, documents, shard_bytes)
        for split in SPLITS if not journal else ():
            files[split] = SplitWriter(folder, split, f"{os.getpid()}.tmp", shard_bytes)
        replaced: Counter[Path] = Counter()
        with (
            closing(_encode(documents, tokenizer, dtype, threads or cpu_count())) as blocks,
            # disable=None: no bar without a terminal, where the line printed at the end has to do.
            tqdm(total=total_bytes, unit="B", unit_scale=True, desc=str(folder), leave=False, disable=None) as bar,
        ):
            bar.update(sum(count["bytes"] for count in counts.values()))  # if it goes on
            for (split, ids, starts, size, wrong), state in blocks:
                count = counts[split]
                if not begins and tokenizer.separator is not None and not count["documents"]:
                    ids = ids[1:]  # the separator in front of the first document, which has none before it
                if max_tokens is not None and len(ids) + sum(c["tokens"] for c in counts.values()) > max_tokens:
                    break
                files[split].write(ids)
                count["tokens"] += len(ids)
                count["bytes"] += size
                count["documents"] += starts
                replaced.update(wrong)
                bar.update(size)
                if journal and state is not None:
                    journal.note(state, counts, files)
        if replaced.total() > FEW * sum(count["bytes"] for count in counts.values()):
            raise _refusal(next(iter(replaced)), f"is no UTF-8 text, as {len(replaced)} of the files are not")
        finished: dict[Path, IdFile] = {}
        for split in SPLITS:
            if not counts[split]["tokens"]:
                raise UserError(f"{folder}: no text for the {split} split: give more documents or another share")
            if tokenizer.separator is not None:
                separators = counts[split]["documents"] - (not begins)
                counts[split]["bytes"] += separators * int(tokenizer.token_bytes()[tokenizer.separator])
            counts[split]["bytes_per_token"] = counts[split]["bytes"] / counts[split]["tokens"]
            about, of_split = files[split].finish(np.dtype(dtype).itemsize)
            counts[split] |= about
            finished |= of_split
        meta = describe_corpus(tokenizer, source, counts, dtype) | (extra or {})
        meta["checksum"] = digest(meta)
        swap(folder, finished, meta)
        remove_unfinished(folder, journal)
    except BaseException as error:
        if journal:
            with suppress(OSError, ValueError):  # no space for it, or closed already: then it is as it was
                journal.save(files)
        if isinstance(error, OSError):
            error.filename = error.filename or str(folder)  # a full disk does not say where
        raise
    finally:
        for writer in files.values():
            writer.close() if journal else writer.remove()
        if journal:
            journal.close()
    sizes = ", ".join(f"{split} {counts[split]['tokens']:,}" for split in SPLITS)
    print(f"{folder}: {sizes} tokens; {tokenizer.name}, {tokenizer.vocab_size:,} ids")
    if replaced:
        where = f"{next(iter(replaced))}{f' and {len(replaced) - 1} file(s) more' if len(replaced) > 1 else ''}"
        print(f"{replaced.total():,} places that are not UTF-8 became U+FFFD, in {where}")
    return meta


Job = list[tuple[str, bool, bytes | TextFile, Path | None]]  # of texts: split, whether a document starts, text, file
Block = tuple[str, np.ndarray, int, int, dict[Path, int]]


def _encode(documents, tokenizer, dtype, threads) -> Generator[tuple[Block, Any]]:
    """Blocks of token ids, in order, each as (split, ids, how many documents start in it, bytes of their text, places
    in a file that are not UTF-8), and the state of the documents where the block ends with one and they have a state.
    Every document begins with the separator, where the tokenizer has one.

    A job is about PIECE bytes of text: many short documents, or a part of a long one. At most two jobs a thread wait at
    a time, which bounds the memory. Threads are enough, since the encoders release the GIL.
    """
    executor = ThreadPoolExecutor(threads)
    running: deque[tuple[Future, Any]] = deque()

    def oldest() -> Iterator[tuple[Block, Any]]:
        future, state = running.popleft()
        blocks = future.result()
        for block in blocks:
            yield block, state if block is blocks[-1] else None

    try:
        for job, state in _jobs(documents, tokenizer.whole_documents):
            running.append((executor.submit(_encode_job, tokenizer, dtype, job), state))
            if len(running) > 2 * threads:
                yield from oldest()
        while running:
            yield from oldest()
    finally:
        executor.shutdown(cancel_futures=True)


def _encode_job(tokenizer: Tokenizer, dtype: str, job: Job) -> list[Block]:
    separator = np.array([] if tokenizer.separator is None else [tokenizer.separator], dtype)
    blocks: list[Block] = []
    for split in SPLITS:
        parts, documents, size = [], 0, 0
        wrong: Counter[Path] = Counter()
        for of, starts, document, path in job:
            if of != split:
                continue
            parts += [separator] * starts
            documents += starts
            for text in _parts(document, tokenizer.whole_documents) if isinstance(document, TextFile) else [document]:
                if path and not isinstance(tokenizer, Bytes):
                    if problem := text_fault(text):
                        raise _refusal(path, problem)
                    if places := places_replaced(text):
                        wrong[path] += places
                parts.append(tokenizer.encode(text))
                size += len(text)
        if parts:
            blocks.append((split, np.concatenate(parts, dtype=dtype, casting="unsafe"), documents, size, wrong))
    return blocks


def _jobs(documents, whole: bool) -> Iterator[tuple[Job, Any]]:
    """Lists of texts that hold about PIECE bytes each, or where documents must stay `whole`, at least one document;
    with the state of the documents behind each that ends with one. A file of less is read where it is encoded."""
    job: Job = []
    size, state_of = 0, getattr(documents, "state", lambda: None)
    state = state_of()
    for split, document in documents:
        path = document.path if isinstance(document, TextFile) else None
        length = document.size() if path else PIECE + 1
        for number, text in enumerate([document] if length <= PIECE else _parts(document, whole)):
            if size >= PIECE // 2:
                yield job, None if number else state
                job, size = [], 0
            job.append((split, number == 0, text, path))
            size += len(text) if isinstance(text, bytes) else length
        state = state_of()
    if job:
        yield job, state


def _parts(document: Document, whole: bool) -> Iterable[bytes]:
    return [b"".join(pieces(document))] if whole else pieces(document)


def pieces(document: Document) -> Iterator[bytes]:
    """The document as UTF-8 pieces of about PIECE bytes, at least one, that encode to the same ids as the whole would.

    They are cut before a newline that follows a letter or digit, or before a space that follows a visible character:
    there the patterns of GPT-2 and of the models in harness/huggingface_tokenizer.py always start a new word. Without
    such a place in a whole PIECE they are cut before a newline that follows another character, where GPT-2's does; and
    without that between any two characters.
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
        size = size - len(block) if block else 0  # the file may have become shorter meanwhile
        text += block
        cut = _cut(text)
        yield text[:cut]
        text = text[cut:]
    yield text + file.read(size)


def _cut(text: bytes) -> int:
    """The last place at which `text` may be cut, see `pieces`."""

    def visible(character: str) -> bool:
        return not character.isspace()

    for space, may_end in ((b"\n", str.isalnum), (b" ", visible), (b"\n", visible)):
        end = text.rfind(space)
        while end > 0:
            if may_end(text[max(0, end - 4) : end].decode(errors="replace")[-1]):
                return end
            end = text.rfind(space, 0, end)
    last = range(len(text) - 1, max(0, len(text) - 4), -1)
    return next((i for i in last if text[i] & 0xC0 != 0x80), len(text))  # a byte 0b10… continues a UTF-8 character


def places_replaced(text: bytes) -> int:
    """How many U+FFFD stand in `text`, decoded, for what is not UTF-8 in it."""
    with suppress(UnicodeDecodeError):
        text.decode()
        return 0
    return text.decode(errors="replace").count("\ufffd") - text.count("\ufffd".encode())


def text_fault(text: bytes) -> str | None:
    """What says that a piece of a file is no UTF-8 text (but UTF-16, compressed, an image, in Latin-1): a NUL, or more
    than a few places that are not UTF-8."""
    if b"\0" in text:
        return "holds NUL bytes, as UTF-16 and compressed files do"
    places = places_replaced(text)
    return f"is not UTF-8 in {places:,} places" if places > max(10, FEW * len(text)) else None


def _refusal(path: Path, problem: str) -> UserError:
    return UserError(
        f"{path} {problem}: unpack it, or convert it to UTF-8 (iconv -f LATIN1 or UTF-16 -t UTF-8), leave it out, or "
        "keep its bytes as they are with --tokenizer bytes"
    )


# --- what the prepare scripts share -----------------------------------------------------------------------------------


def argument_parser(script: str, description: str) -> argparse.ArgumentParser:
    """The command line that every prepare.py has; `script` is its __file__."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", default=_own_folder(script), help="default: its own folder")
    parser.add_argument("--threads", "--num-proc", type=positive, default=cpu_count(), help="default: every CPU")
    shards = "a split above this size becomes several files (default: 1G)"
    parser.add_argument("--shard-size", type=file_size, default=SHARD_BYTES, metavar="BYTES", help=shards)
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


def file_size(text: str) -> int:
    """A command line's number of bytes, as 500M or 2G."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in ("K", "M", "G", "T") else (text, "")
    if (value := int(number) << 10 * " KMGT".index(unit or " ")) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is below 64K")
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
    """A place in [0, 1) that the sha256 of `key` fixes. What lies below the validation fraction is for validation."""
    return int.from_bytes(hashlib.sha256(key).digest()[16:20]) / 2**32


def find_files(root: Path, patterns: Iterable[str], without: Iterable[str] = ()) -> dict[Path, str]:
    """The files below `root` whose name matches one of `patterns`: real path → path relative to `root`.

    Each is there once, whatever links to it. Folders named in `without` are left out, and symbolic links to folders
    are not followed. UserError for a folder that may not be read.
    """

    def refuse(error: OSError) -> None:
        if isinstance(error, PermissionError):
            raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

    without, found = frozenset(without), []
    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in without]
        paths = (Path(folder, name) for name in files)
        found += [path for path in paths if any(path.match(p) for p in patterns) and path.is_file()]
    found.sort(key=lambda path: (path.is_symlink(), path))  # a file goes by its own name, not by a link's
    keys: dict[Path, str] = {}
    for path in found:
        keys.setdefault(path.resolve(), path.relative_to(root).as_posix())
    return keys


def split_files(files: dict[Path, str], val_fraction: float) -> list[tuple[str, TextFile]]:
    """Files, each with its key (its relative path) → documents, in an order and a split that depend on the keys alone.

    Each key is hashed to a place in [0, 1), see `position`. Files are sorted by their places, and a place below
    `val_fraction` means validation. So neither another machine nor a file more or less moves any other file. Of a
    handful of files perhaps none has so low a place; the lowest therefore goes to validation in any case, since the
    validation split must not be empty. Files of one key stay together, in their order in `files`.
    """
    places = [(position(key.encode(errors="surrogateescape")), key, path) for path, key in files.items()]
    places.sort(key=lambda place: place[:2])
    return [
        ("val" if number == 0 or place < val_fraction else "train", TextFile(path))
        for number, (place, _, path) in enumerate(places)
    ]


def characters_of(documents: Iterable[tuple[str, Document]]) -> str:
    """Every character that occurs, sorted: the vocabulary of `Chars`."""
    characters: set[str] = set()
    for _, document in documents:
        for piece in pieces(document):
            characters.update(piece.decode(errors="replace"))
    return "".join(sorted(characters))
