"""A user's mistake is one clear line and exit status 2; a traceback is for mistakes of ours."""

import errno
import io
import os
import sys

from harness.signals import raise_on_ctrl_c

# The machine says no: nothing to debug in our code, so these get one line as well.
_ENVIRONMENT_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)


class UserError(Exception):
    """Something that the user can put right. The message is one line: what is wrong, where, and what to do."""


def run_cli(main) -> int:
    """Call `main()` and return the exit status: `sys.exit(run_cli(main))` is the last line of every script.

    UserError, a full disk or a missing permission → one line on stderr and 2; Ctrl-C → 130; a closed pipe
    (`| head`) ends quietly with 141, as the signal would. Anything else is a bug and keeps its traceback. What the
    output's encoding lacks is printed as an escape, \\xd7 for ×.
    """
    raise_on_ctrl_c()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test's or a notebook's may be none
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main() or 0
        sys.stdout.flush()  # a closed pipe shows here, not while the interpreter shuts down
        return status
    except UserError as error:
        message = " ".join(str(error).split())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in _ENVIRONMENT_ERRNOS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        message = f"{error.strerror}{where}: free some space or mend the permissions, then run this again"
    print(f"error: {message}", file=sys.stderr)
    return 2
