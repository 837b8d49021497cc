"""The schedule of cells: who waits for whom, what a failure takes with it, and what is run again. The processes are
stand-ins here; tests/scripts/test_run_experiment.py runs real ones."""

import json
import os
import signal
import threading
import time

import pytest
import yaml

from harness.distributed import LAUNCHER
from harness.errors import UserError
from harness.experiments import runner
from harness.experiments.grid import Experiment, load_experiment
from harness.experiments.runner import Job, Schedule, clock, run_experiment
from tests.helpers import ROOT


@pytest.fixture
def processes(monkeypatch, experiment):
    """What each cell's processes do: a list of scripts, by the cell's name; unless told otherwise, nothing, for long
    enough that two run at once."""
    scripts = {cell.name: ["import time; time.sleep(0.15)"] for cell in experiment.cells}
    monkeypatch.setattr(runner, "trained", lambda cell: False)

    def commands(experiment, cell):
        return [(["-c", s, "--out"], experiment.folder / "perplexity.json") for s in scripts[cell.name][1:]]

    def plan(job):
        first = [(["-c", scripts[job.cell.name][0]], None)]
        yield from commands(job.experiment, job.cell) if job.measures else first

    monkeypatch.setattr(runner, "to_measure", commands)
    monkeypatch.setattr(Job, "_plan", plan)
    return scripts


def spans(experiment: Experiment, processes: dict) -> dict[str, tuple[float, float]]:
    """Cell → when its process began and ended, of those that were `noting` it."""
    return {
        name: tuple(map(float, (experiment.folder / name).read_text().split()))
        for name in processes
        if (experiment.folder / name).exists()
    }


def noting(experiment: Experiment, name: str) -> str:
    path = str(experiment.folder / name)
    return f"import time; t = time.time(); time.sleep(0.2); open({path!r}, 'w').write(f'{{t}} {{time.time()}}')"


def test_cells_run_as_many_at_a_time_as_asked_and_after_those_that_they_need(experiment, processes):
    for name in processes:
        processes[name] = [noting(experiment, name)]
    assert Schedule(experiment, jobs=2).run() == 0
    found = spans(experiment, processes)
    assert len(found) == 6
    for seed in (1, 2):
        assert found[f"b_s{seed}"][0] >= found[f"a_s{seed}"][1]
    at_once = [sum(a <= begin < b for a, b in found.values()) for begin, _ in found.values()]
    assert max(at_once) == 2


def test_a_failed_cell_is_told_with_its_last_line_and_takes_along_only_those_that_need_it(
    experiment, processes, capsys
):
    processes["a_s1"] = ["import sys; print('more'); sys.exit('error: the disk is full')"]
    assert Schedule(experiment, jobs=2).run() == 1
    said = capsys.readouterr().out
    assert "a_s1: -c: the disk is full; " in said
    assert "b_s1: not run: a_s1 is not trained; " in said
    assert said.count("done in") == 4
    assert "2 of 6 cells are not done: a_s1, b_s1" in said.replace("b_s1, a_s1", "a_s1, b_s1")
    assert "more" in (experiment.folder / "logs" / "a_s1.log").read_text()


def test_a_diagnostic_that_fails_on_one_cell_leaves_its_other_diagnostics_and_cells_alone(
    experiment, processes, capsys
):
    done = experiment.folder / "done"
    processes["a_s1"] = ["pass", "raise SystemExit('error: no attention to measure')", f"open({str(done)!r}, 'w')"]
    assert Schedule(experiment, jobs=2).run() == 1
    assert done.exists()
    said = capsys.readouterr().out
    assert "a_s1: -c: no attention to measure" in said
    assert said.count("done in") == 5


def test_a_process_ended_by_a_signal_is_told_by_its_name(experiment, processes, capsys):
    processes["c_s2"] = ["import os; os.kill(os.getpid(), 9)"]
    assert Schedule(experiment, jobs=2).run() == 1
    assert "c_s2: -c: ended by SIGKILL" in capsys.readouterr().out


def test_a_cell_may_be_compared_with_one_that_starts_from_it_and_is_trained_whatever_that_one_does(
    experiment, processes, capsys, monkeypatch
):
    monkeypatch.setattr(Schedule, "_needs", lambda self, cell: {"b"} if cell.variant == "a" else set())
    for name in processes:
        processes[name] = [noting(experiment, name)]
    processes["a_s1"] = ["pass", noting(experiment, "measured")]
    processes["b_s2"] = ["import sys; sys.exit('no')"]
    assert Schedule(experiment, jobs=2).run() == 1
    found = spans(experiment, {**processes, "measured": []})
    assert found["measured"][0] > found["b_s1"][1]
    said = capsys.readouterr().out
    assert "b_s2: -c: no; " in said
    assert "a_s2: not measured: b_s2 is not trained; " in said
    assert "2 of 6 cells are not done: a_s2, b_s2" in said


