"""Curves in wandb: the same run after a resume, each step once, and never in the training's way."""

import contextlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb

from harness.errors import UserError
from harness.tracking import Tracker, known_id, stored_steps
from tests.harness.test_tracking import config, session, steps
from tests.processes import run_python


class FakeWandb:
    """Stands in for wandb.init and for its server: remembers the arguments and what is logged, up to `fails_at`."""

    def __init__(self, monkeypatch, fails_at: float = math.inf):
        self.starts, self.steps, self.fails_at = [], [], fails_at
        monkeypatch.setattr("wandb.init", self.init)

    def init(self, **arguments):
        self.starts.append(arguments)
        seen = 1 + max((step for step, _ in self.steps), default=-1)
        return SimpleNamespace(log=self.log, finish=lambda: None, offline=False, starting_step=seen)

    def log(self, metrics, step, commit):
        if step >= self.fails_at:
            raise ConnectionResetError("Connection\nlost")
        self.steps.append((step, metrics))


def test_wandb_continues_the_same_run_and_never_sees_a_step_twice(tmp_path, monkeypatch):
    fake = FakeWandb(monkeypatch)
    session(tmp_path, None, range(0, 9), "offline", close=False)
    session(tmp_path, 5, range(6, 8), "offline", close=False)  # killed before it got beyond the first
    session(tmp_path, 5, range(6, 12), "offline")
    assert [step for step, _ in fake.steps] == list(range(12))
    assert len(fake.starts) == 3
    assert len({start["id"] for start in fake.starts}) == 1
    assert all(start["resume"] == "allow" for start in fake.starts)
    assert steps(tmp_path) == list(range(12))


def test_a_line_that_was_cut_off_may_have_reached_wandb_no_more_than_once(tmp_path, monkeypatch):
    fake = FakeWandb(monkeypatch)
    session(tmp_path, None, range(0, 6), "offline", close=False)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "trai')  # killed while it wrote: wandb, which comes second, has not seen step 6
    session(tmp_path, 4, range(5, 8), "offline")
    assert [step for step, _ in fake.steps] == list(range(8))


def test_wandb_gets_the_finite_values_and_the_config(tmp_path, monkeypatch):
    fake = FakeWandb(monkeypatch)
    tracker = Tracker(tmp_path, config("offline"), None)
    tracker.log(3, {"train/loss": math.nan, "train/lr": 0.1})
    assert fake.steps == [(3, {"train/lr": 0.1})]
    (start,) = fake.starts
    assert (start["mode"], start["project"], start["name"]) == ("offline", "offbyone", "a run")
    assert start["config"] == {"run": {"name": "a run"}}
    assert Path(start["dir"]) == tmp_path


