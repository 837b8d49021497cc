"""A run's folder: one process at a time, nothing left of a run that wrote nothing, nothing removed but the run."""

import contextlib
import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys

import pytest

from harness.config import Config, RunConfig
from harness.errors import UserError
from harness.resuming import checkpoint_to_resume
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


class Killed(BaseException):
    """Nothing of the process runs after it."""


CHANGES = ("rename", "unlink", "rmdir", "mkdir")  # all that changes a folder


def killed_at(monkeypatch, moment: int) -> None:
    """Of the next changes to folders only so many happen."""
    left = iter(range(moment))

    def or_killed(change):
        def changed(*arguments, **options):
            if next(left, None) is None:
                raise Killed
            return change(*arguments, **options)

        return changed

    for name in CHANGES:
        monkeypatch.setattr(os, name, or_killed(getattr(os, name)))


def begins(path, fails: bool) -> RunFolder:
    """A new run in the place of another, which fails or not."""
    folder = RunFolder(path)
    with contextlib.suppress(UserError), folder.cleared():
        for name in ("config.yaml", "metrics.jsonl"):
            (path / name).write_text("new")
        if fails:
            raise UserError("wandb cannot go online")
    return folder


@pytest.mark.parametrize("fails", [False, True])
def test_a_kill_at_any_moment_of_a_change_of_runs_leaves_one_of_them_whole(former, tmp_path, fails):
    """Also one while what an earlier kill left is put right."""
    runs = {"former": names_in(former), "new": ["config.yaml", "metrics.jsonl", "notes.md", "plots"]}
    found = []
    for first in itertools.count():
        second, killed = 7 * first % 12, 0
        path = tmp_path / str(first)
        shutil.copytree(former, path, ignore=lambda *_: {p.name for p in tmp_path.iterdir()} - set(runs["former"]))
        for moment, again in ((first, begins), (second, lambda path, _: RunFolder(path))):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("harness.runfolder.fcntl.flock", lambda *_: None)  # as after the end of the process
                killed_at(patch, moment)
                try:
                    os.close(again(path, fails)._lock)
                except Killed:
                    killed += 1
        with RunFolder(path):
            content = {p.read_text() for name in ("config.yaml", "metrics.jsonl") for p in [path / name]}
            (which,) = content
            assert names_in(path) == runs[which], (first, second)
            assert (path / "plots" / "mine.png").read_text() == "former"
            if which == "former":
                assert all((path / name).read_text() == "former" for name in OURS)
        found.append(which)
        if not killed:
            break
    assert len(found) > 12
    assert found[-1] == ("former" if fails else "new")
    assert set(found) == ({"former"} if fails else {"former", "new"})


def test_what_is_not_a_runs_stays(tmp_path):
    """A folder that was there and empty, temporary files of others, what .lock leads to."""
    run = tmp_path / "run"
    run.mkdir()
    with RunFolder(run):
        pass
    assert [*run.iterdir()] == []
    (run / "wandb").mkdir()
    (run / "diagnostics").mkdir()
    dead, alive, own = 2**22 + 1, os.getppid(), os.getpid()
    theirs = ("notes.tmp", "notes.12.tmp", "ckpt.pt.old.tmp", f"curves.png.{alive}.tmp", f"diagnostics/a.{alive}.tmp")
    ours = (
        *(f"{name}.{alive}.tmp" for name in ("ckpt.pt", "best.pt", "config.yaml", "metrics.jsonl")),
        *(f"{name}.{pid}.tmp" for name in ("curves.png", "wandb/run.json", "diagnostics/x.png") for pid in (dead, own)),
    )
    for name in (*theirs, *ours):
        (run / name).touch()
    with RunFolder(run):
        assert [name for name in theirs if not (run / name).exists()] == []
        assert [name for name in ours if (run / name).exists()] == []


@pytest.mark.parametrize("link", [os.symlink, os.link, None])
def test_a_lock_that_is_something_else_is_refused_and_kept(tmp_path, link):
    (tmp_path / "run").mkdir()
    lock, thesis = tmp_path / "run" / ".lock", tmp_path / "thesis.tex"
    thesis.write_text("mine")
    link(thesis, lock) if link else lock.write_text("mine")
    with pytest.raises(UserError, match=r"run/\.lock is not the lock of a run"):
        RunFolder(tmp_path / "run")
    assert thesis.read_text() == lock.read_text() == "mine"


@pytest.mark.parametrize("gone", ["vanished", "linked"])
def test_a_folder_that_has_gone_hides_no_error(tmp_path, gone):
    run = tmp_path / "run"

    def fail():
        with RunFolder(run):
            shutil.move(run, tmp_path / "elsewhere")
            if gone == "linked":
                run.symlink_to(tmp_path / "elsewhere")
            raise UserError("the run's own error")

    with pytest.raises(UserError, match="the run's own error"):
        fail()


def test_a_folder_that_has_gone_hides_no_error_of_a_run_that_begins_anew(former):
    def fail():
        with RunFolder(former) as folder, folder.cleared():
            shutil.rmtree(former)
            raise UserError("the run's own error")

    with pytest.raises(UserError, match="the run's own error"):
        fail()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run.*run\.out_dir"):
        RunFolder(tmp_path / "file" / "run")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL])
def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with RunFolder(tmp_path / "run") as folder:
        (folder.path / "metrics.jsonl").touch()
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert f"{tmp_path / 'run'} is on a file system without locks" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "ckpt.pt", "best.pt", "steps", "shards", "wandb"])
def test_a_folder_in_place_of_a_file_is_refused_before_anything_is_written(tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir()
    path.mkdir() if "." in name else path.touch()
    config = Config(run=RunConfig(name="run", out_dir=str(tmp_path)))
    with pytest.raises(UserError, match=rf"^{path} is no (file|folder), and a run writes one there: move it away, or"):
        checkpoint_to_resume(config)
    with contextlib.suppress(OSError):
        path.unlink()
        path.symlink_to("nothing")
        with pytest.raises(UserError, match=f"^{path} is no "):
            checkpoint_to_resume(config)
    config.training.resume, config.training.overwrite = "never", True  # which moves away whatever it is
    assert checkpoint_to_resume(config) is None


@pytest.mark.parametrize("name", [".moving", ".former", ".replaced"])
@pytest.mark.parametrize("target", [None, "nothing", "."])
def test_what_is_no_folder_of_an_interrupted_move_costs_nothing(tmp_path, name, target):
    """A file, a link to nothing and one to a folder."""
    (tmp_path / "ckpt.pt").write_text("a run")
    if target:
        (tmp_path / name).symlink_to(target)
    else:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="is no folder"), RunFolder(tmp_path):
        pass
    assert (tmp_path / "ckpt.pt").read_text() == "a run"
