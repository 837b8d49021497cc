"""Files that are never half-written: a reader, and a crash at any moment, finds the former content or the new one.

And whether they can be written at all, which a script asks before it works for hours.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from harness.errors import UserError

# How a file system says that it cannot flush or lock: nothing is wrong with the file.
NOT_OFFERED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder to write to, whose file takes the place of `path` when the block ends. If the
    block raises, the temporary file is removed and `path` stays as it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        put_in_place({temporary: path})
    finally:
        with contextlib.suppress(OSError):  # it is not there any more; or this would bury what has failed in the block
            temporary.unlink()


def put_in_place(targets: dict[Path, Path]) -> None:
    """Each closed file, complete as it is, renamed over its target, in this order. All of them are flushed to the disk
    before the first rename, since a rename may reach the disk before the content does; and at the end the folders,
    without which the renames are not on it."""
    for temporary in targets:
        flush(temporary)
    for temporary, target in targets.items():
        os.replace(temporary, target)
    for folder in {target.parent for target in targets.values()}:
        flush(folder)


def flush(file: Path | int) -> None:
    """Return once a file, or a folder's list of files, is on the disk; at once where the file system has no way to say
    so, as that of some network drives. `file`: a path, or the descriptor of one that is open."""
    descriptor = file if isinstance(file, int) else os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
    finally:
        if descriptor != file:
            os.close(descriptor)


def remove_leftovers(folder: Path, *names: str, owned: bool = False) -> None:
    """Remove the temporary files `NAME.<process id>.tmp` that killed processes left in `folder`; `names` are globs. A
    process that still runs keeps its own, unless these files are `owned`: this process alone may write them."""
    for path in (path for name in names for path in folder.glob(f"{name}.*.tmp")):
        pid = re.search(r"\.(\d+)\.tmp$", path.name)
        if pid and path.is_file() and (owned or not _runs(int(pid[1]))):
            with contextlib.suppress(OSError):  # another process has removed it just now, say; it does no harm
                path.unlink()


def _runs(pid: int) -> bool:
    """Whether another process of this machine has that number."""
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return pid != os.getpid()


def write_text(path: Path, text: str) -> None:
    """The whole content of `path`, in UTF-8; whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_folder(folder: Path) -> None:
    """UserError unless `folder` can be written to or, if it is not there yet, made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{folder} cannot be a folder, a file is in the way: give another folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"{folder}: no permission to write to {there}: give another folder")


def make_folder(folder: Path) -> None:
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:  # as in /proc, whatever its permissions say
        raise UserError(f"{folder} cannot be made ({e.strerror}): give another folder") from e


def check_file(path: Path) -> None:
    """UserError unless a file can be written to `path`, in a folder that is there or can be made."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file in it")
    check_folder(path.parent)
