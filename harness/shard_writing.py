"""The files of a corpus while it is written, and how they take the place of a former one, as one.

A file is written under a temporary name. When all are on the disk they become `train.bin.<sha256>.new` and so on, and
the rename of meta.json makes the switch: a reader takes a file that waits under the name that meta.json's sha256 gives
it, and else the one in its place. So a reader finds the former corpus or the new one, whole, at whatever moment the
writer is killed, and the next writer ends what the killed one began.

A writer that can be continued names its files `train.bin.part` and so on, and keeps in `unfinished.json` how far it is.
"""

import base64
import fcntl
import hashlib
import json
import os
import re
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from harness.files import flush, write_text, written_whole
from harness.shards import BLOCK, META, IdFile, digest, files_of

SHARD_BYTES = 1 << 30
_JOURNAL, _PART = "unfinished.json", "part"
_JOURNAL_SECONDS = 10.0  # between two saves: what a kill costs at most
_NAME = r"(?:train|val)(?:_\d{5,})?\.(?:bin|crc)"  # of the files that are this module's to remove
NAMES = (META, _JOURNAL, *(f"{split}{rest}" for split in ("train", "val") for rest in (".bin", "_*.bin", "_*.crc")))
"""patterns of the files that this module writes under temporary names"""


class Unusable(Exception):
    """What an interrupted prepare has left is not what its journal says."""


class Checksums:
    """The sha256 of bytes, and the CRC-32 of each BLOCK of them."""

    def __init__(self) -> None:
        self.size, self._sha256, self._crc = 0, hashlib.sha256(), 0
        self._table: list[int] = []  # of the blocks so far

    def update(self, data: memoryview) -> Any:
        """A sha256 object of the bytes up to here."""
        self._sha256.update(data)
        while data:
            part = data[: BLOCK - self.size % BLOCK]
            self._crc = zlib.crc32(part, self._crc)
            self.size += len(part)
            if self.size % BLOCK == 0:
                self._table.append(self._crc)
                self._crc = 0
            data = data[len(part) :]
        return self._sha256.copy()

    def table(self) -> bytes:
        return np.array(self._table + [self._crc] * (self.size % BLOCK > 0), "<u4").tobytes()


