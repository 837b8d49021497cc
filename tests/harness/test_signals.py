"""Signals in this process, and a Ctrl-C while a program imports; tests/faults/test_signals.py sends them to runs."""

import ast
import os
import signal
import subprocess
import sys

import pytest

from harness import signals
from harness.signals import STOPS, TWICE, StopSignals, raise_on_ctrl_c
from tests.helpers import ROOT
from tests.processes import run_python

PROGRAMS = [ROOT / "train.py", *sorted((ROOT / "scripts").glob("*.py")), *sorted((ROOT / "data").glob("*/prepare.py"))]


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_ends_at_once_until_it_is_deferred_and_is_then_kept(number, capfd):
    former = signal.getsignal(number)
    with pytest.raises(SystemExit) as end, StopSignals(is_main=True):
        signal.raise_signal(number)
    assert end.value.code == 128 + number
    assert f"{number.name} before the first step: nothing is lost" in capfd.readouterr().err
    with StopSignals(is_main=True) as stop:
        stop.defer()
        assert stop.requested == 0
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == number  # the first counts
        said = capfd.readouterr().err
        assert said.count("finishing this step, then saving") == 1
        assert number.name in said
        if number != signal.SIGINT:
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) == former


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", TWICE])
def test_a_ctrl_c_that_a_launcher_passes_on_as_well_is_one(variable, monkeypatch):
    monkeypatch.setenv(variable, "none")
    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    with StopSignals(is_main=False) as stop:
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # does not disturb the end
    with StopSignals(is_main=False) as stop:
        stop.defer()
        for clock[0] in (100.0, 100.1, 100.9):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested == signal.SIGINT
        clock[0] = 101.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_ranks_are_silent_and_a_closed_terminal_is_no_error(capfd, monkeypatch):
    with StopSignals(is_main=False) as stop:
        stop.defer()
        signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err == ""

    def closed(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", closed)
    with StopSignals(is_main=True) as stop:
        stop.defer()
        signal.raise_signal(signal.SIGHUP)
        assert stop.requested == signal.SIGHUP


def test_a_hangup_that_nohup_ignores_stays_ignored(monkeypatch):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(is_main=True) as stop:
            signal.raise_signal(signal.SIGHUP)
            stop.defer()
            signal.raise_signal(signal.SIGHUP)
            assert stop.requested == 0
    finally:
        signal.signal(signal.SIGHUP, former)


def test_run_cli_gives_ctrl_c_its_exception_back():
    former = signal.getsignal(signal.SIGINT)
    try:
        for before, after in ((signal.SIG_DFL, signal.default_int_handler), (signal.SIG_IGN, signal.SIG_IGN)):
            signal.signal(signal.SIGINT, before)
            raise_on_ctrl_c()
            assert signal.getsignal(signal.SIGINT) == after
    finally:
        signal.signal(signal.SIGINT, former)


@pytest.fixture
def importing(tmp_path, monkeypatch):
    """Programs import a torch that receives a Ctrl-C."""
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nprint('went on')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.parametrize(
    "program", [("train.py",), ("-m", "harness.launch"), ("scripts/perplexity.py",), ("scripts/sample.py",)]
)
def test_a_ctrl_c_while_a_program_imports_ends_it_quietly(importing, program):
    done = run_python(*program)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_ctrl_c_is_an_exception_to_who_imports_the_project(importing):
    code = "try:\n    import harness.errors, torch\nexcept KeyboardInterrupt:\n    print('caught')"
    assert run_python("-c", code).stdout == "caught\n"


def test_a_program_that_ignores_ctrl_c_does_so_while_it_imports(importing):
    """A shell starts what runs in a script's background so."""
    ignoring = f"trap '' INT; exec {sys.executable} train.py"
    done = subprocess.run(["bash", "-c", ignoring], capture_output=True, text=True, cwd=ROOT)
    assert "went on" in done.stdout


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_program_imports_torch_before_harness(program):
    """It is the import of harness that lets a Ctrl-C end a program quietly."""
    names = []
    for node in ast.parse(program.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(str(node.module).partition(".")[0])
    assert "harness" in names
    assert "torch" not in names[: names.index("harness")]
