"""The smallest experiment of experiments/, remade from nothing by real processes."""

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from harness.distributed import LAUNCHER
from harness.errors import UserError
from harness.experiments import runner
from harness.experiments.claims import HELD, judge, load_claims
from harness.experiments.grid import ROOT, load_experiment
from harness.experiments.results import read_results
from harness.report.numbers import long_form
from scripts import run_experiment
from tests.processes import started, write_to

# Another vector width and another number of threads sum float32 in another order: measured on the processor of the
# committed table, its values then change by 1e-5 of themselves at most. Another seed changes most by some percent.
ROUNDING = 1e-3
OF_THE_CLOCK = ("train/tokens_per_second", "train/mfu")


def _program(words: list[str], environment: dict[str, str], log: str) -> None:
    os.setsid()
    write_to(log, "a")
    os.environ.update(environment, **{LAUNCHER: str(os.getppid())})
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    os.chdir(ROOT)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


class Forked(subprocess.Popen):
    """A cell's process. The first of each script begins as it does for a user, with three seconds of imports; the
    others are forked from a server that has imported them, and run the same script from its first line."""

    begun: ClassVar[set[str]] = set()

    def __init__(self, command: list[str], **options):
        script, self.forked = command[1], None
        if script not in self.begun:
            self.begun.add(script)
            options["env"] |= {"PYTHONPROFILEIMPORTTIME": "1"}
            super().__init__(command, **options)
            return
        self.forked = started(_program, command[1:], options["env"], options["stdout"].name)

    def poll(self) -> int | None:
        if not self.forked:
            return super().poll()
        self.returncode = self.forked.exitcode
        return self.returncode


@pytest.mark.slow
def test_the_smallest_experiment_comes_out_again(tmp_path, monkeypatch, capsys):
    """One test, since making it takes half a minute: workers that share the tests of a file would each make it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Forked}))
    command = ["experiments/smallest.yaml", "--out", str(tmp_path), "--jobs", "2"]
    assert run_experiment.main(command) == 0
    remade = tmp_path / "smallest"
    every_cell_is_an_ordinary_run_that_has_been_measured(remade)
    table_and_verdict_are_the_committed_ones(remade)
    a_diagnostic_does_not_import_the_compiler(remade)

    logs = {log.name: log.stat().st_size for log in (remade / "logs").iterdir()}
    assert run_experiment.main(command) == 0  # finished: passed over
    checkpoint = remade / "softmax_s2" / "ckpt.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:5000])
    capsys.readouterr()
    assert run_experiment.main(command) == 1  # damaged: told, and kept
    said = capsys.readouterr().out
    assert f"softmax_s2: not run: {checkpoint}" in said
    assert "1 of 6 cells are not done: softmax_s2" in said
    assert checkpoint.read_bytes() == whole[:5000]
    assert {log.name: log.stat().st_size for log in (remade / "logs").iterdir()} == logs


def every_cell_is_an_ordinary_run_that_has_been_measured(remade: Path) -> None:
    for variant in ("softmax", "sigmoid"):
        for seed in (1, 2, 3):
            cell = remade / f"{variant}_s{seed}"
            assert {"ckpt.pt", "best.pt", "config.yaml", "metrics.jsonl"} <= set(os.listdir(cell))
            found = json.loads((cell / "diagnostics" / "activation_kurtosis.json").read_text())
            assert (found["step"], found["config"]["normalizer"]) == (100, variant)
    facts = json.loads((remade / "experiment.json").read_text())
    assert facts["file"] == "experiments/smallest.yaml"


def a_diagnostic_does_not_import_the_compiler(remade: Path) -> None:
    """PyTorch's, which takes longer to import than PyTorch itself."""
    logs = [log.read_text().partition("$ python scripts/")[2] for log in (remade / "logs").iterdir()]
    (imports,) = [log for log in logs if "import time:" in log]
    assert "torch._dynamo" not in imports


def table_and_verdict_are_the_committed_ones(remade: Path) -> None:
    results = read_results(load_experiment(Path("experiments/smallest.yaml"), remade.parent))
    found = {row[:3]: row[3] for row in long_form(results, []) if row[2] not in OF_THE_CLOCK}
    with open("experiments/results/smallest/table.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["measure"] not in OF_THE_CLOCK]
    committed = {(row["variant"], int(row["seed"]), row["measure"]): float(row["value"]) for row in rows}
    assert found == pytest.approx(committed, rel=ROUNDING, abs=1e-9)
    (verdict,) = judge(results, load_claims(results.experiment))
    assert verdict.outcome == HELD
    assert "**Held:**" in Path("experiments/results/smallest/report.md").read_text()


def test_a_dry_run_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # what it sets stays as it is
    assert run_experiment.main(["experiments/smallest.yaml", "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "it decides the claim smallest_sink\n" in said
    assert "to train: 6 of 6 cells, 1,228,800 tokens" in said  # 6 × 100 steps × 32 × 64
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["experiments/none.yaml"], "no experiment file experiments/none.yaml"),
        (["experiments/smallest.yaml", "--jobs", "0"], "--jobs 0: at least 1"),
        (["configs/stdlib_softmax.yaml"], "an experiment has the keys base, config, .*, not 'model'"),
    ],
)
def test_a_mistake_is_one_line(arguments, problem, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=problem):
        run_experiment.main(arguments)
