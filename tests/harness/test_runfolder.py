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


OURS = ("config.yaml", "metrics.jsonl", "ckpt.pt", "best.pt", "wandb/run.json", "diagnostics/kurtosis.json")


@pytest.fixture
def former(tmp_path):
    """A folder with a former run, and with files of somebody else's."""
    for name in (*OURS, "notes.md", "plots/mine.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("former")
    return tmp_path


def names_in(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


def test_clearing_removes_a_run_and_nothing_else(former):
    with RunFolder(former) as folder:
        assert run_files(former)
        with folder.cleared():
            assert names_in(former) == [".former", "notes.md", "plots"]
            (former / "config.yaml").write_text("new")
    assert names_in(former) == ["config.yaml", "notes.md", "plots"]
    assert (former / "config.yaml").read_text() == "new"
    assert (former / "plots" / "mine.png").exists()


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_cannot_begin_or_is_killed_then_takes_the_place_of_none(former, monkeypatch, killed):
    before = names_in(former)
    if killed:  # nothing of the process's own runs then
        monkeypatch.setattr(RunFolder, "_bring_back", lambda folder: None)

    def begin(folder: RunFolder):
        with folder.cleared():
            for name in ("config.yaml", "metrics.jsonl"):
                (former / name).write_text("new")
            raise UserError("wandb cannot go online")

    with RunFolder(former) as folder, pytest.raises(UserError):
        begin(folder)
    monkeypatch.undo()
    with RunFolder(former):
        assert names_in(former) == before
        assert all((former / name).read_text() == "former" for name in OURS)


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
