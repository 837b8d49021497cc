"""Signals that ask a program to end: what a run saves first, and a Ctrl-C that comes too early for it to matter."""

import contextlib
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import TracebackType

STOPS = (
    signal.SIGINT,  # Ctrl-C
    signal.SIGTERM,  # kill; a scheduler, before it sends SIGKILL
    signal.SIGHUP,  # the terminal was closed
    signal.SIGXCPU,  # the limit on CPU time
    signal.SIGUSR1,  # this and the next: a scheduler's warning that time is up
    signal.SIGUSR2,
)


TWICE = "OFFBYONE_CTRL_C_TWICE"
"""the variable that a launcher sets which passes a Ctrl-C on to what the terminal's own reaches as well"""


def heeded() -> list[signal.Signals]:
    """STOPS, but for SIGHUP where it is ignored, as under nohup: it stays so."""
    return [number for number in STOPS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


class StopSignals:
    """In this context the signals of `heeded` end a training run, which saves first; a second Ctrl-C ends it at once.
    `is_main`: whether this rank prints which signal came."""

    def __init__(self, is_main: bool):
        self.requested = 0  # the number of the first signal since `defer`
        self._is_main, self._deferred = is_main, False
        self._interrupted = -math.inf  # when the last Ctrl-C came

    def defer(self) -> None:
        """From now on a signal is kept in `requested`, so that the step is finished and saved. Before, there is nothing
        to save, and a signal ends the run at once, by SystemExit, with the status that shells give to it."""
        self._deferred = True

    def _receive(self, number: int, _frame) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGINT:
            # One Ctrl-C comes to a rank twice, from the terminal and from torchrun or another launcher.
            if now - self._interrupted <= (1 if {"TORCHELASTIC_RUN_ID", TWICE} & os.environ.keys() else 0):
                return
            if self._interrupted > -math.inf:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt
            self._interrupted = now
        if not self._deferred:
            self._say(f"{name} before the first step: nothing is lost, the same command starts again")
            raise SystemExit(128 + number)
        if not self.requested:
            self.requested = number
            again = "Ctrl-C again" if number == signal.SIGINT else "Ctrl-C twice"
            self._say(f"{name}: finishing this step, then saving; {again} stops at once")

    def _say(self, text: str) -> None:
        if self._is_main:  # not by print: a handler may interrupt another print
            with contextlib.suppress(OSError):  # the terminal may be the one that was closed
                os.write(2, f"\n{text}\n".encode())

    def __enter__(self) -> "StopSignals":
        self._former = {number: signal.signal(number, self._receive) for number in heeded()}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


def end_quietly_on_ctrl_c() -> None:
    """Where this process is a program of this project, let a Ctrl-C end it without a traceback until
    `raise_on_ctrl_c`: it has only begun to import, which takes seconds. Nothing changes for who imports the project, a
    test or a notebook, or where Ctrl-C is ignored."""
    if _is_program() and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_on_ctrl_c() -> None:
    """Let a Ctrl-C raise KeyboardInterrupt, as it does where `end_quietly_on_ctrl_c` has changed nothing."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_program() -> bool:
    """Whether Python was started with train.py, a script, a prepare.py or, by -m, a module of harness/."""
    root = Path(__file__).resolve().parents[1]
    if (path := getattr(sys.modules["__main__"], "__file__", None)) is None:
        return sys.argv[:1] == ["-m"] and any(word.startswith("harness.") for word in sys.orig_argv)
    path = Path(path).resolve()
    return path == root / "train.py" or any(root / folder in path.parents for folder in ("scripts", "harness", "data"))
