"""Text into a corpus: `write_corpus` tokenizes documents into the folder that harness/corpus.py describes and reads.

Below it stands what the `data/<corpus>/prepare.py` scripts share: their command line, the search for files, the split
into train and validation, downloads.
"""

import argparse
import hashlib
import io
import json
import os
import urllib.request
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.corpus import SPLITS, describe_corpus
from harness.errors import UserError
from harness.files import make_folder, put_in_place
from harness.tokenizer import Bytes, Tokenizer

FEW = 1e-3  # of the bytes of a text may be wrong
PIECE = 1 << 18  # bytes of text that one thread encodes at a time (GPT-2's regex fails on a million spaces)


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

    Documents keep their order within a split, with the tokenizer's separator between one and the next, or in front of
    each where it is the begin-of-text token. They are encoded on `threads` threads (default: every CPU) in bounded
    memory, whatever their number and size. The corpus ends before both splits together exceed `max_tokens`.
    `total_bytes` is for the progress bar; `extra` is added to meta.json. Until all is on disk only temporary files are
    written, so that any failure (a full disk, Ctrl-C) leaves a former corpus as it was. UserError if a split stays
    empty, or if a file is no text and the tokenizer is not `Bytes`, see `text_fault`; the few places that may be wrong
    are counted and said.
    """
    from tqdm import tqdm  # here, since reading a corpus does not need it

    folder = Path(folder)
    make_folder(folder)
    _remove_leftovers(folder)
    dtype = "uint32" if tokenizer.vocab_size > 65_535 else "uint16"
    begins = tokenizer.separator == tokenizer.begin
    # meta.json is renamed into place first, since it holds the hashes of the other two: if the process is killed
    # between two renames, whoever reads the corpus notices. (Without a meta.json they would pass for nanoGPT's.)
    temporary = {name: folder / f"{name}.{os.getpid()}.tmp" for name in ("meta.json", "train.bin", "val.bin")}
    try:
        with (
            open(temporary["train.bin"], "wb") as train,
            open(temporary["val.bin"], "wb") as val,
            closing(_encode(documents, tokenizer, dtype, threads or cpu_count())) as blocks,
            # disable=None: no bar without a terminal, where the line printed at the end has to do.
            tqdm(total=total_bytes, unit="B", unit_scale=True, desc=str(folder), leave=False, disable=None) as bar,
        ):
            files = {"train": train, "val": val}
            hashes = {split: hashlib.sha256() for split in SPLITS}
            counts: dict[str, dict[str, Any]] = {s: {"tokens": 0, "bytes": 0, "documents": 0} for s in SPLITS}
            replaced: Counter[Path] = Counter()
            for split, ids, starts, size, wrong in blocks:
                count = counts[split]
                if not begins and tokenizer.separator is not None and not count["documents"]:
                    ids = ids[1:]  # the separator in front of the first document, which has none before it
                if max_tokens is not None and len(ids) + sum(c["tokens"] for c in counts.values()) > max_tokens:
                    break
                files[split].write(ids)
                hashes[split].update(ids)
                count["tokens"] += len(ids)
                count["bytes"] += size
                count["documents"] += starts
                replaced.update(wrong)
                bar.update(size)
        if replaced.total() > FEW * sum(count["bytes"] for count in counts.values()):
            raise _refusal(next(iter(replaced)), f"is no UTF-8 text, as {len(replaced)} of the files are not")
        for split in SPLITS:
            if not counts[split]["tokens"]:
                raise UserError(f"{folder}: no text for the {split} split: give more documents or another share")
            if tokenizer.separator is not None:
                separators = counts[split]["documents"] - (not begins)
                counts[split]["bytes"] += separators * int(tokenizer.token_bytes()[tokenizer.separator])
            counts[split]["bytes_per_token"] = counts[split]["bytes"] / counts[split]["tokens"]
            counts[split]["sha256"] = hashes[split].hexdigest()
        meta = describe_corpus(tokenizer, source, counts, dtype) | (extra or {})
        with open(temporary["meta.json"], "w", encoding="utf-8") as description:
            description.write(json.dumps(meta, indent=1) + "\n")
        put_in_place({path: folder / name for name, path in temporary.items()})
    except OSError as error:
        error.filename = error.filename or str(folder)  # a full disk does not say where
        raise
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    sizes = ", ".join(f"{split} {counts[split]['tokens']:,}" for split in SPLITS)
    print(f"{folder}: {sizes} tokens; {tokenizer.name}, {tokenizer.vocab_size:,} ids")
    if replaced:
        where = f"{next(iter(replaced))}{f' and {len(replaced) - 1} file(s) more' if len(replaced) > 1 else ''}"
        print(f"{replaced.total():,} places that are not UTF-8 became U+FFFD, in {where}")
    return meta


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


def _encode(documents, tokenizer, dtype, threads) -> Generator[tuple[str, np.ndarray, int, int, dict[Path, int]]]:
    """Blocks of token ids, in order, each as (split, ids, how many documents start in it, bytes of their text, places
    in a file that are not UTF-8). Every document begins with the separator, where the tokenizer has one.

    A job is about PIECE bytes of text: many short documents, or a part of a long one. At most two jobs a thread wait at
    a time, which bounds the memory. Threads are enough, since the encoders release the GIL.
    """
    separator = np.array([] if tokenizer.separator is None else [tokenizer.separator], dtype)

    def encode_job(job):
        blocks = []
        for split in SPLITS:
            mine = [(starts, text, path) for of, starts, text, path in job if of == split]
            if mine:
                wrong: Counter[Path] = Counter()
                for _, text, path in mine if not isinstance(tokenizer, Bytes) else ():
                    if path and (problem := text_fault(text)):
                        raise _refusal(path, problem)
                    if path and (places := places_replaced(text)):
                        wrong[path] += places
                parts = [
                    part for starts, text, _ in mine for part in (separator[: int(starts)], tokenizer.encode(text))
                ]
                ids = np.concatenate(parts, dtype=dtype, casting="unsafe")
                size = sum(len(text) for _, text, _ in mine)
                blocks.append((split, ids, sum(starts for starts, _, _ in mine), size, wrong))
        return blocks

    executor = ThreadPoolExecutor(threads)
    running: deque[Future] = deque()
    try:
        for job in _jobs(documents, tokenizer.whole_documents):
            running.append(executor.submit(encode_job, job))
            if len(running) > 2 * threads:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _jobs(documents, whole: bool) -> Iterator[list[tuple[str, bool, bytes, Path | None]]]:
    """Lists of (split, whether a document starts here, text, its file) that hold about PIECE bytes each, or where
    documents must stay `whole`, at least one."""
    job, size = [], 0
    for split, document in documents:
        for number, text in enumerate([b"".join(pieces(document))] if whole else pieces(document)):
            job.append((split, number == 0, text, document.path if isinstance(document, TextFile) else None))
            size += len(text)
            if size >= PIECE // 2:
                yield job
                job, size = [], 0
    if job:
        yield job


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
