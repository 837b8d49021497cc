"""A run's folder: one process at a time, nothing left of a run that wrote nothing, nothing removed but the run."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from harness.errors import UserError
from harness.runfolder import RunFolder, run_files
from tests.helpers import ROOT

HOLD = "import sys, pathlib, time; from harness.runfolder import RunFolder, run_files; "


HOLD += "folder = RunFolder(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_which_one_holds_the_folder(tmp_path, holder):
    with pytest.raises(UserError) as error:
        RunFolder(tmp_path / "run")
    assert str(holder.pid) in str(error.value)
    assert str(tmp_path / "run") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_killed_process_holds_no_folder(tmp_path, holder):
    (tmp_path / "run" / "ckpt.pt.123.tmp").touch()  # left by the process, killed while it wrote
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunFolder(tmp_path / "run"):
        assert not (tmp_path / "run" / "ckpt.pt.123.tmp").exists()


def test_the_folder_is_free_again_after_its_context(tmp_path):
    path = tmp_path / "a" / "b"
    with RunFolder(path):
        (path / "config.yaml").touch()
        with pytest.raises(UserError, match=str(os.getpid())):
            RunFolder(path)
    with RunFolder(path) as folder:
        assert run_files(folder.path)


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path):
    with RunFolder(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()


def test_clearing_removes_a_run_and_nothing_else(tmp_path):
    with RunFolder(tmp_path) as folder:
        assert not run_files(folder.path)
        ours = ("config.yaml", "metrics.jsonl", "ckpt.pt", "best.pt", "wandb/run.json", "diagnostics/kurtosis.json")
        for name in (*ours, "notes.md", "plots/mine.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert run_files(folder.path)
        folder.clear()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == ["notes.md", "plots"]
    assert (tmp_path / "plots" / "mine.png").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run.*run\.out_dir"):
        RunFolder(tmp_path / "file" / "run")


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with RunFolder(tmp_path / "run") as folder:
        (folder.path / "metrics.jsonl").touch()
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert f"{tmp_path / 'run'} is on a file system without locks" in capsys.readouterr().out