def test_a_cell_waits_for_those_that_its_diagnostics_compare_it_with(tmp_path):
    grid = {"question": "?", "base": str(ROOT / "configs" / "backcopy_softmax.yaml"), "seeds": [1]}
    grid |= {
        "variants": {"a": None, "b": {"training": {"init_from": "@a"}}, "c": None},
        "diagnostics": {"compare_kl": {"reference": "@b", "variants": ["a"]}},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    experiment = load_experiment(tmp_path / "grid.yaml", tmp_path)
    schedule = Schedule(experiment, jobs=1)
    assert {cell.variant: schedule._needs(cell) for cell in experiment.cells} == {"a": {"b"}, "b": set(), "c": set()}


def test_whatever_ends_the_schedule_leaves_no_process_behind(experiment, processes, monkeypatch):
    lives = experiment.folder / "lives"
    processes["a_s1"] = ["pass", "pass"]
    processes["a_s2"] = [f"import time; time.sleep(3); open({str(lives)!r}, 'w')"]

    def break_down(path, text):
        raise ZeroDivisionError

    monkeypatch.setattr(runner, "write_text", break_down)
    schedule = Schedule(experiment, jobs=2)
    with pytest.raises(ZeroDivisionError):
        schedule.run()
    assert sorted(job._process.wait() for job in schedule.running.values()) == [-signal.SIGTERM, 0]
    assert not lives.exists()


def test_a_second_runner_in_the_same_folder_is_refused(experiment, processes, monkeypatch):
    monkeypatch.setattr(runner, "prepare_corpora", lambda experiment: run_experiment(experiment, 1, ""))
    with pytest.raises(UserError, match=r"another run_experiment.py is working in .*grid: wait for it"):
        run_experiment(experiment, 1, "")


@pytest.mark.parametrize(("visible", "names"), [(None, {"0", "1"}), ("5,GPU-7", {"5", "GPU-7"})])
def test_cells_run_one_a_gpu_as_a_group_of_wandbs_and_know_their_launcher(
    experiment, processes, monkeypatch, visible, names
):
    """PyTorch would not start here with these GPUs, so only the processes' environment is looked at."""
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(runner.torch.cuda, "get_device_name", lambda i: f"card {i}")
    monkeypatch.setattr(runner, "prepare_corpora", lambda experiment: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name in processes:
        keys = "CUDA_VISIBLE_DEVICES", "WANDB_RUN_GROUP", LAUNCHER
        processes[name] = [f"import os, time; time.sleep(0.1); print([os.environ[key] for key in {keys}])"]
    assert run_experiment(experiment, None, "the command") == 0
    logs = [(experiment.folder / "logs" / f"{name}.log").read_text().splitlines()[-1] for name in processes]
    assert set(logs) == {str([name, "grid", str(os.getpid())]) for name in names}
    assert json.loads((experiment.folder / "experiment.json").read_text())["machine"]["gpus"] == "card 0, card 1"
    with pytest.raises(UserError, match="--jobs 3: there are 2 GPUs"):
        run_experiment(experiment, 3, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_an_interruption_lets_the_running_cells_save_and_starts_no_others(
    experiment, processes, capsys, monkeypatch, number
):
    saved = experiment.folder / "saved"
    waits = f"""
import signal, sys, time
def save(*_): open({str(saved)!r}, "w"); sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""
    for name in processes:
        processes[name] = [waits]
    monkeypatch.setattr(runner, "prepare_corpora", lambda experiment: None)

    def interrupt() -> None:
        log = experiment.folder / "logs" / "a_s1.log"
        while not (log.exists() and log.read_text().endswith("ready\n")):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    threading.Thread(target=interrupt).start()
    assert run_experiment(experiment, 1, "") == 128 + number
    assert saved.exists()
    assert sorted(path.stem for path in (experiment.folder / "logs").iterdir()) == ["a_s1"]
    assert "stopped with 0 of 6 cells: the same command continues" in capsys.readouterr().out
    assert signal.getsignal(number) == handler


def test_time_is_shown_in_hours_minutes_and_seconds():
    assert [clock(seconds) for seconds in (0, 61.9, 3 * 3600 + 59)] == ["0:00:00", "0:01:01", "3:00:59"]
