"""Signals sent to runs, of which none loses anything: the ones that stop it, in any order, at any time."""

import itertools
import os
import signal
import time
from pathlib import Path

import pytest

from harness.signals import STOPS
from tests.faults.test_kills import CONFIG, Moments, assert_ends_as
from tests.helpers import TrainingRun, finished


@pytest.fixture(autouse=True)
def folder(training_folder) -> None:
    Path("config.yaml").write_text(CONFIG)


def test_a_run_stopped_by_every_signal_in_turn_ends_as_one_never_stopped():
    """Each comes between a step's line of metrics and what is saved, one step after the last one's end."""
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

    def corpus(*arguments):
        signal.raise_signal(number)
        return read(*arguments)

    train.Corpus = corpus


def test_a_run_that_is_stopped_while_it_reads_its_corpus_leaves_nothing():
    run = TrainingRun("run", inject=receive_while_reading)
    assert run.wait() == 128 + signal.SIGTERM
    assert run.output() == "\nSIGTERM before the first step: nothing is lost, the same command starts again\n"
    assert not run.folder.exists()


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
