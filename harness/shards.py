"""The ids of a corpus's split, in one file or in several: opened where they are touched, checked block by block.

A split is `train.bin`, or above a size the shards `train_00000.bin`, `train_00001.bin`, … of equal length. meta.json
has `tokens` and `sha256` of each file, and as its `crc32` the CRC-32 of each BLOCK of its bytes: in base64, or for a
shard {"file": "train_00000.crc", "sha256": …}, which names a file of them, little-endian uint32. So opening reads no
ids, whatever their number, and no id is returned from a block whose checksum differs.
"""

import base64
import hashlib
import io
import json
import mmap
import os
import resource
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.errors import UserError

BLOCK = 1 << 16  # bytes: what a page fault reads from a disk anyway, and 10 µs to check
META = "meta.json"


class IdFile(NamedTuple):
    """A file of ids, as meta.json describes it."""

    path: Path
    tokens: int
    sha256: str | None = None
    crc32: str | dict | None = None

    @property
    def waiting(self) -> Path:
        """Its path while it waits to take the place of a former file, see harness/shard_writing.py."""
        return self.path.with_name(f"{self.path.name}.{str(self.sha256)[:16]}.new")

    def find(self) -> Path:
        """Where it is now."""
        return self.waiting if self.sha256 and self.waiting.exists() else self.path

    def open(self) -> io.FileIO:
        try:
            return open(self.find(), "rb", buffering=0)
        except FileNotFoundError:  # it has been put in its place in between
            return open(self.find(), "rb", buffering=0)

    def checksums(self) -> np.ndarray | None:
        """The CRC-32 of each block, uint32; None where meta.json has none. ValueError if the file of them that it names
        is another."""
        if self.crc32 is None:
            return None
        if isinstance(self.crc32, dict):
            table = IdFile(self.path.parent / self.crc32["file"], 0, self.crc32["sha256"])
            with table.open() as file:
                content = file.read()
            if hashlib.sha256(content).hexdigest() != table.sha256:
                raise ValueError(f"{table.path.name} is not the file that {META} describes")
        else:
            content = base64.b64decode(self.crc32, validate=True)
        return np.frombuffer(content, "<u4")


def files_of(folder: Path, split: str, about: dict) -> list[IdFile]:
    """The files of a split of which meta.json says `about`. The path of a shard is relative to the folder."""
    if shards := about.get("shards"):
        return [IdFile(folder / s["file"], s["tokens"], s["sha256"], s["crc32"]) for s in shards]
    return [IdFile(folder / f"{split}.bin", about["tokens"], about.get("sha256"), about.get("crc32"))]


def digest(meta: dict) -> str:
    """The sha256 of what stands in a meta.json before its `checksum`: keys behind that are a user's own."""
    keys = list(meta)
    before = {key: meta[key] for key in keys[: keys.index("checksum") if "checksum" in meta else None]}
    return hashlib.sha256(json.dumps(before).encode()).hexdigest()


