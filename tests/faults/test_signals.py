"""Signals sent to runs, of which none loses anything: the ones that stop it, in any order, at any time."""

import fcntl
import itertools
import os
import signal
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.signals import STOPS
from tests.faults.test_kills import CONFIG, Moments, assert_ends_as, leftovers
from tests.processes import TrainingRun, finished


@pytest.fixture(autouse=True)
def folder(training_folder) -> None:
    Path("config.yaml").write_text(CONFIG)
    Path("out").mkdir()


def test_a_run_stopped_by_every_signal_in_turn_ends_as_one_never_stopped():
    """Each signal comes between a step's line of metrics and its save, in the first step after the last stop."""
    whole = finished("whole")
    for step, number in enumerate(STOPS):
        run = TrainingRun("stopped", signal_at=(max(2 * step - 1, 0), number))
        assert run.wait() == 128 + number, run.output()
        assert "Traceback" not in run.output()
        if step == 0:
            assert "SIGINT before the first step: nothing is lost" in run.output()
            assert not (run.folder / "ckpt.pt").exists()
        else:
            assert f"stopped at step {2 * step} of 12" in run.output()
            assert run.checkpoint()["step"] == 2 * step
    assert_ends_as(whole, finished("stopped"))


def receive_while_reading(number: int = signal.SIGTERM) -> None:
    import train

    read = train.Corpus

    def corpus(*arguments, **options):
        signal.raise_signal(number)
        return read(*arguments, **options)

    train.Corpus = corpus


def test_a_run_that_is_stopped_while_it_reads_its_corpus_leaves_nothing():
    run = TrainingRun("run", inject=receive_while_reading)
    assert run.wait() == 128 + signal.SIGTERM
    assert run.output() == "\nSIGTERM before the first step: nothing is lost, the same command starts again\n"
    assert not run.folder.exists()


@dataclass
class OnATerminal(Moments):
    """A run that leads a terminal's session, as a shell does: it gets a SIGHUP when the terminal is closed."""

    terminal: str = ""

    def __call__(self) -> None:
        super().__call__()
        os.setsid()
        descriptor = os.open(self.terminal, os.O_RDWR)
        fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(descriptor, number)
            setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))  # the former may stand at a file


def test_a_run_whose_terminal_is_closed_saves():
    whole = finished("whole")
    ours, theirs = os.openpty()
    run = TrainingRun("run", inject=OnATerminal(Path("out/run"), pause=0.01, terminal=os.ttyname(theirs)))
    run.wait_for_step(3)
    os.close(theirs)
    os.close(ours)
    assert run.wait() == 128 + signal.SIGHUP
    assert run.checkpoint()["step"] == run.metrics()[-1]["step"] < 12
    assert_ends_as(whole, finished("run"))


# --- at any write -----------------------------------------------------------------------------------------------------


def assert_ends_at_once(whole: TrainingRun, moment: str, numbers: tuple[int, ...]) -> None:
    """The run ends with the status of the last of these signals, without a traceback, and can be continued."""
    name = f"stopped at {moment}".replace("/", " ")
    run = TrainingRun(name, inject=Moments(Path("out") / name, stop_at=moment, signals=numbers))
    assert run.wait() == 128 + numbers[-1], run.output()
    assert "Traceback" not in run.output()
    assert not leftovers(run.folder)
    assert_ends_as(whole, finished(name))


TWICE = (signal.SIGINT, signal.SIGINT)


def test_ctrl_c_twice_while_a_checkpoint_is_written_ends_at_once():
    assert_ends_at_once(finished("whole"), "write ckpt.pt.tmp 3", TWICE)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(4))
def test_what_ends_a_run_at_once_does_so_at_any_write(part):
    whole = TrainingRun("whole", inject=Moments(Path("out/whole"), log=Path("moments")))
    assert whole.wait() == 0
    moments = Path("moments").read_text().splitlines()
    first_saved = moments.index("remove ckpt.pt.tmp 1")
    for i, moment in [*enumerate(moments)][part::4]:
        assert_ends_at_once(whole, moment, TWICE if i > first_saved else (signal.SIGTERM,))


# --- in any order -----------------------------------------------------------------------------------------------------

FOUR = (signal.SIGINT, signal.SIGTERM, signal.SIGSTOP, signal.SIGCONT)
ORDERS = [*itertools.permutations(FOUR)]


@pytest.mark.parametrize(
    "order",
    [pytest.param(order, marks=[] if i == 7 else pytest.mark.faults) for i, order in enumerate(ORDERS)],
    ids=lambda order: ", ".join(number.name.removeprefix("SIG") for number in order),
)
def test_signals_in_any_order_lose_nothing(order):
    whole = finished("whole")
    run = TrainingRun("signals", inject=Moments(Path("out/signals"), pause=0.01))
    run.wait_for_step(3)
    for number in order:
        os.kill(run.process.pid, number)
        time.sleep(0.003)
    os.kill(run.process.pid, signal.SIGCONT)  # where SIGSTOP was the last
    assert run.wait() in (128 + signal.SIGINT, 128 + signal.SIGTERM), run.output()
    assert "Traceback" not in run.output()
    assert run.checkpoint()["step"] == run.metrics()[-1]["step"]  # nothing at all is lost
    assert_ends_as(whole, finished("signals"))
