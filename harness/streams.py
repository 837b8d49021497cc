"""Standard output and error for programs whose work matters more than what they print."""

import contextlib
import errno
import io
import os
import select
import signal
import sys
from collections.abc import Iterator


def open_streams() -> None:
    """Make the standard streams such that printing works. A closed one (`>&-`) leads to /dev/null: otherwise the next
    file to be opened would get its number, and what is printed. A character that the encoding lacks is printed as an
    escape, \\xd7 for ×."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # which gets the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
        stream = getattr(sys, name)
        if number and isinstance(stream, io.TextIOWrapper):  # a test's or a notebook's may be none
            stream.reconfigure(errors="backslashreplace")


def silence(number: int) -> None:
    """What is written to this descriptor from now on, by whatever code or child, goes to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


@contextlib.contextmanager
def unfailing_output() -> Iterator[None]:
    """In this block no line, bar or warning that Python code prints raises an error: what cannot be written (a full
    disk, a terminal that has gone) is dropped.

    Where the reader of a pipe has gone (`| head`, or Ctrl-C before `| tee log`), all that is printed from then on goes
    to /dev/null, and the process gets a SIGHUP, as from a terminal that closes: it saves and ends. While
    there is no handler for that signal, the BrokenPipeError is raised.
    """
    former = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_unfailing(stream, number) for stream, number in zip(former, (1, 2), strict=True))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = former


def _unfailing(stream, number: int):
    """A stream to the same descriptor that raises no such error; a test's or a notebook's own stream as it is."""
    try:
        if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != number:
            return stream
    except io.UnsupportedOperation:  # it leads to no file
        return stream
    stream.flush()
    file = io.BufferedWriter(_Unfailing(number, "w", closefd=False))
    by_line = stream.line_buffering or stream.write_through  # the latter under PYTHONUNBUFFERED
    return io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=by_line)


class _Unfailing(io.FileIO):
    def write(self, data) -> int:
        try:
            while (written := super().write(data)) is None:  # set not to block, and its reader is slow
                select.select([], [self], [])
            return written
        except OSError as error:
            if error.errno == errno.EPIPE:
                handler = signal.getsignal(signal.SIGHUP)
                if handler == signal.SIG_DFL:
                    raise
                silence(self.fileno())
                if callable(handler):  # not ignored, as under nohup
                    signal.raise_signal(signal.SIGHUP)
            return len(data)