class SplitWriter:
    """The files of a split while it is written: `train.bin.<suffix>`, then shard after shard. With a `state` it goes on
    where the writer stood from which that was taken, whatever has been written since; Unusable if it cannot.

    Threads write, make the checksums and see that full shards are on the disk, beside the one that calls."""

    def __init__(self, folder: Path, split: str, suffix: str, shard_bytes: int, state: dict | None = None):
        self.folder, self.split, self.suffix = folder, split, suffix
        self.shard_bytes = max(8, shard_bytes // 8 * 8)
        self.shards: list[dict[str, Any]] = []  # those that are full
        self._threads, self._flushed = ThreadPoolExecutor(3), deque[Future]()
        if state:
            self._go_on(state)
        else:
            self._begin()

    def _path(self, number: int, kind: str = "bin") -> Path:
        name = self.split if not number and kind == "bin" else f"{self.split}_{number:05d}"
        return self.folder / f"{name}.{kind}.{self.suffix}"

    def _begin(self, mode: str = "wb") -> None:
        self._file: Any = open(self._path(len(self.shards)), mode)  # noqa: SIM115 (`close` and `_flush` close it)
        self._size, self._checksums = 0, Checksums()
        self._add(memoryview(b""))

    def _add(self, data: memoryview) -> None:
        self._written = self._threads.submit(self._file.write, data)
        self._sha256 = self._threads.submit(self._checksums.update, data)
        self._size += len(data)

    def _wait(self) -> Any:
        """For what was added last; the sha256 up to there."""
        self._written.result()
        return self._sha256.result()

    def write(self, ids: np.ndarray) -> None:
        data = memoryview(ids).cast("B")
        while data:
            if self._size == self.shard_bytes:
                self._end()
                self._begin()
            part = data[: self.shard_bytes - self._size]
            self._wait()
            self._add(part)
            data = data[len(part) :]

    def _end(self) -> None:
        sha256, table = self._wait().hexdigest(), self._checksums.table()
        self._flushed.append(self._threads.submit(_flush, self._file, self._path(len(self.shards), "crc"), table))
        self.shards.append({"bytes": self._size, "sha256": sha256, "crc": hashlib.sha256(table).hexdigest()})

    def sync(self) -> None:
        while self._flushed:
            self._flushed.popleft().result()
        self._wait()
        self._file.flush()
        flush(self._file.fileno())

    def finish(self, itemsize: int) -> tuple[dict, dict[Path, IdFile]]:
        """What meta.json says of the files, and each file with the description of what it becomes."""
        if not self.shards:
            about = {"sha256": self._wait().hexdigest()}
            self._file.close()
            about["crc32"] = base64.b64encode(self._checksums.table()).decode()
            return about, {self._path(0): IdFile(self.folder / f"{self.split}.bin", 0, about["sha256"])}
        self._end()
        self._threads.shutdown()
        while self._flushed:
            self._flushed.popleft().result()
        shards, files = [], {}
        for number, shard in enumerate(self.shards):
            ids, crc = (f"{self.split}_{number:05d}.{kind}" for kind in ("bin", "crc"))
            table = {"file": crc, "sha256": shard["crc"]}
            shards.append(
                {"file": ids, "tokens": shard["bytes"] // itemsize, "sha256": shard["sha256"], "crc32": table}
            )
            files[self._path(number)] = IdFile(self.folder / ids, 0, shard["sha256"])
            files[self._path(number, "crc")] = IdFile(self.folder / crc, 0, shard["crc"])
        together = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode())
        return {"sha256": together.hexdigest(), "shards": shards}, files

    def close(self) -> None:
        self._threads.shutdown()
        self._file.close()

    def remove(self) -> None:
        """Whatever is still under a temporary name."""
        self.close()
        for number in range(len(self.shards) + 1):
            for kind in ("bin", "crc"):
                self._path(number, kind).unlink(missing_ok=True)

    def state(self) -> Callable[[], dict]:
        """Gives what a writer needs to go on from here; whether the checksums have come so far matters only then."""
        shards, size, sha256 = list(self.shards), self._size, self._sha256
        return lambda: {"shards": shards, "bytes": size, "sha256": sha256.result().hexdigest()}

    def _go_on(self, state: dict) -> None:
        self.shards, path = state["shards"], self._path(len(state["shards"]))
        try:
            for number, shard in enumerate(self.shards):
                if self._path(number).stat().st_size != shard["bytes"]:
                    raise Unusable(self._path(number))
                if hashlib.sha256(self._path(number, "crc").read_bytes()).hexdigest() != shard["crc"]:
                    raise Unusable(self._path(number, "crc"))
            self._begin("r+b")
        except OSError as error:
            raise Unusable(error) from error
        sha256 = self._wait()
        while part := self._file.read(min(1 << 20, state["bytes"] - self._checksums.size)):
            sha256 = self._checksums.update(memoryview(part))
        self._size = self._checksums.size
        if (self._size, sha256.hexdigest()) != (state["bytes"], state["sha256"]):
            self.close()
            raise Unusable(path)
        self._file.truncate(self._size)
        self._file.seek(self._size)


def _flush(file: Any, path: Path, table: bytes) -> None:
    """A full shard and its checksums, which go to `path`, are on the disk."""
    file.flush()
    flush(file.fileno())
    file.close()
    path.write_bytes(table)
    flush(path)


# --- swapping ---------------------------------------------------------------------------------------------------------


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other writer swaps files in `folder` in this block; on a file system without locks, one that does so at the
    same moment may damage the corpus, which its readers notice."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # it is not offered there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def swap(folder: Path, files: dict[Path, IdFile], meta: dict) -> None:
    """Put `files`, each under its temporary name and complete, and `meta` in the place of the corpus in `folder`."""
    for path in files:
        flush(path)
    with _alone(folder):
        _settle(folder)
        try:
            for path, file in files.items():
                os.replace(path, file.waiting)
            flush(folder)
            with written_whole(folder / META) as temporary:
                temporary.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        finally:
            _settle(folder)
        flush(folder)


def _settle(folder: Path) -> None:
    """Put the files that wait for the present meta.json in their places, and remove those of any other corpus."""
    meta = {}
    with suppress(OSError, ValueError):
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    listed: set[str] = set()
    with suppress(KeyError, TypeError, AttributeError):
        for split, about in meta["splits"].items():
            for file in files_of(folder, split, about):
                tables = [file.crc32] if isinstance(file.crc32, dict) else []
                for own in (file, *(IdFile(folder / t["file"], 0, t["sha256"]) for t in tables)):
                    listed.add(own.path.name)
                    with suppress(FileNotFoundError):
                        os.replace(own.waiting, own.path)
    for path in folder.iterdir():
        waits = re.fullmatch(rf"{_NAME}\.[0-9a-f]{{16}}\.new", path.name)
        former = "checksum" in meta and re.fullmatch(_NAME, path.name) and path.name not in listed
        if waits or former:
            path.unlink(missing_ok=True)


def former_files(folder: Path) -> list[Path]:
    """The files of a corpus in the folder, finished or not."""
    names = rf"(?:{_NAME}|{re.escape(META)}|{re.escape(_JOURNAL)})(?:\.\w+\.(?:tmp|new)|\.{_PART})?"
    return [path for path in folder.glob("*") if re.fullmatch(names, path.name)]


# --- continuing -------------------------------------------------------------------------------------------------------


class Journal:
    """How far a writer is that can be continued. One process at a time has it, for as long as it lives."""

    def __init__(self, folder: Path, lock: Any, arguments: dict):
        self.path, self._lock = folder / _JOURNAL, lock
        self._arguments = hashlib.sha256(json.dumps(arguments).encode()).hexdigest()
        self._now: dict | None = None
        self._saved = time.monotonic()

    @classmethod
    def open(cls, folder: Path, arguments: dict) -> "Journal | None":
        """None where another process has it."""
        path = folder / f"train.bin.{_PART}"
        while True:
            lock = open(path, "ab")  # noqa: SIM115 (`close` closes it)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                return None
            except OSError:
                pass  # a file system without locks
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    return cls(folder, lock, arguments)
            lock.close()  # its owner has just removed it: try again

    def go_on(self, folder: Path, counts: dict, documents, shard_bytes: int) -> dict[str, SplitWriter]:
        """The writers of the splits, `counts` and `documents` as they were left, or where there is nothing to continue,
        as they are at the start."""
        writers: dict[str, SplitWriter] = {}
        with suppress(FileNotFoundError):
            try:
                saved = json.loads(self.path.read_text(encoding="utf-8"))
                if saved["checksum"] != digest(saved):
                    raise Unusable("its checksum differs")
                if saved["arguments"] != self._arguments:
                    raise Unusable("it had other arguments")
                for split in counts:
                    writers[split] = SplitWriter(folder, split, _PART, shard_bytes, saved["files"][split])
                documents.go_on(saved["documents"])
                counts |= saved["counts"]
                print(f"{folder}: continued, after {sum(c['documents'] for c in counts.values()):,} documents")
                return writers
            except (ValueError, KeyError, TypeError, Unusable) as error:
                print(f"{folder}: what was begun there cannot be continued ({error}): it starts afresh")
        for writer in writers.values():
            writer.close()
        self._remove(but=f"train.bin.{_PART}")
        return {split: SplitWriter(folder, split, _PART, shard_bytes) for split in counts}

    def _remove(self, but: str = "") -> None:
        for path in self.path.parent.iterdir():
            if path == self.path or (re.fullmatch(rf"{_NAME}\.{_PART}", path.name) and path.name != but):
                path.unlink(missing_ok=True)

    def note(self, documents: Any, counts: dict, writers: dict[str, SplitWriter]) -> None:
        """Where a writer would go on, were it interrupted now; from time to time that is written down."""
        copy = {split: dict(count) for split, count in counts.items()}
        self._now = {
            "arguments": self._arguments,
            "documents": documents,
            "counts": copy,
            "files": {split: writer.state() for split, writer in writers.items()},
        }
        if time.monotonic() - self._saved >= _JOURNAL_SECONDS:
            self.save(writers)

    def save(self, writers: dict[str, SplitWriter]) -> None:
        if self._now:
            for writer in writers.values():
                writer.sync()
            now = self._now | {"files": {split: state() for split, state in self._now["files"].items()}}
            write_text(self.path, json.dumps(now | {"checksum": digest(now)}))
            self._saved = time.monotonic()

    def close(self) -> None:
        self._lock.close()


def remove_unfinished(folder: Path, journal: Journal | None) -> None:
    """Remove what an interrupted prepare left to be continued, now that a corpus is there. A prepare that still runs
    keeps its files. `journal`: this process's own, whose files have become the corpus."""
    if journal:
        journal.path.unlink(missing_ok=True)
    elif (folder / f"train.bin.{_PART}").exists() and (journal := Journal.open(folder, {})):
        journal._remove()
        journal.close()