class Tokens:
    """The ids of a split, read-only: (tokens,) of `dtype`, indexed by integers, slices and integer arrays of any shape.

    A file is mapped when it is first touched, and each of its blocks is checked when *that* is first touched. Where a
    checksum differs, a file is gone or shorter than it was, or an id is none of `vocab_size`, `broken(name, problem)`
    makes the error.
    """

    def __init__(self, files: list[IdFile], dtype: str, vocab_size: int, broken: Callable[[str, str], UserError]):
        self.files, self.dtype, self._vocab_size, self._broken = files, np.dtype(dtype), vocab_size, broken
        self._ends = np.cumsum([file.tokens for file in files])
        self.shape, self._per_block = (int(self._ends[-1]),), BLOCK // self.dtype.itemsize
        self._lock = threading.Lock()  # a thread may read batches ahead while another evaluates
        self._mapped: dict[int, np.ndarray] = {}
        self._opened: dict[int, Any] = {}
        self._checksums: dict[int, np.ndarray] = {}
        self._unchecked: dict[int, np.ndarray] = {}  # (blocks,) bool; removed when none is left
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if (needed := 2 * len(files) + 256) > soft != resource.RLIM_INFINITY:  # a shard takes two descriptors
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard) if hard >= 0 else needed, hard))
        if len(files) == 1:  # once open, it is read to the end, even if another corpus takes its place
            self._map(0)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self[:], dtype, copy=copy)

    def astype(self, dtype) -> np.ndarray:
        return self[:].astype(dtype)

    def reshape(self, *shape) -> np.ndarray:
        return self[:].reshape(*shape)

    def tolist(self) -> list[int]:
        return self[:].tolist()

    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._between(start, stop) if step == 1 else self[np.arange(start, stop, step)]
        if isinstance(index, tuple):
            return self[:][index]
        index = np.asarray(index)
        index = np.flatnonzero(index) if index.dtype == bool else index
        if index.size and not -len(self) <= index.min() <= index.max() < len(self):
            raise IndexError(f"an index beyond the {len(self)} tokens")
        if index.size and index.min() < 0:
            index = np.where(index < 0, index + len(self), index)
        if len(self.files) == 1:
            return self._checked(0, index)[index]
        # Windows come as stretches of neighbours, so that a file is looked up for each stretch and not for each index.
        flat = index.ravel()
        numbers = np.searchsorted(self._ends, flat, side="right")
        ids = np.empty(flat.shape, self.dtype)
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(flat)]
        for start, stop in pairwise(edges) if len(flat) else ():
            local = flat[start:stop] - self._start(number := int(numbers[start]))
            ids[start:stop] = self._checked(number, local)[local]
        return ids.reshape(index.shape)[()]

    def _start(self, number: int) -> int:
        return int(self._ends[number]) - self.files[number].tokens

    def _between(self, start: int, stop: int) -> np.ndarray:
        """The ids in [start, stop): a view, or where they cross files, a copy."""
        parts = []
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right") if start < stop else (0, -1)
        for number in range(first, last + 1):
            a, b = max(0, start - self._start(number)), min(self.files[number].tokens, stop - self._start(number))
            parts.append(self._checked(number, slice(a, b))[a:b])
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def _checked(self, number: int, index: np.ndarray | slice) -> np.ndarray:
        """A file's ids, those at `index` checked."""
        ids = self._map(number)
        if os.fstat(self._opened[number].fileno()).st_size < ids.nbytes:  # to read what was cut off ends the process
            raise self._broken(self.files[number].path.name, "has been cut short since it was opened")
        if (unchecked := self._unchecked.get(number)) is None:
            return ids
        if isinstance(index, slice):
            first = index.start // self._per_block
            blocks = first + np.flatnonzero(unchecked[first : -(-index.stop // self._per_block)])
        else:
            touched = index // self._per_block
            blocks = np.unique(touched[unchecked[touched]])
        for block in blocks.tolist():
            self._check(number, block)
            unchecked[block] = False
        if len(blocks) and not unchecked.any():
            self._unchecked.pop(number, None)
        return ids

    def _check(self, number: int, block: int) -> None:
        """Compare a block with its checksum. One call reads it a hundred times as fast as 16 page faults would, at each
        of which the kernel reads ahead."""
        name = self.files[number].path.name
        try:
            content = os.pread(self._opened[number].fileno(), BLOCK, block * BLOCK)
        except OSError as error:
            raise UserError(f"cannot read {self.files[number].path}: {error.strerror}") from error
        if zlib.crc32(content) != self._checksums[number][block]:
            where = f"the {BLOCK:,} bytes from {block * BLOCK:,} on differ"
            raise self._broken(name, f"is not the file that {META} describes ({where})")
        if (largest := int(np.frombuffer(content, self.dtype).max())) >= self._vocab_size:
            raise self._broken(name, f"holds the token id {largest}, outside the {self._vocab_size} known ids")

    def _map(self, number: int) -> np.ndarray:
        if (ids := self._mapped.get(number)) is not None:
            return ids
        with self._lock:
            if number not in self._mapped:
                self._mapped[number] = self._open(number)
            return self._mapped[number]

    def _open(self, number: int) -> np.ndarray:
        file = self.files[number]
        try:
            opened = file.open()  # to be read as long as this object lives
            pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            ids = np.frombuffer(pages, self.dtype)
            checksums = file.checksums()
        except FileNotFoundError as error:
            raise self._broken(file.path.name, "or the file of its checksums is gone") from error
        except OSError as error:
            raise UserError(f"cannot read {file.path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise self._broken(file.path.name, f"cannot be checked ({error})") from error
        if len(ids) != file.tokens:
            raise self._broken(file.path.name, f"has {len(ids):,} ids where {file.tokens:,} belong")
        if checksums is not None:
            if len(checksums) != -(-ids.nbytes // BLOCK):
                raise self._broken(META, f"has {len(checksums)} checksums of {file.path.name}'s blocks")
            self._checksums[number], self._unchecked[number] = checksums, np.ones(len(checksums), bool)
            if hasattr(mmap, "MADV_RANDOM"):
                pages.madvise(mmap.MADV_RANDOM)  # a window is a page or two: read nothing around it
        self._opened[number] = opened
        return ids
