"""A run's folder, out/<run>: who may write there, and what it already holds."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.files import NOT_OFFERED, remove_leftovers

_OURS = ("config.yaml", "metrics.jsonl", "ckpt.pt", "best.pt", "shards", "steps", "curves.png", "wandb", "diagnostics")
# Folders for the files of a former run while another takes its place: .moving while they are moved, in or out; .former
# when all of them are in it; .replaced when the other run has begun and they may be deleted. A folder is renamed in one
# step, so that after a kill at any moment its name tells which run the files outside of it are of.
_MOVING, _FORMER, _REPLACED = ".moving", ".former", ".replaced"


class RunFolder:
    """`folder` made and locked: until this context, or the process, ends no other process trains into it."""

    def __init__(self, folder: Path):
        self.path = folder
        self.checkpoint, self.best = folder / "ckpt.pt", folder / "best.pt"
        check_kinds(folder, (_MOVING, _FORMER, _REPLACED))
        try:
            self._made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(folder)
        except OSError as e:
            raise UserError(
                f"cannot write to the run's folder {folder}: {e.strerror}; choose another run.out_dir"
            ) from e
        # Only the lock's owner writes the first four. Scripts write the others, and may do so just now.
        remove_leftovers(folder, "config.yaml", "metrics.jsonl", "*.pt", "steps/*.pt", owned=True)
        remove_leftovers(folder, "curves.png", "wandb/run.json", "diagnostics/*")
        self._bring_back()

    def kept(self, step: int) -> Path:
        """Where the checkpoint of a step is kept for good, in a folder that is there."""
        (self.path / "steps").mkdir(exist_ok=True)
        return self.path / "steps" / f"{step}.pt"

    @contextlib.contextmanager
    def cleared(self) -> Iterator[None]:
        """Without the files of a former run, of which none is removed before the block has succeeded."""
        moving = self.path / _MOVING
        moving.mkdir()
        try:
            for name in run_files(self.path):
                (self.path / name).rename(moving / name)
            former = moving.rename(self.path / _FORMER)
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # the next start tries again: this one is to end with its own error
                self._bring_back()
            raise
        shutil.rmtree(former.rename(self.path / _REPLACED), ignore_errors=True)

    def _bring_back(self) -> None:
        """Undo a `cleared` that failed or was killed: remove what was written since, put the former files back. If this
        is killed too, the next start does it again."""
        moving, former = self.path / _MOVING, self.path / _FORMER
        if former.exists():
            for name in run_files(self.path):
                _remove(self.path / name)
            former.rename(moving)
        if moving.exists():
            for file in moving.iterdir():
                file.rename(self.path / file.name)
            moving.rmdir()
        shutil.rmtree(self.path / _REPLACED, ignore_errors=True)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # the folder has gone, say: an error here would hide the run's own
            if [p.name for p in self.path.iterdir()] == [".lock"]:  # nothing was written: leave no trace
                (self.path / ".lock").unlink()
                if self._made:
                    self.path.rmdir()
        os.close(self._lock)


def _locked(folder: Path) -> int:
    """The descriptor of `folder`'s .lock, which holds the owner's process id. UserError if another process holds the
    lock, or if the file is no lock: it may be a link to a user's file, which is not to be written to."""
    path = folder / ".lock"
    while True:
        foreign = UserError(f"{path} is not the lock of a run: move it away, or choose another run.name")
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise foreign
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        owner = os.read(lock, 32).decode(errors="replace")
        if not (owner.isdecimal() or not owner) or os.fstat(lock).st_nlink > 1:
            os.close(lock)
            raise foreign
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in NOT_OFFERED:
                os.close(lock)
            if isinstance(e, BlockingIOError):
                who = f"process {owner}" if owner else "another process"
                raise UserError(f"{who} is training into {folder}: wait for it, or choose another run.name") from None
            if e.errno not in NOT_OFFERED:
                raise
            print(f"warning: {folder} is on a file system without locks: do not start this run twice at a time")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(lock)):
                break
        os.close(lock)  # its owner has just removed it, and left
    with contextlib.suppress(OSError):  # a full disk: others are then told no process id
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def remove_shards(folder: Path, named: Any = None) -> None:
    """Remove the sharded checkpoints in a run's folder but the one that its ckpt.pt names, as its `shards`: those that
    it has replaced, and those of processes that were killed before they had written all. What else lies there stays."""
    kept = named.get("folder") if isinstance(named, dict) else None
    for path in (folder / "shards").glob("*"):
        if path.name.isdecimal() and f"shards/{path.name}" != kept and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):  # it is not there, or not empty
        (folder / "shards").rmdir()


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_kinds(folder: Path, names: Iterable[str] = _OURS) -> None:
    """UserError where one of these is no file, or no folder, though a run writes one there."""
    for name in names:
        path, is_file = folder / name, "." in name[1:]
        right = path.is_file() if is_file else path.is_dir() and not (name[0] == "." and path.is_symlink())
        if os.path.lexists(path) and not right:
            kind = "file" if is_file else "folder"
            raise UserError(
                f"{path} is no {kind}, and a run writes one there: move it away, or choose another run.name"
            )


def run_files(folder: Path) -> list[str]:
    """The names of what a run has left in its folder, among the files and folders that runs write."""
    return [name for name in _OURS if (folder / name).exists()]
