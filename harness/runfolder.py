"""A run's folder, out/<run>: who may write there, and what it already holds."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from harness.errors import UserError
from harness.files import NOT_OFFERED

_FORMER = ".former"
_OURS = ("config.yaml", "metrics.jsonl", "ckpt.pt", "best.pt", "steps", "curves.png", "wandb", "diagnostics")


class RunFolder:
    """`folder` made and locked: until this context, or the process, ends no other process trains into it."""

    def __init__(self, folder: Path):
        self.path = folder
        self.checkpoint, self.best = folder / "ckpt.pt", folder / "best.pt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / ".lock", "a+")  # noqa: SIM115 (the lock lives as long as this object)
        except OSError as e:
            raise UserError(
                f"cannot write to the run's folder {folder}: {e.strerror}; choose another run.out_dir"
            ) from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            pid = self._lock.read()
            raise UserError(
                f"process {pid} is training into {folder}: wait for it, or choose another run.name"
            ) from None
        except OSError as e:
            if e.errno not in NOT_OFFERED:
                raise
            print(f"warning: {folder} is on a file system without locks: do not start this run twice at a time")
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        for leftover in (
            *folder.glob("*.tmp"),
            *folder.glob("steps/*.tmp"),
        ):  # of a process killed while it wrote; only the lock's owner writes here
            leftover.unlink()
        if (folder / _FORMER).exists():
            self._bring_back()

    def kept(self, step: int) -> Path:
        """Where the checkpoint of a step is kept for good, in a folder that is there."""
        (self.path / "steps").mkdir(exist_ok=True)
        return self.path / "steps" / f"{step}.pt"

    @contextlib.contextmanager
    def cleared(self) -> Iterator[None]:
        """Without the files of a former run, of which none is removed before the block has succeeded."""
        aside = self.path / _FORMER
        aside.mkdir()
        for name in run_files(self.path):
            (self.path / name).rename(aside / name)
        try:
            yield
        except BaseException:
            self._bring_back()
            raise
        shutil.rmtree(aside)

    def _bring_back(self) -> None:
        """Undo a `cleared` that failed or was killed, with whatever was written since."""
        for name in run_files(self.path):
            _remove(self.path / name)
        for former in (self.path / _FORMER).iterdir():
            former.rename(self.path / former.name)
        (self.path / _FORMER).rmdir()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        if [p.name for p in self.path.iterdir()] == [".lock"]:  # nothing was written: leave no trace
            shutil.rmtree(self.path)
        self._lock.close()


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def run_files(folder: Path) -> list[str]:
    """The names of what a run has left in its folder, among the files and folders that runs write."""
    return [name for name in _OURS if (folder / name).exists()]
