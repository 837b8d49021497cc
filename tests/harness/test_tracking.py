"""Curves that stay right over kills and resumes, in metrics.jsonl and in wandb."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.tracking import Tracker


def config(wandb: str = "disabled"):
    return SimpleNamespace(
        tracking=SimpleNamespace(wandb=wandb, project="offbyone"),
        run=SimpleNamespace(name="a run"),
        to_dict=lambda: {"run": {"name": "a run"}},
    )


class FakeWandb:
    """Stands in for wandb.init: remembers the arguments and what is logged."""

    def __init__(self, monkeypatch):
        self.starts, self.steps = [], []
        monkeypatch.setattr("wandb.init", self.init)

    def init(self, **arguments):
        self.starts.append(arguments)
        return SimpleNamespace(log=lambda metrics, step: self.steps.append((step, metrics)), finish=lambda: None)


def session(folder: Path, resume_step: int | None, steps, wandb: str = "disabled", close: bool = True) -> None:
    """A training process that logs `steps`; one that is killed does not close."""
    tracker = Tracker(folder, config(wandb), resume_step)
    for step in steps:
        tracker.log(step, {"train/loss": step / 10})
    if close:
        tracker.close()


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder)]


# --- metrics.jsonl --------------------------------------------------------------------------------------------------


def test_a_line_is_on_the_disk_as_soon_as_it_is_logged(tmp_path):
    tracker = Tracker(tmp_path, config(), None)
    tracker.log(0, {"val/loss": 2.5, "val/perplexity": 12.0})
    assert lines(tmp_path) == [{"step": 0, "val/loss": 2.5, "val/perplexity": 12.0}]
    tracker.close()


def test_each_step_stands_there_once_after_any_number_of_resumes(tmp_path):
    session(tmp_path, None, range(0, 9), close=False)  # killed at 8, its checkpoint at 5
    session(tmp_path, 5, range(6, 8), close=False)  # killed at 7, before another checkpoint
    session(tmp_path, 5, range(6, 11))
    assert lines(tmp_path) == [{"step": step, "train/loss": step / 10} for step in range(11)]


def test_a_run_that_starts_afresh_keeps_no_former_line(tmp_path):
    session(tmp_path, None, range(5))
    session(tmp_path, None, range(2))
    assert steps(tmp_path) == [0, 1]


@pytest.mark.parametrize("rest", ['{"step": 6, "train/lo', "{", "\x00\x00\x00"])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path, rest):
    session(tmp_path, None, range(6))
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write(rest)
    session(tmp_path, 5, range(6, 8))
    assert steps(tmp_path) == list(range(8))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_a_value_that_is_not_finite_is_null(tmp_path, value):
    tracker = Tracker(tmp_path, config(), None)
    tracker.log(3, {"train/loss": value, "train/lr": 0.1})
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text  # which Python reads back, and no other JSON reader does
    assert "Infinity" not in text
    assert lines(tmp_path) == [{"step": 3, "train/loss": None, "train/lr": 0.1}]


# --- wandb ----------------------------------------------------------------------------------------------------------


def test_wandb_continues_the_same_run_and_never_sees_a_step_twice(tmp_path, monkeypatch):
    wandb = FakeWandb(monkeypatch)
    session(tmp_path, None, range(0, 9), "offline", close=False)
    session(tmp_path, 5, range(6, 8), "offline", close=False)  # killed before it got beyond the first
    session(tmp_path, 5, range(6, 12), "offline")
    assert [step for step, _ in wandb.steps] == list(range(12))
    assert len(wandb.starts) == 3
    assert len({start["id"] for start in wandb.starts}) == 1
    assert all(start["resume"] == "allow" for start in wandb.starts)
    assert steps(tmp_path) == list(range(12))


def test_a_line_that_was_cut_off_may_have_reached_wandb_no_more_than_once(tmp_path, monkeypatch):
    wandb = FakeWandb(monkeypatch)
    session(tmp_path, None, range(0, 6), "offline", close=False)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "trai')  # killed while it wrote: wandb, which comes second, has not seen step 6
    session(tmp_path, 4, range(5, 8), "offline")
    assert [step for step, _ in wandb.steps] == list(range(8))


def test_wandb_gets_the_finite_values_and_the_config(tmp_path, monkeypatch):
    wandb = FakeWandb(monkeypatch)
    tracker = Tracker(tmp_path, config("offline"), None)
    tracker.log(3, {"train/loss": math.nan, "train/lr": 0.1})
    assert wandb.steps == [(3, {"train/lr": 0.1})]
    (start,) = wandb.starts
    assert (start["mode"], start["project"], start["name"]) == ("offline", "offbyone", "a run")
    assert start["config"] == {"run": {"name": "a run"}}
    assert Path(start["dir"]) == tmp_path


@pytest.mark.parametrize(
    ("setting", "environment", "logged_in", "expected"),
    [
        ("offline", "online", True, "offline (as configured)"),
        ("disabled", "online", True, "disabled"),
        ("auto", "offline", True, "offline (WANDB_MODE)"),
        ("auto", "disabled", True, "disabled"),
        ("auto", None, True, "online (logged in)"),
        ("auto", None, False, "offline (not logged in)"),
    ],
)
def test_wandbs_mode_is_chosen_and_said(tmp_path, monkeypatch, capsys, setting, environment, logged_in, expected):
    wandb = FakeWandb(monkeypatch)
    monkeypatch.setattr("wandb.login", lambda **_: logged_in)
    monkeypatch.setattr("wandb.setup", lambda *_: None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    Tracker(tmp_path, config(setting), None).close()
    said, mode = capsys.readouterr().out, expected.split()[0]
    assert f"wandb: {expected}" in said
    assert {start["mode"] for start in wandb.starts} | {"disabled"} == {mode, "disabled"}
    assert (f"{tmp_path}/wandb" in said) == (mode != "disabled")  # where the run is, if there is one


@pytest.mark.slow
def test_the_real_wandb_writes_an_offline_run_that_a_resume_continues(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    session(tmp_path, None, (0, 5, 10), "offline")
    session(tmp_path, 5, (10, 15), "offline")
    logged, ids = [], set()
    for folder in sorted((tmp_path / "wandb").glob("offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        records = [json.loads(line) for line in output.splitlines()]
        ids |= {record["run"]["run_id"] for record in records if record["type"] == "run"}
        items = [record["history"]["item"] for record in records if record["type"] == "history"]
        logged += [(item["_step"], item["train/loss"]) for item in items]
    assert sorted(logged) == [(0, 0), (5, 0.5), (10, 1), (15, 1.5)]
    assert len(ids) == 1


# --- the run's folder -----------------------------------------------------------------------------------------------

# --- what is measured inside a model --------------------------------------------------------------------------------