@pytest.mark.parametrize(
    ("setting", "environment", "logged_in", "expected"),
    [
        ("offline", "online", True, "offline (as configured)"),
        ("disabled", "online", True, "disabled"),
        ("auto", "offline", True, "offline (WANDB_MODE)"),
        ("auto", "dryrun", True, "offline (WANDB_MODE)"),
        ("auto", "offlin", True, "offline (WANDB_MODE=offlin is no mode of wandb's)"),
        ("auto", " Disabled ", True, "disabled"),
        ("auto", "", True, "online (logged in)"),
        ("auto", "disabled", True, "disabled"),
        ("auto", None, True, "online (logged in)"),
        ("auto", None, False, "offline (not logged in)"),
    ],
)
def test_wandbs_mode_is_chosen_and_said(tmp_path, monkeypatch, capsys, setting, environment, logged_in, expected):
    fake = FakeWandb(monkeypatch)
    monkeypatch.setattr("wandb.login", lambda **_: logged_in)
    monkeypatch.setattr("wandb.setup", lambda *_: None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    Tracker(tmp_path, config(setting), None).close()
    said, mode = capsys.readouterr().out, expected.split()[0]
    assert f"wandb: {expected}" in said
    assert {start["mode"] for start in fake.starts} | {"disabled"} == {mode, "disabled"}
    assert (f"{tmp_path}/wandb" in said) == (mode != "disabled")  # where the run is, if there is one


def test_an_empty_variable_of_wandbs_says_nothing(tmp_path, monkeypatch, capsys):
    """wandb itself takes no empty WANDB_SILENT, among others, and would not start."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", " ")
    session(tmp_path, None, range(2), "offline")
    assert "wandb: offline (as configured)" in capsys.readouterr().out
    assert "WANDB_SILENT" not in os.environ


def test_a_resume_sends_what_wandb_lacks_of_the_lines_that_it_keeps(tmp_path, monkeypatch):
    fake = FakeWandb(monkeypatch)
    session(tmp_path, None, range(0, 9), "online", close=False)
    del fake.steps[4:]  # lost with the process, which was killed
    session(tmp_path, 6, range(7, 12), "online")
    assert fake.steps == [(step, {"train/loss": step / 10}) for step in range(12)]


def test_a_wandb_that_dies_in_mid_run_is_said_once_and_stops_nothing(tmp_path, monkeypatch, capsys):
    FakeWandb(monkeypatch, fails_at=3)
    session(tmp_path, None, range(6), "online")
    assert steps(tmp_path) == list(range(6))
    said = [line for line in capsys.readouterr().out.splitlines() if "stopped" in line]
    assert said == [f"wandb: stopped: Connection lost; training goes on, the curves are in {tmp_path}/metrics.jsonl"]


@pytest.mark.parametrize("broken", ["no wandb", "no start"])
def test_a_wandb_that_cannot_start_is_an_error_only_where_online_was_asked_for(tmp_path, monkeypatch, capsys, broken):
    if broken == "no wandb":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        monkeypatch.setattr("wandb.login", lambda **_: False)
        monkeypatch.setattr("wandb.init", lambda **_: int("padded key"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for setting in ("auto", "offline"):
        session(tmp_path / setting, None, range(3), setting)
        assert steps(tmp_path / setting) == [0, 1, 2]
        assert capsys.readouterr().out.count("wandb: cannot start: ") == 1
    with pytest.raises(UserError, match=r"tracking\.wandb: online: "):
        session(tmp_path / "online", None, range(3), "online")


@pytest.mark.parametrize(("setting", "patience"), [("auto", 20), ("online", 90)])
def test_a_server_that_does_not_answer_holds_nothing_up(tmp_path, monkeypatch, capsys, setting, patience):
    """By the limits that wandb is given; faults/test_logging.py has a server that does not answer."""
    fake, ended = FakeWandb(monkeypatch), []

    def init(mode, **arguments):
        if mode == "online":
            fake.starts.append(arguments)
            raise TimeoutError("Timed out initializing run")
        assert ended  # the service does not start a run anew under an id that it still holds
        return fake.init(**arguments)

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setattr("wandb.teardown", lambda: ended.append(True))
    monkeypatch.setattr("wandb.login", lambda **_: True)
    monkeypatch.setattr("wandb.setup", lambda *_: None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with contextlib.nullcontext() if setting == "auto" else pytest.raises(UserError, match="Timed out"):
        session(tmp_path, None, range(3), setting)
        assert "wandb: offline (cannot go online: Timed out initializing run)" in capsys.readouterr().out
        assert steps(tmp_path) == [step for step, _ in fake.steps] == [0, 1, 2]
    settings = fake.starts[0]["settings"]
    assert (settings.init_timeout, settings.finish_timeout, settings.finish_timeout_raises) == (patience, 60, True)


def test_a_wandb_folder_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    FakeWandb(monkeypatch)
    (tmp_path / "wandb").write_text("a file in the way")
    session(tmp_path, None, range(3), "online")
    assert steps(tmp_path) == [0, 1, 2]
    assert f"wandb: {tmp_path}/wandb cannot be written (File exists)" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_run_json_that_cannot_be_read_costs_no_more_than_the_id(tmp_path, monkeypatch, content):
    fake = FakeWandb(monkeypatch)
    (tmp_path / "wandb" / "run-2026_1-abcd").mkdir(parents=True)
    (tmp_path / "wandb" / "run.json").write_text(content)
    session(tmp_path, None, range(2), "online")
    (tmp_path / "wandb" / "run.json").write_text(content)
    (tmp_path / "wandb" / "run-2026_1-abcd" / "run-abcd.wandb").touch()
    session(tmp_path, 1, range(2, 4), "online")
    assert fake.starts[0]["id"]
    assert fake.starts[1]["id"] == "abcd"  # what wandb's own files are named after
    assert steps(tmp_path) == [0, 1, 2, 3]


def stored(folder: Path) -> set[int]:
    """The steps in wandb's files, once its service, which writes them on its own time, has ended."""
    wandb.teardown()
    return stored_steps(folder, known_id(folder))


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory) -> Path:
    """A run of the real wandb, offline, of 400 steps: more than a block of its file."""
    folder = tmp_path_factory.mktemp("offline")
    session(folder, None, range(400), "offline")
    wandb.teardown()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kept", [1.0, 0.7, 0.0])
