"""A user's mistake is one clear line and exit status 2; a traceback is for mistakes of ours."""

import argparse
import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator

from harness.signals import raise_on_ctrl_c
from harness.streams import open_streams, silence

# The machine says no: nothing to debug in our code, so these get one line as well, with what to do.
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "mend the permissions"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n 4096)"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "mend the disk or the network drive (dmesg may say more)"),
    errno.EFBIG: "raise the limit of a file's size (ulimit -f unlimited)",
    errno.EROFS: "name a folder that can be written to, or mount this one so",
}
_OUT_OF_MEMORY = re.compile(
    "out of memory|(can't|cannot) allocate memory|not enough memory|bad_alloc|ALLOC_FAILED", re.I
)


class UserError(Exception):
    """Something that the user can put right. The message is one line: what is wrong, where, and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, by which a mistake is one line as well."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def run_cli(main) -> int:
    """Call `main()` and return the exit status: `sys.exit(run_cli(main))` is the last line of every script.

    UserError, a full or failing disk, a missing permission, no memory or descriptors left → one line on stderr and 2;
    Ctrl-C → 130; a closed pipe (`| head`) ends quietly with 141, as the signal would. Anything else is a bug and keeps
    its traceback. A standard output or error that is closed is none of these.
    """
    raise_on_ctrl_c()
    open_streams()
    try:
        status = main() or 0
        sys.stdout.flush()  # a closed pipe shows here, not while the interpreter shuts down
        return status
    except UserError as error:
        message, status = f"error: {error}", 2
    except BrokenPipeError:
        silence(1)
        return 141
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (OSError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            what = f"{_asked_for(error)}: give a smaller --batch-size, where there is one, or use a larger machine"
        elif isinstance(error, OSError) and error.errno in _ADVICE:
            where = f" ({error.filename})" if error.filename else ""
            what = f"{error.strerror}{where}: {_ADVICE[error.errno]}, then run this again"
        else:
            raise
        message, status = f"error: {what}", 2
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if number == 2:
                print(" ".join(message.split()), file=stream)
            stream.flush()
        except OSError:  # it is full, or has gone: the interpreter would fail on it at exit, and change the status
            silence(number)
    return status


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left. PyTorch says so by errors of several types."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
    )


def _asked_for(error: BaseException) -> str:
    asked = re.search(r"allocate ([\d.]+) ?([KMGT]iB|bytes)", str(error))
    if not asked:
        return "out of memory"
    gigabytes = float(asked[1]) / 1024 ** {"bytes": 3, "KiB": 2, "MiB": 1, "GiB": 0, "TiB": -1}[asked[2]]
    return f"out of memory, {gigabytes:.3g} GiB more were asked for"


def out_of_memory(error: BaseException, config) -> UserError:
    """What a training run of that config, which had no memory left, may change to take less."""
    c = config.training
    share = c.batch_size // max(1, min(c.batch_size, int(os.environ.get("WORLD_SIZE") or 1)))
    most = min(c.micro_batch_size or share, share)
    size, smaller = (max(n for n in range(1, upper + 1) if share % n == 0) for upper in (most, max(most // 2, 1)))
    less = []
    if smaller < size:
        less.append(f"training.micro_batch_size from {size} to {smaller}, on which the losses do not depend")
    if not c.checkpoint_activations:
        less.append("training.checkpoint_activations true")
    if c.parallel != "fsdp":
        less.append("training.parallel fsdp over several GPUs")
    return UserError(f"{_asked_for(error)}. What takes less: {'; '.join(less)}; a smaller model.block_size or model")


@contextlib.contextmanager
def advising(config) -> Iterator[None]:
    """A training run's block. Where it runs out of memory, or into what has no deterministic form, the UserError says
    which keys to change."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(error, config) from error
        if config.training.deterministic and "deterministic" in str(error):
            found = str(error).partition(". ")[0]
            raise config.error("training.deterministic", f"{found}: leave it out, or change the model") from error
        raise
