"""Text into a corpus: `write_corpus` tokenizes documents into the folder that harness/corpus.py describes and reads.

Below it stands what the `data/<corpus>/prepare.py` scripts share: their command line, the search for files, the split
into train and validation, downloads.
"""

import argparse
import fnmatch
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from harness.corpus import SPLITS, describe_corpus
from harness.documents import (
    FEW,
    Document,
    Job,
    TextFile,
    content,
    jobs,
    no_text,
    pieces,
    places_wrong,
    position,
    split_of,
)
from harness.errors import UserError
from harness.files import make_folder, remove_leftovers
from harness.shard_writing import NAMES, SHARD_BYTES, Journal, SplitWriter, remove_unfinished, swap
from harness.shards import IdFile, digest
from harness.tokenizer import Bytes, Tokenizer


def write_corpus(
    folder: str | Path,
    documents: Iterable[tuple[str | float, Document]],
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
    """Tokenize `documents`, pairs of ("train" | "val", document), into `folder`; returns what meta.json holds. Instead
    of a split, the share of validation lets a hash of the text decide.

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
            raise no_text(next(iter(replaced)), f"is no UTF-8 text, as {len(replaced)} of the files are not")
        finished: dict[Path, IdFile] = {}
        separator_bytes = 0 if tokenizer.separator is None else int(tokenizer.token_bytes()[tokenizer.separator])
        for split in SPLITS:
            if not counts[split]["tokens"]:
                raise UserError(f"{folder}: no text for the {split} split: give more documents or another share")
            counts[split]["bytes"] += (counts[split]["documents"] - (not begins)) * separator_bytes
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


Block = tuple[str, np.ndarray, int, int, dict[Path, int]]


def _encode(documents, tokenizer, dtype, threads) -> Generator[tuple[Block, Any]]:
    """Blocks of token ids, in order, each as (split, ids, how many documents start in it, bytes of their text, places
    in a file that are not UTF-8), and the state of the documents where the block ends with one and they have a state.
    Every document begins with the separator, where the tokenizer has one.

    A job is about PIECE bytes of text: many short documents, or a part of a long one. At most two jobs a thread wait at
    a time, which bounds the memory. Threads are enough, since the encoders release the GIL; what holds it, in all
    threads together, and what this thread does bound the number of cores that have work.
    """
    executor = ThreadPoolExecutor(threads)
    running: deque[tuple[Future, Any]] = deque()

    def oldest() -> Iterator[tuple[Block, Any]]:
        future, state = running.popleft()
        blocks = future.result()
        for block in blocks:
            yield block, state if block is blocks[-1] else None

    try:
        for job, state in jobs(documents, tokenizer.whole_documents):
            running.append((executor.submit(_encode_job, tokenizer, dtype, job), state))
            if len(running) > 2 * threads:
                yield from oldest()
        while running:
            yield from oldest()
    finally:
        executor.shutdown(cancel_futures=True)


def _encode_job(tokenizer: Tokenizer, dtype: str, job: Job) -> list[Block]:
    blocks: list[Block] = []
    is_text = not isinstance(tokenizer, Bytes)
    of_splits: dict[str, list[tuple[bool, bytes]]] = {split: [] for split in SPLITS}
    wrong: dict[str, Counter[Path]] = {split: Counter() for split in SPLITS}
    for split, starts, document in job:
        text = content(document)
        split = split_of(text, split)
        if is_text and isinstance(document, TextFile) and (places := places_wrong(text, document.path)):
            wrong[split][document.path] += places
        of_splits[split].append((starts, text))
    for split, texts in of_splits.items():
        ids: list[np.ndarray] = []
        # ASCII by itself: a string with one wider character is wider throughout, which takes longer with the GIL held.
        for (starts, _), together in groupby(texts, lambda piece: (piece[0], piece[1].isascii())):
            some = [text for _, text in together]
            ids += [tokenizer.encode_documents(some)] if starts else map(tokenizer.encode, some)
        if texts:
            size, documents = sum(len(text) for _, text in texts), sum(starts for starts, _ in texts)
            block = np.concatenate(ids, dtype=dtype, casting="unsafe")
            blocks.append((split, block, documents, size, wrong[split]))
    return blocks


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


def find_files(root: Path, patterns: Iterable[str], without: Iterable[str] = ()) -> dict[Path, str]:
    """The files below `root` whose name matches one of `patterns`: real path → path relative to `root`.

    Each is there once, whatever links to it. Folders named in `without` are left out, and symbolic links to folders
    are not followed. UserError for a folder that may not be read.
    """

    def refuse(error: OSError) -> None:
        if isinstance(error, PermissionError):
            raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

    patterns, without, real = list(patterns), frozenset(without), os.path.realpath(root)
    matches = re.compile("|".join(fnmatch.translate(Path(pattern).name) for pattern in patterns)).match
    of_folders = any(len(Path(pattern).parts) > 1 for pattern in patterns)
    found: list[tuple[bool, list[str]]] = []  # whether it is a link, and its path below `root`
    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in without]
        below = Path(folder).relative_to(root).parts
        for name in filter(matches, files):
            path = os.path.join(folder, name)
            if of_folders and not any(Path(path).match(pattern) for pattern in patterns):
                continue
            mode = os.lstat(path).st_mode
            if stat.S_ISREG(mode) or (stat.S_ISLNK(mode) and os.path.isfile(path)):
                found.append((stat.S_ISLNK(mode), [*below, name]))
    keys: dict[Path, str] = {}
    for link, parts in sorted(found):  # a file goes by its own name, not by a link's
        path = os.path.join(real, *parts)
        keys.setdefault(Path(os.path.realpath(path) if link else path), "/".join(parts))
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