def test_a_hole_in_an_offline_run_is_filled_by_a_resume(offline_run, tmp_path, kept):
    """As where a kill takes with it what wandb has not written yet: the end of its file."""
    folder = tmp_path / "run"
    shutil.copytree(offline_run, folder, symlinks=True)
    (made,) = folder.glob("wandb/offline-run-*")  # named after the second, which may not be over yet
    (file,) = made.rename(made.with_name("offline-run-20260101_000000")).glob("run-*.wandb")
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    left = stored(folder)
    assert left == set(range(len(left)))
    assert len(left) == pytest.approx(400 * kept, abs=8)  # besides steps it has some records of other kinds
    session(folder, 395, range(396, 403), "offline")
    assert stored(folder) == set(range(403))
    file.unlink()
    assert stored(folder) == set(range(403)) - left  # no step twice


LOGS = """
import os, signal, subprocess, sys
from pathlib import Path
from harness.config import Config, TrackingConfig
from harness.tracking import Tracker
tracker = Tracker(Path(sys.argv[1]), Config(tracking=TrackingConfig(wandb="offline")), None)
for step in range(200):
    tracker.log(step, {"train/loss": step / 10})
"""
IS_KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
LOSES_ITS_SERVICE = """
for pid in subprocess.check_output(["pgrep", "-P", str(os.getpid()), "wandb-core"], text=True).split():
    os.kill(int(pid), signal.SIGKILL)
for step in range(200, 205):
    tracker.log(step, {})
tracker.close()
"""


@pytest.mark.slow
def test_a_killed_process_leaves_no_hole_in_an_offline_run(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # the process is to have a service of its own
    run_python("-c", LOGS + IS_KILLED, tmp_path)
    assert steps(tmp_path) == list(range(200))
    session(tmp_path, 150, range(151, 260), "offline")
    assert stored(tmp_path) == set(range(260))


@pytest.mark.slow
def test_the_real_wandbs_service_may_be_killed_in_mid_run(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    done = run_python("-c", LOGS + LOSES_ITS_SERVICE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("wandb: stopped: ") == 1
    assert steps(tmp_path) == list(range(205))


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


@pytest.mark.parametrize(("written", "said"), [([2, 3], ""), ([3], ""), ([2], "lacks 1 steps")])
def test_a_service_that_still_writes_is_waited_for(written, said, tmp_path, monkeypatch, capsys):
    """On a busy machine it has said that it is done before all of the steps are in its file."""
    fake = FakeWandb(monkeypatch)
    monkeypatch.setattr(
        "wandb.init", lambda **how: SimpleNamespace(**vars(fake.init(**how)) | {"offline": True}, id="x")
    )
    there = itertools.chain(written, itertools.repeat(written[-1]))
    monkeypatch.setattr("harness.tracking.stored_steps", lambda *_: set(range(next(there))))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    session(tmp_path, None, range(3), "offline")
    assert said in capsys.readouterr().out if said else "lacks" not in capsys.readouterr().out
